"""Grounding: supervised fine-tuning of the LLM on the offline rollouts (paper, section 4.1).

A rollouts dataset becomes examples of tasks, packed into rows, and the Hugging Face Trainer does the rest:
    dynamics      "what happens next" (s_t, a_t)               -> s_{t+1}
    explanation   "say what it did"   (s_0, a_0, ..., s_T)     -> text
    generation    goal text           (s_0)                    -> a_0, s_1, a_1, ..., s_T
    consequence   goal text           (s_0)                    -> s_T
    description   "where are they"    s_t, two balls           -> text       (not the paper's: geometry without a behavior to guess it from)
This file knows nothing of policies, and of CLEVR-Robot only words: of goals, of balls, of which way one lies from another.
"""
import collections
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from tqdm import trange

import env
from data import finite, logs, store
from data.checkpoint import CheckpointByTime
from model import ACTION, PAD, SEGMENTS, STATE, TASKS, TEXT, KalmForRollouts

PROMPTS = {
    "dynamics": "Predict the next state after the action.",
    "explanation": "Explain what this rollout achieves.",
    "generation": "Goal: {goal}\nRollout:",
    "consequence": "Goal: {goal}\nFinal state:",
    "description": "Tell where the balls are.",
}
OTHER_WORDS = {  # examples take turns among these and the one above, so that an answer does not hang on a wording
    "explanation": ("What did these actions accomplish?", "Say in words what has been done.", "Describe the outcome of this rollout.",
                    "Which goal does this behavior fulfil?", "Summarize the result for someone who did not watch."),
}
RELATIONS_PER_ROLLOUT = 3  # that `description` draws
UNSEEN_PROMPT = "In one sentence, what did the robot bring about?"  # never trained on, to ask for explanations with
ROLLOUTS_PER_EXAMPLE = {"dynamics": 4, "explanation": 2, "generation": 6, "consequence": 6, "description": 6}  # share one prompt


def text_ids(tokenizer, text):
    """Token ids of a text, without the tokenizer's special ones."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_ids(tokenizer, task, goal=None, wording=0):
    """Token ids of a task's prompt, a list of int. goal: text, for the tasks that have one."""
    prompts = (PROMPTS[task], *OTHER_WORDS.get(task, ()))
    return text_ids(tokenizer, prompts[wording % len(prompts)].format(goal=goal))


# ------------------------------------------------------------------------------------------------------------------
# Examples: one prompt and the segments that share it, as flat arrays of positions

def text_positions(ids, predict=False):
    """Token ids as positions: (modality, token or action, state or None, whether it is to be predicted)."""
    return [(TEXT, i, None, predict) for i in ids]


def rollout_positions(observations, actions=(), predict=False):
    """s0, a0, s1, ... as positions; with `predict`, everything after s0 is to be predicted."""
    positions = [(STATE, 0, observations[0], False)]
    for state, action, next_state in zip(observations[:-1], actions, observations[1:]):
        positions += [(ACTION, action, state, predict), (STATE, 0, next_state, predict)]
    return positions


def make_example(task, tokenizer, rollouts, wording=0):
    """One grounding example as a dict of arrays over its L positions; the rollouts share the goal of the first.

    rollouts: records (`env.rollout_record`); wording: which of the task's prompts, counted round, and the seed of what a task draws.
    Returns input_ids, modality, segments, position_ids, predict, task (L,) and states (L, 10), all as `KalmForRollouts.forward`
    takes them. Raises ValueError where there are more segments than `SEGMENTS` allows.
    """
    prompt = text_positions(prompt_ids(tokenizer, task, rollouts[0]["goal"], wording))
    segments = []
    for row in rollouts:
        obs, actions = row["observations"], row["actions"]
        if task == "dynamics":
            segments += [[(STATE, 0, s, False), (ACTION, a, s, False), (STATE, 0, n, True)]
                         for s, a, n in zip(obs[:-1], actions, obs[1:])]
        elif task == "explanation":
            answer = text_ids(tokenizer, " " + env.canonical_text(env.goal_of(row)))
            segments.append(rollout_positions(obs, actions) + text_positions([*answer, tokenizer.eos_token_id], predict=True))
        elif task == "generation":
            segments.append(rollout_positions(obs, actions, predict=True))
        elif task == "description":
            there = env.relations_in(obs)
            drawn = np.random.default_rng([wording, len(segments)]).permutation(len(there))[:RELATIONS_PER_ROLLOUT]
            for step, *relation in there[drawn].tolist():
                balls, direction = env.canonical_text(env.Goal("any", relations=(tuple(relation),))).split(",")
                segments.append([(STATE, 0, obs[step], False), *text_positions(text_ids(tokenizer, f" {balls},")),
                                 *text_positions(text_ids(tokenizer, direction), predict=True)])
        else:
            segments.append([(STATE, 0, obs[0], False), (STATE, 0, obs[-1], True)])
    positions = prompt + [p for segment in segments for p in segment]
    lengths = [len(prompt)] + [len(s) for s in segments]
    if len(lengths) > SEGMENTS:
        raise ValueError(f"an example holds at most {SEGMENTS - 1} segments, got {len(segments)}; give it fewer or shorter rollouts")
    states = np.zeros((len(positions), env.OBSERVATION_DIM), np.float32)
    for row, (_, _, state, _) in zip(states, positions):
        if state is not None:
            row[:] = state
    return {
        "input_ids": np.array([p[1] for p in positions]), "modality": np.array([p[0] for p in positions]), "states": states,
        "segments": np.repeat(np.arange(len(lengths)), lengths), "predict": np.array([p[3] for p in positions]),
        "position_ids": np.concatenate([np.arange(n) + (len(prompt) if i else 0) for i, n in enumerate(lengths)]),
        "task": np.full(len(positions), TASKS.index(task))}


