"""How pytest and nbval run here: outputs of a test go to a temporary folder, notebooks are compared by their
text.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent

# Kernels inherit the environment: nothing that a test runs may overwrite the committed results and figures.
_scratch = None
if "COMPANION_OUT" not in os.environ:
    _scratch = os.environ["COMPANION_OUT"] = tempfile.mkdtemp(prefix="companion-tests-")
os.environ["COMPANION_BARS"] = "0"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

# What differs between machines or versions without meaning anything; tables and verdicts are compared as
# plain text.
UNSTABLE = ("stderr", "text/html", "image/png", "image/svg+xml", "application/vnd.jupyter.widget-view+json")


def pytest_collectstart(collector):
    """nbval's notebooks carry the list of output types that are not compared."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare = (*collector.skip_compare, *UNSTABLE)


def pytest_runtest_setup(item):
    """Begin no further notebook after the time that the test command was given; what was left out is reported as skipped."""
    limit, notebook = os.environ.get("COMPANION_TEST_UNTIL"), item.parent
    if limit and hasattr(notebook, "skip_compare"):
        if not hasattr(notebook, "in_time"):
            notebook.in_time = time.time() < float(limit)
        if not notebook.in_time:
            pytest.skip("not begun within COMPANION_TEST_MINUTES")


def pytest_unconfigure():
    """Remove the temporary outputs."""
    if _scratch:
        shutil.rmtree(_scratch, ignore_errors=True)
