"""Adapters: LoRA beside new layers, as the model saves and merges it and as peft reads it."""

import peft
import pytest
import torch
import transformers
from conftest import tiny_llm
from safetensors.torch import save_file
from test_model import TINY_LLMS, hand_batch, outputs, tiny_model

import env
from model import KalmForRollouts


def test_lora_adapters_save_and_load_and_are_all_that_trains_in_the_backbone(tmp_path):
    model, batch = tiny_model("llama", lora_rank=2), hand_batch()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    trained = [name for name in trained if name.startswith("backbone.")]
    assert trained and all(".lora_" in name for name in trained)
    assert set(trained) <= set(model.new_parameters())
    model.save_pretrained(tmp_path)
    again = KalmForRollouts.from_pretrained(tmp_path).eval()
    assert all(map(torch.equal, outputs(model, batch), outputs(again, batch)))


def with_adapter(seed):
    """A grounded model whose LoRA has an effect, and the LLM that it was made from."""
    language_model, _ = tiny_llm(env.make())
    options = {"lora_rank": 3, "seed": seed, "observation_std": [0.3] * 10}
    model = KalmForRollouts.from_llm(language_model, **options).eval()
    torch.manual_seed(seed)
    new_names = model.new_parameters()
    for name, p in model.named_parameters():
        if name in new_names:
            torch.nn.init.normal_(p, std=0.1)
            p.data = p.data.bfloat16().float()
    return model, language_model


def test_merged_adapters_are_the_same_function():
    model, language_model = with_adapter(1)
    before = outputs(model, hand_batch())
    adapted = [m for m in model.merge_adapters().modules() if hasattr(m, "lora_A")]
    assert adapted and all(module.merged for module in adapted)
    for a, b in zip(before, outputs(model, hand_batch())):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert KalmForRollouts.from_llm(language_model).merge_adapters()  # nothing to merge is no error


def test_an_adapter_is_all_that_grounding_added(tmp_path):
    model, language_model = with_adapter(1)
    model.save_adapter(tmp_path)
    again, batch = KalmForRollouts.from_adapter(language_model, tmp_path).eval(), hand_batch()
    assert all(map(torch.equal, outputs(model, batch), outputs(again, batch)))
    new_names = model.new_parameters()
    added = sum(p.numel() for name, p in model.named_parameters() if name in new_names)
    written = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert written < 2 * added + 20_000  # two bytes a number


def test_peft_loads_the_adapter_alone(tmp_path):
    model, language_model = with_adapter(2)
    model.save_adapter(tmp_path)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = model.backbone(input_ids=ids).logits
        plain = language_model.eval()(input_ids=ids).logits
        adapter = peft.PeftModel.from_pretrained(language_model, tmp_path).eval()
        adapted = adapter(input_ids=ids).logits
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-4)
    assert (adapted - plain).abs().max() > 0.1


def test_an_adapter_for_another_language_model_or_with_other_tensors_is_refused(tmp_path):
    model, language_model = with_adapter(3)
    model.save_adapter(tmp_path)
    other = transformers.AutoModelForCausalLM.from_config(TINY_LLMS["qwen2"]())
    with pytest.raises(ValueError, match="model_type llama, and this one has qwen2"):
        KalmForRollouts.from_adapter(other, tmp_path)
    (tmp_path / "new_layers.safetensors").unlink()
    save_file({"state_head.0.bias": torch.zeros(512)}, tmp_path / "new_layers.safetensors")
    with pytest.raises(ValueError, match="is missing or unknown"):
        KalmForRollouts.from_adapter(language_model, tmp_path)
