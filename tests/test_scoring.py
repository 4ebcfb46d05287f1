import numpy as np
import pandas as pd
import pytest
import torch
from conftest import pair_table, random_pairs
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from seqdpo_utils import scoring
from seqdpo_utils.paths import StudyError


def brute_force(model, prompt: list[int], completion: list[int]) -> float:
    """One token at a time: log-softmax of the last position, added up. Shares no code with the scorer."""
    total, ids = 0.0, list(prompt)
    for token in completion:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        total += float(torch.log_softmax(logits, 0)[token])
        ids.append(token)
    return total


@pytest.mark.parametrize("token_budget", [64, 200, 5000])
def test_sums_equal_a_loop_over_single_sequences(base, token_budget):
    pairs = random_pairs(12)
    records = scoring.score_pairs(base, pair_table(12), pairs, checkpoint="base", token_budget=token_budget)
    for pair, row in zip(pairs, records.itertuples(), strict=True):
        assert row.chosen_logp == pytest.approx(brute_force(base, pair.prompt, pair.chosen), rel=1e-4)
        assert row.rejected_logp == pytest.approx(brute_force(base, pair.prompt, pair.rejected), rel=1e-4)
        assert (row.chosen_tokens, row.rejected_tokens) == (len(pair.chosen), len(pair.rejected))


def tiny(kind: str):
    torch.manual_seed(1)
    size = {"vocab_size": 5000, "bos_token_id": 0, "eos_token_id": 2}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, **size)).eval()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(initializer_range=0.3, **shape, **size)).eval()


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_other_architectures_give_equal_sums(kind):
    model = tiny(kind)
    rows = [scoring.PromptRow(pair.prompt, [pair.chosen, pair.rejected, pair.chosen[:1]]) for pair in random_pairs(5, seed=3)]
    for row, sums in zip(rows, scoring.score_rows(model, rows, token_budget=300), strict=True):
        assert sums == pytest.approx([brute_force(model, row.prompt, c) for c in row.completions], rel=1e-4)


def test_branches_do_not_see_each_other(base):
    """Whatever stands in the other branch, a completion keeps its sum."""
    one, two = random_pairs(2)
    alone = scoring.score_rows(base, [scoring.PromptRow(one.prompt, [one.chosen])], token_budget=500)[0][0]
    for other in (one.rejected, two.chosen, [7] * 40):
        beside = scoring.score_rows(base, [scoring.PromptRow(one.prompt, [other, one.chosen])], token_budget=500)[0][1]
        assert beside == pytest.approx(alone, rel=1e-5)


def test_a_model_that_ignores_the_mask_is_scored_the_plain_way(base, monkeypatch):
    rows = [scoring.PromptRow(pair.prompt, [pair.chosen, pair.rejected]) for pair in random_pairs(3)]
    right = scoring.score_rows(base, rows, token_budget=300)
    honest = base.model.forward

    def deaf(*args, attention_mask=None, position_ids=None, **options):
        return honest(*args, **options)

    monkeypatch.setattr(base.model, "forward", deaf)
    with pytest.warns(UserWarning, match="one sequence at a time"):
        sums = scoring.score_rows(base, rows, token_budget=300)
    assert np.allclose(np.ravel(sums), np.ravel(right), rtol=1e-4)


def test_a_shared_prompt_is_computed_once(base, monkeypatch):
    """Two objectives that label the same two answers cost one row, not two."""
    pairs = random_pairs(4)
    swapped = [pair._replace(chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]
    seen = []
    monkeypatch.setattr(scoring, "pack_rows", lambda rows, pack=scoring.pack_rows: seen.extend(rows) or pack(rows))
    table = pd.concat([pair_table(4), pair_table(4, objective="harmless")])
    records = scoring.score_pairs(base, table, pairs + swapped, checkpoint="base", token_budget=500)
    assert len(seen) == 1 + len(pairs)  # one row for the live check, then each prompt once
    assert records["chosen_logp"][:4].tolist() == records["rejected_logp"][4:].tolist()


def test_training_gradients_flow_through_the_packed_pass(base):
    pair = random_pairs(1)[0]
    packed = scoring.pack_rows([scoring.PromptRow(pair.prompt, [pair.chosen, pair.rejected])])
    weight = base.model.layers[0].self_attn.q_proj.weight
    packed_gradient = torch.autograd.grad(scoring.completion_logps(base, packed)[packed.branch == 0].sum(), weight)[0]
    logits = base(torch.tensor([[*pair.prompt, *pair.chosen]])).logits[0, len(pair.prompt) - 1 : -1]
    plain = torch.autograd.grad(torch.log_softmax(logits, 1).gather(1, torch.tensor(pair.chosen)[:, None]).sum(), weight)[0]
    assert torch.allclose(packed_gradient, plain, rtol=1e-3, atol=1e-5 * float(plain.abs().max()))


def test_many_head_rows_are_computed_in_pieces(base, monkeypatch):
    pair = random_pairs(1)[0]
    packed = scoring.pack_rows([scoring.PromptRow(pair.prompt, [pair.chosen, pair.rejected])])
    whole = scoring.completion_logps(base, packed)
    monkeypatch.setattr(scoring, "HEAD_ROWS", 3)
    pieces = scoring.completion_logps(base, packed)
    assert torch.allclose(whole, pieces, atol=1e-5) and pieces.requires_grad


def test_a_pair_without_a_record_is_an_error():
    scores = pair_table(2).drop(columns=["prompt_id", "split"]).assign(chosen_logp=-1.0, rejected_logp=-2.0, chosen_tokens=1, rejected_tokens=1)
    assert scoring.records_of(scores, pair_table(2).iloc[::-1])["pair_id"].tolist() == ["helpful-1", "helpful-0"]
    with pytest.raises(StudyError, match="1 of 3 pairs have no record"):
        scoring.records_of(scores, pair_table(3))


def test_flash_attention_is_never_asked_for_the_shared_prompt_pass(base, monkeypatch):
    """Its kernels take no 4-D mask: such a model is scored one sequence at a time."""
    row = scoring.PromptRow([5, 6, 7], [[8, 9], [10]])
    assert scoring.agrees_with_plain_path(base, row)
    monkeypatch.setattr(base.config, "_attn_implementation_internal", "flash_attention_2")
    assert not scoring.agrees_with_plain_path(base, row)
