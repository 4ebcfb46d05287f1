import gzip
import json
import os
from collections import Counter
from pathlib import Path

import datasets
import pandas as pd
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
    with pytest.raises(StudyError, match="are to lie in a folder helpful-base: give the folder above it"):
        sources.load_rows(tmp_path, "rows.jsonl", layout="hh_rlhf", objective="helpful")


def test_nowhere_broken_and_empty_sources_explain_themselves(tmp_path):
    place = {"layout": "pku_saferlhf", "objective": "safe"}
    for name in ("notes", "broken", "zero", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "broken" / "rows.jsonl").write_text('{"prompt": "a", "respo')
    (tmp_path / "zero" / "rows.jsonl").write_text("")
    for source, message in {
        "no-such/data-set": "hub id that this machine can reach",
        "notes.md": "not a .json, .jsonl or .parquet",
        "broken": "could not be read: JSON parse error",
        "zero": "hold no rows",
        "empty": "any data files",
    }.items():
        with pytest.raises(StudyError, match=message):
            sources.load_rows(tmp_path, source, **place)


ROW = {"prompt": "Q", "response_0": "a", "response_1": "b", "safer_response_id": 0, "better_response_id": 1}


def clone(folder: Path, files: dict[str, int]) -> Path:
    """A folder as `git clone` of a hub data set leaves it: a card with sizes, and `files` with so many numbered rows each."""
    for name, count in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        table = pd.DataFrame([ROW | {"prompt": f"{name} {i}"} for i in range(count)])
        table.to_parquet(file) if name.endswith(".parquet") else table.to_json(file, orient="records", lines=True)
    size = {"splits": [{"name": "train", "num_examples": 99999, "num_bytes": 1}], "download_size": 1, "dataset_size": 1}
    (folder / "README.md").write_text("---\n" + json.dumps({"license": "mit", "dataset_info": size}) + "\n---\n# card\n")
    return folder


@pytest.mark.parametrize(
    ("files", "subset", "rows"),
    [
        ({"train.jsonl.gz": 3, "validation.jsonl.gz": 2, "preference/preference.jsonl.gz": 7, "disagreements/disagreements.jsonl.gz": 4}, None, 5),
        ({"train.jsonl.gz": 3, "validation.jsonl.gz": 2, "disagreements/disagreements.jsonl.gz": 4}, "disagreements", 4),
        ({"data/Alpaca-7B/train.jsonl": 3, "data/Alpaca-7B/test.jsonl": 1, "data/Alpaca2-7B/train.jsonl": 2, "data/Alpaca2-7B/test.jsonl": 1}, None, 7),
        ({"data/train-00000-of-00001.parquet": 3, "data/test-00000-of-00001.parquet": 2}, None, 5),
        ({"evol_instruct.jsonl": 2, "false_qa.jsonl": 1, "flan.jsonl": 3, "sharegpt.jsonl": 1}, None, 7),
        ({"rows.jsonl": 3}, None, 3),
        ({"only.json.gz": 3}, None, 3),
    ],
    ids=["helpsteer2", "helpsteer2-disagreements", "pku", "parquet", "ultrafeedback", "one-file", "json-gz"],
)
def test_a_clone_of_a_hub_data_set_reads_with_all_its_splits(tmp_path, files, subset, rows):
    clone(tmp_path / "copy", files)
    found = sources.load_rows(tmp_path, "copy", layout="pku_saferlhf", objective="safe", subset=subset)
    assert len(found) == rows == len({row["prompt"] for row in found})
    assert set(found[0]) == set(ROW)


