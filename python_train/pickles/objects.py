"""Objects in a file of the reference, inert: the names that are known, modules, and the state dict that they make."""

from __future__ import annotations

import re
from typing import Any

from python_train.pickles.arrays import NUMPY
from python_train.pickles.tensors import StoredTensor, rebuild_parameter, rebuild_tensor, storage_of_blob
from python_train.safe_pickle import Buildable, Names, Refused, StandIn

# Far above what the largest network has: a file cannot make the walk through it long.
_MAX_MODULES, MAX_MEMBERS, MAX_TENSORS, MAX_DEPTH = 4096, 512, 4096, 8


class Module(Buildable):
    """An object of the reference or of torch.nn: the name of its class and its attributes."""

    def __init__(self, class_name: str, state: dict[str, Any] | None = None) -> None:
        self.class_name = class_name
        self.state = state or {}

    def build(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise Refused(f"the state of a {self.class_name} in it is not a dictionary")
        self.state = state


def _rebuild_persistent(meta: Any) -> Module:
    """``torch_utils.persistence._reconstruct_persistent_obj``: the source that comes along is dropped unread (9.2)."""
    if not isinstance(meta, dict) or meta.get("type") != "class" or meta.get("version") != 6:
        raise Refused("an object in it is not stored in the one way that these files use (class, version 6)")
    class_name, state = meta.get("class_name"), meta.get("state")
    if not isinstance(class_name, str) or re.fullmatch(r"\w{1,64}", class_name) is None or not isinstance(state, dict):
        raise Refused("an object in it has no class name or no state")
    return Module(class_name, state)


def _dictionary() -> dict[Any, Any]:
    return {}


PLAIN: Names = {
    ("dnnlib.util", "EasyDict"): StandIn(call=_dictionary, counts=(0,), new=_dictionary),
    ("collections", "OrderedDict"): StandIn(call=_dictionary, counts=(0,), new=_dictionary),
    ("torch._utils", "_rebuild_tensor_v2"): StandIn(call=rebuild_tensor, counts=(6, 7)),
    ("torch._utils", "_rebuild_parameter"): StandIn(call=rebuild_parameter, counts=(3,)),
    **NUMPY,
}

SNAPSHOT: Names = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): StandIn(call=_rebuild_persistent, counts=(1,)),
    ("torch.nn.modules.container", "ModuleDict"): StandIn(new=lambda: Module("ModuleDict")),
    ("torch.storage", "_load_from_bytes"): StandIn(call=storage_of_blob, counts=(1,)),
    **PLAIN,
}


def modules_of(module: Module) -> dict[str, Module]:
    """All modules by name, each before its sub-modules."""
    found: dict[str, Module] = {}
    visited: set[int] = set()

    def visit(name: str, module: Module) -> None:
        if id(module) in visited or name.count(".") > MAX_DEPTH or len(found) >= _MAX_MODULES:
            raise Refused("its modules contain each other, one is used twice, or there are too many")
        visited.add(id(module))
        found[name] = module
        for child_name, child in _members(module, "_modules"):
            if not isinstance(child, Module):
                raise Refused(f"{name}.{child_name} in it is not a module")
            visit(f"{name}.{child_name}".removeprefix("."), child)

    visit("", module)
    return found


def tensors_of(modules: dict[str, Module]) -> dict[str, StoredTensor]:
    """The state dict: of each module its parameters, then its buffers (spec 9.5)."""
    tensors: dict[str, StoredTensor] = {}
    for prefix, module in modules.items():
        unsaved = module.state.get("_non_persistent_buffers_set")
        unsaved = unsaved if isinstance(unsaved, set) else set()
        for kind, left_out in (("_parameters", set()), ("_buffers", unsaved)):
            for name, value in _members(module, kind):
                full = f"{prefix}.{name}".removeprefix(".")
                if not isinstance(value, StoredTensor) or len(tensors) >= MAX_TENSORS:
                    raise Refused(f"{full} in it is not a tensor, or there are too many")
                if name not in left_out:
                    tensors[full] = value
    return tensors


def _members(module: Module, kind: str) -> list[tuple[str, Any]]:
    members = module.state.get(kind, {})
    if not isinstance(members, dict) or len(members) > MAX_MEMBERS:
        raise Refused(f"{kind} of a {module.class_name} in it is not a dictionary, or too large")
    if not all(isinstance(name, str) and re.fullmatch(r"\w{1,64}", name, re.ASCII) for name in members):
        raise Refused(f"a name in {kind} of a {module.class_name} is not one")
    return [(name, value) for name, value in members.items() if value is not None]
