"""Tokenizers: every text comes back, transformers encodes alike, and what came with a given one stays with it."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rooflight.errors import InvalidValue
from rooflight.train.data import Tokenizer
from tests.train.data.corpus import text

SIZE = 320
TRAINED = [text(seed, 2000) for seed in range(5)]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(TRAINED, SIZE)


def any_text(seed: int) -> str:
    """Random characters of all planes, blanks and line ends among them; no surrogates."""
    draw = random.Random(seed)
    ranges = [(0, 0x7F), (9, 13), (32, 32), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    return "".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(draw.randint(0, 200)))


@pytest.mark.parametrize("kind", ["trained", "bytes"])
def test_every_text_comes_back(kind: str, trained: Tokenizer) -> None:
    tokenizer = trained if kind == "trained" else Tokenizer.bytes()
    texts = [any_text(seed) for seed in range(300)] + [text(9, 500), "", "<|endoftext|>", "a<|endoftext|>b"]
    ids = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(row) for row in ids] == texts
    assert not any(tokenizer.eos_id in row for row in ids), "a document cannot spell its own end"
    assert all(0 <= token < tokenizer.vocab_size for row in ids for token in row)


def test_bytes_are_the_bytes() -> None:
    tokenizer = Tokenizer.bytes()
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.eos_token) == (256, 255, "<|endoftext|>")
    assert tokenizer.encode_batch(["né\0"]) == [[*"né\0".encode()]]
    texts = [any_text(seed) for seed in range(50)]
    slow = [[token for token in row if token != 255] for row in tokenizer.encode_batch(texts, special=True)]
    assert slow == tokenizer.encode_batch(texts), "the library's way and the direct one agree"
    assert tokenizer.encode("a<|endoftext|>") == [97, 255]


def test_training_compresses_and_is_bounded(trained: Tokenizer) -> None:
    assert trained.vocab_size == SIZE
    words = text(77, 1000)
    assert len(trained.encode_batch([words])[0]) < 0.5 * len(words.encode())
    assert trained.encode("x<|endoftext|>")[-1] == trained.eos_id
    assert Tokenizer.train(["ab"], 1000).vocab_size == 257, "a text without pairs teaches only bytes"


def test_training_is_the_same_in_another_process(trained: Tokenizer) -> None:
    code = (
        "from rooflight.train.data import Tokenizer; from tests.train.data.corpus import text; "
        "print(Tokenizer.train((text(seed, 2000) for seed in range(5)), 320).fingerprint())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == trained.fingerprint()
    assert Tokenizer.train(TRAINED, SIZE - 1).fingerprint() != trained.fingerprint()


@pytest.mark.parametrize("vocab_size", [0, 256])
def test_too_small_a_vocabulary(vocab_size: int) -> None:
    with pytest.raises(InvalidValue, match=f"--vocab-size {vocab_size} is too small.*at least 257"):
        Tokenizer.train(["text"], vocab_size)


@pytest.mark.parametrize("kind", ["trained", "bytes"])
def test_transformers_encodes_alike(kind: str, trained: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = trained if kind == "trained" else Tokenizer.bytes()
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, len(theirs)) == (tokenizer.eos_id, tokenizer.vocab_size)
    texts = [any_text(seed) for seed in range(100)] + [text(9, 500), "a<|endoftext|>b"]
    for sample in texts:
        assert theirs.encode(sample) == tokenizer.encode(sample)
        assert theirs.decode(theirs.encode(sample)) == sample
    again = Tokenizer.load(tmp_path)
    assert again.vocabulary == tokenizer.vocabulary
    assert again.encode_batch(texts) == tokenizer.encode_batch(texts)


def given(directory: Path, trained: Tokenizer) -> dict:
    """A tokenizer as hubs have them: it adds a first token, cuts and pads, and names its end elsewhere."""
    trained.save(directory)
    inner = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    start = {"id": SIZE, "content": "<s>", "special": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    inner["added_tokens"] += [{**start, **flags}, {**start, **flags, "id": SIZE + 1, "content": "<stop>"}]
    inner["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    inner["padding"] = {
        "strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "<|endoftext|>",
    }  # fmt: skip
    text_piece, start_piece = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<s>", "type_id": 0}}
    inner["post_processor"] = {
        "type": "TemplateProcessing", "single": [start_piece, text_piece], "pair": [start_piece, text_piece],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [SIZE], "tokens": ["<s>"]}},
    }  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(inner), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": {"content": "<stop>"}, "bos_token": "<s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return inner


def test_a_given_tokenizer_keeps_what_it_came_with(trained: Tokenizer, tmp_path: Path) -> None:
    given(tmp_path / "hub", trained)
    tokenizer = Tokenizer.load(tmp_path / "hub")
    assert (tokenizer.eos_id, tokenizer.eos_token, tokenizer.vocab_size) == (SIZE + 1, "<stop>", SIZE + 2)
    assert tokenizer.prefix == (SIZE,)
    long = text(3, 300)
    assert tokenizer.encode_batch([long]) == trained.encode_batch([long]), "neither cut nor padded"
    assert tokenizer.encode("of<stop>") == [SIZE, *trained.encode("of"), SIZE + 1]
    tokenizer.save(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "hub" / name).read_bytes()
    assert Tokenizer.load(tmp_path / "out").vocabulary == tokenizer.vocabulary


def test_where_the_end_of_text_is_named(trained: Tokenizer, tmp_path: Path) -> None:
    given(tmp_path, trained)
    assert Tokenizer.load(tmp_path / "tokenizer.json").eos_id == SIZE + 1
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [320, 321]}')
    assert Tokenizer.load(tmp_path).eos_id == SIZE
    Tokenizer.load(tmp_path).save(tmp_path / "apart")
    assert Tokenizer.load(tmp_path / "apart").vocabulary == Tokenizer.load(tmp_path).vocabulary
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<s>"}')
    assert Tokenizer.load(tmp_path).eos_id == SIZE
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<nowhere>"}')
    with pytest.raises(InvalidValue, match="its eos_token '<nowhere>' is not in tokenizer.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9999}')
    with pytest.raises(InvalidValue, match="its eos_token_id 9999 is not in"):
        Tokenizer.load(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert Tokenizer.load(tmp_path).eos_token == "<|endoftext|>", "a usual name, when nothing is named"
    inner = (tmp_path / "tokenizer.json").read_text(encoding="utf-8").replace("<|endoftext|>", "<other>")
    (tmp_path / "tokenizer.json").write_text(inner, encoding="utf-8")
    with pytest.raises(InvalidValue, match="nothing names its end of text"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_inside_a_run(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / "tokenizer")
    assert Tokenizer.load(tmp_path).vocabulary == trained.vocabulary


def test_none_or_a_broken_one(trained: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="there is no such file or directory"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(InvalidValue, match="has no tokenizer.json; give"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\0")
    with pytest.raises(InvalidValue, match="only the files of a slow tokenizer"):
        Tokenizer.load(tmp_path)
    shutil.rmtree(tmp_path)
    trained.save(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(whole[:1000])
    with pytest.raises(InvalidValue, match="is no tokenizer.json"):
        Tokenizer.load(tmp_path)
