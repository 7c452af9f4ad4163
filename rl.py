"""Skill acquisition: offline RL on real and imaginary rollouts (paper, section 4.3).

An algorithm is a class in ALGORITHMS: a new one is its networks, its loss and an entry there. A
policy sees the observation and the goal's encoding. All seeds of a method train at once: they are
each tensor's first dimension.
This file knows no grounded model and no particular world: data/transitions.py holds what to learn.
"""

import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import trange

import env
from data import finite, llm
from data.policies import save_policy
from data.transitions import Batch, Batches, Buffer
from experiment import folder
from experiment.settings import absolute, at_least, check_name, setting

# ----------------------------------------------------------------------------------------------
# Networks and losses


class SeededMLP(nn.Module):
    """One MLP a seed, evaluated together, with ReLU; of one shape and seed all start alike.

    parts: layer by layer a weight (seeds, in, out) and a bias (seeds, 1, out).
    """

    def __init__(self, seeds: Sequence[int], sizes: Sequence[int]):
        super().__init__()
        self.parts = nn.ParameterList()
        for layer, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:])):
            # a generator for each seed, so that its start does not depend on its company
            generators = [Generator().manual_seed(1000 * seed + layer) for seed in seeds]
            bound = fan_in**-0.5  # as torch.nn.Linear starts
            for rows in (fan_in, 1):
                numbers = torch.empty(len(seeds), rows, fan_out)
                for own, generator in zip(numbers, generators):
                    own.uniform_(-bound, bound, generator=generator)
                self.parts.append(numbers)

    def forward(self, goals: Tensor, *observations: Tensor) -> list[Tensor]:
        """Outputs (seeds, batch, sizes[-1]) float32, one for each of the observations.

        goals: encodings (seeds, batch / k, hidden), each of k in turn of the observations (seeds,
        batch, D): what the first layer makes of them is most of its work, and done once for all.
        Matrices are multiplied in the inputs' precision.
        """
        weight, bias, *rest = [part.to(goals.dtype) for part in self.parts]
        observation_dim = weight.shape[1] - goals.shape[-1]
        of_obs, of_goals = weight.split([observation_dim, goals.shape[-1]], dim=1)
        from_goals = torch.baddbmm(bias, goals, of_goals)
        each = observations[0].shape[1] // goals.shape[1]
        from_goals = from_goals.repeat_interleave(each, 1)
        outputs = []
        for obs in observations:
            x = torch.baddbmm(from_goals, obs, of_obs)
            for weight, bias in zip(rest[::2], rest[1::2]):
                x = torch.baddbmm(bias, F.relu(x), weight)
            outputs.append(x.float())
        return outputs


def of_action(values: Tensor, action: Tensor) -> Tensor:
    """The value of each transition's own action: (..., actions), (...) -> (...)."""
    return values.gather(-1, action[..., None]).squeeze(-1)


def imitation_loss(logits: Tensor, action: Tensor) -> Tensor:
    """Cross entropy of the data's actions: (seeds, batch, actions), (seeds, batch) -> (seeds,)."""
    return -of_action(logits.log_softmax(-1), action).mean(-1)


def conservative_loss(q: Tensor, action: Tensor) -> Tensor:
    """Push Q down where no data is: E[logsumexp_a Q(s, a) - Q(s, a_data)]. Returns (seeds,)."""
    return imitation_loss(q, action)  # the cross entropy of Q as logits


def bellman_loss(q: Tensor, batch: Batch, next_value: Tensor, discount: float) -> Tensor:
    """Squared error of Q(s, a) to r + gamma (1 - done) V(s'). Returns (seeds,)."""
    target = batch.reward + discount * (1 - batch.done) * next_value
    return (of_action(q, batch.action) - target.detach()).square().mean(-1)


def expectile_loss(error: Tensor, expectile: float | Tensor) -> Tensor:
    """|tau - 1(u < 0)| u^2 of errors u = Q - V, least where V is Q's tau-expectile -> (seeds,)."""
    return ((expectile - (error < 0).float()).abs() * error.square()).mean(-1)


def advantage_weighted_loss(logits: Tensor, action, advantage: Tensor, weight: float) -> Tensor:
    """Imitation of each action exp(weight * A) times, at most 100 times. Returns (seeds,)."""
    times = (weight * advantage.detach()).exp().clamp(max=100)
    return -(times * of_action(logits.log_softmax(-1), action)).mean(-1)


