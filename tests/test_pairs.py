import itertools
import json
from collections.abc import Iterable

import numpy as np
import pandas as pd
import pytest

from seqdpo_utils import pairs, params
from seqdpo_utils.errors import StudyError


def labelled(prompt: str, first: str, second: str, *, safe: int = 0, better: int = 0) -> dict:
    answers = {"response_0": first, "response_1": second}
    return {"prompt": prompt, **answers, "safer_response_id": safe, "better_response_id": better}


def pku(rows: list[dict], objective: str = "safe") -> pd.DataFrame:
    return pairs.pairs_of(rows, layout="pku_saferlhf", objective=objective)[0]


def table(objective: str, prompts: Iterable[str | int], *, copies: int = 1) -> pd.DataFrame:
    names = [f"{p} {c}" for p in prompts for c in range(copies)]
    return pku([labelled(f"Prompt {n.split()[0]}?", f"good {n}", f"bad {n}") for n in names], objective)


def test_prompts_are_compared_after_normalisation():
    assert pairs.normalise("  Stra\u00dfe\u00a0 IST\nlang ") == pairs.normalise("strasse ist LANG")
    found = pku([labelled(text, "a", "b") for text in ("Why\u2026  so?", "WHY... SO?")])
    assert found["prompt_id"].nunique() == 1 and found["pair_id"].nunique() == 2


def test_ids_do_not_depend_on_order_or_objective():
    one, two = table("safe", list("ab")), table("safe", list("ba"))
    assert set(one["pair_id"]) == set(two["pair_id"])
    assert set(one["prompt_id"]) == set(table("helpful", list("ab"))["prompt_id"])


def test_a_repeated_pair_is_kept_once_and_counted():
    found, counts = pairs.pairs_of([labelled("Q", "a", "b")] * 3, layout="pku_saferlhf", objective="safe")
    assert len(found) == 1 and counts["the same pair again"] == 2


def sizes(train: int, held_out: int, probe: int = 0, fresh: int = 0) -> dict[str, int]:
    return {"train": train, "eval": held_out, "probe": probe, "fresh": fresh}


def test_splits_divide_prompts_across_objectives():
    tables = {name: table(name, range(30), copies=2) for name in ("safe", "helpful")}
    split = pairs.assign_splits(tables, sizes=sizes(20, 10))
    assert not pairs.leaked_prompts(split)
    for part in split.values():
        assert part["split"].value_counts().to_dict() == {"train": 20, "eval": 10}


def test_probe_pairs_and_fresh_prompts_are_apart_and_fresh_falls_short_first():
    tables = {name: table(name, range(30)) for name in ("safe", "helpful")}
    split = pairs.assign_splits(tables, sizes=sizes(10, 8, probe=8, fresh=10))
    assert not pairs.leaked_prompts(split)
    counts = {"train": 10, "eval": 8, "probe": 8, "fresh": 4}
    assert all(part["split"].value_counts().to_dict() == counts for part in split.values())
    smaller = pairs.assign_splits(tables, sizes=sizes(10, 8))
    for name, part in smaller.items():
        assert part.merge(split[name], on=["pair_id", "split"]).shape[0] == 18, "more splits move no pair"


def test_splits_with_prompts_of_one_objective_only():
    tables = {"safe": table("safe", range(20)), "helpful": table("helpful", range(12, 40))}
    split = pairs.assign_splits(tables, sizes=sizes(8, 6))
    assert not pairs.leaked_prompts(split)
    assert all((part["split"] == "train").sum() == 8 for part in split.values())


def test_a_planted_leak_is_found():
    split = pairs.assign_splits({"safe": table("safe", range(10))}, sizes=sizes(5, 5))
    row = split["safe"].query("split == 'train'").head(1)
    split["helpful"] = row.assign(split="eval", objective="helpful")
    assert pairs.leaked_prompts(split) == set(row["prompt_id"])


def test_an_empty_split_names_the_numbers():
    numbers = "3 usable pairs for eval_pairs = 5, train_pairs = 4, probe_pairs = 0, fresh_pairs = 0"
    with pytest.raises(StudyError, match=f"train split of 'safe' is empty: {numbers}"):
        pairs.assign_splits({"safe": table("safe", list("abc"))}, sizes=sizes(4, 5))


def test_rows_without_a_usable_pair_are_an_error():
    with pytest.raises(StudyError, match="no usable pair for objective 'safe'"):
        pku([labelled("Q", "a", "a")])


WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def talked(turns: list[str], chosen: str, rejected: str, *, system: str | None = None) -> pd.DataFrame:
    """One pair as a table, its prompt a talk that begins with the user."""
    roles = [{"role": ("user", "assistant")[i % 2], "content": words} for i, words in enumerate(turns)]
    prompt = ([{"role": "system", "content": system}] if system else []) + roles
    row = {"prompt": json.dumps(prompt), "chosen": chosen, "rejected": rejected, "objective": "safe"}
    return pd.DataFrame([row | {"prompt_id": "whole", "pair_id": "whole", "removed_turns": 0}])


@pytest.mark.parametrize("max_length", range(24, 140, 4))
def test_a_long_prompt_loses_its_oldest_turns_by_twos_and_no_text_is_cut(tokenizer, max_length):
    turns = [" ".join(WORDS[: 3 + i]) for i in range(7)]
    whole = talked(turns, "a short answer", "a somewhat longer answer than that", system="Be brief.")
    kept, counts = pairs.fit(whole, tokenizer, max_length=max_length)
    sizes = {}
    for start in range(
        0, 7, 2
    ):  # by hand: each suffix that begins with a user turn, the system message before it
        shorter = talked(
            turns[start:], "a short answer", "a somewhat longer answer than that", system="Be brief."
        )
        sizes[start] = pairs.encode_table(tokenizer, shorter)[0].longest
    fitting = [start for start, size in sizes.items() if size <= max_length]
    if not fitting:
        assert (
            kept.empty
            and sum(counts.values()) == 1
            and all("longer than max_length" in what for what in counts)
        )
        return
    prompt = json.loads(kept["prompt"][0])
    assert (
        prompt[0] == {"role": "system", "content": "Be brief."}
        and prompt[1]["role"] == prompt[-1]["role"] == "user"
    )
    assert [turn["content"] for turn in prompt[1:]] == turns[fitting[0] :]
    assert kept["removed_turns"][0] == fitting[0] and kept[["chosen", "rejected"]].equals(
        whole[["chosen", "rejected"]]
    )
    assert pairs.encode_table(tokenizer, kept)[0].longest == sizes[fitting[0]]
    assert counts == ({"kept: prompt shortened by its oldest turns": 1} if fitting[0] else {})


def test_what_cannot_fit_is_dropped_by_reason(tokenizer):
    long = " ".join(WORDS * 3)
    texts = ("Why?", long, "no"), ("Why?", "no", long), (long, "yes", "no"), ("Why?", "yes", "no")
    cases = pd.concat([talked([prompt], *answers) for prompt, *answers in texts], ignore_index=True)
    kept, counts = pairs.fit(cases, tokenizer, max_length=36)
    assert counts == {
        "dropped: completion longer than max_length": 2,
        "dropped: last turn and completion longer than max_length": 1,
    }
    assert kept["chosen"].tolist() == ["yes"]


def test_shortened_pairs_keep_the_id_of_the_whole_prompt_and_get_one_of_their_own(tokenizer):
    whole = pku([labelled("Q", "a", "b")])
    same, counts = pairs.fit(whole, tokenizer, max_length=500)
    pd.testing.assert_frame_equal(same, whole)
    assert not counts
    beginnings = (" ".join(WORDS), " ".join(WORDS[::-1]))
    talks = pd.concat(
        [talked([text, "Well.", "Why?"], "yes", "no") for text in beginnings], ignore_index=True
    )
    last = pairs.encode_table(tokenizer, talked(["Why?"], "yes", "no"))[0]
    kept, counts = pairs.fit(talks, tokenizer, max_length=len(last.prompt) + 4)
    assert kept["prompt_id"].tolist() == ["whole"] and kept["pair_id"][0] != "whole"
    assert counts == {
        "kept: prompt shortened by its oldest turns": 2,
        "dropped: the same pair again, once shortened": 1,
    }


def prompts_in(texts: dict[str, list[str]]) -> dict[str, pd.DataFrame]:
    rows = [
        {
            "prompt_id": f"{split}-{i}",
            "split": split,
            "prompt": json.dumps([{"role": "user", "content": text}]),
        }
        for split, members in texts.items()
        for i, text in enumerate(members)
    ]
    return {"safe": pd.DataFrame(rows)}


