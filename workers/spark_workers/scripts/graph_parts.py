"""Values kept by parts: the state without the object around it.

A module with a lambda for an attribute cannot be pickled, and need not be: its initializer makes it again, and what
training has changed is its parameters. They stay in the graph as the objects they are, so an optimizer in the same
graph still holds the module's own parameters when both are back.
"""

from __future__ import annotations

import sys
from typing import Any


class NeedsInitializer:
    """A value that was kept by parts. Its initializer must make the object again; `apply` puts the parts in.

    One that was never applied can be dumped again.
    """

    __slots__ = ("depends",)

    # Tensors that the object uses and the parts do not hold. If they belong to a value that is lost, so is this one.
    depends: tuple[Any, ...]

    def apply(self, fresh: object) -> object:
        """Put the parts into *fresh*, the object that the initializer made, and return it.

        Raises:
            Exception: The parts do not fit, for instance since the new code has other shapes. *fresh* may then be
                changed in part, and must not be used; the parts are as they were.
        """
        raise NotImplementedError


class StateParts(NeedsInitializer):
    """Anything with `state_dict` and `load_state_dict`."""

    __slots__ = ("state",)

    def __init__(self, state: Any) -> None:
        self.depends = ()
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.state,)

    def apply(self, fresh: Any) -> Any:
        fresh.load_state_dict(self.state)
        return fresh


class SchedulerParts(NeedsInitializer):
    """A learning-rate scheduler, or whatever else steers an optimizer and can save its state.

    Making one anew sets the optimizer's learning rate and more, so these are put back as they were.
    """

    __slots__ = ("groups", "state")

    def __init__(self, state: Any, groups: list[dict[str, Any]], depends: tuple[Any, ...] = ()) -> None:
        self.depends = depends
        self.state = state
        self.groups = groups

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.state, self.groups)

    def apply(self, fresh: Any) -> Any:
        groups = fresh.optimizer.param_groups
        if len(groups) != len(self.groups):
            raise ValueError(f"the optimizer had {len(self.groups)} parameter groups and now has {len(groups)}")
        fresh.load_state_dict(self.state)
        for group, saved in zip(groups, self.groups, strict=True):
            _put_back(group, saved)
        return fresh


class ModuleParts(NeedsInitializer):
    """A `torch.nn.Module`: its parameters and buffers, and which of its modules were in training mode."""

    __slots__ = ("buffers", "modes", "state", "trainable")

    def __init__(self, state: Any, buffers: dict[str, Any], trainable: dict[str, bool], modes: dict[str, bool]) -> None:
        self.depends = ()
        self.state = state
        self.buffers = buffers
        self.trainable = trainable
        self.modes = modes

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.state, self.buffers, self.trainable, self.modes)

    def apply(self, fresh: Any) -> Any:
        torch = sys.modules["torch"]
        if not isinstance(fresh, torch.nn.Module):
            raise TypeError(f"the initializer made a {type(fresh).__name__} in place of a module")
        try:
            torch.nn.Module.load_state_dict(fresh, self.state, assign=True)
        finally:
            # load_state_dict makes the saved parameters as trainable as the fresh ones were; a layer frozen during
            # the training would thaw.
            for name, trainable in self.trainable.items():
                self.state[name].requires_grad_(trainable)
        # What is not in a state dictionary: buffers that are not persistent.
        for name, buffer in self.buffers.items():
            path, _, leaf = name.rpartition(".")
            fresh.get_submodule(path)._buffers[leaf] = buffer
        for name, module in fresh.named_modules():
            module.training = self.modes.get(name, module.training)
        return fresh


def parts_of(value: Any) -> NeedsInitializer | None:
    """Return *value* by parts, or None if it has none."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "nn") and isinstance(value, torch.nn.Module):
        return _module_parts(torch, value)
    if isinstance(value, type) or not callable(getattr(value, "load_state_dict", None)):
        return None
    groups = getattr(getattr(value, "optimizer", None), "param_groups", None)
    if groups is None:
        return StateParts(value.state_dict())
    kept = [{name: _copy(held) for name, held in group.items() if name != "params"} for group in groups]
    return SchedulerParts(value.state_dict(), kept, tuple(one for group in groups for one in group["params"]))


def _module_parts(torch: Any, module: Any) -> ModuleParts:
    # The base class's own: overridden ones often return copies or other names.
    state = torch.nn.Module.state_dict(module, keep_vars=True)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return ModuleParts(
        state,
        dict(module.named_buffers(remove_duplicate=False)),
        {name: one.requires_grad for name, one in parameters.items() if state.get(name) is one},
        {name: one.training for name, one in module.named_modules()},
    )


# The scheduler writes into tensors in place, so the numbers of this moment must not be the optimizer's own tensors.
def _copy(held: Any) -> Any:
    if hasattr(held, "detach"):
        return held.detach().clone()
    return list(held) if type(held) is list else held


def _put_back(group: dict[str, Any], saved: dict[str, Any]) -> None:
    for name, held in saved.items():
        current: Any = group.get(name)
        if hasattr(held, "detach") and hasattr(current, "detach"):
            current.detach().copy_(held)  # in place: a captured graph or a fused kernel may hold this tensor
        else:
            group[name] = _copy(held)
