"""Any torch module by the name of its factory: `package.module:factory` or `file.py:factory`.

The factory takes nothing and returns (module, example arguments).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_map_only

from rooflight.errors import InvalidValue, RooflightError, UntraceableModule

Factory = Callable[[], tuple[nn.Module, tuple[Any, ...]]]


def is_factory(name: str) -> bool:
    """Whether a model name has the form of a factory."""
    place, _, attribute = name.rpartition(":")
    return bool(place) and attribute.isidentifier()


def load_factory(name: str) -> Factory:
    """The factory behind a name, checked on each call to return a module and its arguments.

    Raises InvalidValue where the file, the module or the attribute is not there, or gives something else.
    """
    place, _, attribute = name.rpartition(":")
    module = _import(name, place)
    factory = getattr(module, attribute, None)
    if not callable(factory):
        known = [n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n))]
        raise InvalidValue(
            f"model {name!r}: {place} has no function {attribute!r}; it has {', '.join(known) or 'none'}"
        )

    def make() -> tuple[nn.Module, tuple[Any, ...]]:
        made = factory()
        if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
            raise InvalidValue(
                f"model {name!r}: the factory returned {type(made).__name__}; it must return (module, example_args)"
            )
        args = made[1]
        return made[0], tuple(args) if isinstance(args, tuple | list) else (args,)

    return make


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
            spec.loader.exec_module(module)
            return module
        if "" not in sys.path:
            sys.path.insert(0, "")
        return importlib.import_module(place)
    except RooflightError:
        raise
    except Exception as error:
        raise InvalidValue(f"model {name!r}: {place} does not import: {type(error).__name__}: {error}") from error


def fake(make: Factory) -> tuple[nn.Module, tuple[Any, ...]]:
    """The factory's module on fake tensors; call inside `walk.fake_tensors()`.

    It is made there, so that it never takes memory. A factory that needs values is run for real, its tensors replaced.
    """
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    try:
        module, args = make()
    except RooflightError:
        raise
    except Exception:
        with unset_fake_temporarily():
            try:
                module, args = make()
            except RooflightError:
                raise
            except Exception as error:
                raise UntraceableModule(
                    f"the factory failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                ) from error
    return _all_fake(module, mode), tree_map_only(Tensor, lambda t: _to_fake(t, mode), args)


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
