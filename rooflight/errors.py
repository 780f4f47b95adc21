"""The exceptions that Rooflight raises on purpose; the command line prints them as one line and exits with 2."""

from __future__ import annotations


class RooflightError(Exception):
    """Base of every error that a user can mend; its text names the value, what is allowed and what to do."""


class InvalidValue(RooflightError):
    """An option, a config or a file holds a value that Rooflight cannot use."""


class UnpricedOp(RooflightError):
    """The program ran an operator that has no price; a zero is never silent."""


class UntraceableModule(RooflightError):
    """A module could not be run on fake tensors."""


class WeightsMismatch(RooflightError):
    """A checkpoint's names or shapes are not those of the model."""


class QueueFull(RooflightError):
    """More requests wait than the engine takes."""


class EngineDead(RooflightError):
    """The engine has stopped, or is about to; it takes no more requests."""


class NonFiniteStep(RooflightError):
    """A training step whose loss or gradient norm is not finite; the weights were left as they were."""
