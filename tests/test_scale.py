"""Units of work: the same files whoever computes them, nothing lost but the unit in flight, every mistake in one line."""

from __future__ import annotations

import ast
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import killed_after
from PIL import Image

from lib.data.imageset import Data
from lib.distill import distill
from lib.evaluate.relabel import evaluate_by_distillation
from lib.evaluate.soft_labels import soft_labels
from lib.recover.teacher import make_teacher, save_teacher, train_teacher
from lib.scale import sizes
from lib.scale.__main__ import main, numbers
from lib.scale.plan import Form, Plan, Run, _absolute, _opened, keep, open_run, real
from lib.scale.runner import run_stages, run_unit
from lib.scale.squeeze import train_shared
from lib.scale.stages import shown, the_set
from lib.scale.store import damage, discard_damaged, done, header, read, save
from lib.scale.units import STAGES, check, method, needs, recipe, unit, units
from lib.system.checkpoint import Checkpoint
from lib.system.errors import CompanionError

ROOT = Path(__file__).resolve().parent.parent
TOY = {
    "data": "digits",
    "ipc": 2,
    "options": {"iterations": 6, "block_images": 4, "mode": "alternating"},  # without the import of POT
    "teacher": {"network": "convnet-d2-w8-batch", "epochs": 1},
    "labels": "store",
    "relabel": {"epochs": 3},
    "seeds": (0, 1),
    "classes_per_unit": 4,
    "epochs_per_unit": 2,
}


def plan(folder: Path, **changes) -> Run:
    run = open_run(folder, TOY | changes)
    check(run)
    keep(run)
    return run


def all_units(run: Run) -> list:
    return [one for stage in STAGES for one in units(run, stage)]


def complete(run: Run) -> list:
    """Run here what is missing; the units that were computed."""
    return [one for one in all_units(run) if run_unit(run, one, "cpu") is not None]


def contents(run: Run) -> dict[str, bytes]:
    return {one.name: one.path(run).read_bytes() for one in all_units(run)}


def times(run: Run) -> dict[str, int]:
    return {one.name: one.path(run).stat().st_mtime_ns for one in all_units(run) if one.path(run).exists()}


def python(*words: str, **more) -> subprocess.Popen:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=variables, **pipes, **more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    """A run that was computed here, one unit after the other."""
    run = plan(tmp_path_factory.mktemp("scale") / "run")
    complete(run)
    return run


@pytest.fixture
def copy(finished, tmp_path) -> Run:
    """A copy of it to be damaged."""
    shutil.copytree(finished.folder, tmp_path / "run")
    return replace(finished, folder=tmp_path / "run")


# ------------------------------------------------------------------ which units there are


def imagenet(ipc: int, **changes) -> Run:
    """A plan for ImageNet-1K without the images."""
    names = tuple(f"n{c:08d}" for c in range(1000))
    form = Form("imagenet", names, (1281,) * 1000, 3, 224, {})
    return Run(Path("nowhere"), Plan("imagenet", ipc, **changes), form)


@pytest.mark.parametrize(("ipc", "blocks"), [(10, 100), (50, 500)])
def test_units_of_imagenet(ipc, blocks):
    run = imagenet(ipc, labels="store")
    counts = {stage: len(units(run, stage)) for stage in STAGES}
    assert counts == {
        "squeeze": 1,
        "statistics": 100,
        "recover": blocks,
        "relabel": 30,
        "train": 3,
        "aggregate": 1,
    }
    wanted = [str(other) for other in needs(run, unit(run, "recover", blocks - 1))]
    assert wanted == ["squeeze 0: teacher torchvision-resnet18", "statistics 99: classes 990-999"]
    assert not units(replace(run, plan=replace(run.plan, labels="recompute")), "relabel")


