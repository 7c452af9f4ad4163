"""Specification of the probe: which LLMs are used, and what is said of those that are refused."""

import shutil

import pytest
import torch
import transformers
from conftest import ROOT, tiny_llm
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

import kalm
from data import llm
from experiment import probe
from model import KalmForRollouts

GOALS = ["put the red ball left of the blue ball"]
LENGTH = 150  # positions of the longest example


def documented() -> dict[str, tuple[str, str]]:
    """(exact, refused or not tried; the reason) of each row of docs/llms.md."""
    verdicts = {}
    for line in (ROOT / "docs" / "llms.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4:
            verdicts[cells[0]] = (cells[1], cells[2])
    return verdicts


def refusal(model_type: str, length: int = LENGTH, **fields) -> str:
    """What is said of a kind of LLM; "" if it is exact."""
    try:
        probe.check_exact(CONFIG_MAPPING[model_type](**fields), length)
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture
def tiny_folder(world, tmp_path):
    """A function: the tiny LLM with its tokenizer as a folder, changed as asked."""

    def write(change=None, **fields):
        language_model, tokenizer = tiny_llm(world)
        for name, value in fields.items():
            setattr(language_model.config, name, value)
        if change is not None:
            change(language_model, tokenizer)
        language_model.save_pretrained(tmp_path / "llm")
        tokenizer.save_pretrained(tmp_path / "llm")
        return str(tmp_path / "llm")

    return write


# Kinds of LLMs


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen2", "qwen3", "gemma", "gemma3_text", "gpt2", "phi3", "opt"]
)
def test_common_kinds_are_exact(model_type):
    assert refusal(model_type) == ""
    assert documented()[model_type][0] == "exact"


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gemma2", "cohere", "gpt_oss"])
def test_other_kinds_are_as_documented(model_type):
    verdict, reason = documented()[model_type]
    found = refusal(model_type)
    assert (found == "") == (verdict == "exact")
    assert found[:30] == reason[:30]


@pytest.mark.parametrize("model_type", ["mamba", "jamba", "qwen3_next", "lfm3"])
def test_recurrent_layers_are_refused_by_name(model_type):
    assert "recurrent" in refusal(model_type)


def test_attention_that_ignores_a_mask_of_four_dimensions_is_refused():
    assert "packing rollouts in a row changes its outputs" in refusal("mpt")
    assert "packing rollouts in a row fails" in refusal("bloom")
    assert "packing rollouts in a row fails" in refusal("falcon", alibi=True)


def test_an_llm_that_looks_ahead_is_refused():
    assert "a later position changes its outputs" in refusal("bert")


def test_embeddings_of_another_width_than_hidden_states_are_refused():
    sizes = {"word_embed_proj_dim": 512, "hidden_size": 1024, "num_attention_heads": 16}
    assert "running it fails" in refusal("opt", **sizes)


def test_a_window_matters_only_where_examples_are_longer():
    assert refusal("mistral", length=150, sliding_window=150) == ""
    said = refusal("mistral", length=150, sliding_window=149)
    assert "its sliding_window is 149, and the longest example takes 150 positions" in said


def test_a_small_llm_has_a_layer_of_each_kind():
    config = CONFIG_MAPPING["gemma3_text"]()
    small = probe.small_model(AutoModelForCausalLM, config, LENGTH).config
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert small.sliding_window == config.sliding_window  # longer than any example
    assert config.num_hidden_layers == 26


# What the probe would miss if it did not look


def test_attention_that_ignores_its_mask_is_refused(monkeypatch):
    functions = modeling_llama.ALL_ATTENTION_FUNCTIONS
    attend = functions["sdpa"]

    def blind(module, query, key, value, attention_mask, **options):
        return attend(module, query, key, value, None, **options)  # causal, and nothing else

    assert refusal("llama") == ""
    monkeypatch.setitem(functions._global_mapping, "sdpa", blind)
    assert "packing rollouts in a row changes its outputs" in refusal("llama")


def test_a_cache_that_forgets_is_refused(monkeypatch):
    update = transformers.DynamicCache.update

    def forgetful(self, keys, values, *arguments, **options):
        keys, values = update(self, keys, values, *arguments, **options)
        keys = keys.clone()
        keys[:, :, :1] = 0
        return keys, values

    def forgets_when_fed(self, keys, values, *arguments, **options):
        is_fed = keys.shape[2] == 2  # branches
        return (forgetful if is_fed else update)(self, keys, values, *arguments, **options)

    monkeypatch.setattr(transformers.DynamicCache, "update", forgets_when_fed)
    assert "a key-value cache changes its outputs" in refusal("llama")


