"""Tables across chains that are planted on disk, so that every number is known by hand."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from seqdpo_utils import chains, contrasts, metrics, redistribution, verdicts
from seqdpo_utils.chains import Chain
from seqdpo_utils.conflict import CONFLICT_COLUMNS
from seqdpo_utils.errors import StudyError
from seqdpo_utils.ledger import LEDGER_PAIR_COLUMNS
from seqdpo_utils.paths import RunPaths, read_table, write_json, write_table

PAIRS = 12
PLACE = np.arange(PAIRS)
BASE_LOGPS = np.linspace(-0.1, 0.1, PAIRS)
"""Chosen sums of the base, in nats: its policy margin is half of this, since every answer has two tokens."""


def records(checkpoint: str, margins: dict[str, float | np.ndarray]) -> pd.DataFrame:
    """Held-out pairs, four a prompt, with given margins at beta 1, and a training pair to be left out."""
    parts = []
    for objective, margin in margins.items():
        chosen = np.append(BASE_LOGPS + margin, 99.0)
        ids, prompts = [f"p{i}" for i in range(PAIRS + 1)], [f"q{i // 4}" for i in range(PAIRS + 1)]
        place = {"pair_id": ids, "prompt_id": prompts}
        kind = {"objective": objective, "split": ["eval"] * PAIRS + ["train"], "checkpoint": checkpoint}
        sums = {"chosen_logp": chosen, "rejected_logp": 0.0, "chosen_tokens": 2, "rejected_tokens": 2}
        parts.append(pd.DataFrame(place | kind | sums))
    return pd.concat(parts, ignore_index=True)


def write_chains(root: Path, planted: dict[str, dict], *, seed: int = 0) -> list[RunPaths]:
    """Chains with what notebooks 02 to 06 leave of them.

    `planted` gives each chain, and each of its beginnings, the margin of every objective after its last
    stage: a number, or one a pair.
    """
    for text, margins in planted.items():
        run, chain = RunPaths(root, "smoke", "s", text, seed), Chain.parse(text)
        write_table(run.base_scores, records("base", dict.fromkeys(margins, 0.0)))
        write_table(run.scores, records(text, margins))
        write_json(run.manifest, {"parameters": {"train_share": 1.0}})
        write_table(run.conflict, conflict(len(chain.stages), chain.earlier))
        write_table(run.ledger_pairs, ledger_pairs(len(chain.stages), chain.earlier))
        write_table(run.movement, movement(chain.checkpoints))
    return [derive(RunPaths(root, "smoke", "s", text, seed)) for text in planted]


def derive(run: RunPaths) -> RunPaths:
    """The tables of notebooks 04 and 05."""
    chain, rng = Chain.parse(run.chain), np.random.default_rng(0)
    scores = [read_table(file) for file in (run.base_scores, *(node.scores for node in run.lineage))]
    measures = metrics.pair_measures(pd.concat(scores, ignore_index=True), beta=1.0)
    objectives = list(measures["objective"].unique())
    write_table(run.table("stage_matrix"), metrics.stage_matrix(measures, resamples=100, rng=rng))
    found = metrics.transfer(measures, chain, objectives, resamples=100, rng=rng)
    write_table(run.table("transfer"), found)
    ends = {"before": chain.checkpoints[1 if chain.parent else 0], "after": run.chain}
    parts = [redistribution.pair_change(measures, name, **ends) for name in chain.stages[0].objectives]
    write_table(run.table("pair_change"), pd.concat(parts, ignore_index=True))
    return run


def conflict(stage: int, earlier: tuple[str, ...]) -> pd.DataFrame:
    """Two measurements a stage; against `a` the mean cosine is 0.2, against any other objective -0.9.

    That is on held-out pairs; on training pairs each has the other sign.
    """
    rows = []
    for objective, split in itertools.product(earlier, ("train", "probe")):
        place = {"stage": stage, "previous_objective": objective, "split": split}
        for step, shift in enumerate((-0.1, 0.1)):
            across = (0.2 if objective == "a" else -0.9) + shift / 2
            within = {"within_cosine": 0.5 - shift, "within_new_cosine": 0.7 + 2 * shift}
            across = across if split == "probe" else -across
            rows.append(place | {"step": step, "matched_cosine": across} | within)
    return pd.DataFrame(rows, columns=list(CONFLICT_COLUMNS))


def ledger_pairs(stage: int, earlier: tuple[str, ...], *, left: float = 0.1) -> pd.DataFrame:
    """One stretch and two pairs a stage; for `a` on average left 0.1, term 0.3, measured 0.4 held out.

    The pairs differ by 0.1 in each, so not in curvature; on training pairs all has the other sign, and of
    other objectives much else is told.
    """
    rows = []
    for objective, (split, sign) in itertools.product(earlier, (("train", -1), ("probe", 1))):
        place = {"stage": stage, "previous_objective": objective, "split": split, "from_step": 0, "step": 2}
        means = (left, left + 0.2, left + 0.3) if objective == "a" else (-3.0, -5.0, -7.5)
        for name, apart in (("x", -0.05), ("y", 0.05)):
            foretold, term, measured = (sign * (mean + apart) for mean in means)
            losses = {"loss_before": 0.5, "loss_after": 0.5 + measured}
            rows.append(place | losses | {"pair_id": name, "prompt_id": name, "term": term, "left": foretold})
    return pd.DataFrame(rows, columns=list(LEDGER_PAIR_COLUMNS))


def movement(checkpoints: list[str]) -> pd.DataFrame:
    """The first move against later ones: cosines 0.1 and 0.2 with the second, 0.3 and 0.4 with the third."""
    rows = []
    for later in range(1, len(checkpoints) - 1):
        ends = {"from_checkpoint": checkpoints[0], "to_checkpoint": checkpoints[1]}
        ends |= {"other_from": checkpoints[later], "other_to": checkpoints[later + 1]}
        ends |= {"layer": None, "module": None}
        rows += [ends | {"space": "lora", "cosine": 0.2 * later - 0.1}]
        rows += [ends | {"space": "weight", "cosine": 0.2 * later}]
    names = [
        "from_checkpoint",
        "to_checkpoint",
        "other_from",
        "other_to",
        "space",
        "layer",
        "module",
        "cosine",
    ]
    return pd.DataFrame(rows, columns=names)


def bounds(row: pd.Series, name: str) -> list[float]:
    return row[[name, f"{name}_low", f"{name}_high"]].tolist()


PLANTED = {
    "a": {"a": 1.0, "b": 0.25, "c": -0.5},
    "b": {"a": 0.5, "b": 1.0, "c": 0.0},
    "c": {"a": 0.0, "b": 0.0, "c": 1.0},
    "a+b": {"a": 1.0, "b": 2.0, "c": 0.0},
    "b.half": {"a": 0.5, "b": 1.0, "c": 0.0},
    "c-then-b": {"a": 0.0, "b": 1.0, "c": 0.9},
    "a-then-b": {"a": 0.5, "b": 2.0, "c": 0.0},
    "b-then-a": {"a": 3.0, "b": 1.0, "c": 0.0},
    "a-then-b.half": {"a": -0.25, "b": 1.0, "c": 0.0},
    "b.half-then-a": {"a": 9.0, "b": 1.0, "c": 0.0},
    "a+b-then-c": {"a": 0.75, "b": 3.0, "c": 1.5},
    "c-then-a+b": {"a": 2.0, "b": 2.5, "c": 0.125},
    "a-then-b-then-c": {"a": 0.25, "b": 0.75, "c": 2.0},
    "c-then-b-then-a": {"a": 4.0, "b": 0.5, "c": 0.5},
    "a-then-b-then-a": {"a": 1.5, "b": 0.25, "c": 0.0},
}
OTHER_SEED = {
    "a": {"a": 2.0, "b": 0.25, "c": 0.0},
    "b": {"a": 0.5, "b": 1.0, "c": 0.0},
    "a-then-b": {"a": -1.0, "b": 2.0, "c": 0.0},
    "b-then-a": {"a": 2.0, "b": 1.0, "c": 0.0},
}
SEQUENCES = [text for text in PLANTED if "-then-" in text]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[RunPaths]:
    """Two orders, variants, joint stages, three stages, a return and single stages; some with two seeds."""
    root = tmp_path_factory.mktemp("runs")
    return write_chains(root, PLANTED) + write_chains(root, OTHER_SEED, seed=1)


def test_the_end_of_every_chain_for_every_objective(runs):
    table = contrasts.ends(runs).set_index(["chain", "objective", "seed"])
    assert len(table) == 3 * (len(PLANTED) + len(OTHER_SEED)) and set(table["setting"]) == {"s"}
    for (text, objective, seed), row in table.iterrows():
        margin = (OTHER_SEED if seed else PLANTED)[text][objective]
        assert bounds(row, "margin") == pytest.approx([margin] * 3)
        assert row["trained"] == (objective in Chain.parse(text).objectives)
        assert row[["n_pairs", "n_prompts"]].tolist() == [PAIRS, 3]
    assert not table.loc[("a", "b", 0), "trained"] and table.loc[("a-then-b-then-c", "b", 0), "trained"]


def test_the_first_objectives_after_every_stage(runs):
    table = contrasts.first_objectives(runs).query("seed == 0")
    assert set(table["chain"]) == set(SEQUENCES)
    three = table[table["chain"] == "a-then-b-then-c"]
    assert three["after"].tolist() == ["stage 1", "stage 2", "stage 3"]
    assert three["checkpoint"].tolist() == ["a", "a-then-b", "a-then-b-then-c"]
    assert three["margin"].tolist() == pytest.approx([1.0, 0.5, 0.25]) and set(three["objective"]) == {"a"}
    assert set(three["label"]) == {"s: a, then b, then c (seed 0)"}
    joint = table[table["chain"] == "a+b-then-c"].set_index(["objective", "after"])["margin"]
    assert joint.to_dict() == pytest.approx(
        {("a", "stage 1"): 1.0, ("a", "stage 2"): 0.75, ("b", "stage 1"): 2.0, ("b", "stage 2"): 3.0}
    )
    assert table["label"].nunique() == len(SEQUENCES) + 1  # the two of the joint stage are told apart


@pytest.mark.parametrize(
    ("text", "objective", "seed", "learned", "backward", "retention", "outcome"),
    [
        ("a-then-b", "a", 0, 1.0, -0.5, 0.5, "lost: partial"),
        ("a-then-b", "a", 1, 2.0, -3.0, -0.5, "lost: reversal"),
        ("b-then-a", "b", 0, 1.0, 0.0, 1.0, "stable"),
        ("a-then-b.half", "a", 0, 1.0, -1.25, -0.25, "lost: reversal"),
        ("a+b-then-c", "a", 0, 1.0, -0.25, 0.75, "lost: partial"),
        ("a+b-then-c", "b", 0, 2.0, 1.0, 1.5, "gained"),
        ("a-then-b-then-c", "a", 0, 1.0, -0.75, 0.25, "lost: partial"),
        ("a-then-b-then-a", "a", 0, 1.0, 0.5, 1.5, "gained"),
        ("c-then-a+b", "c", 0, 1.0, -0.875, 0.125, "lost: partial"),
    ],
)
def test_fates(runs, text, objective, seed, learned, backward, retention, outcome):
    table = contrasts.fates(runs, beta=1.0, resamples=100).set_index(["chain", "objective", "seed"])
    row = table.loc[(text, objective, seed)]
    for name, value in (("learned", learned), ("backward", backward), ("retention", retention)):
        assert bounds(row, name) == pytest.approx([value] * 3)
    assert row["outcome"] == outcome


def test_fates_are_of_chains_with_a_later_stage(runs):
    table = contrasts.fates(runs, beta=1.0, resamples=100)
    joint, second_seed = 1, 2
    assert "a" not in set(table["chain"])
    assert len(table) == len(SEQUENCES) + joint + second_seed
    tested = table.dropna(subset=["excess_churn_low"])
    assert set(tested["chain"]) == {"a-then-b", "b-then-a"}


def test_churn_is_held_against_that_of_the_next_seed(tmp_path):
    """Of four pairs a prompt two change sides in stage 2; one stands otherwise in seed 1, three in seed 2."""
    turned = {count: np.where(count > PLACE % 4, -1.0, 1.0) for count in range(4)}
    found = []
    for seed, first, last in ((0, 0, 2), (1, 1, 1), (2, 3, 3)):
        planted = {"a": {"a": turned[first], "b": 0.0}, "a-then-b": {"a": turned[last], "b": 1.0}}
        found += write_chains(tmp_path, planted, seed=seed)[1:]
    table = contrasts.fates(found, beta=1.0, resamples=100).set_index("seed")
    assert table["churn"].tolist() == [0.5, 0.0, 0.0]
    # seed 0 against 1: 2 - 1 of 4; seed 1 against 2: 0 - 2 of 4; seed 2 against 0: 0 - 3 of 4
    assert table["excess_churn_low"].tolist() == pytest.approx([0.25, -0.5, -0.75])
    assert contrasts.fates(found[:1], beta=1.0, resamples=100)["excess_churn_low"].isna().all()


def test_pairs_that_change_places_beyond_what_seeds_do_are_a_redistribution(tmp_path):
    """In every prompt two pairs swap with two others: the mean stays, and all four stand otherwise."""
    up, down = np.where(PLACE % 4 < 2, 2.0, -1.0), np.where(PLACE % 4 < 2, -1.0, 2.0)
    planted = {"a": {"a": up, "b": 0.0}, "a-then-b": {"a": down, "b": 1.0}}
    found = [write_chains(tmp_path, planted, seed=seed)[1] for seed in (0, 1)]
    table = contrasts.fates(found, beta=1.0, resamples=100)
    assert table["retention"].tolist() == pytest.approx([1.0, 1.0]) and set(table["churn"]) == {1.0}
    assert set(table["outcome"]) == {"redistribution"}
    assert contrasts.fates(found[:1], beta=1.0, resamples=100)["outcome"].tolist() == ["stable"]


def test_excess_churn_is_the_lower_bound_over_prompts(tmp_path):
    """Only the pairs of the first of three prompts change sides: the mean is a third, the bound zero."""
    turned = np.where(PLACE < 4, -1.0, 1.0)
    planted = {"a": {"a": 1.0, "b": 0.0}, "a-then-b": {"a": turned, "b": 1.0}}
    found = [write_chains(tmp_path, planted, seed=seed)[1] for seed in (0, 1)]
    table = contrasts.fates(found, beta=1.0, resamples=500)
    assert table["churn"].tolist() == pytest.approx([1 / 3, 1 / 3])
    assert table["excess_churn_low"].tolist() == [0.0, 0.0]


def test_plasticity_stands_beside_every_fate(runs):
    """What the last stage gained on its own objective, and of two the one that gained less."""
    table = contrasts.fates(runs, beta=1.0, resamples=100).set_index(["chain", "objective", "seed"])
    expected = {("a-then-b", "a", 0): ("b", 1.75), ("a-then-b-then-c", "a", 0): ("c", 2.0)}
    expected |= {("a+b-then-c", "b", 0): ("c", 1.5), ("c-then-a+b", "c", 0): ("a", 2.0)}
    expected |= {("a-then-b-then-a", "a", 0): ("a", 1.0)}
    for key, (objective, gain) in expected.items():
        assert table.loc[key, "later_objective"] == objective
        assert bounds(table.loc[key], "later") == pytest.approx([gain] * 3)


def test_one_seed_over_seeds_is_the_single_run(runs):
    first = [run for run in runs if run.seed == 0]
    alone = contrasts.fates(first, beta=1.0, resamples=100).drop(columns="seed")
    over = contrasts.fates_over_seeds(first, beta=1.0, resamples=100)
    pd.testing.assert_frame_equal(over[alone.columns], alone)
    by_run = contrasts.order_effect(first, beta=1.0, resamples=100).drop(columns="seed")
    pd.testing.assert_frame_equal(
        contrasts.order_over_seeds(first, beta=1.0, resamples=100)[by_run.columns], by_run
    )


def test_runs_that_disagree_are_no_verdict_over_seeds(runs):
    """Seed 0 keeps half of 1, seed 1 turns 2 into -1: each alone is clear, together two runs are not."""
    table = contrasts.fates_over_seeds(runs, beta=1.0, resamples=200).set_index(["chain", "objective"])
    row = table.loc[("a-then-b", "a")]
    assert row["seeds"] == 2 and row["learned"] == pytest.approx(1.5) and row["end"] == pytest.approx(-0.25)
    assert row["learned_low"] < 0 < row["learned_high"] and row["outcome"] == metrics.NOT_LEARNED
    agreed = table.loc[("b-then-a", "b")]  # the same margins in both seeds
    assert agreed["outcome"] == "stable" and bounds(agreed, "learned") == pytest.approx([1.0] * 3)
    order = contrasts.order_over_seeds(runs, beta=1.0, resamples=200).set_index(["chain", "objective"])
    gap = order.loc[("a-then-b", "a")]
    assert gap["difference"] == pytest.approx((2.5 + 3.0) / 2) and gap["seeds"] == 2
    assert gap["difference_high"] - gap["difference_low"] > 0.5
    alone = [run for run in runs if run.chain in ("a-then-b", "b-then-a")]
    few = contrasts.order_over_seeds(alone, beta=1.0, resamples=200).set_index("objective")
    p = verdicts.p_value(*bounds(few.loc["a"], "difference"), df=1)  # two seeds, though three prompts
    assert few.loc["a", "difference_p"] == pytest.approx(p)


def test_the_correction_takes_back_what_only_one_of_several_chains_shows(tmp_path):
    """A gain just clear of zero stands alone and falls among others; p-values are those of its interval."""
    by_prompt = np.array([0.35, 0.5, 0.65])[PLACE // 4]
    planted = {"a": {"a": by_prompt, "b": 0.0}, "b": {"a": 0.0, "b": 0.0}}
    planted |= {"a-then-b": {"a": 3 * by_prompt, "b": 0.0}, "b-then-a": {"a": 0.0, "b": 0.0}}
    found = write_chains(tmp_path, planted)
    alone = contrasts.fates_over_seeds(found[2:3], beta=1.0, resamples=2000).iloc[0]
    assert (alone["outcome"], alone["outcome_holm"]) == ("gained", "gained") and alone["learned_p"] < 0.05
    table = contrasts.fates_over_seeds(found, beta=1.0, resamples=2000).set_index("chain")
    both = table.loc["a-then-b"]
    assert (both["outcome"], both["outcome_holm"]) == ("gained", metrics.NOT_LEARNED)
    assert both["learned_p"] == pytest.approx(2 * alone["learned_p"])


def test_the_effect_of_the_order(runs):
    table = contrasts.order_effect(runs, beta=1.0, resamples=100).set_index(["chain", "objective", "seed"])
    expected = {
        ("a-then-b", "a", 0): (0.5, 3.0),
        ("b-then-a", "b", 0): (1.0, 2.0),
        ("a-then-b", "a", 1): (-1.0, 2.0),
        ("b-then-a", "b", 1): (1.0, 2.0),
        ("a+b-then-c", "a", 0): (0.75, 2.0),
        ("a+b-then-c", "b", 0): (3.0, 2.5),
        ("c-then-a+b", "c", 0): (0.125, 1.5),
        ("a-then-b-then-c", "a", 0): (0.25, 4.0),
        ("c-then-b-then-a", "c", 0): (0.5, 2.0),
    }
    assert set(table.index) == set(expected)  # no variants, no chain that is its own reverse
    for key, (first, last) in expected.items():
        row = table.loc[key]
        assert row[["trained_first", "trained_last"]].tolist() == pytest.approx([first, last])
        assert bounds(row, "difference") == pytest.approx([last - first] * 3)


def test_an_objective_that_stands_first_and_last_has_no_order(tmp_path):
    planted = {"a+b": {"a": 1.0, "b": 1.0}, "b": {"a": 0.0, "b": 1.0}}
    planted |= {"a+b-then-b": {"a": 0.5, "b": 2.0}, "b-then-a+b": {"a": 1.0, "b": 2.0}}
    found = contrasts.order_effect(write_chains(tmp_path, planted), beta=1.0, resamples=100)
    assert found[["chain", "objective"]].to_numpy().tolist() == [["a+b-then-b", "a"]]


def test_the_order_is_told_in_units_of_beta_and_resamples_prompts(tmp_path):
    """By prompt the difference is 0, 2 and 4 beta: three prompts span that, twelve pairs would not."""
    by_prompt = PLACE // 4
    planted = {"a": {"a": 0.0, "b": 0.0}, "b": {"a": 0.0, "b": 0.0}}
    planted |= {"a-then-b": {"a": -by_prompt, "b": 0.0}, "b-then-a": {"a": by_prompt, "b": 0.0}}
    found = contrasts.order_effect(write_chains(tmp_path, planted), beta=0.5, resamples=2000)
    row = found.set_index("objective").loc["a"]
    assert row["difference"] == 1.0  # and three prompts reach t / 1.96 sqrt(3 / 2) times as far as 0 to 2
    assert bounds(row, "difference")[1:] == pytest.approx([1 - 2.69, 1 + 2.69], abs=0.9)
    assert row[["n_prompts", "seeds"]].tolist() == [3, 1]


@pytest.fixture
def two_seeds(tmp_path, monkeypatch) -> list[RunPaths]:
    """Pair i changes by -i / 10 nats a token, -i / 5 in margin; in seed 0 stage 1 learned falling margins."""
    monkeypatch.setattr(redistribution, "MIN_QUARTILE", 3)
    found = []
    for seed, slope in ((0, -3), (1, 2)):
        first = 1.0 + slope * BASE_LOGPS
        planted = {"a": {"a": first, "b": 0.0}, "a-then-b": {"a": first - PLACE / 5, "b": 0.0}}
        found += write_chains(tmp_path, planted, seed=seed)
    return found


def test_quartiles_by_four_keys_over_seeds(two_seeds):
    """The three highest pairs changed by -10 / 5 on average, the three lowest by -1 / 5; halved per token."""
    table = contrasts.quartile_contrast(two_seeds, resamples=100).set_index("key")
    assert set(table["chain"]) == {"a-then-b"} and "seed" not in table
    assert table[["pairs", "seeds", "shared"]].drop_duplicates().to_numpy().tolist() == [[PAIRS, 2, 1.0]]
    means = {key: row[["lowest", "highest", "difference"]].tolist() for key, row in table.iterrows()}
    assert means["base"] == pytest.approx([-0.1, -1.0, -0.9])
    # by their own key one run goes down and the other up, and so they do crossed
    assert means["stage1_margin"] == pytest.approx([-1.1, -1.1, 0.0])
    assert means["cross_seed"] == pytest.approx([-1.1, -1.1, 0.0])
    assert means["stage1_policy_margin"] == pytest.approx([-0.55, -0.55, 0.0])
    first = [run for run in two_seeds if run.seed == 0]
    alone = contrasts.quartile_contrast(first, resamples=100).set_index("key")
    assert set(alone.index) == {"stage1_margin", "stage1_policy_margin", "base"}
    assert alone.loc["stage1_margin", "difference"] == pytest.approx(1.8)
    assert alone.loc["base", ["shared", "regression"]].tolist() == [0.0, 0.0]
    p = verdicts.p_value(*bounds(alone.loc["base"], "difference"), df=2)
    assert alone.loc["base", "difference_p"] == pytest.approx(float(p))


def test_another_seed_sorts_and_instruments(two_seeds, tmp_path, monkeypatch):
    """Seed 2 learns a fifth more than seed 1: crossed, each takes its own change, and the other's key."""
    first = 1.0 + 2 * BASE_LOGPS
    planted = {"a": {"a": 1.2 * first, "b": 0.0}, "a-then-b": {"a": 0.5 * first - 0.25, "b": 0.0}}
    both = two_seeds[2:] + write_chains(tmp_path, planted, seed=2)
    table = contrasts.quartile_contrast(both, resamples=100).set_index("key")
    assert contrasts.shared_training(both[::2]) == 1.0 and contrasts.shared_training(both[:1]) == 0.0
    rise = 2 * (BASE_LOGPS[-3:].mean() - BASE_LOGPS[:3].mean())
    assert table.loc["cross_seed", "difference"] == pytest.approx((-1.8 - 0.7 * rise) / 2)
    few = contrasts.kept_of_learned(both, resamples=100)
    assert set(few["pattern"]) == {"cannot be decided"} and few["slope"].isna().all()  # three prompts
    monkeypatch.setattr(redistribution, "widening", lambda _: 1.0)
    line = contrasts.kept_of_learned(both, resamples=100).set_index("instrument")
    across = 1 - 0.2 / (2 * (BASE_LOGPS[1] - BASE_LOGPS[0]))  # slope of seed 1, that of seed 2 is 0.5 / 1.2
    assert line.loc["none", "slope"] == pytest.approx((across + 0.5 * 1.2) / (1 + 1.2**2))
    assert line.loc["cross_seed", "slope"] == pytest.approx((1.2 * across + 0.5) / (1.2 + 1.2))
    assert line.loc["cross_seed", "pattern"] == "cannot be decided"  # the seeds share their training pairs
    assert line.loc["none", "pattern"] != "cannot be decided"


