"""Imagined rollouts: the sampling loop over the grounded LLM, the judging of what it imagines.

The loop reads like the paper's (section 4.2): from a start state and a goal the model writes an action, the state it
expects, the next action... The same loop acts in the environment when the physics writes the states instead.
This file knows nothing of training.
"""
import numpy as np
import torch
from tqdm import tqdm

import env
from data import finite
from data.rollouts import read_rollouts, write_rollouts  # noqa: F401, a part of this module's face
from ground import PROMPTS, make_example, pack, prompt_ids, rollout_positions, text_ids, text_positions
from model import ACTION, PAD, STATE, TEXT

TABLE_LOW, TABLE_HIGH = np.array((-0.6, -0.3)), np.array((0.6, 0.7))
LARGEST_MOVE = 0.43  # metres in one action; random play reaches .42 in 100,000 actions (docs/log.md)

# ------------------------------------------------------------------------------------------------------------------
# The sampling loop


def prefill(model, sequences, text_logits=0):
    """Run ragged sequences of positions (see `ground.text_positions`) through the model, left-padded.

    Returns its output, the mask (B, L), and the position that comes next in each row (B,).
    """
    shape = len(sequences), max(map(len, sequences))
    ids, modality = np.zeros(shape, np.int64), np.full(shape, PAD)
    states = np.zeros((*shape, model.config.observation_dim), np.float32)
    for row, sequence in enumerate(sequences):
        for column, (kind, index, state, _) in enumerate(sequence, start=shape[1] - len(sequence)):
            ids[row, column], modality[row, column] = index, kind
            if state is not None:
                states[row, column] = state
    ids, modality, states = (torch.as_tensor(x, device=model.device) for x in (ids, modality, states))
    mask = (modality != PAD).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(ids, modality, states, attention_mask=mask, position_ids=positions, use_cache=True, text_logits=text_logits)
    return out, mask, positions[:, -1] + 1


def decode_one(model, modality, index, states, mask, positions, cache, text_logits=0):
    """Feed one position a row: a token, action or state. index, positions: (B,); states: (B, 10); mask: (B, all positions)."""
    return model(index[:, None], torch.full_like(index, modality)[:, None], states[:, None], attention_mask=mask,
                 position_ids=positions[:, None], cache=cache, use_cache=True, text_logits=text_logits)


def sample_actions(logits, temperature, generator, count=1):
    """count different actions (B, count) from logits (B, 40): the best ones at temperature 0, else drawn."""
    if temperature == 0:
        return logits.topk(count).indices
    weights = (logits.float() / temperature).softmax(-1).clamp(min=1e-9).cpu()
    return torch.multinomial(weights, count, generator=generator).to(logits.device)


def best_candidates(goals, obs, nexts, actions):
    """Which of the actions tried in each row is expected to lead nearest to its goal, and at best to it.

    goals: (B, 10) array; obs: (B, 10); nexts: (B * count, 10), imagined; actions: (B, count). Returns indices (B,) into nexts.
    """
    count = actions.shape[1]
    goals, obs = np.repeat(goals, count, 0), np.repeat(obs, count, 0)
    distance = env.potential(goals, nexts) - 1e6 * env.success(goals, obs, nexts, actions.reshape(-1), imagined=True)
    return distance.reshape(-1, count).argmin(1) + count * np.arange(len(actions))


