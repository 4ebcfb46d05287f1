"""The ledger's arithmetic on losses whose path integral is known."""

import numpy as np
import pandas as pd
import pytest
import torch

from seqdpo_utils import ledger

NAMES = [
    "m.layers.0.q_proj.lora_A.default.weight",
    "m.layers.0.q_proj.lora_B.default.weight",
    "m.layers.1.up_proj.lora_A.default.weight",
]
COLUMNS = list(ledger.LEDGER_COLUMNS)


def walk(steps: int, *, power: int) -> pd.DataFrame:
    """The ledger of sum |theta|^power along a bent path of equal steps, from gradients that are known."""
    rng = np.random.default_rng(0)
    start, straight, bent = ([torch.tensor(rng.normal(size=(2, 3)) + 3) for _ in NAMES] for _ in range(3))
    pieces = list(zip(start, straight, bent, strict=True))
    weights = [[a + t * b + t**2 * c for a, b, c in pieces] for t in np.linspace(0, 1, steps + 1)]
    losses = [float(sum((w**power).sum() for w in now)) for now in weights]
    gradients = [[power * w ** (power - 1) for w in now] for now in weights]
    points = [ledger.ProbePoint(k, [losses[k]], [gradients[k]]) for k in range(steps + 1)]
    rows = []
    for k in range(steps):
        moved = [b - a for a, b in zip(weights[k], weights[k + 1], strict=True)]
        entries, _ = ledger.segment_rows(NAMES, points[k], points[k + 1], moved)
        rows += [{"stage": 2, "previous_objective": "a", "split": "train"} | row for row in entries]
    return pd.DataFrame(rows, columns=COLUMNS).astype({"layer": "Int64"})


def test_one_segment_by_hand():
    """L = theta^2 from 1 to 3: the trapezoid gives 8 exactly, the left end 4. A and B share an entry."""
    one = torch.tensor([1.0])
    start = ledger.ProbePoint(4, [1.0], [[2 * one, 2 * one]])
    end = ledger.ProbePoint(6, [9.0], [[6 * one, 6 * one]])
    (row,), (pair,) = ledger.segment_rows(NAMES[:2], start, end, [2 * one, 0 * one])
    assert pair == {
        "from_step": 4,
        "step": 6,
        "term": 8.0,
        "left": 4.0,
        "loss_before": 1.0,
        "loss_after": 9.0,
    }
    assert (row["from_step"], row["step"], row["layer"], row["module"]) == (4, 6, 0, "q_proj")
    assert (row["term"], row["left"], row["loss_before"], row["loss_after"]) == (8.0, 4.0, 1.0, 9.0)


def test_a_quadratic_loss_is_explained_exactly_however_long_the_steps():
    for steps in (1, 5):
        total = ledger.totals(walk(steps, power=2), dtype="float32").iloc[0]
        assert total["explained"] == pytest.approx(total["measured"], rel=1e-12)
        assert total["share"] == pytest.approx(1.0) and total["rest"] == pytest.approx(0.0, abs=1e-9)
        assert abs(total["left"] / total["measured"] - 1) > 0.02, "the left end alone misses the curvature"
        assert total["segments"] == steps


def test_halving_the_segments_quarters_the_rest_of_the_trapezoid_and_halves_that_of_the_left_end():
    coarse, fine = (ledger.totals(walk(steps, power=4), dtype="float32").iloc[0] for steps in (8, 16))
    assert coarse["rest"] / fine["rest"] == pytest.approx(4, rel=0.05)
    left = [total["measured"] - total["left"] for total in (coarse, fine)]
    assert left[0] / left[1] == pytest.approx(2, rel=0.05)


def test_entries_stand_by_layer_and_module_and_add_up():
    table = walk(3, power=3)
    assert table[["layer", "module"]].drop_duplicates().to_numpy().tolist() == [[0, "q_proj"], [1, "up_proj"]]
    assert len(table) == 6, "A and B of a module share an entry"
    found = ledger.segments(table)
    assert found["term"].sum() == pytest.approx(table["term"].sum())
    rest = found["loss_after"] - found["loss_before"] - found["term"]
    assert found["rest"].tolist() == pytest.approx(rest.tolist())
    assert found["loss_before"].tolist()[1:] == found["loss_after"].tolist()[:-1]
    for by, parts in (("layer", ["0", "1"]), ("module", ["q_proj", "up_proj"]), ("step", ["1", "2", "3"])):
        bars = ledger.waterfall(table, by=by)
        assert bars["part"].tolist() == [*parts, "rest", "measured"]
        assert bars["kind"].tolist() == ["entry"] * len(parts) + ["rest", "measured"]
        assert bars["end"].tolist()[-2:] == pytest.approx([found["measured"].sum()] * 2)
        assert bars["start"].tolist()[1:-1] == bars["end"].tolist()[:-2]
        assert bars["start"].iloc[0] == bars["start"].iloc[-1] == 0
    by_layer = ledger.waterfall(table, by="layer")
    assert by_layer["end"].iloc[0] == pytest.approx(table.loc[table["layer"] == 0, "term"].sum())


def changes(*values: float, stage: int = 2, previous: str = "a") -> pd.DataFrame:
    """A ledger of one entry a segment that explains nine tenths of each given change."""
    losses = np.cumsum([1.0, *values])
    terms, lefts = 0.9 * np.array(values), 0.5 * np.array(values)
    steps = 2 * np.arange(len(values))
    table = pd.DataFrame({"from_step": steps, "step": steps + 2, "term": terms, "left": lefts})
    table = table.assign(loss_before=losses[:-1], loss_after=losses[1:], layer=0, module="m")
    return table.assign(stage=stage, previous_objective=previous, split="train")[COLUMNS]


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
    assert total["measured"] == pytest.approx(sum(values))
    assert total["path"] == pytest.approx(sum(map(abs, values)))
    words = ledger.closing_words(total)
    assert f"measured {sum(values):+.4f}, rest {0.1 * sum(values):+.4f} nats" in words
    if share is None:
        assert pd.isna(total["share"]) and "not defined" in words
    else:
        assert total["share"] == pytest.approx(share) and "90% explained" in words


def test_stages_and_objectives_are_kept_apart():
    parts = [changes(0.1, 0.1), changes(0.3, stage=3), changes(-0.5, previous="b")]
    both = pd.concat(parts, ignore_index=True)
    found = ledger.totals(both, dtype="float32").set_index(["stage", "previous_objective"])["measured"]
    expected = {(2, "a"): 0.2, (3, "a"): 0.3, (2, "b"): -0.5}
    assert found.to_dict() == pytest.approx(expected)
    bars = ledger.waterfall(both[both["previous_objective"] == "a"], by="step")
    labels = ["stage 2: 1 to 2", "stage 2: 3 to 4", "stage 3: 1 to 2", "rest", "measured"]
    assert bars["part"].tolist() == labels


@pytest.mark.parametrize("nothing", [changes(0.1).head(0), pd.DataFrame(columns=COLUMNS)])
def test_an_empty_ledger_has_no_segments_no_totals_and_no_bars(nothing):
    """A chain of one stage has no earlier objective: its ledger has columns and no rows."""
    assert ledger.segments(nothing).empty
    total = ledger.totals(nothing, dtype="float32")
    assert total.empty and {"stage", "previous_objective", "explained", "share"} <= set(total.columns)
    for by in ("step", "layer", "module"):
        bars = ledger.waterfall(nothing, by=by)
        assert bars.empty and list(bars.columns) == ["part", "start", "end", "kind"]
