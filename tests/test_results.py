"""docs/results.md: the runs behind it, and the page made from their folders."""

import contextlib
import re
import shutil
import sys

import pytest
from conftest import ROOT

import kalm
from experiment import command, folder, settings

sys.path.insert(0, str(ROOT / "docs"))
import results

PAGES = ("results.md", "results_template.md")


def parsed(arguments):
    """The settings that kalm.py reads from a command line, by class."""
    found, _ = settings.parse(
        arguments, kalm.CLASSES, lambda given: command.defaults_of(kalm.SCALES, given), {}
    )
    return {type(each): each for each in found}


@pytest.mark.parametrize("name", results.RUNS)
def test_every_run_has_valid_options_and_a_parent_that_comes_before_it(name):
    parent, _, stages = results.RUNS[name]
    names = list(results.RUNS)
    assert parent is None or names.index(parent) < names.index(name)
    found = parsed([*results.options_of(name), "--stage", *stages])
    split = found[kalm.ImagineArguments].split  # nothing is chosen on what is reported
    assert split == ("test" if name == "main" else "validation")
    grounding = found[kalm.GroundingArguments]
    assert grounding.adapter == ("none" if "ground" in stages else "released")
    assert grounding.max_steps == {"b": 240, "l": 1800}.get(name[0] * ("ground" in stages), -1)


def test_a_run_begins_with_its_parents_files_and_leaves_them_alone(
    smoke_run, tmp_path, monkeypatch
):
    parent = shutil.copytree(smoke_run, tmp_path / "main")
    (parent / ".lock").touch()
    before = {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()}
    one_method = ("main", ["--methods", "bc+kalm"], ["learn"])
    runs = {"main": (None, ["--scale", "smoke"], ["all"]), "one method": one_method}
    monkeypatch.setattr(results, "RUNS", runs)
    monkeypatch.setattr(results.subprocess, "run", lambda line, check: kalm.main(line[2:]))
    monkeypatch.setattr(results.folder, "locked", lambda run, mine: contextlib.nullcontext())
    results.do_run(tmp_path, "one method")
    run = tmp_path / "one_method"
    assert [path.stem for path in (run / "policies").glob("bc*")] == ["bc+kalm"]
    assert not (run / ".lock").exists() and not (run / "results.json").exists()
    assert (run / "goals.jsonl").is_file() and (run / "quality.json").samefile(
        parent / "quality.json"
    )
    assert {path: path.read_bytes() for path in before} == before
    assert not results.is_stale(run, parent, ["learn"])
    manifest = folder.read_json(parent / "manifest.json")
    manifest["stages"]["ground"]["fingerprint"] = "another"
    folder.write_json(parent / "manifest.json", manifest)
    assert results.is_stale(run, parent, ["learn"]) and not results.is_stale(
        run, parent, ["collect"]
    )


def test_the_page_states_the_figures_of_the_run_folders(smoke_run, tmp_path):
    runs, docs = tmp_path / "runs", tmp_path / "docs"
    docs.mkdir()
    for name in ("main", "keep_all", "brief", "long,_LoRA"):
        shutil.copytree(smoke_run, runs / name)
    for name, method, level, mean in (
        ("keep_all", "bc+kalm", "hard", 0.4321),
        ("main", "cql", "easy", 0.6172),
    ):
        found = folder.read_json(runs / name / "results.json")
        cell = {"mean": mean, "std": 0.0234, "seeds": [0.6, 0.63], "episodes": 12}
        found["success"][method][level] = cell
        folder.write_json(runs / name / "results.json", found)
    assert results.show_ablations(runs, ["--scale", "smoke"]) == 0
    report = (runs / "main" / "report.html").read_text(encoding="utf-8")
    assert re.search(r"kept: everything</th>\s*(<td>[.\d]+</td>\s*){3}<td>\.432</td>", report)
    results.page(runs, docs)
    page = (docs / "results.md").read_text(encoding="utf-8")
    assert re.search(r"^\| `cql` \|.*\| \.617 ± \.023 \|", page, re.M)
    assert re.search(r"^\| kept: everything \|.*\| \.432 \|", page, re.M)
    for text in (page, report):  # a run that is not there has no row
        assert (
            "four pre-trained layers, all four tasks" in text and "half of each batch" not in text
        )
    assert len(re.findall(r"^\| four pre-trained layers, LoRA of rank 64 \|", page, re.M)) == 1
    for name in ("curves.svg", "success.svg"):
        assert (docs / name).read_text(encoding="utf-8").startswith("<svg")


def test_the_page_has_the_words_of_its_template():
    pages = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in PAGES}
    words = re.split(r"\{\w+\}", pages["results_template.md"])
    assert re.fullmatch(".*?".join(map(re.escape, words)), pages["results.md"], re.S)
