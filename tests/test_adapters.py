"""LoRA: what is trained, saved and merged, and how its language model is found again."""

import importlib.util

import pytest
import torch
import transformers
from conftest import tiny_llm
from safetensors.torch import load_file, save_file
from test_model import GROUPED, TINY_LLMS, hand_batch, outputs

import env
from data import llm
from model import KalmForRollouts


def with_lora(language_model, seed=1, **options):
    """A grounded model whose LoRA has an effect."""
    options = {"lora_rank": 3, "seed": seed, "observation_std": [0.3] * 10, **options}
    model = KalmForRollouts.from_llm(language_model, **options).eval()
    torch.manual_seed(seed)
    new_names = model.new_parameters()
    for name, parameter in model.named_parameters():
        if name in new_names:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def llm_folder(tmp_path):
    """A language model as a folder."""
    model, tokenizer = tiny_llm(env.make(), seed=4)
    model.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    return tmp_path / "llm"


def saved(folder, language_model, **options):
    """A model whose folder says which LLM it belongs to, and the folder."""
    model = with_lora(language_model, **options)
    model.save_pretrained(folder)
    return model


def test_lora_is_all_that_trains_in_the_backbone_with_the_rank_and_layers_asked_for():
    model = with_lora(tiny_llm(env.make())[0], lora_targets="q_proj,up_proj", lora_alpha=9)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    trained = {name for name in trained if name.startswith("backbone.")}
    assert trained == {name for name in model.new_parameters() if name.startswith("backbone.")}
    assert {name.split(".")[5] for name in trained} == {"q_proj", "up_proj"}
    layer = model.backbone.base_model.layers[0].self_attn.q_proj
    assert layer.lora_A.default.weight.shape[0] == 3 and layer.scaling["default"] == 9 / 3


@pytest.mark.parametrize("name", ("llama", "gpt2", "gemma3", "mixtral"))
def test_merged_lora_is_the_same_function_and_leaves_no_trace(tmp_path, name):
    torch.manual_seed(0)
    experts = transformers.MixtralConfig(**GROUPED, num_local_experts=4)
    config = experts if name == "mixtral" else TINY_LLMS[name]()
    model = with_lora(transformers.AutoModelForCausalLM.from_config(config))
    before = outputs(model, hand_batch())
    assert not [m for m in model.merge_adapters().modules() if hasattr(m, "lora_A")]
    for a, b in zip(before, outputs(model, hand_batch())):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert model.merge_adapters() is model  # nothing to merge is no error
    model.save_pretrained(tmp_path)
    again = KalmForRollouts.from_pretrained(tmp_path).eval()
    assert all(map(torch.equal, outputs(model, hand_batch()), outputs(again, hand_batch())))


def test_a_folder_holds_what_was_trained_alone_and_finds_its_language_model(llm_folder, tmp_path):
    base = llm.describe(str(llm_folder), 0, 0)
    model = saved(tmp_path / "lora", llm.load(str(llm_folder))[0], base=base)
    again, batch = KalmForRollouts.from_pretrained(tmp_path / "lora"), hand_batch()
    assert all(map(torch.equal, outputs(model, batch), outputs(again, batch)))
    new_names = model.new_parameters()
    trained = sum(p.numel() * 4 for name, p in model.named_parameters() if name in new_names)
    assert (tmp_path / "lora" / "model.safetensors").stat().st_size < 1.01 * trained + 20_000
    assert set(load_file(tmp_path / "lora" / "model.safetensors")) == set(new_names)


def test_a_language_model_that_is_gone_or_has_changed_is_said(llm_folder, tmp_path):
    base = llm.describe(str(llm_folder), 0, 0)
    saved(tmp_path / "lora", llm.load(str(llm_folder))[0], base=base)
    other = tiny_llm(env.make(), seed=5)[0]
    other.save_pretrained(llm_folder)
    with pytest.raises(ValueError, match=f"{llm_folder}, whose weights are others by now"):
        KalmForRollouts.from_pretrained(tmp_path / "lora")
    llm_folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"trained on {llm_folder}, which is needed with it"):
        KalmForRollouts.from_pretrained(tmp_path / "lora")
    moved, _ = llm.load(str(tmp_path / "elsewhere"))
    assert KalmForRollouts.from_pretrained(tmp_path / "lora", llm=moved).backbone is moved


def test_the_tiny_language_model_follows_from_what_the_folder_says(tmp_path):
    language_model, _ = tiny_llm(env.make(), seed=6)
    model = saved(tmp_path, language_model, base=llm.describe("tiny", 0, 6))
    again = KalmForRollouts.from_pretrained(tmp_path)
    assert all(map(torch.equal, outputs(model, hand_batch()), outputs(again, hand_batch())))


def test_lora_of_another_language_model_or_with_other_tensors_is_refused(tmp_path):
    language_model, _ = tiny_llm(env.make())
    saved(tmp_path, language_model)
    other = transformers.AutoModelForCausalLM.from_config(TINY_LLMS["qwen2"]())
    with pytest.raises(ValueError, match="model_type llama, and this one has qwen2"):
        KalmForRollouts.from_pretrained(tmp_path, llm=other)
    save_file({"state_head.0.bias": torch.zeros(512)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is missing or unknown"):
        KalmForRollouts.from_pretrained(tmp_path, llm=tiny_llm(env.make())[0])


def test_adapters_of_bfloat16_weights_are_float32_and_merge_with_one_rounding():
    language_model = tiny_llm(env.make())[0].bfloat16()
    model = with_lora(language_model)
    layer = model.backbone.base_model.layers[1].mlp.down_proj
    assert layer.lora_A.default.weight.dtype == torch.float32
    assert layer.base_layer.weight.dtype == torch.bfloat16
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    exact = layer.base_layer.weight.double() + layer.scaling["default"] * (b.double() @ a.double())
    model.merge_adapters()
    merged = model.backbone.base_model.layers[1].mlp.down_proj.weight
    torch.testing.assert_close(merged, exact.float().bfloat16(), rtol=2**-8, atol=0)
    assert merged.dtype == torch.bfloat16


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_language_model_in_4_bits_computes_nearly_the_same(llm_folder):
    whole, _ = llm.load(str(llm_folder))
    small, _ = llm.load(str(llm_folder), in_4bit=True, dtype=torch.bfloat16)
    assert small.base_model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    models = [with_lora(language_model).eval() for language_model in (whole, small)]
    assert models[1].get_input_embeddings().weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        exact, near = (outputs(model, hand_batch())[0].float() for model in models)
    correlation = torch.corrcoef(torch.stack([exact.flatten(), near.flatten()]))[0, 1]
    assert 0.9 < correlation < 0.99999
