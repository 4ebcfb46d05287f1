"""The classroom: predictions before answers, checks that teach, trials beside the study, two copies.

Tags of the notebooks' cells: an `exercise` is a stub for the student, a `solution` fills it in, a `check`
says whether an answer is right or which mistake makes it. What is tagged `by-hand` (every stub, every
solution that trains) waits for a person: a study leaves it out.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown
from scipy import stats

from seqdpo_utils.chains import Chain
from seqdpo_utils.charts import percent, say, with_interval
from seqdpo_utils.errors import StudyError
from seqdpo_utils.pairs import label_agreement
from seqdpo_utils.paths import RunPaths, read_json, read_table, write_json, write_whole

COPIES = {"student": {"solution"}, "teacher": set()}
"""Kind of copy to the tags of the cells that it lacks."""
WAYS = ("falls", "stays", "rises")
_UNKNOWN = "It is none of the mistakes that we know. Work one pair through by hand and compare."
_predictions: dict[str, str] = {}  # of this kernel: a notebook's own


class Rejected(StudyError):
    """An answer that a check refuses; the message names the mistake and what to look at."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows in place of a traceback: the student's code is not at fault."""
        return [f"Not yet. {self}"]


def predict(question: str, word: Any = ..., *, among: Sequence[str] = WAYS) -> Markdown:
    """Store a prediction before the answer is seen; three dots in place of a word ask for one.

    Raises:
        StudyError: for a word that is not among those that can be held against what is seen.
    """
    choice = ", ".join(f"“{each}”" for each in among)
    if word is ...:
        return say(f"**Your prediction is missing: {question}.** In place of `...` write one of {choice}.")
    if word not in among:
        raise StudyError(f"{word!r} is no prediction of {question}: choose one of {choice}.")
    _predictions[question] = word
    return say(f"Stored. You predict of {question}: **{word}**. It will be looked at again.")


def predicted(question: str, seen: str) -> str:
    """A stored prediction beside what was seen; empty where none was stored, as when a study runs."""
    if question not in _predictions:
        return ""
    said = _predictions[question]
    ends = "as you said" if said == seen else "so ask what you overlooked before you read on"
    return f"You predicted of {question}: **{said}**. Seen: **{seen}**, {ends}."


def way(low: float, high: float) -> str:
    """One of `WAYS`: what an interval of a change allows one to say, where "stays" is "not clear of zero"."""
    return WAYS[1 + int(low > 0) - int(high < 0)]


def same(one: Any, other: Any, *, within: float = 1e-6) -> bool:
    """Whether two answers are equal: numbers in any container up to `within` (relative), else as they are."""
    try:
        one, other = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    except (TypeError, ValueError):
        return bool(np.all(one == other))
    return one.shape == other.shape and np.allclose(one, other, rtol=within, atol=1e-9, equal_nan=True)


def check(
    answer: Any,
    right: Any,
    mistakes: Mapping[str, Any],
    *,
    so: str,
    foretold: tuple[str, str] | None = None,
    within: float = 1e-6,
) -> Markdown:
    """Accept the right answer, or say which mistake makes the given one.

    Args:
        answer: the student's.
        right: what it should be; as `same` compares.
        mistakes: message to the answer that this mistake gives. Where a mistake happens to give the right
            answer, nothing is wrong.
        so: what follows from a right answer.
        foretold: question and outcome of the prediction that belongs to it, as `predicted` takes them.
        within: relative tolerance.

    Raises:
        Rejected: with the message of the mistake.
    """
    made = {text: same(answer, wrong, within=within) for text, wrong in mistakes.items()}
    return judge(answer, same(answer, right, within=within), made, so=so, foretold=foretold)


def judge(
    answer: Any,
    right: bool,
    mistakes: Mapping[str, bool],
    *,
    so: str,
    foretold: tuple[str, str] | None = None,
) -> Markdown:
    """As `check`, of an answer with a property: `mistakes` holds message to whether it was made."""
    if any(part is ... for part in (answer if isinstance(answer, tuple | list) else [answer])):
        raise Rejected("This exercise waits for your answer: put it in place of the three dots.")
    if not right:
        raise Rejected(next((text for text, made in mistakes.items() if made), _UNKNOWN))
    return say(f"**Right.** {so} {predicted(*foretold) if foretold else ''}".rstrip())


