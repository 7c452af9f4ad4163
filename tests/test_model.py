"""KalmForRollouts: losses against plain loops, embeddings and heads, any language model."""

import math

import pytest
import torch
import transformers
from conftest import tiny_llm

import env
from model import (
    ACTION,
    PAD,
    SEGMENTS,
    STATE,
    TASKS,
    TEXT,
    KalmForRollouts,
    segment_mask,
    task_losses,
    weighted_sum,
)

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2}
WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
TINY_LLMS = {
    "llama": lambda: tiny_llm(env.make())[0].config,
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=8),
    # prompts outgrow the window of one layer, and the other sees everything
    "gemma3": lambda: transformers.Gemma3TextConfig(**GROUPED, head_dim=8, **WINDOW),
    "gemma": lambda: transformers.GemmaConfig(**GROUPED, head_dim=8),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    ),
}


def tiny_model(name, **options):
    torch.manual_seed(1)
    language_model = transformers.AutoModelForCausalLM.from_config(TINY_LLMS[name]())
    return KalmForRollouts.from_llm(language_model, **options).eval()


def hand_batch():
    """Two examples in one row, the first a prompt with two rollouts, then padding: (1, 16)."""
    second, answer = SEGMENTS, SEGMENTS + 1
    row = [  # modality, index, segment, position, predict, task
        *[(TEXT, 5, 0, 0, 0, 2), (TEXT, 6, 0, 1, 0, 2)],
        *[(STATE, 0, 1, 2, 0, 2), (ACTION, 7, 1, 3, 1, 2), (STATE, 0, 1, 4, 1, 2)],
        *[(STATE, 0, 2, 2, 0, 2), (ACTION, 39, 2, 3, 1, 2), (STATE, 0, 2, 4, 1, 2)],
        *[(ACTION, 1, 2, 5, 1, 2), (STATE, 0, 2, 6, 1, 2)],
        *[(TEXT, 8, second, 0, 0, 1), (STATE, 0, answer, 1, 0, 1)],
        *[(TEXT, 9, answer, 2, 1, 1), (TEXT, 3, answer, 3, 1, 1)],
        *[(PAD, 0, -1, 0, 0, 0)] * 2,
    ]
    modality, ids, segments, positions, predict, task = torch.tensor(row).T[:, None]
    states = torch.randn(1, 16, 10, generator=torch.Generator().manual_seed(0))
    states = states * (modality == STATE)[..., None]
    for action in (modality[0] == ACTION).nonzero()[:, 0]:
        states[0, action] = states[0, action - 1]  # the state it is taken in
    batch = {"input_ids": ids, "modality": modality, "states": states, "segments": segments}
    return {**batch, "position_ids": positions, "predict": predict.bool(), "task": task}


def outputs(model, batch):
    with torch.no_grad():
        out = model(**batch, text_logits=None)
    return out.logits, out.action_logits, out.state_pred


def padded(batch, more):
    """A batch with `more` positions of padding in each row."""
    fill = {"modality": PAD, "segments": -1}
    wider = {}
    for key, values in batch.items():
        padding = values.new_full((len(values), more, *values.shape[2:]), fill.get(key, 0))
        wider[key] = torch.cat([values, padding], 1)
    return wider


# ------------------------------------------------------------------ losses and attention


def test_the_loss_is_the_one_that_plain_loops_compute():
    change_std = [0.1 * (i + 1) for i in range(10)]
    statistics = {"observation_mean": [0.3] * 10, "observation_std": [0.7] * 10}
    model, batch = tiny_model("llama", change_std=change_std, **statistics), hand_batch()
    with torch.no_grad():
        out = model(**batch, text_logits=None)
    parts = {kind: [] for kind in (TEXT, ACTION, STATE)}  # (task, loss)
    for i in range(1, 16):
        if not batch["predict"][0, i]:
            continue
        kind, index = int(batch["modality"][0, i]), int(batch["input_ids"][0, i])
        if kind == STATE:
            wanted, found = batch["states"][0, i].tolist(), out.state_pred[0, i - 1].tolist()
            loss = sum(((w - f) / s) ** 2 for w, f, s in zip(wanted, found, change_std)) / 10
        else:
            scores = (out.logits if kind == TEXT else out.action_logits)[0, i - 1].tolist()
            loss = math.log(sum(math.exp(s) for s in scores)) - scores[index]
        parts[kind].append((int(batch["task"][0, i]), loss))
    assert [len(parts[kind]) for kind in (TEXT, ACTION, STATE)] == [2, 3, 3]

    def mean(kind, tasks):
        chosen = [loss for task, loss in parts[kind] if task in tasks]
        return sum(chosen) / max(1, len(chosen))

    def weighted(*tasks):
        return mean(TEXT, tasks) + 0.5 * mean(ACTION, tasks) + 0.5 * mean(STATE, tasks)

    means = [mean(kind, range(5)) for kind in (TEXT, ACTION, STATE)]
    found = [out.losses[name].item() for name in ("text", "action", "state")]
    assert found == pytest.approx(means, rel=1e-4)
    assert out.loss.item() == pytest.approx(weighted(*range(5)), rel=1e-4)
    expected = [weighted(task) for task in range(len(TASKS))]
    assert out.task_losses.tolist() == pytest.approx(expected, rel=1e-4)


