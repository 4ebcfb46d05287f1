"""A user's own pairs: the standard preference format, one source an objective, and a hundred ways to get it
wrong."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import datasets
import nbformat
import pandas as pd
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook, new_output
from study import snakemake, stub_project

from seqdpo_utils import layouts, pairs, params, paths, power
from seqdpo_utils.batch import access, look
from seqdpo_utils.errors import StudyError
from seqdpo_utils.layouts import LAYOUTS

PREFERENCES = LAYOUTS["preferences"]
GOOD = {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}


def said(**turns: str | None) -> list[dict]:
    """Messages by role; a second user turn is `user_2`."""
    return [{"role": name.partition("_")[0], "content": text} for name, text in turns.items()]


def talks(chosen="Because.", rejected="No idea.", **before) -> dict:
    before = before or {"user": "Why?"}
    sides = {"chosen": chosen, "rejected": rejected}
    return {side: [*said(**before), *said(assistant=text)] for side, text in sides.items()}


def lines(*rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


PROMPT = said(user="Why?")
TWO = said(system="Be kind.", user="Hi", assistant="Hello", user_2="Why?")
SIDES = ("chosen", "rejected")
TALK = "\n\nHuman: Why?\n\nAssistant: "
SIGNED = {"context": PROMPT, "response1": "Because.", "response2": "No idea.", "overall_preference": -2}
SINGLE = {"prompt": "Why?", "response_0": "No idea.", "response_1": "Because.", "better_response_id": 1}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (GOOD, PROMPT),
        (GOOD | {"prompt": PROMPT}, PROMPT),
        ({side: talks()[side][1:] for side in SIDES} | {"prompt": PROMPT}, PROMPT),
        (talks(), PROMPT),
        (talks() | {"prompt": None}, PROMPT),
        (talks() | {"prompt": "Why?"}, PROMPT),
        (talks() | {"prompt": PROMPT}, PROMPT),
        (talks(system="Be kind.", user="Hi", assistant="Hello", user_2="Why?"), TWO),
        (GOOD | {"prompt": TWO}, TWO),
        ({side: TALK + GOOD[side] for side in SIDES}, PROMPT),
        (SIGNED, PROMPT),
        (SIGNED | {"response1": "No idea.", "response2": "Because.", "overall_preference": 1}, PROMPT),
        (SINGLE, PROMPT),
        (SINGLE | {"response_0": "Because.", "response_1": "No idea.", "better_response_id": 0}, PROMPT),
    ],
)  # fmt: skip
def test_every_form_gives_the_same_pair(row, prompt):
    assert PREFERENCES.fault(row) is None
    found = {"prompt": prompt, "chosen": "Because.", "rejected": "No idea."}
    assert PREFERENCES.convert([row], "any") == ([found], Counter())


def test_plain_texts_are_never_divided_where_their_letters_agree():
    row = {"chosen": "Why? Because of rain.", "rejected": "Why? Because of snow."}
    assert "where the prompt ends cannot be told" in PREFERENCES.fault(row)
    assert "Give a column 'prompt', or messages" in PREFERENCES.fault(row)
    ((pair,), _) = PREFERENCES.convert([row | {"prompt": "Say why."}], "any")
    assert (pair["chosen"], pair["rejected"]) == (row["chosen"], row["rejected"])


def test_scores_are_kept_as_ratings_and_may_be_missing():
    rated = GOOD | {"score_chosen": 4, "score_rejected": 1.5}
    ((pair, bare, half), dropped) = PREFERENCES.convert([rated, GOOD, rated | {"score_chosen": None}], "any")
    assert (pair["chosen_rating"], pair["rejected_rating"]) == (4.0, 1.5) and not dropped
    assert bare == half == {"prompt": PROMPT, "chosen": "Because.", "rejected": "No idea."}


EMPTY, SAME = "empty prompt or response", "both responses are the same"
TURNS, APART = "messages do not alternate between user and assistant", "messages differ before the last turn"
TIE, AGAINST = "tie on the objective", "scores contradict the choice"
UNDIVIDED = "not a transcript of alternating turns"
NO_LABEL = "rating is missing"
ALONE = said(user="Why?"), said(assistant="Because.")

DROPPED = {
    "null prompt": (GOOD | {"prompt": None}, UNDIVIDED),
    "empty prompt": (GOOD | {"prompt": ""}, EMPTY),
    "blank prompt": (GOOD | {"prompt": " \n\t"}, EMPTY),
    "empty list as prompt": (GOOD | {"prompt": []}, UNDIVIDED),
    "null chosen": (GOOD | {"chosen": None}, EMPTY),
    "null rejected": (GOOD | {"rejected": None}, EMPTY),
    "both null": (GOOD | {"chosen": None, "rejected": None}, EMPTY),
    "empty chosen": (GOOD | {"chosen": ""}, EMPTY),
    "empty rejected": (GOOD | {"rejected": ""}, EMPTY),
    "blank rejected": (GOOD | {"rejected": "\u00a0 "}, EMPTY),
    "same texts": (GOOD | {"rejected": "Because."}, SAME),
    "same but for space": (GOOD | {"rejected": " Because.\n"}, SAME),
    "empty lists": (GOOD | {"prompt": None, "chosen": [], "rejected": []}, EMPTY),
    "answer only": ({"chosen": ALONE[1], "rejected": ALONE[1]}, TURNS),
    "question only": ({"chosen": ALONE[0], "rejected": ALONE[0]}, TURNS),
    "no answer at the end": (talks(user="Hi", assistant="Hello") | {"prompt": "Hm"}, TURNS),
    "two user turns": (talks(user="Hi", user_2="Why?"), TURNS),
    "two answers": (talks(user="Hi", assistant="Hello"), TURNS),
    "system only": (talks(system="Be kind."), TURNS),
    "system in the middle": (talks(user="Hi", system="Be kind."), TURNS),
    "two system turns": (talks(system="Be kind.", system_2="Now.", user="Why?"), TURNS),
    "unknown role": (talks(human="Why?"), TURNS),
    "a tool speaks": (talks(user="Why?", tool="42"), TURNS),
    "role in capitals": (talks(User="Why?"), TURNS),
    "empty role": ({"chosen": [{"role": "", "content": "a"}], "rejected": ALONE[1]}, TURNS),
    "other questions": (talks() | {"rejected": talks(user="How?")["rejected"]}, APART),
    "other length": (talks() | {"rejected": talks(user="a", assistant="b", user_2="c")["rejected"]}, APART),
    "answers to several turns": (
        {side: said(user="a", assistant=side, user_2="c", assistant_2="d") for side in SIDES},
        APART),
    "null question": (talks(user=None), EMPTY),
    "null turn before": (talks(user="Hi", assistant=None, user_2="Why?"), EMPTY),
    "null answer": (talks(chosen=None), EMPTY),
    "null other answer": (talks(rejected=None), EMPTY),
    "blank system": (talks(system=" ", user="Why?"), EMPTY),
    "same messages": (talks(rejected="Because."), SAME),
    "tie": (GOOD | {"score_chosen": 2, "score_rejected": 2}, TIE),
    "contradiction": (GOOD | {"score_chosen": 1, "score_rejected": 2}, AGAINST),
    "transcripts apart": ({"chosen": TALK + "a", "rejected": "\n\nHuman: How?\n\nAssistant: b"}, APART),
    "half a transcript": ({"chosen": TALK + "a", "rejected": "plain"}, UNDIVIDED),
    "transcript that ends early": ({"chosen": "\n\nHuman: Why?", "rejected": TALK + "b"}, UNDIVIDED),
    "signed tie": (SIGNED | {"overall_preference": 0}, TIE),
    "signed without label": (SIGNED | {"overall_preference": None}, NO_LABEL),
    "signed, no context": (SIGNED | {"context": None}, UNDIVIDED),
    "single without label": (SINGLE | {"better_response_id": None}, NO_LABEL),
    "single, third response": (SINGLE | {"better_response_id": 2}, NO_LABEL),
    "completions of two messages": (GOOD | {"chosen": said(assistant="a", user="b")}, TURNS),
}  # fmt: skip
"""A row whose form is right and whose words give no pair, and the reason under which it is counted."""


def test_rows_that_give_no_pair_are_dropped_and_counted():
    for name, (row, reason) in DROPPED.items():
        assert PREFERENCES.fault(row) is None, name
        assert PREFERENCES.convert([row], "any") == ([], Counter({reason: 1})), name


OF_TEXT, OF_NUMBER = "expected text, or a list of messages", "expected a number or null"
NO_PROMPT, NO_COLUMN = "no column 'prompt'", "no column 'chosen'"
ODD = {"prompt": [5, True, 1.5, {"text": "a"}, [["a"]], ["a"], [None], [5], [{"role": "user"}]]}
ODD["chosen"] = [5, {"a": 1}, ["a", "b"], [[{"role": "user", "content": "a"}]], [{"content": "a"}],
                 [{"from": "human", "value": "a"}], [{"role": None, "content": "a"}],
                 said(user=5), said(user=[{"type": "text", "text": "a"}])]  # fmt: skip
ODD["rejected"] = [False, {"role": "assistant", "content": "a"}, [{"role": 1, "content": "a"}]]
ODD_SCORES = {"score_chosen": ["high", [1], {"a": 1}], "score_rejected": ["4"]}
MALFORMED = {
    f"{n} {column}.jsonl": (lines(GOOD, GOOD | {column: value}), f"row 2: column '{column}': {wanted}")
    for wanted, odd in ((OF_TEXT, ODD), (OF_NUMBER, ODD_SCORES))
    for column, values in odd.items()
    for n, value in enumerate(values)
}
BARE = {"chosen": "Why? Because.", "rejected": "Why? No."}
COMMA = b"prompt,chosen,rejected\n"
FILES = {
    "no prompt.jsonl": (lines(BARE), f"row 1: {NO_PROMPT}, and 'chosen' is plain text"),
    "no chosen.jsonl": (lines({"prompt": "a", "rejected": "b"}), f"row 1: {NO_COLUMN}"),
    "other names.jsonl": (lines({"question": "a", "good": "b", "bad": "c"}), f"{NO_COLUMN}.*good, bad"),
    "nan.jsonl": (lines(GOOD | {"rejected": float("nan")}), f"row 1: column 'rejected': {OF_TEXT}.*nan"),
    "wrapped.json": (json.dumps({"data": [GOOD, GOOD]}).encode(), NO_COLUMN),
    "numbers.jsonl": (b"5\n6\n", "line 1: expected an object .*, got 5"),
    "strings.json": (b'["a", "b"]', "line 1: expected an object .*, got 'a'"),
    "nulls.jsonl": (b"null\nnull\n", "line 1: expected an object .*, got None"),
    "a null.jsonl": (lines(GOOD) + b"\nnull\n", "line 3: expected an object .*, got None"),
    "a null in a list.json": (b'[{"prompt": "a"}, null]', "line 1: expected an object .*, got None"),
    "too deep.json": (b"[" * 10**5, "could not be read"),
    "a word.json": (b"hello", "could not be read"),
    "unbalanced.jsonl": (lines(GOOD, GOOD)[:-3], "line 2, character .*Unterminated"),
    "no comma.jsonl": (b'\n{"prompt": "a" "chosen": "b"}\n', "line 2, character 16: Expecting ',' delimiter"),
    "no comma.json": (b'[\n{"prompt": "a"\n"chosen": "b"}]', "line 3, character 1: Expecting ',' delimiter"),
    "single quotes.jsonl": (b"{'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}\n", "could not be read"),
    "a key twice.jsonl": (b'{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "d"}\n', "twice"),
    "half a character.jsonl": (b'{"prompt": "\\ud800", "chosen": "b", "rejected": "c"}\n', "surrogate"),
    "latin.jsonl": (lines(GOOD).replace(b"Why", b"\xe9h"), "could not be read"),
    "utf-16.jsonl": (lines(GOOD).decode().encode("utf-16"), "could not be read"),
    "zeros.jsonl": (b"\0" * 64, "could not be read"),
    "empty.jsonl": (b"", "no rows"),
    "blank lines.jsonl": (b"\n\n\n", "could not be read|no rows"),
    "empty list.json": (b"[]", "could not be read|no rows"),
    "empty.csv": (b"", "could not be read|no rows"),
    "header alone.csv": (COMMA, "could not be read|no rows"),
    "no rejected.csv": (b"prompt,chosen\na,b\n", "no column 'rejected'"),
    "numbers.csv": (COMMA + b"a,5,6\nb,7,8\n", f"row 1: column 'chosen': {OF_TEXT}.*got 5"),
    "too many cells.csv": (COMMA + b"a,b,c\na,b,c,d,e\n", "could not be read"),
    "semicolons.csv": (COMMA.replace(b",", b";") + b"a;b;c\n", "no column 'chosen'"),
    "open quote.csv": (COMMA + b'a,"b,c\n', "could not be read"),
    "latin.csv": (COMMA + b"\xe9,b,c\n", "could not be read"),
    "scores in words.csv": (b"prompt,chosen,rejected,score_chosen\na,b,c,high\n", OF_NUMBER),
    "cut off.jsonl.gz": (gzip.compress(lines(GOOD, GOOD | {"n": 2}))[:-9], "could not be read"),
    "scratched.jsonl.gz": (gzip.compress(lines(GOOD))[:12] + b"\xff" * 40, "could not be read"),
    "scratched.csv.gz": (gzip.compress(COMMA)[:12] + b"\xff" * 40, "could not be read"),
    "no gzip.jsonl.gz": (lines(GOOD), "could not be read"),
    "empty gzip.jsonl.gz": (gzip.compress(b""), "could not be read|no rows"),
    "no parquet.parquet": (lines(GOOD), "could not be read"),
    "cut off.parquet": (b"PAR1" + b"\0" * 40, "could not be read"),
    "a sheet.xlsx": (b"PK", "is not a .json, .jsonl, .csv"),
    "packed twice.parquet.gz": (gzip.compress(b"PAR1"), "is not a .json"),
    "notes.txt": (b"a", "is not a .json"),
    "signed, no response.jsonl": (lines({"overall_preference": 1, "context": "a"}), "no column 'response1'"),
    "two labels.jsonl": (lines(SINGLE | {"safer_response_id": 0}), NO_COLUMN),
}  # fmt: skip
"""What a file holds, and a part of the sentence that it gives."""


def answer(folder: Path, source: str) -> str:
    """What is said of a source; any other error than the study's own goes through."""
    try:
        rows = layouts.load_rows(folder, {"odd": {"source": source}}, layout="preferences", objective="odd")
    except StudyError as error:
        return str(error)
    return f"read: {rows}"


