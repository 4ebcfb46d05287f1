"""The teaching kit: what its pages name exists, and the lessons fit their ninety minutes."""

import json
import re
import shlex

import pytest
from conftest import ROOT

from seqdpo_utils import metrics

KIT = {file.stem: file.read_text() for file in sorted((ROOT / "notebooks" / "teaching").glob("*.md"))}
LESSONS = ("lesson_1", "lesson_2")
REFERENCE = re.compile(r"\b(\d\d), “([^”]+)”")
MINUTES = re.compile(r" \((\d+) minutes[^)]*\)$")
MAKEFILE = (ROOT / "Makefile").read_text()


def headings(number: str) -> dict[str, int]:
    """Titles of a notebook's sections and exercises, without their minutes, and these minutes (0: none)."""
    (file,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "markdown"]
    lines = "\n".join("".join(cell["source"]) for cell in cells).splitlines()
    titles = [line.lstrip("#").strip() for line in lines if line.startswith("##")]
    return {MINUTES.sub("", each): int(found[1]) if (found := MINUTES.search(each)) else 0 for each in titles}


NUMBERS = [file.name[:2] for file in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))]
HEADINGS = {number: headings(number) for number in NUMBERS}


def references(text: str) -> list[tuple[str, str]]:
    """Number and title of every reference, which may run over two lines."""
    return REFERENCE.findall(re.sub(r"\s+", " ", text))


def blocks(text: str) -> list[tuple[int, int, str]]:
    """The timed sections of a lesson: first minute, last minute, text."""
    parts = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    timed = [(re.match(r"(\d+)–(\d+) · ", part), part) for part in parts]
    return [(int(found[1]), int(found[2]), part) for found, part in timed if found]


def unknown(text: str) -> list[tuple[str, str]]:
    """References to no section and no exercise."""
    return [(number, title) for number, title in references(text) if title not in HEADINGS.get(number, {})]


def test_the_kit_is_whole():
    assert set(KIT) == {*LESSONS, "handout", "discussion"}


@pytest.mark.parametrize("name", KIT)
def test_what_a_page_names_exists(name):
    text = KIT[name]
    assert unknown(text) == []
    assert {number for number in re.findall(r"\((\d\d)\)", text)} <= set(NUMBERS)
    for file in re.findall(r"`(\d\d_\w+)`", text):
        assert (ROOT / "notebooks" / f"{file}.ipynb").is_file(), file
    for file in re.findall(r"`(\w+)\.md`", text):
        assert file in KIT, file


@pytest.mark.parametrize("name", KIT)
def test_every_exercise_and_numbered_section_is_named_with_its_notebook(name):
    """So that no title escapes the test above: without its references a page has none left."""
    left = REFERENCE.sub("", re.sub(r"\s+", " ", KIT[name]))
    assert re.findall(r"Exercise \d[^,;.]*|“\d · [^”]*", left) == []


def test_a_wrong_title_or_number_would_be_found():
    assert unknown("see 05, “Exercise 1 ·\nQuartiles without any training”") == []
    assert unknown("04, “Exercise 1 · Quartiles without any training”; 99, “Exercises”") != []
    assert len(unknown("05, “Exercise 9 · Quartiles without any training”; 99, “Exercises”")) == 2


@pytest.mark.parametrize("name", KIT)
def test_commands_are_targets_of_the_makefile_with_known_words(name):
    commands = [line for line in KIT[name].splitlines() if line.startswith("make ")]
    commands += re.findall(r"`(make [^`]+)`", KIT[name])
    known = set(re.search(r"^\.PHONY:(.*)$", MAKEFILE, re.MULTILINE)[1].split())
    variables = set(re.findall(r"^(\w+) \?=", MAKEFILE, re.MULTILINE))
    for command in commands:
        _, target, *words = shlex.split(command)
        assert target in known and {word.partition("=")[0] for word in words} <= variables, command
        for kind, value in (word.split("=") for word in words):
            folder = {"DESIGN": "designs", "SETTINGS": "settings"}[kind]
            assert all((ROOT / "params" / folder / f"{each}.yaml").is_file() for each in value.split())
    assert name not in LESSONS or {"make setup", "make classroom"} <= set(commands)


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_has_ninety_minutes_and_time_for_its_exercises(name):
    timed = blocks(KIT[name])
    assert timed[0][0] == 0 and timed[-1][1] == 90
    assert [end for _, end, _ in timed[:-1]] == [start for start, _, _ in timed[1:]]
    for start, end, text in timed[:-1]:  # the last one gives homework
        needed = sum(HEADINGS[number][title] for number, title in references(text))
        assert needed <= end - start, text.splitlines()[0]
    assert "## If no machine works" in KIT[name]


@pytest.mark.parametrize("name", KIT)
def test_no_line_is_wider_than_110_columns(name):
    assert [line for line in KIT[name].splitlines() if len(line) > 110] == []


def test_the_handout_is_one_page_with_the_rule_of_the_package():
    text = KIT["handout"]
    assert len(text.splitlines()) <= 60
    assert f"δ = {metrics.DELTA}" in text
    clear = {"learned": 1, "end": 0, "over_lower": 0, "over_upper": 0}
    cases = [{"learned": 0}, {"over_lower": -1, "over_upper": -1, "end": -1}]
    cases += [{"over_lower": -1, "over_upper": -1, "end": 1}, {"over_lower": 1, "over_upper": 1}]
    cases += [{"over_lower": 1, "over_upper": -1}, {"over_upper": -1}, {"over_lower": 1}, {}]
    words = []
    for case in cases:
        signs = clear | case
        bounds = {f"{name}_low": side - 0.5 for name, side in signs.items()}
        bounds |= {f"{name}_high": side + 0.5 for name, side in signs.items()}
        words += [metrics.outcome(bounds).removeprefix("lost: ")]
    rule = re.sub(r"\s+", " ", text.partition("## The outcome rule")[2])
    places = [rule.find(word) for word in words]
    assert -1 not in places, words
    assert places == sorted(places), words
