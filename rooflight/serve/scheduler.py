"""`Scheduler`: which tokens of which requests the next step computes. Knows neither torch nor the clock.

There is no prefill and no decode: a request has tokens, of which some are computed, and each step lets it catch up
under a budget of tokens (Sarathi, 2308.16369; vLLM's V1 scheduler reads alike). A request goes on with one token a step
once it has caught up. A step may be made before the last one's tokens are known: what is in flight counts as standing.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

from rooflight.errors import InvalidValue, RooflightError
from rooflight.serve.kv_cache import BlockPool, chain
from rooflight.serve.request import Request, Status, TokenLogprobs
from rooflight.serve.step import Part, Result, Step


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """The scheduler's sizes, all known numbers. by_priority: lower `priority` first, else by arrival alone."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    num_blocks: int
    enable_prefix_caching: bool = True
    chunked_prefill: bool = True
    by_priority: bool = False


@dataclass(slots=True)
class Output:
    """A request's news of one step: new tokens, and at the end why it ended (stop, length or abort)."""

    request: Request
    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    prompt_logprobs: list[TokenLogprobs] | None = None
    embedding: list[float] | None = None
    finish_reason: str | None = None


@dataclass(slots=True)
class Admission:
    """How much of the prompts admitted since the last reading the prefix cache held."""

    queried_tokens: int = 0
    cached_tokens: int = 0