# ----------------------------------------------------------------------------------------------
# Algorithms


@dataclass(frozen=True)
class RLConfig:
    """Constants of training. The paper: BC with batch 100, CQL with batch 32 and 500,000 steps."""

    steps: int = 8000
    batch: int = 256
    of_goal: int = 4  # transitions in turn that have one goal, which is then encoded once for all
    lr: float = 2e-3  # decays to 0 along a cosine
    width: int = 256  # of two hidden layers
    weight_decay: float = 1e-4
    max_grad_norm: float = 100.0  # of each seed. Usual ones of CQL with weight 10 are below 42
    imaginary_share: float = 0.2  # of each batch
    observation_scale: float = 1.0  # observations are divided by it: about one in size
    reward_scale: float = 0.01  # a success is worth 1
    discount: float = 0.99  # gamma
    target_update: float = 0.005  # Polyak's step toward the online network, each gradient step
    conservative_weight: float = 5.0  # alpha of CQL
    expectile: float = 0.9  # tau of IQL: V(s) is this expectile of Q(s, a) over the data's actions
    advantage_weight: float = 10.0  # beta of IQL, 1/lambda of AWAC: favour of better actions
    bf16: bool = False  # products of matrices in bfloat16, sums and losses in float32
    snapshot_steps: int = 2000  # between snapshots, from which a killed training goes on


class Algorithm(nn.Module):
    """Networks and what they learn by. The policy acts: its largest output is the action."""

    def __init__(self, seeds: Sequence[int], sizes: Sequence[int], config: RLConfig):
        super().__init__()
        self.config = config
        self.policy = SeededMLP(seeds, sizes)

    def loss(self, batch: Batch) -> Tensor:
        """What gradient steps make smaller: (seeds,)."""
        raise NotImplementedError

    def after_step(self) -> None:
        """What else follows a gradient step."""


class BC(Algorithm):
    """Behaviour cloning: imitate the data's actions."""

    def loss(self, batch: Batch) -> Tensor:
        (logits,) = self.policy(batch.goal, batch.obs)
        return imitation_loss(logits, batch.action)


class ActorCritic(Algorithm):
    """With a network of Q values, and its slow copy that Q learns from."""

    def __init__(self, seeds: Sequence[int], sizes: Sequence[int], config: RLConfig):
        super().__init__(seeds, sizes, config)
        self.critic = SeededMLP(seeds, sizes)
        self.target = SeededMLP(seeds, sizes).requires_grad_(False)

    @torch.no_grad()
    def after_step(self) -> None:
        for slow, new in zip(self.target.parts, self.critic.parts):
            slow.lerp_(new, self.config.target_update)


class CQL(ActorCritic):
    """Discrete Conservative Q-Learning (Kumar et al., 2020, eq. 4) with double-DQN targets."""

    def __init__(self, seeds: Sequence[int], sizes: Sequence[int], config: RLConfig):
        super().__init__(seeds, sizes, config)
        self.policy = self.critic  # acts for the largest Q

    def loss(self, batch: Batch) -> Tensor:
        q, next_q = self.critic(batch.goal, batch.obs, batch.next_obs)
        with torch.no_grad():
            (next_q_target,) = self.target(batch.goal, batch.next_obs)
        next_value = of_action(next_q_target, next_q.argmax(-1))
        bellman = bellman_loss(q, batch, next_value, self.config.discount)
        return bellman + self.config.conservative_weight * conservative_loss(q, batch.action)


class IQL(ActorCritic):
    """Discrete Implicit Q-Learning (Kostrikov et al., 2022, eq. 5 to 7), with one Q, not two."""

    def __init__(self, seeds: Sequence[int], sizes: Sequence[int], config: RLConfig):
        super().__init__(seeds, sizes, config)
        self.value = SeededMLP(seeds, [*sizes[:-1], 1])

    def loss(self, batch: Batch) -> Tensor:
        config = self.config
        (logits,) = self.policy(batch.goal, batch.obs)
        (q,) = self.critic(batch.goal, batch.obs)
        value, next_value = self.value(batch.goal, batch.obs, batch.next_obs)
        with torch.no_grad():
            (q_target,) = self.target(batch.goal, batch.obs)
        advantage = of_action(q_target, batch.action) - value.squeeze(-1)
        return (
            expectile_loss(advantage, config.expectile)
            + bellman_loss(q, batch, next_value.squeeze(-1), config.discount)
            + advantage_weighted_loss(logits, batch.action, advantage, config.advantage_weight)
        )