def test_sizes_of_imagenet():
    found = {size.stage: size for size in sizes.sizes(imagenet(50, labels="store"))}
    # 50 x 1000 images x 2000 iterations x 7.3e9 operations; labels: images x 300 epochs x 1000 classes x 2 bytes
    assert found["recover"].operations == pytest.approx(50_000 * 2000 * 7.256e9, rel=1e-3)
    assert found["recover"].bytes == 50_000 * 3 * 224 * 224
    assert found["relabel"].bytes == 30e9


# ------------------------------------------------------------------ the same files whoever computes them


def test_stages_are_told_unit_by_unit(finished, tmp_path):
    run, said = plan(tmp_path / "run"), []
    run_stages(run, STAGES, say=said.append)
    assert contents(run) == contents(finished)
    assert (run.folder / "table.csv").read_text() == (finished.folder / "table.csv").read_text()
    assert [line.split(":")[0] for line in said[4:9]] == [f"recover {n}/5" for n in range(1, 6)]


def test_snakemake_runs_units_side_by_side_with_the_same_bytes(finished, copy):
    """One that is missing, one that was cut short, and the table of both."""
    unit(copy, "train", 0).path(copy).unlink()
    path = unit(copy, "train", 1).path(copy)
    path.write_bytes(path.read_bytes()[:-40])
    kept = {name: time for name, time in times(copy).items() if not name.startswith(("train", "summary"))}
    words = ["-s", "workflow/scale.smk", "--profile", "workflow/profiles/local", "--cores", "2"]
    process = python("-m", "snakemake", *words, "--config", f"out={copy.folder}")
    output = "".join(process.communicate(timeout=600))
    assert process.returncode == 0, output
    assert contents(copy) == contents(finished) and kept.items() <= times(copy).items()


def test_the_set_is_that_of_the_one_loop(finished, tmp_path):
    data = Data(*(real(finished.plan, half, "cpu") for half in ("train", "test")))
    result = distill(method(finished), data.train, finished.plan.ipc, finished.plan.seed)
    mine = the_set(finished)
    assert torch.equal(mine.codes, result.synset.codes) and torch.equal(mine.labels, result.synset.labels)
    teacher = train_teacher(method(finished).teacher, data.train)
    weights = read(finished, unit(finished, "squeeze", 0))[0]
    assert all(torch.equal(weights[name], tensor) for name, tensor in teacher.state_dict().items())
    labels = torch.cat([read(finished, one)[0]["logits"] for one in units(finished, "relabel")])
    expected = torch.stack([soft_labels(teacher, mine, recipe(finished), epoch) for epoch in range(3)])
    assert torch.equal(labels, expected.half())


def test_training_is_that_of_the_notebooks(tmp_path):
    run = plan(tmp_path / "run", labels="recompute", seeds=(5,))
    complete(run)
    data = Data(*(real(run.plan, half, "cpu") for half in ("train", "test")))
    teacher = train_teacher(method(run).teacher, data.train)
    protocol = replace(recipe(run), network="convnet-d2-w8-batch")
    found = evaluate_by_distillation(the_set(run), data, protocol, teacher, seed=5, networks=1)
    assert read(run, unit(run, "train", 0))[0]["soft.accuracy"].item() == found.accuracy.item()
    (row,) = csv.DictReader((run.folder / "table.csv").open())
    assert float(row["soft"]) == pytest.approx(found.accuracy.item(), abs=1e-6) and row["seed"] == "5"


def test_weights_of_barycenters_reach_the_training(finished):
    """The toy plan's atoms are those of k-means: unequal masses, one weight per image, the same as from the one loop."""
    weights = the_set(finished).weights
    assert weights.shape == (20,) and torch.equal(weights, shown(finished, "cpu").image_weights)
    assert torch.allclose(weights.view(10, 2).sum(1), torch.ones(10)) and not torch.allclose(
        weights, weights[:1]
    )
    result = distill(method(finished), real(finished.plan, "train", "cpu"), 2, finished.plan.seed)
    assert torch.equal(weights, result.synset.weights)