def test_too_few_pairs_have_no_quartiles(runs):
    table = contrasts.quartile_contrast(runs, resamples=100)
    assert table.empty and {"difference", "difference_p", "reading", "regression"} <= set(table)
    assert len(contrasts.kept_of_learned(runs, resamples=100)) > len(SEQUENCES)


def test_mechanics_of_the_first_objective_over_all_later_stages(runs):
    table = contrasts.mechanics(runs).set_index(["chain", "objective", "seed"])
    two, three = table.loc[("a-then-b", "a", 0)], table.loc[("a-then-b-then-c", "a", 0)]
    assert (two["cross"], two["within"], two["steps"]) == pytest.approx((0.2, 0.6, 2))
    assert (three["cross"], three["within"], three["steps"]) == pytest.approx((0.2, 0.6, 4))
    assert three["cross_low"] < 0.2 < three["cross_high"] < 0.6 and pd.isna(two["cross_low"])
    assert two[["left", "curvature", "measured", "rest"]].tolist() == pytest.approx([0.1, 0.2, 0.4, 0.1])
    assert three[["left", "curvature", "measured", "rest"]].tolist() == pytest.approx([0.2, 0.4, 0.8, 0.2])
    reach = stats.t.ppf(0.975, 1) * 0.05  # two pairs that differ by 0.1
    for row, wider in ((two, 1), (three, 2**0.5)):  # of two stages the variances add up
        assert bounds(row, "left")[2] - row["left"] == pytest.approx(wider * reach)
        assert row["measured"] - bounds(row, "measured")[1] == pytest.approx(wider * reach)
        assert bounds(row, "curvature") == pytest.approx([row["curvature"]] * 3)
    assert set(table["split"]) == {"probe"} and table["left_beyond"].isna().all()
    assert two[["movement_raw", "movement_weight"]].tolist() == pytest.approx([0.1, 0.2])
    assert three[["movement_raw", "movement_weight"]].tolist() == pytest.approx([0.3, 0.4])
    joint = table.loc["a+b-then-c"].droplevel("seed")
    assert joint["cross"].to_dict() == pytest.approx({"a": 0.2, "b": -0.9})
    assert joint["measured"].to_dict() == pytest.approx({"a": 0.4, "b": -7.5})
    assert three["gradients"] == "aligned" and two["gradients"] == "cannot be decided at this size"


