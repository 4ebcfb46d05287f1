"""Control at inference: can more of one aspect be had by asking for it, without training again?

Every way of asking is scored on the held-out pairs of every other chain, over the same lambdas:

    mixed       adapters of single stages, added up with lambda as weights
    told        a policy that read its lambda in training, asked for another
    not heard   a listwise policy that never read one, told all the same
    base        the base model told lambda: what the words alone do

Reference of all margins is the base model on the plain prompt, so that the ways share one zero.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

from seqdpo_utils import metrics
from seqdpo_utils.chains import Chain, tree
from seqdpo_utils.encoding import encode_prompt, end_of_turn_id
from seqdpo_utils.errors import StudyError
from seqdpo_utils.lists import Told
from seqdpo_utils.mixing import JOINT, SEQUENTIAL, kind_of, mixed, with_adapters
from seqdpo_utils.mixing import places as at_the_end
from seqdpo_utils.models import load_base, load_tokenizer
from seqdpo_utils.pairs import encode_table
from seqdpo_utils.params import Parameters
from seqdpo_utils.paths import RunPaths, read_json, read_table, write_json, write_table
from seqdpo_utils.schedule import believed, lattice
from seqdpo_utils.scoring import Scorer
from seqdpo_utils.stage_data import check_fingerprints

MIXED, TOLD, UNHEARD, BASE = "mixed adapters", "told in the prompt", "told, but never heard", "base, told"
LISTWISE, POOLED = "rated lists", "mean of all"
STEERED = ("listwise_dirichlet", "steered")
"""Variants of the stage whose policy reads its lambda."""
STEERS, AGAINST, OPEN = "rises with its share", "falls with its share", "not shown to move with its share"
WORDS = 40
"""Tokens of a text that shows what a lambda does."""


def grid(aspects: int) -> np.ndarray:
    """The lambdas that a policy is asked for: five on the line of two aspects, else corners and midpoints."""
    return lattice(aspects, parts=4 if aspects == 2 else 2)


def ends_and_middle(aspects: int) -> np.ndarray:
    """Each aspect alone, and all alike."""
    return np.vstack([np.eye(aspects), np.full(aspects, 1 / aspects)])


class Asked:
    """The adapters of one seed, asked for lambdas; what was asked before is read from the disk.

    Records and texts lie in `summary/control` under a hash of all that they depend on.

    Args:
        root: the project's folder.
        run: a node of the setting and seed.
        aspects: those that have a chain of one stage each; their adapters are mixed.
        trained: `TOLD` and `UNHEARD` to the chain whose policy is told; either may be missing.
        parameters: base model, dtype, attention and the like, and the setting's objectives.

    Raises:
        StudyError: when the base model or the data are not those of the adapters.
    """

    def __init__(
        self,
        root: Path,
        run: RunPaths,
        aspects: Sequence[str],
        trained: Mapping[str, str],
        *,
        parameters: Parameters,
    ) -> None:
        self.root, self.run, self.aspects, self.parameters = root, run, list(aspects), parameters
        self.trained = dict(trained)
        alone = all(run.at(name).manifest.is_file() for name in aspects)
        self._singles = list(aspects) if alone else []
        self.computed = 0

    @cached_property
    def _tokenizer(self) -> Any:
        name, revision = self.parameters.base_model, self.parameters.base_model_revision
        return load_tokenizer(self.root, name, revision=revision)

    @cached_property
    def _model(self) -> Any:
        p = self.parameters
        check_fingerprints(self.root, self.run, self._tokenizer, parameters=p)
        base = load_base(
            self.root, p.base_model, dtype=p.dtype, revision=p.base_model_revision,
            attention=p.attention, quantization=p.quantization,
        )  # fmt: skip
        names = [*self._singles, *self.trained.values()]
        return with_adapters(base, [self.run.at(name).adapter for name in names])

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self._model, token_budget=self.parameters.token_budget)

    @property
    def ways(self) -> list[str]:
        """Those that can be asked here: mixing needs the single stages."""
        return [*[MIXED][: len(self._singles)], *self.trained, BASE]

    def points(self, way: str) -> np.ndarray:
        """The lambdas that a way is asked for, (points, m): the ends are enough where nothing should turn."""
        return grid(len(self.aspects)) if way in (MIXED, TOLD) else np.eye(len(self.aspects))

    @contextlib.contextmanager
    def _asked(self, way: str, weights: np.ndarray) -> Iterator[Any]:
        """The tokenizer that asks for lambda, while the model is the one to be asked."""
        told = Told(self._tokenizer, dict(zip(self.aspects, weights, strict=True)))
        if way == MIXED:
            with mixed(self._model, weights.tolist()):
                yield self._tokenizer
        elif way == BASE:
            with self._model.disable_adapter():
                yield told
        else:
            self._model.set_adapter(str(len(self._singles) + list(self.trained).index(way)))
            yield told

    def _place(self, what: str, way: str, weights: np.ndarray, ending: str) -> Path:
        """File of what was asked, named by the adapters, data, base model and lambda that it depends on."""
        used = self.aspects if way == MIXED else [self.trained[way]] if way in self.trained else []
        adapters = [read_json(self.run.at(name).manifest)["adapter_sha256"] for name in used]
        prints = read_json(self.run.preparation)["fingerprints"]
        key = [what, way, self.aspects, weights.tolist(), adapters, prints, self.parameters.max_length]
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return self.run.summary("control").with_suffix("") / f"{name}.{ending}"

    def records(self) -> pd.DataFrame:
        """Per-pair records of every way and lambda on the held-out pairs of all aspects.

        Returns:
            The columns of the records, with `way`, `seed` and a column `lambda_<aspect>` each.
        """
        tables = []
        for way in self.ways:
            for weights in self.points(way):
                if way == MIXED and weights.max() == 1:  # a single stage itself, scored when it was trained
                    single = self.run.at(self.aspects[int(weights.argmax())])
                    table = read_table(single.scores).query("split == 'eval' and objective in @self.aspects")
                    table = table.assign(checkpoint=self._name(way, weights))
                else:
                    file = self._place("records", way, weights, "parquet")
                    if not file.is_file():
                        write_table(file, self._score(way, weights))
                        self.computed += 1
                    table = read_table(file)
                asked = {f"lambda_{name}": w for name, w in zip(self.aspects, weights, strict=True)}
                tables.append(table.assign(way=way, seed=self.run.seed, **asked))
        return pd.concat(tables, ignore_index=True)

    @staticmethod
    def _name(way: str, weights: np.ndarray) -> str:
        return f"{way} {' '.join(f'{weight:g}' for weight in weights)}"

    def _score(self, way: str, weights: np.ndarray) -> pd.DataFrame:
        tables = [read_table(self.run.data(name)).query("split == 'eval'") for name in self.aspects]
        held_out = pd.concat(tables, ignore_index=True)
        with self._asked(way, weights) as tokenizer:
            encoded = encode_table(tokenizer, held_out)
            return self._scorer.records(held_out, encoded, checkpoint=self._name(way, weights))

    def texts(self, count: int = 1) -> pd.DataFrame:
        """Greedy answers to the shortest held-out prompts, under each aspect alone and under all alike.

        Returns:
            `prompt` (its last turn), `way`, `lambda_<aspect>` and `text`, for the ways that may work.
        """
        table = read_table(self.run.data(self.aspects[0])).query("split == 'eval'")
        shortest = table.iloc[table["prompt"].str.len().argsort(kind="stable")].head(count)
        rows = []
        for way in [way for way in (MIXED, TOLD) if way in self.ways]:
            for weights in ends_and_middle(len(self.aspects)):
                asked = {f"lambda_{name}": w for name, w in zip(self.aspects, weights, strict=True)}
                for prompt in shortest["prompt"]:
                    file = self._place(f"text {WORDS} {prompt}", way, weights, "json")
                    if not file.is_file():
                        write_json(file, {"text": self._speak(way, weights, prompt)})
                    question = json.loads(prompt)[-1]["content"]
                    rows.append({"prompt": question, "way": way, "text": read_json(file)["text"]} | asked)
        return pd.DataFrame(rows)

    def _speak(self, way: str, weights: np.ndarray, prompt: str) -> str:
        with self._asked(way, weights) as tokenizer, torch.inference_mode():
            ids = torch.tensor([encode_prompt(tokenizer, json.loads(prompt))], device=self._model.device)
            end = end_of_turn_id(self._tokenizer)
            options = {"max_new_tokens": WORDS, "do_sample": False, "eos_token_id": end, "pad_token_id": end}
            said = self._model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            return self._tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)


def margins_by_lambda(records: pd.DataFrame, base: pd.DataFrame, aspect: str, *, beta: float) -> pd.DataFrame:
    """Held-out margins of one aspect, one column a way and lambda.

    Args:
        records: from `Asked.records`, of one or more seeds of a setting.
        base: the base model's records on the plain prompts.
        aspect: whose pairs.
        beta: the training's.

    Returns:
        Indexed by `seed` and `pair_id`, with `prompt_id`; the other columns are checkpoints of `records`.
    """
    own = records[records["objective"] == aspect]
    return metrics.wide_margins(own.assign(margin=metrics.dpo_margin(own, base, beta=beta)), aspect)


def control(
    records: pd.DataFrame, base: pd.DataFrame, aspects: Sequence[str], *, beta: float, resamples: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Held-out margin of each aspect against the share that it was given, for every way of asking.

    Lambdas that give an aspect the same share are averaged: with two aspects every share is one lambda.

    Args:
        records, base, beta: as for `margins_by_lambda`.
        aspects: in the order of the columns.
        resamples: draws of prompts, crossed with seeds.

    Returns:
        Curves: `way`, `aspect`, `share`, and `margin` with bounds. Control: `way`, `aspect`, `slope` (margin
        gained from share zero to one, least squares) and `rank` (Spearman's correlation of share and mean
        margin), both with bounds; `monotone` (share of draws in which every more of share is more of margin),
        and `verdict`, by the interval of the slope.
    """
    curves, found, rng = [], [], np.random.default_rng(0)
    for way, part in records.groupby("way", sort=False):
        lambdas = part.drop_duplicates("checkpoint").set_index("checkpoint")
        for aspect in aspects:
            wide = margins_by_lambda(part, base, aspect, beta=beta)
            shares = lambdas[f"lambda_{aspect}"]
            draws = metrics.estimates(wide, list(shares.index), resamples=resamples, rng=rng)
            levels = np.unique(shares)
            by_level = np.column_stack([draws[:, shares == level].mean(axis=1) for level in levels])
            place = {"way": way, "aspect": aspect}
            for level, column in zip(levels, by_level.T, strict=True):
                curves.append(place | {"share": level} | metrics.bounded({"margin": column}))
            found.append(place | _control(levels, by_level))
    return pd.DataFrame(curves), pd.DataFrame(found)


