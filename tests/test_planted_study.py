"""Notebooks 03 to 07, executed on a planted study: their numbers beside those computed here from the records.

What is expected follows the definitions, with numpy, pandas and scipy alone. Means have t intervals from sums
over prompts; where no formula is at hand, draws of this file's own stand in. So bounds agree up to the noise
of resampling, which is far less than what resampling pairs in place of prompts would change.
"""

import functools
import itertools
from collections.abc import Iterable
from types import SimpleNamespace

import numpy as np
import pandas as pd
import planted
import pytest
from planted import ALPHA, BACK, BASE, BETA, CHAINS, FORTH, OBJECTIVES, RANK, SEEDS, SHAM
from scipy import optimize, stats

from seqdpo_utils import metrics, models, params, redistribution, rivals, stage_data, stages, verdicts
from seqdpo_utils.chains import Chain
from seqdpo_utils.encoding import EncodedPair
from seqdpo_utils.paths import read_table

RUNS = list(itertools.product(CHAINS, SEEDS))
FATES = {FORTH: "lost: partial", SHAM: "lost: reversal", BACK: "gained"}
VERDICTS = {(FORTH, 0): "opposed", (FORTH, 1): "opposed", (BACK, 0): "aligned", (BACK, 1): "aligned"}
SPLITS = {"train": "training pairs", "probe": "held-out pairs"}
SIDES = ("chosen", "rejected")
DECIDING = ("learned", "end", "over_lower", "over_upper")
KEYS = {
    "stage1_margin": ("margin_before", "margin_change"),
    "cross_seed": ("margin_before", "margin_change"),
    "stage1_policy_margin": ("before", "change"),
    "base": ("base", "change"),
}
every_run = pytest.mark.parametrize(("chain", "seed"), RUNS)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> planted.Planted:
    return planted.plant(tmp_path_factory.mktemp("planted"))


# ---- the definitions once more ----


def ends(chain: str) -> tuple[str, str]:
    """The objective of the first stage, which is also that stage's name, and the other one."""
    first = chain.partition("-then-")[0]
    return first, next(name for name in OBJECTIVES if name != first)


def held(study, seed: int, node: str, objective: str) -> pd.DataFrame:
    """Records of the held-out pairs of an objective at a node, by pair."""
    table = study.records[seed, node]
    return table[(table["objective"] == objective) & (table["split"] == "eval")].set_index("pair_id")


def asked(study, objective: str, runs: int = 1) -> np.ndarray:
    """The prompt of every held-out pair, once for each run."""
    return np.tile(held(study, 0, BASE, objective)["prompt_id"].to_numpy(), runs)


def margin(study, seed: int, node: str, objective: str) -> pd.Series:
    now, base = held(study, seed, node, objective), held(study, seed, BASE, objective)
    chosen, rejected = (now[f"{side}_logp"] - base[f"{side}_logp"] for side in SIDES)
    return BETA * (chosen - rejected)


def policy(study, seed: int, node: str, objective: str) -> pd.Series:
    chosen, rejected = (
        held(study, seed, node, objective).eval(f"{side}_logp / {side}_tokens") for side in SIDES
    )
    return chosen - rejected


def over_seeds(study, node: str, objective: str) -> pd.Series:
    """Margins at a node, seed 0 above seed 1."""
    return pd.concat([margin(study, seed, node, objective) for seed in SEEDS])


def wider(clusters: int) -> float:
    """Student's t instead of a normal's quantile, and n - 1 instead of n."""
    return stats.t.ppf(0.975, clusters - 1) / stats.norm.ppf(0.975) * (clusters / (clusters - 1)) ** 0.5


def error(values: np.ndarray, labels: np.ndarray) -> float:
    """Standard error of a mean whose pairs come in clusters, as wide as an interval has to be."""
    sums = pd.Series(values - values.mean()).groupby(labels).sum()
    return wider(len(sums)) * (sums**2).sum() ** 0.5 / len(values)


def interval(values: Iterable, prompts: np.ndarray) -> np.ndarray:
    """The 95 % interval of a mean over prompts, and over two seeds where the pairs of two runs are given."""
    values = np.asarray(values, dtype=float)
    deviation = error(values, prompts)
    reach = stats.norm.ppf(0.975) * deviation
    if len(values) == 2 * planted.PAIRS:
        # of two seeds a quarter of the draws takes the one twice, a quarter the other
        jump = 2**0.5 * error(values, np.repeat(SEEDS, planted.PAIRS))

        def beyond(x: float) -> float:
            tails = stats.norm.sf(np.array([x, x - jump, x + jump]) / deviation)
            return tails @ [0.5, 0.25, 0.25] - 0.025

        reach = optimize.brentq(beyond, 0, jump + 9 * reach)
    return values.mean() + np.array([-reach, reach])


def triple(row: pd.Series, name: str) -> list[float]:
    return [float(row[f"{name}{end}"]) for end in ("", "_low", "_high")]


def near(row: pd.Series, name: str, values: Iterable, prompts: np.ndarray, share: float = 0.125) -> None:
    """The number is the mean to the last digits; its bounds are ours up to a share of the interval.

    Of a share of pairs, which is far from normal where nearly all or none have won, draws are taken.
    """
    values = np.asarray(values, dtype=float)
    bounds, (found, *theirs) = interval(values, prompts), triple(row, name)
    if np.isin(values, (0, 0.5, 1)).all() and values.any():
        away = wider(len(set(prompts))) * (values - values.mean()) / len(values)
        won = values.mean() + np.array([away[at].sum() for at in resampled(prompts, 400)])
        bounds = np.quantile(won.clip(0, 1), [0.025, 0.975])
    assert found == pytest.approx(values.mean(), abs=1e-9), name
    assert theirs == pytest.approx(bounds, abs=share * np.ptp(bounds) + 1e-9), name


def resampled(prompts: np.ndarray, draws: int) -> list[np.ndarray]:
    """Places of the pairs of drawn prompts, an array a draw."""
    rng, places = np.random.default_rng(9), list(pd.Series(prompts).groupby(prompts).indices.values())
    return [
        np.concatenate([places[k] for k in rng.integers(len(places), size=len(places))]) for _ in range(draws)
    ]


def spread(draws: Iterable, point: np.ndarray, by: float = 1.0) -> np.ndarray:
    """Bounds of draws about a point, widened: (2, ...)."""
    return np.quantile(point + by * (np.array(list(draws)) - point), [0.025, 0.975], axis=0)


def close(found: Iterable, bounds: np.ndarray, share: float = 0.2) -> bool:
    """Whether bounds agree up to a share of the interval."""
    return list(found) == pytest.approx(list(bounds), abs=share * np.ptp(bounds))


def told(values: Iterable, digits: int = 2) -> str:
    """A number with its interval as a page writes it."""
    values = list(values)
    while digits < 4 and any(x and not round(x, digits) for x in values):
        digits += 1
    return "{:+z.{d}f} ({:+z.{d}f} to {:+z.{d}f})".format(*values, d=digits)


