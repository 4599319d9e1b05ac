"""IDC's matching step beside its plain version, which goes class by class, tile by tile and tensor by tensor."""

from __future__ import annotations

from benchmarks.harness import HotSpot
from benchmarks.hot_spots import STEPS, Setting, candidates, distillation, grouped
from lib.methods.idc import IDC


def idc(setting: Setting) -> HotSpot:
    """Matching steps with their updates of the pixels; factor 2, four decoded images of every stored one, each in a new network
    that is not trained. The rate is one at which small images move."""
    method = IDC(
        real_batch=setting.real, network=setting.network, base_side=setting.side, outer=STEPS, inner=1, lr=1.0
    )
    return distillation(setting, "IDC matching step", "idc", candidates(setting, method, grouped(setting)))


FORMATION_SPOTS = {"idc": idc}
