"""The exact divergence from the base: against brute force, against double precision, and in its limits."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_pairs
from peft import LoraConfig, get_peft_model

from seqdpo_utils import divergence, scoring
from seqdpo_utils.divergence import base_divergence
from seqdpo_utils.scoring import Scorer

pytestmark = pytest.mark.filterwarnings("ignore:Model has.*tie_word_embeddings")


def adapted(base, *, move: float):
    """The tiny model under an adapter, also on the output head, that moved so far."""
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head"], task_type="CAUSAL_LM")
    model, generator = get_peft_model(base, config).eval(), torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 1.0, generator=generator).mul_(move)
    return model


@pytest.fixture
def policy(base):
    return adapted(base, move=0.2)


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


def drift(model, pairs, encoded, *, token_budget: int = 100, checkpoint: str = "a") -> pd.DataFrame:
    return base_divergence(Scorer(model, token_budget=token_budget), pairs, encoded, checkpoint=checkpoint)


@pytest.mark.parametrize(("chunk", "begin"), [(1, 0), (128, 0), (128, 9)])
def test_divergence_equals_brute_force(policy, monkeypatch, chunk, begin):
    monkeypatch.setattr(divergence, "KL_ROWS", chunk)
    encoded, pairs = pairs_and_names(6)
    encoded = [pair._replace(prompt=[*range(50, 50 + begin), *pair.prompt]) for pair in encoded]
    table = drift(policy, pairs, encoded)
    answers = [answer for pair in encoded for answer in (pair.chosen, pair.rejected)]
    prompts = [pair.prompt for pair in encoded for _ in range(2)]
    expected = [by_hand(policy, *text) for text in zip(prompts, answers, strict=True)]
    assert table["kl"].tolist() == pytest.approx(expected, rel=1e-4)
    assert table["kl"].min() > 0.01
    assert table["tokens"].tolist() == [len(answer) for answer in answers]
    assert table["side"].tolist() == ["chosen", "rejected"] * 6
    assert table["pair_id"].tolist() == [name for name in pairs["pair_id"] for _ in range(2)]
    assert set(table["checkpoint"]) == {"a"} and set(table["objective"]) == {"a"}


@pytest.mark.parametrize("height", [0.0, 40.0])
@pytest.mark.parametrize("move", [1e-3, 0.1, 1.0, 5.0, 200.0])
def test_float32_numbers_give_what_double_precision_gives(move, height):
    """Also where one side's logits lie higher as a whole, and where the two have nothing in common."""
    generator = torch.Generator().manual_seed(0)
    base = 3 * torch.randn(40, 5000, generator=generator) + 20
    policy = base + move * torch.randn(40, 5000, generator=generator) + height
    wide, narrow = policy.double(), base.double()
    exact = (torch.softmax(wide, 1) * (wide - narrow)).sum(1) - wide.logsumexp(1) + narrow.logsumexp(1)
    found = divergence._kl(policy.clone(), base.clone())
    assert found.dtype == torch.float64
    assert torch.allclose(found, exact, rtol=0, atol=1e-6)
    assert exact.max() > 15 or move < 200


def test_a_model_that_ignores_the_mask_gives_one_answer_at_a_time(policy, monkeypatch):
    encoded, pairs = pairs_and_names(3)
    together = drift(policy, pairs, encoded)["kl"]
    sizes, padded = [], scoring.padded_logits

    def spy(model, rows):
        sizes.append([len(row.completions) for row in rows])
        return padded(model, rows)

    monkeypatch.setattr(scoring, "shared_pass_fault", lambda *_: "deaf")
    monkeypatch.setattr(scoring, "padded_logits", spy)
    monkeypatch.setattr(scoring, "pack_rows", None)
    alone = drift(policy, pairs, encoded)["kl"]
    assert sizes == [[1]] * 12
    assert np.allclose(together, alone, rtol=1e-4)


def test_the_same_two_answers_under_two_objectives_are_computed_once(policy, monkeypatch):
    encoded, pairs = pairs_and_names(3)
    swapped = [pair._replace(chosen=pair.rejected, rejected=pair.chosen) for pair in encoded]
    scorer, seen, pack = Scorer(policy, token_budget=100), [], scoring.pack_rows
    scorer.fault(scoring.prompt_rows(encoded))

    def spy(rows, *, cached):
        seen.extend(rows)
        return pack(rows, cached=cached)

    monkeypatch.setattr(scoring, "pack_rows", spy)
    twice = pd.concat([pairs, pairs.assign(objective="b")])
    both = base_divergence(scorer, twice, encoded + swapped, checkpoint="a")
    assert len(seen) == 2 * 3  # each prompt once with the adapter and once without, and no second check
    values = both.set_index(["objective", "pair_id", "side"])["kl"]
    assert all(values["a", name, "chosen"] == values["b", name, "rejected"] for name in pairs["pair_id"])


def test_an_adapter_that_did_not_move_has_no_divergence(base):
    encoded, pairs = pairs_and_names(2)
    model = adapted(base, move=0.0)
    table = drift(model, pairs, encoded)
    assert table["kl"].abs().max() < 1e-9
    nothing = drift(model, pairs.head(0), [])
    assert nothing.empty and list(nothing.columns) == list(table.columns)