def test_a_paraphrase_with_one_changed_word_is_found_and_an_unrelated_prompt_is_not():
    text = "please tell me in a few plain words how the rain comes to fall on the hills behind our town each "
    text += "year in the autumn and why it then stops again in spring"
    other = "what is a good way to learn the names of the stars in the northern sky without a telescope"
    changed = text.replace("plain", "simple")
    given = prompts_in({"train": [other, text], "eval": [changed, "why is grass green"]})
    twins = pairs.near_identical(given)
    assert twins[["eval_prompt_id", "train_prompt_id"]].to_numpy().tolist() == [["eval-0", "train-1"]]
    grams = len(text.split()) - 2
    assert twins["similarity"][0] == pytest.approx((grams - 3) / (grams + 3))


def test_similarity_is_jaccards_by_brute_force(monkeypatch):
    monkeypatch.setattr(pairs, "_BLOCK", 3)  # several blocks, the last one short
    rng = np.random.default_rng(0)
    sizes = {split: rng.integers(1, 9, 20).tolist() for split in ("train", "eval")}
    texts = {split: [" ".join(rng.choice(["a", "b"], size=n)) for n in many] for split, many in sizes.items()}

    def grams(text):
        words = text.split()
        return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}

    by_hand = {
        (f"eval-{e}", f"train-{t}"): len(grams(x) & grams(y)) / len(grams(x) | grams(y))
        for e, x in enumerate(texts["eval"]) if x not in texts["eval"][:e]
        for t, y in enumerate(texts["train"]) if y not in texts["train"][:t]
    }  # fmt: skip
    found = pairs.near_identical(prompts_in(texts), threshold=0.5)
    keys = zip(found["eval_prompt_id"], found["train_prompt_id"], strict=True)
    assert dict(zip(keys, found["similarity"], strict=True)) == pytest.approx(
        {key: value for key, value in by_hand.items() if value >= 0.5}
    )
    assert len(found) > 10 and found["similarity"].is_monotonic_decreasing


def test_normalisation_comes_before_likeness():
    texts = {"train": ["Why  is the SKY blue\u2026 today?"], "eval": ["why is the sky blue... today?"]}
    twins = pairs.near_identical(prompts_in(texts))
    assert twins["similarity"].tolist() == [1.0]


def test_near_identical_prompts_are_counted_when_data_is_prepared(tokenizer, parameters, tmp_path):
    """Twenty-four prompts and a twin of each with one word more: where the split parts two, it is seen."""
    stem = "tell me in plain words what a careful person should know about the number {} before summer begins"
    texts = [stem.format(i) + tail for i in range(24) for tail in ("", " please")]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(labelled(text, "a", "b")) for text in texts))
    source = {"source": "rows.jsonl", "layout": "pku_saferlhf", "objectives": ["safe", "helpful"]}
    given = parameters.model_copy(update=source | {"train_pairs": 24, "eval_pairs": 24, "probe_pairs": 0})
    tables, counts = pairs.prepare(given, tokenizer, root=tmp_path)
    by = counts.set_index(["objective", "what"])["rows"]
    assert not pairs.leaked_prompts(tables)
    split = tables["safe"].set_index(
        tables["safe"]["prompt"].map(lambda prompt: json.loads(prompt)[0]["content"])
    )
    parted = sum(
        {split["split"].get(text), split["split"].get(text + " please")} == {"train", "eval"}
        for text in texts
    )
    assert by["safe", "held-out prompts near-identical to a training prompt"] >= parted > 0


def test_label_agreement_by_hand():
    labels = (("1", 0, 0), ("2", 0, 1), ("3", 1, 1), ("4", 1, 1))
    rows = [labelled(prompt, "a", "b", safe=safe, better=better) for prompt, safe, better in labels]
    tables = {name: pku(rows, name) for name in ("safe", "helpful")}
    assert pairs.label_agreement(tables).iloc[0][["shared", "agree"]].tolist() == [4, 0.75]


def test_prepare_accounts_for_every_embedded_row(root, tokenizer, parameters):
    tables, counts = pairs.prepare(parameters, tokenizer, root=root)
    assert list(tables["helpful"].columns) == pairs.COLUMNS
    assert json.loads(tables["helpful"]["prompt"].iloc[0])[-1]["role"] == "user"
    by = counts.set_index(["objective", "what"])["rows"]
    assert by["helpful", "pairs for train"] == parameters.train_pairs
    assert by["helpful", "pairs for eval"] == parameters.eval_pairs