def student(values: Iterable, level: float = 0.95) -> tuple[float, float, float]:
    """Mean and t interval of independent values."""
    values = np.asarray(values, dtype=float)
    reach = stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values)
    return values.mean(), values.mean() - reach, values.mean() + reach


# ---- 04 ----


@every_run
def test_the_stage_matrix(study, chain, seed):
    table = study.table("04", "stage_matrix", chain, seed).set_index(["checkpoint", "objective"])
    assert sorted(table.index) == sorted(itertools.product((BASE, ends(chain)[0], chain), OBJECTIVES))
    assert set(table["n_pairs"]) == {sum(planted.PAIRS_OF_PROMPT)}
    assert set(table["n_prompts"]) == {len(planted.PAIRS_OF_PROMPT)}
    for (node, objective), row in table.iterrows():
        prompts = asked(study, objective)
        gained, own = margin(study, seed, node, objective), policy(study, seed, node, objective)
        near(row, "margin", gained, prompts)
        near(row, "policy_margin", own, prompts)
        near(row, "policy_accuracy", own > 0, prompts, 0.2)
        if node == BASE:
            assert pd.isna(row["relative_accuracy"])
        else:
            near(row, "relative_accuracy", gained > 0, prompts, 0.2)


@every_run
def test_the_labels_that_are_not_wrong(study, chain, seed):
    """Without the pairs of prompts whose label is known to be wrong; where nothing is known, no row."""
    both = study.page("04", chain, seed).names["both"].set_index(["checkpoint", "objective"])
    prompts, noisy = asked(study, "safe"), [*planted.NOISY["wrong"], *planted.NOISY["undecided"]]
    sound = ~np.isin(prompts, noisy)
    assert list(both.index) == [(node, "safe") for node in (BASE, ends(chain)[0], chain)]
    for (node, _), row in both.iterrows():
        values = margin(study, seed, node, "safe")
        near(row, "margin", values, prompts)
        row = row.rename({f"margin{end}_sound": f"sound{end}" for end in ("", "_low", "_high")})
        near(row, "sound", values[sound], prompts[sound])
        assert row["n_pairs_sound"] == sound.sum() < row["n_pairs"]


@every_run
def test_transfer(study, chain, seed):
    first, second = ends(chain)
    table = study.table("04", "transfer", chain, seed).set_index(["objective", "quantity"])
    table.columns = ["stage", "checkpoint", "x", "x_low", "x_high", "note"]
    (one, end), other = ([margin(study, seed, node, k) for node in (first, chain)] for k in (first, second))
    expected = {(first, "learned"): one, (first, "backward transfer"): end - one}
    expected |= {(first, "forgetting"): one - end, (first, "D(0)"): end}
    expected |= {(first, "D(0.9)"): end - 0.9 * one, (first, "D(1.1)"): end - 1.1 * one}
    expected |= {(second, "learned"): other[1] - other[0], (second, "forward transfer"): other[0]}
    assert set(table.index) == {*expected, (first, "retention")}
    for key, values in expected.items():
        near(table.loc[key], "x", values, asked(study, key[0]))
    both = np.stack([end, one])
    drawn = [both[:, at] - both.mean(axis=1, keepdims=True) for at in resampled(asked(study, first), 400)]
    drawn = [both.mean(axis=1) + wider(16) * away.sum(axis=1) / planted.PAIRS for away in drawn]
    share, *bounds = triple(table.loc[(first, "retention")], "x")
    assert share == pytest.approx(end.mean() / one.mean())
    assert close(bounds, spread((a / b for a, b in drawn), np.array(0.0)))


@every_run
def test_the_sentences_of_the_evaluation(study, chain, seed):
    (first, second), text = ends(chain), study.page("04", chain, seed).text
    rows = study.table("04", "transfer", chain, seed).set_index(["objective", "quantity"])
    said = {key: told(map(float, row)) for key, row in rows[["value", "low", "high"]].iterrows()}
    for name in OBJECTIVES:
        learned = "was learned" if rows.loc[(name, "learned"), "low"] > 0 else "was not shown to be learned"
        (line,) = (line for line in text.splitlines() if f": **{name}** {learned}" in line)
        assert line.endswith(f"change of margin {said[name, 'learned']}.")
    sentence = f"* The later stages changed **{first}** by {said[first, 'backward transfer']} and left "
    sentence += f"{said[first, 'D(0)']}; D(1 − δ) is {said[first, 'D(0.9)']}, D(1 + δ) "
    sentence += f"{said[first, 'D(1.1)']}, with δ = 0.1. By the rule: **{FATES[chain]}**. "
    assert f"{sentence}The last stage's own {second} " in text
    assert f": {said[second, 'learned']}.\n" in f"{text}\n"
    assert ("In grey" in text) == (chain == FORTH)
    if chain == FORTH:
        ghost = margin(study, seed, SHAM, first).mean()
        assert f"With shuffled labels in place of the last stage **{first}** ends at {ghost:+.2f} (" in text


# ---- 05 ----


def changes(study, chain: str, seed: int) -> pd.DataFrame:
    """Both margins of the pairs of a chain's first objective; the band within which rounding may move one."""
    first, _ = ends(chain)
    one, end = (margin(study, seed, node, first) for node in (first, chain))
    base, before, after = (policy(study, seed, node, first) for node in (BASE, first, chain))
    table = {"margin_before": one, "margin_after": end, "margin_change": end - one}
    table |= {"base": base, "before": before, "after": after, "change": after - before}
    tokens = held(study, seed, BASE, first)[["chosen_tokens", "rejected_tokens"]]
    rms = (planted.NOISE[seed] or {"rms": 0.0})["rms"]
    band = 3 * rms * (2 * (1 / tokens).sum(axis=1) / tokens.to_numpy().mean()) ** 0.5
    return pd.DataFrame(table).assign(within=band.clip(lower=0.01), prompt_id=asked(study, first))


@every_run
def test_every_change_of_a_pair(study, chain, seed):
    table = study.table("05", "pair_change", chain, seed).set_index("pair_id")
    own = changes(study, chain, seed).reindex(table.index)
    pd.testing.assert_frame_equal(table[own.columns], own, check_dtype=False)
    assert set(table["objective"]) == {ends(chain)[0]}
    way = own["change"].where(own["change"].abs() > own["within"], 0).map(np.sign)
    assert table["effect"].tolist() == way.map({1: "helped", 0: "unchanged", -1: "harmed"}).tolist()
    order = (own["after"] > 0).astype(int) - (own["before"] > 0)
    assert table["reordered"].tolist() == order.map({1: "gained", 0: "same", -1: "lost"}).tolist()
    if chain == FORTH:
        ghost = study.page("05", chain, seed).names["ghosts"]["shuffled labels"]["safe"].set_index("pair_id")
        sham = changes(study, SHAM, seed).reindex(ghost.index)
        pd.testing.assert_frame_equal(ghost[own.columns], sham, check_dtype=False)


