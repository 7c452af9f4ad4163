"""A small LLM of the same kind as a large one: few layers, few words, random weights.

What makes an LLM of use or not to `experiment.probe` is how its layers are built, not how many
there are, how wide they are, or what they know. This file knows configurations and no run.
"""

import copy
import math

import torch
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 512
NARROW = 64  # width of feed-forward layers and experts
SHORT = 8  # positions that a sliding window reaches where it is shorter than an example
LARGEST = 100e6  # parameters of a small LLM at most, to take seconds
WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "swa_window_size",
    "window_size",
    "local_attention",
    "attention_chunk_size",
    "attention_window_size",
    "keep_window_size",
    "index_topk",
)
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
FEW_EXPERTS = 32  # and not fewer: some choose 8 of 8 groups
DENSE_LAYERS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
AS_WIDE = ("word_embed_proj_dim", "embedding_size", "lru_width")  # as the hidden size, or not


def small_model(auto, config: PreTrainedConfig, length: int) -> PreTrainedModel:
    """A small random model of a configuration. auto: AutoModel or AutoModelForCausalLM.

    Raises ValueError if it has no small form.
    """
    for narrow in (True, False):  # not all kinds bear fewer heads
        try:
            small = small_config(config, length, narrow)
            with torch.device("meta"):
                size = auto.from_config(small).num_parameters()
            break
        except Exception:
            if not narrow:
                raise
    if size > LARGEST:
        raise ValueError(f"its smallest form has {size / 1e6:.0f} million parameters")
    model = auto.from_config(small, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # some start at 0, where nothing could be seen
            spread = 0.5 / math.sqrt(parameter.shape[-1] if parameter.dim() else 1)
            parameter.add_(torch.randn_like(parameter), alpha=spread)
    return model.eval()


def small_config(config: PreTrainedConfig, length: int, narrow: bool) -> PreTrainedConfig:
    """The configuration with one layer of each kind, two at least, and few words.

    length: positions of the longest example; a window that reaches further stays out of sight.
    narrow: fewer heads too, each as wide as before, and narrow feed-forward layers.
    """
    config = copy.deepcopy(config)
    for name in config.sub_configs:
        if isinstance(getattr(config, name, None), PreTrainedConfig):
            setattr(config, name, small_config(getattr(config, name), length, narrow))
    fields = config.to_dict()
    config.per_layer_config = None  # until layers and heads are fewer
    kept = one_layer_of_each_kind(config, fields)
    for name, value in fields.items():
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        if "vocab" in name and "type" not in name:
            setattr(config, name, VOCABULARY)
        elif name.endswith("_token_id"):
            setattr(config, name, value % VOCABULARY)
        elif name in DENSE_LAYERS:
            setattr(config, name, min(value, 1))
        elif name in EXPERTS:
            setattr(config, name, min(value, FEW_EXPERTS))
        elif name in WINDOWS and value < length:
            setattr(config, name, min(value, SHORT))
        elif narrow and ("intermediate_size" in name or "ffn" in name):
            setattr(config, name, min(value, NARROW))
    if narrow:
        keep_few_heads(config)
    overrides = fields.get("per_layer_config") or {}
    overrides = {int(layer): values for layer, values in overrides.items()}
    if overrides:
        those = {new: overrides[old] for new, old in enumerate(kept) if old in overrides}
        config.per_layer_config = those
    return config


def one_layer_of_each_kind(config: PreTrainedConfig, fields: dict) -> list[int]:
    """Keep layers that differ in what the configuration lists by layer. Returns their numbers."""
    layers = getattr(config, "num_hidden_layers", 0)
    if layers < 2:
        return list(range(layers))
    by_layer = {}
    for name, value in fields.items():
        is_kind = isinstance(value, list) and len(value) == layers
        if is_kind and len(set(map(str, value))) <= 4:  # more would be numbers of the layers
            by_layer[name] = value
    kinds = list(zip(*by_layer.values())) or [()] * layers
    kept = [layer for layer in range(layers) if kinds[layer] not in kinds[:layer]]
    if len(kept) == 1:
        kept = [0, 1]
    config.num_hidden_layers = len(kept)
    if hasattr(config, "decoder_layers"):  # of BART and its like
        config.decoder_layers = len(kept)
    for name, value in by_layer.items():
        setattr(config, name, [value[layer] for layer in kept])
    return kept


def keep_few_heads(config: PreTrainedConfig) -> None:
    """Two key-value heads at most, and two heads to each of them if there were more than one."""
    heads = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return
    groups = getattr(config, "num_key_value_heads", None) or heads
    few_groups = min(groups, 2)
    few_heads = few_groups if groups == heads else 2 * few_groups
    few_hidden = few_heads * (hidden // heads)
    for name in AS_WIDE:
        if getattr(config, name, None) == hidden:
            setattr(config, name, few_hidden)
    config.hidden_size = few_hidden
    config.num_attention_heads = few_heads
    if hasattr(config, "decoder_attention_heads"):
        config.decoder_attention_heads = few_heads
    if getattr(config, "num_key_value_heads", None):
        config.num_key_value_heads = few_groups
