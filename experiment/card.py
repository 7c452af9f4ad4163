"""The model card of a grounded language model: the README.md beside its weights, as hubs show it.

This file knows what a stage tells of itself, and loads no model.
"""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from model import KalmConfig

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
BASES = {  # our own names of language models: (name on the Hub, license)
    "smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
    "tiny": (None, "apache-2.0"),
}
GROUNDING_WORDS = {  # of the figures in grounded/metrics.json
    "action_accuracy": "picks the recorded action",
    "state_error": "error of a number of the next state (root mean square)",
    "state_error_nothing_moves": "the same if nothing moved",
    "easy_action": "first action fits an easy goal",
    "easy_state": "so does the state that it imagines to follow",
    "explanation_source": "explanations name the right source",
    "explanation_target": "explanations name the right target",
    "explanation_direction": "explanations name the right direction",
    "explanation_exact": "explanations are right in every part",
    "explanation_holds": "explanations say what holds in the final state",
}


def figures_in_words(metrics: dict) -> dict[str, float]:
    """The figures of grounding by words for them, or by their own names; the log is left out."""
    figures = {}
    for name, value in metrics.items():
        if name != "log":
            figures[GROUNDING_WORDS.get(name, name.replace("_", " "))] = value
    return figures


def sizes(config: KalmConfig) -> dict[str, int]:
    """What the card says of a model's size."""
    layers = config.backbone_config.get_text_config().num_hidden_layers
    names = ("lora_rank", "observation_dim", "num_actions")
    return {"layers": layers, **{name: getattr(config, name) for name in names}}


def write_card(folder: Path, facts: dict, metrics: dict) -> None:
    """Write README.md to a folder of grounded weights.

    facts: llm, layers, lora_rank; world, observation_dim, num_actions; data and adapter, paths or
    None; rollouts, (trained on, held out); and of training here steps, 0 if there was none,
    batch_size of all processes together, tasks, seed. metrics: as in metrics.json.
    """
    base, license_name = BASES.get(facts["llm"], (facts["llm"], "other"))
    is_hub_name = base is not None and not Path(base).exists()
    world = facts["world"].rpartition(":")[2]  # the class alone of path/to/file.py:Class
    front_matter = ModelCardData(
        library_name="transformers",
        license=license_name,
        license_name="of-the-base-model" if license_name == "other" else None,
        base_model=base if is_hub_name else None,
        language="en",
        tags=["kalm", "offline-rl", world.replace("_", "-")],
    )
    # A path on this machine tells others nothing: the card has its last part.
    last_parts = {name: Path(facts[name] or "").name for name in ("data", "adapter")}
    names = {"base": base if is_hub_name else Path(base or "").name, "world": world, **last_parts}
    card = ModelCard.from_template(
        front_matter,
        template_path=TEMPLATE,
        **{**facts, **names},
        figures=figures_in_words(metrics),
    )
    card.save(folder / "README.md")
