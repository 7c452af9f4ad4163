"""Skill acquisition: offline RL on real and imaginary rollouts (paper, section 4.3).

Goal texts are encoded once by a frozen language model; policies see the observation joined with the encoding. Behaviour
cloning, discrete Conservative Q-Learning and discrete Implicit Q-Learning share one buffer, and all seeds train at once as
a leading batch dimension.
This file knows no grounded model: rollouts come in as records, wherever they are from.
"""
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import trange

import env
from data import checkpoint, finite, store

# ------------------------------------------------------------------------------------------------------------------
# Goal encodings


@torch.inference_mode()
def encode_texts(texts, model, tokenizer, batch_size=128):
    """Frozen encodings of texts: (len(texts), hidden) float32, the mean of the last hidden states over each text's tokens.

    model: any transformers encoder or causal LM without a head, e.g. `AutoModel.from_pretrained(...)`.
    """
    model.eval()
    order = np.argsort([len(t) for t in texts], kind="stable")  # like lengths together: little padding
    encoded = [None] * len(texts)
    for start in trange(0, len(texts), batch_size, desc="encode goals", leave=False, disable=len(texts) < 10 * batch_size):
        rows = order[start:start + batch_size]
        ids = [tokenizer(texts[r], add_special_tokens=True)["input_ids"] for r in rows]
        longest = max(map(len, ids))
        mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i in ids], device=model.device)
        padded = torch.tensor([i + [0] * (longest - len(i)) for i in ids], device=model.device)
        hidden = model(input_ids=padded, attention_mask=mask).last_hidden_state.float()
        weight = mask[..., None] / mask.sum(1)[:, None, None]
        for row, vector in zip(rows, (hidden * weight).sum(1).cpu()):
            encoded[row] = vector
    return torch.stack(encoded)


