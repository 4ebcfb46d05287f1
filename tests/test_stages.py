"""DPO stages against TRL itself, the reference proof against every wrong reference, variants by hand."""

import dataclasses
import importlib.util
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import adapter_of, data_for, fresh, pair_table, random_pairs, records_for, trained_log
from peft import PeftModel
from safetensors.torch import load_file
from trl import DPOTrainer

from seqdpo_utils import metrics, models, scoring, stage_data, stages
from seqdpo_utils.encoding import EncodedPair, encode_pair
from seqdpo_utils.errors import StudyError
from seqdpo_utils.measuring import LengthGrouped
from seqdpo_utils.paths import RunPaths, check_trained, write_json, write_table
from seqdpo_utils.scoring import sequence_logp


@pytest.fixture(scope="session")
def data():
    """What the first stage of the fixture `stage1` was trained on."""
    return data_for(fresh(), random_pairs(16))


@pytest.fixture
def make(tokenizer, parameters, tmp_path):
    """Makes the trainer of a stage over `tmp_path`."""

    def trainer(data, *, base=None, previous=None, **changes):
        options = {
            "parameters": parameters.model_copy(update=changes),
            "output_dir": tmp_path,
            "previous": previous,
        }
        return stages.stage_trainer(base or fresh(), tokenizer, data, **options)

    return trainer


def plain_trl(model, tokenizer, rows, parameters, tmp_path, **options) -> DPOTrainer:
    """TRL's own trainer on the same token ids, its own head, reference computed by TRL unless told
    otherwise."""

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

    config = stages.dpo_config(parameters, pairs=len(rows), output_dir=tmp_path)
    config.precompute_ref_log_probs = False
    return Tokenised(model, args=config, train_dataset=rows, processing_class=tokenizer, **options)


@pytest.mark.parametrize("pairs_per_device", [1, 2, 8])
def test_the_loss_trajectory_and_the_weights_are_trls(
    tokenizer, parameters, tmp_path, make, pairs_per_device
):
    """Grouped by length or not, a step has the pairs of its window; TRL gets them in another order within
    it."""
    sizes = {"pairs_per_device": pairs_per_device, "pairs_per_step": 8, "epochs": 2}
    data = data_for(fresh(), random_pairs(24))
    ours, rows = make(data, **sizes), data.rows
    lora = models.lora_config(parameters)
    theirs = plain_trl(
        fresh(), tokenizer, rows, parameters.model_copy(update=sizes), tmp_path, peft_config=lora
    )
    start = adapter_of(ours)
    if pairs_per_device > 1:
        theirs._get_train_sampler = lambda *_: Windows(ours._get_train_sampler(rows), 8)
    ours.train(), theirs.train()
    log = [trained_log(trainer) for trainer in (ours, theirs)]
    for key in ("loss", "grad_norm", "rewards/margins", "rewards/chosen", "logps/rejected", "learning_rate"):
        assert np.allclose([e[key] for e in log[0]], [e[key] for e in log[1]], rtol=1e-3, atol=1e-5), key
    ends = [
        torch.cat([(p - start[name]).flatten() for name, p in adapter_of(trainer).items()])
        for trainer in (ours, theirs)
    ]
    assert (ends[0] - ends[1]).norm() < 1e-3 * ends[1].norm()


class Windows(torch.utils.data.Sampler):
    """The windows of another sampler, each in ascending order."""

    def __init__(self, sampler, size):
        self.sampler, self.size, self.set_epoch = sampler, size, sampler.set_epoch

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        order = list(self.sampler)
        return iter(
            [i for start in range(0, len(order), self.size) for i in sorted(order[start : start + self.size])]
        )