def test_malformed_files_give_one_sentence_that_names_file_row_and_column(tmp_path):
    written, wrong = MALFORMED | FILES, []
    assert len(DROPPED) + len(written) >= 100
    for name, (content, sentence) in written.items():
        (tmp_path / name).write_bytes(content)
        told = answer(tmp_path, name)
        wrong += [] if re.search(sentence, told) and name in told and "\n" not in told else [(name, told)]
    assert wrong == []


def test_folders_and_splits_are_asked_for_by_name(tmp_path):
    def load(**place):
        sources = {"a": {"source": "rows"} | place}
        return layouts.load_rows(tmp_path, sources, layout="preferences", objective="a")

    (tmp_path / "rows" / "inner").mkdir(parents=True)
    with pytest.raises(StudyError, match="any data files"):
        load()
    for name, count in (("train", 3), ("test", 2), ("inner/train", 1)):
        (tmp_path / "rows" / f"{name}.jsonl").write_bytes(lines(*[GOOD | {"n": n} for n in range(count)]))
    assert (len(load()), len(load(split="test")), len(load(split="train[:1]"))) == (6, 2, 1)
    assert len(load(subset="inner")) == 1
    with pytest.raises(StudyError, match="could not be read: Unknown split"):
        load(split="validation")
    (tmp_path / "more").mkdir()  # no file before the odd one, whose column would set the type of all others
    for name, odd in (("train", 5), ("test", "a")):
        (tmp_path / "more" / f"{name}.jsonl").write_bytes(lines(GOOD, GOOD | {"chosen": odd}))
    with pytest.raises(StudyError, match=r"'more'.*row 2 of split 'train': column 'chosen'"):
        load(source="more")


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.json.gz", "a.csv.gz"]
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    rows = [
        GOOD | {"chosen": text}
        for text in ("None", "NA", "null, she said", 'a "word"', "zwei\nZeilen", "é 漢")
    ]
    table, file = (
        pd.DataFrame([*rows, GOOD | {"rejected": None}]),
        tmp_path / name,
    )  # pandas packs by the name
    if ".csv" in name:
        table.to_csv(file, index=False)
    elif ".parquet" in name:
        table.to_parquet(file)
    else:
        table.to_json(file, orient="records", lines=".jsonl" in name)
    found = layouts.load_rows(tmp_path, {"a": {"source": name}}, layout="preferences", objective="a")
    assert found == [*rows, GOOD | {"rejected": None}]


