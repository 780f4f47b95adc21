"""Fused attention: exact visible pairs, every product of the backward, and nothing written that stays on the chip."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from rooflight.errors import RooflightError
from rooflight.ops import aten, batch
from rooflight.ops.aten.visible import visible_pairs
from rooflight.ops.cost import Cost, Primitive
from tests.priced import Recording, price_call

BF16 = torch.bfloat16


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7), (7, 3), (1, 9), (9, 1)])
@pytest.mark.parametrize(("left", "right"), [(None, None), (None, 0), (2, 0), (0, 0), (1, 2), (3, None), (20, 20)])
@pytest.mark.parametrize("bottom_right", [False, True])
def test_visible_pairs_equal_a_double_loop(
    queries: int, keys: int, left: int | None, right: int | None, bottom_right: bool
) -> None:
    offset = keys - queries if bottom_right else 0
    count = 0
    for i in range(queries):
        for j in range(keys):
            after = left is None or j >= i + offset - left
            before = right is None or j <= i + offset + right
            count += after and before
    assert visible_pairs(queries, keys, left=left, right=right, offset=offset) == count


def _sdpa(heads: int = 4, tokens: int = 6, width: int = 8, **kwargs: Any) -> Recording:
    shape = (2, heads, tokens, width)
    return price_call(F.scaled_dot_product_attention, shape, shape, shape, dtype=BF16, **kwargs)


def test_sdpa_equals_the_flop_counter_when_nothing_is_masked() -> None:
    q = torch.randn(2, 4, 6, 8, dtype=BF16)
    with FlopCounterMode(display=False) as counter:
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)
    expected = 2 * 2 * 2 * 4 * 6 * 6 * 8
    assert counter.get_total_flops() in (0, expected)  # torch's counter knows this operator only in some versions
    assert _sdpa().flops("bf16") == expected


def test_causal_attention_counts_the_triangle() -> None:
    cost = _sdpa(is_causal=True).calls[-1][1]
    assert cost.flops["bf16"] == 2 * (2 * 4) * (2 * 8) * (6 * 7 // 2)
    assert cost.flops["fp32"] == 2 * 4 * (5 * 21 + 6 * 8)
    assert (cost.primitive, cost.curve, cost.size) == (Primitive.DYNAMIC, "attention", (2, 4, 6, 8, 4))


def test_scores_are_not_written() -> None:
    cost = _sdpa(tokens=128).calls[-1][1]
    tensor = 2 * 4 * 128 * 8 * 2
    assert cost.bytes_read == 3 * tensor
    assert cost.bytes_written == tensor + 2 * 4 * 128 * 4  # and a log-sum-exp in fp32 a row


def test_parts_sum_to_the_whole() -> None:
    for cost in (_sdpa(is_causal=True).calls[-1][1], _backward(is_causal=True)):
        assert sum(p.bytes_read for p in cost.parts) == cost.bytes_read
        assert sum(p.bytes_written for p in cost.parts) == cost.bytes_written
        for precision, count in cost.flops.items():
            assert sum(p.flops.get(precision, 0) for p in cost.parts) == count
        assert [p.component for p in cost.parts] == ["scores", "softmax", "context"]


def _backward(**kwargs: Any) -> Cost:
    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        for x in (q, k, v):
            x.requires_grad_()
        F.scaled_dot_product_attention(q, k, v, **kwargs).backward(torch.empty_like(q))

    record = price_call(step, *[(2, 4, 6, 8)] * 3, dtype=BF16)
    (cost,) = (c for _, c in record.calls if c.curve == "attention_backward")
    return cost


def test_backward_is_five_products() -> None:
    forward, backward = _sdpa(is_causal=True).calls[-1][1], _backward(is_causal=True)
    assert 2 * backward.flops["bf16"] == 5 * forward.flops["bf16"]
    tensor = 2 * 4 * 6 * 8 * 2
    assert backward.bytes_read == 5 * tensor + 2 * 4 * 6 * 4
    assert backward.bytes_written == 3 * tensor


CUDA = [
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
]


@pytest.mark.parametrize("name", CUDA)
@pytest.mark.parametrize("causal", [False, True])
def test_cuda_operators_count_the_same_and_share_keys(name: str, causal: bool) -> None:
    q, k = torch.empty(2, 8, 6, 16, dtype=BF16, device="meta"), torch.empty(2, 2, 6, 16, dtype=BF16, device="meta")
    func = getattr(torch.ops.aten, name).default
    extra = () if "flash" in name else (None, True)
    lse = torch.empty(2, 8, 6, device="meta")
    output = (torch.empty_like(q), lse, *[None] * (len(func._schema.returns) - 2))
    cost = aten.price(func, (q, k, k.clone(), *extra), {"is_causal": causal}, output)
    assert cost is not None
    pairs = 21 if causal else 36
    assert cost.flops["bf16"] == 4 * 2 * 8 * pairs * 16
    # Grouped queries: two key heads are read, not eight.
    assert cost.bytes_read == 2 * (2 * 8 * 6 * 16 + 2 * 2 * 2 * 6 * 16)
    assert cost.size == (2, 8, 6, 16, 2)


def _varlen(window: list[int]) -> Cost | None:
    pytest.importorskip("torch.nn.attention.varlen")
    if not hasattr(torch.ops.torch_attn, "_varlen_attn"):
        pytest.skip("this torch has no _varlen_attn")
    q, k = torch.empty(7, 4, 16, dtype=BF16, device="meta"), torch.empty(7, 2, 16, dtype=BF16, device="meta")
    lengths = torch.empty(3, dtype=torch.int32, device="meta")
    output = (torch.empty_like(q), torch.empty(4, 7, device="meta"), torch.empty(2, device="meta"))
    func = torch.ops.torch_attn._varlen_attn.default
    names = [a.name for a in func._schema.arguments]
    given = {"is_causal": True} if "is_causal" in names else {}
    if "window_size" in names:
        given["window_size"] = window  # type: ignore[assignment]
    return aten.price(func, (q, k, k.clone(), lengths, lengths, 4, 4), given, output)


def test_packed_sequences_take_their_lengths_from_the_batch() -> None:
    with pytest.raises(RooflightError, match="Batch"):
        _varlen([-1, 0])
    with batch.use(batch.Batch.of([4, 3], [4, 3])):
        cost = _varlen([-1, 0])
    assert cost is not None
    assert cost.flops["bf16"] == 4 * 4 * 16 * (4 * 5 // 2 + 3 * 4 // 2)


def test_paged_attention_reads_the_context_and_not_the_cache() -> None:
    q, out = (torch.empty(2, 1, 8, 16, dtype=BF16, device="meta") for _ in range(2))
    cache = torch.empty(1000, 16, 2, 16, dtype=BF16, device="meta")
    used, table = (torch.empty(s, dtype=torch.int32, device="meta") for s in ((2,), (2, 4)))
    func = torch.ops.aten._flash_attention_forward.default
    if "block_table" not in [a.name for a in func._schema.arguments]:
        pytest.skip("this torch's flash attention has no block table")
    args = (q, cache, cache.clone(), None, None, 1, 64, 0.0, True, False)
    output = (out, torch.empty(2, 8, 1, device="meta"), None, None, None)
    with batch.use(batch.Batch.of([1, 1], [50, 30])):
        cost = aten.price(func, args, {"seqused_k": used, "block_table": table}, output)
    assert cost is not None
    assert cost.flops["bf16"] == 4 * 8 * 16 * (50 + 30)
    assert cost.bytes_read == 2 * 2 * 8 * 16 + 2 * (80 * 2 * 16 * 2) + 8 + 32
