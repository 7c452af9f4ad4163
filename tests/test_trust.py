"""Nothing lost, nothing half-written: kills, locks, damage, full disks, numbers that are none."""

import dataclasses
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
from conftest import ROOT, grounding_settings, new_model
from safetensors.torch import load_file
from transformers import TrainerState

import env
import ground
import kalm
import rl
import rollout
from experiment import folder, logs

SMOKE = ("--scale", "smoke", "--output_dir")
EXACT = {"rtol": 0, "atol": 0}
OF_THIS_TRY = ("time", "train_runtime", "train_loss", "train_samples_per_second")
OF_THIS_TRY += ("train_steps_per_second",)


class Killed(BaseException):
    """Stands for SIGKILL: no `except Exception` sees it."""


def kill_at(patch, owner, name, call, after=True):
    """The call of that number of owner.name is the last thing that happens, or almost happens."""
    real, calls = getattr(owner, name), []

    def mortal(*args, **kwargs):
        calls.append(name)
        if len(calls) == call and not after:
            raise Killed
        value = real(*args, **kwargs)
        if len(calls) == call:
            raise Killed
        return value

    patch.setattr(owner, name, mortal)


def killed(monkeypatch, run, owner, name, call, after=True, options=()):
    """Run all stages until that call kills them."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, owner, name, call, after)
        kalm.main([*SMOKE, run, *options])


@pytest.fixture
def work_done(monkeypatch):
    """The gradient steps and rounds of imagining that are done from here on: a list of names."""
    done = []
    places = [(ground.GroundingTrainer, "compute_loss"), (rl, "clip_gradients")]
    for owner, name in [*places, (rollout, "generate_all")]:
        real = getattr(owner, name)
        note = lambda *args, _real=real, _name=name, **kw: done.append(_name) or _real(*args, **kw)
        monkeypatch.setattr(owner, name, note)
    return done


def up_to(smoke_run, path, stage):
    """A copy of the smoke run as it was before a stage began, without logs."""
    shutil.copytree(smoke_run, path)
    folder.remove(path / "logs")
    manifest = folder.read_json(path / "manifest.json")
    for later in list(kalm.STAGES)[list(kalm.STAGES).index(stage) : -1]:
        for name in kalm.STAGES[later].writes:
            folder.remove(path / name)
        del manifest["stages"][later]
    folder.write_json(path / "manifest.json", manifest)
    return path


def results_of(run):
    results = folder.read_json(run / "results.json")
    assert results.pop("time_s")
    return results


def lines_of(path):
    """The lines of a log but for what is of the try that wrote them."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in OF_THIS_TRY} for line in lines]


def assert_as_if_nothing_had_been(run, smoke_run, stage):
    """What a stage wrote is what the smoke run has, number by number; so is each of its logs."""
    for file in folder.read_json(smoke_run / "manifest.json")["stages"][stage]["files"]:
        if file == "results.json":
            assert results_of(run) == results_of(smoke_run)
        elif file.endswith(".json"):
            assert folder.read_json(run / file) == folder.read_json(smoke_run / file)
        elif file.endswith(".safetensors"):  # its metadata come in any order
            torch.testing.assert_close(load_file(run / file), load_file(smoke_run / file), **EXACT)
        elif file != "report.html":
            assert (run / file).read_bytes() == (smoke_run / file).read_bytes(), file
    for path in (run / "logs").glob("[!s]*.jsonl"):
        assert lines_of(path) == lines_of(smoke_run / "logs" / path.name)
    assert not [*run.rglob("*.partial"), *run.glob("unfinished")]


def files_of(run, *but):
    """The content of each file, but for those of some of the parts of the run's folder."""
    files = {path.relative_to(run): path for path in run.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name.parts[0] not in but}


# ------------------------------------------------------------------------------- interruption