@every_run
def test_the_sentences_of_the_pairs(study, chain, seed):
    pairs, text = changes(study, chain, seed), study.page("05", chain, seed).text
    helped, harmed = ((sign * pairs["change"] > pairs["within"]).mean() for sign in (1, -1))
    assert f"* {helped:.0%} of the pairs were helped, {harmed:.0%} harmed" in text
    right, still = pairs["before"] > 0, pairs["after"] > 0
    gained, lost = (still & ~right).sum(), (right & ~still).sum()
    churn = (gained + lost) / len(pairs)
    assert f"* {gained} gained the right order, {lost} lost it: {churn:.0%} of all {len(pairs)}." in text
    against = (np.sign(pairs["margin_change"]) != np.sign(pairs["change"])).mean()
    assert f"have opposite signs in {against:.0%} of the pairs" in text
    summed, mean = np.sign(pairs["margin_before"]) != np.sign(pairs["margin_after"]), right != still
    counts = [(summed & ~mean).sum(), (mean & ~summed).sum(), (summed & mean).sum()]
    said = "alone changed sign in {}, the policy margin alone in {}, both in {} of".format(*counts)
    assert said in text and f"correlate at {pairs['before'].corr(pairs['base']):.3f}" in text


def quarters(key: pd.Series, change: pd.Series) -> np.ndarray:
    """Mean change in four groups of equal weight, lowest key first; a pair on a cut stands in both."""
    sorted_change = np.asarray(change)[np.argsort(np.asarray(key), kind="stable")]
    place, cuts = np.arange(len(sorted_change)), np.arange(5) * len(sorted_change) / 4
    shares = [
        np.clip(np.minimum(place + 1, high) - np.maximum(place, low), 0, 1)
        for low, high in itertools.pairwise(cuts)
    ]
    return np.array([share @ sorted_change / share.sum() for share in shares])


def reversion(sorts: pd.DataFrame, moved: pd.DataFrame, key: str) -> np.ndarray:
    """The change of each quarter, were all that both runs share of what stage 1 did luck, and now lost."""
    if key == "base":
        return np.zeros(4)
    own = KEYS[key][0]
    done = [t["margin_before"] if own == "margin_before" else t["before"] - t["base"] for t in (sorts, moved)]
    away = sorts[own] - sorts[own].mean()
    return -np.cov(*done)[0, 1] / away.var() * quarters(away, away)


@every_run
def test_quartiles(study, chain, seed):
    table = study.table("05", "quartiles", chain, seed).set_index(["key", "quartile"])
    pairs, text = changes(study, chain, seed), study.page("05", chain, seed).text
    assert set(table.index) == set(itertools.product(set(KEYS) - {"cross_seed"}, (1, 2, 3, 4)))
    drawn = [pairs.iloc[at] for at in resampled(pairs["prompt_id"].to_numpy(), 200)]
    for key in table.index.unique("key"):
        sorts, moves = KEYS[key]
        means, luck = quarters(pairs[sorts], pairs[moves]), reversion(pairs, pairs, key)
        rows = table.loc[key]
        assert rows["change"].tolist() == pytest.approx(means.tolist())
        assert rows["regression"].tolist() == pytest.approx(luck.tolist())
        bounds = spread((quarters(drew[sorts], drew[moves]) for drew in drawn), means, wider(8))
        theirs = rows[["change_low", "change_high"]].to_numpy().T
        assert all(close(theirs[:, k], bounds[:, k], 0.3) for k in range(4)), key
        assert np.ptp(theirs, axis=0).mean() == pytest.approx(np.ptp(bounds, axis=0).mean(), rel=0.15), key
        sentence = f"highest quartile minus lowest by `{key}`: {means[3] - means[0]:+z.3f} ("
        (line,) = (line for line in text.splitlines() if sentence in line)
        bound = min(luck[3] - luck[0], 0.0)
        assert f"reaches to {bound:+.3f}" in line if bound else "reaches" not in line


@every_run
def test_what_was_kept_of_what_was_learned(study, chain, seed):
    page, pairs = study.page("05", chain, seed), changes(study, chain, seed)
    (row,) = page.names["patterns"]
    ends_of = pairs[["margin_before", "margin_after"]]
    line = np.polyfit(*ends_of.to_numpy().T, 1)
    drawn = resampled(pairs["prompt_id"].to_numpy(), 300)
    bounds = spread((np.polyfit(*ends_of.to_numpy()[at].T, 1) for at in drawn), line, wider(16))
    for k, name in enumerate(("slope", "intercept")):
        found, *theirs = triple(row, name)
        assert found == pytest.approx(line[k]) and close(theirs, bounds[:, k])
        assert f"{name} {told(triple(row, name))}" in page.text


# ---- 03 and 06 ----


def cosines(study, chain: str, seed: int, split: str) -> pd.DataFrame:
    """Matched, within the old and within the new objective, of the measurements that have all three."""
    table = study.conflict[seed, chain].query("split == @split")
    return table[["matched_cosine", "within_cosine", "within_new_cosine"]].astype(float).dropna()


def ledger(study, chain: str, seed: int, split: str) -> pd.DataFrame:
    """Direction, curvature and measured change of every pair over the whole stage."""
    table = study.ledger_pairs[seed, chain].query("split == @split")
    parts = {"left": table["left"], "curvature": table["term"] - table["left"]}
    parts["measured"] = table["loss_after"] - table["loss_before"]
    return pd.DataFrame(parts).groupby([table["prompt_id"], table["pair_id"]]).sum()


@pytest.mark.parametrize("split", SPLITS)
@every_run
def test_the_gradients(study, chain, seed, split):
    page, halves, (first, _) = study.page("06", chain, seed), cosines(study, chain, seed, split), ends(chain)
    across, old, new = (told(student(halves[name], 0.99)) for name in halves)
    sentence = f"* Stage 2 against **{first}**, {SPLITS[split]}, n = {len(halves)}: matched {across}; within "
    (line,) = (line for line in page.text.splitlines() if line.startswith(sentence))
    assert f"the old objective {old}, within the new one {new}. Verdict: **" in line
    if split == "probe" and (chain, seed) in VERDICTS:
        assert f"**{VERDICTS[chain, seed]}**" in line
    if chain == FORTH:
        sham = cosines(study, SHAM, seed, split)["matched_cosine"]
        assert f"With shuffled labels: {told(student(sham, 0.99))}." in line
    estimate, *bounds = page.names["verdicts"][2, first, split]["corrected"]
    cross, *same = halves.mean()
    assert estimate == pytest.approx(cross / (same[0] * same[1]) ** 0.5) and len(halves) == 5
    means = halves.to_numpy()[np.random.default_rng(3).integers(5, size=(3000, 5))].mean(axis=1).T
    reach = stats.t.ppf(0.995, 4) * (means[0] / (means[1] * means[2]) ** 0.5).std() * (5 / 4) ** 0.5
    assert bounds == pytest.approx([estimate - reach, estimate + reach], abs=0.1 * reach)


