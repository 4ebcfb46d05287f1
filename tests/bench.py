"""How fast scoring and training are, as ratios to TRL and to a plain loop, from runs that alternate in one process.

`python -m seqdpo_utils bench` writes `runs/bench/bench.parquet` and a small Markdown table beside it. Its figures belong to the machine that
they were taken on; the ratios travel better than the seconds.
"""

import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from seqdpo_utils import data, models, params, recording, scoring, sources, training
from seqdpo_utils.encoding import EncodedPair
from seqdpo_utils.paths import StudyError, write_table, write_whole

MATMUL = 2048
"""Side of the square float32 matrices whose product sets the ceiling."""
MEMORY_PAIRS = 1000
"""Pairs of the tiny model's scoring whose memory is compared with that of ten times as many."""
OVERHEAD_PAIRS = 64
"""Pairs of the stage on which the cost of measuring is taken."""
COLUMNS = ["what", "compared with", "ratio", "low", "high", "value", "unit", "runs"]


class _Tokenised(DPOTrainer):
    """TRL's trainer on ready-made token ids, so that both sides compute the same tokens."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def bench(root: Path, *, rows: str, base_model: str, pairs: int, repeats: int) -> pd.DataFrame:
    """Run every comparison and return one row for each.

    Args:
        root: the project's folder.
        rows: "embedded", or a folder with a copy of Anthropic/hh-rlhf, as for a scale.
        base_model: hub id or folder of the model.
        pairs: how many pairs are scored; a third of them, and at least eight, are trained on.
        repeats: how often the compared runs alternate.

    Returns:
        Columns `what`, `compared with`, `ratio` (median of the repeats: how many times as fast, with `low` and `high` the extremes), `value` and `unit`, `runs`.

    Raises:
        StudyError: when two sides that are to agree do not, or the rows are too few.
    """
    parameters = params.resolve(root, scale="classroom", setting="distributional_conflict", overrides={"rows": rows, "base_model": base_model})
    tokenizer = models.load_tokenizer(root, base_model)
    table = data.pairs_of(sources.load_rows(root, parameters["source"], layout="hh_rlhf", objective="harmless"), layout="hh_rlhf", objective="harmless")[0]
    table, _ = data.fit(table, tokenizer, max_length=parameters["max_length"])
    if len(table) < pairs:
        raise StudyError(f"{parameters['source']} has {len(table)} usable pairs, the bench was asked for {pairs}. Ask for fewer.")
    encoded = data.encode_table(tokenizer, table.head(pairs))
    found = [*_scoring(root, parameters, tokenizer, encoded, repeats), *_training(root, parameters, tokenizer, encoded[: max(8, pairs // 3)], repeats)]
    found += [*_overhead(root, parameters, tokenizer, table), *_growth(root, parameters, tokenizer, table, pairs), *_memory(root)]
    return pd.DataFrame(found, columns=COLUMNS)


def _alternate(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every run; each repeat goes through all of them, so that a busy machine burdens all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name, run in runs.items():
            seconds[name].append(_seconds(run))
            print(f"  bench | {name}, run {repeat + 1} of {repeats}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return seconds


def _ratio(what: str, against: str, seconds: dict[str, list[float]], *, pairs: int) -> dict[str, Any]:
    ratios = [theirs / ours for ours, theirs in zip(seconds[what], seconds[against], strict=True)]
    rate = {"value": pairs / statistics.median(seconds[what]), "unit": "pairs a second"}
    return {"what": what, "compared with": against, "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "runs": len(ratios)} | rate


def _agree(what: str, ours: list[float], theirs: list[float], *, tolerance: float) -> float:
    gap = float(np.max(np.abs(np.subtract(ours, theirs)) / np.maximum(1.0, np.abs(theirs))))
    if not gap <= tolerance:
        raise StudyError(f"{what}: the two sides differ by {gap:.2g} relative, more than {tolerance:.0e}; their times cannot be compared.")
    return gap


def _dataset(encoded: list[EncodedPair]) -> Dataset:
    return Dataset.from_dict({f"{part}_ids": [getattr(pair, part) for pair in encoded] for part in ("prompt", "chosen", "rejected")})


def _adapted(root: Path, parameters: dict[str, Any], tokenizer: Any, encoded: list[EncodedPair], folder: str, **options: Any) -> DPOTrainer:
    """TRL's own trainer with its own head and reference, in float32, over a fresh adapter."""
    on_cpu = models.compute_device().type == "cpu"
    config = DPOConfig(
        output_dir=folder, max_length=None, bf16=False, use_cpu=on_cpu, dataloader_pin_memory=not on_cpu, report_to="none", disable_tqdm=True, save_strategy="no",
        logging_steps=1, beta=parameters["beta"], learning_rate=parameters["learning_rate"], seed=parameters["seed"], **options,
    )  # fmt: skip
    base = models.load_base(root, parameters["base_model"], dtype="float32")
    rows = _dataset(encoded)
    return _Tokenised(base, args=config, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer, peft_config=models.lora_config(parameters))


