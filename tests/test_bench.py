"""The bench's arithmetic; its runs are for `make bench`, not for the tests."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import bench
import numpy as np
import pandas as pd
import pytest

from seqdpo_utils import scoring
from seqdpo_utils.errors import StudyError
from seqdpo_utils.paths import read_table


def test_ratios_are_paired_and_their_extremes_kept():
    seconds = {"ours": [1.0, 2.0, 4.0], "theirs": [6.0, 10.0, 28.0]}
    row = bench._ratio("ours", "theirs", seconds, pairs=8)
    assert (row["ratio"], row["low"], row["high"], row["runs"], row["value"]) == (6.0, 5.0, 7.0, 3, 4.0)


def test_compared_runs_alternate():
    seen = []
    seconds = bench._alternate({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 2)
    assert seen == ["a", "b", "a", "b"] and [len(times) for times in seconds.values()] == [2, 2]


def test_sides_that_disagree_are_not_compared():
    assert bench._agree("sums", [-100.0], [-100.001], tolerance=1e-4) == pytest.approx(1e-5, rel=1e-3)
    for wrong in (-100.1, float("nan")):
        with pytest.raises(StudyError, match="sums: the two sides differ"):
            bench._agree("sums", [wrong], [-100.0], tolerance=1e-4)


def test_what_must_be_computed_is_counted_by_hand(base):
    # two prompt tokens before the branches, three in them, three scored
    rows = [scoring.PromptRow([1, 2, 3], [[4, 5], [6]])]
    shape = base.config
    square = shape.hidden_size * shape.hidden_size
    attention = 2 * square + 2 * square // 2  # q, o and, with half the heads, k, v
    body = shape.num_hidden_layers * (attention + 3 * shape.hidden_size * shape.intermediate_size)
    assert bench._flops(base, rows) == 2 * (body * 5 + shape.vocab_size * shape.hidden_size * 3)


def test_peak_memory_is_that_of_the_process_and_not_of_its_parent():
    held = np.ones(400_000_000 // 8)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        child = pool.submit(bench._peak_memory).result()
    assert bench._peak_memory() > held.nbytes + child / 2
    assert child < bench._peak_memory() - held.nbytes / 2


def test_the_table_is_written_twice(tmp_path):
    row = bench._row("scoring", "TRL", [6.4, 6.0, 7.0], 2.81, "pairs a second")
    text = bench.write_bench(tmp_path, pd.DataFrame([row], columns=bench.COLUMNS)).read_text()
    assert "| scoring | TRL | 6.40 (6.00 to 7.00) | 2.81 pairs a second | 3 |" in text
    assert read_table(tmp_path / "runs" / "bench" / "bench.parquet")["ratio"].tolist() == [6.4]
