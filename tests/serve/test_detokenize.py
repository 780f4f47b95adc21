"""Pieces of text against the text of all tokens at once, and stop texts against a search of the whole text."""

from __future__ import annotations

from functools import cache
from random import Random

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from rooflight.models.tokenizer import Tokenizer
from rooflight.serve.detokenize import Detokenizer

plain = cache(Tokenizer.bytes)
TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog is not amused.\n\n  Indented, twice.  ",
    "naïve café — “quotes” … 日本語のテキスト、韓국어, עברית, ไทย",
    "😀😀😀 👩‍👩‍👧‍👦 🇩🇪🇫🇷 \U0001f9d1\U0001f3fd\u200d\U0001f680 e\u0301 \U0010fffd",
    "\t\x00 control \r\n and � a replacement character of its own �",
    " leads with a space",
)


@cache
def bpe() -> Tokenizer:
    return Tokenizer.train([*TEXTS, "the dog and the fox " * 20], 330)


@cache
def sentencepiece() -> Tokenizer:
    """Words that begin with ▁, a few ASCII letters, and bytes for all else, as Llama 2's tokenizer has them."""
    pieces = ["▁", "▁t", "▁th", "▁the", "▁d", "▁do", "▁dog", *map(chr, range(0x21, 0x7F)), "\n"]
    vocabulary = {token: place for place, token in enumerate(["<unk>", "</s>"])}
    for piece in [f"<0x{byte:02X}>" for byte in range(256)] + pieces:
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "d"), ("▁d", "o"), ("▁do", "g")]
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)  # type: ignore[assignment]
    inner.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["</s>"])
    return Tokenizer(inner.to_str(), 1)


@cache
def metaspace() -> Tokenizer:
    """As above without bytes, and decoded by the library's own Metaspace."""
    pieces = ["▁", "▁t", "▁th", "▁the", *map(chr, range(0x21, 0x7F)), *sorted({*"".join(TEXTS)} - {" "})]
    vocabulary = {token: place for place, token in enumerate(dict.fromkeys(["<unk>", "</s>", *pieces]))}
    inner = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=[("▁", "t"), ("▁t", "h"), ("▁th", "e")], unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)  # type: ignore[assignment]
    inner.decoder = decoders.Metaspace(prepend_scheme="always")  # type: ignore[assignment]
    inner.add_special_tokens(["</s>"])
    return Tokenizer(inner.to_str(), 1)


TOKENIZERS = {"bpe": bpe, "bytes": plain, "sentencepiece": sentencepiece, "metaspace": metaspace}


def pieces(detokenizer: Detokenizer, ids: list[int], most: int, random: Random) -> list[str]:
    """The texts of `ids` given 1 to `most` at a time."""
    texts, place = [], 0
    while place < len(ids):
        count = random.randint(1, most)
        texts.append(detokenizer.add(ids[place : place + count]).text)
        place += count
    return [*texts, detokenizer.add([], last=True).text]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("most", [1, 3])
