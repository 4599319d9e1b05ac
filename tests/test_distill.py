"""The loop: resume after SIGKILL, checkpoints, the guard against non-finite values, and the cache."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import toy_data

from lib import distill as module
from lib.distill import configuration_key, distill, pack, read_checkpoint, unpack
from lib.formation.start import pixel_set
from lib.match.style import Gram
from lib.methods.dc import DC
from lib.methods.dm import DM
from lib.methods.selection import RandomReal
from lib.nets.ensemble import Ensemble
from lib.system.errors import CompanionError

SMALL = DM(iterations=25, real_batch=8, network="convnet-d2-w4")


def same(a: module.Distilled, b: module.Distilled) -> None:
    assert torch.equal(a.synset.codes, b.synset.codes) and torch.equal(a.synset.labels, b.synset.labels)
    assert a.history.keys() == b.history.keys() and a.snapshots.keys() == b.snapshots.keys()
    assert all(torch.equal(a.history[k], b.history[k]) for k in a.history)
    assert all(torch.equal(a.snapshots[k], b.snapshots[k]) for k in a.snapshots)
    assert a.synset.meta == b.synset.meta and a.synset.classes == b.synset.classes


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# -- killing ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    script = Path(__file__).with_name("kill_me.py")
    root = str(script.parent.parent)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, script, folder],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("method", ["dm", "dc", "dsa-batch"])
def test_sigkill_and_resume_ends_with_the_same_bits(killed, method):
    """Four SIGKILLs, one of them in the middle of writing a checkpoint."""
    log = json.loads((killed / method / "log.json").read_text())
    assert [entry["first"] for entry in log] == [1, 4, 13, 14, 45]  # it went on where it was
    assert [entry["checkpoint"] for entry in log] == [True, True, True, True, False]
    bits = [(killed / method / f"{which}.safetensors").read_bytes() for which in ("killed", "calm")]
    assert bits[0] == bits[1]
    tensors = safetensors.torch.load(bits[0])
    assert {"codes", "labels", "history.loss"} < tensors.keys() and tensors["history.loss"].shape == (60,)
    assert not torch.equal(tensors["snapshot.5"], tensors["snapshot.60"])


class Stop(Exception):
    pass


def interrupted(method, train, path, at, ipc=2, seed=7, **options):
    """Run until step ``at``, as far as a process that dies there."""

    def stop(step, *_):
        if step == at:
            raise Stop

    with pytest.raises(Stop):
        distill(method, train, ipc, seed, checkpoint=path, checkpoint_seconds=0.0, callback=stop, **options)


def test_resume_of_a_momentum_optimiser_and_a_half_trained_network(toy, tmp_path):
    """Within one process, where more kinds of states can be tried: batch norm, IPC 3, every first step after a checkpoint."""
    method = DC(outer=8, inner=4, epochs=1, real_batch=8, network="convnet-d2-w4-batch", init="real")
    calm = distill(method, toy.train, 3, 7, snapshots=(0, 9, 32))
    for at in (11, 22, 31):
        path = tmp_path / f"{at}.checkpoint"
        interrupted(method, toy.train, path, at, ipc=3, snapshots=(0, 9, 32))
        same(distill(method, toy.train, 3, 7, checkpoint=path, snapshots=(0, 9, 32)), calm)
        assert not path.exists()


def test_dc_state_before_its_first_network_is_replaced(toy, tmp_path):
    path = tmp_path / "a"
    method = replace(METHOD_DC, outer=30)
    interrupted(method, toy.train, path, 12)
    packed = read_checkpoint(path)
    assert (
        packed["done"] == 11 and {"pixels", "optimiser", "networks", "t", "memory"} == packed["state"].keys()
    )
    assert all(tensor.isfinite().all() for tensor in packed["state"]["networks"]["parameters"].values())


METHOD_DC = DC(outer=25, inner=2, epochs=2, real_batch=8, network="convnet-d2-w4")


def test_progress_bars_and_callbacks_change_nothing(toy):
    seen = []
    loud = distill(
        SMALL, toy.train, 1, 3, progress=True, callback=lambda step, state, metrics: seen.append(step)
    )
    same(loud, distill(SMALL, toy.train, 1, 3))
    assert seen == list(range(1, 26))


def test_checkpoints_change_nothing(toy, tmp_path):
    calm = distill(SMALL, toy.train, 1, 3)
    same(distill(SMALL, toy.train, 1, 3, checkpoint=tmp_path / "c", checkpoint_seconds=0.0), calm)
    assert list(tmp_path.glob("*")) == []
    assert calm.history["loss"].shape == (25,) and calm.seconds > 0 and calm.peak_bytes >= 0


def test_snapshots(toy):
    run = distill(SMALL, toy.train, 2, 3, snapshots=(25, 0, 12))
    assert sorted(run.snapshots) == [0, 12, 25]
    torch.testing.assert_close(run.snapshots[25], run.synset.viewable())
    g = torch.Generator().manual_seed(3)
    start = SMALL.finish(SMALL.begin(toy.train, 2, g)).viewable()
    assert torch.equal(run.snapshots[0], start) and not torch.equal(run.snapshots[12], start)
    assert 0 <= start.min() and start.max() <= 1


def test_seed_data_and_global_generator(toy):
    torch.manual_seed(1)
    one = distill(SMALL, toy.train, 1, 3)
    torch.manual_seed(2)
    same(distill(SMALL, toy.train, 1, 3), one)
    assert not torch.equal(distill(SMALL, toy.train, 1, 4).synset.codes, one.synset.codes)
    assert one.synset.meta == {
        "method": "dm", "config": module.settings_digest(SMALL), "settings": module.describe(SMALL),
        "dataset": "toy", "data_sha256": toy.train.fingerprint, "ipc": 1, "seed": 3,
    }  # fmt: skip


def test_a_method_without_steps(toy):
    run = distill(RandomReal(), toy.train, 2, 0, snapshots=(0,))
    assert run.history == {} and torch.equal(run.snapshots[0], run.synset.viewable())
    assert torch.equal(run.synset.codes, toy.train.images[run.synset.indices])


# -- checkpoints that do not fit ----------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_configuration_names_what_differs(toy, tmp_path):
    path = tmp_path / "c"
    interrupted(SMALL, toy.train, path, 15)
    kept = path.read_bytes()
    for call, says in [
        ((replace(SMALL, lr=2.0), toy.train, 2, 7), r"\(lr=1.0 there, 2.0 here\)"),
        ((replace(SMALL, init="noise", lr=2.0), toy.train, 2, 7), r"init='real' there, 'noise' here, lr="),
        ((SMALL, toy.train, 3, 7), r"\(ipc=2 there, 3 here\)"),
        ((SMALL, toy.train, 2, 8), r"\(seed=7 there, 8 here\)"),
        ((SMALL, toy_data(seed=5).train, 2, 7), r"data='toy .* there, 'toy .* here"),
        ((METHOD_DC, toy.train, 2, 7), r"method='DM' there, 'DC' here"),
    ]:
        with pytest.raises(CompanionError, match=says) as caught:
            distill(*call, checkpoint=path)
        assert str(path) in one_line(caught) and "another file" in one_line(caught)
    assert path.read_bytes() == kept


def test_a_checkpoint_of_other_code(toy, tmp_path, monkeypatch):
    path = tmp_path / "c"
    interrupted(SMALL, toy.train, path, 15)
    monkeypatch.setattr("lib.distill.method.code_digest", lambda *names: "changed")
    with pytest.raises(CompanionError, match="other code"):
        distill(SMALL, toy.train, 2, 7, checkpoint=path)


def test_damaged_and_foreign_checkpoints(toy, tmp_path):
    path = tmp_path / "c"
    interrupted(SMALL, toy.train, path, 15)
    whole = path.read_bytes()
    for content in (b"", b"nonsense", whole[: len(whole) // 2], whole[:-40], whole[:100]):
        path.write_bytes(content)
        with pytest.raises(CompanionError, match="damaged") as caught:
            distill(SMALL, toy.train, 2, 7, checkpoint=path)
        assert str(path) in one_line(caught) and path.read_bytes() == content
    for foreign in ({"weights": torch.ones(3)}, [1, 2], {"key": 1, "state": {}, "generator": 0, "done": 3}):
        torch.save(foreign, path)
        with pytest.raises(CompanionError, match="not a checkpoint of ours"):
            distill(SMALL, toy.train, 2, 7, checkpoint=path)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_a_checkpoint_cannot_run_code(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"key": Evil(), "state": {}, "generator": 0, "done": 1}, tmp_path / "c")
    with pytest.raises(CompanionError, match="damaged"):
        distill(SMALL, toy.train, 2, 7, checkpoint=tmp_path / "c")
    assert not (tmp_path / "executed").exists()


# -- pack and unpack ----------------------------------------------------------------------------------------------------


def test_pack_is_a_copy_and_unpack_its_inverse(toy):
    g = torch.Generator().manual_seed(0)
    method = replace(METHOD_DC, network="convnet-d2-w4-batch", inner=3)
    state = method.begin(toy.train, 2, g)
    for _ in range(2):
        method.step(state, g)
    packed, before = pack(state), g.get_state()
    reference = pack(state)
    method.step(state, g)
    after = pack(state)
    assert torch.equal(packed["pixels"], reference["pixels"]) and not torch.equal(
        after["pixels"], packed["pixels"]
    )
    fresh = method.begin(toy.train, 2, torch.Generator().manual_seed(9))
    leaf = fresh.pixels
    unpack(fresh, packed)
    assert fresh.pixels is leaf and fresh.optimiser.param_groups[0]["params"][0] is leaf
    g.set_state(before)
    method.step(fresh, g)
    again = pack(fresh)
    assert torch.equal(again["pixels"], after["pixels"]) and again["t"] == after["t"]
    for part in ("parameters", "buffers"):
        for key, tensor in after["networks"][part].items():
            assert torch.equal(again["networks"][part][key], tensor)


def test_pack_refuses_what_it_cannot_restore():
    @dataclass
    class State:
        thing: object
        left_out: object = field(default=None, metadata={"constant": True})

    assert pack(State([torch.ones(2), {"a": 1.5}], object())).keys() == {"thing"}
    with pytest.raises(TypeError, match="not object"):
        pack(State(object()))


# -- a method of the simplest kind, to break things with ----------------------------------------------------------------


@dataclass
class Point:
    pixels: torch.Tensor
    count: int
    train: object = field(metadata={"constant": True})
    ipc: int = field(metadata={"constant": True})


@dataclass(frozen=True)
class Simple:
    """Shrinks its images; at one step the loss, or the images, turn bad."""

    steps: int = 50
    bad_loss_at: int | None = None
    bad_pixels_at: int | None = None

    def total_steps(self, ipc):
        return self.steps

    def begin(self, train, ipc, generator):
        pixels = torch.randn(3 * ipc, *train.shape, generator=generator, requires_grad=True)
        return Point(pixels, 0, train, ipc)

    def step(self, state, generator):
        state.count += 1
        with torch.no_grad():
            state.pixels *= 0.9
            if state.count == self.bad_pixels_at:
                state.pixels[0, 0, 0, 0] = float("inf")
        loss = state.pixels.detach().nan_to_num(0, 0, 0).square().sum()
        return {"loss": loss * (float("nan") if state.count == self.bad_loss_at else 1), "other": loss}

    def finish(self, state):
        return pixel_set(state.pixels, state.train, state.ipc)


@pytest.mark.parametrize("at, good", [(1, 0), (10, 0), (11, 10), (37, 30), (50, 40)])
def test_a_non_finite_loss_stops_and_names_the_step(toy, tmp_path, at, good):
    path, method = tmp_path / "c", Simple(bad_loss_at=at)
    with pytest.raises(
        CompanionError, match=f"Simple stopped: loss is nan at step {at}; .*step {good}. is in"
    ) as caught:
        distill(method, toy.train, 1, 0, checkpoint=path, snapshots=(0, 20, 36))
    assert str(path) in one_line(caught)
    packed = read_checkpoint(path)
    assert packed["done"] == good == packed["state"]["count"] and packed["state"]["pixels"].isfinite().all()
    assert all(len(values) == good for values in packed["history"].values())
    assert sorted(packed["snapshots"]) == [step for step in (0, 20, 36) if step <= good]
    # going on from it meets the same step again, from a finite state
    with pytest.raises(CompanionError, match=f"at step {at}"):
        distill(method, toy.train, 1, 0, checkpoint=path, snapshots=(0, 20, 36))


def test_a_non_finite_learned_value_stops(toy, tmp_path):
    with pytest.raises(CompanionError, match="a learned value is not finite after step 30; .*step 20"):
        distill(Simple(bad_pixels_at=23), toy.train, 1, 0, checkpoint=tmp_path / "c")
    assert read_checkpoint(tmp_path / "c")["state"]["pixels"].isfinite().all()
    with pytest.raises(CompanionError, match="not finite after step 30; no checkpoint was asked for"):
        distill(Simple(bad_pixels_at=23), toy.train, 1, 0)


def test_a_diverging_paper_method_stops(toy, tmp_path):
    with pytest.raises(CompanionError, match="DM stopped: .* step"):
        distill(replace(SMALL, lr=1e30), toy.train, 1, 0, checkpoint=tmp_path / "c")
    assert read_checkpoint(tmp_path / "c")["state"]["pixels"].isfinite().all()


# -- disks --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(limit: int):
    """No file of this process may grow beyond ``limit`` bytes; the write fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_checkpoint(toy, tmp_path):
    path = tmp_path / "c"
    interrupted(SMALL, toy.train, path, 15)
    before = path.read_bytes()
    with full_disk(2048), pytest.raises(CompanionError, match="cannot write .*c: File too large") as caught:
        distill(SMALL, toy.train, 2, 7, checkpoint=path, checkpoint_seconds=0.0)
    one_line(caught)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["c"]
    same(distill(SMALL, toy.train, 2, 7, checkpoint=path), distill(SMALL, toy.train, 2, 7))


