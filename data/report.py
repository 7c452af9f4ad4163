"""report.html: what a run did and how well, beside the paper's figures, on one self-contained page.

This file knows the run folder (data/README.md), and nothing of how its stages work.
"""
import base64
import html
import importlib.metadata
import io
import json
import platform
import re

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

import env  # noqa: E402
import rollout  # noqa: E402
from data import store  # noqa: E402

# The paper's figures, by level in the order of env.LEVELS: success of its best policies as read off its figure, rates as printed
PAPER_SUCCESS = dict(zip(env.LEVELS, (0.60, 0.45, 0.35, 0.09)))
PAPER_NOVEL_MEAN = {"cql": 0.155, "cql+kalm": 0.271}
PAPER_QUALITY = {"match": (None, 0.85, 0.36, 0.28), "action_match": (None, None, 0.30, None), "off_table": (None, 0.184, 0.0, 0.043),
                 "beyond_dynamics": (None, 0.001, 0.002, 0.002)}
QUALITY_WORDS = {
    "rollouts": "rollouts", "actions": "actions in each", "match": "meet their goal as imagined",
    "executed": "meet it when their actions are played in the physics", "executed_of_matched": "the same, of those that meet it as imagined",
    "action_match": "first action fits the goal", "off_table": "transitions off the table",
    "beyond_dynamics": "transitions beyond what physics allows", "explained": "own explanation fits the goal",
    "match_of_explained": "meet their goal, of those whose explanation fits", "dynamics_error": "contradiction to the dynamics prediction, m"}
VERDICTS = {"met": "goal met", "missed": "goal missed", "unjudged": "no judge for this goal"}
SOURCE_COLORS = {"": "#8a8f98", "relabel": "#e0872b", "kalm": "#3b82d0", "both": "#2f9e5b"}
LLM_COLOR = "#a35cc4"
LINES = {"bc": "solid", "cql": "dashed", "iql": "dotted"}
INK = "#1a1b1c"  # of texts and axes in pictures; on the page it becomes the page's own text color
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "safetensors", "mujoco", "gymnasium", "numpy", "matplotlib")


def levels_of(results):
    """The levels that a run's results have, in the usual order."""
    return [level for level in env.LEVELS if level in next(iter(results["success"].values()))]


def novel_mean(row):
    """The mean success over the novel levels that a method's row of results has, or None if it has none."""
    rates = [row[level]["mean"] for level in env.NOVEL_LEVELS if level in row]
    return sum(rates) / len(rates) if rates else None


def results_table(results):
    """The success table as lines of text."""
    levels = levels_of(results)
    lines = ["method        " + "".join(f"{level:>16}" for level in levels)]
    for method, row in results["success"].items():
        cells = [f"{row[level]['mean']:.3f}" + (f" +-{row[level]['std']:.3f}" if len(row[level]["seeds"]) > 1 else " " * 8)
                 for level in levels]
        lines.append(f"{method:14}" + "".join(f"{cell:>16}" for cell in cells))
    return lines


# ------------------------------------------------------------------------------------------------------------------
# Pictures

def color_of(method):
    return LLM_COLOR if method == "llm" else SOURCE_COLORS[method.partition("+")[2]]


def draw_success(axes, results, level):
    """Bars of one level, a method a line, with the deviation over seeds; dotted, the paper's best."""
    for i, (method, row) in enumerate(results["success"].items()):
        error = row[level]["std"] if len(row[level]["seeds"]) > 1 else None
        axes.barh(i, row[level]["mean"], 0.8, xerr=error, color=color_of(method), ecolor=INK, capsize=2)
    axes.axvline(PAPER_SUCCESS[level], color=INK, linestyle="dotted")
    axes.set(title=level, xlim=(0, 1), xlabel="success rate")
    axes.set_yticks(range(len(results["success"])), list(results["success"]))
    axes.invert_yaxis()


def draw_grounding(axes, log):
    for name in ("text_loss", "action_loss", "state_loss"):
        points = [(e["step"], e[name]) for e in log if e[name]]  # 0 stands for batches without this kind of position
        axes.plot(*zip(*points) if points else ((), ()), label=name.replace("_", " "))
    axes.set(title="grounding", xlabel="step", ylabel="loss", yscale="log")
    axes.legend(fontsize=7, framealpha=0)


def draw_policies(axes, curves):
    for method, curve in curves.items():
        steps, losses = np.array(curve).T
        axes.plot(steps, losses, label=method, color=color_of(method), linestyle=LINES[method.partition("+")[0]])
    axes.set(title="offline RL", xlabel="step", ylabel="loss", yscale="log")
    axes.locator_params(axis="x", nbins=4)
    axes.legend(fontsize=6, framealpha=0, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.22))


def success_figure(results):
    """Success by level and method in one row, as an SVG string; error bars are the standard deviation over seeds."""
    levels = levels_of(results)
    return svg([lambda axes, level=level: draw_success(axes, results, level) for level in levels], (2.2 * len(levels) + 0.8, 2.6))


