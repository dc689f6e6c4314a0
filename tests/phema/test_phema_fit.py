"""Profiles of other shapes, the two kinds of fit, and errors that are what they were predicted to be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from phema_files import flat, train

from edm2ext import phema
from edm2ext.phema import Reconstruction, Target, open_average
from edm2ext.phema.fit import cumulative, quadrature
from edm2ext.phema.motion import estimate_motion
from edm2ext.phema.profiles import SHAPES, sigma_rel_to_gamma

WIDTHS = (0.04, 0.06, 0.08, 0.12, 0.16, 0.20, 0.25)
STORED = np.repeat(np.arange(1.0, 65.0), 2), np.tile([0.05, 0.10], 64)


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("sigma_rel", [0.01, 0.1, 0.2, 0.28])
def test_profiles_have_the_width_and_products_of_their_density(shape: str, sigma_rel: float) -> None:
    """Against sums over small intervals, of which the cumulative tells the mass."""
    t = 3.0
    profile = SHAPES[shape](sigma_rel, t)
    edges = np.linspace(0, t, 300_001)
    middle, step = (edges[1:] + edges[:-1]) / 2, edges[1]
    mass = np.diff(profile.cumulative(edges))
    assert mass.sum() == pytest.approx(1)
    mean = mass @ middle
    assert (mass @ (middle - mean) ** 2) ** 0.5 / t == pytest.approx(sigma_rel, rel=1e-4)
    assert profile.times_itself == pytest.approx(mass @ mass / step, rel=1e-3)
    for t_i, std_i in ((2.5, 0.05), (3.0, 0.2), (4.0, 0.1)):
        gamma = float(sigma_rel_to_gamma(std_i))
        stored = np.where(middle < t_i, (gamma + 1) * (middle / t_i) ** gamma / t_i, 0)
        found = profile.times_power(np.array([t_i]), np.array([gamma]))[0]
        assert found == pytest.approx(mass @ stored, rel=1e-3, abs=1e-9)


def test_wide_exponentials_are_uniform() -> None:
    almost = SHAPES["exponential"](phema.MAX_SIGMA_REL - 1e-9, 2.0)
    assert float(almost.cumulative(np.array(0.5))) == pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize("kind", phema.FITS)
def test_stored_averages_are_found_exactly(kind: str) -> None:
    for nimg, sigma_rel in ((64.0, 0.05), (64.0, 0.10), (17.0, 0.10)):
        (found,) = phema.fit(*STORED, [Target(sigma_rel, nimg)], kind)
        assert found.profile_error < 1e-6
        assert found.sum_abs == pytest.approx(1, abs=1e-6)
        assert found.coefs[np.argmax(found.coefs)] == pytest.approx(1, abs=1e-6)
        assert not found.coefs[STORED[0] > nimg].any()


def test_published_fit_is_solve_coefficients() -> None:
    for found, width in zip(phema.fit(*STORED, [Target(w) for w in WIDTHS], "profile"), WIDTHS, strict=True):
        np.testing.assert_allclose(found.coefs, phema.solve_coefficients(*STORED, 64, width)[:, 0], rtol=0, atol=1e-9)


def test_fit_by_weights_is_closer_where_weights_move_at_random() -> None:
    """Against walks drawn step by step, not against the formula that it minimises."""
    steps = 1024
    walk = np.cumsum(np.random.default_rng(0).standard_normal([steps, 400]), axis=0)
    edges = np.arange(steps + 1) * 64 / steps

    def average(cumulative: np.ndarray) -> np.ndarray:
        return np.diff(cumulative) @ walk

    nimg, std = STORED
    stored = np.stack([
        average(SHAPES["power"](s, t).cumulative(edges)) for t, s in zip(nimg, std, strict=True)
    ])  # fmt: skip
    for width, gain in ((0.20, 5), (0.25, 10)):
        wanted = average(SHAPES["power"](width, 64.0).cumulative(edges))
        errors = {
            kind: np.linalg.norm(phema.fit(nimg, std, [Target(width)], kind)[0].coefs @ stored - wanted)
            for kind in phema.FITS
        }
        assert errors["weights"] * gain < errors["profile"]


def test_ordinary_questions_about_a_fit() -> None:
    narrow, wide = phema.fit(*STORED, [Target(0.015), Target(0.13)])
    assert narrow.sum_abs > 50 > wide.sum_abs > 1
    assert narrow.rounding_noise(phema.ROUNDING["fp16"]) == pytest.approx(narrow.norm * 2.07e-4)
    assert narrow.sigma_rel == pytest.approx(0.015, rel=1e-2)
    (lone,) = phema.fit([5.0], [0.05], [Target(0.2)])
    assert lone.profile_error > 0.3
    assert lone.coefs.tolist() == [1]


def test_bad_targets() -> None:
    with pytest.raises(ValueError, match="shape must be one of power, exponential, window, got 'box'"):
        phema.fit([1.0], [0.1], [Target(0.1, shape="box")])
    with pytest.raises(ValueError, match=r"out_nimg must not be before the first input's time 2, got 1"):
        phema.fit([2.0], [0.1], [Target(0.1, 1.0)])
    with pytest.raises(ValueError, match="kind must be one of weights, profile, got 'best'"):
        phema.fit([2.0], [0.1], [Target(0.1)], "best")
    for shape in ("exponential", "window"):
        with pytest.raises(ValueError, match=r"sigma_rel must be between 0 and 0\.2886751, got 0\.3"):
            phema.fit([2.0], [0.1], [Target(0.3, shape=shape)])


@pytest.mark.parametrize("kind", phema.FITS)
def test_reconstructions_are_what_tracking_gives_and_errors_what_was_predicted(kind: str, tmp_path: Path) -> None:
    """64 times, two profiles, stored in float32: relative L2 error over all parameters."""
    run = train(tmp_path, times=64, steps_between=8, also=WIDTHS)
    work = Reconstruction([open_average(path) for path in run.files], WIDTHS, kind=kind)
    results = work.in_memory(dtype=torch.float32)
    for width, result, quality in zip(WIDTHS, results, work.quality(work.motion()), strict=True):
        truth = run.directly(width)
        error = float((flat(result) - truth).norm() / truth.norm())
        if kind == "weights" or width < 0.25:
            assert error <= 1e-4
        else:
            assert error <= 2e-3
        assert quality.expected_error / 2 <= error <= 2 * quality.expected_error


@pytest.mark.parametrize("storage", ["fp16", "fp16+8"])
def test_rounding_noise_is_what_was_predicted(storage: str, tmp_path: Path) -> None:
    run = train(tmp_path, times=128, steps_between=2, also=(0.02, 0.03), storage=storage)
    work = Reconstruction([open_average(path) for path in run.files], (0.02, 0.03))
    results = work.in_memory(dtype=torch.float32)
    for result, quality in zip(results, work.quality(work.motion()), strict=True):
        truth = run.directly(quality.target.sigma_rel)
        error = float((flat(result) - truth).norm() / truth.norm())
        assert quality.expected_error / 3 <= error <= 3 * quality.expected_error
        if storage == "fp16":
            assert quality.rounding_noise > 0.5 * quality.expected_error
        else:
            assert quality.rounding_noise < 2e-5


@pytest.mark.parametrize("kind", phema.FITS)
def test_what_a_smooth_way_foretells_is_no_error(kind: str) -> None:
    """Averages of a way that is known, exactly: all that remains is what the stored ones do not tell."""
    times, span = 24, 1000.0
    nimg, std = np.repeat(span * np.arange(1.0, times + 1), 2), np.tile([0.05, 0.10], times)
    tau, weights = quadrature(np.linspace(0, nimg[-1], 40 * times + 1))
    phases, rates = np.random.default_rng(0).uniform(0, 6, [2, 400])
    velocity = np.cos(rates[:, None] * tau / (3 * span) + phases[:, None]) / span  # turns once in two intervals or more

    def averages(response: np.ndarray) -> np.ndarray:
        return 1 + velocity @ (weights * (1 - response)).T

    samples = averages(cumulative(nimg, std, tau)).T
    motion = estimate_motion(nimg, std, samples.astype(np.float32), np.zeros(len(nimg)))
    for width in (0.03, 0.07, 0.15, 0.20, 0.25):
        target = Target(width)
        (found,), (closest,) = (phema.fit(nimg, std, [target], k) for k in (kind, "weights"))
        truth = averages(target.profile(nimg[-1]).cumulative(tau)[None])[:, 0]
        error = np.linalg.norm(found.coefs @ samples - truth) / np.linalg.norm(truth)
        assert error / 3 - 1e-7 <= motion.expected_error(found, closest) <= 3 * error + 1e-7, width


def test_motion_of_a_single_average(tmp_path: Path) -> None:
    """Nothing tells of it, unless the average that is wanted is the stored one."""
    run = train(tmp_path, times=1, steps_between=4)
    for files, known in ((run.files[2:3], False), (run.files[1:3], False), (run.files[2:4], True)):
        work = Reconstruction([open_average(path) for path in files], [0.08])
        (quality,) = work.quality(work.motion())
        assert np.isfinite(quality.expected_error) == known
