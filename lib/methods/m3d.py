r"""M3D - Dataset Condensation by Minimizing Maximum Mean Discrepancy. Zhang et al., AAAI 2024, arXiv 2312.15927.

$$\min_{\mathcal S}\ \mathbb E_{\theta,\omega}\ \sum_c \overline{K_{TT}} - 2\,\overline{K_{TS}} + \overline{K_{SS}},\qquad
 K_{ij} = \sum_{l=-2}^{2} \exp\Big(-\frac{\lVert z_i-z_j\rVert^2}{2^l\,b_c}\Big),\quad
 z = \psi_\theta(\mathcal A_\omega(D_f(\cdot)))$$

DM (``lib.methods.dm``) with another distance: the squared maximum mean discrepancy (plain means, diagonals included) with a kernel
that sees all moments; with the linear kernel, which sees the mean alone, it is DM's. $b_c$ is the mean squared distance within the
union of both batches, without gradient. From IDC (arXiv 2205.14959) come the mosaics, ``D_f`` (a stored image is f x f images), the
augmentation of the matching, and several updates per network.

Differs from the published code: all classes take one joint step, with the rate and the momentum that make it equal to that
code's step per class (``sequential``); cells are cut where the factor divides the side. The learning rates of the published
tables are in files that were not available, so ``lr`` of the published rows is that of a derived project.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lib.formation import Mosaic, Pixels
from lib.match.distance import Distance
from lib.match.mmd import MMD
from lib.methods.dm import DM
from lib.nets.supply import Fresh
from lib.recipes import Recipes, published, small


@dataclass(frozen=True)
class M3D(DM):
    """Hyper-parameters of the released configuration. The other fields are DM's.

    Attributes:
        iterations, lr, real_batch: of the released configuration; networks: a new one every so many iterations.
        init: "mix": every cell a real image; "real": whole real images; "noise".
        augmentation, mode: colour and cutout always; distance: the MMD; formation: cells of a mosaic; most, space, sequential: as
            released.
    """

    iterations: int = 5000
    lr: float = 10.0
    real_batch: int = 128
    init: str = "mix"
    augmentation: str = "color_crop_cutout"
    mode: str = "idc"
    distance: Distance = MMD()
    networks: Any = Fresh(every=5)
    formation: Any = Mosaic(2, packing="nearest")
    most: int | None = 200
    space: str = "unit"
    sequential: bool = True


_PAPER = M3D()
_SMALL = M3D(iterations=100, real_batch=64, network="convnet-d2-w32", formation=Pixels(), networks=Fresh(), sequential=False,
             space="normalised", augmentation="none", mode="single")  # fmt: skip
_PHOTOS = replace(_SMALL, iterations=40, lr=3.0, network="convnet-d3-w32", formation=Mosaic(2, packing="nearest"), most=20,
                  augmentation="data")  # fmt: skip
_RELEASED = "released configuration; the rates of the tables are in files that were not available"
RECIPES = Recipes(
    small("digits", _SMALL),
    small("fashion14", replace(_SMALL, iterations=80, lr=3.0, real_batch=32, network="convnet-d3-w32")),
    small("photos16 photos32", _PHOTOS),
    published("cifar10 cifar100", (1, 10, 50), _PAPER, "m3d", _RELEASED),
    published(
        "cifar10", 10, replace(_PAPER, lr=5e-3), "m3d", "the released default rate", variant="released-lr"
    ),
    published("mnist fashionmnist svhn", (1, 10, 50), replace(_PAPER, iterations=10_000), "m3d", _RELEASED),
    published("tinyimagenet", (1, 10, 50), replace(_PAPER, network="convnet-d4-w128"), "m3d", _RELEASED),
)