def test_relabelling_is_that_of_the_data(tmp_path):
    """CIFAR-100: no crop, MixUp at temperature 30; ImageNet: CutMix and crops, torchvision's stem."""
    form = Form("cifar100", tuple(map(str, range(100))), (500,) * 100, 3, 32, {})
    cifar = recipe(Run(Path("nowhere"), Plan("cifar100", 10), form))
    assert (cifar.crop, cifar.mix, cifar.temperature, cifar.epochs, cifar.batch) == (
        None,
        "mixup",
        30,
        400,
        128,
    )
    large = recipe(imagenet(10))
    assert (large.crop, large.mix, large.batch, large.network) == (
        0.08,
        "cutmix",
        100,
        "torchvision-resnet18",
    )
    assert recipe(imagenet(10, method="sre2l")).batch == 1024


def test_sre2l_needs_no_class_statistics(tmp_path):
    run = plan(tmp_path / "run", method="sre2l", options={"iterations": 2, "storage": "png"}, seeds=(0,))
    assert [one.stage for one in complete(run)] == [
        "squeeze",
        "recover",
        "relabel",
        "relabel",
        "train",
        "aggregate",
    ]
    assert read(run, unit(run, "recover", 0))[0]["pixels"].dtype == torch.uint8
    train = real(run.plan, "train", "cpu")
    assert torch.equal(the_set(run).codes, distill(method(run), train, 2).synset.codes)


# ------------------------------------------------------------------ killed, resumed, damaged


def test_killed_and_resumed_loses_the_unit_in_flight(finished, tmp_path):
    run = plan(tmp_path / "run")
    process = python("-m", "lib.scale", "run", "--out", str(run.folder), start_new_session=True)
    while not unit(run, "recover", 0).path(run).exists() and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = times(run)
    assert {"squeeze/0000.safetensors", "recover/0000.safetensors"} <= before.keys()
    missing = [one for one in all_units(run) if one.name not in before]
    assert complete(run) == missing
    assert before.items() <= times(run).items()
    assert contents(run) == contents(finished)


@pytest.mark.parametrize("one", ["squeeze 0", "statistics 1", "recover 3", "relabel 0", "train 1"])
def test_a_file_cut_short_is_computed_again(copy, finished, one):
    broken = unit(copy, one.split()[0], int(one.split()[1]))
    path = broken.path(copy)
    path.write_bytes(path.read_bytes()[:-40])
    assert "damaged" in damage(path) and not done(copy, broken)
    assert complete(copy) == [broken]
    assert contents(copy) == contents(finished)
    path.write_bytes(b"")
    assert len(discard_damaged(copy)) == 1 and not path.exists()


def test_changed_content_is_refused_by_name(copy):
    path = unit(copy, "recover", 1).path(copy)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    train = unit(copy, "train", 0)
    train.path(copy).unlink()
    with pytest.raises(
        CompanionError, match=r"recover/0001.safetensors is damaged.*--stage recover --unit 1 --force"
    ):
        run_unit(copy, train, "cpu")
    run_unit(copy, unit(copy, "recover", 1), "cpu", force=True)
    run_unit(copy, train, "cpu")


def test_files_of_another_configuration_are_refused(copy, tmp_path):
    refuse(lambda: open_run(copy.folder, {"ipc": 4}), "holds another run (ipc=2 there, 4 here)")
    batch = plan(tmp_path / "batch", relabel={"epochs": 3, "batch": 10})
    seed = plan(tmp_path / "seed", relabel={"epochs": 3, "seed": 7})
    for run, text in ((batch, "relabel.batch=100 there, 10 here"), (seed, "relabel.seed=42 there, 7 here")):
        for stage in ("squeeze", "statistics", "recover", "relabel"):
            shutil.copytree(copy.folder / stage, run.folder / stage)
        refuse(lambda run=run: run_unit(run, unit(run, "train", 0), "cpu"), text, "relabel/0000.safetensors")
    other = plan(tmp_path / "other", options=TOY["options"] | {"iterations": 7})
    for stage in ("squeeze", "recover"):
        shutil.copytree(copy.folder / stage, other.folder / stage)
    refuse(
        lambda: done(other, unit(other, "recover", 0)), "recover/0000.safetensors", "another configuration"
    )


