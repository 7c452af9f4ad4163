"""RESULTS.md: the runs behind it, and the page made from their folders."""
import json
import re
import shutil
import sys

import pytest
from conftest import ROOT

import kalm

sys.path.insert(0, str(ROOT / "docs"))
import results  # noqa: E402


@pytest.mark.parametrize("name", results.RUNS)
def test_every_run_has_valid_options_and_a_parent_that_comes_before_it(name):
    parent, _, stages = results.RUNS[name]
    names = list(results.RUNS)
    assert parent is None or names.index(parent) < names.index(name)
    options = kalm.parse_options([*results.options_of(name), "--stage", *stages])
    assert options.split == ("test" if name == "main" else "validation")  # nothing is chosen on what is reported


def test_the_page_states_the_figures_of_the_run_folders(smoke_run, tmp_path):
    folder = tmp_path / "runs"
    for name in ("main", "keep_all", "brief", "long,_LoRA"):
        shutil.copytree(smoke_run, folder / name)
    path = folder / "keep_all" / "results.json"
    ablation = json.loads(path.read_text())
    ablation["success"]["bc+kalm"]["hard"]["mean"] = 0.4321
    path.write_text(json.dumps(ablation))
    assert results.show_ablations(folder, ["--scale", "smoke"]) == 0
    page = (folder / "main" / "report.html").read_text()
    assert re.search(r"kept: everything</th>(<td>[.\d]+</td>){3}<td>\.432</td>", page) and "half of each batch" not in page
    assert "four pre-trained layers, all four tasks</th>" in page
    path = folder / "main" / "results.json"
    main = json.loads(path.read_text())
    main["success"]["cql"]["easy"] = {"mean": 0.6172, "std": 0.0234, "seeds": [0.6, 0.63], "episodes": 12}
    path.write_text(json.dumps(main))
    (tmp_path / "docs").mkdir()
    results.page(folder, tmp_path)
    page = (tmp_path / "RESULTS.md").read_text()
    assert re.search(r"^\| `cql` \|.*\| \.617 ± \.023 \|", page, re.M)
    assert re.search(r"^\| kept: everything \|.*\| \.432 \|", page, re.M) and "half of each batch" not in page
    assert re.search(r"^\| four pre-trained layers, all four tasks \|", page, re.M) and "{" not in page
    assert len(re.findall(r"^\| four pre-trained layers, LoRA of rank 64 \|", page, re.M)) == 1
    assert all((tmp_path / "docs" / name).read_text().startswith("<svg") for name in ("curves.svg", "success.svg"))
