"""What a run tells: report.html, the table on the terminal, the model card, the account of act."""

import html.parser
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import rollout_record
from huggingface_hub import ModelCard
from PIL import Image

import env
from experiment import card, episode, report

ATTACK = '<script>alert(1)</script> & "so" on'
RELATIONS = (("red", "blue", "left"),)
SAID = "The red ball is near the blue ball, to the left of it."


def record(world, success=True, text="Put red left of blue.", **more):
    """One push of the red ball to the left, which reaches the goal, or in vain of the cyan one."""
    xy = np.array([[0.2, 0], [0.05, 0], [-0.4, -0.2], [-0.4, 0.4], [0.4, 0.4]], np.float32)
    after = xy.copy()
    after[0] = (-0.2, 0) if success else (0.2, 0)
    goal = env.Goal(text, "rephrase", "relation", RELATIONS)
    path, actions = np.array([xy.ravel(), after.ravel()]), np.array([2 if success else 34])
    return {**rollout_record(world, goal, path, actions, imagined=True), **more}


class Elements(html.parser.HTMLParser):
    """All elements, (tag, attributes). AssertionError: bad nesting, or an attribute comes twice."""

    def __init__(self, page):
        super().__init__()
        self.found, self.open = [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), attributes
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def page_of(smoke_run, world, tmp_path):
    """A function: the page of a smoke run with these rollouts, after a change to its results."""

    def write(records=(), change=lambda results: None, ablations=()):
        run = shutil.copytree(smoke_run, tmp_path / "run")
        (run / "ablations.json").write_text(json.dumps(ablations))
        results = json.loads((run / "results.json").read_text())
        change(results)
        (run / "results.json").write_text(json.dumps(results))
        assert report.write(run, world, {"rephrase": list(records)}) == results
        return (run / "report.html").read_text(encoding="utf-8")

    return write