def test_losses_by_task_are_weighted_means_as_computed_on_paper():
    losses = {"text": [2.0], "action": [1.0, 3.0, 5.0], "state": [8.0, 4.0]}
    tasks = {"text": [1], "action": [2, 2, 3], "state": [0, 2]}
    losses = {name: torch.tensor(values, requires_grad=True) for name, values in losses.items()}
    tasks = {name: torch.tensor(values) for name, values in tasks.items()}
    by_task = task_losses(losses, tasks)
    # text 1, action .5, state .5: .5 * 8; 2; .5 * (1 + 3) / 2 + .5 * 4; .5 * 5; none
    assert by_task.tolist() == [4, 2, 3, 2.5, 0] and not by_task.requires_grad
    means = {"text": torch.tensor(2.0), "action": torch.tensor(3.0), "state": torch.tensor(6.0)}
    assert weighted_sum(means).item() == 2 + 1.5 + 3


def test_a_batch_without_a_modality_has_no_loss_of_it_and_a_finite_gradient():
    model, batch = tiny_model("llama"), hand_batch()
    batch["predict"] &= batch["modality"] == TEXT
    out = model(**batch)
    out.loss.backward()
    assert out.losses["action"] == out.losses["state"] == 0 < out.losses["text"] == out.loss
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


def test_segment_mask_is_causal_within_a_segment_and_its_prompt():
    packed = [0, 0, 1, 1, 2, SEGMENTS, SEGMENTS + 1, SEGMENTS + 1, SEGMENTS + 2, -1]
    segments = torch.tensor([packed, [0, 1, 1, 2, 2, 3, -1, -1, -1, -1]])
    mask = segment_mask(segments, torch.float32)
    assert mask.shape == (2, 1, 10, 10)
    for row in range(2):
        for query in range(10):
            for key in range(10):
                q, k = int(segments[row, query]), int(segments[row, key])
                same_example = q // SEGMENTS == k // SEGMENTS
                shared = q == k or (k >= 0 and k % SEGMENTS == 0)
                seen = key <= query and same_example and shared
                assert mask[row, 0, query, key] == (0 if seen else torch.finfo(torch.float32).min)


# ------------------------------------------------------------------ around any language model


@pytest.mark.parametrize("name", TINY_LLMS)
def test_any_causal_lm_learns_saves_and_loads(name, tmp_path):
    model, batch = tiny_model(name), hand_batch()
    model(**batch).loss.backward()
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), parameter_name
    model.save_pretrained(tmp_path)
    for loader in (KalmForRollouts, transformers.AutoModel):
        other = loader.from_pretrained(tmp_path).eval()
        assert isinstance(other, KalmForRollouts)
        assert all(map(torch.equal, outputs(model, batch), outputs(other, batch)))


