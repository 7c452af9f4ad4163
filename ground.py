"""Grounding: supervised fine-tuning of the LLM on the offline rollouts (paper, section 4.1).

The Hugging Face Trainer does the work, on packed examples of `tasks`, with its own settings and
switches; its evaluation predicts held-out rollouts. This file knows no policies and no particular
world.
"""

import collections
import copy
import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tqdm import trange
from transformers import PreTrainedTokenizerBase as Tokenizer

import env
from data import finite
from data.grounded import adapter_hash
from experiment import folder
from experiment.launch import cpu_workers
from experiment.logs import LogLines, last_checkpoint
from experiment.settings import absolute, at_least, setting
from model import ACTION, MODALITIES, PAD, STATE, TASKS, KalmForRollouts, is_new, weighted_sum
from tasks import GroundingExamples, pack

# ----------------------------------------------------------------------------------------------
# Settings


@dataclass
class GroundingArguments(transformers.TrainingArguments):
    """Grounding. All other settings of transformers.TrainingArguments are accepted."""

    output_dir: str = setting("runs/kalm", "the run's folder", aliases=["--run"])
    keep_layers: int = setting(6, "first layers of the LLM to keep; 0: all")
    fresh_layers: int = setting(0, "so many of them, the last, start from random weights")
    random_weights: bool = setting(False, "forget the LLM's pre-trained weights first")
    lora_rank: int = setting(64, "of LoRA; 0: tune all weights")
    lora_alpha: int = setting(0, "alpha / rank scales what LoRA adds; 0: twice the rank")
    lora_dropout: float = setting(0.0, "of the adapters' inputs")
    lora_targets: str = setting("all-linear", "which layers get adapters: names with commas")
    load_in_4bit: bool = setting(False, "the LLM under LoRA in 4 bits (needs bitsandbytes)")
    adapter: str = setting("none", "to start from: released, a folder, or none")
    tasks: str = setting(",".join(TASKS[:4]), "to train on; one more: " + TASKS[4])
    renamed_copies: int = setting(1, "times the data come in a pass, then under a symmetry")
    embedding_scale: float = setting(7.0, "size of new embeddings at the start; 1: as tokens'")
    new_learning_rate: float = setting(1.5e-3, "of LoRA, embeddings and heads")

    learning_rate: float = setting(6e-4, "of the LLM's own weights")
    max_steps: int = setting(-1, "gradient steps; -1: as num_train_epochs says")
    num_train_epochs: float = setting(3.0, "passes over the examples; 0: no training")
    per_device_train_batch_size: int = setting(32, "examples a step")
    per_device_eval_batch_size: int = setting(32, "the same for evaluation")
    lr_scheduler_type: str = setting("cosine", "of both learning rates")
    warmup_steps: float = setting(0.05, "of rising learning rates; below 1: a share of all")
    weight_decay: float = setting(0.01, "of AdamW")
    adam_beta2: float = setting(0.98, "of AdamW")
    logging_steps: float = setting(50, "between entries of the log")
    eval_strategy: str = setting("steps", "when to measure on held-out rollouts")
    eval_steps: float = setting(0.25, "between measurements; below 1: a share of all steps")
    save_steps: float = setting(100, "from checkpoint to checkpoint")
    save_total_limit: int = setting(1, "checkpoints to keep; all go when grounding is done")
    report_to: str = setting("none", "trackers: tensorboard, wandb, trackio, ...")
    seed: int = setting(0, "of everything random")
    ddp_timeout: int = setting(86400, "s that processes wait for one that works alone")
    ddp_find_unused_parameters: bool = setting(True, "a batch may lack a modality")

    def __post_init__(self):
        self.data_seed = self.seed if self.data_seed is None else self.data_seed
        self.run_name = self.run_name or "grounding"
        self.adapter = absolute(self.adapter, "none", "released")
        at_least(1, self, "per_device_train_batch_size")
        each = self.per_device_train_batch_size // cpu_workers()  # which are one device together
        self.per_device_train_batch_size = max(1, each)
        self.remove_unused_columns = False  # examples are what the model takes
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.deepspeed:
            check_deepspeed(self.deepspeed)
        super().__post_init__()
        self._n_gpu = min(self.n_gpu, 1)  # without a launcher one GPU works, not DataParallel
        at_least(0, self, "keep_layers", "fresh_layers", "lora_rank", "num_train_epochs", "seed")
        at_least(0, self, "learning_rate", "new_learning_rate", "embedding_scale")
        at_least(1, self, "renamed_copies")
        tasks = self.task_names
        if not set(tasks) <= set(TASKS) or len(set(tasks)) < len(tasks):
            raise ValueError(f"--tasks takes {', '.join(TASKS)}, each once, got {self.tasks!r}")
        forgets = self.fresh_layers or self.random_weights
        if forgets and (self.lora_rank or self.adapter != "none"):
            raise ValueError(
                "an adapter adds to what the LLM knows; with --fresh_layers or --random_weights "
                "give --lora_rank 0 and --adapter none"
            )
        if self.load_in_4bit and not self.adds_lora:
            raise ValueError("--load_in_4bit needs LoRA beside the weights: --lora_rank 64, say")
        if self.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("--load_in_4bit needs the package: pip install bitsandbytes")
        inside = Path(self.output_dir).resolve() / "grounded"
        if Path(self.adapter).resolve().is_relative_to(inside):
            replaced = f"--adapter {self.adapter}: ground would replace {inside}"
            raise ValueError(f"{replaced}; copy it elsewhere, or give another --output_dir")

    @property
    def task_names(self) -> list[str]:
        """The tasks as a list."""
        return self.tasks.split(",")

    @property
    def adds_lora(self) -> bool:
        """Whether the LLM's own weights stay as they are, with adapters beside them."""
        return self.lora_rank > 0 or self.adapter != "none"

    @property
    def trains(self) -> bool:
        """Whether there is training to do."""
        return self.max_steps > 0 or self.num_train_epochs > 0

    def recorded(self) -> dict:
        """What the result follows from: without training, where the model came from alone."""
        if not self.trains and self.adapter != "none":
            names = ("adapter", "keep_layers", "max_steps", "num_train_epochs", "load_in_4bit")
            return {name: getattr(self, name) for name in names}
        values = self.to_dict()
        values["per_device_train_batch_size"] *= cpu_workers()
        if self.data_seed == self.seed:
            del values["data_seed"]  # which the run records
        del values["num_train_epochs" if self.max_steps > 0 else "max_steps"]  # says nothing
        recorded = {name: values.get(name) for name in TRAINING_SETTINGS}
        return {name: value for name, value in recorded.items() if value not in ("", None)}

    def inputs(self) -> dict[str, str]:
        """An adapter counts by its weights."""
        return {"adapter": adapter_hash(self.adapter)} if self.adapter != "none" else {}


