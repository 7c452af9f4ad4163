"""Nothing lost, nothing half-written: kills, locks, damage, full disks, numbers that are none."""
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, new_model
from test_rl import random_records, toy_table

import env
import ground
import kalm
import rl
import rollout
from data import checkpoint, store

SMOKE = ("--scale", "smoke", "--checkpoint_minutes", "0", "--output_dir")


class Killed(BaseException):
    """Stands for SIGKILL: no `except Exception` sees it."""


def kill_at(monkeypatch, owner, name, call, after=True):
    """The `call`-th call of owner.name is the last thing that happens, or with after=False almost happens."""
    real, seen = getattr(owner, name), []

    def mortal(*args, **kwargs):
        seen.append(name)
        if len(seen) == call and not after:
            raise Killed
        value = real(*args, **kwargs)
        if len(seen) == call:
            raise Killed
        return value
    monkeypatch.setattr(owner, name, mortal)


def results_of(run):
    results = json.loads((run / "results.json").read_text())
    assert results.pop("time_s")
    return results


def up_to(smoke_run, folder, stage):
    """A copy of the smoke run as it was before a stage began."""
    shutil.copytree(smoke_run, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for later in kalm.STAGES[kalm.STAGES.index(stage):]:
        for name in kalm.WRITES[later]:
            store.remove(folder / name)
        del manifest["stages"][later]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


# ------------------------------------------------------------------------------------------------------- interruption

@pytest.mark.parametrize("stage, owner, name, call, left", [  # left: steps and rounds that the second run has to do
    ("ground", store, "keep_last", 5, (3, 0)),        # five of eight steps were done
    ("ground", ground, "evaluate", 1, (1, 0)),        # all eight, of which the last is done again
    ("imagine", store, "seal", 3, (0, 4)),            # three of seven rounds
    ("learn", store, "keep_last", 100, (260, 0)),     # the first method and 40 of 60 steps of the second of six
    ("learn", rl, "save_policy", 3, (180, 0)),        # three methods
    ("learn", shutil, "copy", 2, (0, 0))], ids=lambda x: str(x) if isinstance(x, (str, int)) else "")  # all of them
def test_a_killed_stage_goes_on_and_ends_as_if_nothing_had_been(smoke_run, tmp_path, monkeypatch, stage, owner, name, call, left):
    run, steps, rounds = up_to(smoke_run, tmp_path / "run", stage), [], []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, owner, name, call)
        kalm.main([*SMOKE, str(run)])
    real_loss, real_generate, real_clip = ground.GroundingTrainer.compute_loss, rollout.generate_all, rl.clip_gradients
    monkeypatch.setattr(ground.GroundingTrainer, "compute_loss", lambda *a, **k: steps.append(1) or real_loss(*a, **k))
    monkeypatch.setattr(rl, "clip_gradients", lambda *a: steps.append(1) or real_clip(*a))
    monkeypatch.setattr(rollout, "generate_all", lambda *a, **k: rounds.append(1) or real_generate(*a, **k))
    assert kalm.main([*SMOKE, str(run), "--stage", stage]) == 0
    assert (len(steps), len(rounds)) == left
    assert kalm.main([*SMOKE, str(run)]) == 0
    assert results_of(run) == results_of(smoke_run)
    for part in ("policies/curves.json", "policies/gradient_norms.json", "grounded/metrics.json"):
        assert json.loads((run / part).read_text()) == json.loads((smoke_run / part).read_text())
    assert {p.name for p in run.iterdir()} == {p.name for p in smoke_run.iterdir()}


