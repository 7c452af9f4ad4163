"""Host memory and seconds from the start of `ground` to its first step, of an LLM of any size:

    python tests/first_step.py LLM_FOLDER RUN_FOLDER --lora_rank 32 [--load_in_4bit true]

Takes further options of `kalm.py`. The peak is of anonymous memory, over what the interpreter with
its packages has, as a share of the LLM's weights in bfloat16. Linux alone.
"""

import gc
import math
import os
import sys
import threading
import time
from pathlib import Path

import conftest  # noqa: F401, first, it sets the import path
import datasets  # noqa: F401, this and the next count as the interpreter's own
import peft  # noqa: F401
from safetensors import safe_open

import ground
import kalm


def anonymous():
    """Bytes of this process that no file stands for."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def weights_in_bfloat16(llm):
    """Bytes of an LLM folder's weights in bfloat16."""
    numbers = 0
    for file in Path(llm).glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                numbers += math.prod(weights.get_slice(name).get_shape())
    return 2 * numbers


def watch(peak):
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.003)


def main(llm, run, *options):
    command = ["--scale", "smoke", "--llm", llm, "--output_dir", run, "--processes", "1"]
    command += ["--bf16", "true", *options]
    assert kalm.main([*command, "--stage", "collect"]) == 0
    gc.freeze()  # as the command does once it is imported
    own = anonymous()
    began = time.time()
    peak = [own]

    def first_step(*_, **__):
        taken = peak[0] - own
        share = taken / weights_in_bfloat16(llm)
        seconds = time.time() - began
        print(f"\nfirst step after {seconds:.1f} s, peak {taken / 1e9:.2f} GB, {share:.2f} of bf16")
        sys.stdout.flush()
        os._exit(0)

    ground.GroundingTrainer.training_step = first_step
    threading.Thread(target=watch, args=(peak,), daemon=True).start()
    sys.exit(kalm.main([*command, "--stage", "ground", "--force"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
