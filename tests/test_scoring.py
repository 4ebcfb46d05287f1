import logging

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import pair_table, random_pairs
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from seqdpo_utils import scoring
from seqdpo_utils.scoring import PromptRow, Scorer


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
    scorer = Scorer(base, token_budget=token_budget)
    records = scorer.records(pair_table(12), pairs, checkpoint="base")
    for pair, row in zip(pairs, records.itertuples(), strict=True):
        assert row.chosen_logp == pytest.approx(brute_force(base, pair.prompt, pair.chosen), rel=1e-4)
        assert row.rejected_logp == pytest.approx(brute_force(base, pair.prompt, pair.rejected), rel=1e-4)
        assert (row.chosen_tokens, row.rejected_tokens) == (len(pair.chosen), len(pair.rejected))


@pytest.mark.parametrize("begin", [0, 1, 9])
def test_a_common_beginning_is_computed_once_and_changes_no_sum(base, monkeypatch, begin):
    pairs = [pair._replace(prompt=[*range(50, 50 + begin), *pair.prompt]) for pair in random_pairs(9)]
    rows = [PromptRow(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs]
    lengths = []
    pack = scoring.pack_rows

    def spy(rows, *, cached):
        lengths.append(cached)
        return pack(rows, cached=cached)

    monkeypatch.setattr(scoring, "pack_rows", spy)
    sums = Scorer(base, token_budget=150).sums(rows)
    assert set(lengths) == {begin} and len(lengths) > 3
    for pair, found in zip(pairs, sums, strict=True):
        right = [brute_force(base, pair.prompt, answer) for answer in (pair.chosen, pair.rejected)]
        assert found == pytest.approx(right, rel=1e-4)


def tiny(kind: str):
    torch.manual_seed(1)
    size = {"vocab_size": 5000, "bos_token_id": 0, "eos_token_id": 2}
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, **size)
        ).eval()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(initializer_range=0.3, **shape, **size)).eval()


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_other_architectures_give_equal_sums(kind):
    model = tiny(kind)
    pairs = random_pairs(5, seed=3)
    rows = [PromptRow(pair.prompt, [pair.chosen, pair.rejected, pair.chosen[:1]]) for pair in pairs]
    for row, sums in zip(rows, Scorer(model, token_budget=300).sums(rows), strict=True):
        assert sums == pytest.approx([brute_force(model, row.prompt, c) for c in row.completions], rel=1e-4)


def adapted(kind: str, *, moved: bool = True):
    """A model whose adapter, also on the output head, changes its sums, or does not yet."""
    targets = {"gpt2": ["c_attn", "c_proj", "lm_head"], "qwen2": ["q_proj", "down_proj", "lm_head"]}[kind]
    config = LoraConfig(r=3, lora_alpha=7, target_modules=targets, init_lora_weights=not moved)
    return get_peft_model(tiny(kind), config).eval()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Model has.*tie_word_embeddings")
@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_the_adapter_is_merged_while_scoring_and_every_weight_is_back_afterwards(kind):
    policy = adapted(kind)
    rows = [PromptRow(pair.prompt, [pair.chosen, pair.rejected]) for pair in random_pairs(4, seed=5)]
    right = [[brute_force(policy, row.prompt, c) for c in row.completions] for row in rows]
    with policy.disable_adapter():
        reference = [[brute_force(policy, row.prompt, c) for c in row.completions] for row in rows]
    assert np.abs(np.subtract(right, reference)).min() > 0.01
    weights = list(policy.named_parameters(remove_duplicate=False))
    before = {name: (id(p), p.detach().clone(), p.requires_grad) for name, p in weights}
    thin = []
    for name, module in policy.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda *_: thin.append(1))
    scorer = Scorer(policy, token_budget=300)
    assert scorer.fault(rows) is None
    thin.clear()
    sums = scorer.sums(rows)
    assert not thin and np.allclose(sums, right, rtol=1e-4, atol=0)
    with policy.disable_adapter():
        assert np.allclose(scorer.sums(rows), reference, rtol=1e-4, atol=0)
    assert np.allclose(scorer.sums(rows), right, rtol=1e-4, atol=0)
    for name, p in policy.named_parameters(remove_duplicate=False):
        assert (id(p), p.requires_grad) == (before[name][0], before[name][2]) and torch.equal(
            p, before[name][1]
        ), name


