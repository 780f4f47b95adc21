"""Any torch module by its factory: what is priced, under which names, and what is said where it cannot be."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rooflight.cli.main import main
from rooflight.errors import InvalidValue, RooflightError, UntraceableModule
from rooflight.hardware import load
from rooflight.workload import factory, measure, walk
from rooflight.workload.align import align
from rooflight.workload.any_module import any_module
from rooflight.workload.explain import explain_module
from rooflight.workload.explanation import Explanation
from rooflight.workload.program import Setting

HERE = Path(__file__).parent


def _explain(name: str, phase: str = "prefill", by: str = "component", dtype: torch.dtype | None = None) -> Explanation:
    make = factory.load_factory(f"tests.workload.modules:{name}", dtype)
    setting = Setting(phase=phase, context=1, dtype="fp32")
    return explain_module(name, lambda: any_module(*factory.fake(make), setting), load("a100-80gb"), setting, by=by)


def _flops(explanation: Explanation, component: str) -> float:
    return sum(row.flops for row in explanation.rows if row.component == component)


def test_layers_of_a_list_are_one_component_and_the_wrapper_is_not_named() -> None:
    found = _explain("language")
    assert [row.component for row in found.rows] == [
        "embed",
        "layers.*.norm",
        "layers.*.up",
        "layers.* itself",
        "layers.*.down",
        "head",
    ]
    tokens, layers = 10, 3
    assert _flops(found, "layers.*.down") == layers * tokens * (2 * 64 * 16 + 16)
    assert _flops(found, "head") == 2 * tokens * 16 * 50
    assert sum(row.count for row in found.rows if row.component == "layers.*.up") == layers


def test_training_adds_the_loss_and_the_optimizer_at_the_end() -> None:
    names = [row.component for row in _explain("language", "train").rows]
    assert names[-2:] == ["loss", "optimizer"]
    assert not any(name.startswith("Language") for name in names)


def test_shared_parameters_count_once() -> None:
    block = 2 * 16 + (16 * 64 + 64) + (64 * 16 + 16)
    assert _explain("language").params == {
        "total": 50 * 16 + 3 * block,
        "active": 50 * 16 + 3 * block,
        "embedding": 50 * 16,
    }


def test_rows_by_layer_are_the_layers_of_the_module() -> None:
    paths = [row.path for row in _explain("language", by="layer").rows]
    assert [path for path in paths if "layers" in path] == [f"model.layers.{index}" for index in range(3)]


def test_a_bare_index_stands_with_its_class() -> None:
    assert [row.component for row in _explain("pipeline").rows] == ["0 Conv2d", "1 ReLU", "3 Linear"]


def test_many_numbered_children_are_one_component() -> None:
    (row,) = _explain("many").rows
    assert (row.component, row.count) == ("block*", 40)


def test_settings_say_what_was_run_and_nothing_else() -> None:
    assert _explain("half").settings == {"arguments": "bfloat16 [4, 8]", "launch": "eager"}
    assert _explain("half").dtype == "bf16"
    assert _explain("half", "train").settings["optimizer"] == "adamw"


def test_a_dtype_casts_module_and_arguments() -> None:
    found = _explain("pipeline", dtype=torch.bfloat16)
    assert found.dtype == "bf16"
    assert found.settings["arguments"] == "bfloat16 [2, 3, 32, 32]"
    assert 2 * found.memory.weights == _explain("pipeline").memory.weights


def test_named_arguments_and_a_loss_among_the_outputs() -> None:
    assert {"inner", "unused"} <= {row.component for row in _explain("named").rows}
    backward = [row for row in _explain("named", "train").points if row.phase == "backward"]
    assert any(row.path == "inner" for row in backward)
    assert not any(row.path == "unused" for row in backward)


def test_tensors_deep_in_an_output_carry_the_backward() -> None:
    found = _explain("dataclass_output", "train")
    assert any(row.phase == "backward" and row.path == "inner" for row in found.points)


def test_an_output_without_a_gradient_is_one_line() -> None:
    with pytest.raises(InvalidValue, match=r"NoneType.*carries a gradient.*--phase prefill"):
        _explain("no_output", "train")


def test_inference_is_in_evaluation_mode_and_training_as_it_was_made() -> None:
    assert {row.component for row in _explain("dropout").rows} == {"0 Linear"}
    assert "1 Dropout" in {row.component for row in _explain("dropout", "train").rows}


@pytest.mark.parametrize("name", ["on_a_gpu", "compiled", "needs_values"])
def test_what_a_factory_does_elsewhere_is_priced_here(name: str) -> None:
    assert _explain(name).totals.flops >= 2 * 4 * 8 * 8


def test_a_compiled_module_shows_its_own_parts() -> None:
    assert [row.component for row in _explain("compiled").rows] == ["0 Linear", "1 ReLU"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lazy", "parameter weight has no shape yet: call the module once"),
        ("values", "_local_scalar_dense.*modules.py:[0-9]+ in forward.*asks for a tensor's values"),
        ("wrong_shape", "same reduction dim.*check that the module runs on these arguments"),
        ("fails", "factory failed: ValueError: no such checkpoint .modules.py:[0-9]+ in fails"),
        ("only_a_module", "returned a Linear; it must return .module, example_args."),
        ("absent", "no function 'absent'; it has .*language"),
    ],
)
def test_what_cannot_be_priced_is_one_line_that_says_what_to_do(name: str, said: str) -> None:
    with pytest.raises(RooflightError, match=said) as caught:
        _explain(name)
    assert "\n" not in str(caught.value)
    assert "imported" not in str(caught.value)


def test_a_file_is_imported_with_its_neighbours_in_reach(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_it.py").write_text("import torch\nlayer = torch.nn.Linear(8, 8)\n")
    (tmp_path / "model_file.py").write_text(
        "import torch\nfrom neighbour_of_it import layer\ndef make(): return layer, torch.randn(4, 8)\n"
    )
    module, args = factory.load_factory(f"{tmp_path / 'model_file.py'}:make")()
    assert isinstance(module, torch.nn.Linear)
    assert isinstance(args, tuple)
    with pytest.raises(InvalidValue, match="no file"):
        factory.load_factory(f"{tmp_path / 'other.py'}:make")
    (tmp_path / "broken.py").write_text("import torch\nraise KeyError('x')\n")
    with pytest.raises(InvalidValue, match=r"does not import: KeyError: 'x' .broken.py:2"):
        factory.load_factory(f"{tmp_path / 'broken.py'}:make")


def test_seventy_billion_parameters_take_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = _explain("enormous", "train")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < (2**20 if sys.platform != "darwin" else 2**30)  # KiB, but bytes on a Mac
    parameters = 80 * 29576**2
    assert found.params["total"] == parameters
    assert found.memory.optimizer == pytest.approx(8 * parameters, rel=1e-6)


@pytest.mark.parametrize("name", ["language", "named", "pipeline", "dropout"])
@pytest.mark.parametrize("phase", ["prefill", "train"])
def test_a_wet_run_does_what_the_dry_one_priced(name: str, phase: str) -> None:
    make = factory.load_factory(f"tests.workload.modules:{name}")
    setting = Setting(phase=phase, context=1, dtype="fp32")
    dry = walk.dry(lambda: any_module(*factory.fake(make), setting))
    wet = walk.record(measure.wet_module(make, setting, "cpu"))
    assert [record.name for record in dry.trace.records] == [record.name for record in wet.trace.records]


def test_fake_needs_a_module_that_can_be_traced() -> None:
    with pytest.raises(UntraceableModule), walk.fake_tensors():
        factory.fake(factory.load_factory("tests.workload.modules:lazy"))


@pytest.mark.parametrize(
    "option", [["--batch", "4"], ["--context", "8"], ["--attention", "naive"], ["--recompute", "full"]]
)
def test_an_option_for_decoders_is_refused_rather_than_ignored(
    option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "tests.workload.modules:language", "--on", "h200", *option]) == 2
    said = capsys.readouterr().err
    assert f"{' '.join(option)} does not reach a module of your own" in said
    assert said.count("\n") == 1


def _aligned(predicted: Sequence[str], names: Sequence[str]) -> tuple[list[float], list[str]]:
    return align(predicted, names, [float(index + 1) for index in range(len(names))])


def test_runs_that_differ_in_copies_are_laid_side_by_side() -> None:
    seconds, notes = _aligned("ab_cdefgh", "abcdefgh")
    assert seconds == [1.0, 2.0, 0.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    assert notes == ["1 operations of the dry run alone, for strides that only one of the two chose: _"]
    seconds, notes = _aligned("abcdefgh", "ab_cdefgh")
    assert seconds == [1.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    assert "of the wet run alone" in notes[0]


@pytest.mark.parametrize(("predicted", "names"), [("abc", "abc"), ("abcd", "wxyz")])
def test_runs_that_are_equal_or_strangers_are_left_alone(predicted: Any, names: Any) -> None:
    seconds, notes = _aligned(predicted, names)
    assert len(seconds) == len(names)
    assert notes == []