class Scheduler:
    """Admits, advances, preempts and ends requests; `schedule` makes a step, `settle` takes what it gave.

    say: is told of every preemption and its reason.
    """

    def __init__(self, config: SchedulerConfig, say: Callable[[str], None] | None = None):
        self.config, self._say = config, say
        self.pool = BlockPool(config.num_blocks)
        self.running: list[Request] = []
        self._waiting: list[tuple[tuple[int, int], Request]] = []
        self._requests: dict[str, Request] = {}
        self._slots = list(range(config.max_num_seqs))
        self._arrivals = self._steps = self._admissions = 0
        self._untold: list[Request] = []
        self.admission = Admission()

    @property
    def waiting(self) -> int:
        """Requests that wait for their first step, or for another after a preemption."""
        return len(self._requests) - len(self.running)

    @property
    def unfinished(self) -> int:
        """Requests that are waiting or running."""
        return len(self._requests)

    def add(self, request: Request, now: float) -> None:
        """Queue a request. Raises InvalidValue on one that could never run, and on an id that is taken."""
        if request.id in self._requests:
            raise InvalidValue(f"request id {request.id!r} is in use; give each request an id of its own")
        self.check(request)
        request.times.arrival = now
        request.order = self._arrivals
        self._arrivals += 1
        self._requests[request.id] = request
        heapq.heappush(self._waiting, (self._rank(request), request))

    def check(self, request: Request) -> None:
        """Raise InvalidValue on a request that could never run."""
        config = self.config
        if not request.prompt:
            raise InvalidValue("an empty prompt cannot be continued; give at least one token")
        longest = len(request.prompt) + request.max_tokens
        if longest > config.max_model_len:
            raise InvalidValue(
                f"a prompt of {len(request.prompt)} tokens and {request.max_tokens} new ones exceed the longest "
                f"context of {config.max_model_len}; shorten one of them"
            )
        if self._blocks_for(longest) > config.num_blocks:
            raise InvalidValue(
                f"{longest} tokens need {self._blocks_for(longest)} KV blocks of the {config.num_blocks} that there "
                "are; shorten the request, or serve with more memory for the cache"
            )
        if not config.chunked_prefill and len(request.prompt) > config.max_num_batched_tokens:
            raise InvalidValue(
                f"a prompt of {len(request.prompt)} tokens exceeds the {config.max_num_batched_tokens} of a step; "
                "allow chunked prefill or raise --max-num-batched-tokens"
            )

    def cancel(self, request_id: str, reason: str = "abort") -> Request | None:
        """End a request wherever it stands; what a launched step still computes for it is dropped."""
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, reason)
        return request

    def schedule(self, now: float) -> Step | None:
        """The next step, or None when no request can take one: none is there, or all wait for tokens in flight."""
        budget = self.config.max_num_batched_tokens
        parts: list[Part] = []
        preempted: list[Request] = []
        index = 0
        # Those that run are served in their rank's order, and room is taken from the last in rank: never from one that
        # has its part already.
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            count = self._wanted(request, budget)
            if count and not self._make_room(request, request.computed + count, preempted):
                break
            if count:
                parts.append(self._part(request, count))
                budget -= count
            index += 1
        if not preempted:
            self._admit(parts, budget, now)
        self._untold += preempted
        if not parts:
            return None
        self._steps += 1
        parts.sort(key=lambda part: part.count > 1)
        told, self._untold = tuple(self._untold), []
        return Step(self._steps, tuple(parts), told)

    def settle(self, step: Step, result: Result, now: float) -> list[Output]:
        """Take a step's tokens; the news of each request that is still wanted."""
        outputs: list[Output] = []
        sampled = 0
        for part in step.parts:
            request = part.request
            token, place = None, sampled
            if part.samples:
                token, sampled = result.tokens[sampled], sampled + 1
                request.in_flight -= 1
            if request.status is Status.FINISHED:
                continue
            if request.params.prompt_logprobs is not None:
                self._collect(request, part, result)
            if token is not None:
                logprobs = result.logprobs[place] if result.logprobs else None
                outputs.append(self._output(request, int(token), logprobs, now))
            elif request.id in result.embeddings:
                output = Output(request, [], [], embedding=result.embeddings[request.id], finish_reason="stop")
                self._end(request, output, now)
                outputs.append(output)
        return outputs

    def _collect(self, request: Request, part: Part, result: Result) -> None:
        """Add a part's prompt logprobs; a prompt that is computed again begins anew."""
        if request.prompt_logprobs is None or part.start == 0:
            request.prompt_logprobs = []
        request.prompt_logprobs += result.prompt_logprobs.get(request.id, ())

    def check_idle(self) -> None:
        """Raise RooflightError when, without any request, a block or a slot is missing."""
        if self._requests:
            return
        self.pool.check_idle()
        if len(self._slots) != self.config.max_num_seqs or self.running:
            raise RooflightError(f"{self.config.max_num_seqs - len(self._slots)} slots are in use without a request")

    def _rank(self, request: Request) -> tuple[int, int]:
        return (request.priority if self.config.by_priority else 0, request.order)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.config.block_size)

    def _wanted(self, request: Request, budget: int) -> int:
        """Tokens that a running request can take now."""
        behind = request.length - request.computed
        if request.in_flight and (request.params.needs_tokens or request.sampled >= request.max_tokens):
            # Its next token depends on one that is not known yet, or all that it may have are on their way.
            return 0
        return self._fitting(behind, budget)

    def _fitting(self, behind: int, budget: int) -> int:
        """Of the tokens that a request lacks, those that a step takes: without chunked prefill all or none.

        What exceeds a whole step, as a preempted request's prompt and output may, is cut nevertheless.
        """
        if budget < behind <= self.config.max_num_batched_tokens and not self.config.chunked_prefill:
            return 0
        return min(behind, budget)

    def _part(self, request: Request, count: int) -> Part:
        start = request.computed
        samples = start + count == request.length and not request.embed
        part = Part(request, start, count, samples, placeholder=request.in_flight > 0)
        request.computed += count
        request.in_flight += samples
        self._keep_full_blocks(request)
        return part

    def _make_room(self, request: Request, tokens: int, preempted: list[Request]) -> bool:
        """Blocks for `tokens` tokens of a running request; False when it was itself the one to give way."""
        missing = self._blocks_for(tokens) - len(request.blocks)
        while missing > self.pool.free:
            last = self.running[-1]
            self._preempt(last, missing)
            preempted.append(last)
            if last is request:
                return False
        if missing > 0:
            request.blocks += self.pool.take(missing)
        return True

    def _preempt(self, request: Request, missing: int) -> None:
        if self._say is not None:
            self._say(
                f"request {request.id} gives its {len(request.blocks)} KV blocks back after {request.computed} tokens: "
                f"{missing} were needed and {self.pool.free} free; it will be computed again"
            )
        self._leave(request)
        request.status = Status.WAITING
        request.computed = 0
        request.preemptions += 1
        heapq.heappush(self._waiting, (self._rank(request), request))

    def _admit(self, parts: list[Part], budget: int, now: float) -> None:
        """Let waiting requests in, strictly in their rank's order: nobody is passed by, so nobody starves."""
        while self._waiting and self._slots and budget > 0:
            _, request = self._waiting[0]
            if request.status is Status.FINISHED:
                heapq.heappop(self._waiting)
                continue
            if request.in_flight:
                return
            found = self._find_cached(request)
            start = len(found) * self.config.block_size
            count = self._fitting(request.length - start, budget)
            if not count:
                return
            # Room for all that stands, not only for this step's part: half a prompt would soon have to give way.
            fresh = self._blocks_for(request.length) - len(found)
            if fresh + self.pool.unused_among(found) > self.pool.free:
                return
            heapq.heappop(self._waiting)
            self.pool.share(found)
            request.blocks = found + self.pool.take(self._blocks_for(start + count) - len(found))
            request.computed = start
            request.kept = len(found)
            request.slot = heapq.heappop(self._slots)
            request.status = Status.RUNNING
            self._admissions += 1
            request.admissions = self._admissions
            if request.times.scheduled is None:
                request.times.scheduled, request.cached = now, start
            self.admission.queried_tokens += request.length
            self.admission.cached_tokens += start
            insort(self.running, request, key=self._rank)
            parts.append(self._part(request, count))
            budget -= count

    def _find_cached(self, request: Request) -> list[int]:
        """Cached blocks of what stands; its last token is always computed, for somebody must say what follows it."""
        if not self.config.enable_prefix_caching or request.params.prompt_logprobs is not None:
            return []
        self._extend_hashes(request, len(request.tokens))
        return self.pool.find(request.hashes[: (len(request.tokens) - 1) // self.config.block_size])

    def _extend_hashes(self, request: Request, tokens: int) -> None:
        size = self.config.block_size
        for index in range(len(request.hashes), tokens // size):
            parent = request.hashes[-1] if request.hashes else b""
            request.hashes.append(chain(parent, request.tokens[index * size : (index + 1) * size]))

    def _keep_full_blocks(self, request: Request) -> None:
        """Let others find the blocks that are full of known and computed tokens.

        A step that is not through yet may be built upon: later steps, and later layers' reads within it, run after its
        writes.
        """
        if not self.config.enable_prefix_caching:
            return
        full = min(request.computed, len(request.tokens)) // self.config.block_size
        if full > request.kept:
            self._extend_hashes(request, full * self.config.block_size)
            for index in range(request.kept, full):
                self.pool.keep(request.blocks[index], request.hashes[index])
            request.kept = full

    def _output(self, request: Request, token: int, logprobs: TokenLogprobs | None, now: float) -> Output:
        request.tokens.append(token)
        if request.times.first_token is None:
            request.times.first_token = now
        request.times.last_token = now
        output = Output(request, [token], [logprobs])
        if request.outputs == 1:
            output.prompt_logprobs = request.prompt_logprobs
        if token in request.ends and request.outputs > request.params.min_tokens:
            output.finish_reason = "stop"
            request.stop_reason = None if token in request.eos_ids else token
        elif request.outputs >= request.max_tokens:
            output.finish_reason = "length"
        if output.finish_reason is not None:
            self._end(request, output, now)
        elif request.status is Status.RUNNING:
            self._keep_full_blocks(request)
        return output

    def _end(self, request: Request, output: Output, now: float) -> None:
        if request.status is Status.RUNNING:
            self._keep_full_blocks(request)
        request.times.finished = now
        self._finish(request, output.finish_reason or "stop")

    def _finish(self, request: Request, reason: str) -> None:
        if request.status is Status.RUNNING:
            self._leave(request)
        request.status = Status.FINISHED
        request.finish_reason = reason
        del self._requests[request.id]
        if len(self._waiting) > 2 * self.waiting:
            # Those that ended while they waited; behind a queue that never empties they would pile up.
            self._waiting = [entry for entry in self._waiting if entry[1].status is Status.WAITING]
            heapq.heapify(self._waiting)

    def _leave(self, request: Request) -> None:
        """Give back what a running request holds."""
        self.running.remove(request)
        self.pool.release(request.blocks)
        heapq.heappush(self._slots, request.slot)
        request.blocks, request.slot = [], -1