def expectation(run: RunPaths) -> tuple[str | None, str]:
    """What the relation of a chain's first and last stage lets one expect of the first objectives.

    Where both label the same two answers, and agree more often or less often than a coin would (two-sided
    binomial test at 5 %), the first objectives should rise or fall. Labels of held-out pairs are not looked
    at.

    Returns:
        One of `WAYS`, None where nothing is expected, and the sentence that says so.
    """
    chain = Chain.parse(run.chain)
    if chain.parent is None:
        return None, "One stage: nothing comes after it, so nothing is expected."
    if chain.last.variants:
        told = f"The last stage changes its pairs or labels (`{'.'.join(chain.last.variants)}`)"
        return None, f"{told}: what plain labels say of it is not its relation, and nothing is expected."
    tables = {}
    for place, stage in (("first", chain.stages[0]), ("last", chain.last)):
        pairs = pd.concat([read_table(run.data(name)) for name in stage.objectives])
        tables[place] = pairs[pairs["split"] != "eval"]
    found, first = label_agreement(tables).iloc[0], " and ".join(chain.stages[0].objectives)
    if not found.shared:
        told = "The two stages label no two answers in common: their labels neither agree nor disagree"
        return "stays", f"{told}, so we expect that the margin of {first} **stays**."
    agreed = round(found.agree * found.shared)
    likely = stats.binomtest(agreed, int(found.shared)).pvalue <= 0.05
    word = WAYS[1 + int(np.sign(found.agree - 0.5)) * likely]
    told = f"Labels of the first and the last stage agree in {percent(found.agree)} of {found.shared} shared "
    why = {"falls": "less often than a coin would", "rises": "more often than a coin would"}
    why = why.get(word, "which a coin might do as well")
    return word, f"{told}pairs, {why}: we expect that the margin of {first} **{word}** in the later stages."


def expectation_met(expected: str | None, value: float, low: float, high: float) -> str:
    """The score of an `expectation`: beside the change of a margin after the objective's own stage."""
    change = with_interval(value, low, high)
    if expected is None:
        return f"Nothing was expected; the margin changed by {change}."
    seen = way(low, high)
    if seen == expected:
        word = "as expected, though “stays” only says that zero is not excluded"
        word = word if seen == "stays" else "as expected"
    else:
        word = "not decided: the interval covers zero" if seen == "stays" else "**not** as expected"
    return f"Expected from the labels: {expected}. Seen: {seen}, {change}; {word}."


def scratch(run: RunPaths, *changed: str) -> RunPaths:
    """A place beside the study where the last stage of a chain can be trained once more.

    Pairs, base sums, start and the adapters of earlier stages, of the same seed, are copied, so that nothing
    there can touch the study; what an earlier trial of this stage left is deleted.

    Args:
        run: the chain.
        changed: names of the parameters that the trial is to change. All other ones must be those of the
            earlier stages, as everywhere.

    Raises:
        StudyError: when notebook 01 or an earlier stage has not been run.
    """
    trial, before = replace(run, root=run.root / "scratch"), run.lineage[:-1]
    read_json(run.preparation)
    manifests = [read_json(node.manifest) for node in before]
    shutil.rmtree(trial.node, ignore_errors=True)
    for source in (
        run.folder / "data",
        run.base_scores.parent,
        run.start,
        *(node.adapter for node in before),
    ):
        target = trial.root / source.relative_to(run.root)
        shutil.rmtree(target, ignore_errors=True)
        if source.exists():  # the start is made where it is missing
            shutil.copytree(source, target)
    for node, manifest in zip(trial.lineage, manifests, strict=False):
        write_json(node.manifest, manifest | {"varied": sorted({*manifest["varied"], *changed})})
    return trial


def copies(root: Path) -> Path:
    """Write every notebook to `runs/classroom_copies`: for students with stubs and no solutions, for teachers
    with both.

    A copy in which somebody has worked is kept beside the new one, as `<name>.before-1.ipynb` and so on.
    """
    folder = root / "runs" / "classroom_copies"
    for source in sorted((root / "notebooks").glob("*.ipynb")):
        content = json.loads(source.read_text(encoding="utf-8"))
        for kind, lacks in COPIES.items():
            cells = [cell for cell in content["cells"] if not lacks & set(cell["metadata"].get("tags", []))]
            text = json.dumps(content | {"cells": cells}, indent=1, ensure_ascii=False) + "\n"
            target = folder / kind / source.name
            if target.is_file() and target.read_text(encoding="utf-8") != text:
                number = len(list(target.parent.glob(f"{target.stem}.before-*")))
                target.rename(target.with_suffix(f".before-{number + 1}.ipynb"))
            write_whole(target, lambda file, text=text: file.write_text(text, encoding="utf-8"))
    return folder