def test_what_was_not_measured_is_null(tmp_path):
    run = write_chains(tmp_path, {name: PLANTED[name] for name in ("a", "a-then-b")})[1]
    for file, columns in ((run.conflict, CONFLICT_COLUMNS), (run.ledger_pairs, LEDGER_PAIR_COLUMNS)):
        write_table(file, pd.DataFrame(columns=list(columns)))
    row = contrasts.mechanics([run]).iloc[0]
    assert row["gradients"] == "not measured" and row["steps"] == 0
    assert (
        row[["cross", "within", "left", "curvature", "measured", "rest", "measured_low"]].isna().all()
        and row["movement_weight"] == 0.2
    )


def test_without_held_out_pairs_the_training_pairs_are_told(tmp_path):
    run = write_chains(tmp_path, {name: PLANTED[name] for name in ("a", "a-then-b")})[1]
    for file in (run.conflict, run.ledger_pairs):
        write_table(file, read_table(file).query("split == 'train'"))
    row = contrasts.mechanics([run]).iloc[0]
    assert row["split"] == "train" and row[["cross", "left", "rest"]].tolist() == pytest.approx(
        [-0.2, -0.1, -0.1]
    )


CONTROLLED = ("a", "a-then-b", "a-then-b.shuffled", "a-then-a")


