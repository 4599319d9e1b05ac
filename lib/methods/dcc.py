r"""DCC - Dataset Condensation with Contrastive Signals. Lee, Chun, Jung, Yun & Yoon, ICML 2022, arXiv 2202.02916.

$$\min_{\mathcal S}\ \mathbb E_{\theta_0}\sum_t D\Big(\textstyle\sum_c\nabla_\theta\ell(\mathcal S_c;\theta_t),\
\sum_c\nabla_\theta\ell(\mathcal T_c;\theta_t)\Big)$$

DC matches every class by itself, so what all classes have in common (their background) is matched C times over; in the sum it
cancels, and what tells classes apart remains. DCC is DC with the distance and the sum exchanged, real initial images, and a
warm-up by DC's own loss: class-wise for the first networks (``warm_outer``) in the first steps of each (``warm_inner``). With
augmentation (``augmentation="data"``) the method is called DSAC.

Paper and code: the paper sums the class gradients, the code takes their mean, as we do; D does not see the scale (but for the
1e-6 in its denominator). The code's warm-up records D of the mean gradients while it lowers the class-wise sum; here ``loss``
is what is lowered. In the contrastive phase there is one distance for all classes: ``per_class`` is then its C-th part.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lib.match.contrastive import contrastive_step
from lib.methods import dc
from lib.methods.dc import DC
from lib.nets.ensemble import Ensemble
from lib.system.errors import CompanionError

LOOPS = {1: (10, 5)}  # IPC -> (T, epochs) where they are not DC's


@dataclass
class State(dc.State):
    """DC's, and how many matching steps are done."""

    done: int = 0


@dataclass(frozen=True)
class DCC(DC):
    """Hyper-parameters of DC, with the published changes."""

    init: str = "real"
    warm_outer: int = 250  # networks k < warm_outer are matched class by class ...
    warm_inner: int = 10  # ... in their steps t < warm_inner
    rows: int | None = (
        None  # synthetic images per second-order pass; None: all (memory; the result is the same)
    )

    def loops(self, ipc: int) -> tuple[int, int]:
        inner, epochs = LOOPS.get(ipc, super().loops(ipc))
        return self.inner or inner, self.epochs or epochs

    def begin(self, train, ipc: int, generator: torch.Generator) -> State:
        for name, least in (("warm_outer", 0), ("warm_inner", 0), ("rows", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise CompanionError(f"{name} {value} is not allowed: at least {least}")
        return State(**vars(super().begin(train, ipc, generator)))

    def step(self, state: State, generator: torch.Generator) -> dict[str, Tensor]:
        metrics = super().step(state, generator)
        state.done += 1
        return metrics

    def match(self, state: State, generator: torch.Generator) -> Tensor:
        """DC's update with the contrastive distance; in the warm-up it is DC's altogether."""
        return DC.match(self if self.contrastive(state) else self.classwise, state, generator)

    def contrastive(self, state: State) -> bool:
        r"""$k\ge W_{out}$ or $t\ge W_{in}$."""
        inner, _ = self.loops(state.ipc)
        return state.done // inner >= self.warm_outer or state.t >= self.warm_inner

    @property
    def classwise(self) -> DC:
        """DC with the same fields."""
        return DC(**{field.name: getattr(self, field.name) for field in dataclasses.fields(DC)})

    def gap(
        self, networks: Ensemble, real: Tensor, syn: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        r"""$D(\bar g^{\mathcal S},\bar g^{\mathcal T})$, shared out equally to ``(C,)``, and its gradient."""
        labels = torch.arange(len(real), device=real.device)
        tensors = networks.parameters | networks.buffers
        loss, gradient = contrastive_step(
            networks.template, tensors, real, syn, labels, self.distance, self.mixed, self.rows
        )
        return loss.expand(len(real)) / len(real), gradient


_PHOTOS = DCC(outer=2, inner=4, epochs=5, real_batch=32, network="convnet-d3-w32", warm_outer=1, warm_inner=2)
# "paper" is the published setting for every data set and IPC; "data" as augmentation makes it DSAC. The small ones spend a
# quarter of their steps on the warm-up, as published.
PRESETS = {
    "digits": DCC(outer=4, real_batch=32, network="convnet-d2-w32", warm_outer=1),
    "photos16": _PHOTOS,
    "photos32": _PHOTOS,
    "paper": DCC(),
}
DSAC = {name: replace(preset, augmentation="data") for name, preset in PRESETS.items()}
