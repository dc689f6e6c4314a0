"""The sampler against spec 12.4, the golden samples, and its own contract."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from python_train.network import Precond
from python_train.sample import SeededRandom, edm_sampler, noise_levels

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_CASES = {
    "heun8": {"num_steps": 8},
    "heun8_guid15": {"num_steps": 8, "guidance": 1.5},
    "heun6_f64": {"num_steps": 6, "sigma_min": 0.01, "sigma_max": 40, "rho": 5, "dtype": torch.float64},
    "heun8_churn": {"num_steps": 8, "S_churn": 10, "S_min": 0.05, "S_max": 50, "S_noise": 1.003},
}


def gaussian_denoiser(std: float) -> Callable[..., Tensor]:
    """The exact denoiser of zero-mean Gaussian data."""
    return lambda x, sigma, labels=None: x * std**2 / (std**2 + sigma**2)


def forbidden(*_: object) -> Tensor:
    raise AssertionError("this network must not be evaluated")


def test_noise_levels_are_those_of_the_specification() -> None:
    levels = noise_levels(32, dtype=torch.float64)
    expected = [80, 66.9309, 55.7362, 46.1864, 38.0749, 31.2164, 25.4454, 20.6141, 16.5914, 13.2612, 10.5212, 8.28158]
    expected += [6.46366, 4.99911, 3.82873, 2.90153, 2.17386, 1.60857, 1.17427, 0.84462, 0.5977, 0.415432, 0.283044]
    expected += [0.1886, 0.122566, 0.0774305, 0.0473637, 0.0279157, 0.0157575, 0.00845305, 0.00426683, 0.002, 0]
    torch.testing.assert_close(levels, torch.tensor(expected, dtype=torch.float64), rtol=5e-6, atol=0)
    assert noise_levels(18).dtype == torch.float32


@pytest.mark.parametrize(
    ("num_steps", "guidance", "expected"),
    [
        (8, 1, 0.696993799), (8, 2, 0.600140918), (8, 0.5, 0.753866551),
        (18, 1, 0.527624637), (18, 2, 0.441955013), (18, 0.5, 0.577021263),
        (32, 1, 0.507838011), (32, 2, 0.423856128), (32, 0.5, 0.556035543),
        (64, 1, 0.501821428), (64, 2, 0.418340563), (64, 0.5, 0.549653121),
    ],
)  # fmt: skip
def test_analytic_denoiser(num_steps: int, guidance: float, expected: float) -> None:
    out = edm_sampler(
        gaussian_denoiser(0.5),
        torch.ones(1, 1, 1, 1),
        gnet=gaussian_denoiser(0.6),
        num_steps=num_steps,
        guidance=guidance,
        dtype=torch.float64,
    )
    assert out.dtype == torch.float64
    assert out.item() == pytest.approx(expected, abs=6e-10)


@pytest.fixture(scope="module", params=["cond", "uncond", "latent"])
def golden(request: pytest.FixtureRequest) -> tuple[dict[str, Tensor], Precond, Precond]:
    """Golden tensors, the trained network and its guide (the shorter average of the same run)."""
    path = GOLDEN / f"train_{request.param}.safetensors"
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["meta"])

    def network(*prefixes: str) -> Precond:
        net = Precond(**meta["config"], use_fp16=False).eval().requires_grad_(False)
        state: dict[str, Tensor] = {}
        for prefix in prefixes:
            state |= {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        net.load_state_dict(state)
        return net

    return tensors, network("state6."), network("state6.", f"{meta['guidance_net']}.")


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden_samples(golden: tuple[dict[str, Tensor], Precond, Precond], backend: str, case: str) -> None:
    tensors, net, gnet = golden
    churn_noises = iter(tensors["sample.churn_noises"])
    out = edm_sampler(
        net,
        tensors["sample.noise"],
        tensors.get("sample.labels"),
        gnet if "guidance" in GOLDEN_CASES[case] else None,
        randn_like=lambda x: next(churn_noises),
        **GOLDEN_CASES[case],
    )
    expected = tensors[f"sample.{case}"].double()
    # Measured: 6e-7 or less for all cases (the solver in fp64 agrees to the network's fp32).
    assert (out.double() - expected).norm() <= 1e-5 * expected.norm()


def test_guide_is_not_evaluated_at_weight_one() -> None:
    noise = torch.randn(2, 1, 4, 4)
    out = edm_sampler(gaussian_denoiser(0.5), noise, gnet=forbidden, num_steps=4)
    assert torch.equal(out, edm_sampler(gaussian_denoiser(0.5), noise, num_steps=4))


def test_churn_only_within_its_range() -> None:
    calls = []

    def randn_like(x: Tensor) -> Tensor:
        calls.append(x.dtype)
        return torch.randn_like(x)

    levels = noise_levels(10)[:-1]
    kwargs = {"num_steps": 10, "S_min": 0.1, "S_max": 20, "randn_like": randn_like}
    edm_sampler(gaussian_denoiser(0.5), torch.ones(1, 1, 2, 2), S_churn=5, dtype=torch.float64, **kwargs)
    assert calls == [torch.float64] * int(((levels >= 0.1) & (levels <= 20)).sum())
    edm_sampler(gaussian_denoiser(0.5), torch.ones(1, 1, 2, 2), S_churn=0, **kwargs)
    assert len(calls) == int(((levels >= 0.1) & (levels <= 20)).sum())


def test_gradients_flow_if_wanted() -> None:
    gain = torch.tensor(0.5, requires_grad=True)
    out = edm_sampler(lambda x, sigma, labels: x * gain, torch.ones(1, 1, 1, 1), num_steps=3)
    out.sum().backward()
    assert gain.grad is not None
    assert gain.grad.abs() > 0


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"guidance": 2}, "guidance=2 needs a guiding network"),
        ({"guidance": float("nan")}, "guidance must be finite"),
        ({"num_steps": 1}, "num_steps must be at least 2, got 1"),
        ({"sigma_min": 0}, "0 < sigma_min < sigma_max, got 0 and 80"),
        ({"sigma_min": 90}, "0 < sigma_min < sigma_max, got 90 and 80"),
        ({"rho": 0}, "rho must be positive"),
        ({"S_churn": -1}, "S_churn must not be negative or infinite, got -1"),
    ],
)
def test_bad_settings_are_named(kwargs: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        edm_sampler(forbidden, torch.ones(1, 1, 1, 1), **kwargs)


def test_integer_dtype_is_refused() -> None:
    with pytest.raises(TypeError, match=r"floating-point type, got torch\.int64"):
        edm_sampler(forbidden, torch.ones(1, 1, 1, 1), dtype=torch.int64)


def test_seeded_random_is_independent_of_the_batch() -> None:
    together, alone = SeededRandom([3, 1000, 4]), SeededRandom([1000])
    assert torch.equal(together.randn([2, 4, 4])[1:2], alone.randn([2, 4, 4]))
    assert torch.equal(together.randint(10)[1:2], alone.randint(10))
    x = torch.empty(1, 2, 3, dtype=torch.float64)
    later = alone.randn_like(x)
    assert later.dtype == torch.float64
    assert torch.equal(together.randn_like(x.expand(3, 2, 3))[1:2], later)


def test_seeded_random_draws_what_its_generator_gives() -> None:
    generator = torch.Generator().manual_seed(7)
    random = SeededRandom([7 + 2**32])
    assert torch.equal(random.randn([1, 8, 8])[0], torch.randn(1, 8, 8, generator=generator))
    assert random.randint(5).item() == torch.randint(5, (), generator=generator).item()
