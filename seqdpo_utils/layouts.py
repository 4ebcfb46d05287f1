"""Four public layouts of preference data and the common one of a user's own, one kind of pair.

`Layout.convert` turns rows as the hub has them into pairs for one objective and counts the rows that it
drops. A pair is a dictionary with `prompt` (a list of {"role", "content"}), `chosen`, `rejected`, and the
source's ratings of the two where it has them (`chosen_rating`, `rejected_rating`).
"""

import gzip
import itertools
import json
import math
import re
import reprlib
import statistics
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seqdpo_utils.errors import StudyError

EMBEDDED = Path(__file__).parent / "embedded" / "rows"
_HH_FOLDERS = {"helpful": "helpful-base", "harmless": "harmless-base"}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SCORES = ("score_chosen", "score_rejected")

Row = dict[str, Any]
Pair = dict[str, Any]
Turns = list[dict[str, str]]
Answers = tuple[Turns, list[str], list[dict[str, float | None]]]
"""A prompt, the answers to it, and of each answer its ratings by aspect."""


class Unusable(Exception):
    """A row gives no pair; the message is the reason under which it is counted."""


@dataclass(frozen=True)
class Layout:
    """All that the study knows about one data set's form.

    Args:
        name: what a setting calls it.
        objectives: those that it carries labels for; none where each objective has a source of its own, and
            any name.
        pair_of: a row (or a group of rows) and an objective to a pair, the higher rated answer as chosen;
            raises `Unusable`. A column that it does not find is reported by `convert`.
        grouped: rows to the groups that `pair_of` gets, where one pair takes several rows.
        folders: objective to the folder with its rows, where each objective has rows of its own.
        lower_is_better: objectives of which the lower rating is preferred.
        answers_of: a row (or group) to all its rated answers; None where a row only says which is better.
        fault: what is wrong with the form of a row, column and expectation named, or None.
    """

    name: str
    objectives: tuple[str, ...]
    pair_of: Callable[[Any, str], Pair]
    grouped: Callable[[Iterable[Row]], Iterable[Any]] = iter
    folders: dict[str, str] = field(default_factory=dict)
    lower_is_better: frozenset[str] = frozenset()
    answers_of: Callable[[Any], Answers] | None = None
    fault: Callable[[Row], str | None] = lambda row: None

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

    def rated_answers(self, rows: Iterable[Row]) -> list[Answers]:
        """All rated answers of every row, a higher rating better on every objective; "N/A" is None.

        Raises:
            StudyError: when the rows of this layout carry no ratings, or lack a column.
        """
        if self.answers_of is None:
            rated = ", ".join(layout.name for layout in LAYOUTS.values() if layout.answers_of)
            raise StudyError(f"layout {self.name} has no ratings of answers; {rated} have.")
        try:
            found = [self.answers_of(row) for row in self.grouped(rows)]
        except KeyError as key:
            raise StudyError(f"layout {self.name} needs a column {key} for rated answers.") from key
        return [(prompt, texts, list(map(self._higher_better, ratings))) for prompt, texts, ratings in found]

    def _higher_better(self, ratings: dict[str, float | None]) -> dict[str, float | None]:
        turned = {name for name in self.lower_is_better if ratings.get(name) is not None}
        return ratings | {name: -ratings[name] for name in turned}


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


