"""A study planted on disk: all files that notebooks 04 to 07 read, from numbers that a test can compute with.

Two objectives in both orders and one control, two seeds. Whatever could hide a slip differs: prompts have one
to four pairs, answers unequal lengths, seeds and chains numbers of their own, training rows absurd margins,
the two splits of earlier pairs opposite signs.
"""

import ast
import contextlib
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import altair as alt
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import torch
from conftest import ROOT
from IPython.display import Markdown
from safetensors.torch import save_file

from seqdpo_utils import layouts
from seqdpo_utils.chains import BASE, Chain
from seqdpo_utils.conflict import CONFLICT_COLUMNS
from seqdpo_utils.ledger import LEDGER_COLUMNS, LEDGER_PAIR_COLUMNS
from seqdpo_utils.paths import REPORT_KEY, RunPaths, read_table, write_json, write_table, write_whole

SCALE, SETTING, OBJECTIVES, SEEDS = "smoke", "safety_signal", ("helpful", "safe"), (0, 1)
FORTH, SHAM, BACK = CHAINS = ("safe-then-helpful", "safe-then-helpful.shuffled", "helpful-then-safe")
BETA, RANK, ALPHA, RESAMPLES = 0.2, 2, 6, 600
SIZES = {"pairs_per_step": 8, "conflict_pairs": 8, "ledger_pairs": 5}
OWN = {"03": SIZES, "04": {"controls": list(CHAINS)}}
OWN |= {"05": OWN["04"], "06": SIZES | OWN["04"] | {"lora_rank": RANK, "lora_alpha": ALPHA}}
"""Parameters of a notebook beside those of all."""
NOISE = {0: None, 1: {"sums": 16, "rms": 0.3, "worst": 0.5}}
"""Rounding of the sums as noted by the scorer: seed 0 in float32, seed 1 not."""
NOISY = {"wrong": ["eval-3"], "undecided": ["eval-4", "eval-9"]}
"""Prompts of `safe` whose labels are known to be wrong or arbitrary; of `helpful` nothing is known."""
PAIRS_OF_PROMPT = (1, 2, 3, 4, 2, 3, 1, 4, 2, 3, 4, 1, 2, 3, 2, 1)
PAIRS = sum(PAIRS_OF_PROMPT)
MARGINS = {
    "safe": {"safe": (1.0, 0.98), "helpful": (0.2, 0.17)},
    "helpful": {"helpful": (0.8, 0.83), "safe": (-0.1, -0.12)},
    FORTH: {"safe": (0.5, 0.47), "helpful": (0.9, 0.86)},
    SHAM: {"safe": (-0.4, -0.42), "helpful": (0.3, 0.35)},
    BACK: {"helpful": (1.3, 1.36), "safe": (1.1, 1.04)},
}
"""Mean margin of a node's objectives at its end, for each seed, about which pairs and prompts scatter."""
KEPT = {FORTH: 0.4, SHAM: -0.2, BACK: 1.2}
"""How much of a pair's deviation after stage 1 is left after stage 2."""
CROSS = {FORTH: -0.3, SHAM: -0.05, BACK: 0.25}
"""Mean cosine of halves with held-out pairs of the first objective; a tenth more in seed 1."""
PARTS = {(0, "q_proj"): 0.4, (0, "up_proj"): 0.3, (1, "q_proj"): -0.1, (1, "up_proj"): 0.4}
"""Share of layer and module in every entry of a ledger."""


