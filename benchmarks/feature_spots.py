"""Every relative of DM beside its plain version (``lib.plain``)."""

from __future__ import annotations

from benchmarks.harness import HotSpot
from benchmarks.hot_spots import STEPS, Setting, candidates, distillation
from lib.match.features import ClassMean
from lib.match.style import Diversity, Gram, Moments
from lib.methods import method as class_of
from lib.nets.supply import Queue


def relative(setting: Setting, name: str, title: str, **changes) -> HotSpot:
    """Steps of a method as its paper has them, at this size."""
    sizes = {"iterations": STEPS, "real_batch": setting.real, "network": setting.network}
    return distillation(setting, title, name, candidates(setting, class_of(name)(**sizes | changes)))


def m3d(setting: Setting) -> HotSpot:
    # at the published rate two steps clamp nearly all pixels of random images, and differences with them
    return relative(setting, "m3d", "M3D step", lr=0.1)


def cafe(setting: Setting) -> HotSpot:
    """The life of one network: updates of the images, epochs on them, accuracies on real images."""
    small = {"iterations": 1, "max_outer": STEPS, "max_inner": 3, "query": min(16, setting.real)}
    return relative(setting, "cafe", "CAFE network", **small)


def idm(setting: Setting) -> HotSpot:
    """Steps with two networks of the queue trained after each."""
    queue = Queue(5, start=3, steps=5, batch=min(256, setting.classes * setting.real))
    return relative(setting, "idm", "IDM step", networks=queue)


def ddm(setting: Setting) -> HotSpot:
    # weights at which no term drowns the others on random images
    distance = ClassMean() + Gram(1e3) + Moments(1e3) + Diversity(1.0)
    return relative(setting, "ddm", "DDM step", distance=distance)


FEATURE_SPOTS = {
    "m3d": m3d,
    "cafe": cafe,
    "idm": idm,
    "datadam": lambda setting: relative(setting, "datadam", "DataDAM step"),
    "ddm": ddm,
    "wasserstein": lambda setting: relative(setting, "wasserstein", "Wasserstein step (exact)"),
}
