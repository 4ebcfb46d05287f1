"""How fast scoring and training are, as ratios to TRL and to a plain loop that alternate with them.

`python tests/bench.py` (`make bench`) writes `runs/bench/bench.parquet` and a small Markdown table beside it,
and prints that. Its figures belong to the machine that they were taken on; the ratios travel better than the
seconds.
"""

import argparse
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from seqdpo_utils import layouts, models, pairs, params, paths, records, scoring, stage_data, stages
from seqdpo_utils.encoding import EncodedPair
from seqdpo_utils.errors import StudyError
from seqdpo_utils.scoring import PromptRow, Scorer

MATMUL = 2048
"""Side of the square float32 matrices whose product sets the ceiling."""
MEMORY_PAIRS = 1000
"""Pairs of the tiny model's scoring whose memory is compared with that of ten times as many."""
OVERHEAD_PAIRS = 64
"""Pairs of the stage on which the cost of measuring is taken."""
BUDGET = 1024
"""Tokens in one forward pass of the scorer."""
COLUMNS = ["what", "compared with", "ratio", "low", "high", "value", "unit", "runs"]


class _Tokenised(DPOTrainer):
    """TRL's trainer on ready-made token ids, so that both sides compute the same tokens."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


@dataclass(frozen=True)
class Case:
    """What every comparison needs: the pairs of one objective and the model that scores and learns them."""

    root: Path
    parameters: params.Parameters
    tokenizer: Any
    table: pd.DataFrame

    def base(self) -> PreTrainedModel:
        return models.load_base(self.root, self.parameters.base_model, dtype="float32")

    def encoded(self, count: int) -> list[EncodedPair]:
        return pairs.encode_table(self.tokenizer, self.table.head(count))


def bench(root: Path, *, rows: str, base_model: str, count: int, repeats: int) -> pd.DataFrame:
    """Run every comparison and return one row for each.

    Args:
        root: the project's folder.
        rows: "embedded", or a folder with a copy of Anthropic/hh-rlhf, as for a scale.
        base_model: hub id or folder of the model.
        count: how many pairs are scored; a third of them, and at least eight, are trained on.
        repeats: how often the compared runs alternate.

    Returns:
        Columns `what`, `compared with`, `ratio` (median of the repeats: how many times as fast, with `low`
        and `high` the extremes), `value` and `unit`, `runs`.

    Raises:
        StudyError: when two sides that are to agree do not, or the rows are too few.
    """
    changed = {"rows": rows, "base_model": base_model}
    setting = {"scale": "classroom", "setting": "distributional_conflict"}
    parameters = params.resolve(root, **setting, overrides=changed)
    tokenizer = models.load_tokenizer(root, base_model)
    kind = {"layout": parameters.layout, "objective": "harmless"}
    table = pairs.pairs_of(layouts.load_rows(root, parameters.source, **kind), **kind)[0]
    table, _ = pairs.fit(table, tokenizer, max_length=parameters.max_length)
    if len(table) < count:
        asked = f"the bench was asked for {count}. Ask for fewer."
        raise StudyError(f"{parameters.source} has {len(table)} usable pairs, {asked}")
    case = Case(root, parameters, tokenizer, table)
    found = [*_scoring(case, count, repeats), *_training(case, max(8, count // 3), repeats)]
    found += [*_overhead(case), *_growth(case, count), *_memory(root)]
    return pd.DataFrame(found, columns=COLUMNS)


def _alternate(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every run; each repeat goes through all, so that a busy machine burdens all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name, run in runs.items():
            seconds[name].append(_seconds(run))
            _tell(f"{name}, run {repeat + 1} of {repeats}: {seconds[name][-1]:.2f} s")
    return seconds


def _tell(text: str) -> None:
    print(f"  bench | {text}", file=sys.stderr, flush=True)


def _row(what: str, against: str, ratios: list[float], value: float, unit: str) -> dict[str, Any]:
    extremes = {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    names = {"what": what, "compared with": against}
    return names | extremes | {"value": value, "unit": unit, "runs": len(ratios)}


def _ratio(what: str, against: str, seconds: dict[str, list[float]], *, pairs: int) -> dict[str, Any]:
    ratios = [theirs / ours for ours, theirs in zip(seconds[what], seconds[against], strict=True)]
    return _row(what, against, ratios, pairs / statistics.median(seconds[what]), "pairs a second")


def _agree(what: str, ours: list[float], theirs: list[float], *, tolerance: float) -> float:
    gap = float(np.max(np.abs(np.subtract(ours, theirs)) / np.maximum(1.0, np.abs(theirs))))
    if not gap <= tolerance:
        found = f"the two sides differ by {gap:.2g} relative, more than {tolerance:.0e}"
        raise StudyError(f"{what}: {found}; their times cannot be compared.")
    return gap


def _dataset(encoded: list[EncodedPair]) -> Dataset:
    parts = "prompt", "chosen", "rejected"
    return Dataset.from_dict({f"{part}_ids": [getattr(pair, part) for pair in encoded] for part in parts})


def _adapted(case: Case, encoded: list[EncodedPair], folder: str, **options: Any) -> DPOTrainer:
    """TRL's own trainer with its own head and reference, in float32, over a fresh adapter."""
    on_cpu, parameters, rows = models.compute_device().type == "cpu", case.parameters, _dataset(encoded)
    config = DPOConfig(
        output_dir=folder, max_length=None, bf16=False, use_cpu=on_cpu, dataloader_pin_memory=not on_cpu,
        report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1, beta=parameters.beta,
        learning_rate=parameters.learning_rate, seed=parameters.seed, **options,
    )  # fmt: skip
    sides = {"train_dataset": rows, "eval_dataset": rows, "processing_class": case.tokenizer}
    return _Tokenised(case.base(), args=config, peft_config=models.lora_config(parameters), **sides)


