"""Redo every run behind docs/results.md and write the page: `python docs/results.py`.

Runs that are finished are kept, so the command can be repeated after an interruption; `--only NAME
...` does some of the runs, `--write` none. A run starts from its parent's folder and options, and
redoes what its own options change. The page's words are in results_template.md.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import env
import kalm
from data.rollouts import read_rollouts
from env import LEVELS
from experiment import episode, folder, intervals, report
from experiment.quality import played_in_world
from experiment.stages import Plan

# ----------------------------------------------------------------------------------------------
# The runs

ONE_ROUND = ["--novel_goals", "160", "--starts_per_goal", "3", "--step_starts", "3"]
ONE_ROUND += ["--temperatures", "1", "--visited_share", "0"]
BRIEF = ["--split", "validation", "--max_steps", "240", "--keep_layers", "4", "--lora_rank", "0"]
BRIEF += ONE_ROUND
HALF = ["--starts_per_goal", "6", "--step_starts", "12"]
CHOOSING = ["--split", "validation", "--methods", "bc,bc+relabel,bc+kalm,bc+both", "--seeds", "2"]
CHOOSING += ["--self_check", "true", *HALF]
ONLY_KALM = ["--methods", "bc+kalm"]
SECOND_SEED = ["--seed", "1", "--adapter", "none", "--max_steps", "1000"]
SECOND_SEED += ["--methods", "bc,bc+relabel,bc+kalm,bc+both,llm"]
NO_JUDGE = ["--keep", "all", "--methods", "bc,bc+kalm"]
OWN_WORDS = [*NO_JUDGE, "--keep", "explained", "--self_check", "true"]
NO_CANDIDATES = ["--candidates", "1", "--step_candidates", "1", "--self_check", "false"]
RANDOM = ["--random_weights", "true"]
TASKS = ("dynamics", "explanation", "generation", "consequence")
JUDGED = {
    "matched": "goal met (the judge)",
    "explained": "what the LLM's own words choose (no judge)",
    "both": "both",
    "all": "everything",
}
KEPT_OTHERWISE = list(JUDGED)[1:]
OPPONENTS = {"all": "bc", "explained": "bc", "matched": "bc+relabel"}  # of bc+kalm, by --keep

GROUNDED = ["ground", "imagine"]
LEARNED = ["learn", "evaluate"]
RUNS = {  # name: (parent, options, stages)
    "main": (None, ["--scale", "cpu"], ["all"]),
    "main, all kept": ("main", NO_JUDGE, LEARNED),
    "main, explained": ("main", OWN_WORDS, ["imagine", *LEARNED]),
    "main, seed 1": ("main", SECOND_SEED, ["all"]),
    "main, seed 1, explained": ("main, seed 1", OWN_WORDS, ["imagine", *LEARNED]),
    "brief": ("main", BRIEF, ["collect", *GROUNDED]),
    "brief, LoRA": ("brief", ["--lora_rank", "64", "--new_learning_rate", "2e-3"], GROUNDED),
    "validation": ("main", CHOOSING, ["imagine", *LEARNED]),
    "dynamics check": ("validation", ["--dynamics_tolerance", "0.1", *ONLY_KALM], LEARNED),
    "unbalanced": ("validation", ["--balance_goals", "false", *ONLY_KALM], LEARNED),
    "no candidates": ("validation", [*NO_CANDIDATES, *ONLY_KALM], ["imagine", *LEARNED]),
    "new starts": (
        "validation",
        ["--visited_share", "0", "--self_check", "false", *ONLY_KALM],
        ["imagine", *LEARNED],
    ),
}
for task in ("dynamics", "explanation", "consequence"):
    others = ",".join(name for name in TASKS if name != task)
    RUNS[f"brief without {task}"] = ("brief", ["--tasks", others], GROUNDED)
RUNS["brief, all random"] = ("brief", RANDOM, GROUNDED)
RUNS["brief without explanation, all random"] = ("brief without explanation", RANDOM, GROUNDED)
for keep in KEPT_OTHERWISE:
    RUNS[f"keep {keep}"] = ("validation", ["--keep", keep, *ONLY_KALM], LEARNED)
for share in ("0.1", "0.5"):
    RUNS[f"share {share}"] = ("validation", ["--imaginary_share", share, *ONLY_KALM], LEARNED)
for count in ("1", "5"):
    RUNS[f"kept {count}"] = ("validation", ["--kept_per_goal", count, *ONLY_KALM], LEARNED)

# Rows of the page's tables of ablations: run, and words for it
LEARNING_ABLATIONS = {
    "validation": "default",
    **{f"keep {keep}": f"kept: {JUDGED[keep]}" for keep in KEPT_OTHERWISE},
    "dynamics check": "transitions dropped that the dynamics prediction contradicts by .1 m",
    "unbalanced": "drawn by transition, not by goal and rollout",
    "new starts": "no counterfactual goals: imagined from new starts alone",
    "share 0.1": "a tenth of each batch imaginary",
    "share 0.5": "half of each batch imaginary",
    "no candidates": "no looking ahead: one action imagined at each step of the later rounds",
    "kept 1": "one kept rollout a goal",
    "kept 5": "five kept rollouts a goal",
}
OTHER_SOURCES = {  # methods of the run "validation"
    "bc": "real rollouts alone",
    "bc+relabel": "the control instead of imagined rollouts",
    "bc+both": "the control beside imagined rollouts",
}
GROUNDING_ABLATIONS = {
    "brief": "four pre-trained layers, all four tasks",
    "brief without dynamics": "without dynamics",
    "brief without explanation": "without explanation",
    "brief without consequence": "without consequence",
    "brief, LoRA": "four pre-trained layers, LoRA of rank 64",
    "brief, all random": "four random layers and token embeddings",
    "brief without explanation, all random": "the same without explanation",
}


def options_of(name: str) -> list[str]:
    """The options of a run: its parent's, then its own."""
    parent, options, _ = RUNS[name]
    before = options_of(parent) if parent else []
    return [*before, *options]