@pytest.mark.parametrize("damage", ("cut off", "flipped", "not sealed"))
def test_a_checkpoint_that_is_not_whole_is_not_used(smoke_run, tmp_path, monkeypatch, damage):
    run, steps = up_to(smoke_run, tmp_path / "run", "ground"), []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if damage == "not sealed":
            kill_at(patch, store, "seal", 4, after=False)
        else:
            kill_at(patch, store, "keep_last", 4)
        kalm.main([*SMOKE, str(run)])
    if damage != "not sealed":
        weights, = run.glob("unfinished/*/checkpoint-4/model.safetensors")
        content = bytearray(weights.read_bytes())
        content[-100] ^= 1
        weights.write_bytes(content if damage == "flipped" else content[:-100])
    real = ground.GroundingTrainer.compute_loss
    monkeypatch.setattr(ground.GroundingTrainer, "compute_loss", lambda *a, **k: steps.append(1) or real(*a, **k))
    assert kalm.main([*SMOKE, str(run)]) == 0
    assert len(steps) == (5 if damage == "not sealed" else 8)
    assert results_of(run) == results_of(smoke_run)


def test_only_the_last_checkpoint_is_kept_and_none_after_the_stage(smoke_run, tmp_path, monkeypatch):
    run, seen = up_to(smoke_run, tmp_path / "run", "ground"), []
    real = store.keep_last
    monkeypatch.setattr(store, "keep_last", lambda path: real(path) or seen.append(sorted(p.name for p in path.parent.glob("c*"))))
    assert kalm.main([*SMOKE, str(run), "--stage", "ground", "learn"]) == 2  # learn has nothing to read: nothing is begun
    assert kalm.main([*SMOKE, str(run), "--stage", "ground"]) == 0
    assert seen == [[f"checkpoint-{n}", f"checkpoint-{n}.sealed"] for n in range(1, 8)]
    assert not (run / "unfinished").exists()