def _scoring(case: Case, count: int, repeats: int) -> list[dict[str, Any]]:
    trl_name = "TRL evaluate (policy and reference each time)"
    names = "scoring, one row a prompt", trl_name, "padded loop of eight pairs, full logits"
    encoded = case.encoded(count)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _adapted(case, encoded, folder, per_device_eval_batch_size=8)
        policy = trainer.model.eval()
        generator = torch.Generator().manual_seed(0)
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.data.copy_(0.01 * torch.randn(weight.shape, generator=generator))
        rows = scoring.prompt_rows(encoded)
        singles = scoring.one_a_row(rows)
        scorer = Scorer(policy, token_budget=BUDGET)
        scorer.fault(rows)  # the check belongs to the model, not to these pairs
        results: dict[str, Any] = {}

        def ours() -> None:
            results["ours"] = [total for sums in scorer.sums(rows, label="ours") for total in sums]

        def padded() -> None:
            parts = [scoring.padded_sums(policy, singles[i : i + 16]) for i in range(0, len(singles), 16)]
            results["padded"] = torch.cat(parts).tolist()

        def trl() -> None:
            results["trl"] = trainer.evaluate()

        ceiling: list[float] = []
        runs = {names[0]: ours, "matrix product": lambda: ceiling.append(_matmul_rate())}
        seconds = _alternate(runs | {names[1]: trl, names[2]: padded}, repeats)
    _agree("scoring", results["ours"], results["padded"], tolerance=1e-4)
    means = [results["trl"][key] for key in ("eval_logps/chosen", "eval_logps/rejected")]
    ours_mean, trl_mean = statistics.fmean(results["ours"]), statistics.fmean(means)
    _agree("mean log-probability", [ours_mean], [trl_mean], tolerance=0.02)  # TRL averages batches, not pairs
    floor = _flops(policy, rows)
    shares = [floor / s / rate for s, rate in zip(seconds[names[0]], ceiling, strict=True)]
    against, rate = f"float32 product of two {MATMUL} x {MATMUL} matrices", statistics.median(ceiling) / 1e9
    share = _row(names[0], against, shares, rate, "GFLOP/s of the product")
    return [*(_ratio(names[0], name, seconds, pairs=count) for name in names[1:]), share]


