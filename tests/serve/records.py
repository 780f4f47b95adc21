"""Requests played by hand: the step records that an engine would give, beside a plain log of what happened when."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from rooflight.serve.engine import StepRecord
from rooflight.serve.params import SamplingParams
from rooflight.serve.request import Request
from rooflight.serve.step import Forecast


def step_record(number: int, began: float, ended: float, forecast: Forecast | None = None, **values) -> StepRecord:
    """A record with the values given and nothing else."""
    counts = "tokens sequences decodes prefill_tokens generated running waiting used_blocks total_blocks preempted"
    given: dict[str, Any] = dict.fromkeys((counts + " queried_tokens cached_tokens").split(), 0)
    given |= {"seconds": ended - began, "first": (), "finished": ()} | values
    return StepRecord(number=number, began=began, ended=ended, forecast=forecast, **given)


def request(name: str, prompt: int, max_tokens: int = 16, arrival: float = 0.0, **values) -> Request:
    """A request of a prompt of so many tokens that arrived at a moment."""
    made = Request(name, [1] * prompt, SamplingParams(max_tokens=max_tokens), max_tokens, **values)
    made.times.arrival = arrival
    return made


def give_token(one: Request, now: float) -> None:
    """What the scheduler does when a request gets a token."""
    one.tokens.append(7)
    one.times.first_token = now if one.times.first_token is None else one.times.first_token
    one.times.last_token = now


def end(one: Request, reason: str, now: float) -> None:
    """What the scheduler does when a request ends."""
    one.finish_reason, one.times.finished = reason, now


@dataclass
class Play:
    """A run's records, and for each request the moments of its tokens, why and when it ended."""

    records: list[StepRecord] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    token_times: dict[str, list[float]] = field(default_factory=dict)
    ends: dict[str, tuple[str, float]] = field(default_factory=dict)


def play(observe, seed: int = 0, steps: int = 400) -> Play:
    """Random traffic: requests come, stall for some steps as when preempted, end, or are cancelled early."""
    rng, told, now, running = random.Random(seed), Play(), 10.0, []
    for number in range(steps):
        began, now = now, now + rng.choice((0.004, 0.01, 0.03, 0.7))
        new = [
            request(f"{number}-{index}", rng.randint(1, 900), rng.randint(1, 12), began - rng.random())
            for index in range(rng.choice((0, 0, 0, 1, 2)))
        ]
        told.requests += new
        for one in new:
            one.times.scheduled = began
            told.token_times[one.id] = []
        first, finished, generated = [], [], 0
        for one in [*running, *new]:
            if rng.random() < 0.03:
                end(one, "abort", now)
            elif one not in new and rng.random() < 0.1:
                continue
            else:
                give_token(one, now)
                generated += 1
                told.token_times[one.id].append(now)
                if one.outputs == 1:
                    first.append(one)
                if one.outputs == one.max_tokens:
                    end(one, rng.choice(("length", "stop")), now)
            if one.finish_reason is not None:
                finished.append(one)
                told.ends[one.id] = one.finish_reason, now
        running = [one for one in [*running, *new] if one not in finished]
        prefill = sum(len(one.prompt) for one in new if len(one.prompt) > 1)
        record = step_record(
            number,
            began,
            now,
            Forecast(rng.random(), rng.random() / 2, "memory") if rng.random() < 0.8 else None,
            seconds=(now - began) * 0.9,
            tokens=generated + prefill,
            prefill_tokens=prefill,
            generated=generated,
            running=len(running),
            waiting=rng.randint(0, 4),
            used_blocks=rng.randint(0, 100),
            total_blocks=100,
            preempted=rng.randint(0, 1),
            queried_tokens=prefill,
            cached_tokens=prefill // 3,
            first=tuple(first),
            finished=tuple(finished),
        )
        told.records.append(record)
        observe(record)
    return told
