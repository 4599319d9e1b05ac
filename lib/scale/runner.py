"""Running units one after another in this process. Side by side, here or on a cluster: ``workflow/scale.smk``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from lib.scale.plan import Run
from lib.scale.stages import compute
from lib.scale.store import done
from lib.scale.units import Unit, needs, units
from lib.system.errors import CompanionError

Say = Callable[[str], None]


def run_unit(run: Run, one: Unit, device: str, force: bool = False) -> float | None:
    """Compute a unit unless its file is there and whole; its seconds, or None if there was nothing to do.

    Raises:
        CompanionError: a unit that it reads is missing, or a file of another configuration is in the way.
    """
    if not force and done(run, one):
        return None
    missing = [str(other) for other in needs(run, one) if not done(run, other)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CompanionError(f"{one} reads {missing[0]}{more}, not there yet: run that stage first")
    begin = time.perf_counter()
    compute(run, one, torch.device(device))
    return time.perf_counter() - begin


def run_stages(run: Run, stages: Sequence[str], device: str = "cpu", say: Say = print) -> None:
    """Run all units of these stages, one stage after the other. Finished units are kept whatever becomes of the rest."""
    for stage in stages:
        there = units(run, stage)
        todo = [one for one in there if not done(run, one)]
        if there and not todo:
            say(f"{stage} {len(there)}/{len(there)}: there already")
        begin = time.perf_counter()
        for count, one in enumerate(todo, 1):
            seconds = run_unit(run, one, device)
            left = (time.perf_counter() - begin) / count * (len(todo) - count)
            text = f"{stage} {len(there) - len(todo) + count}/{len(there)}: {one.about}, {seconds or 0:.1f} s"
            say(text + (f"; {left:.0f} s left" if left else ""))
