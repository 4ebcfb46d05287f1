"""Predictions, checks, trials and copies; every exercise: its solution passes, typical mistakes are named.

Notebooks 00 to 03 run on the tiny model, 04 to 07 on the planted study, all in this process.
"""

import contextlib
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import altair as alt
import nbformat
import numpy as np
import pandas as pd
import planted
import pytest
from conftest import ROOT

from seqdpo_utils import models, params, teaching
from seqdpo_utils.batch import cli, pages
from seqdpo_utils.batch.notebooks import notebook_parameters
from seqdpo_utils.errors import StudyError
from seqdpo_utils.paths import RunPaths, read_json, write_json, write_table

PKU, CHAIN = "safety_signal", "safe-then-helpful"
SOURCES = {file.name[:2]: file for file in sorted((ROOT / "notebooks").glob("0[0-7]_*.ipynb"))}
WAITS = "waits for your answer"


def cells_of(file: Path) -> list[SimpleNamespace]:
    """Code cells of a notebook: id, tags, source."""
    code = [c for c in json.loads(file.read_text())["cells"] if c["cell_type"] == "code"]
    return [
        SimpleNamespace(id=c["id"], tags=set(c["metadata"].get("tags", [])), source="".join(c["source"]))
        for c in code
    ]


def exercises(number: str) -> dict[str, dict[str, str]]:
    """Exercise (as "3" or "0") to its cells by kind: prediction "p", stub "s", solution "x", check "c"."""
    found: dict[str, dict[str, str]] = {}
    for cell in cells_of(SOURCES[number]):
        if named := re.fullmatch(r"t\d\d-(\d)(p?)-([psxc])t?", cell.id):
            found.setdefault(named[1], {})[named[3]] = cell.source
    return found


EVERY = [f"{number}.{name}" for number in SOURCES for name in exercises(number)]


def as_a_student(file: Path, **given: object) -> tuple[dict, list[str]]:
    """Run a student's copy in order; its checks must wait for answers. Returns its names and these checks.

    Stubs that train are left for the tests of their exercises.
    """
    names, waiting = {"__name__": "__main__"}, []
    for cell in cells_of(file):
        if "exercise" in cell.tags and "stages.train" in cell.source:
            continue
        if cell.tags >= {"check", "by-hand"}:
            continue
        code = compile(cell.source, cell.id, "exec")
        if "check" in cell.tags:
            with pytest.raises(teaching.Rejected, match=WAITS):
                exec(code, names)
            waiting += [cell.id]
        else:
            exec(code, names)
        if "parameters" in cell.tags:
            names.update(given)
    return names, waiting


