"""Attention's forward on a Hopper GPU: ours beside cuDNN's, FlashAttention-2's and, where it is there, 3's.

TFLOP/s count 4·B·H·S²·E, halved where causal; times are medians of CUDA-graph replays over several inputs.

    python -m benchmarks.ops_flash [--tune] [--shapes 4x32x32x4096x128,8x16x16x4096x64] [--full]

Times are of one run, and each has its error. FlashAttention-3: rooflight/workload/op_bench/flash3.py says how it comes.
--tune also tries other plans; --full: without causality. Shapes are B x H x key heads x S x E.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from triton.errors import TritonError

from benchmarks.timing import graph_seconds
from rooflight.ops.kernels.flash_hopper import forward
from rooflight.ops.kernels.flash_hopper_plan import Plan, plan_for
from rooflight.workload.op_bench.installed import find

SHAPES = ((4, 32, 32, 4096, 128), (1, 32, 32, 16384, 128), (4, 32, 8, 4096, 128), (8, 16, 16, 4096, 64))
SHAPES += ((16, 32, 32, 1024, 64),)
TUNED = {
    128: (Plan(128, 2, 2, True), Plan(128, 2, 2, False)),
    64: (Plan(128, 3, 3, True), Plan(128, 4, 2, True), Plan(128, 4, 2, False)),
}
INPUTS, WARM_REPLAYS, REPLAYS, GRAPH_SECONDS = 3, 5, 7, 0.01
WRONG = 2e-2
_aten = torch.ops.aten

Shape = tuple[int, int, int, int, int]
Attention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def drawn(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k and v as they lie in the output of a fused projection."""
    batch, heads, key_heads, length, head_dim = shape
    fused = torch.randn(batch, length, (heads + 2 * key_heads) * head_dim, device="cuda", dtype=torch.bfloat16)
    q, k, v = fused.split([heads * head_dim, key_heads * head_dim, key_heads * head_dim], -1)
    return q.unflatten(-1, (-1, head_dim)), k.unflatten(-1, (-1, head_dim)), v.unflatten(-1, (-1, head_dim))


def cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, ...]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out.transpose(1, 2), lse


def flash2(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, ...]:
    scale, length = q.shape[-1] ** -0.5, q.shape[1]
    return _aten._flash_attention_forward(q, k, v, None, None, length, length, 0.0, causal, False, scale=scale)


def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool, plan: Plan) -> tuple[Tensor, ...]:
    return forward(q, k, v, q.shape[-1] ** -0.5, causal, 0, plan)


def errors(run: Attention, inputs: tuple[Tensor, Tensor, Tensor], causal: bool) -> tuple[float, float]:
    """Largest errors of output and log-sum-exp against fp32, of the first head and of the last of the last sequence."""
    q, k, v = inputs
    out, lse = run(q, k, v)[:2]
    found = [0.0, 0.0]
    group = q.shape[2] // k.shape[2]
    for sequence, head in ((0, 0), (q.shape[0] - 1, q.shape[2] - 1)):
        one_q, one_k, one_v = q[sequence, :, head], k[sequence, :, head // group], v[sequence, :, head // group]
        for rows in torch.arange(q.shape[1], device="cuda").split(4096):
            scores = one_q[rows].float() @ one_k.float().t() * q.shape[-1] ** -0.5
            if causal:
                scores.masked_fill_(torch.arange(k.shape[1], device="cuda") > rows[:, None], float("-inf"))
            want = scores.softmax(-1) @ one_v.float()
            found[0] = max(found[0], float((out[sequence, rows, head].float() - want).abs().nan_to_num(9e9).max()))
            gap = lse[sequence, head].flatten()[rows] - scores.logsumexp(-1)
            found[1] = max(found[1], float(gap.abs().nan_to_num(9e9).max()))
    return found[0], found[1]


def attempts(head_dim: int, length: int, causal: bool, tune: bool) -> Iterator[tuple[str, Attention]]:
    yield "cuDNN", functools.partial(cudnn, causal=causal)
    yield "FlashAttention-2", functools.partial(flash2, causal=causal)
    if (flash3 := find("rooflight.workload.op_bench.flash3", "forward")) is not None:
        yield "FlashAttention-3", functools.partial(flash3, causal=causal)
    usual = plan_for(head_dim, length)
    yield f"ours {short(usual)}", functools.partial(ours, causal=causal, plan=usual)
    for plan in TUNED[head_dim] if tune else ():
        if plan != usual:
            yield f"ours {short(plan)}", functools.partial(ours, causal=causal, plan=plan)


def short(plan: Plan) -> str:
    return f"Plan({plan.keys}, {plan.stages}, {plan.consumers}, {plan.turns})"


def table(shapes: list[Shape], causal: bool, tune: bool) -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {'causal' if causal else 'full'}, bf16")
    print(f"{'B×H:K×S×E':>20} {'kernel':<28} {'µs':>8} {'TFLOP/s':>8} {'error':>8} {'of lse':>8}", flush=True)
    for shape in shapes:
        batch, heads, key_heads, length, head_dim = shape
        work = 4 * batch * heads * length**2 * head_dim / (2 if causal else 1)
        inputs = [drawn(shape) for _ in range(INPUTS)]
        name = f"{batch}×{heads}:{key_heads}×{length}×{head_dim}"
        for kernel, run in attempts(head_dim, length, causal, tune):
            try:
                error, of_lse = (float("nan"),) * 2 if kernel == "FlashAttention-2" else errors(run, inputs[0], causal)
                line = f"{name:>20} {kernel:<28}"
                if max(error, of_lse) > WRONG:
                    print(f"{line} WRONG: error {error:.1e}, of lse {of_lse:.1e}", flush=True)
                    continue
                turns = max(len(inputs), round(GRAPH_SECONDS * 4e14 / work))
                time = graph_seconds(lambda each, run=run: run(*each), inputs, turns, REPLAYS, WARM_REPLAYS)
            except (TritonError, RuntimeError) as failure:
                print(f"{name:>20} {kernel:<28} FAILED: {str(failure)[:300]}", flush=True)
                continue
            print(f"{line} {time * 1e6:8.1f} {work / time / 1e12:8.1f} {error:8.1e} {of_lse:8.1e}", flush=True)
        del inputs
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="also try other plans")
    parser.add_argument("--full", action="store_true", help="every query sees every key")
    parser.add_argument("--shapes", default=",".join("x".join(map(str, shape)) for shape in SHAPES))
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        sys.exit("this benchmark needs a Hopper GPU; none is visible")
    shapes = []
    for text in options.shapes.split(","):
        batch, heads, key_heads, length, head_dim = (int(n) for n in text.split("x"))
        shapes.append((batch, heads, key_heads, length, head_dim))
    with torch.no_grad():
        table(shapes, not options.full, options.tune)


if __name__ == "__main__":
    main()
