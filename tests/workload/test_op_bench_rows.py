"""Every declared operation is timed by a row of `bench ops`, or it stands here why not."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil

import torch

import rooflight.ops
from rooflight.ops import batch
from rooflight.ops.op import all_ops
from rooflight.workload.op_bench import BACKWARD, FORWARD, OPERATIONS, WHOLE
from rooflight.workload.op_bench.case import Draw, Peer
from rooflight.workload.op_bench.check import pass_of
from rooflight.workload.record import Recorder
from tests.workload.test_op_bench import TINY

LINKS = "between devices: `rooflight probe` times collectives over several ranks"
NAIVE = "of naive attention, which writes scores out: for pricing, not for speed; its products are `linear`'s"
FP8 = "wants a GPU with fp8: benchmarks/ops_fp8.py times casts and products beside bf16's"
HEAD = "the row of `linear` times the same product; a row of the whole loss times the head in training"
CACHED = "of naive attention in serving, which gathers the cache: for pricing, not for speed"
STEP = "one pass over the gradients or a single number, once a step: benchmarks/ops_optimizer_loss.py times the pass"
ELEMENTWISE = "one elementwise pass over scores or logits, of Gemma alone; the row of `activation` times as many bytes"
WITHOUT_ROW = {
    **dict.fromkeys(("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"), LINKS),
    **dict.fromkeys(("attention_scores", "attention_scores_backward"), NAIVE),
    **dict.fromkeys(("attention_context", "attention_context_backward"), NAIVE),
    **dict.fromkeys(("fp8_amax", "fp8_quantize", "fp8_quantize_transposed", "fp8_quantize_both"), FP8),
    **dict.fromkeys(("fp8_linear", "fp8_linear_input_grad", "fp8_linear_weight_grad"), FP8),
    **dict.fromkeys(("head_linear", "head_input_grad", "head_weight_grad"), HEAD),
    **dict.fromkeys(("clip_scale", "scale_"), STEP),
    **dict.fromkeys(("softcap", "softcap_backward"), ELEMENTWISE),
    "gather_kv": CACHED,
    "rotary_table": "positions to angles, once a step for all layers: torch's own cos and sin",
    "bias_grad": "a sum over rows, which torch makes; a bias is in no row of `linear`",
    "grouped_bias_grad": "a sum over each expert's rows: benchmarks/ops_moe.py times it",
}


def timed() -> set[str]:
    """Names of the operations that the rows' passes run."""
    found: set[str] = set()
    for name, operation in OPERATIONS.items():
        sizes = TINY[name]
        passes = (FORWARD, WHOLE if operation.whole else BACKWARD) if operation.wrt else (FORWARD,)
        for which in passes:
            draw = Draw(torch.device("cpu"), torch.float32, 0)
            force = batch.use(operation.batch(*sizes)) if operation.batch else contextlib.nullcontext()
            with force, torch.set_grad_enabled(which != FORWARD):
                call = pass_of(Peer("ours", operation.ours), operation.make(draw, *sizes), operation.wrt, which, draw)
                with Recorder() as recorder:
                    call()
            found |= {record.name for record in recorder.records}
    return found


def test_every_operation_has_a_row_or_a_reason() -> None:
    for module in pkgutil.walk_packages(rooflight.ops.__path__, "rooflight.ops."):
        if not module.name.startswith("rooflight.ops.kernels"):
            importlib.import_module(module.name)
    declared, rows = {op.name for op in all_ops()}, timed()
    assert declared - rows == set(WITHOUT_ROW)
