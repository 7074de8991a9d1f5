"""How objects that need more than `pickle` knows are written: numpy arrays, torch storages, generators, gradients.

`pickle` asks a `Reducer` about every object that is not a plain container or number. Most types have no handler and go
the default way. Tensors do too: torch's own reduction knows quantised, sparse, conjugate and all other kinds, and ends
at a storage, where this module takes over. What a reduction leaves out is collected in `extras` and written last.

Neither numpy nor torch is imported: an object of theirs can only exist if the user's process has them already.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from . import graph_memory as memory
from .graph_absent import Placeholder
from .graph_memory import HOST, Ledger

# Methods of Reducer, unbound: bound ones would tie it, and with it the whole graph, into a cycle that only gc ends.
Handler = Callable[["Reducer", Any], Any]

# Void covers structured types; those with objects in them, and numpy's variable strings, are pointers and go the
# default way.
_RAW_KINDS = frozenset("?biufcSUVMm")


class SharesLost(pickle.PicklingError):
    """Raised when a value reaches memory of a value that cannot be kept."""

    def __init__(self, key: str) -> None:
        super().__init__(f"shares memory with {key!r}, which cannot be kept; alone it would go on with a silent copy")
        self.key = key


class Extra:
    """What torch's reduction of a tensor or an optimizer leaves out; written after all values, applied at the end."""

    __slots__ = ("fields", "thing")

    def __init__(self, thing: Any, fields: dict[str, Any]) -> None:
        self.thing = thing
        self.fields = fields

    def __reduce__(self) -> tuple[Any, ...]:
        return Extra, (self.thing, self.fields)

    def apply(self) -> None:
        if type(self.thing) is Placeholder:
            self.thing.extra = self.fields
            return
        if "grad" in self.fields:
            self.thing.grad = self.fields["grad"]
        if "requires_grad" in self.fields:
            self.thing.requires_grad_(self.fields["requires_grad"])
        if "opt_called" in self.fields:
            with suppress(Exception):  # an optimizer with a step of its own kind; a warning is all that is at stake
                _watch_steps(self.thing, self.fields["opt_called"])


class Handlers(dict[type, "Handler | None"]):
    """The handler for each type, or None for those that go the default way; found once."""

    def __missing__(self, kind: type) -> Handler | None:
        handler = self[kind] = _find_handler(kind)
        return handler


class Reducer:
    """Reduces the objects of one dump.

    Args:
        ledger: Where memory is placed.
        lost: The memory of values that cannot be kept, by key; reaching it raises `SharesLost`.
        survey: Only note where memory lies. The result cannot be loaded, and nothing is copied from devices.
    """

    def __init__(self, ledger: Ledger, lost: Mapping[str, Ledger], *, survey: bool = False) -> None:
        self.ledger = ledger
        self.lost = lost
        self.survey = survey
        self.key = ""
        self.extras: list[tuple[str, Extra]] = []
        self.handlers = Handlers()
        self._storages: dict[int, Any] = {}
        self._settling = False
        self._untyped: Any = None

    def settle(self) -> list[tuple[str, Extra]]:
        """Return what is to be written last, with the keys it was found under.

        From here on tensors add nothing: a gradient's own gradient is dropped.
        """
        self._settling = True
        return self.extras

    def check(self, tensor: Any) -> None:
        """Raise `SharesLost` if *tensor* lies in lost memory."""
        if str(tensor.layout) != "torch.strided":
            return
        storage = tensor.untyped_storage()
        if storage.device.type != "meta":
            self._check(storage.data_ptr(), storage.nbytes(), str(storage.device))

    def _note(self, thing: Any, fields: dict[str, Any]) -> None:
        self.extras.append((self.key, Extra(thing, fields)))

    def _check(self, address: int, length: int, space: str = HOST) -> None:
        for key, ledger in self.lost.items():
            if ledger.overlaps(address, length, space):
                raise SharesLost(key)

    def _place(self, address: int, length: int, owner: object) -> tuple[Any, int]:
        self._check(address, length)
        interval, offset = self.ledger.place(address, length, owner)
        return (None if self.survey else interval), offset

    # A region of an earlier load is met again only in the arguments of a placeholder. Its offsets are its own, and its
    # interval may have grown since.
    def _region(self, region: memory.Region) -> Any:
        length = len(region.memory)
        return memory.Region.part, (*self._place(region.address(), length, region), length)

    def _placeholder(self, placeholder: Placeholder) -> Any:
        if placeholder.extra is not None and not self._settling:
            self._note(placeholder, placeholder.extra)
        return NotImplemented

    def _array(self, array: Any) -> Any:
        kind = type(array)
        # A view lies in the memory of its root. Only plain arrays are followed: np.asarray(memmap) would otherwise
        # carry the whole file.
        root = array
        while type(root.base) is kind:
            root = root.base
        if array.dtype.kind not in _RAW_KINDS or array.dtype.hasobject or root.dtype.hasobject:
            return NotImplemented
        writeable = bool(array.flags.writeable)
        if array.size == 0:
            return memory.load_empty_array, (array.dtype, array.shape, writeable)
        address = array.__array_interface__["data"][0]
        low, high = memory.extent(address, array.shape, array.strides, array.itemsize)
        if root is not array and root.size:
            start = root.__array_interface__["data"][0]
            root_low, root_high = memory.extent(start, root.shape, root.strides, root.itemsize)
            low, high = min(low, root_low), max(high, root_high)
        if low == high:  # items without a size, such as "S0"
            return NotImplemented
        interval, offset = self._place(low, high - low, root)
        where = offset + address - low
        return memory.load_array, (interval, where, array.dtype, array.shape, array.strides, writeable)

    def _tensor(self, tensor: Any) -> Any:
        if not tensor.is_leaf:
            raise pickle.PicklingError("cannot pickle a tensor with gradient history; keep tensor.detach() instead")
        fields: dict[str, Any] = {}
        grad = None if self._settling else tensor.grad
        if grad is not None:
            # With create_graph=True the gradient has a history of its own, which nobody can carry.
            fields["grad"] = grad if grad.is_leaf else grad.detach()
        if tensor.requires_grad and str(tensor.layout) != "torch.strided":
            fields["requires_grad"] = True  # torch forgets it for sparse tensors
        if fields and not self._settling:
            self._note(tensor, fields)
        return NotImplemented if tensor.dtype not in self._new_dtypes() else _reduce_new_dtype(tensor)

    def _new_dtypes(self) -> Any:
        if self._untyped is None:
            self._untyped = getattr(sys.modules["torch"].storage, "_new_dtypes", frozenset)()
        return self._untyped

    def _typed_storage(self, storage: Any) -> Any:
        return memory.load_typed_storage, (storage._untyped_storage, storage.dtype)

    def _untyped_storage(self, storage: Any) -> Any:
        # Two wrappers of one storage must stay one storage: tied weights are torn apart otherwise when they grow.
        first = self._storages.setdefault(storage._cdata, storage)
        if first is not storage:
            return memory.same, (first,)
        device, length = str(storage.device), storage.nbytes()
        if storage.device.type == "meta" or length == 0:
            return memory.load_blank_storage, (length, device)
        if storage.device.type != HOST:
            return self._device_storage(storage, device, length)
        address = storage.data_ptr()
        if address == 0:
            raise pickle.PicklingError("cannot pickle a tensor without memory")
        return memory.load_storage, (*self._place(address, length, storage), length)

    def _device_storage(self, storage: Any, device: str, length: int) -> Any:
        name = (device, storage.data_ptr(), length)
        first = self.ledger.device_storages.setdefault(name, storage)
        if first is not storage and self._storages.setdefault(first._cdata, first) is first:
            return memory.same, (first,)
        self._check(name[1], length, device)
        self.ledger.place(name[1], length, storage, device)
        if self.survey:
            return memory.same, (None,)
        if name not in self.ledger.host_copies:
            self.ledger.host_copies[name] = storage.cpu()
        host = self.ledger.host_copies[name]
        return memory.load_device_storage, (*self._place(host.data_ptr(), length, host), length, device)

    def _generator(self, generator: Any) -> Any:
        return memory.load_generator, (str(generator.device), generator.get_state())

    def _optimizer(self, optimizer: Any) -> Any:
        # A scheduler marks the optimizer's step, and warns if the mark is gone.
        if not self._settling and hasattr(optimizer.step, "_wrapped_by_lr_sched"):
            self._note(optimizer, {"opt_called": getattr(optimizer, "_opt_called", False)})
        return NotImplemented


