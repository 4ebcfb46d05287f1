import gzip
import json
import os
from collections import Counter
from pathlib import Path

import datasets
import pandas as pd
import pytest

from seqdpo_utils import layouts
from seqdpo_utils.errors import StudyError
from seqdpo_utils.layouts import LAYOUTS
from seqdpo_utils.pairs import pairs_of

HH, HELPSTEER2, PKU, ULTRAFEEDBACK, PREFERENCES = LAYOUTS.values()

REAL = Path(os.environ.get("SEQDPO_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
absent = f"no folder {REAL}; set SEQDPO_REAL_DATA to rows of the public data sets"
needs_real_rows = pytest.mark.skipif(not REAL.is_dir(), reason=absent)


def hh(chosen: str, rejected: str, talk: str = "\n\nHuman: Why?\n\nAssistant: ") -> dict:
    return {"chosen": talk + chosen, "rejected": talk + rejected}


def test_hh_takes_the_last_turn_and_keeps_the_talk_before_it():
    talk = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Why is the sky blue?\n\nAssistant:"
    pairs, dropped = HH.convert([hh(" Scattering.", " No idea.", talk)], "helpful")
    assert [turn["role"] for turn in pairs[0]["prompt"]] == ["user", "assistant", "user"]
    assert (pairs[0]["chosen"], pairs[0]["rejected"]) == ("Scattering.", "No idea.") and not dropped


def test_hh_keeps_letters_that_both_answers_share():
    pairs, _ = HH.convert([hh("I would.", "I would not.")], "helpful")
    assert pairs[0]["chosen"] == "I would."


DIFFER, BROKEN = "transcripts differ before the last turn", "not a transcript of alternating turns"


def said(*turns: str) -> dict:
    return {side: "".join(f"\n\n{turn}" for turn in turns) for side in ("chosen", "rejected")}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (hh("a", ""), "empty prompt or response"),
        (hh("same", "same"), "both responses are the same"),
        (said("Human: A", "Assistant: x") | {"rejected": "\n\nHuman: B\n\nAssistant: y"}, DIFFER),
        (said("Human: A", "Human: B", "Assistant: x"), BROKEN),
        (said("Human: A", "Assistant: x", "Human: B"), BROKEN),
        (said("Assistant: x"), BROKEN),
        (said("before", "Human: A", "Assistant: x"), BROKEN),
        ({"chosen": None, "rejected": None}, BROKEN),
        ({"chosen": "plain text", "rejected": None}, BROKEN),
    ],
)
def test_hh_drops_and_counts(row, reason):
    pairs, dropped = HH.convert([row], "helpful")
    assert not pairs and dropped == Counter({reason: 1})


def answers(*ratings, prompt="Q?") -> list[dict]:
    texts = [f"answer {i} {prompt}" for i in range(len(ratings))]
    return [{"prompt": prompt, "response": t, "helpfulness": r} for t, r in zip(texts, ratings, strict=True)]


def test_helpsteer2_pairs_two_rows_and_averages_lists():
    pairs, dropped = HELPSTEER2.convert(answers([1, 2, 3], [2, 2, 3]), "helpfulness")
    assert not dropped
    assert pairs[0]["chosen"].startswith("answer 1") and pairs[0]["chosen_rating"] == pytest.approx(7 / 3)


def test_of_verbosity_the_lower_rating_wins_and_of_nothing_else():
    lower = {name for layout in LAYOUTS.values() for name in layout.lower_is_better}
    assert lower == HELPSTEER2.lower_is_better == {"verbosity"}
    texts = (("long", 4), ("short", 1))
    rows = [{"prompt": "Q?", "response": text, "verbosity": v, "complexity": v} for text, v in texts]
    question = {"prompt": [{"role": "user", "content": "Q?"}]}
    short = {"chosen": "short", "rejected": "long", "chosen_rating": 1.0, "rejected_rating": 4.0}
    assert HELPSTEER2.convert(rows, "verbosity")[0] == [question | short]
    long = {"chosen": "long", "rejected": "short", "chosen_rating": 4.0, "rejected_rating": 1.0}
    assert HELPSTEER2.convert(rows, "complexity")[0] == [question | long]


def test_helpsteer2_takes_rows_by_twos_and_never_across_prompts():
    rows = answers(1, 2, 3) + answers(4, prompt="R?") + answers(3, 1, prompt="Q?")
    pairs, dropped = HELPSTEER2.convert(rows, "helpfulness")
    assert [(pair["chosen_rating"], pair["rejected_rating"]) for pair in pairs] == [(2.0, 1.0), (3.0, 1.0)]
    assert dropped == Counter({"response without a partner": 2})


