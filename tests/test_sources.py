import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from seqdpo_utils import data, sources
from seqdpo_utils.paths import StudyError

REAL = Path(os.environ.get("SEQDPO_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
needs_real_rows = pytest.mark.skipif(not REAL.is_dir(), reason=f"no folder {REAL}; set SEQDPO_REAL_DATA to rows of the public data sets")


def hh(chosen: str, rejected: str, talk: str = "\n\nHuman: Why?\n\nAssistant: ") -> dict:
    return {"chosen": talk + chosen, "rejected": talk + rejected}


def test_hh_takes_the_last_turn_and_keeps_the_talk_before_it():
    talk = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Why is the sky blue?\n\nAssistant:"
    pairs, dropped = sources.hh_pairs([hh(" Scattering.", " No idea.", talk)], "helpful")
    assert [turn["role"] for turn in pairs[0]["prompt"]] == ["user", "assistant", "user"]
    assert (pairs[0]["chosen"], pairs[0]["rejected"]) == ("Scattering.", "No idea.") and not dropped


def test_hh_keeps_letters_that_both_answers_share():
    pairs, _ = sources.hh_pairs([hh("I would.", "I would not.")], "helpful")
    assert pairs[0]["chosen"] == "I would."


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (hh("a", ""), "empty prompt or response"),
        (hh("same", "same"), "both responses are the same"),
        ({"chosen": "\n\nHuman: A\n\nAssistant: x", "rejected": "\n\nHuman: B\n\nAssistant: y"}, "transcripts differ before the last turn"),
        ({"chosen": "\n\nHuman: A\n\nHuman: B\n\nAssistant: x", "rejected": "\n\nHuman: A\n\nAssistant: y"}, "not a transcript of alternating turns"),
        ({"chosen": "plain text", "rejected": None}, "not a transcript of alternating turns"),
    ],
)
def test_hh_drops_and_counts(row, reason):
    pairs, dropped = sources.hh_pairs([row], "helpful")
    assert not pairs and dropped == Counter({reason: 1})


def answers(*ratings, prompt="Q?", **more) -> list[dict]:
    return [{"prompt": prompt, "response": f"answer {i} {prompt}", "helpfulness": r, **more} for i, r in enumerate(ratings)]


def test_helpsteer2_pairs_two_rows_and_averages_lists():
    pairs, dropped = sources.helpsteer2_pairs(answers([1, 2, 3], [2, 2, 3]), "helpfulness")
    assert pairs[0]["chosen"].startswith("answer 1") and pairs[0]["chosen_rating"] == pytest.approx(7 / 3) and not dropped


def test_helpsteer2_prefers_less_verbosity():
    rows = [{"prompt": "Q?", "response": text, "verbosity": v} for text, v in (("long", 4), ("short", 1))]
    assert sources.helpsteer2_pairs(rows, "verbosity")[0][0]["chosen"] == "short"


def test_helpsteer2_counts_ties_gaps_and_single_rows():
    rows = answers(2, 2) + answers(3, prompt="alone") + answers(1, None, prompt="gap")
    pairs, dropped = sources.helpsteer2_pairs(rows, "helpfulness")
    assert not pairs
    assert dropped == Counter({"tie on the objective": 1, "response without a partner": 1, "rating is missing": 1})


def test_helpsteer2_turns():
    turns = sources.extra_id_turns("One?\n<extra_id_1>Assistant\nTwo.\n<extra_id_1>User\nThree?")
    assert turns == [{"role": r, "content": c} for r, c in (("user", "One?"), ("assistant", "Two."), ("user", "Three?"))]


def test_pku_labels_are_read_per_column():
    row = {"prompt": "Q", "response_0": "zero", "response_1": "one", "better_response_id": 1, "safer_response_id": 0}
    assert sources.pku_pairs([row], "helpful")[0][0]["chosen"] == "one"
    assert sources.pku_pairs([row], "safe")[0][0]["chosen"] == "zero"
    assert sources.pku_pairs([row | {"safer_response_id": -1}], "safe")[1] == Counter({"label is neither 0 nor 1": 1})


