"""Attention: flash (no scores in memory), naive (scores in memory), packed (documents), paged (over a KV cache)."""

from rooflight.ops.attention.flash import attention, attention_backward
from rooflight.ops.attention.naive import attention_context, attention_scores, attention_softmax, naive_attention
from rooflight.ops.attention.packed import packed_attention, packed_attention_backward
from rooflight.ops.attention.paged import gather_kv, paged_attention, write_kv
from rooflight.ops.attention.schedule import attention_schedule

__all__ = [
    "attention",
    "attention_backward",
    "attention_context",
    "attention_schedule",
    "attention_scores",
    "attention_softmax",
    "gather_kv",
    "naive_attention",
    "packed_attention",
    "packed_attention_backward",
    "paged_attention",
    "write_kv",
]
