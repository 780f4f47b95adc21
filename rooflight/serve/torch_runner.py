"""`TorchRunner`: runs the engine's steps on a CPU, or on a GPU with CUDA graphs for decode steps.

On a GPU `launch` only queues work: inputs go over in one copy, a sampled token stays on the device for the next step to
read, and reaches the host when `Pending.result` asks for it.
Legend: T new tokens  B parts  R sampled rows  D width  V vocabulary
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rooflight.models.layout import KVCache
from rooflight.models.transformer import Transformer
from rooflight.ops import batch as batches
from rooflight.serve.graphs import Graphs
from rooflight.serve.inputs import Fed, Inputs
from rooflight.serve.params import SamplingParams
from rooflight.serve.request import Request, TokenLogprobs
from rooflight.serve.sampler import Sampled, Sampler, row_of
from rooflight.serve.sampling_edits import Row
from rooflight.serve.sampling_logprobs import prompt_logprobs
from rooflight.serve.step import Part, Pending, Result, Step
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

    graph_batches, graph_tokens: batch sizes of decode steps and tokens of other steps that are captured as CUDA graphs;
    none on a CPU.
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
        graph_batches: tuple[int, ...] = (),
        graph_tokens: tuple[int, ...] = (),
    ):
        self._model = model
        self._device = model.embedding.weight.device
        self._cuda = self._device.type == "cuda"
        self._inputs = Inputs(cache, max_num_seqs, max_num_batched_tokens, max_model_len, self._device)
        self._sampler = Sampler(model.config.vocab_size, self._device, max_num_seqs, seed)
        self._masks = Masks(grammars) if grammars is not None else None
        self._graphs: Graphs | None = None
        with torch.inference_mode():
            if graph_batches:
                self._graphs = Graphs(model, self._inputs, graph_batches, graph_tokens)
            if self._cuda:
                self._warm_up(max_num_batched_tokens, max_num_seqs, max_model_len)

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
        """Give the graphs, the cache and the model back; a second time changes nothing."""
        for name in ("_graphs", "_inputs", "_model"):
            self.__dict__.pop(name, None)

    def _run(self, step: Step) -> _Waiting:
        graphs = self._graphs
        if graphs is not None and not _looks_inside(step):
            if graphs.takes_decode(step):
                return self._replay(step, graphs)
            if graphs.takes_mixed(step):
                return _Waiting(self._sample(step, graphs.mixed(step)), {}, {})
        fed = self._inputs.feed(step)
        hidden_TD = self._hidden(step, fed)
        prompts = self._prompt_logprobs(step, hidden_TD)
        embeddings = self._embed(step, hidden_TD)
        return _Waiting(self._sample(step, hidden_TD.index_select(0, fed.last_B)), prompts, embeddings)

    def _replay(self, step: Step, graphs: Graphs) -> _Waiting:
        """A captured decode step, which draws its tokens itself where nothing special is asked of them."""
        rows = self._rows(step.parts)
        draws = self._sampler.draws(rows)
        logits_BV, tokens_B = graphs.decode(step.parts, draws)
        if draws is not None:
            return _Waiting(Sampled(tokens_B), {}, {})
        return _Waiting(self._keep(self._sampler.sample(logits_BV, rows)), {}, {})

    def _sample(self, step: Step, last_BD: Tensor) -> Sampled | None:
        """Tokens of the parts that sample, from the hidden state of each part's last token."""
        places = [place for place, part in enumerate(step.parts) if part.samples]
        if not places:
            return None
        if len(places) < len(step.parts):
            last_BD = last_BD[torch.tensor(places, device=last_BD.device)]
        rows = self._rows([step.parts[place] for place in places])
        return self._keep(self._sampler.sample(self._model.head(last_BD), rows))

    def _keep(self, sampled: Sampled) -> Sampled:
        """Leave the tokens where the next step reads them."""
        if sampled.slots_B is not None:
            self._inputs.last_S.index_copy_(0, sampled.slots_B, sampled.tokens_B)
        return sampled

    def _rows(self, parts: Sequence[Part]) -> list[Row]:
        masks = self._masks.rows(parts) if self._masks is not None else [None] * len(parts)
        return [row_of(part, mask) for part, mask in zip(parts, masks, strict=True)]

    def _warm_up(self, most_tokens: int, slots: int, longest: int) -> None:
        """Run steps that nobody asked for, so that every kernel is compiled before the first request."""
        inputs = self._inputs
        # One short prompt; as many tokens as fit; and an odd number of them.
        for tokens in (min(9, longest, most_tokens), most_tokens, most_tokens - 1):
            parts: list[Part] = []
            while tokens and len(parts) < slots:
                count = min(tokens, longest)
                request = Request(f"warm-up {count}", [0] * count, SamplingParams(), 1)
                request.slot = len(parts)
                request.blocks = [inputs.spare_block] * -(-count // inputs.block_size)
                parts.append(Part(request, 0, count, samples=True))
                tokens -= count
            if parts:
                self._run(Step(0, tuple(parts)))
        torch.cuda.synchronize(self._device)

    def _hidden(self, step: Step, fed: Fed) -> Tensor:
        if self._cuda:
            return self._model.hidden(fed.tokens_T, fed.positions_T, fed.layout)
        # A CPU's attention reads context lengths from here instead of from a tensor.
        with batches.use(step.facts()):
            return self._model.hidden(fed.tokens_T, fed.positions_T, fed.layout)

    def _embed(self, step: Step, hidden_TD: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        end = 0
        for part in step.parts:
            request, end = part.request, end + part.count
            if request.embed and part.context == len(request.prompt):
                found[request.id] = hidden_TD[end - 1].float().cpu()
        return found

    def _prompt_logprobs(self, step: Step, hidden_TD: Tensor) -> dict[str, list[TokenLogprobs]]:
        found: dict[str, list[TokenLogprobs]] = {}
        end = 0
        for part in step.parts:
            first, end = end, end + part.count
            request, top = part.request, part.request.params.prompt_logprobs
            if top is None or part.start + 1 >= len(request.prompt):
                continue
            targets = list(request.prompt[part.start + 1 : part.context + 1])
            rows: list[TokenLogprobs] = []
            # A few rows at a time: a long prompt's logits are many times the size of everything else.
            for begin in range(0, len(targets), _PROMPT_ROWS):
                some_T = torch.tensor(targets[begin : begin + _PROMPT_ROWS], device=self._device)
                logits_TV = self._model.head(hidden_TD[first + begin : first + begin + len(some_T)])
                rows += prompt_logprobs(logits_TV, some_T, top).read()
            found[request.id] = rows
        return found


def _looks_inside(step: Step) -> bool:
    """Whether somebody wants more of a step than its sampled tokens."""
    return any(part.request.embed or part.request.params.prompt_logprobs is not None for part in step.parts)
