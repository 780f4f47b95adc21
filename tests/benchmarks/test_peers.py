"""The peers that our trainer is timed against train the same model: equal loss and gradients from equal weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.peers import Job, batches, hf, ours, plain
from rooflight.models.config import ModelConfig, Rope, same_layers
from rooflight.models.layout import Layout
from rooflight.models.transformer import Transformer
from rooflight.models.weights import save

BATCH, CONTEXT = 2, 24
DEFAULT = Rope(theta=10000.0, dims=8)
LLAMA3 = replace(DEFAULT, kind="llama3", factor=8.0, original_context=16)


def config(*, tied: bool, rope: Rope, kv_heads: int) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=97,
        width=32,
        heads=4,
        kv_heads=kv_heads,
        head_dim=8,
        ffn_width=56,
        layers=same_layers(3, rope=rope),
        max_context=128,
        tied=tied,
        dtype="float32",
    ).check()


CONFIGS = {
    "tied, grouped": config(tied=True, rope=DEFAULT, kv_heads=2),
    "as the 8B": config(tied=False, rope=LLAMA3, kv_heads=2),
    "one key head a query head": config(tied=True, rope=DEFAULT, kv_heads=4),
}


def our_loss(model: Any, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
    positions_T = torch.arange(CONTEXT).repeat(BATCH)
    return model(tokens_BT.flatten(), positions_T, Layout((BATCH, CONTEXT)), targets_BT.flatten())


def copied(job: Job, model: Any) -> Any:
    """The plain peer with our weights."""
    peer: Any = plain.model_of(job, "cpu")
    with torch.no_grad():
        peer.embedding.weight.copy_(model.embedding.weight)
        peer.head.weight.copy_(model.head.weight)
        peer.norm.copy_(model.norm.norm.weight)
        for theirs, layer in zip(peer.layers, model.layers, strict=True):
            pairs = (
                (theirs.attention_norm, layer.attention_norm.norm.weight),
                (theirs.qkv.weight, layer.attention.qkv.weight),
                (theirs.out.weight, layer.attention.out.weight),
                (theirs.ffn_norm, layer.ffn_norm.norm.weight),
                (theirs.up.weight, layer.ffn.up.weight),
                (theirs.down.weight, layer.ffn.down.weight),
            )
            for to, weight in pairs:
                to.copy_(weight)
    return peer


def of_transformers(job: Job, model: Transformer, folder: Path) -> Any:
    """transformers' model with our weights, which it reads from a checkpoint of ours."""
    save(model, folder)
    peer = hf.model_of(job, "cpu")
    read = LlamaForCausalLM.from_pretrained(folder)
    peer.load_state_dict(read.state_dict())
    return peer


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("name", CONFIGS)
def test_peers_compute_our_loss_and_gradients(name: str, recompute: str, tmp_path: Path) -> None:
    job = Job(CONFIGS[name], BATCH, CONTEXT, "fp32", recompute)
    tokens_BT, targets_BT = next(batches(job, "cpu"))
    model: Any = Transformer(job.config).initialize(seed=3, std=0.3)
    plain_peer, hf_peer = copied(job, model), of_transformers(job, model, tmp_path)
    losses = [
        our_loss(model, tokens_BT, targets_BT),
        plain_peer(tokens_BT, targets_BT),
        hf.loss_of(hf_peer)(tokens_BT, targets_BT),
    ]
    for loss in losses:
        loss.backward()
        torch.testing.assert_close(loss.detach(), losses[0].detach(), atol=1e-5, rtol=0)
    for layer in range(len(job.config.layers)):
        ours_grad: Any = model.layers[layer].attention.qkv.weight.grad
        projections = hf_peer.model.layers[layer].self_attn
        parts: Any = [getattr(projections, f"{x}_proj").weight.grad for x in "qkv"]
        torch.testing.assert_close(plain_peer.layers[layer].qkv.weight.grad, ours_grad, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.cat(parts), ours_grad, atol=1e-5, rtol=1e-5)
    ours_grad = model.embedding.weight.grad
    torch.testing.assert_close(plain_peer.embedding.weight.grad, ours_grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hf_peer.model.embed_tokens.weight.grad, ours_grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("recompute", "passes"), [("none", 1), ("full", 2)])
def test_peers_recompute_when_asked(recompute: str, passes: int) -> None:
    job = Job(CONFIGS["tied, grouped"], BATCH, CONTEXT, "fp32", recompute)
    plain_peer: Any = plain.model_of(job, "cpu")
    hf_peer: Any = hf.model_of(job, "cpu")
    # Not the last module of a layer: its output is nobody's input, and recomputation stops before it.
    cases = ((plain_peer.layers[0].qkv, plain_peer), (hf_peer.model.layers[0].self_attn, hf.loss_of(hf_peer)))
    for module, loss_of in cases:
        seen: list[int] = []
        module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        loss_of(*next(batches(job, "cpu"))).backward()
        assert len(seen) == passes


def test_every_contender_learns_the_pool() -> None:
    """Each step trains: on one repeated batch the loss falls by as much for all, whatever their random weights."""
    job = Job(CONFIGS["tied, grouped"], BATCH, CONTEXT, "fp32")
    pair = next(batches(job, "cpu"))
    falls = []
    for step in (ours(job, "cpu", "adamw"), plain.build(job, "cpu", compiled=False), hf.build(job, "cpu")):
        torch.manual_seed(0)
        losses = [float(step(*pair)) for _ in range(6)]
        assert losses == sorted(losses, reverse=True), losses
        falls.append(losses[0] - losses[-1])
    assert min(falls) > 0.5 * max(falls), falls


def test_a_pool_repeats_and_shifts() -> None:
    job = Job(CONFIGS["tied, grouped"], BATCH, CONTEXT, "fp32")
    stream, again = batches(job, "cpu", pool=2), batches(job, "cpu", pool=2)
    first, second, third = next(stream), next(stream), next(stream)
    assert torch.equal(first[0], third[0]) and not torch.equal(first[0], second[0])
    assert torch.equal(first[0][:, 1:], first[1][:, :-1])
    assert torch.equal(next(again)[0], first[0])


def test_a_decoder_that_the_plain_peer_is_not() -> None:
    windowed = replace(CONFIGS["tied, grouped"], family="mistral", layers=same_layers(2, window=8, rope=DEFAULT))
    with pytest.raises(ValueError, match="plain peer is a Llama"):
        plain.PlainLlama(windowed, CONTEXT)
