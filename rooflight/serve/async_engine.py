"""`AsyncEngine`: the engine on a thread of its own, and an asyncio face; text is made in the loop's thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

from rooflight.errors import EngineDead, InvalidValue, QueueFull
from rooflight.models.config import ModelConfig
from rooflight.models.tokenizer import Tokenizer
from rooflight.serve.build import Built, build, check_structured
from rooflight.serve.engine import Engine, StepRecord
from rooflight.serve.outputs import Completion, CompletionOutput, Delta, RequestOutput, requests_for
from rooflight.serve.params import SamplingParams
from rooflight.serve.request import Request
from rooflight.serve.scheduler import Output
from rooflight.serve.settings import EngineSettings

RECENT_STEPS = 512
_log = logging.getLogger(__name__)


class _Stream:
    """News of one prompt's completions, kept until they are fetched: a slow reader holds nobody up, itself apart."""

    def __init__(self) -> None:
        self._news: deque[Delta | Exception] = deque()
        # Of each completion the last news that nobody has fetched.
        self._unread: dict[int, Delta] = {}
        self._there = asyncio.Event()

    def put(self, news: Delta | Exception) -> None:
        last = self._unread.get(news.index) if isinstance(news, Delta) else None
        if last is not None and isinstance(news, Delta) and _joins(last, news):
            _join(last, news)
        else:
            self._news.append(news)
            if isinstance(news, Delta):
                self._unread[news.index] = news
        self._there.set()

    async def get(self) -> Delta:
        while not self._news:
            self._there.clear()
            await self._there.wait()
        news = self._news.popleft()
        if isinstance(news, Exception):
            raise news
        if self._unread.get(news.index) is news:
            del self._unread[news.index]
        return news


def _joins(last: Delta, news: Delta) -> bool:
    return (
        last.index == news.index and last.finish_reason is None and (last.logprobs is None) == (news.logprobs is None)
    )


def _join(last: Delta, news: Delta) -> None:
    """Unread news of one completion become one: what piles up grows by characters, not by objects."""
    last.text += news.text
    last.token_ids = last.token_ids + news.token_ids
    if last.logprobs is not None and news.logprobs is not None:
        last.logprobs = last.logprobs + news.logprobs
    last.finish_reason, last.stop_reason = news.finish_reason, news.stop_reason