def test_helpsteer2_counts_ties_gaps_and_single_rows():
    rows = answers(2, 2) + answers(3, prompt="alone") + answers(1, None, prompt="gap")
    pairs, dropped = HELPSTEER2.convert(rows, "helpfulness")
    assert not pairs
    assert dropped == Counter(
        {"tie on the objective": 1, "response without a partner": 1, "rating is missing": 1}
    )


def test_helpsteer2_turns():
    turns = layouts.extra_id_turns("One?\n<extra_id_1>Assistant\nTwo.\n<extra_id_1>User\nThree?")
    assert turns == [
        {"role": r, "content": c} for r, c in (("user", "One?"), ("assistant", "Two."), ("user", "Three?"))
    ]


def test_pku_labels_are_read_per_column():
    row = {
        "prompt": "Q",
        "response_0": "zero",
        "response_1": "one",
        "better_response_id": 1,
        "safer_response_id": 0,
    }
    assert PKU.convert([row], "helpful")[0][0]["chosen"] == "one"
    assert PKU.convert([row], "safe")[0][0]["chosen"] == "zero"
    assert PKU.convert([row | {"safer_response_id": -1}], "safe")[1] == Counter(
        {"label is neither 0 nor 1": 1}
    )


def feedback(*ratings) -> dict:
    rated = [{"truthfulness": {"Rating": rating}} for rating in ratings]
    completions = [{"response": f"r{i}", "annotations": aspects} for i, aspects in enumerate(rated)]
    return {"instruction": "Do", "completions": completions}


def test_ultrafeedback_takes_best_and_worst_of_usable_ratings():
    pair = ULTRAFEEDBACK.convert([feedback("3", "N/A", "5", "2")], "truthfulness")[0][0]
    assert (pair["chosen"], pair["chosen_rating"]) == ("r2", 5.0)
    assert (pair["rejected"], pair["rejected_rating"]) == ("r3", 2.0)


FEW, TIE = "fewer than two usable ratings", "tie on the objective"