def test_length_groups_are_batches_of_one_step_and_waste_less():
    lengths = torch.randint(5, 200, (44,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = LengthGrouped(lengths, window=16, batch=4, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(44)) and order == list(sampler)
    shuffled = torch.randperm(44, generator=torch.Generator().manual_seed(3)).tolist()
    assert [set(order[k : k + 16]) for k in (0, 16, 32)] == [set(shuffled[k : k + 16]) for k in (0, 16, 32)]

    def padded(indices):
        return sum(4 * max(lengths[i] for i in indices[k : k + 4]) for k in range(0, 44, 4))

    assert sum(lengths) < padded(order) < 0.85 * padded(shuffled)
    firsts = [lengths[order[k]] for k in (0, 4, 8, 12)]
    assert firsts != sorted(firsts, reverse=True), "the batches of a step must not run from long to short"
    sampler.set_epoch(1)
    assert list(sampler) != order


def test_the_loss_is_the_equation(make, parameters, data, stage1):
    """-log sigmoid(beta * difference of log-ratios), from sums scored one sequence at a time."""
    trainer, rows, scores = make(data, previous=stage1), data.rows, data.reference
    batch = trainer._prepare_inputs(trainer.data_collator(list(rows.select(range(4)))))
    policy = [
        {
            f"{side}_logp": scoring.sequence_logp(trainer.model, row["prompt_ids"], row[f"{side}_ids"])
            for side in ("chosen", "rejected")
        }
        for row in rows.select(range(4))
    ]
    records = scores.head(4).drop(columns=["chosen_logp", "rejected_logp"]).join(pd.DataFrame(policy))
    by_hand = metrics.dpo_loss(metrics.dpo_margin(records, scores, beta=parameters.beta)).mean()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(by_hand, rel=1e-4)


def test_modpo_is_a_point_of_the_reference_axis(make, parameters, stage1):
    """-log sigmoid((beta h - (1 - w) beta h_1) / w), h and h_1 log-ratios of policy and stage before."""
    pairs, weight = random_pairs(8), 0.25
    data = data_for(fresh(), pairs, helpful=random_pairs(8, seed=3))
    trainer = make(data, previous=stage1, reference=1 - weight, beta_factor=1 / weight)
    before = records_for(trainer.model.eval(), pairs)
    with torch.no_grad():
        for number, (name, weights) in enumerate(trainer.model.named_parameters()):
            if "lora_B" in name:
                weights.add_(
                    0.05 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(number))
                )
    after = records_for(trainer.model.eval(), pairs)
    h, h_1 = (
        metrics.dpo_margin(records, data.reference, beta=parameters.beta) for records in (after, before)
    )
    by_hand = metrics.dpo_loss((h - (1 - weight) * h_1) / weight).mean()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    assert loss.item() == pytest.approx(by_hand, rel=1e-4)
    assert abs(by_hand - metrics.dpo_loss(h).mean()) > 1e-2


def test_swapping_chosen_and_rejected_flips_the_gradient_and_every_margin(make, parameters):
    pairs = random_pairs(8)
    swapped = [pair._replace(chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]
    steps, margins = [], []
    for version in (pairs, swapped):
        data = data_for(fresh(), version)
        trainer, scores = make(data), data.reference
        loss = trainer.compute_loss(
            trainer.model, trainer._prepare_inputs(trainer.data_collator(list(data.rows)))
        )
        gradient = torch.autograd.grad(
            loss, [p for n, p in trainer.model.named_parameters() if "lora_B" in n]
        )
        steps.append(torch.cat([g.flatten() for g in gradient]))
        trainer.train()
        after = records_for(trainer.model, pairs, checkpoint="helpful")
        base = (
            scores
            if version is pairs
            else scores.rename(columns={"chosen_logp": "rejected_logp", "rejected_logp": "chosen_logp"})
        )
        margins.append(metrics.dpo_margin(after, base, beta=parameters.beta))
    assert torch.allclose(steps[0], -steps[1], atol=1e-5)
    assert steps[0].norm() > 0
    assert margins[0].mean() > 0.05 and margins[1].mean() < -0.05


def test_a_later_stage_goes_on_with_the_adapter_and_counts_from_the_base(make, data, stage1):
    trainer = make(data, previous=stage1)
    saved = load_file(stage1 / "adapter_model.safetensors")
    loaded = {name.replace(".default", ""): p for name, p in adapter_of(trainer).items()}
    assert saved.keys() == loaded.keys() and all(torch.equal(p, saved[name]) for name, p in loaded.items())
    proof = stages.prove_reference(trainer, data)
    assert len(proof) == 2 * stages.REFERENCE_CHECKS
    assert np.allclose(proof["adapter_off"], proof["cached_base"], rtol=1e-4)
    trainer.train()
    assert abs(stages.history_table(trainer)["loss"].iloc[0] - np.log(2)) > 1e-3


def test_trls_silent_copy_of_the_stage_1_adapter_is_caught(tokenizer, parameters, tmp_path, data, stage1):
    trained = PeftModel.from_pretrained(fresh(), stage1, is_trainable=True)
    trainer = plain_trl(trained, tokenizer, data.rows, parameters, tmp_path)
    assert "ref" in trainer.model.peft_config, "TRL no longer makes the copy: the trap has changed"
    with pytest.raises(
        StudyError,
        match=r"trainer_reference .* not the base model, for example a copy of the previous stage's adapter",
    ):
        stages.prove_reference(trainer, data)


def test_reference_sums_of_the_stage_1_policy_are_caught(make, data, stage1):
    policy = PeftModel.from_pretrained(fresh(), stage1)
    wrong = dataclasses.replace(data, rows=data_for(policy, random_pairs(16)).rows)
    with pytest.raises(StudyError, match=r"wrong reference: .* trainer_reference"):
        stages.prove_reference(make(wrong, previous=stage1), data)


def test_a_merged_adapter_is_caught(make, data, stage1):
    merged = PeftModel.from_pretrained(fresh(), stage1).merge_and_unload()
    with pytest.raises(StudyError, match="a merged adapter changed the weights"):
        stages.prove_reference(make(data, base=merged), data)


def changed(data, **columns):
    """The stage with other cached sums of the base model."""
    return dataclasses.replace(data, reference=data.reference.assign(**columns))


def test_a_stale_cache_is_caught(make):
    pairs = random_pairs(8)
    data = data_for(fresh(), pairs)
    with pytest.raises(StudyError, match="cached base scores are stale"):
        stages.prove_reference(make(data), changed(data, chosen_logp=data.reference["chosen_logp"] + 0.5))
    with pytest.raises(StudyError, match="other tokens"):
        stage_data.training_rows(pairs, data.reference.iloc[::-1])
    with pytest.raises(StudyError, match="empty"):
        stage_data.training_rows([], data.reference.head(0))


def test_nan_reference_sums_do_not_pass_the_proof(make):
    data = data_for(fresh(), random_pairs(8))
    with pytest.raises(StudyError, match="wrong reference"):
        stages.prove_reference(make(data), changed(data, chosen_logp=float("nan")))


def long_pairs(count=4, *, tokens=80):
    """Pairs whose sums are some -700 nats under the random model."""
    draw = np.random.default_rng(3)
    ids = [draw.integers(10, 5000, size=(3, tokens)).tolist() for _ in range(count)]
    return [EncodedPair(prompt[:9], chosen, rejected) for prompt, chosen, rejected in ids]


def shifted(rows, chosen, rejected):
    """The rows with each reference sum multiplied, so that its relative error is known."""

    def moved(row):
        return {
            "ref_chosen_logps": row["ref_chosen_logps"] * chosen,
            "ref_rejected_logps": row["ref_rejected_logps"] * rejected,
        }

    return rows.map(moved)


@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.9e-4), ("bfloat16", 1.5e-2)])
def test_a_margin_is_held_to_less_than_its_sums(root, make, parameters, dtype, share):
    """Each sum within its tolerance, the two moved apart: in bfloat16 the margin is then off by about 7."""
    model = models.load_base(root, models.TINY, dtype=dtype)
    data = data_for(model, long_pairs())
    assert data.reference["chosen_logp"].max() < -600
    trainer = make(data, base=model)
    proof = stages.prove_reference(trainer, data)
    assert proof["tokens"].eq(80).all() and share < scoring.rounding(trainer.model.dtype)
    rows = trainer.train_dataset
    for sides in ((1 + share, 1 - share), (1 - share, 1 + share)):
        trainer.train_dataset = shifted(rows, *sides)
        with pytest.raises(StudyError, match=r"the pair of chosen \d trainer_reference moves the margin by"):
            stages.prove_reference(trainer, data)
    trainer.train_dataset = shifted(rows, 1 + 3 * share, 1 + 3 * share)
    with pytest.raises(StudyError, match=r"wrong reference: for \w+ \d trainer_reference is"):
        stages.prove_reference(trainer, data)


