"""Models, tokens, embeddings, health and version, by the official client and by plain HTTP."""

from __future__ import annotations

import base64
import json
import struct
import urllib.error
import urllib.request
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError

import rooflight
from rooflight.models.tokenizer import Tokenizer
from rooflight.serve.api.tokens import Offsets, Tokens
from tests.serve.api.conftest import Running, Starter
from tests.serve.api.fake_engine import WIDTH, FakeEngine


def call(server: Running, path: str, body: Any = None) -> tuple[int, Any]:
    """A request's status and JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_models_are_the_served_names(start: Starter) -> None:
    server = start(FakeEngine(), served_model_name=("first", "org/second"))
    client = server.client()
    assert [model.id for model in client.models.list()] == ["first", "org/second"]
    assert client.models.retrieve("org/second").model_extra == {
        "root": "fake", "parent": None, "max_model_len": 512,
    }  # fmt: skip
    for name in ("first", "org/second"):
        assert client.completions.create(model=name, prompt="x", max_tokens=1).model == name
    with pytest.raises(NotFoundError) as caught:
        client.completions.create(model="fake", prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(NotFoundError):
        client.models.retrieve("third")


def test_texts_to_ids_and_back(plain: Running) -> None:
    status, found = call(plain, "/tokenize", {"prompt": "né", "return_token_strs": True})
    assert (status, found) == (
        200,
        {"count": 3, "max_model_len": 512, "tokens": [110, 195, 169], "token_strs": ["n", "�", "�"]},
    )
    assert call(plain, "/detokenize", {"tokens": found["tokens"]}) == (200, {"prompt": "né"})
    messages = [{"role": "user", "content": "a"}]
    _, found = call(plain, "/tokenize", {"messages": messages})
    assert bytes(found["tokens"]) == b"<|user|>a\n<|assistant|>"
    _, found = call(plain, "/tokenize", {"messages": messages, "add_generation_prompt": False})
    assert bytes(found["tokens"]) == b"<|user|>a\n"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/detokenize", {"tokens": [300]}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
        ("/detokenize", {"tokens": [1] + ["x"] * 100_000}, "tokens.1"),
    ],
)
def test_bad_tokens_and_texts(plain: Running, path: str, body: Any, param: str) -> None:
    status, found = call(plain, path, body)
    assert (status, found["error"]["param"]) == (400, param)


def test_a_long_text_is_encoded_on_a_thread_with_the_same_ids(plain: Running) -> None:
    text = "ab✓" * 20_000
    status, found = call(plain, "/tokenize", {"prompt": text})
    assert (status, found["tokens"]) == (200, list(text.encode()))


def test_embeddings_as_floats_and_as_base64(plain: Running) -> None:
    client = plain.client()
    expected = [[float(sum(ids) * (place + 1)) / 7 for place in range(WIDTH)] for ids in (b"ab", b"c")]
    floats = client.embeddings.create(model="fake", input=["ab", "c"], encoding_format="float")
    assert [entry.embedding for entry in floats.data] == expected
    assert floats.usage.prompt_tokens == 3
    # What the client asks for when it is not told: base64, which it unpacks itself.
    packed = client.embeddings.create(model="fake", input=[list(b"ab"), list(b"c")])
    assert [entry.embedding for entry in packed.data] == [
        list(struct.unpack(f"<{WIDTH}f", struct.pack(f"<{WIDTH}f", *vector))) for vector in expected
    ]
    _, raw = call(plain, "/v1/embeddings", {"input": "ab", "encoding_format": "base64"})
    assert base64.b64decode(raw["data"][0]["embedding"]) == struct.pack(f"<{WIDTH}f", *expected[0])
    assert client.embeddings.create(model="fake", input="x", dimensions=WIDTH).data


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"dimensions": 4}, "dimensions"),
        ({"input": []}, "input"),
        ({"input": [""]}, "input"),
        ({"input": [1] * 513}, "input"),
        ({"input": ["x"] * 257}, "input"),
        ({"encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_bad_embeddings(plain: Running, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        plain.client().post("/embeddings", body={"model": "fake", "input": "x", **fields}, cast_to=object)
    assert caught.value.param == param


def test_health_says_when_the_engine_failed_or_drains(start: Starter) -> None:
    server = start(FakeEngine())
    assert call(server, "/health") == (200, {"status": "ok"})
    server.engine.draining = True
    status, found = call(server, "/health")
    assert (status, found["error"]["code"]) == (503, "draining")
    server.engine.errored = True
    status, found = call(server, "/health")
    assert (status, found["error"]["code"]) == (503, "engine_dead")
    assert found["error"]["type"] == "service_unavailable_error"


def test_version(plain: Running) -> None:
    assert call(plain, "/version") == (200, {"version": rooflight.__version__})


def test_pieces_of_a_trained_tokenizer_join_to_its_text() -> None:
    text = "Größe ✓ and some more text, with more more text and 𝄞 too.\n" * 3
    tokenizer = Tokenizer.train([text], 300)
    tokens = Tokens(tokenizer, 300, 4096)
    ids = tokenizer.encode_batch([text])[0]
    assert b"".join(tokens.raw(token) for token in ids) == text.encode()
    offsets = Offsets(tokens)
    decoded, at = [offsets.next(token) for token in ids], 0
    for token, offset in zip(ids, decoded):
        # A token begins where the whole characters before it end.
        assert offset == len(text.encode()[:at].decode(errors="ignore"))
        at += len(tokens.raw(token))
    special = tokenizer.eos_id
    assert (tokens.text(special), tokens.special(special)) == ("<|endoftext|>", True)
    assert tokens.raw(299 + 50) == b""
