"""`Op`: one operation declared once, with its meaning, its kernel, its backward and its price."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rooflight.ops.cost import Cost

NAMESPACE = "rooflight"
_is_inference, _watchers = torch.is_inference_mode_enabled, torch._C._len_torch_dispatch_stack
_library = torch.library.Library(NAMESPACE, "DEF")
_registry: dict[torch._ops.OpOverload, Op] = {}


class Op:
    """An operation registered with torch.library, so that autograd, fake tensors and the recorder see it by name.

    reference(*args): its meaning in PyTorch; also what a CPU runs.
    cost(output, *args) -> Cost: its price from shapes alone (symbolic sizes included) and, where shapes
        cannot know, from `ops.batch.current()`.
    shape(*args): empty outputs for fake tensors; the reference itself when None.
    kernel(*args): the fast path on a GPU, `lazy` where it needs an import; used when `kernel_takes(*args)` (every CUDA
        call when None). Trailing arguments that hold their default may be missing.
    backward(ctx, *grads): as in torch.library.register_autograd, with `setup(ctx, inputs, output)`. It must compute
        through other Ops, for the backward of an operation has a price of its own.
    mutates: names of the arguments written in place.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        *,
        cost: Callable[..., Cost],
        shape: Callable[..., Any] | None = None,
        kernel: Callable[..., Any] | None = None,
        kernel_takes: Callable[..., bool] | None = None,
        backward: Callable[..., Any] | None = None,
        setup: Callable[..., None] | None = None,
        mutates: tuple[str, ...] = (),
    ):
        self.name, self.reference, self.cost, self.mutates = name, reference, cost, mutates
        self.kernel, self.kernel_takes = kernel, kernel_takes
        # infer_schema wants types, not the strings that `from __future__ import annotations` leaves behind.
        hints = typing.get_type_hints(reference)
        reference.__annotations__ = {k: None if hint is type(None) else hint for k, hint in hints.items()}
        self.signature = inspect.signature(reference)
        self._defaults = tuple(parameter.default for parameter in self.signature.parameters.values())
        schema = torch.library.infer_schema(reference, mutates_args=mutates)
        _library.define(name + schema)
        _library.impl(name, reference, "CPU")
        _library.impl(name, self._on_gpu if kernel else reference, "CUDA")
        torch.library.register_fake(f"{NAMESPACE}::{name}", shape or reference, lib=_library)
        if backward is not None:
            torch.library.register_autograd(
                f"{NAMESPACE}::{name}", backward, setup_context=self._setup(setup), lib=_library
            )
        self.overload: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
        _registry[self.overload] = self

    @staticmethod
    def _setup(setup: Callable[..., None] | None) -> Callable[..., None] | None:
        if setup is None:
            return None

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            # A gradient that nobody asked for stays None: no zeros are made, moved or priced.
            ctx.set_materialize_grads(False)
            setup(ctx, inputs, output)

        return setup_context

    def _on_gpu(self, *args: Any) -> Any:
        kernel = self.kernel
        # The dispatcher drops trailing arguments that hold their default.
        args += self._defaults[len(args) :]
        if kernel is None or (self.kernel_takes is not None and not self.kernel_takes(*args)):
            return self.reference(*args)
        device = _device_of(args)
        if device is None or device.index == torch.cuda.current_device():
            return kernel(*args)
        # Triton launches on the current device, whichever the tensors are on.
        with torch.cuda.device(device):
            return kernel(*args)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Where nobody watches or differentiates, a CPU needs no dispatcher: it takes 5 µs a call, of a step's hundreds.
        if _is_inference() and not kwargs and not _watchers() and isinstance(args[0], Tensor) and args[0].is_cpu:
            return self.reference(*args)
        return self.overload(*args, **kwargs)

    def price(self, output: Any, *args: Any, **kwargs: Any) -> Cost:
        """Price of the call that gave `output`, arguments as the dispatcher saw them."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        cost = self.cost(output, *bound.arguments.values())
        return cost if cost.curve else cost.named(self.name)

    def mutated(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The arguments of a call that it writes in place."""
        if not self.mutates:
            return []
        arguments = self.signature.bind(*args, **kwargs).arguments
        return [arguments[name] for name in self.mutates if name in arguments]

    def __repr__(self) -> str:
        return f"Op({self.name})"


def _device_of(args: tuple[Any, ...]) -> torch.device | None:
    for arg in args:
        first = arg[0] if isinstance(arg, (list, tuple)) and arg else arg
        if isinstance(first, Tensor):
            return first.device
    return None


def lazy(module: str, name: str) -> Callable[..., Any]:
    """`module.name`, imported when it is first called: Triton takes a second, and only a GPU needs it."""
    found: list[Callable[..., Any]] = []

    def kernel(*args: Any) -> Any:
        if not found:
            found.append(getattr(importlib.import_module(module), name))
        return found[0](*args)

    return kernel


KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def same_kernel_dtype(*tensors: Tensor | None) -> bool:
    """Whether all tensors are of one and the same of the types that our kernels load and store."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    return len(dtypes) == 1 and dtypes <= KERNEL_DTYPES


def find(overload: torch._ops.OpOverload) -> Op | None:
    """The Op behind an overload that a dispatch mode saw, or None for somebody else's operator."""
    return _registry.get(overload)


def all_ops() -> list[Op]:
    """Every declared operation, in the order of declaration."""
    return list(_registry.values())


def rows_and_columns(tensor: Tensor) -> tuple[Any, Any]:
    """A tensor's size as (rows, columns): the last dimension and all others together."""
    columns = tensor.shape[-1]
    rows: Any = 1
    for size in tensor.shape[:-1]:
        rows = rows * size
    return rows, columns
