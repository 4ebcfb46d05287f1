"""The whole study at smoke scale, through Snakemake and papermill, in a copy of the project."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from peft import PeftModel
from test_charts import OUTSIDE
from transformers import AutoModelForCausalLM, AutoTokenizer

from seqdpo_utils import models, params, recording, scoring
from seqdpo_utils.ledger import LEDGER_COLUMNS
from seqdpo_utils.mechanics import CONFLICT_COLUMNS
from seqdpo_utils.metrics import MEASURES

pytestmark = pytest.mark.chain
SETTINGS = sorted(file.stem for file in (ROOT / "params" / "settings").glob("*.yaml"))
FAST = {"HF_HUB_OFFLINE": "1"}


def run_study(folder: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "seqdpo_utils", "study", "--scale", "smoke", *words]
    environment = os.environ | FAST | {"PYTHONPATH": str(folder), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The tracked parts of the project, with the models that were built already."""
    models.prepare_model(ROOT, models.TINY)
    folder = tmp_path_factory.mktemp("project")
    for name in ("notebooks", "params", "seqdpo_utils"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", folder)
    (folder / "models").mkdir()
    for name in (models.TINY, models.SMOLLM2, models.GGUF_FOLDER):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def study(copy) -> Path:
    """All settings in both orders. Two settings first, so that a later call has something to add to."""
    done = run_study(copy)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "The study is complete after" in done.stdout and "index.html" in done.stdout
    return copy / "runs" / "smoke"


def chains(study: Path) -> list[tuple[str, list[str], Path]]:
    found = []
    for setting in SETTINGS:
        for order in params.orders_of(params.resolve(ROOT, scale="smoke", setting=setting)):
            found.append((setting, order.split("-then-"), study / setting / order / "seed-0"))
    return found


def test_every_file_of_the_contract_is_there(study):
    assert len(chains(study)) == 8
    for setting, objectives, chain in chains(study):
        names = ["run.json", "checkpoints/stage1/adapter_model.safetensors", "checkpoints/stage2/adapter_config.json", "movement.parquet",
                 "history/stage1.parquet", "history/stage2.parquet", "scores/stage1.parquet", "scores/stage2.parquet", "conflict/stage2.parquet",
                 "ledger/stage2.parquet", "tables/kl_stage1.parquet", "tables/kl_stage2.parquet", "tables/subspace.parquet", "tables/stage_matrix.parquet", "tables/quartiles.parquet"]  # fmt: skip
        assert [name for name in names if not (chain / name).is_file()] == []
        assert len(list((chain / "notebooks").glob("0*.ipynb"))) == 5
        assert all((study / setting / "data" / f"{objective}.parquet").is_file() for objective in objectives)
    assert not list(study.rglob("*.partial*")) and not list(study.rglob("*.tmp"))


def test_columns_are_those_of_the_contract(study):
    for setting, objectives, chain in chains(study):
        data = pd.read_parquet(study / setting / "data" / f"{objectives[0]}.parquet")
        assert {"pair_id", "prompt_id", "objective", "split", "prompt", "chosen", "rejected"} <= set(data)
        assert set(data["split"]) == {"train", "eval"}
        scores = pd.read_parquet(chain / "scores" / "stage2.parquet")
        assert {"pair_id", "prompt_id", "objective", "split", "checkpoint", "chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens"} <= set(scores)
        assert set(scores["objective"]) == set(objectives) and scores["chosen_logp"].dtype == "float64"
        conflict = pd.read_parquet(chain / "conflict" / "stage2.parquet")
        assert set(CONFLICT_COLUMNS) <= set(conflict) and (conflict["previous_objective"] == objectives[0]).all() and len(conflict) == 4
        ledger = pd.read_parquet(chain / "ledger" / "stage2.parquet")
        assert list(ledger) == list(LEDGER_COLUMNS) and ledger[["from_step", "step"]].drop_duplicates().to_numpy().tolist() == [[0, 2], [2, 4]]
        assert (ledger["previous_objective"] == objectives[0]).all() and len(ledger) == 2 * 2 * 7
        movement = pd.read_parquet(chain / "movement.parquet")
        assert {"from_checkpoint", "to_checkpoint", "other_from", "other_to", "space", "layer", "module", "norm", "other_norm", "cosine"} <= set(movement)
        matrix = pd.read_parquet(chain / "tables" / "stage_matrix.parquet")
        assert {"checkpoint", "objective", "n_pairs", "n_prompts", *(f"{m}{b}" for m in MEASURES for b in ("", "_low", "_high"))} <= set(matrix)
        assert (matrix.loc[matrix["checkpoint"] == "base", "margin"] == 0).all()
        history = pd.read_parquet(chain / "history" / "stage2.parquet")
        assert {"step", "loss", "learning_rate", "grad_norm", "rewards/margins", "rewards/chosen"} <= set(history)
        assert {"objective", "key", "quartile", "n_pairs", "change", "change_low", "change_high"} <= set(
            pd.read_parquet(chain / "tables" / "quartiles.parquet")
        )


def test_every_pair_was_scored_once_under_the_base(study):
    """Over all settings, orders and stages, and whatever study ran before in this folder."""
    (cache,) = [folder for folder in (study.parent / "reference").iterdir() if folder.is_dir()]
    counter = recording.times_scored(cache)
    pairs = pd.concat(map(pd.read_parquet, study.glob("*/data/*.parquet")))
    assert counter.max() == 1 and set(pairs["pair_id"]) <= set(counter.index)
    for setting, _, chain in chains(study):
        report = json.loads((chain / "run.json").read_text())["scoring"]
        assert set(report) == {"base", "stage1", "stage2"} and report["stage2"]["pass_used"] == recording.SHARED
        assert report["base"]["pairs"] == len(pd.read_parquet(study / setting / "scores" / "base.parquet"))


def test_run_json_tells_what_was_run(study):
    for setting, _, chain in chains(study):
        run = json.loads((chain / "run.json").read_text())
        assert run["parameters"]["setting"] == setting and run["parameters"]["beta"] == 0.3 and run["parameters"]["base_model"] == models.TINY
        assert {"torch", "trl", "peft", "transformers"} <= set(run["versions"])
        assert set(run["fingerprints"]) == {"data", "base_model", "tokenizer", "dtype"} and run["dtype"] == "float32"
        assert run["seconds_per_step"]["stage2"] > 0 and run["counts"]


def test_records_can_be_recomputed_with_plain_transformers_and_peft(study):
    """Random pairs of random chains, one sequence at a time, from the saved adapter and the saved texts alone."""
    rng = np.random.default_rng(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / models.TINY)
    for setting, _, chain in chains(study):
        stage = int(rng.integers(1, 3))
        base = AutoModelForCausalLM.from_pretrained(ROOT / models.TINY, dtype=torch.float32)
        policy = PeftModel.from_pretrained(base, chain / "checkpoints" / f"stage{stage}").eval()
        scores = pd.read_parquet(chain / "scores" / f"stage{stage}.parquet").sample(3, random_state=int(rng.integers(1000)))
        for row in scores.itertuples():
            texts = pd.read_parquet(study / setting / "data" / f"{row.objective}.parquet").set_index("pair_id").loc[row.pair_id]
            prompt = tokenizer.apply_chat_template(json.loads(texts["prompt"]), tokenize=False, add_generation_prompt=True)
            for side in ("chosen", "rejected"):
                start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
                ids = torch.tensor([tokenizer(prompt + texts[side] + "<|im_end|>", add_special_tokens=False)["input_ids"]])
                with torch.no_grad():
                    logps = torch.log_softmax(policy(ids).logits[0, :-1].double(), dim=1).gather(1, ids[0, 1:, None])[start - 1 :, 0]
                assert getattr(row, f"{side}_logp") == pytest.approx(float(logps.sum()), rel=1e-4)
                assert getattr(row, f"{side}_tokens") == len(logps)


def test_base_records_are_the_base_and_margins_there_are_zero(study):
    base = models.load_base(ROOT, models.TINY, dtype="float32")
    tokenizer = models.load_tokenizer(ROOT, models.TINY)
    for setting in SETTINGS:
        scores = pd.read_parquet(study / setting / "scores" / "base.parquet")
        assert set(scores["split"]) == {"train", "eval"} and set(scores["checkpoint"]) == {"base"}
        row = scores.iloc[0]
        texts = pd.read_parquet(study / setting / "data" / f"{row.objective}.parquet").set_index("pair_id").loc[row.pair_id]
        prompt = tokenizer(tokenizer.apply_chat_template(json.loads(texts["prompt"]), tokenize=False, add_generation_prompt=True), add_special_tokens=False)[
            "input_ids"
        ]
        completion = tokenizer(texts["chosen"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        assert row.chosen_logp == pytest.approx(scoring.sequence_logp(base, prompt, completion), rel=1e-4)


def test_pages_read_offline(study):
    index = (study / "appendix" / "index.html").read_text()
    pages = sorted((study / "appendix").glob("*.html"))
    assert len(pages) == 1 + 2 + 4 + 8 * 5
    assert all(path.name in index for path in pages if path.name != "index.html")
    for path in pages:
        text = path.read_text()
        assert not OUTSIDE.search(text) and "<script" not in text, path.name
        assert path.name.startswith(("index", "summary--00")) or "<svg" in text, f"{path.name} has no chart"
        assert "Traceback" not in text and "Warning" not in text, f"{path.name} shows a warning"


def test_a_second_start_has_nothing_to_do_and_one_change_reruns_only_what_depends_on_it(study, copy):
    before = {path: path.stat().st_mtime_ns for path in study.rglob("*") if path.is_file() and not path.name.startswith(".")}
    assert run_study(copy).returncode == 0
    assert [path.name for path, stamp in before.items() if path.stat().st_mtime_ns != stamp] == []
    notebook = copy / "notebooks" / "05_pair_diagnostics.ipynb"
    notebook.write_text(notebook.read_text().replace("Which pairs moved", "Which of the pairs moved").replace("which pairs moved", "which of the pairs moved"))
    assert run_study(copy, "--settings", "safety_signal").returncode == 0
    changed = {path.name for path, stamp in before.items() if path.exists() and path.stat().st_mtime_ns != stamp and path.suffix in {".ipynb", ".parquet"}}
    assert "05_pair_diagnostics.ipynb" in changed
    assert not changed & {
        "01_data_preparation.ipynb",
        "02_first_stage.ipynb",
        "03_later_stage-2.ipynb",
        "04_evaluation.ipynb",
        "stage1.parquet",
        "base.parquet",
    }


def test_one_failing_setting_does_not_stop_another_and_is_named_last(copy, study):
    """A setting whose rows were cut off half-way, which is seen as a change, fails in its first notebook; the other one gets a new seed."""
    file = copy / "seqdpo_utils" / "embedded" / "rows" / "ultrafeedback" / "rows.jsonl"
    whole = file.read_text()
    file.write_text(whole[:-100])
    done = run_study(copy, "--settings", "compatible_quality", "safety_signal", "--seeds", "1", "--set", "resamples=150", "lora_targets=[q_proj, v_proj]")
    file.write_text(whole)
    assert done.returncode != 0
    run = json.loads((study / "safety_signal" / "helpful-then-safe" / "seed-1" / "run.json").read_text())
    assert run["parameters"]["resamples"] == 150
    assert run["parameters"]["lora_targets"] == ["q_proj", "v_proj"]
    last = done.stdout[done.stdout.index("The study stopped") :]
    assert "FAILED runs/smoke/compatible_quality/notebooks/01_data_preparation.partial.ipynb" in last
    assert "'embedded' (layout ultrafeedback, objective instruction_following) could not be read" in last and "FAILED runs/smoke/safety_signal" not in last
    assert (study / "compatible_quality" / "notebooks" / "01_data_preparation.partial.ipynb").is_file()


def test_a_killed_study_goes_on_where_it_was(copy, study):
    """Killed by the hardest signal in a training notebook; the next start clears the marks and finishes."""
    command = [sys.executable, "-m", "seqdpo_utils", "study", "--scale", "smoke", "--settings", "safety_signal", "--seeds", "2"]
    environment = os.environ | FAST | {"PYTHONPATH": str(copy), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    process = subprocess.Popen(command, cwd=copy, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stderr:
        if "started" in line and " 02 " in line:
            break
    again = run_study(copy, "--settings", "safety_signal", "--seeds", "2")
    assert again.returncode == 2 and "already running" in again.stderr
    os.killpg(process.pid, 9)
    process.wait()
    done = run_study(copy, "--settings", "safety_signal", "--seeds", "2")
    assert done.returncode == 0, done.stderr[-4000:]
    assert " 01 safety_signal | started" not in done.stderr
    assert (study / "safety_signal" / "safe-then-helpful" / "seed-2" / "run.json").is_file()
