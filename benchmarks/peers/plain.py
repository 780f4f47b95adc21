"""The best plain PyTorch: a Llama of torch's own modules under torch.compile, with cuDNN attention and fused AdamW.

Nothing of rooflight's operations is used. Legend: B sequences  T tokens  D width  H query heads  K key heads
E head dim  C = E/2 frequencies  V vocabulary
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from benchmarks.peers import Job, Step, torch_step
from rooflight.models.config import ModelConfig
from rooflight.models.rope import frequencies


def _rotate(x_BTHE: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    a, b = x_BTHE.float().chunk(2, dim=-1)
    cos, sin = cos_TC.unsqueeze(-2), sin_TC.unsqueeze(-2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BTHE.dtype)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x)), with fused QKV and fused gate and up."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.eps, self.scale = config.norm_eps, config.scale
        self.attention_norm = nn.Parameter(torch.empty(config.width))
        self.qkv = nn.Linear(config.width, (config.heads + 2 * config.kv_heads) * config.head_dim, bias=False)
        self.out = nn.Linear(config.heads * config.head_dim, config.width, bias=False)
        self.ffn_norm = nn.Parameter(torch.empty(config.width))
        self.up = nn.Linear(config.width, 2 * config.ffn_width, bias=False)
        self.down = nn.Linear(config.ffn_width, config.width, bias=False)

    def _attention(self, x_BTD: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        heads = [self.heads, self.kv_heads, self.kv_heads]
        q, k, v = self.qkv(x_BTD).unflatten(-1, (sum(heads), self.head_dim)).split(heads, dim=-2)
        q, k = _rotate(q, cos_TC, sin_TC), _rotate(k, cos_TC, sin_TC)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = self.heads != self.kv_heads
        out_BHTE = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
        return self.out(out_BHTE.transpose(1, 2).flatten(2))

    def forward(self, x_BTD: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        h_BTD = F.rms_norm(x_BTD, self.attention_norm.shape, self.attention_norm, self.eps)
        x_BTD = x_BTD + self._attention(h_BTD, cos_TC, sin_TC)
        h_BTD = F.rms_norm(x_BTD, self.ffn_norm.shape, self.ffn_norm, self.eps)
        gate, up = self.up(h_BTD).chunk(2, dim=-1)
        return x_BTD + self.down(F.silu(gate) * up)


class PlainLlama(nn.Module):
    """The whole decoder; `forward` gives the mean cross-entropy over full logits."""

    cos_TC: Tensor
    sin_TC: Tensor

    def __init__(self, config: ModelConfig, context: int, *, recompute: bool = False):
        super().__init__()
        kinds = set(config.layers)
        if config.family != "llama" or len(kinds) != 1 or config.qkv_bias or config.mlp_bias:
            raise ValueError(f"the plain peer is a Llama without biases; {config.name or config.family} is not one")
        rope = next(iter(kinds)).rope
        if rope is None:
            raise ValueError(f"the plain peer needs rotary positions; {config.name} has none")
        self.eps, self.recompute = config.norm_eps, recompute
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in config.layers)
        self.norm = nn.Parameter(torch.empty(config.width))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        table_C, factor = frequencies(rope, config.max_context)
        angles_TC = torch.arange(context, device=table_C.device).float().unsqueeze(-1) * table_C
        self.register_buffer("cos_TC", angles_TC.cos() * factor, persistent=False)
        self.register_buffer("sin_TC", angles_TC.sin() * factor, persistent=False)

    @torch.no_grad()
    def initialize(self, std: float = 0.02) -> PlainLlama:
        """N(0, std²) for matrices, ones for norms."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, std)
            else:
                parameter.fill_(1.0)
        return self

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT)
        for layer in self.layers:
            if self.recompute:
                x_BTD = checkpoint(
                    layer, x_BTD, self.cos_TC, self.sin_TC, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_BTD = layer(x_BTD, self.cos_TC, self.sin_TC)
        logits_BTV = self.head(F.rms_norm(x_BTD, self.norm.shape, self.norm, self.eps))
        # The compiler fuses the cast into the softmax: fp32 logits are in no memory.
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


def attention_kernel(device: str) -> AbstractContextManager[Any]:
    """On a GPU cuDNN's attention and no other: where it does not apply torch raises, and nothing slower stands in."""
    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if device == "cuda" else nullcontext()


def model_of(job: Job, device: str) -> PlainLlama:
    """The peer's model with weights of the job's dtype; the rotary table stays fp32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(job.torch_dtype)
    try:
        with torch.device(device):
            return PlainLlama(job.config, job.context, recompute=job.recompute == "full").initialize()
    finally:
        torch.set_default_dtype(before)


def build(job: Job, device: str, *, compiled: bool = True) -> Step:
    """The peer's training step, compiled on its first call."""
    model = model_of(job, device)
    loss_of = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    inner = torch_step(loss_of, model.parameters(), job.clip)

    def step(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        with attention_kernel(device):
            return inner(tokens_BT, targets_BT)

    return step
