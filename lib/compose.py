r"""A method put together from four parts: which distance, what is stored, which real images, which augmentation.

$$\min_{\mathcal S}\ \mathbb E_{\theta,\omega}\
d\big(\mathcal A_\omega(f(\mathcal S)),\ \mathcal A_\omega(R_\theta(\mathcal T));\ \theta\big)$$

with d of a published method (gradients, contrastive gradients, means of features, ...) or any value of ``lib.match``, f a formation
(``lib.formation``), R a sampler (``lib.select.sampler``) and A an augmentation. Every published method of these families is one
point of the grid: DSA is (DC, pixels, random, DSA), IDC is (IDC, multi-formation, random, IDC), DREAM is IDC with representative
batches.

What a distance looks at decides the loop that lowers it: gradients are matched along the training of networks, as DC does, features
in fresh networks, as DM does. Both loops have the same parts as fields, so that composing is replacing them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lib.data.imageset import ImageSet
from lib.formation import ChannelMix, MultiFormation, Pixels
from lib.match.distance import Distance
from lib.match.gradient import Gap
from lib.methods import recipes
from lib.select.sampler import RandomBatches, Representative
from lib.system.errors import choose, unknown

# the method, by its name and variant, whose distance and other settings are taken
OBJECTIVES = {
    "DC": ("dc", ""),  # gradients, class by class
    "DCC": ("dcc", ""),  # gradients of all classes together
    "IDC": ("idc", "I"),  # gradients of convolutions, networks that learn from real images
    "DM": ("dm", ""),  # means of features
    "M3D": ("m3d", ""),  # their distributions
    "DataDAM": ("datadam", ""),  # attention maps and means
}
FORMATIONS = {"pixels": Pixels(), "multi-formation": MultiFormation(2), "channels": ChannelMix()}
SAMPLERS = {"random": RandomBatches(), "representative": Representative()}
AUGMENTATIONS = {
    "none": ("none", "single"),
    "DSA": ("data", "single"),  # one family at a time, those that suit the data
    "IDC": ("color_crop_cutout", "idc"),  # several at a time
}
PARTS = {"objective": OBJECTIVES, "formation": FORMATIONS, "sampler": SAMPLERS, "augmentation": AUGMENTATIONS}
LOOPS = (
    (Gap, "DC"),
    (Distance, "DM"),
)  # what compares gradients, what compares features: whose loop lowers it


def compose(
    objective: str | Gap | Distance,
    formation: Any,
    sampler: Any,
    augmentation: str | tuple[str, str],
    train: ImageSet,
    ipc: int,
    **changes,
):
    """The method of these four parts, each a name of :data:`PARTS` or a value, with the objective's recipe for the data in
    everything else.

    It starts from random real images, as many packed into a stored one as the formation makes of it.

    Args:
        objective: a name, or a distance, which is then lowered in DC's or DM's loop at their settings.
        augmentation: a name, or a strategy and how its families combine.
        changes: fields to replace, such as ``iterations``.
    Raises:
        CompanionError: an unknown name. A part that does not suit the data (channels of grey images, more clusters than images
            of a class) is refused in one line when the method begins.
    """
    method = host(objective, train, ipc)
    formation, (families, mode) = _part("formation", formation), _part("augmentation", augmentation)
    parts = {
        "formation": formation,
        "sampler": _part("sampler", sampler),
        "augmentation": families,
        "mode": mode,
        "init": "mix" if formation.multiplicity > 1 else "real",
    }
    return replace(method, **parts | changes)


def host(objective: str | Gap | Distance, train: ImageSet, ipc: int):
    """The method whose loop lowers the objective, with its recipe for the data."""
    if isinstance(objective, str):
        name, variant = choose("objective", objective, OBJECTIVES)
        return recipes(name).find(train, ipc, variant).method
    for family, loop in LOOPS:
        if isinstance(objective, family):
            return replace(host(loop, train, ipc), distance=objective)
    raise unknown("objective", objective, OBJECTIVES)


def _part(kind: str, value: Any) -> Any:
    return choose(kind, value, PARTS[kind]) if isinstance(value, str) else value


def initial(formation: Any, train: ImageSet, ipc: int):
    """The method that leaves the initial images as they are, whatever the objective."""
    return compose("DM", formation, "random", "none", train, ipc).with_steps(0, ipc)
