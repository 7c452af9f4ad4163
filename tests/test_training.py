"""Grounding's training and evaluation: rates and switches, the log, held-out figures against plain
loops, worlds with and without objects."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, expert_rollouts, grounding_settings, new_model, tiny_llm

import env
import ground
import tasks
from data.grounded import observation_statistics, wrap_llm
from model import STATE, TASKS

# ------------------------------------------------------------------ training


def train(model, tokenizer, world, rollouts, work, **options):
    """`ground.train` on 40 rollouts, 8 others held out: the log."""
    settings = grounding_settings(work, **options)
    log_path = work / "log.jsonl"
    data = (rollouts[:40], rollouts[40:48])
    return ground.train(model, tokenizer, world, *data, settings, work, log_path)


def copies(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def test_grounding_lowers_the_loss_of_every_task(world, rollouts, grounded, losses_of):
    model, tokenizer, _ = grounded
    examples = []
    for record in rollouts[:20]:
        for task in TASKS[:4]:  # description is not trained on without being asked for
            examples.append(tasks.make_example(task, tokenizer, world, [record]))
    batch = tasks.pack(examples)
    before = losses_of(new_model(world, rollouts)[0], batch)[:-1]
    after = losses_of(model, batch)[:-1]
    assert all(a < b for a, b in zip(after, before)), (before, after)


def test_the_log_has_losses_by_modality_and_task(grounded):
    entries = [entry for entry in grounded[2] if "loss" in entry]
    assert len(entries) >= 5 and entries[-1]["loss"] < entries[0]["loss"]
    for entry in entries:
        for name in ("text", "action", "state", *TASKS):
            assert np.isfinite(entry[f"{name}_loss"])


def trainer_of(model, tokenizer, world, rollouts, work, **options):
    return ground.GroundingTrainer(
        model=model,
        args=grounding_settings(work, **options),
        data_collator=tasks.pack,
        processing_class=tokenizer,
        world=world,
        eval_dataset=rollouts,
        measure=ground.held_out_figures,
    )


def test_logged_losses_average_only_the_batches_that_have_them(
    world, rollouts, tmp_path, losses_of
):
    model, tokenizer = new_model(world, rollouts)
    trainer = trainer_of(model, tokenizer, world, rollouts, tmp_path)
    expected = {}
    for task in ("dynamics", "explanation"):
        batch = tasks.pack([tasks.make_example(task, tokenizer, world, rollouts[:1])])
        trainer.compute_loss(model, batch)
        expected[f"{task}_loss"] = losses_of(model, batch)[0]
    trainer.log({"loss": 1.0})
    logged = trainer.state.log_history[-1]
    assert {name: logged[name] for name in expected} == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("lora_rank", (0, 2))
@pytest.mark.parametrize("trained", ("new", "pretrained"))
def test_each_learning_rate_moves_its_own_parameters_only(
    world, rollouts, tmp_path, trained, lora_rank
):
    model, tokenizer = new_model(world, rollouts, lora_rank=lora_rank)
    before = copies(model)
    rates = {"learning_rate": 1e-3, "new_learning_rate": 1e-3, "lora_rank": lora_rank}
    rates["learning_rate" if trained == "new" else "new_learning_rate"] = 0.0
    train(model, tokenizer, world, rollouts, tmp_path, max_steps=3, **rates)
    layers = {n for n in before if n.startswith("backbone.") and "embed_tokens" not in n}
    adapters = {n for n in layers if ".lora_" in n}
    new = {n for n in before if not n.startswith("backbone.")} | adapters
    pretrained = set() if lora_rank else layers
    assert moved(model, before) == (new if trained == "new" else pretrained)


def test_the_first_step_of_sgd_goes_along_the_gradient_at_the_asked_rates(
    world, rollouts, tmp_path, monkeypatch
):
    """--optim and other switches of Hugging Face reach the optimizer."""
    model, tokenizer = new_model(world, rollouts)
    gradients, steps = {}, []
    before = copies(model)

    def step(optimizer, closure=None):
        steps.append(type(optimizer))
        for name, p in model.named_parameters():
            if p.grad is not None:
                gradients[name] = p.grad.clone()
        return sgd_step(optimizer, closure)

    sgd_step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", step)
    options = {"optim": "sgd", "lr_scheduler_type": "constant", "warmup_steps": 0}
    options |= {"weight_decay": 0.1, "max_grad_norm": 0.5, "max_steps": 1}
    options |= {"learning_rate": 0.01, "new_learning_rate": 0.02}
    train(model, tokenizer, world, rollouts, tmp_path, **options)
    assert len(steps) == 1
    norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    assert norm == pytest.approx(0.5, rel=1e-3)  # it was longer, and is cut to this
    assert "backbone.model.embed_tokens.weight" not in gradients  # what stays as it was
    new = set(model.new_parameters())
    for name, p in model.named_parameters():
        rate = 0.02 if name in new else 0.01
        expected = before[name]
        if name in gradients:
            expected = expected - rate * (gradients[name] + 0.1 * expected)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-7)


def test_adam_takes_the_settings_of_hugging_face(world, rollouts, tmp_path):
    model, tokenizer = new_model(world, rollouts)
    options = {"adam_beta1": 0.7, "adam_beta2": 0.95, "adam_epsilon": 1e-3, "weight_decay": 0.2}
    options |= {"learning_rate": 1e-4, "new_learning_rate": 2e-4}
    trainer = trainer_of(model, tokenizer, world, rollouts, tmp_path, **options)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.AdamW)
    new, old = optimizer.param_groups
    for group, rate in ((new, 2e-4), (old, 1e-4)):
        assert (group["lr"], group["betas"], group["eps"]) == (rate, (0.7, 0.95), 1e-3)
        assert group["weight_decay"] == 0.2
    names = set(model.new_parameters())
    expected = [p for name, p in model.named_parameters() if name in names]
    assert {id(p) for p in new["params"]} == {id(p) for p in expected}


def test_token_embeddings_stay_as_they_were(world, rollouts, tmp_path):
    model, tokenizer = new_model(world, rollouts)
    before = copies(model)
    train(model, tokenizer, world, rollouts, tmp_path, max_steps=2)
    tokens = "backbone.model.embed_tokens.weight"
    assert tokens in before and tokens not in moved(model, before)


# ------------------------------------------------------------------ evaluation


def test_the_trainer_measures_held_out_figures_at_the_steps_that_were_asked_for(
    world, rollouts, tmp_path
):
    steady = {"lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1}
    runs = {}
    for steps in (2, 4):  # the first run stops where the second one measures for the first time
        model, tokenizer = new_model(world, rollouts)
        work = tmp_path / str(steps)
        work.mkdir()
        options = {**steady, "max_steps": steps, "eval_strategy": "steps", "eval_steps": 2}
        log = train(model, tokenizer, world, rollouts, work, **options)
        figures = ground.held_out_figures(model, tokenizer, world, rollouts[40:48])
        runs[steps] = {f"eval_{name}": value for name, value in figures.items()}
    measured = {entry["step"]: entry for entry in log if "eval_state_error" in entry}
    assert list(measured) == [2, 4]
    for steps, entry in measured.items():
        found = {name: value for name, value in entry.items() if name.startswith("eval_")}
        assert found == pytest.approx(runs[steps], rel=1e-4)
    assert measured[2]["eval_state_error"] != measured[4]["eval_state_error"]
    lines = map(json.loads, (work / "log.jsonl").read_text(encoding="utf-8").splitlines())
    lines = [line for line in lines if "eval_state_error" in line]
    assert [line["step"] for line in lines] == [2, 4]


def test_evaluation_agrees_with_one_rollout_at_a_time(world, rollouts, grounded):
    model, tokenizer, _ = grounded
    held_out = rollouts[100:]  # some were seen in training, so that no figure is 0
    actions, errors, still = [], [], []
    for record in held_out:
        example = tasks.make_example("generation", tokenizer, world, [record])
        start = int(np.flatnonzero(example["modality"] == STATE)[0])  # s0; then a0, s1, a1, ...
        batch = tasks.pack([example])
        del batch["predict"], batch["task"]
        with torch.no_grad():
            out = model(**batch)
        path = record["observations"]
        for t, action in enumerate(record["actions"]):
            actions.append(int(out.action_logits[0, start + 2 * t].argmax()) == action)
            errors.append(out.state_pred[0, start + 2 * t + 1].numpy() - path[t + 1])
            still.append(path[t + 1] - path[t])
    expected = {
        "action_accuracy": np.mean(actions),
        "state_error": np.sqrt(np.mean(np.square(errors))),
        "state_error_nothing_moves": np.sqrt(np.mean(np.square(still))),
    }
    figures = ground.held_out_figures(model, tokenizer, world, held_out, batch_size=7)
    assert figures == pytest.approx(expected, abs=1e-4) and 0 < figures["action_accuracy"] < 1


# ------------------------------------------------------------------ worlds with and without objects


def test_statistics_are_the_same_for_all_objects_and_never_zero(rollouts):
    path = np.array([[0, 1, 10, 5], [2, 1, 30, 5], [2, 1, 40, 5]], np.float32)
    records = [{"observations": path}, {"observations": path[:2]}]
    whole = observation_statistics(records, 1)
    assert whole["observation_mean"] == pytest.approx([1.2, 1, 24, 5])
    assert whole["observation_std"] == pytest.approx([0.96**0.5, 1, 144**0.5, 1])
    assert whole["change_std"] == pytest.approx([(8 / 9) ** 0.5, 1, (200 / 9) ** 0.5, 1])
    halves = observation_statistics(records, 2)
    seen = np.concatenate([r["observations"] for r in records]).reshape(-1, 2)
    assert halves["observation_mean"] == pytest.approx([*seen.mean(0)] * 2)
    assert halves["observation_std"] == pytest.approx([*seen.std(0)] * 2)
    changes = [(2, 0), (20, 0), (0, 0), (10, 0), (2, 0), (20, 0)]  # of each object, each step
    assert halves["change_std"] == pytest.approx([np.std(changes, 0)[0], 1] * 2)


def test_a_world_without_objects_gets_a_plain_head_that_learns(tmp_path):
    tiles = env.make(f"{ROOT / 'docs' / 'tiles.py'}:Tiles")
    assert tiles.objects == 1
    rng = np.random.default_rng(3)
    records = expert_rollouts(tiles, tiles.sample_goals("offline", "train", 140, rng), rng)
    language_model, tokenizer = tiny_llm(tiles)
    statistics = observation_statistics(records, tiles.objects)
    settings = grounding_settings(tmp_path)
    model = wrap_llm(language_model, tiles, statistics, settings).eval()
    before = ground.held_out_figures(model, tokenizer, tiles, records[40:])
    train(model, tokenizer, tiles, records, tmp_path, max_steps=60)
    after = ground.held_out_figures(model, tokenizer, tiles, records[40:])
    assert after["state_error"] < 0.6 * after["state_error_nothing_moves"] < before["state_error"]
    assert after["action_accuracy"] > before["action_accuracy"]