def folder_of(runs: Path, name: str) -> Path:
    """The folder of a run."""
    return runs / name.replace(" ", "_")


def is_stale(run: Path, parent: Path, stages: list[str]) -> bool:
    """Whether a run's folder was copied from its parent's before the stages that it builds on were
    redone there.
    """
    ours = folder.Manifest(run)
    theirs = folder.Manifest(parent)
    for stage in Plan(ours, kalm.STAGES, stages, {}, {}, force=False).upstream():
        prints = [manifest.stages.get(stage, {}).get("fingerprint") for manifest in (ours, theirs)]
        if prints[0] != prints[1]:
            return True
    return False


def copy_run(parent: Path, run: Path) -> None:
    """A run's folder from its parent's: hard links, for every stage writes aside and renames. Logs,
    which grow in place, are copied. Raises ValueError while a process works in the parent's.
    """
    left_out = (".lock", "unfinished", "results.json", "report.html", "ablations.json")

    def link(source, target):
        copy = shutil.copy if source.endswith(".jsonl") else os.link
        copy(source, target)

    ignore = shutil.ignore_patterns(*left_out)
    with folder.locked(parent), folder.replacing(run) as aside:
        shutil.copytree(parent, aside, copy_function=link, ignore=ignore)


def do_run(runs: Path, name: str, processes: int = 1) -> None:
    """One run, from its parent's folder where it has none of its own."""
    parent, _, stages = RUNS[name]
    run = folder_of(runs, name)
    if parent:
        source = folder_of(runs, parent)
        if not run.exists() or is_stale(run, source, stages):
            copy_run(source, run)
    command = [sys.executable, str(ROOT / "kalm.py"), *options_of(name), "--stage", *stages]
    command += ["--processes", str(processes), "--output_dir", str(run)]
    subprocess.run(command, check=True)


# ----------------------------------------------------------------------------------------------
# The page

IMAGINED = ("match", "executed", "executed_of_matched", "action_match")  # figures of its tables
IMAGINED += ("off_table", "beyond_dynamics", "actions")
CHECKED = ("match", "explained", "match_of_explained", "dynamics_error")
NOT_MADE = (
    "*These runs have not been made for this page; `python docs/results.py` makes them. "
    "What others showed is in the log.*"
)