@pytest.mark.parametrize("split", SPLITS)
@every_run
def test_the_ledger(study, chain, seed, split):
    page, pairs, (first, _) = study.page("06", chain, seed), ledger(study, chain, seed, split), ends(chain)
    bottom = study.table("06", "ledger", chain, seed).set_index("split").loc[split]
    parts = study.table("06", "ledger_parts", chain, seed).query("split == @split").set_index("control")
    left, curvature, measured = pairs.mean()
    rest, explained = measured - left - curvature, left + curvature
    expected = {"left": left, "curvature": curvature, "explained": explained, "measured": measured}
    expected |= {"rest": rest, "share": explained / measured, "segments": 2}
    stretches = study.ledger_pairs[seed, chain].query("split == @split").groupby("step")
    expected["path"] = stretches[["loss_before", "loss_after"]].mean().diff(axis=1).iloc[:, 1].abs().sum()
    assert bottom[list(expected)].tolist() == pytest.approx(list(expected.values()))
    sentence = f"* Ledger of **{first}**, stage 2, 5 {SPLITS[split]}: direction {left:+.4f}, curvature "
    sentence += f"{curvature:+.4f}; explained {explained:+.4f}, measured {measured:+.4f}, rest {rest:+.4f}"
    assert f"{sentence} nats" in page.text
    prompts = pairs.groupby("prompt_id").mean()
    for name in prompts:
        assert triple(parts.loc[""], name) == pytest.approx(student(prompts[name])), name
    assert parts.loc["", ["n_pairs", "n_prompts"]].tolist() == [5, 3]
    if chain == FORTH:
        sham = ledger(study, SHAM, seed, split)
        beyond = [told(student(column)) for _, column in (pairs - sham).groupby("prompt_id").mean().items()]
        said = "direction {}, curvature {}, measured {} nats.".format(*beyond)
        assert f"* {first}, {SPLITS[split]}, n = 5: {said}" in page.text
        ghost = sham.groupby("prompt_id").mean()["measured"].mean()
        assert parts.loc["shuffled labels", "measured"] == pytest.approx(ghost)


def dense(study, seed: int, nodes: list[str]) -> list[dict[tuple[int, str], np.ndarray]]:
    """Moves from adapter to adapter in weight space, by layer and module, as whole matrices."""
    at = [
        {
            (int(name.split(".")[2]), name.rpartition(".")[2]): ALPHA / RANK * b @ a
            for name, (a, b) in study.adapters[seed, node].items()
        }
        for node in nodes
    ]
    return [{place: two[place] - one[place] for place in one} for one, two in itertools.pairwise(at)]


def angle(one: Iterable[np.ndarray], two: Iterable[np.ndarray]) -> tuple[float, float, float]:
    """Both norms, and the cosine."""
    u, v = (np.concatenate([np.ravel(part) for part in move]) for move in (one, two))
    norms = np.linalg.norm(u), np.linalg.norm(v)
    return (*norms, u @ v / norms[0] / norms[1])


def turn(study, seed: int, chain: str) -> tuple[float, float, float]:
    """The first move of a chain against the last, whole adapter, in weight space."""
    return angle(*(move.values() for move in dense(study, seed, [BASE, ends(chain)[0], chain])))


@every_run
def test_the_moves_of_the_adapter(study, chain, seed):
    (first, _), page = ends(chain), study.page("06", chain, seed)
    table, moves = study.table("06", "movement", chain, seed), dense(study, seed, [BASE, first, chain])
    for row in table[table["space"] == "weight"].itertuples():
        here = [(k, m) for k, m in planted.PARTS if pd.isna(row.layer) or row.layer == k]
        here = [(k, m) for k, m in here if pd.isna(row.module) or row.module == m]
        expected = angle(*([move[place] for place in here] for move in moves))
        assert (row.norm, row.other_norm, row.cosine) == pytest.approx(expected)
    assert len(table) == 2 * (1 + 2 + 2 + 4)
    at = [[m for pair in study.adapters[seed, node].values() for m in pair] for node in (BASE, first, chain)]
    raw = angle(*([b - a for a, b in zip(*both, strict=True)] for both in itertools.pairwise(at)))[2]
    (far, other, cosine), beside = turn(study, seed, chain), "no control was run"
    if chain == FORTH:
        sham = turn(study, seed, SHAM)[2]
        beside = f"shuffled labels {sham:+.2f}"
        assert f"Real minus shuffled: {cosine - sham:+.3f}" in page.text
    sentence = f"moved {other / far:.2f} times as far as the first in weight space, at a cosine of "
    assert f"{sentence}{cosine:+.2f} ({beside}), in raw coordinates {raw:+.3f}" in page.text


@every_run
def test_the_directions_that_moves_share(study, chain, seed):
    moves = dense(study, seed, [BASE, ends(chain)[0], chain])
    table = study.table("06", "subspace", chain, seed)
    assert len(table) == 2 * len(planted.PARTS)
    for row in table.itertuples():
        left, _, right = zip(*(np.linalg.svd(move[row.layer, row.module]) for move in moves), strict=True)
        one, two = (u[:, :RANK] for u in left) if row.side == "left" else (v[:RANK].T for v in right)
        assert row.overlap == pytest.approx(np.linalg.norm(one.T @ two) ** 2 / RANK)
        assert row.random == RANK / len(one)


@every_run
def test_displaced_likelihood_and_drift(study, chain, seed):
    (first, _), page = ends(chain), study.page("06", chain, seed)
    table = study.table("06", "displacement", chain, seed)
    table = table.set_index(["objective", "from_checkpoint", "to_checkpoint"])
    moves = [(BASE, first), (BASE, chain), (first, chain)]
    assert sorted(table.index) == sorted((name, *move) for name in OBJECTIVES for move in moves)
    for (objective, start, end), row in table.iterrows():
        was, now = (held(study, seed, node, objective)[[f"{s}_logp" for s in SIDES]] for node in (start, end))
        moved = now - was
        for side in SIDES:
            near(row, side, moved[f"{side}_logp"], asked(study, objective))
        near(row, "both_fell", (moved < 0).all(axis=1), asked(study, objective), 0.2)
    last = table.loc[(first, first, chain)]
    sentence = "chosen {}, rejected {} nats; both".format(*(told(triple(last, side), 1) for side in SIDES))
    assert f"{sentence} fell in {last['both_fell']:.0%} of the pairs." in page.text
    drift = study.table("06", "kl", chain, seed).set_index(["checkpoint", "objective"])
    assert sorted(drift.index) == sorted(itertools.product((first, chain), OBJECTIVES))
    for (node, objective), row in drift.iterrows():
        rows = study.kl[seed, node]
        rows = rows[rows["objective"] == objective]
        middle, low, _ = student(rows.groupby("prompt_id")["kl"].mean())
        mean, reach = rows["kl"].mean(), middle - low
        assert triple(row, "kl") == pytest.approx([mean, mean - reach, mean + reach]) and row["n_pairs"] == 3
    assert "largest on **safe**" in page.text


