"""What several test files share: the import path, a world, expert rollouts, a tiny grounded model,
a finished smoke run."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads would only wait for each other

import numpy as np
import pytest
import torch

import env
import ground
import kalm
import tasks
from data import llm
from data.grounded import observation_statistics
from experiment import folder
from model import KalmForRollouts


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """Files are not synced to the disk, which takes most of the time of runs as small as ours."""
    monkeypatch.setattr(folder.os, "fsync", lambda handle: None)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes half a minute or more; begun first")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # none is left alone last


def run_kalm(*arguments, launcher=(), cwd=ROOT):
    """`python kalm.py ...` in a process of its own."""
    command = [sys.executable, *launcher, str(ROOT / "kalm.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, encoding="utf-8", timeout=300)


@pytest.fixture(scope="session")
def world():
    """The default world, CLEVR-Robot."""
    return env.make()


def rollout_record(world, goal, observations, actions, states=None, imagined=False):
    """The record of one episode."""
    (record,) = env.rollout_records(world, [goal], [(observations, actions, states)], imagined)
    return record


def expert_rollouts(world, goals, rng):
    """One episode of the scripted expert for each relation goal, at most 20 actions."""
    states = env.unfulfilled_states(world, rng, goals)
    return env.expert_rollouts(world, goals, states, max_steps=20)


@pytest.fixture(scope="session")
def rollouts(world):
    """160 successful expert rollouts, four for a goal: records as `env.rollout_records` makes
    them.
    """
    rng = np.random.default_rng(11)
    goals = [goal for goal in world.sample_goals("offline", "train", 60, rng) for _ in range(4)]
    return [record for record in expert_rollouts(world, goals, rng) if record["success"]][:160]


def tiny_llm(world, seed=0):
    """The tiny LLM of a world, and its tokenizer."""
    return llm.tiny([*world.vocabulary(), *tasks.PROMPTS.values()], seed)


def new_model(world, rollouts, **options):
    """An untrained KalmForRollouts around the tiny LLM, and its tokenizer."""
    language_model, tokenizer = tiny_llm(world)
    options = {**observation_statistics(rollouts, world.objects), **options}
    model = KalmForRollouts.from_llm(language_model, objects=world.objects, **options)
    return model.eval(), tokenizer


def grounding_settings(folder, **options):
    """GroundingArguments for quick training in a test."""
    quick = {"per_device_train_batch_size": 16, "learning_rate": 3e-3, "new_learning_rate": 3e-3}
    quick |= {"eval_strategy": "no", "lora_rank": 0, "keep_layers": 0, "disable_tqdm": True}
    return ground.GroundingArguments(output_dir=str(folder), **{**quick, **options})


@pytest.fixture(scope="session")
def grounded(world, rollouts, tmp_path_factory):
    """The tiny LLM after 120 steps of grounding in the first 140 rollouts: (model, tokenizer,
    log).
    """
    model, tokenizer = new_model(world, rollouts)
    work = tmp_path_factory.mktemp("grounded")
    settings = grounding_settings(work, max_steps=120, logging_steps=12)
    log = ground.train(
        model, tokenizer, world, rollouts[:140], rollouts[140:], settings, work, work / "log.jsonl"
    )
    return model.eval(), tokenizer, log


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory):
    """The folder of a finished `--scale smoke` run; tests must leave it as it is."""
    path = tmp_path_factory.mktemp("runs") / "smoke"
    done = run_kalm("--scale", "smoke", "--output_dir", path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def stages_run(monkeypatch):
    """Stages only note that they were run: a list of their names."""
    names = []
    for name, stage in kalm.STAGES.items():
        note = lambda run, settings, work, name=name: names.append(name)
        monkeypatch.setitem(kalm.STAGES, name, kalm.Stage(note, stage.reads, (), stage.shared))
    return names


@pytest.fixture
def losses_of():
    """A function: the losses of a model on a batch, as a list of floats."""

    def losses(model, batch):
        with torch.no_grad():
            out = model(**batch)
        parts = [out.loss, *out.losses.values(), *out.task_losses]
        return [part.item() for part in parts]

    return losses
