"""Datasets of requests: random token ids, ShareGPT's conversations, and JSONL files of prompts or of a trace."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rooflight.errors import InvalidValue
from rooflight.serve.bench.settings import Span, TrafficSettings, span_of
from rooflight.serve.bench.traffic import Arrival, Traffic

# vLLM's filter of ShareGPT: shorter ones measure nothing, longer ones were left out of the published figures.
_LEAST_TOKENS, _MOST_PROMPT, _MOST_TOKENS = 4, 1024, 2048
_OUTPUT_KEYS = ("output_len", "max_tokens", "output_tokens", "output_length")
_INPUT_KEYS = ("input_len", "input_length")
_ARRIVAL_KEYS = ("arrival", "timestamp")


class Encoder(Protocol):
    """Text to token ids; `rooflight.models.tokenizer.Tokenizer` is one."""

    def encode(self, text: str, special: bool = True) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Which token ids there are; `special` ones do not occur in random prompts. size 0: not known."""

    size: int
    special: Collection[int] = ()


def load_traffic(settings: TrafficSettings, seed: int, vocabulary: Vocabulary, encoder: Encoder | None) -> Traffic:
    """The requests that the settings name; raises InvalidValue on a file that holds none."""
    if settings.dataset_name == "random":
        return random_traffic(settings, seed, vocabulary)
    if settings.dataset_name == "sharegpt":
        return sharegpt(settings, seed, encoder)
    return from_lines(settings, seed, vocabulary, encoder)


def random_traffic(settings: TrafficSettings, seed: int, vocabulary: Vocabulary) -> Traffic:
    """Prompts of consecutive token ids from a random one on, lengths uniform; drawn as vLLM draws them."""
    generator = np.random.default_rng(seed)
    count, inputs, outputs = settings.num_prompts, settings.inputs, settings.outputs
    allowed = _allowed(vocabulary)
    input_lens = generator.integers(inputs.low, inputs.high + 1, size=count)
    output_lens = generator.integers(outputs.low, outputs.high + 1, size=count)
    offsets = generator.integers(0, vocabulary.size, size=count)
    prefix = allowed[generator.integers(0, len(allowed), size=settings.random_prefix_len)].tolist()
    arrivals = []
    for index in range(count):
        ids = allowed[(offsets[index] + index + np.arange(input_lens[index])) % len(allowed)].tolist()
        arrivals.append(Arrival(index, (*prefix, *ids), int(output_lens[index])))
    told = f"random: {_told(inputs)} in, {_told(outputs)} out"
    return Traffic(tuple(arrivals), f"{told}, after a prefix of {len(prefix)}" if prefix else told)


def sharegpt(settings: TrafficSettings, seed: int, encoder: Encoder | None) -> Traffic:
    """First question and length of the first answer of shuffled conversations, filtered as vLLM filters them."""
    path = Path(settings.dataset_path)
    if encoder is None:
        raise InvalidValue("--dataset-name sharegpt counts tokens; name a tokenizer by --tokenizer")
    try:
        entries = json.loads(_read(path))
    except ValueError as error:
        raise InvalidValue(f"--dataset-path {path}: is no JSON ({error}); give ShareGPT's list") from None
    if not isinstance(entries, list):
        raise InvalidValue(f"--dataset-path {path}: holds no list; give ShareGPT's list of conversations")
    talks = [talk for entry in entries if (talk := _talk(entry))]
    random.Random(seed).shuffle(talks)
    output = span_of("--output-len", settings.output_len) if settings.output_len else None
    generator = np.random.default_rng(seed)
    arrivals: list[Arrival] = []
    for question, answer in talks:
        if len(arrivals) == settings.num_prompts:
            break
        ids = encoder.encode(question, special=False)
        length = _draw(output, generator) if output else len(encoder.encode(answer, special=False))
        long_enough = len(ids) >= _LEAST_TOKENS and (output is not None or length >= _LEAST_TOKENS)
        if long_enough and len(ids) <= _MOST_PROMPT and len(ids) + length <= _MOST_TOKENS:
            arrivals.append(Arrival(len(arrivals), tuple(ids), length, text=question))
    if not arrivals:
        raise InvalidValue(f"--dataset-path {path}: holds no conversation of usable length; give ShareGPT's JSON file")
    return Traffic(tuple(arrivals), f"ShareGPT, {path.name}", notes=_fewer(settings, len(arrivals)))


def _talk(entry: Any) -> tuple[str, str] | None:
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or len(turns) < 2:
        return None
    texts = [turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2]]
    return (texts[0], texts[1]) if isinstance(texts[0], str) and isinstance(texts[1], str) else None


