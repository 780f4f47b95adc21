"""Text to the ids of a prompt, and single ids to what they spell."""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import Sequence

from rooflight.models.tokenizer import Tokenizer
from rooflight.serve.api.errors import ApiError

# Longer texts are encoded on a thread: the loop must go on serving others.
INLINE = 20_000
_BYTE_DECODER = "ByteLevel"


class Tokens:
    """A tokenizer as the API needs it; without one only token ids come in, and they are spelled by number."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, max_model_len: int):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._pieces: dict[int, bytes] = {}
        self._added: dict[int, tuple[str, bool]] = {}
        self._byte_level = False
        self._byte_of: dict[str, int] = {}
        self._longest = 1
        if tokenizer is not None:
            inner = tokenizer.inner
            self._added = {id: (token.content, token.special) for id, token in inner.get_added_tokens_decoder().items()}
            self._byte_level = _BYTE_DECODER in json.dumps(json.loads(inner.to_str()).get("decoder"))
            self._byte_of = {_printable(byte): byte for byte in range(256)}
            self._longest = max(len(piece) for piece in inner.get_vocab(with_added_tokens=True))

    @property
    def present(self) -> bool:
        """Whether there is a tokenizer."""
        return self._tokenizer is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; raises ApiError 400 where the model has none."""
        if self._tokenizer is None:
            raise ApiError(400, "this model is served without a tokenizer; send token ids instead of text", "prompt")
        return self._tokenizer

    async def encode(self, text: str, *, special: bool, limit: bool = True) -> list[int]:
        """The ids of a text, in which special tokens may be spelled; `special` puts the tokenizer's prefix before it.

        With `limit`, a text so long that no division into tokens fits the context is refused before it is encoded.
        """
        tokenizer = self.tokenizer
        if limit and len(text) > self._longest * self._max_model_len:
            raise ApiError(
                400,
                f"a prompt of {len(text)} characters exceeds the model's context of {self._max_model_len} tokens",
                "prompt",
                "context_length_exceeded",
            )
        encode = tokenizer.encode if special else lambda text: tokenizer.encode_batch([text], special=True)[0]
        return encode(text) if len(text) <= INLINE else await asyncio.to_thread(encode, text)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of ids; empty without a tokenizer."""
        return "" if self._tokenizer is None else self._tokenizer.decode(ids, skip_special)

    def check(self, ids: Sequence[int], param: str) -> None:
        """Raise ApiError 400 on no ids, and on an id that the model does not know."""
        if not ids:
            raise ApiError(400, f"{param} is empty; it must have at least one token", param)
        wrong = next((token for token in ids if not 0 <= token < self._vocab_size), None)
        if wrong is not None:
            raise ApiError(400, f"{param} has token id {wrong}; use 0 to {self._vocab_size - 1}", param)

    def raw(self, token: int) -> bytes:
        """The bytes that one token stands for, also where they are no whole character."""
        if token not in self._pieces:
            self._pieces[token] = self._spell(token)
        return self._pieces[token]

    def text(self, token: int) -> str:
        """One token as text; bytes that are no whole character come out as U+FFFD."""
        return self.raw(token).decode("utf-8", "replace")

    def special(self, token: int) -> bool:
        """Whether the token is one that decoding may leave out."""
        return token in self._added and self._added[token][1]

    def _spell(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token][0].encode()
        piece = None if self._tokenizer is None else self._tokenizer.inner.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level and all(character in self._byte_of for character in piece):
            return bytes(self._byte_of[character] for character in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        return piece.replace("▁", " ").encode()


class Offsets:
    """Where each token begins in the text of them all; a token that begins inside a character begins where that does.

    hidden: characters of leading tokens that the text does not show.
    """

    def __init__(self, tokens: Tokens, hidden: int = 0, skip_special: bool = False):
        self._tokens = tokens
        self._skip_special = skip_special
        self._at = -hidden
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, token: int) -> int:
        """The offset of the next token."""
        begins = max(self._at, 0)
        if not (self._skip_special and self._tokens.special(token)):
            self._at += len(self._decoder.decode(self._tokens.raw(token)))
        return begins


def _printable(byte: int) -> str:
    """The character that byte-level vocabularies write for a byte (GPT-2's table)."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in kept:
        return chr(byte)
    return chr(0x100 + sum(other not in kept for other in range(byte)))
