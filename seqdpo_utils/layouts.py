"""Five public layouts of preference data, one kind of pair.

`Layout.convert` turns rows as the hub has them into pairs for one objective and counts the rows that it
drops. A pair is a dictionary with `prompt` (a list of {"role", "content"}), `chosen`, `rejected`, and the
source's ratings of the two where it has them (`chosen_rating`, `rejected_rating`).
"""

import itertools
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seqdpo_utils.errors import StudyError

EMBEDDED = Path(__file__).parent / "embedded" / "rows"
_HH_FOLDERS = {"helpful": "helpful-base", "harmless": "harmless-base"}
_TURN = re.compile(r"\n\n(Human|Assistant):")

Row = dict[str, Any]
Pair = dict[str, Any]
Turns = list[dict[str, str]]


class Unusable(Exception):
    """A row gives no pair; the message is the reason under which it is counted."""


@dataclass(frozen=True)
class Layout:
    """All that the study knows about one data set's form.

    Args:
        name: what a setting calls it.
        objectives: those that it carries labels for.
        pair_of: a row (or a group of rows) and an objective to a pair, the higher rated answer as chosen;
            raises `Unusable`. A column that it does not find is reported by `convert`.
        grouped: rows to the groups that `pair_of` gets, where one pair takes several rows.
        folders: objective to the folder with its rows, where each objective has rows of its own.
        lower_is_better: objectives of which the lower rating is preferred.
    """

    name: str
    objectives: tuple[str, ...]
    pair_of: Callable[[Any, str], Pair]
    grouped: Callable[[Iterable[Row]], Iterable[Any]] = iter
    folders: dict[str, str] = field(default_factory=dict)
    lower_is_better: frozenset[str] = frozenset()

    def convert(self, rows: Iterable[Row], objective: str) -> tuple[list[Pair], Counter]:
        """Pairs of one objective, and how many rows (or groups of rows) were dropped, by reason.

        Raises:
            StudyError: when the rows lack a column, naming it.
        """
        pairs, dropped = [], Counter()
        for row in self.grouped(rows):
            try:
                pair = _trimmed(self.pair_of(row, objective))
                pairs.append(_turned(pair) if objective in self.lower_is_better else pair)
            except Unusable as reason:
                dropped[str(reason)] += 1
            except KeyError as key:
                found = ", ".join(row if isinstance(row, dict) else row[0])
                raise StudyError(f"layout {self.name} needs a column {key}; the rows have {found}.") from key
        return pairs, dropped


def _trimmed(pair: Pair) -> Pair:
    sides = {side: (pair[side] or "").strip() for side in ("chosen", "rejected")}
    if not all(sides.values()) or not pair["prompt"][-1]["content"]:
        raise Unusable("empty prompt or response")
    if sides["chosen"] == sides["rejected"]:
        raise Unusable("both responses are the same")
    return pair | sides


def _turned(pair: Pair) -> Pair:
    other = {"chosen": "rejected", "rejected": "chosen"}
    return {re.sub("^(chosen|rejected)", lambda side: other[side[0]], name): pair[name] for name in pair}


def label_noise(layout: str, *, source: str) -> dict[str, dict[str, str]]:
    """Which labels of the embedded rows are not what their answers were written for (`DATACARD.md`).

    Returns:
        Objective to prompt id to "wrong" (without noise the other answer would be the chosen one) or
        "undecided" (both would rate alike). An objective of which nothing is known is missing, and so are all
        of any other source.
    """
    if source != "embedded":
        return {}
    known = json.loads((EMBEDDED.parent / "noise.json").read_text(encoding="utf-8"))[layout]
    return {name: {i: kind for kind, ids in kinds.items() for i in ids} for name, kinds in known.items()}


