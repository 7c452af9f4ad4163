"""One training step of a tiny model, for test_distributed.py: alone, or with `torchrun` on two processes as DDP or FSDP.

Arguments: ddp or fsdp, and a file for the losses before and after the step and all weights. Process r trains on batch r; alone,
one process trains on both batches with the mean of their losses.
"""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

import env  # noqa: E402
import ground  # noqa: E402
from data import llm  # noqa: E402
from model import KalmForRollouts  # noqa: E402


def batches(tokenizer):
    rng = np.random.default_rng(0)
    goals = env.sample_goals("offline", "train", 12, rng)
    array = env.goal_array(goals)
    records = env.run_episodes(lambda obs, rows: env.expert_actions(array[rows], obs), goals, env.unfulfilled_states(rng, goals), 5)
    examples = ground.GroundingExamples(records, tokenizer)
    return [ground.pack([examples[i] for i in range(start, start + 20)]) for start in (0, 20)]


def main(way, path):
    language_model, tokenizer = llm.tiny(0)
    model, work = KalmForRollouts.from_llm(language_model, observation_std=[0.3] * 10), batches(tokenizer)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        work = work[dist.get_rank():][:1]
    trained = model
    if way == "fsdp":
        for layer in model.backbone.base_model.layers:
            fully_shard(layer)
        fully_shard(model)
        assert all(isinstance(p, DTensor) for p in model.parameters())
    elif way == "ddp":
        trained = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
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
    whole = ground.gathered(model)
    if way == "alone" or dist.get_rank() == 0:
        save_file({"losses": losses, **{k: v.contiguous().clone() for k, v in whole.named_parameters()}}, path)
    if way != "alone":
        dist.barrier()
        os._exit(0)  # gloo's end can wait forever for a process that has gone already


if __name__ == "__main__":
    main(*sys.argv[1:])
