"""Ctrl-C and the stop button of JupyterLab, heard between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def asked_to_stop() -> Iterator[list]:
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
