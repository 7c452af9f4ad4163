"""report.html: what a run did and how well, beside the paper's figures, on one self-contained page.

This file knows the run's folder and what a world answers; the page's looks are in its template.
"""

import base64
import importlib.metadata
import io
import itertools
import platform
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import env
from data import minari_io
from experiment import folder
from experiment.card import figures_in_words
from experiment.episode import save_gif, verdict_of
from experiment.intervals import figure, success_rows
from experiment.quality import played_in_world
from experiment.settings import setting
from model import TASKS


@dataclass
class ReportArguments:
    """The page, and rollouts for others."""

    export: str = setting("none", "rollouts in other formats: npz, minari or npz,minari")

    def __post_init__(self):
        self.kinds = [] if self.export == "none" else self.export.split(",")
        if not set(self.kinds) <= {"npz", "minari"}:
            raise ValueError(f"--export takes none, npz, minari or both, got {self.export!r}")
        if "minari" in self.kinds:
            minari_io.package()


# The paper's figures: success of its best policies as read off its figure, rates as printed
PAPER_WORLD = "clevr_robot"
PAPER_SUCCESS = dict(zip(env.LEVELS, (0.60, 0.45, 0.35, 0.09)))  # words are ours
PAPER_NOVEL_MEAN = {"cql": 0.155, "cql+kalm": 0.271}
PAPER_QUALITY = {  # in the order of env.LEVELS
    "match": (None, 0.85, 0.36, 0.28, None),
    "action_match": (None, None, 0.30, None, None),
    "off_table": (None, 0.184, 0.0, 0.043, None),
    "beyond_dynamics": (None, 0.001, 0.002, 0.002, None),
}
PAPER_HELD_OUT = (0.85, 0.34, 0.30)  # explanations, from the second epoch on; easy state, action
HELD_OUT_WORDS = {
    "explanation_exact": "explanation",
    "unseen_prompt_exact": "the same, new prompt",
    "easy_action": "easy goal, action",
    "easy_state": "easy goal, state",
    "action_accuracy": "action accuracy",
    "state_error": "state error",
}
QUALITY_WORDS = {
    "rollouts": "rollouts",
    "actions": "actions in each",
    "match": "meet their goal as imagined",
    "executed": "meet it when their actions are played in the physics",
    "executed_of_matched": "the same, of those that meet it as imagined",
    "action_match": "first action fits the goal",
    "off_table": "transitions off the table",
    "beyond_dynamics": "transitions beyond what physics allows",
    "explained": "own explanation fits the goal",
    "match_of_explained": "meet their goal, of those whose explanation fits",
    "dynamics_error": "contradiction to the dynamics prediction, in units of observations",
}
SOURCE_COLORS = {"": "#8a8f98", "relabel": "#e0872b", "kalm": "#3b82d0", "both": "#2f9e5b"}
OTHER_COLOR = "#b3a37d"
LLM_COLOR = "#a35cc4"
LINE_STYLES = ("solid", "dashed", "dotted", "dashdot", (0, (1, 4)), (0, (6, 1, 1, 1, 1, 1)))
INK = "#1a1b1c"  # of texts and axes in pictures; on the page it becomes the page's own text color
PACKAGES = "torch transformers accelerate datasets peft safetensors mujoco gymnasium numpy".split()
TEMPLATE = Path(__file__).with_name("report.html.jinja")

# ----------------------------------------------------------------------------------------------
# Success: results["success"][method][level] = {mean, std, seeds, episodes, outcomes}


def levels_of(results: dict) -> list[str]:
    """The levels that a run's results have, in the usual order."""
    row = next(iter(results["success"].values()))
    return [level for level in env.LEVELS if level in row]


def novel_mean(row: dict) -> float | None:
    """The mean success over the novel levels that a method was tried on, None if on none."""
    rates = [row[level]["mean"] for level in env.NOVEL_LEVELS if level in row]
    return sum(rates) / len(rates) if rates else None


def most_episodes(results: dict) -> int:
    """The number of episodes behind the best-measured rates."""
    counts = []
    for row in results["success"].values():
        counts += [cell["episodes"] for cell in row.values()]
    return max(counts)


def results_table(results: dict) -> list[str]:
    """The success table as lines of ASCII, at most 80 columns for methods of 19 letters: means and
    their 95% intervals, and differences to the controls; then what is made of new words.
    """
    levels = [level for level in levels_of(results) if level != env.WORDS]
    width = max(14, *(len(method) + 1 for method in results["success"]))
    lines = ["method".ljust(width) + "".join(f"{level:>15}" for level in levels)]
    for name, figures in success_rows(results, [[level] for level in levels]):
        is_difference = name.startswith(" ")
        line = name.ljust(width)
        for mean, low, high in figures:
            shown = _short(mean, "+") if is_difference else f"{mean:.3f}"
            line += f"{shown} {_short(low)},{_short(high)}".rjust(15)
        lines.append(line)
    return lines + _words_table(results, width)