def label_noise(layout: str, *, source: str | dict[str, Any]) -> dict[str, dict[str, str]]:
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
    source: str | dict[str, Any],
    *,
    layout: str,
    objective: str,
    subset: str | None = None,
    revision: str | None = None,
    split: str | None = None,
) -> list[Row]:
    """Read the rows with labels for `objective`, all splits of the source: the study divides prompts itself.

    A hub id and a local folder go the same way through `datasets.load_dataset`, so a clone of a hub data set
    reads as the hub does.

    Args:
        root: the project's folder.
        source: "embedded", a hub id, or a local file or folder (json, jsonl, csv, also gzipped, or parquet;
            relative to the project); or by objective such a `source` with its `subset`, `revision`, `split`.
        layout: one of `LAYOUTS`.
        objective: picks the folder where the layout has `folders`; elsewhere all objectives share the rows.
        subset: a folder inside the source; None takes the source's own default.
        revision: commit, tag or branch of the hub data set.
        split: None reads all; "train", or a part such as "train[:1000]".

    Raises:
        StudyError: when the place holds no readable rows, with the remedy, or a row of another form.
    """
    if isinstance(source, dict):
        return load_rows(root, layout=layout, objective=objective, **source[objective])
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
        where, options = _builder(place)
    else:
        where = str(place) if place.is_dir() else source
        options = {"data_dir": inside or None, "revision": revision}
    try:
        if place.is_file() and where == "json":
            _check_json(place)
        # a clone's README may state the sizes of the whole data set; a part of it is welcome: no checks
        found = load_dataset(where, verification_mode="no_checks", split=split, **options)
        rows = {name: part.to_list() for name, part in ({split: found} if split else found).items()}
    except (OSError, ValueError, RuntimeError, EOFError, StopIteration, DatasetsError, zlib.error) as error:
        raise StudyError(f"{what} could not be read: {_why_unreadable(error, source)}") from error
    if not any(rows.values()):
        raise StudyError(f"{what} has no rows.")
    for name, part in rows.items():
        for number, row in enumerate(part, 1):
            if fault := LAYOUTS[layout].fault(row):
                of_split = f" of split {name!r}" if len(rows) > 1 else ""
                raise StudyError(f"{what}, row {number}{of_split}: {fault}.")
    return [row for part in rows.values() for row in part]


def _check_json(file: Path) -> None:
    """Refuse by its line what is no object: Arrow counts in blocks of its own, and dies of a null."""
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as text:
        content = text.read()
    pieces = [content] if content.lstrip().startswith("[") else content.split("\n")
    for number, piece in enumerate(pieces, 1):
        try:
            found = json.loads(piece) if piece.strip() else []
        except json.JSONDecodeError as error:
            place = f"line {number + error.lineno - 1}, character {error.colno}"
            raise ValueError(f"{place}: {error.msg}") from None
        for value in found if isinstance(found, list) else [found]:
            if not isinstance(value, dict):
                raise ValueError(f"line {number}: expected an object {{...}}, got {reprlib.repr(value)}")


def _builder(file: Path) -> tuple[str, dict[str, Any]]:
    """What reads a file, and how; in a csv file an empty cell is missing, and "None" or "NA" are words."""
    kind = Path(file.name.removesuffix(".gz")).suffix.replace("jsonl", "json")
    if kind not in (".json", ".csv", ".parquet") or file.name.endswith(".parquet.gz"):
        raise StudyError(f"{file} is not a .json, .jsonl, .csv (also .gz) or .parquet file.")
    words = {"keep_default_na": False, "na_values": [""]} if kind == ".csv" else {}
    return kind.removeprefix("."), {"data_files": str(file)} | words


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
    prompt, responses, ratings = ultrafeedback_answers(row)
    rated = zip((each[objective] for each in ratings), responses, strict=True)
    usable = [answer for answer in rated if answer[0] is not None]
    if len(usable) < 2:
        raise Unusable("fewer than two usable ratings")
    best, worst = (pick(usable, key=lambda answer: answer[0]) for pick in (max, min))
    return _rated(prompt, best, worst)


def preferences_pair(row: Row, objective: str) -> Pair:
    """TRL's standard preference format: `chosen` and `rejected` as texts or messages, `prompt` or none.

    Without `prompt` it is what comes before the last message; a plain text is divided only where it is a
    transcript of "Human:" and "Assistant:" turns. Answers that repeat the prompt are taken without it. Where
    `score_chosen` and `score_rejected` are given they are kept as ratings.
    """
    row = _chosen_and_rejected(row)
    if not (row["chosen"] and row["rejected"]):
        raise Unusable("empty prompt or response")
    asked, talks = _messages(row.get("prompt"), "user"), []
    for answer in (row["chosen"], row["rejected"]):
        whole = isinstance(answer, str) and not asked
        turns = parse_transcript(answer) if whole else _messages(answer, "assistant")
        talks.append(turns if turns[: len(asked)] == asked else asked + turns)
    chosen, rejected = talks
    for turns in talks:
        roles = [turn["role"] for turn in turns]
        roles = roles[roles[:1] == ["system"] :]
        if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
            raise Unusable("messages do not alternate between user and assistant")
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("messages differ before the last turn")
    if not all(turn["content"] for turn in chosen):
        raise Unusable("empty prompt or response")
    answers = (chosen[-1]["content"], rejected[-1]["content"])
    scores = [_rating(row.get(name)) for name in _SCORES]
    if None in scores:
        return {"prompt": chosen[:-1], "chosen": answers[0], "rejected": answers[1]}
    if scores[0] < scores[1]:
        raise Unusable("scores contradict the choice")
    return _rated(chosen[:-1], *zip(scores, answers, strict=True))


