"""Imagined rollouts: the sampling loop over the grounded LLM, and rounds of imagining.

The loop reads like the paper's (section 4.2): from a start state and a goal the model writes an
action, the state it expects, the next action... Where physics answers instead of the model's own
expectation, the same loop acts in the world. This file knows no training and no particular world.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

import env
from data import finite
from data.rollouts import read_rollouts, write_rollouts
from data.sources import is_wanted
from experiment import folder
from experiment.settings import absolute, at_least, setting
from model import ACTION, PAD, SEGMENTS, STATE, TEXT, KalmForRollouts
from tasks import PROMPTS, Tokenizer, make_example, pack, prompt_ids, text_ids, text_positions
from tasks import rollout_positions as positions_of

# ----------------------------------------------------------------------------------------------
# Sequences behind a key-value cache


class Sequences:
    """Sequences of positions, one a row, that grow together behind a key-value cache.

    out: the model's output at the last position of each row.
    """

    def __init__(self, model: KalmForRollouts, prompts: Sequence[list], text_logits: int = 0):
        """Prefill: run ragged prompts, lists of `tasks.Position`, left-padded."""
        self.model, self.text_logits = model, text_logits
        shape = len(prompts), max(map(len, prompts))
        ids = np.zeros(shape, np.int64)
        modality = np.full(shape, PAD)
        states = np.zeros((*shape, model.config.observation_dim), np.float32)
        for row, prompt in enumerate(prompts):
            for column, position in enumerate(prompt, start=shape[1] - len(prompt)):
                ids[row, column] = position.index
                modality[row, column] = position.modality
                if position.state is not None:
                    states[row, column] = position.state
        arrays = [torch.as_tensor(array, device=model.device) for array in (ids, modality, states)]
        ids, modality, states = arrays
        self.mask = (modality != PAD).long()
        position_ids = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.next_position = position_ids[:, -1] + 1
        self._run(ids, modality, states, position_ids, cache=None)

    def __len__(self):
        return len(self.mask)

    def feed(self, modality: int, index: torch.Tensor, states: torch.Tensor) -> None:
        """Append one position a row: a token, action or state. index: (B,); states: (B, D)."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self), 1)], 1)
        kind = torch.full_like(index, modality)[:, None]
        position_ids = self.next_position[:, None]
        self._run(index[:, None], kind, states[:, None], position_ids, self.cache)
        self.next_position = self.next_position + 1

    def repeat(self, count: int) -> None:
        """Let each row stand count times, one after the other."""
        if count > 1:
            self.cache.batch_repeat_interleave(count)
            self.mask = self.mask.repeat_interleave(count, 0)
            self.next_position = self.next_position.repeat_interleave(count, 0)

    def select(self, rows: torch.Tensor) -> None:
        """Go on with some of the rows alone."""
        self.cache.batch_select_indices(rows)
        self.mask, self.next_position = self.mask[rows], self.next_position[rows]

    def _run(self, ids, modality, states, position_ids, cache):
        options = {"attention_mask": self.mask, "position_ids": position_ids, "cache": cache}
        options |= {"use_cache": True, "text_logits": self.text_logits}
        self.out = self.model(ids, modality, states, **options)
        self.cache = self.out.cache


# ----------------------------------------------------------------------------------------------
# Imagining and acting


def sample_actions(
    logits: torch.Tensor, temperature: float, generator: torch.Generator, count: int = 1
) -> torch.Tensor:
    """count different actions (B, count) from logits (B, num_actions): the best at temperature
    0.
    """
    if temperature == 0:
        return logits.topk(count).indices
    weights = (logits.float() / temperature).softmax(-1).clamp(min=1e-9).cpu()
    return torch.multinomial(weights, count, generator=generator).to(logits.device)


