"""A device that is none: tensors moved to `cuda` are computed with here, but may not meet others, as on a real card.

It shows what torch's processor by another name (`cpu:0`) cannot: a tensor that was left in main memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

NAME = "cuda"
COPIES = (torch.ops.aten.copy_.default,)
"""What real cards do with a tensor of main memory, too."""


class There(torch.Tensor):
    """Holds a tensor of main memory and says that it lies elsewhere.

    Attributes:
        made: how many there have been.
    """

    made: ClassVar[int] = 0
    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> There:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype
        )
        made.inner = inner
        cls.made += 1
        return made  # type: ignore[no-any-return]

    def __init__(self, inner: torch.Tensor) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in COPIES:
            left = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor) and not isinstance(t, There)]
            if any(tensor.dim() for tensor in left):
                raise RuntimeError(f"{func}: Expected all tensors to be on the same device")
        return tree_map(wrapped, func(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs or {})))


def wrapped(value: Any) -> Any:
    return There(value) if isinstance(value, torch.Tensor) and not isinstance(value, There) else value


def unwrapped(value: Any) -> Any:
    return value.inner if isinstance(value, There) else value


class _Moves(TorchFunctionMode):
    """Takes tensors there and back, and makes some there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return torch.device(NAME) if isinstance(args[0], There) else func(*args)
        if func is torch.Tensor.cpu:
            return unwrapped(args[0])
        if func is torch.Tensor.numpy and isinstance(args[0], There):
            raise TypeError("can't convert cuda device type tensor to numpy")
        where = kwargs.get("device", args[1] if func is torch.Tensor.to and len(args) > 1 else None)
        if func is torch.Tensor.to and isinstance(where, torch.Tensor):
            found = unwrapped(args[0]).to(where.dtype)
            return wrapped(found) if isinstance(where, There) else found
        if not isinstance(where, str | torch.device):
            return func(*args, **kwargs)
        there = torch.device(where).type == NAME
        if func is torch.Tensor.to:
            return (wrapped if there else unwrapped)(args[0])
        found = func(*args, **kwargs | {"device": "cpu"})
        return wrapped(found) if there else found


def _at_once(_: ThreadPoolExecutor, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
    done: Future[Any] = Future()
    done.set_result(function(*args, **kwargs))
    return done


@contextmanager
def elsewhere() -> Iterator[None]:
    """Where `cuda` is a device. Pools do their work at once: in other threads it would be none."""
    submit, overwrite = ThreadPoolExecutor.submit, torch.__future__.get_overwrite_module_params_on_conversion()
    ThreadPoolExecutor.submit = _at_once  # type: ignore[method-assign]
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _Moves():
            yield
    finally:
        ThreadPoolExecutor.submit = submit  # type: ignore[method-assign]
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)


def runs_there(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that takes pointers, interpreted with what tensors from there hold."""

    def call(*args: Any, **kwargs: Any) -> Any:
        assert all(isinstance(value, There) for value in args if isinstance(value, torch.Tensor))
        return tree_map(wrapped, kernel(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs)))

    return call
