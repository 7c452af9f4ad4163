"""Whether a language model can be used exactly: asked in seconds, before anything runs.

A small LLM of the same configuration (few layers, random weights) must give the same outputs in
all the ways in which a run uses it. This file knows no world, and nothing of what an LLM knows.
"""

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from safetensors import safe_open
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from data import llm as llm_source
from data.small_llm import WINDOWS, small_model
from model import SEGMENTS, TEXT, KalmForRollouts, KalmOutput
from sequences import Sequences
from tasks import (
    Position,
    make_example,
    pack,
    prompt_ids,
    rollout_positions,
    text_ids,
    text_positions,
)

TOLERANCE = 1e-3  # of the outputs' spread: float32 leaves 3e-4 at most, what is wrong 1e-2
WORD_TOLERANCE = 1e-5  # the same numbers in the same order: a soft cap shows in small logits too
ADVICE = "give another LLM; docs/llms.md lists kinds that are exact"

# ----------------------------------------------------------------------------------------------
# Checks


def check(name: str, goals: Sequence[str], steps: int, keep_layers: int = 0) -> None:
    """Raise ValueError, with the LLM's name and the reason, unless a run can use it exactly.

    name: resolved, see `data.llm.resolve`. goals: texts. steps: actions in a rollout at most.
    keep_layers: layers of the LLM that the run keeps; 0: all.
    """
    config = llm_source.cut(llm_source.read_config(name), keep_layers)
    try:
        check_files(name, config)
        tokenizer = llm_source.load_tokenizer(name)
        length = longest_example(tokenizer, goals, steps)
        check_sizes(tokenizer, config, length)
        check_exact(config, length)
    except ValueError as error:
        raise ValueError(f"--llm {name} ({config.model_type}): {error}; {ADVICE}") from None


def check_encoder(name: str) -> None:
    """Raise ValueError unless a resolved model turns texts into hidden states."""
    try:
        config = llm_source.read_config(name)
        tokenizer = llm_source.load_tokenizer(name)
        if tokenizer.pad_token is None and tokenizer.eos_token is None:
            raise ValueError("its tokenizer has neither a pad nor an end token")
        encoder = small_model(AutoModel, config, length=0)
        ids = torch.ones(2, 5, dtype=torch.long)
        with torch.no_grad():
            hidden = encoder(input_ids=ids, attention_mask=ids).last_hidden_state
        if hidden.shape[:2] != ids.shape:
            raise ValueError("it has no hidden state for each word")
    except Exception as error:
        advice = "give llm, or a model like sentence-transformers/all-MiniLM-L6-v2"
        problem = f"--encoder {name} is no encoder of texts ({in_words(error)}); {advice}"
        raise ValueError(problem) from None


def check_files(name: str, config: PreTrainedConfig) -> None:
    """Raise ValueError for weights that are quantised, or files that are cut off or missing."""
    if llm_source.is_gguf(name):
        return
    if getattr(config, "quantization_config", None):
        raise ValueError("its weights are quantised already, and grounding changes weights")
    files = sorted(Path(name).glob("*.safetensors"))
    for index in Path(name).glob("*.safetensors.index.json"):
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files += [Path(name) / shard for shard in sorted(set(shards))]
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except Exception as error:
            raise ValueError(f"{file.name} is damaged or missing ({in_words(error)})") from None


def longest_example(tokenizer: Tokenizer, goals: Sequence[str], steps: int) -> int:
    """Positions of the longest example: a goal or its explanation, and a rollout of `steps`."""
    longest = max(goals, key=len)
    with_goal = len(prompt_ids(tokenizer, "generation", longest))
    explained = len(prompt_ids(tokenizer, "explanation")) + len(text_ids(tokenizer, longest)) + 1
    return max(with_goal, explained) + 2 * steps + 1


def check_sizes(tokenizer: Tokenizer, config: PreTrainedConfig, length: int) -> None:
    """Raise ValueError for a tokenizer without an end token, or with more tokens than the LLM, or
    an LLM with fewer positions than the longest example.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("its tokenizer has no end token (eos_token), which explanations need")
    embedded = config.get_text_config().vocab_size
    if len(tokenizer) > embedded:
        raise ValueError(f"its tokenizer has {len(tokenizer)} tokens, and the LLM {embedded}")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and positions < length:
        raise ValueError(f"the longest example takes {length} positions, and it has {positions}")


def in_words(error: Exception) -> str:
    """An error as the part of a sentence."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:150]}"


# ----------------------------------------------------------------------------------------------
# Questions: how far outputs are off, as a share of their spread

