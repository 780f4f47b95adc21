"""The tokenizer of a run: a byte-level BPE trained on its data, one that is given, or plain bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from rooflight.errors import InvalidValue
from rooflight.models.huggingface import read_json

END_OF_TEXT = "<|endoftext|>"
FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
LEAST_VOCABULARY = 257
# Words with the space or sign before them, numbers of up to three digits, signs, line ends with their blanks: the
# division that GPT-4 and Llama 3 use.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What belongs to a given tokenizer beside its tokenizer.json.
_NAMING = (CONFIG, "special_tokens_map.json")
_CARRIED = (*_NAMING, "added_tokens.json", "chat_template.jinja", "chat_template.json")
_KNOWN_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<end_of_text>", "<|eot_id|>")
# No byte of this value occurs in UTF-8, so it is free to end a document among 256 bytes.
_FREE_BYTE = 0xFF


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What token ids mean as far as a store of them must know: their number, the end of text, and whose they are."""

    size: int
    eos_id: int
    fingerprint: str


class Tokenizer:
    """Text to token ids and back; documents end with `eos_id`, and begin with `prefix` where the tokenizer wants so."""

    def __init__(self, text: str, eos_id: int, carried: dict[str, str] | None = None):
        self._text = text
        self._inner = tokenizers.Tokenizer.from_str(text)
        # A given tokenizer may cut or pad what it encodes; a document is encoded whole.
        self._inner.no_truncation()
        self._inner.no_padding()
        self._carried = carried or {}
        self.eos_id = eos_id
        self.vocab_size = max(self._inner.get_vocab(with_added_tokens=True).values()) + 1
        self._bytes = self._inner.token_to_id(END_OF_TEXT) == _FREE_BYTE and self.vocab_size == 256
        self.prefix = self._leading()

    @staticmethod
    def train(documents: Iterable[str], vocab_size: int) -> Tokenizer:
        """A byte-level BPE of at most `vocab_size` tokens (fewer where the text has not that many pairs).

        It knows every byte, so no text is unknown to it. The same text gives the same tokenizer. Raises InvalidValue
        on a vocabulary below 257 (all bytes and the end of text).
        """
        if vocab_size < LEAST_VOCABULARY:
            raise InvalidValue(
                f"--vocab-size {vocab_size} is too small for a BPE tokenizer; it takes all 256 bytes and the end of "
                f"text: at least {LEAST_VOCABULARY}"
            )
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
            [
                pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(documents, trainer)
        # Special tokens come before all others.
        return Tokenizer(inner.to_str(pretty=True), eos_id=0)

    @staticmethod
    def bytes() -> Tokenizer:
        """Exactly 256 tokens, a byte each; 0xFF, which UTF-8 never uses, ends a document."""
        vocabulary = {_character(byte): byte for byte in range(256) if byte != _FREE_BYTE}
        inner = tokenizers.Tokenizer(models.BPE(vocab={**vocabulary, END_OF_TEXT: _FREE_BYTE}, merges=[]))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
        inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        inner.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
        return Tokenizer(inner.to_str(pretty=True), _FREE_BYTE)

    @staticmethod
    def load(path: str | Path) -> Tokenizer:
        """The tokenizer of a tokenizer.json, of a directory with one, or of a directory with a tokenizer/ in it.

        Raises InvalidValue where there is none, where it is corrupt, and where nothing names its end of text.
        """
        path = Path(path).expanduser()
        file = next((file for file in (path, path / FILE, path / "tokenizer" / FILE) if file.is_file()), None)
        if file is None:
            raise InvalidValue(_absent(path))
        try:
            text = file.read_text(encoding="utf-8")
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception on a file that it cannot parse
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InvalidValue(f"{file}: is no tokenizer.json ({reason}); fetch or make it again") from error
        carried = {
            name: (file.parent / name).read_text(encoding="utf-8")
            for name in _CARRIED
            if (file.parent / name).is_file()
        }
        return Tokenizer(text, _end_of_text(file, inner), carried)

    @property
    def inner(self) -> tokenizers.Tokenizer:
        """The library's tokenizer, for what must look into its pieces; not to be changed."""
        return self._inner

    @property
    def carried(self) -> Mapping[str, str]:
        """The text of the files that came with a given tokenizer, by name: its config, its chat template."""
        return MappingProxyType(self._carried)

    @property
    def vocabulary(self) -> Vocabulary:
        """What a token store keeps of this tokenizer."""
        return Vocabulary(self.vocab_size, self.eos_id, self.fingerprint())

    @property
    def eos_token(self) -> str:
        """The end of text as the vocabulary spells it."""
        return self._inner.id_to_token(self.eos_id) or ""

    def fingerprint(self) -> str:
        """A hash that changes with anything that changes an encoding."""
        return hashlib.sha256(f"{self.eos_id}\n{self._text}".encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """The token ids of each text, nothing added; the library uses all cores.

        special: whether text that spells a special token, such as <|endoftext|>, becomes it. In documents it must not:
        a text about tokenizers would end in its middle.
        """
        if self._bytes and not special:
            return [list(text.encode("utf-8", "replace")) for text in texts]
        if self._inner.encode_special_tokens == special:
            # Set only when it changes: the library refuses to be changed while another thread encodes.
            self._inner.encode_special_tokens = not special
        return [encoding.ids for encoding in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The token ids of a prompt: `prefix`, then the text, in which special tokens may be spelled."""
        return [*self.prefix, *self.encode_batch([text], special)[0]]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of token ids; bytes that are no whole character come out as U+FFFD."""
        return self._inner.decode([int(token) for token in ids], skip_special_tokens=skip_special)

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and what came with a given tokenizer, its chat template too."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        files = {FILE: self._text, **self._carried}
        named = [json.loads(files[name]).get("eos_token") for name in _NAMING if name in files]
        if not any(named):
            # What named the end of text may stay behind, as a model's config.json does.
            config = {**self._config(), **json.loads(files.get(CONFIG, "{}")), "eos_token": self.eos_token}
            files[CONFIG] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        for name, text in files.items():
            (directory / name).write_text(text, encoding="utf-8")

    def _config(self) -> dict[str, Any]:
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos_token,
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),
        }

    def _leading(self) -> tuple[int, ...]:
        """What the tokenizer's own template puts before a text, such as Llama's <s>."""
        ids = self._inner.encode("a", add_special_tokens=True).ids
        plain = self._inner.encode("a", add_special_tokens=False).ids
        for start in range(len(ids) - len(plain) + 1):
            if ids[start : start + len(plain)] == plain:
                return tuple(ids[:start])
        return ()


def _character(byte: int) -> str:
    """The printable character that stands for a byte in a byte-level vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return chr(byte) if byte in printable else chr(0x100 + [b for b in range(256) if b not in printable].index(byte))


def _end_of_text(file: Path, inner: tokenizers.Tokenizer) -> int:
    """The id of the end of text as the files beside a tokenizer.json name it, else by the usual names."""
    for name in _NAMING:
        if (file.parent / name).is_file():
            token = read_json(file.parent / name).get("eos_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found = inner.token_to_id(token)
                if found is None:
                    raise InvalidValue(f"{file.parent / name}: its eos_token {token!r} is not in {file.name}")
                return found
    for name in ("generation_config.json", "config.json"):
        if (file.parent / name).is_file():
            given = read_json(file.parent / name).get("eos_token_id")
            given = given[0] if isinstance(given, list) and given else given
            if isinstance(given, int) and not isinstance(given, bool):
                if inner.id_to_token(given) is None:
                    raise InvalidValue(f"{file.parent / name}: its eos_token_id {given} is not in {file.name}")
                return given
    for token in _KNOWN_ENDS:
        if (found := inner.token_to_id(token)) is not None:
            return found
    raise InvalidValue(f'{file}: nothing names its end of text; write {{"eos_token": "…"}} into {file.parent / CONFIG}')


def _absent(path: Path) -> str:
    if not path.exists():
        return f"--tokenizer {path}: there is no such file or directory; give a tokenizer.json or a directory with one"
    if (path / "tokenizer.model").is_file() or (path / "vocab.json").is_file():
        return (
            f"--tokenizer {path}: has no tokenizer.json, only the files of a slow tokenizer; convert it with "
            "transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    return f"--tokenizer {path}: has no tokenizer.json; give a tokenizer.json or a directory with one"