SAVED = (TrainerState, "save_to_json")  # the last file of a checkpoint
MOMENTS = {  # stage, the last call, how many of them, whether it is done; steps and rounds left
    "half a checkpoint": ("ground", *SAVED, 1, False, 8),
    "a checkpoint, of four steps": ("ground", *SAVED, 1, True, 4),
    "two steps later": ("ground", logs.LogLines, "on_log", 8, True, 4),
    "half a second checkpoint": ("ground", *SAVED, 2, False, 4),
    "all eight steps": ("ground", kalm, "measured", 1, True, 0),
    "half a third round of seven": ("imagine", os, "replace", 4, False, 5),
    "three rounds": ("imagine", rollout, "write_rollouts", 3, True, 4),
    "all rounds": ("imagine", kalm, "write_rollouts", 2, True, 0),
    "40 of 60 steps of method 2 of 6": ("learn", rl.Training, "save", 5, True, 260),
    "three methods": ("learn", rl, "save_policy", 3, True, 180),
    "all methods": ("learn", shutil, "copy", 2, True, 0),
    "results that are not noted": ("evaluate", folder.Manifest, "note", 1, False, 28),
}


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_a_killed_stage_goes_on_and_ends_as_if_nothing_had_been(
    smoke_run, tmp_path, monkeypatch, work_done, moment
):
    stage, owner, name, call, after, left = moment
    run = up_to(smoke_run, tmp_path / "run", stage)
    killed(monkeypatch, run, owner, name, call, after)
    (tries,) = run.glob("unfinished/*/tries.json")
    folder.write_json(tries, {"earlier": 500, "began": folder.read_json(tries)["began"] - 500})
    work_done.clear()
    assert kalm.main([*SMOKE, run, "--stage", stage]) == 0
    assert len(work_done) == left
    assert_as_if_nothing_had_been(run, smoke_run, stage)
    assert folder.read_json(run / "manifest.json")["stages"][stage]["time_s"] > 1000