@pytest.mark.parametrize("lora_rank", (0, 2))
def test_before_training_the_text_side_is_the_language_model_itself(world, lora_rank):
    language_model, _ = tiny_llm(world, 3)
    model = KalmForRollouts.from_llm(language_model, lora_rank=lora_rank).eval()
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    text, no_states = torch.full_like(ids, TEXT), torch.zeros(2, 9, 10)
    with torch.no_grad():
        logits = model(ids, text, no_states, text_logits=None).logits
        expected = language_model.eval()(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ embeddings and the state head


@pytest.mark.parametrize("scale", (1.0, 0.25))
def test_new_embeddings_start_at_the_asked_scale_of_the_token_embeddings(world, scale):
    language_model, _ = tiny_llm(world)
    model = KalmForRollouts.from_llm(language_model, embedding_scale=scale, seed=4)
    rms = lambda values: values.detach().square().mean().sqrt().item()
    wanted = scale * rms(language_model.get_input_embeddings().weight)
    states = model.state_embedding(model.waves(torch.randn(2000, 10)))
    started = [rms(model.action_embedding.weight), rms(states)]
    assert started == pytest.approx([wanted] * 2, rel=0.1)


def test_each_position_enters_as_its_token_its_action_or_its_normalised_state():
    model = tiny_model("llama", observation_mean=[0.4] * 10, observation_std=[3.0] * 10)
    batch = hand_batch()
    ids, modality, states = (batch[key][0] for key in ("input_ids", "modality", "states"))
    tables = {TEXT: model.get_input_embeddings().weight, ACTION: model.action_embedding.weight}
    with torch.no_grad():
        (embedded,) = model.embed(batch["input_ids"], batch["modality"], batch["states"])
        for i in range(14):  # then comes padding
            kind = int(modality[i])
            x = (states[i] - 0.4) / 3
            waves = [wave(w * x) for w in (1, 2, 4, 8) for wave in (torch.sin, torch.cos)]
            seen = model.state_embedding(torch.cat([x, *waves]))
            expected = seen if kind == STATE else tables[kind][ids[i]]
            torch.testing.assert_close(embedded[i], expected)


def test_physics_is_the_same_whichever_object_a_state_lists_first():
    statistics = {"observation_mean": [0.1, 0.2] * 5, "observation_std": [0.3, 0.2] * 5}
    model = tiny_model("llama", objects=5, change_std=[0.1, 0.2] * 5, **statistics)
    with torch.no_grad():  # the hidden state may tell objects apart, so it is left out
        model.state_head[0].weight[:, :64] = 0
    states = torch.randn(1, 40, 10, generator=torch.Generator().manual_seed(2)) * 0.3
    action = torch.arange(40)[None]
    order = torch.tensor([3, 0, 4, 1, 2])  # object i is listed at place order[i]
    renamed = torch.empty(1, 40, 5, 2)
    renamed[:, :, order] = states.unflatten(-1, (5, 2))
    renamed_action = order[action // 8] * 8 + action % 8
    acted = torch.full_like(action, ACTION)
    with torch.no_grad():
        first = model(action, acted, states).state_pred
        second = model(renamed_action, acted, renamed.flatten(2)).state_pred
    torch.testing.assert_close(second.unflatten(-1, (5, 2))[:, :, order].flatten(2), first)
    moved = (first - states).unflatten(-1, (5, 2)).norm(dim=-1)
    assert moved.min() > 0 and moved.std() > 0.003  # every object, and not all alike


def test_the_acted_object_is_seen_first_and_the_others_by_their_distance():
    model = tiny_model("llama", objects=5)
    states = torch.tensor([[0.0, 0, 1, 0, 3, 0, 7, 0, 15, 0]]).expand(3, 10)
    actions, acted = torch.tensor([2 * 8 + 5, 4 * 8, 0]), torch.tensor([True, True, False])
    order = model.order_from_acted(actions, acted, states)
    assert order.tolist() == [[2, 1, 0, 3, 4], [4, 3, 2, 1, 0], [0, 1, 2, 3, 4]]
    view = model.acted_view(actions, acted, states, order)
    places, offsets = [3, 0, 1, 0, 0, 0, 7, 0, 15, 0], [-2, 0, -3, 0, 4, 0, 12, 0]
    assert view[0, :18].tolist() == places + offsets
    assert view[:, -8:].argmax(-1).tolist()[:2] == [5, 0]
    assert view[:, -8:].sum(-1).tolist() == [1, 1, 0]


def test_the_acted_object_comes_before_another_at_its_place():
    model = tiny_model("llama", objects=5)
    order = model.order_from_acted(torch.tensor([33]), torch.tensor([True]), torch.zeros(1, 10))
    assert order[0, 0] == 4 and sorted(order[0].tolist()) == [0, 1, 2, 3, 4]


def test_without_objects_the_state_head_sees_the_state_as_listed_and_the_whole_action():
    model = tiny_model("llama", observation_dim=6, num_actions=8, observation_std=[2.0] * 6)
    states = torch.arange(12.0).reshape(2, 6)
    actions, acted = torch.tensor([7, 2]), torch.tensor([True, False])
    order = model.order_from_acted(actions, acted, states)
    view = model.acted_view(actions, acted, states, order)
    assert order.tolist() == [[0], [0]] and view.shape == (2, 6 * 9 + 8)
    assert torch.equal(view[:, :54], model.waves(states / 2))
    assert view[:, 54:].tolist() == [[0, 0, 0, 0, 0, 0, 0, 1], [0] * 8]
