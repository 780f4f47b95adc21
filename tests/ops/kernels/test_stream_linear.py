"""How products of few rows are shared out among programs, and what `stream_linear` refuses; no kernel runs here."""

from __future__ import annotations

import itertools

import pytest
import torch

from rooflight.errors import InvalidValue
from rooflight.ops.kernels import ceil_div
from rooflight.ops.kernels.stream_kernel import begin_of, program_of
from rooflight.ops.kernels.stream_linear import stream_linear
from rooflight.ops.kernels.stream_plan import MOST_ROWS, WIDE_ROWS, plan_for, rows_block, stage_bytes, tiles_of

SHARED_OF_A_MULTIPROCESSOR, SHARED_OF_A_PROGRAM = 228 * 1024, 227 * 1024
SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)]
SHAPES += [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (96, 40), (1, 8)]


@pytest.mark.parametrize("rows", [2, 16, 17, 32, 64, 128])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_programs_share_all_steps_once(outputs, inputs, rows):
    for gated in (False, True):
        plan = plan_for(rows, outputs, inputs, gated, 132)
        steps = ceil_div(inputs, plan.inputs)
        total = steps * tiles_of(outputs, gated)
        begins = [begin_of.fn(program, total, plan.programs) for program in range(plan.programs + 1)]
        assert begins[0] == 0 and begins[-1] == total
        shares = [end - begin for begin, end in itertools.pairwise(begins)]
        assert min(shares) > 0 and max(shares) - min(shares) <= 1
        for program, (begin, end) in enumerate(itertools.pairwise(begins)):
            assert {program_of.fn(position, total, plan.programs) for position in (begin, end - 1)} == {program}
            # Two slots of a program for sums of tiles that others share: what begins with its tile, and what does not.
            cut = [
                (max(begin, tile * steps), min(end, (tile + 1) * steps))
                for tile in range(begin // steps, (end - 1) // steps + 1)
            ]
            partial = [first % steps == 0 for first, last in cut if last - first < steps]
            assert len(partial) == len(set(partial))


@pytest.mark.parametrize("rows", [1, 16, 20, 32, 33, 64])
def test_this_launch_fits_a_multiprocessor_and_of_more_rows_the_next_one_too(rows):
    plan = plan_for(rows, 4096, 4096, False, 132)
    ring = plan.stages * stage_bytes(rows, plan.inputs)
    assert (1 if rows <= WIDE_ROWS else 2) * (ring + 2048) <= SHARED_OF_A_MULTIPROCESSOR
    # As many bytes of weights on their way as memory of 4.8 TB/s and a latency of 0.7 µs wants.
    assert (plan.stages - 1) * (stage_bytes(rows, plan.inputs) - 2 * plan.inputs * rows_block(rows)) >= 25_000


def test_refusals():
    x, w = torch.zeros(4, 64, dtype=torch.bfloat16), torch.zeros(128, 64, dtype=torch.bfloat16)
    wide = torch.zeros(4, 70, dtype=torch.bfloat16)
    cases = [
        ((torch.zeros(MOST_ROWS + 1, 64, dtype=torch.bfloat16), w), {}, "rows"),
        ((x[:, :32], w), {}, "columns"),
        ((x.float(), w.float()), {}, "bf16"),
        ((x, w.half()), {}, "bf16"),
        ((wide[:, :64], w), {}, "16 bytes"),
        ((x, w, x[0]), {}, "bias"),
        ((x, w), {"norm_weight_K": w[:, 0]}, "norm weight"),
        ((x, w), {"residual_MN": x}, "residual"),
        ((x, w), {"residual_MN": x, "activation": "tanh"}, "activation"),
        ((x, w[:127]), {"activation": "silu"}, "gates"),
    ]
    for args, options, message in cases:
        with pytest.raises(InvalidValue, match=message):
            stream_linear(*args, **options)
