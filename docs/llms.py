"""Which causal LMs of transformers can be used exactly: `python docs/llms.py` writes docs/llms.md.

Every architecture that AutoModelForCausalLM knows is probed (experiment/probe.py) in its default
configuration, which is mostly that of its best known checkpoint, made small. Nothing is fetched.
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from experiment import probe

LENGTH = 150  # positions of the longest example at default settings, about
GRANITE = {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}
OVERRIDES = {  # where the default configuration is incomplete, or simpler than any checkpoint
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 32, "num_experts_per_tok": 4, "n_shared_experts": 1},
    "granite": GRANITE,
    "granitemoe": GRANITE,
    "granitemoeshared": GRANITE,
    "granitemoehybrid": GRANITE | {"layer_types": ["mamba", "attention"] * 16},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
}
VARIANTS = (  # of an architecture, beside its default
    ("falcon", "with ALiBi", {"alibi": True}),
    ("gemma3_text", "window below an example", {"sliding_window": 64}),
    ("llama", "tied", {"tie_word_embeddings": True}),
    ("mistral", "window below an example", {"sliding_window": 64}),
    ("opt", "350m", {"word_embed_proj_dim": 512, "hidden_size": 1024, "num_attention_heads": 16}),
)
HEAD = """# LLMs that can be used exactly

Made by `python docs/llms.py` with transformers {version}: of architectures and variants
of them {exact} are exact, {refused} are refused, {not tried} were not tried.

A run packs rollouts of a prompt into one row, imagines behind a key-value cache, and reads words
from the LLM's output layer. Before it starts, a small LLM of the same configuration (one layer of
each kind, random weights) must give the same outputs in all these ways as a rollout alone does:
no output may depend on a later position; word logits must be those of the LLM itself; rollouts
packed in a row, and left-padded rows that grow, branch and end behind a cache, must come out as
each rollout alone; LoRA must change nothing while it is new, and give merged what it gives beside;
weights must come back from a folder under their names. An LLM that fails is refused by name with
the reason. So is one with recurrent or convolution layers, with weights that are quantised already,
without an end token, with fewer embeddings than its tokenizer has tokens, or with fewer positions
than the longest example (here {length}).

A sliding window does not matter while every example is shorter than it; where one is longer, the
probe says so. Default configurations are probed; a checkpoint's own settings decide.

| architecture | | reason | seconds |
| --- | --- | --- | ---: |
"""


def verdict(model_type: str, overrides: dict) -> tuple[str, str, float]:
    """("exact", "refused" or "not tried", the reason, seconds of a core) of an architecture."""
    begin = time.process_time()
    try:
        config = CONFIG_MAPPING[model_type](**overrides)
    except Exception as error:
        return "not tried", f"no default configuration ({probe.in_words(error)})", 0.0
    try:
        probe.check_exact(config, LENGTH)
        found, reason = "exact", ""
    except ValueError as error:
        found, reason = "refused", str(error)
    if reason.startswith("making it small"):
        found = "not tried"
    return found, reason, time.process_time() - begin


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows = [(name, "", OVERRIDES.get(name, {})) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    rows = sorted([*rows, *VARIANTS], key=lambda row: row[:2])
    lines = []
    counts = {"exact": 0, "refused": 0, "not tried": 0}
    for name, variant, overrides in rows:
        found, reason, seconds = verdict(name, overrides)
        counts[found] += 1
        title = f"{name}, {variant}" if variant else name
        reason = reason.replace("|", "/").replace("<", "")
        lines.append(f"| {title} | {found} | {reason} | {seconds:.1f} |")
        print(lines[-1], flush=True)
    head = HEAD.format(version=transformers.__version__, length=LENGTH, **counts)
    (ROOT / "docs" / "llms.md").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
