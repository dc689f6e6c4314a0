"""Training for minutes: memory stays where it was, the loss falls, nothing but the wanted files is left."""

import gc
from pathlib import Path

import pytest

from python_train import checkpoint, config, data, loop, run_dir

MINUTES_OF_IMAGES = 192 * 1024


@pytest.mark.slow
def test_memory_does_not_grow(tmp_path: Path) -> None:
    """From the first quarter on, a run that reports, saves and snapshots all the time occupies no more memory."""
    options = config.make_options(
        "digits", model_channels=8, num_blocks=1, batch=64, duration=MINUTES_OF_IMAGES, dropout=0.1,
        status=1024, snapshot=4096, checkpoint=4096,
    )  # fmt: skip
    occupied = []
    original = loop._Reporter.status

    def status(self: loop._Reporter) -> float:
        gc.collect()
        occupied.append(loop._resident_bytes())
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Reporter, "status", status)
        assert loop.train(options, data.open_dataset("digits"), tmp_path / "run") == options.duration
    quarter = len(occupied) // 4
    assert max(occupied[quarter:]) - occupied[quarter] < 32 * 2**20, [b // 2**20 for b in occupied[::quarter]]
    assert len(checkpoint.list_states(tmp_path / "run")) == run_dir.STATES_KEPT
    assert not list((tmp_path / "run").glob(".*"))
