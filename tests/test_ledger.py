"""The ledger's arithmetic on losses whose path integral is known."""

import numpy as np
import pandas as pd
import pytest
import torch

from seqdpo_utils import ledger

NAMES = ["m.layers.0.q_proj.lora_A.default.weight", "m.layers.0.q_proj.lora_B.default.weight", "m.layers.1.up_proj.lora_A.default.weight"]


def walk(steps: int, *, power: int, length: float = 1.0) -> pd.DataFrame:
    """The ledger of sum |theta|^power along a bent path of `steps` equal steps, from gradients that are known."""
    rng = np.random.default_rng(0)
    start, straight, bent = ([torch.tensor(rng.normal(size=(2, 3)) + 3) for _ in NAMES] for _ in range(3))
    weights = [[a + length * (k / steps) * b + length * (k / steps) ** 2 * c for a, b, c in zip(start, straight, bent, strict=True)] for k in range(steps + 1)]
    points = [ledger.ProbePoint(k, float(sum((w**power).sum() for w in now)), [power * w ** (power - 1) for w in now]) for k, now in enumerate(weights)]
    rows = []
    for k in range(steps):
        moved = [b - a for a, b in zip(weights[k], weights[k + 1], strict=True)]
        rows += [{"stage": 2, "previous_objective": "a"} | row for row in ledger.segment_rows(NAMES, points[k], points[k + 1], moved)]
    return pd.DataFrame(rows, columns=list(ledger.LEDGER_COLUMNS)).astype({"layer": "Int64"})


def test_a_quadratic_loss_is_explained_exactly_however_long_the_steps():
    for steps in (1, 5):
        total = ledger.totals(walk(steps, power=2), dtype="float32").iloc[0]
        assert total["explained"] == pytest.approx(total["measured"], rel=1e-12)
        assert total["share"] == pytest.approx(1.0) and total["rest"] == pytest.approx(0.0, abs=1e-9)
        assert abs(total["left"] / total["measured"] - 1) > 0.02, "the left end alone misses the curvature"


def test_halving_the_segments_quarters_what_the_trapezoid_leaves_and_halves_what_the_left_end_leaves():
    rests = [ledger.totals(walk(steps, power=4), dtype="float32").iloc[0] for steps in (8, 16)]
    assert rests[0]["rest"] / rests[1]["rest"] == pytest.approx(4, rel=0.05)
    assert (rests[0]["measured"] - rests[0]["left"]) / (rests[1]["measured"] - rests[1]["left"]) == pytest.approx(2, rel=0.05)


def test_entries_stand_by_layer_and_module_and_add_up():
    table = walk(3, power=3)
    assert table[["layer", "module"]].drop_duplicates().to_numpy().tolist() == [[0, "q_proj"], [1, "up_proj"]]
    assert len(table) == 6, "A and B of a module share an entry"
    found = ledger.segments(table)
    assert found["term"].sum() == pytest.approx(table["term"].sum())
    assert found["rest"].tolist() == pytest.approx((found["loss_after"] - found["loss_before"] - found["term"]).tolist())
    assert found["loss_before"].tolist()[1:] == found["loss_after"].tolist()[:-1]
    for by, parts in (("layer", ["0", "1"]), ("module", ["q_proj", "up_proj"]), ("step", ["1", "2", "3"])):
        bars = ledger.waterfall(table, by=by)
        assert bars["part"].tolist() == [*parts, "rest", "measured"]
        assert bars["end"].tolist()[-2:] == pytest.approx([found["measured"].sum()] * 2)
        assert bars["start"].tolist()[1:-1] == bars["end"].tolist()[:-2] and bars["start"].iloc[0] == bars["start"].iloc[-1] == 0
    by_layer = ledger.waterfall(table, by="layer")
    assert by_layer["end"].iloc[0] == pytest.approx(table.loc[table["layer"] == 0, "term"].sum())


def changes(*values: float, stage: int = 2) -> pd.DataFrame:
    """A ledger of one entry a segment that explains nine tenths of each given change."""
    losses = np.cumsum([1.0, *values])
    rows = [
        {"stage": stage, "previous_objective": "a", "from_step": 2 * k, "step": 2 * k + 2, "layer": 0, "module": "m", "term": 0.9 * value, "left": 0.5 * value,
         "loss_before": losses[k], "loss_after": losses[k + 1]} for k, value in enumerate(values)
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("values", "dtype", "share"),
    [
        ((0.2, 0.1), "float32", 0.9),
        ((5e-5,), "float32", None),
        ((0.01, 0.01), "bfloat16", None),
        ((0.2, -0.199), "float32", None),
        ((-0.2, 0.1), "float32", 0.9),
    ],
    ids=["plain", "rounding", "rounding of bfloat16", "ups and downs", "half of it comes back"],
)
def test_the_share_is_left_out_where_it_would_be_a_ratio_of_errors(values, dtype, share):
    total = ledger.totals(changes(*values), dtype=dtype).iloc[0]
    assert total["measured"] == pytest.approx(sum(values)) and total["path"] == pytest.approx(sum(map(abs, values)))
    words = ledger.closing_words(total)
    if share is None:
        assert pd.isna(total["share"]) and "not defined" in words
    else:
        assert total["share"] == pytest.approx(share) and "90% explained" in words


def test_stages_and_objectives_are_kept_apart_and_an_empty_ledger_has_no_totals():
    both = pd.concat([changes(0.1, 0.1), changes(0.3, stage=3), changes(-0.5).assign(previous_objective="b")], ignore_index=True)
    found = ledger.totals(both, dtype="float32").set_index(["stage", "previous_objective"])["measured"]
    assert found.to_dict() == {(2, "a"): pytest.approx(0.2), (3, "a"): pytest.approx(0.3), (2, "b"): pytest.approx(-0.5)}
    bars = ledger.waterfall(both[both["previous_objective"] == "a"], by="step")
    assert bars["part"].tolist() == ["stage 2: 1 to 2", "stage 2: 3 to 4", "stage 3: 1 to 2", "rest", "measured"]
    assert ledger.totals(both.head(0), dtype="float32").empty