def test_a_run_that_was_killed_in_each_stage_is_whole_in_the_end(smoke_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    killed(monkeypatch, run, kalm, "write_rollouts", 1, after=False)
    killed(monkeypatch, run, folder.Manifest, "note", 2, after=False)
    killed(monkeypatch, run, rollout, "self_check", 2)
    killed(monkeypatch, run, rl.Training, "save", 7)
    killed(monkeypatch, run, kalm, "play", 3)
    killed(monkeypatch, run, kalm.report, "write", 1)
    assert kalm.main([*SMOKE, run]) == 0
    for stage in list(kalm.STAGES)[:-1]:
        assert_as_if_nothing_had_been(run, smoke_run, stage)
    assert files_of(run).keys() == files_of(smoke_run).keys()
    config = (run / "config.yaml").read_bytes()
    assert config == (smoke_run / "config.yaml").read_bytes()


def test_the_time_of_a_stage_counts_all_its_tries_up_to_their_last_file(tmp_path):
    manifest, work = folder.Manifest(tmp_path), tmp_path / "unfinished" / "learn-1"
    assert manifest.begin(work, anew=False) == 0
    for expected in (40, 50):
        began = folder.read_json(work / "tries.json")["began"]
        (work / "file").write_text("x")
        os.utime(work / "file", (0, began + (40 if expected == 40 else 10)))
        assert manifest.begin(work, anew=False) == pytest.approx(expected, abs=0.1)
    assert manifest.begin(work, anew=True) == 0


def test_the_newest_checkpoint_that_is_whole_is_used(tmp_path):
    assert logs.last_checkpoint(tmp_path) is None
    for step, state in ((4, "{}"), (8, "{}"), (10, "{}"), (12, '{"step":'), (14, "")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-16").mkdir()
    assert logs.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_save_steps_says_when_and_only_the_last_checkpoint_is_kept(
    smoke_run, tmp_path, monkeypatch, capsys
):
    run, seen, real = up_to(smoke_run, tmp_path / "run", "ground"), [], ground.finite.check

    def look(*args, **kwargs):
        seen.append([path.name for path in run.glob("unfinished/*/checkpoint-*")])
        return real(*args, **kwargs)

    monkeypatch.setattr(ground.finite, "check", look)
    assert kalm.main([*SMOKE, run, "--stage", "ground", "--save_steps", 3]) == 0
    by_step = [[f"checkpoint-{step // 3 * 3}"] if step >= 3 else [] for step in range(8)]
    assert seen[::2] == by_step  # of the loss; then of the gradient
    assert not (run / "unfinished").exists()
    assert kalm.main([*SMOKE, run, "--stage", "ground", "--save_steps", 5]) == 0
    assert "nothing to do" in capsys.readouterr().out  # and the result does not follow from it


@pytest.mark.parametrize("options, steps", [(["--max_steps", 9], 9), (["--force"], 8)])
def test_another_setting_or_force_does_not_take_up_what_was_unfinished(
    smoke_run, tmp_path, monkeypatch, work_done, options, steps
):
    run = up_to(smoke_run, tmp_path / "run", "ground")
    killed(monkeypatch, run, *SAVED, 1)
    work_done.clear()
    assert kalm.main([*SMOKE, run, "--stage", "ground", *options]) == 0
    assert len(work_done) == steps


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_one_sentence_and_its_exit_code(tmp_path, number, code):
    command = [sys.executable, "kalm.py", *SMOKE, str(tmp_path / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    assert any(line.startswith("ground ...") for line in process.stdout)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"kalm: stopped by {number.name}; the same command goes on" in err
    assert "Traceback" not in err
    assert folder.read_json(tmp_path / "run" / "manifest.json")["stages"]["collect"]["files"]


def test_a_second_run_on_a_folder_is_refused_until_the_first_ends_however(
    smoke_run, tmp_path, capsys
):
    run = shutil.copytree(smoke_run, tmp_path / "run")
    hold = "import sys, pathlib\nfrom experiment import folder\n"
    hold += "with folder.locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n"
    command = [sys.executable, "-c", hold + "    sys.stdin.read()", str(run)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
    holder = subprocess.Popen(command, cwd=ROOT, **pipes)
    assert holder.stdout.readline() == "held\n"
    before = files_of(run)
    assert kalm.main([*SMOKE, run, "--force"]) == 2
    assert f"kalm: {run} is in use by another process" in capsys.readouterr().err
    assert files_of(run) == before
    holder.kill()
    holder.wait()
    assert (run / ".lock").is_file() and kalm.main([*SMOKE, run]) == 0


# ------------------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("kind", ("file", "folder"))
@pytest.mark.parametrize("call", range(1, 7))
def test_what_is_being_replaced_is_the_old_or_the_new_or_its_stage_counts_as_undone(
    tmp_path, monkeypatch, kind, call
):
    manifest, path, calls = folder.Manifest(tmp_path), tmp_path / "x", []
    files = ["x"] if kind == "file" else ["x/a", "x/b"]

    def replace(text):
        with folder.replacing(path) as aside:
            for file in files:
                place = aside / file[2:]
                place.parent.mkdir(exist_ok=True)
                place.write_text(text)

    replace("old")
    manifest.stages["x"] = {"fingerprint": "1", "run": {}, "settings": {}, "files": {}}
    manifest.note("x", ["x"])
    with monkeypatch.context() as patch:
        for owner, name in ((os, "replace"), (folder, "remove"), (os, "fsync")):
            real = getattr(owner, name)

            def dies(*args, _real=real):  # and nothing is done after that, as after SIGKILL
                calls.append(_real)
                if len(calls) >= call:
                    raise Killed
                return _real(*args)

            patch.setattr(owner, name, dies)
        try:
            replace("new")
        except Killed:
            assert len(calls) >= call
    if manifest.is_done("x", "1"):
        assert {(tmp_path / file).read_text() for file in files} in ({"old"}, {"new"})
    else:
        assert kind == "folder" and calls[call - 1] is os.replace and not path.exists()
    replace("newer")  # what was left aside goes
    assert {(tmp_path / file).read_text() for file in files} == {"newer"}
    assert {part.name for part in tmp_path.iterdir()} == {"x", "manifest.json"}


def test_a_stage_that_was_killed_between_the_old_result_and_the_new_is_done_again(
    smoke_run, tmp_path, monkeypatch, work_done
):
    run, real = shutil.copytree(smoke_run, tmp_path / "run"), os.replace

    def dies(source, target):
        if target == run / "policies":
            raise Killed
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", dies)
        kalm.main([*SMOKE, run, "--stage", "learn", "--force"])
    assert not (run / "policies").exists()
    work_done.clear()
    assert kalm.main([*SMOKE, run, "--stage", "learn"]) == 0
    assert work_done == []  # its last snapshots were there
    assert_as_if_nothing_had_been(run, smoke_run, "learn")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    folder.write_json(tmp_path / "x.json", [1])
    with pytest.raises(TypeError):
        folder.write_json(tmp_path / "x.json", [1, object()])
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert folder.read_json(tmp_path / "x.json") == [1]


def test_what_is_written_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    done, real = [], os.replace
    synced = lambda handle: done.append(os.fstat(handle).st_ino)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("rename") or real(a, b))
    folder.write_json(tmp_path / "x.json", 1)
    assert done == [(tmp_path / "x.json").stat().st_ino, "rename"]


# ------------------------------------------------------------------------------------- damage

FILES = {  # who writes and who reads them
    "rollouts/real/data-00000-of-00001.arrow": ("collect", "ground"),
    "grounded/model.safetensors": ("ground", "imagine"),
    "grounded/config.json": ("ground", "evaluate"),
    "rollouts/hard/data-00000-of-00001.arrow": ("imagine", "learn"),
    "goals.jsonl": ("imagine", "act"),
    "quality.json": ("imagine", "report"),
    "policies/bc.safetensors": ("learn", "evaluate"),
    "policies/goals.safetensors": ("learn", "report"),
    "results.json": ("evaluate", "report"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_with_the_stage_to_redo_before_it_is_read(
    smoke_run, tmp_path, capsys, monkeypatch, name
):
    (writer, reader), run = FILES[name], shutil.copytree(smoke_run, tmp_path / "run")
    fails = lambda *_: pytest.fail("the stage was begun")
    unread = dataclasses.replace(kalm.STAGES[reader], function=fails)
    monkeypatch.setitem(kalm.STAGES, reader, unread)
    whole = (run / name).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 16
    options = ["--goal", "put red left of blue"] if reader == "act" else ["--force"]
    cases = ((flipped, "has changed"), (whole[:-1], "has changed"), (None, "is missing"))
    for content, problem in cases:
        (run / name).unlink() if content is None else (run / name).write_bytes(content)
        assert kalm.main([*SMOKE, run, "--stage", reader, *options]) == 2
        problem = f"{run}: {name} {problem} since stage {writer!r} wrote it"
        expected = f"{problem}; redo it with `--stage {writer} --force`"
        assert expected in capsys.readouterr().err.strip().splitlines()[-1]


def test_redoing_the_named_stage_mends_a_damaged_run(smoke_run, tmp_path):
    run = shutil.copytree(smoke_run, tmp_path / "run")
    (run / "quality.json").write_text("{}")
    assert kalm.main([*SMOKE, run, "--stage", "learn", "--force"]) == 2
    assert kalm.main([*SMOKE, run, "--stage", "imagine", "--force"]) == 0
    assert_as_if_nothing_had_been(run, smoke_run, "imagine")
    assert kalm.main([*SMOKE, run, "--stage", "learn", "--force"]) == 0


def test_a_manifest_cannot_point_out_of_its_folder(smoke_run, tmp_path, capsys):
    run = shutil.copytree(smoke_run, tmp_path / "run")
    (tmp_path / "secret").write_text("mine")
    manifest = folder.read_json(run / "manifest.json")
    digest = folder.sha256(tmp_path / "secret")
    manifest["stages"]["collect"]["files"]["../secret"] = digest
    folder.write_json(run / "manifest.json", manifest)
    assert kalm.main([*SMOKE, run, "--stage", "ground", "--force"]) == 2
    assert "../secret is outside of the folder" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- room


@pytest.fixture
def small_disk(tmp_path):
    """A function: a file system of its own, of so many MB, to be mounted in a new way."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(*options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "none", str(disk)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root can mount a file system")
        return disk / "run"

    yield mount
    subprocess.run(["umount", str(disk)], capture_output=True)


@pytest.mark.parametrize("stage", list(kalm.STAGES)[:-1])
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_once_there_is_room(
    smoke_run, small_disk, capsys, stage
):
    run = up_to(smoke_run, small_disk("size=50m"), stage)
    filler = run.parent / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(run).free - 2 * 4096))
    before = files_of(run, "unfinished", "logs", ".lock")
    assert kalm.main([*SMOKE, run, "--stage", stage]) == 2
    err = capsys.readouterr().err
    full = "(No space left on device|is the disk full).*finished stages are kept\n"
    assert re.search(rf"kalm: stage '{stage}': .*{full}", err), err
    assert files_of(run, "unfinished", "logs", ".lock") == before
    filler.unlink()
    assert kalm.main([*SMOKE, run, "--stage", stage]) == 0
    assert_as_if_nothing_had_been(run, smoke_run, stage)


def test_a_read_only_folder_is_one_sentence(smoke_run, small_disk, capsys):
    run = shutil.copytree(smoke_run, small_disk("size=50m"))
    before = files_of(run)
    small_disk("remount", "ro")
    assert kalm.main([*SMOKE, run, "--force"]) == 2
    err = capsys.readouterr().err.strip()
    assert str(run) in err and "read-only" in err.lower() and "\n" not in err
    assert files_of(run) == before


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "/run/x"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("out of memory"),
    ],
)
def test_an_error_that_nobody_foresaw_is_one_sentence_with_its_stage(
    smoke_run, tmp_path, monkeypatch, capsys, error
):
    def broken(run, settings, work):
        raise error

    run = shutil.copytree(smoke_run, tmp_path / "run")
    stage = dataclasses.replace(kalm.STAGES["learn"], function=broken)
    monkeypatch.setitem(kalm.STAGES, "learn", stage)
    assert kalm.main([*SMOKE, run, "--stage", "learn", "--force"]) == 2
    sentence = f"{type(error).__name__}: {error} (--traceback shows where)"
    expected = f"kalm: stage 'learn': {sentence}; finished stages are kept"
    assert capsys.readouterr().err.strip() == expected
    with pytest.raises(type(error)):
        kalm.main([*SMOKE, run, "--stage", "learn", "--force", "--traceback"])


# ------------------------------------------------------------------------------------ numbers


def test_a_loss_that_is_none_stops_grounding_with_step_row_and_task_and_the_checkpoint_stays(
    smoke_run, tmp_path, monkeypatch, capsys
):
    run, steps = up_to(smoke_run, tmp_path / "run", "ground"), []
    real = ground.GroundingTrainer.compute_loss

    def spoiled(self, model, inputs, *args, **kwargs):
        steps.append(len(inputs["states"]))
        if len(steps) == 7:
            inputs["states"][1] = torch.nan
        return real(self, model, inputs, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ground.GroundingTrainer, "compute_loss", spoiled)
        assert kalm.main([*SMOKE, run]) == 2
    task = "|".join(kalm.ground.TASKS)
    where = rf"step 7: the loss is nan, from batch row 1 \(({task})(, ({task}))*\)"
    assert re.search(rf"kalm: stage 'ground': grounding, {where}", capsys.readouterr().err)
    (work,) = (run / "unfinished").iterdir()
    assert logs.last_checkpoint(work) == str(work / "checkpoint-4")
    assert kalm.main([*SMOKE, run, "--stage", "ground"]) == 0
    assert_as_if_nothing_had_been(run, smoke_run, "ground")


def test_a_gradient_that_is_none_stops_grounding_before_the_weights_take_it(
    world, rollouts, tmp_path
):
    model, tokenizer = new_model(world, rollouts)
    model.action_head[2].bias.register_hook(lambda gradient: gradient * torch.inf)
    what = "grounding, step 1: the norm of the gradient is (nan|inf)"
    data = (world, rollouts[:20], rollouts[20:22], grounding_settings(tmp_path, max_steps=2))
    with pytest.raises(FloatingPointError, match=what):
        ground.train(model, tokenizer, *data, tmp_path, tmp_path / "log.jsonl")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("level", ("offline", "easy"))
def test_an_imagined_state_that_is_none_stops_with_action_row_and_goal(world, rollouts, level):
    model, tokenizer = new_model(world, rollouts)
    rng = np.random.default_rng(0)
    goals = world.sample_goals(level, "train" if level == "offline" else "test", 4, rng)
    torch.nn.init.constant_(model.state_head[-1].bias, torch.inf)
    what = rf"rollout, action 1: the state is inf, from batch row 0 .{re.escape(goals[0].text)}"
    with pytest.raises(FloatingPointError, match=what):
        starts = world.observe(env.unfulfilled_states(world, rng, goals))
        rollout.generate(model, tokenizer, world, goals, starts)


def test_the_norms_of_gradients_are_logged_by_both_trainers(smoke_run):
    norms = folder.read_json(smoke_run / "policies" / "gradient_norms.json")
    curves = folder.read_json(smoke_run / "policies" / "curves.json")
    assert norms.keys() == curves.keys()
    for method, curve in curves.items():
        assert [step for step, _ in norms[method]] == [step for step, _ in curve]
        assert all(norm > 0 for _, norm in norms[method])
    log = folder.read_json(smoke_run / "grounded" / "metrics.json")["log"]
    assert all(entry["grad_norm"] > 0 for entry in log)
