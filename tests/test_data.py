import json

import numpy as np
import pandas as pd
import pytest

from seqdpo_utils import data
from seqdpo_utils.paths import StudyError


def table(objective: str, prompts: list[str], *, copies: int = 1) -> pd.DataFrame:
    rows = [
        {"prompt": f"Prompt {p}?", "response_0": f"good {p} {c}", "response_1": f"bad {p} {c}", "safer_response_id": 0, "better_response_id": 1}
        for p in prompts for c in range(copies)
    ]  # fmt: skip
    return data.pairs_of(rows, layout="pku_saferlhf", objective=objective)[0]


def test_prompts_are_compared_after_normalisation():
    assert data.normalise("  Stra\u00dfe\u00a0 IST\nlang ") == data.normalise("strasse ist LANG")
    rows = [{"prompt": text, "response_0": "a", "response_1": "b", "safer_response_id": 0} for text in ("Why\u2026  so?", "WHY... SO?")]
    pairs, _ = data.pairs_of(rows, layout="pku_saferlhf", objective="safe")
    assert pairs["prompt_id"].nunique() == 1 and pairs["pair_id"].nunique() == 2


def test_ids_do_not_depend_on_order_or_objective():
    one, two = table("safe", list("ab")), table("safe", list("ba"))
    assert set(one["pair_id"]) == set(two["pair_id"])
    assert set(one["prompt_id"]) == set(table("helpful", list("ab"))["prompt_id"])


def test_a_repeated_pair_is_kept_once_and_counted():
    rows = [{"prompt": "Q", "response_0": "a", "response_1": "b", "safer_response_id": 0}] * 3
    pairs, counts = data.pairs_of(rows, layout="pku_saferlhf", objective="safe")
    assert len(pairs) == 1 and counts["the same pair again"] == 2


def test_splits_divide_prompts_across_objectives():
    prompts = [str(i) for i in range(30)]
    tables = {name: table(name, prompts, copies=2) for name in ("safe", "helpful")}
    split = data.assign_splits(tables, train_pairs=20, eval_pairs=10)
    assert not data.leaked_prompts(split)
    for part in split.values():
        assert part["split"].value_counts().to_dict() == {"train": 20, "eval": 10}


def test_splits_with_prompts_of_one_objective_only():
    tables = {"safe": table("safe", [str(i) for i in range(20)]), "helpful": table("helpful", [str(i) for i in range(12, 40)])}
    split = data.assign_splits(tables, train_pairs=8, eval_pairs=6)
    assert not data.leaked_prompts(split)
    assert all((part["split"] == "train").sum() == 8 for part in split.values())


def test_a_planted_leak_is_found():
    split = data.assign_splits({"safe": table("safe", [str(i) for i in range(10)])}, train_pairs=5, eval_pairs=5)
    row = split["safe"].query("split == 'train'").head(1)
    split["helpful"] = row.assign(split="eval", objective="helpful")
    assert data.leaked_prompts(split) == set(row["prompt_id"])


def test_an_empty_split_names_the_numbers():
    with pytest.raises(StudyError, match=r"train split of 'safe' is empty: 3 usable pairs for train_pairs = 4 and eval_pairs = 5"):
        data.assign_splits({"safe": table("safe", list("abc"))}, train_pairs=4, eval_pairs=5)


def test_rows_without_a_usable_pair_are_an_error():
    with pytest.raises(StudyError, match="no usable pair for objective 'safe'"):
        data.pairs_of([{"prompt": "Q", "response_0": "a", "response_1": "a", "safer_response_id": 0}], layout="pku_saferlhf", objective="safe")


WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def talked(turns: list[str], chosen: str, rejected: str, *, system: str | None = None) -> pd.DataFrame:
    """One pair as a table, its prompt a talk that begins with the user."""
    roles = [{"role": ("user", "assistant")[i % 2], "content": words} for i, words in enumerate(turns)]
    prompt = ([{"role": "system", "content": system}] if system else []) + roles
    row = {
        "prompt": json.dumps(prompt),
        "chosen": chosen,
        "rejected": rejected,
        "objective": "safe",
        "prompt_id": "whole",
        "pair_id": "whole",
        "removed_turns": 0,
    }
    return pd.DataFrame([row])


