"""Power-function EMA, post-hoc reconstruction and the list syntax (spec section 5, vectors of 12.5 and golden/)."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from edm2ext import phema
from edm2ext.phema import PowerEMA

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "phema.safetensors")


def assert_close(got: np.ndarray, expected: np.ndarray, limit: float = 1e-8) -> None:
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert error <= limit, f"relative L2 error {error:.2e}, allowed {limit:.0e}"


def test_golden_widths() -> None:
    assert_close(phema.sigma_rel_to_gamma(GOLDEN["std"]), GOLDEN["exp"])
    assert_close(phema.gamma_to_sigma_rel(GOLDEN["exp"]), GOLDEN["std"])


def test_golden_decays() -> None:
    t_next, dt = GOLDEN["beta_in"].T
    assert_close(phema.power_beta(t_next[:, None], dt[:, None], [0.05, 0.10]), GOLDEN["beta_out"])


def test_golden_coefficients() -> None:
    got = phema.solve_coefficients(GOLDEN["in_nimg"], GOLDEN["in_std"], GOLDEN["out_nimg"], GOLDEN["out_std"])
    assert got.dtype == np.float64
    assert_close(got, GOLDEN["coefs"])
    in_std = np.resize([0.05, 0.10], len(GOLDEN["in2_nimg"]))
    got = phema.solve_coefficients(GOLDEN["in2_nimg"], in_std, 128 * 2**24, GOLDEN["out_std"])
    assert_close(got, GOLDEN["coefs2"])


def test_conformance_scalars() -> None:
    """Spec 12.5."""
    widths = [0.010, 0.015, 0.025, 0.05, 0.075, 0.10, 0.13, 0.15, 0.20, 0.25]
    gammas = [96.9948978, 63.6589342, 36.9868397, 16.9721986, 10.2891164, 6.93720394, 4.60359678, 3.55786877]
    np.testing.assert_allclose(phema.sigma_rel_to_gamma(widths), [*gammas, 1.82621378, 0.719823958], rtol=1e-8)
    times = np.array([2048, 4096, 204800, 2**20, 2**27, 2**31])
    betas = [0, 3.88892111e-6, 0.834746968, 0.965473838, 0.999725802, 0.9999828605]
    np.testing.assert_allclose(phema.power_beta(times, 2048, 0.05), betas, rtol=1e-8)
    np.testing.assert_allclose(
        phema.power_beta([4096, 2**20, 2**31], 2048, 0.10), [0.00408003166, 0.984602266, 0.9999924305], rtol=1e-8
    )
    gamma = phema.sigma_rel_to_gamma([0.05, 0.10])
    for pair in ((100, gamma[0], 200, gamma[1]), (200, gamma[1], 100, gamma[0])):
        np.testing.assert_allclose(phema.profile_product(*pair), 2.33651714e-4, rtol=1e-8)
    np.testing.assert_allclose(phema.profile_product(100, gamma[1], 100, gamma[1]), 0.0423540936, rtol=1e-8)
    got = phema.solve_coefficients([1024, 1024, 2048, 2048], [0.05, 0.1, 0.05, 0.1], 2048, 0.075)
    np.testing.assert_allclose(got[:, 0], [0.000135748, -0.00242662683, 0.342969036, 0.659321843], rtol=1e-5)


def test_response_of_a_tracked_average() -> None:
    """Averaging the step number itself gives the mean of the discrete profile: gamma + 1 / gamma + 2 of the time."""
    value = torch.zeros((), dtype=torch.float64)
    ema = PowerEMA([value])
    steps = 20000
    for step in range(1, steps + 1):
        value.fill_(step)
        ema.update(step, 1)
    gamma = phema.sigma_rel_to_gamma([0.05, 0.10])
    means = np.array([float(averages[0]) for averages in ema.profiles]) / steps
    np.testing.assert_allclose(means, (gamma + 1) / (gamma + 2), rtol=1e-3)


def test_golden_response() -> None:
    """The profile of an average at time 1000, sampled and normalised."""
    profile = GOLDEN["response_t"]
    t = np.arange(len(profile))
    gamma = phema.sigma_rel_to_gamma([0.05, 0.10])
    expected = np.where(t[:, None] <= 1000, (gamma + 1) / 1000 * (t[:, None] / 1000) ** gamma, 0)
    assert_close(expected / expected.sum(axis=0), profile)


def test_reconstruction_of_a_stored_average_is_that_average() -> None:
    nimg, std = [1024, 1024, 2048, 2048], [0.05, 0.1, 0.05, 0.1]
    got = phema.solve_coefficients(nimg, std, nimg, std)
    np.testing.assert_allclose(got, np.eye(4), atol=1e-9)


@settings(derandomize=True, max_examples=50, deadline=None)
@given(
    counts=st.integers(1, 30),
    targets=st.lists(st.floats(0.03, 0.27), min_size=1, max_size=3),
    unit=st.sampled_from([1, 2048, 2**24]),
)
def test_coefficients_sum_to_one_and_do_not_depend_on_the_unit(counts: int, targets: list[float], unit: int) -> None:
    times = np.repeat(np.arange(1, counts + 1), 2)
    std = np.tile([0.05, 0.10], counts)
    got = phema.solve_coefficients(times * unit, std, counts * unit, targets)
    assert got.shape == (2 * counts, len(targets))
    np.testing.assert_allclose(got.sum(axis=0), 1, rtol=1e-9)
    np.testing.assert_allclose(got, phema.solve_coefficients(times, std, counts, targets), rtol=1e-6, atol=1e-9)


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.floats(1e-4, 0.28))
def test_widths_and_exponents_are_inverse(sigma_rel: float) -> None:
    np.testing.assert_allclose(phema.gamma_to_sigma_rel(phema.sigma_rel_to_gamma(sigma_rel)), sigma_rel, rtol=1e-9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.1", [0.1]),
        ("0.15,0.05, 0.1,0.05", [0.05, 0.1, 0.15]),
        ("0.05,0.10,...,0.25", [0.05, 0.1, 0.15, 0.2, 0.25]),
        ("0.02,0.05,0.10,...,0.20,0.15", [0.02, 0.05, 0.1, 0.15, 0.2]),
        ("0.2,0.15,...,0.05", [0.05, 0.1, 0.15, 0.2]),
        ("0.05,0.06,...,0.07,0.10,...,0.16", [0.05, 0.06, 0.07, 0.1, 0.13, 0.16]),
    ],
)
def test_list_syntax(text: str, expected: list[float]) -> None:
    assert phema.parse_sigma_rel_list(text) == expected


def test_list_of_the_documentation_has_49_entries() -> None:
    values = phema.parse_sigma_rel_list("0.010,0.015,...,0.250")
    np.testing.assert_allclose(values, np.arange(10, 251, 5) / 1000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", '"" in "" is not a number'),
        ("0.05,x", '"x" in "0.05,x" is not a number'),
        ("0.05,...,0.1", 'needs two numbers before and one after, got "0.05,...,0.1"'),
        ("0.05,0.1,...", "needs two numbers before and one after"),
        ("0.05,0.1,...,...,0.2", "needs two numbers before and one after"),
        ("0.05,0.1,...,0.22", "no whole number of steps of 0.05 leads from 0.1 to 0.22"),
        ("0.05,0.05,...,0.1", "no whole number of steps of 0 leads from 0.05 to 0.1"),
        ("0.10,0.05,...,0.2", "no whole number of steps of -0.05 leads from 0.05 to 0.2"),
        ("0.05,0.3", "widths must be between 0 and 0.2886751, got 0.3"),
        ("0.05,nan", "widths must be between 0 and 0.2886751, got nan"),
    ],
)
def test_bad_lists(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        phema.parse_sigma_rel_list(text)


def test_bad_scalars() -> None:
    for bad in (0, -0.1, 0.2886752, np.nan):
        with pytest.raises(ValueError, match=r"sigma_rel_to_gamma: sigma_rel must be between 0 and 0\.2886751, got"):
            phema.sigma_rel_to_gamma([0.05, bad])
    with pytest.raises(ValueError, match="gamma_to_sigma_rel: gamma must not be negative, got"):
        phema.gamma_to_sigma_rel(-1)
    with pytest.raises(ValueError, match="power_beta: 0 <= dt <= t_next and t_next > 0 must hold, got dt=3"):
        phema.power_beta(2, 3, 0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], 1, 0.1), "in_nimg must not be empty"),
        (([1, 1], [0.05, 0.05], 1, 0.1), r"the average at nimg=1, sigma_rel=0\.05 is given twice"),
        (([1, 2], [0.05, 0.05], 3, 0.1), "out_nimg must not exceed the last input's time 2, got 3"),
        (([0, 2], [0.05, 0.05], 2, 0.1), "in_nimg and out_nimg must be positive"),
        (([1, 2, 3], [0.05, 0.1], 2, 0.1), r"in_nimg and in_std must be vectors of one length, got shapes \(3,\) and"),
        (([[1, 2]], [[0.05, 0.1]], 2, 0.1), "in_nimg and in_std must be vectors of one length"),
    ],
)
def test_bad_systems(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=f"solve_coefficients: {message}"):
        phema.solve_coefficients(*arguments)


def test_power_ema_follows_equation_127(backend: str) -> None:
    params = [torch.randn(5, 3), torch.randn(4, dtype=torch.float64), torch.randn(3, dtype=torch.bfloat16)]
    ema = PowerEMA((p for p in params), sigma_rels=(0.05, 0.10, 0.2))
    expected = [[p.double() for p in params] for _ in ema.sigma_rels]
    assert [a.dtype for a in ema.profiles[0]] == [torch.float32, torch.float64, torch.float32]
    for step in range(1, 5):
        for p in params:
            p.add_(torch.randn_like(p))
        ema.update(step * 16, 16)
        for averages, width in zip(expected, ema.sigma_rels, strict=True):
            beta = float(phema.power_beta(step * 16, 16, width))
            for i, p in enumerate(params):
                averages[i] = beta * averages[i] + (1 - beta) * p.double()
        if step == 1:
            assert torch.equal(ema.profiles[1][0], params[0]), "the initial weights vanish at the first step"
    for averages, exact in zip(ema.profiles, expected, strict=True):
        for got, truth in zip(averages, exact, strict=True):
            torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-6)


def test_power_ema_state_survives_a_file() -> None:
    net = torch.nn.Linear(3, 2)
    ema = PowerEMA(net.parameters())
    ema.update(8, 8)
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    other = PowerEMA([torch.zeros_like(p) for p in net.parameters()])
    before = [average.data_ptr() for average in other.profiles[0]]
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other.profiles, ema.profiles, rtol=0, atol=0)
    assert [average.data_ptr() for average in other.profiles[0]] == before


def test_power_ema_bad_states() -> None:
    ema = PowerEMA([torch.zeros(3)])
    with pytest.raises(ValueError, match=r"PowerEMA: the state has sigma_rels \[0\.05\], expected \[0\.05, 0\.1\]"):
        ema.load_state_dict(PowerEMA([torch.zeros(3)], [0.05]).state_dict())
    with pytest.raises(ValueError, match="PowerEMA: the state's averages do not have the shapes of the parameters"):
        ema.load_state_dict(PowerEMA([torch.zeros(4)]).state_dict())
    with pytest.raises(ValueError, match="sigma_rel must be between"):
        PowerEMA([torch.zeros(3)], [0.3])
