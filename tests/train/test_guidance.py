"""Guidance against the numbers of spec 12.4, its combination of guides, and what it evaluates."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from math import inf, nan

import pytest
import torch
from torch import Tensor

from python_train import guidance
from python_train.guidance import Guide, blended_weights, interval_steps
from python_train.sample import SOLVERS, edm_sampler, sample
from python_train.solvers import noise_levels

LEVELS = noise_levels(32, dtype=torch.float64).tolist()


class GaussianDenoiser:
    """The exact denoiser of zero-mean Gaussian data; counts its evaluations by noise level."""

    def __init__(self, std: float) -> None:
        self.std = std
        self.calls: Counter[float] = Counter()

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        self.calls[round(sigma.item(), 9)] += 1
        return x * self.std**2 / (self.std**2 + sigma**2)


def draw(*guides: Guide, num_steps: int = 32, **settings: object) -> float:
    out = sample(
        GaussianDenoiser(0.5), torch.ones(1), guides=guides, num_steps=num_steps, dtype=torch.float64, **settings
    )
    return out.item()


@pytest.mark.parametrize(
    ("weight", "interval", "expected"),
    [
        (2, None, 0.423856128),
        (0.5, None, 0.556035543),
        (1, None, 0.507838011),
        (2.0, range(17, 23), 0.440679868),
        (2.0, (0.19, 1.61), 0.440679868),
        (2.1, range(15, 22), 0.437171790),
        (2.1, (0.28, 2.90), 0.437171790),
        (2.9, range(13, 20), 0.434993848),
        (2.9, (0.60, 5.00), 0.434993848),
    ],
)
def test_numbers_of_the_specification(weight: float, interval: object, expected: float) -> None:
    assert draw(Guide(GaussianDenoiser(0.6), weight, interval)) == pytest.approx(expected, abs=6e-10)


def test_intervals_are_snapped_to_steps() -> None:
    cases = {
        (0.28, 2.90): (15, 21),  # the published, rounded limits of spec 6.3
        (0.60, 5.00): (13, 19),
        (0.19, 1.61): (17, 22),
        (0, inf): (0, 31),
        (0, 80): (0, 31),
        (0.002, 80): (0, 30),
        (0.0019, 81): (0, 31),
        (0, 0.002): (31, 31),
    }
    for interval, (first, last) in cases.items():
        assert interval_steps(interval, LEVELS) == range(first, last + 1), interval
    # The same published interval on other grids: the steps that start within it, give or take a rounding.
    for num_steps in (16, 64):
        levels = noise_levels(num_steps, dtype=torch.float64).tolist()
        steps = interval_steps((0.28, 2.90), levels)
        assert levels[steps[0]] < 2.90 * 1.2
        assert levels[steps[-1]] > 0.28
        assert levels[steps[-1] + 1] < 0.28 * 1.2


@pytest.mark.parametrize("solver", SOLVERS)
def test_skipped_evaluations_are_skipped(solver: str) -> None:
    guide = GaussianDenoiser(0.6)
    guided = draw(Guide(guide, 2.0, range(15, 22)), solver=solver, randn_like=torch.zeros_like)
    # Heun evaluates twice in each guided step, the second time at the level of the next step, which may be unguided.
    assert guide.calls.total() == (14 if solver == "heun" else 7)
    last = 22 if solver == "heun" else 21
    assert set(guide.calls) == {round(level, 9) for level in LEVELS[15 : last + 1]}
    assert guided != draw(solver=solver, randn_like=torch.zeros_like)


def test_a_weight_of_one_evaluates_nothing() -> None:
    guide = GaussianDenoiser(0.6)
    assert draw(Guide(guide, 1)) == draw()
    assert draw(Guide(guide, [1.0] * 32)) == draw()
    assert not guide.calls


def test_schedules_by_step_and_by_noise_level_agree() -> None:
    def weight(sigma: float) -> float:
        return 1 + 1.5 * (0.1 < sigma < 4) * sigma / (1 + sigma)

    guide = GaussianDenoiser(0.6)
    by_level = draw(Guide(guide, weight))
    assert by_level == draw(Guide(GaussianDenoiser(0.6), [weight(sigma) for sigma in LEVELS[:-1]]))
    assert by_level != pytest.approx(draw(), abs=1e-3)
    assert guide.calls.total() == 2 * sum(0.1 < sigma < 4 for sigma in LEVELS)


def test_schedule_and_interval_combine() -> None:
    ramp = [1 + step / 31 for step in range(32)]
    inside = [weight if 10 <= step < 20 else 1 for step, weight in enumerate(ramp)]
    assert draw(Guide(GaussianDenoiser(0.6), ramp, range(10, 20))) == draw(Guide(GaussianDenoiser(0.6), inside))


def test_several_guides_add_up() -> None:
    """Eq. 6 of the autoguidance paper, written out as one denoiser."""
    main, first, second = (GaussianDenoiser(std) for std in (0.5, 0.6, 0.45))

    def combined(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        D = main(x, sigma)
        return D + (1.7 - 1) * (D - first(x, sigma)) + (0.8 - 1) * (D - second(x, sigma))

    expected = sample(combined, torch.ones(1), dtype=torch.float64).item()
    assert draw(Guide(first, 1.7), Guide(second, 0.8)) == pytest.approx(expected, rel=1e-13)
    assert draw(Guide(second, 0.8), Guide(first, 1.7)) == pytest.approx(expected, rel=1e-13)


def test_blend_shares_the_weight_between_two_guides() -> None:
    assert blended_weights(2.5, 0) == (2.5, 1)
    assert blended_weights(2.5, 1) == (1, 2.5)
    assert blended_weights(3, 0.25) == (2.5, 1.5)
    w_uncond, w_bad = blended_weights(2.0, 0.3)
    same = GaussianDenoiser(0.6)
    assert draw(Guide(same, w_uncond), Guide(same, w_bad)) == pytest.approx(0.423856128, abs=6e-10)
    with pytest.raises(ValueError, match=r"blend must be between 0 and 1, got 1\.5"):
        blended_weights(2, 1.5)


def test_all_networks_get_the_labels_and_the_solver_dtype() -> None:
    labels, seen = torch.eye(3), []

    def net(x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        seen.append((x.dtype, sigma.dtype, class_labels))
        return (x * 0).to(torch.bfloat16)

    guides = [Guide(net, 2), Guide(net, 3)]
    out = sample(net, torch.ones(3, 1, 2, 2), labels, guides, num_steps=3, dtype=torch.float64)
    assert out.dtype == torch.float64
    assert len(seen) == 3 * (2 * 3 - 1)
    assert all(x == sigma == torch.float64 and given is labels for x, sigma, given in seen)


def test_streams_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: a guide's stream waits for the current one before it begins, and the current one before it goes on."""
    events: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            events.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def entered(stream: Stream | None) -> Iterator[None]:
        events.append(f"on {stream.name}")
        yield
        events.append("on main")

    def net(name: str) -> Callable[..., Tensor]:
        return lambda x, t, labels: events.append(f"{name} runs") or x

    names = iter(["side 0", "side 1"])
    monkeypatch.setattr(guidance, "_side_stream", lambda device: Stream(next(names)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    guides = [Guide(net("a"), 2.0), Guide(net("b"), [1.0, 3.0])]
    denoise = guidance.GuidedDenoiser(net("net"), guides, None, [2.0, 1.0, 0.0], torch.float32, torch.ones(1).device)
    a = ["side 0 waits for main", "on side 0", "a runs", "on main"]
    b = ["side 1 waits for main", "on side 1", "b runs", "on main"]
    denoise(torch.ones(1), torch.ones(()), 0)
    assert events == [*a, "net runs", "main waits for side 0"]
    events.clear()
    denoise(torch.ones(1), torch.ones(()), 1)
    assert events == [*a, *b, "net runs", "main waits for side 0", "main waits for side 1"]


def test_edm_sampler_is_the_same_sampler() -> None:
    out = edm_sampler(
        GaussianDenoiser(0.5), torch.ones(1), gnet=GaussianDenoiser(0.6), guidance=2, num_steps=9, dtype=torch.float64
    )
    assert out.item() == draw(Guide(GaussianDenoiser(0.6), 2), num_steps=9)


@pytest.mark.parametrize(
    ("guide", "words"),
    [
        (Guide(GaussianDenoiser(1), [2.0] * 31), "expected one weight or 32, one for each step, got 31"),
        (Guide(GaussianDenoiser(1), nan), "guidance must be finite, got nan"),
        (Guide(GaussianDenoiser(1), lambda sigma: inf), "guidance must be finite, got inf"),
        (Guide(GaussianDenoiser(1), 2, (3, 1)), "expected 0 <= sigma_lo < sigma_hi, got 3 and 1"),
        (Guide(GaussianDenoiser(1), 2, (0.42, 0.43)), r"no step starts within \(0.42, 0.43\]"),
        (Guide(GaussianDenoiser(1), 2, range(30, 33)), "steps must be within 0 to 31, got 30 to 32"),
        (Guide(GaussianDenoiser(1), 2, range(5, 5)), "steps must be within 0 to 31, got 5 to 4"),
    ],
)
def test_bad_guides_are_named(guide: Guide, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        draw(guide)