OBSERVATION, ACTIONS = 4, 6  # of a world that there is not
SIZES = {"observation_dim": OBSERVATION, "num_actions": ACTIONS, "objects": 2}
GOALS = {"a goal in many words": (9, 6), "a goal": (4, 7)}  # and actions of its rollouts
FED = 4  # positions fed one by one
WORDS = torch.arange(21, 301, 7)[None]  # token ids of a text (1, 40)


@dataclass(frozen=True)
class Trial:
    """A small grounded model, its examples, and what it gives for each of their rollouts alone.

    sequences: of two rollouts for each goal, prompt included, which `alone` are the outputs of.
    """

    model: KalmForRollouts
    own_logits: torch.Tensor  # of the LLM for WORDS, before it was wrapped
    examples: list[dict[str, np.ndarray]]
    sequences: list[list[Position]]
    alone: list[KalmOutput]


def begin_trial(llm: PreTrainedModel) -> Trial:
    """Wrap a small LLM, and run all rollouts alone."""
    own_logits = llm(input_ids=WORDS).logits
    model = KalmForRollouts.from_llm(llm, **SIZES).eval()
    rng = np.random.default_rng(0)
    world = SimpleNamespace(observation_dim=OBSERVATION)
    examples = []
    sequences = []
    for goal, steps in GOALS.items():
        records = []
        for count in steps:
            observations = rng.normal(size=(count + 1, OBSERVATION)).astype(np.float32)
            actions = rng.integers(ACTIONS, size=count)
            records.append({"goal": goal, "observations": observations, "actions": actions})
            prompt = text_positions(prompt_ids(letters, "generation", goal))
            sequences.append(prompt + rollout_positions(observations, actions))
        examples.append(make_example("generation", letters, world, records))
    alone = [whole(model, sequence) for sequence in sequences]
    return Trial(model, own_logits, examples, sequences, alone)


def arrays(positions: Sequence[Position]) -> list[torch.Tensor]:
    """input_ids, modality (1, L) and states (1, L, OBSERVATION) of a sequence."""
    nowhere = np.zeros(OBSERVATION, np.float32)
    ids = [int(position.index) for position in positions]
    modality = [position.modality for position in positions]
    states = [nowhere if position.state is None else position.state for position in positions]
    return [torch.tensor(np.array(values))[None] for values in (ids, modality, states)]


def whole(model: KalmForRollouts, positions: Sequence[Position]) -> KalmOutput:
    """The outputs of a sequence that is run at once and alone."""
    return model(*arrays(positions), text_logits=None)