@pytest.fixture
def controlled(tmp_path) -> list[RunPaths]:
    """A chain, its later stage with shuffled labels (0.3 less in direction), and the same again."""
    planted = {name: {"a": 1.0 + k, "b": 0.0} for k, name in enumerate(CONTROLLED)}
    found = write_chains(tmp_path, planted)
    write_table(found[2].ledger_pairs, ledger_pairs(2, ("a",), left=-0.2))
    return found


def test_the_ledger_beyond_shuffled_labels_is_paired_by_pair(controlled):
    """The two pairs differ alike in both stages: nothing is left of that in the difference."""
    table = contrasts.mechanics(controlled).set_index("chain")
    row = table.loc["a-then-b"]
    assert bounds(row, "left_beyond") == pytest.approx([0.3] * 3)
    assert bounds(row, "measured_beyond") == pytest.approx([0.3] * 3)
    assert bounds(row, "curvature_beyond") == pytest.approx([0.0] * 3)
    assert table.drop(index="a-then-b")["left_beyond"].isna().all()
    alone = contrasts.mechanics([run for run in controlled if run.chain != "a-then-b.shuffled"])
    assert alone["left_beyond"].isna().all()


def test_moves_stand_beside_those_of_the_controls():
    names = ["a-then-b", "a-then-b.shuffled", "a-then-a", "a-then-b.disjoint", "b-then-a"]
    cosines = {0: [-0.4, -0.6, 0.6, 0.1, 0.3], 1: [-0.2, -0.5, 0.5, 0.0, 0.3]}
    rows = [
        ("s", name, seed, value) for seed in cosines for name, value in zip(names, cosines[seed], strict=True)
    ]
    rows += [("t", "a-then-b", 0, 0.9)]
    table = pd.DataFrame(rows, columns=["setting", "chain", "seed", "movement_weight"])
    found = contrasts.moves(table).set_index(["setting", "chain"])
    assert set(found.index) == {("s", "a-then-b"), ("s", "a-then-a"), ("s", "b-then-a"), ("t", "a-then-b")}
    row = found.loc[("s", "a-then-b")]
    means = ["seeds", "cosine", "shuffled", "again", "disjoint", "beyond"]
    assert row[means].tolist() == pytest.approx([2, -0.3, -0.55, 0.55, 0.05, 0.25])
    assert row["spread"] == pytest.approx(np.std([-0.4, -0.2], ddof=1))
    expected = stats.t.interval(0.95, 1, loc=0.25, scale=stats.sem([0.2, 0.3]))
    assert row[["beyond_low", "beyond_high"]].tolist() == pytest.approx(expected)
    single = found.loc[("t", "a-then-b")]
    assert single["cosine"] == 0.9 and single[["spread", "shuffled", "beyond", "beyond_low"]].isna().all()
    one = contrasts.moves(table[table["seed"] == 0]).set_index(["setting", "chain"]).loc[("s", "a-then-b")]
    assert one["beyond"] == pytest.approx(0.2) and pd.isna(one["beyond_low"])
    asked = contrasts.questioned(found.reset_index())
    assert asked["chain"].tolist() == ["a-then-b", "b-then-a", "a-then-b"]
    assert contrasts.moves(table.head(0)).empty


