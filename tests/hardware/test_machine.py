"""Roofs, bounds, ridge, stand-in units and links, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from rooflight.errors import InvalidValue
from rooflight.hardware import Figure, Link, Machine, load


def simple(**changes: object) -> Machine:
    """1 TFLOP/s in fp32, 4 in bf16, 100 GB/s, one link of 10 GB/s."""
    values: dict[str, object] = {
        "name": "simple",
        "title": "Simple",
        "kind": "gpu",
        "peaks": {"fp32": Figure(1e12, "by hand"), "bf16": Figure(4e12, "by hand")},
        "memory_bandwidth": Figure(1e11, "by hand"),
        "memory_bytes": Figure(16e9, "by hand"),
        "launch_eager_seconds": Figure(1e-5, "by hand"),
        "launch_graph_seconds": Figure(1e-6, "by hand"),
        "links": {"wire": Link("wire", 1e-6, 1e10, 8, "by hand"), "net": Link("net", 1e-5, 1e9, 64, "by hand")},
    }
    return Machine(**{**values, **changes})  # type: ignore[arg-type]


def test_roof_names_the_largest_term() -> None:
    machine = simple()
    assert machine.roof_seconds({"bf16": 4e9}, 1e7) == (pytest.approx(1e-3), "compute")
    assert machine.roof_seconds({"bf16": 4e8}, 1e8) == (pytest.approx(1e-3), "memory")
    assert machine.roof_seconds({"bf16": 4e8}, 1e7, 1e8) == (pytest.approx(1e-2), "communication")
    assert machine.roof_seconds({"bf16": 4e8}, 1e7, 1e8, "net") == (pytest.approx(1e-1), "communication")
    assert machine.roof_seconds({}, 0)[0] == 0


def test_units_of_different_precisions_overlap() -> None:
    # 4e9 on the bf16 units and 5e8 on the fp32 units: 1 ms and 0.5 ms, side by side.
    assert simple().roof_seconds({"bf16": 4e9, "fp32": 5e8}, 0)[0] == pytest.approx(1e-3)


def test_ridge_is_peak_over_bandwidth() -> None:
    machine = simple()
    assert machine.ridge("bf16") == pytest.approx(40)
    at_ridge = machine.roof_seconds({"bf16": 40e6}, 1e6)[0]
    assert at_ridge == pytest.approx(1e-5)
    assert machine.roof_seconds({"bf16": 41e6}, 1e6)[1] == "compute"
    assert machine.roof_seconds({"bf16": 39e6}, 1e6)[1] == "memory"
    assert load("h200").ridge("bf16") == pytest.approx(989.4 / 4.8)


@pytest.mark.parametrize(
    ("name", "precision", "unit"),
    [
        ("a100-80gb", "fp8", "bf16"),
        ("v100", "bf16", "fp16"),
        ("v100", "int8", "fp16"),
        ("v100", "tf32", "fp32"),
        ("h100-sxm", "fp4", "fp8"),
        ("tpu-v5e", "fp64", "fp32"),
        ("h200", "fp32", "fp32"),
    ],
)
def test_missing_units_have_a_named_stand_in(name: str, precision: str, unit: str) -> None:
    machine = load(name)
    assert machine.peak(precision) == (machine.peaks[unit].value, unit)


def test_unknown_precision_is_one_clear_line() -> None:
    with pytest.raises(InvalidValue, match=r"'fp7'; use one of fp64, fp32"):
        simple().peak("fp7")


def test_no_unit_and_no_stand_in_is_an_error() -> None:
    with pytest.raises(InvalidValue, match="no fp32 unit"):
        simple(peaks={"bf16": Figure(1e12, "by hand")}).peak("fp32")


def test_link_for_takes_the_fastest_that_reaches() -> None:
    machine = simple()
    assert machine.link_for(8).name == "wire"
    assert machine.link_for(9).name == "net"
    with pytest.raises(InvalidValue, match=r"65 ranks.*wire \(8\), net \(64\)"):
        machine.link_for(65)
    with pytest.raises(InvalidValue, match="no link 'rope'; it has wire, net"):
        machine.link("rope")


def test_a_cache_has_a_roof_of_its_own_only_where_it_was_measured() -> None:
    caches = {"l2": Figure(1e6, "by hand")}
    assert simple(caches=caches).bandwidth_at(5e5) == 1e11
    machine = simple(caches=caches, measured={"bandwidth.l2": Figure(1e12, "by hand")})
    assert machine.bandwidth_at(5e5) == 1e12
    assert machine.bandwidth_at(5e6) == 1e11
