"""Redo every run behind RESULTS.md and write the page: `python docs/results.py`.

Runs that are finished are kept, so the command can be repeated after an interruption; `--only NAME ...` does some of
the runs, `--write` none. A run starts from its parent's folder and options and redoes what its own options change.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import env  # noqa: E402
import kalm  # noqa: E402
from data import report, store  # noqa: E402
from env import LEVELS, NOVEL_LEVELS  # noqa: E402

ONE_ROUND = ["--novel_goals", "160", "--starts_per_goal", "3", "--step_starts", "3", "--temperatures", "1", "--visited_share", "0"]
HALF = ["--starts_per_goal", "8", "--step_starts", "20", "--rl_steps", "8000"]
BRIEF = ["--ground_steps", "240", "--keep_layers", "4", "--lora_rank", "0", *ONE_ROUND]
LONG, LONG_AGAIN = ("", ", half fresh", ", LoRA", ", all random"), ("long", "long, all random")  # brief ones at length; with a second seed
JUDGED = {"matched": "goal met (the judge)", "explained": "own explanation fits the goal (no judge)", "both": "both", "all": "everything"}

RUNS = {  # name: (parent, options, stages)
    "main": (None, [], ["all"]),
    "brief": ("main", ["--split", "validation", *BRIEF], ["collect", "ground", "imagine"]),
    "brief without dynamics": ("brief", ["--tasks", "explanation,generation,consequence"], ["ground", "imagine"]),
    "brief without explanation": ("brief", ["--tasks", "dynamics,generation,consequence"], ["ground", "imagine"]),
    "brief without consequence": ("brief", ["--tasks", "dynamics,explanation,generation"], ["ground", "imagine"]),
    "brief, half fresh": ("brief", ["--fresh_layers", "2"], ["ground", "imagine"]),
    "brief, LoRA": ("brief", ["--lora_rank", "64", "--new_learning_rate", "2e-3"], ["ground", "imagine"]),
    "brief, all random": ("brief", ["--random_weights", "1"], ["ground", "imagine"]),
    **{f"long{which}": (f"brief{which}", ["--ground_steps", "1800"], ["ground", "imagine"]) for which in LONG},
    **{f"{name}, seed 1": (name, ["--seed", "1"], ["collect", "ground", "imagine"]) for name in LONG_AGAIN},
    "validation": ("main", ["--split", "validation", "--methods", "bc,bc+relabel,bc+kalm,bc+both", "--seeds", "2", "--self_check", "1", *HALF],
                   ["imagine", "learn", "evaluate"]),
    **{f"keep {name}": ("validation", ["--keep", name, "--methods", "bc+kalm"], ["learn", "evaluate"]) for name in list(JUDGED)[1:]},
    "dynamics check": ("validation", ["--dynamics_tolerance", "0.1", "--methods", "bc+kalm"], ["learn", "evaluate"]),
    "unbalanced": ("validation", ["--balance_goals", "0", "--methods", "bc+kalm"], ["learn", "evaluate"]),
    **{f"share {x}": ("validation", ["--imaginary_share", x, "--methods", "bc+kalm"], ["learn", "evaluate"]) for x in ("0.1", "0.5")},
    **{f"kept {n}": ("validation", ["--kept_per_goal", n, "--methods", "bc+kalm"], ["learn", "evaluate"]) for n in ("1", "5")},
    "no candidates": ("validation", ["--candidates", "1", "--step_candidates", "1", "--self_check", "0", "--methods", "bc+kalm"],
                ["imagine", "learn", "evaluate"]),
    "new starts": ("validation", ["--visited_share", "0", "--self_check", "0", "--methods", "bc+kalm"], ["imagine", "learn", "evaluate"]),
}
LEARNING_ABLATIONS = {
    "validation": "default", **{f"keep {k}": f"kept: {JUDGED[k]}" for k in list(JUDGED)[1:]},
    "dynamics check": "transitions dropped that the dynamics prediction contradicts by .1 m",
    "unbalanced": "drawn by transition, not by goal", "new starts": "no counterfactual goals: imagined from new starts alone",
    "share 0.1": "a tenth of each batch imaginary", "share 0.5": "half of each batch imaginary",
    "no candidates": "no looking ahead: one action imagined at each step of the later rounds",
    "kept 1": "one kept rollout a goal", "kept 5": "five kept rollouts a goal"}
OTHER_SOURCES = {  # of the run "validation"
    "bc": "real rollouts alone", "bc+relabel": "the control instead of imagined rollouts", "bc+both": "the control beside imagined rollouts"}
GROUNDING_ABLATIONS = {"brief": "four pre-trained layers, all four tasks", **{f"brief {x}": x for x in (
    "without dynamics", "without explanation", "without consequence")}, "brief, half fresh": "two pre-trained layers below two fresh ones",
    "brief, LoRA": "four pre-trained layers, LoRA of rank 64", "brief, all random": "four random layers and token embeddings"}
LONG_ABLATIONS = {f"long{which}": GROUNDING_ABLATIONS[f"brief{which}"] for which in LONG}
LONG_ABLATIONS |= {f"{name}, seed 1": f"{LONG_ABLATIONS[name]}, seed 1" for name in LONG_AGAIN}
GROUNDING_HEADER = ["match / executed", *LEVELS, "action accuracy", "state error", "source", "holds"]


def options_of(name):
    parent, options, _ = RUNS[name]
    return [*(options_of(parent) if parent else ["--scale", "cpu"]), *options]


def is_stale(folder, source, stages):
    """Whether a run's folder was copied from its parent's before the stages that it builds on were redone there."""
    needed = {n for stage in stages if stage != "all" for n in kalm.follows_from(stage)} - set(stages)
    ours, theirs = (kalm.read_manifest(f)["stages"] for f in (folder, source))
    return any(ours.get(n, {}).get("fingerprint") != theirs.get(n, {}).get("fingerprint") for n in needed)


def run(name, folder, processes=1):
    """One run, from its parent's folder (hard links: every stage writes anew and renames)."""
    parent, _, stages = RUNS[name]
    source = folder.parent / str(parent).replace(" ", "_")
    if parent and folder.exists() and is_stale(folder, source, stages):
        shutil.rmtree(folder)
    if parent and not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial, copy_function=os.link)
        for path in ("results.json", "report.html", "ablations.json"):
            (partial / path).unlink(missing_ok=True)
        partial.rename(folder)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    subprocess.run([sys.executable, *launcher, str(ROOT / "kalm.py"), *options_of(name), "--stage", *stages, "--output_dir", str(folder)], check=True)