def curves_figure(log, curves):
    """Learning curves of grounding and of the policies side by side, as an SVG string."""
    return svg([lambda axes: draw_grounding(axes, log), lambda axes: draw_policies(axes, curves)], (9, 3), sharey=False)


def svg(drawings, size, sharey=True, page=False):
    """Drawings, each a function of its axes, in one row: an SVG string, on white, or for the page without background."""
    style = {name: INK for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")}
    look = {"svg.fonttype": "none", "svg.hashsalt": "kalm", "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context({**style, **look}):
        figure, axes = plt.subplots(1, len(drawings), figsize=size, sharey=sharey, squeeze=False, layout="constrained")
        for draw, each in zip(drawings, axes[0]):
            draw(each)
        picture = io.StringIO()
        figure.savefig(picture, format="svg", transparent=page, metadata={"Date": None})
        plt.close(figure)
    text = picture.getvalue()
    return text[text.index("<svg"):]


def page_picture(draw, description, name, size=(3.7, 2.6)):
    """One drawing for the page: named for those who do not see it, in the page's own colors, with ids that no other has."""
    text = svg([draw], size, page=True)
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.S)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text).replace(INK, "currentColor")
    text = re.sub(r'(width|height)="([\d.]+)pt"', lambda found: f'{found[1]}="{float(found[2]) * 4 / 3:.0f}"', text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)


# ------------------------------------------------------------------------------------------------------------------
# Tables and the gallery