def _scoring(root: Path, parameters: dict[str, Any], tokenizer: Any, encoded: list[EncodedPair], repeats: int) -> list[dict[str, Any]]:
    names = "scoring, one row a prompt", "TRL evaluate (policy and reference each time)", "padded loop of eight pairs, full logits"
    with tempfile.TemporaryDirectory() as folder:
        trainer = _adapted(root, parameters, tokenizer, encoded, folder, per_device_eval_batch_size=8)
        policy = trainer.model.eval()
        generator = torch.Generator().manual_seed(0)
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.data.copy_(0.01 * torch.randn(weight.shape, generator=generator))
        rows = scoring.prompt_rows(encoded)
        singles = [scoring.PromptRow(row.prompt, [completion]) for row in rows for completion in row.completions]
        trusted = scoring.distrust(policy, rows) is None
        results: dict[str, Any] = {}

        def ours() -> None:
            results["ours"] = [total for row in scoring.score_rows(policy, rows, token_budget=1024, label="ours", trusted=trusted) for total in row]

        def padded() -> None:
            results["padded"] = torch.cat([scoring.padded_sums(policy, singles[i : i + 16]) for i in range(0, len(singles), 16)]).tolist()

        def trl() -> None:
            results["trl"] = trainer.evaluate()

        ceiling: list[float] = []
        runs = {names[0]: ours, "matrix product": lambda: ceiling.append(_matmul_rate()), names[1]: trl, names[2]: padded}
        seconds = _alternate(runs, repeats)
    _agree("scoring", results["ours"], results["padded"], tolerance=1e-4)
    mean = statistics.fmean(results["trl"][key] for key in ("eval_logps/chosen", "eval_logps/rejected"))
    _agree("mean log-probability", [statistics.fmean(results["ours"])], [mean], tolerance=0.02)  # TRL averages batches, not pairs
    floor = _flops(policy, rows)
    shares = [floor / s / rate for s, rate in zip(seconds[names[0]], ceiling, strict=True)]
    share = {"what": names[0], "compared with": f"float32 product of two {MATMUL} x {MATMUL} matrices", "ratio": statistics.median(shares)}
    share |= {"low": min(shares), "high": max(shares), "value": statistics.median(ceiling) / 1e9, "unit": "GFLOP/s of the product", "runs": repeats}
    return [*(_ratio(names[0], name, seconds, pairs=len(encoded)) for name in names[1:]), share]


def _matmul_rate() -> float:
    """Floating point operations a second of the best of eight products, on the device that the models are on."""
    left, right = (torch.randn(MATMUL, MATMUL, device=models.compute_device()) for _ in range(2))
    best = min(_seconds(lambda: (left @ right)[0, 0].item()) for _ in range(8))  # a GPU is done when a number is read
    return 2 * MATMUL**3 / best


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _flops(model: PreTrainedModel, rows: list[scoring.PromptRow]) -> float:
    """Multiplications and additions of the matrix products that scoring cannot do without.

    Every prompt once, the head at completion tokens, no attention, and of the adapter nothing, since it can be merged.
    """
    spared = "embed", "lm_head", "lora_"
    body = sum(w.numel() for name, w in model.named_parameters() if w.ndim == 2 and not any(word in name for word in spared))
    head = scoring.bare_model(model).get_output_embeddings().weight.numel()
    return 2.0 * (body * sum(row.tokens for row in rows) + head * sum(len(c) for row in rows for c in row.completions))