def test_pieces_join_to_the_text_of_all_tokens(name: str, most: int) -> None:
    tokenizer, random = TOKENIZERS[name](), Random(1)
    for text in (*TEXTS, "".join(TEXTS)):
        ids = tokenizer.encode(text, special=False)
        got = pieces(Detokenizer(tokenizer), ids, most, random)
        assert "".join(got) == tokenizer.decode(ids)
        # Only a text that holds replacement characters shows any.
        assert "\ufffd" in text or "\ufffd" not in "".join(got)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_is_told_as_soon_as_it_is_whole(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    text = "the dog 😀 é the dog"
    ids = tokenizer.encode(text, special=False)
    detokenizer, told = Detokenizer(tokenizer), ""
    for place, token in enumerate(ids, 1):
        told += detokenizer.add([token]).text
        now = tokenizer.decode(ids[:place])
        if not now.endswith("\ufffd"):
            assert told == now


@pytest.mark.parametrize("name", ["bpe", "bytes"])
def test_random_tokens_join_to_the_text_of_them_all(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    for seed in range(150):
        random = Random(seed)
        ids = [random.randrange(tokenizer.vocab_size) for _ in range(random.randint(1, 120))]
        for skip in (True, False):
            detokenizer = Detokenizer(tokenizer, skip_special=skip)
            assert "".join(pieces(detokenizer, ids, random.choice((1, 4)), random)) == tokenizer.decode(ids, skip)


def test_bytes_that_make_no_character_among_bytes_that_do() -> None:
    tokenizer = plain()
    for seed in range(200):
        random = Random(seed)
        parts = [random.choice([b"\x80", b"\xf0\x9f", b"\xe2", b"\xc0", b"\xed\xa0\x80", "😀é€a".encode(), b"ab"])]
        parts += [random.choice([b"\x80" * 9, b"\xf0\x9f\x98", "😀".encode(), b" ", b"\xfe"]) for _ in range(12)]
        ids = list(b"".join(parts))
        got = "".join(pieces(Detokenizer(tokenizer), ids, 2, random))
        assert got == b"".join(parts).decode("utf-8", "replace")


def test_a_long_run_of_such_bytes_is_told_on_the_way() -> None:
    tokenizer = plain()
    detokenizer = Detokenizer(tokenizer)
    told = 0
    for count in range(1, 1000):
        told += len(detokenizer.add([0x80]).text)
        assert count - 3 <= told <= count
        assert len(detokenizer._ids) - detokenizer._context <= 3 * 64
    assert detokenizer.add(list(b"a"), last=True).text[-1] == "a"


def test_spoiled_bytes_leave_told_characters_alone() -> None:
    # The library makes of a run of byte tokens with one bad byte nothing but replacement characters.
    tokenizer = sentencepiece()
    byte = {value: tokenizer.inner.get_vocab()[f"<0x{value:02X}>"] for value in range(256)}
    euro = [byte[value] for value in "€".encode()]
    assert tokenizer.decode([*euro, byte[0xFF]]) == "\ufffd" * 4
    for bad, shown in (([0xFF], "€\ufffd"), ([0xFF] * 6, "€" + "\ufffd" * 6)):
        ids = [*euro, *(byte[value] for value in bad)]
        assert "".join(pieces(Detokenizer(tokenizer), ids, 1, Random(0))) == shown
        word = tokenizer.encode(" dog", special=False)
        got = "".join(pieces(Detokenizer(tokenizer), [*ids, *word], 1, Random(0)))
        assert got.startswith(shown) and got.endswith("dog")


@pytest.mark.parametrize("name", ["bpe", "sentencepiece"])
def test_special_tokens_show_only_on_demand(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    end = tokenizer.eos_id
    ids = [end, *tokenizer.encode("the dog", special=False), end, end, end, end]
    ids += [*tokenizer.encode(" 😀 dog", special=False), end]
    for skip in (True, False):
        got = "".join(pieces(Detokenizer(tokenizer, skip_special=skip), ids, 1, Random(0)))
        assert got == tokenizer.decode(ids, skip)
        assert (tokenizer.eos_token in got) is not skip


def test_without_a_tokenizer_there_is_no_text() -> None:
    assert Detokenizer(None, ("a",)).add([1, 2, 3], last=True).text == ""


def cut(text: str, stops: tuple[str, ...], include: bool, free: int = 0) -> tuple[str, str | None]:
    """What is left of a text: try each end, and at each end every stop text, the longest first."""
    for end in range(free + 1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


def run(detokenizer: Detokenizer, ids: list[int], most: int, random: Random) -> tuple[str, str | None]:
    text, place = "", 0
    while place < len(ids):
        count = random.randint(1, most)
        piece = detokenizer.add(ids[place : place + count], last=place + count >= len(ids))
        text += piece.text
        if piece.stop is not None:
            return text, piece.stop
        place += count
    return text, None


@pytest.mark.parametrize("include", [False, True])
def test_stop_texts_wherever_tokens_end(include: bool) -> None:
    found = 0
    for seed in range(600):
        random = Random(seed)
        letters = random.choice(("ab", "abc", "a😀é"))
        text = "".join(random.choices(letters, k=random.randint(1, 40)))
        stops = tuple("".join(random.choices(letters, k=random.randint(1, 5))) for _ in range(random.randint(1, 4)))
        tokenizer = random.choice((bpe(), plain()))
        ids = tokenizer.encode(text, special=False)
        want = cut(text, stops, include)
        assert run(Detokenizer(tokenizer, stops, include), ids, random.choice((1, 2, 50)), random) == want
        found += want[1] is not None
    assert 100 < found < 500


def test_a_stop_text_in_the_middle_of_a_token_and_over_its_border() -> None:
    tokenizer = bpe()
    ids = tokenizer.encode(" the dog", special=False)
    tokens = [tokenizer.decode([token]) for token in ids]
    assert max(map(len, tokens)) >= 4
    for stop, left in (("he", " t"), ("e d", " th"), ("dog", " the "), ("dogs", " the dog")):
        assert run(Detokenizer(tokenizer, (stop,)), ids, 1, Random(0))[0] == left


def test_what_may_begin_a_stop_text_is_held_back_and_no_more() -> None:
    detokenizer = Detokenizer(plain(), ("abcd", "cx"))
    told = [detokenizer.add([byte]).text for byte in b"zabcabcab"]
    assert told == ["z", "", "", "", "abc", "", "", "abc", ""]
    assert detokenizer.add([], last=True).text == "ab"


def test_the_stop_text_that_is_complete_first_counts() -> None:
    stops = ("abcd", "bc")
    for ids in ([list(b"abcd")], [[byte] for byte in b"abcd"]):
        detokenizer = Detokenizer(plain(), stops)
        told = []
        for some in ids:
            told.append(detokenizer.add(some))
            if told[-1].stop is not None:
                break
        assert ("".join(piece.text for piece in told), told[-1].stop) == ("a", "bc")


def test_stop_texts_of_tokens_that_may_not_end_are_passed_by() -> None:
    for seed in range(200):
        random = Random(seed)
        text = "".join(random.choices("ab", k=20))
        stops = ("".join(random.choices("ab", k=random.randint(1, 3))),)
        least = random.randint(0, 12)
        detokenizer, got = Detokenizer(plain(), stops), ""
        for place, byte in enumerate(text.encode(), 1):
            piece = detokenizer.add([byte], last=place == len(text), may_stop=place > least)
            got += piece.text
            if piece.stop is not None:
                break
        left, stop = cut(text, stops, False, free=least)
        # What was told before the least number of tokens cannot be taken back.
        assert piece.stop == stop and got.startswith(left)
        assert len(got) - len(left) <= max(len(stops[0]) - 1, 0)
