"""Presets, amounts of images, validation and comparison of options."""

from __future__ import annotations

import re

import pytest

from python_train import UserError
from python_train.config import PRESETS, TrainOptions, differences, format_nimg, make_options, parse_ints, parse_nimg

# spec 4.4: channels, kimg, alpha_ref, t_ref, dropout, P_mean, P_std
TABLE = {
    "img512-xxs": (64, 2147483, 0.0170, 70000, 0.0, -0.4, 1.0),
    "img512-xs": (128, 2147483, 0.0120, 70000, 0.0, -0.4, 1.0),
    "img512-s": (192, 2147483, 0.0100, 70000, 0.0, -0.4, 1.0),
    "img512-m": (256, 2147483, 0.0090, 70000, 0.1, -0.4, 1.0),
    "img512-l": (320, 1879048, 0.0080, 70000, 0.1, -0.4, 1.0),
    "img512-xl": (384, 1342177, 0.0070, 70000, 0.1, -0.4, 1.0),
    "img512-xxl": (448, 939524, 0.0065, 70000, 0.1, -0.4, 1.0),
    "img64-xs": (128, 1073741, 0.0120, 35000, 0.0, -0.8, 1.6),
    "img64-s": (192, 1073741, 0.0100, 35000, 0.0, -0.8, 1.6),
    "img64-m": (256, 2147483, 0.0090, 35000, 0.1, -0.8, 1.6),
    "img64-l": (320, 1073741, 0.0080, 35000, 0.1, -0.8, 1.6),
    "img64-xl": (384, 671088, 0.0070, 35000, 0.1, -0.8, 1.6),
}


@pytest.mark.parametrize("preset", TABLE)
def test_presets(preset: str) -> None:
    o = make_options(preset)
    o.validate()
    row = (o.model_channels, o.duration // 1000, o.lr, o.decay, o.dropout, o.P_mean, o.P_std)
    assert row == TABLE[preset]
    common = (o.batch, o.rampup, o.seed, o.precision, o.loss_scaling, o.channel_mult, o.num_blocks, o.attn_resolutions)
    assert common == (2048, 10_000_000, 0, "fp16", 1.0, (1, 2, 3, 4), 3, (16, 8))
    assert (o.status, o.snapshot, o.checkpoint) == (128 * 2**10, 8 * 2**20, 128 * 2**20)
    assert o.sigma_rels == (0.05, 0.10)


def test_defaults_and_digits() -> None:
    options = make_options()
    assert (options.duration, options.lr, options.decay) == (8 * 2**30, 0.01, 70000)
    digits = make_options("digits")
    digits.validate()
    assert (digits.model_channels, digits.channel_mult, digits.batch, digits.decay) == (32, (1, 2), 128, 400)
    assert make_options("digits", batch=256, lr=None).batch == 256
    assert len(PRESETS) == 13


def test_unknown_preset_lists_them() -> None:
    with pytest.raises(UserError, match=r"unknown preset 'img32'.*img512-xxs.*img64-xl"):
        make_options("img32")


@pytest.mark.parametrize(
    ("name", "meant"), [("img64s", "img64-s"), ("IMG512-XXL", "img512-xxl"), ("edm2-img512-s", "img512-s")]
)
def test_a_preset_that_is_nearly_one(name: str, meant: str) -> None:
    with pytest.raises(UserError, match=rf"unknown preset '{name}' \(did you mean {meant}\?\); the presets are"):
        make_options(name)


@pytest.mark.parametrize(("text", "nimg"), [("0", 0), ("4096", 4096), ("128Ki", 2**17), ("8Mi", 2**23), ("2Gi", 2**31)])
def test_nimg(text: str, nimg: int) -> None:
    assert parse_nimg(text) == nimg
    assert parse_nimg(format_nimg(nimg)) == nimg


@pytest.mark.parametrize("text", ["", "8M", "-1", "1.5Ki", "8 Mi", "Ki"])
def test_bad_nimg(text: str) -> None:
    with pytest.raises(UserError, match=re.escape(repr(text))):
        parse_nimg(text)


def test_ints() -> None:
    assert parse_ints("1, 2,3") == (1, 2, 3)
    assert parse_ints("") == ()
    for text in ("1,,2", "a", "0", "-1", "1.5"):
        with pytest.raises(UserError, match="positive integers"):
            parse_ints(text)


@pytest.mark.parametrize(
    ("change", "world_size", "message"),
    [
        ({"batch": 100}, 1, "duration 8192 is not divisible by batch 100"),
        ({"batch_gpu": 48}, 1, "batch per process 128 is not divisible by batch-gpu 48"),
        ({}, 3, "batch 128 is not divisible by the 3 processes"),
        ({"status": 100}, 1, "status 100 is not divisible by batch 128"),
        ({"slice": 100}, 1, "slice 100 is not divisible by batch 128"),
        ({"snapshot": 1152}, 1, "snapshot 1152 is not divisible by 1024"),
        ({"checkpoint": 1152}, 1, "checkpoint 1152 is not divisible by 1024"),
        ({"batch": 0}, 1, "batch must be positive, got 0"),
        ({"lr": -1.0}, 1, "lr must be positive, got -1.0"),
        ({"lr": float("nan")}, 1, "lr must be positive"),
        ({"P_std": float("inf")}, 1, "P_std must be positive, got inf"),
        ({"P_mean": float("nan")}, 1, "P_mean must be a finite number, got nan"),
        ({"decay": float("inf")}, 1, "decay must be a finite number, got inf"),
        ({"batch_gpu": -2}, 1, "batch_gpu must be positive"),
        ({"dropout": 1.0}, 1, "dropout"),
        ({"precision": "fp8"}, 1, "precision must be one of fp32, fp16, bf16, got 'fp8'"),
        ({"channel_mult": ()}, 1, "channel_mult"),
    ],
)
def test_validation(change: dict, world_size: int, message: str) -> None:
    options = TrainOptions(**{"batch": 128, "duration": 8192, **change})
    with pytest.raises(UserError, match=message):
        options.validate(world_size)


def test_rounds() -> None:
    assert TrainOptions(batch=128).rounds(1) == (128, 1)
    assert TrainOptions(batch=128, batch_gpu=16).rounds(2) == (16, 4)
    assert TrainOptions(batch=128, batch_gpu=512).rounds(2) == (64, 1)


def test_differences() -> None:
    old, new = make_options("digits").to_json(), make_options("digits", lr=0.02, duration=2**20, status=128).to_json()
    assert differences({"options": old}, {"options": new}) == ["options.lr: 0.01 -> 0.02"]
    assert differences({"a": 1}, {"b": 2}) == ["a: 1 -> None", "b: None -> 2"]