def _stage_rows(root: Path, parameters: dict[str, Any], encoded: list[EncodedPair]) -> Dataset:
    """The data set of a stage, with the base model's sums."""
    base = models.load_base(root, parameters["base_model"], dtype="float32")
    table = pd.DataFrame({"pair_id": range(len(encoded)), "prompt_id": "", "objective": "harmless", "split": "train"})
    return training.training_rows(encoded, scoring.score_pairs(base, table, encoded, checkpoint="base", token_budget=1024))


def _training(root: Path, parameters: dict[str, Any], tokenizer: Any, encoded: list[EncodedPair], repeats: int) -> list[dict[str, Any]]:
    names = "training, reference cached, one row a pair", "default DPOTrainer in float32"
    encoded = encoded[: len(encoded) // 8 * 8]
    parameters = parameters | {"pairs_per_step": 8, "warmup_ratio": 0.0}
    rows = _stage_rows(root, parameters, encoded)
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:

        def ours() -> None:
            fresh = models.load_base(root, parameters["base_model"], dtype="float32")
            train(training.stage_trainer(fresh, tokenizer, rows, parameters=parameters, output_dir=Path(folder)), names[0])

        def theirs() -> None:
            options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 1, "lr_scheduler_type": "cosine"}
            train(_adapted(root, parameters, tokenizer, encoded, folder, **options), names[1])

        def train(trainer: DPOTrainer, name: str) -> None:
            seconds[name].append(_seconds(trainer.train))
            losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

        seconds: dict[str, list[float]] = {name: [] for name in names}
        _alternate({names[0]: ours, names[1]: theirs}, repeats)
    _agree("training losses", losses[names[0]], losses[names[1]], tolerance=2e-3)
    return [_ratio(*names, seconds, pairs=len(encoded))]


