"""KalmForRollouts: losses against plain loops, packing, saving and loading, other language models."""
import math

import numpy as np
import pytest
import torch
import transformers
from conftest import new_model
from safetensors.torch import save_file

import ground
from data import llm
from model import ACTION, PAD, SEGMENTS, STATE, TASKS, TEXT, KalmForRollouts, segment_mask

TINY_LLMS = {
    "llama": lambda: llm.tiny(0)[0].config,
    "qwen2": lambda: transformers.Qwen2Config(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                              num_attention_heads=4, num_key_value_heads=2),
    "qwen3": lambda: transformers.Qwen3Config(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                              num_attention_heads=4, num_key_value_heads=2, head_dim=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(  # a window that prompts outgrow, and one layer that sees everything
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
    "gemma": lambda: transformers.GemmaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                              num_attention_heads=4, num_key_value_heads=2, head_dim=8),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                                   num_attention_heads=4),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0),
}


def tiny_model(name, **options):
    torch.manual_seed(1)
    return KalmForRollouts.from_llm(transformers.AutoModelForCausalLM.from_config(TINY_LLMS[name]()), **options).eval()


def hand_batch():
    """Two examples in one row, the first a prompt with two rollouts, then padding: (1, 16)."""
    row = [  # modality, index, segment, position, predict, task
        (TEXT, 5, 0, 0, 0, 2), (TEXT, 6, 0, 1, 0, 2), (STATE, 0, 1, 2, 0, 2), (ACTION, 7, 1, 3, 1, 2), (STATE, 0, 1, 4, 1, 2),
        (STATE, 0, 2, 2, 0, 2), (ACTION, 39, 2, 3, 1, 2), (STATE, 0, 2, 4, 1, 2), (ACTION, 1, 2, 5, 1, 2), (STATE, 0, 2, 6, 1, 2),
        (TEXT, 8, SEGMENTS, 0, 0, 1), (STATE, 0, SEGMENTS + 1, 1, 0, 1), (TEXT, 9, SEGMENTS + 1, 2, 1, 1),
        (TEXT, 3, SEGMENTS + 1, 3, 1, 1), (PAD, 0, -1, 0, 0, 0), (PAD, 0, -1, 0, 0, 0)]
    modality, ids, segments, positions, predict, task = torch.tensor(row).T[:, None]
    states = torch.randn(1, 16, 10, generator=torch.Generator().manual_seed(0)) * (modality == STATE)[..., None]
    for action in (modality[0] == ACTION).nonzero()[:, 0]:
        states[0, action] = states[0, action - 1]  # the state it is taken in
    return {"input_ids": ids, "modality": modality, "states": states, "segments": segments, "position_ids": positions,
            "predict": predict.bool(), "task": task}


def outputs(model, batch):
    with torch.no_grad():
        out = model(**batch, text_logits=None)
    return out.logits, out.action_logits, out.state_pred


def test_the_loss_is_the_one_that_plain_loops_compute():
    change_std = [0.1 * (i + 1) for i in range(10)]
    model, batch = tiny_model("llama", change_std=change_std, observation_mean=[0.3] * 10, observation_std=[0.7] * 10), hand_batch()
    with torch.no_grad():
        out = model(**batch, text_logits=None)
    parts = {kind: [] for kind in (TEXT, ACTION, STATE)}  # (task, loss)
    for i in range(1, 16):
        if not batch["predict"][0, i]:
            continue
        kind, index = int(batch["modality"][0, i]), int(batch["input_ids"][0, i])
        if kind == STATE:
            error = [(float(batch["states"][0, i, k]) - float(out.state_pred[0, i - 1, k])) / change_std[k] for k in range(10)]
            loss = sum(e * e for e in error) / 10
        else:
            scores = (out.logits if kind == TEXT else out.action_logits)[0, i - 1].tolist()
            loss = math.log(sum(math.exp(s) for s in scores)) - scores[index]
        parts[kind].append((int(batch["task"][0, i]), loss))
    assert [len(parts[kind]) for kind in (TEXT, ACTION, STATE)] == [2, 3, 3]

    def weighted(keep):
        def mean(kind):
            chosen = [loss for task, loss in parts[kind] if keep(task)]
            return sum(chosen) / max(1, len(chosen))
        return mean(TEXT) + 0.5 * mean(ACTION) + 0.5 * mean(STATE)
    assert out.loss.item() == pytest.approx(weighted(lambda task: True), rel=1e-4)
    assert out.task_losses.tolist() == pytest.approx([weighted(lambda task: task == t) for t in range(len(TASKS))], rel=1e-4)


