"""The table of prices as a whole: its views, its names, its error, and how a price is added."""

from __future__ import annotations

import pytest
import torch
import torch.distributed._functional_collectives
import torch.distributed.fsdp

from rooflight.errors import UnpricedOp
from rooflight.ops import aten
from rooflight.ops.aten import registry
from rooflight.ops.cost import Access, Cost, Movement
from tests.priced import price_call, recording

SCHEMAS = {s.name: list(torch._C._jit_get_schemas_for_operator(s.name)) for s in torch._C._jit_get_all_schemas()}
# Views and same-tensor results whose schemas do not say that they alias.
UNDECLARED = {
    "aten::_unsafe_view", "aten::lift", "aten::unsafe_split", "aten::unsafe_split_with_sizes", "aten::unsafe_chunk",
    "aten::requires_grad_", "aten::atleast_1d", "aten::atleast_2d", "aten::atleast_3d", "aten::broadcast_tensors",
    "aten::_nested_get_values", "inductor::_reinterpret_tensor", "_c10d_functional::_wrap_tensor_autograd",
    "aten::data",
}  # fmt: skip


def _returns_tensors(schema: torch._C.FunctionSchema) -> bool:
    return any("Tensor" in str(r.type) for r in schema.returns)


@pytest.mark.parametrize("name", sorted(aten.ALIASES - UNDECLARED))
def test_aliases_share_the_storage_of_an_argument(name: str) -> None:
    tensors = [s for s in SCHEMAS.get(name, ()) if _returns_tensors(s) and "out" not in s.overload_name]
    if not tensors:
        pytest.skip(f"this torch has no {name}")
    for schema in tensors:
        assert any(a.alias_info is not None for a in schema.arguments), schema


@pytest.mark.parametrize("name", sorted(aten.METADATA - {"aten::_make_dep_token", "aten::record_stream"}))
def test_metadata_operators_produce_no_numbers(name: str) -> None:
    for schema in SCHEMAS.get(name, ()):
        # A few hand through a token, or small tensors of sizes, to keep an order; none computes on the data.
        tokens = "dep_token" in str(schema) or "record_function" in name or "nested_tensor" in name
        assert tokens or not _returns_tensors(schema), schema


@pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.ops.aten._unsafe_view(x, [6, 4]),
        lambda x: torch.ops.aten.lift(x),
        lambda x: torch.ops.aten.unsafe_split.Tensor(x, 2)[1],
        lambda x: torch.ops.aten.unsafe_split_with_sizes(x, [1, 3])[1],
    ],
)
def test_undeclared_views_share_storage_all_the_same(view) -> None:
    x = torch.randn(4, 6)
    assert view(x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_views_are_free_and_what_looks_like_one_but_copies_is_not() -> None:
    with recording() as record:
        x = torch.empty(4, 6)
        x.t().view(6, 2, 2)[1:, :, 0].unsqueeze(0).expand(3, 5, 2).permute(2, 0, 1).detach()
        x.unfold(1, 3, 1).diagonal(0, 0, 1)
        x.split(2)
        assert record.names == {"aten::empty.memory_format"}
        x.t().reshape(24)
    assert record.one("clone").total_bytes == 2 * 24 * 4
    assert record.one("clone").access is Access.STRIDED


def test_view_copies_are_priced_as_copies() -> None:
    cost = price_call(torch.permute_copy, (4, 6), dims=[1, 0]).one("permute_copy")
    assert (cost.bytes_read, cost.bytes_written) == (96, 96)


def test_allocation_is_an_explicit_zero_and_a_fill_is_its_writes() -> None:
    with recording() as record:
        x = torch.empty(8, 8)
        torch.empty_like(x)
        torch.zeros(8, 8)
        x.fill_(3.0)
        x.zero_()
    assert [c.total_bytes for c in record.named("empty") + record.named("empty_like")] == [0, 0]
    for name in ("zeros", "fill_", "zero_"):
        cost = record.one(name)
        assert (cost.bytes_read, cost.bytes_written, cost.total_flops) == (0, 256, 0)


def test_every_registered_name_is_an_operator_of_this_torch() -> None:
    pytest.importorskip("torch.nn.attention.varlen")
    version = tuple(int(v) for v in torch.__version__.split(".")[:2])
    missing = {
        n for n in aten.priced_names() if n.split(".")[0] not in SCHEMAS and n.split(".")[0] + "_" not in SCHEMAS
    }
    missing = {n for n in missing if not n.startswith(("torch_attn::", "aten::rooflight_test"))}
    assert version > (2, 13) or version < (2, 13) or missing == set()


@pytest.fixture
def foreign():
    library = torch.library.Library("rooflight_test", "FRAGMENT")
    library.define("double(Tensor x, Tensor y) -> Tensor")
    library.impl("double", lambda x, y: x * 2, "CPU")
    torch.library.register_fake("rooflight_test::double", lambda x, y: torch.empty_like(x), lib=library)
    yield torch.ops.rooflight_test.double
    registry._rules.pop("rooflight_test::double", None)
    registry.rule_of.cache_clear()
    library._destroy()


def test_an_operator_without_a_price_is_named_with_its_shapes_and_the_way_out(foreign) -> None:
    with pytest.raises(UnpricedOp) as error:
        args = (torch.empty(2, 3), torch.empty(5, dtype=torch.int64))
        aten.price(foreign.default, args, {}, torch.empty(2, 3))
    text = str(error.value)
    assert "\n" not in text
    for part in ("rooflight_test::double", "(2, 3) float32", "(5,) int64", "@rooflight.ops.aten.prices(", "Op"):
        assert part in text
    assert "torch.ops.rooflight_test.double)" in text


def test_a_price_can_be_added(foreign) -> None:
    @aten.prices(foreign)
    def double(call: aten.Call) -> Cost:
        return Cost(flops={"fp32": call["x"].numel()}, movement=(Movement.BROADCAST,))

    cost = price_call(foreign, (2, 3), (2, 3)).one("double")
    assert cost.total_flops == 6


def test_sparse_tensors_are_refused_rather_than_mispriced() -> None:
    x = torch.eye(3).to_sparse()
    with pytest.raises(UnpricedOp, match="sparse"):
        aten.price(torch.ops.aten.mul.Tensor, (x, x), {}, x)


def test_composites_fall_apart_and_priced_operators_do_not() -> None:
    assert aten.decomposes(torch.ops.aten.layer_norm.default)
    assert not aten.decomposes(torch.ops.aten.linear.default)
    assert not aten.decomposes(torch.ops.aten.mm.default)
    assert not aten.decomposes(torch.ops.aten.chunk.default)
    with torch.inference_mode():
        record = price_call(torch.nn.functional.layer_norm, (4, 8), [8])
    assert record.one("native_layer_norm").total_flops == 5 * 32
