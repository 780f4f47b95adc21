"""What a benchmark hands to its report: rows of figures, one run or a wet and a dry one beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rooflight.serve.bench.roof import Roof
from rooflight.serve.bench.statistics import Distribution, Outcome, Statistics

TITLES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token (without the first)",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
    "latency": "Time of an iteration",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. unit: count, s, ms or a rate such as tok/s. key: as vLLM's JSON spells it. of_roof: share of it."""

    key: str
    label: str
    unit: str
    value: float | None
    of_roof: float | None = None
    group: str = ""


@dataclass(slots=True)
class Run:
    """The figures of one run. name: wet or dry. took: seconds of a real clock that a dry run took."""

    name: str
    machine: str
    rows: list[Row]
    outcomes: list[Outcome] = field(default_factory=list)
    took: float | None = None

    def value(self, key: str) -> float | None:
        return next((row.value for row in self.rows if row.key == key), None)


@dataclass(slots=True)
class Result:
    """A benchmark's runs. facts: what was run, for the report's head."""

    command: str
    model: str
    facts: list[str]
    runs: list[Run]
    notes: list[str] = field(default_factory=list)

    @property
    def ratios(self) -> dict[str, float | None]:
        """Dry over wet by row, where there are both; None where one of them has no figure, or wet is 0.

        How often a batch ran and how much its times differ say nothing of the prediction: they have no ratio.
        """
        if len(self.runs) < 2:
            return {}
        wet, dry = self.runs[0], self.runs[1]
        found: dict[str, float | None] = {}
        for row in wet.rows:
            other = None if row.key.startswith(("std_", "num_")) else dry.value(row.key)
            found[row.key] = other / row.value if row.value and other is not None else None
        return found

    def to_json(self, detailed: bool = False) -> dict[str, Any]:
        """The figures under vLLM's names; detailed: with every request's, in seconds."""
        return {
            "command": self.command,
            "model": self.model,
            "facts": self.facts,
            "runs": [_run_json(run, detailed) for run in self.runs],
            "ratio_dry_to_wet": self.ratios or None,
            "notes": self.notes,
        }


def _run_json(run: Run, detailed: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": run.name,
        "machine": run.machine,
        **{row.key: row.value for row in run.rows},
        "share_of_roof": {row.key: row.of_roof for row in run.rows if row.of_roof is not None},
    }
    if run.took is not None:
        found["took_seconds"] = run.took
    if detailed:
        found["requests"] = [asdict(outcome) for outcome in run.outcomes]
    return found


def run_rows(stats: Statistics, roof: Roof, rates_alone: bool = False) -> list[Row]:
    """The rows of `bench serve`; rates_alone: those of `bench throughput`, whose requests all come at once."""
    share = _share(roof.run, stats.seconds)
    rows = [
        Row("completed", "Requests completed", "count", stats.completed),
        Row("failed", "Requests failed", "count", stats.failed),
        Row("duration", "Duration", "s", stats.seconds, share),
    ]
    if roof.steps is not None:
        rows.append(Row("step_seconds", "… of it in steps", "s", roof.steps, _share(roof.run, roof.steps)))
    if roof.predicted is not None:
        rows.append(Row("predicted_step_seconds", "… as predicted", "s", roof.predicted))
    rows += [
        Row("total_input_tokens", "Prompt tokens", "count", stats.prompt_tokens),
        Row("total_output_tokens", "Output tokens", "count", stats.output_tokens),
        Row("request_throughput", "Requests", "req/s", stats.request_throughput, share),
        Row("output_throughput", "Output tokens", "tok/s", stats.output_throughput, share),
        Row("total_token_throughput", "All tokens", "tok/s", stats.total_throughput, share),
    ]
    if stats.goodput is not None:
        rows.append(Row("request_goodput", "Goodput", "req/s", stats.goodput))
    if rates_alone:
        return rows
    rows += [
        Row("max_output_tokens_per_s", "Output tokens in the fullest second", "tok/s", stats.peak_output_throughput),
        Row("max_concurrent_requests", "Most requests at once", "count", stats.peak_concurrency),
    ]
    roofs = {"ttft": roof.ttft, "tpot": roof.tpot, "itl": roof.tpot, "e2el": roof.e2el}
    for name, found in stats.metrics.items():
        rows += distribution_rows(name, found, roofs[name])
    return rows


def distribution_rows(name: str, found: Distribution, roof: float | None) -> list[Row]:
    """Mean, median, deviation and percentiles in ms; the share of the roof beside mean and median."""
    group = TITLES[name]
    rows = [
        _ms(f"mean_{name}_ms", "mean", found.mean, group, roof),
        _ms(f"median_{name}_ms", "median", found.median, group, roof),
        _ms(f"std_{name}_ms", "standard deviation", found.std, group),
    ]
    for percentile, value in found.percentiles:
        rows.append(_ms(f"p{percentile:g}_{name}_ms", f"p{percentile:g}", value, group))
    return rows


def _ms(key: str, label: str, seconds: float | None, group: str, roof: float | None = None) -> Row:
    return Row(key, label, "ms", None if seconds is None else 1e3 * seconds, _share(roof, seconds), group)


def _share(roof: float | None, seconds: float | None) -> float | None:
    return roof / seconds if roof is not None and seconds else None


def failures(outcomes: Sequence[Outcome], most: int = 5) -> list[str]:
    """A note for each kind of failure, the most frequent first."""
    counts: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.error:
            counts[outcome.error] = counts.get(outcome.error, 0) + 1
    ordered = sorted(counts.items(), key=lambda pair: -pair[1])
    told = [f"{count} of {len(outcomes)} requests failed: {error}" for error, count in ordered[:most]]
    return told + ([f"and {len(ordered) - most} other reasons"] if len(ordered) > most else [])