def test_checkpoints_come_by_the_clock(tmp_path, rollouts, monkeypatch):
    saved, clock = [], [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(checkpoint.store, "keep_last", lambda path: saved.append(path.name))
    monkeypatch.setattr(ground.GroundingTrainer, "_save_checkpoint", lambda *_: None)
    real = ground.GroundingTrainer.compute_loss
    monkeypatch.setattr(ground.GroundingTrainer, "compute_loss",
                        lambda *a, **k: clock.__setitem__(0, clock[0] + 60) or real(*a, **k))
    model, tokenizer = new_model(rollouts)
    ground.train(model, tokenizer, rollouts[:40], tmp_path, steps=12, batch_examples=4, checkpoints=tmp_path, checkpoint_minutes=5)
    assert saved == ["checkpoint-5", "checkpoint-10"]


def test_another_option_or_force_does_not_take_up_what_was_unfinished(smoke_run, tmp_path, monkeypatch):
    for arguments in (["--ground_steps", "9"], ["--force"]):
        run, steps = up_to(smoke_run, tmp_path / arguments[0], "ground"), []
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, store, "keep_last", 4)
            kalm.main([*SMOKE, str(run)])
        with monkeypatch.context() as patch:
            real = ground.GroundingTrainer.compute_loss
            patch.setattr(ground.GroundingTrainer, "compute_loss", lambda *a, **k: steps.append(1) or real(*a, **k))
            assert kalm.main([*SMOKE, str(run), "--stage", "ground", *arguments]) == 0
        assert len(steps) == (9 if "9" in arguments else 8)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_one_sentence_and_its_exit_code(tmp_path, number, code):
    process = subprocess.Popen([sys.executable, "kalm.py", *SMOKE, str(tmp_path / "run")], cwd=ROOT, stderr=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    assert any(line.startswith("ground ...") for line in process.stdout)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"kalm: stopped by {number.name}; the same command goes on from here" in err and "Traceback" not in err
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["collect"]["files"]


def test_a_second_run_on_a_folder_names_the_first_and_a_lock_left_by_a_killed_one_is_no_obstacle(smoke_run, tmp_path, capsys):
    run = shutil.copytree(smoke_run, tmp_path / "run")
    holder = subprocess.Popen([sys.executable, "-c", "import sys, pathlib; sys.path.insert(0, '.')\nfrom data import store\n"
                               f"with store.locked(pathlib.Path({str(run)!r})):\n    print('held', flush=True)\n    sys.stdin.read()"],
                              cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    before = (run / "manifest.json").read_bytes()
    assert kalm.main([*SMOKE, str(run), "--force"]) == 2
    assert re.search(rf"is in use by process {holder.pid} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d", capsys.readouterr().err)
    assert (run / "manifest.json").read_bytes() == before
    holder.kill()
    holder.wait()
    assert (run / ".lock").is_file()
    assert kalm.main([*SMOKE, str(run)]) == 0 and not (run / ".lock").exists()


# ---------------------------------------------------------------------------------------------------- atomic artifacts

@pytest.mark.parametrize("can_exchange", (True, False))
@pytest.mark.parametrize("call", range(1, 9))
def test_a_folder_that_is_being_replaced_is_the_old_or_the_new_one_at_every_moment(tmp_path, monkeypatch, can_exchange, call):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "a").write_text("old"), (path / "b").write_text("old")
    if not can_exchange:
        monkeypatch.setattr(store, "exchange", lambda *_: False)
    with monkeypatch.context() as patch:
        count = []

        def mortal(real):
            def call_or_die(*args, **kwargs):
                count.append(real)
                if len(count) >= call:
                    raise Killed
                return real(*args, **kwargs)
            return call_or_die
        for owner, name in ((os, "rename"), (os, "replace"), (store, "exchange"), (shutil, "rmtree"), (store, "sync")):
            patch.setattr(owner, name, mortal(getattr(owner, name)))
        try:
            with store.replacing(path) as aside:
                aside.mkdir()
                (aside / "a").write_text("new"), (aside / "b").write_text("new")
        except Killed:
            pass
    store.recover(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    assert {(p.name, p.read_text()) for p in path.iterdir()} in ({("a", "old"), ("b", "old")}, {("a", "new"), ("b", "new")})
    assert call < 8 or (path / "a").read_text() == "new"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    store.write_json(tmp_path / "x.json", [1])
    with pytest.raises(TypeError):
        store.write_json(tmp_path / "x.json", [1, object()])
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"] and json.loads((tmp_path / "x.json").read_text()) == [1]


def test_what_is_written_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    done, real = [], os.replace
    monkeypatch.setattr(store.os, "fsync", lambda handle: done.append(os.readlink(f"/proc/self/fd/{handle}")))
    monkeypatch.setattr(store.os, "replace", lambda a, b: done.append("rename") or real(a, b))
    store.write_json(tmp_path / "x.json", 1)
    assert done == [str(tmp_path / "x.json.partial"), "rename", str(tmp_path)]


# -------------------------------------------------------------------------------------------------------------- damage

FILES = [("rollouts/real/data-00000-of-00001.arrow", "collect", "ground"), ("grounded/model.safetensors", "ground", "imagine"),
         ("grounded/config.json", "ground", "evaluate"), ("rollouts/hard/data-00000-of-00001.arrow", "imagine", "learn"),
         ("quality.json", "imagine", "report"), ("policies/bc.safetensors", "learn", "evaluate"),
         ("policies/goals.safetensors", "learn", "report"), ("results.json", "evaluate", "report")]


@pytest.mark.parametrize("name, writer, reader", FILES, ids=[name for name, _, _ in FILES])
def test_a_damaged_file_is_named_with_the_stage_to_redo_before_it_is_read(smoke_run, tmp_path, capsys, monkeypatch, name, writer, reader):
    run = shutil.copytree(smoke_run, tmp_path / "run")
    monkeypatch.setitem(kalm.RUN_STAGE, reader, lambda *_: pytest.fail("the stage was begun"))
    whole = (run / name).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 16
    for content, problem in ((flipped, "has changed"), (whole[:-1], "has changed"), (None, "is missing")):
        (run / name).unlink() if content is None else (run / name).write_bytes(content)
        assert kalm.main([*SMOKE, str(run), "--stage", reader, "--force"]) == 2
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert err == f"kalm: {run}: {name} {problem} since stage {writer!r} wrote it; redo it with `--stage {writer} --force`"


def test_redoing_the_named_stage_mends_a_damaged_run(smoke_run, tmp_path):
    run = shutil.copytree(smoke_run, tmp_path / "run")
    (run / "quality.json").write_text("{}")
    assert kalm.main([*SMOKE, str(run), "--stage", "learn", "--force"]) == 2
    assert kalm.main([*SMOKE, str(run), "--stage", "imagine", "--force"]) == 0
    assert (run / "quality.json").read_bytes() == (smoke_run / "quality.json").read_bytes()
    assert kalm.main([*SMOKE, str(run), "--stage", "learn", "--force"]) == 0


def test_a_manifest_cannot_point_out_of_its_folder(smoke_run, tmp_path, capsys):
    run = shutil.copytree(smoke_run, tmp_path / "run")
    (tmp_path / "secret").write_text("mine")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["stages"]["collect"]["files"]["../secret"] = store.sha256(tmp_path / "secret")
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert kalm.main([*SMOKE, str(run), "--stage", "ground", "--force"]) == 2
    assert "../secret is outside of the folder" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- room

@pytest.mark.parametrize("stage", kalm.STAGES)
def test_each_stage_asks_for_room_before_it_begins(smoke_run, tmp_path, monkeypatch, capsys, stage):
    run = shutil.copytree(smoke_run, tmp_path / "run")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 9, 10 ** 9 - 4321, 4321))
    monkeypatch.setitem(kalm.RUN_STAGE, stage, lambda *_: pytest.fail("the stage was begun"))
    assert kalm.main([*SMOKE, str(run), "--stage", stage, "--force"]) == 2
    err = capsys.readouterr().err
    assert re.search(rf"kalm: stage '{stage}' writes about [\d.]+ .B to {run}, where 4.32 kB are free; make room", err)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_grounding_asks_for_the_room_of_its_checkpoints(smoke_run, tmp_path, monkeypatch, capsys):
    run = up_to(smoke_run, tmp_path / "run", "ground")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 9, 10 ** 9 - 2 * 10 ** 6, 2 * 10 ** 6))
    monkeypatch.setattr(ground, "train", lambda *_, **__: pytest.fail("training began"))
    assert kalm.main([*SMOKE, str(run), "--stage", "ground"]) == 2
    assert "stage 'ground' writes about" in capsys.readouterr().err


