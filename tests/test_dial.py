"""The conflict dial on planted runs: instruments that follow the share, and some that are blind to it."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from seqdpo_utils import charts, dial, metrics, verdicts
from seqdpo_utils.chains import Chain
from seqdpo_utils.conflict import CONFLICT_COLUMNS
from seqdpo_utils.ledger import LEDGER_PAIR_COLUMNS
from seqdpo_utils.paths import RunPaths, write_json, write_table

PAIRS, STEPS, LEARNED = 24, 8, 1.0
FLIPS = {0.0: "", 0.25: ".flip25", 0.5: ".flip50", 0.75: ".flip75", 1.0: ".flip100"}
DIAL = {f"a-then-a.disjoint{flip}": (dial.NEW, share) for share, flip in FLIPS.items()}
EVERY_OTHER = list(DIAL)[::2]
OTHERS = {"a-then-b": 0.4, "a-then-b.shuffled": 0.5}
"""Chains that go on with another objective, and the share of whose readings theirs are."""


def records(checkpoint: str, margin: float | np.ndarray) -> pd.DataFrame:
    """Held-out pairs of `a`, two a prompt, with given margins at beta 1."""
    ids, prompts = [f"p{i}" for i in range(PAIRS)], [f"q{i // 2}" for i in range(PAIRS)]
    place = {
        "pair_id": ids,
        "prompt_id": prompts,
        "objective": "a",
        "split": "eval",
        "checkpoint": checkpoint,
    }
    sums = {"chosen_logp": margin + np.zeros(PAIRS), "rejected_logp": 0.0}
    return pd.DataFrame(place | sums | {"chosen_tokens": 2, "rejected_tokens": 2})


def adapter(folder: Path, *weights: float) -> None:
    """One module with A the identity and B diagonal, so that moves of B are moves in weight space."""
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    sides = {
        f"{stem}.lora_A.weight": torch.eye(2),
        f"{stem}.lora_B.weight": torch.diag(torch.tensor(weights)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: side.contiguous() for name, side in sides.items()}, folder / "adapter_model.safetensors")


def plant(root: Path, chain: str, *, seed: int, share: float, sign: int = 1, blind: bool = False) -> RunPaths:
    """A run of two stages whose readings are those of `share`: at .5 all zero; `blind`: only the margin's.

    What a seed and a prompt add is the same at every share, and a little noise is not.
    """
    run, rng = (
        RunPaths(root, "smoke", "s", chain, seed),
        np.random.default_rng([seed, int(100 * share), len(chain)]),
    )
    parsed, pull = Chain.parse(chain), sign * (1 - 2 * share)
    shown, own, level = (
        (0.0 if blind else pull),
        np.random.default_rng(seed).normal(0, 0.2, PAIRS // 2),
        0.1 * seed,
    )
    by_prompt, noise = np.repeat(own, 2) + level, lambda size: rng.normal(0, 0.02, size)
    first = run.lineage[0]
    write_table(run.base_scores, records("base", 0.0))
    write_table(first.scores, records("a", LEARNED + by_prompt))
    write_table(run.scores, records(chain, LEARNED + 2 * by_prompt + pull + noise(PAIRS)))
    variants = parsed.last.variants
    flips = [name for name in variants if name.startswith("flip")]
    shaped = {"flipped": float(flips[0][4:]) / 100 if flips else 0.0, "train_share": 1.0}
    shaped["prompts_across_stages"] = "disjoint" if "disjoint" in variants else "shared"
    varied = ["flipped"] * bool(flips) + ["prompts_across_stages"] * ("disjoint" in variants)
    varied += ["shuffled_labels"] * ("shuffled" in variants)
    write_json(run.manifest, {"parameters": shaped, "varied": sorted(varied)})
    write_table(run.history, pd.DataFrame({"step": [1, STEPS]}))
    write_table(run.conflict, conflict(0.3 * shown, noise))
    write_table(run.ledger_pairs, ledger(-shown - by_prompt + noise(PAIRS)))
    for folder, weights in ((run.start, (0.0, 0.0)), (first.adapter, (1.0, 0.0))):
        adapter(folder, *weights)
    moved = shown + noise(1).item()
    adapter(run.adapter, 1.0 + moved, float(np.sqrt(max(0.0, 1 - moved**2))))
    return run


def conflict(matched: float, noise) -> pd.DataFrame:
    """Cosines of halves: within an objective .5, so that the corrected cosine is twice the matched one."""
    place = {"stage": 2, "previous_objective": "a", "step": np.arange(STEPS)}
    parts = [
        pd.DataFrame(place | {
            "split": split, "matched_cosine": matched + noise(STEPS), "within_cosine": 0.5 + noise(STEPS),
            "within_new_cosine": 0.5 + noise(STEPS),
        })
        for split in ("train", "probe")
    ]  # fmt: skip
    return pd.concat(parts, ignore_index=True).reindex(columns=list(CONFLICT_COLUMNS))


def ledger(change: np.ndarray) -> pd.DataFrame:
    """One stretch a pair; the direction is half of the change. Training pairs say the opposite."""
    parts = []
    for split, way in (("probe", 1), ("train", -1)):
        place = {"stage": 2, "previous_objective": "a", "split": split, "from_step": 0, "step": 4}
        ids = {"pair_id": [f"h{i}" for i in range(PAIRS)], "prompt_id": [f"r{i // 2}" for i in range(PAIRS)]}
        values = {
            "term": way * change,
            "left": way * change / 2,
            "loss_before": 0.5,
            "loss_after": 0.5 + way * change,
        }
        parts.append(pd.DataFrame(place | ids | values))
    return pd.concat(parts, ignore_index=True)[list(LEDGER_PAIR_COLUMNS)]


def study(root: Path, *, seeds=(0, 1, 2), chains=(*DIAL, *OTHERS), **planted) -> pd.DataFrame:
    shares = {chain: share for chain, (_, share) in DIAL.items()} | OTHERS
    shares |= {f"a-then-a{flip}": share for share, flip in FLIPS.items()}
    runs = [
        plant(root, chain, seed=seed, share=shares[chain], **planted) for chain in chains for seed in seeds
    ]
    return dial.roles(runs)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> pd.DataFrame:
    return study(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def calibrated(found) -> pd.DataFrame:
    return dial.calibrate(found, beta=1.0, resamples=200)


def of(table: pd.DataFrame, instrument: str) -> pd.DataFrame:
    return table[table["instrument"] == instrument].set_index("chain")


def test_roles_are_read_from_what_the_stages_were_trained_with(found, tmp_path):
    assert found["chain"].nunique() == 7 and set(found["steps"]) == {STEPS} and len(found) == 21
    for chain, (pairs, share) in DIAL.items():
        rows = found[found["chain"] == chain]
        assert set(rows["pairs"]) == {pairs} and set(rows["share"]) == {share}
    assert found[found["pairs"] == dial.OTHER]["share"].isna().all()
    chains = ["a-then-a", "a-then-a.flip100", "a-then-b"]
    small = study(tmp_path, seeds=[0], chains=chains)
    assert small["pairs"].tolist() == [dial.OTHER, dial.SEEN, dial.SEEN]
    (new, seen) = dial.absent(small)
    assert new.endswith("new pairs: no chain with 0%, 25%, 50%, 75%, 100% turned") and "s, a" in new
    assert seen.endswith("seen pairs: no chain with 25%, 50%, 75% turned")
    # other variants, more stages, and an objective without a dial are left out
    half = RunPaths(tmp_path, "smoke", "s", "a-then-a.half", 0)
    write_json(
        half.manifest,
        {"parameters": {"flipped": 0.0, "prompts_across_stages": "shared"}, "varied": ["train_share"]},
    )
    write_table(half.history, pd.DataFrame({"step": [1]}))
    runs = [*small["run"], half, half.at("a-then-a-then-a"), half.at("a.half-then-a"), half.at("a")]
    assert dial.roles(runs)["chain"].tolist() == small["chain"].tolist()
    assert dial.roles(small["run"][:1].tolist()).empty and dial.absent(dial.roles([])) == []


def test_readings_are_those_planted(calibrated):
    """Margin and movement are 1 - 2f, matched cosines .3 of it, corrected .6, the ledger minus it."""
    expected = {"margin change": 1, "matched cosine (training)": 0.3, "matched cosine (held out)": 0.3}
    expected |= {"corrected cosine (training)": 0.6, "corrected cosine (held out)": 0.6}
    expected |= {"ledger direction (nats)": -0.5, "ledger measured (nats)": -1, "movement cosine": 1}
    assert list(expected) == list(dial.INSTRUMENTS)
    for instrument, size in expected.items():
        rows = of(calibrated, instrument)
        at_half = rows.loc[
            "a-then-a.disjoint.flip50", "value"
        ]  # what seeds and prompts add, the same everywhere
        assert abs(at_half) < (0.2 if instrument.startswith(("margin", "ledger")) else 0.02)
        for chain, (_, share) in DIAL.items():
            row = rows.loc[chain]
            assert row["value"] - at_half == pytest.approx(size * (1 - 2 * share), abs=0.03)
            assert row["difference"] == pytest.approx(-2 * size * share, abs=0.03)
            assert row["value_low"] <= row["value"] <= row["value_high"] and row["seeds"] == 3
        assert rows["monotone"].iloc[0] > 0.9
        fitted = dial.INSTRUMENTS[instrument][0] * rows.loc[list(DIAL), "fitted"].to_numpy(dtype=float)
        assert (np.diff(fitted) >= 0).all()


def test_instruments_that_follow_the_share_see_its_first_step(calibrated):
    table = dial.seen(calibrated)
    assert len(table) == len(dial.INSTRUMENTS) and set(table["pairs"]) == {dial.NEW}
    assert table["first"].tolist() == [0.25] * len(table) and set(table["reading"]) == {"sees 25% turned"}


def test_blind_instruments_see_nothing_and_place_nothing(tmp_path):
    table = dial.calibrate(study(tmp_path, chains=EVERY_OTHER, blind=True), beta=1.0, resamples=200)
    by_name = dial.seen(table).set_index("instrument")
    assert by_name.loc["margin change", "first"] == 0.5 and by_name.index[0] == "margin change"
    blind = by_name.drop("margin change")
    assert blind["first"].isna().all() and set(blind["reading"]) == {"sees no share"}
    assert blind["monotone"].abs().max() < 0.9
    rows = table[table["instrument"] != "margin change"]
    assert rows["place"].isna().all() and not (rows["outside"] != "").any()
    assert dial.place_in_words(rows.iloc[0]).startswith("no place")


def test_an_instrument_that_goes_the_wrong_way_is_not_said_to_see(tmp_path):
    """Turned labels lift the margin, lower the earlier loss and align gradients: every sign exchanged."""
    table = dial.calibrate(study(tmp_path, chains=EVERY_OTHER, sign=-1), beta=1.0, resamples=200)
    by_name = dial.seen(table)
    assert by_name["first"].isna().all() and set(by_name["reading"]) == {"moves the wrong way at 50%"}
    assert (by_name["monotone"] < -0.9).all() and table["place"].isna().all()


def test_chains_of_another_objective_are_placed_where_their_readings_stand(calibrated):
    for instrument in dial.INSTRUMENTS:
        rows = of(calibrated, instrument)
        for chain, share in OTHERS.items():
            row = rows.loc[chain]
            assert row["place"] == pytest.approx(share, abs=0.03) and row["outside"] == ""
            assert row["place_low"] <= row["place"] <= row["place_high"]
        assert rows.loc[list(DIAL), "place"].isna().all()
    # where a reading is zero: at one half, but for what seeds and prompts add to a margin and to the ledger
    assert of(calibrated, "movement cosine").loc[dial.ZERO, "place"] == pytest.approx(0.5, abs=0.03)
    margin = of(calibrated, "margin change")
    assert margin.loc[dial.ZERO, "place"] > 0.52 > margin.loc["a-then-b.shuffled", "place"]
    assert dial.place_in_words(margin.loc["a-then-b"]).endswith("milder than labels at random")
    assert dial.place_in_words(margin.loc["a-then-b.shuffled"]).endswith("not told from labels at random")


def scale(readings: list[float]) -> pd.DataFrame:
    """A dial by hand: 0, .5 and 1 turned, then two chains and zero, with bounds of nothing."""
    shares = [0.0, 0.5, 1.0] + [np.nan] * (len(readings) - 3)
    table = pd.DataFrame(
        {"chain": list("abcdefg")[: len(readings)], "share": shares, "units": 3, "value": readings}
    )
    return table.assign(
        difference=table["value"] - readings[0],
        difference_p=[np.nan, 0.01, 0.01] + [np.nan] * (len(readings) - 3),
    )


def test_a_place_is_the_inverse_of_the_isotonic_line():
    """At 1, -1 and -.8 turned shares fit 1, -.9, -.9: half way down the first stretch is a quarter."""
    readings = [1.0, -1.0, -0.8, 0.05, 2.0, -3.0]
    draws = np.tile(readings, (5, 1))
    table = scale(readings)
    rows = pd.DataFrame(dial._placed(table, draws, table.index[:3], -1))
    assert rows["fitted"][:3].tolist() == pytest.approx([1.0, -0.9, -0.9])
    assert rows["place"][3:].tolist() == pytest.approx([0.25, 0.0, 1.0])
    assert rows["outside"].tolist() == ["", "", "", "", "below", "beyond"]
    assert dial.place_in_words(rows.iloc[4]).startswith("outside the scale, milder than with none turned")
    assert dial.place_in_words(rows.iloc[5]).endswith("worse than labels at random")


def test_p_values_are_corrected_over_the_shares_and_count_as_many_units_as_seeds(tmp_path, calibrated):
    rows = of(calibrated, "movement cosine").loc[list(DIAL)[1:]]
    raw = verdicts.p_value(*rows[["difference", "difference_low", "difference_high"]].to_numpy().T, df=2)
    assert rows["difference_p"].to_numpy() == pytest.approx(verdicts.holm(raw))
    assert rows["difference_p"].iloc[-1] > 1.9 * raw[-1] > 0
    few = study(tmp_path, chains=["a-then-a.disjoint", "a-then-a.disjoint.flip100"])
    alone = of(dial.calibrate(few, beta=1.0, resamples=200), "movement cosine").iloc[1]
    assert alone["difference_p"] == pytest.approx(raw[-1], rel=0.2)
    (line, _) = dial.absent(few)
    assert line.endswith("no chain with 25%, 50%, 75% turned")


def test_without_share_zero_there_is_no_scale_and_seen_pairs_are_a_dial_of_their_own(tmp_path):
    no_zero = study(
        tmp_path / "x", seeds=[0, 1], chains=["a-then-a.disjoint.flip25", "a-then-a.disjoint.flip50"]
    )
    empty = dial.calibrate(no_zero, beta=1.0, resamples=50)
    assert empty.empty and dial.seen(empty).empty
    both = study(tmp_path / "y", seeds=[0, 1], chains=[*EVERY_OTHER, "a-then-a", "a-then-a.flip100"])
    table = dial.calibrate(both, beta=1.0, resamples=50)
    sizes = table[table["instrument"] == "margin change"].groupby("pairs")["chain"].apply(list)
    assert sizes[dial.NEW] == [*EVERY_OTHER, dial.ZERO] and sizes[dial.SEEN] == [
        "a-then-a",
        "a-then-a.flip100",
        dial.ZERO,
    ]


def test_one_seed_has_intervals_over_prompts_and_none_for_the_one_movement(tmp_path):
    table = dial.calibrate(study(tmp_path, seeds=[0], chains=EVERY_OTHER), beta=1.0, resamples=200)
    moved = of(table, "movement cosine")
    assert (
        moved["value"].notna().all()
        and moved["value_low"].isna().all()
        and moved["difference_p"].isna().all()
    )
    by_name = dial.seen(table).set_index("instrument")
    assert by_name.loc["movement cosine", "reading"].startswith("cannot be decided")
    assert (
        by_name.loc["margin change", "first"] == 0.5 and by_name.loc["margin change", "units"] == PAIRS // 2
    )
    assert by_name.loc["matched cosine (held out)", "units"] == STEPS


def test_seeds_that_disagree_widen_the_interval_of_a_difference(tmp_path, calibrated):
    """Seed 1 runs the other way: no difference is clear over the two seeds."""
    runs = [plant(tmp_path, c, seed=s, share=DIAL[c][1], sign=1 - 2 * s) for c in EVERY_OTHER for s in (0, 1)]
    table = dial.calibrate(dial.roles(runs), beta=1.0, resamples=200)
    assert dial.seen(table)["first"].isna().all()
    wide, narrow = (
        of(each, "margin change").loc["a-then-a.disjoint.flip100"] for each in (table, calibrated)
    )
    assert wide["difference_high"] - wide["difference_low"] > 5 * (
        narrow["difference_high"] - narrow["difference_low"]
    )


def test_a_corrected_cosine_needs_halves_that_agree(tmp_path):
    found = study(tmp_path, seeds=[0, 1], chains=EVERY_OTHER)
    for run in found["run"]:
        table = pd.read_parquet(run.conflict)
        table["within_new_cosine"] = table["step"].mod(2).map({0: 0.5, 1: -0.5})
        write_table(run.conflict, table)
    by_name = dial.seen(dial.calibrate(found, beta=1.0, resamples=200)).set_index("instrument")
    assert by_name.loc["corrected cosine (held out)", "reading"].startswith("cannot be decided")
    assert by_name.loc["matched cosine (held out)", "first"] == 0.5


def test_what_was_not_measured_is_left_out(tmp_path):
    found = study(tmp_path, seeds=[0, 1], chains=EVERY_OTHER)
    for run in found["run"]:
        for file in (run.conflict, run.ledger_pairs):
            write_table(file, pd.read_parquet(file).head(0))
    table = dial.calibrate(found, beta=1.0, resamples=50)
    assert table["instrument"].unique().tolist() == ["margin change", "movement cosine"]


def test_new_pairs_against_seen_pairs_is_a_paired_contrast(tmp_path):
    """Where both were run, with a planted margin of .3 that only the stage on seen pairs adds."""
    found = study(tmp_path, chains=[*EVERY_OTHER, "a-then-a", "a-then-a.flip100"])
    for run in found.loc[found["pairs"] == dial.SEEN, "run"]:
        table = pd.read_parquet(run.scores)
        write_table(run.scores, table.assign(chosen_logp=table["chosen_logp"] + 0.3))
    table = dial.new_minus_seen(found, beta=1.0, resamples=200)
    assert table["share"].tolist() == [0.0, 1.0] and set(table["seeds"]) == {3}
    assert table["difference"].to_numpy() == pytest.approx(-0.3, abs=0.02)
    assert (table["new"] - table["seen"]).to_numpy() == pytest.approx(table["difference"].to_numpy())
    assert (table["difference_high"] < -0.2).all() and (table["difference_p"] < 0.05).all()


def test_outcomes_fall_from_gained_to_lost(found):
    table = dial.outcomes(found, beta=1.0, resamples=200).set_index("chain")
    assert table.loc["a-then-a.disjoint", "outcome"] == "gained"
    assert table.loc["a-then-a.disjoint.flip100", "outcome"].startswith("lost")
    assert table.loc["a-then-b", "share"] != table.loc["a-then-b", "share"]
    assert table["learned"].to_numpy() == pytest.approx(table["learned"].iloc[0])


def test_the_force_is_minus_the_derivative_of_the_mixed_loss_and_vanishes_as_foretold(found):
    margin, step = pd.Series([-1.0, 0.0, 0.7, 2.0]), 1e-6

    def loss(at: pd.Series, share: float) -> pd.Series:
        return (1 - share) * metrics.dpo_loss(at) + share * metrics.dpo_loss(-at)

    for share in dial.SHARES:
        slope = (loss(margin + step, share) - loss(margin - step, share)) / (2 * step)
        assert dial.force(margin, share) == pytest.approx(-slope.to_numpy(), abs=1e-8)
    (row,) = dial.foretold(found, beta=1.0).to_dict("records")
    assert (
        row["seeds"] == 3
        and 0.2 < row["share"] < 0.5
        and row["margin"] == pytest.approx(LEARNED + 0.1, abs=0.1)
    )


def test_the_figure_has_a_panel_an_instrument_and_a_tick_a_chain(calibrated):
    spec = charts.dial_panels(calibrated, caption="n = 3.").to_dict()
    rows = [row for data in spec["datasets"].values() for row in data]
    panels = {row["instrument"] for row in rows if "instrument" in row}
    assert panels == set(dial.INSTRUMENTS)
    ticks = [row for row in rows if row.get("label")]
    assert {row["label"] for row in ticks} == {"b", "b.shuffled"} and len(ticks) == 2 * len(panels)
    assert charts.static_bundle(spec)[0]["image/svg+xml"].startswith("<svg")