def test_controls_stand_behind_their_chain(controlled):
    run, kinds = controlled[1], {chains.SHUFFLED: "a-then-b.shuffled"}
    own = pd.DataFrame({"checkpoint": ["a", "a-then-b"], "margin": [1.0, 2.0]})
    found = contrasts.beside(
        own, run, kinds, lambda node: pd.DataFrame({"checkpoint": [node.chain], "margin": 3.0})
    )
    assert found["checkpoint"].tolist() == ["a", "a-then-b", "a-then-b"] and found["margin"].tolist() == [
        1,
        2,
        3,
    ]
    assert found["control"].tolist() == ["", "", chains.SHUFFLED]
    overview = contrasts.beside_controls(contrasts.first_objectives(controlled))
    assert set(overview["chain"]) == {"a-then-b"} and overview["label"].nunique() == 1
    expected = {"stage 1": 1.0, "stage 2": 2.0, chains.SHUFFLED: 3.0, chains.AGAIN: 4.0}
    assert overview.set_index("after")["margin"].to_dict() == pytest.approx(expected)
    alone = contrasts.first_objectives(controlled[:2])
    pd.testing.assert_frame_equal(contrasts.beside_controls(alone), alone)
    nothing = contrasts.first_objectives(controlled[:1])
    assert contrasts.beside_controls(nothing).empty