class GroundingExamples(torch.utils.data.Dataset):
    """All examples of a list of rollout records: grouped by goal text, each group once for every task.

    copies: how often they all come, from the second time on with the names of the balls drawn anew.
    """

    def __init__(self, rollouts, tokenizer, tasks=TASKS, copies=1, seed=0):
        self.rollouts, self.tokenizer, self.copies, self.seed = rollouts, tokenizer, copies, seed
        by_goal = collections.defaultdict(list)
        for row, rollout in enumerate(rollouts):
            by_goal[rollout["goal"]].append(row)
        self.examples = [(task, rows[i:i + ROLLOUTS_PER_EXAMPLE[task]]) for rows in by_goal.values() for task in tasks
                         for i in range(0, len(rows), ROLLOUTS_PER_EXAMPLE[task])]

    def __len__(self):
        return len(self.examples) * self.copies

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        copy, number = divmod(index, len(self.examples))
        task, rows = self.examples[number]
        rollouts = [self.rollouts[row] for row in rows]
        if copy:
            order = np.random.default_rng([self.seed, index]).permutation(len(env.COLORS))
            rollouts = [env.rename_balls(r, order) for r in rollouts]
        return make_example(task, self.tokenizer, rollouts, wording=index)


def pack(examples, row_length=256):
    """Collate examples into rows of at most row_length positions (one longer example makes a longer row).

    First fit, longest first: little is padded, and `segment_mask` keeps the examples of a row apart. Returns tensors.
    """
    rows = []
    for example in sorted(examples, key=lambda e: -len(e["input_ids"])):
        size = len(example["input_ids"])
        row = next((r for r in rows if sum(len(e["input_ids"]) for e in r) + size <= row_length), None)
        if row is None:
            rows.append(row := [])
        row.append(example)
    longest = max(sum(len(e["input_ids"]) for e in row) for row in rows)
    fill = {"input_ids": 0, "modality": PAD, "states": 0, "segments": -1, "position_ids": 0, "predict": False, "task": 0}
    batch = {k: np.full((len(rows), longest, *v.shape[1:]), fill[k], v.dtype) for k, v in rows[0][0].items()}
    for r, row in enumerate(rows):
        start = 0
        for i, example in enumerate(row):
            end = start + len(example["input_ids"])
            for key, value in example.items():
                batch[key][r, start:end] = value + i * SEGMENTS if key == "segments" else value
            start = end
    return {k: torch.from_numpy(v) for k, v in batch.items()}


def observation_statistics(rollouts):
    """KalmConfig's objects, observation_mean, observation_std and change_std, the same for every ball so that balls stay alike."""
    sample = [r["observations"] for r in rollouts[:5000]]
    balls = np.concatenate(sample).reshape(-1, 2)
    changes = np.concatenate([np.diff(o, axis=0) for o in sample]).reshape(-1, 2)
    tile = sample[0].shape[1] // 2
    return {"objects": tile, "observation_mean": balls.mean(0).tolist() * tile, "observation_std": balls.std(0).tolist() * tile,
            "change_std": changes.std(0).tolist() * tile}


# ------------------------------------------------------------------------------------------------------------------
# Training