@pytest.mark.parametrize("scored_before", [True, False])
def test_a_faulty_merge_is_found_out_even_when_a_fresh_adapter_hid_it(monkeypatch, caplog, scored_before):
    """With B = 0 any merge is right. The first sums after training compare one completion more, once."""
    policy = adapted("qwen2", moved=False)
    rows = [PromptRow(pair.prompt, [pair.chosen, pair.rejected]) for pair in random_pairs(4, seed=5)]
    scorer, checks, check = Scorer(policy, token_budget=300), [], scoring.shared_pass_fault

    def spy(model, rows):
        checks.append([len(row.completions) for row in rows])
        return check(model, rows)

    honest = Linear.get_delta_weight
    monkeypatch.setattr(scoring, "shared_pass_fault", spy)
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: 1.5 * honest(self, adapter))
    if scored_before:
        scorer.sums(rows)
        assert checks == [[2] * scoring.CHECKED_ROWS] and not caplog.text
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    right = [[brute_force(policy, row.prompt, c) for c in row.completions] for row in rows]
    for _ in range(2):
        assert np.allclose(scorer.sums(rows), right, rtol=1e-4, atol=0)
    assert checks[1:] == ([[1]] if scored_before else [])
    assert "padded rows, one a completion, are used instead" in caplog.text


def test_each_thing_is_proven_once(monkeypatch):
    policy = adapted("qwen2")
    rows = [PromptRow(pair.prompt, [pair.chosen, pair.rejected]) for pair in random_pairs(4, seed=5)]
    scorer, checks = Scorer(policy, token_budget=300), []
    monkeypatch.setattr(scoring, "shared_pass_fault", lambda model, rows: checks.append(len(rows)))
    assert scorer.sums([]) == [] and not checks
    with policy.disable_adapter():
        for _ in range(2):
            scorer.sums(rows)
    assert checks == [scoring.CHECKED_ROWS]  # the adapter was off: nothing was merged yet
    for _ in range(2):
        scorer.sums(rows)
    assert checks == [scoring.CHECKED_ROWS, 1]


def test_weights_are_back_when_scoring_fails_and_bfloat16_is_never_merged():
    policy = adapted("qwen2")
    weight = policy.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    kept = weight.detach().clone()
    with pytest.raises(RuntimeError, match="out of patience"), scoring.adapter_merged(policy) as bare:
        assert not torch.equal(bare.model.layers[0].self_attn.q_proj.base_layer.weight, kept)
        raise RuntimeError("out of patience")
    assert policy.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight is weight
    assert torch.equal(weight, kept)
    with scoring.adapter_merged(policy.bfloat16()) as bare:
        assert torch.equal(bare.model.layers[0].self_attn.q_proj.base_layer.weight, kept.bfloat16())


def test_branches_do_not_see_each_other(base):
    """Whatever stands in the other branch, a completion keeps its sum."""
    one, two = random_pairs(2)
    scorer = Scorer(base, token_budget=500)
    alone = scorer.sums([PromptRow(one.prompt, [one.chosen])])[0][0]
    for other in (one.rejected, two.chosen, [7] * 40):
        beside = scorer.sums([PromptRow(one.prompt, [other, one.chosen])])[0][1]
        assert beside == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("fault", ["deaf to the mask", "refuses it"])
def test_a_model_that_does_not_take_the_mask_is_scored_on_padded_rows(base, monkeypatch, caplog, fault):
    rows = [PromptRow(pair.prompt, [pair.chosen, pair.rejected]) for pair in random_pairs(3)]
    right = Scorer(base, token_budget=300).sums(rows)
    honest = base.model.forward

    def deaf(*args, attention_mask=None, position_ids=None, **options):
        if attention_mask is not None and fault == "refuses it":
            raise ValueError("only 2-D masks")
        return honest(*args, **options)

    monkeypatch.setattr(base.model, "forward", deaf)
    with caplog.at_level(logging.WARNING):
        sums = Scorer(base, token_budget=300).sums(rows)
    assert "padded rows, one a completion, are used instead" in caplog.text
    assert np.allclose(sums, right, rtol=1e-4)