def test_segment_mask_is_causal_within_a_segment_and_its_prompt():
    segments = torch.tensor([[0, 0, 1, 1, 2, SEGMENTS, SEGMENTS + 1, SEGMENTS + 1, SEGMENTS + 2, -1],
                             [0, 1, 1, 2, 2, 3, -1, -1, -1, -1]])
    mask = segment_mask(segments, torch.float32)
    assert mask.shape == (2, 1, 10, 10)
    for row in range(2):
        for query in range(10):
            for key in range(10):
                q, k = int(segments[row, query]), int(segments[row, key])
                same_example = q // SEGMENTS == k // SEGMENTS
                seen = key <= query and same_example and (q == k or (k >= 0 and k % SEGMENTS == 0))
                assert mask[row, 0, query, key] == (0 if seen else torch.finfo(torch.float32).min)


def examples_of(rollouts, tokenizer):
    by_goal = {}
    for r in rollouts:
        by_goal.setdefault(r["goal"], []).append(r)
    return [ground.make_example(task, tokenizer, rows) for rows in list(by_goal.values())[:4] for task in TASKS]


def padded(batch, more):
    fill = {"modality": PAD, "segments": -1}
    return {k: torch.cat([v, v.new_full((len(v), more, *v.shape[2:]), fill.get(k, 0))], 1) for k, v in batch.items()}


def test_losses_do_not_depend_on_how_examples_are_packed(rollouts, losses_of):
    model, tokenizer = new_model(rollouts)
    examples = examples_of(rollouts, tokenizer)
    separate = ground.pack(examples, row_length=1)
    assert len(separate["segments"]) == len(examples) and len(ground.pack(examples, row_length=9999)["segments"]) == 1
    expected = losses_of(model, separate)
    permuted = [examples[i] for i in np.random.default_rng(0).permutation(len(examples))]
    for batch in (ground.pack(examples), ground.pack(examples, row_length=900), ground.pack(permuted, row_length=400),
                  padded(ground.pack(permuted), 13)):
        assert losses_of(model, batch) == pytest.approx(expected, rel=1e-4)


def test_a_rollout_in_a_row_with_others_is_predicted_as_if_alone(rollouts):
    model, tokenizer = new_model(rollouts)
    same_goal = [dict(r, goal=rollouts[0]["goal"]) for r in rollouts[:3]]
    batch = ground.pack([ground.make_example("generation", tokenizer, same_goal),
                         ground.make_example("dynamics", tokenizer, rollouts[5:9])], row_length=9999)
    together, ours = outputs(model, batch), batch["task"] == TASKS.index("generation")
    for number, record in enumerate(same_goal, 1):
        single = ground.pack([ground.make_example("generation", tokenizer, [record])])
        for many, alone in zip(together, outputs(model, single)):
            torch.testing.assert_close(many[ours & (batch["segments"] % SEGMENTS == number)], alone[single["segments"] == 1],
                                       rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TINY_LLMS)