def test_the_references_of_earlier_objectives_are_proven_too(make, stage1):
    """Against the base, whatever the stage's own reference is."""
    data = data_for(fresh(), random_pairs(8), first=random_pairs(6, seed=1), second=random_pairs(2, seed=2))
    for share in (0.0, 1.0):
        trainer = make(data, previous=stage1, reference=share)
        proof = stages.prove_reference(trainer, data, share=share).iloc[2 * stages.REFERENCE_CHECKS :]
        names = [f"{side} {i} of earlier first (train)" for i in range(4) for side in ("chosen", "rejected")]
        assert proof["completion"].tolist()[:8] == names and len(proof) == 8 + 4
        assert np.allclose(proof["trainer_reference"], proof["adapter_off"], rtol=1e-4)
    policy = PeftModel.from_pretrained(fresh(), stage1)
    wrong = [shifted(data.earlier["second", "train"], *sides) for sides in ((1.1, 1.1), (1.00009, 0.99991))]
    for rows in [*wrong, data_for(policy, random_pairs(2, seed=2)).rows]:
        moved = dataclasses.replace(data, earlier=data.earlier | {("second", "train"): rows})
        with pytest.raises(StudyError, match="of the earlier objective second is not the base model"):
            stages.prove_reference(make(moved, previous=stage1), moved)


