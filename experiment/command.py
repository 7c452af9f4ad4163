"""What a command line leaves open: the settings of the run, defaults that follow from others, and
checks that need several settings at once.

This file knows what goes together, and nothing of what stages do.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState

import env
from data import llm
from data.grounded import adapter_folder
from experiment import launch, probe
from experiment.folder import Manifest, read_json, sha256
from experiment.settings import absolute, at_least, setting
from ground import TRAINING_SETTINGS, GroundingArguments
from rl import DT, LearnArguments
from rollout import ImagineArguments

FITS = {"env": env.DEFAULT_WORLD, "llm": llm.DEFAULT}  # the released adapter
LAPTOP_STEPS = 3300  # of grounding at a laptop's scales, where the released adapter does not fit
RENAMED = {
    "ground_steps": "max_steps", "adapter_steps": "max_steps",
    "batch_examples": "per_device_train_batch_size", "checkpoint_minutes": "save_steps",
}  # fmt: skip


@dataclass
class RunArguments:
    """The run, beside --output_dir (or --run) and --seed."""

    stage: list[str] = setting(["all"], "one or more of the stages, all of them, or act")
    goal: str = setting("", "for --stage act: a sentence to act on, once")
    scale: str = setting("gpu" if torch.cuda.is_available() else "cpu", "the dial of defaults")
    config: str = setting("", "YAML or JSON file of settings; the command line wins")
    env: str = setting(env.DEFAULT_WORLD, "the world: a name in worlds/ or path/to/file.py:Class")
    llm: str = setting(llm.DEFAULT, "smollm2, tiny, a folder, a .gguf file or a Hub name")
    processes: int = setting(0, "workers; 0: one a GPU, or one a core if memory allows")
    dry_run: bool = setting(False, "print the plan and the memory it takes, write nothing")
    force: bool = setting(False, "redo the stages even if nothing changed")
    traceback: bool = setting(False, "show the traceback of an error")

    def __post_init__(self):
        at_least(0, self, "processes")
        self.llm = absolute(self.llm, llm.DEFAULT, llm.TINY)
        file, colon, name = self.env.rpartition(":")
        self.env = absolute(file) + colon + name
        acts = self.stage == ["act"]
        if bool(self.goal.strip()) != acts or ("act" in self.stage and not acts):
            raise ValueError(
                "--stage act stands alone and takes a --goal in words, no other stage does: "
                '--stage act --goal "put red left of blue"'
            )

    def names(self, known: Mapping) -> list[str]:
        """The stages to run, in the order of the known ones, of which `act` is the last."""
        allowed = (*known, "all")
        for name in self.stage:
            if name not in allowed:
                raise ValueError(f"unknown stage {name!r}; stages are {', '.join(allowed)}")
        if "all" in self.stage:
            return list(known)[:-1]
        return [name for name in known if name in self.stage]


def defaults_of(scales: Mapping[str, dict], given: Mapping[str, str]) -> dict:
    """The defaults of a command that gives these settings: of its scale, and what follows.

    On a laptop the released adapter is taken unless the run has trained before, or the command asks
    for it: by naming the stage, by a setting of training, or by data, a world or a language model
    that the adapter does not fit. Where one is taken, nothing is trained but for steps given.
    """
    scale = given.get("scale", RunArguments.scale)
    if scale not in scales:
        raise ValueError(f"unknown scale {scale!r}; scales are {', '.join(scales)}")
    defaults = {"scale": scale, **scales[scale]}
    language_model = given.get("llm", defaults.get("llm"))
    is_large = language_model != llm.TINY
    defaults["bf16"] = is_large and bf16_is_fast()
    processes = int(os.environ.get("WORLD_SIZE", "1")) // launch.cpu_workers()
    in_all = defaults.get("per_device_train_batch_size", 32)  # of a scale, on all devices
    defaults["per_device_train_batch_size"] = max(1, in_all // max(1, processes))
    defaults["fp16"] = is_large and torch.cuda.is_available() and not defaults["bf16"]
    if defaults.get("adapter") == "released":
        named = {name for name, value in given.items() if value != FITS.get(name)}
        asks_for_training = {"data", "env", "llm", *TRAINING_SETTINGS} - {"adapter"} & named
        names_it = "ground" in given.get("stage", "").split()
        if names_it or asks_for_training or has_trained(given):
            defaults |= {"adapter": "none", "max_steps": LAPTOP_STEPS}
    takes_adapter = given.get("adapter", defaults.get("adapter", "none")) != "none"
    if takes_adapter or "num_train_epochs" in given:
        defaults.pop("max_steps", None)
    if takes_adapter and not {"max_steps", "num_train_epochs"} & set(given):
        defaults["num_train_epochs"] = 0.0
    return defaults


def has_trained(given: Mapping[str, str]) -> bool:
    """Whether the run of a command has grounded its language model itself."""
    run = Path(given.get("output_dir", GroundingArguments.output_dir))
    settings = Manifest(run).stages.get("ground", {}).get("settings", {})
    return settings.get("adapter") == "none"


def hashes(run: RunArguments) -> dict[str, str]:
    """Of the files that a command names its world and its language model by, "" where it names
    none.
    """
    world = Path(run.env.rpartition(":")[0])
    weights = Path(run.llm)
    return {
        "world_file": sha256(world) if world.suffix == ".py" else "",
        "llm_weights": llm.fingerprint(run.llm) if weights.exists() else "",
    }


def dtype_of(ground: GroundingArguments) -> torch.dtype:
    """What the language model computes in."""
    if ground.bf16:
        return torch.bfloat16
    return torch.float16 if ground.fp16 else torch.float32


def bf16_is_fast() -> bool:
    """Whether this machine multiplies bfloat16 faster than float32: GPUs since Ampere, Intel's,
    CPUs with AVX512-BF16 or AMX.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator().type == "xpu"
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def check(
    names: Sequence[str],
    world: env.World,
    run: RunArguments,
    ground: GroundingArguments,
    imagine: ImagineArguments,
    learn: LearnArguments,
    given: Mapping[str, str],
) -> None:
    """Raise ValueError for what two stages' settings or the LLM, fetched here, do not allow."""
    if not imagine.self_check and (learn.keep in ("explained", "both") or learn.dynamics_tolerance):
        filters = f"--keep {learn.keep} with --dynamics_tolerance {learn.dynamics_tolerance}"
        raise ValueError(f"{filters} needs --self_check true")
    if ground.load_in_4bit and llm.is_gguf(run.llm):
        raise ValueError("--load_in_4bit takes a folder or a Hub name as --llm, no GGUF file")
    if "ground" in names and ground.adapter != "none":
        check_adapter(ground, world, given)
    if learn.encoder != "llm":
        probe.check_encoder(llm.resolve(learn.encoder, "--encoder"))
    if run.dry_run and llm.must_be_fetched(run.llm):
        return
    path = llm.resolve(run.llm)
    llm.check_layers(path, ground.keep_layers, "--keep_layers")
    llm.check_layers(path, ground.fresh_layers, "--fresh_layers", ground.keep_layers)
    llm.check_layers(path, learn.encoder_layers, "--encoder_layers")


