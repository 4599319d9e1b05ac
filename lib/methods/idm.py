r"""IDM - Improved Distribution Matching for Dataset Condensation. Zhao, Li, Qin & Yu, CVPR 2023, arXiv 2307.09742.

$$\min_{\mathcal S}\ \mathbb E_{\theta\sim\mathcal Q,\omega}\ \sum_c \Big\lVert \overline{\psi_\theta(\mathcal A_\omega(T_c))}
 - \overline{\psi_\theta(\mathcal A_\omega(D(S_c)))}\Big\rVert_2^2
 + \lambda\,a_\theta\,\overline{\mathrm{CE}}\big(g_\theta(\mathcal A_\omega(D(S_c))), c\big)$$

DM (``lib.methods.dm``) with three additions, each a value. *Partition and expansion*: a stored image is a mosaic of f x f cells,
each enlarged to a training image ($D$, ``lib.formation.Mosaic``). *Model queue* $\mathcal Q$: networks of different age, of which
one is looked at and some are trained a little at every step (``lib.nets.supply.Queue``). *Class-aware regularisation*:
cross-entropy of the synthetic images under that network, weighted by its training accuracy $a_\theta$ (``ClassAware``).

Facts of the published code that the paper does not state: $a_\theta$ is in **percent** (0 to 100), so $\lambda$ = 0.5 weighs the
cross-entropy up to 50 times; it is 0 for a network that was not trained yet; and it is cleared at every evaluation, so that how
often one evaluates changes the result (``Queue(meter="reset")``). Here it is by default a running mean that is never cleared.
Differs besides: all classes take one joint step, with the rate and the momentum that make it equal to that code's step per
class (``sequential``); the special rules for IPC 1 without mosaics are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lib.formation import Mosaic, Pixels
from lib.match.distance import Distance
from lib.match.features import ClassAware, ClassMean
from lib.methods.dm import DM
from lib.nets.supply import Queue
from lib.recipes import Recipes, published, small


@dataclass(frozen=True)
class IDM(DM):
    """Hyper-parameters of the published commands (CIFAR-10, IPC 10). The other fields are DM's.

    Attributes:
        lr: of the pixels; init: "mix": every cell a real image; "real": whole real images; "noise".
        distance: the class mean and a cross-entropy; networks: a queue of partly trained ones; formation: cells of a mosaic.
    """

    lr: float = 0.2
    init: str = "mix"
    distance: Distance = ClassMean() + ClassAware(0.5)
    networks: Any = Queue()
    formation: Any = Mosaic(2)
    sequential: bool = True


def _with(method: IDM, lam: float | None = None, **queue) -> IDM:
    """Another weight of the cross-entropy, another queue."""
    distance = method.distance if lam is None else ClassMean() + ClassAware(lam)
    return replace(method, distance=distance, networks=replace(method.networks, **queue))


_CIFAR = IDM()
_SMALL = IDM(iterations=100, lr=0.4, real_batch=64, network="convnet-d2-w32", augmentation="none", formation=Pixels(),
             distance=ClassMean() + ClassAware(0.1), networks=Queue(5, interval=10, steps=3, batch=32), sequential=False)  # fmt: skip
_PHOTOS = replace(
    _SMALL, iterations=30, network="convnet-d3-w32", augmentation="data", formation=Mosaic(2), distance=ClassMean() + ClassAware(0.01)
)  # fmt: skip
_IPC1 = _with(replace(_CIFAR, real_batch=5000), interval=5)  # every image of a class of CIFAR-10
_TINY = replace(_CIFAR, network="convnet-d4-w128")
_IMAGENET = _with(
    replace(_CIFAR, network="convnet-d6-w128", real_batch=128), 3.0, interval=50, size=50, batch=128
)
_COMMANDS = "published commands"
RECIPES = Recipes(
    small("digits", replace(_SMALL, lr=0.1)),
    small("fashion14", replace(_SMALL, iterations=60, lr=3.0, real_batch=32, network="convnet-d3-w32")),
    small("photos16 photos32", _PHOTOS),
    published("cifar10", 1, _IPC1, "dsa", _COMMANDS),
    published("cifar10", 10, _CIFAR, "dsa", _COMMANDS),
    published("cifar10", 50, _with(_CIFAR, 0.1), "dsa", _COMMANDS),
    published("cifar100", 1, _IPC1, "dsa", _COMMANDS),
    published("cifar100", 10, _with(_CIFAR, 0.1, steps=50), "dsa", _COMMANDS),
    published(
        "cifar100", 50, _with(_CIFAR, 0.1), "dsa", f"{_COMMANDS}; the author advises 40 training steps"
    ),
    published("tinyimagenet", (1, 10), _TINY, "dsa", _COMMANDS),
    published("tinyimagenet", 50, _with(_TINY, 0.8, steps=50), "dsa", _COMMANDS),
    published("imagenet100", (1, 10), _IMAGENET, "dsa", f"{_COMMANDS}; 224 px"),
    published(
        "imagenet100",
        50,
        _with(replace(_IMAGENET, formation=Pixels()), size=100),
        "dsa",
        f"{_COMMANDS}; there from pretrained networks",
    ),  # fmt: skip
)
