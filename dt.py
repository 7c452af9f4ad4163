"""Decision Transformer (Chen et al., 2021) with the LLM as its backbone, as the paper compares.

    goal text, g_0, s_0 -> a_0, g_1, s_1 -> a_1, ...     where g_t = r_t + r_t+1 + ... + r_T
States are given and actions alone are predicted. Model, packing, Trainer and the loop that acts are
those of the grounded LLM; a return-to-go is one more kind of position. This file knows no
particular world and no evaluation.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedModel

import ground
from data.grounded import observation_statistics, weights_of, wrap_llm
from data.llm import describe
from experiment import folder, launch, logs
from experiment.run import Run
from ground import GroundingArguments
from model import RETURN, KalmConfig, KalmForRollouts, matching
from tasks import Tokenizer, returns_to_go

TARGET = 0.9  # quantile of the data's returns that is asked for: seldom reached, and not unheard of
BATCH = 8  # examples a step on all devices, of six rollouts each
POLICY_STEPS = 8  # of --rl_steps, for one step here, which takes as long as a hundred of them


def return_statistics(rollouts: Sequence[dict]) -> dict[str, float]:
    """Mean and deviation of returns-to-go, which normalise them, and the return to ask for.

    One target for all goals: kinds of goals that are new have no returns in the data.
    """
    to_go = [returns_to_go(record["rewards"]) for record in rollouts]
    every = np.concatenate(to_go)
    return {
        "return_mean": float(every.mean()),
        "return_std": float(every.std()) or 1.0,  # never divide by 0
        "target_return": float(np.quantile([own[0] for own in to_go], TARGET)),
    }


class DecisionTransformer(KalmForRollouts):
    """KalmForRollouts that also reads returns-to-go; its configuration has `return_statistics`."""

    def __init__(self, config: KalmConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config, backbone)
        self.return_embedding = nn.Linear(1, config.hidden_size)
        for parameter in self.return_embedding.parameters():
            nn.init.normal_(parameter, std=config.embedding_rms)
        self.target_return = config.target_return

    def embed(self, input_ids: Tensor, modality: Tensor, states: Tensor) -> Tensor:
        """As KalmForRollouts does. states: at a return-to-go, its number in each dimension."""
        embedded = super().embed(input_ids, modality, states)
        returns = self.embed_returns(states[..., 0]).to(embedded.dtype)
        return torch.where((modality == RETURN)[..., None], returns, embedded)

    def embed_returns(self, returns: Tensor) -> Tensor:
        """Input embeddings (..., hidden) of returns-to-go (...)."""
        numbers = (returns - self.config.return_mean) / self.config.return_std
        return self.return_embedding(matching(self.return_embedding, numbers[..., None]))


def arguments(run: Run, steps: int, work: Path) -> GroundingArguments:
    """The recipe by which the run grounded its LLM, or the default where that was an adapter."""
    devices = PartialState().num_processes // launch.cpu_workers()
    each = max(launch.cpu_workers(), BATCH // devices)  # workers on one CPU divide it again
    recipe = {**run.recorded("ground"), "per_device_train_batch_size": each}
    recipe |= {"adapter": "none", "max_steps": steps, "seed": run.seed}
    recipe |= {"bf16": run.dtype == torch.bfloat16, "fp16": run.dtype == torch.float16}
    often = {"eval_strategy": "no", "save_steps": 0.1, "logging_steps": 0.01}  # shares of all steps
    settings = GroundingArguments(output_dir=str(work), **recipe, **often)
    settings.tasks = "decision"  # which --tasks does not offer
    return settings


def learn(run: Run, rl_steps: int, rollouts: Sequence[dict], work: Path) -> list[tuple]:
    """Train on rollouts, all processes together -> work/model. rl_steps: of policies in this run.
    Returns the learning curve, a list of (step, loss, gradient norm).
    """
    settings = arguments(run, max(1, rl_steps // POLICY_STEPS), work)
    language_model, tokenizer = run.load_llm_to_train(settings)
    returns = return_statistics(rollouts)
    statistics = observation_statistics(rollouts, run.world.objects) | returns
    model = wrap_llm(language_model, run.world, statistics, settings, DecisionTransformer)
    model.config.base = describe(run.llm, settings.keep_layers, run.seed)
    shown = [f"{name} {number:.1f}" for name, number in returns.items()]
    run.say(f"  Decision Transformer: {', '.join(shown)}")
    log_path = run.folder / "logs" / "rl_dt.jsonl"
    log = ground.train(model, tokenizer, run.world, rollouts, (), settings, work, log_path)
    entries = [entry for entry in log if "loss" in entry]
    curve = [(entry["step"], entry["loss"], entry.get("grad_norm", 0.0)) for entry in entries]
    weights = weights_of(model)
    if PartialState().is_main_process:
        with logs.curve(log_path.parent, log_path.stem, run.trackers) as note:  # as of policies
            for step, loss, _ in curve:
                note(step, loss)
        with folder.replacing(work / "model") as aside:
            model.save_pretrained(aside, state_dict=weights)
            tokenizer.save_pretrained(aside)
    return curve


def load(run: Run) -> tuple[DecisionTransformer, Tokenizer]:
    """What a run has learned, on this process's device, and its tokenizer."""
    return run.load_grounded("policies/dt", DecisionTransformer)