def _matmul_rate() -> float:
    """Floating point operations a second of the best of eight products, on the device of the models."""
    left, right = (torch.randn(MATMUL, MATMUL, device=models.compute_device()) for _ in range(2))
    # a GPU is done when a number is read
    best = min(_seconds(lambda: (left @ right)[0, 0].item()) for _ in range(8))
    return 2 * MATMUL**3 / best


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _flops(model: PreTrainedModel, rows: list[PromptRow]) -> float:
    """Multiplications and additions of the matrix products that scoring cannot do without.

    Every prompt once, the head at completion tokens, no attention, and of the adapter nothing, since it can
    be merged.
    """
    spared = "embed", "lm_head", "lora_"
    matrices = [(name, w) for name, w in model.named_parameters() if w.ndim == 2]
    body = sum(w.numel() for name, w in matrices if not any(word in name for word in spared))
    head = scoring.bare_model(model).get_output_embeddings().weight.numel()
    scored = sum(len(completion) for row in rows for completion in row.completions)
    return 2.0 * (body * sum(row.tokens for row in rows) + head * scored)


def _stage_data(case: Case, encoded: list[EncodedPair], **earlier: Dataset) -> stage_data.StageData:
    """What a stage trains on, with the base model's sums."""
    names = {"pair_id": range(len(encoded)), "prompt_id": "", "objective": "harmless", "split": "train"}
    scorer = Scorer(case.base(), token_budget=BUDGET)
    reference = scorer.records(pd.DataFrame(names), encoded, checkpoint="base")
    return stage_data.StageData(stage_data.training_rows(encoded, reference), reference, earlier)