class AsyncEngine:
    """Requests from coroutines, served by an engine that runs in a thread.

    max_queue: requests that may wait; more are refused with QueueFull.
    """

    def __init__(self, built: Built, settings: EngineSettings, max_queue: int = 4096):
        self.engine: Engine = built.engine
        self.settings, self.source, self.plan = settings, built.source, built.plan
        self.predictor = built.predictor
        self.config: ModelConfig = built.source.config
        self.tokenizer: Tokenizer | None = built.source.tokenizer
        self.directory: Path | None = built.source.directory
        self.eos_ids, self.defaults = built.source.eos_ids, dict(built.source.defaults)
        self.max_model_len = built.source.max_model_len
        self.max_queue = max_queue
        self.recent: deque[StepRecord] = deque(maxlen=RECENT_STEPS)
        self.draining = False
        self.error: BaseException | None = None
        self._grammars = built.grammars
        self._listeners: list[Callable[[StepRecord], None]] = []
        self._completions: dict[str, tuple[Completion, _Stream]] = {}
        self._embeddings: dict[str, tuple[Request, asyncio.Future[list[float]]]] = {}
        self._inbox: deque[tuple[str, Any]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self.engine.on_step = self._on_step

    @staticmethod
    def from_settings(
        settings: EngineSettings, say: Callable[[str], None] = _log.info, max_queue: int = 4096
    ) -> AsyncEngine:
        """Load the model and build its engine; `start` makes it run."""
        return AsyncEngine(build(settings, say), settings, max_queue)

    @property
    def errored(self) -> bool:
        """Whether a step has failed; nothing runs any more."""
        return self.error is not None

    @property
    def unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._completions) + len(self._embeddings)

    def add_listener(self, listener: Callable[[StepRecord], None]) -> None:
        """Call `listener` in the engine's thread with the record of each settled step."""
        self._listeners.append(listener)

    async def start(self) -> AsyncEngine:
        """Begin to serve, for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="rooflight-engine", daemon=True)
        self._thread.start()
        return self

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Take no more requests, let running ones end for so long, cancel the rest, and end the thread."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_seconds):
                while self.unfinished and not self.errored:
                    await asyncio.sleep(0.02)
        for name, (_, stream) in list(self._completions.items()):
            self._send("cancel", name)
            stream.put(EngineDead("the server is shutting down"))
        for name, (_, future) in list(self._embeddings.items()):
            self._send("cancel", name)
            if not future.done():
                future.set_exception(EngineDead("the server is shutting down"))
        self._completions.clear()
        self._embeddings.clear()
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        self.engine.runner.close()

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str, priority: int = 0
    ) -> AsyncGenerator[Delta, None]:
        """News of a prompt's completions as they come; leaving the iteration early cancels them.

        Raises InvalidValue on what cannot be run, QueueFull and EngineDead.
        """
        requests = await self._requests(prompt_ids, params, request_id, priority)
        stream = _Stream()
        open_ = {request.id for request in requests}
        for index, request in enumerate(requests):
            self._completions[request.id] = Completion(index, request, self.tokenizer), stream
            self._send("add", request)
        try:
            while open_:
                delta = await stream.get()
                if delta.finish_reason is not None:
                    open_.discard(requests[delta.index].id)
                yield delta
        finally:
            for request in requests:
                completion, _ = self._completions.get(request.id, (None, None))
                # One that has ended may have left its id to another.
                if completion is not None and completion.request is request:
                    del self._completions[request.id]
                    self._send("cancel", request.id)

    async def complete(
        self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str, priority: int = 0
    ) -> RequestOutput:
        """A prompt's whole completions."""
        outputs = [CompletionOutput(index) for index in range(params.n)]
        whole = RequestOutput(request_id, None, list(prompt_ids), outputs)
        async for delta in self.generate(prompt_ids, params, request_id, priority):
            whole.add(delta)
        return whole

    async def embed(self, prompt_ids: Sequence[int], request_id: str) -> list[float]:
        """The last hidden state of a prompt's last token, after the last norm."""
        self._admit(1)
        self._check_prompt(prompt_ids)
        request = Request(request_id, list(prompt_ids), SamplingParams(), 0, embed=True)
        self._check_free([request])
        self.engine.scheduler.check(request)
        future: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self._embeddings[request_id] = request, future
        self._send("add", request)
        try:
            return await future
        finally:
            self._embeddings.pop(request_id, None)
            if not future.done() or future.cancelled():
                self._send("cancel", request_id)

    async def _requests(
        self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str, priority: int
    ) -> list[Request]:
        self._admit(params.n)
        params.check(self.config.vocab_size)
        self._check_prompt(prompt_ids)
        if params.structured is not None:
            # Here, so that a bad grammar is the caller's error and not the engine's; a large one takes a while.
            await asyncio.to_thread(check_structured, self._grammars, params)
            # Others have come in the meantime, or the engine has stopped.
            self._admit(params.n)
        found = requests_for(request_id, list(prompt_ids), params, self.max_model_len, self.eos_ids, priority)
        self._check_free(found)
        self.engine.scheduler.check(found[0])
        return found

    def _check_free(self, requests: Sequence[Request]) -> None:
        for name in (request.id for request in requests):
            if name in self._completions or name in self._embeddings:
                raise InvalidValue(f"request id {name!r} is in use; give each request an id of its own")

    def _admit(self, count: int) -> None:
        if self.error is not None:
            raise EngineDead(f"the engine has stopped: {self.error}")
        if self.draining or self._stopping:
            raise EngineDead("the server is shutting down; it takes no more requests")
        waiting = self.engine.scheduler.waiting + len(self._inbox)
        if waiting + count > self.max_queue:
            raise QueueFull(f"{waiting} requests wait and {self.max_queue} may; try again later")

    def _check_prompt(self, prompt_ids: Sequence[int]) -> None:
        vocabulary = self.config.vocab_size
        outside = next((token for token in prompt_ids if not 0 <= token < vocabulary), None)
        if outside is not None:
            raise InvalidValue(f"token {outside} is outside the vocabulary of {vocabulary}; use 0 to {vocabulary - 1}")

    def _send(self, what: str, item: Any) -> None:
        with self._wake:
            self._inbox.append((what, item))
            self._wake.notify()

    # From here on: the engine's thread.

    def _on_step(self, record: StepRecord) -> None:
        self.recent.append(record)
        for listener in self._listeners:
            listener(record)

    def _run(self) -> None:
        try:
            while self._heed():
                outputs = self.engine.step()
                if outputs:
                    self._tell(self._deliver, outputs)
        except BaseException as error:
            # Whatever it is, nothing runs any more, and everybody who waits must hear of it.
            _log.exception("the engine has stopped")
            self.error = error
            self._tell(self._fail, error)

    def _heed(self) -> bool:
        """Take what was sent; wait while there is nothing to do. False when it is time to end."""
        with self._wake:
            while not self._inbox and not self._stopping and not self.engine.has_work:
                self._wake.wait()
            if self._stopping and not self._inbox:
                return False
            sent = list(self._inbox)
            self._inbox.clear()
        for what, item in sent:
            if what != "add":
                self.engine.cancel(item, "stop" if what == "stop" else "abort")
                continue
            try:
                self.engine.add(item)
            except InvalidValue as error:
                self._tell(self._refuse, item.id, error)
        return True

    def _tell(self, callback: Callable[..., None], *args: Any) -> None:
        if self._loop is not None:
            # A loop that has been closed has nobody left to tell.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(callback, *args)

    # From here on: the event loop's thread again.

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            name = output.request.id
            if output.embedding is not None:
                request, future = self._embeddings.get(name, (None, None))
                if future is not None and request is output.request and not future.done():
                    future.set_result(output.embedding)
                continue
            completion, stream = self._completions.get(name, (None, None))
            # Late news of a request that was cancelled, whose id another has by now, are not that other's.
            if completion is None or stream is None or completion.request is not output.request:
                continue
            stream.put(completion.news(output))
            if completion.ended:
                del self._completions[name]
                if output.finish_reason is None:
                    # A stop text ended it, of which the engine knows nothing.
                    self._send("stop", name)

    def _refuse(self, name: str, error: Exception) -> None:
        found = self._completions.pop(name, None)
        if found is not None:
            found[1].put(error)
        _, future = self._embeddings.get(name, (None, None))
        if future is not None and not future.done():
            future.set_exception(error)

    def _fail(self, error: BaseException) -> None:
        dead = EngineDead(f"the engine has stopped: {error}")
        for _, stream in self._completions.values():
            stream.put(dead)
        self._completions.clear()
        for _, future in self._embeddings.values():
            if not future.done():
                future.set_exception(dead)
