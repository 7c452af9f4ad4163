"""The Decision Transformer: returns-to-go, its loss and mask, what it learns, how it acts."""

import math

import numpy as np
import pytest
import torch
import transformers
from conftest import grounding_settings, tiny_llm
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import TINY_LLMS

import dt
import env
import ground
import rl
import rollout
import tasks
from data.grounded import load_grounded, observation_statistics, wrap_llm
from experiment import command, launch
from experiment.run import Run
from model import ACTION, PAD, RETURN, SEGMENTS, STATE, KalmForRollouts


def new_dt(world, rollouts, work, llm=None, **options):
    """An untrained Decision Transformer around the tiny LLM, its tokenizer and settings."""
    language_model, tokenizer = tiny_llm(world)
    chosen = grounding_settings(work, **options)
    chosen.tasks = "decision"
    statistics = observation_statistics(rollouts, world.objects) | dt.return_statistics(rollouts)
    kind = dt.DecisionTransformer
    model = wrap_llm(llm or language_model, world, statistics, chosen, kind)
    return model.eval(), tokenizer, chosen


@pytest.fixture(scope="module")
def untrained(world, rollouts, tmp_path_factory):
    return new_dt(world, rollouts, tmp_path_factory.mktemp("dt"))


def batch_of(untrained, world, *groups, row_length=256):
    """A packed batch of examples, of rollouts of one goal each."""
    examples = [tasks.make_example("decision", untrained[1], world, g) for g in groups]
    return tasks.pack(examples, row_length)


def action_logits(model, batch):
    with torch.no_grad():
        return model(**batch).action_logits


# ------------------------------------------------------------------ data


def test_returns_to_go_are_the_rewards_from_each_action_on():
    assert tasks.returns_to_go(np.array([1.0, -2.0, 100.0])).tolist() == [99, 98, 100]


def test_statistics_are_of_all_returns_to_go_and_the_target_of_whole_rollouts():
    rewards = [[1, 3], [5]]  # returns-to-go 4, 3 and 5
    found = dt.return_statistics([{"rewards": np.array(own, float)} for own in rewards])
    assert found["return_mean"] == pytest.approx(4)
    assert found["return_std"] == pytest.approx((2 / 3) ** 0.5)
    assert found["target_return"] == pytest.approx(4 + 0.9)  # .9 of the way from 4 to 5
    alike = dt.return_statistics([{"rewards": np.array([7.0])}] * 3)
    assert alike == {"return_mean": 7, "return_std": 1, "target_return": 7}


def test_a_rollout_is_return_state_action_in_turn_and_actions_alone_are_predicted(
    world, rollouts, untrained
):
    record = rollouts[0]
    steps = len(record["actions"])
    batch = batch_of(untrained, world, [record])
    inside = batch["segments"][0] == 1
    modality = batch["modality"][0][inside]
    assert modality.tolist() == [RETURN, STATE, ACTION] * steps
    assert (batch["predict"][0] == (batch["modality"][0] == ACTION)).all()
    assert batch["input_ids"][0][inside][2::3].tolist() == record["actions"].tolist()
    states = batch["states"][0][inside].numpy()
    to_go = [record["rewards"][step:].sum() for step in range(steps)]
    np.testing.assert_allclose(states[::3], np.repeat(to_go, 10).reshape(steps, 10), rtol=1e-5)
    np.testing.assert_array_equal(states[1::3], record["observations"][:-1])


# ------------------------------------------------------------------ model


def test_the_loss_is_the_mean_cross_entropy_of_actions_that_plain_loops_compute(
    world, rollouts, untrained
):
    batch = batch_of(untrained, world, rollouts[:2], rollouts[4:5])
    with torch.no_grad():
        out = untrained[0](**batch)
    surprises = []
    for row, column in (batch["modality"] == ACTION).nonzero().tolist():
        logits = out.action_logits[row, column - 1].double().numpy()  # at the state before
        chosen = logits[batch["input_ids"][row, column]]
        surprises.append(math.log(np.exp(logits).sum()) - chosen)
    assert len(surprises) == sum(len(rollouts[row]["actions"]) for row in (0, 1, 4))
    losses = {name: loss.item() for name, loss in out.losses.items()}
    assert losses == pytest.approx({"action": np.mean(surprises), "text": 0, "state": 0}, rel=1e-5)
    assert out.loss.item() == pytest.approx(0.5 * losses["action"])  # as actions weigh in grounding


