"""The operators that move nothing: aliases of a tensor that exists, or questions about it."""

from __future__ import annotations


def _aten(names: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in names.split())


# Their results share the storage of an argument, or are the argument with other sizes and strides.
ALIASES: frozenset[str] = _aten(
    """
    view _unsafe_view t transpose permute expand slice select split split_with_sizes unbind as_strided detach alias
    squeeze unsqueeze diagonal unfold chunk lift_fresh lift _reshape_alias view_as view_as_real view_as_complex _conj
    _neg_view real imag narrow movedim moveaxis swapaxes swapdims expand_as broadcast_to broadcast_tensors unflatten
    hsplit vsplit dsplit tensor_split unsafe_split unsafe_split_with_sizes unsafe_chunk numpy_T mT mH adjoint matrix_H
    slice_inverse values _values indices _indices crow_indices col_indices ccol_indices row_indices _fw_primal
    _make_dual _unpack_dual data t_ transpose_ squeeze_ unsqueeze_ swapaxes_ swapdims_ detach_ as_strided_ set_
    atleast_1d atleast_2d atleast_3d _nested_view_from_buffer _nested_view_from_jagged _nested_get_values
    requires_grad_
    """
) | frozenset(("inductor::_reinterpret_tensor", "_c10d_functional::_wrap_tensor_autograd"))

# They read sizes, devices and flags, which are on the host, or mark a point in the program.
METADATA: frozenset[str] = _aten(
    """
    sym_size sym_stride sym_numel sym_storage_offset sym_is_contiguous size stride storage_offset numel dim
    is_contiguous is_same_size is_pinned is_set_to is_floating_point is_complex is_conj is_neg is_inference
    sym_constrain_range sym_constrain_range_for_size _functional_sym_constrain_range
    _functional_sym_constrain_range_for_size _assert_scalar _functional_assert_scalar _assert_tensor_metadata
    _assert_async _functional_assert_async _make_dep_token _has_same_storage_numel record_stream _version
    _fused_sdp_choice _nested_tensor_size _nested_tensor_strides _nested_tensor_storage_offsets dense_dim sparse_dim
    result_type _linalg_check_errors promote_types can_cast _print _use_cudnn_ctc_loss
    """
) | frozenset(
    (
        "prim::device",
        "prim::layout",
        "profiler::_record_function_enter",
        "profiler::_record_function_enter_new",
        "profiler::_record_function_exit",
        "streams::record_event",
        "streams::wait_event",
    )
)

VIEWS: frozenset[str] = ALIASES | METADATA
