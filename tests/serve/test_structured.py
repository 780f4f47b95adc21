"""Structured output: whatever the model would rather say, what comes out parses and fits."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from rooflight.errors import InvalidValue
from rooflight.models.tokenizer import Tokenizer
from rooflight.serve.params import SamplingParams, Structured
from rooflight.serve.request import Request
from rooflight.serve.step import Part
from rooflight.serve.structured import Grammars, Masks, Matcher

TEXT = ['{"name": "Ada", "age": 36, "tags": ["x", "y"], "ok": true, "no": null}', "the colour is red, the sum 12.5 é"]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", "b"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}


def tokenizer(name: str) -> Tokenizer:
    return Tokenizer.bytes() if name == "bytes" else Tokenizer.train(TEXT * 20, 330)


TOKENIZERS = pytest.mark.parametrize("name", ["bytes", "bpe"])


def allowed(mask_W: np.ndarray) -> list[int]:
    """Bit by bit, in plain Python."""
    return [
        32 * i + bit for i, word in enumerate(mask_W.tolist()) for bit in range(32) if (word & 0xFFFFFFFF) >> bit & 1
    ]


def random_output(
    matcher: Matcher, words: Tokenizer, eos_ids: frozenset[int], seed: int, most: int = 3000
) -> tuple[str, bool]:
    """What random logits say under the mask, and whether it came to its end."""
    rng, tokens = np.random.default_rng(seed), []
    while len(tokens) < most:
        token = int(rng.choice(allowed(matcher.mask())))
        matcher.advance([token])
        if token in eos_ids:
            return words.decode(tokens), True
        tokens.append(token)
    return words.decode(tokens), False


def grammars(words: Tokenizer, columns: int = 352) -> Grammars:
    return Grammars(words, columns, frozenset())


@TOKENIZERS
def test_random_logits_fit_the_schema(name: str) -> None:
    words = tokenizer(name)
    made = grammars(words)
    for seed in range(8):
        matcher = made.matcher(Structured("json_schema", json.dumps(SCHEMA)))
        text, ended = random_output(matcher, words, made.eos_ids, seed)
        assert ended and not matcher.error
        value = json.loads(text)
        assert set(value) == set(SCHEMA["required"])
        assert isinstance(value["name"], str) and len(value["name"]) <= 6
        assert type(value["age"]) is int and 0 <= value["age"] <= 150
        assert value["kind"] in ("a", "b")
        assert len(value["tags"]) <= 3 and all(type(tag) is bool for tag in value["tags"])


@TOKENIZERS
@pytest.mark.parametrize(
    "pattern", [r"[a-c]{2,5}-\d{3}", r"(yes|no|maybe)", r"é+/x\\n", r"[A-Z][a-z]*( [A-Z][a-z]*){0,2}"]
)
def test_random_logits_match_the_whole_expression(name: str, pattern: str) -> None:
    words = tokenizer(name)
    made = grammars(words)
    for seed in range(5):
        text, ended = random_output(made.matcher(Structured("regex", pattern)), words, made.eos_ids, seed)
        assert ended
        assert re.fullmatch(pattern, text), text


@TOKENIZERS
def test_random_logits_follow_a_grammar(name: str) -> None:
    words = tokenizer(name)
    made = grammars(words)
    lark = 'start: term ("+" term){0,3}\nterm: NUMBER | "(" start ")"\nNUMBER: /[1-9][0-9]{0,2}/'
    for seed in range(5):
        text, ended = random_output(made.matcher(Structured("grammar", lark)), words, made.eos_ids, seed)
        if ended:
            assert re.fullmatch(r"[0-9+()]+", text)
            assert isinstance(eval(text, {"__builtins__": {}}), int)


@TOKENIZERS
def test_json_is_an_object_from_its_first_token(name: str) -> None:
    words = tokenizer(name)
    made = grammars(words)
    ended = 0
    for seed in range(6):
        text, end = random_output(made.matcher(Structured("json")), words, made.eos_ids, seed, 400)
        assert text.startswith("{")
        # Cut in the middle of a character it may hold U+FFFD, and is no whole object; at its end it is one.
        ended += end
        assert not end or isinstance(json.loads(text), dict)
    assert ended


def test_blanks_come_to_an_end() -> None:
    made = grammars(Tokenizer.bytes())
    matcher = made.matcher(Structured("json"))
    matcher.advance(list(b"{" + b" " * 39))
    assert ord(" ") in allowed(matcher.mask())
    matcher.advance([ord(" ")])
    assert ord(" ") not in allowed(matcher.mask())
    assert ord("}") in allowed(matcher.mask())


def test_ends_are_allowed_where_the_output_may_stop_and_alone_where_it_must() -> None:
    words = Tokenizer.bytes()
    made = Grammars(words, 256, frozenset({255, 7}))
    matcher = made.matcher(Structured("regex", "ab?"))
    assert allowed(matcher.mask()) == [97]
    matcher.advance([97])
    assert allowed(matcher.mask()) == [7, 98, 255] and not matcher.finished
    matcher.advance([98])
    assert allowed(matcher.mask()) == [7, 255] and matcher.finished
    # A request that ignores ends of text goes on; nothing but ends is left to it.
    matcher.advance([7, 7])
    assert allowed(matcher.mask()) == [7, 255] and not matcher.error
    early = made.matcher(Structured("regex", "ab?"))
    early.advance([97, 7])
    assert early.finished and not early.error


def test_a_token_that_does_not_fit_leaves_only_ends() -> None:
    matcher = grammars(Tokenizer.bytes(), 256).matcher(Structured("regex", "ab"))
    matcher.advance([120])
    assert "\n" not in matcher.error and "doesn't satisfy" in matcher.error
    assert allowed(matcher.mask()) == [255]


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("json_schema", "{", "is no JSON"),
        ("json_schema", "3", "a schema is an object"),
        ("json_schema", "[" * 100_000, "at most 65536"),
        ("json_schema", "[" * 60_000, "is no JSON"),
        ("json_schema", '{"type": "strin"}', "strin"),
        ("json_schema", '{"type": "object", "dependentSchemas": {}}', "dependentSchemas"),
        ("regex", "a(", "unclosed group"),
        ("grammar", "start: foo", 'unknown name: "foo"'),
        ("regex", "(?=a)a", "look-around"),
        ("yaml", "", "json_schema, regex, grammar, json"),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_one_line(kind: str, text: str, says: str) -> None:
    with pytest.raises(InvalidValue, match=re.escape(says)) as raised:
        grammars(Tokenizer.bytes()).matcher(Structured(kind, text))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_matchers_of_one_grammar_go_their_own_ways() -> None:
    made = grammars(Tokenizer.bytes())
    first, second = (made.matcher(Structured("regex", "ab|ba")) for _ in range(2))
    first.advance([97])
    assert allowed(first.mask()) == [98]
    assert allowed(second.mask()) == [97, 98]


def test_the_last_used_grammars_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rooflight.serve.structured._MOST_COMPILED", 2)
    made = grammars(Tokenizer.bytes())
    compiled: list[str] = []
    plain = made._compile
    monkeypatch.setattr(made, "_compile", lambda spec: (compiled.append(spec.text), plain(spec))[1])
    for text in "abacab":
        made.matcher(Structured("regex", text))
    assert compiled == ["a", "b", "c", "b"]


def part(request: Request) -> Part:
    return Part(request, 0, len(request.tokens), samples=True)


def request_of(structured: Structured | None, slot: int, **rest: Any) -> Request:
    made = Request(f"r{slot}", [1, 2, 3], SamplingParams(structured=structured), 10, **rest)
    made.slot, made.admissions = slot, 1
    return made


def test_masks_catch_up_with_outputs_and_begin_again_after_a_preemption() -> None:
    made = grammars(Tokenizer.bytes(), 256)
    masks = Masks(made)
    requests = [
        request_of(Structured("regex", "abc"), 0),
        request_of(None, 1),
        request_of(Structured("regex", "xy"), 2),
    ]

    def rows() -> list[list[int] | None]:
        return [None if mask is None else allowed(mask) for mask in masks.rows([part(r) for r in requests])]

    assert rows() == [[97], None, [120]]
    requests[0].tokens.append(97)
    requests[1].tokens.append(50)
    assert rows() == [[98], None, [120]]
    # The same state asked for twice is the same answer.
    assert rows() == [[98], None, [120]]
    requests[0].tokens.append(98)
    requests[0].admissions, requests[0].slot, requests[2].slot = 2, 2, 0
    requests[2].admissions = 2
    assert rows() == [[99], None, [120]]
    assert masks.rows([part(requests[1])]) == [None]
    # Another request takes the slot.
    requests[0] = request_of(Structured("regex", "xy"), 2)
    requests[0].id = "later"
    assert rows()[0] == [120]


def test_columns_past_the_tokenizer_are_never_allowed() -> None:
    words = tokenizer("bpe")
    mask_W = grammars(words, 400).matcher(Structured("regex", r"(?s:.*)")).mask()
    assert mask_W.shape == (13,)
    assert max(allowed(mask_W)) < words.vocab_size
