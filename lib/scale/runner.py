"""Running units with plain processes: one per visible GPU, else as many as asked for with one thread each."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

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


def run_stages(run: Run, stages: Sequence[str], workers: int | None = None, say: Say = print) -> None:
    """Run all units of these stages, one stage after the other, in ``workers`` processes (default: see :func:`places`).

    The files do not depend on ``workers``. Finished units are kept whatever becomes of the rest.
    """
    with _workers(places(workers)) as submit:
        for stage in stages:
            there = units(run, stage)
            todo = [one for one in there if not done(run, one)]
            if there and not todo:
                say(f"{stage} {len(there)}/{len(there)}: there already")
            waiting, begin = {submit(run, one): one for one in todo}, time.perf_counter()
            for count, future in enumerate(as_completed(waiting), 1):
                seconds = future.result()
                left = (time.perf_counter() - begin) / count * (len(todo) - count)
                text = f"{stage} {len(there) - len(todo) + count}/{len(there)}: {waiting[future].about}"
                say(f"{text}, {seconds or 0:.1f} s" + (f"; {left:.0f} s left" if left else ""))


def places(workers: int | None = None) -> list[str]:
    """The device of each worker: every visible GPU once (or in turn, up to ``workers``), else the CPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    count = workers or max(1, gpus)
    return [f"cuda:{n % gpus}" for n in range(count)] if gpus else ["cpu"] * count


@contextlib.contextmanager
def _workers(devices: Sequence[str]) -> Iterator[Callable]:
    """Yield ``submit(run, unit) -> Future``; each device has a process of its own, which lives until the end."""
    context = _context()
    free: queue.Queue = queue.Queue()
    pools = [ProcessPoolExecutor(1, mp_context=context, initializer=_begin) for _ in devices]
    for pair in zip(pools, devices, strict=True):
        free.put(pair)
    hands = ThreadPoolExecutor(len(devices))

    def work(run: Run, one: Unit) -> float | None:
        pool, device = free.get()
        try:
            return pool.submit(run_unit, run, one, device).result()
        finally:
            free.put((pool, device))

    submitted: list[Future] = []

    def submit(run: Run, one: Unit) -> Future:
        submitted.append(hands.submit(work, run, one))
        return submitted[-1]

    try:
        yield submit
    except BaseException as error:
        hands.shutdown(wait=False, cancel_futures=True)
        while not all(
            future.done() for future in submitted
        ):  # a process that is just beginning is in no list yet
            for pool in pools:
                for process in list((pool._processes or {}).values()):
                    process.terminate()
            time.sleep(0.05)
        if isinstance(error, (BrokenProcessPool, EOFError, ConnectionError)):
            raise CompanionError(
                "a worker was killed; finished units are kept, start again to go on"
            ) from None
        raise
    finally:
        hands.shutdown()
        for pool in pools:
            pool.shutdown()


def _context():
    """Workers begin as copies of one process that has imported everything and done nothing (no GPU is in use in it)."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _begin() -> None:
    """In a new worker: one thread on a CPU, no interruption of its own, and no life beyond the parent's."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