class AWAC(ActorCritic):
    """Discrete Advantage-Weighted Actor-Critic (Nair et al., 2020), without its online part.

    The policy's values are means over all actions, not of a sampled one; one Q, not the smaller of
    two; an action is imitated at most 100 times.
    """

    def loss(self, batch: Batch) -> Tensor:
        config = self.config
        logits, next_logits = self.policy(batch.goal, batch.obs, batch.next_obs)
        (q,) = self.critic(batch.goal, batch.obs)
        with torch.no_grad():
            (next_q,) = self.target(batch.goal, batch.next_obs)
        value = (logits.softmax(-1) * q).sum(-1)
        next_value = (next_logits.softmax(-1) * next_q).sum(-1)
        advantage = of_action(q, batch.action) - value
        critic_loss = bellman_loss(q, batch, next_value, config.discount)
        times = config.advantage_weight
        return critic_loss + advantage_weighted_loss(logits, batch.action, advantage, times)


ALGORITHMS: dict[str, type[Algorithm]] = {"bc": BC, "cql": CQL, "iql": IQL, "awac": AWAC}
SOURCES = ("", "+relabel", "+kalm", "+both")  # rollouts to learn from beside the real ones
EPOCHS = 50  # of the paper's training curves
LLM = "llm"  # the method that learns nothing: the grounded model acts
DT = "dt"  # the Decision Transformer, which is trained as the LLM is grounded
MODELS = (LLM, DT)  # methods without a small policy: a language model acts, of one seed


def method_names() -> list[str]:
    """All methods: each algorithm with each source, and language models as policies."""
    return ["".join(pair) for pair in itertools.product(ALGORITHMS, SOURCES)] + [*MODELS]


def algorithm_of(method: str) -> str:
    """The algorithm of a method: "cql" of "cql+kalm"."""
    return method.partition("+")[0]


def source_of(method: str) -> str:
    """The source of a method's imaginary rollouts: "kalm" of "cql+kalm", "" of "cql"."""
    return method.partition("+")[2]


