"""Every method against its plain version (``lib.plain``): the same random numbers, equal tensors after a few steps."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import generator, toy_data

from lib.distill import distill
from lib.match.features import ClassMean
from lib.match.rendered import Trajectories
from lib.match.style import Diversity, Gram, Moments
from lib.methods import METHODS
from lib.methods import method as class_of
from lib.nets.experts import Experts
from lib.nets.generators import LayeredVAE
from lib.nets.generators.denoiser import PixelUNet
from lib.nets.generators.gan import ACGAN
from lib.nets.starts import Fixed, Pretrained
from lib.nets.supply import Fresh, Queue
from lib.plain import plain, text
from lib.recover.teacher import Teacher
from lib.select.proxy import Proxy
from lib.select.rules import RULES
from lib.select.sampler import Representative
from lib.system.files import ROOT

ROOM, NET = ROOT / "lib" / "plain", "convnet-d2-w4"


@dataclass(frozen=True)
class Case:
    """Settings under which a method is compared, and how closely."""

    method: Any
    ipc: int = 2
    rtol: float = 1e-4
    atol: float = 1e-5
    channels: int = 1
    per_class: int = 20


DM = class_of("dm")(iterations=5, real_batch=8, network=NET)
DEEP = "convnet-d3-w4"
M3D = class_of("m3d")(iterations=5, lr=3.0, real_batch=8, network=NET, networks=Fresh(every=2))
CAFE = class_of("cafe")(iterations=3, real_batch=8, network=DEEP, window=3, max_outer=5, max_inner=5, query=5)
IDM = class_of("idm")(
    iterations=9,
    real_batch=8,
    network=NET,
    networks=Queue(4, start=2, interval=2, steps=3, batch=16, lr=0.05),
)
DATADAM = class_of("datadam")(iterations=5, real_batch=8, network=DEEP)
DDM = class_of("ddm")(
    iterations=5,
    real_batch=8,
    network=NET,
    lr=0.1,
    distance=ClassMean() + Gram(1e3) + Moments(1e3) + Diversity(1.0),
)
W2 = class_of("wasserstein")(iterations=5, real_batch=8, network=NET)
KIP = class_of("kip")(iterations=4, target_batch=30, ridge=1e-3)
CONV = class_of("conv_kip")(
    iterations=2, target_batch=9, nets=("convnet3",), augmentation="none", learn_labels=False, ridge=1e-3
)
RFAD = class_of("rfad")(
    iterations=5, networks=3, width=4, depth=2, real_batch=30, batches=2, lr=0.01, validate_every=0
)
FREPO = class_of("frepo")(
    iterations=8, networks=2, online_updates=2, lr=0.01, lr_network=0.01, real_batch=20, width=4, depth=2
)
# a large ridge: the Hessian's condition number multiplies the rounding of 32-bit Jacobians
RCIG = class_of("rcig")(
    iterations=6, networks=2, online_updates=4, most_updates=3, lr=0.01, lr_network=0.01, real_batch=15, width=3, depth=2,
    ridge=0.05, flip=False, lr_inner=1e-2, lr_solver=0.1,
)  # fmt: skip
QUICK = Teacher("convnet-d2-w4-batch", epochs=2, lr=0.05, batch=32, augmentation="none")
SMALL = {"iterations": 5, "lr": 0.05, "crop": None, "storage": "float", "roll": (-1, 1), "teacher": QUICK}
SRE2L = class_of("sre2l")(block_images=3, **SMALL)
WMDD = class_of("wmdd")(bn_weight=1.0, **SMALL)
RECOVERED = ({}, {"crop": 0.3}, {"teacher": replace(QUICK, network="resnet18-w2-batch")})
# rates at which images and networks move far enough within a few steps
MATCHED = {"outer": 2, "inner": 3, "epochs": 2, "real_batch": 8, "network": NET, "lr": 0.5, "lr_network": 0.1}
ON_REAL = {
    "outer": 2,
    "inner": 3,
    "real_batch": 8,
    "network": NET,
    "lr": 0.5,
    "base_side": 8,
    "n_data": 24,
    "network_batch": 8,
}
DC = class_of("dc")(**MATCHED)
DSA = class_of("dsa")(**MATCHED)
DCC = class_of("dcc")(**MATCHED, warm_outer=1, warm_inner=2)
LCMAT_C = class_of("lcmat_c")(**MATCHED)
OFTEN = Representative(every=2)
EXPERTS = Experts(2, lr=0.05, batch=16)
MTT = class_of("mtt")(
    iterations=5, steps=4, lr=10.0, rate=0.05, lr_rate=1e-3, network=NET, experts=EXPERTS, expert_epochs=2
)
DD = class_of("dd")(
    iterations=5, steps=2, epochs=2, rate=0.2, lr=0.05, decay_every=2, real_batch=25, networks=2, network=NET
)
DIM = class_of("dim")(
    prior=ACGAN(
        steps=3, lr=1e-3, batch=8, noise=5, width=4, least=2, convs=(1, 0), critic_width=4, critic_convs=2, penalty_every=2
    ),
    iterations=9, lr=1e-3, batch=16, weight=1.0, pool=(NET, "resnet18-w2-batch"), network_steps=2, renew_every=2,
)  # fmt: skip
MINIMAX = class_of("minimax")(
    prior=PixelUNet(steps=2, batch=8, width=8, times=40), iterations=6, lr=1e-3, batch=7, memory=3, trainable="all", average=0.5,
    sampling_steps=5, guidance=2.0,
)  # fmt: skip
ESP = class_of("esp")(
    iterations=6,
    window=3,
    start_epochs=2,
    reset=3,
    eta=0.1,
    lr=0.03,
    real_batch=20,
    network=NET,
    experts=EXPERTS,
)
STUDENTS = Trajectories(steps=4, rate=0.05, lr_rate=1e-3, experts=EXPERTS)
HABA = class_of("haba")(
    iterations=5, hallucinators=3, identity=0.5, objective=STUDENTS, lr=5.0, lr_hallucinators=0.1, lr_extractor=0.01,
    extractor=NET, network=NET,
)  # fmt: skip
PRIOR = LayeredVAE(steps=40, lr=0.01, batch=30, latent=6, width=8)
ITGAN = class_of("itgan")(
    PRIOR,
    4,
    lr=0.05,
    regulariser=0.1,
    batch=None,
    real_batch=8,
    network=NET,
    inversion_steps=3,
    classifier_epochs=0,
)
DCGM = class_of("dcgm")(PRIOR, 4, intra=2.0, inter=3.0, margin_intra=0.05, real_batch=8, network=NET)
GLAD = class_of("glad")(PRIOR, replace(DM, init="noise", augmentation="data"), "w", 4, lr=0.1, chunk=4)
PROXY = Proxy("mlp", epochs=3, lr=0.02, batch=16)
CHOSEN = {"proxy": PROXY, "repeats": 2, "neighbours": 3, "iterations": 4}
# name -> cases; the settings are those that the plain version reads
CASES = {
    "krr": [Case(class_of("krr")(map=name), rtol=1e-6) for name in ("identity", "fcnn", "fourier")],
    "kip": [Case(KIP), Case(replace(KIP, depth=2), 3), Case(replace(KIP, learn_labels=True))],
    "conv_kip": [Case(CONV, 1), Case(replace(CONV, learn_labels=True), 1)],
    "rfad": [
        Case(RFAD),
        Case(replace(RFAD, loss="mse", learn_labels=False)),
        Case(replace(RFAD, corruption=0.4)),
    ],
    "frepo": [
        Case(FREPO),
        Case(replace(FREPO, flip=False, networks=1)),
        Case(replace(FREPO, norm=False, learn_labels=False)),
    ],
    "rcig": [
        Case(RCIG),
        Case(replace(RCIG, flip=True, solver="exact"), ipc=1),
        Case(replace(RCIG, solver="exact", implicit=False)),
        Case(replace(RCIG, displaced=False, softplus=0.0)),
    ],
    "mtt": [
        Case(MTT),
        Case(replace(MTT, batch=4, augmentation="none", gradient="recompute")),
        Case(replace(MTT, soft_labels=True, gradient="tesla", batch=4)),
    ],
    "dd": [
        Case(DD, ipc=4),
        Case(replace(DD, init="real", start=Fixed(), networks=1, gradient="recompute")),
        Case(replace(DD, start=Pretrained(replace(EXPERTS, adam=True), epochs=2), attack=(0, 1))),
    ],
    "dim": [
        Case(DIM),
        Case(replace(DIM, renew_every=None, augmentation="none", pool=(NET,)), ipc=1, channels=3),
    ],
    "minimax": [
        Case(MINIMAX),
        Case(replace(MINIMAX, weight_real=1.0, weight_own=1.0, batch=20), ipc=1, channels=3),
    ],
    "esp": [Case(ESP, atol=1e-3), Case(replace(ESP, augmentation="none"), atol=1e-4)],
    "itgan": [
        Case(ITGAN),
        Case(replace(ITGAN, inversion="encoder", batch=2, regulariser=1e-6), ipc=3),
        Case(replace(ITGAN, inversion="none", augmentation="none")),
    ],
    "dcgm": [
        Case(DCGM),
        Case(replace(DCGM, centred=False, learn_generator=False, augmentation="none"), ipc=1),
        Case(replace(DCGM, prior=DIM.prior, gan=0.5, lr_generator=1e-3)),
    ],
    "glad": [Case(GLAD), Case(replace(GLAD, space="z", chunk=None), ipc=1)],
    "haba": [
        Case(HABA),
        Case(
            replace(HABA, adversary=False, hallucinators=1, objective=replace(STUDENTS, gradient="recompute"))
        ),
        Case(replace(HABA, batch=4, augmentation="none"), channels=3),
    ],
    "sre2l": [Case(replace(SRE2L, **change)) for change in RECOVERED],
    "wmdd": [Case(replace(WMDD, **change)) for change in (*RECOVERED, {"block_images": 2})],
    "dm": [Case(replace(DM, augmentation=names)) for names in ("none", "data", "flip_crop")],
    # rounding is multiplied by rates that move pixels by several standard deviations
    "m3d": [
        Case(M3D, atol=2e-4),
        Case(replace(M3D, augmentation="none", networks=Fresh()), ipc=1, atol=2e-4),
    ],
    "cafe": [Case(CAFE, atol=1e-4), Case(replace(CAFE, saturated=0.5, moved=0.2), ipc=1)],
    "idm": [Case(IDM), Case(replace(IDM, augmentation="none"), ipc=1)],
    "datadam": [Case(replace(DATADAM, augmentation=names)) for names in ("none", "data")],
    "ddm": [Case(DDM, ipc=4), Case(replace(DDM, augmentation="none"), ipc=7)],
    "dc": [Case(replace(DC, network_batch=size), rtol=1e-3, atol=1e-4) for size in (256, 4)],
    "dsa": [Case(replace(DSA, network_batch=size), rtol=1e-3, atol=1e-4) for size in (256, 4)],
    "dcc": [Case(DCC, rtol=1e-3, atol=1e-4), Case(replace(DCC, warm_outer=0), ipc=1, rtol=1e-3, atol=1e-4)],
    "lcmat_c": [Case(LCMAT_C, ipc=3, rtol=1e-3, atol=1e-4)],
    "idc": [Case(class_of("idc")(**ON_REAL), rtol=1e-3, atol=1e-4)],
    # few clusters of many images: of two images that make a cluster both are nearest to its centre
    "dream": [
        Case(
            class_of("dream")(**ON_REAL | {"real_batch": 4}, sampler=OFTEN),
            ipc=1,
            rtol=1e-3,
            atol=1e-4,
            per_class=60,
        )
    ],
    "dream_dc": [
        Case(
            class_of("dream_dc")(**MATCHED | {"real_batch": 4}, sampler=OFTEN),
            rtol=1e-3,
            atol=1e-4,
            per_class=60,
        )
    ],
    "dcep": [Case(class_of("dcep")(**ON_REAL), rtol=1e-3, atol=1e-4, channels=3)],
    "wasserstein": [Case(W2, ipc=4), Case(replace(W2, augmentation="none"), ipc=1)],
    "random": [Case(class_of("random")(), ipc) for ipc in (1, 5)],
    "herding": [Case(class_of("herding")(proxy=PROXY, features=kind), 5) for kind in ("proxy", "pixels")],
    "k_center": [Case(class_of("k_center")(proxy=PROXY, features=kind), 5) for kind in ("proxy", "pixels")],
    "lcmat_s": [Case(class_of("lcmat_s")(proxy=PROXY, eps=eps), 5) for eps in (0.01, 1.0)],
} | {
    rule: [
        Case(class_of(rule)(rule=rule, **CHOSEN | {"proxy": proxy}), 5)
        for proxy in (PROXY, replace(PROXY, until=0.6))
    ]
    for rule in RULES
}
CASES["gradmatch"].append(Case(class_of("gradmatch")(rule="gradmatch", proxy=PROXY), 1))


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name, cases in CASES.items() for case in cases],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore:the prior")  # trained for three steps
def test_the_method_equals_its_plain_version(name, case):
    train = toy_data(per_class=case.per_class, channels=case.channels).train
    got = distill(case.method, train, case.ipc, 5)
    wanted, losses = plain(name)(case.method, train, case.ipc, generator(5))
    images, labels = wanted if isinstance(wanted, tuple) else (wanted, None)
    if got.synset.weights is not None:
        torch.testing.assert_close(got.synset.weights, labels.float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got.synset.codes, images, rtol=case.rtol, atol=case.atol)
    if labels is not None and got.synset.soft:
        torch.testing.assert_close(got.synset.labels, labels, rtol=case.rtol, atol=case.atol)
    if len(losses):
        loss = torch.as_tensor(losses, dtype=got.history["loss"].dtype)
        torch.testing.assert_close(got.history["loss"], loss, rtol=case.rtol, atol=case.atol)


@pytest.mark.parametrize("name", CASES)
def test_the_plain_version_can_be_read(name):
    lines = [line for line in text(name).splitlines() if line.strip()]
    assert 4 <= len(lines) <= 45, f"lib/plain/{name}.py has {len(lines)} lines"


def test_every_method_has_a_plain_version_and_a_case():
    known = {path.stem for path in ROOM.glob("*.py")} - {"__init__"}
    assert sorted(METHODS.keys() - known) == [], "no plain version"
    assert sorted(METHODS.keys() - CASES.keys()) == [], "no case above"
    assert sorted(known - METHODS.keys()) == [], "a plain version of no method"


@pytest.mark.parametrize("path", sorted(ROOM.glob("*.py")), ids=lambda path: path.stem)
def test_a_plain_version_does_not_delegate(path):
    """What it is compared with may not do its work: nothing of the fast distances, formations, loops and kernels."""
    own = ("lib.match", "lib.formation", "lib.nets.training", "lib.kernels", "lib.methods", "lib.distill")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        allowed = {"lib.methods", "lib.methods.METHODS"} if path.stem == "__init__" else set()
        wrong = [name for name in names if name.startswith(own) and name not in allowed]
        assert not wrong, f"{path.name} imports {wrong}"
