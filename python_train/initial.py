"""Fine-tuning: a new run that starts from the weights of a snapshot."""

from __future__ import annotations

from pathlib import Path

import torch

from python_train import UserError, checkpoint
from python_train.network import Precond

# What may differ between two networks of the same weights without a word.
_NOT_OF_THE_WEIGHTS = {"use_fp16", "dropout", "img_resolution"}


@torch.no_grad()
def load_weights(net: Precond, path: Path, reinit: bool = False) -> list[str]:
    """Copy the weights and buffers of a snapshot, of this program or of the reference, into ``net``.

    With ``reinit`` layers that do not fit keep the values they have, and what only the snapshot has is left out.
    Returns what the user should know, as lines. Raises UserError if the snapshot cannot be read, or, without
    ``reinit``, naming every layer that does not fit; nothing is changed then.
    """
    if checkpoint.is_state(path):
        raise UserError(f"{path} is a training state; what is needed is a snapshot, network-snapshot-*.safetensors")
    header, stored = checkpoint.read_header(path), checkpoint.read_tensors(path)
    own = net.state_dict()
    fitting = [name for name in own if name in stored and stored[name].shape == own[name].shape]
    misfits = [_misfit(name, own[name], stored.get(name)) for name in own if name not in fitting]
    unknown = [f"{name}: {list(stored[name].shape)} in the file, nothing here" for name in stored if name not in own]
    lines = [*misfits, *unknown]
    if lines and not reinit:
        raise UserError(
            f"{path} does not fit this network:\n  " + "\n  ".join(lines) + "\n"
            "With --reinit these layers of the network start anew, and what only the file has is left out."
        )
    if not fitting:
        raise UserError(f"{path} has nothing that fits this network")
    for name in fitting:
        own[name].copy_(stored[name])
    seen = f"{header['nimg']:,} images" if header["nimg"] is not None else "an unknown number of images"
    notes = [f"starting from the weights of {path} ({seen}, sigma_rel {header['sigma_rel']})"]
    notes += [f"starting anew: {line}" for line in misfits]
    notes += [f"left out: {line}" for line in unknown]
    theirs = header["config"]
    differing = (theirs.keys() & net.config.keys()) - _NOT_OF_THE_WEIGHTS
    notes += [
        f"the network was trained with {name} {theirs[name]}; here it is {net.config[name]}"
        for name in sorted(differing)
        if theirs[name] != net.config[name]
    ]
    return notes


def _misfit(name: str, own: torch.Tensor, stored: torch.Tensor | None) -> str:
    there = f"{list(stored.shape)} in the file" if stored is not None else "not in the file"
    return f"{name}: {list(own.shape)} here, {there}"
