"""The decoder: one definition that is trained, served and priced.

Legend: T tokens  D width  V vocabulary
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rooflight.models.attention import Attention, Tables
from rooflight.models.config import LayerKind, ModelConfig
from rooflight.models.feed_forward import MLP, MoEBlock
from rooflight.models.latent import LatentAttention
from rooflight.models.layers import ResidualNorm, make_norm
from rooflight.models.layout import Layout
from rooflight.models.recompute import Recompute, contexts_of, recomputing
from rooflight.models.rope import frequencies
from rooflight.ops.activation import softcap
from rooflight.ops.embedding import embedding
from rooflight.ops.fused_loss import linear_cross_entropy
from rooflight.ops.linear import linear
from rooflight.ops.rope import rotary_table


class Embedding(nn.Module):
    """Token embedding, with learned positions where the model has them (GPT-2)."""

    component = "embedding"

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.scale = config.embedding_scale
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.width))
        learned = config.learned_positions
        self.positions = nn.Parameter(torch.empty(learned, config.width)) if learned else None

    def forward(self, tokens_T: Tensor, positions_T: Tensor) -> Tensor:
        x_TD = embedding(tokens_T, self.weight, self.scale)
        return x_TD if self.positions is None else x_TD + embedding(positions_T, self.positions, 1.0)


class Head(nn.Module):
    """Logits of the last hidden state, or the loss against targets without the logits ever being whole."""

    component = "head"

    def __init__(self, config: ModelConfig, tied: nn.Parameter | None):
        super().__init__()
        self.softcap = config.logits_softcap
        self.weight = tied if tied is not None else nn.Parameter(torch.empty(config.vocab_size, config.width))

    def forward(self, x_TD: Tensor, targets_T: Tensor | None = None, target_count: int = 0) -> Tensor:
        if targets_T is not None:
            return linear_cross_entropy(x_TD, self.weight, targets_T, self.softcap, count=target_count)
        logits_TV = linear(x_TD, self.weight, None)
        return softcap(logits_TV, self.softcap) if self.softcap else logits_TV


class Layer(nn.Module):
    """norm → attention → add and norm → feed-forward, the residual sum carried beside (pre-norm, 2002.04745)."""

    component = "norm and residual"

    def __init__(self, config: ModelConfig, kind: LayerKind, index: int):
        super().__init__()
        self.attention_norm = ResidualNorm(config)
        block = LatentAttention if config.latent is not None else Attention
        self.attention = block(config, kind, index)
        self.attention_post_norm = make_norm(config.width, config) if config.post_norms else None
        self.ffn_norm = ResidualNorm(config)
        self.ffn = MoEBlock(config) if kind.sparse else MLP(config, config.ffn_width)
        self.ffn_post_norm = make_norm(config.width, config) if config.post_norms else None
        self._plain_norms = config.norm == "rms" and not config.post_norms

    def forward(
        self, x_TD: Tensor, residual_TD: Tensor | None, tables: Tables, layout: Layout, closed: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The block's output and the residual sum beside it; `closed` adds the two up and leaves no residual.

        A serving step has no residual beside the blocks' output: each block adds to the stream in place.
        """
        if residual_TD is None and self._streams(x_TD, layout):
            self.attention(x_TD, tables, layout, self.attention_norm.norm)
            if isinstance(self.ffn, MLP):
                return self.ffn(x_TD, norm=self.ffn_norm.norm), None
            return x_TD.add_(self.ffn(self.ffn_norm(x_TD, None)[0])), None
        h_TD, stream_TD = self.attention_norm(x_TD, residual_TD)
        h_TD = self.attention(h_TD, tables, layout)
        if self.attention_post_norm is not None:
            h_TD = self.attention_post_norm(h_TD)
        h_TD, stream_TD = self.ffn_norm(h_TD, stream_TD)
        # The closing sum saves nothing, so a recomputation needs what enters the block's last product, not what leaves.
        h_TD = self.ffn(h_TD, needed=not (closed and self.ffn_post_norm is None and recomputing()))
        if self.ffn_post_norm is not None:
            h_TD = self.ffn_post_norm(h_TD)
        return (h_TD + stream_TD, None) if closed else (h_TD, stream_TD)

    def _streams(self, x_TD: Tensor, layout: Layout) -> bool:
        """Whether the step serves, with blocks whose products carry the norm before and the sum after them along."""
        block = self.attention
        fused = self._plain_norms and isinstance(block, Attention) and block.serves(x_TD)
        return fused and layout.cached is not None