def test_a_clone_of_hh_reads_by_objective_and_a_file_by_itself(tmp_path):
    clone(
        tmp_path / "hh-rlhf", {f"{part}/{split}.jsonl.gz": 2 for part in ("helpful-base", "harmless-base", "red-team-attempts") for split in ("train", "test")}
    )
    for objective, part in sources.HH_FOLDERS.items():
        rows = sources.load_rows(tmp_path, "hh-rlhf", layout="hh_rlhf", objective=objective)
        assert len(rows) == 4 and all(row["prompt"].startswith(part) for row in rows)
        one = sources.load_rows(tmp_path, f"hh-rlhf/{part}/test.jsonl.gz", layout="hh_rlhf", objective=objective)
        assert len(one) == 2
    with pytest.raises(StudyError, match="any data files"):
        sources.load_rows(tmp_path, "hh-rlhf", layout="hh_rlhf", objective="helpful", subset="elsewhere")


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated to access it.", "set HF_TOKEN"),
        ("Revision 'abc' doesn't exist for dataset 'a/b' on the Hub.", "Give `revision` a commit"),
        ("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed.", "a hub id that this machine can reach"),
    ],
)
def test_what_the_hub_refuses_comes_with_its_remedy(tmp_path, monkeypatch, error, remedy):
    def refuse(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError(error)

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(StudyError, match=remedy) as caught:
        sources.load_rows(tmp_path, "a/b", layout="pku_saferlhf", objective="safe")
    assert error.rstrip(".") in str(caught.value) and "\n" not in str(caught.value)


def talk(answer, *, question="Q?", system=None) -> list[dict]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def binarized(chosen, rejected, scores=(4.0, 2.0)) -> dict:
    return {"chosen": chosen, "rejected": rejected, "score_chosen": scores[0], "score_rejected": scores[1]}


def test_binarized_ultrafeedback_keeps_the_talk_and_the_scores():
    pairs, dropped = sources.ultrafeedback_binarized_pairs([binarized(talk("yes", system="Be brief."), talk("no", system="Be brief."))], "overall")
    assert [turn["role"] for turn in pairs[0]["prompt"]] == ["system", "user"] and not dropped
    assert (pairs[0]["chosen"], pairs[0]["chosen_rating"], pairs[0]["rejected_rating"]) == ("yes", 4.0, 2.0)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (binarized(talk("a"), talk("b"), (2.0, 2.0)), "tie on the objective"),
        (binarized(talk("a"), talk("b"), (1.0, 2.0)), "scores contradict the choice"),
        (binarized(talk("a"), talk("b"), (1.0, None)), "rating is missing"),
        (binarized(talk("a"), talk("b", question="R?")), "messages differ before the last turn"),
        (binarized(talk("a")[:1], talk("b")), "messages do not end with a user's turn and its answer"),
        (binarized(None, talk("b")), "messages do not end with a user's turn and its answer"),
        (binarized(talk("a"), talk(None)), "empty prompt or response"),
    ],
)
def test_binarized_ultrafeedback_drops_and_counts(row, reason):
    assert sources.ultrafeedback_binarized_pairs([row], "overall") == ([], Counter({reason: 1}))


@pytest.mark.parametrize("value", [None, "N/A", "", "nan", float("nan"), float("inf"), [], [None, "N/A"]])
def test_what_is_no_number_is_no_rating(value):
    rows = [{"prompt": "Q", "response": "a", "helpfulness": value}, {"prompt": "Q", "response": "b", "helpfulness": 3}]
    assert sources.helpsteer2_pairs(rows, "helpfulness") == ([], Counter({"rating is missing": 1}))


def test_missing_texts_are_dropped_and_counted():
    empty = Counter({"empty prompt or response": 1})
    assert sources.pku_pairs([ROW | {"prompt": None}], "safe")[1] == empty
    assert sources.pku_pairs([ROW | {"response_1": None}], "safe")[1] == empty
    assert sources.ultrafeedback_pairs([feedback("1", "5") | {"instruction": None}], "truthfulness")[1] == empty
    assert sources.ultrafeedback_pairs([{"instruction": "Do", "completions": None}], "truthfulness")[1] == Counter({"fewer than two usable ratings": 1})
    bare = {"instruction": "Do", "completions": [{"response": "r", "annotations": None}] * 4}
    assert sources.ultrafeedback_pairs([bare], "truthfulness")[1] == Counter({"fewer than two usable ratings": 1})