def _words_table(results, width):
    """Success on level words, and how often the first action is right: in new words with its
    interval, in nonsense, in known words. Lines of ASCII.
    """
    parts = next(iter(results["words"].values()), [])
    header = "in new words".ljust(width) + f"{'success':>8}"
    lines = ["", header + "".join(f"{part:>13} nonsense known"[-25:].rjust(25) for part in parts)]
    for method, figures in results["words"].items():
        cell = results["success"].get(method, {}).get(env.WORDS)
        line = method.ljust(width) + (_short(cell["mean"]) if cell else "").rjust(8)
        for part in parts:
            mean, low, high = figures[part]["new"]
            line += f"{_short(mean)} {_short(low)},{_short(high)}".rjust(13)
            for words in ("nonsense", "known"):
                line += _short(figures[part][words][0]).rjust(6)
        lines.append(line)
    return lines if parts else []


def _short(value, sign="-"):
    """Two digits behind the point, and before it none but that of 1.0."""
    text = f"{round(value, 2) + 0.0:{sign}.2f}"
    return text.replace("1.00", "1.0").replace("0.", ".", 1)


def columns_of(results: dict) -> list[list[str]]:
    """What the columns of success tables are means of: each level, then the novel ones."""
    levels = levels_of(results)
    novel = [level for level in levels if level in env.NOVEL_LEVELS]
    return [*([level] for level in levels), *([novel] if novel else [])]


def _is_papers_world(results):
    return results["config"].get("env", PAPER_WORLD) == PAPER_WORLD


# ----------------------------------------------------------------------------------------------
# Pictures. A method is ALGORITHM or ALGORITHM+SOURCE: lines show the one, colors the other


def color_of(method: str) -> str:
    """The color of a method's source of data; the LLM has its own."""
    source = method.partition("+")[2]
    return LLM_COLOR if method == "llm" else SOURCE_COLORS.get(source, OTHER_COLOR)


def draw_success(axes: Axes, results: dict, level: str) -> None:
    """Bars of one level, a method a line, with their 95% intervals; dotted: paper's best."""
    for i, (method, row) in enumerate(results["success"].items()):
        axes.barh(i, row[level]["mean"], 0.8, color=color_of(method))
        axes.hlines(i, *figure(results, row, [level])[1:], color=INK)
    if _is_papers_world(results) and level in PAPER_SUCCESS:
        axes.axvline(PAPER_SUCCESS[level], color=INK, linestyle="dotted")
    axes.set(title=level, xlim=(0, 1), xlabel="success rate")
    axes.set_yticks(range(len(results["success"])), list(results["success"]))
    axes.invert_yaxis()


def draw_training(axes: Axes, results: dict, level: str) -> None:
    """Success on one level while policies learn, a method a line; shaded: half a standard deviation
    over the seeds to each side, as in the paper's figure.
    """
    looks = looks_of(results["curves"])
    for method, curves in results["curves"].items():
        steps, rates = zip(*curves[level])
        mean = np.mean(rates, axis=1)
        half = np.std(rates, axis=1) / 2
        axes.plot(steps, mean, label=method, **looks[method])
        axes.fill_between(steps, mean - half, mean + half, color=color_of(method), alpha=0.15)
    axes.set(title=level, ylim=(0, 1), xlabel="step", ylabel="success rate")
    _explain_below(axes, columns=2)


def _explain_below(axes, columns):
    """A legend, and few enough numbers on the axis above it."""
    axes.locator_params(axis="x", nbins=4)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.26)}
    axes.legend(fontsize=7, framealpha=0, ncols=columns, **place)


def looks_of(methods: Iterable[str]) -> dict[str, dict]:
    """Color and style of each method's line."""
    algorithms = dict.fromkeys(method.partition("+")[0] for method in methods)
    styles = dict(zip(algorithms, itertools.cycle(LINE_STYLES)))
    looks = {}
    for method in methods:
        style = styles[method.partition("+")[0]]
        looks[method] = {"color": color_of(method), "linestyle": style}
    return looks


