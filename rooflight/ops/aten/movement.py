"""Copies, fills, allocations and random numbers: bytes with little or no arithmetic."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rooflight.ops.aten.registry import Call, Rule, base_name, fallback, prices
from rooflight.ops.aten.shapes import access_of, broadcasts, elements
from rooflight.ops.aten.views import ALIASES
from rooflight.ops.cost import Access, Cost, Count, Movement, Primitive, elementwise_cost


def _move(
    call: Call,
    reads: Iterable[Tensor],
    curve: str,
    *,
    flops: Count = 0,
    access: Access | None = None,
    movement: tuple[Movement, ...] = (),
) -> Cost:
    reads = tuple(reads)
    count = elements(call.writes)
    return elementwise_cost(
        flops,
        reads,
        call.writes,
        size=(count,),
        primitive=Primitive.DATA_MOVEMENT,
        access=access or access_of((*reads, *call.writes)),
        movement=movement,
    ).named(curve)


@prices(
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::empty_permuted", "aten::new_empty",
    "aten::new_empty_strided", "aten::resize", "aten::resize_as", "aten::_resize_output", "aten::_efficientzerotensor",
    "inductor::resize_storage_bytes_", "inductor::_alloc_from_pool", "aten::_empty_affine_quantized",
    "aten::_empty_per_channel_affine_quantized", "aten::_cudnn_init_dropout_state",
)  # fmt: skip
def allocate(call: Call) -> Cost:
    """Memory is reserved and nothing is written to it: a launch-free zero."""
    return Cost(primitive=Primitive.DATA_MOVEMENT, curve="allocate")


@prices("_c10d_functional::wait_tensor", "c10d::check_for_nan")
def wait(call: Call) -> Cost:
    """A point where a collective's result is waited for; the collective itself carries the bytes."""
    return Cost(primitive=Primitive.DATA_MOVEMENT, curve="wait")


@prices(
    "aten::zeros", "aten::zeros_like", "aten::new_zeros", "aten::ones", "aten::ones_like", "aten::new_ones",
    "aten::full", "aten::full_like", "aten::new_full", "aten::fill", "aten::zero", "aten::arange", "aten::range",
    "aten::linspace", "aten::logspace", "aten::eye", "aten::scalar_tensor", "aten::tril_indices",
    "aten::triu_indices", "aten::_new_zeros_with_same_feature_meta", "aten::fft_fftfreq", "aten::fft_rfftfreq",
    "aten::hann_window", "aten::hamming_window", "aten::blackman_window", "aten::bartlett_window",
    "aten::kaiser_window", "aten::fill_diagonal", "aten::_fill_mem_eff_dropout_mask",
)  # fmt: skip
def fill(call: Call) -> Cost:
    """Every element written once; a value that is a tensor is read."""
    value = call.get("value", "fill_value")
    return _move(call, (value,) if isinstance(value, Tensor) else (), "fill")


@prices(
    "aten::normal", "aten::uniform", "aten::bernoulli_", "aten::random", "aten::exponential", "aten::geometric",
    "aten::log_normal", "aten::cauchy", "aten::rand", "aten::randn", "aten::randint", "aten::rand_like",
    "aten::randn_like", "aten::randint_like", "aten::randperm", "aten::normal_functional", "aten::_philox_normal",
    "aten::_philox_uniform",
)  # fmt: skip
def random(call: Call) -> Cost:
    """A draw is counted as one operation an element; tensors of parameters are read, the old values are not."""
    written = {id(t) for t in call.writes}
    names = ("mean", "std", "p")
    reads = (v for v in (call.get(n) for n in names) if isinstance(v, Tensor) and id(v) not in written)
    return _move(call, reads, "fill", flops=elements(call.writes))


@prices(
    "aten::bernoulli", "aten::poisson", "aten::binomial", "aten::_standard_gamma", "aten::_sample_dirichlet",
    "aten::_standard_gamma_grad", "aten::_dirichlet_grad",
)  # fmt: skip
def sample(call: Call) -> Cost:
    """A draw with a parameter an element."""
    return _move(call, call.reads, "elementwise", flops=2 * elements(call.writes))


@prices("aten::native_dropout", "aten::_fused_dropout")
def dropout(call: Call) -> Cost:
    """Draw, compare, scale; the mask is written besides."""
    output = call.first_output()
    return elementwise_cost(3 * output.numel(), call.reads, call.writes, size=(output.numel(),)).named("elementwise")