SETTING = {"layout": "preferences", "relationship": "other prompts"}


def resolved(root: Path, folder: Path, objectives, overrides=None, **more) -> params.Parameters:
    """A setting `mine` in a project that has nothing else of its own."""
    (folder / "params" / "settings").mkdir(parents=True, exist_ok=True)
    for name in ("defaults.yaml", "variants.yaml", "scales"):
        if not (folder / "params" / name).exists():
            (folder / "params" / name).symlink_to(root / "params" / name)
    content = SETTING | {"objectives": objectives} | more
    (folder / "params" / "settings" / "mine.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return params.resolve(folder, scale="smoke", setting="mine", overrides=overrides)


HUB = {"source": "some/hub-id", "revision": "abc", "split": "train[:9]"}


def test_a_setting_names_a_source_for_each_objective(root, tmp_path):
    flat = resolved(root, tmp_path, {"concise": "../mine/concise.jsonl", "polite": HUB})
    nothing = {"subset": None, "revision": None, "split": None}
    assert flat.objectives == ["concise", "polite"] and flat.revision is flat.subset is None
    assert flat.source == {
        "concise": nothing | {"source": "../mine/concise.jsonl"}, "polite": nothing | HUB}  # fmt: skip
    for rows in ("hub", "embedded", "../copies"):
        assert (
            resolved(root, tmp_path, {"a": "x.csv", "b": HUB}, {"rows": rows}).source["a"]["source"]
            == "x.csv"
        )
    turned = resolved(root, tmp_path, {"a": "x", "b": "y"}, {"objectives": ["b", "a"]})
    assert turned.objectives == ["b", "a"] and list(turned.source) == ["a", "b"]
    again = params.from_notebook(tmp_path, {"scale": "smoke", "setting": "mine", "source": turned.source})
    assert again.source == turned.source


@pytest.mark.parametrize(
    ("objectives", "more", "message"),
    [
        ({"a": "x"}, {}, "objectives: List should have at least 2"),
        ({"a": "x", "B": "y"}, {}, r"mine.yaml: objectives.B.\[key\]: String should match"),
        ({"a": "x", "b": None}, {}, "mine.yaml: objectives.b.source: .*got None"),
        ({"a": "x", "b": ""}, {}, "mine.yaml: objectives.b.source: "),
        ({"a": "x", "b": {"sourse": "y"}}, {}, "objectives.b.sourse: Extra inputs"),
        ({"a": "x", "b": {"source": "y", "subset": "../z"}}, {}, "objectives.b.subset: String should match"),
        ({"a": "x", "b": HUB | {"revision": 5}}, {}, "objectives.b.revision: .*valid string, got 5"),
        ({"a": "x", "b": ["y", "z"]}, {}, "objectives.b.source: "),
        ({"a": "x", "data": "y"}, {}, "objectives: 'data' is a name of the study's own"),
        ({"a": "x", "b": "y"}, {"source": "z"}, "mine.yaml: source: leave it out"),
        ({"a": "x", "b": "y"}, {"revision": "z"}, "mine.yaml: revision: leave it out"),
        ({"a": "x", "b": "y"}, {"layout": "other"}, "layout: 'other' is not one of hh_rlhf"),
        ({"a": "x", "b": "y"}, {"layout": "hh_rlhf"}, "unknown objective 'a' for layout hh_rlhf"),
        (["a", "b"], {"source": "z", "subset": None, "revision": None}, "'a' has no source of its own"),
    ],
)  # fmt: skip
def test_a_setting_that_is_wrong_says_where(root, tmp_path, objectives, more, message):
    with pytest.raises(StudyError, match=message):
        resolved(root, tmp_path, objectives, **more)


def test_the_command_line_can_neither_merge_nor_invent_sources(root, tmp_path):
    for overrides in ({"source": "z.jsonl"}, {"objectives": ["a", "c"]}):
        with pytest.raises(StudyError, match="has no source of its own"):
            resolved(root, tmp_path, {"a": "x", "b": "y"}, overrides)


def test_a_source_that_is_not_there_is_named_before_anything_runs(root, tmp_path):
    (tmp_path / "here.jsonl").write_bytes(lines(GOOD))
    flat = resolved(root, tmp_path, {"a": "here.jsonl", "b": "../nowhere.jsonl"})
    assert "source '../nowhere.jsonl' of mine is not there" in access.source_fault(tmp_path, flat)
    assert access.source_fault(tmp_path, resolved(root, tmp_path, dict.fromkeys("ab", "here.jsonl"))) is None


def test_the_example_is_a_setting(root, tmp_path):
    text = (root / "params" / "settings" / "mine.yaml.example").read_text()
    example = yaml.safe_load(text)
    assert resolved(root, tmp_path, **example).objectives == ["concise", "polite"]
    told = yaml.safe_load(text.replace("  # honest", "  honest"))
    assert resolved(root, tmp_path, **told).source["honest"]["split"] == "train[:2000]"
    assert "mine" not in params.settings_of(root)


SIZES = {"train_pairs": 8, "eval_pairs": 4, "probe_pairs": 2, "fresh_pairs": 2}


def test_own_pairs_are_divided_fitted_and_counted_as_all_others_are(root, tmp_path, tokenizer):
    """Shared prompts are in one split of both objectives; every row ends in one line of the counts."""
    plain = [
        GOOD | {"prompt": f"Question {n}?", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(24)
    ]
    turned = [talks(f"no {n}", f"yes {n}", user=f"Question {n}?") for n in range(18)]
    alike = [talks(f"yes {n}", f"no {n}", user=f"Question {n}?") for n in range(18, 24)]
    again, tied = plain[0] | {"id": 1}, plain[1] | {"score_chosen": 2, "score_rejected": 2}
    huge = GOOD | {"prompt": "huge", "chosen": "word " * 200_000}
    odd = GOOD | {"prompt": "odd \0 \u2028 \U0001f642 \u0301", "rejected": None}
    (tmp_path / "a.jsonl").write_bytes(lines(*plain, again, tied, huge, odd))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps([*turned, *alike]).encode()))
    flat = resolved(root, tmp_path, {"a": "a.jsonl", "b": "b.json.gz"}, SIZES)
    tables, counts = pairs.prepare(flat, tokenizer, root=tmp_path)
    told = counts.set_index(["objective", "what"])["rows"]
    assert told["a", "dropped: the same pair again"] == told["a", "dropped: tie on the objective"] == 1
    assert told["a", "dropped: completion longer than max_length"] == 1
    assert told["a", f"dropped: {EMPTY}"] == 1
    for name, read in (("a", 28), ("b", 24)):
        ends = told[name][told[name].index.str.startswith(("dropped", "pairs for", "left over"))]
        assert told[name, "rows read"] == read == ends.sum()
    assert not pairs.leaked_prompts(tables)
    (row,) = pairs.label_agreement(
        {name: table.drop(columns="split") for name, table in tables.items()}
    ).itertuples()
    kept = {n for n in range(24) if f"yes {n}" in set(tables["a"]["chosen"])}
    assert row.shared == row.pairs == 16 == len(kept)
    assert row.agree == pytest.approx(len(kept & set(range(18, 24))) / 16)


