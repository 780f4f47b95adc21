"""The memory-bound operations of a training step on a GPU: bandwidth of our kernels beside eager and compiled PyTorch.

    python -m benchmarks.ops_memory_bound [--quick] [--only NAME] [--sweep]        (under a minute on an H200)

Bytes are the operation's own price (unique bytes, moved once); the share is of the copy bandwidth of the same run.
Inputs take turns through more copies than the L2 cache holds, calls run in a CUDA graph. `--sweep` then tries other
launch constants for the norms. Shapes are those of the training runs in ANCHORS: 152M, 1.24B, 3.2B, and 8B at 4k.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.timing import copy_bandwidth
from rooflight.hardware.timing import Timing, time_call
from rooflight.ops import activation, embedding, layer_norm, norm, rope
from rooflight.ops.attention.naive import attention_softmax, softmax_backward
from rooflight.ops.op import Op

COLD_BYTES = 256 * 2**20
EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Case:
    """One call: what its row is called, the operation, how to draw its arguments; whether torch.compile runs beside it.

    Compiling takes seconds, so that one size of each operation has to do.
    """

    label: str
    op: Op
    args: Callable[[], tuple[Any, ...]]
    peer: bool = False


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def _qkv(tokens: int, heads: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    q_size, kv_size = heads * head_dim, kv_heads * head_dim
    q, k, _ = draw(tokens, q_size + 2 * kv_size).split([q_size, kv_size, kv_size], dim=-1)
    return q.unflatten(-1, (heads, head_dim)), k.unflatten(-1, (kv_heads, head_dim))


def _rotary_args(tokens: int, heads: int, kv_heads: int, head_dim: int, fused: bool) -> tuple[Any, ...]:
    q, k = _qkv(tokens, heads, kv_heads, head_dim)
    if not fused:
        q, k = q.contiguous(), k.contiguous()
    table = draw(tokens, head_dim // 2, dtype=torch.float32)
    return q, k, table.cos(), table.sin(), False, not fused


def _tokens(count: int, vocabulary: int, half: bool = False) -> Tensor:
    """Token ids that fall off as 1/rank, as text does; or one of them in half of all places."""
    uniform = torch.rand(count, device="cuda", dtype=torch.float64)
    ids = (vocabulary**uniform).long().clamp_(max=vocabulary - 1)
    return torch.where(torch.rand(count, device="cuda") < 0.5, 17, ids) if half else ids


def _layer_norms(t: int, d: int) -> list[Case]:
    size, peer = f"{t}×{d}", d == 4096
    return [
        Case(f"layer_norm {size}", layer_norm.layer_norm, lambda: (draw(t, d), draw(d), draw(d), EPS), peer),
        Case(
            f"add_layer_norm {size}",
            layer_norm.add_layer_norm,
            lambda: (draw(t, d), draw(t, d), draw(d), draw(d), EPS),
        ),
        Case(
            f"layer_norm_backward {size}",
            layer_norm.layer_norm_backward,
            lambda: (draw(t, d), None, draw(t, d), draw(d), EPS),
            peer,
        ),
        Case(
            f"… layer_norm with residual {size}",
            layer_norm.layer_norm_backward,
            lambda: (draw(t, d), draw(t, d), draw(t, d), draw(d), EPS),
        ),
    ]


def _wide(t: int, d: int) -> list[Case]:
    size = f"{t}×{d}"
    return [
        Case(f"rms_norm {size}", norm.rms_norm, lambda: (draw(t, d), draw(d), EPS, 0.0)),
        Case(f"add_rms_norm {size}", norm.add_rms_norm, lambda: (draw(t, d), draw(t, d), draw(d), EPS, 0.0)),
        Case(
            f"rms_norm_backward {size}",
            norm.rms_norm_backward,
            lambda: (draw(t, d), None, draw(t, d), draw(d), EPS, 0.0),
        ),
    ]


def _softmaxes(rows: int, keys: int, causal: bool) -> list[Case]:
    size = f"{rows}×{keys}{', causal' if causal else ''}"
    # Heads of `keys` queries each where a mask wants them.
    shape = (1, rows // keys, keys, keys) if causal else (1, 1, rows, keys)
    return [
        Case(f"softmax {size}", attention_softmax, lambda: (draw(*shape), causal, 0, 0.0, None), not causal),
        Case(
            f"softmax_backward {size}",
            softmax_backward,
            lambda: (draw(*shape), draw(*shape).softmax(-1), None, 0.0, False),
            not causal,
        ),
    ]


def cases(quick: bool) -> list[Case]:
    rows: list[Case] = []
    for t, d in ((32768, 768), (16384, 2048), (16384, 3072), (16384, 4096)):
        size, peer = f"{t}×{d}", d == 4096
        rows += [
            Case(f"rms_norm {size}", norm.rms_norm, lambda t=t, d=d: (draw(t, d), draw(d), EPS, 0.0), peer),
            Case(
                f"add_rms_norm {size}",
                norm.add_rms_norm,
                lambda t=t, d=d: (draw(t, d), draw(t, d), draw(d), EPS, 0.0),
                peer,
            ),
            Case(
                f"rms_norm_backward {size}",
                norm.rms_norm_backward,
                lambda t=t, d=d: (draw(t, d), None, draw(t, d), draw(d), EPS, 0.0),
                peer,
            ),
            Case(
                f"… with residual {size}",
                norm.rms_norm_backward,
                lambda t=t, d=d: (draw(t, d), draw(t, d), draw(t, d), draw(d), EPS, 0.0),
                peer,
            ),
        ]
    for t, d in ((32768, 768), (16384, 4096), (8192, 8192), (4096, 32768)):
        rows += _layer_norms(t, d)
    rows += [*_wide(8192, 20480), *_wide(4096, 32768)]
    for keys, causal in ((4096, False), (4096, True), (1024, False)):
        rows += _softmaxes(16384, keys, causal)
    rows.append(
        Case(
            "rms_norm of q, 16384×16×128",
            norm.rms_norm,
            lambda: (_qkv(16384, 16, 8, 128)[0], draw(128), EPS, 0.0),
        )
    )
    for t, f, kind in ((16384, 8192, "silu"), (16384, 14336, "silu"), (16384, 8192, "gelu")):
        rows += [
            Case(
                f"gated {kind} {t}×{f}",
                activation.gated_activation,
                lambda t=t, f=f, kind=kind: (draw(t, 2 * f), kind),
                f == 8192,
            ),
            Case(
                f"gated {kind} backward {t}×{f}",
                activation.gated_activation_backward,
                lambda t=t, f=f, kind=kind: (draw(t, f), draw(t, 2 * f), kind),
                f == 8192,
            ),
        ]
    for kind in ("gelu", "gelu_tanh"):
        rows += [
            Case(f"{kind} 32768×3072", activation.activation, lambda kind=kind: (draw(32768, 3072), kind)),
            Case(
                f"{kind} backward 32768×3072",
                activation.activation_backward,
                lambda kind=kind: (draw(32768, 3072), draw(32768, 3072), kind),
            ),
        ]
    for t, h, k, e in ((32768, 12, 12, 64), (16384, 32, 8, 64), (16384, 24, 8, 128)):
        for fused in (True, False):
            label = f"rotary {'of fused qkv' if fused else 'back'} {t}×({h}+{k})×{e}"
            rows.append(Case(label, rope.rotary, lambda a=(t, h, k, e, fused): _rotary_args(*a), e == 128))
    for t, v, d, half in ((32768, 50304, 768, False), (16384, 128256, 2048, False), (32768, 50304, 768, True)):
        rows.append(
            Case(
                f"embedding_backward {t}→{v}×{d}{', half one token' if half else ''}",
                embedding.embedding_backward,
                lambda t=t, v=v, d=d, half=half: (draw(t, d), _tokens(t, v, half), v, 1.0),
            )
        )
    return rows[::4] if quick else rows


def _bytes_of(args: tuple[Any, ...]) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(args) if isinstance(x, Tensor))


def _sets(case: Case) -> list[tuple[Any, ...]]:
    """As many sets of arguments as leave none of them in the cache when its turn comes again."""
    first = case.args()
    return [first, *(case.args() for _ in range(max(1, -(-COLD_BYTES // _bytes_of(first)) - 1)))]


def _check(case: Case) -> float:
    """Error of the kernel against the reference in fp32, relative to the result's root mean square."""
    args = case.args()
    wide = tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x, args)
    worst = 0.0
    for found, wanted in zip(tree_leaves(case.op(*args)), tree_leaves(case.op.reference(*wide)), strict=True):
        if not found.numel():
            continue
        worst = max(worst, float((found.float() - wanted).pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt()))
    return worst


