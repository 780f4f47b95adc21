"""Peers that may be installed: Liger, FlashAttention 2 and 3, FlexAttention and SDPA's backends.

Legend: B sequences  Q queries  S keys  T tokens  H query heads  K key heads  E head dim  F feed-forward width
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from rooflight.workload.op_bench.case import Absent, Args, Peer

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_ON_CPU = ("flash", "math")
# What torch says where a backend does not take the call, on a GPU and on a CPU.
_REFUSALS = ("No available kernel", "No viable backend")


def find(module: str, name: str) -> Callable[..., Any] | None:
    """`module.name`, or None where it is not installed, or not in a version that has it or can be loaded."""
    try:
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(importlib.import_module(module), name, None)
    except Exception:
        # Built for another torch, another CUDA, another transformers: whatever it says, it is not usable here.
        return None


def liger(name: str, device: torch.device, call: Callable[..., Any], **how: Any) -> list[Peer]:
    """Liger's functional `name` as a peer, called by `call(function, *args)`; it wants a GPU."""
    function = find("liger_kernel.transformers.functional", name) if device.type == "cuda" else None
    return [] if function is None else [Peer("liger", lambda *args: call(function, *args), **how)]


def liger_gate(device: torch.device) -> list[Peer]:
    """Liger's SwiGLU and GeGLU, which take gate and up apart."""
    kinds = {
        kind: find("liger_kernel.transformers.functional", name)
        for kind, name in (("silu", "liger_swiglu"), ("gelu_tanh", "liger_geglu"))
    }

    def prepare(gate_up_T2F: Tensor, kind: str) -> Args:
        if kinds.get(kind) is None:
            raise Absent
        gate_TF, up_TF = gate_up_T2F.chunk(2, -1)
        return gate_TF.contiguous(), up_TF.contiguous(), kinds[kind]

    def merged(gate_TF: Tensor, up_TF: Tensor) -> Args:
        return (torch.cat((gate_TF, up_TF), -1),)

    if device.type != "cuda" or not any(kinds.values()):
        return []
    return [Peer("liger", lambda gate, up, function: function(gate, up), prepare, (0, 1), merged)]


def liger_rope(device: torch.device) -> list[Peer]:
    """Liger's rotary positions: in place, over contiguous queries and keys, tables as wide as a head."""

    def prepare(q_THE: Tensor, k_TKE: Tensor, *tables_TC: Tensor) -> Args:
        cos, sin = (torch.cat((table, table), -1).to(q_THE.dtype).unsqueeze(0) for table in tables_TC)
        return q_THE.contiguous(), k_TKE.contiguous(), cos, sin

    def call(rope: Callable[..., Any], q_THE: Tensor, k_TKE: Tensor, cos: Tensor, sin: Tensor) -> Args:
        q, k = rope(*(x.unsqueeze(0).transpose(1, 2) for x in (q_THE, k_TKE)), cos, sin)
        return q.transpose(1, 2)[0], k.transpose(1, 2)[0]

    return liger("liger_rope", device, call, prepare=prepare)


def by_heads(call: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """`call` over [B,H,Q,E] of tensors that are [B,Q,H,E], as views."""
    return call(*(x.transpose(1, 2) for x in (q, k, v)), **how).transpose(1, 2)


def sdpa(q_BQHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, scale: float) -> Tensor:
    """torch's attention, causal, the last query seeing the last key."""
    queries, keys = q_BQHE.shape[1], k_BSKE.shape[1]
    mask = None
    if 1 < queries < keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q_BQHE.device).tril(keys - queries)
    how = {"attn_mask": mask, "is_causal": queries == keys > 1, "enable_gqa": q_BQHE.shape[2] != k_BSKE.shape[2]}
    return by_heads(F.scaled_dot_product_attention, q_BQHE, k_BSKE, v_BSKE, scale=scale, **how)


def sdpa_backends(device: torch.device, prepare: Callable[..., Args] = lambda *args: args) -> list[Peer]:
    """A peer for each of SDPA's backends; one that refuses the call is absent."""

    def through(backend: SDPBackend) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            try:
                with sdpa_kernel(backend), warnings.catch_warnings():
                    # Refusing, torch warns once for each reason.
                    warnings.simplefilter("ignore")
                    return sdpa(*args)
            except RuntimeError as error:
                if any(refusal in str(error) for refusal in _REFUSALS):
                    raise Absent from error
                raise

        return call

    names = BACKENDS if device.type == "cuda" else _ON_CPU
    return [Peer(name, through(BACKENDS[name]), prepare) for name in names]


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` under torch.compile for these very sizes."""
    return torch.compile(call, dynamic=False)


def flex(device: torch.device, masked: Callable[..., Args]) -> list[Peer]:
    """FlexAttention under torch.compile; masked(create_block_mask, *args): q, k, v, scale and a block mask."""
    create = find("torch.nn.attention.flex_attention", "create_block_mask")
    attend = find("torch.nn.attention.flex_attention", "flex_attention")
    if device.type != "cuda" or create is None or attend is None:
        return []
    fast = compiled(attend)

    def call(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Any) -> Tensor:
        return by_heads(fast, q, k, v, scale=scale, block_mask=mask, enable_gqa=q.shape[2] != k.shape[2])

    return [Peer("flex", call, lambda *args: masked(create, *args))]


def flash_attention(device: torch.device, name: str, call: Callable[..., Any], **how: Any) -> list[Peer]:
    """FlashAttention 2 ("fa2") and 3 ("fa3") by their function `name`, called by `call(function, *args)`."""
    found: list[Peer] = []
    # Of each the first that is there.
    modules = {"fa2": ("flash_attn",), "fa3": ("flash_attn_interface", "rooflight.workload.op_bench.flash3")}
    for label, places in modules.items() if device.type == "cuda" else ():
        function = next((function for place in places if (function := find(place, name)) is not None), None)
        if function is None:
            continue

        def of(*args: Any, function: Callable[..., Any] = function) -> Tensor:
            out = call(function, *args)
            # Some versions return the log-sum-exp too.
            return out[0] if isinstance(out, tuple) else out

        found.append(Peer(label, of, **how))
    return found
