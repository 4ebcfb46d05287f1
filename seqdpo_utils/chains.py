"""Chains of stages: how a run is written, what it builds on, and how a design becomes chains.

    helpful-then-harmless.shuffled          a chain of two stages; the second has a variant
    helpful+harmless                        one stage that trains two objectives together

The text names the folder, so one training has one text: the objectives of a stage stand in the setting's
order, its variants in the order of the alphabet.
"""

import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from seqdpo_utils.errors import StudyError

THEN = "-then-"
BASE = "base"
"""Name of the checkpoint before any training."""
STAGE_PATTERN = r"[a-z][a-z0-9_]*(\+[a-z][a-z0-9_]*)*(\.[a-z][a-z0-9_]*)*"
"""A stage as a regular expression: objectives joined by "+", then variants after dots."""


@dataclass(frozen=True)
class Stage:
    """One training: the objectives whose pairs are pooled, and variants of how they are trained on."""

    objectives: tuple[str, ...]
    variants: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Stage":
        """Read a stage, for example "helpful+harmless.half".

        Raises:
            StudyError: for an empty stage, characters that no name has, or a word that stands twice.
        """
        if not text:
            raise StudyError("a stage is empty: write at least one objective between two '-then-'.")
        if not re.fullmatch(STAGE_PATTERN, text):
            raise StudyError(
                f"stage {text!r} is not of the form objective+objective.variant.variant: names are lower-case"
                " letters, digits and underscores, and begin with a letter."
            )
        objectives, *variants = text.split(".")
        stage = cls(tuple(objectives.split("+")), tuple(variants))
        for kind, words in (("objective", stage.objectives), ("variant", stage.variants)):
            twice = [word for word in words if words.count(word) > 1]
            if twice:
                raise StudyError(f"stage {text!r} names the {kind} {twice[0]!r} twice.")
        return stage

    def __str__(self) -> str:
        return ".".join(["+".join(self.objectives), *self.variants])


@dataclass(frozen=True)
class Chain:
    """Stages that train one adapter one after another, from the base model on."""

    stages: tuple[Stage, ...]

    @classmethod
    def parse(cls, text: str) -> "Chain":
        """Read a chain; `str` gives the same text back.

        Raises:
            StudyError: as `Stage.parse`, naming the chain.
        """
        try:
            return cls(tuple(Stage.parse(part) for part in text.split(THEN)))
        except StudyError as error:
            raise StudyError(f"chain {text!r}: {error}") from None

    def __str__(self) -> str:
        return THEN.join(map(str, self.stages))

    @property
    def last(self) -> Stage:
        """The stage that makes this chain out of its parent."""
        return self.stages[-1]

    @property
    def parent(self) -> "Chain | None":
        """The chain without its last stage; None where the first stage is the last."""
        return Chain(self.stages[:-1]) if len(self.stages) > 1 else None

    @cached_property
    def lineage(self) -> list["Chain"]:
        """Every beginning of the chain, the shortest first, itself last."""
        return [Chain(self.stages[:count]) for count in range(1, len(self.stages) + 1)]

    @property
    def objectives(self) -> tuple[str, ...]:
        """What is trained anywhere in the chain, each objective once, in the order of training."""
        return tuple(dict.fromkeys(name for stage in self.stages for name in stage.objectives))

    @property
    def earlier(self) -> tuple[str, ...]:
        """What was trained before the last stage, each objective once, in the order of training."""
        return self.parent.objectives if self.parent else ()

    @property
    def checkpoints(self) -> list[str]:
        """Names of the checkpoints in tables: "base", then each beginning's text."""
        return [BASE, *map(str, self.lineage)]

    @property
    def labels(self) -> dict[str, str]:
        """Checkpoint to a short name for figures: "base", "1 helpful", "2 harmless.shuffled"."""
        short = [f"{number} {stage}" for number, stage in enumerate(self.stages, start=1)]
        return dict(zip(self.checkpoints, [BASE, *short], strict=True))


def canonical(chain: Chain, objectives: Sequence[str]) -> Chain:
    """The same chain with each stage's objectives in the order of `objectives` and its variants sorted."""
    stages = [
        Stage(tuple(sorted(s.objectives, key=objectives.index)), tuple(sorted(s.variants)))
        for s in chain.stages
    ]
    return Chain(tuple(stages))


def check_chain(chain: Chain, *, objectives: Sequence[str], variants: Iterable[str]) -> None:
    """Refuse a chain that a setting cannot run.

    Args:
        chain: the chain.
        objectives: those of the setting, in its order.
        variants: names of all variants.

    Raises:
        StudyError: for an unknown objective or variant, or a stage that is not written in the one way.
    """
    known = {"objective": sorted(objectives), "variant": sorted(variants)}
    for stage in chain.stages:
        for kind, words in (("objective", stage.objectives), ("variant", stage.variants)):
            unknown = [word for word in words if word not in known[kind]]
            if unknown:
                choice = ", ".join(known[kind])
                raise StudyError(f"chain '{chain}': unknown {kind} {unknown[0]!r}; known are {choice}.")
    if (right := canonical(chain, objectives)) != chain:
        raise StudyError(f"chain '{chain}': write '{right}', so that one training has one folder.")


def tree(chains: Iterable[Chain]) -> list[Chain]:
    """The chains and all their beginnings, each once: what has to be trained."""
    return list(dict.fromkeys(beginning for chain in chains for beginning in chain.lineage))


SHUFFLED, AGAIN = "shuffled labels", "the same again"
"""The two controls of a later stage: labels at random, and the first stage's own objectives once more."""


def controls(chain: Chain, among: Collection[str]) -> dict[str, str]:
    """The chains that show what any later stage does, for a chain whose last stage has no variants.

    Args:
        chain: whose last stage is questioned.
        among: texts of the chains of the study.

    Returns:
        Kind (`SHUFFLED`, `AGAIN`) to the text of the chain; only those in `among`.
    """
    if chain.parent is None or chain.last.variants:
        return {}
    last = {SHUFFLED: Stage(chain.last.objectives, ("shuffled",)), AGAIN: Stage(chain.stages[0].objectives)}
    named = {kind: str(Chain((*chain.parent.stages, stage))) for kind, stage in last.items()}
    return {kind: text for kind, text in named.items() if text in among and text != str(chain)}


def expand(templates: Sequence[str], objectives: Sequence[str]) -> tuple[list[Chain], list[str]]:
    """The chains that a design means for a setting.

    In a template a capital letter stands for an objective, different letters for different ones, and ALL for
    every objective of the setting trained together. Each template gives one chain for every way of choosing
    its letters: "A-then-B" over two objectives is both orders.

    Args:
        templates: such as "A-then-B.shuffled".
        objectives: of the setting, in its order.

    Returns:
        The chains, each once, and the templates that need more objectives than the setting has.
    """
    found: dict[Chain, None] = {}
    skipped = []
    for template in templates:
        letters = sorted(set(re.findall(r"\b[A-Z]\b", template)))
        if len(letters) > len(objectives):
            skipped.append(template)
            continue
        for choice in itertools.permutations(objectives, len(letters)):
            names: Mapping[str, str] = dict(zip(letters, choice, strict=True)) | {"ALL": "+".join(objectives)}
            text = re.sub(r"\b([A-Z]|ALL)\b", lambda word, names=names: names[word[0]], template)
            found[canonical(Chain.parse(text), objectives)] = None
    return list(found), skipped
