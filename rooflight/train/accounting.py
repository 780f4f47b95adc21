"""What a step should cost and what it did: predicted time and memory, model FLOPs, and the shares of roof and ceiling.

MFU is model FLOPs over the datasheet's peak (PaLM, 2204.02311, appendix B): a token takes 6·N for the N parameters that
multiply it, and for attention 6·L·T·d where a causal mask is counted as half the square, 12·L·T·d where it is not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import cast

import torch

from rooflight.hardware.host import memory_bytes
from rooflight.hardware.machine import Machine
from rooflight.models.config import ModelConfig
from rooflight.models.count import parameter_counts
from rooflight.models.recompute import Recompute
from rooflight.train.recompute import GIB, choose
from rooflight.train.settings import TrainSettings
from rooflight.train.whole_step import whole_step
from rooflight.workload import program, walk
from rooflight.workload.explanation import Memory
from rooflight.workload.memory import over_time
from rooflight.workload.optimizers import Update
from rooflight.workload.program import Setting
from rooflight.workload.roofline import Timed, time_walk
from rooflight.workload.training import Recipe


def recipe(settings: TrainSettings, config: ModelConfig) -> Recipe:
    """How the settings take a step of this model."""
    found = _recipe(settings)
    if settings.recompute == "selective" and settings.activation_gib:
        return replace(found, recompute=_dropped(settings, config))
    return found


@cache
def _dropped(settings: TrainSettings, config: ModelConfig) -> frozenset[str]:
    plain = setting_of(replace(settings, recompute="none", activation_gib=0.0), config)
    base = replace(plain.recipe or Recipe(), micro_batches=1)

    def walked(recompute: Recompute) -> walk.Walk:
        at = replace(plain, recipe=replace(base, recompute=recompute))
        return walk.dry(lambda: program.decoder(config, at, "cpu", fold=True))

    return choose(walked, settings.activation_gib * GIB)


def _recipe(settings: TrainSettings) -> Recipe:
    half = settings.dtype != "fp32"
    update = Update(
        name=settings.optimizer,
        state_dtype=settings.optimizer_dtype,
        masters=settings.master_weights and half,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
    )
    return Recipe(
        recompute=cast("Recompute", settings.recompute),
        clip=settings.clip,
        fp32_gradients=settings.gradient_dtype == "fp32" and half,
        micro_batches=settings.micro_batches,
        document_length=settings.document_length,
        update=update,
    )


def setting_of(settings: TrainSettings, config: ModelConfig) -> Setting:
    """The program that a step of these settings runs; dtype and context must be resolved."""
    return Setting("train", settings.micro, settings.context, settings.dtype, recipe=recipe(settings, config))


@dataclass(frozen=True, slots=True)
class Prediction:
    """A step as the dry run sees it; `timed` holds its operations, of two micro-batches at most."""

    machine: Machine | None
    seconds: float | None
    roof_seconds: float | None
    memory: Memory
    walked: walk.Walk
    timed: Timed | None

    @property
    def peak_bytes(self) -> float:
        """The most that stands at any moment of the step."""
        return self.memory.total


def predict(config: ModelConfig, settings: TrainSettings, machine: Machine | None, capacity: float = 0.0) -> Prediction:
    """Run the step dry: time on `machine` (none without one), and memory against its capacity.

    Micro-batches after the first do the same work, adding to the gradients: two are walked, and the second is counted
    for all that follow.
    """
    plan = setting_of(settings, config)
    found = plan.recipe or Recipe()
    count = found.micro_batches

    at = replace(plan, recipe=replace(found, micro_batches=min(count, 2)))
    walked = walk.dry(lambda: program.decoder(config, at, "cpu", fold=True))
    memory = over_time(walked, machine.memory_bytes.value if machine else capacity)
    if machine is None:
        return Prediction(None, None, None, memory, walked, None)
    timed = time_walk(walked, machine, graph=False)
    whole = whole_step(timed, count)
    return Prediction(machine, whole.expected_seconds, whole.roof_seconds, memory, walked, timed)


def flops_per_token(config: ModelConfig, context: int) -> tuple[float, float]:
    """Model FLOPs that training takes for a token: causal attention counted half, and counted whole."""
    counts = parameter_counts(config)
    multiplied = counts["active"] - (0 if config.tied else counts["embedding"])
    if config.tied and config.learned_positions:
        multiplied -= config.learned_positions * config.width
    dims = config.heads * config.head_dim
    if config.latent is not None:
        dims = config.heads * (config.latent.nope_dim + config.latent.rope_dim + config.latent.value_dim) / 2
    reach = sum(min(kind.window or context, context) for kind in config.layers)
    return 6 * multiplied + 6 * dims * reach, 6 * multiplied + 12 * dims * reach


@dataclass(frozen=True, slots=True)
class Utilisation:
    """Model FLOP/s of a run as shares: of the datasheet's peak in both conventions, and of the measured ceiling."""

    mfu: float | None
    mfu_full: float | None
    of_ceiling: float | None


def utilisation(
    config: ModelConfig, context: int, tokens_per_second: float, machine: Machine | None, dtype: str
) -> Utilisation:
    """The shares that a rate of tokens comes to; None where the machine does not tell its peak or ceiling."""
    if machine is None:
        return Utilisation(None, None, None)
    causal, full = flops_per_token(config, context)
    # Attention and head stay in bf16, and runs in fp8 are compared with runs in bf16: one peak for both.
    dtype = "bf16" if dtype == "fp8" else dtype
    peak, unit = machine.peak(dtype)
    ceiling = machine.measured.get(f"matmul.{dtype}") or machine.measured.get(f"matmul.{unit}")
    return Utilisation(
        causal * tokens_per_second / peak,
        full * tokens_per_second / peak,
        causal * tokens_per_second / ceiling.value if ceiling else None,
    )


class PeakMemory:
    """The most memory that this process has taken since it was made: CUDA's allocated bytes, or resident pages."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _reset_resident_peak()
            self._before = _resident("VmRSS")

    def read(self) -> float | None:
        """Bytes; None where the system does not tell."""
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        peak = _resident("VmHWM")
        return None if peak is None or self._before is None else peak - self._before


def _reset_resident_peak() -> None:
    # Linux: 5 resets VmHWM to what is resident now (proc(5)); elsewhere the peak since the start is all there is.
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _resident(field: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


__all__ = [
    "PeakMemory",
    "Prediction",
    "Utilisation",
    "flops_per_token",
    "memory_bytes",
    "predict",
    "recipe",
    "setting_of",
    "utilisation",
]