def test_a_head_that_knows_nothing_pays_the_logarithm_of_the_number_of_actions(
    world, rollouts, tmp_path
):
    model, *_ = untrained = new_dt(world, rollouts, tmp_path)
    torch.nn.init.zeros_(model.action_head[2].weight)
    torch.nn.init.zeros_(model.action_head[2].bias)
    out = model(**batch_of(untrained, world, rollouts[:1]))
    assert out.losses["action"].item() == pytest.approx(math.log(40))
    gradient = torch.autograd.grad(out.loss, model.action_head[2].bias)[0]
    taken = np.bincount(rollouts[0]["actions"], minlength=40) / len(rollouts[0]["actions"])
    np.testing.assert_allclose(gradient.numpy(), 0.5 * (1 / 40 - taken), atol=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_no_position_sees_its_own_action_or_what_comes_after(world, rollouts, untrained, data):
    record = rollouts[data.draw(st.integers(0, len(rollouts) - 1))]
    steps = len(record["actions"])
    before = batch_of(untrained, world, [record])
    start = int((before["segments"][0] == 1).nonzero()[0])
    step = data.draw(st.integers(0, steps - 1))
    place = data.draw(st.sampled_from([RETURN, STATE, ACTION]))
    changed = {key: value.clone() for key, value in before.items()}
    column = start + 3 * step + [RETURN, STATE, ACTION].index(place)
    if place == ACTION:
        other = data.draw(st.integers(1, 39))
        changed["input_ids"][0, column] = (changed["input_ids"][0, column] + other) % 40
    else:
        changed["states"][0, column] += data.draw(st.sampled_from([-20.0, -1.0, 1.0, 20.0]))
    was, now = (action_logits(untrained[0], batch)[0] for batch in (before, changed))
    torch.testing.assert_close(now[:column], was[:column], rtol=0, atol=0)
    moved = (now - was).abs().amax(-1)[column:]
    assert (moved > 0).all()  # and everything from there on does see it


def test_packed_rollouts_are_predicted_as_each_alone(world, rollouts, untrained):
    same_goal = [{**record, "goal": rollouts[0]["goal"]} for record in rollouts[:3]]
    packed = batch_of(untrained, world, same_goal, rollouts[8:9], row_length=9999)
    assert len(packed["segments"]) == 1 and (packed["modality"] != PAD).all()
    together = action_logits(untrained[0], packed)
    for number, record in enumerate(same_goal, 1):
        alone = batch_of(untrained, world, [record])
        expected = action_logits(untrained[0], alone)[alone["segments"] == 1]
        segment = packed["segments"][0]
        example = segment // SEGMENTS == segment[segment % SEGMENTS == 3][0] // SEGMENTS
        here = together[0][example & (segment % SEGMENTS == number)]
        torch.testing.assert_close(here, expected, rtol=1e-4, atol=1e-5)


def test_new_weights_begin_at_the_size_of_other_embeddings_and_survive_the_disk(
    world, rollouts, tmp_path
):
    for rank in (0, 2):
        model, *_ = new_dt(world, rollouts, tmp_path, lora_rank=rank)
        numbers = model.config.return_mean + model.config.return_std * torch.randn(2000)
        embedded = model.embed_returns(numbers)
        expected = model.config.embedding_rms * 2**0.5
        assert embedded.square().mean().sqrt().item() == pytest.approx(expected, rel=0.2)
        assert "return_embedding.weight" in model.new_parameters()
        model.config.base = None if rank == 0 else {"name": "tiny", "seed": 0, "fingerprint": ""}
        model.save_pretrained(tmp_path / str(rank))
        llm = {"llm": tiny_llm(world)[0]} if rank else {}
        again = dt.DecisionTransformer.from_pretrained(tmp_path / str(rank), **llm)
        torch.testing.assert_close(again.embed_returns(numbers), embedded)
        assert again.target_return == model.target_return
    assert KalmForRollouts.target_return is None


# ------------------------------------------------------------------ learning and acting


def test_it_does_what_earned_the_return_that_it_is_asked_for(world, rollouts, tmp_path):
    """Two actions in one and the same situation: one earns 10, the other nothing."""
    good, bad = 5, 13
    records = []
    for number in range(64):
        action, reward = [(good, 10.0), (bad, 0.0)][number % 2]
        own = {"actions": np.array([action]), "rewards": np.array([reward], np.float32)}
        records.append({**rollouts[0], "observations": rollouts[0]["observations"][:2], **own})
    model, tokenizer, chosen = new_dt(world, records, tmp_path, max_steps=40)
    how = (chosen, tmp_path, tmp_path / "log.jsonl")
    ground.train(model, tokenizer, world, records, (), *how)
    assert model.target_return == 10
    goal = env.goal_of(rollouts[0])
    start = world.state_from_observation(rollouts[0]["observations"][:1])
    for target, action in ((10.0, good), (0.0, bad)):
        model.target_return = target
        given = (model, tokenizer, world, [goal], world.observe(start))
        (record,) = rollout.generate(*given, states=start, max_steps=1)
        assert record["actions"].tolist() == [action]


@pytest.mark.parametrize("name", TINY_LLMS)
def test_acting_with_a_cache_equals_the_whole_sequence_run_again_at_each_step(
    world, rollouts, tmp_path, name
):
    torch.manual_seed(1)
    llm = transformers.AutoModelForCausalLM.from_config(TINY_LLMS[name]())
    model, tokenizer, _ = new_dt(world, rollouts, tmp_path, llm)
    rng = np.random.default_rng(4)
    goals = world.sample_goals("offline", "train", 4, rng)
    goals += world.sample_goals("easy", "test", 2, rng)
    states = env.unfulfilled_states(world, rng, goals)
    given = (model, tokenizer, world, goals, world.observe(states))
    records = rollout.generate_all(*given, states=states, max_steps=5, batch_size=3)
    assert [env.goal_of(record) for record in records] == goals
    for record in records:
        taken = record["actions"]
        for step in range(len(taken)):  # what is left of the target, from the rewards so far
            rewards = [*record["rewards"][:step], 0.0]
            rewards[-1] = model.target_return - sum(rewards)
            asked = {**record, "rewards": np.array(rewards), "actions": taken[: step + 1]}
            example = tasks.make_example("decision", tokenizer, world, [asked])
            whole = tasks.pack([example])
            del whole["segments"]  # one rollout: plain causal attention, in a window or not
            logits = action_logits(model, whole)
            assert int(logits[0, -2].argmax()) == taken[step]  # at the last state
    assert max(len(record["actions"]) for record in records) == 5


def test_training_that_stopped_goes_on_to_the_same_weights(world, rollouts, tmp_path):
    weights = []
    for name, stops in (("whole", [6]), ("stopped", [3, 6])):
        work = tmp_path / name
        work.mkdir()
        for stop in stops:
            steady = {"lr_scheduler_type": "constant", "warmup_steps": 0, "save_steps": 1}
            model, tokenizer, chosen = new_dt(world, rollouts, work, max_steps=stop, **steady)
            how = (chosen, work, work / "log.jsonl")
            ground.train(model, tokenizer, world, rollouts, (), *how)
        weights.append(model.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)


# ------------------------------------------------------------------ as a method of a run


class Recorded(Run):
    """A run of which nothing is known but how it grounded its LLM."""

    def recorded(self, stage):
        return self.llm


@pytest.mark.parametrize("devices", (1, 2, 16))
def test_it_is_trained_by_the_recipe_of_grounding_whatever_the_devices(
    tmp_path, monkeypatch, devices
):
    monkeypatch.setattr(dt, "PartialState", lambda: type("State", (), {"num_processes": devices}))
    arguments = lambda record: dt.arguments(
        Recorded(tmp_path, None, record, 3, torch.float32, []), 70, tmp_path
    )
    released = {"adapter": "released", "keep_layers": 6, "num_train_epochs": 0.0}
    ours = arguments({**released, "load_in_4bit": False})
    assert (ours.adapter, ours.max_steps, ours.seed, ours.keep_layers) == ("none", 70, 3, 6)
    each = max(1, dt.BATCH // devices)
    assert ours.lora_rank == 64 and ours.per_device_train_batch_size == each
    trained = {"lora_rank": 0, "new_learning_rate": 0.5, "per_device_train_batch_size": 32}
    ours = arguments({**trained, "num_train_epochs": 2.0, "tasks": "dynamics,generation"})
    assert (ours.lora_rank, ours.new_learning_rate, ours.max_steps) == (0, 0.5, 70)
    assert ours.task_names == ["decision"]
    monkeypatch.setenv(launch.CPU_WORKERS, str(devices))  # which are one device together
    ours = arguments({**released, "load_in_4bit": False})
    assert ours.per_device_train_batch_size == each


def test_an_llm_too_short_for_three_positions_an_action_is_refused_before_it_learns(
    world, monkeypatch, tmp_path
):
    asked = []
    note = lambda name, texts, steps, layers: asked.append(steps)
    monkeypatch.setattr(command.probe, "check", note)
    monkeypatch.setattr(command.llm, "resolve", lambda name: name)
    run = command.RunArguments(llm=str(tmp_path))
    for methods, todo in (("bc,dt", "learn"), ("bc,dt", "imagine"), ("bc,llm", "learn")):
        learned = rl.LearnArguments(methods=methods)
        parts = (run, grounding_settings(tmp_path), rollout.ImagineArguments(novel_goals=2))
        command.check_llm(*parts, learned, world, [todo])
    assert asked == [75, 50]  # of 50 actions; the last learns nothing that an LLM is needed for


def test_what_cannot_be_loaded_is_to_be_learned_anew(world, tmp_path):
    with pytest.raises(ValueError, match="redo it with `--stage learn --force`"):
        load_grounded(tmp_path / "dt", world, kind=dt.DecisionTransformer)


def test_it_learns_from_real_rollouts_alone():
    with pytest.raises(ValueError, match=r"unknown method 'dt\+kalm'; did you mean"):
        rl.LearnArguments(methods="dt+kalm")