class GoalTable:
    """Encodings of distinct goal texts: `table` is (texts, hidden) float32, `index[text]` a text's row.

    scale: (2, hidden), the mean and deviation that standardised them, for `with_text`.
    """

    def __init__(self, texts, table, scale=None):
        self.index, self.table, self.scale = {text: row for row, text in enumerate(texts)}, table, scale

    @classmethod
    def encode(cls, training_texts, novel_texts, model, tokenizer):
        """Encode all texts, standardised by the mean and deviation of the training texts."""
        texts = list(dict.fromkeys([*training_texts, *novel_texts]))
        encodings = encode_texts(texts, model, tokenizer)
        known = encodings[:len(set(training_texts))]
        scale = torch.stack([known.mean(0), known.std(0) + 1e-6])
        return cls(texts, (encodings - scale[0]) / scale[1], scale)

    def with_text(self, text, model, tokenizer):
        """The table with one more text, encoded by the model that encoded the others. Raises ValueError without `scale`."""
        if self.scale is None:
            raise ValueError("these policies do not say how goal texts were standardised; learn them again (--stage learn --force)")
        encoding = (encode_texts([text], model, tokenizer) - self.scale[0]) / self.scale[1]
        return GoalTable([*self.index, text], torch.cat([self.table, encoding]), self.scale)

    def rows(self, texts):
        """Rows of the table for texts: (len(texts),) int64."""
        return np.array([self.index[t] for t in texts])

    def save(self, path):
        """A safetensors file; the texts are its metadata, as JSON."""
        tensors = {k: v.cpu().contiguous() for k, v in (("table", self.table), ("scale", self.scale)) if v is not None}
        save_file(tensors, str(path), {"texts": json.dumps(list(self.index))})

    @classmethod
    def load(cls, path):
        with safe_open(str(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return cls(json.loads(file.metadata()["texts"]), **tensors)


# ------------------------------------------------------------------------------------------------------------------
# Buffer

class Buffer:
    """Transitions as flat tensors on the device: obs, next_obs (N, 10); goal, action (N,) int64; reward, done (N,).

    balanced: draw each goal as often as any other, however many transitions it has. dynamics_tolerance: leave out
    transitions whose `dynamics_error` is larger, in metres; 0 keeps all.
    """

    def __init__(self, records, goals, device="cpu", balanced=False, dynamics_tolerance=0.0):
        def joined(parts, dtype):
            return torch.as_tensor(np.concatenate(list(parts)), dtype=dtype, device=device)
        lengths = [len(r["actions"]) for r in records]
        self.obs = joined((r["observations"][:-1] for r in records), torch.float32)
        self.next_obs = joined((r["observations"][1:] for r in records), torch.float32)
        self.action = joined((r["actions"] for r in records), torch.int64)
        self.reward = joined((r["rewards"] for r in records), torch.float32)
        self.goal = torch.as_tensor(np.repeat(goals.rows([r["goal"] for r in records]), lengths), device=device)
        self.done = torch.zeros(len(self.action), device=device)
        self.done[torch.as_tensor(np.cumsum(lengths) - 1, device=device)] = torch.tensor(
            [float(r["success"]) for r in records], device=device)
        order = torch.arange(len(self.action), device=device)
        if dynamics_tolerance:
            believed = joined((r.get("dynamics_error", np.zeros(len(r["actions"]))) for r in records), torch.float32) <= dynamics_tolerance
            order = order[believed]
        self.balanced = balanced
        if balanced:
            order = order[self.goal[order].argsort(stable=True)]
        self._arrange(order)
        self.counts = self.goal.unique_consecutive(return_counts=True)[1]
        self.starts = self.counts.cumsum(0) - self.counts

    def _arrange(self, order):
        for name in ("obs", "goal", "action", "reward", "next_obs", "done"):
            setattr(self, name, getattr(self, name)[order])

    def __len__(self):
        return len(self.action)

    def draw(self, shape, generator):
        """Rows to train on, uniform over transitions, or over goals and then over each one's transitions."""
        if not self.balanced:
            return torch.randint(len(self), shape, generator=generator, device=self.action.device)
        goal = torch.randint(len(self.counts), shape, generator=generator, device=self.action.device)
        within = torch.rand(shape, generator=generator, device=self.action.device) * self.counts[goal]
        return self.starts[goal] + within.long().clamp(max=self.counts[goal] - 1)

    def take(self, rows):
        """The transitions `rows` (any shape) as a tuple (obs, goal, action, reward, next_obs, done)."""
        return tuple(x[rows] for x in (self.obs, self.goal, self.action, self.reward, self.next_obs, self.done))


def sample_batch(real, imaginary, size, seeds, imaginary_share, generator):
    """A batch (seeds, size) a seed: `imaginary_share` of it from the buffers in the list `imaginary`, in equal parts, after the
    rest from `real`; all of it from there if the list is empty."""
    counts = np.diff(np.linspace(0, round(size * imaginary_share), len(imaginary) + 1).astype(int)) if imaginary else []
    parts = [(real, size - sum(counts)), *zip(imaginary, counts)]
    drawn = [b.take(b.draw((seeds, n), generator)) for b, n in parts if n]
    return tuple(torch.cat(column, 1) for column in zip(*drawn))


# ------------------------------------------------------------------------------------------------------------------
# Networks and losses

class SeededMLP(nn.Module):
    """One MLP a seed, evaluated together, ReLU between layers.

    flat: all numbers, (seeds, numbers) float32, layer by layer a weight (fan in, fan out) and a bias: gradient norms, AdamW and
    Polyak updates are one operation each. weights, biases: its parts, (seeds, fan in, fan out) and (seeds, 1, fan out).
    """

    def __init__(self, seeds, sizes):
        super().__init__()
        self.shapes, parts = [shape for fans in zip(sizes[:-1], sizes[1:]) for shape in (fans, (1, fans[1]))], []
        for layer, fan_in in enumerate(sizes[:-1]):
            bound = fan_in ** -0.5  # torch.nn.Linear's start, with a generator of its own for each seed
            draw = [torch.Generator().manual_seed(1000 * seed + layer) for seed in seeds]
            parts += [torch.stack([torch.empty(n).uniform_(-bound, bound, generator=g) for g in draw])
                      for n in map(math.prod, self.shapes[2 * layer:2 * layer + 2])]
        self.flat = nn.Parameter(torch.cat(parts, 1))

    def parts(self, flat):
        """Views of numbers that lie as `flat` does, layer by layer: weight, bias, weight, ..."""
        return [part.unflatten(1, shape) for part, shape in zip(flat.split([math.prod(s) for s in self.shapes], 1), self.shapes)]

    weights = property(lambda self: self.parts(self.flat)[::2])
    biases = property(lambda self: self.parts(self.flat)[1::2])

    def forward(self, goals, *observations):
        """Outputs (seeds, batch, sizes[-1]) float32 for each of observations (seeds, batch, 10), which share their goals' encodings
        (seeds, batch, hidden): so they share most of the first layer's work. Products of matrices are in the inputs' precision."""
        first, bias, *rest = (part.contiguous() for part in self.parts(self.flat.to(goals.dtype)))  # bmm is slow on strided ones
        of_obs, of_goals = first.split([first.shape[1] - goals.shape[-1], goals.shape[-1]], 1)
        goal_part, outputs = torch.baddbmm(bias, goals, of_goals), []
        for obs in observations:
            x = torch.baddbmm(goal_part, obs, of_obs)
            for weight, bias in zip(rest[::2], rest[1::2]):
                x = torch.baddbmm(bias, F.relu(x), weight)
            outputs.append(x.float())
        return outputs


@dataclass(frozen=True)
class RLConfig:
    """Offline RL. The paper: BC with batch 100 and lr 1e-3, CQL with batch 32, lr 6.25e-5 and weight 10, 500,000 steps."""
    steps: int = 8000
    batch: int = 256
    lr: float = 1e-3                  # decays to 0 along a cosine
    width: int = 256                  # two hidden layers of it
    weight_decay: float = 1e-4
    discount: float = 0.99            # gamma
    conservative_weight: float = 1.0  # alpha of CQL
    expectile: float = 0.9            # tau of IQL: V(s) is this expectile of Q(s, a) over the data's actions, 0.5 their mean
    advantage_weight: float = 10.0    # beta of IQL: how much more a better action is imitated
    reward_scale: float = 0.01        # a success is worth 1
    target_update: float = 0.005      # Polyak step toward the online network, each gradient step
    imaginary_share: float = 0.5      # of each batch
    max_grad_norm: float = 100.0      # of each seed; longer gradients are cut to it. Usual ones of CQL with weight 10 are below 42
    bf16: bool = False                # products of matrices in bfloat16, sums and losses in float32


def of_action(values, action):
    """The value of each transition's own action: values (seeds, batch, actions), action (seeds, batch) -> (seeds, batch)."""
    return values.gather(-1, action[..., None]).squeeze(-1)


def imitation_loss(logits, action):
    """Behaviour cloning: cross entropy of the data's actions. logits: (seeds, batch, actions). Returns (seeds,)."""
    return -of_action(logits.log_softmax(-1), action).mean(-1)


def bellman_loss(q, next_q, next_q_target, action, reward, done, discount):
    """Squared error to the double-DQN target r + gamma (1 - done) Q_target(s', argmax_a Q(s', a)). Returns (seeds,)."""
    target = reward + discount * (1 - done) * of_action(next_q_target, next_q.argmax(-1))
    return (of_action(q, action) - target.detach()).square().mean(-1)


def conservative_loss(q, action):
    """Push Q down where no data is: E[logsumexp_a Q(s, a) - Q(s, a_data)] (Kumar et al., 2020, eq. 4). Returns (seeds,)."""
    return imitation_loss(q, action)  # the cross entropy of Q as logits


def expectile_loss(error, expectile):
    """|tau - 1(u < 0)| u^2, least where V is the tau-expectile of Q; error u = Q - V: (seeds, batch) (Kostrikov et al., 2022, eq. 5).
    Returns (seeds,)."""
    return ((expectile - (error < 0).float()).abs() * error.square()).mean(-1)


def advantage_weighted_loss(logits, action, advantage, weight):
    """Imitation of each action exp(beta A) times, at most 100 times (Kostrikov et al., 2022, eq. 7). Returns (seeds,)."""
    times = (weight * advantage.detach()).exp().clamp(max=100)
    return -(times * of_action(logits.log_softmax(-1), action)).mean(-1)


# ------------------------------------------------------------------------------------------------------------------
# Training and acting

def scaled(obs):
    """Observations as policies read them, about one in size."""
    return obs / 0.3


def clip_gradients(networks, largest):
    """Scale each seed's gradients down to the norm `largest`, in place. Returns the norms that they had, (seeds,)."""
    gradients = [network.flat.grad for network in networks]
    norm = torch.stack([g.norm(dim=1) for g in gradients]).norm(dim=0)
    scale = (largest / norm).clamp(max=1)[:, None]
    for g in gradients:
        g.mul_(scale)
    return norm


def learn(algorithm, real, imaginary, table, seeds, config, description="", snapshots=None, snapshot_minutes=5.0,
          log=None):
    """Train one policy a seed, all at once. algorithm: "bc", "cql" or "iql"; real: Buffer; imaginary: list of Buffers.

    table: (goals, hidden) encodings. snapshots: a folder for them; what an earlier call left there is where this one goes on.
    log: called with (step, loss) a hundred times.
    Returns the trained SeededMLP and its learning curve, a list of (step, loss, gradient norm). Raises FloatingPointError.
    """
    device = real.action.device
    table = table.to(device, torch.bfloat16 if config.bf16 else torch.float32)
    sizes = [real.obs.shape[1] + table.shape[1], config.width, config.width, env.NUM_ACTIONS]
    network = SeededMLP(seeds, sizes).to(device)
    target = SeededMLP(seeds, sizes).to(device).requires_grad_(False)
    critic, trained = network, [network]  # the network with Q, whose slow copy is the target
    if algorithm == "iql":
        critic, value = SeededMLP(seeds, sizes).to(device), SeededMLP(seeds, [*sizes[:-1], 1]).to(device)
        trained = [network, critic, value]
    optimizer = torch.optim.AdamW([p for each in trained for p in each.parameters()], lr=config.lr, weight_decay=config.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    generator = torch.Generator(device=device).manual_seed(int(sum(seeds)) + 17)
    name, curve, start, saved = description or algorithm, [], 0, time.monotonic()
    training = [*trained, target], optimizer, schedule, generator
    if last := snapshots and store.last_sealed(snapshots, name):
        curve, start = checkpoint.resume_training(last, *training), int(last.name.rpartition("-")[2])
    for step in trange(start, config.steps, desc=name, initial=start, total=config.steps, leave=False, mininterval=1):
        obs, goal, action, reward, next_obs, done = sample_batch(
            real, imaginary, config.batch, len(seeds), config.imaginary_share, generator)
        encoded, obs, next_obs = table[goal], scaled(obs).to(table.dtype), scaled(next_obs).to(table.dtype)
        reward = config.reward_scale * reward
        if algorithm == "bc":
            out, = network(encoded, obs)
            loss = imitation_loss(out, action)
        elif algorithm == "cql":
            out, next_q = network(encoded, obs, next_obs)
            with torch.no_grad():
                next_q_target, = target(encoded, next_obs)
            loss = (bellman_loss(out, next_q, next_q_target, action, reward, done, config.discount)
                    + config.conservative_weight * conservative_loss(out, action))
        else:
            (out,), (q,), (v, next_v) = network(encoded, obs), critic(encoded, obs), value(encoded, obs, next_obs)
            with torch.no_grad():
                q_target, bootstrapped = of_action(target(encoded, obs)[0], action), reward + config.discount * (1 - done) * next_v.squeeze(-1)
            advantage = q_target - v.squeeze(-1)
            loss = (expectile_loss(advantage, config.expectile) + (of_action(q, action) - bootstrapped).square().mean(-1)
                    + advantage_weighted_loss(out, action, advantage, config.advantage_weight))
        optimizer.zero_grad(set_to_none=True)
        loss.sum().backward()
        norm = clip_gradients(trained, config.max_grad_norm)
        finite.check(f"{name}, step {step + 1}", {"loss": loss, "norm of the gradient": norm}, (obs, next_obs, reward, encoded, out),
                     ("seed", "batch row"))
        optimizer.step()
        schedule.step()
        if algorithm != "bc":
            with torch.no_grad():
                target.flat.lerp_(critic.flat, config.target_update)
        if step % max(1, config.steps // 100) == 0:
            curve.append((step, loss.mean().item(), norm.max().item()))
            if log:
                log(*curve[-1][:2])
        if snapshots and (step + 1 == config.steps or time.monotonic() - saved >= 60 * snapshot_minutes):
            checkpoint.save_training(Path(snapshots) / f"{name}-{step + 1}", *training, curve)
            saved = time.monotonic()
    return network, curve


def policy_of(network, seed_index, table, goal_rows):
    """A greedy policy for `env.run_episodes`: episode i pursues the goal in row goal_rows[i] of the table."""
    device = network.flat.device
    table, goal_rows = table.to(device), torch.as_tensor(goal_rows, device=device)
    weights = [(w[seed_index].detach(), b[seed_index].detach()) for w, b in zip(network.weights, network.biases)]

    @torch.inference_mode()
    def act(obs, rows):
        goals = table[goal_rows[torch.as_tensor(rows, device=device)]]
        x = torch.cat([scaled(torch.as_tensor(obs, device=device)), goals], -1)
        for layer, (weight, bias) in enumerate(weights):
            x = torch.addmm(bias, x, weight)
            if layer < len(weights) - 1:
                x = F.relu(x)
        return x.argmax(-1).cpu().numpy()
    return act


def relabel(records, goals, count, rng, pool=6000):
    """The control without a language model: real rollouts, cut and renamed for novel goals that they happen to fulfil.

    records: real rollouts, of which `pool` are looked at; goals: novel ones; count: how many to make, spread evenly over the
    goals that any rollout fulfils, fewer where there are no more. Step goals are judged by the action,
    as in the environment.
    """
    chosen = [records[i] for i in rng.permutation(len(records))[:pool]]
    lengths = np.array([len(r["actions"]) for r in chosen])
    obs = np.concatenate([r["observations"][:-1] for r in chosen])
    nexts = np.concatenate([r["observations"][1:] for r in chosen])
    actions = np.concatenate([r["actions"] for r in chosen])
    owner, offset = np.repeat(np.arange(len(chosen)), lengths), np.cumsum(lengths) - lengths
    candidates = []
    for goal in goals:
        hit = np.flatnonzero(env.success(goal, obs, nexts, actions))
        if goal.kind != "step":  # only the first success of a rollout, and only if it was not fulfilled from the start
            fulfilled = env.success(goal, obs[offset], obs[offset], actions[offset])
            hit = hit[np.unique(owner[hit], return_index=True)[1]]
            hit = hit[~fulfilled[owner[hit]]]
        candidates.append(rng.permutation(hit))
    made, turn = [], 0
    while len(made) < count and any(turn < len(c) for c in candidates):
        for goal, hits in zip(goals, candidates):
            if turn < len(hits) and len(made) < count:
                record, end = chosen[owner[hits[turn]]], hits[turn] - offset[owner[hits[turn]]] + 1
                begin = end - 1 if goal.kind == "step" else 0
                made.append(env.rollout_record(goal, record["observations"][begin:end + 1], record["actions"][begin:end]))
        turn += 1
    return made


# ------------------------------------------------------------------------------------------------------------------
# Policies on disk

def save_policy(path, network, seeds, method, config):
    """All seeds of one method as one safetensors file, written aside and renamed."""
    tensors = {f"{kind}.{i}": part.detach().cpu().contiguous() for kind in ("weights", "biases") for i, part in enumerate(getattr(network, kind))}
    with store.replacing(path) as aside:
        save_file(tensors, str(aside), {"method": method, "seeds": json.dumps(list(seeds)), "config": json.dumps(asdict(config))})


def load_policy(path):
    """(SeededMLP, seeds) of a file from `save_policy`."""
    with safe_open(str(path), "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}
        seeds = json.loads(file.metadata()["seeds"])
    parts = [tensors[f"{kind}.{i}"] for i in range(len(tensors) // 2) for kind in ("weights", "biases")]
    network = SeededMLP(seeds, [parts[0].shape[1], *(bias.shape[2] for bias in parts[1::2])])
    network.flat.data = torch.cat([part.flatten(1) for part in parts], 1)
    return network, seeds
