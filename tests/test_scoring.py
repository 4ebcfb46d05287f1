import logging

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import pair_table, random_pairs
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from seqdpo_utils import scoring


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


@pytest.mark.parametrize("begin", [0, 1, 9])
def test_a_common_beginning_is_computed_once_and_changes_no_sum(base, monkeypatch, begin):
    pairs = [pair._replace(prompt=[*range(50, 50 + begin), *pair.prompt]) for pair in random_pairs(9)]
    rows = [scoring.PromptRow(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs]
    lengths = []
    monkeypatch.setattr(scoring, "pack_rows", lambda rows, *, cached=0, pack=scoring.pack_rows: lengths.append(cached) or pack(rows, cached=cached))
    sums = scoring.score_rows(base, rows, token_budget=150)
    assert set(lengths) == {begin} and len(lengths) > 3
    for pair, found in zip(pairs, sums, strict=True):
        assert found == pytest.approx([brute_force(base, pair.prompt, pair.chosen), brute_force(base, pair.prompt, pair.rejected)], rel=1e-4)


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


def adapted(kind: str):
    """A model whose adapter, also on the output head, changes its sums."""
    targets = {"gpt2": ["c_attn", "c_proj", "lm_head"], "qwen2": ["q_proj", "down_proj", "lm_head"]}[kind]
    return get_peft_model(tiny(kind), LoraConfig(r=3, lora_alpha=7, target_modules=targets, init_lora_weights=False)).eval()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Model has.*tie_word_embeddings")
@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_the_adapter_is_merged_while_scoring_and_every_weight_is_back_afterwards(kind):
    policy = adapted(kind)
    rows = [scoring.PromptRow(pair.prompt, [pair.chosen, pair.rejected]) for pair in random_pairs(4, seed=5)]
    right = [[brute_force(policy, row.prompt, c) for c in row.completions] for row in rows]
    with policy.disable_adapter():
        reference = [[brute_force(policy, row.prompt, c) for c in row.completions] for row in rows]
    assert np.abs(np.subtract(right, reference)).min() > 0.01
    before = {name: (id(p), p.detach().clone(), p.requires_grad) for name, p in policy.named_parameters(remove_duplicate=False)}
    thin = []
    for name, module in policy.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda *_: thin.append(1))
    assert scoring.distrust(policy, rows) is None
    thin.clear()
    sums = scoring.score_rows(policy, rows, token_budget=300, trusted=True)
    assert not thin and np.allclose(sums, right, rtol=1e-4, atol=0)
    with policy.disable_adapter():
        assert np.allclose(scoring.score_rows(policy, rows, token_budget=300), reference, rtol=1e-4, atol=0)
    for name, p in policy.named_parameters(remove_duplicate=False):
        assert (id(p), p.requires_grad) == (before[name][0], before[name][2]) and torch.equal(p, before[name][1]), name


def test_weights_are_back_when_scoring_fails_and_bfloat16_is_never_merged():
    policy = adapted("qwen2")
    weight = policy.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    kept = weight.detach().clone()
    with pytest.raises(RuntimeError, match="out of patience"), scoring.adapter_merged(policy) as bare:
        assert not torch.equal(bare.model.layers[0].self_attn.q_proj.base_layer.weight, kept)
        raise RuntimeError("out of patience")
    assert policy.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight is weight and torch.equal(weight, kept)
    with scoring.adapter_merged(policy.bfloat16()) as bare:
        assert torch.equal(bare.model.layers[0].self_attn.q_proj.base_layer.weight, kept.bfloat16())


def test_branches_do_not_see_each_other(base):
    """Whatever stands in the other branch, a completion keeps its sum."""
    one, two = random_pairs(2)
    alone = scoring.score_rows(base, [scoring.PromptRow(one.prompt, [one.chosen])], token_budget=500)[0][0]
    for other in (one.rejected, two.chosen, [7] * 40):
        beside = scoring.score_rows(base, [scoring.PromptRow(one.prompt, [other, one.chosen])], token_budget=500)[0][1]
        assert beside == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("fault", ["deaf to the mask", "refuses it"])