@pytest.mark.parametrize(("ratio", "warm"), [(0.1, 0), (0.124, 0), (0.125, 1), (0.25, 2), (0.0, 0)])
def test_a_warm_up_of_less_than_one_step_is_none(parameters, tmp_path, ratio, warm):
    given = parameters.model_copy(update={"pairs_per_step": 4, "epochs": 1, "warmup_ratio": ratio})
    assert stages.optimiser_steps(given, pairs=32) == stages.optimiser_steps(given, pairs=29) == 8
    assert stages.dpo_config(given, pairs=32, output_dir=tmp_path).warmup_steps == warm


def test_adapters_of_other_parameters_are_refused(tmp_path, stage1, parameters):
    run = RunPaths(tmp_path, "smoke", "s", "a-then-b", 0)
    for node in run.lineage:
        shutil.copytree(stage1, node.adapter)
    check_trained(run, dict(parameters.model_copy(update={"resamples": 7})))
    message = r"a/seed-0/adapter was trained with beta = 0\.3, here it is 0\.1\. Delete .*seed-0 and run"
    with pytest.raises(StudyError, match=message):
        check_trained(run, {"beta": 0.1})
    check_trained(run, {"learning_rate": 5.0}, varied=["learning_rate"])
    manifest = json.loads(run.manifest.read_text())
    write_json(run.manifest, manifest | {"varied": ["epochs"]})
    with pytest.raises(StudyError, match="a/seed-0/adapter was trained with epochs"):
        check_trained(run, {"epochs": 9})
    write_json(run.at("a").manifest, manifest | {"varied": ["epochs"]})
    check_trained(run, {"epochs": 9})


def test_a_loss_that_is_no_number_stops_the_run(make):
    trainer = make(data_for(fresh(), random_pairs(8)))
    next(p for n, p in trainer.model.named_parameters() if "lora_A" in n).data.fill_(float("nan"))
    with pytest.raises(
        StudyError,
        match=r"loss of stage 1 became nan at step 1\. Nothing of it was saved\. Lower learning_rate",
    ):
        trainer.train()


def test_an_adapter_that_does_not_fit_is_refused(make, data, stage1, tmp_path):
    with pytest.raises(StudyError, match=r"does not fit, see .*: check lora_rank and lora_targets"):
        make(data, previous=stage1, lora_targets=["q_proj"])
    with pytest.raises(StudyError, match="run the stage before"):
        make(data, previous=tmp_path / "nowhere")


def test_dropout_of_the_adapter_has_an_effect(make):
    """TRL's default would switch it off silently."""
    data, ends = data_for(fresh(), random_pairs(8)), []
    for dropout in (0.0, 0.5):
        trainer = make(data, lora_dropout=dropout)
        forward = trainer.model.get_base_model().forward.__func__
        assert forward.__module__ == "seqdpo_utils.measuring", "the shared-prompt pass was not trusted"
        trainer.train()
        ends.append(torch.cat([p.flatten() for p in adapter_of(trainer).values()]))
    assert not torch.allclose(*ends)


def test_seed_and_nothing_else_rules_the_run(make, data):
    weights = []
    for seed in (0, 0, 1):
        trainer = make(data, seed=seed)
        trainer.train()
        weights.append(torch.cat([p.flatten() for p in adapter_of(trainer).values()]))
    assert torch.equal(weights[0], weights[1]) and not torch.allclose(weights[0], weights[2])


