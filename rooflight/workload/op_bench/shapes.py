"""The sizes that `bench ops` runs, in one place: what targets and the models of ANCHORS ask for, and small ones."""

from __future__ import annotations

from itertools import product

from rooflight.workload.op_bench.case import Shapes

# M rows, N outputs, K inputs. Decode steps of Llama-3.1-8B and Qwen3-0.6B: QKV, gate and up, down.
_WEIGHTS = ((6144, 4096), (28672, 4096), (4096, 14336), (4096, 1024), (1024, 3072))
_FEW = (1, 8, 32, 128)  # rows of decode steps
# N and K behind a norm, and whether a gate follows; N and K before the residual sum: of both models, Qwen3's first.
_NORMED = ((4096, 1024, None), (6144, 1024, "silu"), (6144, 4096, None), (28672, 4096, "silu"))
_SUMMED = ((1024, 2048), (1024, 3072), (4096, 4096), (4096, 14336))
_LLAMA = (32, 8, 128)  # query heads, key heads, head dim
_QWEN = (16, 8, 128)
_SMALL = (8, 2, 64)
_EXPERTS = (128, 8)  # of Qwen3-30B-A3B, and of them a token
# count sequences that each add `query` tokens and then hold `context`
_DECODES = ((1, 8192), (1, 65536), (8, 8192), (32, 4096), (128, 2048), (128, 512))
_RAGGED = tuple((1, 1, 1 + 2047 * i * 37 % 64 * 32) for i in range(64))
_DOCUMENTS = ((4, 1024), (6, 512), (8, 128))  # count and tokens

