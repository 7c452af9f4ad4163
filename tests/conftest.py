"""What several test files share: the import path, expert rollouts, a tiny grounded model, a finished smoke run."""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads would only wait for each other

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import env  # noqa: E402
import ground  # noqa: E402
import kalm  # noqa: E402
from data import llm, store  # noqa: E402
from model import KalmForRollouts  # noqa: E402


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """Files are not synced to the disk, which takes most of the time of runs as small as those of the tests."""
    monkeypatch.setattr(store.os, "fsync", lambda handle: None)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes a minute or more; part of the default run")


def expert_rollouts(goals, rng):
    """One episode of the scripted expert for each relation goal, at most 20 actions."""
    array, states = env.goal_array(goals), env.unfulfilled_states(rng, goals)
    return env.run_episodes(lambda obs, rows: env.expert_actions(array[rows], obs), goals, states, max_steps=20)


def run_kalm(*arguments, launcher=()):
    """`python kalm.py ...` in a process of its own."""
    return subprocess.run([sys.executable, *launcher, "kalm.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)


@pytest.fixture(scope="session")
def rollouts():
    """160 successful expert rollouts, four for a goal: records as `env.rollout_record` makes them."""
    rng = np.random.default_rng(11)
    goals = [goal for goal in env.sample_goals("offline", "train", 60, rng) for _ in range(4)]
    return [r for r in expert_rollouts(goals, rng) if r["success"]][:160]


def new_model(rollouts, **options):
    """An untrained KalmForRollouts around the tiny LLM, and its tokenizer."""
    language_model, tokenizer = llm.tiny(0)
    return KalmForRollouts.from_llm(language_model, **ground.observation_statistics(rollouts), **options).eval(), tokenizer


@pytest.fixture(scope="session")
def grounded(rollouts, tmp_path_factory):
    """The tiny LLM after 120 steps of grounding in the first 140 rollouts: (model, tokenizer, log)."""
    model, tokenizer = new_model(rollouts)
    log = ground.train(model, tokenizer, rollouts[:140], tmp_path_factory.mktemp("logs"), steps=120, batch_examples=16,
                       learning_rate=3e-3, new_learning_rate=3e-3)
    return model.eval(), tokenizer, log


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory):
    """The folder of a finished `--scale smoke` run; tests must leave it as it is."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    done = run_kalm("--scale", "smoke", "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def stages_run(monkeypatch):
    """Stages only note that they were run: a list of their names."""
    names = []
    for stage in kalm.STAGES:
        monkeypatch.setitem(kalm.RUN_STAGE, stage, lambda options, state, stage=stage: names.append(stage))
    return names


@pytest.fixture
def losses_of():
    """A function: the losses of a model on a batch, as a list of floats."""
    def losses(model, batch):
        with torch.no_grad():
            out = model(**batch)
        return [out.loss.item(), out.text_loss.item(), out.action_loss.item(), out.state_loss.item(), *out.task_losses.tolist()]
    return losses
