"""Whether a training step fits a device's memory, and which changes of its settings would make it fit."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from rooflight.errors import InvalidValue
from rooflight.models.config import ModelConfig
from rooflight.train.accounting import Prediction, setting_of
from rooflight.train.settings import TrainSettings
from rooflight.train.whole_step import whole_step
from rooflight.workload import memory, program, walk
from rooflight.workload.roofline import time_walk

GIB = 2**30
MOST_SHOWN = 4
# No walk of a changed step begins after this; one of an 8B takes about half a second.
BUDGET_SECONDS = 11.0
# Parts of the context to offer: half and a quarter; a shorter one is another job.
CONTEXTS = (2, 4)
# Rates nearer to each other than this are alike: then the lesser change is the better one.
ALIKE = 0.03
# What a step holds however its tokens are divided.
STATE = ("weights", "gradients", "optimizer")
Change = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Alternative:
    """Changed settings under which a step would fit: the flags, and what the step would then take.

    seconds: of a step; tokens_per_second: of it. Both None where there is no machine to predict for.
    """

    flags: str
    peak_bytes: float
    seconds: float | None
    tokens_per_second: float | None


@dataclass(frozen=True, slots=True)
class Spread:
    """What a step that fits in no way needs: its state, its leanest activations, and ranks that could hold both.

    ranks: least with state / ranks + activations ≤ capacity, as ZeRO-3 (1910.02054) divides the state; None where the
        activations of one row alone do not fit.
    """

    state_bytes: float
    activation_bytes: float
    ranks: int | None


def fit_sentence(
    config: ModelConfig, settings: TrainSettings, prediction: Prediction, capacity: float, where: str
) -> tuple[str, list[Alternative]]:
    """Whether the step fits `where`, in one sentence, and the alternatives that it offers where not."""
    found = prediction.memory
    need = f"needs {_gib(found.total)} at its peak ({found.peak_label}), {where} has {_gib(capacity)}"
    if found.total <= capacity:
        return f"fits: {need}", []
    offers = would_fit(config, settings, prediction, capacity)
    if offers:
        return f"does not fit: {need}; would fit with {' or '.join(map(_offer, offers))}", offers
    spread = spread_over(config, settings, capacity)
    alone = f"weights, gradients and optimizer alone take {_gib(spread.state_bytes)}"
    lean = f"{_gib(spread.activation_bytes)} of activations (one row, full recompute)"
    if spread.ranks is None:
        return f"does not fit: {need}; no change of precision or recompute is enough: {lean}; shorten --context", []
    return (
        f"does not fit: {need}; nothing that was tried makes it fit on one device: {alone}; by estimate ZeRO-3 over "
        f"{spread.ranks} such devices would hold it, the state divided among them and on each {lean}"
    ), []


def refuse_if_too_large(config: ModelConfig, settings: TrainSettings, prediction: Prediction, capacity: float) -> None:
    """Raise InvalidValue, with what would fit, where the predicted peak is beyond `capacity` bytes."""
    if prediction.peak_bytes > capacity:
        raise InvalidValue("the step " + fit_sentence(config, settings, prediction, capacity, "this device")[0])


def would_fit(
    config: ModelConfig, settings: TrainSettings, prediction: Prediction, capacity: float
) -> list[Alternative]:
    """Changes under which the step fits `capacity` bytes, by falling tokens/s; at most MOST_SHOWN.

    Of each kind the mildest that fits: smaller micro-batches, recomputation, bf16 moments, no fp32 masters, a shorter
    context; where fewer than two of them do, also several together.
    """
    search = _Search(config, settings, prediction, capacity)
    search.try_all(search.singles())
    if len(search.hits) < 2:
        search.try_all(search.combinations())
    if not search.hits:
        search.try_all(search.everything())
    return search.best()[:MOST_SHOWN]


class _Search:
    """Walks changed settings, as few as may do, and keeps those that fit."""

    def __init__(self, config: ModelConfig, settings: TrainSettings, prediction: Prediction, capacity: float):
        self.config, self.settings, self.prediction, self.capacity = config, settings, prediction, capacity
        self.hits: list[tuple[Change, Alternative]] = []
        self.states: dict[tuple[str, bool], float] = {}
        self.deadline = time.monotonic() + BUDGET_SECONDS
        self.moving = _moving(dict(prediction.memory.at_peak))
        self.room = capacity - (prediction.peak_bytes - self.moving)

    def singles(self) -> Iterator[list[Change]]:
        """A list for each kind of change, the mildest first."""
        yield self._rows()
        yield self._recomputes()
        yield self._moments()
        yield self._no_masters()
        yield self._contexts()

    def combinations(self) -> Iterator[list[Change]]:
        """Several changes together: first those that leave what is learned as it is, then those of precision."""
        recomputes, moments, masters = self._recomputes(), self._moments(), self._no_masters()
        rows = self._smaller()
        yield [full | micro for full in recomputes for micro in rows[:1] + rows[-1:]]
        lean = (recomputes[-1] if recomputes else {}) | (rows[-1] if rows else {})
        precisions = [moments, masters, [a | b for a in moments for b in masters]]
        for precision in precisions:
            yield [change for p in precision for change in (p | (recomputes[-1] if recomputes else {}), lean | p)]

    def everything(self) -> Iterator[list[Change]]:
        """All changes at once, with a shorter context too."""
        last = [kind[-1] for kind in (self._recomputes(), self._smaller(), self._moments(), self._no_masters()) if kind]
        together = {name: value for change in last for name, value in change.items()}
        yield [together | shorter for shorter in self._shorter()]

    def _smaller(self) -> list[Change]:
        size, batch = self.settings.micro, self.settings.batch_size
        return [{"micro_batch_size": m} for m in range(size - 1, 0, -1) if batch % m == 0]

    def _rows(self) -> list[Change]:
        """Smaller micro-batches, from the largest that may fit if activations follow the rows, and one above it."""
        return _from_likely(
            self._smaller(), lambda c: self.moving * c["micro_batch_size"] / self.settings.micro <= self.room
        )

    def _shorter(self) -> list[Change]:
        context = self.settings.context
        return [{"context": context // n} for n in CONTEXTS if context % n == 0]

    def _contexts(self) -> list[Change]:
        return _from_likely(self._shorter(), lambda c: self.moving * c["context"] / self.settings.context <= self.room)

    def _recomputes(self) -> list[Change]:
        order = ("none", "selective", "full")
        stronger = order[order.index(self.settings.recompute) + 1 :]
        return [{"recompute": name, "activation_gib": 0.0} for name in stronger]

    def _moments(self) -> list[Change]:
        return [{"optimizer_dtype": "bf16"}] if self.settings.optimizer_dtype == "fp32" else []

    def _no_masters(self) -> list[Change]:
        if not self.settings.master_weights or self.settings.dtype == "fp32":
            return []
        rounding = "nearest" if self.settings.optimizer == "muon" else "stochastic"
        return [{"master_weights": False, "rounding": rounding}]

    def try_all(self, kinds: Iterable[list[Change]]) -> None:
        """Of each list keep the first change that fits, with larger micro-batches than one row where those fit too."""
        for changes in kinds:
            for change in changes:
                moving = self._try(change)
                if moving is not None:
                    self._grow(change, moving)
                    break

    def _grow(self, change: Change, moving: float) -> None:
        if change.get("micro_batch_size") != 1 or len(change) < 2:
            return
        hit = self.hits[-1][1]
        likely = [
            c for c in self._smaller() if hit.peak_bytes + moving * (c["micro_batch_size"] - 1) <= 0.98 * self.capacity
        ]
        if likely and likely[0]["micro_batch_size"] > 1 and self._try(change | likely[0]) is not None:
            del self.hits[-2]

    def _try(self, change: Change) -> float | None:
        """Walk the changed step; bytes of its activations at the peak when it fits, else None."""
        if time.monotonic() > self.deadline or self._least(change) > self.capacity:
            return None
        settings = replace(self.settings, **change)
        walked = _walk(self.config, settings)
        found = memory.over_time(walked, self.capacity)
        self.states[_precision(settings)] = float(walked.standing["optimizer"])
        if not found.fits:
            return None
        seconds = rate = None
        if self.prediction.machine is not None:
            timed = time_walk(walked, self.prediction.machine, graph=False)
            seconds = whole_step(timed, settings.micro_batches).expected_seconds
            rate = settings.batch_size * settings.context / seconds
        self.hits.append((change, Alternative(flags_of(change), found.total, seconds, rate)))
        return _moving(dict(found.at_peak))

    def _least(self, change: Change) -> float:
        """Bytes that stand when the optimizer runs, under a change: what is too much then need not be walked."""
        found, settings = self.prediction.memory, replace(self.settings, **change)
        optimizer = self.states.get(_precision(settings))
        if optimizer is None:
            kinds = zip(_states_each(settings), _states_each(self.settings), strict=True)
            optimizer = found.optimizer * min(after / before for after, before in kinds)
        return found.weights + found.gradients + optimizer

    def best(self) -> list[Alternative]:
        """By falling tokens/s, without those that change more than another and are no faster."""

        def rate(hit: Alternative) -> float:
            return hit.tokens_per_second or 0.0

        def beaten(change: Change, hit: Alternative) -> bool:
            lesser = [other for given, other in self.hits if given.items() < change.items()]
            return any(rate(other) * (1 + ALIKE) >= rate(hit) for other in lesser)

        left = [hit for change, hit in self.hits if not beaten(change, hit)]
        return sorted(left, key=rate, reverse=True)


def _from_likely(changes: list[Change], likely: Any) -> list[Change]:
    """The changes from one before the first that is likely to fit; all are estimates until they are walked."""
    first = next((index for index, change in enumerate(changes) if likely(change)), len(changes))
    return changes[max(first - 1, 0) :]


def _moving(sizes: dict[str, float]) -> float:
    return sum(size for kind, size in sizes.items() if kind not in STATE)


def _precision(settings: TrainSettings) -> tuple[str, bool]:
    """What the size of the optimizer's states depends on."""
    return settings.optimizer_dtype, settings.master_weights


