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
from model import KalmForRollouts

RELEASED = Path(__file__).resolve().parent / "adapter"


def adapter_folder(name: str) -> Path:
    """The folder of a trained adapter: "released" or a path. Raises ValueError if it has none."""
    path = RELEASED if name == "released" else Path(name)
    if not (path / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"--adapter {name}: {path} has no adapter_model.safetensors; give the folder "
            "grounded/adapter of a run with --lora_rank, or none to train"
        )
    return path


def adapter_hashes(name: str) -> list[str]:
    """What makes an adapter the same: SHA-256 of its weights."""
    path = adapter_folder(name)
    files = [path / "adapter_model.safetensors", path / "new_layers.safetensors"]
    return [folder.sha256(file) for file in files if file.is_file()]


def wrap_llm(
    llm: PreTrainedModel, world: env.World, statistics: Mapping[str, list[float]], settings
) -> KalmForRollouts:
    """A model to ground around an LLM, of which layers or all weights may start anew.

    statistics: of the rollouts, as `observation_statistics` gives them. settings:
    `ground.GroundingArguments`.
    """
    if settings.fresh_layers:
        llm_source.forget_layers(llm, settings.fresh_layers, settings.seed)
    if settings.random_weights:
        llm = transformers.AutoModelForCausalLM.from_config(llm.config)
    return KalmForRollouts.from_llm(
        llm,
        settings.embedding_scale,
        settings.seed,
        observation_dim=world.observation_dim,
        num_actions=world.num_actions,
        objects=world.objects,
        lora_rank=settings.lora_rank,
        **statistics,
    )


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


def gathered(model: KalmForRollouts) -> KalmForRollouts:
    """The model, or where FSDP sharded it, one with all its weights on process 0. All call it."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return model
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if weights:  # process 0 alone has them
        model = type(model)(model.config)
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
    return model


def save_grounded(
    path: Path, model: KalmForRollouts, tokenizer, metrics: dict, with_adapter: bool
) -> None:
    """A from_pretrained folder with metrics.json; what grounding added alone in adapter/."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    folder.write_json(path / "metrics.json", metrics)
    if with_adapter and model.config.lora_rank:
        (path / "adapter").mkdir()
        model.save_adapter(path / "adapter")
        folder.write_json(path / "adapter" / "metrics.json", metrics)


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
    path: Path, world: env.World, bf16: bool = False
) -> tuple[KalmForRollouts, PreTrainedTokenizerBase]:
    """The model that `ground` wrote, LoRA merged and with bf16 its backbone so, and its tokenizer.

    Raises ValueError if it is none, or was made for a world of other sizes.
    """
    advice = "redo it with `--stage ground --force`"
    try:
        model, found = KalmForRollouts.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if found[kind]:
                weight = min(map(str, found[kind]))
                raise ValueError(f"the weight {weight} is missing or unknown")
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
    model.merge_adapters()
    if bf16:
        model.backbone.to(torch.bfloat16)
    return model.eval(), tokenizer
