r"""Feature matching: distances between the embedded class batches of S and T.

Embeddings are ``(C, n, d)`` for the real and ``(C, m, d)`` for the synthetic images; distances are ``(C,)``, one per class.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.match.distance import At, Distance, Look, check_weight
from lib.system.errors import CompanionError, choose
from lib.system.tensors import guard


def class_mean(real: Tensor, syn: Tensor) -> Tensor:
    r"""$\lVert \frac1n\sum_i e^T_{c,i} - \frac1m\sum_j e^S_{c,j}\rVert_2^2$, summed over features (DM, arXiv 2110.04181).

    This is the squared MMD with a linear kernel (biased form).
    """
    return (real.mean(1) - syn.mean(1)).square().sum(-1)


def paired(real: Tensor, syn: Tensor) -> Tensor:
    r"""$\frac1m\sum_j\lVert e^S_{c,j}-e^T_{c,j}\rVert_2^2$: every synthetic image and its own real one, ``(C, m, d)`` both (IT-GAN,
    arXiv 2204.07513)."""
    return (syn - real).square().sum(-1).mean(1)


def discrimination_logits(real: Tensor, syn: Tensor) -> Tensor:
    r"""$o_{c,i,k} = \langle e^T_{c,i},\, \bar e^S_k\rangle$, ``(C, n, C)``: the synthetic class means as a linear classifier."""
    return torch.einsum("cnd,kd->cnk", real, syn.mean(1))


def discrimination(real: Tensor, syn: Tensor) -> Tensor:
    r"""$\sum_i -\log\mathrm{softmax}(o_{c,i})_c$ over the real images of each class, ``(C,)`` (CAFE, section 3.2).

    A *sum* over images as in the released code; the paper writes the mean over all ``C n`` images.
    """
    return -discrimination_logits(real, syn).log_softmax(-1).diagonal(dim1=0, dim2=2).sum(0)


def class_aware(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each class's synthetic images, ``(C, m, K)`` and labels ``(C, m)`` or ``(C, 1)`` -> ``(C,)``."""
    labels = labels.expand(logits.shape[:2]).unsqueeze(-1)
    return -logits.log_softmax(-1).gather(-1, labels).squeeze(-1).mean(1)


@dataclass(frozen=True)
class ClassMean(Distance):
    r"""DM's distance: $w\,\lVert\bar\psi^T_c-\bar\psi^S_c\rVert_2^2$ (:func:`class_mean`); term ``mean``.

    Attributes:
        weight: w, 0 or more.
    """

    weight: float = 1.0

    def __post_init__(self):
        check_weight(self)

    def terms(self, real: dict[str, Tensor], syn: dict[str, Tensor], at: At) -> dict[str, Tensor]:
        return {"mean": self.weight * class_mean(real["embedding"], syn["embedding"])}


@dataclass(frozen=True)
class LayerMeans(Distance):
    r"""CAFE's: $\sum_l w_l\,\lVert\bar f^T_{l,c}-\bar f^S_{l,c}\rVert_2^2$ over the maps after every ReLU and after the last pooling.

    Terms ``relu1``, ``relu2``, ..., ``pool``. Published for depth 3. The last ReLU and the pooling keep their weights at every
    depth: a shallower network drops weights from the front, a deeper one repeats the first.

    Attributes:
        weights: of ReLU 1, 2, 3 and of the last pooling, two or more, 0 or more each; 0 leaves a layer out.
    """

    weights: tuple[float, ...] = (0.1, 0.1, 1.0, 1.0)

    def __post_init__(self):
        if len(self.weights) < 2 or not all(0 <= weight < float("inf") for weight in self.weights):
            raise CompanionError(
                f"weights {self.weights} of LayerMeans are not allowed: two or more, none of them negative"
            )

    @property
    def taps(self) -> tuple[str, ...]:
        return ("act",)

    def at_depth(self, depth: int) -> tuple[float, ...]:
        """Weights of ReLU 1 ... ``depth`` and of the last pooling."""
        return self.weights[:1] * (depth + 1 - len(self.weights)) + self.weights[-depth - 1 :]

    def observe(self, look: Look) -> dict[str, Tensor]:
        """Class means of every block's map, ``(C, 1, width, h, w)``, and the embeddings (the last pooling, flattened)."""
        means = [one.mean(1, keepdim=True) for one in look.maps("act")]
        return {f"relu{i}": mean for i, mean in enumerate(means, 1)} | {"embedding": look.embedding}

    def terms(self, real: dict[str, Tensor], syn: dict[str, Tensor], at: At) -> dict[str, Tensor]:
        *relus, pool = self.at_depth(len(real) - 1)
        found = {}
        for i, weight in enumerate(relus, 1):
            if weight:
                a, b = real[f"relu{i}"], syn[f"relu{i}"]
                found[f"relu{i}"] = weight * class_mean(a.flatten(2), b.flatten(2))
        if pool:
            found["pool"] = pool * class_mean(real["embedding"], syn["embedding"])
        return found


REDUCTIONS = ("sum", "mean")


@dataclass(frozen=True)
class Discrimination(Distance):
    r"""CAFE's $-\beta\sum_i\log\operatorname{softmax}(\langle\psi(x_i),\bar\psi(s_k)\rangle_k)_{y_i}$; term ``discrimination``.

    Paper and code: the code *sums* over the real batch (with weight 0.01), the paper writes the *mean*.

    Attributes:
        weight: $\beta$, 0 or more; reduction: "sum"; "mean": over the real images of all classes.
    """

    weight: float = 0.01
    reduction: str = "sum"

    def __post_init__(self):
        choose("discrimination", self.reduction, dict.fromkeys(REDUCTIONS))
        check_weight(self)

    def terms(self, real: dict[str, Tensor], syn: dict[str, Tensor], at: At) -> dict[str, Tensor]:
        a, b = real["embedding"], syn["embedding"]
        share = a[..., 0].numel() if self.reduction == "mean" else 1
        return {"discrimination": self.weight / share * discrimination(a, b)}


@dataclass(frozen=True)
class ClassAware(Distance):
    r"""IDM's regulariser $\lambda\,a_\theta\,\overline{\mathrm{CE}}_c$: the synthetic images should be recognised by the network, as
    far as it can recognise anything. Term ``cross-entropy``; the history also shows ``accuracy``.

    $a_\theta$ is the network's training accuracy in **percent** (0 to 100), as in the published code: at full accuracy
    0.5 weighs the cross-entropy 50 times.

    Attributes:
        weight: $\lambda$, 0 or more.
    """

    weight: float = 0.5

    def __post_init__(self):
        check_weight(self)

    def check(self, network: nn.Module, ipc: int) -> None:
        if not hasattr(network, "classifier"):
            raise CompanionError(
                f"ClassAware needs a network with a linear classifier, not {type(network).__name__}"
            )

    def terms(self, real: dict[str, Tensor], syn: dict[str, Tensor], at: At) -> dict[str, Tensor]:
        logits = at.network.classifier(syn["embedding"])
        labels = torch.arange(len(logits), device=logits.device).unsqueeze(1)
        at.measured["accuracy"] = torch.as_tensor(at.percent, device=logits.device).clone()
        return {"cross-entropy": self.weight * at.percent * class_aware(logits, labels)}


guard(globals())
