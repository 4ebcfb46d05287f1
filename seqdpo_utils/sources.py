"""Four public preference data sets in their layouts, one kind of pair.

Each `*_pairs` function turns rows in a hub layout into pairs for one objective and counts every row that it drops,
by reason. A pair is a dictionary with `prompt` (a list of {"role", "content"}), `chosen`, `rejected`, and the
source's ratings of the two where it has them (`chosen_rating`, `rejected_rating`).
"""

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from seqdpo_utils.paths import StudyError

EMBEDDED = Path(__file__).parent / "embedded" / "rows"
HH_FOLDERS = {"helpful": "helpful-base", "harmless": "harmless-base"}
LOWER_IS_BETTER = {"verbosity"}
_TURN = re.compile(r"\n\n(Human|Assistant):")

Pair = dict[str, Any]
Rows = Iterable[dict[str, Any]]


def load_rows(root: Path, source: str, *, layout: str, objective: str, subset: str | None = None, revision: str | None = None) -> list[dict[str, Any]]:
    """Read the rows that carry labels for `objective`, all splits of the source one after another: the study divides prompts itself.

    A hub id and a local folder go the same way through `datasets.load_dataset`, so a clone of a hub data set reads as the hub does.

    Args:
        root: the project's folder.
        source: "embedded", a local file or folder (json, jsonl, parquet, also gzipped; relative to the project), or a hub id.
        layout: one of `CONVERTERS`.
        objective: for HH-RLHF it picks the folder, elsewhere all objectives share the rows.
        subset: a folder inside the source; None takes the source's own default.
        revision: commit, tag or branch of the hub data set.

    Raises:
        StudyError: when the place holds no readable rows, with the remedy.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    place = EMBEDDED / layout if source == "embedded" else root / source
    inside = "/".join(part for part in (subset, HH_FOLDERS[objective] if layout == "hh_rlhf" else None) if part)
    if inside and place.is_file() and place.parent.name != Path(inside).name:
        raise StudyError(f"source {source!r} is one file, but the rows of {objective!r} are to lie in a folder {inside}: give the folder above it.")
    try:
        # a README that came with a clone may state sizes of the whole data set: a part of it is welcome, so sizes are not checked
        if place.is_file():
            splits = load_dataset(_builder(place), data_files=str(place), verification_mode="no_checks")
        else:
            where = str(place) if place.is_dir() else source
            splits = load_dataset(where, data_dir=inside or None, revision=revision, verification_mode="no_checks")
        rows = [row for split in splits.values() for row in split.to_list()]
    except (OSError, ValueError, RuntimeError, EOFError, StopIteration, DatasetsError) as error:
        raise StudyError(f"source {source!r} (layout {layout}, objective {objective}) could not be read: {_why_unreadable(error, source)}") from error
    if not rows:
        raise StudyError(f"source {source!r} (layout {layout}, objective {objective}) has no rows.")
    return rows


def _builder(file: Path) -> str:
    name = file.name.removesuffix(".gz")
    if not name.endswith((".json", ".jsonl", ".parquet")):
        raise StudyError(f"{file} is not a .json, .jsonl or .parquet file (also .gz).")
    return "parquet" if name.endswith(".parquet") else "json"


def _why_unreadable(error: Exception, source: str) -> str:
    if isinstance(error, StopIteration):  # what `datasets` raises for files without a row
        return "its files hold no rows."
    remedy = "Give a local file or folder in that layout, a hub id that this machine can reach, or 'embedded'."
    if "gated" in str(error):
        remedy = f"Ask for access on the page of {source}, then set HF_TOKEN or run `hf auth login`."
    elif "Revision" in str(error):
        remedy = "Give `revision` a commit, tag or branch of that data set, or null for the newest."
    return f"{' '.join(str(error.__cause__ or error).split()).rstrip('.')}. {remedy}"


def _require(row: dict[str, Any], columns: Iterable[str], layout: str) -> None:
    missing = [name for name in columns if name not in row]
    if missing:
        raise StudyError(f"layout {layout} needs a column {missing[0]!r}; the rows have {', '.join(sorted(row))}.")


def parse_transcript(text: str) -> list[dict[str, str]] | None:
    """Split an HH transcript into messages; None when it does not alternate human and assistant.

    Turns open with a blank line and "Human:" or "Assistant:"; the words after it belong to the turn.
    """
    pieces = _TURN.split(text)
    if len(pieces) < 3 or pieces[0].strip():
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[name], "content": words.strip()} for name, words in zip(pieces[1::2], pieces[2::2], strict=True)]
    alternates = all(turn["role"] == ("user", "assistant")[i % 2] for i, turn in enumerate(turns))
    return turns if alternates and turns[-1]["role"] == "assistant" else None


def hh_pairs(rows: Rows, objective: str) -> tuple[list[Pair], Counter]:
    """Pairs of Anthropic/hh-rlhf: the last assistant turns of two transcripts with a common beginning.

    The folder that the rows came from is the objective, so `objective` names it only in errors.
    Source: Bai et al. 2022, arXiv 2204.05862.
    """
    pairs, counts = [], Counter()
    for row in rows:
        _require(row, ("chosen", "rejected"), f"hh_rlhf ({objective})")
        chosen, rejected = (parse_transcript(row[side] or "") for side in ("chosen", "rejected"))
        if not chosen or not rejected:
            counts["not a transcript of alternating turns"] += 1
        elif chosen[:-1] != rejected[:-1]:
            counts["transcripts differ before the last turn"] += 1
        else:
            pair = {"prompt": chosen[:-1], "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}
            _keep(pair, pairs, counts)
    return pairs, counts


def helpsteer2_pairs(rows: Rows, objective: str) -> tuple[list[Pair], Counter]:
    """Pairs of nvidia/HelpSteer2: two consecutive rows of one prompt, the better rated response chosen.

    Lists of scores (the `disagreements` layout) are averaged. `<extra_id_1>` separates the turns of a longer prompt.
    Source: Wang et al. 2024, arXiv 2406.08673.
    """
    pairs, counts, waiting = [], Counter(), None
    for row in rows:
        _require(row, ("prompt", "response", objective), "helpsteer2")
        if waiting is None or waiting["prompt"] != row["prompt"]:
            counts["response without a partner"] += waiting is not None
            waiting = row
            continue
        ratings = [_rating(answer[objective]) for answer in (waiting, row)]
        responses, waiting = [waiting["response"], row["response"]], None
        _rank(extra_id_turns(row["prompt"] or ""), responses, ratings, objective, pairs, counts)
    counts["response without a partner"] += waiting is not None
    return pairs, +counts


def extra_id_turns(prompt: str) -> list[dict[str, str]]:
    """Split a HelpSteer2 prompt at its `<extra_id_1>User` / `<extra_id_1>Assistant` marks into messages."""
    first, *rest = re.split(r"<extra_id_1>(?=User|Assistant)", prompt)
    turns = [{"role": "user", "content": first.strip()}]
    for piece in rest:
        name, _, words = piece.partition("\n")
        turns.append({"role": "user" if name.strip() == "User" else "assistant", "content": words.strip()})
    return turns


def pku_pairs(rows: Rows, objective: str) -> tuple[list[Pair], Counter]:
    """Pairs of PKU-Alignment/PKU-SafeRLHF: `better_response_id` for helpful, `safer_response_id` for safe.

    Source: Ji et al. 2024, arXiv 2406.15513.
    """
    label = {"helpful": "better_response_id", "safe": "safer_response_id"}[objective]
    pairs, counts = [], Counter()
    for row in rows:
        _require(row, ("prompt", "response_0", "response_1", label), "pku_saferlhf")
        if row[label] not in (0, 1):
            counts["label is neither 0 nor 1"] += 1
            continue
        better, worse = (row["response_0"], row["response_1"])[:: 1 if row[label] == 0 else -1]
        prompt = [{"role": "user", "content": (row["prompt"] or "").strip()}]
        _keep({"prompt": prompt, "chosen": better, "rejected": worse}, pairs, counts)
    return pairs, counts


def ultrafeedback_pairs(rows: Rows, objective: str) -> tuple[list[Pair], Counter]:
    """Pairs of openbmb/UltraFeedback: the best and the worst of the completions on one aspect.

    Ratings are strings; "N/A" is missing, never a number. Among equals the first in the row is taken.
    Source: Cui et al. 2023, arXiv 2310.01377.
    """
    pairs, counts = [], Counter()
    for row in rows:
        _require(row, ("instruction", "completions"), "ultrafeedback")
        rated = [(_rating(((c["annotations"] or {}).get(objective) or {}).get("Rating")), c["response"]) for c in row["completions"] or []]
        usable = [(rating, response) for rating, response in rated if rating is not None]
        if len(usable) < 2:
            counts["fewer than two usable ratings"] += 1
            continue
        best = max(usable, key=lambda item: item[0])
        worst = min(usable, key=lambda item: item[0])
        prompt = [{"role": "user", "content": (row["instruction"] or "").strip()}]
        _rank(prompt, [best[1], worst[1]], [best[0], worst[0]], objective, pairs, counts)
    return pairs, counts


def ultrafeedback_binarized_pairs(rows: Rows, objective: str) -> tuple[list[Pair], Counter]:
    """Pairs of UltraFeedback in its binarized form: two message lists that differ in their last turn, each with one overall score.

    The lists say which answer was preferred; the scores are kept as ratings, and a pair whose scores are equal or the other way round is dropped.
    `objective` is "overall", the only one that this form has: a setting needs two, so these rows can be read and converted, but are no setting of their own.
    Source: Tunstall et al. 2023, arXiv 2310.16944.
    """
    pairs, counts = [], Counter()
    for row in rows:
        _require(row, ("chosen", "rejected", "score_chosen", "score_rejected"), f"ultrafeedback_binarized ({objective})")
        chosen, rejected = ([{"role": turn["role"], "content": (turn["content"] or "").strip()} for turn in row[side] or []] for side in ("chosen", "rejected"))
        ratings = [_rating(row[f"score_{side}"]) for side in ("chosen", "rejected")]
        if not _ends_with_answer(chosen) or not _ends_with_answer(rejected):
            counts["messages do not end with a user's turn and its answer"] += 1
        elif chosen[:-1] != rejected[:-1]:
            counts["messages differ before the last turn"] += 1
        elif None not in ratings and ratings[0] < ratings[1]:
            counts["scores contradict the choice"] += 1
        else:
            _rank(chosen[:-1], [chosen[-1]["content"], rejected[-1]["content"]], ratings, objective, pairs, counts)
    return pairs, counts


def _ends_with_answer(turns: list[dict[str, str]]) -> bool:
    return [turn["role"] for turn in turns[-2:]] == ["user", "assistant"]


def _rating(value: Any) -> float | None:
    if isinstance(value, list):
        usable = [score for score in map(_rating, value) if score is not None]
        return statistics.fmean(usable) if usable else None
    try:
        return float(value) if math.isfinite(float(value)) else None
    except (TypeError, ValueError):
        return None


def _rank(prompt: list[dict[str, str]], responses: list[str], ratings: list[float | None], objective: str, pairs: list[Pair], counts: Counter) -> None:
    if None in ratings:
        counts["rating is missing"] += 1
    elif ratings[0] == ratings[1]:
        counts["tie on the objective"] += 1
    else:
        first_wins = (ratings[0] > ratings[1]) != (objective in LOWER_IS_BETTER)
        best, worst = (0, 1) if first_wins else (1, 0)
        pair = {"prompt": prompt, "chosen": responses[best], "rejected": responses[worst]}
        _keep(pair | {"chosen_rating": ratings[best], "rejected_rating": ratings[worst]}, pairs, counts)


def _keep(pair: Pair, pairs: list[Pair], counts: Counter) -> None:
    """Append `pair` with trimmed texts unless a side is empty or both are the same."""
    pair["chosen"], pair["rejected"] = (pair["chosen"] or "").strip(), (pair["rejected"] or "").strip()
    if not pair["chosen"] or not pair["rejected"] or not pair["prompt"][-1]["content"]:
        counts["empty prompt or response"] += 1
    elif pair["chosen"] == pair["rejected"]:
        counts["both responses are the same"] += 1
    else:
        pairs.append(pair)


CONVERTERS: dict[str, Callable[[Rows, str], tuple[list[Pair], Counter]]] = {
    "hh_rlhf": hh_pairs,
    "helpsteer2": helpsteer2_pairs,
    "pku_saferlhf": pku_pairs,
    "ultrafeedback": ultrafeedback_pairs,
    "ultrafeedback_binarized": ultrafeedback_binarized_pairs,
}