def check_llm(
    run: RunArguments,
    ground: GroundingArguments,
    imagine: ImagineArguments,
    learn: LearnArguments,
    world: env.World,
    todo: Sequence[str],
) -> None:
    """Raise ValueError if a stage that is to be done needs a language model that cannot be used
    exactly. Takes seconds.
    """
    learns_dt = "learn" in todo and DT in learn.method_list
    is_needed = "ground" in todo or "imagine" in todo or learns_dt
    is_nowhere = run.dry_run and llm.must_be_fetched(run.llm)
    is_asked = is_needed and PartialState().is_main_process
    if run.llm == llm.TINY or is_nowhere or not is_asked:
        return
    texts = []
    for goals in imagine.novel_goals_of(world, ground.seed).values():
        texts += [goal.text for goal in goals]
    # It has three positions an action, where rollouts have two.
    steps = world.max_steps * 3 // 2 if learns_dt else world.max_steps
    probe.check(llm.resolve(run.llm), texts, steps, ground.keep_layers)


def check_adapter(settings: GroundingArguments, world: env.World, given: Mapping[str, str]) -> None:
    """Raise ValueError if the trained adapter is none, of a world or LLM of other sizes, or of
    another LoRA than the one given.
    """
    config = read_json(adapter_folder(settings.adapter) / "config.json")
    theirs = {size: config.get(size) for size in ("observation_dim", "num_actions")}
    ours = {size: getattr(world, size) for size in theirs}
    if settings.keep_layers:
        theirs["keep_layers"] = config["backbone_config"].get("num_hidden_layers")
        ours["keep_layers"] = settings.keep_layers
    for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"):
        if name in given:
            theirs[name] = config[name]
            ours[name] = getattr(settings, name)
    for size, number in theirs.items():
        if number != ours[size]:
            made = f"--adapter {settings.adapter} was made with {size} {number}"
            raise ValueError(
                f"{made}, and this command has {ours[size]}; --adapter none trains one"
            )