@pytest.mark.parametrize("max_length", [80, 256])
@pytest.mark.parametrize(
    "setting", ["distributional_conflict", "attribute_interaction", "safety_signal", "compatible_quality"]
)
def test_every_row_read_ends_in_exactly_one_line(root, tokenizer, setting, max_length):
    given = params.resolve(root, scale="smoke", setting=setting).model_copy(update={"max_length": max_length})
    given = given.model_copy(update={"train_pairs": 3, "eval_pairs": 3, "probe_pairs": 2})
    _, counts = pairs.prepare(given, tokenizer, root=root)
    ends = counts["what"].str.startswith(("joined", "dropped", "pairs for", "left over"))
    read = counts[counts["what"] == "rows read"].set_index("objective")["rows"]
    assert counts[ends].groupby("objective")["rows"].sum().to_dict() == read.to_dict()
    assert counts["rows"].ge(0).all() and not counts.duplicated(["objective", "what"]).any()
    joined = counts[counts["what"].str.startswith("joined")]["rows"].tolist()
    assert joined == ([180, 180] if setting == "attribute_interaction" else [])


def test_the_fingerprint_sees_labels_and_splits():
    tables = pairs.assign_splits({"safe": table("safe", range(10))}, sizes=sizes(5, 5))
    shuffled = {"safe": tables["safe"].sample(frac=1, random_state=0)}
    other = tables["safe"]["split"].map({"train": "eval", "eval": "train"})
    changed = {"safe": tables["safe"].assign(split=other)}
    assert (
        pairs.data_fingerprint(tables) == pairs.data_fingerprint(shuffled) != pairs.data_fingerprint(changed)
    )


def stage(count: int, *, objective: str = "safe") -> pd.DataFrame:
    """Pairs of a stage with their base sums, in no order; chosen is positive, rejected negative."""
    names = [f"{objective}-{i}" for i in np.random.default_rng(5).permutation(count)]
    number = np.arange(count) + 1
    sides = {"chosen": 1, "rejected": -1}
    texts = {side: [f"{side} {name}" for name in names] for side in sides}
    columns = ("rating", "logp", "tokens")
    values = {f"{side}_{column}": sign * number for side, sign in sides.items() for column in columns}
    return pd.DataFrame({"pair_id": names, "objective": objective, **texts, **values}, index=number * 10)


def test_turning_half_of_four_pairs_by_hand():
    four = stage(4).astype({"chosen_logp": float, "rejected_logp": float})
    half = pairs.turn_labels(four, share=0.5, seed=0)
    assert half["turned"].sum() == 2 and half["pair_id"].tolist() == four["pair_id"].tolist()
    for row, (_, before) in zip(half.to_dict("records"), four.iterrows(), strict=True):
        first, second = ("rejected", "chosen") if row["turned"] else ("chosen", "rejected")
        for column in ("", "_rating", "_logp", "_tokens"):
            assert row[f"chosen{column}"] == before[f"{first}{column}"]
            assert row[f"rejected{column}"] == before[f"{second}{column}"]
    assert half.dtypes.drop("turned").equals(four.dtypes) and half.index.tolist() == [0, 1, 2, 3]
    whole = pairs.turn_labels(four, share=1.0, seed=0)
    assert whole["turned"].all() and whole["chosen_tokens"].tolist() == [-1, -2, -3, -4]
    none = pairs.turn_labels(four, share=0.0, seed=0)
    pd.testing.assert_frame_equal(none.drop(columns="turned"), four.reset_index(drop=True))


def turned(rows: pd.DataFrame) -> set[str]:
    return set(rows.loc[rows["turned"], "pair_id"])


def test_turned_pairs_are_nested_and_ruled_by_seed_and_pairs_alone():
    rows = stage(40)
    sets = [turned(pairs.turn_labels(rows, share=share, seed=3)) for share in (0.1, 0.25, 0.5, 0.75, 1.0)]
    assert [len(found) for found in sets] == [4, 10, 20, 30, 40]
    assert all(small < large for small, large in itertools.pairwise(sets))
    assert len(turned(pairs.turn_labels(stage(7), share=0.25, seed=3))) == 2, "rounded, not cut off"
    again = pairs.turn_labels(rows.sample(frac=1, random_state=0), share=0.5, seed=3)
    assert turned(again) == sets[2], "the order of the rows must not matter"
    assert turned(pairs.turn_labels(rows, share=0.5, seed=4)) != sets[2]