@every_run
def test_length_foretells_as_much_as_is_there(study, chain, seed):
    (first, _), page = ends(chain), study.page("06", chain, seed)
    table = study.table("06", "length", chain, seed).set_index("objective")
    for objective, row in table.iterrows():
        prompts, own = asked(study, objective), policy(study, seed, chain, objective)
        longer = held(study, seed, chain, objective).eval("chosen_tokens - rejected_tokens")
        moved = own - policy(study, seed, first, objective)
        rank, *bounds = triple(row, "spearman")
        assert rank == pytest.approx(stats.spearmanr(longer, moved)[0])
        ranks = (stats.spearmanr(longer.iloc[at], moved.iloc[at])[0] for at in resampled(prompts, 100))
        assert close(bounds, spread(ranks, np.array(0.0)))
        near(row, "longer_chosen", (longer > 0) + 0.5 * (longer == 0), prompts, 0.2)
        near(row, "policy_accuracy", own > 0, prompts, 0.2)
    row = table.loc[first]
    sentence = f"{planted.PAIRS} {first} pairs: rank correlation {told(triple(row, 'spearman'))}; "
    sentence += f'"the longer one" is right in {row["longer_chosen"]:.0%}, the model in '
    sentence += f"{row['policy_accuracy']:.0%}."
    assert sentence in page.text


def labels(study, *splits: str) -> np.ndarray:
    """Of the two answers that both objectives label, whether they have one label."""
    winners = [
        {tuple(sorted(row[-2:])): row.chosen for row in table.itertuples() if row.split in splits}
        for table in study.data.values()
    ]
    return np.array([winners[0][key] == winners[1][key] for key in winners[0].keys() & winners[1].keys()])


def test_labels_and_prompts_in_common(study):
    page, agree = study.page("06", FORTH, 0), labels(study, "eval", "train", "probe")
    found = page.names["agreement"].iloc[0]
    assert (found["shared"], found["agree"]) == (len(agree), agree.mean()) and 0 < agree.mean() < 1
    asked_in = [set(table.query("split == 'train'")["prompt_id"]) for table in study.data.values()]
    words = f"Of the {len(asked_in[0])} training prompts of the last stage's objectives "
    assert f"{words}{len(asked_in[0] & asked_in[1])} are" in page.text


def test_a_later_stage_looks_back_at_the_earlier_objective(study, monkeypatch):
    """Its rows carry the labels, ids and base sums of the earlier objective, training and held-out pairs."""
    monkeypatch.setattr(stage_data, "check_fingerprints", lambda *_, **__: {})

    def of_one_length(_, table: pd.DataFrame) -> list[EncodedPair]:
        counts = table[["chosen_tokens", "rejected_tokens"]].to_numpy()
        return [EncodedPair([1], [2] * chosen, [3] * rejected) for chosen, rejected in counts]

    monkeypatch.setattr(stage_data, "encode_table", of_one_length)
    given = {"seed": 0, "beta": BETA, "train_share": 1.0, "flipped": 0.0, "shuffled_labels": False}
    # train_share was another one in the stage before
    varied = params.Parameters.model_construct(**(given | {"train_share": 0.5, "lambdas": None}))
    for chain in (FORTH, BACK):
        data = stage_data.prepare_stage(planted.ROOT, study.run(chain, 0), None, parameters=varied)
        first, second = ends(chain)
        assert set(data.reference["objective"]) == {second}
        assert set(data.earlier) == {(first, "train"), (first, "probe")}
        for (objective, split), rows in data.earlier.items():
            base = study.records[0, BASE].set_index(["objective", "split"]).loc[(objective, split)]
            assert rows["pair_id"] == base["pair_id"].tolist()
            assert rows["ref_chosen_logps"] == base["chosen_logp"].tolist()


def test_the_optimiser_is_told_what_the_parameters_say(tmp_path):
    given = params.resolve(planted.ROOT, scale="smoke", setting=planted.SETTING)
    odd = {"max_grad_norm": 0.37, "learning_rate": 0.0123, "epochs": 3, "beta": 0.41, "label_smoothing": 0.07}
    config = stages.dpo_config(given.model_copy(update=odd), pairs=8, output_dir=tmp_path)
    found = {
        name: getattr(config, name) for name in ("max_grad_norm", "learning_rate", "beta", "label_smoothing")
    }
    assert found | {"epochs": config.num_train_epochs} == odd
    assert config.weight_decay == 0, "what was learned must not fade of itself"


@pytest.fixture
def later_stage(study, monkeypatch) -> planted.Page:
    """Notebook 03 with a stage that is not trained: all that it would measure was planted."""
    run, nothing = study.run(FORTH, 0), pd.DataFrame({"sums": [1.0]})
    tables = {name: read_table(getattr(run, name)) for name in ("conflict", "ledger", "ledger_pairs")}
    trainer = SimpleNamespace(**{f"{name}_table": lambda t=table: t for name, table in tables.items()})
    scored = pd.concat([study.records[0, BASE], study.records[0, FORTH]], ignore_index=True)
    made = {"begin_stage": trainer, "prove_reference": nothing, "train": None, "score_stage": scored}
    made |= {"score_within": nothing.head(0)}
    monkeypatch.setattr(stage_data, "prepare_stage", lambda *_, **__: SimpleNamespace(rows=[0] * 8))
    made |= {"history_table": planted.history(np.random.default_rng(0)), "measure_drift": study.kl[0, FORTH]}
    made |= {"save_stage": {"adapter_sha256": "0" * 64}}
    monkeypatch.setattr(models, "load_tokenizer", lambda *_, **__: None)
    for name, value in made.items():
        monkeypatch.setattr(stages, name, lambda *_, value=value, **__: value)
    return study.page("03", FORTH, 0)


def test_the_page_of_a_later_stage(study, later_stage):
    text = later_stage.text
    for split, words in SPLITS.items():
        halves = [told(student(column, 0.99)) for _, column in cosines(study, FORTH, 0, split).items()]
        said = "{}, within the old objective {}, within the new one {}".format(*halves)
        assert f"against safe, {words}, {said}" in text
        prompts = ledger(study, FORTH, 0, split).groupby("prompt_id").mean()
        sentence = (
            f"* Ledger, 5 {words} of safe: the loss changed by {told(student(prompts['measured']), 3)} "
        )
        direction, curvature, _ = prompts.mean()
        assert f"{sentence}nats; direction {direction:+.3f}, curvature {curvature:+.3f}." in text
    assert "those of safe on held-out pairs: **opposed**" in text
    for objective, row in later_stage.names["summary"].iterrows():
        trained = study.data[objective]["split"].eq("train").sum()
        values = [*margin(study, 0, FORTH, objective), *[50.0] * trained]
        expected = [np.mean(values), np.std(values, ddof=1), len(values)]
        assert row[["mean", "std", "size"]].tolist() == pytest.approx(expected)


# ---- 07 ----


def adjusted(table: pd.DataFrame, name: str) -> list[float]:
    """p of a mean of zero from its interval (two seeds: one degree of freedom), after Holm's correction."""
    value, low, high = (table[f"{name}{end}"].to_numpy(dtype=float) for end in ("", "_low", "_high"))
    ratio = abs(value) / np.where(value > 0, value - low, high - value)
    p, highest = 2 * stats.t.sf(stats.t.ppf(0.975, 1) * ratio, 1), 0.0
    for left, k in zip(range(len(p), 0, -1), np.argsort(p), strict=True):
        highest = p[k] = max(highest, min(left * p[k], 1.0))
    return p.tolist()


