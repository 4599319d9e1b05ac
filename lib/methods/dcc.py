r"""DCC - Dataset Condensation with Contrastive Signals. Lee, Chun, Jung, Yun & Yoon, ICML 2022, arXiv 2202.02916.

$$\min_{\mathcal S}\ \mathbb E_{\theta_0}\sum_t D\Big(\textstyle\sum_c\nabla_\theta\ell(\mathcal S_c;\theta_t),\
\sum_c\nabla_\theta\ell(\mathcal T_c;\theta_t)\Big)$$

DC matches every class by itself, so what all classes have in common (their background) is matched C times over; in the sum it
cancels, and what tells classes apart remains. DCC is DC with the distance and the sum exchanged (``Contrastive``), real initial
images, and a warm-up by DC's own loss: class-wise for the first networks (``warm_outer``) in the first steps of each
(``warm_inner``). With augmentation (``augmentation="data"``) the method is called DSAC.

Paper and code: the paper sums the class gradients, the code takes their mean, as we do; D does not see the scale (but for the
1e-6 in its denominator). The code's warm-up records D of the mean gradients while it lowers the class-wise sum; here ``loss``
is what is lowered. In the contrastive phase there is one distance for all classes: ``per_class`` is then its C-th part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lib.data.imageset import ImageSet
from lib.match.contrastive import Contrastive
from lib.match.gradient import Gap, RowCosine
from lib.methods import dc
from lib.methods.dc import DC
from lib.recipes import Recipes, published, small
from lib.system.errors import CompanionError, whole

LOOPS = {1: (10, 5)}  # IPC -> (T, epochs) where they are not DC's


@dataclass
class State(dc.State):
    """DC's, and how many matching steps are done."""

    done: int = 0


@dataclass(frozen=True)
class DCC(DC):
    """Hyper-parameters of DC, with the published changes. The other fields are DC's.

    Attributes:
        distance: of matching; warm: of the warm-up, with the same terms.
        warm_outer, warm_inner: networks k < warm_outer are matched by ``warm`` in their steps t < warm_inner; 0 or more.
    """

    init: str = "real"
    distance: Gap = Contrastive(RowCosine())
    warm: Gap = RowCosine()
    warm_outer: int = 250
    warm_inner: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, warm_outer=0, warm_inner=0)
        if self.warm.names != self.distance.names:
            raise CompanionError(
                f"the warm-up has the terms {', '.join(self.warm.names)}, the distance {', '.join(self.distance.names)}: "
                "they must be the same"
            )

    def loops(self, ipc: int) -> tuple[int, int]:
        inner, epochs = LOOPS.get(ipc, super().loops(ipc))
        return self.inner or inner, self.epochs or epochs

    def begin(self, train: ImageSet, ipc: int, generator: torch.Generator) -> State:
        return State(**vars(super().begin(train, ipc, generator)))

    def step(self, state: State, generator: torch.Generator) -> dict[str, Tensor]:
        metrics = super().step(state, generator)
        state.done += 1
        return metrics

    def compared(self, state: State) -> Gap:
        """The contrastive distance, or that of the warm-up."""
        return self.distance if self.contrastive(state) else self.warm

    def contrastive(self, state: State) -> bool:
        r"""$k\ge W_{out}$ or $t\ge W_{in}$."""
        inner, _ = self.loops(state.ipc)
        return state.done // inner >= self.warm_outer or state.t >= self.warm_inner


_PAPER = DCC()
# a quarter of the steps is warm-up, as published
_DIGITS = DCC(outer=4, real_batch=32, network="convnet-d2-w32", warm_outer=1)
_FASHION = replace(_DIGITS, lr=0.4, network="convnet-d3-w32")
_PHOTOS = DCC(outer=2, inner=4, epochs=5, real_batch=32, network="convnet-d3-w32", warm_outer=1, warm_inner=2)
_COMMANDS = "section 5 and the published commands"


def _dsac(method: DCC) -> DCC:
    return replace(method, augmentation="data")


RECIPES = Recipes(
    small("digits", _DIGITS),
    small("fashion14", _FASHION),
    small("photos16 photos32", _PHOTOS),
    published("svhn cifar10 cifar100", (1, 10, 50), _PAPER, "dc", _COMMANDS),
    small("digits", _dsac(_DIGITS), variant="DSAC"),
    small("fashion14", _dsac(_FASHION), variant="DSAC"),
    small("photos16 photos32", _dsac(_PHOTOS), variant="DSAC"),
    published("svhn cifar10 cifar100", (1, 10, 50), _dsac(_PAPER), "dsa", _COMMANDS, variant="DSAC"),
)