def test_what_is_unknown_without_controls_is_said(controlled):
    first, chain, shuffled = controlled[:3]
    both = {chains.SHUFFLED: "a-then-b.shuffled", chains.AGAIN: "a-then-a"}
    told = contrasts.controls_in_words(chain, both)
    assert "(`a-then-b.shuffled`)" in told and "(`a-then-a`)" in told and "not known" not in told
    for kinds in ({}, {chains.AGAIN: "a-then-a"}):
        missing = contrasts.controls_in_words(chain, kinds)
        assert "not known here" in missing and 'DESIGN="both_orders controls" SETTINGS="s"' in missing
        assert missing.startswith("In grey") == bool(kinds)
    assert "one stage" in contrasts.controls_in_words(first, {})
    assert "variant" in contrasts.controls_in_words(shuffled, {})


def test_a_study_of_single_stages_has_ends_and_otherwise_empty_tables(runs):
    singles = [run for run in runs if run.chain in "abc"]
    assert len(contrasts.ends(singles)) == 15
    tables = [
        contrasts.first_objectives(singles),
        contrasts.fates(singles, beta=1.0, resamples=100),
        contrasts.order_effect(singles, beta=1.0, resamples=100),
        contrasts.quartile_contrast(singles, resamples=100),
        contrasts.mechanics(singles),
    ]
    key = set(contrasts.KEY) - {"seed"}
    assert all(table.empty and key < set(table.columns) for table in tables)
    assert contrasts.kept_of_learned(singles, resamples=100).empty
    over_seeds = contrasts.fates_over_seeds(singles, beta=1.0, resamples=100)
    assert over_seeds.empty and contrasts.order_over_seeds(singles, beta=1.0, resamples=100).empty
    assert verdicts.null_rates(tables[1], rng=np.random.default_rng(0)).empty
    assert not verdicts.several_fates(over_seeds) and contrasts.sides(tables[2], "difference") == (0, 0)
    assert contrasts.ledger_counts(tables[4]) == {"kept": 0, "rose": 0, "closed": 0}


def test_a_missing_table_names_its_file(tmp_path):
    with pytest.raises(StudyError, match=r"a-then-b/seed-0/tables/stage_matrix\.parquet is missing"):
        contrasts.ends([RunPaths(tmp_path, "smoke", "s", "a-then-b", 0)])


def test_decisions():
    lows, highs = [-0.5, -0.5, -0.1, 0.1, 0.2], [-0.1, -0.2, 0.1, 0.3, 0.4]
    assert contrasts.sides(pd.DataFrame({"gap_low": lows, "gap_high": highs}), "gap") == (2, 2)
    measured, rest = [0.5, -0.5, 1.0, None, 0.2], [0.05, -0.05, 0.2, 0.0, -0.01]
    counts = contrasts.ledger_counts(pd.DataFrame({"measured": measured, "rest": rest}))
    assert counts == {"kept": 4, "rose": 3, "closed": 3}