# ------------------------------------------------------------------------------------------------------------------
# The page

def load(folder, name, file):
    path = folder / name.replace(" ", "_") / file
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def table(header, rows):
    """A table in Markdown; without rows, a sentence that says so."""
    rows = list(rows)
    if not rows:
        return "*These runs have not been made for this page; `python docs/results.py` makes them. What earlier ones showed is in the log.*"
    return "\n".join(["| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows)])


def number(value, digits=3):
    return "" if value is None else f"{value:.{digits}f}".replace("0.", ".", 1) if 0 <= value < 1 else f"{value:.{digits}f}"


def success_rows(results):
    for method, row in results["success"].items():
        cells = [number(row[v]["mean"]) + (f" ± {number(row[v]['std'])}" if len(row[v]["seeds"]) > 1 else "") for v in LEVELS]
        yield [f"`{method}`", *cells, number(sum(row[v]["mean"] for v in NOVEL_LEVELS) / 3), row["offline"]["episodes"]]


def quality_rows(quality, names):
    for name, words in names.items():
        yield [words, *(number(quality[v].get(name)) for v in LEVELS)]
        if name in report.PAPER_QUALITY:
            yield [f"*paper: {words}*", *(number(x) for x in report.PAPER_QUALITY[name])]


def ablation_rows(folder, names, method="bc+kalm"):
    for name, words in names.items():
        results = load(folder, name, "results.json")
        if results:
            row = results["success"][method]
            yield [words, *(number(row[v]["mean"]) for v in LEVELS), number(sum(row[v]["mean"] for v in NOVEL_LEVELS) / 3)]


def grounding_rows(folder, names):
    for name, words in names.items():
        quality, metrics = load(folder, name, "quality.json"), load(folder, name, "grounded/metrics.json")
        if quality:
            yield [words, *(f"{number(quality[v]['match'], 2)} / {number(quality[v]['executed'], 2)}" for v in LEVELS),
                   number(metrics["action_accuracy"], 2), number(metrics["state_error"]), number(metrics["explanation_source"], 2),
                   number(metrics["explanation_holds"], 2)]


def growth_rows(growth):
    for what, row in growth["rows"].items():
        yield [what, ", ".join(f"{n:,}" for n in row["sizes"]), ", ".join(f"{t:.3g}" for t in row["seconds"]), f"{row['exponent']:.2f}"]


def ablations(folder):
    """What each part is worth, in learning and in grounding: tables of texts, {caption, header, rows}; missing runs leave no rows."""
    return [{"caption": "Success of BC by what it learns from", "header": ["BC, validation goals", *LEVELS, "novel mean"],
             "rows": [*ablation_rows(folder, LEARNING_ABLATIONS),
                      *(row for method, words in OTHER_SOURCES.items() for row in ablation_rows(folder, {"validation": words}, method))]},
            {"caption": "Imagined rollouts by how the LLM was grounded: rate that meets the goal / that meets it in the physics",
             "header": GROUNDING_HEADER, "rows": list(grounding_rows(folder, GROUNDING_ABLATIONS))},
            {"caption": "The same, grounded 7.5 times as long", "header": GROUNDING_HEADER, "rows": list(grounding_rows(folder, LONG_ABLATIONS))}]


def show_ablations(folder, options):
    """The tables of ablations -> report.html of the main run, which has these options. Returns the exit code."""
    store.write_json(folder / "main" / "ablations.json", ablations(folder))
    return kalm.main([*options, "--stage", "report", "--force", "--output_dir", str(folder / "main")])


def write_picture(folder, path):
    """The picture of README.md: the first imagined rollout of a rephrased goal, five to eight actions long, whose actions fulfil it in the
    physics too, beside what they do there. Writes nothing where there is none."""
    for imagined in kalm.rollout.read_rollouts(folder / "main" / "rollouts" / "rephrase"):
        actions = imagined["actions"]
        if imagined["success"] and 5 <= len(actions) <= 8:
            start = env.state_from_observation(imagined["observations"][:1])
            played, = env.run_episodes(kalm.rollout.replay([actions]), [env.goal_of(imagined)], start, len(actions))
            if played["success"] and len(played["actions"]) == len(actions):
                break
    else:
        return
    env.save_gif(path, imagined, played, captions=("imagined", "executed"), frame_ms=450)
    print(f"{path} shows: {imagined['goal']}")


def page(folder, target=ROOT):
    """RESULTS.md from the run folders, and its pictures in docs/, both below target. Runs that are missing leave no rows."""
    results, quality = load(folder, "main", "results.json"), load(folder, "main", "quality.json")
    if not results:
        sys.exit(f"{folder} has no finished run 'main', which the page is about; run `python docs/results.py --only main`")
    checks, brief = (load(folder, name, "quality.json") for name in ("validation", "brief"))
    metrics, curves = load(folder, "main", "grounded/metrics.json"), load(folder, "main", "policies/curves.json")
    (target / "docs" / "curves.svg").write_text(report.curves_figure(metrics["log"], curves), encoding="utf-8")
    (target / "docs" / "success.svg").write_text(report.success_figure(results), encoding="utf-8")
    write_picture(folder, target / "docs" / "imagined.gif")
    learning, grounding, longer = ablations(folder)
    times, growth = results["time_s"], json.loads((ROOT / "docs" / "growth.json").read_text(encoding="utf-8"))
    explained = [[words, *(number(metrics[f"{key}_{part}"]) for part in ("source", "target", "direction", "exact", "holds"))]
                 for key, words in (("explanation", "the prompt of training"), ("unseen_prompt", "a prompt never trained on"))]
    explained.append(["*paper (keywords), both prompts*", "> .85", "> .85", "", "", ""])
    text = (ROOT / "docs" / "results_template.md").read_text(encoding="utf-8").format(
        success=table(["success rate", *LEVELS, "novel mean", "episodes"], success_rows(results)),
        quality=table(["imagined rollouts", *LEVELS], quality_rows(quality, {
            "match": "match", "executed": "succeed when their actions are played in the physics",
            "executed_of_matched": "the same, of those that match", "action_match": "action alone matches",
            "off_table": "transitions off the table", "beyond_dynamics": "transitions beyond dynamics", "actions": "actions"})),
        checks=table(["imagined rollouts", *LEVELS], [] if not checks else quality_rows(checks, {
            "match": "match", "explained": "own explanation fits the goal", "match_of_explained": "match, of those that fit",
            "dynamics_error": "contradiction to the dynamics prediction, m"})),
        explained=table(["asked with", "source", "target", "direction", "all three", "holds in the final state"], explained),
        grounding=", ".join(f"{k.replace('_', ' ')} {number(metrics[k])}" for k in (
            "action_accuracy", "state_error", "state_error_nothing_moves")),
        counts="none" if not brief else ", ".join(f"{v} {brief[v]['rollouts']:.0f}" for v in LEVELS),
        growth_machine=f"{growth['machine']}, {growth['date']}", growth=table(["what", "sizes", "seconds", "exponent"], growth_rows(growth)),
        ablation=table(learning["header"], learning["rows"]), tasks=table(grounding["header"], grounding["rows"]),
        longer=table(longer["header"], longer["rows"]),
        minutes=table(["stage", *times, "all"], [["minutes", *(f"{t / 60:.1f}" for t in (*times.values(), sum(times.values())))]]))
    (target / "RESULTS.md").write_text(text, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "results", help="where the run folders are")
    parser.add_argument("--only", nargs="*", choices=list(RUNS), metavar="NAME", help=f"some of: {'; '.join(RUNS)}")
    parser.add_argument("--processes", type=int, default=1, help="how many share the work of each run")
    parser.add_argument("--write", action="store_true", help="write the page from finished runs, run nothing")
    options = parser.parse_args()
    for name in [] if options.write else options.only or RUNS:
        run(name, options.runs / name.replace(" ", "_"), options.processes)
    page(options.runs)
    sys.exit(show_ablations(options.runs, options_of("main")))


if __name__ == "__main__":
    main()
