"""Which attention runs in the Hopper kernel, and how it is cut.

Legend: B sequences  Q queries  S keys  H query heads  K key heads  E head dim
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 64  # queries of a warpgroup
# Half of an H200's L2: keys and values of the heads that run at one time stay in it.
SECTION_BYTES = 24 * 2**20
SHORT = 2048  # keys up to which tiles of fewer queries are faster, at 64 channels
_DTYPES = frozenset({torch.bfloat16, torch.float16})


@dataclass(frozen=True, slots=True)
class Plan:
    """Launch constants: keys of a tile, tiles on their way, warpgroups of 64 queries, and whether these take turns.

    Taking turns, one warpgroup's products run while another is at its softmax (FlashAttention-3's ping-pong).
    """

    keys: int
    stages: int
    consumers: int
    turns: bool

    @property
    def queries(self) -> int:
        """Queries of a tile."""
        return ROWS * self.consumers

    @property
    def registers(self) -> int:
        """Of a consumer's thread; the producer leaves them its own."""
        return 240 if self.consumers == 2 else 160


def plan_for(head_dim: int, keys: int) -> Plan:
    """How a call is cut; measured by `python -m benchmarks.ops_flash --tune` on an H200."""
    if head_dim == 128:
        return Plan(128, 2, 2, False)
    # More of a higher tile lies beyond the diagonal, which counts where there are few keys.
    return Plan(128, 3, 3, True) if keys > SHORT else Plan(128, 4, 2, True)


def section_of(heads: int, group: int, keys: int, head_dim: int) -> int:
    """Heads whose tiles are next to one another in order, so that their keys are read from memory once."""
    of_a_key_head = 4 * keys * head_dim
    return min(heads, group * max(1, SECTION_BYTES // of_a_key_head))


@functools.lru_cache
def is_hopper(device: torch.device) -> bool:
    """Whether the device has the copy engine and the tensor cores of compute capability 9.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def reachable(x: Tensor) -> bool:
    """Whether the copy engine can address it: rows of whole 16 bytes, in order."""
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    aligned = all(stride > 0 and stride % 8 == 0 for stride in strides)
    return aligned and x.stride(-1) == 1 and x.data_ptr() % 16 == 0


def takes(
    q_BQHE: Tensor,
    k_BSKE: Tensor,
    v_BSKE: Tensor,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
) -> bool:
    """Whether `flash_hopper.forward` computes this call."""
    if q_BQHE.dtype not in _DTYPES or softcap or sinks_H is not None or not scale > 0:
        return False
    if q_BQHE.shape[-1] not in (64, 128) or v_BSKE.shape != k_BSKE.shape or k_BSKE.shape[-1] != q_BQHE.shape[-1]:
        return False
    queries, keys = q_BQHE.shape[1], k_BSKE.shape[1]
    if (queries != keys if causal else window) or not q_BQHE.numel() or not k_BSKE.numel():
        return False
    if not k_BSKE.dtype == v_BSKE.dtype == q_BQHE.dtype or q_BQHE.shape[2] % k_BSKE.shape[2]:
        return False
    return is_hopper(q_BQHE.device) and all(reachable(x) for x in (q_BQHE, k_BSKE, v_BSKE))