@pytest.mark.parametrize("max_length", range(24, 140, 4))
def test_a_long_prompt_loses_its_oldest_turns_by_twos_and_no_text_is_cut(tokenizer, max_length):
    turns = [" ".join(WORDS[: 3 + i]) for i in range(7)]
    whole = talked(turns, "a short answer", "a somewhat longer answer than that", system="Be brief.")
    kept, counts = data.fit(whole, tokenizer, max_length=max_length)
    sizes = {}
    for start in range(0, 7, 2):  # by hand: each suffix that begins with a user turn, the system message before it
        shorter = talked(turns[start:], "a short answer", "a somewhat longer answer than that", system="Be brief.")
        sizes[start] = data.encode_table(tokenizer, shorter)[0].longest
    fitting = [start for start, size in sizes.items() if size <= max_length]
    if not fitting:
        assert kept.empty and sum(counts.values()) == 1 and all("longer than max_length" in what for what in counts)
        return
    prompt = json.loads(kept["prompt"][0])
    assert prompt[0] == {"role": "system", "content": "Be brief."} and prompt[1]["role"] == prompt[-1]["role"] == "user"
    assert [turn["content"] for turn in prompt[1:]] == turns[fitting[0] :]
    assert kept["removed_turns"][0] == fitting[0] and kept[["chosen", "rejected"]].equals(whole[["chosen", "rejected"]])
    assert data.encode_table(tokenizer, kept)[0].longest == sizes[fitting[0]]
    assert counts == ({"kept: prompt shortened by its oldest turns": 1} if fitting[0] else {})


def test_what_cannot_fit_is_dropped_by_reason(tokenizer):
    long = " ".join(WORDS * 3)
    cases = pd.concat(
        [talked(["Why?"], long, "no"), talked(["Why?"], "no", long), talked([long], "yes", "no"), talked(["Why?"], "yes", "no")], ignore_index=True
    )
    kept, counts = data.fit(cases, tokenizer, max_length=36)
    assert counts == {"dropped: completion longer than max_length": 2, "dropped: last turn and completion longer than max_length": 1}
    assert kept["chosen"].tolist() == ["yes"]


def test_shortened_pairs_keep_the_id_of_the_whole_prompt_and_get_one_of_their_own(tokenizer):
    row = {"prompt": "Q", "response_0": "a", "response_1": "b", "safer_response_id": 0}
    whole = data.pairs_of([row], layout="pku_saferlhf", objective="safe")[0]
    same, counts = data.fit(whole, tokenizer, max_length=500)
    pd.testing.assert_frame_equal(same, whole)
    assert not counts
    talks = pd.concat([talked([first, "Well.", "Why?"], "yes", "no") for first in (" ".join(WORDS), " ".join(WORDS[::-1]))], ignore_index=True)
    kept, counts = data.fit(talks, tokenizer, max_length=len(data.encode_table(tokenizer, talked(["Why?"], "yes", "no"))[0].prompt) + 4)
    assert kept["prompt_id"].tolist() == ["whole"] and kept["pair_id"][0] != "whole"
    assert counts == {"kept: prompt shortened by its oldest turns": 2, "dropped: the same pair again, once shortened": 1}


def prompts_in(texts: dict[str, list[str]]) -> dict[str, pd.DataFrame]:
    rows = [
        {"prompt_id": f"{split}-{i}", "split": split, "prompt": json.dumps([{"role": "user", "content": text}])}
        for split, members in texts.items()
        for i, text in enumerate(members)
    ]
    return {"safe": pd.DataFrame(rows)}


def test_a_paraphrase_with_one_changed_word_is_found_and_an_unrelated_prompt_is_not():
    text = "please tell me in a few plain words how the rain comes to fall on the hills behind our town each year in the autumn and why it then stops again in spring"
    other = "what is a good way to learn the names of the stars in the northern sky without a telescope"
    twins = data.near_identical(prompts_in({"train": [other, text], "eval": [text.replace("plain", "simple"), "why is grass green"]}))
    assert twins[["eval_prompt_id", "train_prompt_id"]].to_numpy().tolist() == [["eval-0", "train-1"]]
    grams = len(text.split()) - 2
    assert twins["similarity"][0] == pytest.approx((grams - 3) / (grams + 3))