def _training(case: Case, count: int, repeats: int) -> list[dict[str, Any]]:
    names = "training, reference cached, one row a pair", "default DPOTrainer in float32"
    encoded = case.encoded(count // 8 * 8)
    parameters = case.parameters.model_copy(update={"pairs_per_step": 8, "warmup_ratio": 0.0})
    data = _stage_data(case, encoded)
    losses: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:

        def ours() -> None:
            options = {"parameters": parameters, "output_dir": Path(folder)}
            train(stages.stage_trainer(case.base(), case.tokenizer, data, **options), names[0])

        def theirs() -> None:
            options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
            options |= {"num_train_epochs": 1, "lr_scheduler_type": "cosine"}
            train(_adapted(case, encoded, folder, **options), names[1])

        def train(trainer: DPOTrainer, name: str) -> None:
            seconds[name].append(_seconds(trainer.train))
            losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

        _alternate({names[0]: ours, names[1]: theirs}, repeats)
    _agree("training losses", losses[names[0]], losses[names[1]], tolerance=2e-3)
    return [_ratio(*names, seconds, pairs=len(encoded))]


def _overhead(case: Case) -> list[dict[str, Any]]:
    """Seconds of a stage that measures conflict and ledger over those of one that does not.

    The value is how many pairs it measures for each that it trains on.
    """
    half = min(OVERHEAD_PAIRS, len(case.table) // 2)
    encoded = case.encoded(2 * half)
    data = _stage_data(case, encoded[:half], harmless=_stage_data(case, encoded[half:]).rows)
    sizes = {"pairs_per_step": 8, "conflict_pairs": 4, "ledger_pairs": 2}
    seconds, measured = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for every in (0, 1, 4):
            measuring = {"conflict_every": every, "ledger_every": max(every, 1)}
            measuring |= {} if every else {"ledger_pairs": 0}
            parameters = case.parameters.model_copy(update=sizes | measuring)
            options = {"parameters": parameters, "output_dir": Path(folder)}
            trainer = stages.stage_trainer(case.base(), case.tokenizer, data, **options)
            seconds[every] = _seconds(trainer.train)
            points = trainer.ledger_table()["step"].nunique() + 1
            drawn = len(trainer.conflict_table()) * sizes["conflict_pairs"]
            measured[every] = (drawn + points * sizes["ledger_pairs"]) / half
            _tell(f"stage of {half} pairs, measured every {every} steps: {seconds[every]:.2f} s")
    rows = []
    for every, words in ((1, "every step"), (4, "every fourth step")):
        what = f"seconds of a stage that measures conflict and ledger {words}"
        ratio, unit = seconds[every] / seconds[0], "pairs measured for each pair trained on"
        rows.append(_row(what, "of one that does not", [ratio], measured[every], unit))
    return rows


def _growth(case: Case, count: int) -> list[dict[str, Any]]:
    """Seconds a token for ten times the pairs over those for the pairs.

    One is what a cost in proportion gives, less where padding shrinks.
    """
    few, seconds = max(4, count // 10), {}
    scorer = Scorer(case.base(), token_budget=BUDGET)
    for size in (few, 10 * few):
        rows = scoring.prompt_rows(case.encoded(size))
        scorer.fault(rows)
        seconds[size] = _seconds(lambda rows=rows: scorer.sums(rows)) / sum(row.tokens for row in rows)
    what, against = f"seconds a token for {10 * few} pairs", f"for {few} pairs"
    ratio = seconds[10 * few] / seconds[few]
    return [_row(what, against, [ratio], 1 / seconds[10 * few], "tokens a second")]


def _memory(root: Path) -> list[dict[str, Any]]:
    """Peak memory of scoring ten times the pairs over that of the pairs.

    Each in a process of its own, on the tiny model.
    """
    peaks = {}
    for count in (MEMORY_PAIRS, 10 * MEMORY_PAIRS):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            peaks[count] = pool.submit(_peak_of_scoring, root, count).result()
    what, against = f"peak memory for {10 * MEMORY_PAIRS} pairs", f"for {MEMORY_PAIRS} pairs"
    ratio = peaks[10 * MEMORY_PAIRS] / peaks[MEMORY_PAIRS]
    return [_row(what, against, [ratio], peaks[10 * MEMORY_PAIRS] / 1e6, "MB")]


def _peak_of_scoring(root: Path, count: int) -> int:
    """Peak resident bytes of this process after scoring `count` short pairs, by chunks of `MEMORY_PAIRS`."""
    records.CHUNK_PAIRS = MEMORY_PAIRS
    models.prepare_model(root, models.TINY)
    tokenizer = models.load_tokenizer(root, models.TINY)
    scorer = Scorer(models.load_base(root, models.TINY, dtype="float32"), token_budget=4096)
    names = [f"{i:016x}" for i in range(0, 1 << 64, (1 << 64) // count)][:count]
    texts = [(f'[{{"role": "user", "content": "{name}"}}]', f"yes {name}", f"no {name}") for name in names]
    table = pd.DataFrame(texts, columns=["prompt", "chosen", "rejected"])
    table = table.assign(pair_id=names, prompt_id=names, objective="helpful", split="eval")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "data.parquet", Path(folder) / "scores.parquet"
        paths.write_table(source, table)
        records.score_files(scorer, tokenizer, [source], target, splits=["eval"], checkpoint="base")
    return _peak_memory()


def _peak_memory() -> int:
    """Peak resident bytes of this process alone."""
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux getrusage would count what the parent had held before this process began
        lines = status.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else 1024 * peak


def write_bench(root: Path, table: pd.DataFrame) -> Path:
    """Write the table as Parquet and as Markdown to `runs/bench`; returns the Markdown file."""
    folder = root / "runs" / "bench"
    paths.write_table(folder / "bench.parquet", table)
    lines = ["| what | compared with | ratio (lowest to highest) | value | runs |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for row in table.to_dict("records"):
        ratio = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        cells = [row["what"], row["compared with"], ratio, f"{row['value']:.3g} {row['unit']}", row["runs"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    machine = f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"
    text = "\n".join([*lines, "", f"Measured on {machine}, device {models.compute_device()}.", ""])
    target = folder / "bench.md"
    return paths.write_whole(target, lambda beside: beside.write_text(text, encoding="utf-8"))


def main() -> int:
    """Read the command line, run the bench and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="embedded", help="embedded, or a folder with Anthropic/hh-rlhf")
    parser.add_argument("--model", default=models.SMOLLM2, help="hub id, or folder relative to the project")
    parser.add_argument("--pairs", type=int, default=48, help="pairs that are scored")
    parser.add_argument("--repeats", type=int, default=2, help="how often the compared runs alternate")
    given = parser.parse_args()
    try:
        root = paths.project_root()
        options = {"rows": given.rows, "base_model": given.model, "count": given.pairs}
        table = bench(root, repeats=given.repeats, **options)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(write_bench(root, table).read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
