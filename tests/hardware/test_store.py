"""Machine files: a round trip loses nothing, every name finds its machine, every bad value is one clear error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rooflight.errors import InvalidValue
from rooflight.hardware import Figure, catalog, here_path, load, save
from rooflight.hardware.schema import parse
from rooflight.hardware.store import dumps


@pytest.mark.parametrize("name", catalog())
def test_round_trip(name: str, tmp_path: Path) -> None:
    machine = load(name)
    again = load(save(machine, tmp_path / "machine.toml"))
    assert again == machine
    assert [path.name for path in tmp_path.iterdir()] == ["machine.toml"], "no draft is left behind"


def test_round_trip_keeps_odd_texts_and_options() -> None:
    machine = replace(
        load("l4"),
        title='a "quoted" \\ title\nof two lines, in µs',
        price_per_hour=Figure(0.71, "a list price"),
        aliases=("x", "y"),
    )
    assert parse(dumps(machine), "text") == replace(machine, reference=None)


def test_here_is_the_probed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert here_path() == tmp_path / "rooflight" / "here.toml"
    with pytest.raises(InvalidValue, match="run `rooflight probe`"):
        load("here")
    save(replace(load("l4"), name="here"))
    assert load("HERE").memory_bandwidth.value == 300e9


def test_unknown_names_are_told_the_close_ones() -> None:
    with pytest.raises(InvalidValue, match="unknown machine 'h20o'; did you mean .*h200") as error:
        load("h20o")
    for name in catalog():
        assert name in str(error.value)
    with pytest.raises(InvalidValue, match="no machine file 'missing.toml'"):
        load("missing.toml")
    assert "\n" not in str(error.value)


L4 = dumps(load("l4"))


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('kind = "gpu"', 'kind = "abacus"', "kind is 'abacus'; it must be one of gpu, cpu, tpu"),
        ('name = "l4"', "name = 4", "name is 4; it must be a text"),
        ('name = "l4"', 'nome = "l4"', "a key is 'nome'"),
        (
            '"bf16" = { value = 121000000000000',
            '"bf16" = { value = -1',
            r"peaks.bf16.value is -1; it must be more than",
        ),
        (
            '"bf16" = { value = 121000000000000',
            '"bf16" = { value = nan',
            "peaks.bf16.value is nan; it must be a finite",
        ),
        ('"bf16" = { value = 121000000000000', '"bf16" = { value = "fast"', "peaks.bf16.value is 'fast'"),
        ('"bf16" = {', '"bf17" = {', "a key of peaks is 'bf17'; it must be one of fp64"),
        ('"fp32" = {', '"tf32x" = {', "a key of peaks is 'tf32x'"),
        ("[memory]", "[memori]", "a key is 'memori'"),
        ('"capacity" = {', '"size" = {', "memory.capacity is None"),
        ("domain = 8", "domain = 0", "links.pcie.domain is 0; it must be a whole number"),
        ("domain = 8", 'domain = "all"', "links.pcie.domain is 'all'"),
        ("[memory]", "[memory", "is not valid TOML"),
        ("[launch]", "[[launch]]", "launch is .* it must be a table"),
    ],
)
def test_each_bad_value_is_one_clear_line(old: str, new: str, complaint: str, tmp_path: Path) -> None:
    assert old in L4
    path = tmp_path / "bad.toml"
    path.write_text(L4.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InvalidValue, match=complaint) as error:
        load(path)
    assert "bad.toml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (
            '{ curve = "linear", precision = "bf16", size = [1, 2], flops = {}, bytes = 1 }',
            r"rows\[0\].seconds is None",
        ),
        ('{ curve = "linear", precision = "b", size = [1], flops = {}, bytes = 1, seconds = 1 }', "precision is 'b'"),
        ('{ curve = "linear", precision = "bf16", size = [0], flops = {}, bytes = 1, seconds = 1 }', "size is 0"),
        ('{ curve = "linear", precision = "bf16", size = [1], flops = { x = 1 }, bytes = 1, seconds = 1 }', "flops is"),
        ('{ curve = "linear", precision = "bf16", size = [1], flops = {}, bytes = 1, seconds = 0 }', "more than zero"),
        ('"linear"', "it must be a table"),
    ],
)
def test_each_bad_sample_is_named_by_its_place(row: str, complaint: str) -> None:
    with pytest.raises(InvalidValue, match=complaint):
        parse(f'{L4}\n[samples]\nsource = "by hand"\nrows = [{row}]\n', "text")


def test_a_truncated_or_binary_file_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "cut.toml"
    path.write_text(L4[: len(L4) // 2], encoding="utf-8")
    with pytest.raises(InvalidValue, match="cut.toml"):
        load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidValue, match="cannot be read"):
        load(path)
