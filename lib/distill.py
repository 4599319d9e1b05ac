"""The one loop: progress, checkpoint and resume, snapshots, timing, and a guard against non-finite values.

A method (see ``lib.methods``) is three functions, ``begin``, ``step`` and ``finish``; everything around them is here, once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lib.nets.ensemble import Ensemble
from lib.synset import SyntheticSet, check_ipc, read_safetensors
from lib.system.cache import digest
from lib.system.code import code_digest
from lib.system.device import check_default_type
from lib.system.errors import CompanionError, check_seed
from lib.system.files import atomic, cache_dir, write_tensors
from lib.system.measure import Meter

CHECKPOINT = {"key", "configuration", "done", "generator", "state", "seconds", "history", "snapshots"}
GUARD_EVERY = 10  # steps between two looks at the metrics (a look waits for a GPU)


class Method(Protocol):
    """What :func:`distill` asks of a method: a frozen dataclass whose fields are the paper's hyper-parameters."""

    def total_steps(self, ipc: int) -> int: ...
    def begin(self, train, ipc: int, generator: torch.Generator) -> Any: ...
    def step(self, state: Any, generator: torch.Generator) -> dict[str, Tensor]: ...
    def finish(self, state: Any) -> SyntheticSet: ...


@dataclass(frozen=True)
class Distilled:
    """A distilled set and how it came about.

    Attributes:
        synset: the result.
        history: metric -> values, ``(steps,)``; snapshots: step -> stored images in [0, 1], ``(m, c, h, w)``.
        seconds, peak_bytes: of the whole distillation, ``begin`` included; measured when it was computed, not when it was
            found in the cache.
    """

    synset: SyntheticSet
    history: dict[str, Tensor]
    snapshots: dict[int, Tensor]
    seconds: float
    peak_bytes: int


def distill(
    method: Method | str,
    train,
    ipc: int,
    seed: int = 0,
    *,
    snapshots: Sequence[int] = (),
    checkpoint: Path | str | None = None,
    checkpoint_seconds: float = 30.0,
    cache: bool = False,
    progress: bool = False,
    callback: Callable[[int, Any, dict[str, Tensor]], None] | None = None,
) -> Distilled:
    """Run a method from its beginning, or from its checkpoint, to its synthetic set.

    Interrupted (Ctrl-C, the stop button of JupyterLab), it ends the step it is in, keeps its state and says so; the same call goes on.

    The result depends on the arguments method, train, ipc and seed alone: a run that is killed and started again ends with
    the same bits (on the same machine and thread count).

    Args:
        method: its settings, ``DM(iterations=300)``; a name, ``"dm"``, stands for its recipe for these data (``lib.recipes``).
        train: the data to distil: an ``ImageSet``, or both halves (``lib.data.Data``), of which the training half is taken.
        ipc: stored images per class; seed: of every random choice.
        snapshots: steps whose images are kept (0 is the initial set).
        checkpoint: file to save the state to, at least every ``checkpoint_seconds``, and to go on from if it exists; removed at
            the end. With ``cache`` it has a place of its own.
        cache: keep the result under a key of configuration, data, seed and code, and return it at once when it is there.
        progress: a bar with method, data and the last value of the first metric.
        callback: called with (steps done, state, metrics) after every step.
    Raises:
        CompanionError: ipc, seed or a number among the settings out of range; images or labels that are none; a checkpoint of another
            configuration; a non-finite value (the last good state stays in the checkpoint, if there is one).
    """
    check_default_type()
    train = getattr(train, "train", train)
    train.check()
    if isinstance(method, str):
        from lib.methods import recipes

        method = recipes(method).find(train, ipc).method
    no_negative(method)
    ipc, seed = check_ipc(ipc, train.smallest_class), check_seed(seed)
    key = configuration_key(method, train, ipc, seed)
    stored = cache_dir() / f"{key}-{digest(sorted(snapshots))[:8]}.safetensors"
    if cache and stored.is_file() and (found := _read_result(stored)) is not None:
        return dataclasses.replace(found, synset=found.synset.to(train.device))
    kept = cache or checkpoint is not None  # otherwise only an interruption writes it
    checkpoint = Path(checkpoint or stored.with_suffix(".checkpoint"))
    with Meter(train.device) as meter:
        run = _Run(
            method, train, ipc, seed, key, checkpoint, checkpoint_seconds if kept else None, sorted(snapshots)
        )
        run.to_the_end(progress, callback)
        synset = method.finish(run.state)
    synset.meta = _provenance(method, train, ipc, seed) | synset.meta
    history = {name: torch.cat(parts) for name, parts in run.history.items()}
    result = Distilled(synset, history, run.snapshots, meter.seconds + run.seconds_before, meter.peak_bytes)
    if cache:
        _write_result(stored, result)
    checkpoint.unlink(missing_ok=True)
    return result


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[list]:
    """A list that an interruption fills, so that the step under way ends first; a second one comes at once.

    Only the main thread gets signals; elsewhere, and where interruptions are ignored, nothing changes.
    """
    asked: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield asked
        return

    def note(number: int, frame) -> None:
        if asked:
            before(number, frame)
        asked.append(number)

    signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def no_negative(method: Any) -> None:
    """Refuse numbers among a method's fields that are negative, unless their default is, or not finite."""
    for field in dataclasses.fields(method):
        value, default = getattr(method, field.name), field.default
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        least = min(0, default) if isinstance(default, (int, float)) else 0
        if number and value != default and not least <= value < math.inf:
            raise CompanionError(
                f"{type(method).__name__}: {field.name} {value!r} is not allowed: it must be finite and at least {least}"
            )