def test_a_full_disk_while_the_result_is_cached(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_CACHE", str(tmp_path / "small"))
    with (
        full_disk(1024),
        pytest.raises(CompanionError, match="cannot write .*safetensors: .*File too large") as caught,
    ):
        distill(SMALL, toy.train, 2, 7, cache=True)
    one_line(caught)
    assert list((tmp_path / "small").iterdir()) == []


def test_a_folder_that_cannot_be_written(toy, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CompanionError, match="cannot write .*file/c: ") as caught:
        distill(SMALL, toy.train, 2, 7, checkpoint=tmp_path / "file" / "c", checkpoint_seconds=0.0)
    one_line(caught)


# -- cache --------------------------------------------------------------------------------------------------------------


def test_a_cached_result_is_equal_and_not_computed_again(toy, monkeypatch):
    first = distill(SMALL, toy.train, 2, 7, cache=True, snapshots=(0, 25))

    def fail(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(DM, "begin", fail)
    found = distill(SMALL, toy.train, 2, 7, cache=True, snapshots=(25, 0))
    same(found, first)
    assert found.seconds == first.seconds and found.peak_bytes == first.peak_bytes
    for other in (
        lambda: distill(replace(SMALL, lr=0.5), toy.train, 2, 7, cache=True, snapshots=(0, 25)),
        lambda: distill(SMALL, toy.train, 1, 7, cache=True, snapshots=(0, 25)),
        lambda: distill(SMALL, toy.train, 2, 8, cache=True, snapshots=(0, 25)),
        lambda: distill(SMALL, toy_data(seed=1).train, 2, 7, cache=True, snapshots=(0, 25)),
        lambda: distill(SMALL, toy.train, 2, 7, cache=True),
    ):
        with pytest.raises(AssertionError, match="computed again"):
            other()


def test_a_cached_run_resumes_and_cleans_up(toy, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    monkeypatch.setenv("COMPANION_CACHE", str(folder))

    def stop(step, *_):
        if step == 15:
            raise Stop

    with pytest.raises(Stop):
        distill(SMALL, toy.train, 2, 7, cache=True, checkpoint_seconds=0.0, callback=stop)
    assert [p.suffix for p in folder.iterdir()] == [".checkpoint"]
    seen = []
    done = distill(SMALL, toy.train, 2, 7, cache=True, callback=lambda step, *_: seen.append(step))
    assert seen[0] == 15 and [p.suffix for p in folder.iterdir()] == [".safetensors"]
    same(done, distill(SMALL, toy.train, 2, 7))


def test_a_damaged_cache_file_counts_as_absent(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_CACHE", str(tmp_path / "here"))
    first = distill(SMALL, toy.train, 2, 7, cache=True)
    (file,) = (tmp_path / "here").iterdir()
    whole = file.read_bytes()
    foreign = safetensors.torch.save({"a": torch.ones(1)}, {"format": "pt"})
    for content in (b"", whole[: len(whole) // 2], foreign):
        file.write_bytes(content)
        same(distill(SMALL, toy.train, 2, 7, cache=True), first)
        assert len(file.read_bytes()) > 1000


def test_the_key_holds_everything(toy, monkeypatch):
    key = configuration_key(SMALL, toy.train, 2, 7)
    assert key == configuration_key(DM(**vars(SMALL)), toy.train, 2, 7)
    others = [
        configuration_key(replace(SMALL, mixed=True), toy.train, 2, 7),
        configuration_key(SMALL, toy_data(seed=1).train, 2, 7),
        configuration_key(SMALL, toy.train, 1, 7),
        configuration_key(SMALL, toy.train, 2, 0),
        configuration_key(METHOD_DC, toy.train, 2, 7),
    ]
    asked = []
    monkeypatch.setattr("lib.distill.method.code_digest", lambda *names: asked.append(names) or "other code")
    others.append(configuration_key(SMALL, toy.train, 2, 7))
    (modules,) = asked
    assert {"lib.methods.dm", "lib.match.features", "lib.nets.supply", "lib.distill"} <= set(modules)
    assert len({key, *others}) == 7
    configuration_key(replace(SMALL, distance=SMALL.distance + Gram(1e3)), toy.train, 2, 7)
    assert set(asked[1]) - set(modules) == {"lib.match.style", "lib.match.distance"}


# -- mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ipc", [0, -1, 1.5, True, "2", None, 21])
def test_wrong_ipc_is_one_line(toy, ipc):
    with pytest.raises(CompanionError, match=r"ipc .*(at least 1|1 to 20)") as caught:
        distill(SMALL, toy.train, ipc)
    assert repr(ipc) in one_line(caught)


def test_ipc_of_the_whole_class_is_allowed(toy):
    run = distill(RandomReal(), toy.train, 20)
    assert sorted(run.synset.indices.tolist()) == list(range(60))


def test_metrics_may_be_many_and_ensembles_are_restored(toy):
    run = distill(Simple(steps=13), toy.train, 1, 0)
    assert run.history.keys() == {"loss", "other"} and all(len(v) == 13 for v in run.history.values())
    assert torch.all(run.history["loss"][1:] < run.history["loss"][:-1])
    assert dataclasses.is_dataclass(run) and not isinstance(run.synset, Ensemble)


# -- slow steps, interruption, numbers at the edge ------------------------------------------------------------------------


def test_a_checkpoint_is_never_older_than_asked_for_however_slow_a_step_is(toy, tmp_path, monkeypatch):
    """A clock that a step moves on by two seconds: with an interval of one, every step is kept."""
    clock = [0.0]
    monkeypatch.setattr("lib.distill.loop.time.perf_counter", lambda: clock[0])
    path, kept = tmp_path / "slow.checkpoint", []

    def tick(step, *_):
        kept.append(read_checkpoint(path)["done"] if path.is_file() else None)
        clock[0] += 2.0

    distill(
        replace(SMALL, iterations=4), toy.train, 2, 7, checkpoint=path, checkpoint_seconds=1.0, callback=tick
    )
    assert kept == [None, 1, 2, 3]


def test_an_interruption_keeps_the_state_and_says_how_to_go_on(toy, tmp_path, monkeypatch):
    calm = distill(SMALL, toy.train, 2, 7)
    path, step = tmp_path / "a.checkpoint", DM.step

    def pressed(self, state, generator):
        if len(asked) == 13:
            raise KeyboardInterrupt
        asked.append(1)
        return step(self, state, generator)

    asked: list[int] = []
    monkeypatch.setattr(DM, "step", pressed)
    with pytest.raises(KeyboardInterrupt, match="goes on from step 10 of"):
        distill(SMALL, toy.train, 2, 7, checkpoint=path)
    monkeypatch.setattr(DM, "step", step)
    same(distill(SMALL, toy.train, 2, 7, checkpoint=path), calm)


def test_seeds_and_ipc_of_any_integer_type(toy):
    plain = distill(SMALL, toy.train, 2, 7)
    same(distill(SMALL, toy.train, np.int64(2), np.int64(7)), plain)
    same(distill(SMALL, toy.train, 2, torch.tensor(7)), plain)
    for seed in (-1, 1.5, "3", True, 2**63):
        with pytest.raises(CompanionError, match="seed"):
            distill(SMALL, toy.train, 2, seed)