def _chosen_and_rejected(row: Row) -> Row:
    """A row that names two responses and a label, as nvidia/HelpSteer3 (below zero the first is better) and
    PKU-Alignment/PKU-SafeRLHF-single-dimension do, in the standard format; any other row as it is."""
    if "overall_preference" in row:
        prompt, names, label = row["context"], ("response1", "response2"), _rating(row["overall_preference"])
    elif "better_response_id" in row and "safer_response_id" not in row:
        prompt, names = row["prompt"], ("response_0", "response_1")
        label = {0: -1, 1: 1}.get(_rating(row["better_response_id"]))
    else:
        return row
    if not label:
        raise Unusable("tie on the objective" if label == 0 else "rating is missing")
    rejected, chosen = (row[name] for name in (names if label > 0 else reversed(names)))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def preferences_fault(row: Row) -> str | None:
    """What keeps a row from being one of the standard preference format, whatever its texts say."""
    try:
        row = _chosen_and_rejected(row)
        texts = {"prompt": row.get("prompt"), "chosen": row["chosen"], "rejected": row["rejected"]}
    except Unusable:
        return None
    except KeyError as key:
        return f"no column {key}, where prompt, chosen and rejected are expected; it has {', '.join(row)}"
    for name, value in texts.items():
        if not (value is None or isinstance(value, str) or _are_messages(value)):
            wanted = 'text, or a list of messages {"role": ..., "content": ...} with texts in them'
            return f"column {name!r}: expected {wanted}, got {reprlib.repr(value)}"
    for name in _SCORES:
        if not isinstance(row.get(name), int | float | None):
            return f"column {name!r}: expected a number or null, got {reprlib.repr(row[name])}"
    if "prompt" not in row and isinstance(row["chosen"], str) and not _TURN.match(row["chosen"]):
        why = "where the prompt ends cannot be told from texts that begin alike"
        return f"no column 'prompt', and 'chosen' is plain text: {why}. Give a column 'prompt', or messages"
    return None


def _are_messages(value: Any) -> bool:
    """Whether a value is a list of {"role": text, "content": text or null}."""
    turns = value if isinstance(value, list) else [None]
    named = [turn for turn in turns if isinstance(turn, dict) and isinstance(turn.get("role"), str)]
    texts = (isinstance(turn.get("content", 0), str | None) for turn in named)
    return len(named) == len(turns) and all(texts)


def ultrafeedback_answers(row: Row) -> Answers:
    """openbmb/UltraFeedback: every completion with its ratings on all aspects."""
    completions, ratings = row["completions"] or [], []
    for answer in completions:
        aspects = answer["annotations"] or {}
        ratings.append({name: _rating((aspects.get(name) or {}).get("Rating")) for name in _ULTRAFEEDBACK})
    return _question(row["instruction"]), [answer["response"] for answer in completions], ratings


def helpsteer2_answers(rows: list[Row]) -> Answers:
    """nvidia/HelpSteer2: the responses to one prompt with their ratings on all five attributes."""
    ratings = [{name: _rating(row.get(name)) for name in _HELPSTEER2} for row in rows]
    return extra_id_turns(rows[0]["prompt"] or ""), [row["response"] for row in rows], ratings


def _messages(value: str | Turns | None, role: str) -> Turns:
    turns = [{"role": role, "content": value}] if isinstance(value, str) else value or []
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
    Layout(
        "helpsteer2",
        _HELPSTEER2,
        helpsteer2_pair,
        grouped=consecutive_answers,
        lower_is_better=_LOWER,
        answers_of=helpsteer2_answers,
    ),
    Layout("pku_saferlhf", ("helpful", "safe"), pku_pair),
    Layout("ultrafeedback", _ULTRAFEEDBACK, ultrafeedback_pair, answers_of=ultrafeedback_answers),
    Layout("preferences", (), preferences_pair, fault=preferences_fault),
]
LAYOUTS = {layout.name: layout for layout in _ALL}
"""Every layout by its name."""
