"""Fixtures of the operations' tests: poisoned fresh memory, and a process group that moves nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

# A module of one property, which type checkers do not see.
deterministic: Any = torch.utils.deterministic


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, so an element that an operation forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def fake_ranks() -> Iterator[str]:
    """Name of a group of four ranks of which this process is the first; its collectives move nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield dist.group.WORLD.group_name  # pyright: ignore[reportOptionalMemberAccess]
    dist.destroy_process_group()
