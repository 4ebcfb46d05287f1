import json
from datetime import datetime

import pytest
import torch
from conftest import pair_table
from datasets import Dataset
from test_layouts import REAL, needs_real_rows
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils
from trl import DPOConfig, DPOTrainer

from seqdpo_utils import encoding, layouts, models, pairs, scoring, stage_data, stages
from seqdpo_utils.errors import StudyError

TALK = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Another?"},
]


def test_a_completion_ends_with_the_end_of_turn_token_and_nothing_after_it(tokenizer):
    pair = encoding.encode_pair(tokenizer, TALK, chosen="Red.", rejected="I would rather not say.")
    assert tokenizer.decode(pair.chosen) == "Red.<|im_end|>"
    assert (
        pair.rejected[-1]
        == tokenizer.convert_tokens_to_ids("<|im_end|>")
        == encoding.end_of_turn_id(tokenizer)
    )
    assert tokenizer.decode(pair.prompt).endswith("<|im_start|>assistant\n")
    assert pair.longest == len(pair.prompt) + len(pair.rejected)


@pytest.mark.parametrize(
    "answer", ["Red.", " red", "é — 漢字 🙂", "<|im_end|> not really", "1. one\n\n2. two"]
)
def test_prompt_and_answer_apart_give_the_ids_of_both_together(tokenizer, answer):
    pair = encoding.encode_pair(tokenizer, TALK, chosen=answer, rejected="x")
    together = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) + answer
    assert pair.prompt + pair.chosen[:-1] == tokenizer(together, add_special_tokens=False)["input_ids"]


def answers(chosen: str, rejected: str) -> dict:
    """The two answers as TRL's conversational format has them."""
    texts = {"chosen": chosen, "rejected": rejected}
    return {side: [{"role": "assistant", "content": text}] for side, text in texts.items()}


def trls(base, tokenizer, talks: list[dict], folder) -> DPOTrainer:
    """TRL's own trainer on conversations, with no limit on their length."""
    args = DPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", max_length=None)
    return DPOTrainer(base, args=args, train_dataset=Dataset.from_list(talks), processing_class=tokenizer)


def test_our_ids_are_trls_without_the_newline_that_the_template_writes_after_a_turn(
    tokenizer, base, tmp_path
):
    """TRL scores the line break after `<|im_end|>` too; ours stops at the end-of-turn token."""
    talk = {"prompt": TALK, **answers("Red.", "No colour.")}
    theirs = trls(base, tokenizer, [talk], tmp_path).train_dataset[0]
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


def test_the_fingerprint_sees_the_vocabulary_the_template_and_what_it_writes(root, tokenizer, monkeypatch):
    """A template that writes today's date gives other ids tomorrow, though its text is the same."""
    plain = encoding.tokenizer_fingerprint(tokenizer)
    same, dated = (models.load_tokenizer(root, models.TINY) for _ in range(2))
    assert encoding.tokenizer_fingerprint(same) == plain
    same.add_tokens(["<one more>"])
    assert encoding.tokenizer_fingerprint(same) != plain
    dated.chat_template = "{{ strftime_now('%d %B %Y') }}" + tokenizer.chat_template
    days = []
    for day in (1, 1, 2):
        monkeypatch.setattr(chat_template_utils, "datetime", Clock(day))
        days.append(encoding.tokenizer_fingerprint(dated))
    assert days[0] == days[1] != days[2] and plain not in days


class Clock:
    """Stands in for the class `datetime` on one day of January 2031."""

    def __init__(self, day: int) -> None:
        self.day = day

    def now(self) -> datetime:
        return datetime(2031, 1, self.day)


SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@pytest.fixture
def llama() -> PreTrainedTokenizerFast:
    """Bytes and the special tokens of Llama 3.1: no pad token, and every text begins with the same token."""
    alphabet = sorted(ByteLevel.alphabet())
    raw = Tokenizer(BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    raw.add_special_tokens(SPECIAL)
    begin = (SPECIAL[0], raw.token_to_id(SPECIAL[0]))
    raw.post_processor = TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[begin])
    ends = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[-1]}
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=LLAMA_TEMPLATE, **ends)


