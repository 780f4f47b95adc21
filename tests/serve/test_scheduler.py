"""The scheduler under random traffic, against a simulated KV memory and against each request computed alone."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from random import Random

import pytest

from rooflight.errors import InvalidValue
from rooflight.serve.params import SamplingParams, Structured
from rooflight.serve.request import Request, Status
from rooflight.serve.scheduler import Output, Scheduler, SchedulerConfig
from rooflight.serve.step import Pending, Step
from tests.serve.scripted import ScriptedRunner, config, expected, request

ANYTHING = Structured("json")  # whatever it is, it makes a request wait for its tokens


@dataclass
class Traffic:
    """Drives a scheduler: random arrivals, cancels between any two calls, up to `ahead` + 1 steps launched."""

    config: SchedulerConfig
    seed: int
    ahead: int = 0
    cancelled_share: float = 0.0
    time: float = 0.0
    outputs: dict[str, list[Output]] = field(default_factory=dict)
    live: dict[str, Request] = field(default_factory=dict)
    everyone: list[Request] = field(default_factory=list)
    log: list[tuple] = field(default_factory=list)
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.random = Random(self.seed)
        self.orders: dict[Request, int] = {}
        self.untold: list[Request] = []
        self.scheduler = Scheduler(self.config)
        self.runner = ScriptedRunner(self.config)
        self.launched: deque[tuple[Step, Pending]] = deque()

    def rank(self, request: Request) -> tuple[int, int]:
        return (request.priority if self.config.by_priority else 0, self.orders[request])

    def run(self, arrivals: list[Request], burst: int = 3) -> None:
        """Until every request has ended; each one that is to be cancelled is so at a random moment of its life."""
        pending = deque(arrivals)
        doomed = {item for item in arrivals if self.random.random() < self.cancelled_share}
        moments: dict[int, list[Request]] = {}
        turn = idle = 0
        while pending or self.live or self.launched:
            turn += 1
            for _ in range(self.random.randint(0, burst)):
                if pending:
                    self.arrive(pending.popleft())
                    item = self.everyone[-1]
                    if item in doomed:
                        moments.setdefault(turn + int(self.random.expovariate(0.07)), []).append(item)
            # Between any two of the phases: cancelled before its first step, in flight, preempted, between steps.
            due = moments.pop(turn, [])
            self.cancel(due[::3])
            step = self.schedule()
            self.cancel(due[1::3])
            while len(self.launched) > (self.ahead if step is not None else 0):
                self.settle()
                self.cancel(due[2::3])
                due = []
            self.cancel(due[2::3])
            idle = 0 if step is not None or self.launched or not self.live else idle + 1
            assert idle < 2, "nothing is launched, and yet nobody may run"
        self.scheduler.check_idle()

    def arrive(self, item: Request) -> None:
        self.time += 1.0
        self.scheduler.add(item, self.time)
        self.live[item.id] = item
        self.orders[item] = len(self.everyone)
        self.everyone.append(item)

    def cancel(self, items: list[Request]) -> None:
        for item in items:
            assert (self.scheduler.cancel(item.id) is item) == (self.live.pop(item.id, None) is not None)

    def schedule(self) -> Step | None:
        before = {name: (item.status, item.admissions) for name, item in self.live.items()}
        step = self.scheduler.schedule(self.time)
        assert self.scheduler.unfinished == len(self.live)
        assert self.scheduler.running == sorted(self.scheduler.running, key=self.rank)
        running = [item for item in self.live.values() if item.status is Status.RUNNING]
        assert self.scheduler.waiting == len(self.live) - len(running)
        held = {block for item in running for block in item.blocks}
        assert len(held) == self.scheduler.pool.used
        left = [item for name, item in self.live.items() if before[name][0] is not item.status is Status.WAITING]
        self.untold += left
        if step is None:
            return None
        self._check_order(step, before, left)
        assert sorted(item.id for item in step.preempted) == sorted(item.id for item in self.untold)
        self.untold.clear()
        self.preemptions += len(step.preempted)
        parts = [(part.request.id, part.start, part.count, part.samples, part.placeholder) for part in step.parts]
        self.log.append((step.number, parts, [item.id for item in step.preempted]))
        self.launched.append((step, self.runner.launch(step)))
        return step

    def _check_order(self, step: Step, before: dict[str, tuple[Status, int]], left: list[Request]) -> None:
        admitted = [part for part in step.parts if before[part.request.id][0] is Status.WAITING]
        waiting = [self.rank(item) for item in self.live.values() if item.status is Status.WAITING]
        assert not admitted or not left
        for part in admitted:
            assert part.request.admissions != before[part.request.id][1]
            assert all(self.rank(part.request) < rank for rank in waiting), "somebody was passed by"
        for item in left:
            assert all(self.rank(part.request) < self.rank(item) for part in step.parts)
        if not self.config.chunked_prefill:
            for part in step.parts:
                whole = part.samples or part.request.embed
                assert whole or len(part.request.tokens) > self.config.max_num_batched_tokens

    def settle(self) -> None:
        step, pending = self.launched.popleft()
        self.time += 1.0
        for output in self.scheduler.settle(step, pending.result(), self.time):
            item = output.request
            assert self.live[item.id] is item, "news of a request that has ended"
            self.outputs.setdefault(item.id, []).append(output)
            if output.finish_reason is not None:
                assert self.live.pop(item.id).status is Status.FINISHED

    def check_all(self) -> None:
        """Every request that was not cancelled has what it has alone; a cancelled one has the begin of it."""
        for item in self.everyone:
            got = self.outputs.get(item.id, [])
            if item.embed:
                assert item.finish_reason == "abort" or [len(output.embedding or ()) for output in got] == [1]
                continue
            tokens = [token for output in got for token in output.tokens]
            want, reason = expected(item)
            assert item.tokens == [*item.prompt, *tokens]
            if item.finish_reason == "abort":
                assert tokens == want[: len(tokens)]
            else:
                assert (tokens, item.finish_reason) == (want, reason)
                assert [output.finish_reason for output in got] == [None] * (len(got) - 1) + [reason]
                assert item.times.arrival <= item.times.scheduled <= item.times.first_token <= item.times.finished  # type: ignore[operator]
            if got and item.params.prompt_logprobs is not None:
                assert [told.token for told in got[0].prompt_logprobs or ()] == item.prompt[1:]
            if item.params.logprobs is not None:
                assert [told.token for output in got for told in output.logprobs if told] == tokens


def requests(seed: int, count: int, longest_prompt: int = 30, longest_output: int = 14) -> list[Request]:
    """Requests of every kind: many begin alike, some repeat a whole prompt, some end by a stop token."""
    random = Random(seed)
    shared = [[random.randrange(24) for _ in range(longest_prompt)] for _ in range(3)]
    made: list[Request] = []
    for number in range(count):
        length = random.randint(1, longest_prompt)
        same = random.randint(0, length) if random.random() < 0.6 else 0
        prompt = random.choice(shared)[:same] + [random.randrange(24) for _ in range(length - same)]
        if made and random.random() < 0.15:
            prompt = list(random.choice(made).prompt)
        kind = random.random()
        if kind < 0.06:
            made.append(Request(f"r{number}", prompt, SamplingParams(), 0, random.randint(-2, 2), embed=True))
            continue
        params: dict = {}
        if random.random() < 0.5:
            params = {
                "stop_token_ids": (random.randrange(24), random.randrange(24)),
                "min_tokens": random.choice((0, 3)),
            }
        if kind < 0.16:
            params["structured"] = ANYTHING
        if 0.16 < kind < 0.26:
            params["prompt_logprobs"] = 1
        if 0.26 < kind < 0.36:
            params["logprobs"] = 0
        made.append(request(f"r{number}", prompt, random.randint(1, longest_output), random.randint(-2, 2), **params))
    return made


SETTINGS = {
    "ample": config(num_blocks=64),
    "tiny": config(num_blocks=12),
    "tiny, long blocks": config(num_blocks=6, block_size=8),
    "tiny, by priority": config(num_blocks=13, by_priority=True),
    "tiny, whole prompts": config(num_blocks=12, chunked_prefill=False, max_num_batched_tokens=32),
    "tiny, no prefix cache": config(num_blocks=12, enable_prefix_caching=False),
    "one slot": config(num_blocks=12, max_num_seqs=1),
    "budget below slots": config(num_blocks=40, max_num_seqs=8, max_num_batched_tokens=3),
    "blocks of one": config(num_blocks=48, block_size=1, max_num_batched_tokens=7),
}


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("name", SETTINGS)
def test_random_traffic_gives_what_each_request_has_alone(name: str, ahead: int) -> None:
    for seed in range(3):
        traffic = Traffic(SETTINGS[name], seed, ahead, cancelled_share=0.2)
        traffic.run(requests(seed, 60))
        traffic.check_all()
        assert traffic.preemptions > 0 or "tiny" not in name


@pytest.mark.parametrize("ahead", [0, 1])
def test_two_thousand_requests_a_third_cancelled_leave_nothing_behind(ahead: int) -> None:
    traffic = Traffic(config(num_blocks=40, max_num_seqs=8, max_num_batched_tokens=48), 5, ahead, cancelled_share=1 / 3)
    traffic.run(requests(9, 2000, 40, 20), burst=4)
    traffic.check_all()
    scheduler = traffic.scheduler
    assert sum(item.finish_reason == "abort" for item in traffic.everyone) > 300
    assert traffic.preemptions > 20
    assert scheduler.pool.free == scheduler.pool.total and scheduler.pool.used == 0
    assert not scheduler.running and not scheduler.waiting and not scheduler._waiting and not scheduler._requests
    assert sorted(scheduler._slots) == list(range(8))
    assert all(item.slot == -1 and not item.blocks and not item.in_flight for item in traffic.everyone)


def test_the_same_traffic_makes_the_same_decisions() -> None:
    logs = []
    for _ in range(2):
        traffic = Traffic(SETTINGS["tiny, by priority"], 3, 1, cancelled_share=0.2)
        traffic.run(requests(4, 80))
        logs.append(traffic.log)
    assert logs[0] == logs[1]


def alone_in(scheduler: Scheduler, runner: ScriptedRunner, item: Request) -> list[Step]:
    """Run one request to its end; the steps that it took."""
    scheduler.add(item, 0.0)
    steps = []
    while (step := scheduler.schedule(0.0)) is not None:
        steps.append(step)
        scheduler.settle(step, runner.launch(step).result(), 0.0)
    return steps


def test_long_prompts_are_cut_to_the_budget() -> None:
    sizes = config()
    steps = alone_in(Scheduler(sizes), ScriptedRunner(sizes), request("a", range(20), 3))
    told = [(part.start, part.count, part.samples) for step in steps for part in step.parts]
    assert told == [(0, 16, False), (16, 4, True), (20, 1, True), (21, 1, True)]


def test_whole_prompts_wait_for_a_step_of_their_own() -> None:
    sizes = config(chunked_prefill=False)
    scheduler, runner = Scheduler(sizes), ScriptedRunner(sizes)
    for name, length in (("a", 10), ("b", 9), ("c", 1)):
        scheduler.add(request(name, [ord(name)] * length, 2), 0.0)
    told = []
    while (step := scheduler.schedule(0.0)) is not None:
        told.append([(part.request.id, part.count) for part in step.parts])
        scheduler.settle(step, runner.launch(step).result(), 0.0)
    # b does not fit beside a's prompt, and c does not pass it by; then b's 9 fit beside a's one.
    assert told == [[("a", 10)], [("a", 1), ("c", 1), ("b", 9)], [("b", 1), ("c", 1)]]


def test_a_preempted_request_that_outgrew_the_budget_comes_back_without_chunked_prefill() -> None:
    sizes = config(chunked_prefill=False, max_num_batched_tokens=8, num_blocks=8)
    traffic = Traffic(sizes, 0)
    traffic.run([request("a", range(8), 20), request("b", range(1, 8), 20)])
    traffic.check_all()
    assert traffic.preemptions > 0


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 16])
def test_a_repeated_prompt_is_cached_but_for_what_must_be_computed(length: int) -> None:
    sizes = config()
    scheduler, runner = Scheduler(sizes), ScriptedRunner(sizes)
    alone_in(scheduler, runner, request("a", range(length), 1))
    again = request("b", range(length), 1)
    alone_in(scheduler, runner, again)
    # Whole blocks of 4, without the last token.
    assert again.cached == (length - 1) // 4 * 4
    assert (scheduler.admission.queried_tokens, scheduler.admission.cached_tokens) == (2 * length, again.cached)


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_conversation_finds_its_own_answer_in_the_cache(ahead: int) -> None:
    traffic = Traffic(config(), 0, ahead)
    traffic.run([first := request("a", range(5), 8)])
    traffic.run([second := request("b", [*first.tokens, 1, 2, 3], 2)])
    traffic.check_all()
    # 13 tokens, whose last was never computed: three blocks.
    assert second.cached == 12


def test_what_a_preempted_request_computes_again_is_kept_again() -> None:
    # a grows until it has every block, so that nothing of b is left in the cache when b comes back.
    traffic = Traffic(config(num_blocks=8), 0)
    again = request("b", range(4, 13), 20)
    traffic.run([request("a", range(4), 28), again])
    traffic.run([request("c", [*range(4, 13), 1, 2, 3], 1)])
    traffic.check_all()
    assert again.preemptions > 0
    assert traffic.everyone[2].cached == 8


def test_equal_prompts_of_one_step_share_their_blocks() -> None:
    sizes = config(max_num_batched_tokens=64)
    scheduler, runner = Scheduler(sizes), ScriptedRunner(sizes)
    for name in "abc":
        scheduler.add(request(name, range(10), 2), 0.0)
    step = scheduler.schedule(0.0)
    assert step is not None
    assert sorted(part.count for part in step.parts) == [2, 2, 10]
    assert scheduler.pool.used == 2 + 3
    runner.launch(step)


def test_prompt_logprobs_take_nothing_from_the_cache() -> None:
    sizes = config()
    scheduler, runner = Scheduler(sizes), ScriptedRunner(sizes)
    alone_in(scheduler, runner, request("a", range(12), 1))
    again = request("b", range(12), 1, prompt_logprobs=0)
    alone_in(scheduler, runner, again)
    assert again.cached == 0


def test_cached_counts_the_first_admission_not_what_a_preempted_request_finds_of_itself() -> None:
    traffic = Traffic(config(num_blocks=8), 0)
    items = [request("a", range(8), 16), request("b", range(8, 16), 16)]
    traffic.run(items)
    traffic.check_all()
    assert items[1].preemptions > 0
    assert [item.cached for item in items] == [0, 0]


def test_preemptions_of_a_schedule_without_a_step_are_told_with_the_next() -> None:
    # a waits for its token in flight; b, the last in rank, finds no block to go on with: nobody has a part.
    sizes = config(num_blocks=4)
    scheduler, runner = Scheduler(sizes), ScriptedRunner(sizes)
    scheduler.add(request("a", range(5), 6, structured=ANYTHING), 0.0)
    scheduler.add(request("b", range(7, 15), 6), 0.0)
    told, launched = 0, deque()
    while scheduler.unfinished or launched:
        step = scheduler.schedule(0.0)
        if step is not None:
            told += len(step.preempted)
            launched.append((step, runner.launch(step)))
        while len(launched) > (1 if step is not None else 0):
            before, pending = launched.popleft()
            scheduler.settle(before, pending.result(), 0.0)
    requests_ = [part.request for step in runner.steps for part in step.parts]
    assert told == sum(item.preemptions for item in set(requests_)) > 0


def test_an_id_that_comes_again_is_another_tenant_of_its_slot() -> None:
    sizes = config(enable_prefix_caching=False)
    scheduler, runner = Scheduler(sizes), ScriptedRunner(sizes)
    other = request("other", range(4), 20)
    first, second = request("a", range(6), 9), request("a", range(9, 20), 9)
    scheduler.add(first, 0.0)
    scheduler.add(other, 0.0)
    for turn in range(40):
        if turn == 2:
            scheduler.cancel("a")
            scheduler.add(second, 0.0)
        step = scheduler.schedule(0.0)
        if step is None:
            break
        scheduler.settle(step, runner.launch(step).result(), 0.0)
    assert second.tokens[11:] == expected(second)[0] and other.tokens[4:] == expected(other)[0]


def test_cancelled_waiting_requests_are_forgotten() -> None:
    sizes = config(max_num_seqs=1, by_priority=True)
    scheduler = Scheduler(sizes)
    scheduler.add(request("runs", range(4), 50), 0.0)
    assert scheduler.schedule(0.0) is not None
    for number in range(1000):
        scheduler.add(request(str(number), range(4), 4, priority=9), 0.0)
        scheduler.cancel(str(number))
        assert scheduler.waiting == 0 and len(scheduler._waiting) < 10


def test_min_tokens_and_both_ends() -> None:
    sizes = config()
    free = request("free", range(6), 12)
    alone_in(Scheduler(sizes), ScriptedRunner(sizes), free)
    output = free.tokens[6:]
    assert len(output) == 12 and free.finish_reason == "length"
    for eos in (frozenset(), frozenset({output[4]})):
        for min_tokens in (0, output.index(output[4]) + 1):
            params = SamplingParams(stop_token_ids=() if eos else (output[4],), min_tokens=min_tokens)
            item = Request("a", list(range(6)), params, 12, eos_ids=eos)
            alone_in(Scheduler(sizes), ScriptedRunner(sizes), item)
            place = next((i for i, token in enumerate(output) if token == output[4] and i >= min_tokens), 11)
            assert item.tokens[6:] == output[: place + 1]
            stopped = output[place] == output[4]
            assert item.finish_reason == ("stop" if stopped else "length")
            assert item.stop_reason == (output[4] if stopped and not eos else None)
    params = SamplingParams(ignore_eos=True)
    item = Request("a", list(range(6)), params, 12, eos_ids=frozenset({output[4]}))
    alone_in(Scheduler(sizes), ScriptedRunner(sizes), item)
    assert item.tokens == free.tokens


@pytest.mark.parametrize(
    ("item", "changed", "words"),
    [
        (request("a", [], 4), {}, "an empty prompt"),
        (request("a", range(60), 5), {}, "a prompt of 60 tokens and 5 new ones exceed the longest context of 64"),
        (request("a", range(30), 5), {"num_blocks": 8}, "35 tokens need 9 KV blocks of the 8"),
        (request("a", range(17), 5), {"chunked_prefill": False}, "a prompt of 17 tokens exceeds the 16 of a step"),
        (request("taken", range(4)), {}, "request id 'taken' is in use"),
    ],
)
def test_what_could_never_run_is_refused_in_one_line(item: Request, changed: dict, words: str) -> None:
    scheduler = Scheduler(config(**changed))
    scheduler.add(request("taken", range(4)), 0.0)
    with pytest.raises(InvalidValue, match=words) as error:
        scheduler.add(item, 0.0)
    assert "\n" not in str(error.value)
    assert scheduler.unfinished == 1


def test_the_largest_that_fits_runs() -> None:
    sizes = config(num_blocks=16)
    steps = alone_in(Scheduler(sizes), ScriptedRunner(sizes), item := request("a", [1] * 44, 20))
    assert item.outputs == 20 and steps[-1].parts[0].context == 63


def test_preemptions_are_said() -> None:
    said: list[str] = []
    traffic = Traffic(config(num_blocks=8), 0)
    traffic.scheduler = Scheduler(traffic.config, said.append)
    traffic.run([request("a", range(8), 16), request("b", range(8, 16), 16)])
    assert len(said) == traffic.preemptions > 0
    assert all(text.startswith("request b gives its ") and "\n" not in text for text in said)