def load_rows(
    root: Path,
    source: str,
    *,
    layout: str,
    objective: str,
    subset: str | None = None,
    revision: str | None = None,
) -> list[Row]:
    """Read the rows with labels for `objective`, all splits of the source: the study divides prompts itself.

    A hub id and a local folder go the same way through `datasets.load_dataset`, so a clone of a hub data set
    reads as the hub does.

    Args:
        root: the project's folder.
        source: "embedded", a hub id, or a local file or folder (json, jsonl, parquet, also gzipped; relative
            to the project).
        layout: one of `LAYOUTS`.
        objective: picks the folder where the layout has `folders`; elsewhere all objectives share the rows.
        subset: a folder inside the source; None takes the source's own default.
        revision: commit, tag or branch of the hub data set.

    Raises:
        StudyError: when the place holds no readable rows, with the remedy.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    what = f"source {source!r} (layout {layout}, objective {objective})"
    place = EMBEDDED / layout if source == "embedded" else root / source
    inside = "/".join(part for part in (subset, LAYOUTS[layout].folders.get(objective)) if part)
    if inside and place.is_file() and place.parent.name != Path(inside).name:
        raise StudyError(
            f"{what} is one file; its rows are to lie in a folder {inside}: give the one above it."
        )
    if place.is_file():
        where, options = _builder(place), {"data_files": str(place)}
    else:
        where = str(place) if place.is_dir() else source
        options = {"data_dir": inside or None, "revision": revision}
    try:
        # a clone's README may state the sizes of the whole data set; a part of it is welcome: no checks
        splits = load_dataset(where, verification_mode="no_checks", **options)
        rows = [row for split in splits.values() for row in split.to_list()]
    except (OSError, ValueError, RuntimeError, EOFError, StopIteration, DatasetsError) as error:
        raise StudyError(f"{what} could not be read: {_why_unreadable(error, source)}") from error
    if not rows:
        raise StudyError(f"{what} has no rows.")
    return rows


def _builder(file: Path) -> str:
    name = file.name.removesuffix(".gz")
    if not name.endswith((".json", ".jsonl", ".parquet")):
        raise StudyError(f"{file} is not a .json, .jsonl or .parquet file (also .gz).")
    return "parquet" if name.endswith(".parquet") else "json"


def _why_unreadable(error: Exception, source: str) -> str:
    if isinstance(error, StopIteration):  # what `datasets` raises for files without a row
        return "its files hold no rows."
    said = " ".join(str(error.__cause__ or error).split()).rstrip(".")
    if "gated" in str(error):
        return f"{said}. Ask for access on the page of {source}, then set HF_TOKEN or run `hf auth login`."
    if "Revision" in str(error):
        return f"{said}. Give `revision` a commit, tag or branch of that data set, or null for the newest."
    return f"{said}. Give a local file or folder in that layout, a hub id that can be reached, or 'embedded'."


def parse_transcript(text: str) -> Turns:
    """Split an HH transcript into messages that alternate between user and assistant.

    Turns open with a blank line and "Human:" or "Assistant:"; the words after it belong to the turn.

    Raises:
        Unusable: when the turns do not alternate, or the last one is not the assistant's.
    """
    before, *pieces = _TURN.split(text)
    names, words = pieces[::2], pieces[1::2]
    if before.strip() or not names or names != ["Human", "Assistant"] * (len(names) // 2):
        raise Unusable("not a transcript of alternating turns")
    roles = itertools.cycle(["user", "assistant"])
    return [{"role": role, "content": turn.strip()} for role, turn in zip(roles, words, strict=False)]


def hh_pair(row: Row, objective: str) -> Pair:
    """Anthropic/hh-rlhf: the last assistant turns of two transcripts with a common beginning.

    The folder that the row came from is the objective. Source: Bai et al. 2022, arXiv 2204.05862.
    """
    chosen, rejected = (parse_transcript(row[side] or "") for side in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("transcripts differ before the last turn")
    return {"prompt": chosen[:-1], "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}


def consecutive_answers(rows: Iterable[Row]) -> Iterable[list[Row]]:
    """Rows of HelpSteer2 by twos with one prompt; a row without a partner comes alone."""
    for _, rest in itertools.groupby(rows, key=lambda row: row.get("prompt")):
        while group := list(itertools.islice(rest, 2)):
            yield group


def helpsteer2_pair(rows: list[Row], objective: str) -> Pair:
    """nvidia/HelpSteer2: two consecutive rows of one prompt, the higher rated response chosen.

    Lists of scores (the `disagreements` layout) are averaged. `<extra_id_1>` separates the turns of a prompt.
    Source: Wang et al. 2024, arXiv 2406.08673.
    """
    prompt = extra_id_turns(rows[0]["prompt"] or "")
    answers = [(_rating(row[objective]), row["response"]) for row in rows]
    if len(answers) == 1:
        raise Unusable("response without a partner")
    return _rated(prompt, *answers)


def extra_id_turns(prompt: str) -> Turns:
    """Split a HelpSteer2 prompt at its `<extra_id_1>User` / `<extra_id_1>Assistant` marks into messages."""
    first, *rest = re.split(r"<extra_id_1>(?=User|Assistant)", prompt)
    turns = _question(first)
    for piece in rest:
        name, _, words = piece.partition("\n")
        turns.append({"role": "user" if name.strip() == "User" else "assistant", "content": words.strip()})
    return turns


def pku_pair(row: Row, objective: str) -> Pair:
    """PKU-Alignment/PKU-SafeRLHF: `better_response_id` for helpful, `safer_response_id` for safe.

    Source: Ji et al. 2024, arXiv 2406.15513.
    """
    label = row["better_response_id" if objective == "helpful" else "safer_response_id"]
    first, second = row["response_0"], row["response_1"]
    if label not in (0, 1):
        raise Unusable("label is neither 0 nor 1")
    chosen, rejected = (second, first) if label else (first, second)
    return {"prompt": _question(row["prompt"]), "chosen": chosen, "rejected": rejected}


def ultrafeedback_pair(row: Row, objective: str) -> Pair:
    """openbmb/UltraFeedback: the best and the worst of the completions on one aspect.

    Ratings are strings; "N/A" is missing, never a number. Among equals the first in the row is taken.
    Source: Cui et al. 2023, arXiv 2310.01377.
    """
    prompt, completions = _question(row["instruction"]), row["completions"] or []
    aspects = [(answer["annotations"] or {}).get(objective) or {} for answer in completions]
    ratings = [_rating(aspect.get("Rating")) for aspect in aspects]
    usable = [(r, c["response"]) for r, c in zip(ratings, completions, strict=True) if r is not None]
    if len(usable) < 2:
        raise Unusable("fewer than two usable ratings")
    best, worst = (pick(usable, key=lambda answer: answer[0]) for pick in (max, min))
    return _rated(prompt, best, worst)


def ultrafeedback_binarized_pair(row: Row, objective: str) -> Pair:
    """UltraFeedback in its binarized form: two message lists that differ in their last turn, one score each.

    The lists say which answer was preferred; the scores are kept as ratings, and a pair whose scores are
    equal or the other way round is dropped. The only objective is "overall": a setting needs two, so these
    rows can be read and converted, but are no setting of their own. Source: Tunstall et al. 2023, arXiv
    2310.16944.
    """
    chosen, rejected = (_messages(row[side] or []) for side in ("chosen", "rejected"))
    scores = [_rating(row["score_chosen"]), _rating(row["score_rejected"])]
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("messages differ before the last turn")
    if None not in scores and scores[0] < scores[1]:
        raise Unusable("scores contradict the choice")
    return _rated(chosen[:-1], (scores[0], chosen[-1]["content"]), (scores[1], rejected[-1]["content"]))


def _messages(turns: Turns) -> Turns:
    if [turn["role"] for turn in turns[-2:]] != ["user", "assistant"]:
        raise Unusable("messages do not end with a user's turn and its answer")
    return [{"role": turn["role"], "content": (turn["content"] or "").strip()} for turn in turns]


def _question(text: str | None) -> Turns:
    return [{"role": "user", "content": (text or "").strip()}]


def _rating(value: Any) -> float | None:
    if isinstance(value, list):
        usable = [score for score in map(_rating, value) if score is not None]
        return statistics.fmean(usable) if usable else None
    try:
        return float(value) if math.isfinite(float(value)) else None
    except (TypeError, ValueError):
        return None


def _rated(prompt: Turns, *answers: tuple[float | None, str]) -> Pair:
    """A pair from two (rating, response), the higher rated one chosen."""
    if any(rating is None for rating, _ in answers):
        raise Unusable("rating is missing")
    (low, rejected), (high, chosen) = sorted(answers, key=lambda answer: answer[0])
    if low == high:
        raise Unusable("tie on the objective")
    pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return pair | {"chosen_rating": high, "rejected_rating": low}


_HELPSTEER2 = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
_ULTRAFEEDBACK = ("instruction_following", "truthfulness", "honesty", "helpfulness")
_LOWER = frozenset({"verbosity"})
_ALL = [
    Layout("hh_rlhf", tuple(_HH_FOLDERS), hh_pair, folders=_HH_FOLDERS),
    Layout("helpsteer2", _HELPSTEER2, helpsteer2_pair, grouped=consecutive_answers, lower_is_better=_LOWER),
    Layout("pku_saferlhf", ("helpful", "safe"), pku_pair),
    Layout("ultrafeedback", _ULTRAFEEDBACK, ultrafeedback_pair),
    Layout("ultrafeedback_binarized", ("overall",), ultrafeedback_binarized_pair),
]
LAYOUTS = {layout.name: layout for layout in _ALL}
"""Every layout by its name."""