class Lessons:
    """Notebooks as they stand after a run, by number; each is executed when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.planted = planted.plant(folder / "planted")
        self.real, self.names, self.waiting = folder / "real", {}, {}
        for name in ("notebooks", "params", "models"):
            (self.real / name).symlink_to(ROOT / name)
        self.copies = teaching.copies(self.real) / "student"

    def root(self, number: str) -> Path:
        return self.real if number < "04" else self.planted.root

    def at(self, number: str) -> dict:
        """What a notebook knows at its end: 00 to 03 as students run them, 04 to 07 as a study does."""
        if number in self.names:
            return self.names[number]
        if number in ("04", "05", "06"):
            self.names[number] = self.planted.page(number, CHAIN).names
            return self.names[number]
        if number == "07":  # one seed and both orders, after 04 to 06
            orders = [planted.FORTH, planted.BACK]
            for each in itertools.product(("04", "05", "06"), orders):
                self.planted.page(*each)
            given = {"scale": planted.SCALE, "beta": planted.BETA, "resamples": 200, "seeds": [0]}
            with contextlib.chdir(self.planted.root), alt.renderers.enable("default"):
                page = planted.execute("07", **given, chains={planted.SETTING: orders})
            self.names[number] = page.names
            return page.names
        for before in ("01", "02"):
            if before < number:
                self.at(before)
        chain = {"02": "safe", "03": CHAIN}.get(number, "")
        given = params.resolve(ROOT, scale="smoke", setting=PKU, chain=chain).model_dump()
        given = notebook_parameters(SOURCES[number], given)
        with contextlib.chdir(self.real), alt.renderers.enable("default"):
            done = as_a_student(self.copies / SOURCES[number].name, **given)
        self.names[number], self.waiting[number] = done
        return self.names[number]

    def run(self, number: str, *sources: str) -> dict:
        names = self.at(number)
        with contextlib.chdir(self.root(number)), alt.renderers.enable("default"):
            for source in sources:
                exec(source, names)
        return names


@pytest.fixture(scope="module")
def lessons(tmp_path_factory) -> Lessons:
    models.prepare_model(ROOT, models.TINY)
    folder = tmp_path_factory.mktemp("lessons")
    for name in ("planted", "real"):
        (folder / name).mkdir()
    return Lessons(folder)


# ---- what a student and a teacher get ----


def test_copies_for_students_lack_the_solutions_and_nothing_else(lessons, capsys):
    for kind, lacks in (("student", {"solution"}), ("teacher", set())):
        for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
            whole, copy = (
                json.loads(each.read_text()) for each in (file, lessons.copies.parent / kind / file.name)
            )
            kept = [c for c in whole["cells"] if not lacks & set(c["metadata"].get("tags", []))]
            assert copy == whole | {"cells": kept}
            assert any("exercise" in c["metadata"].get("tags", []) for c in kept) or file.name > "08"
            if kind == "student":
                assert len(kept) < len(whole["cells"]) and file.parent not in (lessons.copies, None)
    with contextlib.chdir(lessons.real):
        assert cli.main(["classroom"]) == 0
    assert capsys.readouterr().out.strip().endswith("runs/classroom_copies")


@pytest.mark.parametrize("number", list(SOURCES))
def test_what_waits_for_a_person_is_left_out_of_a_study(number):
    for cell in cells_of(SOURCES[number]):
        trains = "stages.train(second)" in cell.source or cell.id.endswith("-ct")
        assert ("by-hand" in cell.tags) == ("exercise" in cell.tags or trains), cell.id
        assert len(cell.tags & {"exercise", "solution", "check"}) <= 1


@pytest.mark.parametrize("number", ["00", "01", "02", "03", "04", "05", "06"])
def test_a_copy_for_students_runs_and_waits_at_the_first_check(lessons, number):
    """From top to bottom: the first thing that stops is a check, and it asks for the answer."""
    if number < "04":
        lessons.at(number)
        waiting = lessons.waiting[number]
    else:
        given = {
            "scale": planted.SCALE,
            "setting": PKU,
            "objectives": list(planted.OBJECTIVES),
            "chain": CHAIN,
        }
        given |= {"seed": 0, "beta": planted.BETA, "resamples": 200} | planted.OWN[number]
        with contextlib.chdir(lessons.planted.root), alt.renderers.enable("default"):
            _, waiting = as_a_student(lessons.copies / SOURCES[number].name, **given)
    asked = [name for name, cells in exercises(number).items() if "x" in cells]
    trained = [name for name in asked if "stages.train" in exercises(number)[name]["x"]]
    assert waiting == [f"t{number}-{name}-c" for name in asked if name not in trained]


# ---- every exercise, as it stands in its notebook ----

WRONG = {
    "00.0": {
        "answer = (3.0, -1.0)": "β is forgotten",
        "answer = (-0.9, 0.3)": "sign is swapped",
        "answer = (0.3, -0.3)": "change is added",
        "answer = (0.9, -2.7)": "reference is missing",
    },
    "00.1": {
        "answer = (0, 0)": "own number of tokens",
        "answer = (1.5, 0.25)": "Only the chosen answer",
        "answer = (0, 0.075)": "β belongs to M",
    },
    "00.2": {
        "answer = (-10, -30, -12, -25)": "Both signs are turned",
        "answer = (-1, -1, 2, -3)": "not positive",
        "answer = (-10, -10, -12, -11)": "M is not positive",
        "answer = (-10, -10, -8, -11)": "m is not",
    },
    "00.3": {"answer = 'a'": "not by chance", "answer = 'c'": "policy accuracy"},
    "00.4": {
        "answer = 18": "Nothing is shared",
        "answer = 6": "asked are the trainings",
        "answer = 7": "none of",
    },
    "01.1": {"answer = 'nobody'": "No pair of this setting", "answer = of_kind('sound')": "label is sound"},
    "01.2": {
        "answer = 1 - answer": "shorter",
        "answer = part['chosen'].mean()": "average length",
        "answer = 0.123": "none of the mistakes",
    },
    "01.3": {
        "answer = original": "prompt itself",
        "answer = original + ' now'": "One word more",
        "answer = 'x' + original.lower()": "One word more",
    },
    "01.4": {
        "answer = set()": "names of pairs",
        "answer = set(turned[1].query('turned')['pair_id'])": "larger draw",
    },
    "02.1": {
        "answer = [answer[0] * beta, answer[1] * 0.1]": "margins: divide",
        "answer = answer[::-1]": "swapped",
        "answer, trainer_seed = [0, 0], second.args.seed; second.args.seed = 99": "Two things were changed",
    },
    "02.2": {
        "answer = scored['margin']": "Nothing was exchanged",
        "answer = -scored['margin'] / beta": "β is",
        "answer = policy_alone()": "this stage's records only",
    },
    "02.3": {
        "answer = [len(history) - answer[0], len(steep) - answer[1]]": "below log 2",
        "answer = [1, 99]": "none of the mistakes",
    },
    "02.4": {
        "answer = logps.sum().item()": "prompt is not masked",
        "answer = answer / len(row['chosen_ids'])": "mean",
        "answer = shifted()": "Off by one",
        "answer = with_adapter_off()": "reference: the adapter was off",
    },
    "03.1": {
        "answer = answer[::-1]": "swapped",
        "answer = mean_of('matched_cosine')": "between the objectives",
        "answer = mean_of('within_new_cosine')": "within the new objective",
    },
    "03.2": {
        "answer = (0, -0.3)": "sign is swapped",
        "answer = (0, 0)": "scale",
        "answer = (0, 3)": "rate is forg",
    },
    "03.3": {"answer = 1 - answer if answer != 0.5 else 9": "equal signs|none of", "answer = 7": "none of"},
    "03.4": {"answer = 0.5": "left ends", "answer = 4": "upside down", "answer = 1 / 8": "single stretch"},
    "03.5": {"answer = 1 / answer": "upside down", "answer = 0.25": "what was measured"},
    "04.1": {
        "answer = [1 - share for share in answer]": "rejected answers' wins",
        "answer = answer[::-1]": "order",
        "answer = policy_wins()": "policy accuracy",
    },
    "04.2": {"answer = mean_margin()": "asked are medians", "answer = answer / beta": "β is forgotten"},
    "04.3": {
        "answer = ([1, -1, 1, -1], [-1, 1, -1, 1])": "retention of nothing",
        "answer = ([1, 1, 1, 1], [-1, -1, 1, 1])": "it is not 1",
        "answer = ([1, 2, 3, 4], [4, 3, 2, 1])": "Fewer than half",
        "answer = ([1], [1])": "four pairs",
    },
    "05.1": {
        "answer = [-x for x in answer]": "sign is swapped",
        "answer = answer[::-1]": "highest to the lowest",
        "answer = by(truth)": "nobody has",
        "answer = by(two)": "second copy",
    },
    "05.2": {"answer = ('harmed', 'lost')": "only below zero", "answer = ('unchanged', 'same')": "band"},
    "05.3": {
        "answer = answer[::-1]": "Slope first",
        "answer = (1, 0)": "flattens",
        "answer = np.polyfit(late, early, 1)": "first copy on the second",
    },
    "06.1": {"answer = {'weight'}": "holds BA", "answer = set()": "A counts four times"},
    "06.2": {
        "answer = (0.2, answer[1])": "both are noisy",
        "answer = (0.04, 0.04)": "loses noise",
        "answer = (0.04, 0.806)": "a root remains",
    },
    "06.3": {"answer = [k + 100 for k in answer] + [7]": "none of", "answer = by_module()": "by itself"},
    "06.4": {"answer = -1": "sign is swapped", "answer = 0": "not zero", "answer = 0.05": "one step"},
    "07.1": {"answer = answer[::-1]": "two are swapped", "answer = (answer[0],) * 2": "none of the mistakes"},
    "07.2": {
        "answer = answer // 2": "square root",
        "answer = answer // 4": "number that it has",
        "answer = 4 * ends.loc[widths.idxmax(), 'n_pairs']": "count prompts",
    },
    "07.3": {"answer = len(cases) - answer": "keep their outcome", "answer = 99": "none of the mistakes"},
}
"""Exercise to wrong answers (as code, after the solution) and the words of the message that each must get."""
MISTAKEN = """
def of_kind(kind):
    return pooled.loc[pooled["label"] == kind, "pair_id"].iloc[0]