def test_another_teacher_is_another_configuration(copy, tmp_path):
    head = header(unit(copy, "squeeze", 0).path(copy))
    run = plan(tmp_path / "run")
    torch.manual_seed(0)
    network = make_teacher("convnet-d2-w8-batch", run.form)
    save(copy, unit(copy, "squeeze", 0), network.state_dict())
    assert header(unit(copy, "squeeze", 0).path(copy))["content"] != head["content"]
    refuse(lambda: done(copy, unit(copy, "recover", 0)), "files of squeeze=", "another configuration")


def test_networks_may_be_added_later(copy):
    run = open_run(copy.folder, {"seeds": [0, 1, 2]})
    assert [str(one) for one in complete(run)] == [
        "train 2: convnet-d2-w8-batch, seed 2",
        "aggregate 0: table.csv, summary.json",
    ]
    assert len((run.folder / "table.csv").read_text().splitlines()) == 4


# ------------------------------------------------------------------ kept on the way


@pytest.mark.parametrize(
    ("name", "step"),
    [("squeeze 0", 1), ("squeeze 0", 12), ("squeeze 0", 23), ("recover 2", 1), ("recover 2", 4), ("recover 2", 6),
     ("train 1", 1), ("train 1", 2), ("train 1", 4), ("train 1", 6)],
)  # fmt: skip
def test_a_unit_that_is_interrupted_goes_on_with_the_same_bits(finished, tmp_path, monkeypatch, name, step):
    """Squeeze, recovery and both kinds of training, with a checkpoint after every second step."""
    run = replace(finished, folder=tmp_path / "run")
    shutil.copytree(finished.folder, run.folder)
    shutil.rmtree(tmp_path / "run" / "checkpoints", ignore_errors=True)
    one = unit(run, name.split()[0], int(name.split()[1]))
    one.path(run).unlink()
    with killed_after(step):
        run_unit(run, one, "cpu")
    assert list((run.folder / "checkpoints").iterdir()) and not one.path(run).exists()
    after, taken = Checkpoint.after, []

    def counted(self, training):
        taken.append(1)
        after(self, training)

    monkeypatch.setattr(Checkpoint, "after", counted)
    run_unit(run, one, "cpu")
    whole = {"squeeze": 23, "recover": 6, "train": 6}[
        one.stage
    ]  # train: 3 steps with soft labels, then 3 with hard ones
    assert len(taken) == whole - (step if step % 2 else step - 1)
    assert one.path(run).read_bytes() == one.path(finished).read_bytes()
    assert not list((run.folder / "checkpoints").iterdir())


def test_accuracies_on_the_way_are_recorded_and_the_last_is_reported(tmp_path, finished):
    run = plan(tmp_path / "run", validate_every=2, seeds=(0,))
    shutil.copytree(finished.folder / "squeeze", run.folder / "squeeze")
    complete(run)
    found = read(run, unit(run, "train", 0))[0]
    assert found["soft.epochs"].tolist() == found["hard.epochs"].tolist() == [2, 3]
    assert found["soft.curve"].shape == (2, 1) and found["soft.curve"][-1] == found["soft.accuracy"]
    rows = list(csv.DictReader((run.folder / "curves.csv").open()))
    assert [(row["labels"], row["epoch"]) for row in rows] == [
        (column, epoch) for column in ("soft", "hard") for epoch in ("2", "3")
    ]
    assert list(csv.DictReader((run.folder / "table.csv").open()))[0]["hard"] == rows[-1]["accuracy"]
    same = read(finished, unit(finished, "train", 0))[0]  # looking changes nothing
    assert torch.equal(found["hard.accuracy"], same["hard.accuracy"])
    assert torch.equal(found["soft.loss"], same["soft.loss"])
    assert not torch.equal(found["soft.loss"], found["hard.loss"])