@dataclass
class Planted:
    """What lies on disk under `root / "runs"`, kept as it was planted, by seed and chain."""

    root: Path
    records: dict[tuple[int, str], pd.DataFrame] = field(default_factory=dict)
    conflict: dict[tuple[int, str], pd.DataFrame] = field(default_factory=dict)
    ledger_pairs: dict[tuple[int, str], pd.DataFrame] = field(default_factory=dict)
    kl: dict[tuple[int, str], pd.DataFrame] = field(default_factory=dict)
    adapters: dict[tuple[int, str], dict[str, tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)
    data: dict[str, pd.DataFrame] = field(default_factory=dict)
    _pages: dict[tuple, "Page"] = field(default_factory=dict)

    def run(self, chain: str, seed: int) -> RunPaths:
        return RunPaths(self.root / "runs", SCALE, SETTING, chain, seed)

    def page(self, number: str, chain: str = "", seed: int = 0) -> "Page":
        """Notebook 03, 04, 05 or 06 of a chain, or 07 after the last three of all; executed once."""
        given = {"scale": SCALE, "beta": BETA} | ({"resamples": RESAMPLES} if number != "03" else {})
        if number == "07":
            given |= {"seeds": list(SEEDS), "chains": {SETTING: list(CHAINS)}}
            for each in itertools.product(("04", "05", "06"), CHAINS, SEEDS):
                self.page(*each)
        else:
            given |= {"setting": SETTING, "objectives": list(OBJECTIVES), "chain": chain, "seed": seed}
            given |= OWN[number]
        if (key := (number, chain, seed)) not in self._pages:
            rows = mock.patch.object(layouts, "EMBEDDED", self.root / "rows")  # what is known of wrong labels
            with contextlib.chdir(self.root), alt.renderers.enable("default"), rows:
                self._pages[key] = execute(number, **given)
        return self._pages[key]

    def table(self, number: str, name: str, chain: str, seed: int) -> pd.DataFrame:
        """A table that notebook 04, 05 or 06 wrote."""
        self.page(number, chain, seed)
        run = self.run(chain, seed)
        return read_table(run.movement if name == "movement" else run.table(name))

    def summary(self, name: str) -> pd.DataFrame:
        """A table that notebook 07 wrote."""
        self.page("07")
        return read_table(self.run("", 0).summary(name))


def plant(root: Path) -> Planted:
    """Write the study under `root / "runs"`, beside links to the project's notebooks and parameters."""
    for name in ("notebooks", "params"):
        (root / name).symlink_to(ROOT / name)
    study = Planted(root, data={name: _data(name, k) for k, name in enumerate(OBJECTIVES)})
    for name, table in study.data.items():
        write_table(study.run("", 0).data(name), table)
    told = {"layout": "pku_saferlhf", "source": "embedded"}
    write_json(study.run("", 0).preparation, {"parameters": told})
    write_json(root / "noise.json", {"pku_saferlhf": {"safe": NOISY}})
    base = pd.concat([_base(table, k) for k, table in enumerate(study.data.values())], ignore_index=True)
    _write_records(study.run("", 0).base_scores, base, noise=None)
    for seed in SEEDS:
        study.records[seed, BASE] = base
        study.adapters[seed, BASE] = _adapter(np.random.default_rng(50 + seed), None)
        _write_adapter(study.run("", seed).start, study.adapters[seed, BASE])
        for place, text in enumerate(MARGINS):
            _plant_node(study, Chain.parse(text), seed, np.random.default_rng([seed, place]))
    return study


def _plant_node(study: Planted, chain: Chain, seed: int, rng: np.random.Generator) -> None:
    run, key = study.run(str(chain), seed), (seed, str(chain))
    study.records[key] = _scores(study, chain, seed, rng)
    _write_records(run.scores, study.records[key], noise=NOISE[seed])
    study.conflict[key] = _conflict(chain, seed, rng)
    write_table(run.conflict, study.conflict[key])
    study.ledger_pairs[key] = _ledger_pairs(chain, seed, rng)
    write_table(run.ledger_pairs, study.ledger_pairs[key])
    write_table(run.ledger, ledger(study.ledger_pairs[key]))
    study.kl[key] = _kl(str(chain), rng)
    write_table(run.kl, study.kl[key])
    write_table(run.history, history(rng))
    study.adapters[key] = _adapter(rng, study.adapters[seed, str(chain.parent or BASE)])
    _write_adapter(run.adapter, study.adapters[key])
    write_json(run.manifest, {"parameters": {"beta": BETA, "train_share": 0.5}, "varied": []})
    told = {"source": "planted", "base_model": "none", "dtype": "float32", "train_pairs": 8}
    told |= {"conflict_pairs": 8}
    spent = {"seconds_per_step": 2.0, "scoring": {str(chain): {"seconds": 10.0 + seed}}}
    write_json(run.run_json, {"parameters": told} | spent)


def _data(objective: str, place: int) -> pd.DataFrame:
    """Pairs of every split with texts; half of the training prompts and some labels are `safe`'s own."""
    rows = []
    for split, sizes in (("eval", PAIRS_OF_PROMPT), ("train", (2, 1, 3, 2)), ("probe", (1, 2, 2))):
        for number, size in enumerate(sizes):
            prompt = f"{split}-{number + 2 * place * (split == 'train')}"
            for k in range(size):
                turned = place == 1 and (k == 1 if split == "eval" else number % 3 == 0)
                texts = [f"{prompt} {k} {which}" for which in (("two", "one") if turned else ("one", "two"))]
                row = {"pair_id": f"{prompt}-{k}", "prompt_id": prompt, "objective": objective}
                rows.append(row | {"split": split, "prompt": "[]", "chosen": texts[0], "rejected": texts[1]})
    return pd.DataFrame(rows)


def _base(data: pd.DataFrame, place: int) -> pd.DataFrame:
    """Records of the base for every split; a nat a token, more or less."""
    rng = np.random.default_rng(100 + place)
    names = data[["pair_id", "prompt_id", "objective", "split"]].assign(checkpoint=BASE)
    for side in ("chosen", "rejected"):
        tokens = rng.integers(5, 40, len(data))
        names[f"{side}_tokens"] = tokens
        names[f"{side}_logp"] = -tokens * rng.normal(1.0, 0.05, len(data))
    return names


def _scores(study: Planted, chain: Chain, seed: int, rng: np.random.Generator) -> pd.DataFrame:
    """Records after a node: held-out pairs with planted margins, training pairs with a margin of 50."""
    base, before = study.records[seed, BASE], study.records.get((seed, str(chain.parent)))
    scored = base[base["split"] != "probe"].reset_index(drop=True).assign(checkpoint=str(chain))
    margin = np.full(len(scored), 50.0)
    shared = np.random.default_rng(300 + list(MARGINS).index(str(chain)))  # what both seeds do to a prompt
    for objective, means in MARGINS[str(chain)].items():
        rows = ((scored["objective"] == objective) & (scored["split"] == "eval")).to_numpy()
        prompts = scored.loc[rows, "prompt_id"].astype("category").cat.codes.to_numpy()
        off = shared.normal(0, 0.35, len(PAIRS_OF_PROMPT))[prompts] + rng.normal(0, 0.2, rows.sum())
        if before is not None and objective in chain.stages[0].objectives:
            off = 0.3 * off + KEPT[str(chain)] * _margin(before, base, rows)
        margin[rows] = means[seed] + off - off.mean()
    common = rng.normal(-1.0, 1.5, len(scored))
    scored["chosen_logp"] += common + margin / BETA * 0.4
    scored["rejected_logp"] += common - margin / BETA * 0.6
    return scored


def _margin(records: pd.DataFrame, base: pd.DataFrame, rows: np.ndarray) -> np.ndarray:
    gained = records["chosen_logp"] - records["rejected_logp"]
    scored = base[base["split"] != "probe"].reset_index(drop=True)
    return BETA * (gained - (scored["chosen_logp"] - scored["rejected_logp"])).to_numpy()[rows]


def _write_records(path: Path, table: pd.DataFrame, *, noise: dict | None) -> None:
    held = pa.Table.from_pandas(table, preserve_index=False)
    told = {REPORT_KEY: json.dumps({"noise": noise})}
    held = held.replace_schema_metadata((held.schema.metadata or {}) | told)
    write_whole(path, lambda beside: pyarrow.parquet.write_table(held, beside))


def _conflict(chain: Chain, seed: int, rng: np.random.Generator) -> pd.DataFrame:
    """Six measurements a split, one of them without halves of the new batch; none for a first stage."""
    rows = []
    for earlier in chain.earlier:
        for split, sign in (("train", -1), ("probe", 1)):
            for step in range(1, 7):
                cross = sign * (CROSS[str(chain)] + 0.1 * seed) + rng.normal(0, 0.03)
                old, new = rng.normal(0.5, 0.04), rng.normal(0.7, 0.04)
                row = {"step": step, "stage": 2, "previous_objective": earlier, "split": split}
                row |= {"norm_new": 1.0 + rng.random(), "norm_old": 2.0 + rng.random(), "cosine": cross * 0.9}
                row |= {"within_cosine": old, "loss_new": rng.random(), "loss_old": rng.random()}
                row |= {"ledger": rng.normal(0, 0.1), "within_old": old * (1 + rng.random())}
                if step != 4:
                    row |= {"matched_cosine": cross, "within_new_cosine": new}
                    row |= {"cross_product": cross * (1 + rng.random()), "within_new": new}
                rows.append(row)
    return pd.DataFrame(rows, columns=list(CONFLICT_COLUMNS))


def _ledger_pairs(chain: Chain, seed: int, rng: np.random.Generator) -> pd.DataFrame:
    """Two stretches of five pairs on three prompts; of held-out pairs the loss rises, of training pairs not.

    The same pairs in every stage with the same earlier objective, with a part of the change in common.
    """
    rows = []
    for earlier in chain.earlier:
        for split, sign in (("train", -1), ("probe", 1)):
            shared = np.random.default_rng(200 + seed).normal(0, 0.1, 5)
            before = 0.4 + rng.random(5) / 10
            for start, step in ((0, 2), (2, 5)):
                left = sign * 0.1 + shared + rng.normal(0, 0.02, 5)
                term = left + 0.05 + CROSS[str(chain)] / 5 + rng.normal(0, 0.02, 5)
                after = before + term + rng.normal(0.01, 0.01, 5)
                for k, (pair, prompt) in enumerate(zip("uvwxy", "aabbc", strict=True)):
                    row = {"stage": 2, "previous_objective": earlier, "split": split, "from_step": start}
                    row |= {"step": step, "pair_id": pair, "prompt_id": prompt, "term": term[k]}
                    row |= {"left": left[k], "loss_before": before[k], "loss_after": after[k]}
                    rows.append(row)
                before = after
    return pd.DataFrame(rows, columns=list(LEDGER_PAIR_COLUMNS))


def ledger(pairs: pd.DataFrame) -> pd.DataFrame:
    """Entries by layer and module of what `pairs` tell pair by pair."""
    place = ["stage", "previous_objective", "split", "from_step", "step"]
    means = pairs.groupby(place, sort=False)[["term", "left", "loss_before", "loss_after"]].mean()
    rows = [
        row | {"layer": layer, "module": module} | {name: share * row[name] for name in ("term", "left")}
        for row in means.reset_index().to_dict("records")
        for (layer, module), share in PARTS.items()
    ]
    return pd.DataFrame(rows, columns=list(LEDGER_COLUMNS))


def _kl(checkpoint: str, rng: np.random.Generator) -> pd.DataFrame:
    """Three pairs of each objective on two prompts; farther for `safe`."""
    rows = [
        {"pair_id": pair, "prompt_id": prompt, "objective": objective, "checkpoint": checkpoint, "side": side}
        | {"tokens": 5, "kl": 0.1 + 0.4 * place + 0.05 * rng.random()}
        for place, objective in enumerate(OBJECTIVES)
        for pair, prompt in (("u", "a"), ("v", "a"), ("w", "b"))
        for side in ("chosen", "rejected")
    ]
    return pd.DataFrame(rows)


def history(rng: np.random.Generator) -> pd.DataFrame:
    """The log of a stage of five steps."""
    names = ["loss", "rewards/margins", "rewards/chosen", "rewards/rejected"]
    names += ["grad_norm", "learning_rate", "seconds"]
    return pd.DataFrame({"step": range(1, 6)} | {name: rng.random(5) for name in names})


def _adapter(rng: np.random.Generator, before: dict | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A and B of each module, near those of the stage before."""
    names = [f"model.layers.{k}.{'self_attn' if m == 'q_proj' else 'mlp'}.{m}" for k, m in PARTS]
    sizes = ((RANK, 6), (5, RANK))
    if before is None:
        return {name: tuple(rng.normal(size=size) for size in sizes) for name in names}
    moved = {name: [rng.normal(0, 0.3, size) for size in sizes] for name in names}
    return {name: (a + moved[name][0], b + moved[name][1]) for name, (a, b) in before.items()}


def _write_adapter(folder: Path, adapter: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sides = {
        f"base_model.model.{name}.lora_{side}.weight": torch.tensor(matrix)
        for name, pair in adapter.items()
        for side, matrix in zip("AB", pair, strict=True)
    }
    save_file(sides, folder / "adapter_model.safetensors")


@dataclass
class Page:
    """A notebook that was executed: its names at the end, and the texts that it showed."""

    names: dict[str, Any]
    texts: list[str]

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def execute(number: str, **parameters: Any) -> Page:
    """Run the code cells of a notebook in this process, in the working directory.

    Kept of what cells show are computed sentences, and the description of a chart, which holds its caption.
    """
    (file,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    page = Page({"__name__": "__main__"}, [])
    for cell in json.loads(file.read_text())["cells"]:
        if cell["cell_type"] != "code" or "by-hand" in cell["metadata"].get("tags", []):
            continue
        tree = ast.parse("".join(cell["source"]), f"{number} {cell['id']}")
        shown = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{number} {cell['id']}", "exec"), page.names)
        if "parameters" in cell["metadata"].get("tags", []):
            assert set(parameters) <= set(page.names), "a parameter that the notebook does not declare"
            page.names.update(parameters)
        if shown:
            value = eval(compile(ast.Expression(shown.value), f"{number} {cell['id']}", "eval"), page.names)
            told = value.data if isinstance(value, Markdown) else getattr(value, "description", None)
            page.texts += [told] if isinstance(told, str) else []
    return page
