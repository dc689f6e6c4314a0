"""How a network in a file of the reference was made: told by the file or inferred, and checked against its tensors."""

from __future__ import annotations

import math
import re
from typing import Any

import torch

from python_train.network import Block, Precond, UNet
from python_train.pickles.objects import MAX_TENSORS, Module
from python_train.pickles.tensors import MAX_DIMS, StoredTensor
from python_train.safe_pickle import Refused

_LIST_ARGUMENTS = ("channel_mult", "attn_resolutions", "resample_filter")


def told_config(net: Module) -> dict[str, Any]:
    """Constructor arguments of the network: what the reference was told, the rest being its defaults (spec 3.2-3.4)."""
    args, kwargs = net.state.get("_init_args", ()), net.state.get("_init_kwargs")
    if args != () or not isinstance(kwargs, dict):
        raise Refused("its network does not say how it was made (by keywords)")
    config = {"use_fp16": True, "sigma_data": 0.5, "logvar_channels": 128, **kwargs}
    for key, value in config.items():
        numbers = value if key in _LIST_ARGUMENTS and isinstance(value, (list, tuple)) else [value]
        if not isinstance(key, str) or not all(_is_number(number) for number in numbers) or len(numbers) > MAX_DIMS:
            raise Refused(f"the network's argument {str(key)[:40]!r} in it is not a number or a short list of numbers")
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def _is_number(value: Any) -> bool:
    return value is None or (type(value) in (int, float, bool) and abs(value) < 2**31)


def checked_config(
    config: dict[str, Any], tensors: dict[str, StoredTensor], modules: dict[str, Module], file_size: int
) -> dict[str, Any]:
    """The configuration in full; Refused unless it describes exactly these tensors, and the blocks where they tell."""
    if sum(tensor.nbytes for tensor in tensors.values()) > file_size:
        raise Refused("its tensors are the same numbers several times")
    num_blocks, levels = config.get("num_blocks", 3), config.get("channel_mult", [1, 2, 3, 4])
    # Before it is built: at least four tensors of a block, in the encoder and in the decoder.
    least = 8 * num_blocks * len(levels) if type(num_blocks) is int and isinstance(levels, list) else math.inf
    if not least <= len(tensors) <= MAX_TENSORS:
        raise Refused(f"its network should have {num_blocks} blocks at each level and has {len(tensors)} tensors")
    try:
        with torch.device("meta"):
            net = Precond(**config)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise Refused(f"its network cannot be made from its arguments ({reason})") from error
    expected = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in expected or name not in tensors or tensors[name].shape != expected[name]:
            raise Refused(
                f"the tensor {name[:80]!r} is missing, unknown or of a wrong shape for its network's arguments"
            )
        if not tensors[name].dtype.is_floating_point:
            raise Refused(f"the tensor {name} in it has {tensors[name].dtype} numbers")
    ours = dict(net.named_modules())
    for name, stored in modules.items():
        module = ours.get(name)
        for key in _STORED_FACTS.get(type(module), ()):
            _check_fact(name, key, getattr(module, key), stored.state)
    return net.config


_STORED_FACTS: dict[type, tuple[str, ...]] = {
    Precond: ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_data"),
    UNet: ("label_balance", "concat_balance"),
    Block: (
        "flavor",
        "resample_mode",
        "resample_filter",
        "num_heads",
        "dropout",
        "res_balance",
        "attn_balance",
        "clip_act",
    ),
}


def _check_fact(name: str, key: str, ours: Any, state: dict[str, Any]) -> None:
    """Where a stored module tells what it does, it must be what ours does."""
    theirs = state.get(key, ours)
    theirs = tuple(theirs) if isinstance(theirs, list) else theirs
    same_kind = type(theirs) is type(ours) or {type(theirs), type(ours)} <= {int, float}
    flat = not isinstance(theirs, tuple) or all(type(value) in (int, float) for value in theirs)
    if not same_kind or not flat or theirs != ours:
        shown = theirs if type(theirs) in (int, float, bool, str, type(None)) else type(theirs).__name__
        raise Refused(f"{name or 'its network'} was made with {key} {str(shown)[:40]}, not with {ours}")


def inferred_config(state: dict[str, StoredTensor]) -> dict[str, Any]:
    """The configuration that names and shapes of a state dict determine (spec 3.3)."""

    def shape(name: str, dims: int) -> tuple[int, ...]:
        if name not in state or len(state[name].shape) != dims:
            raise Refused(f"it has no tensor {name} of {dims} dimensions")
        return state[name].shape

    convs = [match for name in state if (match := re.fullmatch(r"unet\.enc\.(\d{1,5})x\1_conv\.weight", name))]
    if len(convs) != 1:
        raise Refused("its network has not one input convolution")
    resolution = int(convs[0][1])
    width, inputs = shape(convs[0][0], 4)[:2]
    if resolution == 0 or width == 0:
        raise Refused("its network has no resolution or no channels")
    levels: dict[int, set[int]] = {}
    attention: set[int] = set()
    for name in state:
        if match := re.fullmatch(r"unet\.enc\.(\d{1,5})x\1_block(\d{1,3})\.(conv_res1|attn_proj)\.weight", name):
            levels.setdefault(int(match[1]), set()).add(int(match[2]))
            if match[3] == "attn_proj":
                attention.add(int(match[1]))
    if not levels:
        raise Refused("its network has no encoder blocks")
    resolutions = sorted(levels, reverse=True)
    widths = [shape(f"unet.enc.{res}x{res}_block0.conv_res1.weight", 4)[0] for res in resolutions]
    emb, noise = shape("unet.emb_noise.weight", 2)
    config: dict[str, Any] = {
        "img_resolution": resolution,
        "img_channels": inputs - 1,
        "label_dim": shape("unet.emb_label.weight", 2)[1] if "unet.emb_label.weight" in state else 0,
        "use_fp16": True,
        "sigma_data": 0.5,
        "logvar_channels": shape("logvar_linear.weight", 2)[1],
        "model_channels": width,
        "channel_mult": [_ratio(level_width, width) for level_width in widths],
        "num_blocks": len(levels[resolutions[0]]),
        "attn_resolutions": [res for res in resolutions if res in attention],
    }
    if noise != widths[0]:
        config["channel_mult_noise"] = _ratio(noise, width)
    if emb != max(widths):
        config["channel_mult_emb"] = _ratio(emb, width)
    return config


def _ratio(width: int, unit: int) -> int | float:
    return width // unit if width % unit == 0 else width / unit
