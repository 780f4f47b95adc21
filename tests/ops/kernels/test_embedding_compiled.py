"""What the embedding's backward compiles to for an H100 or H200: no spills, 16-byte accesses, room beside each other.

`python -m pytest tests/ops/kernels/test_embedding_compiled.py -s` prints the table.
"""

from __future__ import annotations

import pytest
import torch

from rooflight.ops.kernels import embedding, token_order

from . import test_ahead_of_time as ahead
from .test_ahead_of_time import meta

compiled = ahead.compiled
COMPILES = (token_order._count_kernel, token_order._place_kernel, embedding._write_kernel)
# What a program of the sort leaves of a multiprocessor for the launch after it, in threads.
BESIDE = 512


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "width"),
    [(16384, 128256, 2048), (32768, 50304, 768), (8192, 128256, 4096), (4096, 262144, 640), (64, 2**22 - 1, 640)],
)
@pytest.mark.parametrize("early", [False, True], ids=["", "early"])
def test_compiles_for_hopper(
    tokens: int,
    vocabulary: int,
    width: int,
    dtype: torch.dtype,
    early: bool,
    compiled: list[ahead.Compiled],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(embedding, "early_launch", lambda rows: early)
    ids = meta(tokens, dtype=torch.int64)
    embedding.embedding_backward(meta(tokens, width, dtype=dtype), ids, vocabulary, 1.0)
    _, lower, upper, write = compiled
    for kernel in compiled:
        assert kernel.stack == 0, f"{kernel} spills"
        assert kernel.resident_threads >= BESIDE, f"{kernel} leaves room for {kernel.resident_threads} threads"
    assert min(lower.wide_loads, upper.wide_loads) > 0
    # Zeros and sums; of the sums' rows as many as are on their way at once.
    assert write.wide_stores > embedding.ROWS and write.wide_loads >= embedding.ROWS