def load(runs: Path, name: str, file: str):
    """The value of a JSON file of a run, None if there is none."""
    path = folder_of(runs, name) / file
    return folder.read_json(path) if path.is_file() else None


def without_judge(runs: Path, name: str) -> dict[str, dict]:
    """Results of a run's children that learned without a judge, by what was kept."""
    found = {}
    for kept in ("explained", "all kept"):
        results = load(runs, f"{name}, {kept}", "results.json")
        if results:
            found[kept] = results
    return found


def table(header: list, rows: list[list]) -> str:
    """A table in Markdown; without rows, a sentence that says so."""
    if not rows:
        return NOT_MADE
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    """A figure without its leading zero."""
    if value is None:
        return ""
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if -1 < value < 1 else text


def in_words(figure: tuple[float, float, float]) -> str:
    """A figure and its interval."""
    mean, low, high = figure
    return f"{number(mean)} ({number(low, 2)}, {number(high, 2)})"


def success_rows(results: dict, without_judge: dict[str, dict] | None = None) -> list[list]:
    """Rows of the methods, then of what is learned from imagined rollouts that no judge chose, each
    with its difference to real data alone.

    without_judge: results by what was kept.
    """
    columns = report.columns_of(results)
    found = intervals.success_rows(results, columns)
    for kept, unjudged in (without_judge or {}).items():
        _, *others = intervals.success_rows(unjudged, columns)  # the first is bc, as above
        found += [(f"{name}, {kept}", figures) for name, figures in others]
    rows = []
    for name, figures in found:
        rows.append([f"`{name}`", *map(in_words, figures)])
    return rows


def last_rows(results: dict) -> list[list]:
    """The mean of the last checkpoints, which the paper reports, behind the figure of the end in
    the same episodes.
    """
    rows = []
    for method, last in results["last_checkpoints"].items():
        at_end = {}
        for level, curve in results["curves"][method].items():
            _, rates = curve[-1]
            at_end[level] = {"mean": sum(rates) / len(rates)}
        cells = []
        for level in LEVELS:
            cells.append(f"{number(at_end[level]['mean'])} / {number(last[level]['mean'])}")
        means = [number(report.novel_mean(each)) for each in (at_end, last)]
        rows.append([f"`{method}`", *cells, " / ".join(means)])
    return rows


def opponent_rows(runs: Path) -> list[list]:
    """BC with imagined rollouts that nobody judged, or that the judge chose, each against its
    opponent: two methods of runs with the same goals, starts and seeds.
    """
    rows = []
    validation = load(runs, "validation", "results.json")
    for keep, control in OPPONENTS.items():
        name = "validation" if keep == "matched" else f"keep {keep}"
        results = load(runs, name, "results.json")
        if results and validation:
            ours = results["success"]["bc+kalm"]
            theirs = validation["success"][control]
            cells = []
            for levels in [*([level] for level in LEVELS), list(env.NOVEL_LEVELS)]:
                cells.append(in_words(intervals.figure(results, ours, levels, theirs)))
            rows.append([f"kept: {JUDGED[keep]} - `{control}`", *cells])
    return rows


def quality_rows(quality: dict, names: Sequence[str]) -> list[list]:
    rows = []
    for name in names:
        text = report.QUALITY_WORDS[name]
        rows.append([text, *(number(quality[level].get(name)) for level in LEVELS)])
        if name in report.PAPER_QUALITY:
            rows.append([f"*paper: {text}*", *map(number, report.PAPER_QUALITY[name])])
    return rows


def learning_rows(runs: Path, names: dict[str, str], method: str = "bc+kalm") -> list[list]:
    rows = []
    for name, words in names.items():
        results = load(runs, name, "results.json")
        if results:
            row = results["success"][method]
            rates = [number(row[level]["mean"]) for level in LEVELS]
            rows.append([words, *rates, number(report.novel_mean(row))])
    return rows


