"""Checkpoints of a training run: written whole or not at all, found again, verified and loaded in place."""

from __future__ import annotations

from rooflight.train.checkpoint.checkpoints import CheckpointNotSaved, Checkpoints
from rooflight.train.checkpoint.lock import run_lock
from rooflight.train.checkpoint.rng import rng_state, set_rng_state

__all__ = ["CheckpointNotSaved", "Checkpoints", "rng_state", "run_lock", "set_rng_state"]