def test_similarity_is_jaccards_by_brute_force(monkeypatch):
    monkeypatch.setattr(data, "_BLOCK", 3)  # several blocks, the last one short
    rng = np.random.default_rng(0)
    texts = {split: [" ".join(rng.choice(["a", "b"], size=int(n))) for n in rng.integers(1, 9, 20)] for split in ("train", "eval")}

    def grams(text):
        words = text.split()
        return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}

    by_hand = {
        (f"eval-{e}", f"train-{t}"): len(grams(x) & grams(y)) / len(grams(x) | grams(y))
        for e, x in enumerate(texts["eval"]) if x not in texts["eval"][:e]
        for t, y in enumerate(texts["train"]) if y not in texts["train"][:t]
    }  # fmt: skip
    found = data.near_identical(prompts_in(texts), threshold=0.5)
    assert {(row.eval_prompt_id, row.train_prompt_id): row.similarity for row in found.itertuples()} == pytest.approx(
        {key: value for key, value in by_hand.items() if value >= 0.5}
    )
    assert len(found) > 10 and found["similarity"].is_monotonic_decreasing


def test_normalisation_comes_before_likeness():
    twins = data.near_identical(prompts_in({"train": ["Why  is the SKY blue\u2026 today?"], "eval": ["why is the sky blue... today?"]}))
    assert twins["similarity"].tolist() == [1.0]


def test_near_identical_prompts_are_counted_when_data_is_prepared(tokenizer, parameters, tmp_path, monkeypatch):
    """Twenty-four prompts and a twin of each with one word more: wherever both of two twins were taken, they are seen when the split parts them."""
    stem = "tell me in plain words what a careful person should know about the number {} before the summer holidays begin in the old town"
    texts = [stem.format(i) + tail for i in range(24) for tail in ("", " please")]
    rows = [{"prompt": text, "response_0": "a", "response_1": "b", "safer_response_id": 0, "better_response_id": 1} for text in texts]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = parameters | {"source": "rows.jsonl", "layout": "pku_saferlhf", "objectives": ["safe", "helpful"], "train_pairs": 24, "eval_pairs": 24}
    tables, counts = data.prepare(given, tokenizer, root=tmp_path)
    by = counts.set_index(["objective", "what"])["rows"]
    assert not data.leaked_prompts(tables)
    train = set(tables["safe"].query("split == 'train'")["prompt"])
    parted = sum(
        json.dumps([{"role": "user", "content": text.removesuffix(" please") if text.endswith(" please") else text + " please"}]) in train
        for text in (json.loads(prompt)[0]["content"] for prompt in tables["safe"].query("split == 'eval'")["prompt"])
    )
    assert by["safe", "held-out prompts near-identical to a training prompt"] >= parted > 0


def test_label_agreement_by_hand():
    rows = [
        {"prompt": p, "response_0": "a", "response_1": "b", "safer_response_id": s, "better_response_id": h}
        for p, s, h in (("1", 0, 0), ("2", 0, 1), ("3", 1, 1), ("4", 1, 1))
    ]
    tables = {name: data.pairs_of(rows, layout="pku_saferlhf", objective=name)[0] for name in ("safe", "helpful")}
    assert data.label_agreement(tables).iloc[0][["shared", "agree"]].tolist() == [4, 0.75]


def test_prepare_accounts_for_every_embedded_row(root, tokenizer, parameters):
    tables, counts = data.prepare(parameters, tokenizer, root=root)
    assert list(tables["helpful"].columns) == data.COLUMNS
    assert json.loads(tables["helpful"]["prompt"].iloc[0])[-1]["role"] == "user"
    by = counts.set_index(["objective", "what"])["rows"]
    assert by["helpful", "pairs for train"] == parameters["train_pairs"]
    assert by["helpful", "pairs for eval"] == parameters["eval_pairs"]


def test_the_fingerprint_sees_labels_and_splits():
    tables = data.assign_splits({"safe": table("safe", [str(i) for i in range(10)])}, train_pairs=5, eval_pairs=5)
    shuffled = {"safe": tables["safe"].sample(frac=1, random_state=0)}
    changed = {"safe": tables["safe"].assign(split=tables["safe"]["split"].map({"train": "eval", "eval": "train"}))}
    assert data.data_fingerprint(tables) == data.data_fingerprint(shuffled) != data.data_fingerprint(changed)