def test_a_model_that_does_not_take_the_mask_is_scored_on_padded_rows(base, monkeypatch, caplog, fault):
    rows = [scoring.PromptRow(pair.prompt, [pair.chosen, pair.rejected]) for pair in random_pairs(3)]
    right = scoring.score_rows(base, rows, token_budget=300)
    honest = base.model.forward

    def deaf(*args, attention_mask=None, position_ids=None, **options):
        if attention_mask is not None and fault == "refuses it":
            raise ValueError("only 2-D masks")
        return honest(*args, **options)

    monkeypatch.setattr(base.model, "forward", deaf)
    with caplog.at_level(logging.WARNING):
        sums = scoring.score_rows(base, rows, token_budget=300)
    assert "padded rows, one a completion, are used instead" in caplog.text
    assert np.allclose(np.ravel(sums), np.ravel(right), rtol=1e-4)


def test_a_shared_prompt_is_computed_once(base, monkeypatch):
    """Two objectives that label the same two answers cost one row, not two."""
    pairs = random_pairs(4)
    swapped = [pair._replace(chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]
    seen = []
    monkeypatch.setattr(scoring, "pack_rows", lambda rows, pack=scoring.pack_rows, **options: seen.extend(rows) or pack(rows, **options))
    table = pd.concat([pair_table(4), pair_table(4, objective="harmless")])
    records = scoring.score_pairs(base, table, pairs + swapped, checkpoint="base", token_budget=500)
    assert len(seen) == scoring.CHECKED_ROWS + len(pairs)  # the rows of the live check, then each prompt once
    assert records["chosen_logp"][:4].tolist() == records["rejected_logp"][4:].tolist()


def test_training_gradients_flow_through_the_packed_pass(base):
    pair = random_pairs(1)[0]
    packed = scoring.pack_rows([scoring.PromptRow(pair.prompt, [pair.chosen, pair.rejected])])
    base.lm_head.weight.requires_grad_(False)  # tied to the embedding, and frozen as under LoRA
    weight = base.model.layers[0].self_attn.q_proj.weight
    packed_gradient = torch.autograd.grad(scoring.completion_logps(base, packed)[packed.branch == 0].sum(), weight)[0]
    logits = base(torch.tensor([[*pair.prompt, *pair.chosen]])).logits[0, len(pair.prompt) - 1 : -1]
    plain = torch.autograd.grad(torch.log_softmax(logits, 1).gather(1, torch.tensor(pair.chosen)[:, None]).sum(), weight)[0]
    assert torch.allclose(packed_gradient, plain, rtol=1e-3, atol=1e-5 * float(plain.abs().max()))


def test_many_head_rows_are_computed_in_pieces(base, monkeypatch):
    """No more logits than HEAD_ROWS rows at a time, forward and backward, and the same numbers."""
    pair = random_pairs(1)[0]
    packed = scoring.pack_rows([scoring.PromptRow(pair.prompt, [pair.chosen, pair.rejected])])
    base.lm_head.weight.requires_grad_(False)
    weight, factors = base.model.layers[1].mlp.down_proj.weight, torch.randn(len(packed.target), generator=torch.Generator().manual_seed(0))
    results, sizes = [], []
    base.lm_head.register_forward_hook(lambda head, inputs, logits: sizes.append(len(logits)))
    for rows in (1024, 3):
        monkeypatch.setattr(scoring, "HEAD_ROWS", rows)
        logps = scoring.completion_logps(base, packed)
        results.append((logps, torch.autograd.grad((factors * logps).sum(), weight)[0]))
    (whole, gradient), (pieces, same_gradient) = results
    assert sizes[0] == len(packed.target) and max(sizes[1:]) == 3 and sum(sizes[1:]) == len(packed.target)
    assert torch.allclose(whole, pieces, atol=1e-5)
    assert torch.allclose(gradient, same_gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def test_flash_attention_is_never_asked_for_the_shared_prompt_pass(base, monkeypatch):
    """Its kernels take no 4-D mask: such a model is scored on padded rows."""
    row = scoring.PromptRow([5, 6, 7], [[8, 9], [10]])
    assert scoring.distrust(base, [row]) is None
    monkeypatch.setattr(base.config, "_attn_implementation_internal", "flash_attention_2")
    assert "no 4-D mask" in scoring.distrust(base, [row])