def _control(levels: np.ndarray, margins: np.ndarray) -> dict[str, Any]:
    """Slope and rank correlation of margins, (1 + draws, levels), with what the draws say of them."""
    centred = levels - levels.mean()
    slopes = margins @ centred / (centred @ centred)
    ranks = stats.rankdata(margins, axis=1) - (len(levels) + 1) / 2
    places = stats.rankdata(levels) - (len(levels) + 1) / 2
    row = metrics.bounded({"slope": slopes, "rank": ranks @ places / (places @ places)})
    rising = (np.diff(margins[1:], axis=1) > 0).all(axis=1).mean()
    verdict = STEERS if row["slope_low"] > 0 else AGAINST if row["slope_high"] < 0 else OPEN
    return row | {"monotone": rising, "verdict": verdict}


@dataclass(frozen=True)
class AspectStudy:
    """The chains of one setting around its stages on rated lists.

    Attributes:
        nodes: a run of each seed, of any chain.
        chains: texts of all chains, beginnings too.
        aspects: objectives of the listwise stages, in the setting's order.
    """

    nodes: tuple[RunPaths, ...]
    chains: tuple[str, ...]
    aspects: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the setting."""
        return self.nodes[0].setting

    def chain(self, *words: str) -> str | None:
        """The stage of all aspects with these variants, if it was run."""
        text = ".".join(["+".join(self.aspects), *words])
        return text if text in self.chains else None

    def missing(self) -> list[str]:
        """Chains of this lecture that are not in the study."""
        wanted = [(), ("listwise",), ("listwise_uniform",), ("listwise_learned",), STEERED]
        joint = "+".join(self.aspects)
        absent = [".".join([joint, *words]) for words in wanted if not self.chain(*words)]
        return [*(name for name in self.aspects if name not in self.chains), *absent]

    def lists(self) -> pd.DataFrame:
        """What the lists of training prompts hold, by aspect; it skips those that it rates once or never."""
        table, rows = read_table(self.nodes[0].lists), []
        for name in self.aspects:
            rated = [np.isfinite(ratings).sum() for ratings in table[name]]
            answers = sum(map(len, table[name]))
            row = {"setting": self.name, "aspect": name, "lists": len(table), "answers": answers}
            row |= {"ratings missing": answers - sum(rated), "lists skipped": sum(n < 2 for n in rated)}
            rows.append(row)
        return pd.DataFrame(rows)

    def asked(self, root: Path, *, parameters: Parameters) -> list[Asked]:
        """What can be asked of the adapters of each seed."""
        chains = {TOLD: self.chain(*STEERED), UNHEARD: self.chain("listwise_uniform")}
        trained = {way: chain for way, chain in chains.items() if chain}
        return [Asked(root, node, self.aspects, trained, parameters=parameters) for node in self.nodes]

    def schedule(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """What the learned schedule of each run believes at its end, and what it measured.

        Returns:
            `seed`, `share` (of the first aspect) and `gain`, of all steps measured, and, along the line of
            the first two aspects, predicted, with 95 % bounds.
        """
        line = np.zeros((21, len(self.aspects)))
        line[:, 0] = np.linspace(0, 1, 21)
        line[:, 1] = 1 - line[:, 0]
        predicted, seen = [], []
        for node in self.nodes:
            table = read_table(node.at(self.chain("listwise_learned")).schedule)
            mean, spread = believed(line, table, self.aspects)
            bounds = {"gain": mean, "gain_low": mean - 1.96 * spread, "gain_high": mean + 1.96 * spread}
            predicted.append(pd.DataFrame({"seed": node.seed, "share": line[:, 0]} | bounds))
            seen.append(
                table.assign(seed=node.seed, share=table[f"lambda_{self.aspects[0]}"])[
                    ["seed", "step", "share", "gain", "error"]
                ]
            )
        return pd.concat(predicted, ignore_index=True), pd.concat(seen, ignore_index=True)

    def margins(self, aspect: str, texts: Sequence[str], *, beta: float) -> pd.DataFrame:
        """Held-out margins of an aspect at the end of chains, with `prompt_id`, by `seed` and `pair_id`."""
        tables = [
            metrics.margins([node.at(text) for node in self.nodes], aspect, beta=beta) for text in texts
        ]
        columns = [table[text] for table, text in zip(tables, texts, strict=True)]
        return pd.concat([*columns, tables[0]["prompt_id"]], axis=1)

    def difference(self, chain: str, against: str, *, beta: float, resamples: int) -> pd.DataFrame:
        """Held-out margin of one chain minus that of another, pair by pair and run by run.

        Returns:
            `setting`, `objective` (each aspect, and `POOLED`), `difference` with bounds, `runs`, and
            `runs_above`: in how many of them it is above zero.
        """
        rng, rows, parts = np.random.default_rng(0), [], []
        for aspect in self.aspects:
            wide = self.margins(aspect, [chain, against], beta=beta)
            parts.append(wide.assign(gap=wide[chain] - wide[against], aspect=aspect))
        pooled = pd.concat(parts)
        for name, part in [*pooled.groupby("aspect", sort=False), (POOLED, pooled)]:
            gap = part.rename(columns={"gap": "difference"})
            row = metrics.estimated(gap, ["difference"], resamples=resamples, rng=rng)
            above = int((gap.groupby(level="seed")["difference"].mean() > 0).sum())
            place = {"setting": self.name, "objective": name}
            rows.append(place | row | {"runs_above": above, "runs": len(self.nodes)})
        return pd.DataFrame(rows)

    def places(self, records: pd.DataFrame, *, beta: float, resamples: int) -> pd.DataFrame:
        """Where every way to have the first two aspects ends, as `charts.margin_planes` draws it.

        Args:
            records: from `Asked.records` of all seeds.

        Returns:
            As `mixing.places`, with `setting`, `x`, `y`, `order` (which aspect a chain of two stages trains
            first), `sequential`, and `share` (of the second aspect, on the line of mixtures).
        """
        x, y = self.aspects[:2]
        kinds = {text: kind for text in self.chains if (kind := _kind(text, self.aspects))}
        asked = records[records["way"].isin([MIXED, TOLD])]
        single = asked[[f"lambda_{name}" for name in self.aspects]].max(axis=1) == 1
        asked = asked[~single | (asked["way"] == TOLD)]  # the ends of the mixtures are the single stages
        base, tables = read_table(self.nodes[0].base_scores), []
        for aspect in (x, y):
            wide = margins_by_lambda(asked, base, aspect, beta=beta)
            ended = self.margins(aspect, list(kinds), beta=beta).drop(columns="prompt_id")
            tables.append(wide.join(ended, how="inner").dropna())
        by_name = asked.drop_duplicates("checkpoint").set_index("checkpoint")
        table = at_the_end(
            kinds | by_name["way"].to_dict(), tables, resamples=resamples, rng=np.random.default_rng(0)
        )
        on_line = {x: 0.0, y: 1.0} | by_name.query("way == @MIXED")[f"lambda_{y}"].to_dict()
        first = {name: Chain.parse(name).earlier for name in kinds if kinds[name] == SEQUENTIAL}
        order = {name: "across" if earlier == (x,) else "upward" for name, earlier in first.items()}
        names = table["name"]
        table["order"] = [order.get(name, "neither") for name in names]
        table["share"] = names.map(on_line) if len(self.aspects) == 2 else np.nan
        return table.assign(setting=self.name, x=x, y=y, sequential=table["kind"] == SEQUENTIAL)


def _kind(text: str, aspects: Sequence[str]) -> str | None:
    """The way of a chain; None for those that are no way to have these aspects."""
    chain = Chain.parse(text)
    if not set(chain.objectives) <= set(aspects) or any(stage.variants for stage in chain.stages[:-1]):
        return None
    if not chain.last.variants:
        pooled = not chain.parent and len(chain.last.objectives) == len(aspects)
        return JOINT if pooled else kind_of(chain)
    listwise = not chain.parent and len(chain.last.variants) == 1
    return LISTWISE if listwise and chain.last.variants[0].startswith("listwise") else None


def studies_of(
    root: Path, scale: str, chains: Mapping[str, Sequence[str]], seeds: Sequence[int]
) -> list[AspectStudy]:
    """The settings of a study that have a stage on rated lists.

    Raises:
        StudyError: when there is none.
    """
    found = []
    for setting, texts in chains.items():
        every = tree(map(Chain.parse, texts))
        listwise = [
            chain.last for chain in every if any(w.startswith("listwise") for w in chain.last.variants)
        ]
        if listwise:
            nodes = tuple(RunPaths(root / "runs", scale, setting, str(every[0]), seed) for seed in seeds)
            found.append(AspectStudy(nodes, tuple(map(str, every)), listwise[0].objectives))
    if not found:
        raise StudyError("no stage on rated lists is in this study: `make study DESIGN=aspects` runs them.")
    return found