def rule(learned: int, end: int, lower: int, upper: int) -> str:
    """The outcome rule, from the sides of zero on which R1, D(0), D(0.9) and D(1.1) clearly lie."""
    if learned <= 0:
        return "not learned"
    if lower < 0:
        return {0: "lost, extent open", 1: "lost: partial", -1: "lost: reversal"}[end]
    if upper > 0:
        return "gained"
    return {(1, -1): "stable", (0, -1): "not gained", (1, 0): "not lost", (0, 0): "undecided"}[lower, upper]


def side(row: pd.Series, name: str) -> int:
    return int(row[f"{name}_low"] > 0) - int(row[f"{name}_high"] < 0)


def fate(one: pd.Series, end: pd.Series) -> dict[str, pd.Series]:
    """What decides what became of an objective, pair by pair."""
    found = {"learned": one, "backward": end - one, "end": end}
    return found | {"over_lower": end - 0.9 * one, "over_upper": end - 1.1 * one}


def churned(study, chain: str, seed: int) -> tuple[pd.Series, pd.Series]:
    """Which pairs changed sides after stage 1; and that, less which stand otherwise in the other seed."""
    first, _ = ends(chain)
    here, there, end = (
        policy(study, *at, first) > 0 for at in ((seed, first), (1 - seed, first), (seed, chain))
    )
    moved = (here != end).astype(float)
    return moved, moved - (here != there)


def test_the_ends_and_the_overview(study):
    table = study.summary("ends").set_index(["chain", "seed", "objective"])
    overview = study.summary("first_objective").set_index(["chain", "seed", "after"])
    assert len(table) == len(overview) == 2 * len(RUNS) and table["trained"].all()
    assert set(table["n_pairs"]) == {planted.PAIRS} and set(table["n_prompts"]) == {16}
    for chain, seed in RUNS:
        first, _ = ends(chain)
        for name in OBJECTIVES:
            near(
                table.loc[(chain, seed, name)], "margin", margin(study, seed, chain, name), asked(study, name)
            )
        for after, node in (("stage 1", first), ("stage 2", chain)):
            row = overview.loc[(chain, seed, after)]
            near(row, "margin", margin(study, seed, node, first), asked(study, first))
            assert (row["objective"], row["checkpoint"]) == (first, node)
            assert row["label"] == f"safety_signal: {chain.replace('-then-', ', then ')} (seed {seed})"
    sides = [side(row, "margin") for _, row in table.iterrows()]
    words = f"Trained: {sides.count(1)} of 12 end clearly above the base, {sides.count(-1)} clearly below"
    assert words in study.page("07").text


def test_fates_of_single_runs(study):
    table = study.summary("fates").set_index(["chain", "seed"])
    for chain, seed in RUNS:
        (first, second), row = ends(chain), table.loc[(chain, seed)]
        one, end = (margin(study, seed, node, first) for node in (first, chain))
        for name, values in fate(one, end).items():
            near(row, name, values, asked(study, first))
        assert row["retention"] == pytest.approx(end.mean() / one.mean())
        later = [margin(study, seed, node, second) for node in (first, chain)]
        near(row, "later", later[1] - later[0], asked(study, second))
        assert (row["objective"], row["later_objective"], row["outcome"]) == (first, second, FATES[chain])
        churn, excess = churned(study, chain, seed)
        bounds = interval(excess, asked(study, first))
        assert row["churn"] == pytest.approx(churn.mean())
        assert row["excess_churn_low"] == pytest.approx(bounds[0], abs=0.25 * np.ptp(bounds))


def test_fates_over_seeds(study):
    table, text = study.summary("fates_over_seeds").set_index("chain"), study.page("07").text
    for name in DECIDING:
        assert table[f"{name}_p"].tolist() == pytest.approx(adjusted(table, name), rel=1e-6)
    for chain, row in table.iterrows():
        first, second = ends(chain)
        one, end = (over_seeds(study, node, first) for node in (first, chain))
        for name, values in fate(one, end).items():
            near(row, name, values, asked(study, first, 2))
        later = over_seeds(study, chain, second) - over_seeds(study, first, second)
        near(row, "later", later, asked(study, second, 2))
        churn, excess = map(pd.concat, zip(*(churned(study, chain, seed) for seed in SEEDS), strict=True))
        bounds = interval(excess, asked(study, first, 2))
        assert row["churn"] == pytest.approx(churn.mean()) and row["seeds"] == 2
        assert row["excess_churn_low"] == pytest.approx(bounds[0], abs=0.25 * np.ptp(bounds))
        assert row["outcome"] == rule(*(side(row, name) for name in DECIDING))
        sure = [side(row, name) * int(row[f"{name}_p"] <= 0.05) for name in DECIDING]
        assert row["outcome_holm"] == rule(*sure)
    assert table.loc[BACK, "outcome_holm"] == "gained" and table.loc[FORTH, "outcome_holm"].startswith("lost")
    assert "More than one fate is seen" in text
    for name, count in table["outcome_holm"].value_counts().items():
        assert f"{name}: {count} of 3 cases" in text.partition("After Holm's correction")[2]
    gain, kept, later = (told(triple(table.loc[FORTH], name)) for name in ("learned", "retention", "later"))
    sentence = f"{FORTH}: gain {gain}, retention {kept}, gain of the last stage's own objective {later}"
    assert sentence in text


def test_the_order(study):
    text, said, mirror = study.page("07").text, [], {FORTH: BACK, BACK: FORTH}
    by_run, together = study.summary("order_effect"), study.summary("order_over_seeds")
    assert set(by_run["chain"]) == set(together["chain"]) == set(mirror)
    for row in [*by_run.to_dict("records"), *together.to_dict("records")]:
        first, seeds = ends(row["chain"])[0], [row["seed"]] if "seed" in row else SEEDS
        nodes = row["chain"], mirror[row["chain"]]
        was, now = (pd.concat([margin(study, seed, node, first) for seed in seeds]) for node in nodes)
        near(row, "difference", now - was, asked(study, first, len(seeds)))
        assert [row["trained_first"], row["trained_last"]] == pytest.approx([was.mean(), now.mean()])
        said += [f"safety_signal, {first} {(now - was).mean():+.2f}"] * (len(seeds) == 2)
    assert together["difference_p"].tolist() == pytest.approx(adjusted(together, "difference"), rel=1e-6)
    sides = [side(row, "difference") for _, row in together[together["difference_p"] <= 0.05].iterrows()]
    words = (
        f"Of 2 differences {sides.count(1)} are clearly above zero (last is better), {sides.count(-1)} below"
    )
    assert f"2 seeds: {'; '.join(said)}." in text and words in text


def sortings(key: str) -> list[tuple[int, int]]:
    """The seed that sorts and the seed that changed."""
    return [(0, 1), (1, 0)] if key == "cross_seed" else [(0, 0), (1, 1)]