@torch.inference_mode()
def generate(model, tokenizer, goals, observations, *, temperature=0.0, max_steps=env.MAX_STEPS, seed=0, states=None, candidates=1):
    """Roll out one goal from one start a row, with a key-value cache that lives through the rollout.

    goals: B goals; observations: (B, 10). Each row ends when the judge says success, after max_steps actions, and
    after one action for step goals; finished rows leave the batch. states: (B, 69) physics states, to act in the
    environment instead of imagining. candidates: different actions that the model imagines at each step, to go on with the one
    that the reward likes best. Returns B rollout records.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    array = env.goal_array(goals)
    physics = None if states is None else np.array(states, np.float64)
    obs = torch.as_tensor(np.asarray(observations), dtype=torch.float32, device=model.device)
    paths, moves = [[o] for o in obs.cpu().numpy()], [[] for _ in goals]
    physics_paths = None if physics is None else [[s.copy()] for s in physics]
    out, mask, positions = prefill(model, [text_positions(prompt_ids(tokenizer, "generation", goal.text)) + rollout_positions([o])
                                           for goal, (o,) in zip(goals, paths)])
    cache, running = out.cache, np.arange(len(goals))
    one = mask.new_ones(len(goals), 1)
    for step in range(max_steps):
        actions = sample_actions(out.action_logits[:, -1], temperature, generator, candidates)
        mask = torch.cat([mask, one[:len(mask)]], 1)
        if candidates > 1:
            cache.batch_repeat_interleave(candidates)
        out = decode_one(model, ACTION, actions.flatten(), *(x.repeat_interleave(candidates, 0) for x in (obs, mask, positions)), cache)
        before, imagined = obs.cpu().numpy(), out.state_pred[:, -1]
        if candidates > 1:
            best = best_candidates(array[running], before, imagined.cpu().numpy(), actions.cpu().numpy())
            best = torch.as_tensor(best, device=model.device)
            cache.batch_select_indices(best)
            imagined, actions = imagined[best], actions.flatten()[best]
        played = actions.flatten().cpu().numpy()
        if physics is None:
            obs = imagined
        else:
            physics[running] = env.step_batch(physics[running], played)
            obs = torch.as_tensor(env.observe(physics[running]), device=model.device)
        finite.check(f"rollout, action {step + 1}", {"state": obs}, (obs,), about=lambda row: goals[running[row]].text)
        after = obs.cpu().numpy()
        judged = env.success(array[running], before, after, played, imagined=physics is None)
        for row, o, a in zip(running, after, played):
            paths[row].append(o)
            moves[row].append(a)
            if physics is not None:
                physics_paths[row].append(physics[row].copy())
        going = np.flatnonzero(~judged & (array[running, 0] != env.KINDS.index("step")))
        if len(going) == 0 or step == max_steps - 1:
            break
        keep = torch.as_tensor(going, device=model.device)
        if len(going) < len(running):
            running = running[going]
            cache.batch_select_indices(keep)
        obs, mask, positions = obs[keep], torch.cat([mask, one[:len(mask)]], 1)[keep], positions[keep]
        out = decode_one(model, STATE, torch.zeros_like(keep), obs, mask, positions + 1, cache)
        positions = positions + 2
    return [env.rollout_record(goal, np.array(path), np.array(a, np.int64), imagined=physics is None,
                               states=None if physics is None else np.array(physics_paths[i]))
            for i, (goal, path, a) in enumerate(zip(goals, paths, moves))]


def generate_all(model, tokenizer, goals, observations, *, batch_size=256, states=None, candidates=1, description="imagine", **options):
    """`generate` in batches of goals with texts of like length, with a progress bar; returns records in the order of goals.

    candidates: for all goals, or a number for each. batch_size: rows of the model, of which each candidate takes one.
    """
    counts, seed = np.broadcast_to(candidates, len(goals)), options.pop("seed", 0)
    order, batches = np.lexsort(([len(g.text) for g in goals], counts)), []
    while len(order):
        size = min(max(1, batch_size // counts[order[0]]), (counts[order] == counts[order[0]]).sum())
        batches, order = [*batches, order[:size]], order[size:]
    records = [None] * len(goals)
    for number, rows in enumerate(tqdm(batches, desc=description, disable=len(batches) < 2)):
        part = generate(model, tokenizer, [goals[r] for r in rows], np.asarray(observations)[rows], seed=seed + number,
                        states=None if states is None else states[rows], candidates=int(counts[rows[0]]), **options)
        for row, record in zip(rows, part):
            records[row] = record
    return records


# ------------------------------------------------------------------------------------------------------------------
# The model's own view of rollouts: what it says they achieve, and whether it believes their transitions


@torch.inference_mode()
def explain(model, tokenizer, records, prompt=PROMPTS["explanation"], max_tokens=24, batch_size=256):
    """What the model says that rollouts achieve, greedily decoded: a text for each record."""
    model.eval()
    asked = text_ids(tokenizer, prompt)
    order, answers = np.argsort([len(r["actions"]) for r in records], kind="stable"), [[] for _ in records]
    for start in tqdm(range(0, len(records), batch_size), desc="explain", disable=len(records) <= batch_size, leave=False):
        running = order[start:start + batch_size]
        out, mask, positions = prefill(model, [text_positions(asked) + rollout_positions(records[r]["observations"], records[r]["actions"])
                                               for r in running], text_logits=1)
        cache = out.cache
        for _ in range(max_tokens):
            token = out.logits[:, -1].argmax(-1)
            going = (token != tokenizer.eos_token_id).nonzero()[:, 0]
            if len(going) == 0:
                break
            if len(going) < len(running):
                cache.batch_select_indices(going)
            running, token, positions = running[going.cpu().numpy()], token[going], positions[going]
            for row, t in zip(running, token.tolist()):
                answers[row].append(t)
            mask = torch.cat([mask[going], mask.new_ones(len(going), 1)], 1)
            nothing = torch.zeros(len(going), model.config.observation_dim, device=model.device)
            out = decode_one(model, TEXT, token, nothing, mask, positions, cache, text_logits=1)
            positions = positions + 1
    return [tokenizer.decode(a).strip() for a in answers]


@torch.inference_mode()
def dynamics_error(model, tokenizer, records, rollouts_a_row=16):
    """How far imagined next states are from the model's answer when asked for that transition alone (dynamics prediction).

    Returns an array (T,) for each record, the distance of the ball that differs most, in metres.
    """
    model.eval()
    errors = []
    for start in tqdm(range(0, len(records), rollouts_a_row), desc="check dynamics", disable=len(records) < 1000, leave=False):
        part = records[start:start + rollouts_a_row]
        batch = {k: v.to(model.device) for k, v in pack([make_example("dynamics", tokenizer, part)]).items()}
        ahead = batch["predict"][:, 1:]
        gap = (model(**batch).state_pred[:, :-1] - batch["states"][:, 1:])[ahead].float().reshape(-1, len(env.COLORS), 2)
        errors += np.split(gap.norm(dim=-1).amax(-1).cpu().numpy(), np.cumsum([len(r["actions"]) for r in part])[:-1])
    return errors


def explanation_fits(record):
    """Whether what the model says of a rollout fits its goal: needs no judge, and stands in for one where there is none."""
    return not env.contradicts(record["goal"], record["explanation"])


def explanation_accuracy(records, explanations):
    """How often explanations of rollouts of one relation each are right, as rates: source, target and direction as in the

    goal, exact for all three; and holds, the named relation is true of the final state (several can be at once).
    """
    said = [env.read_relation(text) for text in explanations]
    goal = [env.goal_of(r).relations[0] for r in records]
    parts = np.array([(False,) * 3 if s is None else [x == y for x, y in zip(s, g)] for s, g in zip(said, goal)])
    final = [r["observations"][-1].reshape(5, 2) for r in records]
    holds = [s is not None and bool(env.holds(xy[s[0]] - xy[s[1]], s[2])) for s, xy in zip(said, final)]
    return {**dict(zip(("source", "target", "direction"), parts.mean(0).tolist())), "exact": float(parts.all(1).mean()),
            "holds": float(np.mean(holds))}


# ------------------------------------------------------------------------------------------------------------------
# Judging what was imagined (paper, section 5.3)

def quality(records):
    """Figures of imagined rollouts: match, the rate that fulfils its goal; action_match, for step goals the action alone;

    both of goals that have a judge; off_table and beyond_dynamics, rates of transitions that leave the table or move a
    ball further than physics can;
    executed, the rate that fulfils its goal when its actions are played in the physics from its start, and the same of
    the matched ones alone; explained, the rate whose explanation fits the goal; dynamics_error, see there.
    """
    first = np.stack([r["observations"][0] for r in records])
    obs = np.concatenate([r["observations"][:-1] for r in records]).reshape(-1, 5, 2)
    nexts = np.concatenate([r["observations"][1:] for r in records]).reshape(-1, 5, 2)
    goals = [env.goal_of(r) for r in records]
    played = env.run_episodes(replay([r["actions"] for r in records]), goals, env.state_from_observation(first),
                              max(len(r["actions"]) for r in records))
    match, executed = (np.array([r["success"] for r in of]) for of in (records, played))
    judged = np.array([g.kind != "unknown" for g in goals])
    figures = {
        "rollouts": len(records), "match": match[judged].mean(), "executed": executed[judged].mean(),
        "executed_of_matched": executed[match].mean() if match.any() else 0.0} if judged.any() else {"rollouts": len(records)}
    figures |= {
        "actions": np.mean([len(r["actions"]) for r in records]),
        "off_table": ((nexts < TABLE_LOW) | (nexts > TABLE_HIGH)).any((1, 2)).mean(),
        "beyond_dynamics": (np.linalg.norm(nexts - obs, axis=-1) > LARGEST_MOVE).any(1).mean()}
    if records[0].get("explanation") is not None:
        fits = np.array([explanation_fits(r) for r in records])
        figures["explained"] = fits.mean()
        if judged.any():
            figures["match_of_explained"] = match[fits & judged].mean() if (fits & judged).any() else 0.0
        figures["dynamics_error"] = np.concatenate([r["dynamics_error"] for r in records]).mean()
    steps = [i for i, g in enumerate(goals) if g.kind == "step"]
    if steps:
        figures["action_match"] = env.success([goals[i] for i in steps], first[steps], first[steps],
                                              np.array([records[i]["actions"][0] for i in steps])).mean()
    return {k: float(v) for k, v in figures.items()}


def replay(plans):
    """A policy for `env.run_episodes` that plays fixed action sequences; past its end a plan repeats its last action."""
    played = np.zeros(len(plans), int)

    def act(obs, rows):
        actions = np.array([plans[row][min(played[row], len(plans[row]) - 1)] for row in rows])
        played[rows] += 1
        return actions
    return act