def from_lines(settings: TrafficSettings, seed: int, vocabulary: Vocabulary, encoder: Encoder | None) -> Traffic:
    """The lines of a JSONL file, in order.

    A line has `prompt` (text), `prompt_token_ids`, or `input_len` (random ids); `output_len` or `max_tokens` unless
    --output-len is given; and to be replayed `arrival` (seconds from the begin) or `timestamp` (seconds or ISO 8601,
    counted from the first line's).
    """
    path = Path(settings.dataset_name)
    if not path.is_file():
        raise InvalidValue(f"--dataset-name {settings.dataset_name!r} is unknown; use random, sharegpt or a JSONL file")
    lines = [(number, line) for number, line in enumerate(_read(path).splitlines(), 1) if line.strip()]
    output = span_of("--output-len", settings.output_len) if settings.output_len else None
    generator = np.random.default_rng(seed)
    arrivals: list[Arrival] = []
    moments: list[tuple[str, float] | None] = []
    for number, line in lines[: settings.num_prompts]:
        where = f"{path}, line {number}"
        entry = _entry(line, where)
        ids, text = _prompt(entry, where, vocabulary, encoder, generator)
        length = _draw(output, generator) if output else _length(entry, where, _OUTPUT_KEYS, "output_len")
        moments.append(_moment(entry, where))
        arrivals.append(Arrival(len(arrivals), ids, length, text=text))
    if not arrivals:
        raise InvalidValue(f"--dataset-name {path}: holds no request; give a JSONL file with one a line")
    notes = _fewer(settings, len(arrivals))
    if not any(moments):
        return Traffic(tuple(arrivals), path.name, notes=notes)
    return Traffic(_timed(arrivals, moments, path), f"{path.name}, replayed", timed=True, notes=notes)


def _timed(arrivals: Sequence[Arrival], moments: Sequence[tuple[str, float] | None], path: Path) -> tuple[Arrival, ...]:
    """The arrivals by rising time, numbered anew."""
    kinds = {moment[0] if moment else None for moment in moments}
    if len(kinds) > 1:
        raise InvalidValue(f"{path}: some lines have an arrival or timestamp, others not; give one kind in every line")
    times = [moment[1] for moment in moments if moment]
    first = min(times) if "timestamp" in kinds else 0.0
    ordered = sorted(zip(times, arrivals, strict=True), key=lambda pair: pair[0])
    return tuple(
        Arrival(index, each.prompt, each.output_len, moment - first, each.text)
        for index, (moment, each) in enumerate(ordered)
    )


def _entry(line: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise InvalidValue(f"{where}: is no JSON ({error}); give one object a line") from None
    if not isinstance(entry, dict):
        raise InvalidValue(f"{where}: is no JSON object; give one with prompt and output_len")
    return entry


def _prompt(
    entry: dict[str, Any], where: str, vocabulary: Vocabulary, encoder: Encoder | None, generator: np.random.Generator
) -> tuple[tuple[int, ...], str]:
    ids, text = entry.get("prompt_token_ids"), entry.get("prompt")
    if isinstance(text, list):
        ids, text = text, None
    if ids is not None:
        whole = isinstance(ids, list) and all(isinstance(each, int) and not isinstance(each, bool) for each in ids)
        if not whole or not ids:
            raise InvalidValue(f"{where}: prompt_token_ids is no list of token ids")
        top = max(ids) if not vocabulary.size else vocabulary.size - 1
        for token in ids:
            if not 0 <= token <= top:
                raise InvalidValue(f"{where}: token {token} is outside the vocabulary; use 0 to {top}")
        return tuple(ids), ""
    if isinstance(text, str) and text:
        return tuple(encoder.encode(text)) if encoder else (), text
    if any(key in entry for key in _INPUT_KEYS):
        length = _length(entry, where, _INPUT_KEYS, "input_len")
        allowed = _allowed(vocabulary)
        return tuple(allowed[generator.integers(0, len(allowed), size=length)].tolist()), ""
    raise InvalidValue(f"{where}: has no prompt; give prompt (text), prompt_token_ids, or input_len")


def _length(entry: dict[str, Any], where: str, keys: Sequence[str], name: str) -> int:
    found = next((entry[key] for key in keys if key in entry), None)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        way = ", or --output-len for all lines" if name == "output_len" else ""
        raise InvalidValue(f"{where}: {name} is {found}; give a whole number from 1 up{way}")
    return found


def _moment(entry: dict[str, Any], where: str) -> tuple[str, float] | None:
    key = next((key for key in _ARRIVAL_KEYS if key in entry), None)
    if key is None:
        return None
    value = entry[key]
    if key == "timestamp" and isinstance(value, str):
        try:
            return key, datetime.fromisoformat(value).timestamp()
        except ValueError:
            raise InvalidValue(f"{where}: timestamp {value!r} is no time; give seconds, or ISO 8601") from None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0.0 <= value < float("inf"):
        raise InvalidValue(f"{where}: {key} {value!r} is no time; give seconds from 0 up")
    return key, float(value)


def _allowed(vocabulary: Vocabulary) -> np.ndarray:
    """Every token id but the special ones."""
    allowed = np.setdiff1d(np.arange(vocabulary.size), np.array(sorted(vocabulary.special), dtype=np.int64))
    if not len(allowed):
        raise InvalidValue("random prompts need the vocabulary's size; name the model's tokenizer by --tokenizer")
    return allowed


def _draw(span: Span, generator: np.random.Generator) -> int:
    return int(generator.integers(span.low, span.high + 1))


def _told(span: Span) -> str:
    return str(span.low) if span.low == span.high else f"{span.low}–{span.high}"


def _fewer(settings: TrafficSettings, found: int) -> tuple[str, ...]:
    if found >= settings.num_prompts:
        return ()
    return (f"the dataset holds {found} usable requests of the {settings.num_prompts} asked for; each is sent once",)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidValue(f"dataset {path} cannot be read ({error}); give a readable file") from None