def test_any_causal_lm_learns_saves_and_loads(name, tmp_path):
    model, batch = tiny_model(name), hand_batch()
    model(**batch).loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert missing == []
    model.save_pretrained(tmp_path)
    for other in (KalmForRollouts.from_pretrained(tmp_path), transformers.AutoModel.from_pretrained(tmp_path)):
        assert isinstance(other, KalmForRollouts)
        for a, b in zip(outputs(model, batch), outputs(other.eval(), batch)):
            assert torch.equal(a, b)


def test_lora_adapters_save_and_load_and_are_all_that_trains_in_the_backbone(tmp_path):
    model, batch = tiny_model("llama", lora_rank=2), hand_batch()
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.1)
    trained = [n for n, p in model.named_parameters() if p.requires_grad and n.startswith("backbone.")]
    assert trained and all(".lora_" in n for n in trained) and set(trained) <= set(model.new_parameters())
    model.save_pretrained(tmp_path)
    for a, b in zip(outputs(model, batch), outputs(KalmForRollouts.from_pretrained(tmp_path).eval(), batch)):
        assert torch.equal(a, b)


def with_adapter(seed):
    """A grounded model whose LoRA has an effect, and the LLM that it was made from."""
    language_model, _ = llm.tiny(0)
    model = KalmForRollouts.from_llm(language_model, lora_rank=3, seed=seed, observation_std=[0.3] * 10).eval()
    torch.manual_seed(seed)
    for n, p in model.named_parameters():
        if n in model.new_parameters():
            torch.nn.init.normal_(p, std=0.1)
            p.data = p.data.bfloat16().float()
    return model, language_model


def test_merged_adapters_are_the_same_function():
    model, language_model = with_adapter(1)
    before = outputs(model, hand_batch())
    adapted = [m for m in model.merge_adapters().modules() if hasattr(m, "lora_A")]
    assert adapted and all(m.merged for m in adapted)
    for a, b in zip(before, outputs(model, hand_batch())):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert KalmForRollouts.from_llm(language_model).merge_adapters()  # nothing to merge is no error


def test_an_adapter_is_all_that_grounding_added(tmp_path):
    model, language_model = with_adapter(1)
    model.save_adapter(tmp_path)
    again, batch = KalmForRollouts.from_adapter(language_model, tmp_path).eval(), hand_batch()
    for a, b in zip(outputs(model, batch), outputs(again, batch)):
        assert torch.equal(a, b)
    added = sum(p.numel() for n, p in model.named_parameters() if n in model.new_parameters())
    assert sum(f.stat().st_size for f in tmp_path.glob("*.safetensors")) < 2 * added + 20_000  # two bytes a number


def test_peft_loads_the_adapter_alone(tmp_path):
    import peft
    model, language_model = with_adapter(2)
    model.save_adapter(tmp_path)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = model.backbone(input_ids=ids).logits
        plain = language_model.eval()(input_ids=ids).logits
        adapted = peft.PeftModel.from_pretrained(language_model, tmp_path).eval()(input_ids=ids).logits
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-4)
    assert (adapted - plain).abs().max() > 0.1


def test_an_adapter_for_another_language_model_is_refused(tmp_path):
    model, _ = with_adapter(3)
    model.save_adapter(tmp_path)
    other = transformers.AutoModelForCausalLM.from_config(TINY_LLMS["qwen2"]())
    with pytest.raises(ValueError, match="model_type llama, and this one has qwen2"):
        KalmForRollouts.from_adapter(other, tmp_path)
    (tmp_path / "new_layers.safetensors").unlink()
    save_file({"state_head.0.bias": torch.zeros(512)}, tmp_path / "new_layers.safetensors")
    with pytest.raises(ValueError, match="is missing or unknown"):
        KalmForRollouts.from_adapter(llm.tiny(0)[0], tmp_path)