def letters(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
    """A tokenizer for the small LLM: a token each letter."""
    return {"input_ids": [ord(letter) for letter in text]}


def gap(out: KalmOutput, row: int, columns, alone: KalmOutput, alone_columns) -> float:
    """How far outputs at positions of a row are from those of a rollout alone."""
    gaps = []
    for name in ("action_logits", "state_pred", "logits"):
        here = getattr(out, name)[row, columns]
        there = getattr(alone, name)[0, alone_columns]
        gaps.append(distance(here, there, getattr(alone, name).std()))
    return max(gaps)


def distance(here: torch.Tensor, there: torch.Tensor, spread: torch.Tensor) -> float:
    """The largest difference, as a share of a spread; infinite where there is no number."""
    largest = ((here - there).abs().max() / spread).item()
    return largest if math.isfinite(largest) else math.inf


def later_positions(trial: Trial) -> float:
    """A sequence without its last positions, against the whole."""
    shorter = whole(trial.model, trial.sequences[0][:-FED])
    return gap(shorter, 0, slice(None), trial.alone[0], slice(-FED))


def word_logits(trial: Trial) -> float:
    """A text through the grounded model, against the LLM."""
    no_states = torch.zeros(*WORDS.shape, OBSERVATION)
    modality = torch.full_like(WORDS, TEXT)
    logits = trial.model(WORDS, modality, no_states, text_logits=None).logits
    return distance(logits, trial.own_logits, trial.own_logits.std())


def packing(trial: Trial) -> float:
    """All examples in one row, against each rollout alone."""
    batch = pack(trial.examples, row_length=1000)  # the longest first, as they are already
    del batch["predict"]
    out = trial.model(**batch, text_logits=None)
    segments = batch["segments"][0]
    gaps = []
    for number, alone in enumerate(trial.alone):
        example, rollout = divmod(number, 2)
        prompt = segments == example * SEGMENTS
        columns = prompt | (segments == example * SEGMENTS + rollout + 1)
        gaps.append(gap(out, 0, columns, alone, slice(None)))
    return max(gaps)


def caching(trial: Trial) -> float:
    """Left-padded rows that leave the batch and grow by one of two branches, against each alone."""
    model = trial.model
    sequences = Sequences(model, [sequence[:-FED] for sequence in trial.sequences])
    rows = [3, 2, 0]
    sequences.select(torch.tensor(rows))
    gaps = []
    for column in range(-FED, 0):
        right = [model.embed(*arrays([trial.sequences[row][column]])) for row in rows]
        right = torch.cat(right)
        sequences.feed_branches(torch.cat([right.flip(0), right], 1))
        sequences.keep_branch(torch.ones(len(rows), dtype=torch.long), 2)
        for hidden, row in zip(sequences.hidden, rows):
            for name in ("action_logits", "word_logits"):
                here = getattr(model, name)(hidden)
                there = getattr(trial.alone[row], name.replace("word_", ""))
                gaps.append(distance(here, there[0, column], there.std()))
    return max(gaps)


def saving(trial: Trial) -> float:
    """Weights from a folder, against those written. Raises ValueError for one that is lost."""
    with tempfile.TemporaryDirectory() as folder:
        trial.model.save_pretrained(folder)
        again = KalmForRollouts.from_pretrained(folder)
        names = set()
        for file in Path(folder).glob("*.safetensors"):
            with safe_open(file, "pt") as weights:
                names.update(weights.keys())
    loaded = dict(again.named_parameters())
    for name, weight in trial.model.named_parameters():
        if name not in names:  # by which a run that goes on from a checkpoint would miss it
            raise ValueError(f"{name} is written under another name")
        if not torch.equal(loaded[name], weight):
            raise ValueError(f"{name} is another")
    return 0.0


def adapters(trial: Trial) -> float:
    """LoRA that is new, against none; then merged into the weights, against beside them."""
    llm = trial.model.backbone
    model = KalmForRollouts.from_llm(llm, lora_rank=2, **SIZES).eval()
    sequence = trial.sequences[0]
    new = gap(whole(model, sequence), 0, slice(None), trial.alone[0], slice(None))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    beside = whole(model, sequence)
    merged = whole(model.merge_adapters(), sequence)
    return max(new, gap(merged, 0, slice(None), beside, slice(None)))


QUESTIONS: dict[str, Callable[[Trial], float]] = {
    "a later position": later_positions,
    "its output layer alone, for words,": word_logits,
    "packing rollouts in a row": packing,
    "a key-value cache": caching,
    "saving and loading": saving,
    "LoRA": adapters,  # the last, since it changes the LLM
}


@torch.no_grad()
def check_exact(config: PreTrainedConfig, length: int) -> None:
    """Raise ValueError, with the reason, where an LLM of this configuration is not exact.

    length: positions of the longest example.
    """
    if is_recurrent(config):
        raise ValueError(
            "it has recurrent or convolution layers, which mix rollouts packed in a row"
        )
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # of the small LLM nobody needs to hear
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            problem = first_problem(config, length)
    finally:
        transformers.logging.set_verbosity(level)
    if problem:
        raise ValueError(problem + shorter_window(config, length))


def first_problem(config: PreTrainedConfig, length: int) -> str:
    """The first question whose answer is wrong, or an error, in words; "" if there is none."""
    asked = "making it small"
    try:
        llm = small_model(AutoModelForCausalLM, config, length)
        asked = "running it"
        trial = begin_trial(llm)
        for asked, question in QUESTIONS.items():
            share = question(trial)
            tolerance = WORD_TOLERANCE if question is word_logits else TOLERANCE
            if share > tolerance:
                return f"{asked} changes its outputs, by {share:.2g} of their spread"
    except Exception as error:  # whatever odd models raise
        return f"{asked} fails ({in_words(error)})"
    return ""


def is_recurrent(config: PreTrainedConfig) -> bool:
    """Whether a layer keeps a state of its own in place of keys and values, as Mamba's do."""
    try:
        layers = DynamicCache(config=config).layers
    except Exception:  # then the questions find out
        return False
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def shorter_window(config: PreTrainedConfig, length: int) -> str:
    """Says of an LLM whose attention reaches less far than an example that it does, else ""."""
    text = config.get_text_config()
    for name in WINDOWS:
        window = getattr(text, name, None)
        if isinstance(window, int) and 0 < window < length:
            return f"; its {name} is {window}, and the longest example takes {length} positions"
    return ""
