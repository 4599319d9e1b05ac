"""Tensors that are wrong - not finite, of another type, on another device, none at all - in every public function that takes some.

A row of :data:`FUNCTIONS` is a call that works. One tensor after the other is spoilt; then the function says so in one line, or its
answer is honest: not finite where a value was not, equal to that of the right type where another type can be converted.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import generator, toy_data
from torch import Tensor

from lib import augment
from lib.analysis import spectrum
from lib.data import Data
from lib.distill import distill
from lib.evaluate import evaluate, protocol
from lib.formation import mosaic, tiles
from lib.kernels import closed_form, conv, fc, feature_maps, ridge
from lib.match import attention, barycenter, features, ipm, mmd, style, subspace, transport
from lib.methods import method
from lib.select import gradmatch, greedy, kmeans, scores, similarity
from lib.select.subset import real_set
from lib.synset import SyntheticSet
from lib.system.errors import CompanionError
from lib.system.tensors import check_tensor

G = generator(7)


def rand(*size: int) -> Tensor:
    return torch.rand(*size, generator=G) + 0.1


REAL, SYN, MAPS, X = rand(2, 6, 4), rand(2, 6, 4), rand(2, 5, 3, 4, 4), rand(4, 3, 8, 8)
K = rand(5, 3).double()
K_SS, K_TS = K @ K.T + torch.eye(5), rand(7, 5).double()
Y_S, Y_T = rand(5, 3).double(), rand(7, 3).double()
P, Q, COST = rand(6, 3), rand(5, 3), rand(6, 5)
U, LOGITS, PER_IMAGE = rand(4), rand(9, 3), rand(2, 3)

# name -> (function, arguments that work)
FUNCTIONS = {
    "features.class_mean": (features.class_mean, [REAL, SYN]),
    "features.paired": (features.paired, [REAL, SYN]),
    "features.discrimination": (features.discrimination, [REAL, SYN]),
    "mmd.squared_distances": (mmd.squared_distances, [REAL, SYN]),
    "mmd.distances": (mmd.distances, [REAL, SYN]),
    "mmd.median_distance": (mmd.median_distance, [REAL, SYN]),
    "mmd.mmd": (mmd.mmd, [REAL, SYN]),
    "transport.cost_matrix": (transport.cost_matrix, [P, Q]),
    "transport.wasserstein": (transport.wasserstein, [REAL, SYN]),
    "transport.wasserstein_dual": (transport.wasserstein_dual, [REAL, SYN]),
    "transport.sinkhorn_divergence": (transport.sinkhorn_divergence, [REAL, SYN]),
    "transport.bures": (transport.bures, [REAL, SYN]),
    "transport.sliced": (transport.sliced, [REAL, SYN, torch.eye(4)]),
    "barycenter.barycenter": (barycenter.barycenter, [rand(12, 3), 2, "uniform", rand(2, 3)]),
    "barycenter.optimal_weights": (barycenter.optimal_weights, [rand(12, 3), rand(2, 3)]),
    "ipm.metrics": (ipm.metrics, [REAL, SYN, torch.eye(4)]),
    "style.mean_gram": (style.mean_gram, [MAPS]),
    "style.gram_distance": (style.gram_distance, [MAPS, MAPS + 1]),
    "style.moment_distance": (style.moment_distance, [MAPS, MAPS + 1]),
    "style.neighbour_diversity": (style.neighbour_diversity, [REAL, 2]),
    "attention.attention_map": (attention.attention_map, [MAPS, 4]),
    "subspace.spectrum": (subspace.spectrum, [P]),
    "ridge.regularised": (ridge.regularised, [K_SS, 0.1]),
    "ridge.solve": (ridge.solve, [K_SS, Y_S]),
    "ridge.predict": (ridge.predict, [K_TS, K_SS, Y_S, 0.1]),
    "ridge.label_solve": (ridge.label_solve, [K_TS, K_SS, Y_T, 0.1]),
    "ridge.mse": (ridge.mse, [Y_S, Y_S + 1]),
    "ridge.lead": (ridge.lead, [Y_S]),
    "closed_form.regularised_pinv": (closed_form.regularised_pinv, [K, 0.1]),
    "closed_form.student": (closed_form.student, [K.T, Y_S.T, 0.1]),
    "conv.convolutional": (conv.convolutional, [X, X + 1, "ccf"]),
    "fc.fully_connected": (fc.fully_connected, [X.flatten(1), X.flatten(1) + 1]),
    "feature_maps.conjugate_kernel": (feature_maps.conjugate_kernel, [P, Q]),
    "spectrum.intrinsic_dimension": (spectrum.intrinsic_dimension, [rand(20, 3)]),
    "greedy.herding": (greedy.herding, [rand(9, 4), 3]),
    "greedy.k_center": (greedy.k_center, [rand(9, 4), 3]),
    "greedy.contextual_diversity": (greedy.contextual_diversity, [LOGITS, 3]),
    "scores.confidence": (scores.confidence, [LOGITS]),
    "scores.negative_entropy": (scores.negative_entropy, [LOGITS]),
    "scores.margin": (scores.margin, [LOGITS]),
    "scores.neighbours": (scores.neighbours, [rand(9, 4), 3]),
    "scores.best": (scores.best, [rand(9), 3]),
    "kmeans.k_means": (kmeans.k_means, [rand(2, 9, 3), torch.ones(2, 9, dtype=torch.bool), rand(2, 4, 3)]),
    "gradmatch.non_negative": (gradmatch.non_negative, [K_SS, rand(5).double(), 0.5]),
    "similarity.dense": (similarity.dense, [K_SS]),
    "augment.brightness": (augment.brightness, [X, U]),
    "augment.saturation": (augment.saturation, [X, U]),
    "augment.contrast": (augment.contrast, [X, U]),
    "augment.scale": (augment.scale, [X, U + 0.5, U + 0.5]),
    "augment.rotate": (augment.rotate, [X, U]),
    "augment.cutmix": (
        lambda x: augment.cutmix(x, torch.tensor([[1, 0, 3, 2]]), U[None, :3]),
        [X[None]],
    ),  # draws are ours
    "mosaic.expand": (mosaic.expand, [X, 2]),
    "mosaic.shrink": (mosaic.shrink, [X, 2]),
    "tiles.enlarged_tiles": (tiles.enlarged_tiles, [X, 2]),
}


def spoilt(value: Tensor, how: str):
    """The tensor as a user might pass it by mistake."""
    if how == "not finite":
        value = value.clone()
        value[tuple(side // 2 for side in value.shape)] = torch.nan
        return value
    return {
        "bytes": lambda: (value * 10).to(torch.uint8),
        "whole": lambda: (value * 10).long(),
        "another float": lambda: value.to(torch.float32 if value.dtype == torch.float64 else torch.float64),
        "another device": lambda: value.to("meta"),
        "a list": lambda: value.tolist(),
        "an array": lambda: value.numpy(),
        "complex": lambda: value.to(torch.complex64),
    }[how]()


def leaves(result) -> list[Tensor]:
    """The floating point tensors in what a function returned."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        result = list(result.values())
    if hasattr(result, "__dataclass_fields__"):
        result = list(vars(result).values())
    return [leaf for one in result for leaf in leaves(one)] if isinstance(result, (list, tuple)) else []