def _time(fn: Callable[..., Any], sets: list[tuple[Any, ...]]) -> Timing:
    return time_call([lambda args=args: fn(*args) for args in sets], device="cuda", budget_seconds=0.1)


def row(case: Case, roof: float) -> str:
    """A case's time, rate and error, and how long PyTorch takes."""
    error, sets = _check(case), _sets(case)
    price = case.op.price(case.op(*sets[0]), *sets[0]).total_bytes
    ours, eager = _time(case.op, sets), _time(case.op.reference, sets)
    compiled = ""
    if case.peer:
        torch._dynamo.reset()
        compiled = f"{_time(torch.compile(case.op.reference, dynamic=False), sets).seconds * 1e6:.1f}"
    rate = price / ours.seconds
    return (
        f"{ours.seconds * 1e6:8.1f} {rate / 1e12:6.2f} {rate / roof:8.1%}"
        f" {(ours.host_seconds or 0) * 1e6:8.1f} {eager.seconds * 1e6:8.1f} {compiled:>9} {error:.1e}"
    )


def table(quick: bool, only: str) -> None:
    roof = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy of 4 GiB {roof / 1e12:.2f} TB/s")
    print(f"{'operation':44} {'µs':>8} {'TB/s':>6} {'of copy':>8} {'host µs':>8} {'eager':>8} {'compiled':>9} error")
    for case in cases(quick):
        if only not in case.label:
            continue
        try:
            told = row(case, roof)
        except Exception as error:
            told = f"failed: {type(error).__name__}: {str(error)[:200]}"
        print(f"{case.label:44} {told}", flush=True)
        torch.cuda.empty_cache()