def test_turning_too_few_pairs_is_an_error():
    with pytest.raises(StudyError, match="4 pairs are too few to turn 10% of them"):
        pairs.turn_labels(stage(4), share=0.1, seed=0)


def test_shuffled_labels_are_fair_coins_one_for_each_pair():
    rows = stage(20_000)
    one, again, other = (pairs.shuffle_labels(rows, seed=seed) for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(one, again)
    assert 0.49 < one["turned"].mean() < 0.51
    agree = (one["turned"] == other["turned"]).mean()
    assert 0.49 < agree < 0.51, "another seed throws the coins anew"
    assert one["turned"].sum() != 10_000, "coins, not exactly a half"
    assert (one["chosen_logp"] < 0).equals(one["turned"]) and (one["rejected_tokens"] > 0).equals(
        one["turned"]
    )
    mixed = pairs.shuffle_labels(rows.sample(frac=1, random_state=0), seed=1)
    assert turned(mixed) == turned(one)


def test_a_part_keeps_its_order_and_is_nested():
    rows = stage(40)
    half, again, other = (pairs.part_of(rows, share=0.5, seed=seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(half, again)
    assert len(half) == 20 and set(half["pair_id"]) != set(other["pair_id"])
    inside = rows[rows["pair_id"].isin(half["pair_id"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(half, inside)
    assert set(pairs.part_of(rows, share=0.25, seed=0)["pair_id"]) < set(half["pair_id"])
    assert len(pairs.part_of(rows, share=0.001, seed=0)) == 1
    pd.testing.assert_frame_equal(pairs.part_of(rows, share=1.0, seed=0), rows.reset_index(drop=True))


def test_replay_exchanges_pairs_and_keeps_their_number():
    rows, earlier = stage(20), stage(12, objective="helpful")
    mixed, again, other = (pairs.replay(rows, earlier, share=0.25, seed=seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(mixed, again)
    assert mixed["objective"].tolist() == ["safe"] * 15 + ["helpful"] * 5
    assert mixed["pair_id"].is_unique and mixed.index.tolist() == list(range(20))
    for objective, source in (("safe", rows), ("helpful", earlier)):
        part = mixed[mixed["objective"] == objective].reset_index(drop=True)
        expected = source[source["pair_id"].isin(part["pair_id"])].reset_index(drop=True)
        pd.testing.assert_frame_equal(part, expected)
        assert set(other.loc[other["objective"] == objective, "pair_id"]) != set(part["pair_id"])


def test_replay_does_not_bring_back_what_the_stage_has():
    rows = stage(10)
    earlier = pd.concat([rows, stage(3, objective="helpful")])
    mixed = pairs.replay(rows, earlier, share=0.3, seed=0)
    assert mixed["pair_id"].is_unique and (mixed["objective"] == "helpful").sum() == 3
    same_texts = pd.concat([rows, rows.assign(objective="helpful")])
    assert (pairs.replay(rows, same_texts, share=0.3, seed=0)["objective"] == "helpful").sum() == 3
    with pytest.raises(StudyError, match="replay asks for 4 earlier pairs, there are 3"):
        pairs.replay(rows, earlier, share=0.4, seed=0)
    with pytest.raises(StudyError, match="10 pairs are too few to replay 4% of them"):
        pairs.replay(rows, earlier, share=0.04, seed=0)


def test_different_uses_of_chance_do_not_share_a_stream():
    rows, earlier = stage(400), stage(400, objective="helpful")
    mixed = pairs.replay(rows, earlier, share=0.5, seed=0)
    number = {"pair_id": lambda part: part["pair_id"].str.rpartition("-")[2]}
    drawn = {
        "turned": turned(pairs.turn_labels(rows, share=0.5, seed=0)),
        "shuffled": turned(pairs.shuffle_labels(rows, seed=0)),
        "part": set(pairs.part_of(rows, share=0.5, seed=0)["pair_id"]),
        "staying": set(mixed.loc[mixed["objective"] == "safe", "pair_id"]),
        "coming": set(
            mixed.assign(**number).query("objective == 'helpful'")["pair_id"].map("safe-{}".format)
        ),
    }
    for one, other in itertools.combinations(drawn, 2):
        assert 70 < len(drawn[one] & drawn[other]) < 130, f"{one} and {other} are not independent"
