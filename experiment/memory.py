"""How much memory grounding and imagining will take on each device, told before they run.

The model is run forward with torch's fake tensors, which have sizes and no numbers, and what
autograd would keep for the backward pass is counted, whatever the architecture. What an allocator
keeps of memory that was given back is not: on a CPU that has been a third more.
"""

import os
from collections.abc import Mapping, Sequence

import numpy as np
import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

import env
from data import llm
from data.grounded import model_options
from model import STATE, TEXT, KalmConfig, KalmForRollouts
from sequences import row_bytes
from tasks import GroundingExamples, Tokenizer, pack

GB = 1e9
LONGEST_PROMPT = 64  # positions, about

ADVICE = (
    "--activation_checkpointing true, a smaller --per_device_train_batch_size with "
    "--gradient_accumulation_steps, --lora_rank 64, --load_in_4bit true, --keep_layers, or more "
    "devices with configs/fsdp.yaml"
)
QUANTISED = 0.5 + 4 / 64  # bytes of a weight in 4 bits: bitsandbytes scales blocks of 64


def ran_out(error: Exception) -> bool:
    """Whether an error says that a device or the host has no more memory."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator: can't allocate" in str(error)


def free(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    return torch.accelerator.get_memory_info(device)[0]


def in_words(run, settings, imagining) -> str:
    """What grounding and imagining of a run will take, and what helps if that is too much.

    run: `experiment.run.Run`; settings: `ground.GroundingArguments`; imagining:
    `rollout.ImagineArguments`.
    """
    if llm.must_be_fetched(run.llm):
        return f"memory: known once {run.llm} is fetched"
    config, tokenizer = run.llm_without_weights(settings.keep_layers)
    model_config = KalmConfig(backbone_config=config, **model_options(run.world, settings))
    batch = sample_batch(run.world, tokenizer, settings)
    lines = []
    if settings.trains:
        parts = of_grounding(model_config, batch, settings, run.dtype)
        shown = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts.items())
        total = sum(parts.values()) / GB
        lines.append(f"memory: ground takes about {total:.2f} GB on each device ({shown})")
    weights, _ = weight_bytes(on_meta(model_config), run.dtype, settings.load_in_4bit)
    positions = LONGEST_PROMPT + 2 * imagining.imagined_steps
    row = row_bytes(config, run.dtype.itemsize, positions) / GB
    available = free(settings.device) / GB
    lines.append(
        f"memory: imagine takes about {weights / GB:.2f} GB of weights and {row:.4f} GB a row, of "
        f"at most 256 rows that half of the free memory holds; {available:.1f} GB are free"
    )
    if settings.trains and total > available:
        lines.append(f"memory: that is more than is free; what helps: {ADVICE}")
    return "\n".join(lines)


def on_meta(config: KalmConfig) -> KalmForRollouts:
    """A model of a configuration, without memory."""
    with torch.device("meta"):
        return KalmForRollouts(config)


def sample_batch(world: env.World, tokenizer: Tokenizer, settings) -> dict[str, torch.Tensor]:
    """A batch as one device will have it, of rollouts of the world's expert."""
    rng = np.random.default_rng(0)
    size = settings.per_device_train_batch_size
    goals = world.sample_goals("offline", "train", max(8, size // 2), rng)
    goals = [goal for goal in goals for _ in range(6)]
    records = env.expert_rollouts(world, goals, env.unfulfilled_states(world, rng, goals), 20)
    done = [record for record in records if record["success"]]
    examples = GroundingExamples(done, tokenizer, world, settings.task_names)
    return pack([examples[number] for number in rng.integers(len(examples), size=size)])


def of_grounding(
    config: KalmConfig, batch: Mapping[str, torch.Tensor], settings, dtype: torch.dtype
) -> dict[str, float]:
    """Bytes of training on one device by what they are for; together they are the peak.

    batch: as `tasks.pack` gives it, of which the sizes count. settings:
    `ground.GroundingArguments`. dtype: what the LLM computes in.
    """
    base_dtype = dtype if config.lora_rank else torch.float32
    model = on_meta(config).train()
    model.get_input_embeddings().weight.requires_grad_(False)
    weights, trained = weight_bytes(model, base_dtype, settings.load_in_4bit)
    activations = head_bytes(model, batch, dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        shape = batch["input_ids"].shape
        activations += saved_bytes(model, shape, base_dtype, dtype, settings)
    is_sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    shards = settings.world_size if is_sharded else 1
    copies = 1 if settings.world_size == shards else 2  # DDP's buckets hold the gradients again
    return {
        "weights": weights / shards,
        "optimizer": 2 * trained / shards,
        # While the ones are given back, the others come.
        "activations or gradients": max(activations, copies * trained / shards),
    }


def weight_bytes(
    model: KalmForRollouts, base_dtype: torch.dtype, in_4bit: bool
) -> tuple[float, float]:
    """Bytes of all weights, and of those that are trained, which are float32."""
    new = set(model.new_parameters())
    words = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    of_all = 0.0
    trained = 0.0
    for name, parameter in model.named_parameters():
        is_linear = parameter.ndim == 2 and id(parameter) not in words
        size = 4 if name in new else base_dtype.itemsize
        if in_4bit and is_linear and name not in new:
            size = QUANTISED
        of_all += size * parameter.numel()
        trained += 4 * parameter.numel() * parameter.requires_grad
    return of_all, trained


def saved_bytes(
    model: KalmForRollouts,
    shape: Sequence[int],
    base_dtype: torch.dtype,
    dtype: torch.dtype,
    settings,
) -> int:
    """Bytes that autograd keeps of the backbone for its backward pass, of rows (B, L)."""
    device = settings.device
    module = model.backbone.base_model
    named = dict(model.named_parameters())
    new = {id(named[name]) for name in model.new_parameters()}
    weights = {name: torch.empty_like(x, device=device) for name, x in module.named_buffers()}
    for name, parameter in module.named_parameters():
        own_dtype = torch.float32 if id(parameter) in new else base_dtype
        empty = torch.empty_like(parameter, dtype=own_dtype, device=device)
        weights[name] = empty.requires_grad_(parameter.requires_grad)
    are_weights = {weight.untyped_storage()._cdata for weight in weights.values()}
    kept = {}  # by where a tensor lies, so that one kept twice counts once

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in are_weights:
            kept[storage._cdata] = storage
        return tensor

    rows, length = shape
    width = model.get_input_embeddings().weight.shape[1]
    embedded = torch.zeros(rows, length, width, dtype=base_dtype, device=device)
    embedded.requires_grad_(True)
    inputs = {
        "inputs_embeds": embedded,
        "attention_mask": torch.zeros(rows, 1, length, length, dtype=base_dtype, device=device),
        "position_ids": torch.zeros(rows, length, dtype=torch.long, device=device),
    }
    low_precision = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with low_precision, saved_tensors_hooks(keep, lambda tensor: tensor):
        functional_call(module, weights, kwargs={**inputs, "use_cache": False})
    everything = sum(storage.nbytes() for storage in kept.values())
    if not settings.activation_checkpointing:
        return everything
    layers = model.config.backbone_config.get_text_config().num_hidden_layers
    return everything // layers + layers * embedded.nbytes  # one layer is run again at a time


def head_bytes(
    model: KalmForRollouts, batch: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> int:
    """Bytes of what leads to the losses: logits of all predicted words, with their gradient, and
    what the state embedding and heads keep.
    """
    ahead = batch["predict"][:, 1:]
    words = int((ahead & (batch["modality"][:, 1:] == TEXT)).sum())
    states = int((ahead & (batch["modality"][:, 1:] == STATE)).sum())
    positions = batch["input_ids"].numel()
    vocabulary = model.get_output_embeddings().weight.shape[0]
    logits = words * vocabulary * (3 * 4 + dtype.itemsize)
    width = model.config.head_width
    hidden = model.config.hidden_size
    of_states = states * (hidden + 8 * width) * 4
    of_positions = positions * (4 * hidden + 6 * width) * 4
    return logits + of_states + of_positions
