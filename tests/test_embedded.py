import json
import random
from collections import Counter

import compose
import pytest
from conftest import ROOT

from seqdpo_utils.layouts import load_rows
from seqdpo_utils.pairs import encode_table, label_agreement, pairs_of

OBJECTIVES = compose.OBJECTIVES


def tables(layout: str) -> dict:
    found = {}
    for name in OBJECTIVES[layout]:
        rows = load_rows(ROOT, "embedded", layout=layout, objective=name)
        found[name] = pairs_of(rows, layout=layout, objective=name)[0]
    return found


def test_the_generator_reproduces_the_shipped_rows():
    for name, rows in compose.composed().items():
        shipped = (compose.EMBEDDED / "rows" / name).read_text(encoding="utf-8")
        composed = "".join(json.dumps(row) + "\n" for row, _ in rows)
        assert shipped == composed, f"{name}: run python tests/compose.py"


@pytest.mark.parametrize("layout", OBJECTIVES)
def test_each_setting_has_160_prompts_and_answers_of_a_few_sentences(layout, tokenizer):
    parts = tables(layout).values()
    assert len(set().union(*(part["prompt_id"] for part in parts))) >= 160
    encoded = [pair for part in parts for pair in encode_table(tokenizer, part)]
    lengths = [len(answer) - 1 for pair in encoded for answer in (pair.chosen, pair.rejected)]
    inside = sum(15 <= n <= 80 for n in lengths) / len(lengths)
    assert inside > 0.95, f"{inside:.1%} of the responses have 15 to 80 tokens"


def test_the_four_relations_come_from_the_construction():
    """What the data card says of the settings, measured."""
    assert label_agreement(tables("hh_rlhf"))["shared"].iloc[0] == 0
    shared = ("helpsteer2", "pku_saferlhf", "ultrafeedback")
    agree = {layout: label_agreement(tables(layout)).iloc[0] for layout in shared}
    assert all(row["shared"] > 40 for row in agree.values())
    assert (
        agree["helpsteer2"]["agree"] < 0.5 < agree["pku_saferlhf"]["agree"] < agree["ultrafeedback"]["agree"]
    )


@pytest.mark.parametrize("layout", OBJECTIVES)
def test_no_response_is_a_template(layout):
    """Texts are written by hand: no opening of four words serves more than a few of them."""
    parts = tables(layout).values()
    texts = {text for part in parts for side in ("chosen", "rejected") for text in part[side]}
    opening, times = Counter(" ".join(text.split()[:4]) for text in texts).most_common(1)[0]
    assert times <= 8, f"{times} responses begin with {opening!r}"


def test_length_alone_does_not_give_the_preferred_answer_away_where_it_should_not():
    hh = [("hh_rlhf", "helpful"), ("hh_rlhf", "harmless")]
    for layout, objective in [*hh, ("pku_saferlhf", "safe"), ("ultrafeedback", "truthfulness")]:
        pairs = tables(layout)[objective]
        longer = (pairs["chosen"].str.len() > pairs["rejected"].str.len()).mean()
        assert 0.3 < longer < 0.75, f"{layout} {objective}: the chosen answer is longer in {longer:.0%}"


def test_the_card_states_the_noise():
    card = (compose.EMBEDDED / "DATACARD.md").read_text(encoding="utf-8")
    for name in ("LABEL_NOISE", "RATING_NOISE", "MISSING_RATING"):
        assert f"`{name}`, {getattr(compose, name):.0%}" in card


@pytest.fixture(scope="module")
def judged():
    return compose.classroom()


def test_the_card_and_the_side_file_are_measured_in_the_rows(judged):
    text = (compose.EMBEDDED / "DATACARD.md").read_text(encoding="utf-8")
    assert text == compose.card(text, compose.measured(judged)), "run python tests/compose.py"
    assert compose.noise_table(judged) in text and compose.rating_table() in text
    shipped = json.loads((compose.EMBEDDED / "noise.json").read_text(encoding="utf-8"))
    assert shipped == compose.noise(judged), "run python tests/compose.py"


def test_a_wrong_label_is_one_against_the_parts_that_it_came_from(judged):
    """HH by its parts, PKU by its flags, and the classroom splits as notebook 01 makes them."""
    texts = {item["prompt"]: item for item in compose.parts("hh_helpful")}
    labels = judged[judged["objective"].eq("helpful") & judged["layout"].eq("hh_rlhf")]
    labels = labels.set_index("prompt_id")["label"]
    for pair in tables("hh_rlhf")["helpful"].itertuples():
        item = texts[json.loads(pair.prompt)[-1]["content"]]
        assert labels[pair.prompt_id] == ("right" if pair.chosen == item["better"] else "wrong")
    rows = load_rows(ROOT, "embedded", layout="pku_saferlhf", objective="safe")
    safe = judged.query("layout == 'pku_saferlhf' and objective == 'safe'")["label"].value_counts()
    flags = [(row["is_response_0_safe"], row["is_response_1_safe"], row["safer_response_id"]) for row in rows]
    assert safe["undecided"] == sum(first == second for first, second, _ in flags)
    assert safe["wrong"] == sum(first != second and second != label for first, second, label in flags)
    sizes = judged.groupby(["layout", "objective"])["split"].value_counts().unstack()
    assert (sizes[["train", "eval"]] == 32).all().all()


def test_chance_rules_the_noise():
    one, same, other = (list(compose.hh_rows(random.Random(seed), "helpful")) for seed in (1, 1, 2))
    assert one == same != other
    swapped = sum(a["chosen"] == b["rejected"] for (a, _), (b, _) in zip(one, other, strict=True)) / len(one)
    assert 0 < swapped < 4 * compose.LABEL_NOISE
