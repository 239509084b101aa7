"""What a program holds, counted: the bytes of every storage that is alive, on any device, real or fake."""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """
    Counts the storages that are made inside the block, from their first tensor to their last.

    Args:
        live: bytes that are alive now.
        largest: bytes of the largest storage.
        peaks: by moment, the most that were alive at once during it.
        moment: what is going on, named by whoever knows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.largest = 0
        self.peaks: dict[Any, int] = {}
        self.moment: Any = None
        self._known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    @property
    def peak(self) -> int:
        """The most bytes that were alive at once."""
        return max(self.peaks.values(), default=0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a fake tensor is asked for its device
            return func(*args, **kwargs)
        for storage in _storages((args, kwargs)):  # not made here: a weight, whose views are results below
            self._known.setdefault(storage._cdata, storage)
        result = func(*args, **kwargs)
        for storage in _storages(result):
            if storage._cdata not in self._known:
                self._known[storage._cdata] = storage
                size = storage.nbytes()
                self.live, self.largest = self.live + size, max(self.largest, size)
                weakref.finalize(storage, self._release, size)
        self.peaks[self.moment] = max(self.peaks.get(self.moment, 0), self.live)
        return result

    def _release(self, size: int) -> None:
        self.live -= size


class NoValues(TorchDispatchMode):
    """
    Fake tensors have shapes and no values, and a program may ask for one. Inside the block the answer is zero, which to
    the checks of a training step ("is any of them not finite?") is that nothing is wrong.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 0
        return func(*args, **(kwargs or {}))


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages of tensors, what they share counted once."""
    return sum({storage._cdata: storage.nbytes() for storage in _storages(list(tensors))}.values())


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    return (value.untyped_storage() for value in tree_iter(values) if isinstance(value, torch.Tensor))
