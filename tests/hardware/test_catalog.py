"""The shipped machines: complete, sourced, dense, and found by every name that they answer to."""

from __future__ import annotations

import pytest

from rooflight.hardware import Figure, Machine, catalog, load, match_device

ASKED_FOR = {
    "a100-40gb", "a100-80gb", "h100-sxm", "h100-pcie", "h200", "h20", "b200", "l4", "l40s", "rtx-4090", "mi300x",
    "tpu-v5e", "xeon-6980p", "laptop-cpu",
}  # fmt: skip


def figures(machine: Machine) -> dict[str, Figure]:
    found = {f"peaks.{name}": figure for name, figure in machine.peaks.items()}
    found |= {f"caches.{name}": figure for name, figure in machine.caches.items()}
    found |= {f"measured.{name}": figure for name, figure in machine.measured.items()}
    found["bandwidth"], found["capacity"] = machine.memory_bandwidth, machine.memory_bytes
    found["eager"], found["graph"] = machine.launch_eager_seconds, machine.launch_graph_seconds
    for name in ("power_watts", "price_per_hour"):
        if getattr(machine, name) is not None:
            found[name] = getattr(machine, name)
    return found


def test_the_asked_for_machines_ship() -> None:
    assert set(catalog()) >= ASKED_FOR
    assert len(catalog()) >= 16


@pytest.mark.parametrize("name", catalog())
def test_every_figure_has_a_value_and_a_source(name: str) -> None:
    machine = load(name)
    assert machine.name == name
    for key, figure in figures(machine).items():
        assert figure.value > 0, key
        assert len(figure.source) > 5, key
    assert machine.links, "a machine without links cannot be one of many"
    for link in machine.links.values():
        assert link.bandwidth_bytes_per_s > 0 and link.domain >= 2 and len(link.source) > 5
    assert {"bf16", "fp16", "fp32"} & set(machine.peaks)
    assert not machine.samples or machine.samples_source


@pytest.mark.parametrize("name", catalog())
def test_figures_are_of_the_right_magnitude(name: str) -> None:
    """A unit slip (GB for bytes, TFLOP for FLOP, bits for bytes) is at least a factor of eight."""
    machine = load(name)
    assert 2e9 < machine.memory_bytes.value < 2e12
    assert 2e10 < machine.memory_bandwidth.value < 1e13
    assert 1e11 < machine.peaks["fp32"].value < 2e14
    assert 1e-7 < machine.launch_graph_seconds.value <= machine.launch_eager_seconds.value < 1e-4
    narrow = [
        machine.peaks[precision].value for precision in ("fp32", "bf16", "fp8", "fp4") if precision in machine.peaks
    ]
    assert narrow == sorted(narrow), "a narrower format is never slower"


@pytest.mark.parametrize(
    ("name", "precision", "dense"),
    [
        ("h200", "bf16", 989.4e12),
        ("h200", "fp8", 1978.9e12),
        ("h200", "tf32", 494.7e12),
        ("h100-sxm", "fp16", 989.4e12),
        ("a100-80gb", "bf16", 312e12),
        ("a100-80gb", "int8", 624e12),
        ("b200", "fp4", 9e15),
        ("b200", "bf16", 2.25e15),
        ("l4", "bf16", 121e12),
        ("l40s", "fp8", 733e12),
        ("mi300x", "bf16", 1307.4e12),
    ],
)
def test_peaks_are_dense_not_sparse(name: str, precision: str, dense: float) -> None:
    assert load(name).peak(precision) == (dense, precision)


@pytest.mark.parametrize("name", catalog())
def test_no_sample_or_ceiling_beats_its_roof(name: str) -> None:
    machine = load(name)
    for sample in machine.samples:
        roof, _ = machine.roof_seconds(sample.flops, sample.bytes, sample.link_bytes)
        assert roof <= sample.seconds * 1.0001, sample
    for key, figure in machine.measured.items():
        if key.startswith("matmul."):
            assert figure.value <= machine.peak(key.removeprefix("matmul."))[0]
        if key in ("copy", "read"):
            assert figure.value <= machine.memory_bandwidth.value


def test_h200_carries_the_measured_ceilings() -> None:
    h200 = load("h200")
    assert h200.measured["copy"].value == pytest.approx(4.31e12)
    assert h200.launch_eager_seconds.value == pytest.approx(7.9e-6)
    curves = {sample.curve for sample in h200.samples}
    assert curves >= {"linear", "attention", "attention_backward", "add_rms_norm", "softmax", "paged_attention", "copy"}
    assert curves >= {"all_reduce", "all_gather", "reduce_scatter", "send"}
    # 4096³ at 731 TFLOP/s is 188 µs.
    square = h200.estimate("linear", "bf16", (4096,) * 3, {"bf16": 2 * 4096.0**3}, 3 * 2 * 4096.0**2, "matrix multiply")
    assert square.provenance == "measured"
    assert square.seconds == pytest.approx(188e-6, rel=2e-3)


@pytest.mark.parametrize(("alias", "name"), [("H100", "h100-sxm"), ("xeon", "xeon-6980p"), ("A100", "a100-80gb")])
def test_aliases_in_any_case(alias: str, name: str) -> None:
    assert load(alias).name == name


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ],
)
def test_drivers_names_find_their_machine(device: str, name: str) -> None:
    found = match_device(device)
    assert found is not None and found.name == name


def test_a_device_that_nobody_knows_matches_nothing() -> None:
    assert match_device("NVIDIA GeForce GT 710") is None