def test_a_quantised_base_is_its_own_reference(root, make):
    pytest.importorskip("bitsandbytes")
    model = models.load_base(root, models.TINY, dtype="float32", quantization="nf4")
    data = data_for(model, random_pairs(8))
    whole = records_for(fresh(), random_pairs(8))["chosen_logp"]
    assert (data.reference["chosen_logp"] - whole).abs().max() > 0.1, "four bits are not the whole weights"
    trainer = make(data, base=model)
    stages.prove_reference(trainer, data)
    trainer.train()
    assert stages.history_table(trainer)["loss"].iloc[0] == pytest.approx(np.log(2), abs=1e-3)
    assert any(p.abs().max() > 0 for name, p in adapter_of(trainer).items() if "lora_B" in name)


def test_quantization_without_its_package_is_one_sentence_with_the_remedy(root):
    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(StudyError, match=r"base model .* could not be loaded: .*bitsandbytes"):
        models.load_base(root, models.TINY, dtype="float32", quantization="nf4")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sums_do_not_depend_on_the_attention_kernel(root, scored, attention):
    pairs, scores = scored
    model = models.load_base(root, models.TINY, dtype="float32", attention=attention)
    again = scoring.Scorer(model, token_budget=128).records(pair_table(8), pairs, checkpoint="base")
    assert np.allclose(
        again[["chosen_logp", "rejected_logp"]], scores[["chosen_logp", "rejected_logp"]], rtol=1e-4
    )


# ---- variants of a stage ----


def test_a_mixed_reference_is_proven_like_any_other(make, data, stage1):
    """(1 - l) base + l stage before, at l = 0.5 and 1.5; the base reference and the wrong share are
    caught."""
    old = data_for(fresh(), random_pairs(16), first=random_pairs(16))
    for share in (0.5, 1.5):
        trainer = make(old, previous=stage1, reference=share)
        proof = stages.prove_reference(trainer, old, share=share).dropna()
        by_hand = (1 - share) * proof["adapter_off"] + share * proof["adapter_on"]
        assert np.allclose(proof["trainer_reference"], by_hand, rtol=1e-4)
        assert (proof["adapter_on"] - proof["adapter_off"]).abs().max() > 0.1
        for wrong in (0.0, 1.0):
            with pytest.raises(StudyError, match=r"wrong reference: .* trainer_reference"):
                stages.prove_reference(trainer, old, share=wrong)


def test_the_stage_before_as_reference_starts_at_log_2(make, stage1):
    """The fingerprint of a moving reference, which the base reference does not have."""
    old = data_for(fresh(), random_pairs(8), first=random_pairs(16))
    firsts = []
    for share in (0.0, 1.0):
        trainer = make(old, previous=stage1, reference=share)
        trainer.train()
        firsts.append(trained_log(trainer)[0]["loss"])
    assert abs(firsts[0] - np.log(2)) > 1e-3 and firsts[1] == pytest.approx(np.log(2), abs=1e-4)


@pytest.mark.parametrize(
    ("loss", "formula"),
    [
        (["ipo"], lambda gap, beta, tokens: (gap[0] / tokens[0] - gap[1] / tokens[1] - 1 / (2 * beta)) ** 2),
        (["hinge"], lambda gap, beta, tokens: max(0.0, 1 - beta * (gap[0] - gap[1]))),
        (["sigmoid", "hinge"], lambda gap, beta, tokens: np.log1p(np.exp(-beta * (gap[0] - gap[1])))
         + 0.5 * max(0.0, 1 - beta * (gap[0] - gap[1]))),
    ],
    ids=["ipo", "hinge", "a list with weights"],
)  # fmt: skip
def test_other_losses_are_their_equations(make, data, stage1, parameters, loss, formula):
    """On one pair, from sums scored one sequence at a time."""
    weights = None if len(loss) == 1 else [1.0, 0.5]
    trainer, row = make(data, previous=stage1, loss_type=loss, loss_weights=weights), data.rows[0]
    sums = [
        scoring.sequence_logp(trainer.model, row["prompt_ids"], row[f"{side}_ids"])
        for side in ("chosen", "rejected")
    ]
    gap = [total - row[f"ref_{side}_logps"] for total, side in zip(sums, ("chosen", "rejected"), strict=True)]
    batch = trainer._prepare_inputs(trainer.data_collator([row]))
    expected = formula(gap, parameters.beta, [len(row["chosen_ids"]), len(row["rejected_ids"])])
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected, rel=1e-3)


