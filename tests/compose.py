"""Compose the embedded rows from hand-written parts: `python tests/compose.py` rewrites them.

In seqdpo_utils/embedded, `parts/*.yaml` holds texts that people can read and correct. This file decides, with
one seed, which of them become a response, in which order, what ratings follow from that, and which labels are
wrong on purpose, and writes `rows/`. DATACARD.md explains the choices.
"""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

EMBEDDED = Path(__file__).resolve().parents[1] / "seqdpo_utils" / "embedded"
SEED = 20260619
LABEL_NOISE = 0.06
"""Share of binary labels (HH, PKU) that are swapped."""
RATING_NOISE = 0.15
"""Chance that a rating (HelpSteer2, UltraFeedback) is one point off, up or down."""
MISSING_RATING = 0.02
"""Chance that an UltraFeedback rating is "N/A"."""

HELPSTEER2_KINDS = (
    ("core",), ("core", "detail"), ("core", "detail", "example"), ("padding", "core"),
    ("padding", "core", "detail"), ("core", "detail", "padding"), ("core", "hedge"), ("slip",),
    ("slip", "detail"), ("slip", "detail", "example"), ("padding", "slip", "detail"), ("slip", "hedge"),
)  # fmt: skip
PKU_KINDS = {  # (first, second): weight; helpfulness and safety agree in about two thirds of the rows
    ("safe_rich", "unsafe_thin"): 5, ("safe_rich", "unsafe_rich"): 4, ("safe_thin", "unsafe_rich"): 4,
    ("safe_thin", "unsafe_thin"): 2, ("safe_rich", "safe_thin"): 2, ("unsafe_rich", "unsafe_thin"): 1,
}  # fmt: skip
_HELP = {"safe_rich": 3.0, "unsafe_rich": 2.4, "safe_thin": 1.0, "unsafe_thin": 0.6}


def parts(name: str) -> list[dict[str, Any]]:
    """The hand-written items of one or more files `parts/<name>*.yaml`, in file order."""
    files = sorted((EMBEDDED / "parts").glob(f"{name}*.yaml"))
    return [item for file in files for item in yaml.safe_load(file.read_text(encoding="utf-8"))]


def hh_rows(rng: random.Random, objective: str) -> Iterator[dict[str, Any]]:
    """Transcripts; with the stated chance the better answer stands under `rejected`."""
    for item in parts(f"hh_{objective}"):
        turns = [*item["earlier"], item["prompt"]]
        talk = (
            "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(turns))
            + "\n\nAssistant: "
        )
        sides = [talk + item["better"], talk + item["worse"]]
        if rng.random() < LABEL_NOISE:
            sides.reverse()
        yield {"chosen": sides[0], "rejected": sides[1]}


def helpsteer2_rows(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Two responses a prompt with five ratings from 0 to 4 that follow from the parts used."""
    for item in parts("helpsteer2"):
        for kind in rng.sample(HELPSTEER2_KINDS, 2):
            response = " ".join(item[part] for part in kind)
            wrong, words = "slip" in kind, len(response.split())
            ratings = {
                "helpfulness": 2
                + ("detail" in kind)
                + ("example" in kind)
                - 2 * wrong
                - ("hedge" in kind and wrong),
                "correctness": 1 if wrong else 4,
                "coherence": 4 - ("padding" in kind),
                "complexity": (words > 24) + ("detail" in kind) + ("example" in kind),
                "verbosity": min(4, words // 12) + ("padding" in kind),
            }
            noisy = {name: _jitter(rng, value, 0, 4) for name, value in ratings.items()}
            yield {"prompt": item["prompt"], "response": response} | noisy


def _jitter(rng: random.Random, value: int, low: int, high: int) -> int:
    if rng.random() < RATING_NOISE:
        value += rng.choice((-1, 1))
    return max(low, min(high, value))


def pku_rows(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Two responses a prompt: a weak, noisy helpfulness label and a strong safety label."""
    kinds, weights = list(PKU_KINDS), list(PKU_KINDS.values())
    for item in parts("pku"):
        pair = list(rng.choices(kinds, weights)[0])
        rng.shuffle(pair)
        helpfulness = [_HELP[kind] + rng.gauss(0, 0.8) for kind in pair]
        better = int(helpfulness[1] > helpfulness[0])
        safe = [kind.startswith("safe") for kind in pair]
        safer = int(safe[1]) if safe[0] != safe[1] else better
        if rng.random() < LABEL_NOISE:
            safer = 1 - safer
        yield {
            "prompt": item["prompt"],
            "response_0": item[pair[0]],
            "response_1": item[pair[1]],
            "is_response_0_safe": safe[0],
            "is_response_1_safe": safe[1],
            "better_response_id": better,
            "safer_response_id": safer,
            "category": item["category"],
        }


def ultrafeedback_rows(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Four completions an instruction, rated from 1 to 5 on four aspects; a rating may be missing."""
    for item in parts("ultrafeedback"):
        kinds = ["true_fit", "true_loose", "false_fit", "false_loose"]
        rng.shuffle(kinds)
        yield {
            "instruction": item["instruction"],
            "completions": [_completion(rng, item, kind) for kind in kinds],
        }


def _completion(rng: random.Random, item: dict[str, Any], kind: str) -> dict[str, Any]:
    unsure = rng.random() < 0.25
    true, fits = kind.startswith("true"), kind.endswith("_fit")
    ratings = {
        # a false statement costs a point of the other aspects too: annotators do not keep them apart
        "instruction_following": (5 if fits else 2) - (not true),
        "truthfulness": (5 if true else 2) - (not fits and not true),
        "honesty": (4 if true else 2) + unsure,
        "helpfulness": 1 + 2 * true + 2 * fits - unsure,
    }
    annotations = {aspect: {"Rating": _noted(rng, value)} for aspect, value in ratings.items()}
    return {
        "response": item[kind] + (" " + item["unsure_clause"] if unsure else ""),
        "annotations": annotations,
    }


def _noted(rng: random.Random, value: int) -> str:
    return "N/A" if rng.random() < MISSING_RATING else str(_jitter(rng, value, 1, 5))


def all_rows() -> dict[str, list[dict[str, Any]]]:
    """Every shipped file, by its path under `rows/`; each has a generator of its own."""
    return {
        "hh_rlhf/helpful-base/rows.jsonl": list(hh_rows(random.Random(f"{SEED}-helpful"), "helpful")),
        "hh_rlhf/harmless-base/rows.jsonl": list(hh_rows(random.Random(f"{SEED}-harmless"), "harmless")),
        "helpsteer2/rows.jsonl": list(helpsteer2_rows(random.Random(f"{SEED}-helpsteer2"))),
        "pku_saferlhf/rows.jsonl": list(pku_rows(random.Random(f"{SEED}-pku"))),
        "ultrafeedback/rows.jsonl": list(ultrafeedback_rows(random.Random(f"{SEED}-ultrafeedback"))),
    }


def main() -> None:
    """Rewrite `rows/` from `parts/`."""
    shutil.rmtree(EMBEDDED / "rows", ignore_errors=True)
    for name, rows in all_rows().items():
        file = EMBEDDED / "rows" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
