"""A notebook's run: seeds, device and folders at the start; what it wrote, measured, claimed at the end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from lib.companion import provenance, shown, tables, verdicts
from lib.companion.profiles import Profile, cases_of, profile_named
from lib.companion.verdicts import Verdict
from lib.system.allocator import keep_large_blocks
from lib.system.errors import CompanionError
from lib.system.files import ROOT, inside, write_text
from lib.system.measure import Meter
from lib.system.naming import BY_HAND, CASE_PARAMETERS, run_name, without_usual, word

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
SEEDS = 2**32  # numpy takes no more
STREAMS = 1_000_000  # seeds of different runs never share a generator stream


def output_root() -> Path:
    """Folder that holds ``results/`` and ``figures/``: ``$COMPANION_OUT``, else the project."""
    return Path(os.environ.get("COMPANION_OUT") or ROOT)


def start(
    notebook: str,
    *,
    profile: str = "cpu",
    seed: int = 0,
    dataset: str | None = None,
    ipc: int | None = None,
    changes: dict[str, dict] | None = None,
    device: str | None = None,
    threads: int | None = None,
    title: str = "",
    claim: str = "",
) -> Run:
    """Prepare the process for a reproducible run and return its :class:`Run`.

    Sets the allocator, seeds ``random``, numpy and torch, fixes the thread count (``threads``, else
    ``OMP_NUM_THREADS``, else torch's own choice), switches deterministic algorithms on in the ``cpu`` profile
    and applies the plotting style.

    Args:
        notebook: file name without suffix, such as ``20_dm``; names the output folders.
        profile: ``cpu``, ``overnight`` or ``paper``.
        seed: whole number from 0 to 2^32 - 1; every generator of the run derives from it.
        dataset, ipc: override the profile's cases (see :func:`lib.companion.profiles.cases_of`).
        changes: fields of a profile that are others in this notebook, by the profile's name: ``{"overnight": {"sets": 3}}``; ``cases``
            hold as long as no data set is asked for.
        device: ``cpu``, ``cuda``, ...; default the profile's.
        title, claim: heading and one-line claim of the gallery card.

    Raises:
        CompanionError: for a wrong value of any argument, in one line that lists what is allowed.
    """
    from lib.companion.theme import use_style
    from lib.system.device import resolve_device

    chosen = profile_named(profile)
    _whole("seed", seed, 0)
    if seed >= SEEDS:
        raise CompanionError(
            f"seed must be below {SEEDS}, of which no two give the same stream, not {seed!r}"
        )
    if threads is not None:
        _whole("threads", threads, 1)
    if not NAME.fullmatch(notebook):
        raise CompanionError(f"a notebook's name is its file name without suffix, not {notebook!r}")
    own = (changes or {}).get(profile, {})
    chosen = replace(chosen, **(own | ({} if dataset is None else {"cases": chosen.cases})))
    cases = cases_of(chosen, dataset, ipc)
    where = resolve_device(device or chosen.device)

    keep_large_blocks()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    threads = threads or int(os.environ.get("OMP_NUM_THREADS") or 0)
    if threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(chosen.name == "cpu" and where.type == "cpu")
    # Filling fresh memory guards against reading it uninitialised; it decides no result and costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False
    use_style()
    tables.use_display()
    given = {"profile": profile, "seed": seed, "dataset": dataset, "ipc": ipc, "device": device}
    return Run(notebook, chosen, seed, cases, where, parameters=given, title=title, claim=claim)


def _whole(kind: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise CompanionError(f"{kind} must be a whole number >= {least}, not {value!r}")


@dataclass(eq=False)
class Run:
    """What a notebook reads (profile, cases, device, folders) and the only way by which it writes."""

    notebook: str
    profile: Profile
    seed: int
    cases: tuple[tuple[str, int], ...]
    device: torch.device
    parameters: dict = field(default_factory=dict)
    title: str = ""
    claim: str = ""
    name: str = ""  # of the run, as its parameters have it
    config: dict = field(default_factory=dict)
    stages: dict = field(default_factory=dict)
    judged: list[Verdict] = field(default_factory=list)
    headlines: dict = field(default_factory=dict)
    saved: dict = field(default_factory=lambda: {"figures": {}, "tables": {}, "sets": {}})
    started: float = field(default_factory=time.perf_counter)
    git: dict = field(default_factory=provenance.git_state)

    def __post_init__(self) -> None:
        self.name = self.name or _named(self.profile.name, self.parameters)
        self.results = inside(output_root() / "results", self.name) / self.notebook
        self.figures = inside(output_root() / "figures", self.name) / self.notebook

    def __repr__(self) -> str:
        cases = ", ".join(f"{dataset} IPC {ipc}" for dataset, ipc in self.cases)
        return (
            f"{self.notebook}: profile {self.profile.name}, seed {self.seed}, {cases}, on {self.device.type}"
        )

    @property
    def long(self) -> bool:
        """Whether the long sections are computed, too: in every profile but the first look."""
        return self.profile.name != "cpu"

    @property
    def bars(self) -> bool:
        """Whether progress bars are shown: only where somebody watches, and ``$COMPANION_BARS`` (0 or 1)
        decides first.
        """
        wish = os.environ.get("COMPANION_BARS")
        if wish:
            return wish != "0"
        if "PYTEST_VERSION" in os.environ:
            return False
        if _in_notebook():  # JupyterLab and VS Code name the session; papermill and nbval do not
            return "JPY_SESSION_NAME" in os.environ or "VSCODE_PID" in os.environ
        return sys.stderr.isatty()

    def generator(self, offset: int = 0) -> torch.Generator:
        """A fresh generator on the run's device; equal (seed, offset) give equal streams, different ones do
        not overlap.
        """
        if not 0 <= offset < STREAMS:
            raise CompanionError(f"a seed offset lies in 0 ... {STREAMS - 1}, not {offset!r}")
        return torch.Generator(self.device).manual_seed(self.seed * STREAMS + offset)

    def row(self, **fields) -> tables.Row:
        """A row of the results table with ``notebook`` and ``commit`` filled in; accuracies in percent."""
        return tables.Row(**{"notebook": self.notebook, "commit": self.git["commit"] or ""} | fields)

    def algorithm(self, name: str) -> None:
        """Show the plain version of a method (``lib/plain/<name>.py``), highlighted."""
        shown.algorithm(name)

    def settings(self, cases, name: str, variant: str = "", *, method=None, paper=None):
        """The table "here / paper" of the settings that differ (:func:`lib.companion.shown.settings`).

        Args:
            cases: one :class:`lib.companion.study.Case` or several.
        """
        several = cases if isinstance(cases, (list, tuple)) else [cases]
        return shown.settings(several, name, variant, method=method, paper=paper)

    def record(self, **config) -> None:
        """Add settings, fingerprints or counts to ``run.json``."""
        self.config.update(config)

    def headline(self, *, ours: str, published: str) -> None:
        """The two results that the gallery shows side by side; say data set and IPC in both, and "published"
        in the second.
        """
        self.headlines = {"ours": ours, "published": published}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the enclosed code: seconds and peak memory in MB go to ``run.json``; a name used again adds
        up.

        The peak is that of the stage above what was in use when it began (:class:`lib.system.measure.Meter`).
        """
        meter = Meter(self.device)
        try:
            with meter:
                yield
        finally:  # a stage that fails has cost its time too
            before = self.stages.get(name, {"seconds": 0.0, "peak_mb": 0.0})
            peak = max(before["peak_mb"], meter.peak_bytes / 1e6)
            self.stages[name] = {"seconds": before["seconds"] + meter.seconds, "peak_mb": peak}

    def save_table(self, frame, name: str = "table", digits: int = 1):
        """Write ``frame`` to ``results/<run>/<notebook>/<name>.csv``; returns it made readable, to be
        displayed.
        """
        tables.write_csv(frame, self._new("tables", self.results, name, ".csv"))
        return tables.readable(frame, digits)

    def save_figure(self, fig, name: str, caption: str, *, see: str, thumbnail: bool = False) -> None:
        """Write ``fig`` as PNG and show it, with the sentence that says what to see below it.

        In a notebook the figure is displayed here, with the caption as its alternative text, and then closed,
        so it must not be displayed again. Elsewhere it stays open. ``thumbnail`` puts it on the gallery card
        (else the first figure saved is there).

        Args:
            caption: what the figure shows, for those who do not see it.
            see: one sentence: what a reader should see in it. It holds no measured number, which would differ between machines.
        Raises:
            CompanionError: no such sentence, or the name is that of another figure of the run.
        """
        from lib.companion.theme import save_png

        if not see.strip().endswith("."):
            raise CompanionError(f"figure {name!r} needs one sentence that says what to see, not {see!r}")
        before = self.saved["figures"].get(name, {}).get("caption", caption)
        if before != caption and not self.bars:  # whoever works in a notebook edits captions and runs the cell again
            raise CompanionError(f"figure {name!r} is of {before!r} already; that of {caption!r} would replace it")
        png = self._new("figures", self.figures, name, ".png")
        save_png(fig, png, dict(self.cases))
        self.saved["figures"][name] |= {"caption": caption, "see": see, "thumbnail": thumbnail}
        if _in_notebook():
            _show(fig, caption)
            shown.markdown(see)

    def save_set(self, synset, name: str) -> Path:
        """Store a synthetic set through its own ``save(path)`` as
        ``results/<run>/<notebook>/<name>.safetensors``.
        """
        path = self._new("sets", self.results, name, ".safetensors")
        synset.save(path)
        return path

    def _new(self, kind: str, folder: Path, name: str, suffix: str) -> Path:
        path = folder / f"{word(name, 100)}{suffix}"  # a name may hold that of a user's data set
        self.saved[kind][name] = {"file": path.relative_to(output_root()).as_posix()}
        return path

    def check(self, text: str, ok: bool, **numbers) -> bool:
        """Print and keep a check (an identity, a cost, a sanity test); ``numbers`` (or results, Spreads) are what it was judged by."""
        return self._judge(verdicts.judge_check(text, ok, **numbers))

    def close(self, text: str, value, target: float, tol: float) -> bool:
        """The check ``|value - target| <= tol``; ``value`` is a number, or a result or Spread, whose mean is taken."""
        return self._judge(verdicts.judge_close(text, value, target, tol))

    def better(self, text: str, a, b, source: str, *, lower=False, paired=False, digits=1) -> bool:
        """The claim "a is better than b": confirmed, contradicted or not resolved by the 95 % interval of the difference
        (:func:`lib.companion.verdicts.judge_better`).

        Args:
            a, b: results or Spreads of independent repetitions.
            source: section or table of the paper that says so; "this companion" for a sentence of ours.
            lower: smaller is better, as of losses and gaps.
            paired: a and b are the same repetitions under two conditions.
            digits: decimals of the numbers in the line.
        """
        return self._judge(
            verdicts.judge_better(text, a, b, source, lower=lower, paired=paired, digits=digits)
        )

    def better_in(
        self, table, text: str, a, b, source: str, *, needs: str = "the profile overnight", **options
    ) -> None:
        """:meth:`better` of the entries ``a`` and ``b`` of a table of results; not tested where one of them was not made.

        Args:
            table: key -> result or Spread; needs: what a missing entry would need; options: as of :meth:`better`.
        """
        if a in table and b in table:
            self.better(text, table[a], table[b], source, **options)
        else:
            self.untested(text, source, needs=needs)

    def untested(self, text: str, source: str, *, needs: str) -> None:
        """A claim of the paper that is not judged here, and what that would need."""
        self._judge(verdicts.judge_untested(text, source, needs))

    def _judge(self, verdict: Verdict) -> bool:
        self.judged.append(verdict)
        print(verdict.line)
        return verdict.ok

    def finish(self, *, title: str = "", claim: str = "") -> None:
        """Write ``run.json``: where every file, number and verdict of this run comes from."""
        self.title, self.claim = title or self.title or self.notebook, claim or self.claim
        record = {
            "notebook": self.notebook,
            "run": self.name,
            "title": self.title,
            "claim": self.claim,
            "headline": self.headlines,
            "profile": self.profile.name,
            "parameters": self.parameters,
            "cases": self.cases,
            "repetitions": {key: getattr(self.profile, key) for key in ("sets", "networks", "random_draws")},
            "config": self.config,
            "verdicts": [
                {
                    "text": v.text,
                    "source": v.source,
                    "outcome": v.outcome,
                    "said": v.said,
                    "numbers": v.numbers,
                }
                for v in self.judged
            ],
            **{kind: self._hashed(kind) for kind in ("figures", "tables", "sets")},
            "git": self.git,
            "versions": provenance.versions(),
            "device": provenance.device_name(self.device),
            "threads": torch.get_num_threads(),
            "stages": self.stages,
            "seconds": time.perf_counter() - self.started,
            "peak_mb": max(
                [provenance.peak_mb(self.device), *(stage["peak_mb"] for stage in self.stages.values())]
            ),
        }
        write_text(
            self.results / "run.json",
            json.dumps(provenance.plain(record), indent=1, ensure_ascii=False) + "\n",
        )

    def _hashed(self, kind: str) -> dict:
        files = self.saved[kind]
        return {
            name: entry | {"sha256": provenance.sha256(output_root() / entry["file"])}
            for name, entry in files.items()
        }


def _named(profile: str, parameters: dict) -> str:
    """The run's name: what ``run_all.sh`` calls it in ``$COMPANION_RUN``, if these are the parameters that it gave; a notebook that
    somebody runs by hand, in JupyterLab or with papermill, has a place of its own and replaces nothing.
    """
    changed = without_usual({name: parameters.get(name) for name in CASE_PARAMETERS})
    ours, given = run_name(profile, changed).split("+"), os.environ.get("COMPANION_RUN", "").split("+")
    cases = [part for part in given[1:] if part.split("=")[0] in CASE_PARAMETERS]
    return "+".join(given) if [given[0], *cases] == ours else run_name(profile, changed, BY_HAND)


def _in_notebook() -> bool:
    """Whether this process is a Jupyter kernel (others may have imported one)."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


def _show(fig, caption: str) -> None:
    """Display ``fig`` in the notebook with its caption as alternative text, then close it."""
    import matplotlib.pyplot as plt
    from IPython.display import display

    display(fig, metadata={"image/png": {"alt": caption}})
    plt.close(fig)
