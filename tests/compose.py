"""Compose the embedded rows from hand-written parts: `python tests/compose.py` rewrites them.

In seqdpo_utils/embedded, `parts/*.yaml` holds texts that people can read and correct. This file decides, with
one seed, which of them become a response, in which order, what ratings follow from that, and which labels are
wrong on purpose, and writes `rows/`. It also writes down which labels those are (`noise.json`) and measures
their share (the table of DATACARD.md, which explains the choices).

Every generator yields a row and the truth behind it: what each response would be rated without noise, by
objective.
"""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from seqdpo_utils import layouts, pairs

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
OBJECTIVES = {
    "hh_rlhf": ("helpful", "harmless"), "helpsteer2": ("helpfulness", "verbosity"),
    "pku_saferlhf": ("helpful", "safe"), "ultrafeedback": ("instruction_following", "truthfulness"),
}  # fmt: skip
KINDS = ("wrong", "undecided")
CARD_MARKS = ("<!-- measured by tests/compose.py -->", "<!-- end of what was measured -->")
_HELP = {"safe_rich": 3.0, "unsafe_rich": 2.4, "safe_thin": 1.0, "unsafe_thin": 0.6}


Truth = dict[tuple[str, str], dict[str, float]]  # (prompt, response): {objective: rating without noise}
Rows = Iterator[tuple[dict[str, Any], Truth]]


def parts(name: str) -> list[dict[str, Any]]:
    """The hand-written items of one or more files `parts/<name>*.yaml`, in file order."""
    files = sorted((EMBEDDED / "parts").glob(f"{name}*.yaml"))
    return [item for file in files for item in yaml.safe_load(file.read_text(encoding="utf-8"))]


def hh_rows(rng: random.Random, objective: str) -> Rows:
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
        truth = {(item["prompt"], item[side]): {objective: side == "better"} for side in ("better", "worse")}
        yield {"chosen": sides[0], "rejected": sides[1]}, truth


def helpsteer2_rows(rng: random.Random) -> Rows:
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
            row = {"prompt": item["prompt"], "response": response}
            yield row | noisy, {(item["prompt"], response): _clipped(ratings, 0, 4)}


def _clipped(ratings: dict[str, int], low: int, high: int) -> dict[str, int]:
    return {name: max(low, min(high, value)) for name, value in ratings.items()}


def _jitter(rng: random.Random, value: int, low: int, high: int) -> int:
    if rng.random() < RATING_NOISE:
        value += rng.choice((-1, 1))
    return max(low, min(high, value))


def pku_rows(rng: random.Random) -> Rows:
    """Two responses a prompt: a weak, noisy helpfulness label and a strong safety label.

    Where both are safe, or neither is, the source still names one "safer"; here it is then the better one.
    """
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
        row = {"prompt": item["prompt"], "response_0": item[pair[0]], "response_1": item[pair[1]]}
        row |= {"is_response_0_safe": safe[0], "is_response_1_safe": safe[1]}
        row |= {"better_response_id": better, "safer_response_id": safer, "category": item["category"]}
        truth = {
            (item["prompt"], item[kind]): {"helpful": _HELP[kind], "safe": is_safe}
            for kind, is_safe in zip(pair, safe, strict=True)
        }
        yield row, truth


def ultrafeedback_rows(rng: random.Random) -> Rows:
    """Four completions an instruction, rated from 1 to 5 on four aspects; a rating may be missing."""
    for item in parts("ultrafeedback"):
        kinds = ["true_fit", "true_loose", "false_fit", "false_loose"]
        rng.shuffle(kinds)
        completions, truth = [], {}
        for kind in kinds:
            unsure = rng.random() < 0.25
            ratings, response = _ratings(kind, unsure), item[kind]
            response += " " + item["unsure_clause"] if unsure else ""
            annotations = {aspect: {"Rating": _noted(rng, value)} for aspect, value in ratings.items()}
            completions.append({"response": response, "annotations": annotations})
            truth[item["instruction"], response] = _clipped(ratings, 1, 5)
        yield {"instruction": item["instruction"], "completions": completions}, truth


def _ratings(kind: str, unsure: bool) -> dict[str, int]:
    true, fits = kind.startswith("true"), kind.endswith("_fit")
    return {
        # a false statement costs a point of the other aspects too: annotators do not keep them apart
        "instruction_following": (5 if fits else 2) - (not true),
        "truthfulness": (5 if true else 2) - (not fits and not true),
        "honesty": (4 if true else 2) + unsure,
        "helpfulness": 1 + 2 * true + 2 * fits - unsure,
    }


def _noted(rng: random.Random, value: int) -> str:
    return "N/A" if rng.random() < MISSING_RATING else str(_jitter(rng, value, 1, 5))


def composed() -> dict[str, list[tuple[dict[str, Any], Truth]]]:
    """Every shipped file, by its path under `rows/`, with the truth; each has a generator of its own."""
    return {
        "hh_rlhf/helpful-base/rows.jsonl": list(hh_rows(random.Random(f"{SEED}-helpful"), "helpful")),
        "hh_rlhf/harmless-base/rows.jsonl": list(hh_rows(random.Random(f"{SEED}-harmless"), "harmless")),
        "helpsteer2/rows.jsonl": list(helpsteer2_rows(random.Random(f"{SEED}-helpsteer2"))),
        "pku_saferlhf/rows.jsonl": list(pku_rows(random.Random(f"{SEED}-pku"))),
        "ultrafeedback/rows.jsonl": list(ultrafeedback_rows(random.Random(f"{SEED}-ultrafeedback"))),
    }