def check_deepspeed(path: str) -> None:
    """Raise ValueError for a configuration of DeepSpeed that grounding cannot use."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("--deepspeed needs the package: pip install deepspeed")
    stage = folder.read_json(Path(path)).get("zero_optimization", {}).get("stage", 0)
    if stage == 3:  # it takes the LLM's weights apart before ours are beside them
        raise ValueError(f"--deepspeed {path}: give stage 1 or 2 of ZeRO, or use configs/fsdp.yaml")


# What the result follows from; other settings say where and how to compute, save and show.
TRAINING_SETTINGS = """keep_layers fresh_layers random_weights lora_rank lora_alpha lora_dropout
lora_targets load_in_4bit adapter tasks renamed_copies embedding_scale learning_rate
new_learning_rate max_steps num_train_epochs lr_scheduler_type lr_scheduler_kwargs warmup_steps
per_device_train_batch_size optim gradient_accumulation_steps optim_args optim_target_modules
weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm neftune_noise_alpha
dataloader_drop_last auto_find_batch_size data_seed""".split()

# ----------------------------------------------------------------------------------------------
# Training


class GroundingTrainer(transformers.Trainer):
    """Trainer with a learning rate of its own for new layers, losses by task and modality in its
    log, figures of held-out rollouts as its evaluation, and no step on a loss that is NaN.
    """

    def __init__(self, *args, world: env.World, measure, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            if plugin.mixed_precision_policy:
                # It would round the states, which are the model's input, as it rounds weights.
                exact = {"cast_forward_inputs": False}
                policy = dataclasses.replace(plugin.mixed_precision_policy, **exact)
                plugin.mixed_precision_policy = policy
        self.world = world
        self.measure = measure
        self.loss_parts = collections.defaultdict(list)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The optimizer of --optim, with two learning rates."""
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        options["weight_decay"] = self.args.weight_decay
        new, old = [], []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                (new if is_new(name) else old).append(parameter)
        groups = [{"params": new, "lr": self.args.new_learning_rate}]
        if old:
            groups.append({"params": old, "lr": self.args.learning_rate})
        self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def _run_epoch(self, *args, **kwargs):
        # From the checkpoint of the last step the Trainer would go one step further.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):  # noqa: ANN201
        """The model's own loss; its parts are kept for the log."""
        with self.accelerator.autocast():  # FSDP's own rounds weights alone
            output = model(**inputs)

        def tasks_of(row):
            here = inputs["modality"][row] != PAD
            return ", ".join(TASKS[task] for task in inputs["task"][row][here].unique())

        step = f"grounding, step {self.state.global_step + 1}"
        rows = (inputs["states"], output.state_pred, output.action_logits)
        finite.check(step, {"loss": output.loss}, rows, about=tasks_of)
        means = self.means_of_all(output.losses, inputs)
        output.loss = weighted_sum(means)
        parts = {f"{name}_loss": loss for name, loss in means.items()}
        parts |= {f"{task}_loss": loss for task, loss in zip(TASKS, output.task_losses)}
        for name, loss in parts.items():
            self.loss_parts[name].append(loss.detach())
        return (output.loss, output) if return_outputs else output.loss

    def means_of_all(self, means: dict, inputs: dict) -> dict[str, torch.Tensor]:
        """Losses of this process so weighted that their mean over processes is the mean over all
        positions, as if one process had them all. The Trainer takes that mean.
        """
        counts = []
        for kind in MODALITIES.values():
            is_predicted = inputs["predict"][:, 1:] & (inputs["modality"][:, 1:] == kind)
            counts.append(is_predicted.sum().float())
        of_all = self.accelerator.reduce(torch.stack(counts), "mean").clamp(min=1e-9)
        shares = zip(means.items(), counts, of_all)
        return {name: loss * (count / mean) for (name, loss), count, mean in shares}

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        step = f"grounding, step {self.state.global_step + 1}"
        finite.check(step, {"norm of the gradient": torch.as_tensor(norm)})  # DeepSpeed's: a float
        return norm

    def log(self, logs: dict, *args, **kwargs) -> None:
        """Add the parts of the loss to an entry that has the loss."""
        if "loss" in logs:
            for name, values in self.loss_parts.items():
                everywhere = self.accelerator.gather(torch.stack(values))
                values = everywhere.view(self.args.world_size, -1).mean(0)
                present = (values != 0).sum().clamp(min=1)  # 0: the batch has no such position
                logs[name] = round((values.sum() / present).item(), 4)
            self.loss_parts.clear()
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict:
        """Figures of the held-out rollouts, the same whatever the number of processes."""
        rollouts = eval_dataset or self.eval_dataset
        batch_size = self.args.per_device_eval_batch_size
        with self.accelerator.autocast():
            figures = self.measure(
                self.model, self.processing_class, self.world, rollouts, batch_size
            )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(metrics)
        report = (self.args, self.state, self.control, metrics)
        self.control = self.callback_handler.on_evaluate(*report)
        return metrics


