"""report.html: what a run did and how well, on one self-contained page.

This file knows the run folder (data/README.md), and nothing of how its stages work.
"""
import base64
import html
import io
import json

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

import env  # noqa: E402
import rollout  # noqa: E402

PUBLISHED = {"rephrase": 0.45, "easy": 0.35, "hard": 0.09, "offline": 0.60}  # the paper's best KALM policies, by eye


def results_table(results):
    """The success table as lines of text."""
    levels = [level for level in env.LEVELS if level in next(iter(results["success"].values()))]
    lines = ["method        " + "".join(f"{level:>16}" for level in levels)]
    for method, row in results["success"].items():
        cells = [f"{row[level]['mean']:.3f}" + (f" +-{row[level]['std']:.3f}" if len(row[level]["seeds"]) > 1 else " " * 8)
                 for level in levels]
        lines.append(f"{method:14}" + "".join(f"{cell:>16}" for cell in cells))
    return lines


def success_figure(results):
    """Success by level and method as an SVG string; error bars are the standard deviation over seeds."""
    levels = [level for level in env.LEVELS if level in next(iter(results["success"].values()))]
    figure, axes = plt.subplots(figsize=(9, 3.6))
    width = 0.85 / len(results["success"])
    for i, (method, row) in enumerate(results["success"].items()):
        x = np.arange(len(levels)) + (i - (len(results["success"]) - 1) / 2) * width
        axes.bar(x, [row[level]["mean"] for level in levels], 0.9 * width, yerr=[row[level]["std"] for level in levels], label=method,
                 color=plt.cm.tab20(i), capsize=2)
    for x, level in enumerate(levels):
        axes.hlines(PUBLISHED[level], x - 0.45, x + 0.45, color="gray", linestyle="dotted",
                    label="paper's best (other data, model and sentences)" if x == 0 else None)
    axes.set_xticks(range(len(levels)), levels)
    axes.set_ylim(0, 1)
    axes.set_ylabel("success rate")
    axes.legend(ncols=4, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    return to_svg(figure)


def curves_figure(log, curves):
    """Learning curves of grounding and of the policies as an SVG string."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
    for name in ("text_loss", "action_loss", "state_loss"):
        left.plot([e["step"] for e in log], [e[name] for e in log], label=name.replace("_", " "))
    for method, curve in curves.items():
        steps, losses = np.array(curve).T
        right.plot(steps, losses, label=method)
    for axes, title in ((left, "grounding"), (right, "offline RL")):
        axes.set(title=title, xlabel="step", ylabel="loss", yscale="log")
        axes.legend(fontsize=7)
    return to_svg(figure)


def to_svg(figure):
    picture = io.StringIO()
    figure.savefig(picture, format="svg", bbox_inches="tight", transparent=False, metadata={"Date": None})
    plt.close(figure)
    text = picture.getvalue()
    return text[text.index("<svg"):]


def gallery(imagined, per_level=2):
    """For each level, imagined rollouts that met their goal and that did not, beside their execution in the physics."""
    cells = []
    for level, records in imagined.items():
        met, missed = (sorted((r for r in records if r["success"] == good), key=lambda r: len(r["actions"]) > 12) for good in (True, False))
        for record in met[:per_level] + missed[:1]:
            start = env.state_from_observation(record["observations"][:1])
            played, = env.run_episodes(rollout.replay([record["actions"]]), [env.goal_of(record)], start, len(record["actions"]))
            pictures = "".join(f'<figure><img alt="{what} rollout" src="data:image/gif;base64,{gif_base64(r)}">'
                               f"<figcaption>{what}: {'goal met' if r['success'] else 'goal missed'}</figcaption></figure>"
                               for what, r in (("imagined", record), ("executed", played)))
            cells.append(f'<article><p><b>{level}</b> {html.escape(record["goal"])}</p><div class="pair">{pictures}</div></article>')
    return "\n".join(cells)


def gif_base64(record):
    picture = io.BytesIO()
    env.save_gif(picture, record, size=180)
    return base64.b64encode(picture.getvalue()).decode()


def html_table(header, rows):
    line = "".join
    return (f"<table><tr>{line(f'<th>{html.escape(str(c))}</th>' for c in header)}</tr>"
            + line(f"<tr>{line(f'<td>{html.escape(str(c))}</td>' for c in row)}</tr>" for row in rows) + "</table>")


def write(run, imagined):
    """Write report.html of a run folder; imagined: {level: rollout records}. Returns the run's results."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    metrics = json.loads((run / "grounded" / "metrics.json").read_text(encoding="utf-8"))
    curves = json.loads((run / "policies" / "curves.json").read_text(encoding="utf-8"))
    levels = [level for level in env.LEVELS if level in next(iter(results["success"].values()))]
    success = html_table(["method", *levels], [
        [method, *(f"{row[v]['mean']:.3f} ± {row[v]['std']:.3f}" for v in levels)] for method, row in results["success"].items()])
    names = sorted({name for figures in results["quality"].values() for name in figures})
    quality = html_table(["imagined rollouts", *names], [
        [level, *(f"{figures[n]:.3f}".removesuffix(".000") if n in figures else "" for n in names)]
        for level, figures in results["quality"].items()])
    grounding = html_table(["held-out rollouts", "value"], [[k, f"{v:.3f}"] for k, v in results["grounding"].items()])
    settings = html_table(["option", "value"], results["config"].items())
    times = html_table(["stage", "seconds"], [[k, f"{v:.0f}"] for k, v in results["time_s"].items()])
    episodes = max(row[levels[0]]["episodes"] for row in results["success"].values())
    page = PAGE.format(bars=success_figure(results), curves=curves_figure(metrics["log"], curves), success=success, quality=quality,
                       grounding=grounding, settings=settings, times=times, gallery=gallery(imagined), episodes=episodes)
    aside = run / "report.html.partial"
    aside.write_text(page, encoding="utf-8")
    aside.replace(run / "report.html")
    return results


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>KALM run</title><style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0; font-size: .85rem; }}
th, td {{ padding: .2rem .6rem; border-bottom: 1px solid #8886; text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
svg {{ max-width: 100%; height: auto; background: #fff; }}
.pair {{ display: flex; gap: .5rem; }} figure {{ margin: 0; }} img {{ width: 100%; max-width: 180px; }}
.gallery {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; font-size: .85rem; }}
</style></head><body>
<h1>KALM run</h1>
<h2>Success</h2><p>{episodes} episodes a cell, mean and standard deviation over seeds.</p>{bars}{success}
<h2>Imagination</h2><p>match: the imagined rollout meets its goal. executed: its actions meet the goal in the physics.</p>{quality}
<div class="gallery">{gallery}</div>
<h2>Grounding</h2>{grounding}
<h2>Learning curves</h2>{curves}
<h2>Options</h2>{settings}<h2>Time</h2>{times}
</body></html>
"""