def configuration_key(method: Method, train, ipc: int, seed: int) -> str:
    """Hash of everything that the result depends on, the code of the method included."""
    return digest(
        method,
        train.fingerprint,
        ipc,
        seed,
        train.device.type,
        code_digest(*sorted(_modules(method)), __name__),
    )


def _modules(value: Any) -> set[str]:
    """The modules of a method and of the values in its fields: a distance is written elsewhere than the method it is given to."""
    if isinstance(value, (tuple, list)):
        return set().union(*map(_modules, value))
    if not dataclasses.is_dataclass(value):
        return set()
    parts = (_modules(getattr(value, field.name)) for field in dataclasses.fields(value))
    return {type(value).__module__}.union(*parts)


class _Run:
    """The state of a distillation under way, and its checkpoints."""

    def __init__(self, method, train, ipc, seed, key, checkpoint, checkpoint_seconds, wanted):
        self.method, self.key, self.checkpoint, self.every = method, key, checkpoint, checkpoint_seconds
        self.title = f"{type(method).__name__} on {train.name} IPC {ipc}"
        data = f"{train.name} {train.fingerprint[:8]} on {train.device.type}"
        self.about = describe(method) | {"data": data, "ipc": ipc, "seed": seed}
        self.generator = torch.Generator(train.device).manual_seed(seed)
        self.total, self.wanted = method.total_steps(ipc), wanted
        self.state = method.begin(train, ipc, self.generator)
        self.done, self.seconds_before = 0, 0.0
        self.history: dict[str, list[Tensor]] = {}
        self.snapshots: dict[int, Tensor] = {}
        self.started = time.perf_counter()
        if checkpoint.is_file():
            self._load()
        elif 0 in wanted:
            self._snapshot()

    def to_the_end(self, progress: bool, callback) -> None:
        from tqdm.auto import tqdm

        good, due, saved, pending = None, False, time.perf_counter(), []
        look = {"leave": False, "disable": not progress, "unit": "step", "desc": self.title}
        with tqdm(total=self.total, initial=self.done, **look) as bar, _asked_to_stop() as asked:
            while self.done < self.total:
                if not pending and self.every is not None:
                    good = self._core()
                    if due:
                        self._save(good)
                        saved = time.perf_counter()
                try:
                    metrics = self.method.step(self.state, self.generator)
                except KeyboardInterrupt:  # asked for twice, or not in the main thread
                    raise KeyboardInterrupt(self._interrupted(good)) from None
                self.done += 1
                pending.append(metrics)
                if self.done in self.wanted:
                    self._snapshot()
                if callback is not None:
                    callback(self.done, self.state, metrics)
                # slow steps are looked at one by one, so that a checkpoint is never older than the caller allows
                due = self.every is not None and time.perf_counter() - saved > self.every
                if due or asked or len(pending) == GUARD_EVERY or self.done == self.total:
                    self._look(pending, good)
                    bar.update(len(pending))
                    bar.set_postfix_str(self._last(), refresh=False)
                    pending = []
                if asked and self.done < self.total:
                    raise KeyboardInterrupt(self._interrupted(self._core())) from None

    def _last(self) -> str:
        """The first metric as it was last looked at."""
        name = next(iter(self.history), None)
        return "" if name is None else f"{name} {self.history[name][-1][-1].item():.3g}"

    def _interrupted(self, good: dict | None) -> str:
        """Keep a good state, and say so."""
        name = type(self.method).__name__
        if good is None:
            return f"{name} was interrupted in step {self.done + 1} of {self.total}, whose state is lost"
        self._save(good)
        return f"{name} was interrupted; the same call goes on from step {good['done']} of {self.total} ({self.checkpoint})"

    def _look(self, pending: list[dict[str, Tensor]], good: dict | None) -> None:
        """Move the metrics to the history; stop if one of them, or a learned value, is not finite."""
        columns = {name: torch.stack([metrics[name] for metrics in pending]).cpu() for name in pending[0]}
        first = self.done - len(pending) + 1
        for name, values in columns.items():
            bad = (~values.isfinite()).nonzero()
            if len(bad):
                self._stop(
                    f"{name} is {values[bad[0, 0]].item()} at step {first + bad[0, 0].item()}",
                    first - 1,
                    good,
                )
        if not all(bool(tensor.isfinite().all()) for tensor in learned(self.state)):
            self._stop(f"a learned value is not finite after step {self.done}", first - 1, good)
        for name, values in columns.items():
            self.history.setdefault(name, []).append(values)

    def _stop(self, what: str, good_step: int, good: dict | None) -> None:
        kept = "; no checkpoint was asked for"
        if good is not None:
            self._save(good)
            kept = f"; the last good state (step {good_step}) is in {self.checkpoint}"
        raise CompanionError(f"{type(self.method).__name__} stopped: {what}{kept}")

    def _snapshot(self) -> None:
        self.snapshots[self.done] = self.method.finish(self.state).stored()[0].cpu()

    def _core(self) -> dict[str, Any]:
        """What the next step depends on, copied."""
        return {"done": self.done, "generator": self.generator.get_state().clone(), "state": pack(self.state)}

    def _save(self, core: dict[str, Any]) -> None:
        """Write a checkpoint of plain tensors, numbers and strings (loadable with ``weights_only=True``)."""
        packed = core | {
            "key": self.key,
            "configuration": self.about,
            "seconds": self.seconds_before + time.perf_counter() - self.started,
            "history": {name: torch.cat(parts)[: core["done"]] for name, parts in self.history.items()},
            "snapshots": {step: images for step, images in self.snapshots.items() if step <= core["done"]},
        }
        buffer = io.BytesIO()  # torch.save on a file hides a full disk behind an error of its own
        torch.save(packed, buffer)
        with atomic(self.checkpoint) as temporary:
            temporary.write_bytes(buffer.getbuffer())

    def _load(self) -> None:
        packed = read_checkpoint(self.checkpoint)
        if packed["key"] != self.key:
            mine, theirs = self.about, packed["configuration"]
            names = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
            what = ", ".join(f"{n}={theirs.get(n)!r} there, {mine.get(n)!r} here" for n in names)
            raise CompanionError(
                f"the checkpoint {self.checkpoint} is of another run ({what or 'other code'}); "
                "remove it or name another file"
            )
        unpack(self.state, packed["state"])
        self.generator.set_state(packed["generator"])
        self.done, self.seconds_before = packed["done"], packed["seconds"]
        self.history = {name: [values] for name, values in packed["history"].items()}
        self.snapshots = packed["snapshots"]


