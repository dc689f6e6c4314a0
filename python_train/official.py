"""Weights of the EDM2 reference program, read without executing anything (spec 9): snapshots and training states; and
what `python_train.convert` writes for that program, which is read in the same way.

The reference stores pickles that carry source code and run it when they are loaded. :mod:`python_train.safe_pickle`
reads them as data; :mod:`python_train.pickles` knows what the data mean. Tensors stay in the file until they are asked
for.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from python_train.data import VAE_MEAN, VAE_STD, LatentEncoder, open_encoder
from python_train.pickles.arrays import NumpyArray
from python_train.pickles.config import checked_config, inferred_config, told_config
from python_train.pickles.files import read_pickle, reading
from python_train.pickles.names import name_facts
from python_train.pickles.objects import PLAIN, SNAPSHOT, Module, modules_of, tensors_of
from python_train.pickles.tensors import STORAGE_TYPES, StoredTensor
from python_train.pickles.zip_file import read_zip
from python_train.safe_pickle import Names, Refused

_MAX_AVERAGES = 16
_MOST_FACTS = 2**20  # characters

LICENSE = "CC BY-NC-SA 4.0"

_TRAINING_STATE: Names = {**PLAIN, **STORAGE_TYPES}


# What `python_train.convert` keeps of a snapshot's header beside what the reference would have written.
EXPORTED_FACTS = ("sigma_rel", "ema_kind", "dataset", "encoder", "license", "shape", "sigma_rel_of")


@dataclass(frozen=True)
class OfficialSnapshot:
    """One network of the reference: the header that our snapshots have, and its tensors in state-dict order.

    ``header["nimg"]`` and ``header["sigma_rel"]`` are None where the file's name does not tell them (spec 5.4).
    """

    header: dict[str, Any]
    tensors: dict[str, StoredTensor]


@dataclass(frozen=True)
class OfficialTrainingState:
    """A training state of the reference: its averages by width sigma_rel (a traditional one has width None)."""

    nimg: int
    averages: dict[float | None, OfficialSnapshot]


def read_snapshot(path: str | os.PathLike[str]) -> OfficialSnapshot:
    """Read a snapshot or a reconstructed network of the reference, executing nothing; the weights stay in the file.

    The network's configuration is checked against its blocks and tensors, so ``Precond(**header["config"])`` takes the
    tensors as its state dict. Raises UserError, naming the file and the reason, for anything else than such a file.
    """
    path = Path(path)
    with reading(path) as file:
        content = read_pickle(file, SNAPSHOT)
        net = content.get("ema") if isinstance(content, dict) else None
        if not isinstance(net, Module) or net.class_name != "Precond":
            raise Refused("it holds no EDM2 network under 'ema'")
        modules = modules_of(net)
        tensors = tensors_of(modules)
        config = checked_config(told_config(net), tensors, modules, file.size)
        header = {
            "format_version": 1,
            "config": config,
            **name_facts(path),
            "dataset": _dataset(content.get("dataset_kwargs"), config),
            "encoder": _encoder(content.get("encoder")),
            "license": LICENSE,
            "source": {"file": path.name, "bytes": file.size},
        }
    return OfficialSnapshot(header, tensors)


def _dataset(kwargs: Any, config: dict[str, Any]) -> dict[str, Any]:
    """What our headers say of the data set, as far as the reference does."""
    path = kwargs.get("path") if isinstance(kwargs, dict) else None
    path = path if isinstance(path, str) else ""
    return {
        "name": re.split(r"[/\\]", path)[-1].rpartition(".")[0] or path,
        "path": path,
        "resolution": config["img_resolution"],
        "label_dim": config["label_dim"],
    }


def _encoder(encoder: Any) -> dict[str, Any]:
    """Our description of the stored encoder (spec 1.1, 1.2, 9.1)."""
    class_name = encoder.class_name if isinstance(encoder, Module) else None
    if class_name == "StandardRGBEncoder":
        return {"kind": "pixel"}
    if class_name != "StabilityVAEEncoder":
        raise Refused("its encoder is neither StandardRGBEncoder nor StabilityVAEEncoder")
    scale, bias = (_vector(encoder.state.get(key)) for key in ("scale", "bias"))
    if len(scale) != len(bias) or not (scale > 0).all() or not np.isfinite([scale, bias]).all():
        raise Refused("its encoder has no scale and bias for each channel")
    published = np.float32(0.5) / np.float32(VAE_STD)
    if np.array_equal(scale, published) and np.array_equal(bias, np.float32(0) - np.float32(VAE_MEAN) * published):
        return LatentEncoder().facts()
    std = 0.5 / scale.astype(np.float64)
    return LatentEncoder(tuple((-bias * 2 * std).tolist()), tuple(std.tolist())).facts()


def _vector(array: Any) -> np.ndarray:
    if not isinstance(array, NumpyArray) or array.value is None or array.value.ndim != 1:
        raise Refused("its encoder has no scale and bias for each channel")
    return array.value.astype(np.float32)


def read_training_state(path: str | os.PathLike[str]) -> OfficialTrainingState:
    """Read the averages of a training state (``.pt``) of the reference, executing nothing; weights stay in the file.

    The file does not say how its network was made: the configuration is inferred from names and shapes, with attention
    heads of 64 channels and no dropout (which only matters for training). Raises UserError as
    :func:`read_snapshot` does.
    """
    path = Path(path)
    with reading(path) as file:
        content = read_zip(file, _TRAINING_STATE)
        nimg = _time_of(content)
        averages: dict[float | None, OfficialSnapshot] = {}
        config: dict[str, Any] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for sigma_rel, state in _averages(content.get("ema")):
            if not all(isinstance(name, str) and isinstance(value, StoredTensor) for name, value in state.items()):
                raise Refused("an average in it is not a dictionary of tensors")
            if not averages:
                config = checked_config(inferred_config(state), state, {}, file.size)
                shapes = {name: tensor.shape for name, tensor in state.items()}
            elif {name: tensor.shape for name, tensor in state.items()} != shapes:
                raise Refused("its averages are not of one network")
            header = {
                "format_version": 1,
                "config": config,
                "nimg": nimg,
                "sigma_rel": sigma_rel,
                "ema_kind": "power",
                "dataset": _dataset(None, config),
                "encoder": _likely_encoder(config),
                "license": LICENSE,
                "source": {"file": path.name, "bytes": file.size},
            }
            averages[sigma_rel] = OfficialSnapshot(header, state)
    return OfficialTrainingState(nimg, averages)


def _time_of(content: Any) -> int:
    counters = content.get("state") if isinstance(content, dict) else None
    nimg = counters.get("cur_nimg") if isinstance(counters, dict) else None
    if type(nimg) is not int or nimg < 0:
        raise Refused("it is no training state of the EDM2 reference program: it has no state.cur_nimg")
    return nimg


def _likely_encoder(config: dict[str, Any]) -> dict[str, Any]:
    """Of a file that does not tell."""
    return LatentEncoder().facts() if config["img_channels"] == len(VAE_MEAN) else {"kind": "pixel"}


def _averages(ema: Any) -> list[tuple[float | None, dict[Any, Any]]]:
    """(width, state dict) of each average: power-function ones, or one traditional (spec 5.2, 9.6)."""
    if not isinstance(ema, dict):
        raise Refused("it holds no average of its network under 'ema'")
    if "emas" not in ema:
        return [(None, ema)]
    stds, states = ema.get("stds"), ema["emas"]
    if not isinstance(stds, (list, tuple)) or not isinstance(states, (list, tuple)) or len(stds) != len(states):
        raise Refused("it does not have one width for each average")
    if len(stds) > _MAX_AVERAGES or not all(type(std) is float and 0 < std < 1 for std in stds):
        raise Refused("the widths of its averages are not a few numbers in (0, 1)")
    if len(set(stds)) < len(stds) or not all(isinstance(state, dict) for state in states):
        raise Refused("it has two averages of one width, or one that is not a dictionary")
    return list(zip(stds, states, strict=True))


def read_export(path: str | os.PathLike[str]) -> OfficialSnapshot:
    """Read what ``python_train.convert --to official`` wrote (``.pt``), executing nothing; weights stay in the file.

    Raises UserError as :func:`read_snapshot` does.
    """
    path = Path(path)
    with reading(path) as file:
        content = read_zip(file, _TRAINING_STATE)
        nimg, net = _time_of(content), content.get("net")
        if not isinstance(net, dict) or not all(
            isinstance(name, str) and isinstance(value, StoredTensor) for name, value in net.items()
        ):
            raise Refused("its network under 'net' is not a dictionary of tensors")
        config = told_config(Module("Precond", {"_init_kwargs": content.get("init_kwargs")}))
        config = checked_config(config, net, {}, file.size)
        facts = {key: content[key] for key in EXPORTED_FACTS if key in content}
        header = {
            "format_version": 1,
            "config": config,
            "nimg": nimg,
            "sigma_rel": None,
            "ema_kind": "phema",
            "dataset": _dataset(None, config),
            "encoder": _likely_encoder(config),
            **facts,
            "source": {"file": path.name, "bytes": file.size},
        }
        _check_facts(header)
    return OfficialSnapshot(header, net)


def _check_facts(header: dict[str, Any]) -> None:
    """Refused unless what an export says of its network is plain and of the kinds that it should be."""
    sigma_rel, texts = header["sigma_rel"], [header[key] for key in ("license", "shape") if key in header]
    if not (sigma_rel is None or (type(sigma_rel) in (int, float) and 0 < sigma_rel < 1)):
        raise Refused("its sigma_rel is not a number in (0, 1)")
    if header["ema_kind"] not in ("power", "phema") or not all(isinstance(text, str) for text in texts):
        raise Refused("its ema_kind, license or shape is not what it should be")
    if not all(isinstance(header.get(key, {}), dict) for key in ("dataset", "encoder", "sigma_rel_of")):
        raise Refused("its dataset, encoder or sigma_rel_of is not a dictionary")
    try:
        length = len(json.dumps(header, allow_nan=False))
        open_encoder(header["encoder"])
    except (TypeError, ValueError, RecursionError) as error:
        raise Refused("what it says of its network is not plain, or its encoder is unknown") from error
    if length > _MOST_FACTS:
        raise Refused("what it says of its network is too long")


def read_official(path: str | os.PathLike[str]) -> OfficialSnapshot | OfficialTrainingState:
    """A snapshot, a training state or an export, whichever the content is. Raises UserError for anything else."""
    with reading(path) as file:
        if file.read_at(0, min(4, file.size)) != b"PK\3\4":
            return read_snapshot(path)
        content = read_zip(file, _TRAINING_STATE)
    is_export = isinstance(content, dict) and "init_kwargs" in content
    return read_export(path) if is_export else read_training_state(path)
