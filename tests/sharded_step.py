"""One training step of a tiny model, for test_distributed.py: alone, or with `torchrun` on two
processes as DDP or FSDP.

Arguments: alone, ddp or fsdp, and a file for the losses before and after the step and all weights.
Process r trains on batch r; alone, one process trains on both, with the mean of their losses.
"""

import os
import sys

import conftest  # first, it sets the import path
import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import env
import ground
from data.grounded import gathered


def batches(world, rollouts, tokenizer):
    """Two batches of 20 examples."""
    examples = ground.GroundingExamples(rollouts, tokenizer, world)
    starts = (0, 20)
    return [ground.pack([examples[start + row] for row in range(20)]) for start in starts]


def main(way, path):
    world = env.make()
    rng = np.random.default_rng(0)
    goals = world.sample_goals("offline", "train", 12, rng)
    rollouts = conftest.expert_rollouts(world, goals, rng)
    model, tokenizer = conftest.new_model(world, rollouts)
    model.train()
    work = batches(world, rollouts, tokenizer)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        work = [work[dist.get_rank()]]
    trained = model
    if way == "fsdp":
        for layer in model.backbone.base_model.layers:
            fully_shard(layer)
        fully_shard(model)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    elif way == "ddp":
        trained = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        loss = torch.stack([trained(**batch).loss for batch in work]).mean()
        optimizer.zero_grad()
        loss.backward()
        if not losses:
            optimizer.step()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    if way != "alone":
        dist.all_reduce(losses)
        losses /= dist.get_world_size()
    whole = gathered(model)
    if way == "alone" or dist.get_rank() == 0:
        weights = {name: value.contiguous().clone() for name, value in whole.named_parameters()}
        save_file({"losses": losses, **weights}, path)
    if way != "alone":
        dist.barrier()
        os._exit(0)  # gloo's end can wait forever for a process that has gone already


if __name__ == "__main__":
    main(*sys.argv[1:])
