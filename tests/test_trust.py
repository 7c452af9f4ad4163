"""Nothing lost, nothing half-written: kills, signals, locks, damage, full disks."""

import contextlib
import dataclasses
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from kill_resume import content, differences
from transformers import TrainerState

import ground
import kalm
import rl
import rollout
from experiment import folder, logs

STAGES = list(kalm.STAGES)[:-1]
SMOKE = ("--scale", "smoke", "--output_dir")
PIPES = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | {"encoding": "utf-8"}


def smoke(run, *options):
    """Run kalm.py here. Returns its exit code."""
    return kalm.main([*SMOKE, run, *options])


class Killed(BaseException):
    """Stands for SIGKILL: no `except Exception` sees it."""


def note(patch, owner, name, before):
    """Call before(name) ahead of every call of owner.name."""
    real = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: before(name) or real(*args, **kwargs))


def dying(number):
    """A function whose call of that number kills, as does any call that a dead process makes."""
    calls = itertools.count(1)

    def die(name):
        if next(calls) >= number:
            raise Killed

    return die


def killed(monkeypatch, run, owner, name, number):
    """Run all stages up to that call of owner.name."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        note(patch, owner, name, dying(number))
        smoke(run)


@pytest.fixture
def work_done(monkeypatch):
    """Gradient steps and rounds of imagining and acting from here on: a list of names."""
    done, steps = [], (ground.GroundingTrainer, "compute_loss")
    for owner, name in (steps, (rl, "clip_gradients"), (rollout, "generate_all")):
        note(monkeypatch, owner, name, done.append)
    return done


def up_to(smoke_run, run, stage):
    """A copy of the smoke run as it was before a stage began, without logs."""
    shutil.copytree(smoke_run, run)
    folder.remove(run / "logs")
    manifest = folder.read_json(run / "manifest.json")
    for later in STAGES[STAGES.index(stage) :]:
        for name in [*manifest["stages"].pop(later)["files"], *kalm.STAGES[later].writes]:
            folder.remove(run / name)
    folder.write_json(run / "manifest.json", manifest)
    return run


def assert_whole(run, smoke_run, *stages):
    """What stages wrote and logged is as if nothing had been, and nothing else is left."""
    for stage in stages:
        for name in folder.read_json(smoke_run / "manifest.json")["stages"][stage]["files"]:
            assert name == "report.html" or content(run / name) == content(smoke_run / name)
    assert content(run / "logs" / "stages.jsonl") == [{"stage": stage} for stage in stages]
    for path in (run / "logs").glob("[!s]*"):
        assert content(path) == content(smoke_run / "logs" / path.name)
    assert not [*run.rglob("*.partial"), *run.glob("unfinished")]


def bytes_of(run):
    """The bytes of each file, but for logs, the lock and what is unfinished."""
    paths = {path for path in run.rglob("*") if path.is_file()}
    paths -= {*run.glob("logs/*"), *run.glob("unfinished/**/*"), run / ".lock"}
    return {path: path.read_bytes() for path in paths}


MOMENTS = {  # stage, the call that is not made any more, steps and rounds that are left then
    "half a checkpoint, none before": ("ground", TrainerState, "save_to_json", 1, 8),
    "half a second checkpoint": ("ground", TrainerState, "save_to_json", 2, 4),
    "two steps after a checkpoint": ("ground", logs.LogLines, "on_log", 9, 4),
    "all eight steps": ("ground", kalm, "grounding_figures", 1, 0),
    "half a third round of seven": ("imagine", os, "replace", 4, 6),
    "three rounds": ("imagine", rollout, "self_check", 4, 5),
    "all rounds": ("imagine", kalm, "write_rollouts", 3, 0),
    "40 of 60 steps of method 2 of 6": ("learn", rl.Training, "save", 6, 267),
    "one method, and 20 steps of another": ("learn", rl, "save_policy", 4, 287),
    "two of seven steps of the Decision Transformer": ("learn", logs.LogLines, "on_log", 3, 5),
    "all methods": ("learn", shutil, "copy", 3, 0),
    "all policies, not yet in their place": ("learn", os, "replace", 44, 0),
    "results that are not noted": ("evaluate", folder.Manifest, "note", 1, 4),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_stage_ends_as_if_nothing_had_been_and_its_time_counts_all_tries(
    smoke_run, tmp_path, monkeypatch, work_done, moment
):
    stage, *call, left = MOMENTS[moment]
    run = up_to(smoke_run, tmp_path / "run", stage)
    killed(monkeypatch, run, *call)
    (tries,) = run.glob("unfinished/*/tries.json")
    folder.write_json(tries, {"earlier": 500, "began": folder.read_json(tries)["began"] - 500})
    work_done.clear()
    assert smoke(run, "--stage", stage) == 0
    steps = work_done.count("compute_loss") if stage == "ground" else len(work_done)
    assert steps == left  # ground imagines too, to measure
    assert_whole(run, smoke_run, stage)
    assert folder.read_json(run / "manifest.json")["stages"][stage]["time_s"] > 1000


def test_a_run_that_was_killed_in_each_stage_is_whole_in_the_end(smoke_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    for owner, name, number in (
        *[(kalm, "write_rollouts", 1), (folder.Manifest, "note", 2), (rollout, "self_check", 2)],
        *[(rl.Training, "save", 7), (kalm, "play_llm", 1), (kalm.report, "write", 1)],
    ):
        killed(monkeypatch, run, owner, name, number)
    assert smoke(run) == 0
    assert_whole(run, smoke_run, *STAGES)
    assert differences(run, smoke_run) == []


def test_the_newest_checkpoint_that_is_whole_is_used(tmp_path):
    assert logs.last_checkpoint(tmp_path) is None
    for step, state in ((4, "{}"), (8, "{}"), (10, "{}"), (12, '{"step":'), (14, ""), (16, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert logs.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("file", ("model.safetensors", "optimizer.pt", "rng_state.pth"))
def test_a_checkpoint_with_a_flipped_bit_is_not_gone_on_from(
    smoke_run, tmp_path, monkeypatch, work_done, file
):
    run = up_to(smoke_run, tmp_path / "run", "ground")
    killed(monkeypatch, run, kalm, "grounding_figures", 1)
    (path,) = run.glob(f"unfinished/*/checkpoint-8/{file}")
    flipped = bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 16
    path.write_bytes(flipped)
    work_done.clear()
    assert smoke(run, "--stage", "ground") == 0 and work_done.count("compute_loss") == 8
    assert_whole(run, smoke_run, "ground")


def test_a_clock_that_is_set_back_or_forward_leaves_true_seconds(smoke_run, tmp_path, monkeypatch):
    run = up_to(smoke_run, tmp_path / "run", "report")
    real, jumps = folder.time.time, itertools.cycle([-7200, 7200])
    monkeypatch.setattr(folder.time, "time", lambda: real() + next(jumps))
    assert smoke(run, "--stage", "report") == 0
    assert 0 < folder.read_json(run / "manifest.json")["stages"]["report"]["time_s"] < 600


def test_save_steps_says_when_and_the_last_alone_is_kept(smoke_run, tmp_path, monkeypatch, capsys):
    run, seen = up_to(smoke_run, tmp_path / "run", "ground"), []
    look = lambda _: seen.append([path.name for path in run.glob("unfinished/*/checkpoint-*")])
    note(monkeypatch, ground.GroundingTrainer, "compute_loss", look)
    assert smoke(run, "--stage", "ground", "--save_steps", 3) == 0
    expected = [[f"checkpoint-{step // 3 * 3}"] if step >= 3 else [] for step in range(8)]
    assert seen == expected
    assert_whole(run, smoke_run, "ground")
    assert smoke(run, "--stage", "ground", "--save_steps", 5) == 0
    assert "nothing to do" in capsys.readouterr().out  # the result does not follow from it


@pytest.mark.parametrize("options, steps", [(["--max_steps", 9], 9), (["--force"], 8)])
def test_settings_or_force_begin_anew(smoke_run, tmp_path, monkeypatch, work_done, options, steps):
    run = up_to(smoke_run, tmp_path / "run", "ground")
    killed(monkeypatch, run, kalm, "grounding_figures", 1)
    work_done.clear()
    assert smoke(run, "--stage", "ground", *options) == 0
    assert work_done.count("compute_loss") == steps


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_one_sentence_and_its_exit_code(tmp_path, number, code):
    command = [sys.executable, "kalm.py", *SMOKE, str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, **PIPES)
    begun = any(line.startswith("ground ...") for line in process.stdout)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert begun and process.returncode == code, err
    assert f"kalm: stopped by {number.name}; the same command goes on" in err
    assert "Traceback" not in err
    assert folder.read_json(tmp_path / "run" / "manifest.json")["stages"]["collect"]["files"]


def test_a_second_run_on_a_folder_is_refused_until_the_first_ends_or_dies(tmp_path, capsys):
    hold = "import pathlib, sys\nfrom experiment import folder\n"
    hold += "with folder.locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n"
    command = [sys.executable, "-c", hold + "    sys.stdin.read()", str(tmp_path)]
    holder = subprocess.Popen(command, cwd=ROOT, **PIPES)
    assert holder.stdout.readline() == "held\n"
    assert smoke(tmp_path, "--stage", "collect") == 2
    assert f"kalm: {tmp_path} is in use by another process" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    holder.kill()
    holder.communicate()
    assert (tmp_path / ".lock").is_file() and smoke(tmp_path, "--stage", "collect") == 0


@pytest.mark.parametrize("names", [[""], ["a", "b"]])
@pytest.mark.parametrize("number", range(1, 7))
def test_a_result_is_the_old_or_the_new_or_undone(tmp_path, monkeypatch, names, number):
    manifest, files = folder.Manifest(tmp_path), [tmp_path / "x" / name for name in names]

    def replace(text):
        with folder.replacing(tmp_path / "x") as aside:
            for name in names:
                (aside / name).parent.mkdir(exist_ok=True)
                (aside / name).write_text(text)

    replace("old")
    manifest.stages["x"] = {"fingerprint": "1", "run": {}, "settings": {}, "files": {}}
    manifest.note("x", ["x"])
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        die = dying(number)
        for owner, name in ((os, "replace"), (folder, "remove"), (os, "fsync")):
            note(patch, owner, name, die)
        replace("new")
    if manifest.is_done("x", "1"):
        assert {path.read_text() for path in files} in ({"old"}, {"new"})
    else:
        assert (len(names), number) == (2, 5)  # a folder, between its removal and the renaming
    replace("newer")  # and what was left aside goes
    assert {path.read_text() for path in files} == {"newer"}
    assert {path.name for path in tmp_path.iterdir()} == {"x", "manifest.json"}


def test_what_is_written_is_synced_then_renamed_or_the_old_stays(tmp_path, monkeypatch):
    path, done, real = tmp_path / "x.json", [], os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("rename") or real(a, b))
    folder.write_json(path, 1)
    assert done == [path.stat().st_ino, "rename"]
    with pytest.raises(TypeError):
        folder.write_json(path, [1, object()])
    assert list(tmp_path.iterdir()) == [path] and folder.read_json(path) == 1


FILES = """rollouts/real/data-00000-of-00001.arrow collect ground
grounded/model.safetensors ground imagine
rollouts/hard/data-00000-of-00001.arrow imagine learn
goals.jsonl imagine act
quality.json imagine report
policies/goals.safetensors learn report
results.json evaluate report"""  # who writes and who reads them


@pytest.mark.parametrize("file", FILES.splitlines())
def test_damage_is_named_with_the_stage_to_redo(smoke_run, tmp_path, capsys, monkeypatch, file):
    (name, writer, reader), run = file.split(), shutil.copytree(smoke_run, tmp_path / "run")
    stage = dataclasses.replace(kalm.STAGES[reader], function=lambda *_: pytest.fail("begun"))
    monkeypatch.setitem(kalm.STAGES, reader, stage)
    whole = (run / name).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 16
    options = ["--goal", "put red left of blue"] if reader == "act" else ["--force"]
    for damaged, problem in ((flipped, "has changed"), (whole[:-1], "has changed"), (0, "is mi")):
        (run / name).write_bytes(damaged) if damaged else (run / name).unlink()
        assert smoke(run, "--stage", reader, *options) == 2
        expected = rf": {name} {problem}.* since stage '{writer}' wrote it; redo it with `--stage "
        assert re.search(expected + writer + " --force`", capsys.readouterr().err)


def test_redoing_the_named_stage_mends_a_damaged_run(smoke_run, tmp_path):
    run = up_to(smoke_run, tmp_path / "run", "learn")
    (run / "quality.json").write_text("{}")
    assert smoke(run, "--stage", "learn") == 2
    assert smoke(run, "--stage", "imagine", "--force") == 0
    assert smoke(run, "--stage", "learn") == 0
    assert_whole(run, smoke_run, "imagine", "learn")


def test_a_manifest_cannot_point_out_of_its_folder(smoke_run, tmp_path, capsys):
    run = shutil.copytree(smoke_run, tmp_path / "run")
    (tmp_path / "secret").write_text("mine")
    manifest = folder.read_json(run / "manifest.json")
    manifest["stages"]["collect"]["files"]["../secret"] = folder.sha256(tmp_path / "secret")
    folder.write_json(run / "manifest.json", manifest)
    assert smoke(run, "--stage", "ground", "--force") == 2
    assert "../secret is outside of the folder" in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path):
    """A function: mount a file system of 80 MB, or mount it again with other options."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options="size=80m"):
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(disk)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root can mount a file system")
        return disk / "run"

    yield mount
    subprocess.run(["umount", str(disk)], capture_output=True)