def describe(method: Method) -> dict[str, Any]:
    """Name and fields of a method, as plain values; parts that are values themselves say their kind."""
    fields = {field.name: _plain(getattr(method, field.name)) for field in dataclasses.fields(method)}
    return {"method": type(method).__name__} | fields


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__} | fields
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content; nothing in it can run code."""
    try:
        packed = torch.load(path, weights_only=True, map_location="cpu")
        if isinstance(packed, dict) and CHECKPOINT <= packed.keys():
            return packed
    except Exception as error:  # torch.load raises a dozen kinds for damaged files
        raise CompanionError(
            f"the checkpoint {path} is damaged ({type(error).__name__}): remove it to start again"
        ) from error
    raise CompanionError(f"{path} is not a checkpoint of ours: remove it or name another file")


# -- a method's state: a dataclass of tensors, optimisers, ensembles and numbers -----------------------------------------


def pack(state: Any) -> dict[str, Any]:
    """A copy of the state's fields as plain values. Fields marked ``metadata={"constant": True}`` are left to ``begin``."""
    return {name: _copy(value) for name, value in _fields(state)}


def unpack(state: Any, packed: Mapping[str, Any]) -> None:
    """Put packed values back, in place where there is a place (leaf tensors stay the ones their optimiser knows)."""
    for name, value in _fields(state):
        new = packed[name]
        if isinstance(value, Tensor) and isinstance(new, Tensor) and value.shape == new.shape:
            with torch.no_grad():
                value.copy_(new)
        elif isinstance(value, Ensemble):
            for mine, saved in ((value.parameters, new["parameters"]), (value.buffers, new["buffers"])):
                for key, tensor in mine.items():
                    with torch.no_grad():
                        tensor.copy_(saved[key])
        elif hasattr(value, "load_state_dict"):
            value.load_state_dict(new)
        elif dataclasses.is_dataclass(value):
            unpack(value, new)
        else:
            setattr(state, name, new)


