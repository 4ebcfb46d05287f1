"""Planted truths: a later objective that reverses an earlier one, repeats it, or is unrelated to it."""

import numpy as np
import pandas as pd
import pytest
from conftest import data_for, fresh, random_pairs

from seqdpo_utils import conflict, ledger, models, stages
from seqdpo_utils.encoding import EncodedPair

PAIRS = 128
MEASURED = {"conflict_every": 1, "conflict_pairs": 16, "ledger_every": 4, "ledger_pairs": 16}
LATER = MEASURED | {"chain": "helpful-then-harmless"}


def preferring(*, seed: int) -> list[EncodedPair]:
    """Pairs of one taste: four tokens preferred to four others, after prompts that differ in two tokens."""
    rng = np.random.default_rng(seed)

    def answer(first: int) -> list[int]:
        return [*rng.integers(first, first + 4, 3).tolist(), 2]

    def prompt() -> list[int]:
        return [11, 12, 13, *rng.integers(10, 5000, 2).tolist(), 14]

    return [EncodedPair(prompt(), answer(100), answer(200)) for _ in range(PAIRS)]


def reverse(pair: EncodedPair) -> EncodedPair:
    return pair._replace(chosen=pair.rejected, rejected=pair.chosen)


def at_random(*, seed: int) -> list[EncodedPair]:
    """Other pairs of the same texts, one half of them reversed: on average they say nothing."""
    turned = set(np.random.default_rng(seed).permutation(PAIRS)[: PAIRS // 2].tolist())
    return [reverse(pair) if i in turned else pair for i, pair in enumerate(preferring(seed=seed + 1))]


@pytest.fixture(params=[0, 1], ids=["seed 0", "seed 1"])
def measured(request, tokenizer, parameters, tmp_path) -> dict[str, tuple[str, pd.Series]]:
    """Verdict on the gradients and bottom line of the ledger for the three later objectives."""
    sizes = {"learning_rate": 3e-3, "pairs_per_step": 16, "pairs_per_device": 8, "seed": request.param}
    parameters = parameters.model_copy(update=sizes)
    first = preferring(seed=request.param)
    data = data_for(fresh(), first)
    options = {"parameters": parameters, "output_dir": tmp_path}
    trainer = stages.stage_trainer(fresh(), tokenizer, data, **options)
    trainer.train()
    models.save_adapter(trainer.model, tmp_path / "first", manifest={})
    later = {"reversed": [reverse(pair) for pair in first], "same": first}
    later["unrelated"] = at_random(seed=request.param + 100)
    options |= {"parameters": parameters.model_copy(update=LATER), "previous": tmp_path / "first"}
    found = {}
    for name, pairs in later.items():
        trainer = stages.stage_trainer(fresh(), tokenizer, data_for(fresh(), pairs, helpful=first), **options)
        trainer.train()
        ((key, verdict),) = conflict.verdicts(trainer.conflict_table()).items()
        assert key == (2, "helpful", "train")
        found[name] = verdict["verdict"], ledger.totals(trainer.ledger_table(), dtype="float32").iloc[0]
    return found


def test_opposition_alignment_and_neither_are_told_apart(measured):
    verdicts = {name: verdict for name, (verdict, _) in measured.items()}
    assert verdicts["reversed"] == "opposed" and verdicts["same"] == "aligned"
    assert verdicts["unrelated"] in ("near-orthogonal", conflict.UNDECIDED)
    against, along, aside = (measured[name][1] for name in ("reversed", "same", "unrelated"))
    assert against["explained"] > 0.1 and against["measured"] > 0.1, (
        "undoing the first objective raises its loss"
    )
    assert along["explained"] < -0.1 and along["measured"] < -0.1, (
        "more of the first objective lowers its loss"
    )
    assert abs(aside["explained"]) < 0.5 * min(against["explained"], -along["explained"])
    assert all(total["share"] == pytest.approx(1, abs=0.1) for total in (against, along, aside))


def test_random_pairs_have_no_common_gradient(tokenizer, parameters, tmp_path):
    """Where no taste is planted, an objective does not agree even with itself, and nothing is decided."""
    few = parameters.model_copy(update=LATER | {"conflict_pairs": 4})
    data = data_for(fresh(), random_pairs(32, seed=1), helpful=random_pairs(32))
    trainer = stages.stage_trainer(fresh(), tokenizer, data, parameters=few, output_dir=tmp_path)
    trainer.train()
    table = trainer.conflict_table()
    assert conflict.conflict_verdict(table)["verdict"] == conflict.UNDECIDED
    assert table["corrected_cosine"].dropna().abs().le(1).all()


def test_a_first_stage_measures_nothing(tokenizer, parameters, tmp_path):
    """No earlier objective: both tables are empty, with their columns."""
    few = parameters.model_copy(update=MEASURED)
    data = data_for(fresh(), random_pairs(8))
    trainer = stages.stage_trainer(fresh(), tokenizer, data, parameters=few, output_dir=tmp_path)
    trainer.train()
    tables = trainer.conflict_table(), trainer.ledger_table()
    assert [tuple(table.columns) for table in tables] == [conflict.CONFLICT_COLUMNS, ledger.LEDGER_COLUMNS]
    assert all(table.empty for table in tables)
    assert conflict.conflict_verdict(tables[0])["verdict"] == "not measured"
    assert ledger.totals(tables[1], dtype="float32").empty
