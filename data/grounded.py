"""Grounded models on disk: what grounding begins with, and what the stages after it load.

This file knows KalmForRollouts and its folders, no training and no rollouts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
import transformers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import env
from data import llm as llm_source
from experiment import folder
from model import KalmConfig, KalmForRollouts

RELEASED = Path(__file__).resolve().parent / "adapter"
WEIGHTS = "model.safetensors"


def adapter_folder(name: str) -> Path:
    """The folder of a trained adapter: "released" or a path. Raises ValueError if it has none."""
    path = RELEASED if name == "released" else Path(name)
    config = path / "config.json"
    is_adapter = (path / WEIGHTS).is_file() and config.is_file()
    if not is_adapter or not folder.read_json(config).get("lora_rank"):
        raise ValueError(
            f"--adapter {name}: {path} holds no adapter; give the folder grounded of a run with "
            "--lora_rank, or none to train"
        )
    return path


def adapter_hash(name: str) -> str:
    """What makes an adapter the same: SHA-256 of its weights."""
    return folder.sha256(adapter_folder(name) / WEIGHTS)


def wrap_llm(
    llm: PreTrainedModel, world: env.World, statistics: Mapping, settings, kind=KalmForRollouts
) -> KalmForRollouts:
    """A model to ground around an LLM, of which layers or all weights may start anew.

    statistics: of the rollouts, as `observation_statistics` gives them. settings:
    `ground.GroundingArguments`. kind: class of the model.
    """
    if settings.fresh_layers:
        llm_source.forget_layers(llm, settings.fresh_layers, settings.seed)
    if settings.random_weights:
        llm = transformers.AutoModelForCausalLM.from_config(llm.config)
    options = {**model_options(world, settings), **statistics}
    return kind.from_llm(llm, settings.embedding_scale, settings.seed, **options)


def model_options(world: env.World, settings) -> dict:
    """What KalmConfig takes of a world and of `ground.GroundingArguments`."""
    options = {}
    for name in ("observation_dim", "num_actions", "objects"):
        options[name] = getattr(world, name)
    for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"):
        options[name] = getattr(settings, name)
    return options


def observation_statistics(rollouts: Sequence[dict], objects: int) -> dict[str, list[float]]:
    """KalmConfig's observation_mean, observation_std and change_std, the same for like objects."""
    sample = [record["observations"] for record in rollouts[:5000]]
    numbers = sample[0].shape[1] // objects
    seen = np.concatenate(sample).reshape(-1, numbers)
    changes = np.concatenate([np.diff(obs, axis=0) for obs in sample]).reshape(-1, numbers)
    statistics = {"observation_mean": seen.mean(0)}
    for name, values in (("observation_std", seen), ("change_std", changes)):
        deviation = values.std(0)
        statistics[name] = np.where(deviation > 0, deviation, 1)  # never divide by 0
    return {name: values.tolist() * objects for name, values in statistics.items()}


def weights_of(model: KalmForRollouts) -> dict[str, torch.Tensor]:
    """The weights to save, {} on all processes but the first where FSDP sharded them. All call
    it.
    """
    if not is_sharded(model):
        return model.state_dict()
    trained_alone = bool(model.config.lora_rank)
    options = {"full_state_dict": True, "cpu_offload": True, "ignore_frozen_params": trained_alone}
    weights = get_model_state_dict(model, options=StateDictOptions(**options))
    for name in model.all_tied_weights_keys:
        weights.pop(name, None)  # once is enough
    return weights


def is_sharded(model: KalmForRollouts) -> bool:
    """Whether FSDP left each process a part of the weights alone."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def upload(path: Path, settings) -> None:
    """Push a folder of grounded weights to the Hub, as Hugging Face's push_to_hub settings say."""
    url = huggingface_hub.create_repo(
        settings.hub_model_id or path.parent.name,
        token=settings.hub_token,
        private=settings.hub_private_repo,
        exist_ok=True,
    )
    huggingface_hub.upload_folder(repo_id=url.repo_id, folder_path=path, token=settings.hub_token)


def load_grounded(
    path: Path,
    world: env.World,
    dtype: torch.dtype = torch.float32,
    in_4bit: bool = False,
    kind: type[KalmForRollouts] = KalmForRollouts,
) -> tuple[KalmForRollouts, PreTrainedTokenizerBase]:
    """The model of a kind that `ground` or `learn` wrote, and its tokenizer. The LLM's weights are
    in a dtype and have LoRA merged, or they are in 4 bits and LoRA stays beside them.

    Raises ValueError if it is none, or was made for a world of other sizes.
    """
    stage = "ground" if kind is KalmForRollouts else "learn"
    advice = f"redo it with `--stage {stage} --force`"
    try:
        if KalmConfig.from_pretrained(path).lora_rank:
            model = kind.from_pretrained(path, dtype=dtype, in_4bit=in_4bit)
        else:
            model = whole_model(path, kind)
            model.backbone.to(dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever the libraries raise for a folder that is damaged
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path} is not a grounded model that can be loaded ({reason}); {advice}"
        ) from None
    for name in ("num_actions", "observation_dim"):
        theirs, ours = getattr(model.config, name), getattr(world, name)
        if theirs != ours:
            raise ValueError(
                f"{path} is a model with {name} {theirs}, and the environment has {ours}; {advice}"
            )
    if not in_4bit:
        model.merge_adapters()
    return model.eval(), tokenizer


def whole_model(path: Path, kind: type[KalmForRollouts]) -> KalmForRollouts:
    """A model of which all weights were saved. Raises ValueError if some are missing or unknown."""
    options = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    model, found = kind.from_pretrained(path, **options)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[problem]:
            weight = min(map(str, found[problem]))
            raise ValueError(f"the weight {weight} is missing or unknown")
    return model
