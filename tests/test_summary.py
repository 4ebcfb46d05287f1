"""Every claim against planted tables: what it may say, and what it must not."""

import numpy as np
import pandas as pd
import pytest

from seqdpo_utils import metrics, summary
from seqdpo_utils.mechanics import CONFLICT_COLUMNS
from seqdpo_utils.paths import RunPaths, write_table


def fates(**changes) -> pd.DataFrame:
    rows = {"setting": ["safety_signal", "other"], "first": ["safe", "a"], "seed": 0, "learned": 1.0, "learned_low": 0.5, "learned_high": 1.5, "retention": [1.0, 0.5],
            "retention_low": [0.95, 0.3], "retention_high": [1.05, 0.7], "excess_churn_low": [None, None], "outcome": ["stable", "partial degradation"]}  # fmt: skip
    return pd.DataFrame(rows | changes)


def mechanics(verdict: str, **changes) -> pd.DataFrame:
    return pd.DataFrame({"gradients": [verdict], "cross": [0.01], "within": [0.02], "explained": [0.19], "measured": [0.2], "rest": [0.01],
            "movement_weight": [0.5], "movement_raw": [0.1]} | changes)  # fmt: skip


ORDERS = pd.DataFrame({"setting": ["s"], "objective": ["a"], "difference": [0.5], "difference_low": [0.2], "difference_high": [0.9]})
QUARTILES = pd.DataFrame({"key": ["stage1_policy_margin"] * 2, "difference_low": [-0.5, -0.1], "difference_high": [-0.1, 0.1]})


def claims(**tables) -> list[tuple[str, str]]:
    planted = {"fates": fates(), "orders": ORDERS, "quartiles": QUARTILES, "mechanics": mechanics("near-orthogonal")} | tables
    return [(row.figure, row.verdict) for row in summary.claims(**planted).itertuples()]


def test_fates():
    assert claims()[0][1].startswith("More than one fate")
    assert "not tested with one seed" in claims()[0][1]
    undecided = fates(outcome=[metrics.UNDEFINED, "undecided"], retention=[None, None])
    assert claims(fates=undecided)[0][1].startswith("Cannot be decided")
    assert claims(fates=fates(outcome="stable", excess_churn_low=[-0.1, -0.1]))[0][1] == "Only one fate could be told: stable."


def test_safety_with_and_without_the_setting_and_without_a_gain():
    assert "+1.00 (+0.95 to +1.05)" in claims()[1][0] and "stable: 1 of 1 seeds" in claims()[1][1]
    assert claims(fates=fates(setting=["x", "y"]))[1][1] == "No answer."
    assert "undefined" in claims(fates=fates(retention=[None, 0.5]))[1][0]


def test_opposition_is_read_off_the_ledger():
    figure, verdict = claims()[5]
    assert "+0.200 to +0.200 nats; it rose in 1 of 1" in figure and "to a tenth in 1 of 1" in figure
    assert verdict.startswith("In 1 of 1 chains with a rising loss")
    assert "in 0 of 1." in claims(mechanics=mechanics("opposed", explained=[0.1], rest=[0.1]))[5][0]
    assert "rose nowhere" in claims(mechanics=mechanics("aligned", explained=[-0.2], measured=[-0.2], rest=[0.0]))[5][1]
    assert claims(mechanics=mechanics("opposed", measured=[None]))[5] == ("No ledger was kept.", "No answer.")


def test_order_and_quartiles():
    assert "a +0.50" in claims()[2][0] and "1 of 1 cases" in claims()[2][1]
    assert claims(orders=ORDERS.head(0))[2][1] == "No answer."
    assert "below zero in 1 of 2 chains" in claims()[3][0] and "not excluded" in claims()[3][1]
    crossed = pd.concat([QUARTILES, QUARTILES.assign(key="cross_seed", difference_low=0.1, difference_high=0.2)])
    assert "above in 2" in claims(quartiles=crossed)[3][0] and "share their training pairs" in claims(quartiles=crossed)[3][1]


@pytest.mark.parametrize(
    ("verdict", "words"),
    [("not measured", "No answer."), ("opposed", "opposed: 1 of 1 chains."), ("cannot be decided at this size", "says nothing about the objectives")],
)
def test_gradients(verdict, words):
    assert words in claims(mechanics=mechanics(verdict))[4][1]


