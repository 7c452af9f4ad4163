"""Imagined rollouts: the sampling loop over the grounded LLM, and rounds of imagining.

The loop reads like the paper's (section 4.2): from a start state and a goal the model writes an
action, the state it expects, the next action... Where physics answers instead of the model's own
expectation, the same loop acts in the world. This file knows no training and no particular world.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

import env
from data import finite
from data.rollouts import read_rollouts, write_rollouts
from experiment import folder
from experiment.processes import in_batches
from experiment.settings import absolute, at_least, setting
from explain import self_check
from model import KalmForRollouts
from sequences import Sequences, fitting_batch
from tasks import Tokenizer, prompt_ids, text_positions

POSITIONS_AT_ONCE = 1024  # candidates of all rows together: more is no faster on a CPU
SHARES = 8  # batches at least, for processes to share evenly, unless they would have
FEW_ROWS = 64  # less than so many rows, which wastes a pass through the model

# ----------------------------------------------------------------------------------------------
# Imagining and acting


def gumbel_noise(
    seed: int | Sequence[int], rollouts: Sequence[int], steps: int, num_actions: int
) -> np.ndarray:
    """Gumbel noise (B, steps, num_actions) of B rollouts by their numbers: each has a generator
    of its own, so that its draws do not depend on what else is in a batch.
    """
    noise = np.empty((len(rollouts), steps, num_actions))
    for row, number in enumerate(rollouts):
        rng = np.random.default_rng([*np.atleast_1d(seed), number])
        noise[row] = rng.gumbel(size=(steps, num_actions))
    return noise


def sample_actions(
    logits: np.ndarray, temperature: float, noise: np.ndarray, count: int = 1
) -> np.ndarray:
    """count different actions (B, count) from logits (B, num_actions) and Gumbel noise like them.

    The largest noisy logits are a sample without replacement (Kool et al., 2019); at temperature 0
    they are the likeliest actions.
    """
    scores = logits + temperature * noise
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def best_candidates(
    world: env.World, goals, obs: np.ndarray, nexts: np.ndarray, actions: np.ndarray
) -> np.ndarray:
    """Which of the actions tried in each row should lead nearest to its goal, and at best to it.

    goals: (B, ...) encoded; obs: (B, D); nexts: (B, count, D), imagined; actions: (B, count).
    Returns indices (B,) below count.
    """
    count = actions.shape[1]
    goals = np.repeat(goals, count, 0)
    obs = np.repeat(obs, count, 0)
    nexts = nexts.reshape(len(obs), -1)
    met = world.success(goals, obs, nexts, actions.reshape(-1), imagined=True)
    distance = world.potential(goals, nexts) - 1e6 * met
    return distance.reshape(-1, count).argmin(1)


def expected_states(
    model: KalmForRollouts, hidden: torch.Tensor, actions: torch.Tensor, obs: np.ndarray
) -> np.ndarray:
    """The states (B, count, D) that the model expects after actions (B, count) in obs (B, D).

    hidden: (B, count, hidden), at the actions.
    """
    before = torch.as_tensor(np.repeat(obs, actions.shape[1], 0), device=model.device)
    is_action = torch.ones(len(before), dtype=torch.bool, device=model.device)
    change = model.predict_change(hidden.flatten(0, 1), actions.flatten(), is_action, before)
    expected = before + change * model.change_std
    return expected.unflatten(0, actions.shape).cpu().numpy()


def imagine_step(
    sequences: Sequences, world: env.World, goals, obs: np.ndarray, actions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Take actions in mind, (b, count) tried in each row, and go on with the best of each.

    goals: (b, ...) encoded; obs: (b, D). Returns those actions (b,) and the states that the model
    expects after them (b, D).
    """
    model = sequences.model
    count = actions.shape[1]
    tried = torch.as_tensor(actions, device=model.device)
    embeddings = model.action_embedding(tried)
    if count == 1:
        sequences.feed(embeddings[:, 0])
        hidden = sequences.hidden[:, None]
    else:
        hidden = sequences.feed_branches(embeddings)
    nexts = expected_states(model, hidden, tried, obs)
    best = np.zeros(len(actions), int)
    if count > 1:
        best = best_candidates(world, goals, obs, nexts, actions)
        sequences.keep_branch(torch.as_tensor(best, device=model.device), count)
    rows = np.arange(len(actions))
    return actions[rows, best], nexts[rows, best]


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
    seed: int | Sequence[int] = 0,
    numbers: Sequence[int] | None = None,
    states: np.ndarray | None = None,
    candidates: int = 1,
) -> list[dict]:
    """Roll out one goal from one start a row, behind a cache that lives through the rollout.

    observations: (B, D). A row ends when the judge says success, after max_steps actions, and after
    one action for one-step goals; finished rows leave the batch. numbers: (B,), of the rollouts;
    the draws of each follow from seed and its number alone; None: 0, 1, ... states: (B, S), to act
    in the world from these instead of imagining. candidates: different actions that the model tries
    in mind at each step, to go on with the one that the reward likes best. Returns B records.
    """
    model.eval()
    max_steps = max_steps or world.max_steps
    encoded = world.encode_goals(goals)
    one_step = world.one_step(encoded)
    simulator = None if states is None else Simulator(world, states)
    noise = np.zeros((len(goals), max_steps, 1))
    if temperature > 0:
        numbers = range(len(goals)) if numbers is None else numbers
        noise = gumbel_noise(seed, numbers, max_steps, model.config.num_actions)
    obs = np.array(observations, np.float32)
    paths = [[row] for row in obs]
    taken = [[] for _ in goals]
    is_given_returns = model.target_return is not None  # a Decision Transformer
    returns_to_go = np.full(len(goals), model.target_return or 0.0, np.float32)
    sequences = prefill(model, tokenizer, goals)
    running = np.arange(len(goals))
    for step in range(max_steps):
        if is_given_returns:
            to_go = torch.as_tensor(returns_to_go[running], device=model.device)
            sequences.feed(model.embed_returns(to_go))
        sequences.feed(model.embed_states(torch.as_tensor(obs, device=model.device)))
        logits = model.action_logits(sequences.hidden).float().cpu().numpy()
        tried = sample_actions(logits, temperature, noise[running, step], candidates)
        actions, after = imagine_step(sequences, world, encoded[running], obs, tried)
        if simulator is not None:
            after = simulator.step(running, actions)
        if is_given_returns:
            returns_to_go[running] -= world.reward(encoded[running], obs, after, actions)
        texts = [goals[row].text for row in running]
        seen = {"state": torch.from_numpy(after)}
        finite.check(f"rollout, action {step + 1}", seen, seen.values(), about=texts.__getitem__)
        met = world.success(encoded[running], obs, after, actions, imagined=simulator is None)
        for row, next_obs, action in zip(running, after, actions):
            paths[row].append(next_obs)
            taken[row].append(action)
        going = np.flatnonzero(~met & ~one_step[running])
        if len(going) == 0:
            break
        if len(going) < len(running):
            sequences.select(torch.as_tensor(going, device=model.device))
        running = running[going]
        obs = after[going]
    episodes = []
    for row, path in enumerate(paths):
        physical = None if simulator is None else np.array(simulator.paths[row])
        episodes.append((np.array(path), np.array(taken[row], np.int64), physical))
    return env.rollout_records(world, goals, episodes, imagined=simulator is None)


