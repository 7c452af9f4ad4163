"""What every stage may ask of its run: the world, random streams, models and rollouts by name.

This file knows where things lie in a run's folder, and nothing of what the stages do with them.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate import PartialState
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import env
from data import grounded, llm
from data.rollouts import read_rollouts
from data.transitions import GoalTable
from experiment import folder, restate, words
from model import KalmForRollouts
from tasks import PROMPTS


@dataclass(frozen=True)
class Run:
    """A run's folder and what all of its stages share."""

    folder: Path
    world: env.World
    llm: str  # the language model as the command names it
    seed: int
    dtype: torch.dtype  # of the language model's matrix products
    trackers: list[str]

    def rng(self, *numbers: int) -> np.random.Generator:
        """A random stream of its own for each use."""
        return np.random.default_rng([self.seed, *numbers])

    def say(self, text: str) -> None:
        """Print on the main process alone."""
        if PartialState().is_main_process:
            print(text, flush=True)

    def recorded(self, stage: str) -> dict:
        """The settings that a finished stage had."""
        return folder.Manifest(self.folder).stages[stage]["settings"]

    def figures(self) -> dict[str, dict]:
        """What earlier stages measured: quality, grounding, words."""
        grounding = folder.read_json(self.folder / "grounded" / "metrics.json")
        del grounding["log"]
        figures = {"quality": folder.read_json(self.folder / "quality.json")}
        words = folder.read_json(self.folder / "words.json")
        return {**figures, "grounding": grounding, "words": words}

    # Models

    def autocast(self) -> torch.autocast:
        """The context in which the language model computes."""
        enabled = self.dtype != torch.float32
        return torch.autocast(PartialState().device.type, self.dtype, enabled=enabled)

    def load_llm(self, keep_layers: int, **options) -> tuple[PreTrainedModel, Tokenizer]:
        """The language model untouched, and its tokenizer. options: dtype and in_4bit."""
        texts = [*self.world.vocabulary(), *PROMPTS.values()]
        return llm.load(llm.resolve(self.llm), keep_layers, self.seed, texts, **options)

    def load_llm_to_train(self, settings) -> tuple[PreTrainedModel, Tokenizer]:
        """The same, to be wrapped and trained as `ground.GroundingArguments` say."""
        dtype = self.dtype if settings.adds_lora else torch.float32  # what is trained stays float32
        options = {"dtype": dtype, "in_4bit": settings.load_in_4bit}
        return self.load_llm(settings.keep_layers, **options)

    def llm_without_weights(self, keep_layers: int) -> tuple[PreTrainedConfig, Tokenizer]:
        """The configuration of the language model, cut, and its tokenizer."""
        name = llm.resolve(self.llm)
        if name == llm.TINY:
            model, tokenizer = self.load_llm(keep_layers)
            return model.config, tokenizer
        return llm.cut(llm.read_config(name), keep_layers), llm.load_tokenizer(name)

    def load_encoder(self, name: str, layers: int) -> tuple[torch.nn.Module, Tokenizer]:
        """A frozen encoder of goal texts: layers of the language model for "llm", or another."""
        if name == "llm":
            language_model, tokenizer = self.load_llm(layers)
            encoder = language_model.base_model
        else:
            where = llm.source(name)
            encoder = transformers.AutoModel.from_pretrained(**where, dtype=torch.float32)
            tokenizer = llm.load_tokenizer(name)
        return encoder.to(PartialState().device), tokenizer

    def load_grounded(
        self, name: str = "grounded", kind: type[KalmForRollouts] = KalmForRollouts
    ) -> tuple[KalmForRollouts, Tokenizer]:
        """The grounded model, or another in the run's folder, on this process's device, and its
        tokenizer.
        """
        in_4bit = self.recorded("ground")["load_in_4bit"]
        how = (self.world, self.dtype, in_4bit, kind)
        model, tokenizer = grounded.load_grounded(self.folder / name, *how)
        # Products of few rows round by where weights lie in memory, and one process maps the file
        # where several copy it: in copies all lie alike.
        for parameter in model.parameters():
            if not in_4bit:
                parameter.data = parameter.data.clone()
        return model.to(PartialState().device), tokenizer

    def goal_table(
        self, texts: Sequence[str], encoder: str, layers: int, shared: bool = False
    ) -> GoalTable:
        """The policies' goal encodings, with those of more texts by the encoder that they have.

        shared: all processes call this with the same, and each encodes a part.
        """
        table = GoalTable.load(self.folder / "policies" / "goals.safetensors")
        if all(text in table.index for text in texts):
            return table
        with self.autocast():
            return table.with_texts(texts, *self.load_encoder(encoder, layers), shared)

    # Rollouts and goals

    def real_rollouts(self) -> tuple[list[dict], list[dict]]:
        """(training, held-out) rollouts: the last twentieth is held out, to measure grounding."""
        path = self.folder / "rollouts" / "real"
        records = read_rollouts(path, self.world)
        held_out = max(2, min(1200, len(records) // 20))
        if len(records) <= held_out:
            few = f"{path} has {len(records)} rollouts, and {held_out} are held out"
            raise ValueError(f"{few}; collect more (--train_goals)")
        return records[:-held_out], records[-held_out:]

    def novel_goals(self) -> dict[str, list[env.Goal]]:
        """The novel goals that were imagined for, by level."""
        return env.by_level(env.read_goals(self.folder / "goals.jsonl", self.world))

    def imagined_rollouts(self) -> dict[str, list[dict]]:
        """All imagined rollouts by level."""
        found = {}
        for level in self.novel_goals():
            if level != env.WORDS:
                found[level] = read_rollouts(self.folder / "rollouts" / level, self.world)
        return found

    def heard(self, texts: Sequence[str], restates: bool) -> dict[str, str]:
        """What agents hear instead of texts: where the world has a lexicon, known words for new
        ones, if the LLM is to find them. Texts that are heard as they are have no entry.
        """
        lexicon = getattr(self.world, "lexicon", None) if restates else None
        new = set()
        for text in texts if lexicon else []:
            new.update(place[1] for place in lexicon.places(text))
        if not new:
            return {}
        grounding = self.recorded("ground")
        options = {"dtype": self.dtype, "in_4bit": grounding.get("load_in_4bit", False)}
        language_model, tokenizer = self.load_llm(0, **options)
        if grounding.get("random_weights"):  # knows nothing then either
            torch.manual_seed(self.seed)
            language_model = transformers.AutoModelForCausalLM.from_config(language_model.config)
        language_model.eval().to(PartialState().device)
        of_words = restate.meanings(sorted(new), lexicon, language_model, tokenizer)
        said_again = {text: restate.restate(text, lexicon, of_words) for text in texts}
        return {text: said for text, said in said_again.items() if said != text}

    def heard_before(self) -> dict[str, str]:
        """What `heard` has told the stage imagine."""
        return folder.read_json(self.folder / "heard.json")

    def word_questions(self, imagining: Mapping) -> list[words.Question]:
        """What first actions are looked at for. imagining: its settings."""
        count = 2 * imagining["novel_goals"]  # a first action costs little
        return words.questions(self.world, imagining["split"], self.seed, count)

    def goals_to_evaluate(self, count: int) -> dict[str, list[env.Goal]]:
        """count judged goals a level, trained and novel ones; few are repeated in turn. Of level
        words half as many, as agents hear them: of these, first actions tell more than success.
        """
        real, _ = self.real_rollouts()
        by_text = {}
        for record in real:
            by_text[record["goal"]] = env.goal_of(record)
        trained = list(by_text.values())
        order = self.rng(5).permutation(len(trained))[:count]
        candidates = {"offline": [trained[row] for row in order], **self.novel_goals()}
        chosen = {}
        for level, goals in candidates.items():
            judged = [goal for goal in goals if goal.kind != env.UNJUDGED]
            wanted = (count + 1) // 2 if level == env.WORDS else count
            if judged:
                chosen[level] = list(itertools.islice(itertools.cycle(judged), wanted))
        if env.WORDS in chosen:
            chosen[env.WORDS] = words.as_heard(chosen[env.WORDS], self.heard_before())
        return chosen
