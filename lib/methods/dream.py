r"""DREAM - Efficient Dataset Distillation by Representative Matching. Liu et al., ICCV 2023, arXiv 2302.14416.

$$\min_{\mathcal S}\ \mathbb E_{\theta_0}\sum_t\sum_c
d\big(\nabla_\theta\ell(f(\mathcal S_c);\theta_t),\ \nabla_\theta\ell(R_t(\mathcal T_c);\theta_t)\big),\qquad
R_t(\mathcal T_c)=\Big\{\arg\min_{x\in\mathcal T_c}\lVert\phi_{\theta_t}(x)-\mu_j\rVert_2\Big\}_{j=1}^n$$

with $\mu_1,\dots,\mu_n$ the centroids of k-means on the embeddings of *all* images of the class, computed anew every I steps. A
random batch is a noisy target: images near the boundary have large gradients, those near the centre tiny ones. One image per
cluster is an even one. DREAM is IDC with that sampler (``lib.select.sampler.Representative``, which every method takes) and with
representatives as initial images; with ``sampler=RandomBatches(), init="mix"`` it *is* IDC. :class:`DreamDC` is the same on DC.

DREAM+ (Bidirectional Representative Matching, arXiv 2310.15052) has a field for each part that its code shows: ``feature`` adds
the distance of mean embeddings, ``early=1`` trains every network for an epoch first, ``Representative(per_cluster=s)`` takes s
images of each of n / s clusters.

Paper and code: the code embeds pixels in [0, 1] in networks that see normalised ones; here both are normalised. Its first
network is the one that chose the initial images; here that one is discarded, so that IDC and DREAM of one seed see the same
networks. The clustering has random numbers of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lib.match.features import class_mean
from lib.methods import dc, idc
from lib.methods.dc import DC
from lib.methods.idc import IDC
from lib.nets.ensemble import Ensemble
from lib.nets.training import predict_embeddings
from lib.select.sampler import Representative
from lib.system.errors import CompanionError


class RepresentativeStart:
    """A method of the family of DC whose ``init="k-means"`` starts from representatives instead of random real images."""

    def begin(self, train, ipc: int, generator: torch.Generator) -> dc.State:
        if self.init != "k-means":
            return super().begin(train, ipc, generator)
        state = replace(self, init="mix").begin(train, ipc, generator)  # the same random numbers as without
        codes = self.stored(state, self.representatives(state, generator.initial_seed()))
        with torch.no_grad():
            state.pixels.copy_(codes)
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

    def stored(self, state: dc.State, codes: Tensor) -> Tensor:
        """Normalised codes in the space in which the method keeps them."""
        return codes


@dataclass(frozen=True)
class DreamDC(RepresentativeStart, DC):
    """DC with representative matching."""

    init: str = "k-means"  # or DC's
    sampler: Any = Representative()


@dataclass(frozen=True)
class DREAM(RepresentativeStart, IDC):
    """Hyper-parameters of the published settings: those of IDC, but for the batch."""

    real_batch: int = 128  # images of a class, one per cluster
    init: str = "k-means"  # or IDC's
    sampler: Any = Representative(every=10)
    feature: float = 0.0  # DREAM+: weight of the squared distance of mean embeddings

    def __post_init__(self):
        super().__post_init__()
        if not self.feature >= 0:
            raise CompanionError(f"feature {self.feature!r} is not allowed: a weight is at least 0")

    def gap(
        self, networks: Ensemble, real: Tensor, syn: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        r"""$d(\cdot,\cdot)$ of the gradients, plus ``feature`` $\lVert\bar\phi(\mathcal T_c)-\bar\phi(\mathcal S_c)\rVert^2$."""
        losses, gradient = super().gap(networks, real, syn, generator)
        if self.feature == 0:
            return losses, gradient
        fixed = networks.detached()

        def embed(images: Tensor) -> Tensor:
            return fixed.embed(images.flatten(0, 1).unsqueeze(0))[0].unflatten(0, images.shape[:2])

        pixels = syn.detach().requires_grad_()
        with torch.no_grad():
            target = embed(real)
        extra = self.feature * class_mean(target, embed(pixels))
        return losses + extra.detach(), gradient + torch.autograd.grad(extra.sum(), pixels)[0]

    def prepare(self, state: idc.State, seed: int) -> None:
        if self.early:
            own = torch.Generator(state.train.device).manual_seed(seed)
            self.learn(state, state.train.images, state.train.labels, self.early, own)

    def stored(self, state: idc.State, codes: Tensor) -> Tensor:
        return state.train.transform.inverse(codes)


def _dream(preset: IDC, **changes) -> DREAM:
    """DREAM with IDC's settings."""
    own = {"init": "k-means", "sampler": Representative()}
    return DREAM(**vars(preset) | own | changes)


_PAPER = DREAM()
_TINY = replace(_PAPER, network="convnet-d4-w128", n_data=1000, real_batch=64)
_OFTEN = Representative(every=5, warm=True)  # small runs have few steps per network
# The published settings by data set ("plus": DREAM+), and the small ones of IDC with the sampler of DREAM.
PRESETS = {name: _dream(idc.PRESETS[name], sampler=_OFTEN) for name in ("digits", "photos16", "photos32")} | {
    "paper": _PAPER,
    **{
        name: _dream(idc.PRESETS[name], real_batch=128)
        for name in ("paper-svhn", "paper-mnist", "paper-fashion")
    },
    "paper-tinyimagenet": _TINY,
    "paper-tinyimagenet-ipc50": replace(_TINY, lr=1e-6),
    "paper-plus": replace(_PAPER, feature=1.0, early=1),
}
DREAM_DC = {
    name: DreamDC(
        **vars(preset) | {"init": "k-means", "sampler": Representative() if name == "paper" else _OFTEN}
    )
    for name, preset in dc.PRESETS.items()
}
