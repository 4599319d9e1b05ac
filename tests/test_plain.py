"""Every method against its plain version (``lib.plain``): the same random numbers, equal tensors after a few steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import generator

from lib.distill import distill
from lib.methods import method as class_of
from lib.plain import plain, text

NET = "convnet-d2-w4"


@dataclass(frozen=True)
class Case:
    """Settings under which a method is compared, and how closely."""

    method: Any
    ipc: int = 2
    rtol: float = 1e-4
    atol: float = 1e-5


DM = class_of("dm")(iterations=5, real_batch=8, network=NET)
# name -> cases; the settings are those that the plain version reads
CASES = {
    "dm": [Case(replace(DM, augmentation=names)) for names in ("none", "data", "flip_crop")],
}


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name, cases in CASES.items() for case in cases],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_method_equals_its_plain_version(toy, name, case):
    got = distill(case.method, toy.train, case.ipc, 5)
    wanted, losses = plain(name)(case.method, toy.train, case.ipc, generator(5))
    images, labels = wanted if isinstance(wanted, tuple) else (wanted, None)
    torch.testing.assert_close(got.synset.codes, images, rtol=case.rtol, atol=case.atol)
    if labels is not None:
        torch.testing.assert_close(got.synset.labels, labels, rtol=case.rtol, atol=case.atol)
    if len(losses):
        loss = torch.as_tensor(losses, dtype=got.history["loss"].dtype)
        torch.testing.assert_close(got.history["loss"], loss, rtol=case.rtol, atol=case.atol)


@pytest.mark.parametrize("name", CASES)
def test_the_plain_version_can_be_read(name):
    lines = [line for line in text(name).splitlines() if line.strip()]
    assert 8 <= len(lines) <= 45, f"lib/plain/{name}.py has {len(lines)} lines"