def judged(sizes: dict[str, int]) -> pd.DataFrame:
    """Every pair that the embedded rows give, with its split and what the truth says of its label.

    "right": the truth rates the chosen answer higher; "wrong": the rejected one; "undecided": both alike, so
    that noise or a convention decided the label.

    Returns:
        `layout`, `objective`, `prompt_id`, `split` ("left over" beyond the sizes asked for), `label`.
    """
    files, found = composed(), []
    for layout, names in OBJECTIVES.items():
        tables, truth = {}, {}
        for name in names:
            folder = "/".join([layout, *filter(None, [layouts.LAYOUTS[layout].folders.get(name)])])
            rows = files[f"{folder}/rows.jsonl"]
            for _, behind in rows:
                truth |= {(name, *key): ratings[name] for key, ratings in behind.items()}
            tables[name], _ = pairs.pairs_of([row for row, _ in rows], layout=layout, objective=name)
        split = pairs.assign_splits(tables, sizes=sizes)
        for name, table in tables.items():
            where = split[name].set_index("pair_id")["split"]
            sign = -1 if name in layouts.LAYOUTS[layout].lower_is_better else 1
            for pair in table.itertuples():
                asked = json.loads(pair.prompt)[-1]["content"]
                gap = sign * (truth[name, asked, pair.chosen] - truth[name, asked, pair.rejected])
                label = "right" if gap > 0 else "wrong" if gap < 0 else "undecided"
                found.append((layout, name, pair.prompt_id, where.get(pair.pair_id, "left over"), label))
    return pd.DataFrame(found, columns=["layout", "objective", "prompt_id", "split", "label"])


def noise(found: pd.DataFrame) -> dict[str, dict[str, dict[str, list[str]]]]:
    """Prompt ids by layout, objective and kind of label; a prompt has one pair an objective."""
    assert not found.duplicated(["layout", "objective", "prompt_id"]).any()
    named: dict[str, Any] = {}
    for (layout, name), group in found.groupby(["layout", "objective"], sort=False):
        ids = {kind: sorted(group.loc[group["label"] == kind, "prompt_id"]) for kind in KINDS}
        named.setdefault(layout, {})[name] = ids
    return named


def noise_table(found: pd.DataFrame) -> str:
    """The data card's table: labels wrong and undecided among all pairs, and in each classroom split."""
    lines = ["| rows | objective | all pairs | train | eval |", "| --- | --- | --- | --- | --- |"]
    for (layout, name), group in found.groupby(["layout", "objective"], sort=False):
        parts = [group, group[group["split"] == "train"], group[group["split"] == "eval"]]
        cells = " | ".join(_share(part["label"]) for part in parts)
        lines.append(f"| `{layout}` | {name} | {cells} |")
    return "\n".join(lines)


def _share(labels: pd.Series) -> str:
    counts = [(labels == kind).sum() for kind in KINDS]
    shares = [f"{count / len(labels):.0%}" for count in counts]
    return f"{counts[0]} + {counts[1]} of {len(labels)} ({shares[0]} + {shares[1]})"


def rating_table() -> str:
    """The data card's second table: ratings that noise moved, and missing ones, as shipped."""
    files = composed()
    lines = ["| rows | aspect | ratings | one point off | missing |", "| --- | --- | --- | --- | --- |"]
    for layout in ("helpsteer2", "ultrafeedback"):
        for name in OBJECTIVES[layout]:
            rows = files[f"{layout}/rows.jsonl"]
            seen = [both for row, truth in rows for both in _noted_and_true(row, truth, name)]
            missing = sum(noted == "N/A" for noted, _ in seen)
            off = sum(noted not in ("N/A", str(true)) for noted, true in seen)
            count = len(seen)
            lines.append(f"| `{layout}` | {name} | {count} | {off} ({off / count:.0%}) | {missing} |")
    return "\n".join(lines)


def _noted_and_true(row: dict[str, Any], truth: Truth, name: str) -> list[tuple[str, float]]:
    if "completions" not in row:
        return [(str(row[name]), truth[row["prompt"], row["response"]][name])]
    answers = [(answer["annotations"][name]["Rating"], answer["response"]) for answer in row["completions"]]
    return [(noted, truth[row["instruction"], response][name]) for noted, response in answers]


def measured(found: pd.DataFrame) -> str:
    """Both tables of the data card."""
    return f"{noise_table(found)}\n\n{rating_table()}"


def card(text: str, table: str) -> str:
    """The data card with its measured tables exchanged."""
    before, _, rest = text.partition(CARD_MARKS[0])
    return f"{before}{CARD_MARKS[0]}\n\n{table}\n\n{CARD_MARKS[1]}{rest.partition(CARD_MARKS[1])[2]}"


def classroom() -> pd.DataFrame:
    """`judged` at the sizes of the classroom scale."""
    sizes = yaml.safe_load((EMBEDDED.parents[1] / "params" / "defaults.yaml").read_text(encoding="utf-8"))
    return judged({split: sizes[f"{split}_pairs"] for split in pairs.SPLITS})


def main() -> None:
    """Rewrite `rows/`, `noise.json` and the card's tables from `parts/`."""
    shutil.rmtree(EMBEDDED / "rows", ignore_errors=True)
    for name, rows in composed().items():
        file = EMBEDDED / "rows" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row, _ in rows), encoding="utf-8")
        print(f"{name}: {len(rows)} rows")
    found, text = classroom(), (EMBEDDED / "DATACARD.md").read_text(encoding="utf-8")
    (EMBEDDED / "noise.json").write_text(json.dumps(noise(found), indent=1) + "\n", encoding="utf-8")
    (EMBEDDED / "DATACARD.md").write_text(card(text, measured(found)), encoding="utf-8")


if __name__ == "__main__":
    main()
