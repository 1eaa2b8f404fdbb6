"""An imitation of Apple's GPUs, for machines without: tensors "on MPS" are CPU tensors that are marked.

As on a real one, float64 is refused, tensors of two devices do not mix, and what is on MPS cannot become a NumPy array.
Kernels, speed and memory are the CPU's.
"""

import weakref
from contextlib import contextmanager
from functools import cache

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MPS, CPU = torch.device("mps"), torch.device("cpu")
# between devices, or with indices of either
MIXING = ("copy_", "index", "index_put_", "_index_put_impl_", "set_", "_has_compatible_shallow_copy_type")


def _tensors(*things):
    return [leaf for leaf in tree_leaves(things) if isinstance(leaf, torch.Tensor)]


class _Marks(TorchDispatchMode):
    """What is computed from marked tensors is marked, too."""

    def __init__(self):
        super().__init__()
        self.marked, self.copying, self.seen = set(), False, set()

    def has(self, tensor):
        return tensor.untyped_storage()._cdata in self.marked

    def mark(self, tensor):
        if tensor.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        storage = tensor.untyped_storage()
        if storage._cdata not in self.marked:
            self.marked.add(storage._cdata)
            weakref.finalize(storage, self.marked.discard, storage._cdata)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        result = function(*args, **(kwargs or {}))
        if self.copying:
            return result
        given = [(tensor, self.has(tensor)) for tensor in _tensors(args, kwargs)]
        if any(on_it for _, on_it in given):
            self.seen.add(name)
            if name not in MIXING and any(tensor.dim() and not on_it for tensor, on_it in given):
                raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found mps and cpu")
            if name != "copy_" or self.has(args[0]):
                for tensor in _tensors(result):
                    self.mark(tensor)
        return result


class _Devices(TorchFunctionMode):
    """Translates devices, on the way in and out."""

    def __init__(self, marks):
        super().__init__()
        self.marks = marks

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function == torch.Tensor.device.__get__:
            return MPS if self.marks.has(args[0]) else CPU
        if function is torch.Tensor.numpy and self.marks.has(args[0]):
            raise TypeError("can't convert mps:0 device type tensor to numpy")
        if function in (torch.Tensor.__deepcopy__, torch.Tensor.new_tensor):        # make tensors without an operation
            return self._moved(function(*args, **kwargs), MPS if self.marks.has(args[0]) else CPU)
        args, target = list(args), CPU if function is torch.Tensor.cpu else None
        for holder, place in [*((args, number) for number in range(len(args))), *((kwargs, name) for name in kwargs)]:
            if (place == "device" or function is torch.Tensor.to) and isinstance(holder[place], (torch.device, str)):
                target = torch.device(holder[place])
                holder[place] = target if target.type == "meta" else CPU
        result = function(*args, **kwargs)
        return result if target is None or target.type == "meta" else self._moved(result, target)

    def _moved(self, tensor, target):
        """The tensor itself if it is there, else a copy; gradients flow."""
        if self.marks.has(tensor) == (target.type == "mps"):
            return tensor
        before, self.marks.copying = self.marks.copying, True
        try:
            tensor = tensor.clone()
        finally:
            self.marks.copying = before
        if target.type == "mps":
            self.marks.mark(tensor)
        return tensor


@contextmanager
def imitated(monkeypatch):
    """In this context there is a GPU of Apple's. Yields the set of operations that it computes."""
    memory = {"recommended_max_memory": 2**34, "driver_allocated_memory": 2**28}
    monkeypatch.setattr(torch.backends.mps, "is_available", cache(lambda: True))      # as torch's, which it looks into
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.get_rng_state())
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: torch.set_rng_state(state))
    for name, value in memory.items():
        monkeypatch.setattr(torch.mps, name, lambda value=value: value)
    with _Marks() as marks, _Devices(marks):
        yield marks.seen