def grounding_rows(runs: Path, names: dict[str, str]) -> list[list]:
    rows = []
    for name, words in names.items():
        quality = load(runs, name, "quality.json")
        if not quality:
            continue
        metrics = load(runs, name, "grounded/metrics.json")
        cells = []
        for level in LEVELS:
            rates = quality[level]
            cells.append(f"{number(rates['match'], 2)} / {number(rates['executed'], 2)}")
        cells += [number(metrics["action_accuracy"], 2), number(metrics["state_error"])]
        cells += [number(metrics[f"explanation_{part}"], 2) for part in ("source", "holds")]
        for part in load(runs, name, "words.json")["llm"].values():
            cells.append(" / ".join(number(part[words][0], 2) for words in ("new", "nonsense")))
        rows.append([words, *cells])
    return rows


def words_rows(results: dict) -> list[list]:
    """How often first actions are right in new, nonsense and known words."""
    rows = []
    for method, figures in results["words"].items():
        cells = [in_words(figure) for part in figures.values() for figure in part.values()]
        rows.append([f"`{method}`", *cells])
    return rows


def explanation_rows(metrics: dict) -> list[list]:
    prompts = {
        "explanation": "the prompt of training",
        "unseen_prompt": "a prompt never trained on",
    }
    rows = []
    for key, words in prompts.items():
        parts = ("source", "target", "direction", "exact", "holds")
        rows.append([words, *(number(metrics[f"{key}_{part}"]) for part in parts)])
    return [*rows, ["*paper (keywords), both prompts*", "> .85", "> .85", "", "", ""]]


def growth_rows(growth: dict) -> list[list]:
    rows = []
    for what, row in growth["rows"].items():
        sizes = ", ".join(f"{size:,}" for size in row["sizes"])
        seconds = ", ".join(f"{time:.3g}" for time in row["seconds"])
        rows.append([what, sizes, seconds, f"{row['exponent']:.2f}"])
    return rows


def ablations(runs: Path) -> list[dict]:
    """What each part is worth, in learning and in grounding: tables of texts, {caption, header,
    rows}; missing runs leave no rows.
    """
    learning = learning_rows(runs, LEARNING_ABLATIONS)
    for method, words in OTHER_SOURCES.items():
        learning += learning_rows(runs, {"validation": words}, method)
    parts = ["action accuracy", "state error", "source", "holds"]
    parts += [f"{part}, new / nonsense" for part in ("ball", "direction")]
    return [
        {
            "caption": "Success of BC by what it learns from",
            "header": ["BC, validation goals", *LEVELS, "novel mean"],
            "rows": learning,
        },
        {
            "caption": "Imagined rollouts by how the LLM was grounded: rate that meets the goal / "
            "that meets it in the physics",
            "header": ["match / executed", *LEVELS, *parts],
            "rows": grounding_rows(runs, GROUNDING_ABLATIONS),
        },
    ]


def show_ablations(runs: Path, options: list[str]) -> int:
    """The tables of ablations -> report.html of the main run. Returns the exit code."""
    main_run = folder_of(runs, "main")
    folder.write_json(main_run / "ablations.json", ablations(runs))
    return kalm.main([*options, "--stage", "report", "--force", "--output_dir", str(main_run)])


def write_picture(runs: Path, path: Path) -> None:
    """The picture of README.md, if there is one to show: the first imagined rollout of a rephrased
    goal, five to eight actions long, whose actions fulfil it in the physics too, beside what they
    do there.
    """
    world = env.make()
    for imagined in read_rollouts(folder_of(runs, "main") / "rollouts" / "rephrase", world):
        actions = imagined["actions"]
        if not imagined["success"] or not 5 <= len(actions) <= 8:
            continue
        played = played_in_world(world, imagined)
        if played["success"] and len(played["actions"]) == len(actions):
            captions = ("imagined", "executed")
            episode.save_gif(path, world, imagined, played, captions=captions, frame_ms=450)
            print(f"{path} shows: {imagined['goal']}")
            return