def sweep(only: str) -> None:
    """Other launch constants for the norms: elements a thread, warps that stay resident, rows in flight."""
    from rooflight.ops.kernels import norm_rows as kernels

    before = kernels.ELEMENTS, kernels.RESIDENT_WARPS, kernels.STAGES
    for case in cases(quick=False):
        if "norm" not in case.op.name or only not in case.label:
            continue
        backward, sets = "backward" in case.op.name, _sets(case)
        for elements in (8, 16, 32):
            for warps in (8, 16, 24) if backward else (before[1],):
                for stages in (1, 2, 3, 4) if backward else (before[2],):
                    kernels.ELEMENTS, kernels.RESIDENT_WARPS, kernels.STAGES = elements, warps, stages
                    micro = _time(case.op, sets).seconds * 1e6
                    print(
                        f"{case.label:44} elements {elements} warps {warps} stages {stages} {micro:8.1f} µs", flush=True
                    )
    kernels.ELEMENTS, kernels.RESIDENT_WARPS, kernels.STAGES = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every fourth row")
    parser.add_argument("--only", default="", metavar="NAME", help="rows that hold this text")
    parser.add_argument("--sweep", action="store_true", help="then try other launch constants for the norms")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU; none is visible")
    with torch.no_grad():
        table(options.quick, options.only)
        if options.sweep:
            sweep(options.only)


if __name__ == "__main__":
    main()