HOW = ("not finite", "bytes", "whole", "another float", "another device", "a list", "an array", "complex")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_wrong_tensor_is_refused_or_handled(name, how):
    function, arguments = FUNCTIONS[name]
    function(*arguments)
    for i, value in enumerate(arguments):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        wrong = spoilt(value, how)
        try:
            found = function(*arguments[:i], wrong, *arguments[i + 1 :])
        except CompanionError as error:
            assert "\n" not in str(error) and len(str(error)) < 300
            continue
        if how == "not finite":
            assert any(
                not leaf.isfinite().all() for leaf in leaves(found) if leaf.is_floating_point()
            ) or callable(found)
            continue
        assert how not in ("another device", "complex"), f"argument {i} was taken"
        right = torch.as_tensor(wrong).to(value.dtype)
        want = function(*arguments[:i], right, *arguments[i + 1 :])
        for mine, theirs in zip(leaves(found), leaves(want), strict=True):
            torch.testing.assert_close(mine, theirs, check_dtype=False, rtol=1e-3, atol=1e-5)


# -- sets, data, evaluation ------------------------------------------------------------------------------------------------

DATA = toy_data()
SMALL = protocol("cpu-small", network="convnet-d2-w4", epochs=1)
SET = real_set(DATA.train, torch.arange(6))
DM = method("dm")(iterations=1, real_batch=4, network="convnet-d2-w4")