FULL = [(stage, left) for stage in STAGES for left in (8192, 0.5)]  # bytes, or part of its files


@pytest.mark.parametrize(
    "stage, left", [*FULL, ("ground", 2.0)]
)  # the last: in an optimizer's file
def test_a_full_disk_is_said_and_the_run_goes_on(smoke_run, small_disk, capsys, stage, left):
    run = up_to(smoke_run, small_disk(), stage)
    if left < 8192:
        files = folder.read_json(smoke_run / "manifest.json")["stages"][stage]["files"]
        left = int(left * sum((smoke_run / name).stat().st_size for name in files))
    filler = run.parent / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(run).free - max(left, 8192)))
    before = bytes_of(run)
    assert smoke(run, "--stage", stage) == 2
    full = rf"kalm: stage '{stage}': .*No space left on.*finished stages are kept\n"
    error = capsys.readouterr().err
    assert re.search(full, error), error
    assert bytes_of(run) == before
    filler.unlink()
    assert smoke(run, "--stage", stage) == 0
    assert_whole(run, smoke_run, stage)


def test_a_read_only_folder_is_one_sentence(smoke_run, small_disk, capsys):
    run = shutil.copytree(smoke_run, small_disk())
    before = bytes_of(run)
    small_disk("remount,ro")
    assert smoke(run, "--force") == 2 and bytes_of(run) == before
    assert re.fullmatch(rf"kalm: .*Read-only file system.*{run}.*\n", capsys.readouterr().err)


def test_an_unforeseen_error_is_one_sentence(smoke_run, tmp_path, monkeypatch, capsys):
    run = up_to(smoke_run, tmp_path / "run", "learn")
    missing = dataclasses.replace(kalm.STAGES["learn"], function=lambda *_: {}["key"])
    monkeypatch.setitem(kalm.STAGES, "learn", missing)
    assert smoke(run, "--stage", "learn") == 2
    sentence = "KeyError: 'key' (--traceback shows where); finished stages are kept"
    assert capsys.readouterr().err == f"kalm: stage 'learn': {sentence}\n"
    with pytest.raises(KeyError):
        smoke(run, "--stage", "learn", "--traceback")
