"""Training that goes on after a kill: when to save, and the snapshot of an offline RL run as one safetensors file.

Only the last complete checkpoint is kept (`store.keep_last`); one that was cut off while written is not sealed, so never used.
"""
import json
import time

import torch
import transformers
from accelerate.utils import broadcast
from safetensors import safe_open
from safetensors.torch import save_file

from data import store


class CheckpointByTime(transformers.TrainerCallback):
    """Lets the Trainer save a checkpoint every so many minutes, at a step that it logs: so the log goes on without a seam."""

    def __init__(self, folder, minutes):
        self.folder, self.seconds, self.last = folder, 60 * minutes, time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.logging_steps == 0 and state.global_step < state.max_steps:  # resumed at its end, it would overrun
            due = torch.tensor(time.monotonic() - self.last >= self.seconds, device=args.device)
            control.should_save = bool(broadcast(due))  # all processes save, or none

    def on_save(self, args, state, control, **kwargs):
        if args.world_size > 1:
            torch.distributed.barrier()
        if state.is_world_process_zero:
            store.keep_last(self.folder / f"checkpoint-{state.global_step}")
        self.last = time.monotonic()


def save_training(path, networks, optimizer, schedule, generator, curve):
    """One safetensors file NAME-STEP: networks (a list of modules), optimiser moments, schedule, generator and curve; then sealed."""
    tensors = {f"network.{i}.{k}": v for i, network in enumerate(networks) for k, v in network.state_dict().items()}
    tensors |= {f"moment.{i}.{k}": v for i, moments in optimizer.state_dict()["state"].items() for k, v in moments.items()}
    tensors["generator"] = generator.get_state()
    with store.replacing(path) as aside:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, aside,
                  {"schedule": json.dumps(schedule.state_dict()), "curve": json.dumps(curve)})
    store.keep_last(path)


def resume_training(path, networks, optimizer, schedule, generator):
    """Put the content of `save_training` back in place. Returns the curve."""
    with safe_open(str(path), "pt") as file:
        tensors, text = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()
    for i, network in enumerate(networks):
        network.load_state_dict({k: tensors[f"network.{i}.{k}"] for k in network.state_dict()})
    moments = {}
    for name in tensors:
        if name.startswith("moment."):
            _, i, kind = name.split(".")
            moments.setdefault(int(i), {})[kind] = tensors[name]
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    schedule.load_state_dict(json.loads(text["schedule"]))
    for group, lr in zip(optimizer.param_groups, schedule.get_last_lr()):
        group["lr"] = lr
    generator.set_state(tensors["generator"])
    return [tuple(entry) for entry in json.loads(text["curve"])]
