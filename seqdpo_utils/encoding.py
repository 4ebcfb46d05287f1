"""From a pair of texts to token ids: the same ids in training and in scoring."""

import hashlib
import json
from typing import Any, NamedTuple

from seqdpo_utils.errors import StudyError

_TURNS = ("user", "Name a colour."), ("assistant", "Blue."), ("user", "Another?")
_TALK = [{"role": role, "content": content} for role, content in _TURNS]


class EncodedPair(NamedTuple):
    """Token ids of one pair. A completion ends with the end-of-turn token and nothing follows it."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def longest(self) -> int:
        """Tokens of the prompt with the longer completion."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def end_of_turn_id(tokenizer: Any) -> int:
    """Id of the token with which the chat template closes an assistant turn.

    Raises:
        StudyError: when the tokenizer has no chat template, or the template closes the turn with ordinary
            text.
    """
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise StudyError(f"{name} has no chat template: the study needs an instruction-tuned model.")
    tail = tokenizer.apply_chat_template(_TALK[:2], tokenize=False).rpartition("Blue.")[2]
    ids = tokenizer(tail.lstrip(), add_special_tokens=False)["input_ids"]
    if not ids or ids[0] not in tokenizer.all_special_ids:
        raise StudyError(f"the chat template of {name} ends a turn with {tail!r}, not with a special token.")
    return ids[0]


def encode_prompt(tokenizer: Any, prompt: list[dict[str, str]]) -> list[int]:
    """Ids of a prompt's messages, up to and including the header of the assistant's turn."""
    rendered = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def encode_pair(tokenizer: Any, prompt: list[dict[str, str]], *, chosen: str, rejected: str) -> EncodedPair:
    """Encode a pair with the model's chat template.

    Scored are the answer's own tokens and the token that ends the turn; neither the header before them nor
    what a template writes after a turn. TRL's conversational format differs in one place: where the template
    goes on after the end of a turn (SmolLM2's writes a line break), TRL scores that too. With Llama 3.1's
    template, which stops there, the ids are the same. The beginning-of-text token comes from the template
    alone, so it stands once. No pad token is needed here: pads are never scored.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        prompt: messages, the last one the user's.
        chosen, rejected: plain text of the two answers.

    Returns:
        Prompt ids up to and including the header of the assistant's turn, and the two completions.
    """
    end = end_of_turn_id(tokenizer)
    chosen_ids, rejected_ids = tokenizer([chosen, rejected], add_special_tokens=False)["input_ids"]
    return EncodedPair(encode_prompt(tokenizer, prompt), [*chosen_ids, end], [*rejected_ids, end])


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of vocabulary, chat template and the ids of a fixed talk: equal fingerprints give equal ids.

    The talk is there because a template may write what stands outside of it, such as today's date: then
    the ids change from day to day, and the fingerprint with them.
    """
    ids = encode_prompt(tokenizer, _TALK)
    content = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, ids])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