def train(
    model: KalmForRollouts,
    tokenizer: Tokenizer,
    world: env.World,
    rollouts: Sequence[dict],
    held_out: Sequence[dict],
    settings: GroundingArguments,
    work: Path,
    log_path: Path,
    measure: Callable[..., dict] | None = None,
) -> list[dict]:
    """Ground `model` in rollout records, in place. Returns the Trainer's log history. measure: of
    the figures at its eval_steps, called as `held_out_figures`, which is the default.

    Works alone and under a launcher, where FSDP leaves the model in shards (see `gathered`). work:
    a folder for checkpoints; what an earlier call left there is where this one goes on.
    """
    # What the LLM knows of words that the data lack stays as it was.
    model.get_input_embeddings().weight.requires_grad_(False)
    arguments = copy.copy(settings)
    arguments.output_dir = str(work)
    arguments.push_to_hub = False  # the finished model is uploaded, not its checkpoints
    tasks, copies = settings.task_names, settings.renamed_copies
    trainer = GroundingTrainer(
        model=model,
        args=arguments,
        train_dataset=GroundingExamples(rollouts, tokenizer, world, tasks, copies, settings.seed),
        eval_dataset=held_out,
        data_collator=pack,
        processing_class=tokenizer,
        callbacks=[LogLines(log_path)],
        world=world,
        measure=measure or held_out_figures,
    )
    checkpoint = settings.resume_from_checkpoint or last_checkpoint(work)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer.state.log_history


@torch.no_grad()
def held_out_figures(
    model: KalmForRollouts, tokenizer: Tokenizer, world: env.World, rollouts, batch_size: int = 32
) -> dict[str, float]:
    """How well the grounded model predicts held-out rollouts, teacher-forced.

    Returns action_accuracy; state_error and state_error_nothing_moves (root mean square of a
    coordinate, in the world's units).
    """
    model.eval()
    examples = GroundingExamples(rollouts, tokenizer, world, tasks=("generation",))
    right = []
    squares = []
    for start in trange(0, len(examples), batch_size, desc="evaluate grounding", leave=False):
        numbers = range(start, min(start + batch_size, len(examples)))
        batch = pack([examples[number] for number in numbers])
        batch = {key: value.to(model.device) for key, value in batch.items()}
        out = model(**batch)
        ahead = batch["predict"][:, 1:]
        action = ahead & (batch["modality"][:, 1:] == ACTION)
        state = ahead & (batch["modality"][:, 1:] == STATE)
        chosen = out.action_logits[:, :-1].argmax(-1)
        right.append((chosen == batch["input_ids"][:, 1:])[action].cpu())
        target = batch["states"][:, 1:][state]
        last = batch["states"][:, :-1][state]
        error = (out.state_pred[:, :-1][state] - target) ** 2
        squares.append(torch.stack([error, (last - target) ** 2]).cpu())
    error, still = torch.cat(squares, 1).mean((1, 2)).sqrt().tolist()
    accuracy = torch.cat(right).float().mean().item()
    names = ("action_accuracy", "state_error", "state_error_nothing_moves")
    return dict(zip(names, (accuracy, error, still)))