def _overhead(root: Path, parameters: dict[str, Any], tokenizer: Any, table: pd.DataFrame) -> list[dict[str, Any]]:
    """Seconds of a stage that measures conflict and ledger over those of one that does not, and how many pairs it measures for each that it trains on."""
    half = min(OVERHEAD_PAIRS, len(table) // 2)
    encoded = data.encode_table(tokenizer, table.head(2 * half))
    now, old = (_stage_rows(root, parameters, encoded[part]) for part in (slice(half), slice(half, None)))
    sizes = {"pairs_per_step": 8, "conflict_pairs": 4, "probe_pairs": 2}
    seconds, measured = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        options = {"output_dir": Path(folder), "stage": 2, "earlier": {"harmless": old}}
        for every in (0, 1, 4):
            measuring = {"conflict_every": every, "ledger_every": max(every, 1)} | ({} if every else {"probe_pairs": 0})
            fresh = models.load_base(root, parameters["base_model"], dtype="float32")
            trainer = training.stage_trainer(fresh, tokenizer, now, parameters=parameters | sizes | measuring, **options)
            seconds[every] = _seconds(trainer.train)
            points = trainer.ledger_table()["step"].nunique() + 1
            measured[every] = (len(trainer.conflict_table()) * sizes["conflict_pairs"] + points * sizes["probe_pairs"]) / half
            print(f"  bench | stage of {half} pairs, measured every {every} steps: {seconds[every]:.2f} s", file=sys.stderr, flush=True)
    rows = []
    for every, words in ((1, "every step"), (4, "every fourth step")):
        ratio = seconds[every] / seconds[0]
        row = {"what": f"seconds of a stage that measures conflict and ledger {words}", "compared with": "of one that does not", "ratio": ratio}
        unit = "pairs measured for each pair trained on"
        rows.append(row | {"low": ratio, "high": ratio, "value": measured[every], "unit": unit, "runs": 1})
    return rows


def _growth(root: Path, parameters: dict[str, Any], tokenizer: Any, table: pd.DataFrame, pairs: int) -> list[dict[str, Any]]:
    """Seconds a token for ten times the pairs over those for the pairs; one is what a cost in proportion gives, less where padding shrinks."""
    base = models.load_base(root, parameters["base_model"], dtype="float32")
    few = max(4, min(pairs, len(table)) // 10)
    seconds = {}
    for count in (few, 10 * few):
        rows = scoring.prompt_rows(data.encode_table(tokenizer, table.head(count)))
        seconds[count] = _seconds(lambda rows=rows: scoring.score_rows(base, rows, token_budget=1024, trusted=True)) / sum(row.tokens for row in rows)
    ratio = seconds[10 * few] / seconds[few]
    row = {"what": f"seconds a token for {10 * few} pairs", "compared with": f"for {few} pairs", "ratio": ratio, "low": ratio, "high": ratio}
    return [row | {"value": 1 / seconds[10 * few], "unit": "tokens a second", "runs": 1}]


def _memory(root: Path) -> list[dict[str, Any]]:
    """Peak memory of scoring ten times the pairs over that of the pairs, each in a process of its own, on the tiny model."""
    peaks = {}
    for count in (MEMORY_PAIRS, 10 * MEMORY_PAIRS):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            peaks[count] = pool.submit(_peak_of_scoring, root, count).result()
    ratio = peaks[10 * MEMORY_PAIRS] / peaks[MEMORY_PAIRS]
    row = {"what": f"peak memory for {10 * MEMORY_PAIRS} pairs", "compared with": f"for {MEMORY_PAIRS} pairs", "ratio": ratio, "low": ratio, "high": ratio}
    return [row | {"value": peaks[10 * MEMORY_PAIRS] / 1e6, "unit": "MB", "runs": 1}]


def _peak_of_scoring(root: Path, count: int) -> int:
    """Peak resident bytes of this process after scoring `count` short pairs from a data file, by chunks of `MEMORY_PAIRS`."""
    recording.CHUNK_PAIRS = MEMORY_PAIRS
    tokenizer, model = models.load_tokenizer(root, models.TINY), models.load_base(root, models.TINY, dtype="float32")
    names = [f"{i:016x}" for i in range(0, 1 << 64, (1 << 64) // count)][:count]
    rows = [(f'[{{"role": "user", "content": "{name}"}}]', f"yes {name}", f"no {name}") for name in names]
    table = pd.DataFrame(rows, columns=["prompt", "chosen", "rejected"]).assign(pair_id=names, prompt_id=names, objective="helpful", split="eval")
    with tempfile.TemporaryDirectory() as folder:
        source = write_table(Path(folder) / "data.parquet", table)
        recording.score_files(model, tokenizer, [source], Path(folder) / "scores.parquet", splits=["eval"], checkpoint="base", token_budget=4096)
    return _peak_memory()


def _peak_memory() -> int:
    """Peak resident bytes of this process alone."""
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux getrusage would count what the parent had held before this process began
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else 1024 * peak


def write_bench(root: Path, table: pd.DataFrame) -> Path:
    """Write the table as Parquet and as Markdown to `runs/bench`; returns the Markdown file."""
    folder = root / "runs" / "bench"
    write_table(folder / "bench.parquet", table)
    lines = ["| what | compared with | ratio (lowest to highest) | value | runs |", "| --- | --- | --- | --- | --- |"]
    for row in table.to_dict("records"):
        lines.append(
            f"| {row['what']} | {row['compared with']} | {row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f}) | {row['value']:.3g} {row['unit']} | {row['runs']} |"
        )
    cores = f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}, device {models.compute_device()}"
    return write_whole(folder / "bench.md", lambda beside: beside.write_text("\n".join([*lines, "", f"Measured on {cores}."]) + "\n", encoding="utf-8"))
