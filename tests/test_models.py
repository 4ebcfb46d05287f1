"""The adapter before training is TRL's; folders appear whole; what does not fit is refused."""

import shutil

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file
from trl import DPOConfig, DPOTrainer

from seqdpo_utils import models
from seqdpo_utils.errors import StudyError
from seqdpo_utils.paths import read_json

ROW = {"prompt": "Q", "chosen": "yes", "rejected": "no"}


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def loaded(root, **kind):
    return models.load_base(root, models.TINY, **({"dtype": "float32"} | kind))


def trl_start(base, tokenizer, parameters, folder) -> dict[str, torch.Tensor]:
    """The adapter that TRL makes for a base model, a configuration with a seed, and a LoRA configuration."""
    args = DPOConfig(output_dir=str(folder), seed=parameters.seed, use_cpu=True, bf16=False, report_to="none")
    rows, lora = Dataset.from_list([ROW]), models.lora_config(parameters)
    trainer = DPOTrainer(base, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    trainer.model.save_pretrained(folder / "trl")
    return weights(folder / "trl")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_start_is_the_adapter_that_trl_makes(root, tokenizer, parameters, tmp_path, dtype, dropout):
    given = parameters.model_copy(update={"seed": 7, "dtype": dtype, "lora_dropout": dropout})
    ours = weights(models.start_adapter(root, given, tmp_path / "start"))
    torch.rand(5)  # wherever chance stands by now
    theirs = trl_start(loaded(root, dtype=dtype), tokenizer, given, tmp_path)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(ours[name].dtype == theirs[name].dtype for name in ours)
    assert all((tensor == 0).all() == ("lora_B" in name) for name, tensor in ours.items())


def test_the_start_of_a_quantised_model_has_trls_dtype(root, tokenizer, parameters, tmp_path, monkeypatch):
    """A plain model stands in for the quantised one; TRL makes its adapter bfloat16."""
    given = parameters.model_copy(update={"quantization": "nf4"})
    plain, marked = loaded(root), loaded(root)
    marked.is_loaded_in_4bit = True
    monkeypatch.setattr(models, "load_base", lambda *_, **__: plain)
    ours = weights(models.start_adapter(root, given, tmp_path / "start"))
    theirs = trl_start(marked, tokenizer, given, tmp_path)
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_seed_rules_the_start(root, parameters, tmp_path):
    seeds = {"one": 1, "again": 1, "other": 2}
    for name, seed in seeds.items():
        models.start_adapter(root, parameters.model_copy(update={"seed": seed}), tmp_path / name)
    hashes = {name: read_json(tmp_path / name / "manifest.json")["adapter_sha256"] for name in seeds}
    assert hashes["one"] == hashes["again"] != hashes["other"]


def test_the_manifest_names_what_the_start_depends_on(root, parameters, tmp_path):
    manifest = read_json(models.start_adapter(root, parameters, tmp_path / "start") / "manifest.json")
    assert manifest["adapter_sha256"] == models.hash_files([tmp_path / "start" / "adapter_model.safetensors"])
    named = {"seed", "base_model", "base_model_revision", "dtype", "quantization"}
    named |= {"lora_rank", "lora_alpha", "lora_dropout", "lora_targets"}
    assert manifest["parameters"] == {key: getattr(parameters, key) for key in named}


def test_a_start_that_is_there_stays_and_is_not_taken_for_another(root, parameters, tmp_path, monkeypatch):
    start = models.start_adapter(root, parameters, tmp_path / "start")
    monkeypatch.setattr(models, "load_base", lambda *_, **__: pytest.fail("made anew"))
    assert models.start_adapter(root, parameters, start) == start
    wider = parameters.model_copy(update={"lora_rank": parameters.lora_rank + 1})
    numbers = f"lora_rank = {parameters.lora_rank}, here it is {parameters.lora_rank + 1}"
    with pytest.raises(StudyError, match=f"was made with {numbers}"):
        models.start_adapter(root, wider, start)


def test_a_killed_save_leaves_the_old_folder_and_the_next_one_is_whole(
    root, parameters, tmp_path, monkeypatch
):
    model = get_peft_model(loaded(root), models.lora_config(parameters))
    first = models.save_adapter(model, tmp_path / "adapter", manifest={"device": "cpu"})
    assert first.keys() == {"device", "adapter_sha256"}
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if "lora_B" in name).fill_(1.0)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(models, "write_json", killed)
        models.save_adapter(model, tmp_path / "adapter", manifest={})
    assert read_json(tmp_path / "adapter" / "manifest.json") == first
    (tmp_path / ".adapter.partial" / "stray.safetensors").touch()
    assert models.hash_files((tmp_path / "adapter").glob("*.safetensors")) == first["adapter_sha256"]
    second = models.save_adapter(model, tmp_path / "adapter", manifest={})
    assert second["adapter_sha256"] != first["adapter_sha256"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert not (tmp_path / "adapter" / "stray.safetensors").exists()


def test_a_saved_adapter_comes_back_bit_by_bit(root, parameters, tmp_path):
    saved = models.start_adapter(root, parameters.model_copy(update={"seed": 3}), tmp_path / "saved")
    model = get_peft_model(loaded(root), models.lora_config(parameters))
    models.load_adapter(model, saved)
    model.save_pretrained(tmp_path / "again")
    before, after = weights(saved), weights(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_that_does_not_fit_is_refused(root, parameters, tmp_path):
    start = models.start_adapter(root, parameters, tmp_path / "start")
    assert len(parameters.lora_targets) > 1
    targets = [parameters.lora_targets[:1], [*parameters.lora_targets, "lm_head"]]
    for other in ({"lora_targets": targets[0]}, {"lora_targets": targets[1]}, {"lora_rank": 16}):
        lora = models.lora_config(parameters.model_copy(update=other))
        model = get_peft_model(loaded(root), lora)
        with pytest.raises(StudyError, match=r"does not fit, see .*: check lora_rank and lora_targets"):
            models.load_adapter(model, start)
    with pytest.raises(StudyError, match="is missing: run the stage before this one"):
        models.load_adapter(model, tmp_path / "nowhere")


def test_fingerprints_of_weights_and_numbers(root, tokenizer, parameters, tmp_path):
    recorded = models.base_fingerprint(root, models.TINY)
    copy = tmp_path / "copy"
    shutil.copytree(root / models.TINY, copy)
    (copy / "manifest.json").unlink()
    assert models.base_fingerprint(root, str(copy)) == recorded, "a folder without a manifest is hashed"
    with pytest.raises(StudyError, match="'no/such' is not in the local hub cache: load it first"):
        models.base_fingerprint(root, "no/such")
    with pytest.raises(StudyError, match="'no/such' could not be loaded"):
        models.load_base(root, "no/such", dtype="float32")
    tables = {"a": models.pd.DataFrame({"pair_id": ["1"], "objective": ["a"], "split": ["train"]})}
    coarse = parameters.model_copy(update={"dtype": "bfloat16", "quantization": "nf4"})
    prints = [
        models.fingerprints(root, tables, tokenizer, parameters=given) for given in (parameters, coarse)
    ]
    assert prints[0] | {"dtype": "bfloat16 over nf4"} == prints[1] and prints[0]["dtype"] == "float32"
    assert prints[0].keys() == {"data", "base_model", "tokenizer", "dtype"}