@pytest.mark.parametrize(("ratings", "reason"), [(("N/A", "4", None), FEW), (("4", "4", "4"), TIE)])
def test_ultrafeedback_drops_and_counts(ratings, reason):
    assert ULTRAFEEDBACK.convert([feedback(*ratings)], "truthfulness") == ([], Counter({reason: 1}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_missing_column_is_named(layout):
    with pytest.raises(StudyError, match=rf"layout {layout} needs a column '\w+'; the rows have text, label"):
        LAYOUTS[layout].convert([{"text": "x", "label": 1}], [*LAYOUTS[layout].objectives, "mine"][0])


def test_one_file_cannot_be_both_objectives_of_hh(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"chosen": "a", "rejected": "b"}')
    with pytest.raises(StudyError, match="are to lie in a folder helpful-base: give the one above it"):
        layouts.load_rows(tmp_path, "rows.jsonl", layout="hh_rlhf", objective="helpful")


def test_nowhere_broken_and_empty_sources_explain_themselves(tmp_path):
    place = {"layout": "pku_saferlhf", "objective": "safe"}
    for name in ("notes", "broken", "zero", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "broken" / "rows.jsonl").write_text('{"prompt": "a", "respo')
    (tmp_path / "zero" / "rows.jsonl").write_text("")
    for source, message in {
        "no-such/data-set": "a hub id that can be reached",
        "notes.md": "not a .json, .jsonl, .csv",
        "broken": "could not be read: JSON parse error",
        "zero": "hold no rows",
        "empty": "any data files",
    }.items():
        with pytest.raises(StudyError, match=message):
            layouts.load_rows(tmp_path, source, **place)


ROW = {"prompt": "Q", "response_0": "a", "response_1": "b", "safer_response_id": 0, "better_response_id": 1}


def clone(folder: Path, files: dict[str, int]) -> Path:
    """A folder as `git clone` of a hub data set leaves it: a card with sizes, and files of numbered rows."""
    for name, count in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        table = pd.DataFrame([ROW | {"prompt": f"{name} {i}"} for i in range(count)])
        table.to_parquet(file) if name.endswith(".parquet") else table.to_json(
            file, orient="records", lines=True
        )
    size = {
        "splits": [{"name": "train", "num_examples": 99999, "num_bytes": 1}],
        "download_size": 1,
        "dataset_size": 1,
    }
    (folder / "README.md").write_text(
        "---\n" + json.dumps({"license": "mit", "dataset_info": size}) + "\n---\n# card\n"
    )
    return folder


HELPSTEER2_FILES = {"train.jsonl.gz": 3, "validation.jsonl.gz": 2, "disagreements/disagreements.jsonl.gz": 4}
PKU_FOLDERS = {"data/Alpaca-7B": (3, 1), "data/Alpaca2-7B": (2, 1)}
PKU_FILES = {
    f"{folder}/{split}.jsonl": count
    for folder, counts in PKU_FOLDERS.items()
    for split, count in zip(("train", "test"), counts, strict=True)
}


@pytest.mark.parametrize(
    ("files", "subset", "rows"),
    [
        (HELPSTEER2_FILES | {"preference/preference.jsonl.gz": 7}, None, 5),
        (HELPSTEER2_FILES, "disagreements", 4),
        (PKU_FILES, None, 7),
        ({"data/train-00000-of-00001.parquet": 3, "data/test-00000-of-00001.parquet": 2}, None, 5),
        ({"evol_instruct.jsonl": 2, "false_qa.jsonl": 1, "flan.jsonl": 3, "sharegpt.jsonl": 1}, None, 7),
        ({"rows.jsonl": 3}, None, 3),
        ({"only.json.gz": 3}, None, 3),
    ],
    ids=["helpsteer2", "helpsteer2-disagreements", "pku", "parquet", "ultrafeedback", "one-file", "json-gz"],
)
def test_a_clone_of_a_hub_data_set_reads_with_all_its_splits(tmp_path, files, subset, rows):
    clone(tmp_path / "copy", files)
    found = layouts.load_rows(tmp_path, "copy", layout="pku_saferlhf", objective="safe", subset=subset)
    assert len(found) == rows == len({row["prompt"] for row in found})
    assert set(found[0]) == set(ROW)


def test_a_clone_of_hh_reads_by_objective_and_a_file_by_itself(tmp_path):
    parts = ("helpful-base", "harmless-base", "red-team-attempts")
    clone(
        tmp_path / "hh-rlhf", {f"{part}/{split}.jsonl.gz": 2 for part in parts for split in ("train", "test")}
    )
    for objective, part in HH.folders.items():
        rows = layouts.load_rows(tmp_path, "hh-rlhf", layout="hh_rlhf", objective=objective)
        assert len(rows) == 4 and all(row["prompt"].startswith(part) for row in rows)
        one = layouts.load_rows(
            tmp_path, f"hh-rlhf/{part}/test.jsonl.gz", layout="hh_rlhf", objective=objective
        )
        assert len(one) == 2
    with pytest.raises(StudyError, match="any data files"):
        layouts.load_rows(tmp_path, "hh-rlhf", layout="hh_rlhf", objective="helpful", subset="elsewhere")


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (
            "Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated to access it.",
            "set HF_TOKEN",
        ),
        ("Revision 'abc' doesn't exist for dataset 'a/b' on the Hub.", "Give `revision` a commit"),
        ("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed.", "a hub id that can be reached"),
    ],
)
def test_what_the_hub_refuses_comes_with_its_remedy(tmp_path, monkeypatch, error, remedy):
    def refuse(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError(error)

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(StudyError, match=remedy) as caught:
        layouts.load_rows(tmp_path, "a/b", layout="pku_saferlhf", objective="safe")
    assert error.rstrip(".") in str(caught.value) and "\n" not in str(caught.value)


def talk(answer, *, question="Q?", system=None) -> list[dict]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def binarized(chosen, rejected, scores=(4.0, 2.0)) -> dict:
    return {"chosen": chosen, "rejected": rejected, "score_chosen": scores[0], "score_rejected": scores[1]}


def test_binarized_ultrafeedback_keeps_the_talk_and_the_scores():
    row = binarized(talk("yes", system="Be brief."), talk("no", system="Be brief."))
    pairs, dropped = PREFERENCES.convert([row], "overall")
    assert [turn["role"] for turn in pairs[0]["prompt"]] == ["system", "user"] and not dropped
    assert (pairs[0]["chosen"], pairs[0]["chosen_rating"], pairs[0]["rejected_rating"]) == ("yes", 4.0, 2.0)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (binarized(talk("a"), talk("b"), (2.0, 2.0)), "tie on the objective"),
        (binarized(talk("a"), talk("b"), (1.0, 2.0)), "scores contradict the choice"),
        (binarized(talk("a"), talk("b", question="R?")), "messages differ before the last turn"),
        (binarized(talk("a")[:1], talk("b")), "messages do not alternate between user and assistant"),
        (binarized(None, talk("b")), "empty prompt or response"),
        (binarized(talk("a"), talk(None)), "empty prompt or response"),
    ],
)
def test_binarized_ultrafeedback_drops_and_counts(row, reason):
    assert PREFERENCES.convert([row], "overall") == ([], Counter({reason: 1}))


@pytest.mark.parametrize("value", [None, "N/A", "", "nan", float("nan"), float("inf"), [], [None, "N/A"]])
def test_what_is_no_number_is_no_rating(value):
    rows = [{"prompt": "Q", "response": text, "helpfulness": v} for text, v in (("a", value), ("b", 3))]
    assert HELPSTEER2.convert(rows, "helpfulness") == ([], Counter({"rating is missing": 1}))