@dataclass
class LearnArguments:
    """Which rollouts to learn from, by which methods and how."""

    keep: str = setting("matched", "imagined: matched (judge), explained, both, all")
    kept_per_goal: int = setting(0, "at most so many of a goal; 0: all")
    dynamics_tolerance: float = setting(0.0, "drop transitions further off; 0: none")
    balance_goals: bool = setting(True, "draw imaginary batches by goal and rollout")
    encoder: str = setting("llm", "of goals: llm (the base LLM), or a transformers model")
    encoder_layers: int = setting(4, "first layers of the base LLM to use; 0: all")
    rl_steps: int = setting(RLConfig.steps, "gradient steps of offline RL")
    rl_batch: int = setting(RLConfig.batch, "transitions a step and seed")
    rl_of_goal: int = setting(RLConfig.of_goal, "transitions of a batch in turn of one goal")
    rl_learning_rate: float = setting(RLConfig.lr, "of policies")
    conservative_weight: float = setting(RLConfig.conservative_weight, "alpha of CQL")
    imaginary_share: float = setting(RLConfig.imaginary_share, "of each batch")
    methods: str = setting(
        "bc,bc+relabel,bc+kalm,bc+both,cql,cql+relabel,cql+kalm,cql+both,llm",
        f"to learn and evaluate: {', '.join(ALGORITHMS)} with {', '.join(SOURCES[1:])}; llm, dt",
    )
    seeds: int = setting(3, "policies for each method")
    rl_snapshot_steps: int = setting(RLConfig.snapshot_steps, "gradient steps between snapshots")
    curve_points: int = setting(5, "policies kept on the way")
    last_checkpoints: int = setting(5, "and a fiftieth apart, to the end")

    def __post_init__(self):
        self.encoder = absolute(self.encoder, "llm")
        at_least(1, self, "rl_steps", "rl_batch", "rl_of_goal", "rl_snapshot_steps")
        at_least(1, self, "seeds", "last_checkpoints")
        at_least(0, self, "curve_points", "kept_per_goal", "dynamics_tolerance", "encoder_layers")
        at_least(0, self, "rl_learning_rate", "conservative_weight", "imaginary_share")
        if self.keep not in ("matched", "explained", "both", "all"):
            raise ValueError(f"--keep takes matched, explained, both or all, got {self.keep!r}")
        for method in self.method_list:
            check_name("--methods: unknown method", method, method_names())
        if len(set(self.method_list)) < len(self.method_list):
            raise ValueError(f"--methods takes each method once, got {self.methods!r}")
        if self.imaginary_share >= 1:
            raise ValueError(f"--imaginary_share must be below 1, got {self.imaginary_share}")
        if self.rl_batch % self.rl_of_goal:
            raise ValueError(
                f"--rl_batch {self.rl_batch} must be a multiple of --rl_of_goal {self.rl_of_goal}"
            )
        imaginary = round(self.rl_batch // self.rl_of_goal * self.imaginary_share)
        sources = len(env.NOVEL_LEVELS) * (2 if "+both" in self.methods else 1)
        if "+" in self.methods and self.imaginary_share > 0 and imaginary < sources:
            raise ValueError(
                f"--rl_batch / --rl_of_goal * --imaginary_share is {imaginary} of a batch's goals, "
                f"for {sources} sources (levels, twice in +both); raise one or lower --rl_of_goal"
            )

    def inputs(self) -> dict[str, str]:
        """An encoder in a folder counts by its weights."""
        is_here = self.encoder != "llm" and Path(self.encoder).exists()
        return {"encoder": llm.fingerprint(self.encoder)} if is_here else {}

    @property
    def method_list(self) -> list[str]:
        return self.methods.split(",")

    @property
    def learned_methods(self) -> list[str]:
        return [method for method in self.method_list if method not in MODELS]

    @property
    def checkpoints(self) -> list[int]:
        """The gradient steps after which policies are kept; the last are all of them."""
        steps = {self.rl_steps}
        for number in range(1, self.curve_points):
            steps.add(self.rl_steps * number // self.curve_points)
        for number in range(1, self.last_checkpoints):
            steps.add(self.rl_steps - self.rl_steps * number // EPOCHS)
        return sorted(steps - {0})

    def policy_file(self, method: str, step: int) -> str:
        """Where, below policies/, that is kept which a method has learned after some steps."""
        is_done = step == self.rl_steps
        return f"{method}.safetensors" if is_done else f"checkpoints/{method}-{step}.safetensors"

    def config(self, observation_scale: float = 1.0, bf16: bool = False) -> RLConfig:
        """What `learn` and the algorithms take."""
        return RLConfig(
            steps=self.rl_steps,
            batch=self.rl_batch,
            of_goal=self.rl_of_goal,
            lr=self.rl_learning_rate,
            imaginary_share=self.imaginary_share,
            conservative_weight=self.conservative_weight,
            snapshot_steps=self.rl_snapshot_steps,
            observation_scale=observation_scale,
            bf16=bf16,
        )


# ----------------------------------------------------------------------------------------------
# Training


class Training:
    """What changes while an algorithm learns; a snapshot has all of it."""

    PARTS = ("algorithm", "optimizer", "schedule")

    def __init__(self, algorithm: Algorithm, device):
        config = algorithm.config
        self.algorithm = algorithm.to(device)
        self.trained = [part for part in algorithm.parameters() if part.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, config.steps)
        self.curve = []  # (step, loss, norm of the gradient)

    def gradient_step(self, batch: Batch, name: str) -> tuple[Tensor, Tensor]:
        """Loss and norm of the gradient, (seeds,) each. Raises FloatingPointError for NaN."""
        loss = self.algorithm.loss(batch)
        self.optimizer.zero_grad()
        loss.sum().backward()
        norm = clip_gradients(self.trained, self.algorithm.config.max_grad_norm)
        numbers = {"loss": loss, "norm of the gradient": norm}
        finite.check(name, numbers, self._rows(batch), ("seed", "batch row"))
        self.optimizer.step()
        self.schedule.step()
        self.algorithm.after_step()
        return loss, norm

    def _rows(self, batch: Batch) -> Iterator[Tensor]:
        """Where to look for the row that is not finite."""
        each = batch.obs.shape[1] // batch.goal.shape[1]
        yield from (batch.obs, batch.next_obs, batch.reward, batch.goal.repeat_interleave(each, 1))
        yield self.algorithm.policy(batch.goal, batch.obs)[0]

    def save(self, path: Path) -> None:
        state = {name: getattr(self, name).state_dict() for name in self.PARTS}
        state["curve"] = self.curve
        buffer = io.BytesIO()  # torch.save to a file has no words for a full disk
        torch.save(state, buffer)
        with folder.replacing(path) as aside:
            aside.write_bytes(buffer.getbuffer())

    def restore(self, path: Path) -> None:
        """Go on from a snapshot of the same settings. Raises ValueError if it does not fit."""
        try:
            folder.check_zip(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
            for name in self.PARTS:
                getattr(self, name).load_state_dict(state[name])
            self.curve = state["curve"]
        except Exception as error:  # a damaged file can raise anything
            raise ValueError(
                f"{path} is damaged or a snapshot of other networks; give --force to begin anew"
            ) from error


def clip_gradients(parameters: Sequence[Tensor], largest: float) -> Tensor:
    """Scale each seed's gradients down to a norm, in place. Returns the norms before, (seeds,)."""
    gradients = [parameter.grad for parameter in parameters]
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients])
    norm = norms.norm(dim=0)
    if (norm > largest).any():
        scale = (largest / norm).clamp(max=1)[:, None, None]
        for gradient in gradients:
            gradient.mul_(scale)
    return norm


def scaled(transitions: Batch, config: RLConfig, dtype: torch.dtype) -> Batch:
    """Transitions as losses get them: about one in size, observations in dtype."""
    return transitions._replace(
        obs=(transitions.obs / config.observation_scale).to(dtype),
        reward=config.reward_scale * transitions.reward,
        next_obs=(transitions.next_obs / config.observation_scale).to(dtype),
    )


def learn(
    algorithm: str,
    real: Buffer,
    imaginary: Sequence[Buffer],
    table: Tensor,
    seeds: Sequence[int],
    config: RLConfig,
    num_actions: int,
    description: str = "",
    snapshot: Path | None = None,
    checkpoints: Mapping[int, Path] | None = None,
    log: Callable[[int, float], None] | None = None,
) -> tuple[SeededMLP, list[tuple[int, float, float]]]:
    """Train one policy a seed, all at once.

    table: (goals, hidden) encodings. snapshot: a file; what an earlier call left there is where
    this one goes on. checkpoints: files for the policies after some of the steps, of which only the
    last is in full precision. log: called with (step, loss) a hundred times, first for what a
    snapshot has.
    Returns the policies and the learning curve, a list of (step, loss, gradient norm). Raises
    ValueError for an unknown algorithm or another's snapshot, FloatingPointError for NaN.
    """
    check_name("unknown algorithm", algorithm, list(ALGORITHMS))
    name = description or algorithm
    device = real.transitions.obs.device
    table = table.to(device, torch.bfloat16 if config.bf16 else torch.float32)
    inputs = real.transitions.obs.shape[1] + table.shape[1]
    sizes = [inputs, config.width, config.width, num_actions]
    training = Training(ALGORITHMS[algorithm](seeds, sizes, config), device)
    if snapshot and snapshot.is_file():
        training.restore(snapshot)
    for step, loss, _ in training.curve if log else []:
        log(step, loss)
    batches = Batches(
        real,
        imaginary,
        size=config.batch,
        seeds=len(seeds),
        share=config.imaginary_share,
        seed=int(sum(seeds)),
        each=config.of_goal,
        prepare=partial(scaled, config=config, dtype=table.dtype),
    )
    start = training.schedule.last_epoch
    steps = config.steps
    for step in trange(
        start, steps, desc=name, initial=start, total=steps, leave=False, mininterval=1
    ):
        batch = batches[step]
        batch = batch._replace(goal=table[batch.goal])
        loss, norm = training.gradient_step(batch, f"{name}, step {step + 1}")
        if step % max(1, steps // 100) == 0:
            training.curve.append((step, loss.mean().item(), norm.max().item()))
            if log:
                log(*training.curve[-1][:2])
        if checkpoints and step + 1 in checkpoints:
            dtype = torch.float32 if step + 1 == steps else torch.float16
            policy = training.algorithm.policy
            parts = [part.detach().to("cpu", dtype) for part in policy.parts]
            save_policy(checkpoints[step + 1], parts, seeds, name, config)
        is_due = (step + 1) % config.snapshot_steps == 0 or step + 1 == steps
        if snapshot and is_due:
            training.save(snapshot)
    return training.algorithm.policy, training.curve