def cells_of(page):
    """The rows of all tables of a page, as lists of texts without the empty ones."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.S)
    return [re.findall(r">([^<>\n]+)<", row) for row in rows]


def test_the_page_is_well_formed_and_no_id_comes_twice(page_of, world):
    elements = Elements(page_of([record(world)])).found
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) > 50 and len(set(ids)) == len(ids)
    for _, attributes in elements:  # what is referred to is there
        assert attributes.get("xlink:href", "#" + ids[0])[1:] in ids
        assert attributes.get("clip-path", f"url(#{ids[0]})")[5:-1] in ids


def test_every_picture_says_what_it_shows_and_follows_the_dark(page_of, world):
    page = page_of([record(world)], lambda r: r["success"]["cql"]["easy"].update(mean=0.62))
    found = [attributes for _, attributes in Elements(page).found]
    alts = [attributes["alt"] for attributes in found if "alt" in attributes]
    assert len(alts) == 2 and alts[0] == "imagined, 1 action: goal met; changed: red 0.40 m left"
    labels = [attributes["aria-label"] for attributes in found if attributes.get("role") == "img"]
    assert len(labels) == 13 and sum("cql 0.62" in label for label in labels) == 1
    drawings = re.findall(r"<svg.*?</svg>", page, re.S)
    assert "prefers-color-scheme: dark" in page and len(drawings) == 13
    for drawing in drawings:
        assert "currentColor" in drawing and "<text" in drawing
        assert report.INK not in drawing and "#ffffff" not in drawing


def test_text_from_the_data_stays_text(page_of, world):
    change = lambda results: results["config"].update(llm=ATTACK, goals=ATTACK)
    page = page_of([record(world, text=ATTACK, explanation=ATTACK)], change)
    assert "script" not in {tag for tag, _ in Elements(page).found}
    escaped = "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#34;so&#34; on"
    assert page.count(escaped) == 5  # goal, explanation, the run's first line, two options


def test_the_gallery_shows_failures_and_unjudged_goals_with_verdicts_on_both_sides(page_of, world):
    unjudged = record(world, False, "Surprise me.", kind=env.UNJUDGED, relations=[])
    met = [record(world, explanation=SAID), *[record(world)] * 8]
    page = page_of([*met, *[unjudged] * 3, record(world, False)])
    cards = re.findall(r"<article>.*?</article>", page, re.S)
    found = [re.findall(r"imagined: .*>(.*)</span|executed: .*>(.*)</span", card) for card in cards]
    verdicts = [imagined[0] for imagined, _ in found]
    assert verdicts == ["goal met"] * 2 + ["goal missed"] + ["not judged"] * 2
    assert [executed[1] for _, executed in found][2:] == verdicts[2:]
    assert f"<q>{SAID}</q>" in cards[0] and page.count("<q>") == 1


def test_tables_of_ablations_are_shown_where_they_have_rows(page_of):
    full = {"caption": "Kept <which>", "header": ["a", "b"], "rows": [["everything", ".432"]]}
    page = page_of(ablations=[{**full, "caption": "Grounding", "rows": []}, full, full])
    assert Elements(page).found and page.count("What each part is worth") == 1
    assert page.count("Kept &lt;which&gt;") == 2 and "<caption>Grounding<" not in page
    assert '<th scope="row">everything</th><td>.432</td>' in page


def test_results_stand_beside_the_papers_in_the_papers_world(page_of):
    cells = cells_of(page_of(change=lambda r: r["quality"]["hard"].update(match=0.4567)))
    assert ["paper: best of the level", "0.600", "0.450", "0.350", "0.090"] in cells
    assert ["paper: cql+kalm", "0.271"] in cells and ["paper", "0.850", "0.360", "0.280"] in cells
    assert ["meet their goal as imagined", "0.457"] in [row[:1] + row[4:5] for row in cells]


def test_another_world_has_its_own_figures_and_none_of_the_papers(page_of):
    def change(results):
        results["config"].update(env="mine.py:Tiles", learning_rate=0.0006, data="")
        results["quality"]["easy"]["two_on_a_tile"] = 0.125
        results["grounding"]["explanation_of_tiles"] = 0.375
        results["time_s"]["learn"] = 1234.4

    page = page_of(change=change)
    cells = cells_of(page)
    assert ["two on a tile", "0.125"] in cells and ["explanation of tiles", "0.375"] in cells
    assert "paper" not in page and ["torch", torch.__version__] in cells
    for row in (["learn", "1234"], ["learning_rate", "0.0006"], ["data", "none"]):
        assert row in cells


def results_with(*methods):
    cell = {"mean": 0.1234, "episodes": 40, "outcomes": ["0" * 20, "1" * 20]}
    alone = {"mean": 1.0, "episodes": 20, "outcomes": ["1" * 20]}
    rows = {method: dict.fromkeys(env.LEVELS, cell) for method in methods}
    rows["llm"] = dict.fromkeys(env.LEVELS, alone)
    goals = dict.fromkeys(env.LEVELS, [str(number) for number in range(20)])
    return {"success": rows, "goals": goals, "config": {}, "words": {}}


def test_the_table_fits_80_columns_of_any_terminal():
    results = results_with("bc", "mine+relabel", "a_long_method+kalm")
    header, *lines = report.results_table(results)
    assert header.split() == ["method", *env.LEVELS[:4]] and "".join(lines).isascii()
    assert {len(line) for line in lines} == {len(header)} and len(header) <= 80
    assert lines[0].split() == ["bc", *["0.123", ".00,1.0"] * 4]
    assert lines[-1].split() == ["llm", *["1.000", "1.0,1.0"] * 4]
    assert report.most_episodes(results) == 40
    assert report.novel_mean(results["success"]["bc"]) == pytest.approx(0.1234)
    assert report.novel_mean({"offline": {"mean": 1}}) is None


def test_the_table_has_differences_to_controls_in_as_many_columns():
    results = results_with("cql", "cql+kalm", "a_long_one+relabel", "a_long_one+kalm")
    worse = {"mean": 0.0, "episodes": 40, "outcomes": ["0" * 20, "0" * 20]}
    for method in ("cql+kalm", "a_long_one+kalm"):
        results["success"][method]["easy"] = worse
    results["success"]["cql"]["easy"] = {**worse, "mean": 1.0, "outcomes": ["1" * 20] * 2}
    lines = report.results_table(results)
    assert {len(line) for line in lines} == {len(lines[0])} and len(lines[0]) <= 80
    same = ["+.00", ".00,.00"]
    assert lines[3].split() == ["-", "cql", *same * 2, "-1.0", "-1.0,-1.0", *same]
    assert lines[6].split() == ["-", "relabel", *same * 2, "-.12", "-1.0,.00", *same]


def test_what_is_made_of_new_words_stands_below_in_the_same_columns(page_of):
    results = results_with("bc", "a_long_method+kalm")
    rates = {"new": [0.4567, 0.4, 1.0], "nonsense": [0.401, 0, 1], "known": [1.0, 1, 1]}
    figures = {"ball": {**rates, "gain": [0.0557, -0.1, 0.2]}}
    results["words"] = {"a_long_method+kalm": figures, "llm": {**figures, "direction": rates}}
    blank, header, ours, _ = report.results_table(results)[-4:]
    assert (blank, header.split()) == ("", "in new words success ball nonsense known".split())
    assert ours.split() == ["a_long_method+kalm", ".12", ".46", ".40,1.0", ".40", "1.0"]
    results["words"] = dict.fromkeys(results["success"], {"ball": figures["ball"], "way": rates})
    lines = report.results_table(results)[-4:]
    assert {len(line) for line in lines} == {len(lines[0])} and len(lines[0]) <= 80
    page = page_of(change=lambda r: r.update(words={"llm": figures}))
    cells = cells_of(page)
    assert ["method", "ball, new", "ball, nonsense", "ball, known", "ball, gain"] in cells
    assert ["llm", "0.457 (0.40, 1.00)", "0.401 (0.00, 1.00)"] in [row[:3] for row in cells]


def test_a_world_without_new_words_says_nothing_of_them(page_of):
    page = page_of(change=lambda results: results.update(words={}))
    assert "New words" not in page and "nonsense" not in page


def test_held_out_figures_are_drawn_over_grounding_beside_the_papers():
    log = [{"step": 5, "loss": 1.0}]
    for step, rate in ((10, 0.2), (20, 0.6)):
        log.append({"step": step, "eval_action_accuracy": rate, "eval_easy_state": rate / 2})
    axes = report.Figure().subplots()
    report.draw_held_out(axes, log, report.PAPER_HELD_OUT)
    easy, action, *papers = [list(line.get_ydata()) for line in axes.lines]
    assert (easy, action) == ([0.1, 0.3], [0.2, 0.6])
    assert [line[0] for line in papers] == list(report.PAPER_HELD_OUT)


def test_the_page_draws_success_over_training_where_there_are_checkpoints(page_of):
    def one_seed_more(results):
        results["curves"]["cql"]["hard"] = [[30, [0.0, 0.25, 0.5]], [60, [0.25, 0.5, 0.75]]]
        results["last_checkpoints"]["cql"]["hard"] = {"mean": 0.4567, "episodes": 24}

    page = page_of(change=one_seed_more)
    labels = re.findall(r'aria-label="Success over training on level (\w+)[^"]* cql ([.\d]+)', page)
    assert [level for level, _ in labels] == list(env.LEVELS) and labels[3][1] == "0.50"
    rows = [row for row in cells_of(page) if row[:1] == ["cql"]]
    assert rows[1][4] == "0.457" and len(rows) == 3
    axes = report.Figure().subplots()
    results = {"curves": {"bc": {"hard": [[30, [0.0, 0.4]], [60, [0.5, 0.5]]]}}}
    report.draw_training(axes, results, "hard")
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[30, 0.2], [60, 0.5]])
    shade = axes.collections[0].get_paths()[0].vertices
    assert sorted(set(shade[:, 1].round(6))) == [0.1, 0.3, 0.5]


def test_the_page_of_a_run_without_checkpoints_has_no_curves_of_success(page_of):
    page = page_of(change=lambda results: results.update(curves={}, last_checkpoints={}))
    assert Elements(page).found and "over training" not in page


def test_any_algorithm_has_a_line_style_and_any_source_a_color():
    algorithms, sources = ("bc", "awac", "iql"), ("", "+kalm", "+mine")
    names = [f"{algorithm}{source}" for algorithm in algorithms for source in sources]
    axes = report.Figure().subplots()
    report.draw_policies(axes, {name: [(0, 3.0), (1, 2.0)] for name in names})
    looks = [(line.get_linestyle(), line.get_color()) for line in axes.lines]
    styles, colors = np.reshape(looks, (3, 3, 2)).transpose(2, 0, 1)
    assert (styles == styles[:, :1]).all() and len(set(styles[:, 0])) == 3
    assert (colors == colors[:1]).all() and len(set(colors[0])) == 3
    assert report.success_figure(results_with(*names)).startswith("<svg")


def test_curves_leave_out_steps_that_had_no_such_loss():
    axes = report.Figure().subplots()
    log = [{"step": 1, "text_loss": 2, "action_loss": 0}, {"step": 2}, {"step": 3, "text_loss": 1}]
    report.draw_grounding(axes, log)
    assert [line.get_xdata().tolist() for line in axes.lines] == [[1, 3], []]
    assert report.curves_figure(log, {"bc": [[0, 1.0]]}).startswith("<svg")


FACTS = {"llm": "smollm2", "layers": 6, "lora_rank": 64, "world": "clevr_robot", "data": None}
FACTS |= {"observation_dim": 10, "num_actions": 40, "rollouts": (1460, 71), "adapter": None}
FACTS |= {"steps": 300, "batch_size": 32, "tasks": ["dynamics", "explanation"], "seed": 4}


def card_with(folder, **changed):
    metrics = {"log": [{"step": 1}], "action_accuracy": 0.7067, "explanation_of_tiles": 0.25}
    card.write_card(folder, {**FACTS, **changed}, metrics)
    return ModelCard.load(folder / "README.md")


def test_the_model_card_has_front_matter_figures_and_how_to_load(tmp_path):
    found = card_with(tmp_path)
    assert found.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert found.data.license == "apache-2.0" and {"kalm", "clevr-robot"} <= set(found.data.tags)
    assert "| picks the recorded action | 0.707 |" in found.text
    assert "| explanation of tiles | 0.250 |" in found.text
    assert "import model" in found.text and "from_pretrained(FOLDER, llm=...)" in found.text
    assert "llm=..." not in card_with(tmp_path, lora_rank=0).text


def test_the_model_card_names_a_base_that_others_can_find_and_its_license(tmp_path, monkeypatch):
    llama = card_with(tmp_path, llm="meta-llama/Llama-2-7b-chat-hf").data
    assert (llama.base_model, llama.license) == ("meta-llama/Llama-2-7b-chat-hf", "other")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "mine").mkdir(parents=True)
    local = card_with(tmp_path, llm="here/mine", world=f"{tmp_path}/a.py:Tiles", data="here/my.npz")
    assert local.data.base_model is None and str(tmp_path) not in local.content
    assert all(name in local.text for name in ("`mine`, 6 layers", "`Tiles`", "of `my.npz`"))
    assert "random tiny" in card_with(tmp_path, llm="tiny").text


def test_the_model_card_tells_of_training_what_really_happened(tmp_path):
    steps = "300 steps of 32 examples, tuning LoRA of rank 64, tasks dynamics, explanation, seed 4"
    trained = card_with(tmp_path).text
    assert f"**Training**: {steps}." in trained and "1460 rollouts of the world's" in trained
    further = card_with(tmp_path, adapter="runs/x/mine").text
    assert f"`mine`, trained on for {steps}." in further and "on 71 held-out rollouts" in further
    taken = card_with(tmp_path, adapter="released", steps=0).text
    assert "adapter `released` (LoRA of rank 64) was taken as it is" in taken
    assert not re.search("1460|71|32|dynamics, expl|seed", taken)
    measured = card_with(tmp_path, adapter="released", steps=0, data="my.npz").text
    assert "on 71 held-out rollouts" in measured and "1460" not in measured
    assert "random weights" in card_with(tmp_path, steps=0).text


def test_the_best_policy_of_a_run_and_the_llm_act_unless_others_are_named(tmp_path):
    (tmp_path / "policies").mkdir()
    for name in ("bc", "bc+kalm", "cql"):
        (tmp_path / "policies" / f"{name}.safetensors").touch()
    actors = lambda *named: episode.actors(tmp_path, ("bc", "bc+kalm", "cql", "iql", "llm"), named)
    assert actors() == ["bc+kalm", "llm"]  # no results yet
    rates = {"bc": (0.2, 0.1), "bc+kalm": (0.1, 0.1), "cql": (0.4, 0.0), "llm": (0.9, 0.9)}
    rows = {m: {"easy": {"mean": a}, "hard": {"mean": b}} for m, (a, b) in rates.items()}
    (tmp_path / "results.json").write_text(json.dumps({"success": rows}))
    assert actors() == ["cql", "llm"] and actors("bc", "llm") == ["bc", "llm"]
    with pytest.raises(ValueError, match="--methods iql: .* it has bc, bc.kalm, cql, llm"):
        actors("bc", "iql")


def test_an_episode_and_its_judge_are_told_drawn_and_logged(world, tmp_path):
    text = "Räum den Tisch auf, 请"
    goal = env.Goal(text, "rephrase", "relation", RELATIONS)
    judge = episode.judge_in_words
    assert judge(world, goal, False) == "red is left of blue (read from the sentence)"
    assert "as the goals of the run" in judge(world, goal, True)
    assert judge(world, env.Goal(text), True).startswith("none is known")
    missed = {**record(world, False, explanation="The The"), "goal": text}
    told = episode.write_account(tmp_path, world, "bc", missed, 3)
    assert "  bc: goal missed, 1 actions; changed: nothing\n" in told and "does not fit" in told
    met = {**record(world, explanation=SAID), "goal": text}
    told = episode.write_account(tmp_path, world, "bc+kalm", met, 3)
    assert "  bc+kalm: goal met, 1 actions; changed: red 0.40 m left\n" in told
    assert f'"{SAID}" (this names what the goal names)' in told
    lines = (tmp_path / "logs" / "act.jsonl").read_text(encoding="utf-8").splitlines()
    entry = json.loads(lines[1])
    gif = tmp_path / "act" / entry.pop("gif")
    assert gif.name.endswith("-3-bc+kalm.gif") and str(gif) in told and entry.pop("time") > 1e9
    done = {"verdict": "goal met", "actions": [2], "explanation": SAID, "explanation_fits": True}
    assert entry == {"goal": text, "kind": "relation", "method": "bc+kalm", "seed": 3, **done}
    with Image.open(gif) as picture:
        assert len(lines) == 2 and picture.n_frames > 1
