"""DPO stages against TRL itself, the reference proof against every wrong reference."""

import importlib.util
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import pair_table, random_pairs
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from trl import DPOTrainer

from seqdpo_utils import metrics, models, scoring, training
from seqdpo_utils.paths import RunPaths, StudyError, check_trained
from seqdpo_utils.trainer import LengthGrouped


def rows_for(model, pairs, objective="helpful") -> tuple[Dataset, pd.DataFrame]:
    scores = scoring.score_pairs(model, pair_table(len(pairs), objective=objective), pairs, checkpoint="base", token_budget=300)
    return training.training_rows(pairs, scores), scores


def adapter_of(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.fixture
def stage1(root, tokenizer, parameters, tmp_path):
    """A trained first stage: its folder, its pairs and the base records of both objectives."""
    base = models.load_base(root, models.TINY, dtype="float32")
    rows, scores = rows_for(base, random_pairs(16))
    trainer = training.stage_trainer(base, tokenizer, rows, parameters=parameters, output_dir=tmp_path)
    trainer.train()
    training.save_adapter(trainer, tmp_path / "stage1", parameters=parameters)
    return tmp_path / "stage1", rows, scores


def fresh(root):
    return models.load_base(root, models.TINY, dtype="float32")


def plain_trl(model, tokenizer, rows, parameters, tmp_path, **options) -> DPOTrainer:
    """TRL's own trainer on the same token ids, its own head, reference computed by TRL unless told otherwise."""

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

    config = training.dpo_config(parameters, pairs=len(rows), output_dir=tmp_path)
    config.precompute_ref_log_probs = False
    return Tokenised(model, args=config, train_dataset=rows, processing_class=tokenizer, **options)


@pytest.mark.parametrize("pairs_per_device", [1, 2, 8])
def test_the_loss_trajectory_and_the_weights_are_trls(root, tokenizer, parameters, tmp_path, pairs_per_device):
    """Grouped by length or not, a step has the pairs of its window; TRL gets them in another order within it."""
    parameters = parameters | {"pairs_per_device": pairs_per_device, "pairs_per_step": 8, "epochs": 2}
    rows, _ = rows_for(fresh(root), random_pairs(24))
    ours = training.stage_trainer(fresh(root), tokenizer, rows, parameters=parameters, output_dir=tmp_path)
    theirs = plain_trl(fresh(root), tokenizer, rows, parameters, tmp_path, peft_config=models.lora_config(parameters))
    start = adapter_of(ours)
    if pairs_per_device > 1:
        theirs._get_train_sampler = lambda *_: Windows(ours._get_train_sampler(rows), 8)
    ours.train(), theirs.train()
    log = [[entry for entry in trainer.state.log_history if "loss" in entry] for trainer in (ours, theirs)]
    for key in ("loss", "grad_norm", "rewards/margins", "rewards/chosen", "logps/rejected", "learning_rate"):
        assert np.allclose([e[key] for e in log[0]], [e[key] for e in log[1]], rtol=1e-3, atol=1e-5), key
    ends = [torch.cat([(p - start[name]).flatten() for name, p in adapter_of(trainer).items()]) for trainer in (ours, theirs)]
    assert (ends[0] - ends[1]).norm() < 1e-3 * ends[1].norm()


class Windows(torch.utils.data.Sampler):
    """The windows of another sampler, each in ascending order."""

    def __init__(self, sampler, size):
        self.sampler, self.size, self.set_epoch = sampler, size, sampler.set_epoch

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        order = list(self.sampler)
        return iter([i for start in range(0, len(order), self.size) for i in sorted(order[start : start + self.size])])


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


def test_the_loss_is_the_equation(root, tokenizer, parameters, tmp_path, stage1):
    """-log sigmoid(beta * difference of log-ratios), from sums scored one sequence at a time."""
    folder, rows, scores = stage1
    trainer = training.stage_trainer(fresh(root), tokenizer, rows, parameters=parameters, output_dir=tmp_path, stage=2, previous=folder)
    batch = trainer._prepare_inputs(trainer.data_collator(list(rows.select(range(4)))))
    policy = [
        {f"{side}_logp": scoring.sequence_logp(trainer.model, row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected")}
        for row in rows.select(range(4))
    ]
    records = scores.head(4).drop(columns=["chosen_logp", "rejected_logp"]).join(pd.DataFrame(policy))
    by_hand = metrics.dpo_loss(metrics.dpo_margin(records, scores, beta=parameters["beta"])).mean()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(by_hand, rel=1e-4)


def test_swapping_chosen_and_rejected_flips_the_gradient_and_every_margin(root, tokenizer, parameters, tmp_path):
    pairs = random_pairs(8)
    swapped = [pair._replace(chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]
    steps, margins = [], []
    for version in (pairs, swapped):
        rows, scores = rows_for(fresh(root), version)
        trainer = training.stage_trainer(fresh(root), tokenizer, rows, parameters=parameters, output_dir=tmp_path)
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(list(rows))))
        gradient = torch.autograd.grad(loss, [p for n, p in trainer.model.named_parameters() if "lora_B" in n])
        steps.append(torch.cat([g.flatten() for g in gradient]))
        trainer.train()
        after = scoring.score_pairs(trainer.model, pair_table(8), pairs, checkpoint="stage1", token_budget=300)
        base = scores if version is pairs else scores.rename(columns={"chosen_logp": "rejected_logp", "rejected_logp": "chosen_logp"})
        margins.append(metrics.dpo_margin(after, base, beta=parameters["beta"]))
    assert torch.allclose(steps[0], -steps[1], atol=1e-5)
    assert steps[0].norm() > 0
    assert margins[0].mean() > 0.05 and margins[1].mean() < -0.05


def test_a_later_stage_goes_on_with_the_adapter_and_counts_from_the_base(root, tokenizer, parameters, tmp_path, stage1):
    folder, rows, scores = stage1
    trainer = training.stage_trainer(fresh(root), tokenizer, rows, parameters=parameters, output_dir=tmp_path, stage=2, previous=folder)
    saved = load_file(folder / "adapter_model.safetensors")
    loaded = {name.replace(".default", ""): p for name, p in adapter_of(trainer).items()}
    assert saved.keys() == loaded.keys() and all(torch.equal(p, saved[name]) for name, p in loaded.items())
    proof = training.prove_reference(trainer, scores)
    assert len(proof) == 2 * training.REFERENCE_CHECKS
    assert np.allclose(proof["adapter_off"], proof["cached_base"], rtol=1e-4)
    trainer.train()
    assert abs(training.history_table(trainer)["loss"].iloc[0] - np.log(2)) > 1e-3


def test_trls_silent_copy_of_the_stage_1_adapter_is_caught(root, tokenizer, parameters, tmp_path, stage1):
    folder, rows, scores = stage1
    trained = PeftModel.from_pretrained(fresh(root), folder, is_trainable=True)
    trainer = plain_trl(trained, tokenizer, rows, parameters, tmp_path)
    assert "ref" in trainer.model.peft_config, "TRL no longer makes the copy: the trap has changed"
    with pytest.raises(StudyError, match=r"trainer_reference .* not the base model, for example a copy of the previous stage's adapter"):
        training.prove_reference(trainer, scores)


def test_reference_sums_of_the_stage_1_policy_are_caught(root, tokenizer, parameters, tmp_path, stage1):
    folder, _, scores = stage1
    policy = PeftModel.from_pretrained(fresh(root), folder)
    wrong, _ = rows_for(policy, random_pairs(16))
    trainer = training.stage_trainer(fresh(root), tokenizer, wrong, parameters=parameters, output_dir=tmp_path, stage=2, previous=folder)
    with pytest.raises(StudyError, match=r"wrong reference: .* trainer_reference"):
        training.prove_reference(trainer, scores)


def test_a_merged_adapter_is_caught(root, tokenizer, parameters, tmp_path, stage1):
    folder, rows, scores = stage1
    merged = PeftModel.from_pretrained(fresh(root), folder).merge_and_unload()
    trainer = training.stage_trainer(merged, tokenizer, rows, parameters=parameters, output_dir=tmp_path, stage=2)
    with pytest.raises(StudyError, match="a merged adapter changed the weights"):
        training.prove_reference(trainer, scores)


def test_a_stale_cache_is_caught(root, tokenizer, parameters, tmp_path):
    pairs = random_pairs(8)
    rows, scores = rows_for(fresh(root), pairs)
    stale = scores.assign(chosen_logp=scores["chosen_logp"] + 0.5)
    trainer = training.stage_trainer(fresh(root), tokenizer, rows, parameters=parameters, output_dir=tmp_path)
    with pytest.raises(StudyError, match="cached base scores are stale"):
        training.prove_reference(trainer, stale)
    with pytest.raises(StudyError, match="other tokens"):
        training.training_rows(pairs, scores.iloc[::-1])
    with pytest.raises(StudyError, match="empty"):
        training.training_rows([], scores.head(0))


def test_nan_reference_sums_do_not_pass_the_proof(root, tokenizer, parameters, tmp_path):
    rows, scores = rows_for(fresh(root), random_pairs(8))
    trainer = training.stage_trainer(fresh(root), tokenizer, rows, parameters=parameters, output_dir=tmp_path)
    with pytest.raises(StudyError, match="wrong reference"):
        training.prove_reference(trainer, scores.assign(chosen_logp=float("nan")))


def test_adapters_of_other_parameters_are_refused(tmp_path, stage1, parameters):
    paths = RunPaths(tmp_path, "smoke", "s", "a-then-b", 0)
    shutil.copytree(stage1[0], paths.checkpoint(1))
    check_trained(paths, stages=1, parameters=parameters | {"resamples": 7})
    with pytest.raises(StudyError, match=r"stage1 was trained with beta = 0\.3, here it is 0\.1\. Delete .*seed-0 and run"):
        check_trained(paths, stages=1, parameters={"beta": 0.1})


def test_a_loss_that_is_no_number_stops_the_run(root, tokenizer, parameters, tmp_path):
    rows, _ = rows_for(fresh(root), random_pairs(8))
    trainer = training.stage_trainer(fresh(root), tokenizer, rows, parameters=parameters, output_dir=tmp_path)
    next(p for n, p in trainer.model.named_parameters() if "lora_A" in n).data.fill_(float("nan"))
    with pytest.raises(StudyError, match=r"loss of stage 1 became nan at step 1\. Lower learning_rate"):
        trainer.train()


def test_an_adapter_that_does_not_fit_is_refused(root, tokenizer, parameters, tmp_path, stage1):
    folder, rows, _ = stage1
    fewer = parameters | {"lora_targets": ["q_proj"]}
    with pytest.raises(StudyError, match="does not fit the adapter"):
        training.stage_trainer(fresh(root), tokenizer, rows, parameters=fewer, output_dir=tmp_path, stage=2, previous=folder)
    with pytest.raises(StudyError, match="run the stage before"):
        training.stage_trainer(fresh(root), tokenizer, rows, parameters=parameters, output_dir=tmp_path, stage=2, previous=tmp_path / "nowhere")


def test_dropout_of_the_adapter_has_an_effect(root, tokenizer, parameters, tmp_path):
    """TRL's default would switch it off silently."""
    rows, _ = rows_for(fresh(root), random_pairs(8))
    ends = []
    for dropout in (0.0, 0.5):
        trainer = training.stage_trainer(fresh(root), tokenizer, rows, parameters=parameters | {"lora_dropout": dropout}, output_dir=tmp_path)
        assert trainer.model.get_base_model().forward.__func__.__module__ == "seqdpo_utils.trainer", "the shared-prompt pass was not trusted"
        trainer.train()
        ends.append(torch.cat([p.flatten() for p in adapter_of(trainer).values()]))
    assert not torch.allclose(*ends)


def test_seed_and_nothing_else_rules_the_run(root, tokenizer, parameters, tmp_path):
    rows, _ = rows_for(fresh(root), random_pairs(16))
    weights = []
    for seed in (0, 0, 1):
        trainer = training.stage_trainer(fresh(root), tokenizer, rows, parameters=parameters | {"seed": seed}, output_dir=tmp_path)
        trainer.train()
        weights.append(torch.cat([p.flatten() for p in adapter_of(trainer).values()]))
    assert torch.equal(weights[0], weights[1]) and not torch.allclose(weights[0], weights[2])


def test_a_quantised_base_is_its_own_reference(root, tokenizer, parameters, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = models.load_base(root, models.TINY, dtype="float32", quantization="nf4")
    rows, scores = rows_for(model, random_pairs(8))
    whole = rows_for(fresh(root), random_pairs(8))[1]
    assert (scores["chosen_logp"] - whole["chosen_logp"]).abs().max() > 0.1, "four bits are not the whole weights"
    trainer = training.stage_trainer(model, tokenizer, rows, parameters=parameters, output_dir=tmp_path)
    training.prove_reference(trainer, scores)
    trainer.train()
    assert training.history_table(trainer)["loss"].iloc[0] == pytest.approx(np.log(2), abs=1e-3)
    assert any(p.abs().max() > 0 for name, p in adapter_of(trainer).items() if "lora_B" in name)


def test_quantization_without_its_package_is_one_sentence_with_the_remedy(root):
    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(StudyError, match=r"base model .* could not be loaded: .*bitsandbytes"):
        models.load_base(root, models.TINY, dtype="float32", quantization="nf4")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sums_do_not_depend_on_the_attention_kernel(root, scored, attention):
    pairs, scores = scored
    again = scoring.score_pairs(
        models.load_base(root, models.TINY, dtype="float32", attention=attention), pair_table(8), pairs, checkpoint="base", token_budget=128
    )
    assert np.allclose(again[["chosen_logp", "rejected_logp"]], scores[["chosen_logp", "rejected_logp"]], rtol=1e-4)
