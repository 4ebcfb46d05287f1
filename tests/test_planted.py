"""Planted truths: an earlier objective, and a later one that is its reverse, itself, or nothing to do with it."""

import numpy as np
import pytest
from conftest import random_pairs
from test_training import fresh, rows_for

from seqdpo_utils import ledger, mechanics, params, training
from seqdpo_utils.encoding import EncodedPair

PAIRS = 128
MEASURED = {"conflict_every": 1, "conflict_pairs": 16, "ledger_every": 4, "probe_pairs": 16}


def preferring(*, seed: int) -> list[EncodedPair]:
    """Pairs of one simple taste: answers of four tokens over answers of four others, after prompts that differ in two tokens."""
    rng = np.random.default_rng(seed)

    def answer(first: int) -> list[int]:
        return [*rng.integers(first, first + 4, 3).tolist(), 2]

    return [EncodedPair([11, 12, 13, *rng.integers(10, 5000, 2).tolist(), 14], answer(100), answer(200)) for _ in range(PAIRS)]


def reverse(pair: EncodedPair) -> EncodedPair:
    return pair._replace(chosen=pair.rejected, rejected=pair.chosen)


def at_random(*, seed: int) -> list[EncodedPair]:
    """Other pairs of the same texts, one half of them reversed: on average they say nothing."""
    turned = set(np.random.default_rng(seed).permutation(PAIRS)[: PAIRS // 2].tolist())
    return [reverse(pair) if i in turned else pair for i, pair in enumerate(preferring(seed=seed + 1))]


@pytest.fixture(params=[0, 1], ids=["seed 0", "seed 1"])
def measured(request, root, tokenizer, tmp_path):
    """Verdict on the gradients and bottom line of the ledger for the three later objectives."""
    sizes = {"learning_rate": 3e-3, "pairs_per_step": 16, "pairs_per_device": 8, "seed": request.param}
    parameters = params.resolve(root, scale="smoke", setting="distributional_conflict") | sizes
    first = preferring(seed=request.param)
    old, _ = rows_for(fresh(root), first)
    trainer = training.stage_trainer(fresh(root), tokenizer, old, parameters=parameters, output_dir=tmp_path)
    trainer.train()
    training.save_adapter(trainer, tmp_path / "stage1", parameters=parameters)
    found = {}
    for name, pairs in {"reversed": [reverse(pair) for pair in first], "same": first, "unrelated": at_random(seed=request.param + 100)}.items():
        now, _ = rows_for(fresh(root), pairs, "later")
        options = {"stage": 2, "previous": tmp_path / "stage1", "earlier": {"first": old}, "output_dir": tmp_path}
        later = training.stage_trainer(fresh(root), tokenizer, now, parameters=parameters | MEASURED, **options)
        later.train()
        found[name] = mechanics.conflict_verdict(later.conflict_table())["verdict"], ledger.totals(later.ledger_table(), dtype="float32").iloc[0]
    return found


def test_opposition_alignment_and_neither_are_told_apart(measured):
    verdicts = {name: verdict for name, (verdict, _) in measured.items()}
    assert verdicts["reversed"] == "opposed" and verdicts["same"] == "aligned"
    assert verdicts["unrelated"] in ("near-orthogonal", "cannot be decided at this size")
    totals = {name: total for name, (_, total) in measured.items()}
    assert totals["reversed"]["explained"] > 0.1 and totals["reversed"]["measured"] > 0.1, "undoing the first objective raises its loss"
    assert totals["same"]["explained"] < -0.1 and totals["same"]["measured"] < -0.1, "more of the first objective lowers its loss"
    assert abs(totals["unrelated"]["explained"]) < 0.5 * min(totals["reversed"]["explained"], -totals["same"]["explained"])
    assert all(total["share"] == pytest.approx(1, abs=0.1) for total in totals.values())


def test_random_pairs_have_no_common_gradient(root, tokenizer, tmp_path):
    """The control of the control: where no taste is planted, an objective does not agree even with itself, and nothing is decided."""
    parameters = params.resolve(root, scale="smoke", setting="distributional_conflict") | MEASURED | {"conflict_pairs": 4}
    rows, _ = rows_for(fresh(root), random_pairs(32))
    now, _ = rows_for(fresh(root), random_pairs(32, seed=1))
    trainer = training.stage_trainer(fresh(root), tokenizer, now, parameters=parameters, output_dir=tmp_path, stage=2, earlier={"first": rows})
    trainer.train()
    assert mechanics.conflict_verdict(trainer.conflict_table())["verdict"] == "cannot be decided at this size"