def test_quartiles_over_seeds(study):
    table = study.summary("quartiles").set_index(["chain", "key"])
    assert sorted(table.index) == sorted(itertools.product(CHAINS, KEYS))
    for _, part in table.groupby("key"):
        assert part["difference_p"].tolist() == pytest.approx(adjusted(part, "difference"), rel=1e-6)
    for (chain, key), row in table.iterrows():
        runs, (sorts, moves) = [changes(study, chain, seed) for seed in SEEDS], KEYS[key]
        means = np.array([quarters(runs[a][sorts], runs[b][moves]) for a, b in sortings(key)])
        gaps = means[:, 3] - means[:, 0]
        found = row[["lowest", "highest", "difference"]].tolist()
        assert found == pytest.approx([*means.mean(axis=0)[[0, 3]], gaps.mean()])
        luck = np.mean([reversion(runs[a], runs[b], key) for a, b in sortings(key)], axis=0)
        bound, (_, low, high) = min(luck[3] - luck[0], 0.0), triple(row, "difference")
        readings = {"highest changed for the better": low > 0, "highest changed for the worse": high < bound}
        readings |= {"regression to the mean not excluded": high < 0, "no contrast shown": True}
        assert row["regression"] == pytest.approx(bound)
        assert row["reading"] == next(words for words, holds in readings.items() if holds)
        assert row[["seeds", "pairs", "n_prompts", "shared"]].tolist() == [2, 38, 16, 0.5]
        if chain == SHAM:
            drawn = []
            for at in resampled(asked(study, "safe"), 150):
                cut = [quarters(runs[a][sorts].iloc[at], runs[b][moves].iloc[at]) for a, b in sortings(key)]
                drawn.append(np.mean([quarter[3] - quarter[0] for quarter in cut]))
            jump = wider(2) * np.ptp(gaps) / 2  # one of two seeds drawn twice
            draws = gaps.mean() + wider(8) * (np.array(drawn) - gaps.mean())
            assert close([low, high], spread(np.add.outer([-jump, 0, 0, jump], draws).ravel(), np.array(0.0)))


def test_kept_over_seeds(study):
    table = study.summary("kept_of_learned").set_index(["chain", "instrument"])
    for (chain, instrument), row in table.iterrows():
        runs = [changes(study, chain, seed) for seed in SEEDS]
        parts = [
            [np.cov(runs[by]["margin_before"], runs[of][f"margin_{at}"])[0, 1] for at in ("after", "before")]
            for by, of in sortings(instrument)
        ]
        kept, learned = pd.concat(runs)[["margin_after", "margin_before"]].mean()
        slope = np.divide(*np.sum(parts, axis=0))
        assert [row["slope"], row["intercept"]] == pytest.approx([slope, kept - slope * learned])
        assert row["slope_low"] < slope < row["slope_high"]
    assert set(table.xs("cross_seed", level="instrument")["pattern"]) == {"cannot be decided"}


def test_mechanics(study):
    table, text = study.summary("mechanics").set_index(["chain", "seed"]), study.page("07").text
    for (chain, seed), row in table.iterrows():
        halves = cosines(study, chain, seed, "probe")
        assert triple(row, "cross") == pytest.approx(student(halves["matched_cosine"], 0.99))
        same = halves[["within_cosine", "within_new_cosine"]].mean(axis=1)
        assert triple(row, "within") == pytest.approx(student(same, 0.99))
        assert (row["split"], row["steps"], row["objective"]) == ("probe", 6, ends(chain)[0])
        assert row["gradients"] == VERDICTS.get((chain, seed), row["gradients"])
        own, sham = (ledger(study, node, seed, "probe").groupby("prompt_id").mean() for node in (chain, SHAM))
        for name in own:
            assert triple(row, name) == pytest.approx(student(own[name])), name
            if chain == FORTH:
                assert triple(row, f"{name}_beyond") == pytest.approx(student(own[name] - sham[name])), name
            else:
                assert pd.isna(row[f"{name}_beyond"])
        assert row["rest"] == pytest.approx(own["measured"].mean() - own[["left", "curvature"]].mean().sum())
        assert row["movement_weight"] == pytest.approx(turn(study, seed, chain)[2])
    plain, beyond = table.loc[[FORTH, BACK]], table.loc[FORTH]
    sentence = (
        f"between objectives {plain['cross'].mean():+.2f}, within an objective {plain['within'].mean():+.2f}"
    )
    assert f"{sentence}, and there clear of zero in {(plain['within_low'] > 0).sum()} of 4." in text
    sentence = f"{plain['measured'].min():+.3f} to {plain['measured'].max():+.3f} nats; it rose in "
    sentence += f"{(plain['measured'] > 0).sum()} of 4 cases, clearly in {(plain['measured_low'] > 0).sum()}."
    assert sentence in text
    sides = [side(row, "left_beyond") for _, row in beyond.iterrows()]
    assert f"of 2 cases clearly up in {sides.count(1)}, clearly down in {sides.count(-1)}" in text


def test_moves_over_seeds(study):
    table = study.summary("moves").set_index("chain")
    assert set(table.index) == {FORTH, BACK} and pd.isna(table.loc[BACK, ["shuffled", "beyond"]]).all()
    own, sham = ([turn(study, seed, chain)[2] for seed in SEEDS] for chain in (FORTH, SHAM))
    row = table.loc[FORTH]
    expected = [np.mean(own), np.std(own, ddof=1), np.mean(sham)]
    assert row[["cosine", "spread", "shuffled"]].tolist() == pytest.approx(expected)
    assert triple(row, "beyond") == pytest.approx(student(np.subtract(own, sham)))
    assert f"{FORTH} {np.mean(own):+z.2f} (shuffled labels {np.mean(sham):+z.2f})" in study.page("07").text


def test_compatibility(study):
    table, agree = study.summary("compatibility").set_index("chain"), labels(study, "train", "probe")
    assert set(table.index) == {FORTH, BACK}
    for chain, row in table.iterrows():
        first, second = ends(chain)
        assert [row["shared"], row["agreement"]] == pytest.approx([len(agree), agree.mean()])
        near(row, "forward", over_seeds(study, first, second), asked(study, second, 2))
        one, end = (over_seeds(study, node, first) for node in (first, chain))
        near(row, "backward", end - one, asked(study, first, 2))
        if chain == FORTH:
            near(row, "due", end - over_seeds(study, SHAM, first), asked(study, first, 2))
        began = pd.concat(
            [study.conflict[seed, chain].query("split == 'probe' and step == 1") for seed in SEEDS]
        )
        across, new, old = began[["cross_product", "within_new", "within_old"]].astype(float).mean()
        assert row["gradients"] == pytest.approx(across / (new * old) ** 0.5)


