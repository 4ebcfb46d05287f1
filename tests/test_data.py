import json

import pandas as pd
import pytest

from seqdpo_utils import data
from seqdpo_utils.encoding import EncodedPair
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


def test_too_long_pairs_are_dropped_whole():
    pairs = [EncodedPair([1] * 5, [1] * 5, [1] * 3), EncodedPair([1] * 5, [1] * 6, [1] * 3)]
    kept, dropped = data.drop_too_long(pd.DataFrame({"n": [0, 1]}), pairs, max_length=10)
    assert kept["n"].tolist() == [0] and dropped == 1


def test_label_agreement_by_hand():
    rows = [
        {"prompt": p, "response_0": "a", "response_1": "b", "safer_response_id": s, "better_response_id": h}
        for p, s, h in (("1", 0, 0), ("2", 0, 1), ("3", 1, 1), ("4", 1, 1))
    ]
    tables = {name: data.pairs_of(rows, layout="pku_saferlhf", objective=name)[0] for name in ("safe", "helpful")}
    assert data.label_agreement(tables).iloc[0][["shared", "agree"]].tolist() == [4, 0.75]


def test_prepare_accounts_for_every_embedded_row(tokenizer, parameters):
    tables, counts = data.prepare(parameters, tokenizer)
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
