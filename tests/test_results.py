"""docs/results.md: the runs behind it, and the page made from their folders."""

import re
import shutil
import sys

import pytest
from conftest import ROOT

import kalm
from experiment import command, folder, settings

sys.path.insert(0, str(ROOT / "docs"))
import results


def test_every_run_has_valid_options_and_a_parent_that_comes_before_it():
    for number, (name, (parent, _, stages)) in enumerate(results.RUNS.items()):
        assert parent is None or parent in list(results.RUNS)[:number]
        line = [*results.options_of(name), "--stage", *stages]
        defaults = lambda given: command.defaults_of(kalm.SCALES, given)
        (_, _, grounding, imagining, *_), _ = settings.parse(line, kalm.CLASSES, defaults, {})
        assert imagining.split == ("test" if name.startswith("main") else "validation"), name
        wanted = (-1, "released")
        if "ground" in stages:
            wanted = (240, "none")
        if name.startswith("main, seed 1"):
            wanted = (1000, "none")
        assert (grounding.max_steps, grounding.adapter) == wanted, name


def test_a_run_begins_with_its_parents_files_and_leaves_them(smoke_run, tmp_path, monkeypatch):
    run, parent = tmp_path / "one", shutil.copytree(smoke_run, tmp_path / "main")
    (parent / ".lock").touch()
    before = {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()}
    monkeypatch.setitem(results.RUNS, "main", (None, ["--scale", "smoke"], ["all"]))
    monkeypatch.setitem(results.RUNS, "one", ("main", ["--methods", "bc+kalm"], ["learn"]))
    codes = []
    kalm_here = lambda line, check: codes.append(kalm.main(line[2:]))
    monkeypatch.setattr(results.subprocess, "run", kalm_here)
    for _ in range(2):  # the second time nothing is left to do
        results.do_run(tmp_path, "one")
    assert codes == [0, 0] and len(list((run / "policies").glob("*bc*"))) == 1
    assert not (run / "results.json").exists() and (parent / ".lock").stat().st_nlink == 1
    assert (run / "quality.json").samefile(parent / "quality.json")
    assert {path: path.read_bytes() for path in before} == before
    with folder.locked(parent), pytest.raises(ValueError, match="in use by another process"):
        results.copy_run(parent, tmp_path / "two")  # a parent at work is no parent yet
    assert not (tmp_path / "two").exists()
    assert not results.is_stale(run, parent, ["learn"])
    manifest = folder.read_json(parent / "manifest.json")
    manifest["stages"]["ground"]["fingerprint"] = "another"
    folder.write_json(parent / "manifest.json", manifest)
    assert [results.is_stale(run, parent, [name]) for name in ("collect", "learn")] == [False, True]


def test_the_page_states_the_figures_of_the_run_folders(smoke_run, tmp_path):
    def change(name, method, level, mean):
        found = folder.read_json(tmp_path / name / "results.json")
        found["success"][method][level] |= {"mean": mean, "std": 0.0234}
        folder.write_json(tmp_path / name / "results.json", found)

    for name in ("main", "validation", "keep_all", "brief", "brief,_LoRA"):
        shutil.copytree(smoke_run, tmp_path / name)
    found = folder.read_json(tmp_path / "validation" / "results.json")
    found["success"]["bc+both"] = found["success"]["bc+kalm"]
    folder.write_json(tmp_path / "validation" / "results.json", found)
    change("keep_all", "bc+kalm", "hard", 0.4321)
    assert results.show_ablations(tmp_path, ["--scale", "smoke"]) == 0
    report = (tmp_path / "main" / "report.html").read_text(encoding="utf-8")
    assert re.search(r"kept: everything</th>\s*(<td>[.\d]+</td>\s*){3}<td>\.432</td>", report)
    change("main", "cql", "easy", 0.6172)
    results.page(tmp_path, tmp_path)
    page = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert re.search(r"^\| `cql` \|.*\| \.617 \(\.\d\d, \.\d\d\) \|", page, re.M)
    assert re.search(r"^\| `  - bc` \|.*\| -?\.\d+ \(", page, re.M)  # kept without a judge
    assert re.search(r"^\| kept: everything - `bc` \|.*\| -?\.\d+ \(.*\) \|$", page, re.M)
    assert re.search(r"^\| kept: everything \|.*\| \.432 \|", page, re.M)
    assert re.search(r"^\| four pre-trained layers, all four tasks \|", page, re.M)
    assert re.search(r"^\| four pre-trained layers, LoRA of rank 64 \|", page, re.M)
    assert "four random layers" not in page + report  # a run that is not there has no row
    pictures = {path.stem for path in tmp_path.glob("*.svg")}
    assert pictures == {"curves", "success", "training"}


def test_the_page_has_the_words_of_its_template():
    names = ("results_template.md", "results.md")
    template, page = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in names)
    words = map(re.escape, re.split(r"\{\w+\}", template))
    assert re.fullmatch(".*?".join(words), page, re.S)
