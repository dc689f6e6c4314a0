"""Planning a run's snapshots: what is chosen supports what was asked for, within the disk."""

from __future__ import annotations

import pytest
from click.testing import CliRunner, Result

from edm2ext import phema
from edm2ext.phema import Target
from python_train import UserError
from python_train.reconstruct import plan
from python_train.reconstruct.plan import Way, best, errors, parse_range, parse_size, ways

WIDTHS = [0.015, 0.05, 0.15]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(plan.main, [str(argument) for argument in arguments])


def test_errors_are_those_of_the_fit() -> None:
    found, norms = errors(1024, 16, (0.05, 0.10), WIDTHS)
    nimg = [1024 * k for k in range(1, 17) for _ in range(2)]
    fits = phema.fit(nimg, [0.05, 0.10] * 16, [Target(width) for width in WIDTHS])
    assert found == [fit.profile_error for fit in fits]
    assert norms == [fit.norm for fit in fits]


def test_ways_fit_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "COUNTS", (16, 24, 32))
    found = list(ways(2**20, 1_000_000, WIDTHS, 2048, everything=True))
    assert {(way.times, way.interval) for way in found} == {(16, 2**16), (32, 2**15)}, "24 does not divide it"
    (one,) = [way for way in found if (way.times, way.profiles, way.storage) == (32, (0.05, 0.10), "fp16+8")]
    assert one.gigabytes == pytest.approx(33 * 2 * 3e6 / 1e9)
    assert one.noise == pytest.approx(max(errors(2**15, 32, (0.05, 0.10), WIDTHS)[1]) * 8.1e-7)
    assert list(ways(2**20, 1, WIDTHS, 2**17)) == []
    few = list(ways(2**20, 1_000_000, [0.06, 0.09], 2048))
    good = min(way.gigabytes for way in few if way.is_good)
    assert 0 < len(few) < len(found), "larger ones than a good one are not looked at"
    assert all(way.gigabytes <= 2 * good for way in few)


def test_best_is_the_smallest_good_one() -> None:
    def way(gigabytes: float, profile_error: float, noise: float) -> Way:
        return Way(1024, 16, (0.1,), "fp16", gigabytes, profile_error, noise)

    rough, noisy, good, better = way(1, 0.5, 0), way(2, 0.01, 0.006), way(3, 0.019, 0.004), way(4, 0, 0)
    candidates = [better, good, noisy, rough]
    assert best(candidates, None) == good
    assert best(candidates, 2.5) == noisy
    assert best(candidates, 1.5) == rough
    with pytest.raises(UserError, match=r"0\.5 GB are not enough: the smallest way takes 1\.0 GB"):
        best(candidates, 0.5)


def test_command_plans_and_shows_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "COUNTS", (16, 64))
    result = run("--duration", "512Mi", "--parameters", "10e6", "--range", "0.012-0.2")
    assert result.exit_code == 0, result.output
    assert "10.0 M parameters, 512Mi images; sigma_rel 0.012 to 0.2" in result.output
    assert "as published (every 8Mi, 0.05 and 0.1 in fp16, 2.6 GB)" in result.output
    (chosen,) = [line for line in result.output.splitlines() if "<- chosen" in line]
    assert "good" in chosen
    assert "--snapshot 8Mi --snapshot-storage" in result.output
    before, after = (result.output.splitlines()[-10].split()[i] for i in (5, 7))
    assert float(after) < float(before), "rounding noise of the shortest length"
    tight = run("--duration", "512Mi", "--parameters", "10e6", "--range", "0.012-0.2", "--disk", "0.4GB")
    assert tight.exit_code == 0, tight.output
    assert "nothing that fits supports the whole range" in tight.output


def test_presets_are_known() -> None:
    assert plan.parameters_of("img512-xs") == pytest.approx(124.71e6, rel=1e-4), "spec 3.5"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name a --preset, or --duration and --parameters"),
        (["--duration", "8Mi", "--parameters", "1e6", "--range", "0.2-0.1"], "two widths between 0 and 0.2887"),
        (["--duration", "8Mi", "--parameters", "1e6", "--range", "0.2"], "expected two widths"),
        (["--duration", "8Mi", "--parameters", "1e6", "--disk", "much"], "expected a size such as 200GB"),
        (["--duration", "8Mi", "--parameters", "1e6", "--disk", "1MB"], "GB are not enough"),
        (["--duration", "2Ki", "--parameters", "1e6"], "cannot be divided into 16 or more intervals"),
        (["--duration", "soon", "--parameters", "1e6"], "expected a number of images"),
    ],
)
def test_bad_arguments(arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "COUNTS", (16,))
    result = run(*arguments)
    assert result.exit_code == 1
    assert words in result.output


def test_sizes_and_ranges() -> None:
    assert [parse_size(text) for text in ("200GB", "1.5 TB", "512MiB", "3")] == [200, 1500, 0.536870912, 3]
    widths = parse_range("0.01-0.2")
    assert (widths[0], widths[-1], len(widths)) == (0.01, 0.2, 9)
    assert widths[4] == pytest.approx((0.01 * 0.2) ** 0.5, abs=1e-4)