def _states_each(settings: TrainSettings) -> tuple[int, ...]:
    """Bytes of optimizer state for a parameter: AdamW's moments and master; with Muon, a hidden matrix's too."""
    masters = settings.master_weights and settings.dtype != "fp32"
    adamw = 2 * (4 if settings.optimizer_dtype == "fp32" else 2) + 4 * masters
    if settings.optimizer != "muon":
        return (adamw,)
    # One momentum in the type of what is stored, which is the master where there is one.
    return adamw, (8 if masters else 4 if settings.dtype == "fp32" else 2)


def spread_over(config: ModelConfig, settings: TrainSettings, capacity: float) -> Spread:
    """What is left when nothing fits: the state as it is, one row fully recomputed, and ranks that could hold them."""
    lean = replace(settings, recompute="full", activation_gib=0.0, micro_batch_size=1, batch_size=1)
    walked = _walk(config, lean)
    found = memory.over_time(walked, capacity)
    state = found.weights + found.gradients + found.optimizer
    moving = max(_moving(now) for now in memory.play(walked))
    room = capacity - moving
    return Spread(state, moving, math.ceil(state / room) if room > 0 else None)


def flags_of(change: Change) -> str:
    """Changed settings as the flags that make them; what is the default then is left out."""
    silent = {"activation_gib": 0.0, "rounding": "nearest"}
    written = []
    for name, value in change.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            written.append(f"--{'' if value else 'no-'}{flag}")
        elif silent.get(name) != value:
            written.append(f"--{flag} {value}")
    return " ".join(written)


def _walk(config: ModelConfig, settings: TrainSettings) -> walk.Walk:
    plan = setting_of(settings, config)
    if plan.recipe is not None:
        plan = replace(plan, recipe=replace(plan.recipe, micro_batches=min(settings.micro_batches, 2)))
    return walk.dry(lambda: program.decoder(config, plan, "cpu", fold=True))


def _offer(found: Alternative) -> str:
    time = "" if found.seconds is None else f", {found.seconds:.3g} s a step"
    return f"{found.flags} ({_gib(found.peak_bytes)}{time})"


def _gib(size: float) -> str:
    gib = size / GIB
    return f"{gib:,.0f} GiB" if gib >= 999.5 else f"{gib:.4g} GiB" if gib >= 99.5 else f"{gib:.3g} GiB"
