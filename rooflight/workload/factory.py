"""Any torch module by the name of its factory: `package.module:factory` or `file.py:factory`.

The factory takes nothing and returns (module, example arguments): a tuple of arguments, or a dict of named ones.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map, tree_map_only

from rooflight.errors import InvalidValue, RooflightError, UntraceableModule
from rooflight.workload.untraceable import cause

Arguments = tuple[Any, ...] | dict[str, Any]
Made = tuple[nn.Module, Arguments]
Factory = Callable[[], Made]


def is_factory(name: str) -> bool:
    """Whether a model name has the form of a factory."""
    place, _, attribute = name.rpartition(":")
    return bool(place) and attribute.isidentifier()


def load_factory(name: str, dtype: torch.dtype | None = None) -> Factory:
    """The factory behind a name, checked on each call to return a module and its arguments.

    dtype: what the module and its floating-point arguments are cast to; None leaves them as the factory made them.
    A module under torch.compile is taken as it was before: its operations are priced and run one by one.
    Raises InvalidValue where the file, the module or the attribute is not there, or gives something else.
    """
    place, _, attribute = name.rpartition(":")
    module = _import(name, place)
    factory = getattr(module, attribute, None)
    if not callable(factory):
        known = ", ".join(_own_functions(module)) or "none"
        raise InvalidValue(f"model {name!r}: {place} has no function {attribute!r}; it has {known}")

    def make() -> Made:
        made = factory()
        if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
            kind = f"a tuple of {len(made)}" if isinstance(made, tuple) else f"a {type(made).__name__}"
            raise InvalidValue(
                f"model {name!r}: the factory returned {kind}; it must return (module, example_args), "
                "where example_args is a tuple, or a dict of named arguments"
            )
        made_module, args = _uncompiled(made[0]), _arguments(made[1])
        if dtype is None:
            return made_module, args
        return made_module.to(dtype), tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, args)

    return make


def _own_functions(module: Any) -> list[str]:
    """What a module defines itself and could be meant as a factory; what it imported could not."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and callable(value)
        and not isinstance(value, type)
        and getattr(value, "__module__", None) == module.__name__
    ]


def _arguments(given: Any) -> Arguments:
    if isinstance(given, Mapping):
        return dict(given)
    return tuple(given) if isinstance(given, tuple | list) else (given,)


def _uncompiled(module: nn.Module) -> nn.Module:
    """The module as it was before torch.compile, which does not run under a recorder."""
    module = getattr(module, "_orig_mod", module)
    for child in module.modules():
        child._compiled_call_impl = None
        for name, inner in child._modules.items():
            if inner is not None:
                child._modules[name] = getattr(inner, "_orig_mod", inner)
    return module


def _import(name: str, place: str) -> Any:
    path = Path(place)
    try:
        if place.endswith(".py"):
            if not path.is_file():
                raise InvalidValue(f"model {name!r}: no file {place}; give file.py:factory or package.module:factory")
            spec = importlib.util.spec_from_file_location(path.stem, path)
            if spec is None or spec.loader is None:
                raise InvalidValue(f"model {name!r}: {place} is not a Python file")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            # A file finds its neighbours, as when it is run.
            sys.path.insert(0, str(path.resolve().parent))
            spec.loader.exec_module(module)
            return module
        if "" not in sys.path:
            sys.path.insert(0, "")
        return importlib.import_module(place)
    except RooflightError:
        raise
    except (Exception, SystemExit) as error:
        raise InvalidValue(f"model {name!r}: {place} does not import: {cause(error)}") from error


def fake(make: Factory) -> Made:
    """The factory's module on fake tensors; call inside `walk.fake_tensors()`.

    It is made there, so that it never takes memory, and on the CPU, for the machine to predict is another matter. A
    factory that needs values is run for real, its tensors replaced.
    Raises UntraceableModule where it fails both ways, or leaves parameters without a shape.
    """
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    try:
        with _OnTheCpu():
            module, args = make()
    except RooflightError:
        raise
    except (Exception, SystemExit):
        with unset_fake_temporarily(), _OnTheCpu():
            try:
                module, args = make()
            except RooflightError:
                raise
            except (Exception, SystemExit) as error:
                raise UntraceableModule(f"the factory failed: {cause(error)}") from error
    lazy = [name for name, p in module.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise UntraceableModule(
            f"parameter {lazy[0]} has no shape yet: call the module once on its example arguments in the factory"
        )
    return _all_fake(module, mode), tree_map_only(Tensor, lambda t: _to_fake(t, mode), args)


class _OnTheCpu(TorchFunctionMode):
    """Inside, what asks for a GPU gets the CPU: a factory written for a GPU is priced on a machine that has none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cuda:
            return args[0]
        return func(*tree_map(_cpu_device, args), **tree_map(_cpu_device, kwargs or {}))


def _cpu_device(value: Any) -> Any:
    if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")):
        return "cpu"
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value


def _to_fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    return tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor, static_shapes=True)


def _all_fake(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The module with what real tensors it holds replaced by fake ones; shared parameters stay shared."""
    made: dict[int, Any] = {}
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and not isinstance(parameter, FakeTensor):
                if id(parameter) not in made:
                    fake_data = _to_fake(parameter.detach(), mode)
                    made[id(parameter)] = nn.Parameter(fake_data, requires_grad=parameter.requires_grad)
                child._parameters[name] = made[id(parameter)]
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = _to_fake(buffer, mode)
    return module