@pytest.mark.parametrize("text", ["naïve café — 漢字 🙂", "tab\tand\u00a0space", "é composed", "עברית", "a\u2028b"])
def test_unicode_survives_reading_and_conversion(tmp_path, text):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW | {"response_0": text}) + "\n")
    rows = sources.load_rows(tmp_path, "rows.jsonl", layout="pku_saferlhf", objective="safe")
    assert sources.pku_pairs(rows, "safe")[0][0]["chosen"] == text


FULL_ROW = {
    "source": "evol_instruct", "instruction": "Say where rain comes from.", "models": ["a", "b", "c", "d"],
    "completions": [
        {
            "annotations": {
                aspect: {"Rating": rating, "Rationale": "because"} | ({"Type": ["1"], "Rationale For Rating": "so"} if aspect in ("helpfulness", "truthfulness") else {})
                for aspect in ("instruction_following", "honesty", "truthfulness", "helpfulness")
            },
            "critique": "fine", "custom_system_prompt": "You are an assistant.", "fine-grained_score": 4.0, "model": name, "overall_score": 8.0,
            "principle": "honesty", "response": f"From clouds, says {name}.",
        }
        for name, rating in zip("abcd", ("3", "N/A", "5", "1"), strict=True)
    ],
    "correct_answers": ["None"], "incorrect_answers": ["None"],
}  # fmt: skip
"""Every column that the data card of openbmb/UltraFeedback documents."""


@pytest.mark.parametrize("objective", ["instruction_following", "honesty", "truthfulness", "helpfulness"])
def test_the_documented_ultrafeedback_schema_loads_from_several_files(tmp_path, objective):
    for name in ("evol_instruct", "flan", "sharegpt"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(FULL_ROW | {"instruction": name}) + "\n")
    rows = sources.load_rows(tmp_path.parent, tmp_path.name, layout="ultrafeedback", objective=objective)
    pairs, dropped = sources.ultrafeedback_pairs(rows, objective)
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
        ("ultrafeedback_binarized", "ultrafeedback/binarized.jsonl.gz", "overall", 0.8),
    ],
)
def test_real_rows_become_pairs_and_every_row_is_accounted_for(layout, file, objective, least):
    rows = sources.load_rows(REAL, file, layout=layout, objective=objective)
    with gzip.open(REAL / file) as lines:
        assert len(rows) == sum(1 for _ in lines)
    pairs, dropped = sources.CONVERTERS[layout](rows, objective)
    groups = len(rows) // 2 if layout == "helpsteer2" else len(rows)
    assert len(pairs) + sum(dropped.values()) == groups
    assert len(pairs) / groups >= least
    assert all(pair["prompt"][-1]["role"] == "user" and pair["chosen"] != pair["rejected"] for pair in pairs)


@needs_real_rows
@pytest.mark.parametrize(
    ("name", "layout", "objectives"),
    [
        ("hh-rlhf", "hh_rlhf", ("helpful", "harmless")),
        ("helpsteer2", "helpsteer2", ("helpfulness", "correctness", "coherence", "complexity", "verbosity")),
        ("pku-saferlhf", "pku_saferlhf", ("helpful", "safe")),
        ("ultrafeedback", "ultrafeedback_binarized", ("overall",)),
    ],
)
def test_a_folder_of_real_rows_loads_for_every_objective(name, layout, objectives):
    for objective in objectives:
        table, _ = data.pairs_of(sources.load_rows(REAL, name, layout=layout, objective=objective), layout=layout, objective=objective)
        prompts = [json.loads(prompt) for prompt in table["prompt"]]
        assert all(prompt[-1]["role"] == "user" for prompt in prompts) and table["pair_id"].is_unique
    if layout == "helpsteer2":
        assert any(len(prompt) > 1 for prompt in prompts) and not any("<extra_id_1>" in turn["content"] for prompt in prompts for turn in prompt)