def test_llamas_template_begins_once_scores_the_end_of_turn_and_no_header(llama):
    bos, end = (llama.convert_tokens_to_ids(SPECIAL[i]) for i in (0, 4))
    pair = encoding.encode_pair(llama, TALK, chosen="Red.", rejected="No, thank you.")
    assert llama("x")["input_ids"][0] == bos, "the tokenizer itself would add one more"
    for answer in (pair.chosen, pair.rejected):
        assert [*pair.prompt, *answer].count(bos) == 1 and pair.prompt[0] == bos
        assert answer[-1] == end == encoding.end_of_turn_id(llama) and answer.count(end) == 1
    assert llama.decode(pair.chosen) == "Red.<|eot_id|>"
    assert llama.decode(pair.prompt).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert pair.prompt.count(end) == len(TALK)


def test_with_llamas_template_our_ids_are_trls(llama, base, tmp_path):
    """The template stops at the end of a turn, so there is nothing that only TRL would score."""
    talk = {"prompt": TALK, **answers("Red.", "No colour.")}
    theirs = trls(base, llama, [talk], tmp_path).train_dataset[0]
    ours = encoding.encode_pair(llama, TALK, chosen="Red.", rejected="No colour.")
    assert (theirs["prompt_ids"], theirs["chosen_ids"], theirs["rejected_ids"]) == tuple(ours)


def llama_model(vocabulary: int) -> LlamaForCausalLM:
    widths = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **widths, **heads)).eval()


@pytest.mark.parametrize("pairs_per_device", [1, 4])
def test_neither_tokenizer_nor_embeddings_change_and_pads_are_never_scored(
    llama, parameters, tmp_path, pairs_per_device
):
    """From encoding through scoring and training without a pad token; batches of four are padded."""
    model, vocabulary = llama_model(len(llama)), len(llama)
    before = model.get_input_embeddings().weight.detach().clone()
    sides = [
        (TALK[: 1 + 2 * (i % 2)], {"chosen": "Red. " * (i + 1), "rejected": "No." * (5 - i)})
        for i in range(4)
    ]
    encoded = [encoding.encode_pair(llama, prompt, **texts) for prompt, texts in sides]
    scores = scoring.Scorer(model, token_budget=700).records(pair_table(4), encoded, checkpoint="base")
    data = stage_data.StageData(stage_data.training_rows(encoded, scores), scores)
    given = parameters.model_copy(update={"pairs_per_device": pairs_per_device})
    trainer = stages.stage_trainer(model, llama, data, parameters=given, output_dir=tmp_path)
    mask = trainer.data_collator(list(data.rows))["completion_mask"]
    assert mask.sum(dim=1).tolist() == [len(p.chosen) for p in encoded] + [len(p.rejected) for p in encoded]
    stages.prove_reference(trainer, data)
    trainer.train()
    assert (
        llama.pad_token is None and len(llama) == vocabulary and "pad_token" not in llama.special_tokens_map
    )
    weight = trainer.model.get_input_embeddings().weight
    assert torch.equal(weight, before) and model.config.vocab_size == vocabulary
    assert trainer.processing_class.pad_token in SPECIAL, "TRL took a token that is there, in its own copy"


@needs_real_rows
def test_on_real_rows_trl_scores_one_line_break_more_and_nothing_else_differs(tokenizer, base, tmp_path):
    """SmolLM2's template writes a line break after `<|im_end|>`; TRL's ids and masks hold it, ours do not."""
    file = "hh-rlhf/helpful-base/test.jsonl.gz"
    rows = layouts.load_rows(REAL, file, layout="hh_rlhf", objective="helpful")
    table = pairs.pairs_of(rows, layout="hh_rlhf", objective="helpful")[0].head(150)
    texts = zip(table["prompt"], table["chosen"], table["rejected"], strict=True)
    talks = [
        {"prompt": json.loads(prompt), **answers(chosen, rejected)} for prompt, chosen, rejected in texts
    ]
    trl = trls(base, tokenizer, talks, tmp_path)
    line_break = tokenizer("\n", add_special_tokens=False)["input_ids"]
    ours = pairs.encode_table(tokenizer, table)
    for theirs, pair in zip(trl.train_dataset, ours, strict=True):
        assert theirs["prompt_ids"] == pair.prompt
        assert theirs["chosen_ids"] == pair.chosen + line_break
        assert theirs["rejected_ids"] == pair.rejected + line_break
    few = [{f"{part}_ids": ids for part, ids in pair._asdict().items()} for pair in ours[:8]]
    collated = [trl.data_collator(rows) for rows in (list(trl.train_dataset.select(range(8))), few)]
    theirs, without = (batch["completion_mask"].sum(dim=1) for batch in collated)
    assert (theirs - without).tolist() == [1] * 16
