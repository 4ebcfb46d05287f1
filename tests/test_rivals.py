"""Displacement, drift and length: by hand, against brute force, and in their limits."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_pairs
from peft import get_peft_model
from scipy import stats

from seqdpo_utils import divergence, metrics, models, rivals, scoring


def records(**logps) -> pd.DataFrame:
    """Four pairs on three prompts; for each checkpoint the chosen and the rejected sums."""
    pairs = {
        "pair_id": list("wxyz"),
        "prompt_id": ["p", "p", "q", "r"],
        "objective": "a",
        "split": "eval",
        "chosen_tokens": [4, 2, 6, 3],
        "rejected_tokens": [2, 4, 3, 3],
    }
    return pd.concat([pd.DataFrame(pairs | {"checkpoint": name, "chosen_logp": c, "rejected_logp": r}) for name, (c, r) in logps.items()], ignore_index=True)


def test_displacement_by_hand():
    table = records(base=([-4.0] * 4, [-4.0] * 4), stage1=([-5.0, -5, -5, -3], [-6.0, -3, -8, -9]), stage2=([-4.0] * 4, [-6.0, -3, -8, -9]))
    found = rivals.displacement(table, resamples=500, rng=np.random.default_rng(0)).set_index(["from_checkpoint", "to_checkpoint"])
    assert list(found.index) == [("base", "stage1"), ("base", "stage2"), ("stage1", "stage2")]
    assert found.loc[("base", "stage1"), ["chosen", "rejected", "both_fell"]].tolist() == [-0.5, -2.5, 0.5]
    assert found.loc[("base", "stage2"), ["chosen", "both_fell"]].tolist() == [0.0, 0.0]
    assert found.loc[("stage1", "stage2"), ["chosen", "rejected", "both_fell"]].tolist() == [0.5, 0.0, 0.0]
    assert found[["n_pairs", "n_prompts"]].drop_duplicates().to_numpy().tolist() == [[4, 3]]
    assert (found["rejected_low"] <= found["rejected"]).all() and (found["rejected"] <= found["rejected_high"]).all()
    assert found.loc[("base", "stage1"), "chosen_low"] < found.loc[("base", "stage1"), "chosen_high"]


@pytest.fixture
def policy(base, parameters):
    """The tiny model under an adapter that was moved away from the base."""
    model = get_peft_model(base, models.lora_config(parameters)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.2, generator=generator)
    return model


def by_hand(model, prompt, completion) -> float:
    """Both full distributions of one unpadded sequence, in double precision."""
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *completion]])
        policy = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1].double(), 1)
        with model.disable_adapter():
            base = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1].double(), 1)
    return float((policy.exp() * (policy - base)).sum(1).mean())


def pairs_and_names(count: int):
    names = [f"pair{i}" for i in range(count)]
    return random_pairs(count), pd.DataFrame({"pair_id": names, "prompt_id": names, "objective": "a"})


@pytest.mark.parametrize("chunk", [1, 128])
def test_divergence_equals_brute_force(policy, monkeypatch, chunk):
    monkeypatch.setattr(divergence, "KL_ROWS", chunk)
    encoded, pairs = pairs_and_names(4)
    table = divergence.base_divergence(policy, pairs, encoded, checkpoint="stage1")
    expected = [by_hand(policy, pair.prompt, answer) for pair in encoded for answer in (pair.chosen, pair.rejected)]
    assert table["kl"].tolist() == pytest.approx(expected, rel=1e-4)
    assert table["kl"].min() > 0.01
    assert table["tokens"].tolist() == [len(answer) for pair in encoded for answer in (pair.chosen, pair.rejected)]
    assert table["side"].tolist() == ["chosen", "rejected"] * 4


def test_divergence_of_a_model_that_ignores_the_mask_is_taken_one_answer_at_a_time(policy, monkeypatch):
    encoded, pairs = pairs_and_names(3)
    together = divergence.base_divergence(policy, pairs, encoded, checkpoint="stage1")["kl"]
    rows = []
    monkeypatch.setattr(divergence, "distrust", lambda *_: "deaf")
    monkeypatch.setattr(divergence, "pack_rows", lambda given: rows.extend(given) or scoring.pack_rows(given))
    alone = divergence.base_divergence(policy, pairs, encoded, checkpoint="stage1")["kl"]
    assert [len(row.completions) for row in rows] == [1] * 6
    assert np.allclose(together, alone, rtol=1e-4)


def test_the_same_two_answers_under_two_objectives_are_computed_once(policy, monkeypatch):
    encoded, pairs = pairs_and_names(3)
    swapped = [pair._replace(chosen=pair.rejected, rejected=pair.chosen) for pair in encoded]
    rows = []
    monkeypatch.setattr(divergence, "pack_rows", lambda given: rows.extend(given) or scoring.pack_rows(given))
    both = divergence.base_divergence(policy, pd.concat([pairs, pairs.assign(objective="b")]), encoded + swapped, checkpoint="stage1")
    assert len(rows) == 3
    values = both.set_index(["objective", "pair_id", "side"])["kl"]
    assert all(values["a", name, "chosen"] == values["b", name, "rejected"] for name in pairs["pair_id"])


def test_an_adapter_that_did_not_move_has_no_divergence(base, parameters):
    encoded, pairs = pairs_and_names(2)
    model = get_peft_model(base, models.lora_config(parameters)).eval()
    table = divergence.base_divergence(model, pairs, encoded, checkpoint="stage0")
    assert table["kl"].abs().max() < 1e-9
    assert divergence.base_divergence(model, pairs.head(0), [], checkpoint="stage0").empty


def test_divergences_are_averaged_with_an_interval_over_prompts():
    table = pd.DataFrame({"pair_id": list("wwxx"), "prompt_id": list("ppqq"), "objective": "a", "checkpoint": "stage1", "kl": [0.1, 0.3, 0.4, 0.8]})
    (row,) = rivals.divergence_table(table, resamples=500, rng=np.random.default_rng(0)).to_dict("records")
    assert (row["n_pairs"], row["kl"], row["kl_low"], row["kl_high"]) == (2, pytest.approx(0.4), pytest.approx(0.2), pytest.approx(0.6))
    assert rivals.divergence_table(table.head(0), resamples=100, rng=np.random.default_rng(0)).empty


def planted(effect: float, *, pairs: int = 120) -> pd.DataFrame:
    """Measures whose policy margin moves with the length difference by `effect`, and noise."""
    rng = np.random.default_rng(0)
    chosen, rejected = rng.integers(2, 40, (2, pairs))
    names = [f"i{k}" for k in range(pairs)]
    parts = []
    for name, move in (("base", 0.0), ("stage1", 0.0), ("stage2", effect * (chosen - rejected) + rng.normal(size=pairs))):
        data = {
            "pair_id": names,
            "prompt_id": names,
            "objective": "a",
            "split": "eval",
            "checkpoint": name,
            "chosen_tokens": chosen,
            "rejected_tokens": rejected,
        }
        parts.append(pd.DataFrame(data | {"chosen_logp": -10.0 + move * chosen, "rejected_logp": -10.0}))
    return metrics.pair_measures(pd.concat(parts, ignore_index=True), beta=0.3)


@pytest.mark.parametrize(("effect", "sign"), [(0.5, 1), (-0.5, -1), (0.0, 0)])
def test_length_foretells_what_was_planted(effect, sign):
    measures = planted(effect)
    (row,) = rivals.length_as_predictor(measures, before="stage1", after="stage2", resamples=300, rng=np.random.default_rng(1)).to_dict("records")
    wide = metrics.pair_change(measures, "a", before="stage1", after="stage2").set_index("pair_id")
    lengths = measures[measures["checkpoint"] == "base"].set_index("pair_id").reindex(wide.index)
    longer = lengths["chosen_tokens"] - lengths["rejected_tokens"]
    assert row["spearman"] == pytest.approx(stats.spearmanr(longer, wide["change"]).statistic)
    assert np.sign(row["spearman_low"]) + np.sign(row["spearman_high"]) == 2 * sign
    assert row["longer_chosen"] == pytest.approx(((longer > 0) + 0.5 * (longer == 0)).mean())
    assert row["policy_accuracy"] == pytest.approx((wide["after"] > 0).mean())
    assert row["longer_chosen_low"] < row["longer_chosen"] < row["longer_chosen_high"]


def test_equal_lengths_foretell_nothing():
    measures = planted(0.5).assign(chosen_tokens=5, rejected_tokens=5)
    (row,) = rivals.length_as_predictor(measures, before="stage1", after="stage2", resamples=100, rng=np.random.default_rng(1)).to_dict("records")
    assert pd.isna(row["spearman"]) and pd.isna(row["spearman_low"])
    assert row["longer_chosen"] == 0.5
