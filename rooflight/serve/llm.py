"""`LLM`: prompts in, completions out, in one call and one thread."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rooflight.errors import InvalidValue
from rooflight.serve.build import build, check_structured
from rooflight.serve.engine import Engine, StepRecord
from rooflight.serve.outputs import Completion, CompletionOutput, RequestOutput, requests_for
from rooflight.serve.params import SamplingParams
from rooflight.serve.request import Request
from rooflight.serve.settings import EngineSettings

Prompt = str | Sequence[int]


class LLM:
    """A model ready to generate: `LLM("./model").generate(["Once"], SamplingParams(max_tokens=32))`.

    settings: those of `EngineSettings`, by name. say: is told what takes long. on_step: is handed each step's record.
    """

    def __init__(
        self,
        model: str,
        *,
        say: Callable[[str], None] = lambda text: None,
        on_step: Callable[[StepRecord], None] | None = None,
        **settings: Any,
    ):
        self.settings = EngineSettings(model=model, **settings).check()
        self._built = build(self.settings, say)
        self.engine: Engine = self._built.engine
        self.engine.on_step = on_step
        self.source, self.plan, self.predictor = self._built.source, self._built.plan, self._built.predictor
        self.tokenizer, self.config = self.source.tokenizer, self.source.config
        self._numbers = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """The completions of each prompt, in the order of the prompts; params: one for all, or one each.

        A prompt is a text or a list of token ids. Raises InvalidValue, before anything runs, on what cannot be run.
        """
        listed = [prompts] if _is_prompt(prompts) else list(prompts)
        each = self._params(params, len(listed))
        results: list[RequestOutput] = []
        open_: dict[str, tuple[Completion, RequestOutput]] = {}
        for prompt, own in zip(listed, each, strict=True):
            result, requests = self._requests(prompt, own)  # type: ignore[arg-type]
            results.append(result)
            for index, request in enumerate(requests):
                open_[request.id] = Completion(index, request, self.tokenizer), result
        with self._abandoning([completion.request for completion, _ in open_.values()]):
            while open_:
                self._step(open_)
            # With a step ahead, what the last requests' stop texts made needless is still under way.
            while self.engine.has_work:
                self.engine.step()
        return results

    def embed(self, prompts: Prompt | Sequence[Prompt]) -> list[list[float]]:
        """The last hidden state of each prompt's last token, after the last norm: `width` numbers.

        Raises InvalidValue, before anything runs, on a prompt that cannot be run.
        """
        listed = [prompts] if _is_prompt(prompts) else list(prompts)
        requests = [Request(self._name(), self._ids(prompt), SamplingParams(), 0, embed=True) for prompt in listed]  # type: ignore[arg-type]
        for request in requests:
            self.engine.scheduler.check(request)
        found: dict[str, list[float]] = {}
        with self._abandoning(requests):
            while self.engine.has_work:
                for output in self.engine.step():
                    if output.embedding is not None:
                        found[output.request.id] = output.embedding
        return [found[request.id] for request in requests]

    def close(self) -> None:
        """Give the model's memory back."""
        self.engine.runner.close()

    @contextlib.contextmanager
    def _abandoning(self, requests: Sequence[Request]) -> Iterator[None]:
        """Queue requests; where what follows is interrupted, none of them goes on in a later call."""
        try:
            for request in requests:
                self.engine.add(request)
            yield
        except BaseException:
            for request in requests:
                self.engine.cancel(request.id)
            # The prefix cache counts on steps that were launched; one that was interrupted has written nothing.
            pool = self.engine.scheduler.pool
            pool.release(pool.take(pool.free))
            raise

    def _step(self, open_: dict[str, tuple[Completion, RequestOutput]]) -> None:
        for output in self.engine.step():
            found = open_.get(output.request.id)
            if found is None:
                continue
            completion, result = found
            result.add(completion.news(output))
            if completion.ended:
                del open_[output.request.id]
                if output.finish_reason is None:
                    # A stop text ended it, of which the engine knows nothing.
                    self.engine.cancel(output.request.id, "stop")

    def _requests(self, prompt: Prompt, params: SamplingParams) -> tuple[RequestOutput, list[Request]]:
        ids, name = self._ids(prompt), self._name()
        params.check(self.config.vocab_size)
        check_structured(self._built.grammars, params)
        requests = requests_for(name, ids, params, self.source.max_model_len, self.source.eos_ids)
        self.engine.scheduler.check(requests[0])
        outputs = [CompletionOutput(index) for index in range(params.n)]
        return RequestOutput(name, prompt if isinstance(prompt, str) else None, ids, outputs), requests

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidValue("the model has no tokenizer; give prompts as token ids, or name a tokenizer")
            return self.tokenizer.encode(prompt)
        ids, vocabulary = [int(token) for token in prompt], self.config.vocab_size
        outside = next((token for token in ids if not 0 <= token < vocabulary), None)
        if outside is not None:
            raise InvalidValue(f"token {outside} is outside the vocabulary of {vocabulary}; use 0 to {vocabulary - 1}")
        return ids

    def _params(
        self, params: SamplingParams | Sequence[SamplingParams] | None, prompts: int
    ) -> Sequence[SamplingParams]:
        if params is None:
            params = SamplingParams(**self.source.defaults)
        if isinstance(params, SamplingParams):
            return [params] * prompts
        if len(params) != prompts:
            raise InvalidValue(f"{len(params)} sampling params were given for {prompts} prompts; give one, or one each")
        return params

    def _name(self) -> str:
        return f"request-{next(self._numbers)}"


def _is_prompt(prompts: Any) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