def refused(call, *words) -> None:
    with pytest.raises(CompanionError) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said and all(word in said for word in words), said


@pytest.mark.parametrize("how", ["not finite", "whole", "another device", "a list"])
@pytest.mark.parametrize("field", ["codes", "labels", "weights"])
def test_a_wrong_set_is_refused_wherever_it_goes(field, how, tmp_path):
    whole = replace(SET, weights=torch.ones(6))
    if field == "labels" and how in ("not finite", "whole"):
        soft = torch.eye(3)[SET.labels]
        wrong = (
            spoilt(soft, "not finite") if how == "not finite" else SET.labels + 1
        )  # a label beyond the classes
    else:
        wrong = spoilt(getattr(whole, field), how)

    def broken() -> SyntheticSet:
        return replace(whole, **{field: wrong})

    for use in (
        lambda: evaluate(broken(), DATA, SMALL),
        lambda: broken().save(tmp_path / "s"),
        lambda: broken().export(tmp_path / "o"),
    ):
        refused(use, field)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": SET.labels[:5]}, ["labels", "5", "6"]),
        ({"weights": torch.ones(5)}, ["weights", "5", "6"]),
        ({"indices": torch.arange(7)}, ["indices", "7", "6"]),
        ({"labels": torch.rand(6, 2)}, ["labels", "(6, 2)", "3 classes"]),
        ({"weights": -torch.ones(6)}, ["weights", "negative"]),
    ],
)
def test_a_set_whose_parts_do_not_fit_is_refused(changes, words):
    refused(lambda: evaluate(replace(SET, **changes), DATA, SMALL), *words)


@pytest.mark.parametrize("how", ["not finite", "whole", "another float", "another device", "a list"])
@pytest.mark.parametrize("half", ["train", "test"])
def test_wrong_data_are_refused(half, how):
    images = getattr(DATA, half)
    broken = replace(images, images=spoilt(images.images, how))
    if half == "train":
        refused(lambda: distill(DM, broken, 1), "images")
    else:
        refused(lambda: evaluate(SET, Data(DATA.train, broken), SMALL), "images")


@pytest.mark.parametrize("half", ["train", "test"])
@pytest.mark.parametrize(
    "labels",
    [
        torch.zeros(60),
        torch.full((60,), 3),
        torch.full((60,), -1),
        torch.zeros(59, dtype=torch.long),
        [0] * 60,
    ],
)
def test_wrong_labels_of_data_are_refused(half, labels):
    broken = replace(getattr(DATA, half), labels=labels)
    if half == "train":
        refused(lambda: distill(DM, broken, 1), "labels")
    else:
        refused(lambda: evaluate(SET, Data(DATA.train, broken), SMALL), "labels")


def test_what_a_check_says():
    for value, words in (
        ([1.0], ["x must be a tensor, not list"]),
        (torch.ones(2, dtype=torch.int32), ["x must hold floating point numbers, not torch.int32"]),
        (torch.tensor([1.0, torch.inf]), ["1 of 2 values of x are not finite"]),
        (torch.ones(2, device="meta"), ["x is on the device 'meta'"]),
    ):
        refused(lambda value=value: check_tensor("x", value), *words)
    refused(
        lambda: check_tensor("x", torch.ones(2), floating=False),
        "x must hold whole numbers, not torch.float32",
    )
