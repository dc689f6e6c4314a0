"""The demo's closing step on a tiny network, and the judge that it relies on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from python_train import UserError, demo
from python_train.checkpoint import load_snapshot, save_snapshot, snapshot_name
from python_train.data import open_dataset, open_encoder
from python_train.demo import (
    DigitJudge,
    early_guide,
    finish,
    generate_classes,
    judge_images,
    nearest,
    nearest_other,
    rows_of_classes,
    to_features,
)
from python_train.generate import generate_batch
from python_train.guidance import Guide
from python_train.network import Precond
from python_train.reconstruct import find_snapshots, reconstruct

SMALL = {"sigma_rels": (0.05, 0.12), "sweep_per_class": 1, "sweep_steps": 2, "final_per_class": 12, "final_steps": 2}


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    images, labels = open_dataset("digits").load_all()
    return to_features(images.numpy()), labels.argmax(dim=1).numpy()


@pytest.fixture(scope="module")
def judge(digits: tuple[np.ndarray, np.ndarray]) -> DigitJudge:
    return DigitJudge(*digits)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """What training would have left behind, with random weights."""
    dataset = open_dataset("digits")
    for nimg in (0, 8192, 16384):
        for sigma_rel in (0.05, 0.10):
            net = Precond(
                img_resolution=8, img_channels=1, label_dim=10, use_fp16=False, model_channels=8, channel_mult=[1],
                num_blocks=1, attn_resolutions=[], channels_per_head=8, logvar_channels=8,
            )  # fmt: skip
            save_snapshot(
                tmp_path / snapshot_name(nimg, sigma_rel),
                net,
                nimg=nimg,
                sigma_rel=sigma_rel,
                ema_kind="power",
                dataset=dataset.facts(),
                encoder=dataset.encoder().facts(),
            )
    lines = [{"Progress/kimg": kimg, "Loss/loss": 1.0, "Loss/learning_rate": 0.01} for kimg in (0, 8, 16)]
    (tmp_path / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_features_are_scikit_learns(digits: tuple[np.ndarray, np.ndarray]) -> None:
    assert digits[0].min() == 0
    assert digits[0].max() == 16
    np.testing.assert_allclose(digits[0], digits[0].round(), atol=0.04)


def test_judge_knows_digits(judge: DigitJudge, digits: tuple[np.ndarray, np.ndarray]) -> None:
    assert 0.96 < judge.held_out_accuracy < 1
    assert judge.accuracy(*digits) > 0.995
    assert judge.accuracy(digits[0], (digits[1] + 1) % 10) < 0.005


def test_distances() -> None:
    real = np.array([[0.0, 0], [3, 4], [3, 5]])
    distances, indices = nearest(np.array([[0.0, 1], [3, 4]]), real)
    assert distances.tolist() == [1, 0]
    assert indices.tolist() == [0, 1]
    assert nearest_other(real).tolist() == [5, 1, 1]


def test_copies_are_found_out(judge: DigitJudge, digits: tuple[np.ndarray, np.ndarray]) -> None:
    real, classes = digits
    copied = judge_images(0.1, real[:100], classes[:100], real, judge)
    assert (copied.copies, copied.close_fraction, copied.nearest_median) == (100, 1, 0)
    nudged = judge_images(0.1, real[:100] + 0.1, classes[:100], real, judge)
    assert (nudged.copies, nudged.close_fraction) == (0, 1)
    fresh = judge_images(0.1, real[:400], classes[:400], real[400:], judge)  # real ones that the others do not contain
    assert fresh.copies == 0
    assert fresh.close_fraction < 0.05
    assert fresh.nearest_median > 0.9 * fresh.real_nearest_median


def test_bad_digits_fail_after_everything_is_written(run_dir: Path) -> None:
    lines: list[str] = []
    with pytest.raises(UserError, match=r"only \d+\.\d % of the generated digits .* 95 % are needed"):
        finish(run_dir, "cpu", log=lines.append, **SMALL)
    for name in demo.PICTURES:
        assert f"  {run_dir / name}" in lines
        with Image.open(run_dir / name) as image:
            image.load()
    report = json.loads((run_dir / "report.json").read_text())
    assert [point["sigma_rel"] for point in report["sweep"]] == [0.05, 0.12]
    assert report["verdict"]["images"] == 120
    assert all(point["kid"] > 1 and point["kid_error"] > 0 for point in report["sweep"])
    assert report["autoguidance"]["guide_nimg"] == 8192
    assert report["autoguidance"]["images"] == 80
    best = min(report["sweep"], key=lambda point: point["loss"])["sigma_rel"]
    _, header = load_snapshot(run_dir / report["snapshot"])
    assert (header["ema_kind"], header["sigma_rel"], header["nimg"]) == ("phema", best, 16384)
    assert not list(run_dir.glob(".*")), "temporary files are left"


def test_good_digits_pass(
    run_dir: Path, digits: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, classes = digits

    def draw(net: Precond, encoder: object, seeds: Sequence[int], wanted: list[int], **_: Any) -> Tensor:
        rows = [np.flatnonzero(classes == idx)[seed % 100] for seed, idx in zip(seeds, wanted, strict=True)]
        return torch.from_numpy(np.rint(real[rows] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8))

    monkeypatch.setattr(demo, "generate_batch", draw)
    lines: list[str] = []
    verdict = finish(run_dir, log=lines.append, **SMALL)
    assert verdict.accuracy > 0.98
    assert verdict.copies == verdict.images == 120
    report = json.loads((run_dir / "report.json").read_text())
    assert all(abs(point["kid"]) < 0.5 for point in report["sweep"])
    assert report["autoguidance"]["accuracy"] == report["autoguidance"]["unguided_accuracy"] > 0.95
    assert lines[3].startswith("autoguided by itself at 8k images, weight 1.5: 80 digits, class accuracy ")
    assert lines[0].startswith("class accuracy of 120 generated digits: ")
    assert "(needs 95 %, aim 97 %;" in lines[0]
    assert "exact copies: 120" in lines[2]
    again = finish(run_dir, log=lines.append, **SMALL)  # its own reconstruction is not taken for an input
    assert again == verdict


def test_guided_digits_have_the_noise_of_the_others(run_dir: Path) -> None:
    snapshots = find_snapshots(run_dir)
    (main,) = reconstruct(snapshots, [0.10])
    encoder = open_encoder(main.encoder)
    guide = early_guide(snapshots)
    assert (guide.nimg, guide.sigma_rel) == (8192, 0.10)
    for net in (main.net, guide.net):  # whose gains are 0, so that they all draw the same
        for name, param in net.named_parameters():
            if name.endswith("gain"):
                torch.nn.init.constant_(param, 0.7)
    with tqdm(disable=True) as progress:
        many = generate_classes(main.net, encoder, 5, 40, 2, progress)
        few = generate_classes(main.net, encoder, 2, 40, 2, progress, seeds_per_class=5)
        guided = generate_classes(main.net, encoder, 2, 40, 2, progress, Guide(guide.net, 2), seeds_per_class=5)
    same = rows_of_classes(many, 10, 2).reshape(few.shape)
    assert int(np.abs(same.astype(int) - few).max()) <= 1
    assert not np.array_equal(few, guided)
    one = generate_batch(main.net, encoder, [40 + 3 * 5 + 1], [3], guides=[Guide(guide.net, 2)], num_steps=2)
    assert int((one[0].int() - torch.from_numpy(guided[3 * 2 + 1]).int()).abs().max()) <= 1


def test_a_folder_without_snapshots_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        finish(tmp_path)
