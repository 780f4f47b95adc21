"""`ModelConfig`: everything that defines a decoder, frozen, independent of any publisher's file format.

Integer sizes may be symbolic: the same model is then traced to a formula.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from rooflight.errors import InvalidValue


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions: base, how many of the head's dimensions turn, and how long contexts stretch them.

    kind: default | linear | llama3 | yarn | longrope; the other fields are those that the kind reads.
    """

    theta: float
    dims: Any
    interleaved: bool = False
    kind: str = "default"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, 2405.04434): keys and values from one compressed vector a token."""

    q_rank: int  # 0: queries are not compressed
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    norm_eps: float = 1e-6  # of the two norms inside; the released code does not take the model's


@dataclass(frozen=True, slots=True)
class MoE:
    """Mixture of experts: how a token is routed and how wide an expert is; see ops/routing.py for the scorings."""

    experts: int
    top_k: int
    width: Any
    shared_width: Any = 0
    scoring: str = "softmax"
    normalize: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    router_bias: bool = False
    choice_bias: bool = False  # added to the scores for the choice alone (DeepSeek-V3)
    expert_bias: bool = False


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What may differ from one layer to the next; layers of one kind cost the same."""

    window: int
    rope: Rope | None
    sparse: bool


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder: GPT-2, Llama, Mistral, Qwen, Gemma, Phi, gpt-oss, Mixtral and DeepSeek are settings of it."""

    family: str
    vocab_size: Any
    width: Any
    heads: Any
    kv_heads: Any
    head_dim: Any
    ffn_width: Any
    layers: tuple[LayerKind, ...]
    max_context: int
    norm: str = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    post_norms: bool = False
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_scale: float | None = None
    attention_softcap: float = 0.0
    logits_softcap: float = 0.0
    sinks: bool = False
    learned_positions: int = 0
    embedding_scale: float = 1.0
    tied: bool = False
    moe: MoE | None = None
    latent: Latent | None = None
    dtype: str = "bfloat16"
    name: str = ""

    @property
    def scale(self) -> float:
        """Factor on q·kᵀ, 1/√head_dim unless the model sets its own."""
        return self.attention_scale if self.attention_scale is not None else float(self.head_dim) ** -0.5

    @property
    def kv_elements_per_token_layer(self) -> Any:
        """Elements that one token leaves in one layer's cache: 2·kv_heads·head_dim; MLA: the latent and its rope."""
        if self.latent is not None:
            return self.latent.kv_rank + self.latent.rope_dim
        return 2 * self.kv_heads * self.head_dim

    def folded(self) -> tuple[ModelConfig, tuple[int, ...]]:
        """The same decoder with each distinct layer once, and how often each stands in the whole.

        The first layer is kept apart: only it has no residual to add in its first norm, so folding stays exact.
        """
        kinds: dict[tuple[bool, LayerKind], int] = {}
        for index, kind in enumerate(self.layers):
            key = (index == 0, kind)
            kinds[key] = kinds.get(key, 0) + 1
        return replace(self, layers=tuple(kind for _, kind in kinds)), tuple(kinds.values())

    def layer_order(self) -> tuple[int, ...]:
        """For each layer of the whole, the index of the folded layer that stands for it."""
        folded, _ = self.folded()
        index = {(i == 0, kind): i for i, kind in enumerate(folded.layers)}
        return tuple(index[(i == 0, kind)] for i, kind in enumerate(self.layers))

    def check(self) -> ModelConfig:
        """Raise InvalidValue on sizes that no decoder can have."""
        for name in ("vocab_size", "width", "heads", "kv_heads", "head_dim", "ffn_width", "max_context"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise InvalidValue(f"model config: {name} is {value!r}; it must be a positive integer")
        if not self.layers:
            raise InvalidValue("model config: the number of layers is 0; it must be a positive integer")
        if self.latent is None and self.heads % self.kv_heads:
            raise InvalidValue(
                f"model config: {self.kv_heads} key heads do not divide {self.heads} query heads; "
                f"use one of {', '.join(map(str, divisors(self.heads)))}"
            )
        if self.moe is not None and self.moe.top_k > self.moe.experts:
            raise InvalidValue(
                f"model config: {self.moe.top_k} experts a token are more than the {self.moe.experts} there are"
            )
        return self


def divisors(n: int) -> list[int]:
    """Every positive divisor of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def same_layers(count: int, window: int = 0, rope: Rope | None = None, sparse: bool = False) -> tuple[LayerKind, ...]:
    """`count` layers of one kind."""
    return tuple(LayerKind(window, rope, sparse) for _ in range(count))


def layers_from(windows: Iterable[int], ropes: Iterable[Rope | None], sparse: Iterable[bool]) -> tuple[LayerKind, ...]:
    """Layers from parallel lists of what may differ."""
    return tuple(LayerKind(*kind) for kind in zip(windows, ropes, sparse, strict=True))
