"""Arithmetic and bytes of every stage, by counting, before anything runs.

Operations are those of convolutions and matrix products, a multiplication and an addition each, counted by PyTorch on
tensors without content. An image-iteration of recovery is a forward pass and a backward pass to the pixels; one of training,
a forward pass and a backward pass to pixels and weights.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.utils.flop_counter import FlopCounterMode

from lib.recover.teacher import make_teacher
from lib.scale.plan import COLUMNS, Run
from lib.scale.units import STAGES, method, recipe, trainings, units

# Operations per second that CDA's README implies: 29 h on one RTX 4090 for 50 images of each of 1000 classes, 4000
# iterations of a ResNet-18 at 224 px, are 1.9e3 image-iterations of 7.3e9 operations a second. Published, not measured here.
PUBLISHED_RATE = 1.4e13


@dataclasses.dataclass(frozen=True)
class Size:
    """One stage: number of units, operations and bytes of all of them together."""

    stage: str
    units: int
    operations: float
    bytes: float


def passes(network: torch.nn.Module, shape: tuple[int, int, int]) -> dict[str, float]:
    """Operations per image of a pass ``forward``, of one and back to the pixels (``recover``) or the weights (``train``)."""
    network, counted = network.to("meta").eval(), {}
    for name, pixels, weights in (
        ("forward", False, False),
        ("recover", True, False),
        ("train", False, True),
    ):
        network.requires_grad_(weights)
        x = torch.zeros(2, *shape, device="meta", requires_grad=pixels)
        with FlopCounterMode(display=False) as counter:
            y = network(x)
            if y.requires_grad:
                y.sum().backward()
        counted[name] = counter.get_total_flops() / 2
    return counted


def sizes(run: Run) -> list[Size]:
    """All stages of a run."""
    plan, form, chosen, schedule = run.plan, run.form, method(run), recipe(run)
    shape = (form.channels, form.size, form.size)
    network = make_teacher(chosen.teacher.network, form)
    weights = sum(tensor.numel() * 4 for tensor in network.state_dict().values())
    layers = sum(m.num_features for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d))
    atoms = [m for m in network.modules() if isinstance(m, torch.nn.Linear)][-1].in_features * plan.ipc
    teacher = passes(network, shape)
    m, real, pixels = form.num_classes * plan.ipc, sum(form.counts), form.channels * form.size**2
    shown = m * schedule.epochs  # images shown to one network in training
    pairs = trainings(run)
    per_network = {name: passes(make_teacher(name, form), shape)["train"] for name, _ in pairs}
    trained = sum(per_network[name] for name, _ in pairs)
    asked = teacher["forward"] * shown
    soft, hard = (kind in plan.columns for kind in COLUMNS)
    operations = {
        "squeeze": 0 if chosen.teacher.weights else chosen.teacher.epochs * real * teacher["train"],
        "statistics": real * teacher["forward"],
        "recover": 0 if plan.images else m * chosen.iterations * teacher["recover"],
        "relabel": asked,
        "train": trained * shown * (soft + hard)
        + soft * (asked * len(pairs) if plan.labels == "recompute" else 0),
    }
    stored = {
        "squeeze": weights,
        "statistics": form.num_classes * (atoms + 2 * layers) * 4,
        "recover": m * pixels * (4 if chosen.storage == "float" else 1),
        "relabel": shown * form.num_classes * 2,
    }
    counts = {stage: len(units(run, stage)) for stage in STAGES}
    return [
        Size(s, n, operations.get(s, 0) if n else 0, stored.get(s, 0) if n else 0) for s, n in counts.items()
    ]


def table(run: Run, rate: float = PUBLISHED_RATE) -> str:
    """The stages as text; hours at ``rate`` operations per second."""
    lines = [f"{'stage':<11}{'units':>7}{'operations':>13}{'GPU hours':>11}{'min/unit':>10}{'bytes':>10}"]
    for size in sizes(run):
        hours = size.operations / rate / 3600
        each = hours * 60 / size.units if size.units else 0
        lines.append(
            f"{size.stage:<11}{size.units:>7}{size.operations:>13.2g}{hours:>11.3g}{each:>10.3g}{size.bytes:>10.2g}"
        )
    return "\n".join(
        [
            *lines,
            f"hours at {rate:.2g} operations per second ({'published' if rate == PUBLISHED_RATE else 'given'})",
        ]
    )