def page(runs: Path, docs: Path = ROOT / "docs") -> None:
    """results.md from the run folders, and its pictures, in the folder `docs`. Runs that are
    missing leave no rows.
    """
    results = load(runs, "main", "results.json")
    if not results:
        sys.exit(
            f"{runs} has no finished run 'main', which the page is about; run "
            "`python docs/results.py --only main`"
        )
    quality = load(runs, "main", "quality.json")
    metrics = load(runs, "main", "grounded/metrics.json")
    curves = load(runs, "main", "policies/curves.json")
    checks = load(runs, "validation", "quality.json")
    brief = load(runs, "brief", "quality.json")
    again = load(runs, "main, seed 1", "results.json")
    again_rows = success_rows(again, without_judge(runs, "main, seed 1")) if again else []
    growth = folder.read_json(ROOT / "docs" / "growth.json")
    curves_svg = report.curves_figure(metrics["log"], curves)
    (docs / "curves.svg").write_text(curves_svg, encoding="utf-8")
    training = NOT_MADE
    if results["curves"]:
        training = "![Success over training](training.svg)"
        training_svg = report.success_figure(results, report.draw_training)
        (docs / "training.svg").write_text(training_svg, encoding="utf-8")
    (docs / "success.svg").write_text(report.success_figure(results), encoding="utf-8")
    write_picture(runs, docs / "imagined.gif")

    held_out = ("action_accuracy", "state_error", "state_error_nothing_moves")
    grounding = [f"{name.replace('_', ' ')} {number(metrics[name])}" for name in held_out]
    counts = [f"{level} {brief[level]['rollouts']:.0f}" for level in LEVELS] if brief else ["none"]
    columns = [*LEVELS, "novel mean"]
    word_columns = []
    for part, figures in next(iter(results["words"].values())).items():
        word_columns += [f"{part}: {kind.replace('gain', 'new - nonsense')}" for kind in figures]
    learning, grounding_tasks = ablations(runs)
    times = {**results["time_s"], "all": sum(results["time_s"].values())}
    explained_parts = ["source", "target", "direction", "all three", "holds in the final state"]
    text = (
        (ROOT / "docs" / "results_template.md")
        .read_text(encoding="utf-8")
        .format(
            success=table(
                ["success rate", *columns], success_rows(results, without_judge(runs, "main"))
            ),
            opponents=table(["BC, validation goals", *columns], opponent_rows(runs)),
            training=training,
            last=table(["at the end / last checkpoints", *columns], last_rows(results)),
            words=table(["first action right", *word_columns], words_rows(results)),
            again=table(["success rate", *columns], again_rows),
            again_words=table(
                ["first action right", *word_columns], words_rows(again) if again else []
            ),
            quality=table(["imagined rollouts", *LEVELS], quality_rows(quality, IMAGINED)),
            checks=table(
                ["imagined rollouts", *LEVELS], quality_rows(checks, CHECKED) if checks else []
            ),
            explained=table(["asked with", *explained_parts], explanation_rows(metrics)),
            grounding=", ".join(grounding),
            counts=", ".join(counts),
            ablation=table(learning["header"], learning["rows"]),
            tasks=table(grounding_tasks["header"], grounding_tasks["rows"]),
            minutes=table(
                ["stage", *times], [["minutes", *(f"{t / 60:.1f}" for t in times.values())]]
            ),
            growth_machine=f"{growth['machine']}, {growth['date']}",
            growth=table(["what", "sizes", "seconds", "exponent"], growth_rows(growth)),
        )
    )
    (docs / "results.md").write_text(text, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    where = ROOT / "runs" / "results"
    parser.add_argument("--runs", type=Path, default=where, help="where the run folders are")
    names = f"some of: {'; '.join(RUNS)}"
    parser.add_argument("--only", nargs="*", choices=list(RUNS), metavar="NAME", help=names)
    shared = "how many share the work of each run"
    parser.add_argument("--processes", type=int, default=1, help=shared)
    nothing = "write the page from finished runs, run nothing"
    parser.add_argument("--write", action="store_true", help=nothing)
    options = parser.parse_args()
    for name in [] if options.write else options.only or RUNS:
        do_run(options.runs, name, options.processes)
    page(options.runs)
    sys.exit(show_ablations(options.runs, options_of("main")))


if __name__ == "__main__":
    main()
