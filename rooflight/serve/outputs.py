"""From the engine's tokens to a user's completions: text, stop texts, and the prompts that ask for several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rooflight.models.tokenizer import Tokenizer
from rooflight.serve.detokenize import Detokenizer
from rooflight.serve.params import SamplingParams
from rooflight.serve.request import Request, TokenLogprobs
from rooflight.serve.scheduler import Output


@dataclass(slots=True)
class Delta:
    """One completion's news: new text and tokens, and at the end why it ended (stop, length, abort).

    prompt_logprobs: on the first news of completion 0 only; a prompt's first token has none. cached_tokens: of the
    prompt, those that the prefix cache held.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    cached_tokens: int = 0


class Completion:
    """One request's text as it grows; it says when a stop text has ended it."""

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer | None):
        params = request.params
        self.index, self.request, self.ended = index, request, False
        self._wants_logprobs, self._min_tokens, self._tokens = params.logprobs is not None, params.min_tokens, 0
        self._ends = request.ends
        self._text = Detokenizer(
            tokenizer, params.stop, params.include_stop_str_in_output, params.skip_special_tokens, request.prompt
        )

    def news(self, output: Output) -> Delta:
        """What an engine's output means for a reader."""
        request, reason = output.request, output.finish_reason
        shown = output.tokens
        if reason == "stop" and shown and shown[-1] in self._ends:
            # The token that ends a text is not a part of it, but for whoever asks to see special tokens.
            shown = shown[:-1] if request.params.skip_special_tokens else shown
        # Counted here: by the time that this output is read, the request itself may be further.
        self._tokens += len(output.tokens)
        piece = self._text.add(shown, reason is not None, may_stop=self._tokens > self._min_tokens)
        delta = Delta(self.index, piece.text, output.tokens, cached_tokens=min(request.cached, len(request.prompt)))
        if self._wants_logprobs:
            delta.logprobs = [one for one in output.logprobs if one is not None]
        if output.prompt_logprobs is not None and self.index == 0:
            delta.prompt_logprobs = [None, *output.prompt_logprobs]
        if reason is not None:
            delta.finish_reason, delta.stop_reason = reason, request.stop_reason
        if piece.stop is not None:
            delta.finish_reason, delta.stop_reason = "stop", piece.stop
        self.ended = delta.finish_reason is not None
        return delta


@dataclass(slots=True)
class CompletionOutput:
    """A whole completion."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, delta: Delta) -> None:
        """Append a completion's news."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = (self.logprobs or []) + delta.logprobs
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its completions, `n` of them."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0

    def add(self, delta: Delta) -> None:
        """Take one completion's news."""
        self.outputs[delta.index].add(delta)
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        self.num_cached_tokens = max(self.num_cached_tokens, delta.cached_tokens)

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return all(output.finish_reason is not None for output in self.outputs)


def requests_for(
    request_id: str,
    prompt: Sequence[int],
    params: SamplingParams,
    max_model_len: int,
    eos_ids: frozenset[int],
    priority: int = 0,
) -> list[Request]:
    """The engine's requests behind one prompt: one for each of `n` completions, with a seed of its own."""
    room = max_model_len - len(prompt)
    limit = room if params.max_tokens is None else params.max_tokens
    requests = []
    for index in range(params.n):
        own = params
        if params.seed is not None and index:
            own = replace(params, seed=params.seed + index)
        name = request_id if params.n == 1 else f"{request_id}-{index}"
        requests.append(Request(name, prompt, own, max(limit, 1), priority, eos_ids))
    return requests