@pytest.fixture
def run(tmp_path) -> RunPaths:
    """Two objectives of eight training pairs each, with sums that name the pair."""
    run = RunPaths(tmp_path, "smoke", "s", "a-then-b", 0)
    tables = []
    for k, objective in enumerate(("a", "b")):
        pairs = pair_table(9, objective=objective).assign(prompt="[]", chosen="yes", rejected="no")
        pairs.loc[8, "split"] = "eval"
        write_table(run.data(objective), pairs)
        sums = {"chosen_logp": -1.0 * (100 * k + pairs.index), "rejected_logp": -1000.0}
        tables.append(pairs.assign(**sums, chosen_tokens=2, rejected_tokens=3))
    write_table(run.base_scores, pd.concat(tables))
    return run


PLAIN = {"seed": 0, "train_share": 1.0, "flipped": 0.0, "shuffled_labels": False, "replay": 0.0}


def test_a_stage_sees_the_training_pairs_of_its_objectives(run):
    assert stage_data.training_pairs(run.at("a"), PLAIN)["pair_id"].tolist() == [f"a-{i}" for i in range(8)]
    joint = stage_data.training_pairs(run.at("a+b"), PLAIN)
    assert joint["objective"].tolist() == ["a"] * 8 + ["b"] * 8 and joint["chosen_logp"].tolist()[8] == -100.0


def test_turned_labels_carry_their_sums_and_are_nested(run):
    turned = {}
    for share in (0.25, 0.5, 1.0):
        table = stage_data.training_pairs(run.at("a"), PLAIN | {"flipped": share})
        other = table[table["chosen_logp"] == -1000.0]
        assert (
            len(other) == 8 * share
            and (other["chosen"] == "no").all()
            and (other["chosen_tokens"] == 3).all()
        )
        turned[share] = set(other["pair_id"])
    assert turned[0.25] < turned[0.5] < turned[1.0]


def test_half_of_the_pairs_and_labels_at_random_are_ruled_by_the_seed(run):
    def seen(**changes):
        table = stage_data.training_pairs(run.at("a"), PLAIN | changes)
        return table["pair_id"].tolist(), (table["chosen"] == "no").tolist()

    assert len(seen(train_share=0.5)[0]) == 4 and seen(train_share=0.5) == seen(train_share=0.5)
    draws = [seen(shuffled_labels=True, seed=seed)[1] for seed in range(20)]
    assert draws[0] == seen(shuffled_labels=True)[1] and len({tuple(draw) for draw in draws}) > 15
    assert 0.35 < np.mean(draws) < 0.65


def test_replayed_pairs_take_the_place_of_some_as_their_own_stage_saw_them(run):
    write_json(run.at("a").manifest, {"parameters": PLAIN | {"flipped": 1.0}, "varied": ["flipped"]})
    table = stage_data.training_pairs(run, PLAIN | {"replay": 0.25})
    replayed = table[table["objective"] == "a"]
    assert len(table) == 8 and len(replayed) == 2 and (replayed["chosen"] == "no").all()
    assert table["pair_id"].is_unique and (table[table["objective"] == "b"]["chosen"] == "yes").all()
    with pytest.raises(StudyError, match=r"replay|few"):
        stage_data.training_pairs(run, PLAIN | {"replay": 0.01})


def test_a_stage_on_new_prompts_meets_none_that_an_earlier_stage_trained_on(run):
    """Objective b labels the prompts of a; its stage takes as many pairs as ever, first of its own split."""
    for objective in ("a", "b"):
        pairs = pd.read_parquet(run.data(objective)).assign(prompt_id=[f"p{i}" for i in range(9)])
        fresh = pairs.head(6).assign(split="fresh", prompt_id=[f"new{i}" for i in range(6)])
        fresh["pair_id"] = [f"{objective}-new{i}" for i in range(6)]
        if objective == "b":
            pairs.loc[:2, "prompt_id"] = ["b0", "b1", "b2"]  # three prompts that only b has
        write_table(run.data(objective), pd.concat([pairs, fresh]))
    tables = [pd.read_parquet(run.data(objective)) for objective in ("a", "b")]
    sums = {"chosen_logp": -1.0, "rejected_logp": -2.0, "chosen_tokens": 2, "rejected_tokens": 3}
    write_table(run.base_scores, pd.concat(tables).assign(**sums))
    write_json(run.at("a").manifest, {"parameters": PLAIN, "varied": []})
    first = stage_data.training_pairs(run.at("a"), PLAIN | {"prompts_across_stages": "disjoint"})
    assert first["pair_id"].tolist() == [f"a-{i}" for i in range(8)], "a first stage has nothing to avoid"
    shared = stage_data.training_pairs(run, PLAIN)
    assert set(shared["prompt_id"]) & set(first["prompt_id"])
    apart = stage_data.training_pairs(run, PLAIN | {"prompts_across_stages": "disjoint"})
    assert apart["pair_id"].tolist() == ["b-0", "b-1", "b-2", *(f"b-new{i}" for i in range(5))]
    assert not set(apart["prompt_id"]) & set(first["prompt_id"])
    with pytest.raises(
        StudyError, match=r"6 pairs of a have prompts that no earlier stage saw, 8 are needed"
    ):
        stage_data.training_pairs(run.at("a-then-a"), PLAIN | {"prompts_across_stages": "disjoint"})