@prices(
    "aten::clone", "aten::_to_copy", "aten::cat", "aten::stack", "aten::_stack", "aten::_chunk_cat",
    "aten::block_diag", "aten::repeat", "aten::tile", "aten::roll", "aten::flip", "aten::rot90",
    "aten::constant_pad_nd", "aten::pad", "aten::reflection_pad1d", "aten::reflection_pad2d", "aten::reflection_pad3d",
    "aten::replication_pad1d", "aten::replication_pad2d", "aten::replication_pad3d", "aten::pixel_shuffle",
    "aten::pixel_unshuffle", "aten::channel_shuffle", "aten::native_channel_shuffle", "aten::copy",
    "aten::_lazy_clone", "aten::lift_fresh_copy", "aten::_conj_copy", "aten::diag_embed", "aten::select_scatter",
    "aten::slice_scatter", "aten::diagonal_scatter", "aten::as_strided_scatter", "aten::_pin_memory",
    "aten::_local_scalar_dense", "aten::select_backward", "aten::slice_backward", "aten::diagonal_backward",
    "aten::resolve_conj", "aten::resolve_neg", "aten::_padded_dense_to_jagged_forward",
    "aten::_jagged_to_padded_dense_forward", "aten::to_padded_tensor", 
    "aten::_copy_from", "aten::_copy_from_and_resize", "fsdp::all_gather_copy_in", "aten::_transform_bias_rescale_qkv",
    "aten::lu_unpack", "aten::mkldnn_reorder_conv2d_weight", "aten::mkldnn_reorder_conv3d_weight",
)  # fmt: skip
def copy(call: Call) -> Cost:
    """Every byte read once and written once; no arithmetic, a change of type included."""
    written = {id(t) for t in call.writes}
    reads = tuple(t for t in call.reads if id(t) not in written)
    output = call.writes[0] if call.writes else None
    spread = output is not None and broadcasts(reads, output)
    return _move(call, reads, "copy", movement=(Movement.BROADCAST,) if spread else ())


@prices("aten::copy_", "aten::set_data", "fsdp::copy_", "aten::resize_as_sparse_")
def copy_into(call: Call) -> Cost:
    """The source read, the target written; the target's old values are not read."""
    target: Tensor = call.get("self", "tensor")
    source = tuple(t for t in call.reads if t is not target)
    spread = (Movement.BROADCAST,) if broadcasts(source, target) else ()
    return _move(call, source, "copy", movement=spread)


@prices("fsdp::split_with_sizes_copy", "fsdp::chunk_cat")
def copy_out(call: Call) -> Cost:
    return _move(call, call.reads, "copy")


@prices(
    "aten::reflection_pad1d_backward", "aten::reflection_pad2d_backward", "aten::reflection_pad3d_backward",
    "aten::replication_pad1d_backward", "aten::replication_pad2d_backward", "aten::replication_pad3d_backward",
    "aten::unfold_backward",
)  # fmt: skip
def fold_back(call: Call) -> Cost:
    """Gradients of elements that were copied to several places are added up; the input's values are not read."""
    grad: Tensor = call.get("grad_output", "grad_in")
    return _move(
        call, (grad,), "scatter", flops=grad.numel(), access=Access.STRIDED,
        movement=(Movement.SCATTER, Movement.REDUCTION),
    )  # fmt: skip


@prices("aten::tril", "aten::triu")
def triangle(call: Call) -> Cost:
    """A copy with one side zeroed."""
    return _move(call, call.reads, "copy")


@prices("aten::affine_grid_generator", "aten::affine_grid_generator_backward")
def affine_grid(call: Call) -> Cost:
    """A small matrix times every position's homogeneous coordinates, or the sum back."""
    positions: Tensor = call.get("grad") if call.name.endswith("backward") else call.first_output()
    return _move(call, call.reads, "elementwise", flops=2 * positions.numel() * (positions.shape[-1] + 1))


@fallback
def find_view_copy(func: torch._ops.OpOverload) -> Rule | None:
    """`aten::permute_copy` and its kin: what the view would show, written out."""
    name = base_name(func)
    return copy if name.endswith("_copy") and name.removesuffix("_copy") in ALIASES else None
