"""Rated lists: several answers to one prompt, each rated on several aspects, and what they ask of a policy.

Lists stand on the training prompts of a setting's pairs, so that the held-out pairs are those of every other
chain. A rating that is missing stays missing.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor

from seqdpo_utils.encoding import encode_prompt, end_of_turn_id
from seqdpo_utils.layouts import Answers
from seqdpo_utils.pairs import COLUMNS, pair_hash, prompt_hash

OBJECTIVE = "lists"
"""What stands for the objective in the records of lists."""


def rated_lists(
    answers: Sequence[Answers], tables: Mapping[str, pd.DataFrame], tokenizer: Any, *, max_length: int
) -> tuple[pd.DataFrame, Counter]:
    """Lists on the training prompts of the pairs of a setting.

    Prompts are taken as the pairs have them, shortened where they were. An answer that is empty, repeats
    another or does not fit leaves its list.

    Args:
        answers: from `Layout.rated_answers`.
        tables: objective to its pairs, with splits.
        tokenizer: the base model's.
        max_length: tokens of prompt and longest answer.

    Returns:
        One row a prompt: `prompt_id`, `prompt` (JSON), `responses` (N texts), and for each objective a column
        of N ratings (NaN where missing); and how many lists and answers were left out, by reason.
    """
    train = pd.concat(tables.values()).query("split == 'train'").drop_duplicates("prompt_id")
    prompts, counts, rows = train.set_index("prompt_id")["prompt"], Counter(), {}
    for prompt, texts, ratings in answers:
        key = prompt_hash(prompt)
        if key not in prompts.index or key in rows:
            continue
        room = max_length - len(encode_prompt(tokenizer, json.loads(prompts[key])))
        kept: dict[str, dict] = {}
        for text, rated in zip(map(_trimmed, texts), ratings, strict=True):
            fits = len(tokenizer(text, add_special_tokens=False)["input_ids"]) < room
            if text and fits and text not in kept:
                kept[text] = rated
            else:
                counts["answers: empty, repeated or too long"] += 1
        if len(kept) < 2:
            counts["lists: fewer than two answers"] += 1
            continue
        known = {name: [each.get(name) for each in kept.values()] for name in tables}
        columns = {name: np.array(column, dtype=float) for name, column in known.items()}
        rows[key] = {"prompt_id": key, "prompt": prompts[key], "responses": list(kept)} | columns
    table = pd.DataFrame(rows.values(), columns=["prompt_id", "prompt", "responses", *tables])
    return table.sort_values("prompt_id", ignore_index=True), counts


def _trimmed(text: str | None) -> str:
    return (text or "").strip()


def twos(count: int) -> list[tuple[int, int]]:
    """Positions 0 to count - 1 by twos; of an odd count the last stands with the first."""
    return [(i, (i + 1) % count) for i in range(0, count, 2)]


def as_pairs(lists: pd.DataFrame) -> pd.DataFrame:
    """Every list cut into pairs of its answers, the form in which sums are kept and a reference is proven.

    Returns:
        The columns of pairs; "chosen" is merely the first of the two.
    """
    rows = [
        (row.prompt_id, OBJECTIVE, "train", row.prompt, row.responses[i], row.responses[j])
        for row in lists.itertuples()
        for i, j in twos(len(row.responses))
    ]
    table = pd.DataFrame(rows, columns=["prompt_id", "objective", "split", "prompt", "chosen", "rejected"])
    texts = zip(table["prompt"], table["chosen"], table["rejected"], strict=True)
    return table.assign(pair_id=[pair_hash(*text) for text in texts]).reindex(columns=COLUMNS)


def usable(lists: pd.DataFrame, aspects: Sequence[str]) -> pd.DataFrame:
    """The lists in which at least one aspect rates two answers: the others ask nothing of the policy."""
    rated = [any(np.isfinite(row[name]).sum() >= 2 for name in aspects) for _, row in lists.iterrows()]
    return lists[rated].reset_index(drop=True)


def list_rows(tokenizer: Any, lists: pd.DataFrame, sums: pd.DataFrame, aspects: Sequence[str]) -> Dataset:
    """The data set of a listwise stage.

    Args:
        tokenizer: the base model's.
        lists: from `usable`.
        sums: the base model's records of `as_pairs(lists)`, in that order.
        aspects: whose ratings are targets, m of them.

    Returns:
        A row a list: `number`, `prompt` (JSON), `prompt_ids`, `completions` (N lists of ids),
        `ref_logps` (N sums in nats), `ratings` (m lists of N).
    """
    end, rows, place = end_of_turn_id(tokenizer), [], 0
    for number, row in enumerate(lists.to_dict("records")):
        texts, reference = list(row["responses"]), {}
        for i, j in twos(len(texts)):
            reference |= {i: sums["chosen_logp"].iloc[place], j: sums["rejected_logp"].iloc[place]}
            place += 1
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows.append({
            "number": number,
            "prompt": row["prompt"],
            "prompt_ids": encode_prompt(tokenizer, json.loads(row["prompt"])),
            "completions": [[*tokens, end] for tokens in ids],
            "ref_logps": [float(reference[k]) for k in range(len(texts))],
            "ratings": [[float(rating) for rating in row[name]] for name in aspects],
        })  # fmt: skip
    return Dataset.from_list(rows)


def pairs_of_rows(rows: Dataset) -> Dataset:
    """The rows of a listwise stage by twos, as the rows of pairs are, with the reference that they carry."""
    parts = []
    for row in rows:
        answers, sums = row["completions"], row["ref_logps"]
        for i, j in twos(len(answers)):
            ids = {"prompt_ids": row["prompt_ids"], "chosen_ids": answers[i], "rejected_ids": answers[j]}
            parts.append(ids | {"ref_chosen_logps": sums[i], "ref_rejected_logps": sums[j]})
    return Dataset.from_list(parts)


def targets(ratings: Tensor, *, temperature: float) -> Tensor:
    """What each aspect wants: p* = softmax(rating / temperature) over the answers that it rates.

    Args:
        ratings: (m, N), NaN where missing.
        temperature: tau, in points of the rating; near zero all weight falls on the best rated.

    Returns:
        (m, N): zero at unrated answers, and a row of zeros for an aspect that rates fewer than two.

    Source: arXiv 2506.19780, with missing ratings left out instead of taken for the worst.
    """
    rated = ~ratings.isnan()
    rated &= rated.sum(dim=1, keepdim=True) >= 2
    return (ratings / temperature).masked_fill(~rated, -torch.inf).softmax(dim=1).nan_to_num(0.0)


def listwise_loss(rewards: Tensor, ratings: Tensor, weights: Tensor, *, temperature: float) -> Tensor:
    """The loss of one list: sum over aspects k of weight_k times -sum_i p*_k(i) log softmax_i(reward).

    The softmax of an aspect runs over the answers that it rates. For two answers and targets of one and zero
    this is DPO's loss, and where every answer is rated it is the cross-entropy to the mixed target
    sum_k weight_k p*_k.

    Args:
        rewards: (N) beta times log-probability sum minus that of the reference.
        ratings: (m, N), NaN where missing.
        weights: (m) lambda, not negative, of sum one.
        temperature: of the targets.
    """
    wanted = targets(ratings, temperature=temperature)
    loss = rewards.new_zeros(())
    for weight, target, rated in zip(weights, wanted, ~ratings.isnan(), strict=True):
        if target.any():
            loss = loss - weight * (target[rated] * rewards[rated].log_softmax(dim=0)).sum()
    return loss


def told(prompt: list[dict[str, str]], weights: Mapping[str, float]) -> list[dict[str, str]]:
    """The prompt with a line, after the words of its last turn, that says what each aspect weighs.

    A system message would be the usual place, but some chat templates refuse one.
    """
    words = "; ".join(f"{name.replace('_', ' ')} {weight:.2f}" for name, weight in weights.items())
    *before, last = prompt
    return [*before, last | {"content": f"{last['content']}\n\n(What counts here: {words}.)"}]


class Told:
    """A tokenizer whose chat template also tells the policy what each aspect weighs.

    With it everything that encodes prompts (scoring, drift, generation) asks the policy for these weights.

    Args:
        tokenizer: the base model's.
        weights: aspect to its share.
    """

    def __init__(self, tokenizer: Any, weights: Mapping[str, float]) -> None:
        self.tokenizer, self.weights = tokenizer, weights

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.tokenizer(*args, **options)

    def apply_chat_template(self, turns: list[dict[str, str]], **options: Any) -> Any:
        """The template's text; only a prompt, which ends with the user's turn, is told."""
        asked = turns[-1]["role"] == "user"
        return self.tokenizer.apply_chat_template(told(turns, self.weights) if asked else turns, **options)
