"""What a distillation says while it runs: one line of what it is about to do, then a bar with the first metric."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping

from torch import Tensor

from lib.methods.about import announcement


class Progress:
    """A bar over the steps on the error stream; silent if not ``shown`` (None: shown on a terminal).

    It is a context manager. The line stands before the bar, and stays; the bar goes at the end.
    """

    def __init__(self, shown: bool | None, method, data: str, ipc: int, total: int, done: int):
        from tqdm.auto import tqdm

        shown = sys.stderr.isatty() if shown is None else shown
        if shown:
            _say(announcement(method, data, ipc))
        title = f"{type(method).__name__} on {data} IPC {ipc}"
        self.bar = tqdm(total=total, initial=done, leave=False, disable=not shown, unit="step", desc=title)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def forward(self, steps: int, history: Mapping[str, list[Tensor]]) -> None:
        """Move on, and show the first metric as it was last looked at."""
        self.bar.update(steps)
        if name := next(iter(history), None):
            self.bar.set_postfix_str(f"{name} {history[name][-1][-1].item():.3g}", refresh=False)


@functools.cache
def _say(line: str) -> None:
    """Once: the sets of other seeds need no line of their own."""
    print(line, file=sys.stderr, flush=True)
