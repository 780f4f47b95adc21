"""The state of torch's random generators as JSON: a hexadecimal string each."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rooflight.errors import InvalidValue


def rng_state(device: torch.device | str = "cpu") -> dict[str, str]:
    """States of the CPU's default generator and, when `device` is a CUDA device, of that device's."""
    states = {"cpu": torch.get_rng_state()}
    if torch.device(device).type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {kind: bytes(state.tolist()).hex() for kind, state in states.items()}


def set_rng_state(states: Mapping[str, str], device: torch.device | str = "cpu") -> None:
    """Put back what `rng_state` gave; a generator whose state is not there (another kind of device) stays as it is.

    Raises InvalidValue on a text that is no state of that generator.
    """
    for kind in ("cpu", "cuda") if torch.device(device).type == "cuda" else ("cpu",):
        if kind not in states:
            continue
        try:
            state = torch.frombuffer(bytearray.fromhex(states[kind]), dtype=torch.uint8)
            if kind == "cpu":
                torch.set_rng_state(state)
            else:
                torch.cuda.set_rng_state(state, device)
        except (ValueError, TypeError, RuntimeError) as error:
            raise InvalidValue(
                f"random state of {kind}: {str(states[kind])[:16]!r}… is no state of torch's generator "
                f"({str(error).splitlines()[0]}); use one that rng_state gave"
            ) from error