def _find_handler(kind: type) -> Handler | None:
    if kind is memory.Region:
        return Reducer._region
    if kind is Placeholder:
        return Reducer._placeholder
    np = sys.modules.get("numpy")
    if np is not None and kind is getattr(np, "ndarray", None):
        return Reducer._array
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "optim"):  # not there, or not imported to its end
        return None
    for base, handler in (
        (torch.Tensor, Reducer._tensor),
        (torch.UntypedStorage, Reducer._untyped_storage),
        (torch.storage.TypedStorage, Reducer._typed_storage),
        (torch.Generator, Reducer._generator),
        (torch.optim.Optimizer, Reducer._optimizer),
    ):
        if issubclass(kind, base):
            return handler
    return None


# Types newer than torch's typed storages (8 bit floats, wide unsigned integers) are rebuilt by a function that works
# only inside torch.load, and there not for tensors that require gradients.
def _reduce_new_dtype(tensor: Any) -> Any:
    utils: Any = sys.modules["torch"]._utils
    func, args, *rest = tensor.__reduce_ex__(5)
    if func is utils._rebuild_tensor_v3:
        func = memory.load_tensor_v3
    elif args and args[0] is utils._rebuild_tensor_v3:  # a subclass
        args = (memory.load_tensor_v3, *args[1:])
    return (func, args, *rest)


def _watch_steps(optimizer: Any, called: bool) -> None:
    from torch.optim.lr_scheduler import LRScheduler

    class Watch(LRScheduler):  # type: ignore[misc]
        """Does what a scheduler's constructor does to the optimizer's step, and nothing to its hyper-parameters."""

        def _initial_step(self) -> None:
            pass

    Watch(optimizer)
    optimizer._opt_called = called


def apply_tolerantly(extras: Any) -> None:
    """Apply what can be applied of extras that a tolerant reader read: some may hold placeholders, or be such."""
    for extra in extras if isinstance(extras, list) else ():
        if type(extra) is Placeholder and extra.func is Extra:
            extra = Extra(*extra.args)
        with suppress(Exception):  # without its gradient a tensor is still worth having
            extra.apply()


def release_sparse() -> None:
    """Empty the list in which torch keeps the sparse tensors it rebuilt, for a check that only torch.load makes."""
    pending = getattr(getattr(sys.modules.get("torch"), "_utils", None), "_sparse_tensors_to_validate", None)
    if isinstance(pending, list):
        pending.clear()
