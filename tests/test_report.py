"""report.html: valid, self-contained, honest about failures, readable without pictures."""
import html.parser
import json
import re
import shutil

import numpy as np
import pytest

import env
from data import report

ATTACK = "<script>alert(1)</script> & \"so\" on"


def record(success, goal="Put the red ball left of the blue ball.", **more):
    """One push of the red ball to the left, which reaches the goal, or of the cyan one, which does not."""
    xy = np.array([[0.2, 0], [0.05, 0], [-0.4, -0.2], [-0.4, 0.4], [0.4, 0.4]], np.float32)
    after = xy.copy()
    after[0] = (-0.2, 0) if success else (0.2, 0)
    goal = env.Goal(goal, "rephrase", "relation", ((0, 1, 1),))
    return {**env.rollout_record(goal, np.array([xy.ravel(), after.ravel()]), np.array([2 if success else 34]), imagined=True), **more}


class Elements(html.parser.HTMLParser):
    """Every element with its attributes; raises AssertionError where tags do not nest or an attribute comes twice."""
    VOID = ("meta", "img", "br")

    def __init__(self, page):
        super().__init__()
        self.found, self.open = [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), attributes
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def page_of(smoke_run, tmp_path):
    """A function: the report of a smoke run with these imagined rollouts and tables of ablations, after a change to its results."""
    def write(records=(), change=lambda results: None, ablations=None):
        run = shutil.copytree(smoke_run, tmp_path / "run", ignore=shutil.ignore_patterns("rollouts"))
        if ablations is not None:
            (run / "ablations.json").write_text(json.dumps(ablations))
        results = json.loads((run / "results.json").read_text())
        change(results)
        (run / "results.json").write_text(json.dumps(results))
        report.write(run, {"rephrase": list(records)})
        return (run / "report.html").read_text()
    return write


def test_the_page_is_well_formed_and_no_id_comes_twice(page_of):
    elements = Elements(page_of([record(True)])).found
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) > 50 and len(set(ids)) == len(ids)
    named = {*ids, *(f"url(#{name})" for name in ids)}
    for _, attributes in elements:  # what is referred to is there
        assert attributes.get("xlink:href", "#" + ids[0]).removeprefix("#") in named
        assert attributes.get("clip-path", f"url(#{ids[0]})") in named


def test_every_picture_says_what_it_shows(page_of):
    elements = Elements(page_of([record(True)], lambda results: results["success"]["cql"]["easy"].update(mean=0.62))).found
    alts = [attributes["alt"] for tag, attributes in elements if tag == "img"]
    assert alts[0] == "Five balls on a table, imagined, 1 action: goal met" and len(alts) == 2
    labels = [attributes["aria-label"] for tag, attributes in elements if tag == "svg"]
    assert len(labels) == 6 and sum("cql 0.62" in label for label in labels) == 1


def test_text_from_the_data_stays_text(page_of):
    page = page_of([record(True, goal=ATTACK, explanation=ATTACK)], lambda results: results["config"].update(llm=ATTACK, goals=ATTACK))
    assert "script" not in {tag for tag, _ in Elements(page).found}
    escaped = "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;so&quot; on"
    assert page.count(escaped) == 5  # goal, explanation, the run's first line, two options


def test_the_gallery_shows_failures_too_with_the_judges_verdict_on_both_sides(page_of):
    page = page_of([record(True) for _ in range(9)] + [record(False)])
    cards = re.findall(r"<article>.*?</article>", page, re.S)
    verdicts = [re.findall(r"(imagined|executed): <span[^>]*>goal (\w+)", card) for card in cards]
    assert len(cards) == 3 and all(dict(v)["imagined"] == "met" for v in verdicts[:2])
    assert verdicts[2] == [("imagined", "missed"), ("executed", "missed")]


def test_a_goal_without_a_judge_is_neither_met_nor_missed(page_of):
    unjudged = record(False, goal="Surprise me.", kind="unknown", relations=[])
    page = page_of([unjudged] * 3 + [record(False)])
    cards = re.findall(r"<article>.*?</article>", page, re.S)
    assert ["goal missed" in card for card in cards] == [True, False, False]  # it takes no place of those that missed theirs
    for card in cards[1:]:
        assert card.count("no judge for this goal") == 4 and "goal met" not in card  # below both pictures, and read out with both


def test_tables_of_ablations_are_shown_where_there_are_any(page_of, tmp_path):
    table = {"caption": "Kept <which>", "header": ["bc+kalm", "hard"], "rows": [["everything", ".432"]]}
    page = page_of(ablations=[table, {"caption": "Grounding", "header": ["x"], "rows": []}])
    assert page.count("What each part is worth") == 1 and "Kept &lt;which&gt;" in page and "<caption>Grounding<" not in page
    assert '<th scope="row">everything</th><td>.432</td>' in page and Elements(page).found
    assert report.ablation_tables(tmp_path) == ""
    (tmp_path / "ablations.json").write_text(json.dumps([{**table, "rows": []}]))
    assert report.ablation_tables(tmp_path) == ""


def test_an_explanation_is_shown_where_there_is_one(page_of):
    page = page_of([record(True, explanation="The red ball is near the blue ball."), record(True, explanation=None)])
    assert page.count("<q>") == 1 and "<q>The red ball is near the blue ball.</q>" in page


def test_results_stand_beside_the_papers(page_of):
    page = page_of(change=lambda results: results["quality"]["hard"].update(match=0.4567))
    rows = {re.sub("<[^>]*>", "|", row) for row in re.findall(r"<tr>.*?</tr>", page)}
    cells = [[c for c in row.split("|") if c] for row in rows]
    assert ["paper: best of the level", "0.600", "0.450", "0.350", "0.090"] in cells and ["paper: cql+kalm", "0.271"] in cells
    assert ["paper", "0.850", "0.360", "0.280"] in cells
    assert any(row[0] == "meet their goal as imagined" and row[-1] == "0.457" for row in cells)


def test_colors_of_pictures_follow_the_page_in_the_dark(page_of):
    page = page_of()
    drawings = re.findall(r"<svg.*?</svg>", page, re.S)
    for drawing in drawings:
        assert "currentColor" in drawing and report.INK not in drawing and "#ffffff" not in drawing and "<text" in drawing
    assert "prefers-color-scheme: dark" in page and len(drawings) == 6


def test_the_page_names_versions_and_times(page_of):
    page = page_of(change=lambda results: results["time_s"].update(learn=1234.4))
    import torch
    assert torch.__version__ in page and re.search(r"mujoco</th><td>\d", page) and ">1234</td>" in page