def policy_alone():
    half, rows = records.copy(), records["checkpoint"] == chain
    sides = ["chosen_logp", "rejected_logp"]
    half.loc[rows, sides] = half.loc[rows, sides[::-1]].to_numpy()
    return metrics.pair_measures(half, beta=beta).query("checkpoint == @chain")["margin"]
def shifted():
    at = range(ids.shape[1] - len(row["chosen_ids"]), ids.shape[1])
    return sum(logits[t].log_softmax(-1)[ids[0, t]].item() for t in at)
def with_adapter_off():
    with torch.no_grad(), trainer.model.disable_adapter():
        plain = trainer.model(ids).logits[0].float().log_softmax(-1)
    at = range(ids.shape[1] - len(row["chosen_ids"]), ids.shape[1])
    return sum(plain[t - 1, ids[0, t]].item() for t in at)
def mean_of(column):
    return [each[each["split"] == "probe"][column].mean() for each in (measured, doubled)]
def policy_wins():
    table = measures[measures["checkpoint"] == first].groupby("objective")["policy_margin"]
    return table.agg(lambda margin: (margin > 0).mean())[objectives].tolist()
def mean_margin():
    return measures[measures["checkpoint"] == chain].groupby("objective")["margin"].mean()[objectives]
def by(key):
    return [(two - one)[group].mean() for group in np.array_split(np.argsort(key), 4)]