def learned(state: Any) -> list[Tensor]:
    """The tensors of the state that carry gradients, those of networks and of states within it included."""
    found = []
    for _, value in _fields(state):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, torch.nn.Module):
            found += value.parameters()
        elif dataclasses.is_dataclass(value) and not hasattr(value, "state_dict"):
            found += learned(value)
    return [tensor for tensor in found if tensor.requires_grad]


def _fields(state: Any) -> list[tuple[str, Any]]:
    return [
        (field.name, getattr(state, field.name))
        for field in dataclasses.fields(state)
        if not field.metadata.get("constant")
    ]


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Ensemble):
        return {"parameters": _copy(value.parameters), "buffers": _copy(value.buffers)}
    if hasattr(value, "state_dict"):
        return _copy(value.state_dict())
    if dataclasses.is_dataclass(value):
        return pack(value)
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"a state may hold tensors, optimisers, ensembles and plain values, not {type(value).__name__}"
    )


# -- results in the cache -------------------------------------------------------------------------------------------------


def settings_digest(method: Method) -> str:
    """Twelve hexadecimal digits that tell the settings of a method: its class and the values of all its fields."""
    return digest(method)[:12]


def identity(method: Method) -> dict[str, Any]:
    """What tells one method and its settings from another: registry name, digest and the settings themselves."""
    from lib.methods import name_of  # the registry; it imports no method

    return {"method": name_of(method), "config": settings_digest(method), "settings": describe(method)}


def _provenance(method: Method, train, ipc: int, seed: int) -> dict[str, Any]:
    about = {"dataset": train.name, "data_sha256": train.fingerprint, "ipc": ipc, "seed": seed}
    return identity(method) | about


def _write_result(path: Path, result: Distilled) -> None:
    tensors = {f"set.{name}": tensor for name, tensor in result.synset.tensors().items()}
    tensors |= {f"history.{name}": values for name, values in result.history.items()}
    tensors |= {f"snapshot.{step}": images.contiguous() for step, images in result.snapshots.items()}
    header = result.synset.header() | {"seconds": repr(result.seconds), "peak_bytes": str(result.peak_bytes)}
    write_tensors(path, tensors, header)


def _read_result(path: Path) -> Distilled | None:
    """The stored result; a damaged file counts as absent."""
    try:
        header, tensors = read_safetensors(path)
        part = {
            kind: {
                name.split(".", 1)[1]: value for name, value in tensors.items() if name.startswith(kind + ".")
            }
            for kind in ("set", "history", "snapshot")
        }
        synset = SyntheticSet.from_parts(header, part["set"], path)
        snapshots = {int(step): images for step, images in part["snapshot"].items()}
        seconds, peak = float(header["seconds"]), int(header["peak_bytes"])
    except (CompanionError, KeyError, ValueError):
        return None
    return Distilled(synset, part["history"], snapshots, seconds, peak) if math.isfinite(seconds) else None
