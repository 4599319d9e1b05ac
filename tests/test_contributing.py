"""CONTRIBUTING.md keeps its word: the worked example runs as it stands there, and what it names exists."""

from __future__ import annotations

import importlib
import re
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import test_plain
import torch
from helpers import generator

import lib.methods
import lib.plain
from lib.distill import distill
from lib.system.files import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# the text of every code block by its first line
BLOCKS = dict(re.findall(r"```(?:python|yaml)\n# ([^\n]+)\n(.*?)```", TEXT, re.DOTALL))
CODE = ("lib/methods/trace.py", "lib/plain/trace.py")


def _block(place: str) -> str:
    return textwrap.dedent(BLOCKS[place])


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The example as the document has it, beside the library's own files."""
    for package, place in zip((lib.methods, lib.plain), CODE, strict=True):
        path = tmp_path / place
        path.parent.mkdir(parents=True)
        path.write_text(_block(place))
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(path.parent)])
    importlib.invalidate_caches()
    line = eval(f"dict({{{_block('METHODS in lib/methods/__init__.py')}}})", vars(lib.methods))
    monkeypatch.setitem(lib.methods.METHODS, "trace", line["trace"])
    yield lib.methods.method("trace")
    for name in ("lib.methods.trace", "lib.plain.trace"):
        sys.modules.pop(name, None)


def test_the_example_is_short():
    lines = [line for place in CODE for line in BLOCKS[place].splitlines() if line.strip()]
    assert len(lines) < 60


def test_the_example_equals_its_plain_version(example):
    names = vars(test_plain)
    cases = eval(f"dict({{{_block('CASES in tests/test_plain.py')}}})", names)
    for name, (case,) in cases.items():
        test_plain.test_the_method_equals_its_plain_version(name, case)
    test_plain.test_the_plain_version_can_be_read("trace")


def test_the_example_has_a_name_a_recipe_and_named_terms(example, toy):
    method = replace(
        lib.methods.recipes("trace").find(replace(toy.train, name="digits"), 2).method, iterations=2
    )
    assert lib.methods.name_of(method) == "trace" and lib.methods.title_of("trace") == "TraceDM"
    result = distill(replace(method, real_batch=8, network=test_plain.NET), toy.train, 2, 0)
    assert {"loss", "mean", "trace"} <= set(result.history)
    assert torch.isfinite(result.synset.codes).all()


def test_the_case_of_the_example_calls_the_distance_that_runs(example):
    sys.path.insert(0, str(ROOT / "tests" / "golden"))
    names = vars(importlib.import_module("arrays")) | vars(importlib.import_module("lib.match.distance"))
    names |= {"Trace": importlib.import_module("lib.methods.trace").Trace}
    exec(_block("tests/golden/cases_features.py"), names)
    z = {
        name: torch.randn(2, n, 5, generator=generator(n)).double().numpy()
        for name, n in (("real", 9), ("syn", 4))
    }
    got = names["trace_distance"]({"emb_real": z["real"], "emb_syn": z["syn"], "weight": np.array(0.5)})
    traces = {name: np.array([np.trace(np.cov(one.T, ddof=0)) for one in value]) for name, value in z.items()}
    np.testing.assert_allclose(got["loss_per_class"], 0.5 * (traces["real"] - traces["syn"]) ** 2, rtol=1e-12)


def test_files_that_the_document_names_exist():
    made = {"lib/methods/trace.py", "lib/plain/trace.py", "figures/index.html"}
    for name in set(re.findall(r"`((?:lib|tests|workflow|notebooks|benchmarks)/[\w/.]+)`", TEXT)) - made:
        assert (ROOT / name).exists(), name