def spoken(text: str, *tags: str) -> nbformat.NotebookNode:
    output = new_output("display_data", {"text/markdown": text, "text/plain": "-"})
    return new_code_cell(outputs=[output], metadata={"tags": list(tags)})


def test_look_says_what_notebook_01_saw_and_what_the_pairs_that_there_are_decide(root, tmp_path):
    flat = resolved(root, tmp_path, {"a": "a.jsonl", "b": "b.jsonl"}, {"train_pairs": 100, "eval_pairs": 100})
    run = paths.RunPaths(tmp_path / "runs", "smoke", "mine")
    page = new_notebook(cells=[spoken("* **a**: 9 rows read.", "look"), spoken("* not this")])
    run.page("01_data_preparation").parent.mkdir(parents=True)
    nbformat.write(page, run.page("01_data_preparation"))
    for name, train, held_out in (("a", 7, ["p", "q", "q", "r"]), ("b", 6, ["p", "q", "r", "s"])):
        splits = [*["train"] * train, *["eval"] * len(held_out), "probe"]
        prompts = [*["t"] * train, *held_out, "u"]
        paths.write_table(run.data(name), pd.DataFrame({"split": splits, "prompt_id": prompts}))
    said = look.text(tmp_path, flat, {"scale": "smoke", "chains": {"mine": ["a-then-b"]}, "seeds": [0, 1]})
    joined = " ".join(said.split())
    assert "* a: 9 rows read." in joined and "not this" not in joined
    assert "6 training pairs, 3 held-out prompts, 2 seed(s)" in joined
    for line in power.decidable_in_words(power.shipped()[0], prompts=3, seeds=2):
        assert " ".join(line.split()) in joined
    assert max(map(len, said.splitlines())) <= 100 and "runs/smoke/mine/notebooks/01" in joined


def test_look_runs_notebook_01_and_nothing_else(tmp_path):
    project, chains = stub_project(tmp_path / "project"), {"safety_signal": ["helpful-then-safe"]}
    said = snakemake(project, "look", "-n", "--quiet", "rules", chains=chains)
    counts = dict(re.findall(r"^(\w+)\s+(\d+)$", said.stdout + said.stderr, flags=re.MULTILINE))
    assert counts == {"data_preparation": "1", "look": "1", "total": "2"}, said.stderr[-3000:]


def test_a_malformed_source_stops_before_anything_is_written(root, tmp_path, tokenizer):
    (tmp_path / "good.jsonl").write_bytes(lines(*[GOOD | {"prompt": f"{n}?"} for n in range(99)]))
    (tmp_path / "odd.jsonl").write_bytes(lines(GOOD, GOOD | {"score_chosen": "high"}))
    flat = resolved(root, tmp_path, {"good": "good.jsonl", "odd": "odd.jsonl"}, SIZES)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StudyError, match=r"'odd.jsonl' .* row 2: column 'score_chosen': expected a number"):
        pairs.prepare(flat, tokenizer, root=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
