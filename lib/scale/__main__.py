"""``python -m lib.scale``: plan a run, list its units, run them, say how far it is::

python -m lib.scale run --out runs/toy --data digits --ipc 1
python -m lib.scale list --out runs/toy --stage recover
python -m lib.scale run --out runs/toy --stage recover --unit 3
python -m lib.scale status --out runs/toy

ImageNet-1K and its named subsets are read at 224 pixels: the teacher sees random parts of the whole files, statistics and tests
what is left of a shorter side of 256. Every command may be killed at any moment and given again; squeeze, recovery and training
are kept once a minute in the folder `checkpoints` of the run.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import torch

from lib.scale import sizes
from lib.scale.plan import Run, keep, open_run, read_file
from lib.scale.runner import run_stages, run_unit
from lib.scale.store import damage, done
from lib.scale.units import STAGES, Unit, check, unit, units
from lib.system.device import resolve_device
from lib.system.errors import CompanionError, unknown
from lib.system.terminal import Parser, pair

COMMANDS = {
    "plan": "check a plan and write it into its folder",
    "list": "list the units",
    "run": "run the units that are not there yet (all, some stages, or some units)",
    "status": "how many units are there, per stage, and which files are damaged",
    "sizes": "units, arithmetic and bytes of every stage, by counting",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    top = Parser(prog="python -m lib.scale", description=__doc__, formatter_class=form)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="folder of the run")
        if name in ("list", "run"):
            sub.add_argument(
                "--stage", nargs="+", metavar="STAGE", help=f"of {', '.join(STAGES)}; default: all"
            )
        if name == "run":
            sub.add_argument(
                "--unit", nargs="+", metavar="N", help="numbers and ranges, such as 17 or 0-9; run here"
            )
            sub.add_argument("--workers", help=argparse.SUPPRESS)
            sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
            sub.add_argument("--force", action="store_true", help="with --unit: also if its file is there")
            sub.add_argument("--dry-run", action="store_true", help="say what would run")
        _plan_options(sub.add_argument_group("a new plan (an existing folder knows its own)"))
    return top


def _plan_options(group) -> None:
    group.add_argument("--plan", type=Path, metavar="FILE", help="YAML or JSON with the fields below")
    for name, text in {
        "data": "data set, such as digits, imagenet, imagenette, folder:/path",
        "root": "where data sets lie",
        "method": "wmdd or sre2l",
        "variant": "of the method's published settings, such as CDA",
        "recipe": "data set whose settings are taken (default: those of the data)",
        "labels": "soft labels: recompute or store",
        "images": "somebody else's set (folders of images by class, or .safetensors) to judge instead of recovering one",
        "precision": "float32, or bfloat16: networks under autocast (the distilled set is another one then)",
    }.items():
        group.add_argument(f"--{name}", help=text)
    for name, text in {
        "ipc": "images per class",
        "size": "side in pixels; default: 224 for imagenet and its named subsets, else as stored",
        "resize": "what the shorter side is scaled to before the centre is cut out; default: 256 for 224 with ImageNet's settings",
        "seed": "of barycenters and recovery",
        "classes-per-unit": "of the class statistics",
        "epochs-per-unit": "of stored labels",
        "validate-every": "epochs between looks at the test half; the last epoch is reported",
    }.items():
        group.add_argument(f"--{name}", type=int, metavar="N", help=text)
    group.add_argument("--architectures", nargs="+", metavar="NET", help="networks to train")
    group.add_argument(
        "--columns", nargs="+", metavar="LABELS", help="soft, hard; default: both, each with a network"
    )
    group.add_argument(
        "--channels-last", action="store_true", default=None, help="images pixel by pixel in memory, on a GPU"
    )
    group.add_argument("--seeds", nargs="+", type=int, metavar="N", help="seeds of these networks")
    for name, text in {
        "options": "field of the method",
        "teacher": "field of the teacher's recipe: network, weights (pretrained or a file), epochs, ...",
        "relabel": "field of relabelling and training: epochs, batch, ...",
    }.items():
        group.add_argument(f"--{name}", nargs="+", metavar="NAME=VALUE", help=text)


def fields_of(given: argparse.Namespace) -> dict:
    """The plan fields on the command line, over those of its file."""
    fields = read_file(given.plan) if given.plan else {}
    for name in ("data", "root", "method", "variant", "recipe", "labels", "images", "precision", "ipc", "size", "resize",
                 "seed", "classes_per_unit", "epochs_per_unit", "validate_every", "architectures", "columns", "channels_last",
                 "seeds"):  # fmt: skip
        if (value := getattr(given, name)) is not None:
            fields[name] = value
    for name in ("options", "teacher", "relabel"):
        if (pairs := getattr(given, name)) is not None:
            fields[name] = {**fields.get(name, {}), **dict(map(pair, pairs))}
    return fields


def numbers(words: list[str]) -> list[int]:
    """``["3", "5-7"]`` -> ``[3, 5, 6, 7]``."""
    found = []
    for word in words:
        first, dash, last = word.partition("-")
        if not (first.isdigit() and (last.isdigit() or not dash)):
            raise CompanionError(f"--unit takes numbers and ranges such as 17 or 0-9, not {word!r}")
        found += range(int(first), int(last or first) + 1)
    return found


def stages_of(given: argparse.Namespace) -> list[str]:
    """The stages meant, in their order."""
    for name in given.stage or ():
        if name not in STAGES:
            raise unknown("stage", name, STAGES)
    return [stage for stage in STAGES if not given.stage or stage in given.stage]


# -- commands -------------------------------------------------------------------------------------------------------------


def list_units(run: Run, stages: list[str]) -> None:
    for stage in stages:
        for one in units(run, stage):
            print(f"{'there' if done(run, one) else '-----'}  {one}")


def status(run: Run) -> int:
    """Print one line per stage; 0 if everything is there, 1 if something is damaged or missing."""
    complete = True
    for stage in STAGES:
        there = units(run, stage)
        found = [one for one in there if done(run, one)]
        print(f"{stage:<11}{len(found):>6}/{len(there)}")
        for one in there:
            if text := damage(one.path(run)):
                print(f"  {text}")
        complete &= len(found) == len(there)
    return 0 if complete else 1


def chosen(run: Run, given: argparse.Namespace) -> list[Unit]:
    """``--stage S --unit N ...``: these units."""
    if len(stages := stages_of(given)) != 1:
        raise CompanionError("--unit needs one --stage")
    return [unit(run, stages[0], number) for number in numbers(given.unit)]


def run_some(run: Run, given: argparse.Namespace) -> None:
    """All units of the stages, or the chosen ones, here, in this process, one after another."""
    device = str(resolve_device(given.device))
    if device == "cpu":
        torch.set_num_threads(1)  # sums over threads differ in their last digits
    if not given.unit:
        run_stages(run, stages_of(given), device, lambda text: print(text, flush=True))
        return
    for one in chosen(run, given):
        seconds = run_unit(run, one, device, given.force)
        print(f"{one}: " + ("there already" if seconds is None else f"{seconds:.1f} s"), flush=True)


def main(words: list[str] | None = None) -> int:
    given = parser().parse_args(words)
    if getattr(given, "workers", None) is not None:
        raise CompanionError(
            "units run one after another here; side by side by Snakemake: snakemake -s workflow/scale.smk "
            f"--profile workflow/profiles/local --cores {given.workers} --config out={given.out}"
        )
    dry = given.command in ("list", "status", "sizes") or getattr(given, "dry_run", False)
    run = open_run(given.out, fields_of(given))
    check(run)
    if not dry:
        keep(run)
    if given.command == "plan":
        print(f"{run.folder}: " + ", ".join(f"{len(units(run, stage))} {stage}" for stage in STAGES))
    elif given.command == "list":
        list_units(run, stages_of(given))
    elif given.command == "status":
        return status(run)
    elif given.command == "sizes":
        print(sizes.table(run))
    elif given.dry_run:
        every = [one for stage in stages_of(given) for one in units(run, stage)]
        for one in chosen(run, given) if given.unit else every:
            if not done(run, one):
                print(one)
    else:
        run_some(run, given)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except CompanionError as error:
        print(f"lib.scale: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