def html_table(caption, header, rows):
    """A table whose cells may be anything: texts are escaped, numbers have three digits, None is an empty cell."""
    def cell(value):
        return "" if value is None else html.escape(f"{value:.3f}" if isinstance(value, float) else str(value))
    head = "".join(f'<th scope="col">{cell(c)}</th>' for c in header)
    body = "".join(f'<tr><th scope="row">{cell(first)}</th>' + "".join(f"<td>{cell(c)}</td>" for c in rest) + "</tr>" for first, *rest in rows)
    return (f'<div class="wide"><table><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


def success_table(results):
    levels, rows = levels_of(results), []
    for method, row in results["success"].items():
        cells = (f"{row[v]['mean']:.3f}" + (f" ± {row[v]['std']:.3f}" if len(row[v]["seeds"]) > 1 else "") for v in levels)
        rows.append([method, *cells, novel_mean(row)])
    rows += [[f"paper: {method}", *(None for _ in levels), mean] for method, mean in PAPER_NOVEL_MEAN.items()]
    rows.append(["paper: best of the level", *(PAPER_SUCCESS[v] for v in levels), None])
    return html_table("Success rate, mean ± standard deviation over seeds", ["method", *levels, "novel mean"], rows)


def quality_table(quality):
    levels, rows = [level for level in env.LEVELS if level in quality], []
    for name, words in QUALITY_WORDS.items():
        if any(name in figures for figures in quality.values()):
            digits = 0 if name == "rollouts" else 3
            rows.append([words, *(f"{quality[v][name]:.{digits}f}" if name in quality[v] else None for v in levels)])
            if name in PAPER_QUALITY:
                rows.append(["paper", *(PAPER_QUALITY[name][env.LEVELS.index(v)] for v in levels)])
    return html_table("Imagined rollouts, first round", ["rates, if not said otherwise", *levels], rows)


def ablation_tables(run):
    """The tables of RUN/ablations.json under a heading of their own, or nothing where there are none."""
    path = run / "ablations.json"
    tables = [html_table(**table) for table in json.loads(path.read_text(encoding="utf-8")) if table["rows"]] if path.is_file() else []
    return "\n".join(tables and ["<h2>What each part is worth</h2>", *tables])


def verdict_of(record):
    """What the judge says of a rollout, a key of VERDICTS."""
    return "unjudged" if record["kind"] == "unknown" else "met" if record["success"] else "missed"


def gallery(imagined, each=2):
    """For each level and verdict, so many imagined rollouts beside the same actions in the physics."""
    cells = []
    for level, records in imagined.items():
        by_length = sorted(records, key=lambda r: len(r["actions"]) > 12)
        for record in (r for verdict in VERDICTS for r in [r for r in by_length if verdict_of(r) == verdict][:each]):
            start = env.state_from_observation(record["observations"][:1])
            played, = env.run_episodes(rollout.replay([record["actions"]]), [env.goal_of(record)], start, len(record["actions"]))
            cells.append(card(level, record, played))
    return "\n".join(cells)


def card(level, record, played):
    """One imagined rollout and its execution, with the goal, what the LLM says of it, and the judge's verdicts."""
    goal = html.escape(record["goal"])
    pictures = ""
    for what, shown in (("imagined", record), ("executed", played)):
        steps, verdict = len(shown["actions"]), verdict_of(shown)
        alt = f"Five balls on a table, {what}, {steps} action{'s' * (steps > 1)}: {VERDICTS[verdict]}"
        pictures += (f'<figure><img alt="{alt}" width="180" height="180" src="data:image/gif;base64,{gif_base64(shown)}">'
                     f'<figcaption>{what}: <span class="{verdict}">{VERDICTS[verdict]}</span></figcaption></figure>')
    own = record.get("explanation")
    said = f"<p>The LLM says of it: <q>{html.escape(own)}</q></p>" if own else ""
    return f'<article><p><b>{html.escape(level)}</b> {goal}</p><div class="pair">{pictures}</div>{said}</article>'


def gif_base64(record):
    picture = io.BytesIO()
    env.save_gif(picture, record, size=180)
    return base64.b64encode(picture.getvalue()).decode()


def versions():
    """(name, version) of Python and of the packages that a result may depend on."""
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"
    yield "python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"


def write(run, imagined):
    """Write report.html of a run folder; imagined: {level: rollout records}. Returns the run's results."""
    results, metrics, curves = (json.loads((run / name).read_text(encoding="utf-8")) for name in (
        "results.json", "grounded/metrics.json", "policies/curves.json"))
    bars = ""
    for level in levels_of(results):
        rates = ", ".join(f"{method} {row[level]['mean']:.2f}" for method, row in results["success"].items())
        bars += page_picture(lambda axes: draw_success(axes, results, level),
                             f"Success on level {level}: {rates}; the paper's best {PAPER_SUCCESS[level]}", level)
    learning = "".join(page_picture(lambda axes: draw(axes, data), f"Learning curves of {name}: loss over gradient steps", name.replace(" ", "-"))
                       for name, draw, data in (("grounding", draw_grounding, metrics["log"]), ("offline RL", draw_policies, curves)) if data)
    times, settings = results["time_s"], {k: v if v != "" else "none" for k, v in results["config"].items()}
    page = PAGE.format(
        scale=html.escape(str(settings["scale"])), llm=html.escape(str(settings["llm"])), bars=bars, learning=learning,
        episodes=max(cell["episodes"] for row in results["success"].values() for cell in row.values()),
        success=success_table(results), quality=quality_table(results["quality"]), gallery=gallery(imagined),
        ablations=ablation_tables(run),
        grounding=html_table("The grounded LLM on held-out rollouts", ["figure", "value"],
                             [[k.replace("_", " "), v] for k, v in results["grounding"].items()]),
        times=html_table("Seconds of each stage", ["stage", "seconds"], [[k, f"{v:.0f}"] for k, v in {**times, "all": sum(times.values())}.items()]),
        versions=html_table("What it ran on", ["package", "version"], versions()),
        settings=html_table("Every option of the run", ["option", "value"], [[k, str(v)] for k, v in settings.items()]))
    with store.replacing(run / "report.html") as aside:
        aside.write_text(page, encoding="utf-8")
    return results


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>KALM run</title><style>
:root {{ color-scheme: light dark; --line: #8886; --good: #1a7f3c; --bad: #b3362b; }}
@media (prefers-color-scheme: dark) {{ :root {{ --good: #5fd08a; --bad: #ff8a7a; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: auto; padding: 1rem; }}
.wide {{ overflow-x: auto; margin: 1rem 0; }}
table {{ border-collapse: collapse; font-size: .85rem; }} caption {{ text-align: left; padding: .2rem .6rem; }}
th, td {{ padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }}
tbody th {{ font-weight: normal; }} th:first-child {{ text-align: left; white-space: normal; min-width: 7rem; }}
.row {{ display: flex; flex-wrap: wrap; gap: 1rem; }}
svg {{ max-width: 100%; height: auto; stroke-linejoin: round; }}
.gallery {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: 1rem; font-size: .85rem; }}
article {{ border: 1px solid var(--line); border-radius: .5rem; padding: .2rem .8rem; overflow-wrap: anywhere; }}
.pair {{ display: flex; gap: .5rem; }} figure {{ margin: 0; flex: 1; }} img {{ width: 100%; max-width: 180px; height: auto; }}
.met {{ color: var(--good); }} .missed {{ color: var(--bad); }}
</style></head><body>
<h1>KALM run</h1><p>Scale {scale}, language model {llm}.</p>
<h2>Success</h2><p>Up to {episodes} episodes a cell. Bars are means over seeds with their standard deviation. The dotted lines are the
paper's best policies, which had other data, another model and other sentences.</p>
<div class="row">{bars}</div>{success}
<h2>Imagination</h2>{quality}
<p>Some imagined rollouts that met their goal, some that missed it, and some without a judge, where there are any. Left as the LLM
imagined them, right the same actions in the physics.</p>
<div class="gallery">{gallery}</div>
{ablations}
<h2>Learning curves</h2><div class="row">{learning}</div>
<h2>Grounding</h2>{grounding}
<h2>Time and versions</h2>{times}{versions}
<h2>Options</h2><details><summary>All of them</summary>{settings}</details>
</body></html>
"""
