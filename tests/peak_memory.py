"""Grounding's peak of memory beside its estimate, for test_memory.py: one JSON line.

Arguments: a folder, the width and layers of a random Llama, and options of `kalm.py`.
"""

import json
import os
import sys
import threading
import time

import conftest  # noqa: F401, first, it sets the import path
import transformers

import env
import ground
import kalm
import tasks
from data import llm
from experiment import memory
from experiment.command import dtype_of
from experiment.run import Run

folder, width, layers, *arguments = sys.argv[1:]
width = int(width)


def anonymous():
    """Bytes of this process that no file stands for."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def save_random_llm(world):
    _, tokenizer = llm.tiny([*world.vocabulary(), *tasks.PROMPTS.values()])
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=width * 8 // 3, eos_token_id=1,
        num_hidden_layers=int(layers), num_attention_heads=width // 64, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder + "/llm")
    tokenizer.save_pretrained(folder + "/llm")


world = env.make()
if not os.path.exists(folder + "/llm"):
    save_random_llm(world)
command = f"--scale smoke --llm {folder}/llm --output_dir {folder}/run --max_steps 2".split()
command += [*arguments, "--eval_strategy", "no", "--save_strategy", "no"]
assert kalm.main([*command, "--stage", "collect"]) == 0
found = {}
peak = 0
take_step = ground.GroundingTrainer.training_step
train = ground.train


def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.003)


def measured_train(model, tokenizer, world, rollouts, held_out, settings, *others):
    run = Run(kalm.Path(folder), world, folder + "/llm", 0, dtype_of(settings), [])
    config, _ = run.llm_without_weights(0)
    batches = []
    ground.GroundingTrainer.training_step = lambda self, model, batch, *rest: (
        batches.append(batch),
        take_step(self, model, batch, *rest),
    )[1]
    log = train(model, tokenizer, world, rollouts, held_out, settings, *others)
    estimates = []
    for batch in batches:
        parts = memory.of_grounding(model.config, batch, settings, run.dtype)
        estimates.append(sum(parts.values()))
    found.update(estimate=max(estimates), parts=parts, measured=peak - own)
    return log


ground.train = measured_train
own = anonymous()
threading.Thread(target=watch, daemon=True).start()
assert kalm.main([*command, "--stage", "ground", "--traceback"]) == 0
print("FOUND", json.dumps(found))
