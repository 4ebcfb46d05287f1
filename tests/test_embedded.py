import json
import random
from collections import Counter

import compose
import pytest
from conftest import ROOT

from seqdpo_utils.layouts import load_rows
from seqdpo_utils.pairs import encode_table, label_agreement, pairs_of

OBJECTIVES = {
    "hh_rlhf": ("helpful", "harmless"),
    "helpsteer2": ("helpfulness", "verbosity"),
    "pku_saferlhf": ("helpful", "safe"),
    "ultrafeedback": ("instruction_following", "truthfulness"),
}


def tables(layout: str) -> dict:
    found = {}
    for name in OBJECTIVES[layout]:
        rows = load_rows(ROOT, "embedded", layout=layout, objective=name)
        found[name] = pairs_of(rows, layout=layout, objective=name)[0]
    return found


def test_the_generator_reproduces_the_shipped_rows():
    for name, rows in compose.all_rows().items():
        shipped = (compose.EMBEDDED / "rows" / name).read_text(encoding="utf-8")
        composed = "".join(json.dumps(row) + "\n" for row in rows)
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


def test_chance_rules_the_noise():
    one, same, other = (list(compose.hh_rows(random.Random(seed), "helpful")) for seed in (1, 1, 2))
    assert one == same != other
    swapped = sum(a["chosen"] == b["rejected"] for a, b in zip(one, other, strict=True)) / len(one)
    assert 0 < swapped < 4 * compose.LABEL_NOISE