@pytest.mark.parametrize("lora_rank", (0, 2))
def test_before_training_the_text_side_is_the_language_model_itself(lora_rank):
    language_model, _ = llm.tiny(3)
    model = KalmForRollouts.from_llm(language_model, lora_rank=lora_rank).eval()
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids, torch.full_like(ids, TEXT), torch.zeros(2, 9, 10), text_logits=None).logits
        torch.testing.assert_close(logits, language_model.eval()(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", (1.0, 0.25))
def test_new_embeddings_start_at_the_asked_scale_of_the_token_embeddings(scale):
    language_model, _ = llm.tiny(0)
    model = KalmForRollouts.from_llm(language_model, embedding_scale=scale, seed=4)
    with torch.no_grad():
        wanted = scale * language_model.get_input_embeddings().weight.square().mean().sqrt().item()
        states = model.state_embedding(model.waves(torch.randn(2000, 10))).square().mean().sqrt().item()
        assert [model.action_embedding.weight.square().mean().sqrt().item(), states] == pytest.approx([wanted] * 2, rel=0.1)


def test_each_position_enters_as_its_token_its_action_or_its_normalised_state():
    model, batch = tiny_model("llama", observation_mean=[0.4] * 10, observation_std=[3.0] * 10), hand_batch()
    ids, modality, states = (batch[k][0] for k in ("input_ids", "modality", "states"))
    tables = {TEXT: model.get_input_embeddings().weight, ACTION: model.action_embedding.weight}
    with torch.no_grad():
        embedded, = model.embed(batch["input_ids"], batch["modality"], batch["states"])
        for i in range(14):  # then comes padding
            kind = int(modality[i])
            x = (states[i] - 0.4) / 3
            waves = [f(w * x) for w in (1, 2, 4, 8) for f in (torch.sin, torch.cos)]
            expected = model.state_embedding(torch.cat([x, *waves])) if kind == STATE else tables[kind][ids[i]]
            torch.testing.assert_close(embedded[i], expected)


def test_physics_is_the_same_whichever_object_a_state_lists_first():
    model = tiny_model("llama", objects=5, observation_mean=[0.1, 0.2] * 5, observation_std=[0.3, 0.2] * 5, change_std=[0.1, 0.2] * 5)
    with torch.no_grad():  # the hidden state may tell objects apart, so it is left out
        model.state_head[0].weight[:, :64] = 0
    states = torch.randn(1, 40, 10, generator=torch.Generator().manual_seed(2)) * 0.3
    action = torch.arange(40)[None]
    order = torch.tensor([3, 0, 4, 1, 2])  # object i is listed at place order[i]
    renamed = torch.empty(1, 40, 5, 2)
    renamed[:, :, order] = states.unflatten(-1, (5, 2))
    with torch.no_grad():
        first, second = (model(a, torch.full_like(a, ACTION), s).state_pred for a, s in (
            (action, states), (order[action // 8] * 8 + action % 8, renamed.flatten(2))))
    torch.testing.assert_close(second.unflatten(-1, (5, 2))[:, :, order].flatten(2), first)
    moved = (first - states).unflatten(-1, (5, 2)).norm(dim=-1)
    assert moved.min() > 0 and moved.std() > 0.003  # every object, and not all alike


def test_the_acted_object_is_seen_first_and_the_others_by_their_distance():
    model = tiny_model("llama", objects=5)
    states = torch.tensor([[[0.0, 0, 1, 0, 3, 0, 7, 0, 15, 0]]]).expand(1, 3, 10)
    modality = torch.tensor([[ACTION, ACTION, STATE]])
    features, order = model.acted_view(torch.tensor([[2 * 8 + 5, 4 * 8, 0]]), modality, states)
    assert order[0].tolist() == [[2, 1, 0, 3, 4], [4, 3, 2, 1, 0], [0, 1, 2, 3, 4]]
    assert features[0, 0, :18].tolist() == [3, 0, 1, 0, 0, 0, 7, 0, 15, 0, -2, 0, -3, 0, 4, 0, 12, 0]
    assert features[0, :, -8:].argmax(-1).tolist()[:2] == [5, 0] and features[0, :, -8:].sum(-1).tolist() == [1, 1, 0]