def test_movement_in_degrees():
    assert "60 to 60 degrees" in claims()[6][1]
    assert claims(mechanics=mechanics("opposed", movement_weight=[None]))[6][1] == "No answer."


def write_chain(root, order: str, seed: int, finals: dict[str, float]) -> RunPaths:
    """A chain whose margins are known: stage 1 gives 1 to its objective, the last stage what `finals` says (beta 1)."""
    run = RunPaths(root, "smoke", "s", order, seed)
    objectives = order.split("-then-")
    names = [f"p{i}" for i in range(12)]
    noise = np.linspace(-0.1, 0.1, 12)

    def records(checkpoint: str, means: dict[str, float]) -> pd.DataFrame:
        parts = [
            pd.DataFrame({"pair_id": names, "prompt_id": names, "objective": o, "split": "eval", "checkpoint": checkpoint, "chosen_logp": means[o] + noise * (means[o] != 0),
                          "rejected_logp": 0.0, "chosen_tokens": 2, "rejected_tokens": 2}) for o in sorted(objectives)
        ]  # fmt: skip
        return pd.concat(parts, ignore_index=True)

    tables = [records("base", dict.fromkeys(objectives, 0.0)), records("stage1", {objectives[0]: 1.0, objectives[1]: 0.0}), records("stage2", finals)]
    for file, table in zip((run.base_scores, run.scores(1), run.scores(2)), tables, strict=True):
        write_table(file, table)
    measures = metrics.pair_measures(pd.concat(tables), beta=1.0)
    rng = np.random.default_rng(0)
    write_table(run.table("stage_matrix"), metrics.stage_matrix(measures, resamples=100, rng=rng))
    write_table(run.table("transfer"), metrics.transfer(measures, objectives, resamples=100, rng=rng))
    write_table(run.table("pair_change"), metrics.pair_change(measures, objectives[0], before="stage1", after="stage2"))
    write_table(run.conflict(2), pd.DataFrame(columns=list(CONFLICT_COLUMNS)))
    whole = {"from_checkpoint": "stage0", "to_checkpoint": "stage1", "other_from": "stage1", "other_to": "stage2", "layer": [None, None], "module": None}
    entry = {"stage": 2, "from_step": 0, "step": 2, "layer": [0, 1], "module": "q_proj", "term": [0.2, 0.1], "left": 0.1, "loss_before": 0.5, "loss_after": 0.9}
    write_table(run.ledger(2), pd.DataFrame(entry | {"previous_objective": objectives[0]}))
    write_table(run.movement, pd.DataFrame(whole | {"space": ["lora", "weight"], "norm": 1.0, "other_norm": 1.0, "cosine": [0.1, 0.2]}))
    return run


def test_tables_across_chains_with_two_seeds(tmp_path):
    runs = [write_chain(tmp_path, "a-then-b", seed, {"a": 0.5, "b": 2.0}) for seed in (0, 1)]
    runs += [write_chain(tmp_path, "b-then-a", seed, {"a": 3.0, "b": 1.0}) for seed in (0, 1)]
    options = {"beta": 1.0, "resamples": 200}
    table = summary.fates(runs, seeds=[0, 1], **options).set_index(["first", "seed"])
    assert table.loc[("a", 0), "retention"] == pytest.approx(0.5)
    assert table.loc[("a", 0), "outcome"] == "partial degradation"
    assert table.loc[("b", 1), "outcome"] == "stable"
    assert table["excess_churn_low"].eq(0).all()
    effect = summary.order_effect(runs, **options).set_index(["objective", "seed"])
    assert effect.loc[("a", 0), ["trained_first", "trained_last", "difference"]].tolist() == pytest.approx([0.5, 3.0, 2.5])
    assert effect.loc[("b", 1), "difference"] == pytest.approx(1.0)
    assert len(effect) == 4
    assert set(summary.quartile_contrast(runs, seeds=[0, 1], **options)["key"]) == {"stage1_policy_margin", "cross_seed"}
    mechanical = summary.mechanics(runs)
    assert mechanical["gradients"].eq("not measured").all()
    assert mechanical["movement_weight"].eq(0.2).all()
    assert mechanical[["explained", "measured", "rest"]].drop_duplicates().to_numpy().tolist() == [pytest.approx([0.3, 0.4, 0.1])]
    assert len(summary.first_objective(runs)) == 8