class GroundingTrainer(transformers.Trainer):
    """Trainer with a learning rate of its own for new layers, and with the losses by task and modality in its log.

    checkpoints: the folder to save them in. Raises FloatingPointError before a step that would spoil the weights.
    """

    def __init__(self, *args, new_learning_rate=1e-3, checkpoints=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.new_learning_rate, self.checkpoints = new_learning_rate, checkpoints
        self.parts = collections.defaultdict(list)

    def create_optimizer(self, model=None):
        model = self.model
        new = set(model.new_parameters())
        groups = [{"params": [p for n, p in model.named_parameters() if p.requires_grad and (n in new) == is_new], "lr": lr}
                  for is_new, lr in ((True, self.new_learning_rate), (False, self.args.learning_rate))]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.98),
                                           weight_decay=self.args.weight_decay, fused=True)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        output = model(**inputs)
        finite.check(f"grounding, step {self.state.global_step + 1}", {"loss": output.loss},
                     (inputs["states"], output.state_pred, output.action_logits),
                     about=lambda row: ", ".join(TASKS[t] for t in inputs["task"][row][inputs["modality"][row] != PAD].unique()))
        for name, value in (("text", output.text_loss), ("action", output.action_loss), ("state", output.state_loss),
                            *zip(TASKS, output.task_losses)):
            self.parts[f"{name}_loss"].append(value.detach())
        return (output.loss, output) if return_outputs else output.loss

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        finite.check(f"grounding, step {self.state.global_step + 1}", {"norm of the gradient": norm})
        return norm

    def _get_output_dir(self, trial):
        return str(self.checkpoints)

    def log(self, entry, *args, **kwargs):
        if self.parts and "loss" in entry:
            for name, values in self.parts.items():  # 0 stands for a batch without the task or modality
                values = torch.stack(values)
                entry = {**entry, name: round((values.sum() / (values != 0).sum().clamp(min=1)).item(), 4)}
            self.parts.clear()
        if self.is_world_process_zero():
            logs.write_line(Path(self.args.output_dir) / "grounding.jsonl", step=self.state.global_step, **entry)
        super().log(entry, *args, **kwargs)


def train(model, tokenizer, rollouts, output_dir, *, steps, batch_examples=32, learning_rate=4e-4, new_learning_rate=1e-3,
          freeze_embeddings=True, bf16=False, tasks=TASKS, copies=1, seed=0, report_to="none", checkpoints=None, checkpoint_minutes=5.0):
    """Ground `model` in rollout records, in place. Returns the Trainer's log history, a list of dicts.

    Works alone and under `accelerate launch` or torchrun, where FSDP leaves the model in shards (see `gathered`); its log is
    output_dir/grounding.jsonl too, and what the trackers that report_to names make of it. checkpoints: a folder for them; what an
    earlier call left there is where this one goes on.
    """
    if freeze_embeddings:  # what the LLM knows of words new to the data stays as it was
        model.get_input_embeddings().weight.requires_grad_(False)
    arguments = transformers.TrainingArguments(
        output_dir=str(output_dir), max_steps=steps, per_device_train_batch_size=batch_examples, learning_rate=learning_rate,
        lr_scheduler_type="cosine", warmup_steps=max(1, steps // 20), weight_decay=0.01, max_grad_norm=1.0, bf16=bf16,
        logging_steps=max(1, min(50, steps // 10)), save_strategy="no", seed=seed, data_seed=seed,
        report_to=logs.check_trackers(report_to), project=logs.PROJECT, run_name="grounding", remove_unused_columns=False,
        dataloader_num_workers=0, ddp_find_unused_parameters=True, use_cpu=not torch.cuda.is_available())
    trainer = GroundingTrainer(model=model, args=arguments, train_dataset=GroundingExamples(rollouts, tokenizer, tasks, copies, seed),
                               data_collator=pack, new_learning_rate=new_learning_rate, checkpoints=checkpoints,
                               callbacks=[CheckpointByTime(Path(checkpoints), checkpoint_minutes)] if checkpoints else [])
    last = store.last_sealed(checkpoints, "checkpoint") if checkpoints else None
    if not last:
        (Path(output_dir) / "grounding.jsonl").unlink(missing_ok=True)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    return trainer.state.log_history


def gathered(model):
    """The model itself, or where FSDP sharded it, one with all its weights on process 0. Every process must call it."""
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return model
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if weights:  # process 0 alone has them
        model = type(model)(model.config)
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
    return model


# ------------------------------------------------------------------------------------------------------------------
# Evaluation on held-out rollouts

@torch.no_grad()
def evaluate(model, tokenizer, rollouts, batch_examples=32):
    """How well the grounded model predicts held-out rollouts, teacher-forced.

    Returns action_accuracy; state_error and state_error_nothing_moves (root mean square of a coordinate, metres).
    """
    model.eval()
    examples = GroundingExamples(rollouts, tokenizer, tasks=("generation",))
    right, squares = [], []
    for start in trange(0, len(examples), batch_examples, desc="evaluate grounding", leave=False):
        part = [examples[i] for i in range(start, min(start + batch_examples, len(examples)))]
        batch = {k: v.to(model.device) for k, v in pack(part).items()}
        out = model(**batch)
        ahead, nexts = batch["predict"][:, 1:], batch["modality"][:, 1:]
        action, state = ahead & (nexts == ACTION), ahead & (nexts == STATE)
        right.append((out.action_logits[:, :-1].argmax(-1) == batch["input_ids"][:, 1:])[action].cpu())
        target, last = batch["states"][:, 1:][state], batch["states"][:, :-1][state]
        squares.append(torch.stack([(out.state_pred[:, :-1][state] - target) ** 2, (last - target) ** 2]).cpu())
    error, still = torch.cat(squares, 1).mean((1, 2)).sqrt().tolist()
    return {"action_accuracy": torch.cat(right).float().mean().item(), "state_error": error, "state_error_nothing_moves": still}