def test_a_shared_prompt_is_computed_once(base, monkeypatch):
    """Two objectives that label the same two answers cost one row, not two."""
    pairs = random_pairs(4)
    swapped = [pair._replace(chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]
    seen, pack = [], scoring.pack_rows

    def spy(rows, *, cached):
        seen.extend(rows)
        return pack(rows, cached=cached)

    monkeypatch.setattr(scoring, "pack_rows", spy)
    table = pd.concat([pair_table(4), pair_table(4, objective="harmless")])
    records = Scorer(base, token_budget=500).records(table, pairs + swapped, checkpoint="base")
    assert len(seen) == scoring.CHECKED_ROWS + len(pairs)  # the rows of the live check, then each prompt once
    assert records["chosen_logp"][:4].tolist() == records["rejected_logp"][4:].tolist()


def test_training_gradients_flow_through_the_packed_pass(base):
    pair = random_pairs(1)[0]
    packed = scoring.pack_rows([PromptRow(pair.prompt, [pair.chosen, pair.rejected])])
    base.lm_head.weight.requires_grad_(False)  # tied to the embedding, and frozen as under LoRA
    weight = base.model.layers[0].self_attn.q_proj.weight
    logps = scoring.completion_logps(base, packed)[packed.branch == 0]
    packed_gradient = torch.autograd.grad(logps.sum(), weight)[0]
    logits = base(torch.tensor([[*pair.prompt, *pair.chosen]])).logits[0, len(pair.prompt) - 1 : -1]
    logps = torch.log_softmax(logits, 1).gather(1, torch.tensor(pair.chosen)[:, None])
    plain = torch.autograd.grad(logps.sum(), weight)[0]
    assert torch.allclose(packed_gradient, plain, rtol=1e-3, atol=1e-5 * float(plain.abs().max()))


def test_many_head_rows_are_computed_in_pieces(base, monkeypatch):
    """No more logits than HEAD_ROWS rows at a time, forward and backward, and the same numbers."""
    pair = random_pairs(1)[0]
    packed = scoring.pack_rows([PromptRow(pair.prompt, [pair.chosen, pair.rejected])])
    base.lm_head.weight.requires_grad_(False)
    weight = base.model.layers[1].mlp.down_proj.weight
    factors = torch.randn(len(packed.target), generator=torch.Generator().manual_seed(0))
    results, sizes = [], []
    base.lm_head.register_forward_hook(lambda head, inputs, logits: sizes.append(len(logits)))
    for rows in (1024, 3):
        monkeypatch.setattr(scoring, "HEAD_ROWS", rows)
        logps = scoring.completion_logps(base, packed)
        results.append((logps, torch.autograd.grad((factors * logps).sum(), weight)[0]))
    (whole, gradient), (pieces, same_gradient) = results
    assert sizes[0] == sum(sizes[1:]) == len(packed.target) and max(sizes[1:]) == 3
    assert torch.allclose(whole, pieces, atol=1e-5)
    assert torch.allclose(gradient, same_gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def test_flash_attention_is_never_asked_for_the_shared_prompt_pass(base, monkeypatch):
    """Its kernels take no 4-D mask: such a model is scored on padded rows."""
    row = PromptRow([5, 6, 7], [[8, 9], [10]])
    assert scoring.shared_pass_fault(base, [row]) is None
    monkeypatch.setattr(base.config, "_attn_implementation_internal", "flash_attention_2")
    assert "no 4-D mask" in scoring.shared_pass_fault(base, [row])


def test_a_packed_row_is_the_picture_in_the_docstring():
    p, q, r, a, b, u, v, w = range(11, 19)
    packed = scoring.pack_rows([PromptRow([p, q, r], [[a, b], [u, v, w]])])
    assert packed.ids.tolist() == [[p, q, r, a, r, u, v]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 2, 3, 4]]
    assert (packed.source.tolist(), packed.target.tolist()) == ([2, 3, 4, 5, 6], [a, b, u, v, w])
    assert packed.branch.tolist() == [0, 0, 1, 1, 1]
    picture = ["1000000", "1100000", "1110000", "1111000", "1100100", "1100110", "1100111"]
    assert packed.mask[0, 0].int().tolist() == [[int(bit) for bit in line] for line in picture]


def test_a_cached_beginning_leaves_the_row_and_stays_in_the_mask():
    rows = [PromptRow([11, 12, 13], [[14, 15], [16, 17, 18]]), PromptRow([11, 12], [[19]])]
    whole, packed = scoring.pack_rows(rows), scoring.pack_rows(rows, cached=1)
    assert packed.ids.tolist() == [whole.ids[0, 1:].tolist(), [12, 0, 0, 0, 0, 0]]
    assert packed.positions[0].tolist() == whole.positions[0, 1:].tolist() and packed.positions[1, 0] == 1
    assert torch.equal(packed.mask[0], whole.mask[0, :, 1:])
    assert packed.mask[1, 0, 1:].any(1).all()  # a pad without any key to see would be NaN
    assert (packed.source.tolist(), packed.branch.tolist()) == ([1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 1, 2])


def test_batches_hold_the_budget_and_few_pads():
    rows = [PromptRow([1] * 5, [[2] * n]) for n in (7, 90, 30, 8, 28, 6, 31, 200)]
    lengths = [row.tokens - 3 for row in rows]
    found = list(scoring.batches(rows, 96, cached=3))
    assert found[0] == [7]  # one row alone may exceed the budget
    for batch in found[1:]:
        computed = max(lengths[i] for i in batch) * len(batch)
        assert computed <= 96 and computed - sum(lengths[i] for i in batch) <= 96 / scoring.PADS
    assert found == [[7], [1], [6, 2], [4], [3, 0, 5]]