def test_logits_that_an_llm_scales_are_refused_or_followed(monkeypatch):
    forward = modeling_llama.LlamaForCausalLM.forward

    def doubled(self, *arguments, **options):
        out = forward(self, *arguments, **options)
        out.logits = out.logits * 2
        return out

    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", doubled)
    assert "its output layer alone, for words, changes its outputs" in refusal("llama")


def test_weights_that_are_lost_on_the_way_are_refused(monkeypatch):
    load = KalmForRollouts.from_pretrained.__func__

    def spoiled(cls, *arguments, **options):
        model = load(cls, *arguments, **options)
        with torch.no_grad():
            model.action_embedding.weight[0, 0] += 1e-3
        return model

    monkeypatch.setattr(KalmForRollouts, "from_pretrained", classmethod(spoiled))
    assert "saving and loading fails" in refusal("llama")


def test_the_probe_leaves_random_numbers_as_they_were():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    refusal("gpt2")
    assert torch.rand(1) == expected


# Folders


def test_a_usable_folder_passes(tiny_folder):
    probe.check(tiny_folder(), GOALS, steps=50)


def test_a_refusal_names_the_llm_its_kind_and_advice(tiny_folder):
    path = tiny_folder(max_position_embeddings=100)
    with pytest.raises(ValueError) as refused:
        probe.check(path, GOALS, steps=50)
    assert str(refused.value).startswith(f"--llm {path} (llama): the longest example takes 1")
    assert "and it has 100; give another LLM; docs/llms.md" in str(refused.value)


def test_a_long_goal_must_fit(tiny_folder):
    path = tiny_folder(max_position_embeddings=200)
    probe.check(path, GOALS, steps=50)
    with pytest.raises(ValueError, match="the longest example takes 4.. positions"):
        probe.check(path, [*GOALS, "red " * 300], steps=50)


def test_an_llm_without_an_end_token_is_refused(tiny_folder):
    def forget_end(language_model, tokenizer):
        tokenizer.eos_token = None

    with pytest.raises(ValueError, match="no end token"):
        probe.check(tiny_folder(forget_end), GOALS, steps=50)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tiny_folder):
    def add_words(language_model, tokenizer):
        tokenizer.add_tokens(["unheard", "unseen"])

    path = tiny_folder(add_words)
    size = llm.read_config(path).vocab_size
    with pytest.raises(ValueError, match=f"has {size + 2} tokens, and the LLM {size}"):
        probe.check(path, GOALS, steps=50)


def test_a_quantised_llm_is_refused(tiny_folder):
    quantised = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match="quantised already"):
        probe.check(tiny_folder(quantization_config=quantised), GOALS, steps=50)


def test_a_truncated_file_is_refused(tiny_folder, tmp_path):
    path = tiny_folder()
    weights = tmp_path / "llm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        probe.check(path, GOALS, steps=50)


def test_a_folder_without_a_tokenizer_is_refused(tiny_folder, tmp_path):
    path = tiny_folder()
    for file in (tmp_path / "llm").glob("token*"):
        file.unlink()
    with pytest.raises(ValueError, match="no tokenizer"):
        probe.check(path, GOALS, steps=50)


# In a run


def command_line(*arguments) -> list[str]:
    return ["--scale", "smoke", *map(str, arguments)]


def test_a_run_refuses_an_llm_before_its_first_stage(tiny_folder, tmp_path, stages_run, capsys):
    path = tiny_folder(max_position_embeddings=100)
    run = command_line("--output_dir", tmp_path / "run", "--llm", path)
    assert kalm.main(run) == 2
    assert "the longest example takes" in capsys.readouterr().err
    assert stages_run == []


def test_stages_that_need_no_llm_do_not_ask(tiny_folder, tmp_path, stages_run):
    path = tiny_folder(max_position_embeddings=100)
    run = command_line("--output_dir", tmp_path / "run", "--llm", path, "--stage", "collect")
    assert kalm.main(run) == 0
    assert stages_run == ["collect"]


def test_an_encoder_must_be_one_of_texts(tiny_folder, tmp_path, stages_run, capsys):
    path = tiny_folder()
    probe.check_encoder(path)
    vision = transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    transformers.AutoModel.from_config(vision).save_pretrained(tmp_path / "vision")
    for file in (tmp_path / "llm").glob("token*"):
        shutil.copy(file, tmp_path / "vision")
    run = command_line("--output_dir", tmp_path / "run", "--encoder", tmp_path / "vision")
    assert kalm.main(run) == 2
    assert "vision is no encoder of texts" in capsys.readouterr().err
    assert stages_run == []