def draw_grounding(axes: Axes, log: list[dict]) -> None:
    """Losses of grounding by kind of position."""
    names = dict.fromkeys(name for entry in log for name in entry if name.endswith("_loss"))
    for name in [name for name in names if name.removesuffix("_loss") not in TASKS]:
        # 0 stands for batches without this kind of position
        points = [(entry["step"], entry[name]) for entry in log if entry.get(name)]
        axes.plot(*np.reshape(points, (-1, 2)).T, label=name.replace("_", " "))
    axes.set(title="grounding", xlabel="step", ylabel="loss", yscale="log")
    axes.legend(fontsize=7, framealpha=0)


def draw_held_out(axes: Axes, log: list[dict], papers: Iterable[float]) -> None:
    """Figures of held-out rollouts while the LLM is grounded; dotted: the paper's rates."""
    measured = [entry for entry in log if "eval_action_accuracy" in entry]
    for name, words in HELD_OUT_WORDS.items():
        points = [(e["step"], e[f"eval_{name}"]) for e in measured if f"eval_{name}" in e]
        if points:
            axes.plot(*np.transpose(points), label=words)
    for rate in papers:
        axes.axhline(rate, color=INK, linestyle="dotted", linewidth=0.8)
    axes.set(title="held-out rollouts", xlabel="step", ylim=(0, 1))
    _explain_below(axes, columns=2)


def draw_policies(axes: Axes, curves: dict) -> None:
    """Losses of the policies: {method: [(step, loss), ...]}."""
    looks = looks_of(curves)
    for method, curve in curves.items():
        axes.plot(*np.transpose(curve), label=method, **looks[method])
    losses = np.concatenate([np.transpose(curve)[1] for curve in curves.values()])
    scale = "log" if (losses > 0).all() else "symlog"
    axes.set(title="offline RL", xlabel="step", ylabel="loss", yscale=scale)
    _explain_below(axes, columns=3)


def success_figure(results: dict, draw: Callable = draw_success) -> str:
    """SVG text: success by level and method, with 95% intervals; or another drawing by level."""
    levels = levels_of(results)
    drawings = [partial(draw, results=results, level=level) for level in levels]
    return _svg(drawings, (2.4 * len(levels) + 0.8, 2.8), sharey=True)


def curves_figure(log: list[dict], curves: dict) -> str:
    """SVG text: learning curves of grounding and of the policies, side by side."""
    return _svg([partial(draw_grounding, log=log), partial(draw_policies, curves=curves)], (9, 3))


def _svg(drawings, size, sharey=False, transparent=False):
    """SVG text without date and maker of drawings, each a function of its axes, in one row."""
    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    spines = ("axes.spines.top", "axes.spines.right")
    others = {"font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": "kalm"}
    style = {**dict.fromkeys(inks, INK), **dict.fromkeys(spines, False), **others}
    with matplotlib.rc_context(style):
        figure = Figure(size, layout="constrained")
        axes = figure.subplots(1, len(drawings), sharey=sharey, squeeze=False)
        for draw, each in zip(drawings, axes[0]):
            draw(each)
        picture = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(picture, format="svg", transparent=transparent, metadata=nothing)
    text = picture.getvalue()
    return text[text.index("<svg") :]


def _page_svg(name, draw, **data):
    """A drawing for the page: in the page's own colors, and with ids that no other picture has."""
    text = _svg([partial(draw, **data)], (3.7, 2.6), transparent=True)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    return text.replace(INK, "currentColor")


# ----------------------------------------------------------------------------------------------
# The page: its tables, whose cells are texts, numbers or None, and its gallery


def _success_rows(results):
    levels = levels_of(results)
    rows = []
    for name, figures in success_rows(results, columns_of(results)):
        rows.append([name, *(f"{mean:.3f} ({low:.2f}, {high:.2f})" for mean, low, high in figures)])
    if _is_papers_world(results):
        blank = [None for _ in levels]
        rows += [[f"paper: {name}", *blank, mean] for name, mean in PAPER_NOVEL_MEAN.items()]
        rows.append(["paper: best of the level", *map(PAPER_SUCCESS.get, levels), None])
    return rows


def _last_rows(results):
    """Success as the paper reports it, the mean of the last checkpoints."""
    rows = []
    for method, row in results["last_checkpoints"].items():
        means = [row[level]["mean"] for level in levels_of(results)]
        rows.append([method, *means, novel_mean(row), next(iter(row.values()))["episodes"]])
    return rows


