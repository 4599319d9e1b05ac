r"""DSA - Dataset Condensation with Differentiable Siamese Augmentation. Zhao & Bilen, ICML 2021, arXiv 2102.08259.

$$\min_{\mathcal S}\ \sum_c D\big(\nabla_\theta\ell(\mathcal A_\omega(\mathcal S_c);\theta),\
\nabla_\theta\ell(\mathcal A_\omega(\mathcal T_c);\theta)\big),\qquad \omega\sim\Omega\ \text{shared by both sides.}$$

DSA is DC (``lib.methods.dc``) with an augmentation and real initial images, and nothing else: with ``augmentation="none"``
and ``init="noise"`` it *is* DC. One family of transforms is drawn per class and step; networks are trained on S with the
same families, but own parameters for every image.
"""

from __future__ import annotations

from dataclasses import dataclass

from lib.methods import dc


@dataclass(frozen=True)
class DSA(dc.DC):
    """Hyper-parameters of DC, with DSA's two changes."""

    init: str = "real"
    augmentation: str = "data"  # the data set's strategy: all six families, without flips for digits


PRESETS = {
    name: DSA(**(vars(preset) | {"init": "real", "augmentation": "data"}))
    for name, preset in dc.PRESETS.items()
}