SHAPES: dict[str, Shapes] = {
    "linear": Shapes(  # M, N, K
        gpu=((1, 6144, 4096), (4096, 6144, 4096)),
        gpu_grid=(
            *((m, n, k) for (n, k), m in product(_WEIGHTS, (1, 4, 16, 64, 256))),
            *((m, n, k) for (n, k), m in product(_WEIGHTS[:3], (4096, 16384))),
        ),
        cpu=((1, 1024, 1024), (256, 1024, 1024)),
        cpu_grid=tuple((m, 1024, 1024) for m in (1, 4, 16, 64, 256)),
    ),
    "norm_linear": Shapes(  # rows, N, K, gate
        gpu=((1, 6144, 4096, None), (32, 6144, 1024, "silu")),
        gpu_grid=tuple((rows, *weights) for weights, rows in product(_NORMED, _FEW)),
        cpu=((1, 1024, 1024, None), (32, 2048, 1024, "silu")),
        cpu_grid=((32, 1024, 1024, None), (1, 2048, 1024, "silu")),
    ),
    "add_linear": Shapes(  # rows, N, K
        gpu=((1, 4096, 4096), (32, 1024, 3072)),
        gpu_grid=tuple((rows, *weights) for weights, rows in product(_SUMMED, _FEW)),
        cpu=((1, 1024, 1024), (32, 1024, 1024)),
        cpu_grid=((1, 1024, 2048), (32, 1024, 2048)),
    ),
    "rms_norm": Shapes(  # rows, columns
        gpu=((16384, 4096),),
        gpu_grid=((1, 4096), (128, 4096), (32768, 768), (16384, 2048), (16384, 3072), (262144, 128)),
        cpu=((1024, 1024),),
        cpu_grid=((1, 1024), (4096, 1024), (8192, 128)),
    ),
    "add_rms_norm": Shapes(
        gpu=((16384, 4096),),
        gpu_grid=((1, 4096), (128, 4096), (32768, 768), (16384, 2048), (16384, 3072), (4096, 32768)),
        cpu=((1024, 1024),),
        cpu_grid=((1, 1024), (4096, 1024)),
    ),
    "layer_norm": Shapes(
        gpu=((32768, 768),),
        gpu_grid=((128, 4096), (16384, 4096), (4096, 32768)),
        cpu=((1024, 1024),),
        cpu_grid=((1, 1024),),
    ),
    "add_layer_norm": Shapes(
        gpu=((32768, 768),),
        gpu_grid=((128, 4096), (16384, 4096), (4096, 32768)),
        cpu=((1024, 1024),),
        cpu_grid=((1, 1024),),
    ),
    "softmax": Shapes(
        gpu=((16384, 4096),), gpu_grid=((4096, 16384), (128, 128256)), cpu=((1024, 1024),), cpu_grid=((8, 32000),)
    ),
    "rotary": Shapes(  # tokens, query heads, key heads, head dim
        gpu=((16384, *_LLAMA),),
        gpu_grid=((1, *_LLAMA), (128, *_LLAMA), (32768, 12, 12, 64), (16384, 32, 8, 64), (16384, 24, 8, 128)),
        cpu=((1024, *_SMALL),),
        cpu_grid=((1, *_SMALL),),
    ),
    "rotary_qkv": Shapes(
        gpu=((16384, *_LLAMA),),
        gpu_grid=((16384, 32, 8, 64), (16384, 24, 8, 128)),
        cpu=((1024, *_SMALL),),
        cpu_grid=((256, *_SMALL),),
    ),
    "gated_activation": Shapes(  # kind, tokens, width
        gpu=(("silu", 16384, 14336), ("gelu_tanh", 16384, 8192)),
        gpu_grid=(("silu", 1, 14336), ("silu", 128, 14336), ("silu", 16384, 8192), ("gelu", 16384, 8192)),
        cpu=(("silu", 512, 2048), ("gelu_tanh", 512, 2048)),
        cpu_grid=(("silu", 1, 2048),),
    ),
    "activation": Shapes(
        gpu=(("gelu_tanh", 32768, 3072),),
        gpu_grid=(("gelu", 32768, 3072), ("silu", 32768, 3072)),
        cpu=(("gelu_tanh", 512, 2048),),
        cpu_grid=(("gelu", 512, 2048),),
    ),
    "embedding": Shapes(  # tokens, vocabulary, width
        gpu=((16384, 128256, 2048),),
        gpu_grid=((32768, 50304, 768), (16384, 128256, 4096)),
        cpu=((1024, 16384, 512),),
        cpu_grid=((1, 16384, 512),),
    ),
    "attention": Shapes(  # sequences, query heads, key heads, tokens, head dim
        gpu=((4, 32, 32, 4096, 128), (4, 32, 8, 4096, 128)),
        gpu_grid=((1, 32, 32, 16384, 128), (8, 16, 16, 4096, 64), (16, 32, 32, 1024, 64), (16, 32, 32, 1024, 128)),
        cpu=((1, 8, 2, 512, 64),),
        cpu_grid=((1, 8, 8, 512, 64), (4, 8, 2, 128, 64), (1, 8, 2, 2048, 64)),
    ),
    "packed_attention": Shapes(  # documents, query heads, key heads, head dim
        gpu=((_DOCUMENTS, *_LLAMA),),
        gpu_grid=((((8, 2048),), *_LLAMA), (((64, 256),), *_LLAMA), (((32, 1024),), 12, 12, 64)),
        cpu=((((1, 256), (4, 64)), *_SMALL),),
        cpu_grid=((((8, 64),), *_SMALL),),
    ),
    "paged_attention": Shapes(  # sequences, query heads, key heads, head dim
        gpu=((((32, 1, 4096),), *_LLAMA), (((1, 8192, 8192),), *_LLAMA)),
        gpu_grid=(
            *((((count, 1, context),), *_LLAMA) for count, context in _DECODES),
            *((((count, 1, context),), *_QWEN) for count, context in ((1, 256), (1, 1024), (32, 256), (256, 600))),
            (((32, 1, 8192),), 64, 8, 128),
            (_RAGGED, *_LLAMA),
            *((((count, length, length),), *_LLAMA) for count, length in ((1, 1024), (16, 1024))),
            (((1, 2048, 16384),), *_LLAMA),
            (((64, 1, 1024), (1, 1984, 4096)), *_LLAMA),
        ),
        cpu=((((4, 1, 512),), *_SMALL), (((1, 256, 256),), *_SMALL)),
        cpu_grid=((((1, 1, 2048),), *_SMALL), (((16, 1, 128),), *_SMALL), (((4, 1, 256), (1, 64, 128)), *_SMALL)),
    ),
    "attention_schedule": Shapes(  # sequences, key heads, tokens that a table has room for
        gpu=((((32, 1, 4096),), 8, 131072),),
        gpu_grid=(
            *((((count, 1, context),), 8, 131072) for count, context in _DECODES),
            *((((count, 1, context),), 8, 40960) for count, context in ((1, 256), (32, 256), (256, 600))),
            (_RAGGED, 8, 131072),
        ),
        cpu=((((4, 1, 512),), 2, 2048),),
    ),
    "write_kv": Shapes(  # tokens, query heads, key heads, head dim
        gpu=((8192, *_LLAMA),),
        gpu_grid=((1, *_LLAMA), (256, *_LLAMA)),
        cpu=((256, *_SMALL),),
        cpu_grid=((1, *_SMALL),),
    ),
    "rotate_and_cache": Shapes(  # tokens, query heads, key heads, head dim, head norms
        gpu=((32, *_QWEN, True), (8192, *_LLAMA, False)),
        gpu_grid=((1, *_LLAMA, False), (1, *_QWEN, True), (256, *_LLAMA, False)),
        cpu=((256, *_SMALL, True),),
        cpu_grid=((1, *_SMALL, False),),
    ),
    "route": Shapes(  # tokens, experts, experts a token
        gpu=((4096, *_EXPERTS),),
        gpu_grid=((1, *_EXPERTS), (32, *_EXPERTS)),
        cpu=((256, 32, 4),),
        cpu_grid=((1, 32, 4),),
    ),
    "permute": Shapes(  # … and width
        gpu=((4096, *_EXPERTS, 2048),),
        gpu_grid=((1, *_EXPERTS, 2048), (32, *_EXPERTS, 2048)),
        cpu=((256, 32, 4, 256),),
        cpu_grid=((1, 32, 4, 256),),
    ),
    "unpermute": Shapes(
        gpu=((4096, *_EXPERTS, 2048),),
        gpu_grid=((1, *_EXPERTS, 2048), (32, *_EXPERTS, 2048)),
        cpu=((256, 32, 4, 256),),
        cpu_grid=((1, 32, 4, 256),),
    ),
    "grouped_linear": Shapes(  # … outputs and width
        gpu=((32, *_EXPERTS, 1536, 2048), (4096, *_EXPERTS, 1536, 2048)),
        gpu_grid=((1, *_EXPERTS, 1536, 2048), (8, *_EXPERTS, 2048, 768), (4096, 8, 2, 28672, 4096)),
        cpu=((256, 8, 2, 256, 256),),
        cpu_grid=((1, 8, 2, 256, 256),),
    ),
    "grouped_gated_linear": Shapes(
        gpu=((32, *_EXPERTS, 1536, 2048),),
        gpu_grid=tuple((tokens, *_EXPERTS, 1536, 2048) for tokens in (1, 8, 128, 4096)),
        cpu=((32, 8, 2, 256, 256),),
        cpu_grid=((1, 8, 2, 256, 256),),
    ),
    "linear_cross_entropy": Shapes(  # tokens, width, vocabulary
        gpu=((8192, 2048, 128256),),
        gpu_grid=((16384, 2048, 128256), (32768, 768, 50304), (16384, 3072, 128256)),
        cpu=((256, 256, 8192),),
        cpu_grid=((1024, 256, 8192),),
    ),
    "cross_entropy": Shapes(  # tokens, vocabulary
        gpu=((8192, 128256),), gpu_grid=((16384, 50304),), cpu=((256, 8192),), cpu_grid=((1024, 8192),)
    ),
    "adamw": Shapes(  # storage types, layers, width
        gpu=(("fp32", 4, 2048), ("bf16", 4, 2048)),
        gpu_grid=(("bf16, fp32 states", 4, 2048), ("bf16, fp32 masters", 4, 2048)),
        cpu=(("fp32", 1, 256),),
        cpu_grid=(("bf16", 1, 256), ("bf16, fp32 states", 1, 256), ("bf16, fp32 masters", 1, 256)),
    ),
    "grad_norm": Shapes(gpu=((4, 2048),), gpu_grid=((16, 2048),), cpu=((1, 256),)),  # layers, width
    "greedy": Shapes(  # rows, vocabulary
        gpu=((32, 128256),),
        gpu_grid=((1, 128256), (1, 151936), (256, 151936)),
        cpu=((4, 32000),),
        cpu_grid=((1, 32000),),
    ),
    "sample_plain": Shapes(
        gpu=((32, 128256),),
        gpu_grid=((1, 151936), (32, 151936), (256, 151936)),
        cpu=((4, 32000),),
        cpu_grid=((1, 32000),),
    ),
    "sample": Shapes(  # rows, vocabulary, top_k, top_p
        gpu=((32, 128256, 50, 0.9), (32, 128256, 0, 0.9)),
        gpu_grid=(
            (1, 151936, 50, 0.9),
            (1, 151936, 0, 0.9),
            (32, 151936, 50, 1.0),
            (256, 151936, 50, 0.9),
            (256, 151936, 0, 0.9),
        ),
        cpu=((4, 32000, 50, 0.9),),
        cpu_grid=((4, 32000, 0, 0.9), (4, 32000, 50, 1.0), (1, 32000, 50, 0.9)),
    ),
}
