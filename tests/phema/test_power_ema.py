"""`PowerEMA` in anybody's training loop: widths come out right however it is called, and names are plain ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from phema_files import flat, small_net
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from edm2ext import phema
from edm2ext.phema import PowerEMA, open_average


def width_of(steps: Sequence[int]) -> list[float]:
    """Relative widths of the averages after updates at these times: of the time, tracked as if it were a weight."""
    clock = [torch.zeros(2, dtype=torch.float64)]
    ema = PowerEMA(clock, (0.05, 0.10, 0.2))
    before = 0
    for time in steps:
        # Mean of tau and of tau^2 since the last update: what the average of a continuously changing weight takes in.
        clock[0].copy_(torch.tensor([(before + time) / 2, (before**2 + before * time + time**2) / 3]))
        ema.update(time)
        before = time
    moments = np.array([profile[0].tolist() for profile in ema.profiles])
    return (np.sqrt(moments[:, 1] - moments[:, 0] ** 2) / steps[-1]).tolist()


@pytest.mark.parametrize("every", [1, 10, 100])
def test_width_does_not_depend_on_how_often_it_is_updated(every: int) -> None:
    assert width_of(range(8 * every, 8 * 5001, 8 * every)) == pytest.approx([0.05, 0.10, 0.2], rel=0.01)


def test_width_does_not_depend_on_the_batch() -> None:
    batches = np.random.default_rng(0).integers(1, 300, 2000)
    assert width_of(np.cumsum(batches).tolist()) == pytest.approx([0.05, 0.10, 0.2], rel=0.01)


def test_accumulated_steps_count_all_their_images() -> None:
    """Four micro-batches of 8 and one update are a step of 32."""
    net = small_net()
    accumulated, at_once = PowerEMA(net, [0.1]), PowerEMA(net, [0.1])
    seen = 0
    for step in range(1, 6):
        for _ in range(4):
            seen += 8
        with torch.no_grad():
            net[0].weight += 1
        accumulated.update(seen)
        at_once.update(32 * step, 32)
    torch.testing.assert_close(accumulated.profiles, at_once.profiles, rtol=0, atol=0)


def test_time_goes_on_and_is_kept() -> None:
    net = small_net()
    ema = PowerEMA(net)
    ema.update(64)
    for bad in (64, 32):
        with pytest.raises(ValueError, match=rf"nimg_next must be larger than at the last update \(64\), got {bad}"):
            ema.update(bad)
    other = PowerEMA(net)
    other.load_state_dict(ema.state_dict())
    assert other.nimg == 64
    state = ema.state_dict()
    del state["nimg"]  # as states of earlier versions
    other.load_state_dict(state)
    assert other.nimg == 0


class _NoWaiting(TorchDispatchMode):
    """Everything that would make the host wait for a GPU is an error."""

    def __torch_dispatch__(
        self, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), function
        return function(*args, **(kwargs or {}))


def test_update_does_not_wait_for_the_device(backend: str) -> None:
    net = small_net()
    ema = PowerEMA(net)
    with _NoWaiting():
        ema.update(8)
    with torch.device("meta"):  # a device without values: reading one raises
        meta = PowerEMA(small_net())
    meta.update(8)
    meta.update(16)


def test_compiled_modules_have_plain_names(tmp_path: Path) -> None:
    net = small_net()
    compiled = torch.compile(net, backend="eager")
    assert any("_orig_mod" in name for name, _ in compiled.named_parameters())
    ema = PowerEMA(compiled)
    ema.update(8)
    assert ema.averages(0.05).keys() == dict(net.named_parameters()).keys()
    ema.save(lambda width: tmp_path / f"{width}.safetensors")
    net.load_state_dict(load_file(tmp_path / "0.05.safetensors"))


def test_a_child_called_module_is_not_a_wrapper(tmp_path: Path) -> None:
    net = nn.ModuleDict({"module": nn.Linear(2, 2), "weight_of": nn.Linear(2, 2)})
    net.register_parameter("weight", nn.Parameter(torch.ones(3)))
    ema = PowerEMA(net)
    assert ema.names == [name for name, _ in net.named_parameters()]
    wrapped = nn.Module()
    wrapped.module = torch.compile(net, backend="eager")
    wrapped.module.register_buffer("mean", torch.zeros(2))
    assert PowerEMA(wrapped).names == ema.names
    wrapped.module.register_buffer("later", torch.zeros(2))
    ema = PowerEMA(wrapped)
    ema.update(8)
    ema.save(lambda width: tmp_path / f"{width}.safetensors")
    assert load_file(tmp_path / "0.05.safetensors").keys() == {*ema.names, "mean", "later"}
    assert open_average(tmp_path / "0.05.safetensors").copied == {"mean", "later"}


class LoRA(nn.Module):
    """A frozen linear layer and a trainable one of low rank beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(8, 8).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.zeros(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def test_adapters_only(tmp_path: Path) -> None:
    net = nn.Sequential(LoRA(), nn.SiLU(), LoRA())
    ema = PowerEMA(net)
    assert ema.names == ["0.down", "0.up", "2.down", "2.up"]
    for step in range(1, 5):
        with torch.no_grad():
            net[0].up += 1
        ema.update(step)
        ema.save(lambda width, step=step: tmp_path / f"{step}-{width}.safetensors")
    (result,) = phema.reconstruct(sorted(tmp_path.iterdir()), [0.08])
    assert set(result) == set(ema.names)
    missing, unexpected = net.load_state_dict({n: v.float() for n, v in result.items()}, strict=False)
    assert not unexpected
    assert all(".base." in name for name in missing)
    with pytest.raises(ValueError, match="no parameters that require gradients"):
        PowerEMA(net.requires_grad_(False))


def test_buffers_go_along(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    net.register_buffer("scratch", torch.zeros(1), persistent=False)
    ema = PowerEMA(net)
    for step in range(1, 4):
        net(torch.randn(8, 3))
        ema.update(8 * step)
        ema.save(lambda width, step=step: tmp_path / f"{step}-{width}.safetensors", storage="fp32")
    (result,) = phema.reconstruct(sorted(tmp_path.iterdir()), [0.08], dtype=torch.float32)
    net[1].running_mean.sub_(result["1.running_mean"])
    assert float(net[1].running_mean.abs().max()) == 0, "the last one's, not an average"
    assert int(result["1.num_batches_tracked"]) == 3
    assert open_average(tmp_path / "1-0.05.safetensors").copied == {
        "1.running_mean", "1.running_var", "1.num_batches_tracked"
    }  # fmt: skip
    net.load_state_dict(result)


def test_unknown_width() -> None:
    with pytest.raises(ValueError, match=r"sigma_rel must be one of \[0\.05, 0\.1\], got 0\.2"):
        PowerEMA(small_net()).averages(0.2)


STEPS = 3


def _train(net: nn.Module, ema: PowerEMA, part: slice) -> None:
    """A few steps of plain gradient descent on a rank's part of the data."""
    generator = torch.Generator().manual_seed(1)
    for step in range(1, STEPS + 1):
        x = torch.randn(8, 8, generator=generator)
        net(x[part]).square().mean().backward()
        with torch.no_grad():
            for param in net.parameters():
                param -= 0.1 * param.grad
                param.grad = None
        ema.update(8 * step)


def _wrapped(kind: str, net: nn.Module) -> nn.Module:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(net)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(net, mesh=init_device_mesh("cpu", (2,)))


def _process(rank: int, kind: str, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = _wrapped(kind, small_net())
    ema = PowerEMA(net)
    _train(net, ema, slice(4 * rank, 4 * rank + 4))
    other = PowerEMA(net)
    other.load_state_dict(ema.state_dict())
    other.save(lambda width: f"{folder}/{width}.safetensors", storage="fp32")
    torch.save([e.numel() for e in ema.profiles[0]], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_processes_save_what_one_does(kind: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_process, (kind, str(tmp_path)), nprocs=2)
    torch.manual_seed(0)
    net = small_net()
    alone = PowerEMA(net)
    _train(net, alone, slice(None))
    for width in alone.sigma_rels:
        saved = load_file(tmp_path / f"{width}.safetensors")
        torch.testing.assert_close(flat(saved), flat(alone.averages(width)), rtol=1e-5, atol=1e-6)
        assert open_average(tmp_path / f"{width}.safetensors").nimg == 8 * STEPS
    if kind == "fsdp2":
        whole = [param.numel() for param in net.parameters()]
        parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
        assert [a + b for a, b in zip(*parts, strict=True)] == whole, "each process holds its shards only"
