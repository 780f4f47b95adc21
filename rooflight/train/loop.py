"""The training loop: data, step, log, evaluation, samples and checkpoints, one after the other.

The device is never waited for within a step: what step N left is read when step N + 1 is about to update, and an
optimizer that met a loss or norm that is not finite has by then changed nothing.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rooflight.errors import InvalidValue, NonFiniteStep
from rooflight.train import accounting, state
from rooflight.train.checkpoint import CheckpointNotSaved, Checkpoints, rng_state, set_rng_state
from rooflight.train.data import Prefetch
from rooflight.train.feed import micro_batches
from rooflight.train.job import Job
from rooflight.train.log import GIB, Log, against, percent, rate
from rooflight.train.profile import Profile, profile_step
from rooflight.train.schedule import learning_rate
from rooflight.train.trial import held_out_loss, sample_text
from rooflight.workload import optimizers
from rooflight.workload.record import Recorder
from rooflight.workload.training import Outcome


@dataclass(slots=True)
class Pending:
    """A step that was taken and not looked at yet."""

    step: int
    sample_ids: tuple[int, ...]
    outcome: Outcome
    applied: bool


class Trainer:
    """One run from its first step, or from a checkpoint's, to its last."""

    def __init__(
        self,
        job: Job,
        checkpoints: Checkpoints,
        log: Log,
        write_profile: Callable[[Profile], str] | None = None,
    ):
        self.job, self.checkpoints, self.log = job, checkpoints, log
        self.prediction = job.prediction
        self._write_profile = write_profile
        self.step = 0  # steps taken
        self.skipped = 0
        self.loss = self.norm = float("nan")
        self._pending: Pending | None = None
        self._stop: str | None = None
        self._busy = 0.0  # seconds of steps since the last log line
        self._since = 0  # the step of the last log line
        self._rate = 0.0  # the learning rate of the last step
        self._saved: int | None = None  # the step of the last checkpoint

    def resume(self) -> bool:
        """Take up the newest whole checkpoint; False when there is none."""
        newest = self.checkpoints.latest()
        for problem in self.checkpoints.problems:
            self.log.say(f"damaged checkpoint passed over: {problem}")
        if newest is None:
            return False
        data = self.checkpoints.meta(newest)["data"]
        if data != self.job.dataset.store.fingerprint():
            raise InvalidValue(
                f"--data {' '.join(self.job.settings.data)} holds other tokens than when {newest} was saved; "
                "give the data as they were, or start a new run in another --out"
            )
        meta = self.checkpoints.load(newest, state.tensors(self.job.trainee))
        set_rng_state(meta["rng"], self.job.device)
        state.restore_counts(self.job.trainee, meta["counts"])
        self.step, self.skipped = meta["step"], meta["skipped"]
        self._saved = self._since = self.step
        self.log.say(f"resumed from {newest} at step {self.step}")
        self.log.event("resume", step=self.step, checkpoint=str(newest))
        return True

    def describe(self) -> str:
        """One line on what is trained, how, and where its figures are predicted for."""
        job, settings = self.job, self.job.settings
        weights = sum(p.numel() for p in job.trainee.trained)
        kept = "fp32 masters, " if settings.master_weights and settings.dtype != "fp32" else ""
        machine = self.prediction.machine
        where = f"predicted for {machine.title}" if machine else "no prediction of time: `rooflight probe` this machine"
        return (
            f"{job.name}: {weights / 1e6:,.1f}M parameters on {job.device.type}, {settings.dtype}, {kept}"
            f"{settings.optimizer} with {settings.optimizer_dtype} states, recompute {settings.recompute}, "
            f"{settings.batch_size} rows of {settings.context} tokens a step, {settings.micro} a forward; " + where
        )

    def run(self) -> None:
        """Train to the last step; on SIGTERM or SIGINT save after the step at hand and return."""
        settings = self.job.settings
        feed = Prefetch(self.job.dataset, settings.batch_size, self.step * settings.batch_size)
        try:
            with self._signals():
                while self.step < settings.steps and self._stop is None:
                    self._one(next(feed))
                    self._after()
        finally:
            feed.close()
        self._settle()
        if self.step >= settings.steps:
            if settings.eval_every == 0 or self.step % settings.eval_every:
                self.evaluate()
            if settings.sample_every == 0 or self.step % settings.sample_every:
                self.sample()
        self._save()
        self.checkpoints.wait()
        if self._stop is not None:
            self.log.say(f"stopped by {self._stop} after step {self.step}; go on with --resume")

    def _one(self, rows: Any) -> None:
        """One optimizer step."""
        job, settings = self.job, self.job.settings
        started = time.perf_counter()
        rate_now = learning_rate(
            self.step,
            settings.steps,
            kind=settings.schedule,
            peak=settings.lr,
            least=settings.min_lr,
            warmup=settings.warmup,
            decay=settings.decay,
        )
        optimizers.learning_rate(job.trainee.optimizer, rate_now)
        applied = [False]

        def before_update(factor: Tensor | None) -> bool:
            self._settle()
            applied[0] = getattr(job.trainee.optimizer, "guards_itself", True) or state.finite(factor)
            return applied[0]

        micros = list(micro_batches(rows, settings.micro, job.device))

        def take(recorder: Recorder | None = None) -> None:
            outcome = job.trainee.step(
                micros,
                # 0 would mean "count your own"; a batch without any target has a loss of 0.
                targets=max(rows.targets, 1),
                seed=state.rounding_seed(settings.seed, self.step) if settings.rounding == "stochastic" else 0,
                recorder=recorder,
                before_update=before_update,
            )
            self._pending = Pending(self.step, rows.sample_ids, outcome, applied[0])

        if self.step + 1 == settings.profile and self._write_profile is not None:
            self._settle()
            count = settings.micro_batches
            found = profile_step(
                take, job.trainee.model, job.device, self.prediction, step=settings.profile, micro_batches=count
            )
            self.log.say(self._write_profile(found))
            # A step under the recorder takes longer than one without: it counts for none.
            self._since += 1
            started = time.perf_counter()
        else:
            take()
        self.step += 1
        if job.device.type == "cpu" or self.step % settings.log_every == 0 or self.step == 1:
            self._settle()
        self._busy += time.perf_counter() - started
        self._rate = rate_now

    def _settle(self) -> None:
        """Read the last step's loss and norm; what is not finite stops the run, or is skipped and counted."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        outcome = pending.outcome
        figures = [outcome.loss.float()] + ([outcome.norm] if outcome.norm is not None else [])
        values = torch.stack(figures).tolist()
        if all(math.isfinite(value) for value in values):
            self.loss, self.norm = values[0], values[-1]
            return
        if pending.applied:
            self.job.trainee.optimizer.rewind()
        loss, norm = values[0], values[-1]
        ids = ", ".join(map(str, pending.sample_ids))
        told = f"step {pending.step + 1}: loss {loss}, gradient norm {norm}; samples {ids}; the weights are untouched"
        if not self.job.settings.skip_nonfinite:
            saved = self.checkpoints.latest() or "none"
            raise NonFiniteStep(f"{told}; last good checkpoint: {saved}; lower --lr, or go on with --skip-nonfinite")
        self.skipped += 1
        self.log.say(f"skipped {told}")
        self.log.event("skip", step=pending.step + 1, loss=loss, norm=norm, samples=list(pending.sample_ids))

    def _after(self) -> None:
        """What is due after a step."""
        settings = self.job.settings
        if self.step % settings.log_every == 0 or self.step in (1, settings.steps):
            self._line()
        self.log.advance(self.step, f"loss {self.loss:.3f}")
        last = self.step == settings.steps
        if settings.eval_every and self.step % settings.eval_every == 0:
            self.evaluate()
        if settings.sample_every and self.step % settings.sample_every == 0:
            self.sample()
        if settings.checkpoint_every and self.step % settings.checkpoint_every == 0 and not last:
            self._save_or_say()

    def _line(self) -> None:
        """The log line: what the steps since the last one did, beside what they should have."""
        settings, job, prediction = self.job.settings, self.job, self.prediction
        self._settle()
        if self.step == self._since:
            return  # the one step since the last line was profiled, and has had its table
        seconds = self._busy / (self.step - self._since)
        self._busy, self._since = 0.0, self.step
        tokens = settings.batch_size * settings.context
        machine = prediction.machine
        shares = accounting.utilisation(job.config, settings.context, tokens / seconds, machine, settings.dtype)
        peak = job.memory.read()
        predicted = prediction.seconds
        predicted_peak = prediction.peak_bytes
        self.log.say(
            f"step {self.step}/{settings.steps}  loss {self.loss:.4f}  lr {self._rate:.2e}  norm {self.norm:.3f}  "
            f"{rate(tokens / seconds)} tok/s  MFU {percent(shares.mfu)} (full {percent(shares.mfu_full)}), "
            f"{percent(shares.of_ceiling)} of GEMM ceiling  "
            f"memory {against(peak, predicted_peak, 1 / GIB, 'GiB')}  time {against(seconds, predicted, 1e3, 'ms')}"
            + (f"  skipped {self.skipped}" if self.skipped else "")
        )
        self.log.event(
            "step",
            step=self.step,
            loss=self.loss,
            learning_rate=self._rate,
            gradient_norm=self.norm,
            tokens=self.step * tokens,
            tokens_per_second=tokens / seconds,
            mfu=shares.mfu,
            mfu_full_attention=shares.mfu_full,
            share_of_gemm_ceiling=shares.of_ceiling,
            peak_bytes=peak,
            predicted_peak_bytes=predicted_peak,
            seconds=seconds,
            predicted_seconds=predicted,
            roof_seconds=prediction.roof_seconds,
            skipped=self.skipped,
        )

    def evaluate(self) -> None:
        """Say the mean loss on held-out rows, where there are some."""
        self._settle()
        found = held_out_loss(self.job)
        if found is not None:
            loss, tokens = found
            self.log.say(f"step {self.step}/{self.job.settings.steps}  held-out loss {loss:.4f} over {tokens} tokens")
            self.log.event("evaluation", step=self.step, loss=loss, tokens=tokens)

    def sample(self) -> None:
        """Say a piece of text by the model as it is, where there is a tokenizer."""
        self._settle()
        text = sample_text(self.job, self.step)
        if text is not None:
            lines = "\n".join(f"    {line}" for line in text.splitlines())
            self.log.say(f"step {self.step}/{self.job.settings.steps}  sample:\n{lines}")
            self.log.event("sample", step=self.step, text=text)

    def _save_or_say(self) -> None:
        """A checkpoint on the way: a full disk is said, and training goes on to try again at the next one."""
        for attempt in (self.checkpoints.wait, self._save):
            try:
                attempt()
            except CheckpointNotSaved as error:
                self.log.say(f"not saved: {error}")
                self.log.event("not saved", step=self.step, error=str(error))

    def _save(self) -> None:
        self._settle()
        if self._saved == self.step:
            return
        meta = {
            "step": self.step,
            "skipped": self.skipped,
            "counts": state.counts(self.job.trainee),
            "data": self.job.dataset.store.fingerprint(),
            "rng": rng_state(self.job.device),
        }
        self.checkpoints.save(self.step, state.tensors(self.job.trainee), meta)
        self._saved = self.step
        self.log.event("checkpoint", step=self.step)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGTERM or SIGINT lets the step at hand end and saves; the second acts at once."""

        def stop(number: int, frame: Any) -> None:
            self._stop = signal.Signals(number).name
            for each, before in old.items():
                signal.signal(each, before)

        old: dict[signal.Signals, Any] = {}
        try:
            for each in (signal.SIGTERM, signal.SIGINT):
                old[each] = signal.signal(each, stop)
        except ValueError:
            pass  # not the main thread: whoever started us there handles signals
        try:
            yield
        finally:
            for each, before in old.items():
                signal.signal(each, before)
