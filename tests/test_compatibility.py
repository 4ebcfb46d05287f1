"""What was known beforehand beside what then happened: planted on disk, and rank correlations by hand."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_contrasts import PLACE, records

from seqdpo_utils import compatibility
from seqdpo_utils.chains import Chain
from seqdpo_utils.conflict import CONFLICT_COLUMNS
from seqdpo_utils.paths import RunPaths, write_table


def write(folder, ends, *, agree=0.75, products=(0.3, 0.5, 0.5), setting="s", seed=0):
    """Runs of a setting with objectives `a` and `b`, four training pairs that both label, and gradients.

    `ends`: chain to its held-out margins at the end; `products`: cross, within new, within old at the start.
    """
    runs = [RunPaths(folder, "smoke", setting, text, seed) for text in ends]
    write_table(runs[0].base_scores, records("base", {"a": 0.0, "b": 0.0}))
    for name in "ab":
        turned = [name == "b" and k >= 4 * agree for k in range(4)] + [name == "b"] * 4
        sides = {"chosen": np.where(turned, "no", "yes"), "rejected": np.where(turned, "yes", "no")}
        table = pd.DataFrame({"prompt_id": [f"q{k}" for k in range(8)]} | sides)
        write_table(runs[0].data(name), table.assign(split=["train"] * 4 + ["eval"] * 4))
    for run in runs:
        write_table(run.scores, records(run.chain, ends[run.chain]))
        rows = []
        for step, split in itertools.product((4, 2), ("probe", "train")):
            signs = (1, 1, 1) if (step, split) == (2, "probe") else (-1, 9, 9)
            place = {"step": step, "split": split, "previous_objective": run.chain[0]}
            named = dict(
                zip(("cross_product", "within_new", "within_old"), np.multiply(products, signs), strict=True)
            )
            rows.append(place | named)
        write_table(run.conflict, pd.DataFrame(rows, columns=list(CONFLICT_COLUMNS)))
    return [run for run in runs if Chain.parse(run.chain).parent]


ENDS = {"a": {"a": 1.0, "b": 0.25}, "a-then-b": {"a": 0.5, "b": 2.0}}
SHAM = {"a-then-b.shuffled": {"a": 0.7, "b": 0.0}}


def test_one_row_a_chain_with_every_number_known(tmp_path):
    others = {"a-then-a": {"a": 2.0, "b": 0.0}, "a-then-b-then-a": {"a": 2.0, "b": 0.0}}
    runs = write(tmp_path, ENDS | SHAM | others)
    table = compatibility.compatibility(runs, beta=1.0, resamples=100)
    assert table[["setting", "chain", "seeds", "shared"]].to_numpy().tolist() == [["s", "a-then-b", 1, 4]]
    row = table.iloc[0]
    assert row["agreement"] == 0.75  # the four held-out pairs, all turned, are left out
    assert row["forward"] == pytest.approx(0.25) and row["backward"] == pytest.approx(-0.5)
    assert row["due"] == pytest.approx(0.5 - 0.7)
    assert row["gradients"] == pytest.approx(0.3 / 0.5)  # the first measurement on held-out pairs
    assert row[["forward_low", "forward_high"]].tolist() == pytest.approx([0.25, 0.25])


def test_intervals_are_over_prompts_and_runs(tmp_path):
    """By prompt backward transfer is -1, 0 and 1; two runs differ by 1."""
    by_prompt = np.array([-1.0, 0.0, 1.0])[PLACE // 4]
    runs = write(tmp_path, ENDS | {"a-then-b": {"a": 1.0 + by_prompt, "b": 2.0}})
    one = compatibility.compatibility(runs, beta=1.0, resamples=400).iloc[0]
    assert one["backward"] == pytest.approx(0) and one["backward_low"] < -0.5 and one["backward_high"] > 0.5
    runs += write(tmp_path, ENDS | {"a-then-b": {"a": 2.0 + by_prompt, "b": 2.0}}, seed=1)
    both = compatibility.compatibility(runs, beta=1.0, resamples=400).iloc[0]
    assert both["backward"] == pytest.approx(0.5) and both["seeds"] == 2
    assert both["backward_high"] - both["backward_low"] > one["backward_high"] - one["backward_low"]


def test_gradients_are_pooled_over_runs_and_may_be_unknown(tmp_path):
    """Inner products are averaged: (.3 - .1) / 2 over the roots of (.5 + .3) / 2 and (.5 + .3) / 2."""
    runs = write(tmp_path, ENDS)
    runs += write(tmp_path, ENDS, products=(-0.1, 0.3, 0.3), seed=1)
    assert compatibility.first_cosine(runs, "a") == pytest.approx(0.1 / 0.4)
    assert compatibility.first_cosine(runs, "b") is None
    noisy = write(tmp_path, ENDS, products=(0.3, -0.1, 0.5), seed=2)
    assert compatibility.first_cosine(noisy, "a") is None
    table = compatibility.compatibility(noisy, beta=1.0, resamples=100)
    assert table["gradients"].isna().all() and table["due"].isna().all()


def test_objectives_that_share_no_pair_have_no_agreement(tmp_path):
    runs = write(tmp_path, ENDS)
    other = pd.DataFrame({"prompt_id": ["z"], "chosen": ["x"], "rejected": ["y"], "split": ["train"]})
    write_table(runs[0].data("b"), other)
    row = compatibility.compatibility(runs, beta=1.0, resamples=100).iloc[0]
    assert row["shared"] == 0 and pd.isna(row["agreement"])


def chains(known, happened, *, settings=4):
    """A table of chains, two a setting where there are as many."""
    size = len(known)
    names = [f"s{k * settings // size}" for k in range(size)]
    blank = dict.fromkeys([*compatibility.BEFORE, *compatibility.AFTER], pd.array([pd.NA] * size, "Float64"))
    return pd.DataFrame({"setting": names} | blank).assign(forward=known, backward=happened)


def reading(table):
    found = compatibility.relations(table, rng=np.random.default_rng(0)).set_index(["before", "after"])
    return found.loc[("forward", "backward")]


UP = np.arange(8.0)


@pytest.mark.parametrize(
    ("happened", "rho", "expected"),
    [
        (UP**3, 1.0, compatibility.FORETELLS),
        (-(UP**3), -1.0, compatibility.CONTRARY),
        (np.array([3.0, 0, 6, 1, 7, 2, 5, 4]), None, compatibility.NO_RELATION),
    ],
)
def test_compatibility_that_foretells_and_one_that_does_not(happened, rho, expected):
    row = reading(chains(UP, happened))
    assert row["reading"] == expected and row["chains"] == 8 and row["settings"] == 4
    assert row["rho"] == pytest.approx(stats.spearmanr(UP, happened).statistic if rho is None else rho)


def test_p_is_the_share_of_permutations_that_go_as_far():
    """All 120 orders of five chains, by hand; ties share their ranks."""
    known, happened = np.array([1.0, 2, 2, 4, 5]), np.array([2.0, 1, 3, 4, 9])
    rho = stats.spearmanr(known, happened).statistic
    every = [
        stats.spearmanr(known[list(order)], happened).statistic for order in itertools.permutations(range(5))
    ]
    one_sided = min(np.mean(np.array(every) >= rho - 1e-9), np.mean(np.array(every) <= rho + 1e-9))
    row = reading(chains(known, happened, settings=5))
    assert row["p"] == pytest.approx(2 * one_sided) and row["p_holm"] == row["p"]


def test_a_sign_that_hangs_on_one_setting_is_said():
    """Three settings fall slightly; the fourth, far off in both, makes the whole rise."""
    known = np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 20, 21, 22, 23, 24, 25, 26, 27, 28])
    happened = np.concatenate([-known[:9], known[9:]])
    table = chains(known, happened).assign(setting=["s", "s", "s", "t", "t", "t", "u", "u", "u"] + ["v"] * 9)
    row = reading(table)
    assert row["rho"] > 0 and row["p"] < 0.05 and not row["same_sign"]
    assert row["reading"] == compatibility.ONE_SETTING
    assert reading(chains(UP, UP))["same_sign"]
    alone = reading(chains(UP, UP, settings=1))
    assert pd.isna(alone["same_sign"]) and alone["reading"] == compatibility.ONE_SETTING


def test_few_chains_decide_nothing():
    table = compatibility.relations(chains(UP[:4], UP[:4]), rng=np.random.default_rng(0))
    assert set(table["reading"]) == {compatibility.TOO_FEW} and table[["rho", "p", "p_holm"]].isna().all(
        axis=None
    )
    assert "4 of the 5 chains" in compatibility.in_words(table)
    none = compatibility.relations(chains(UP[:0], UP[:0]), rng=np.random.default_rng(0))
    assert set(none["chains"]) == {0} and "0 of the 5 chains" in compatibility.in_words(none)
    flat = reading(chains(np.ones(8), UP))
    assert flat["reading"].endswith("does not vary") and pd.isna(flat["rho"])


def test_the_sentence_names_what_was_found():
    found = compatibility.relations(chains(UP, -UP), rng=np.random.default_rng(0))
    words = compatibility.in_words(found)
    assert (
        words.startswith("**Exploratory**: 8 chains") and compatibility.CONTRARY in words and "-1.00" in words
    )
    many = compatibility.relations(chains(np.arange(20.0), np.arange(20.0)), rng=np.random.default_rng(0))
    assert compatibility.in_words(many).startswith("20 chains.") and "+1.00" in compatibility.in_words(many)


def test_the_correction_is_over_the_relations():
    table = chains(UP, UP).assign(due=UP, agreement=UP[::-1])
    found = compatibility.relations(table, rng=np.random.default_rng(0))
    assert found["p"].notna().sum() == 4
    assert found["p_holm"].dropna().min() == pytest.approx(4 * found["p"].dropna().min())
