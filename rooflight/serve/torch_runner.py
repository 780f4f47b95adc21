"""`TorchRunner`: runs the engine's steps on a CPU, or on a GPU with CUDA graphs for decode steps.

On a GPU `launch` only queues work: inputs go over in one copy, a sampled token stays on the device for the next step to
read, and reaches the host when `Pending.result` asks for it.
Legend: T new tokens  B parts  R sampled rows  D width  V vocabulary
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from rooflight.models.layout import KVCache
from rooflight.models.transformer import Transformer
from rooflight.ops import batch as batches
from rooflight.serve.graphs import DecodeGraphs
from rooflight.serve.inputs import Fed, Inputs
from rooflight.serve.request import TokenLogprobs
from rooflight.serve.sampler import Sampled, Sampler, row_of
from rooflight.serve.sampling_logprobs import prompt_logprobs
from rooflight.serve.step import Pending, Result, Step
from rooflight.serve.structured import Grammars, Masks

# Rows of logits at once when a whole prompt's are wanted.
_PROMPT_ROWS = 256


@dataclass(slots=True)
class _Waiting:
    """A step under way: what is still on the device, and the events around it."""

    sampled: Sampled | None
    prompt_logprobs: dict[str, list[TokenLogprobs]]
    embeddings: dict[str, Tensor]
    seconds: float | None = None
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def result(self) -> Result:
        tokens, logprobs = self.sampled.read() if self.sampled is not None else ([], [])
        seconds = self.seconds
        if self.events is not None:
            self.events[1].synchronize()
            seconds = self.events[0].elapsed_time(self.events[1]) / 1e3
        embeddings = {name: vector.tolist() for name, vector in self.embeddings.items()}
        return Result(tokens, logprobs, self.prompt_logprobs, embeddings, seconds)


class TorchRunner:
    """Executes steps with a model and its paged cache, which has one block more than the scheduler knows.

    graph_sizes: batch sizes whose decode steps are captured as CUDA graphs; none on a CPU.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        grammars: Grammars | None,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        seed: int = 0,
        graph_sizes: tuple[int, ...] = (),
    ):
        self._model = model
        self._device = model.embedding.weight.device
        self._cuda = self._device.type == "cuda"
        self._inputs = Inputs(cache, max_num_seqs, max_num_batched_tokens, max_model_len, self._device)
        self._sampler = Sampler(model.config.vocab_size, self._device, max_num_seqs, seed)
        self._masks = Masks(grammars) if grammars is not None else None
        self._graphs: DecodeGraphs | None = None
        with torch.inference_mode():
            if graph_sizes:
                self._graphs = DecodeGraphs(model, self._inputs, list(graph_sizes))

    def launch(self, step: Step) -> Pending:
        """Queue a step; on a CPU it is through when this returns."""
        with torch.inference_mode():
            if not self._cuda:
                began = time.perf_counter()
                waiting = self._run(step)
                waiting.seconds = time.perf_counter() - began
                return waiting
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            waiting = self._run(step)
            events[1].record()
            waiting.events = events
            return waiting

    def close(self) -> None:
        """Give the graphs, the cache and the model back."""
        del self._graphs, self._inputs, self._model

    def _run(self, step: Step) -> _Waiting:
        prompts: dict[str, list[TokenLogprobs]] = {}
        embeddings: dict[str, Tensor] = {}
        sampling = [part for part in step.parts if part.samples]
        if self._graphs is not None and self._replays(step, self._graphs.largest):
            logits_RV = self._graphs.run(step.parts)
        else:
            fed = self._inputs.feed(step)
            hidden_TD = self._hidden(step, fed)
            prompts = self._prompt_logprobs(step, fed, hidden_TD)
            embeddings = self._embed(step, fed, hidden_TD)
            if not sampling:
                return _Waiting(None, prompts, embeddings)
            logits_RV = self._logits(step, fed, hidden_TD)
        masks = self._masks.rows(sampling) if self._masks is not None else [None] * len(sampling)
        rows = [row_of(part, mask) for part, mask in zip(sampling, masks, strict=True)]
        sampled = self._sampler.sample(logits_RV, rows)
        self._inputs.last_S.index_copy_(0, sampled.slots_B, sampled.tokens_B)
        return _Waiting(sampled, prompts, embeddings)

    @staticmethod
    def _replays(step: Step, largest: int) -> bool:
        """Whether a step is of the captured kind: a token a part, and each samples."""
        return step.sequences <= largest and all(
            part.count == 1 and part.samples and part.request.params.prompt_logprobs is None for part in step.parts
        )

    def _hidden(self, step: Step, fed: Fed) -> Tensor:
        if self._cuda:
            return self._model.hidden(fed.tokens_T, fed.positions_T, fed.layout)
        # A CPU's attention reads context lengths from here instead of from a tensor.
        with batches.use(step.facts()):
            return self._model.hidden(fed.tokens_T, fed.positions_T, fed.layout)

    def _logits(self, step: Step, fed: Fed, hidden_TD: Tensor) -> Tensor:
        """Logits after the last token of each part that samples."""
        last_R = fed.last_B
        if step.samples < step.sequences:
            places = [place for place, part in enumerate(step.parts) if part.samples]
            last_R = last_R[torch.tensor(places, device=last_R.device)]
        return self._model.head(hidden_TD.index_select(0, last_R))

    def _embed(self, step: Step, fed: Fed, hidden_TD: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for place, part in enumerate(step.parts):
            request = part.request
            if request.embed and part.context == len(request.prompt):
                found[request.id] = hidden_TD[int(fed.starts_B1[place + 1]) - 1].float().cpu()
        return found

    def _prompt_logprobs(self, step: Step, fed: Fed, hidden_TD: Tensor) -> dict[str, list[TokenLogprobs]]:
        found: dict[str, list[TokenLogprobs]] = {}
        for place, part in enumerate(step.parts):
            request, top = part.request, part.request.params.prompt_logprobs
            if top is None or part.start + 1 >= len(request.prompt):
                continue
            first = int(fed.starts_B1[place])
            targets = list(request.prompt[part.start + 1 : part.context + 1])
            rows: list[TokenLogprobs] = []
            # A few rows at a time: a long prompt's logits are many times the size of everything else.
            for begin in range(0, len(targets), _PROMPT_ROWS):
                some_T = torch.tensor(targets[begin : begin + _PROMPT_ROWS], device=self._device)
                logits_TV = self._model.head(hidden_TD[first + begin : first + begin + len(some_T)])
                rows += prompt_logprobs(logits_TV, some_T, top).read()
            found[request.id] = rows
        return found
