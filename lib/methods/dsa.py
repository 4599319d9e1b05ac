r"""DSA - Dataset Condensation with Differentiable Siamese Augmentation. Zhao & Bilen, ICML 2021, arXiv 2102.08259.

$$\min_{\mathcal S}\ \sum_c D\big(\nabla_\theta\ell(\mathcal A_\omega(\mathcal S_c);\theta),\
\nabla_\theta\ell(\mathcal A_\omega(\mathcal T_c);\theta)\big),\qquad \omega\sim\Omega\ \text{shared by both sides.}$$

DSA is DC (``lib.methods.dc``) with an augmentation and real initial images, and nothing else: with ``augmentation="none"``
and ``init="noise"`` it *is* DC. One family of transforms is drawn per class and step; networks are trained on S with the
same families, but own parameters for every image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lib.methods import dc
from lib.recipes import Recipes, published, small, two_cores


@dataclass(frozen=True)
class DSA(dc.DC):
    """Hyper-parameters of DC, with DSA's two changes. The other fields are DC's.

    Attributes:
        init: where images start; augmentation: "data": the data set's strategy, all six families, without flips for digits.
    """

    init: str = "real"
    augmentation: str = "data"


_PAPER = DSA()
_DIGITS = DSA(real_batch=64, network="convnet-d2-w32", outer=120, lr=1.0)
_FASHION = DSA(real_batch=32, network="convnet-d3-w32", outer=40, lr=0.4)
_PHOTOS = DSA(real_batch=32, network="convnet-d3-w32", outer=4, inner=5, epochs=5, lr=0.01)
_NARROW = DSA(lr=0.4, real_batch=64, network="convnet-d3-w32")
RECIPES = Recipes(
    small("digits", _DIGITS),
    small("fashion14", _FASHION),
    small("digits", replace(_DIGITS, outer=12), ipc=10, source=dc.FEWER),
    small("fashion14", replace(_FASHION, outer=12), ipc=10, source=dc.FEWER),
    small("photos16 photos32", _PHOTOS),
    two_cores(replace(_NARROW, outer=200), ipc=1, source=dc.CUT),
    two_cores(replace(_NARROW, **dc.FEW), ipc=10, source=f"{dc.CUT}; epochs cut"),
    published(
        "mnist fashionmnist svhn cifar10 cifar100",
        (1, 10, 50),
        _PAPER,
        "dsa",
        "section 4.1 and the published commands",
    ),
)