def test_every_stage_draws_from_a_seed_of_its_own(run, parameters, tmp_path):
    """With one seed for all, stages that share prompts would meet them in one order."""
    orders, configs = [], []
    for chain in ("a", "a-then-b", "a-then-b-then-a"):
        table = stage_data.training_pairs(run.at(chain), PLAIN | {"shuffled_labels": True})
        orders.append(tuple(table["turned"]))
        given = parameters.model_copy(update={"chain": chain, "seed": 3})
        configs.append(stages.dpo_config(given, pairs=8, output_dir=tmp_path).seed)
    assert len(set(orders)) == 3 and len(set(configs)) == 3
    other = given.model_copy(update={"chain": "x-then-y-then-z"})
    again = stages.dpo_config(other, pairs=8, output_dir=tmp_path)
    assert again.seed == configs[-1], "variants and objectives do not matter: stages that differ in one thing"


def test_kept_adapters_are_scored_and_the_trained_weights_come_back(make, tokenizer, tmp_path, parameters):
    data = data_for(fresh(), random_pairs(8))
    run = RunPaths(tmp_path / "runs", "smoke", "s", "helpful", 0)
    asked, answers = [{"role": "user", "content": "Why?"}], {"chosen": "Because.", "rejected": "No idea."}
    texts = pair_table(3, split="eval").assign(prompt=json.dumps(asked), prompt_id=["1", "2", "3"], **answers)
    write_table(run.data("helpful"), texts)
    given = parameters.model_copy(update={"objectives": ["helpful"], "chain": "helpful"})
    trainer = make(data, pairs_per_step=2)
    trainer.add_callback(stages._Keeper(trainer.model, run, every=2))
    trainer.train()
    assert sorted(path.name for path in run.kept(0).parent.iterdir()) == ["step-2"], "not after the last step"
    before = adapter_of(trainer)
    scoring_options = {"splits": ["eval"], "checkpoint": "helpful"}
    stages.score_files(trainer.scorer, tokenizer, [run.data("helpful")], run.scores, **scoring_options)
    within = stages.score_within(trainer, run, tokenizer, parameters=given)
    assert within["step"].unique().tolist() == [2] and len(within) == 3
    assert all(torch.equal(before[name], now) for name, now in adapter_of(trainer).items())
    kept = PeftModel.from_pretrained(fresh(), run.kept(2)).eval()
    pair = encode_pair(tokenizer, asked, **answers)
    assert within["chosen_logp"][0] == pytest.approx(sequence_logp(kept, pair.prompt, pair.chosen), rel=1e-4)
    assert within["chosen_logp"][0] != pytest.approx(pd.read_parquet(run.scores)["chosen_logp"][0], rel=1e-6)


def test_a_first_stage_by_hand_makes_its_start_adapter_once(root, tokenizer, parameters, run):
    """As in a notebook opened without a study before it; a second trainer begins with the same adapter."""
    pairs = random_pairs(4)
    data = dataclasses.replace(data_for(fresh(), pairs), fingerprints={"data": "1"})
    first = run.at("a")
    begun = [
        stages.begin_stage(
            root, first, tokenizer, data, parameters=parameters.model_copy(update={"chain": "a"})
        )
        for _ in range(2)
    ]
    start = load_file(first.start / "adapter_model.safetensors")
    for trainer in begun:
        weights = {name.replace(".default", ""): p for name, p in adapter_of(trainer).items()}
        assert weights.keys() == start.keys() and all(
            torch.equal(p, start[name]) for name, p in weights.items()
        )
