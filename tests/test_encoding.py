import pytest
from trl import DPOConfig, DPOTrainer

from seqdpo_utils import encoding, models
from seqdpo_utils.paths import StudyError

TALK = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}, {"role": "user", "content": "Another?"}]


def test_a_completion_ends_with_the_end_of_turn_token_and_nothing_after_it(tokenizer):
    pair = encoding.encode_pair(tokenizer, TALK, chosen="Red.", rejected="I would rather not say.")
    assert tokenizer.decode(pair.chosen) == "Red.<|im_end|>"
    assert pair.rejected[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>") == encoding.end_of_turn_id(tokenizer)
    assert tokenizer.decode(pair.prompt).endswith("<|im_start|>assistant\n")
    assert pair.longest == len(pair.prompt) + len(pair.rejected)


@pytest.mark.parametrize("answer", ["Red.", " red", "é — 漢字 🙂", "<|im_end|> not really", "1. one\n\n2. two"])
def test_prompt_and_answer_apart_give_the_ids_of_both_together(tokenizer, answer):
    pair = encoding.encode_pair(tokenizer, TALK, chosen=answer, rejected="x")
    together = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) + answer
    assert pair.prompt + pair.chosen[:-1] == tokenizer(together, add_special_tokens=False)["input_ids"]


def test_our_ids_are_trls_without_the_newline_that_the_template_writes_after_a_turn(tokenizer, base, tmp_path):
    """In TRL's conversational format the line break after `<|im_end|>` is scored too; ours stops at the end-of-turn token."""
    from datasets import Dataset

    answers = {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "Red."), ("rejected", "No colour."))}
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    theirs = DPOTrainer(base, args=args, train_dataset=Dataset.from_list([{"prompt": TALK, **answers}]), processing_class=tokenizer).train_dataset[0]
    ours = encoding.encode_pair(tokenizer, TALK, chosen="Red.", rejected="No colour.")
    line_break = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert theirs["prompt_ids"] == ours.prompt
    assert theirs["chosen_ids"] == ours.chosen + line_break
    assert theirs["rejected_ids"] == ours.rejected + line_break


def test_a_tokenizer_without_a_chat_template_is_refused(root, tokenizer):
    bare = models.load_tokenizer(root, models.TINY)
    bare.chat_template = None
    with pytest.raises(StudyError, match="no chat template"):
        encoding.end_of_turn_id(bare)
    bare.chat_template = "{% for m in messages %}{{ m['content'] }} over{% endfor %}"
    with pytest.raises(StudyError, match="not with a special token"):
        encoding.end_of_turn_id(bare)
    assert encoding.tokenizer_fingerprint(bare) != encoding.tokenizer_fingerprint(tokenizer)