def test_spreads_over_prompts_and_runs(study):
    """By a two-way analysis of variance of prompt means, prompts by seeds."""
    table, mirror = study.summary("spreads").set_index(["chain", "quantity"]), {FORTH: BACK, BACK: FORTH}
    for chain in CHAINS:
        first, _ = ends(chain)
        one, end = (over_seeds(study, node, first) for node in (first, chain))
        wanted = {name: values for name, values in fate(one, end).items() if name != "end"}
        if chain in mirror:
            wanted["order"] = over_seeds(study, mirror[chain], first) - end
        for name, values in wanted.items():
            runs = np.repeat(SEEDS, len(values) // 2)
            x = values.groupby([asked(study, first, 2), runs]).mean().unstack().to_numpy()
            by_prompt, by_run, n = x.mean(axis=1, keepdims=True), x.mean(axis=0, keepdims=True), len(x)
            rest = ((x - by_prompt - by_run + x.mean()) ** 2).sum() / (n - 1)
            squares = [by_prompt.var(ddof=1) - rest / 2, rest, by_run.var(ddof=1) - rest / n]
            expected = [x.mean(), n, 2, *np.sqrt(np.maximum(squares, 0))]
            row = table.loc[(chain, name), ["mean", "prompts", "seeds", "prompt_sd", "rest_sd", "run_sd"]]
            assert row.tolist() == pytest.approx(expected), name
        halves = [cosines(study, chain, seed, "probe")["matched_cosine"] for seed in SEEDS]
        row = table.loc[(chain, "matched"), ["mean", "prompt_sd", "half"]]
        assert row.tolist() == pytest.approx([np.mean(halves), np.mean([h.std() for h in halves]), 4])


# ---- five worlds ----

NONE, OPEN, WORSE = (
    "no contrast shown",
    "regression to the mean not excluded",
    "highest changed for the worse",
)
KEPT = "kept as learned"
WORLDS = {
    "drift only": ("stable", NONE, NONE, KEPT, KEPT),
    "uniform shift": ("lost: partial", NONE, NONE, "uniform shift", "uniform shift"),
    "redrawn luck": ("stable", OPEN, NONE, "neither", KEPT),
    "loss in proportion": ("lost: partial", OPEN, WORSE, "in proportion", "in proportion"),
    "top quartile": ("lost: partial", OPEN, WORSE, "neither", "neither"),
}
"""What is to be said: the outcome, of quartiles by the run itself and by another, of the line by both."""
A_THEN_B = Chain.parse("a-then-b")


@functools.cache
def world(name: str) -> pd.DataFrame:
    """Four runs in which stage 1 learns 1 on average, as much as differs over pairs, and luck on top."""
    rng, parts = np.random.default_rng(1), []
    n, tokens = 600, 20
    truth, opinion = rng.normal(1.0, 0.6, n), rng.normal(0, 3, n)
    place = {"pair_id": [f"p{i:03}" for i in range(n)], "prompt_id": [f"q{i // 2:03}" for i in range(n)]}
    for seed in range(4):
        one = truth + rng.normal(0, 0.3, n)
        end = {
            "drift only": one,
            "uniform shift": one - 0.4,
            "redrawn luck": truth + rng.normal(0, 0.3, n),
            "loss in proportion": 0.5 * one,
            "top quartile": np.where(one > 1.5, 0.2 * one, one),
        }[name] + rng.normal(0, 0.05, n)
        drift = -5.0 * (name == "drift only")
        for node, m, fell in ((BASE, 0 * one, 0.0), ("a", one, 0.0), ("a-then-b", end, drift)):
            sums = {"chosen_logp": fell - 30 + opinion + m / 2, "rejected_logp": fell - 30 - m / 2}
            counts = {"chosen_tokens": tokens, "rejected_tokens": tokens, "split": "eval", "objective": "a"}
            parts.append(pd.DataFrame(place | sums | counts | {"checkpoint": node, "seed": seed}))
    runs = pd.concat(parts).groupby("seed")
    return pd.concat([metrics.pair_measures(run, beta=1.0) for _, run in runs], ignore_index=True)


def measured(name: str) -> dict:
    """`metrics.fate` of a world, its p-values, and the excess of churn over that between two runs."""
    runs, rng = world(name), np.random.default_rng(0)
    other = runs.assign(objective="b")  # what the last stage learned is of no interest here
    found = metrics.transfer(pd.concat([runs, other]), A_THEN_B, ["a", "b"], resamples=300, rng=rng)
    row = metrics.fate(found, A_THEN_B, "a")
    right = metrics.wide_margins(runs, "a", measure="policy_margin")[["a", "a-then-b"]] > 0
    first, end = (right[node].unstack("seed") for node in ("a", "a-then-b"))
    row["excess"] = float(
        (first != end).mean().mean() - (first != first[[1, 2, 3, 0]].to_numpy()).mean().mean()
    )
    for contrast in DECIDING[2:]:
        row[f"{contrast}_p"] = float(verdicts.p_value(*triple(row, contrast), df=3))
    return row | {"world": name, "outcome_holm": metrics.outcome(row)}


def tables(name: str) -> list[pd.DataFrame]:
    nodes = {"before": "a", "after": "a-then-b"}
    return [redistribution.pair_change(run, "a", **nodes) for _, run in world(name).groupby("seed")]


@pytest.mark.parametrize("name", WORLDS)
def test_five_worlds_are_told_apart(name):
    runs, options = tables(name), {"resamples": 300, "rng": np.random.default_rng(0)}
    told_of = [metrics.outcome(measured(name))]
    for key in ("stage1_margin", "cross_seed"):
        told_of += [redistribution.highest_minus_lowest(runs, key, shared=False, **options)["reading"]]
    for crossed in (False, True):
        line = redistribution.kept_line(runs, crossed=crossed, **options)
        told_of += [redistribution.loss_pattern(line, learned=1.0)["pattern"]]
    assert tuple(told_of) == WORLDS[name], told_of


def test_what_fell_was_not_learned_and_has_no_retention():
    """A gain clearly below zero: its ratio to what is left would be a number, and mean nothing."""
    runs, rng = world("uniform shift"), np.random.default_rng(0)
    fell = runs.assign(margin=-runs["margin"])
    found = metrics.transfer(fell, A_THEN_B, ["a"], resamples=100, rng=rng).set_index("quantity")
    assert found.loc["learned", "high"] < 0 and pd.isna(found.loc["retention", "value"])
    assert found.loc["retention", "note"].startswith("undefined: stage 1 did not learn")


def test_drift_shows_in_the_probabilities_and_nowhere_else():
    options = {"resamples": 100, "rng": np.random.default_rng(0)}
    for name in WORLDS:
        run = world(name).query("seed == 0")
        fell = rivals.displacement(run, **options).set_index("from_checkpoint").loc["a", "both_fell"]
        assert (fell > 0.95) == (name == "drift only")


def test_luck_that_is_drawn_anew_is_no_redistribution():
    """Pairs change sides as often as between two runs of stage 1; a shift turns fewer, and all one way."""
    assert abs(measured("redrawn luck")["excess"]) < 0.01
    assert measured("drift only")["excess"] < -0.01


def test_more_than_one_fate_is_said_of_a_study_that_has_it():
    def several(*names: str) -> bool:
        study = pd.DataFrame([measured(name) for name in names])
        for contrast in DECIDING[2:]:
            study[f"{contrast}_p"] = verdicts.holm(study[f"{contrast}_p"].to_numpy())
        return verdicts.several_fates(study)

    assert several(*WORLDS) and several("drift only", "uniform shift")
    assert not several("drift only", "redrawn luck")
    assert not several("uniform shift", "loss in proportion", "top quartile")
