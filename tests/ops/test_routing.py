"""Routing against transformers' own routers, and a whole expert layer against a loop over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config, GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from rooflight.errors import InvalidValue
from rooflight.ops import grouped
from rooflight.ops.batch import Batch, use
from rooflight.ops.dispatch import permute, unpermute
from rooflight.ops.grouped import grouped_linear
from rooflight.ops.routing import route

pytestmark = pytest.mark.usefixtures("poisoned_memory")
X, K, D = 16, 4, 32
_DEEPSEEK = {"hidden_size": D, "num_experts_per_tok": K, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
ROUTERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixtral": (
        MixtralTopKRouter(MixtralConfig(hidden_size=D, num_local_experts=X, num_experts_per_tok=K)),
        {"scoring": "softmax", "normalize": True},
    ),
    "qwen3-normalised": (
        Qwen3MoeTopKRouter(Qwen3MoeConfig(hidden_size=D, num_experts=X, num_experts_per_tok=K, norm_topk_prob=True)),
        {"scoring": "softmax", "normalize": True},
    ),
    "qwen3": (
        Qwen3MoeTopKRouter(Qwen3MoeConfig(hidden_size=D, num_experts=X, num_experts_per_tok=K, norm_topk_prob=False)),
        {"scoring": "softmax", "normalize": False},
    ),
    "gpt-oss": (
        GptOssTopKRouter(GptOssConfig(hidden_size=D, num_local_experts=X, num_experts_per_tok=K)),
        {"scoring": "softmax_topk", "normalize": False},
    ),
    "deepseek-v2-greedy": (
        DeepseekV2TopkRouter(DeepseekV2Config(n_routed_experts=X, topk_method="greedy", **_DEEPSEEK)),
        {"scoring": "softmax", "normalize": False, "scale": 2.5},
    ),
    "deepseek-v2": (
        DeepseekV2TopkRouter(DeepseekV2Config(n_routed_experts=X, topk_method="group_limited_greedy", **_DEEPSEEK)),
        {"scoring": "softmax", "normalize": False, "scale": 2.5, "groups": 4, "top_groups": 2, "group_score": "max"},
    ),
    "deepseek-v3": (
        DeepseekV3TopkRouter(DeepseekV3Config(n_routed_experts=X, norm_topk_prob=True, **_DEEPSEEK)),
        {"scoring": "sigmoid", "normalize": True, "scale": 2.5, "groups": 4, "top_groups": 2, "group_score": "top2"},
    ),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_routes_as_transformers_does(name: str) -> None:
    router, options = ROUTERS[name]
    generator = torch.Generator().manual_seed(0)
    bias_X = None
    with torch.no_grad():
        router.weight.copy_(torch.randn(X, D, generator=generator))
        if name == "deepseek-v3":
            bias_X = torch.randn(X, generator=generator) / 4
            router.e_score_correction_bias.copy_(bias_X)
        if name == "gpt-oss":
            router.bias.zero_()
        logits_TX, expected_TK, chosen_TK = router(torch.randn(50, D, generator=generator))
        weights_TK, experts_TK = route(logits_TX, bias_X, K, **options)
    # transformers leaves the order of the chosen open.
    order, ours = chosen_TK.argsort(-1), experts_TK.argsort(-1)
    assert torch.equal(chosen_TK.gather(1, order), experts_TK.gather(1, ours))
    torch.testing.assert_close(weights_TK.gather(1, ours), expected_TK.gather(1, order))


@pytest.mark.parametrize("bad", [{"scoring": "tanh"}, {"groups": 4, "top_groups": 2, "group_score": "mean"}])
def test_unknown_choices_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue, match="is unknown; use one of"):
        route(torch.randn(3, X), None, K, **bad)


def test_an_expert_layer_is_a_loop_over_tokens_with_gradients() -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(size, requires_grad=True) for size in ((9, D), (X, 7, D), (X, 7), (9, X))]
    x_TD, weight_XND, bias_XN, logits_TX = leaves
    weights_TK, experts_TK = route(logits_TX, None, K)
    rows_RD, source_R, counts_X = permute(x_TD, experts_TK, X)
    out_TN = unpermute(grouped_linear(rows_RD, weight_XND, bias_XN, counts_X), weights_TK, source_R)
    picked = logits_TX.softmax(-1).gather(1, experts_TK)
    picked = picked / picked.sum(-1, keepdim=True)
    expected_TN = torch.stack(
        [
            sum((p * (weight_XND[e] @ x + bias_XN[e]) for p, e in zip(row, chosen, strict=True)), torch.zeros(7))
            for row, chosen, x in zip(picked, experts_TK.tolist(), x_TD, strict=True)
        ]
    )
    torch.testing.assert_close(out_TN, expected_TN)
    grad_TN = torch.randn_like(out_TN)
    found, wanted = (torch.autograd.grad(out, leaves, grad_TN) for out in (out_TN, expected_TN))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


COUNTS_X = torch.tensor([3, 0, 9, 4])


def test_torchs_grouped_product_agrees_with_the_loop() -> None:
    """The GPU path's layouts, through _grouped_mm's CPU implementation; an expert without rows among them."""
    torch.manual_seed(0)
    x_RK, grad_RN = torch.randn(16, 24).bfloat16(), torch.randn(16, 8).bfloat16()
    weight_XNK = torch.randn(4, 8, 24).bfloat16()
    close: dict[str, Any] = {"rtol": 2e-2, "atol": 2e-2}
    forward = (x_RK, weight_XNK)
    torch.testing.assert_close(
        grouped._torchs_linear(*forward, COUNTS_X), grouped._linear(*forward, None, COUNTS_X), **close
    )
    back = (grad_RN, weight_XNK, COUNTS_X)
    torch.testing.assert_close(grouped._torchs_input_grad(*back), grouped._input_grad(*back), **close)
    last = (grad_RN, x_RK, COUNTS_X)
    torch.testing.assert_close(grouped._weight_grad_kernel(*last), grouped._weight_grad(*last), **close)


def _weights_read(rows: int, batch: Batch | None) -> float:
    x_RK, weight_XNK = torch.empty(rows, 8), torch.empty(4, 6, 8)
    counts_X, out_RN = torch.empty(4, dtype=torch.int64), torch.empty(rows, 6)
    if batch is None:
        cost = grouped_linear.price(out_RN, x_RK, weight_XNK, None, counts_X)
    else:
        with use(batch):
            cost = grouped_linear.price(out_RN, x_RK, weight_XNK, None, counts_X)
    return (cost.bytes_read - x_RK.nbytes - counts_X.nbytes) / weight_XNK[0].nbytes


def test_only_experts_with_rows_have_their_weights_read() -> None:
    silent = Batch.uniform(1, 3, 3)  # says nothing of experts
    # Four experts: one row reaches one; three rows 4·(1 − 0.75³) = 2.3 on average; a hundred all but surely all.
    assert [_weights_read(rows, None) for rows in (1, 3, 100)] == [1, 2, 4]
    assert _weights_read(3, silent) == 2
    assert _weights_read(100, Batch((), expert_tokens=(50, 0, 50, 0))) == 2


def test_the_order_within_an_expert_is_the_order_of_tokens() -> None:
    experts_TK = torch.tensor([[1, 0], [0, 1], [1, 2]])
    rows_RD, source_R, counts_X = permute(torch.arange(3.0).unsqueeze(1), experts_TK, 4)
    assert source_R.tolist() == [1, 2, 0, 3, 4, 5]
    assert counts_X.tolist() == [2, 3, 1, 0]
    assert rows_RD.squeeze(1).tolist() == [0, 1, 0, 1, 2, 2]


def test_permuted_rows_are_a_copy() -> None:
    x_TD: Tensor = torch.randn(2, D)
    rows_RD, _, _ = permute(x_TD, torch.zeros(2, 1, dtype=torch.int64), 1)
    rows_RD.zero_()
    assert x_TD.abs().sum() > 0