def feedback(*ratings) -> dict:
    return {"instruction": "Do", "completions": [{"response": f"r{i}", "annotations": {"truthfulness": {"Rating": r}}} for i, r in enumerate(ratings)]}


def test_ultrafeedback_takes_best_and_worst_of_usable_ratings():
    pair = sources.ultrafeedback_pairs([feedback("3", "N/A", "5", "2")], "truthfulness")[0][0]
    assert (pair["chosen"], pair["rejected"], pair["chosen_rating"], pair["rejected_rating"]) == ("r2", "r3", 5.0, 2.0)


@pytest.mark.parametrize(("ratings", "reason"), [(("N/A", "4", None), "fewer than two usable ratings"), (("4", "4", "4"), "tie on the objective")])
def test_ultrafeedback_drops_and_counts(ratings, reason):
    assert sources.ultrafeedback_pairs([feedback(*ratings)], "truthfulness") == ([], Counter({reason: 1}))


@pytest.mark.parametrize("layout", sources.CONVERTERS)
def test_a_missing_column_is_named(layout):
    objective = {"pku_saferlhf": "safe", "hh_rlhf": "helpful"}.get(layout, "helpfulness")
    with pytest.raises(StudyError, match=r"needs a column .*the rows have text"):
        sources.CONVERTERS[layout]([{"text": "x"}], objective)


def test_one_file_cannot_be_both_objectives_of_hh(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"chosen": "a", "rejected": "b"}')
    with pytest.raises(StudyError, match="each objective has a folder"):
        sources.load_rows(str(tmp_path / "rows.jsonl"), layout="hh_rlhf", objective="helpful")


def test_nowhere_broken_and_empty_sources_explain_themselves(tmp_path):
    place = {"layout": "pku_saferlhf", "objective": "safe"}
    with pytest.raises(StudyError, match="hub id that this machine can reach"):
        sources.load_rows("no-such/data-set", **place)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(StudyError, match=r"holds no \.json"):
        sources.load_rows(str(tmp_path), **place)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "respo')
    with pytest.raises(StudyError, match="could not be read"):
        sources.load_rows(str(tmp_path), **place)


@needs_real_rows
@pytest.mark.parametrize(
    ("layout", "file", "objective", "least"),
    [
        ("hh_rlhf", "hh-rlhf/helpful-base/test.jsonl.gz", "helpful", 0.98),
        ("hh_rlhf", "hh-rlhf/harmless-base/test.jsonl.gz", "harmless", 0.98),
        ("helpsteer2", "helpsteer2/disagreements.jsonl.gz", "helpfulness", 0.3),
        ("helpsteer2", "helpsteer2/disagreements.jsonl.gz", "verbosity", 0.3),
        ("pku_saferlhf", "pku-saferlhf/hub_schema.jsonl.gz", "helpful", 0.9),
        ("pku_saferlhf", "pku-saferlhf/hub_schema.jsonl.gz", "safe", 0.9),
    ],
)
def test_real_rows_become_pairs_and_every_row_is_accounted_for(layout, file, objective, least):
    rows = sources.load_rows(str(REAL / file), layout=layout, objective=objective)
    with gzip.open(REAL / file) as lines:
        assert len(rows) == sum(1 for _ in lines)
    pairs, dropped = sources.CONVERTERS[layout](rows, objective)
    groups = len(rows) // 2 if layout == "helpsteer2" else len(rows)
    assert len(pairs) + sum(dropped.values()) == groups
    assert len(pairs) / groups >= least
    assert all(pair["prompt"][-1]["role"] == "user" and pair["chosen"] != pair["rejected"] for pair in pairs)


@needs_real_rows
def test_a_folder_with_the_hub_layout_loads_by_objective():
    for objective in ("helpful", "harmless"):
        rows = sources.load_rows(str(REAL / "hh-rlhf"), layout="hh_rlhf", objective=objective)
        table, _ = data.pairs_of(rows, layout="hh_rlhf", objective=objective)
        assert json.loads(table["prompt"].iloc[0])[0]["role"] == "user"