def by_module():
    rows = moves[(moves["space"] == "weight") & moves["layer"].notna() & moves["module"].notna()]
    rows = rows[(rows["to_checkpoint"] == first) & (rows["other_to"] == last)]
    return sorted(rows.loc[rows["cosine"] < 0, "layer"])
"""


def test_every_exercise_has_stub_solution_check_and_wrong_answers():
    assert set(WRONG) == {name for name in EVERY if "x" in exercises(name[:2])[name[3:]]} and len(WRONG) >= 31
    for number in SOURCES:
        for name, cells in exercises(number).items():
            if (number, name) != ("01", "0"):  # the first pair: a choice, looked at in the next section
                assert set(cells) >= {"s", "x", "c"} and "..." in cells["s"], f"{number}.{name}"
    assert all(len(wrong) >= 2 for wrong in WRONG.values())


def study_files(lessons: Lessons) -> dict[Path, bytes]:
    """Every file that notebooks 01 to 03 made, outside the place of trials."""
    files = [file for file in (lessons.real / "runs").rglob("*") if file.is_file()]
    return {
        file: file.read_bytes() for file in files if not {"scratch", "classroom_copies"} & set(file.parts)
    }


@pytest.mark.parametrize("name", WRONG)
def test_the_solution_passes_and_mistakes_are_named(lessons, name):
    cells = exercises(name[:2])[name[3:]]
    lessons.at(name[:2])
    kept = study_files(lessons)
    names = lessons.run(name[:2], cells["x"], cells["c"], MISTAKEN)
    assert study_files(lessons) == kept, "a trial must not touch what the study made"
    right = names["answer"]
    for wrong, words in WRONG[name].items():
        names["answer"] = right
        lessons.run(name[:2], wrong)
        with pytest.raises(teaching.Rejected, match=words):
            lessons.run(name[:2], cells["c"])
    names["answer"] = ... if not isinstance(right, tuple | list) else (...,) * len(right)
    with pytest.raises(teaching.Rejected, match=WAITS):
        lessons.run(name[:2], cells["c"])


# ---- the helpers ----


def test_a_prediction_is_stored_and_looked_at_again():
    assert "missing: the margin" in teaching.predict("the margin").data
    assert teaching.predicted("the margin", "falls") == ""
    assert "**falls**" in teaching.predict("the margin", "falls").data
    assert "as you said" in teaching.predicted("the margin", "falls")
    again = teaching.predicted("the margin", "rises")
    assert "**falls**" in again and "Seen: **rises**" in again and "overlooked" in again
    with pytest.raises(StudyError, match="'explodes' is no prediction of the margin: choose one of “falls”"):
        teaching.predict("the margin", "explodes")
    assert "as you said" in teaching.check(1, 1, {}, so="", foretold=("the margin", "falls")).data


@pytest.mark.parametrize(
    ("bounds", "word"), [((0.1, 0.2), "rises"), ((-0.2, -0.1), "falls"), ((-0.1, 0.1), "stays")]
)
def test_the_way_of_an_interval(bounds, word):
    assert teaching.way(*bounds) == word


def test_answers_are_compared_as_numbers_where_they_are_numbers():
    assert (
        teaching.same(1, 1.0 + 1e-8) and not teaching.same(1, 1.001) and teaching.same(1, 1.001, within=0.01)
    )
    assert teaching.same(pd.Series([1.0, 2.0], index=["a", "b"]), (1, 2)) and not teaching.same(
        [1, 2], [2, 1]
    )
    assert teaching.same({"a"}, {"a"}) and not teaching.same({"a"}, {"b"}) and not teaching.same([1], [1, 1])
    assert (
        teaching.same((None, 1), (np.nan, 1)) and not teaching.same("lost", 3) and not teaching.same(0, 0.001)
    )


def test_a_check_prefers_a_right_answer_and_names_the_first_mistake():
    wrong = {"upside down": 4, "also right": 2, "halved": 1}
    assert teaching.check(2, 2, wrong, so="Since.").data == "**Right.** Since."
    for answer, words in ((4, "upside down"), (1, "halved"), (7, "none of the mistakes"), (..., WAITS)):
        with pytest.raises(teaching.Rejected, match=words) as told:
            teaching.check(answer, 2, wrong, so="")
        assert told.value._render_traceback_() == [f"Not yet. {told.value}"]


@pytest.mark.parametrize(
    ("agree", "expected"),
    [(range(12), "rises"), ((), "falls"), ((0, 1, 2, 3, 4, 5), "stays"), (None, "stays")],
)
def test_a_chain_expects_from_the_labels_that_both_stages_share(tmp_path, agree, expected):
    """Twelve pairs with labels of both stages, in the given ones alike; held-out pairs say the opposite."""
    run = RunPaths(tmp_path, "smoke", PKU, "helpful-then-safe", 0)
    for objective in ("helpful", "safe"):
        rows = []
        for k in range(24):
            alike = (agree is not None and k in agree) if k < 12 else expected != "rises"
            sides = ["x", "y"] if objective == "helpful" or alike else ["y", "x"]
            prompt = f"{k}{objective if agree is None else ''}"
            rows += [(prompt, prompt, objective, "train" if k < 12 else "eval", *sides)]
        names = ["pair_id", "prompt_id", "objective", "split", "chosen", "rejected"]
        write_table(run.data(objective), pd.DataFrame(rows, columns=names))
    word, sentence = teaching.expectation(run)
    assert word == expected and f"**{expected}**" in sentence
    count = None if agree is None else f"{len(agree) / 12:.0%} of 12 shared pairs"
    assert count is None or count in sentence
    assert teaching.expectation(run.at("helpful"))[0] is None
    assert "(`shuffled`)" in teaching.expectation(run.at("helpful-then-safe.shuffled"))[1]
    assert teaching.expectation(run.at("helpful-then-helpful"))[0] == ("rises")


@pytest.mark.parametrize(
    ("expected", "bounds", "words"),
    [
        ("falls", (-0.4, -0.1), "Seen: falls.*; as expected"),
        ("rises", (-0.4, -0.1), r"\*\*not\*\* as expected"),
        ("stays", (0.1, 0.4), r"\*\*not\*\* as expected"),
        ("falls", (-0.4, 0.1), "not decided"),
        ("stays", (-0.4, 0.1), "zero is not excluded"),
        (None, (-0.4, 0.1), "Nothing was expected"),
    ],
)
def test_an_expectation_is_scored(expected, bounds, words):
    assert re.search(words, teaching.expectation_met(expected, sum(bounds) / 2, *bounds))


def test_a_trial_has_files_of_its_own_and_its_earlier_stages(tmp_path):
    run = RunPaths(tmp_path / "runs", "smoke", PKU, "safe-then-helpful", 3)
    with pytest.raises(StudyError, match="missing"):
        teaching.scratch(run, "beta")
    write_json(run.preparation, {"counts": {}})
    with pytest.raises(StudyError, match=r"safe/seed-3/adapter/manifest\.json is missing"):
        teaching.scratch(run, "beta")
    for file in (run.at("safe").manifest, run.manifest, run.start / "manifest.json"):
        write_json(file, {"parameters": {"beta": 0.3}, "varied": ["epochs"]})
    write_table(run.base_scores, pd.DataFrame({"x": [1]}))
    write_table(run.data("safe"), pd.DataFrame({"x": [2]}))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    trial = teaching.scratch(run, "beta")
    write_json(trial.manifest, {"of": "the trial"})
    write_table(trial.data("safe"), pd.DataFrame({"x": [9]}))
    assert {file: file.read_bytes() for file in before} == before
    assert trial.root == run.root / "scratch" and not (set(before) & set(trial.root.rglob("*")))
    assert read_json(trial.at("safe").manifest)["varied"] == ["beta", "epochs"]
    assert trial.base_scores.is_file() and (trial.start / "manifest.json").is_file()
    again = teaching.scratch(run)
    assert not again.manifest.exists(), "what an earlier trial left is gone"
    assert read_json(again.at("safe").manifest)["varied"] == ["epochs"]
    assert pd.read_parquet(again.data("safe"))["x"].tolist() == [2]


# ---- pages ----


def test_pages_show_no_stub_and_fold_checks_and_what_was_not_run(tmp_path):
    said = nbformat.v4.new_output("stream", name="stdout", text="spoken")
    kinds = {"exercise": "left = ...", "solution": "filled = 1", "check": "checked = 1", "answer": "told = 1"}
    cells = [nbformat.v4.new_code_cell(text, metadata={"tags": [tag]}) for tag, text in kinds.items()]
    cells += [nbformat.v4.new_code_cell("trained = 1", metadata={"tags": ["solution", "by-hand"]})]
    cells[1].outputs = cells[3].outputs = [said]
    link = "See [churn](00_read_me_first.ipynb#6-·-Words)."
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# 02 · x\n\n{link}"), *cells])
    file = tmp_path / "setting" / "a" / "seed-0" / "notebooks" / "02_x.ipynb"
    file.parent.mkdir(parents=True)
    nbformat.write(made, file)
    text = (pages.render_appendix(tmp_path).parent / "setting--a--seed-0--02_x.html").read_text()
    assert "left" not in text.partition("</style>")[2] and 'href="summary--00_read_me_first.html#6' in text
    folds = re.findall(r"<summary>(.*?)</summary>(.*?)</details>", text, re.DOTALL)
    trains = "Show the solution (trains, so a study leaves it out)"
    named = ["Show the solution", "Show the check", "Show the answer", trains]
    assert [name for name, _ in folds] == named and ["spoken" in inside for _, inside in folds][::2] == [
        True
    ] * 2


def test_links_between_notebooks_lead_somewhere():
    """To the words in 00, whose section has that number and name."""
    texts = {file.name: file.read_text() for file in SOURCES.values()}
    found = [link for text in texts.values() for link in re.findall(r"\]\((\d\d_\w+\.ipynb)#([^)]*)\)", text)]
    assert len(found) >= 9
    for file, anchor in found:
        assert f'"## {anchor.replace("-", " ")}\\n"' in texts[file], anchor


def test_the_prediction_of_the_summary_is_looked_at_again(lessons):
    """07 as a study leaves it, then the two cells that wait for a person."""
    (asked, looked) = (c.source for c in cells_of(SOURCES["07"]) if c.id in ("t07-p-p", "t07-q-p"))
    asked = asked.replace("...", '"several"')
    names = lessons.run("07", asked, looked.replace("charts.say(", "shown = (").strip())
    assert "**several**" in names["shown"] and "Seen: **" in names["shown"]


def test_a_copy_in_which_somebody_worked_is_kept(root, tmp_path):
    (tmp_path / "notebooks").mkdir()
    source = tmp_path / "notebooks" / "00_read_me_first.ipynb"
    source.write_text((root / "notebooks" / source.name).read_text())
    mine = teaching.copies(tmp_path) / "student" / source.name
    fresh = mine.read_text()
    teaching.copies(tmp_path)
    assert [file.name for file in mine.parent.iterdir()] == [source.name], "nothing was changed, nothing kept"
    for word in ("first", "second"):
        mine.write_text(f"my {word} work")
        teaching.copies(tmp_path)
    assert mine.read_text() == fresh
    kept = [mine.with_suffix(f".before-{number}.ipynb").read_text() for number in (1, 2)]
    assert kept == ["my first work", "my second work"]
