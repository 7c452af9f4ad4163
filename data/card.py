"""The model card of a grounded language model: the README.md beside its weights, as model hubs show it.

This file knows metrics.json and the options of grounding, and loads nothing.
"""
from pathlib import Path

BASES = {"smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"), "tiny": (None, "apache-2.0")}
FIGURES = {  # of metrics.json, on held-out rollouts
    "action_accuracy": "picks the expert's action", "state_error": "error of a coordinate of the next state (m)",
    "state_error_nothing_moves": "the same if nothing moved (m)", "explanation_source": "explanations name the pushed ball",
    "explanation_target": "... the other ball", "explanation_direction": "... the direction",
    "explanation_holds": "... a relation that holds in the final state"}

CARD = """---
{front}
---
# A language model grounded in CLEVR-Robot

{base}, which reads and writes the states and actions of a robot beside text: from a goal in words and a start it imagines
rollouts (an action, the next state, the next action, ...), explains rollouts in words, and predicts what an action does. Made by
KALM (Pang et al., "Knowledgeable Agents by Offline Reinforcement Learning from Large Language Model Rollouts", NeurIPS 2024,
[arXiv 2404.09248](https://arxiv.org/abs/2404.09248)).

- **States**: x, y in metres of the red, blue, green, purple and cyan ball (10 numbers). **Actions**: 0..39, ball * 8 + push direction.
- **Data**: {data}.
- **Training**: {training}.
- **Limits**: it knows this table and these five balls. The next states that it imagines are kinder than physics.

{figures}
## Load it

With the code of KALM on the import path (`model.py`):

```python
import model  # registers "kalm" with transformers
from transformers import AutoModel, AutoTokenizer

grounded, tokenizer = AutoModel.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
```

`rollout.generate` imagines with it, `rollout.explain` explains.{adapter}

## License

{license_text}
"""


def write(folder, metrics, options, config, counts):
    """README.md in a folder of grounded weights.

    metrics: as in metrics.json; options: of grounding, a namespace; config: KalmConfig; counts: of rollouts, (trained on, held out).
    """
    steps = options.adapter_steps if options.adapter else options.ground_steps
    whose = f"rollouts of `{Path(options.data).name}`" if options.data else "rollouts of a scripted expert in simulated physics (MuJoCo)"
    layers = config.backbone_config.get_text_config().num_hidden_layers
    tuned, tasks = f"LoRA of rank {config.lora_rank}" if config.lora_rank else "all weights", options.tasks.replace(",", ", ")
    training = ", then ".join([f"the adapter `{Path(options.adapter).name}` ({tuned})"] * bool(options.adapter) + [
        f"{steps} steps of {options.batch_examples} examples, tuning {tuned}, tasks {tasks}, seed {options.seed}"] * bool(steps))
    base, license_name = BASES.get(options.llm, (options.llm, "other"))
    is_hub_name = base and not Path(base).exists()
    base = base if is_hub_name or not base else Path(base).name  # a folder of this machine is no name
    front = ["library_name: transformers", f"license: {license_name}", *(["license_name: of-the-base-model"] * (license_name == "other")),
             *([f"base_model: {base}"] if is_hub_name else []), "language: en", "tags: [kalm, robotics, offline-rl, clevr-robot]"]
    rows = [f"| {words} | {metrics[name]:.3f} |" for name, words in FIGURES.items() if name in metrics]
    text = CARD.format(
        front="\n".join(front), base=f"{f'`{base}`' if base else 'A random tiny language model, for tests'}, {layers} layers of it",
        data=f"{counts[0]} {whose}, {counts[1]} more held out" if steps else "what the adapter was trained on", training=training,
        figures="\n".join(["| on held-out rollouts | |", "| --- | --- |", *rows, ""]),
        adapter=" What grounding added alone is in `adapter/`, as peft loads it." if (Path(folder) / "adapter").is_dir() else "",
        license_text="Apache-2.0, as the language model that it was made from." if license_name == "apache-2.0" else
        "The code is Apache-2.0; these weights derive from the language model above, and its license holds for them.")
    (Path(folder) / "README.md").write_text(text, encoding="utf-8")