def _quality_rows(results):
    quality = results["quality"]
    levels = [level for level in env.LEVELS if level in quality]
    found = {}
    for level in levels:
        found.update(quality[level])
    names = sorted(found, key=[*QUALITY_WORDS, *found].index)  # those with words first
    rows = [["rates, if not said otherwise", *levels]]
    for name in names:
        figures = [quality[level].get(name) for level in levels]
        if name == "rollouts":
            figures = [None if figure is None else int(figure) for figure in figures]
        rows.append([QUALITY_WORDS.get(name, name.replace("_", " ")), *figures])
        if name in PAPER_QUALITY and _is_papers_world(results):
            of_paper = dict(zip(env.LEVELS, PAPER_QUALITY[name]))
            rows.append(["paper", *(of_paper[level] for level in levels)])
    return rows


def _words_rows(results):
    """How often first actions are right, a row a method below the header; nothing without words."""
    rows = []
    for method, figures in results["words"].items():
        header = ["method"]
        row = [method]
        for part, by_words in figures.items():
            header += [f"{part}, {words}" for words in by_words]
            row += [f"{mean:.3f} ({low:.2f}, {high:.2f})" for mean, low, high in by_words.values()]
        rows = [header, *rows[1:], row]
    return rows


def _version_rows():
    rows = [["python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"]]
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        rows.append([name, version])
    return rows


def _examples(records):
    """Two imagined rollouts of each verdict, brief ones first."""
    brief_first = sorted(records, key=lambda record: len(record["actions"]) > 12)
    examples = []
    for verdict in ("goal met", "goal missed", "not judged"):
        examples += [record for record in brief_first if verdict_of(record) == verdict][:2]
    return examples


def _gallery(world, imagined):
    """For each level some imagined rollouts, each beside what its actions do in the physics."""
    cards = []
    for level, records in imagined.items():
        for record in _examples(records):
            played = played_in_world(world, record)
            pictures = [_picture(world, "imagined", record), _picture(world, "executed", played)]
            cards.append({"level": level, "record": record, "pictures": pictures})
    return cards


def _picture(world, kind, record):
    """A rollout as an animated picture, and in words for those who do not see it."""
    file = io.BytesIO()
    save_gif(file, world, record, size=180)
    gif = base64.b64encode(file.getvalue()).decode()
    steps = len(record["actions"])
    verdict = verdict_of(record)
    change = world.change_in_words(record["observations"][0], record["observations"][-1])
    return {"kind": kind, "steps": steps, "verdict": verdict, "change": change, "gif": gif}


def write(run: Path, world: env.World, imagined: dict[str, list[dict]]) -> dict:
    """Write report.html of a run. imagined: {level: rollout records}. Returns the run's results."""
    results = folder.read_json(run / "results.json")
    log = folder.read_json(run / "grounded" / "metrics.json")["log"]
    curves = folder.read_json(run / "policies" / "curves.json")
    success_svgs = {}
    training_svgs = {}
    for level in levels_of(results):
        of_level = {"results": results, "level": level}
        success_svgs[level] = _page_svg(level, draw_success, **of_level)
        if results["curves"]:
            training_svgs[level] = _page_svg(f"training-{level}", draw_training, **of_level)
    learning_svgs = {}
    if log:
        learning_svgs["grounding"] = _page_svg("grounding", draw_grounding, log=log)
    if any("eval_action_accuracy" in entry for entry in log):
        papers = PAPER_HELD_OUT if _is_papers_world(results) else ()
        held_out_svg = _page_svg("held-out", draw_held_out, log=log, papers=papers)
        learning_svgs["held-out rollouts"] = held_out_svg
    if curves:
        learning_svgs["offline RL"] = _page_svg("offline-rl", draw_policies, curves=curves)
    ablations = run / "ablations.json"  # tables that docs/results.py writes
    times = {**results["time_s"], "all": sum(results["time_s"].values())}
    settings = {name: str(value) or "none" for name, value in results["config"].items()}
    rules = {"autoescape": True, "trim_blocks": True, "undefined": jinja2.StrictUndefined}
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), **rules)
    page = template.render(
        world=world.name,
        results=results,
        episodes=most_episodes(results),
        paper_success=PAPER_SUCCESS if _is_papers_world(results) else {},
        success_svgs=success_svgs,
        success_rows=_success_rows(results),
        training_svgs=training_svgs,
        last_rows=_last_rows(results),
        quality_rows=_quality_rows(results),
        words_rows=_words_rows(results),
        gallery=_gallery(world, imagined),
        ablations=folder.read_json(ablations) if ablations.is_file() else [],
        learning_svgs=learning_svgs,
        grounding=figures_in_words(results["grounding"]),
        seconds={stage: round(time) for stage, time in times.items()},
        versions=_version_rows(),
        settings=settings,
    )
    with folder.replacing(run / "report.html") as aside:
        aside.write_text(page, encoding="utf-8")
    return results