def best_candidates(
    world: env.World, goals, obs: np.ndarray, nexts: np.ndarray, actions: np.ndarray
) -> np.ndarray:
    """Which of the actions tried in each row should lead nearest to its goal, and at best to it.

    goals: (B, ...) encoded; obs: (B, D); nexts: (B * count, D), imagined; actions: (B, count).
    Returns indices (B,) into nexts.
    """
    count = actions.shape[1]
    goals, obs = np.repeat(goals, count, 0), np.repeat(obs, count, 0)
    met = world.success(goals, obs, nexts, actions.reshape(-1), imagined=True)
    distance = world.potential(goals, nexts) - 1e6 * met
    return distance.reshape(-1, count).argmin(1) + count * np.arange(len(actions))


def imagine_step(
    sequences: Sequences, world: env.World, goals, obs: torch.Tensor, actions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take actions in mind, (b, count) tried in each row, and go on with the best of each.

    goals: (b, ...) encoded; obs: (b, D). Returns those actions (b,) and the states that the model
    expects after them (b, D).
    """
    count = actions.shape[1]
    sequences.repeat(count)
    sequences.feed(ACTION, actions.flatten(), obs.repeat_interleave(count, 0))
    expected = sequences.out.state_pred[:, -1]
    if count == 1:
        return actions[:, 0], expected
    arrays = [tensor.cpu().numpy() for tensor in (obs, expected, actions)]
    best = torch.as_tensor(best_candidates(world, goals, *arrays), device=obs.device)
    sequences.select(best)
    return actions.flatten()[best], expected[best]


class Simulator:
    """Physics of several episodes, for rollouts that act in the world instead of imagining."""

    def __init__(self, world: env.World, states: np.ndarray):
        self.world = world
        self.states = np.array(states, np.float64)
        self.paths = [[state.copy()] for state in self.states]

    def step(self, rows: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Observations (b, D) after one action in each of the episodes `rows` (b,)."""
        self.states[rows] = self.world.step_batch(self.states[rows], actions)
        for row in rows:
            self.paths[row].append(self.states[row].copy())
        return self.world.observe(self.states[rows])


@torch.inference_mode()
def generate(
    model: KalmForRollouts,
    tokenizer: Tokenizer,
    world: env.World,
    goals: Sequence[env.Goal],
    observations: np.ndarray,
    *,
    temperature: float = 0.0,
    max_steps: int | None = None,
    seed: int = 0,
    states: np.ndarray | None = None,
    candidates: int = 1,
) -> list[dict]:
    """Roll out one goal from one start a row, behind a cache that lives through the rollout.

    observations: (B, D). A row ends when the judge says success, after max_steps actions, and after
    one action for one-step goals; finished rows leave the batch. states: (B, S), to act in the
    world from these instead of imagining. candidates: different actions that the model tries in
    mind at each step, to go on with the one that the reward likes best. Returns B rollout records.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    encoded = world.encode_goals(goals)
    one_step = world.one_step(encoded)
    simulator = None if states is None else Simulator(world, states)
    obs = torch.as_tensor(np.asarray(observations), dtype=torch.float32, device=model.device)
    paths = [[row] for row in obs.cpu().numpy()]
    taken = [[] for _ in goals]
    prompts = []
    for goal, (start,) in zip(goals, paths):
        prompt = text_positions(prompt_ids(tokenizer, "generation", goal.text))
        prompts.append(prompt + positions_of([start]))
    sequences = Sequences(model, prompts)
    running = np.arange(len(goals))
    max_steps = max_steps or world.max_steps
    for step in range(max_steps):
        before = obs.cpu().numpy()
        logits = sequences.out.action_logits[:, -1]
        actions = sample_actions(logits, temperature, generator, candidates)
        actions, obs = imagine_step(sequences, world, encoded[running], obs, actions)
        actions = actions.cpu().numpy()
        if simulator is not None:
            obs = torch.as_tensor(simulator.step(running, actions), device=model.device)
        texts = [goals[row].text for row in running]
        finite.check(f"rollout, action {step + 1}", {"state": obs}, (obs,), about=texts.__getitem__)
        after = obs.cpu().numpy()
        met = world.success(encoded[running], before, after, actions, imagined=simulator is None)
        for row, next_obs, action in zip(running, after, actions):
            paths[row].append(next_obs)
            taken[row].append(action)
        going = np.flatnonzero(~met & ~one_step[running])
        if len(going) == 0 or step + 1 == max_steps:
            break
        if len(going) < len(running):
            keep = torch.as_tensor(going, device=model.device)
            sequences.select(keep)
            running, obs = running[going], obs[keep]
        no_index = torch.zeros(len(running), dtype=torch.long, device=model.device)
        sequences.feed(STATE, no_index, obs)
    records = []
    for row, goal in enumerate(goals):
        physical = None if simulator is None else np.array(simulator.paths[row])
        episode = (np.array(paths[row]), np.array(taken[row], np.int64), physical)
        records.append(env.rollout_record(world, goal, *episode, imagined=simulator is None))
    return records


def generate_all(
    model: KalmForRollouts,
    tokenizer: Tokenizer,
    world: env.World,
    goals: Sequence[env.Goal],
    observations: np.ndarray,
    *,
    batch_size: int = 256,
    seed: int = 0,
    states: np.ndarray | None = None,
    candidates: int | np.ndarray = 1,
    description: str = "imagine",
    **options,
) -> list[dict]:
    """`generate` in batches of goals with texts of like length; records come in the order of goals.

    candidates: for all goals, or a number for each. batch_size: rows of the model, of which each
    candidate takes one.
    """
    observations = np.asarray(observations)
    counts = np.broadcast_to(candidates, len(goals))
    order = np.lexsort(([len(goal.text) for goal in goals], counts))
    batches = []
    while len(order):
        count = counts[order[0]]
        alike = (counts[order] == count).sum()
        size = min(max(1, batch_size // count), alike)
        batches.append(order[:size])
        order = order[size:]
    records = [None] * len(goals)
    for number, rows in enumerate(tqdm(batches, desc=description, disable=len(batches) < 2)):
        options["seed"] = seed + number
        options["states"] = None if states is None else states[rows]
        options["candidates"] = int(counts[rows[0]])
        some_goals = [goals[row] for row in rows]
        part = generate(model, tokenizer, world, some_goals, observations[rows], **options)
        for row, record in zip(rows, part):
            records[row] = record
    return records


# ----------------------------------------------------------------------------------------------
# Rounds of imagining


@dataclass
class ImagineArguments:
    """Which goals to imagine rollouts for, from how many starts, and how."""

    goals: str = setting("", "file of your own novel goals, see data/README.md")
    split: str = setting(
        "test", "of the built-in goals: validation (to choose) or test (to report)"
    )
    novel_goals: int = setting(240, "novel goals a level")
    starts_per_goal: int = setting(16, "starts to imagine from for each goal")
    step_starts: int = setting(40, "the same for goals of one action")
    temperatures: str = setting("1,1,1.2,1.2", "of sampling, one for each round of imagining")
    candidates: int = setting(
        8, "actions to look ahead at in each step of later rounds, at most all"
    )
    step_candidates: int = setting(40, "the same for goals of one action")
    visited_share: float = setting(0.5, "of rollouts that start in a state of the data")
    self_check: bool = setting(False, "the model explains and checks what it imagined")
    imagined_steps: int = setting(20, "actions in an imagined rollout at most")

    def __post_init__(self):
        if self.split not in ("validation", "test"):
            raise ValueError(f"--split takes validation or test, got {self.split!r}")
        at_least(1, self, "novel_goals", "starts_per_goal", "step_starts", "imagined_steps")
        at_least(1, self, "candidates", "step_candidates")
        if not 0 <= self.visited_share <= 1:
            raise ValueError(f"--visited_share must be from 0 to 1, got {self.visited_share}")
        try:
            usable = all(0 <= temperature < np.inf for temperature in self.rounds)
        except ValueError:
            usable = False
        if not usable:
            raise ValueError(
                f"--temperatures takes numbers from 0 on with commas, got {self.temperatures!r}"
            )
        self.goals = absolute(self.goals)
        if self.goals and not Path(self.goals).is_file():
            raise ValueError(f"--goals {self.goals}: no such file")

    def inputs(self) -> dict[str, str]:
        """A goals file counts by its content."""
        return {"goals": folder.sha256(Path(self.goals))} if self.goals else {}

    def novel_goals_of(self, world: env.World, seed: int) -> dict[str, list[env.Goal]]:
        """The novel goals by level, from the file or built in. Raises ValueError for bad ones."""
        if self.goals:
            goals = env.by_level(env.read_goals(self.goals, world))
            if "offline" in goals:
                raise ValueError(
                    f"{self.goals}: level 'offline' is for training goals, found "
                    f"{goals['offline'][0].text!r}; use {', '.join(env.NOVEL_LEVELS)}"
                )
            return goals
        goals = {}
        for number, level in enumerate(env.NOVEL_LEVELS):
            rng = np.random.default_rng([seed, 1, number])
            goals[level] = world.sample_goals(level, self.split, self.novel_goals, rng)
        return goals

    @property
    def rounds(self) -> list[float]:
        """The temperature of each round."""
        return [float(temperature) for temperature in self.temperatures.split(",")]


def imagine_rounds(
    model: KalmForRollouts,
    tokenizer: Tokenizer,
    world: env.World,
    level: str,
    goals: Sequence[env.Goal],
    visited: np.ndarray,
    settings: ImagineArguments,
    seed: Sequence[int],
    work: Path,
) -> list[list[dict]]:
    """Rounds of imagining, one a temperature: the first from every start, each later one from the
    starts without a match. Returns records by round; all processes share the work.

    Later rounds look ahead: of several actions that the model would take, the reward picks the one
    with the best imagined outcome. So what is kept is spread over goals and starts as the starts
    are, not as the model's luck is. Goals of level offline, for comparison, have one start and one
    round each. visited: (N, D), states of the data, where a share of the rollouts starts: there
    another goal was pursued. A finished round is kept in the folder `work`.
    """
    state = PartialState()
    rng = np.random.default_rng(seed)
    starts_a_goal = {"offline": 1, "easy": settings.step_starts}
    repeats = starts_a_goal.get(level, settings.starts_per_goal)
    goals = [goal for goal in goals for _ in range(repeats)]
    starts = world.observe(env.unfulfilled_states(world, rng, goals))
    if level != "offline":
        elsewhere = rng.random(len(goals)) < settings.visited_share
        seen = env.unfulfilled_observations(world, rng, goals, visited)
        starts[elsewhere] = seen[elsewhere]
    one_step = world.one_step(world.encode_goals(goals))
    candidates = np.where(one_step, settings.step_candidates, settings.candidates)
    candidates = np.minimum(candidates, world.num_actions)
    is_checked = settings.self_check or any(goal.kind == env.UNJUDGED for goal in goals)
    temperatures = settings.rounds[:1] if level == "offline" else settings.rounds
    rounds = []
    rows = np.arange(len(goals))
    for number, temperature in enumerate(temperatures):
        mine = rows[state.process_index :: state.num_processes]
        draws = int(rng.integers(2**31)) + state.process_index
        kept = work / f"{level}-{number}"
        if kept.is_dir():
            records = read_rollouts(kept, world)
        else:
            max_steps = min(settings.imagined_steps, world.max_steps)
            options = {"temperature": temperature, "max_steps": max_steps}
            options |= {"candidates": candidates[mine] if number else 1, "seed": draws}
            options |= {"description": f"imagine {level}"}
            wanted = [goals[row] for row in mine]
            records = generate_all(model, tokenizer, world, wanted, starts[mine], **options)
            if is_checked:
                self_check(model, tokenizer, world, records)
            gathered = gather_object(list(zip(mine.tolist(), records)))
            records = [record for _, record in sorted(gathered, key=lambda pair: pair[0])]
            if state.is_main_process:
                write_rollouts(kept, records)
        rounds.append(records)
        rows = rows[[not is_wanted(world, record, "matched") for record in records]]
        if len(rows) == 0:
            break
    return rounds


def self_check(model, tokenizer: Tokenizer, world: env.World, records: list[dict]) -> None:
    """Add to imagined rollouts what the model says of them, and whether it believes them."""
    explanations = explain(model, tokenizer, records)
    errors = dynamics_error(model, tokenizer, world, records)
    for record, explanation, error in zip(records, explanations, errors):
        record.update(explanation=explanation, dynamics_error=error)


# ----------------------------------------------------------------------------------------------
# The model's own view of rollouts: what they achieve, and whether it believes their transitions


@torch.inference_mode()
def explain(
    model: KalmForRollouts,
    tokenizer: Tokenizer,
    records: Sequence[dict],
    prompt: str = PROMPTS["explanation"],
    max_tokens: int = 24,
    batch_size: int = 256,
) -> list[str]:
    """What the model says that rollouts achieve, greedily decoded: a text for each record."""
    model.eval()
    asked = text_positions(text_ids(tokenizer, prompt))
    order = np.argsort([len(record["actions"]) for record in records], kind="stable")
    answers = [[] for _ in records]
    batches = range(0, len(records), batch_size)
    for start in tqdm(batches, desc="explain", disable=len(batches) < 2, leave=False):
        running = order[start : start + batch_size]
        prompts = []
        for row in running:
            shown = positions_of(records[row]["observations"], records[row]["actions"])
            prompts.append(asked + shown)
        sequences = Sequences(model, prompts, text_logits=1)
        for _ in range(max_tokens):
            token = sequences.out.logits[:, -1].argmax(-1)
            going = (token != tokenizer.eos_token_id).nonzero()[:, 0]
            if len(going) == 0:
                break
            if len(going) < len(running):
                sequences.select(going)
                running, token = running[going.cpu().numpy()], token[going]
            for row, index in zip(running, token.tolist()):
                answers[row].append(index)
            no_state = torch.zeros(len(token), model.config.observation_dim, device=model.device)
            sequences.feed(TEXT, token, no_state)
    return [tokenizer.decode(answer).strip() for answer in answers]


@torch.inference_mode()
def dynamics_error(
    model: KalmForRollouts,
    tokenizer: Tokenizer,
    world: env.World,
    records: Sequence[dict],
    rollouts_a_row: int = 16,
) -> list[np.ndarray]:
    """How far imagined next states are from the model's answer when asked for that transition
    alone.

    Returns an array (T,) for each record, the distance of the object that differs most.
    """
    model.eval()
    errors = []
    longest = max([len(record["actions"]) for record in records], default=1)
    size = max(1, min(rollouts_a_row, (SEGMENTS - 1) // longest))  # each transition is a segment
    batches = range(0, len(records), size)
    for start in tqdm(batches, desc="check dynamics", disable=len(records) < 1000, leave=False):
        part = records[start : start + size]
        batch = pack([make_example("dynamics", tokenizer, world, part)])
        batch = {key: value.to(model.device) for key, value in batch.items()}
        ahead = batch["predict"][:, 1:]
        gap = model(**batch).state_pred[:, :-1] - batch["states"][:, 1:]
        gap = gap[ahead].float().unflatten(-1, (world.objects, -1))
        largest = gap.norm(dim=-1).amax(-1).cpu().numpy()
        ends = np.cumsum([len(record["actions"]) for record in part])
        errors += np.split(largest, ends[:-1])
    return errors
