r"""DREAM - Efficient Dataset Distillation by Representative Matching. Liu et al., ICCV 2023, arXiv 2302.14416.

$$\min_{\mathcal S}\ \mathbb E_{\theta_0}\sum_t\sum_c
d\big(\nabla_\theta\ell(f(\mathcal S_c);\theta_t),\ \nabla_\theta\ell(R_t(\mathcal T_c);\theta_t)\big),\qquad
R_t(\mathcal T_c)=\Big\{\arg\min_{x\in\mathcal T_c}\lVert\phi_{\theta_t}(x)-\mu_j\rVert_2\Big\}_{j=1}^n$$

with $\mu_1,\dots,\mu_n$ the centroids of k-means on the embeddings of *all* images of the class, computed anew every I steps. A
random batch is a noisy target: images near the boundary have large gradients, those near the centre tiny ones. One image per
cluster is an even one. DREAM is IDC with that sampler (``lib.select.sampler.Representative``, which every method takes) and with
representatives as initial images; with ``sampler=RandomBatches(), init="mix"`` it *is* IDC. :class:`DreamDC` is the same on DC.

DREAM+ (Bidirectional Representative Matching, arXiv 2310.15052) has a value for each part that its code shows: the distance of mean
embeddings is another summand (``FeatureMean``), ``early=1`` trains every network for an epoch first, ``Representative(per_cluster=s)``
takes s images of each of n / s clusters.

Paper and code: the code embeds pixels in [0, 1] in networks that see normalised ones; here both are normalised. Its first
network is the one that chose the initial images; here that one is discarded, so that IDC and DREAM of one seed see the same
networks. The clustering has random numbers of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lib.data.imageset import ImageSet
from lib.formation.start import to_space
from lib.match.gradient import FeatureMean
from lib.methods import dc, idc
from lib.methods.dc import DC
from lib.methods.idc import IDC
from lib.nets.training import predict_embeddings
from lib.recipes import Recipes, published, small
from lib.select.sampler import Representative


class RepresentativeStart:
    """A method of the family of DC whose ``init="k-means"`` starts from representatives instead of random real images."""

    def begin(self, train: ImageSet, ipc: int, generator: torch.Generator) -> dc.State:
        if self.init != "k-means":
            return super().begin(train, ipc, generator)
        state = replace(self, init="mix").begin(train, ipc, generator)  # the same random numbers as without
        codes = self.representatives(state, generator.initial_seed())
        with torch.no_grad():
            state.pixels.copy_(to_space(codes, train, self.space))
        return state

    def representatives(self, state: dc.State, seed: int) -> Tensor:
        """As many images of every class as can be packed into its codes, packed: ``(C * ipc, c, h, w)``, normalised."""
        train, formation = state.train, self.formation.on(state.train.transform)
        self.prepare(state, seed)
        sampler = self.sampler if isinstance(self.sampler, Representative) else Representative()
        sampler = replace(sampler, clusters=None, per_cluster=1)
        wanted = formation.multiplicity * state.ipc
        rows = sampler.pick(
            state.memory,
            train,
            min(wanted, train.smallest_class),
            seed,
            lambda images: predict_embeddings(state.networks, images)[0],
        )
        rows = rows.repeat(1, -(-wanted // rows.shape[1]))[:, :wanted]  # a small class: again from the first
        images = train.images[rows].unflatten(1, (formation.multiplicity, state.ipc)).transpose(0, 1)
        return formation.pack(images.flatten(1, 2))

    def prepare(self, state: dc.State, seed: int) -> None:
        """What happens to the first network before it chooses."""


@dataclass(frozen=True)
class DreamDC(RepresentativeStart, DC):
    """DC with representative matching. The other fields are DC's.

    Attributes:
        init: "k-means", or DC's; sampler: representative images.
    """

    init: str = "k-means"
    sampler: Any = Representative()


@dataclass(frozen=True)
class DREAM(RepresentativeStart, IDC):
    """Hyper-parameters of the published settings: those of IDC, but for the batches. The other fields are IDC's.

    Attributes:
        real_batch: images of a class, one per cluster; network_batch: the same, as the published loader has it.
        init: "k-means", or IDC's; sampler: representative images.
    """

    real_batch: int = 128
    network_batch: int = 128
    init: str = "k-means"
    sampler: Any = Representative(every=10)

    def prepare(self, state: idc.State, seed: int) -> None:
        if self.early:
            own = torch.Generator(state.train.device).manual_seed(seed)
            self.learn(state, state.train.images, state.train.labels, self.early, own)


_OFTEN = Representative(every=5, warm=True)  # small runs have few steps per network
_PAPER = DREAM()
_TINY = replace(_PAPER, network="convnet-d4-w128", n_data=1000, real_batch=64, network_batch=64)
_CODE = "settings of the published code"
_MERGED = "the newer published code"


def _of_idc(data: str, ipc: int | None = None) -> DREAM:
    """DREAM with IDC's settings for the same data."""
    return DREAM(**vars(idc.RECIPES.named(data, ipc).method) | {"init": "k-means", "sampler": _OFTEN})


def _published(data: str) -> DREAM:
    """The same at the published batches."""
    return replace(_of_idc(data, 10), real_batch=128, network_batch=128, sampler=_PAPER.sampler)


def plus(method: DREAM) -> DREAM:
    """DREAM+."""
    return replace(method, distance=method.distance + FeatureMean(1.0), early=1)


RECIPES = Recipes(
    *(small(data, _of_idc(data)) for data in ("digits", "fashion14", "photos16", "photos32")),
    published("cifar10 cifar100", (1, 10, 50), _PAPER, "idc", _CODE),
    published("svhn", (1, 10, 50), _published("svhn"), "idc", _CODE),
    published("fashionmnist", (1, 10, 50), _published("fashionmnist"), "idc", _CODE),
    published("mnist", (1, 10, 50), _published("mnist"), "idc-plain", _CODE),
    published("tinyimagenet", (1, 10), _TINY, "idc", _MERGED),
    published("tinyimagenet", 50, replace(_TINY, lr=1e-6), "idc", _MERGED),
    *(small(data, plus(_of_idc(data)), variant="plus") for data in ("digits", "fashion14", "photos16", "photos32")),
    published("cifar10 cifar100", (1, 10, 50), plus(_PAPER), "idc", "DREAM+ in the published code", variant="plus"),
)  # fmt: skip


def _on_dc(data: str, ipc: int | None, sampler: Representative) -> DreamDC:
    return DreamDC(**vars(dc.RECIPES.named(data, ipc).method) | {"init": "k-means", "sampler": sampler})


DREAM_DC = Recipes(
    *(small(data, _on_dc(data, None, _OFTEN)) for data in ("digits", "fashion14", "photos16", "photos32")),
    *(small(data, _on_dc(data, 10, _OFTEN), ipc=10, source=dc.FEWER) for data in ("digits", "fashion14")),
    published("mnist", (1, 10, 50), _on_dc("mnist", 10, Representative()), "dc-mnist", "DC's settings, DREAM's sampler"),
    published(
        "fashionmnist svhn cifar10", (1, 10, 50), _on_dc("cifar10", 10, Representative()), "dc", "DC's settings, DREAM's sampler"
    ),
)  # fmt: skip