def test_a_column_may_be_left_out(tmp_path, finished):
    run = plan(tmp_path / "run", columns=("hard",), seeds=(1,))
    shutil.copytree(finished.folder / "squeeze", run.folder / "squeeze")
    assert "relabel" not in [one.stage for one in complete(run)]
    assert (run.folder / "table.csv").read_text().splitlines()[0] == "architecture,seed,hard"
    same = read(finished, unit(finished, "train", 1))[0]
    assert torch.equal(read(run, unit(run, "train", 0))[0]["hard.accuracy"], same["hard.accuracy"])


def test_other_precision_is_another_configuration(tmp_path, finished):
    run = plan(tmp_path / "run", precision="bfloat16", channels_last=True, seeds=(0,))
    shutil.copytree(finished.folder / "squeeze", run.folder / "squeeze")
    refuse(lambda: complete(run), "channels_last=False there, True here, precision='float32' there")
    shutil.rmtree(run.folder / "squeeze")
    complete(run)
    pixels = [read(one, unit(one, "recover", 0))[0]["pixels"] for one in (run, finished)]
    assert pixels[0].dtype == torch.float32 and not torch.equal(*pixels)


# ------------------------------------------------------------------ somebody else's set


@pytest.mark.parametrize("named", ["new{label:03d}", "{name}"])
def test_a_released_folder_is_judged_like_a_set_of_ours(finished, tmp_path, named):
    data = real(finished.plan, "train", "cpu")
    mine = the_set(finished)
    levels = (mine.viewable() * 255).round().to(torch.uint8)
    for i, label in enumerate(mine.labels.tolist()):
        folder = tmp_path / "released" / named.format(label=label, name=data.classes[label])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(levels[i, 0].numpy()).save(folder / f"class{label:03d}_id{i % 2:03d}.png")
    run = plan(tmp_path / "run", images=str(tmp_path / "released"), seeds=(0,))
    shutil.copytree(finished.folder / "squeeze", run.folder / "squeeze")
    assert [str(one) for one in units(run, "recover")] == [f"recover 0: images of {tmp_path / 'released'}"]
    stages = [one.stage for one in complete(run)]
    assert stages == ["recover", "relabel", "relabel", "train", "aggregate"]
    assert torch.equal(read(run, unit(run, "recover", 0))[0]["pixels"], levels)
    assert the_set(run).meta["method"].startswith("images of") and the_set(run).weights is None
    assert 0 <= read(run, unit(run, "train", 0))[0]["soft.accuracy"].item() <= 1
    min((tmp_path / "released").rglob("*.png")).unlink()
    fewer = plan(tmp_path / "fewer", images=str(tmp_path / "released"))
    refuse(lambda: run_unit(fewer, unit(fewer, "recover", 0), "cpu"), "1 images of class '0', the plan 2")


# ------------------------------------------------------------------ mistakes