@pytest.fixture
def tiny_disk(tmp_path):
    """A function: a file system of its own, of so many kB, with a copy of a run on it."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(kilobytes, run=None):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(disk)], capture_output=True)
        if done.returncode:
            pytest.skip("only root can mount a file system")
        if run:
            shutil.copytree(run, disk / "run")
        return disk / "run"
    yield mount
    subprocess.run(["umount", str(disk)], capture_output=True)


@pytest.mark.parametrize("stage", ("collect", "ground", "imagine", "learn", "evaluate", "report"))
def test_a_disk_that_fills_up_is_one_sentence_and_the_run_goes_on_once_there_is_room(smoke_run, tiny_disk, monkeypatch, capsys, stage):
    used = sum(-(-p.stat().st_size // 4096) * 4 + 4 for p in smoke_run.rglob("*"))
    run = tiny_disk(used + 200, smoke_run)
    filler = run.parent / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(run).free - 8192))
    before = {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    free = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 10 ** 9))  # someone else fills it after the check
    assert kalm.main([*SMOKE, str(run), "--stage", stage, "--force"]) == 2
    err = capsys.readouterr().err
    assert re.search(rf"kalm: stage '{stage}' cannot write {run.parent}\S*: the disk is full; it needs about [\d.]+ .B, .* are free", err), err
    after = {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file() and "unfinished" not in p.parts}
    assert {p: b for p, b in after.items() if p.parts[0] != "logs"} == {p: b for p, b in before.items() if p.parts[0] != "logs"}
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=50m", str(run.parent)], check=True)
    monkeypatch.setattr(shutil, "disk_usage", free)
    assert kalm.main([*SMOKE, str(run), "--stage", stage]) == 0 and results_of(run) == results_of(smoke_run)


def test_a_read_only_folder_is_one_sentence(smoke_run, tiny_disk, capsys):
    run = tiny_disk(20_000, smoke_run)
    before = {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    subprocess.run(["mount", "-o", "remount,ro", str(run.parent)], check=True)
    assert kalm.main([*SMOKE, str(run), "--force"]) == 2
    err = capsys.readouterr().err.strip()
    assert str(run) in err and "read-only" in err.lower() and "\n" not in err
    assert {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("error, words", [
    (PermissionError(errno.EACCES, "Permission denied", "/run/x"), "cannot write /run/x: permission is denied"),
    (OSError(errno.EROFS, "Read-only file system"), "it is read-only"),
    (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "quota")])
def test_permission_lost_while_a_stage_writes_is_one_sentence(smoke_run, tmp_path, monkeypatch, capsys, error, words):
    def broken(options, state):
        raise error
    run = shutil.copytree(smoke_run, tmp_path / "run")
    monkeypatch.setitem(kalm.RUN_STAGE, "learn", broken)
    assert kalm.main([*SMOKE, str(run), "--stage", "learn", "--force"]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("kalm: stage 'learn' cannot write") and words in err and "needs about" in err and "\n" not in err


# ------------------------------------------------------------------------------------------------------------- numbers

def test_a_loss_that_is_not_finite_stops_grounding_with_step_row_and_task_and_the_checkpoint_stays(smoke_run, tmp_path, monkeypatch, capsys):
    run, steps, real = up_to(smoke_run, tmp_path / "run", "ground"), [], ground.GroundingTrainer.compute_loss

    def spoiled(self, model, inputs, *args, **kwargs):
        steps.append(len(inputs["states"]))
        if len(steps) == 5:
            inputs["states"][1] = torch.nan
        return real(self, model, inputs, *args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(ground.GroundingTrainer, "compute_loss", spoiled)
        assert kalm.main([*SMOKE, str(run)]) == 2
    err = capsys.readouterr().err
    task = "|".join(kalm.TASKS)
    assert re.search(rf"kalm: grounding, step 5: the loss is nan, from batch row 1 \(({task})(, ({task}))*\)", err), err
    assert store.last_sealed(next((run / "unfinished").iterdir()), "checkpoint").name == "checkpoint-4"
    assert kalm.main([*SMOKE, str(run)]) == 0 and results_of(run) == results_of(smoke_run)


def test_a_gradient_that_is_not_finite_stops_grounding_before_the_weights_take_it(rollouts, tmp_path):
    model, tokenizer = new_model(rollouts)
    model.action_head[2].bias.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(FloatingPointError, match="grounding, step 1: the norm of the gradient is (nan|inf)"):
        ground.train(model, tokenizer, rollouts[:20], tmp_path, steps=2, batch_examples=8)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("algorithm", ("bc", "cql"))
@pytest.mark.parametrize("field", ("obs", "next_obs", "reward"))
def test_numbers_that_are_none_stop_offline_rl_with_method_step_seed_and_row(algorithm, field):
    table = toy_table()
    buffer = rl.Buffer(random_records(8), table)
    getattr(buffer, field)[3] = torch.nan
    if algorithm == "bc" and field != "obs":
        rl.learn(algorithm, buffer, [], table.table, [0, 1], rl.RLConfig(steps=2, batch=64), "bc+kalm")  # it does not read them
        return
    with pytest.raises(FloatingPointError, match=rf"^{algorithm}\+kalm, step 1: the loss is nan and the norm of the gradient is nan, "
                                                 r"from seed 0, batch row \d+;"):
        rl.learn(algorithm, buffer, [], table.table, [0, 1], rl.RLConfig(steps=2, batch=64), f"{algorithm}+kalm")


def test_a_seed_whose_numbers_are_none_is_told_from_the_others():
    rows = torch.zeros(3, 5, 4)
    rows[1, 4, 2] = torch.inf
    with pytest.raises(FloatingPointError, match="here, step 7: the loss is nan, from seed 1, batch row 4;"):
        rl.finite.check("here, step 7", {"loss": torch.tensor([0, torch.nan, 0])}, (torch.zeros(3, 5), rows), ("seed", "batch row"))


@pytest.mark.parametrize("kind", ("relation", "step"))
def test_an_imagined_state_that_is_not_finite_stops_with_action_row_and_goal(rollouts, kind):
    model, tokenizer = new_model(rollouts)
    goals = [g for g in env.sample_goals("easy" if kind == "step" else "offline", "test" if kind == "step" else "train", 4,
                                         np.random.default_rng(0))]
    torch.nn.init.constant_(model.state_head[-1].bias, torch.inf)
    with pytest.raises(FloatingPointError, match=f"rollout, action 1: the state is inf, from batch row 0 .{re.escape(goals[0].text)}"):
        rollout.generate(model, tokenizer, goals, env.observe(env.initial_states(np.random.default_rng(0), 4)))


def test_long_gradients_are_cut_for_each_seed_alone_and_their_norms_told():
    network = rl.SeededMLP([0, 1], [6, 5, 4])
    loss = network(torch.randn(2, 7, 4), torch.randn(2, 7, 2))[0].square().sum((1, 2))
    (loss * torch.tensor([1e-3, 1e3])).sum().backward()
    before = network.flat.grad.clone()
    expected = [float((before[s].double() ** 2).sum()) ** 0.5 for s in range(2)]
    assert expected[0] < 2 < expected[1]
    assert rl.clip_gradients([network], 2.0).tolist() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(network.flat.grad[0], before[0])
    torch.testing.assert_close(network.flat.grad[1], before[1] * 2 / expected[1])


def test_the_norms_of_gradients_are_logged_by_both_trainers(smoke_run):
    norms = json.loads((smoke_run / "policies" / "gradient_norms.json").read_text())
    curves = json.loads((smoke_run / "policies" / "curves.json").read_text())
    assert norms.keys() == curves.keys()
    assert all([s for s, _ in norms[m]] == [s for s, _ in curves[m]] and all(n > 0 for _, n in norms[m]) for m in norms)
    log = json.loads((smoke_run / "grounded" / "metrics.json").read_text())["log"]
    assert all(entry["grad_norm"] > 0 for entry in log)


def test_a_snapshot_taken_up_again_gives_the_same_policy_to_the_last_bit(tmp_path, monkeypatch):
    table = toy_table()
    real, imaginary = (rl.Buffer(random_records(9, seed), table) for seed in (0, 1))
    config = rl.RLConfig(steps=9, batch=12)
    straight, curve = rl.learn("cql", real, [imaginary], table.table, [3, 8], config)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, store, "keep_last", 4)
        rl.learn("cql", real, [imaginary], table.table, [3, 8], config, snapshots=tmp_path, snapshot_minutes=0)
    resumed, again = rl.learn("cql", real, [imaginary], table.table, [3, 8], config, snapshots=tmp_path, snapshot_minutes=1000)
    assert again == curve and all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters()))
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["cql-9", "cql-9.sealed"]


def test_snapshots_of_offline_rl_come_by_the_clock(tmp_path, monkeypatch):
    saved, clock = [], [0.0]
    monkeypatch.setattr(rl.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(checkpoint, "save_training", lambda path, *_: saved.append(path.name))
    real = rl.clip_gradients
    monkeypatch.setattr(rl, "clip_gradients", lambda *a: clock.__setitem__(0, clock[0] + 60) or real(*a))
    table = toy_table()
    rl.learn("bc", rl.Buffer(random_records(9), table), [], table.table, [0], rl.RLConfig(steps=12, batch=4), snapshots=tmp_path)
    assert saved == ["bc-5", "bc-10", "bc-12"]
