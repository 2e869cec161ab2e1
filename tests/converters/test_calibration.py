"""Calibration rows: from text, from files, and from the model itself."""

from __future__ import annotations

import json
from pathlib import Path

import pruning
import pytest
import tiny_checkpoints
import torch
from transformers import PreTrainedTokenizerFast

from alight.errors import BadInput, Unsupported
from alight_converters.calibration import Calibration
from alight_converters.checkpoint import Checkpoint

TEXT = tiny_checkpoints.TEXT.read_text()
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    """A copy, so that a test may change it."""
    tiny_checkpoints.tokenizer().save_pretrained(tmp_path / "tokenizer")
    return PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")


def test_text_is_cut_into_rows_without_a_gap(tokenizer: PreTrainedTokenizerFast) -> None:
    made = Calibration.of_text(TEXT, tokenizer, 3, 20)
    assert made.rows.shape == (3, 20)
    assert made.rows.dtype == torch.int64
    assert made.rows.flatten().tolist() == tokenizer(TEXT).input_ids[:60]


def test_each_row_starts_as_the_tokenizer_starts_a_text(tokenizer: PreTrainedTokenizerFast) -> None:
    from tokenizers.processors import TemplateProcessing

    whole = tokenizer(TEXT).input_ids
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    made = Calibration.of_text(TEXT, tokenizer, 2, 20)
    assert made.rows.tolist() == [[0, *whole[:19]], [0, *whole[19:38]]]


def test_a_short_text_is_refused_with_the_numbers(tokenizer: PreTrainedTokenizerFast) -> None:
    count = len(tokenizer("a few words").input_ids)
    with pytest.raises(
        BadInput, match=rf"text has {count} tokens: 0 rows of 64, and 8 \(512 tokens\) are wanted"
    ):
        Calibration.of_text("a few words", tokenizer, 8, 64)


def test_a_text_that_is_shorter_than_it_may_be_is_used_up(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = tokenizer(TEXT).input_ids
    made = Calibration.of_text(TEXT, tokenizer, 10**6, 20, fewest=2)
    assert made.rows.flatten().tolist() == whole[: len(whole) // 20 * 20]
    assert len(Calibration.of_text(TEXT, tokenizer, 3, 20, fewest=2).rows) == 3
    with pytest.raises(BadInput, match="0 rows of 64, and 2"):
        Calibration.of_text("a few words", tokenizer, 8, 64, fewest=2)


def test_chats_go_through_the_template(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.chat_template = TEMPLATE
    chats = [
        [{"role": "user", "content": f"How is day {i}?"}, {"role": "assistant", "content": "Like any other."}]
        for i in range(20)
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats) + "\n")
    made = Calibration.of_file(file, tokenizer, 2, 64)
    text = "".join(f"<s>user: How is day {i}?</s><s>assistant: Like any other.</s>" for i in range(20))
    assert made.rows.flatten().tolist() == tokenizer(text).input_ids[:128]
    assert made.origin == "chats.jsonl"


def test_documents_of_a_folder_follow_each_other(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "train").mkdir(parents=True)
    (folder / "README.rst").write_text("not read")
    (folder / "a.txt").write_text("The first.")
    (folder / "b.csv").write_text('id,text\n1,"The second,\nin two lines."\n')
    (folder / "train" / "c.jsonl").write_text('{"text": "The third."}\n\n{"text": "' + "Long. " * 99 + '"}\n')
    made = Calibration.of_file(folder, tokenizer, 1, 60)
    decoded = tokenizer.decode(made.rows[0])
    assert decoded.startswith("The first.</s>The second,\nin two lines.</s>The third.</s>Long. Long.")


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.pdf", "", Unsupported, r"calibration from \.pdf files\nSupported are .*\.parquet"),
        ("a.json", '[{"text": "x"}, {"txt": "y"}]', BadInput, "row 2 has neither a 'text' nor 'messages'"),
        ("a.json", '[{"text": "x"}', BadInput, r"a\.json is not JSON"),
        ("a.jsonl", '{"text": "x"}\n{"txt": "y"}', BadInput, "line 2 has neither a 'text' nor 'messages'"),
        ("a.jsonl", "{", BadInput, "line 1 is not JSON"),
        ("a.jsonl", '{"messages": []}', BadInput, "no chat template"),
        ("a.csv", "id,body\n1,x\n", BadInput, "no column 'text', only id, body"),
        ("a.txt", b"\xff\xfe\x00", BadInput, "is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(
    name: str, content: str | bytes, error: type[BadInput], message: str, tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
) -> None:  # fmt: skip
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=message):
        Calibration.of_file(file, tokenizer, 1, 8)


def test_a_chat_that_its_template_refuses_is_named(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    file = tmp_path / "chats.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    with pytest.raises(BadInput, match=r"line 1: the chat template refuses it: roles must alternate"):
        Calibration.of_file(file, tokenizer, 1, 8)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_sampled_rows_are_what_the_model_would_write(family: str, tmp_path: Path) -> None:
    """Drawn again here without a KV cache, from the same random numbers."""
    checkpoint = pruning.checkpoint_of(family, tmp_path / "model")
    made = Calibration.sampled(checkpoint, 5, 24, seed=3)
    model = checkpoint.load()
    generator = torch.Generator().manual_seed(3)
    rows = torch.zeros(5, 1, dtype=torch.int64)  # BOS
    with torch.inference_mode():
        for _ in range(23):
            chances = model(input_ids=rows, use_cache=False).logits[:, -1].softmax(-1)
            drawn = torch.multinomial(chances, 1, generator=generator)
            drawn[rows[:, -1] == 1] = 0  # BOS after the end of a text
            rows = torch.cat([rows, drawn], dim=1)
    assert torch.equal(made.rows, rows)
    assert not torch.equal(made.rows, Calibration.sampled(checkpoint, 5, 24, seed=4).rows)


def test_a_new_text_begins_after_an_end_of_text(tmp_path: Path) -> None:
    checkpoint = pruning.checkpoint_of("llama", tmp_path / "model")
    head = torch.zeros(512, 64)
    ended = [(n, head if n == "lm_head.weight" else t) for n, t in checkpoint.tensors()]  # every token alike
    uniform = checkpoint.with_tensors(ended, tmp_path / "uniform")
    rows = Calibration.sampled(uniform, 40, 100).rows
    ends = (rows[:, :-1] == 1).nonzero()
    assert len(ends) > 2
    assert all(int(rows[row, place + 1]) == 0 for row, place in ends.tolist())


def test_more_rows_than_go_at_once_are_all_different(tmp_path: Path) -> None:
    checkpoint = pruning.checkpoint_of("llama", tmp_path / "model")
    steps: list[tuple[str, int, int]] = []
    made = Calibration.sampled(checkpoint, 40, 12, progress=lambda *step: steps.append(step))
    assert made.rows.shape == (40, 12)
    assert len({tuple(row) for row in made.rows.tolist()}) == 40
    assert [done for _, done, _ in steps] == [32, 40]


def test_rows_longer_than_the_model_reads_are_refused(tiny: Checkpoint) -> None:
    with pytest.raises(BadInput, match="1 rows of 257 tokens cannot be sampled"):
        Calibration.sampled(tiny, 1, 257)


def test_at_most_keeps_one_row_at_least() -> None:
    rows = Calibration(torch.arange(40).reshape(4, 10), "counting")
    assert rows.at_most(25).rows.tolist() == rows.rows[:2].tolist()
    assert len(rows.at_most(5).rows) == 1
    assert len(rows.at_most(1000).rows) == 4