def refuse(call, *texts: str) -> None:
    with pytest.raises(CompanionError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for text in texts:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["run", "--stage", "recove"],
            "unknown stage 'recove' (did you mean 'recover'?); allowed: aggregate, recover",
        ),
        (["run", "--stage", "recover", "--unit", "5"], "stage recover has no unit 5: allowed 0 to 4"),
        (
            ["run", "--stage", "recover", "--unit", "x"],
            "--unit takes numbers and ranges such as 17 or 0-9, not 'x'",
        ),
        (["run", "--unit", "1"], "--unit needs one --stage"),
        (["run", "--workers", "3"], "side by side by Snakemake: snakemake -s workflow/scale.smk"),
        (["status", "--ipc", "x"], "invalid int value: 'x'"),
        (["plan", "--seed", "3"], "seed=0 there, 3 here"),
        (["plan", "--options", "lr"], "expected NAME=VALUE, not 'lr'"),
        (["plan", "--plan", "nowhere.yaml"], "cannot read the plan nowhere.yaml"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(finished, words, text):
    refuse(lambda: main([words[0], "--out", str(finished.folder), *words[1:]]), text)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"method": "dm"}, "unknown method that recovers images in blocks"),
        ({"variant": "cdaa"}, "unknown variant 'cdaa'"),
        ({"recipe": "cifar1"}, "no recipe for cifar1 IPC 2; there are recipes for digits"),
        ({"options": {"lamda": 1}}, "unknown field of WMDD 'lamda'"),
        ({"teacher": {"networks": 1}}, "unknown field of Teacher 'networks'"),
        ({"teacher": {"network": "convnet-d2-w8"}}, "has no BatchNorm layer"),
        ({"relabel": {"batches": 1}}, "unknown field of FKD 'batches'"),
        ({"architectures": ("convnext",)}, "unknown network 'convnext'"),
        ({"labels": "stored"}, "unknown labels 'stored'"),
        ({"ipc": 3}, "ipc 3 does not fit"),
        ({"ipc": 1000}, "ipc 1000 is larger than the smallest class"),
        ({"precision": "fp16"}, "unknown precision 'fp16'"),
        ({"columns": ("firm",)}, "unknown column of labels 'firm'"),
        ({"validate_every": 0}, "validate_every must be a whole number >= 1"),
        ({"resize": 9}, "resize 9 is not allowed: of folders of images only"),
        ({"images": "/nowhere/set"}, "no file or folder /nowhere/set"),
        ({"seeds": ("a",)}, "seeds must be a whole number >= 0, not 'a'"),
        ({"colour": 1}, "unknown field of a plan 'colour'"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(tmp_path, changes, text):
    if changes == {"ipc": 3}:  # 12 images: blocks of 4 classes, 10 is no multiple
        changes = {"ipc": 3, "options": {"block_images": 12}}
    refuse(lambda: plan(tmp_path / "run", **changes), text)
    assert not (tmp_path / "run").exists()


def test_a_unit_before_what_it_reads(tmp_path):
    run = plan(tmp_path / "run")
    text = "recover 0: classes 0-1 reads squeeze 0: teacher convnet-d2-w8-batch and 1 more, not there yet"
    refuse(lambda: run_unit(run, unit(run, "recover", 0), "cpu"), text)
    refuse(lambda: open_run(tmp_path / "empty"), "nothing is planned", "data and ipc")


def test_the_command_line(tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")]
    (tmp_path / "plan.yaml").write_text(json.dumps(TOY | {"seeds": [0, 1]}))
    assert main(["plan", *out, "--plan", str(tmp_path / "plan.yaml"), "--seeds", "0"]) == 0
    assert "5 recover, 2 relabel, 1 train" in capsys.readouterr().out
    assert main(["run", *out, "--dry-run"]) == 0 and len(capsys.readouterr().out.splitlines()) == 13
    assert main(["run", *out, "--stage", "squeeze", "--unit", "0"]) == 0
    assert main(["run", *out, "--stage", "statistics", "--unit", "0-1", "2"]) == 0
    assert main(["list", *out, "--stage", "statistics", "recover"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-8:-5] == [
        f"there  statistics {n}: classes {text}" for n, text in enumerate(("0-3", "4-7", "8-9"))
    ]
    assert lines[-1] == "-----  recover 4: classes 8-9"
    assert main(["status", *out]) == 1 and "statistics      3/3" in capsys.readouterr().out
    assert main(["sizes", *out]) == 0 and numbers(["3", "5-7"]) == [3, 5, 6, 7]


def test_a_plan_is_taken_up_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    (tmp_path / "teacher.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    fields = {"data": "folder:images", "root": "data", "teacher": {"weights": "teacher.safetensors"}}
    found = _absolute(fields)
    monkeypatch.chdir("/")
    assert (
        found
        == _absolute(found)
        == {
            "data": f"folder:{tmp_path}/images",
            "root": f"{tmp_path}/data",
            "teacher": {"weights": f"{tmp_path}/teacher.safetensors"},
        }
    )
    plain = {"data": "digits", "root": None, "teacher": {"weights": "pretrained"}}
    assert _absolute(plain) == plain


def test_a_run_on_a_folder_of_images_goes_on_from_another_folder(photographs, tmp_path, monkeypatch):
    teacher = {"network": "convnet-d2-w8-batch", "batch": 30, "epochs": 1}
    shutil.copytree(photographs, tmp_path / "here" / "images")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = plan(
        Path("../run"), data="folder:images", size=16, recipe="imagenette", teacher=teacher, options={}
    )
    monkeypatch.chdir(tmp_path / "there")
    _opened.cache_clear()  # as in another process
    assert main(["run", "--out", str(tmp_path / "run"), "--stage", "squeeze"]) == 0
    again = open_run(tmp_path / "run", {"data": f"folder:{tmp_path / 'here' / 'images'}"})
    assert done(again, unit(again, "squeeze", 0)) and again.plan == run.plan
    refuse(lambda: open_run(tmp_path / "run", {"data": "folder:images"}), "holds another run")


def test_images_of_imagenet_are_224_of_256_pixels(photographs):
    assert Plan("imagenette", 10).scaled == Plan("imagenet", 1).scaled == (224, 256)
    assert Plan("imagenette", 10, size=112).scaled == (112, 128)
    assert Plan("imagenette", 10, resize=224).scaled == (224, 224)
    assert Plan("folder:/x", 10, recipe="imagenet", size=224).scaled == (224, 256)
    assert Plan("folder:/x", 10, size=64).scaled == (64, None)
    assert Plan("tinyimagenet", 10).scaled == Plan("digits", 1, recipe="imagenet").scaled == (None, None)
    seen = real(Plan(f"folder:{photographs}", 2, recipe="imagenette", size=56), "test", "cpu")
    assert (seen.size, seen.resize) == (56, 64)


def test_nothing_in_lib_imports_a_scheduler():
    for path in (ROOT / "lib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {
                "snakemake",
                "submitit",
                "ray",
                "dask",
                "workflow",
            }, path


# ------------------------------------------------------------------ several processes for the teacher


def test_one_process_trains_the_teacher_of_the_notebooks(toy):
    teacher = replace(method(imagenet(10)).teacher, network="resnet18-w4-batch", epochs=2, batch=25)
    alone, shared = train_teacher(teacher, toy.train), train_shared(teacher, toy.train)
    assert all(
        torch.equal(a, b)
        for a, b in zip(alone.state_dict().values(), shared.state_dict().values(), strict=True)
    )


def test_two_processes_share_a_batch(tmp_path):
    """Without BatchNorm: the network of one process up to rounding. With it each process normalises by its own rows on a CPU."""
    teacher = {"network": "convnet-d1-w4", "epochs": 1, "batch": 100, "augmentation": "crop_flip", "lr": 0.02}
    run = open_run(tmp_path / "run", TOY | {"teacher": teacher})
    keep(run)
    words = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "lib.scale.squeeze",
    ]
    process = python(*words, "--out", str(run.folder))
    text, errors = process.communicate(timeout=600)
    assert process.returncode == 0 and text.count("written by process 0 of 2") == 1, errors
    found = read(run, unit(run, "squeeze", 0))[0]
    alone = train_shared(method(run).teacher, real(run.plan, "train", "cpu")).state_dict()
    start = train_shared(replace(method(run).teacher, lr=0.0), real(run.plan, "train", "cpu")).state_dict()
    for name, tensor in alone.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    assert (alone["classifier.weight"] - start["classifier.weight"]).abs().max() > 1e-2


# ------------------------------------------------------------------ images of ImageNet's shape


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """3 classes of 20 images of 64 to 224 pixels a side, for training, and 4 for testing."""
    root, random = tmp_path_factory.mktemp("images"), np.random.RandomState(0)
    for half, count in (("train", 20), ("val", 4)):
        for c, synset in enumerate(("n01440764", "n02102040", "n02979186")):
            (root / half / synset).mkdir(parents=True)
            for i in range(count):
                width, height = random.randint(64, 225, 2)
                low = random.randint(0, 156, (4, 4, 3)) + 100 * np.eye(3, dtype=int)[c]
                image = Image.fromarray(low.astype(np.uint8)).resize((width, height))
                image.save(root / half / synset / f"{i}.JPEG")
    return root


def test_a_folder_of_images_and_a_pretrained_network_end_to_end(photographs, tmp_path):
    data = f"folder:{photographs}"
    train = real(Plan(data, 2, size=64), "train", "cpu")
    torch.manual_seed(0)  # torchvision draws its weights from the global generator
    network = make_teacher("torchvision-resnet18", train)
    weights = save_teacher(network, tmp_path / "resnet18.safetensors", "torchvision-resnet18", train.classes)
    changes = {
        "recipe": "imagenette",
        "options": {"iterations": 2, "block_images": 6, "storage": "jpeg"},
        "size": 64,
    }
    changes |= {"teacher": {"weights": str(weights)}, "relabel": {"epochs": 1, "batch": 6}, "seeds": (0,)}
    changes["architectures"] = ("torchvision-resnet18", "torchvision-vit_ti_16")
    run = plan(tmp_path / "run", data=data, classes_per_unit=2, **{**changes})
    assert [one.stage for one in complete(run)] == [
        *("squeeze", "statistics", "statistics", "recover", "relabel", "train", "train", "aggregate")
    ]
    statistics = read(run, unit(run, "statistics", 1))[0]
    assert (
        statistics["2.atoms"].shape == (2, 512)
        and sum(name.startswith("2.mean") for name in statistics) == 20
    )
    pixels = read(run, unit(run, "recover", 0))[0]["pixels"]
    assert pixels.shape == (6, 3, 64, 64) and pixels.dtype == torch.uint8
    assert 0 <= read(run, unit(run, "train", 0))[0]["hard.accuracy"].item() <= 1
    found = header(unit(run, "aggregate", 0).path(run))["about"]["accuracy"]
    assert {name: found[name]["soft"]["networks"] for name in found} == dict.fromkeys(
        run.plan.architectures, 1
    )


def test_teacher_of_other_classes_is_refused(photographs, tmp_path):
    train = real(Plan(f"folder:{photographs}", 2, size=64), "train", "cpu")
    network = make_teacher("resnet18-w2-batch", train)
    weights = save_teacher(network, tmp_path / "t.safetensors", "resnet18-w2-batch", train.classes[::-1])
    teacher = {"network": "resnet18-w2-batch", "weights": str(weights)}
    run = plan(
        tmp_path / "run",
        data=f"folder:{photographs}",
        size=64,
        recipe="imagenette",
        teacher=teacher,
        options={},
    )
    refuse(lambda: run_unit(run, unit(run, "squeeze", 0), "cpu"), "class 0 is 'n02979186' there, 'n01440764'")


def test_missing_class_folders_are_named(photographs, tmp_path):
    (tmp_path / "imagenet").symlink_to(photographs)
    call = lambda: plan(tmp_path / "run", data="imagenette", root=str(tmp_path))  # noqa: E731
    refuse(call, "no class folder 'n03000684', 'n03028079'", "'n03888257' (7 of 10 are missing)")


def test_images_that_came_later_are_noticed(photographs, tmp_path):
    shutil.copytree(photographs, tmp_path / "images")
    teacher = {"network": "resnet18-w2-batch", "batch": 30, "epochs": 1}
    data = f"folder:{tmp_path / 'images'}"
    run = plan(tmp_path / "run", data=data, size=16, teacher=teacher, options={})
    _opened.cache_clear()  # as in another process
    shutil.copy(tmp_path / "images/train/n01440764/0.JPEG", tmp_path / "images/train/n01440764/new.JPEG")
    refuse(lambda: run_unit(run, unit(run, "squeeze", 0), "cpu"), "class 'n01440764' had 20 images", "now 21")