class Transformer(nn.Module):
    """A decoder for flat tokens: `hidden` runs the layers, `head` makes logits or the loss."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.layers = nn.ModuleList(Layer(config, kind, index) for index, kind in enumerate(config.layers))
        self.norm = ResidualNorm(config)
        self.head = Head(config, self.embedding.weight if config.tied else None)
        self.ropes = list(dict.fromkeys(kind.rope for kind in config.layers if kind.rope is not None))
        self.rope_scales = [frequencies(rope, config.max_context)[1] for rope in self.ropes]
        self.reset_frequencies()

    def reset_frequencies(self) -> None:
        """Compute the rotary frequencies anew, in fp32, on the device of the embedding."""
        with torch.device(self.embedding.weight.device):
            for index, rope in enumerate(self.ropes):
                table_C, _ = frequencies(rope, self.config.max_context)
                self.register_buffer(f"frequencies_{index}", table_C, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Transformer:
        # Behind `to`, `cuda` and `to_empty`: frequencies must neither be rounded to bf16 nor left uninitialised.
        super()._apply(fn, recurse)
        self.reset_frequencies()
        return self

    def _tables(self, positions_T: Tensor) -> Tables:
        """cos and sin of this step's positions, once for all layers that share a rope."""
        return {
            rope: rotary_table(positions_T, getattr(self, f"frequencies_{index}"), self.rope_scales[index])
            for index, rope in enumerate(self.ropes)
        }

    def _scheduled(self, layout: Layout) -> Layout:
        """With this step's schedules of attention, once for all layers of one window; MLA is attended without."""
        paged = layout.cached
        if paged is None or layout.attention == "naive" or self.config.latent is not None:
            return layout
        return replace(layout, paged=paged.scheduled(dict.fromkeys(kind.window for kind in self.config.layers)))

    def hidden(self, tokens_T: Tensor, positions_T: Tensor, layout: Layout, recompute: Recompute = "none") -> Tensor:
        """Last hidden state of every token, normalised: [T, D]."""
        x_TD, residual_TD = self.embedding(tokens_T, positions_T), None
        tables, layout = self._tables(positions_T), self._scheduled(layout)
        # Full recomputation keeps what enters a layer: closed layers make that one tensor and not two.
        closed = recompute == "full"
        contexts = contexts_of(recompute)
        for layer in self.layers:
            if recompute == "none":
                x_TD, residual_TD = layer(x_TD, residual_TD, tables, layout)
            else:
                x_TD, residual_TD = checkpoint(
                    layer,
                    x_TD,
                    residual_TD,
                    tables,
                    layout,
                    closed,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=contexts,
                )
        return self.norm(x_TD, residual_TD)[0]

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        layout: Layout,
        targets_T: Tensor | None = None,
        select_B: Tensor | None = None,
        recompute: Recompute = "none",
        target_count: int = 0,
    ) -> Tensor:
        """The loss if there are targets, else logits: of every token, or of those that `select_B` names.

        target_count: how many targets the loss is the mean over, when these tokens are a part of a batch; 0: its own.
        """
        hidden_TD = self.hidden(tokens_T, positions_T, layout, recompute)
        return self.head(hidden_TD if select_B is None else hidden_TD[select_B], targets_T, target_count)

    @torch.no_grad()
    def initialize(self, seed: int = 0, std: float = 0.02) -> Transformer:
        """Random weights, N(0, std²) for matrices, identity for norms, zero for biases."""
        device = self.embedding.weight.device
        generator = torch.Generator(device=device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if "norm" in name:
                is_offset = self.config.norm_offset != 0.0 or name.endswith("bias")
                parameter.fill_(0.0 if is_offset else 1.0)
            elif parameter.dim() == 1 or name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, std, generator=generator)
        for name, buffer in self.named_buffers():
            if name.endswith("choice_bias_X"):
                buffer.zero_()
        return self
