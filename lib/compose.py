r"""A method put together from four parts: which distance, what is stored, which real images, which augmentation.

$$\min_{\mathcal S}\ \mathbb E_{\theta,\omega}\
d\big(\mathcal A_\omega(f(\mathcal S)),\ \mathcal A_\omega(R_\theta(\mathcal T));\ \theta\big)$$

with d of a published method (gradients, contrastive gradients, means of features, ...), f a formation (``lib.formation``), R a
sampler (``lib.select.sampler``) and A an augmentation. Every published method of these families is one point of the grid: DSA is
(DC, pixels, random, DSA), IDC is (IDC, multi-formation, random, IDC), DREAM is IDC with representative batches.
"""

from __future__ import annotations

from dataclasses import replace

from lib.formation import ChannelMix, MultiFormation, Pixels
from lib.methods import datadam, dc, dcc, dm, idc, m3d, settings
from lib.select.sampler import RandomBatches, Representative
from lib.system.errors import choose

OBJECTIVES = {
    "DC": dc.PRESETS,  # gradients, class by class
    "DCC": dcc.PRESETS,  # gradients of all classes together
    "IDC": idc.IDC_I,  # gradients of convolutions, networks that learn from real images
    "DM": dm.PRESETS,  # means of features
    "M3D": m3d.PRESETS,  # their distributions
    "DataDAM": datadam.PRESETS,  # attention maps and means
}
FORMATIONS = {"pixels": Pixels(), "multi-formation": MultiFormation(2), "channels": ChannelMix()}
SAMPLERS = {"random": RandomBatches(), "representative": Representative()}
AUGMENTATIONS = {
    "none": ("none", "single"),
    "DSA": ("data", "single"),  # one family at a time, those that suit the data
    "IDC": ("color_crop_cutout", "idc"),  # several at a time
}
PARTS = {"objective": OBJECTIVES, "formation": FORMATIONS, "sampler": SAMPLERS, "augmentation": AUGMENTATIONS}


def compose(objective: str, formation: str, sampler: str, augmentation: str, dataset: str, **changes):
    """The method of these four names, with the objective's settings for the data set (``PRESETS``) in everything else.

    It starts from random real images, as many packed into a stored one as the formation makes of it.

    Args:
        changes: fields to replace, such as ``iterations``.
    Raises:
        CompanionError: an unknown name. A part that does not suit the data (channels of grey images, more clusters than images
            of a class) is refused in one line when the method begins.
    """
    given = {
        "objective": objective,
        "formation": formation,
        "sampler": sampler,
        "augmentation": augmentation,
    }
    chosen = {part: choose(part, name, PARTS[part]) for part, name in given.items()}
    method = settings(chosen["objective"], dataset)
    families, mode = chosen["augmentation"]
    parts = {
        "formation": chosen["formation"],
        "sampler": chosen["sampler"],
        "augmentation": families,
        "mode": mode,
    }
    if hasattr(method, "factor"):  # mosaics of its own
        parts["factor"] = 1
    init = "mix" if chosen["formation"].multiplicity > 1 else "real"
    return replace(method, **parts | {"init": init} | changes)


def steps(method, count: int):
    """The same method with ``count`` updates of the images at IPC 1 (0: its initial images)."""
    if hasattr(method, "iterations"):
        return replace(method, iterations=count)
    inner = method.loops(1)[0]
    return replace(method, outer=-(-count // inner))
