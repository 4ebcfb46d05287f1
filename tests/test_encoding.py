import json

import pytest
import torch
from conftest import pair_table
from datasets import Dataset
from test_sources import REAL, needs_real_rows
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from seqdpo_utils import data, encoding, models, scoring, sources, training
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


SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@pytest.fixture
def llama() -> PreTrainedTokenizerFast:
    """Bytes and the special tokens of Llama 3.1, which has no pad token and puts the beginning-of-text token before every text."""
    alphabet = sorted(ByteLevel.alphabet())
    raw = Tokenizer(BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    raw.add_special_tokens(SPECIAL)
    raw.post_processor = TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[(SPECIAL[0], raw.token_to_id(SPECIAL[0]))])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=SPECIAL[0], eos_token=SPECIAL[-1], chat_template=LLAMA_TEMPLATE)


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
    answers = {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "Red."), ("rejected", "No colour."))}
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    theirs = DPOTrainer(base, args=args, train_dataset=Dataset.from_list([{"prompt": TALK, **answers}]), processing_class=llama).train_dataset[0]
    ours = encoding.encode_pair(llama, TALK, chosen="Red.", rejected="No colour.")
    assert (theirs["prompt_ids"], theirs["chosen_ids"], theirs["rejected_ids"]) == tuple(ours)


@pytest.mark.parametrize("pairs_per_device", [1, 4])
def test_neither_tokenizer_nor_embeddings_change_and_pads_are_never_scored(llama, parameters, tmp_path, pairs_per_device):
    """From encoding through scoring and training on a tokenizer without a pad token; pairs of unlike length are padded in batches of four."""
    config = LlamaConfig(vocab_size=len(llama), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(config).eval()
    size, vocabulary, before = model.get_input_embeddings().weight.shape, len(llama), model.get_input_embeddings().weight.detach().clone()
    pairs = [encoding.encode_pair(llama, TALK[: 1 + 2 * (i % 2)], chosen="Red. " * (i + 1), rejected="No." * (5 - i)) for i in range(4)]
    scores = scoring.score_pairs(model, pair_table(4), pairs, checkpoint="base", token_budget=700)
    rows = training.training_rows(pairs, scores)
    trainer = training.stage_trainer(model, llama, rows, parameters=parameters | {"pairs_per_device": pairs_per_device}, output_dir=tmp_path)
    batch = trainer.data_collator(list(rows))
    assert batch["completion_mask"].sum(dim=1).tolist() == [len(p.chosen) for p in pairs] + [len(p.rejected) for p in pairs]
    training.prove_reference(trainer, scores)
    trainer.train()
    assert llama.pad_token is None and len(llama) == vocabulary and "pad_token" not in llama.special_tokens_map
    weight = trainer.model.get_input_embeddings().weight
    assert weight.shape == size and torch.equal(weight, before) and model.config.vocab_size == vocabulary
    assert trainer.processing_class.pad_token in SPECIAL, "TRL took a token that is there, in its own copy"


@needs_real_rows
def test_on_real_rows_trl_scores_one_line_break_more_and_nothing_else_differs(tokenizer, base, tmp_path):
    """SmolLM2's template writes a line break after `<|im_end|>`; TRL's ids and masks hold it, ours end with the turn."""
    rows = sources.load_rows(REAL, "hh-rlhf/helpful-base/test.jsonl.gz", layout="hh_rlhf", objective="helpful")
    table = data.pairs_of(rows, layout="hh_rlhf", objective="helpful")[0].head(150)
    talks = [
        {"prompt": json.loads(row.prompt), **{side: [{"role": "assistant", "content": getattr(row, side)}] for side in ("chosen", "rejected")}}
        for row in table.itertuples()
    ]
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None)
    trl = DPOTrainer(base, args=args, train_dataset=Dataset.from_list(talks), processing_class=tokenizer)
    line_break = tokenizer("\n", add_special_tokens=False)["input_ids"]
    ours = data.encode_table(tokenizer, table)
    for theirs, pair in zip(trl.train_dataset, ours, strict=True):
        assert theirs["prompt_ids"] == pair.prompt
        assert (theirs["chosen_ids"], theirs["rejected_ids"]) == (pair.chosen + line_break, pair.rejected + line_break)
    few = [{"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected} for pair in ours[:8]]
    scored = [trl.data_collator(rows)["completion_mask"].sum(dim=1) for rows in (list(trl.train_dataset.select(range(8))), few)]
    assert (scored[0] - scored[1]).tolist() == [1] * 16