def prefill(model: KalmForRollouts, tokenizer: Tokenizer, goals: Sequence[env.Goal]) -> Sequences:
    """Sequences that begin with the prompts of goals; goals with one text share what it costs."""
    texts = list(dict.fromkeys(goal.text for goal in goals))
    prompts = [text_positions(prompt_ids(tokenizer, "generation", text)) for text in texts]
    sequences = Sequences(model, prompts)
    index = {text: number for number, text in enumerate(texts)}
    rows = [index[goal.text] for goal in goals]
    sequences.select(torch.tensor(rows, device=model.device))
    return sequences


def batches_of(goals: Sequence[env.Goal], counts: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Rows of each batch: as many candidates, texts of like length, goals of one text together.

    A batch has at most batch_size rows, at most an eighth of all but for few, and where several
    candidates are tried, at most POSITIONS_AT_ONCE of them. The same whatever the number of
    processes.
    """
    batch_size = min(batch_size, max(FEW_ROWS, math.ceil(len(goals) / SHARES)))
    by_kind = lambda row: (counts[row], len(goals[row].text), goals[row].text)
    order = np.array(sorted(range(len(goals)), key=by_kind), int)
    batches = []
    while len(order):
        count = counts[order[0]]
        alike = (counts[order] == count).sum()
        size = min(batch_size, max(1, POSITIONS_AT_ONCE // count), alike)
        batches.append(order[:size])
        order = order[size:]
    return batches


def generate_all(
    model: KalmForRollouts,
    tokenizer: Tokenizer,
    world: env.World,
    goals: Sequence[env.Goal],
    observations: np.ndarray,
    *,
    batch_size: int | None = None,
    numbers: Sequence[int] | None = None,
    states: np.ndarray | None = None,
    candidates: int | np.ndarray = 1,
    shared: bool = False,
    description: str = "imagine",
    **options,
) -> list[dict]:
    """`generate` in batches of goals with texts of like length; records come in the order of goals.

    candidates: for all goals, or a number for each. batch_size: rows of the model at most; None: as
    memory allows. shared: all processes call this with the same, and each does a part.
    """
    observations = np.asarray(observations)
    numbers = np.arange(len(goals)) if numbers is None else np.asarray(numbers)
    counts = np.broadcast_to(candidates, len(goals))
    max_steps = options.get("max_steps") or world.max_steps
    if batch_size is None:
        longest = max((goal.text for goal in goals), key=len, default="")
        an_action = 2 if model.target_return is None else 3  # positions, as a return comes too
        positions = len(prompt_ids(tokenizer, "generation", longest)) + an_action * max_steps
        batch_size = fitting_batch(model, positions + max(counts, default=0), shared)

    def work(rows):
        of_rows = {"numbers": numbers[rows], "candidates": int(counts[rows[0]])}
        if states is not None:
            of_rows["states"] = states[rows]
        asked = [goals[row] for row in rows]
        return generate(model, tokenizer, world, asked, observations[rows], **of_rows, **options)

    batches = batches_of(goals, counts, batch_size)
    steps = np.where(world.one_step(world.encode_goals(goals)), 1, max_steps)
    costs = [((1 + counts) * steps)[rows].sum() for rows in batches]
    return in_batches(work, batches, costs, shared, description)


# ----------------------------------------------------------------------------------------------
# Rounds of imagining


@dataclass
class ImagineArguments:
    """Which goals to imagine rollouts for, from how many starts, and how."""

    goals: str = setting("", "file of your own novel goals, see data/README.md")
    split: str = setting("test", "of built-in goals: validation (to choose) or test (to report)")
    novel_goals: int = setting(240, "novel goals a level")
    restate: bool = setting(True, "new words as known ones that the LLM finds")
    starts_per_goal: int = setting(12, "starts to imagine from a goal")
    step_starts: int = setting(24, "the same for goals of one action")
    temperatures: str = setting("1,1", "of sampling, by round of imagining")
    candidates: int = setting(8, "actions tried in mind at a step of later rounds")
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

    def inputs(self) -> dict[str, str]:
        """A goals file counts by its content."""
        return {"goals": folder.sha256(Path(self.goals))} if self.goals else {}

    def novel_goals_of(self, world: env.World, seed: int) -> dict[str, list[env.Goal]]:
        """The novel goals by level, from the file or built in. Raises ValueError for bad ones."""
        if self.goals:
            if not Path(self.goals).is_file():
                raise ValueError(f"--goals {self.goals}: no such file")
            goals = env.by_level(env.read_goals(self.goals, world))
            if "offline" in goals:
                raise ValueError(
                    f"{self.goals}: level 'offline' is for training goals, found "
                    f"{goals['offline'][0].text!r}; use {', '.join(env.NOVEL_LEVELS)}"
                )
            return goals
        goals = {}
        built_in = (*env.NOVEL_LEVELS, env.WORDS) if world.word_parts else env.NOVEL_LEVELS
        for number, level in enumerate(built_in):
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
    starts without a match, of goals without a judge from all. Returns records by round; all
    processes share the work.

    Later rounds look ahead: of several actions that the model would take, the reward picks the one
    with the best imagined outcome. So what is kept is spread over goals and starts as the starts
    are, not as the model's luck is. Levels that nothing is learned from have one start and one
    round a goal. visited: (N, D), states of the data, where a share of the rollouts starts: there
    another goal was pursued. A finished round is kept in the folder `work`.
    """
    state = PartialState()
    rng = np.random.default_rng(seed)
    is_learned_from = level in env.NOVEL_LEVELS
    starts_a_goal = {"offline": 1, env.WORDS: 1, "easy": settings.step_starts}
    repeats = starts_a_goal.get(level, settings.starts_per_goal)
    goals = [goal for goal in goals for _ in range(repeats)]
    starts = world.observe(env.unfulfilled_states(world, rng, goals))
    if is_learned_from:
        elsewhere = rng.random(len(goals)) < settings.visited_share
        seen = env.unfulfilled_observations(world, rng, goals, visited)
        starts[elsewhere] = seen[elsewhere]
    one_step = world.one_step(world.encode_goals(goals))
    candidates = np.where(one_step, settings.step_candidates, settings.candidates)
    candidates = np.minimum(candidates, world.num_actions)
    is_checked = settings.self_check or any(goal.kind == env.UNJUDGED for goal in goals)
    temperatures = settings.rounds if is_learned_from else settings.rounds[:1]
    max_steps = min(settings.imagined_steps, world.max_steps)
    rounds = []
    rows = np.arange(len(goals))
    for number, temperature in enumerate(temperatures):
        tried = candidates if number else np.ones_like(candidates)
        kept = work / f"{level}-{number}"
        if kept.is_dir():
            records = read_rollouts(kept, world)
        else:
            options = {"seed": [*seed, number], "temperature": temperature, "numbers": rows}
            options |= {"max_steps": max_steps, "candidates": tried[rows], "shared": True}
            options["description"] = f"imagine {level}"
            asked = [goals[row] for row in rows]
            records = generate_all(model, tokenizer, world, asked, starts[rows], **options)
            if is_checked:
                self_check(model, tokenizer, world, records)
            if state.is_main_process:
                write_rollouts(kept, records)
        rounds.append(records)
        missed = np.array([not record["success"] for record in records])
        has_more = ~one_step[rows] | (tried[rows] < world.num_actions)
        rows = rows[missed & has_more]
        if len(rows) == 0:
            break
    return rounds