def test_missing_texts_are_dropped_and_counted():
    empty = Counter({"empty prompt or response": 1})
    assert PKU.convert([ROW | {"prompt": None}], "safe")[1] == empty
    assert PKU.convert([ROW | {"response_1": None}], "safe")[1] == empty
    assert ULTRAFEEDBACK.convert([feedback("1", "5") | {"instruction": None}], "truthfulness")[1] == empty
    for completions in (None, [{"response": "r", "annotations": None}] * 4):
        row = {"instruction": "Do", "completions": completions}
        assert ULTRAFEEDBACK.convert([row], "truthfulness")[1] == Counter({FEW: 1})


@pytest.mark.parametrize(
    "text", ["naïve café — 漢字 🙂", "tab\tand\u00a0space", "é composed", "עברית", "a\u2028b"]
)
def test_unicode_survives_reading_and_conversion(tmp_path, text):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW | {"response_0": text}) + "\n")
    rows = layouts.load_rows(tmp_path, "rows.jsonl", layout="pku_saferlhf", objective="safe")
    assert PKU.convert(rows, "safe")[0][0]["chosen"] == text


ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
TYPED = {"Type": ["1"], "Rationale For Rating": "so"}


def completion(name: str, rating: str) -> dict:
    annotations = {aspect: {"Rating": rating, "Rationale": "because"} for aspect in ASPECTS}
    for aspect in ("helpfulness", "truthfulness"):
        annotations[aspect] |= TYPED
    scores = {"fine-grained_score": 4.0, "overall_score": 8.0, "critique": "fine"}
    origin = {"model": name, "principle": "honesty", "custom_system_prompt": "You are an assistant."}
    return {"annotations": annotations, "response": f"From clouds, says {name}."} | scores | origin


FULL_ROW = {
    "source": "evol_instruct",
    "instruction": "Say where rain comes from.",
    "models": ["a", "b", "c", "d"],
    "completions": [completion(*pair) for pair in zip("abcd", ("3", "N/A", "5", "1"), strict=True)],
    "correct_answers": ["None"],
    "incorrect_answers": ["None"],
}
"""Every column that the data card of openbmb/UltraFeedback documents."""


@pytest.mark.parametrize("objective", ASPECTS)
def test_the_documented_ultrafeedback_schema_loads_from_several_files(tmp_path, objective):
    for name in ("evol_instruct", "flan", "sharegpt"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(FULL_ROW | {"instruction": name}) + "\n")
    rows = layouts.load_rows(tmp_path.parent, tmp_path.name, layout="ultrafeedback", objective=objective)
    pairs, dropped = ULTRAFEEDBACK.convert(rows, objective)
    assert [pair["chosen"] for pair in pairs] == ["From clouds, says c."] * 3 and not dropped
    assert {pair["rejected"] for pair in pairs} == {"From clouds, says d."}


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
        ("pku_saferlhf", "pku-saferlhf/safety_only.jsonl.gz", "safe", 0.9),
        ("preferences", "ultrafeedback/binarized.jsonl.gz", "overall", 0.8),
    ],
)
def test_real_rows_become_pairs_and_every_row_is_accounted_for(layout, file, objective, least):
    rows = layouts.load_rows(REAL, file, layout=layout, objective=objective)
    with gzip.open(REAL / file) as lines:
        assert len(rows) == sum(1 for _ in lines)
    pairs, dropped = LAYOUTS[layout].convert(rows, objective)
    groups = len(rows) // 2 if layout == "helpsteer2" else len(rows)
    assert len(pairs) + sum(dropped.values()) == groups
    assert len(pairs) / groups >= least
    assert all(pair["prompt"][-1]["role"] == "user" and pair["chosen"] != pair["rejected"] for pair in pairs)


@needs_real_rows
@pytest.mark.parametrize(
    ("name", "layout"),
    [("hh-rlhf", HH), ("helpsteer2", HELPSTEER2), ("pku-saferlhf", PKU), ("ultrafeedback", PREFERENCES)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_folder_of_real_rows_loads_for_every_objective(name, layout):
    for objective in layout.objectives or ("overall",):
        rows = layouts.load_rows(REAL, name, layout=layout.name, objective=objective)
        table, _ = pairs_of(rows, layout=layout.name, objective=objective)
        prompts = [json.loads(prompt) for prompt in table["prompt"]]
        assert all(prompt[-1]["role"] == "user" for prompt in prompts) and table["pair_id"].is_unique
    if layout is HELPSTEER2:
        assert any(len(prompt) > 1 for prompt in prompts)
        assert not any("<extra_id_1>" in turn["content"] for prompt in prompts for turn in prompt)
