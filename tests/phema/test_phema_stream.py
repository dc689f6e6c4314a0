"""One pass over files of averages: sums, tiles, memory, resuming, and files that do not fit."""

from __future__ import annotations

import errno
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from phema_files import TRACKED, flat, train
from safetensors.torch import load_file, save_file

from edm2ext import phema
from edm2ext.phema import Reconstruction, Target, open_average, save_average
from edm2ext.phema import output as output_module
from edm2ext.phema import stream as stream_module
from edm2ext.phema.output import OutputFiles
from edm2ext.phema.stored import StoredAverage, StoredTensor, read_layout, refine, residual, residual_path


def some_tensors(scale: float, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """Odd sizes, an empty one, a number, a buffer of integers."""
    shapes = {"a.weight": [7, 5, 3], "a.gain": [], "b.weight": [1001], "none": [0], "b.bias": [13]}
    tensors = {name: scale * torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    return {**tensors, "steps": torch.tensor([3, int(scale)])}


def store(folder: Path, times: int = 6, dtypes: tuple[torch.dtype, ...] = (torch.float16,)) -> list[Path]:
    paths = []
    for i in range(times):
        for width in TRACKED:
            path = folder / f"{i}-{width}.safetensors"
            header = {"nimg": 1024 * (i + 1), "sigma_rel": width}
            save_file(some_tensors(i + 1, dtypes[i % len(dtypes)]), path, {"edm2": json.dumps(header)})
            paths.append(path)
    return paths


def expected(paths: list[Path], coefs: np.ndarray, name: str) -> torch.Tensor:
    return sum(float(c) * load_file(path)[name].double() for c, path in zip(coefs, paths, strict=True))


@pytest.mark.parametrize("dtypes", [(torch.float16,), (torch.float32, torch.float16, torch.bfloat16)])
@pytest.mark.parametrize("memory", [1, 1 << 16, 1 << 28])
def test_sums_do_not_depend_on_tiles(
    tmp_path: Path, backend: str, memory: int, dtypes: tuple[torch.dtype, ...]
) -> None:
    paths = store(tmp_path, dtypes=dtypes)
    targets = [Target(0.07), Target(0.2), Target(0.12, 3072), Target(0.05, shape="window")]
    groups = {"b.*": 0.15}
    work = Reconstruction([open_average(p) for p in reversed(paths)], targets, groups)
    results = work.in_memory(dtype=torch.float32, memory=memory, threads=3)
    assert [r.keys() for r in results] == [load_file(paths[0]).keys()] * 4
    for m, result in enumerate(results):
        for name, value in result.items():
            if name == "steps":
                assert value.tolist() == [3, 3 if m == 2 else 6]
                continue
            group = 1 if name.startswith("b.") else 0
            truth = expected(paths, work.fits[group][m].coefs, name)
            assert value.shape == truth.shape
            torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-5)
    assert work.fits[1][0].target.sigma_rel == 0.15


def test_files_hold_what_memory_does(tmp_path: Path) -> None:
    paths = store(tmp_path)
    out = [tmp_path / "out" / f"{i}.safetensors" for i in range(3)]
    assert phema.reconstruct(paths, [0.06, 0.12, 0.2], out, memory=1 << 14) is None
    assert sorted((tmp_path / "out").iterdir()) == out, "nothing else is left"
    for path, tensors, width in zip(out, phema.reconstruct(paths, [0.06, 0.12, 0.2]), (0.06, 0.12, 0.2), strict=True):
        stored = load_file(path)
        assert stored.keys() == tensors.keys()
        for name, value in tensors.items():
            assert value.dtype == stored[name].dtype == (torch.int64 if name == "steps" else torch.float16)
            assert torch.equal(value, stored[name])
        read = open_average(path)
        assert (read.nimg, read.sigma_rel, read.copied) == (6144, width, {"steps"})
        assert read.header["ema_kind"] == "phema"
    phema.reconstruct(paths, [0.06], [tmp_path / "single.safetensors"], dtype=torch.float32)
    assert load_file(tmp_path / "single.safetensors")["b.weight"].dtype == torch.float32


def test_later_averages_are_not_looked_at(tmp_path: Path) -> None:
    """A run that diverged after the target's time."""
    paths = store(tmp_path)
    good = phema.reconstruct(paths, [Target(0.1, 4096), Target(0.2, 4096)])
    for path in paths[8:]:
        tensors, header = load_file(path), {"nimg": open_average(path).nimg, "sigma_rel": open_average(path).sigma_rel}
        save_file({n: t * torch.nan if t.is_floating_point() else t for n, t in tensors.items()}, path,
                  {"edm2": json.dumps(header)})  # fmt: skip
    both = phema.reconstruct(paths, [Target(0.1), Target(0.1, 4096), Target(0.2, 4096)])
    assert both[0]["b.weight"].isnan().all()
    for found, wanted in zip(both[1:], good, strict=True):
        assert all(torch.equal(found[name], wanted[name]) for name in wanted if wanted[name].is_floating_point())


@pytest.mark.parametrize("refused", ["nothing", "opening", "writing"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_whole_pages_and_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, refused: str
) -> None:
    """Tiles of a page's multiple, groups and ends that are none, on file systems that want the system's cache too."""
    paths = []
    for i in range(3):
        tensors = {"a": torch.randn(20_011), "b": torch.randn(9_000), "steps": torch.tensor([i]), "c": torch.randn(3)}
        path = tmp_path / f"{i}.safetensors"
        save_file(tensors, path, {"edm2": json.dumps({"nimg": 1024 * (i + 1), "sigma_rel": 0.05})})
        paths.append(path)
    real_open, real_pwrite, direct = os.open, os.pwrite, []

    def opening(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT and refused == "opening":
            raise OSError(errno.EINVAL, "Invalid argument")
        descriptor = real_open(path, flags, *rest)
        direct.extend([descriptor] if flags & os.O_DIRECT else [])
        return descriptor

    def pwrite(descriptor: int, content: memoryview, position: int) -> int:
        if descriptor in direct:
            assert position % 4096 == len(content) % 4096 == 0
            if refused == "writing":
                raise OSError(errno.EINVAL, "Invalid argument")
        return real_pwrite(descriptor, content, position)

    monkeypatch.setattr(output_module.os, "open", opening)
    monkeypatch.setattr(output_module.os, "pwrite", pwrite)
    work = Reconstruction([open_average(path) for path in paths], [0.06, 0.12], {"b": 0.1})
    out = [tmp_path / "out" / f"{i}.safetensors" for i in range(2)]
    work.to_files(out, dtype=dtype, memory=2 * 4096 * (3 * 4 + 2 * dtype.itemsize + 4))
    for path, tensors in zip(out, work.in_memory(dtype=dtype), strict=True):
        assert all(torch.equal(load_file(path)[name], tensors[name]) for name in tensors)


class Interrupted(Exception):
    """What the power cut looks like."""


def interrupt_after(monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    real, count = OutputFiles.write, [0]

    def write(self: OutputFiles, *args: object) -> None:
        count[0] += 1
        if count[0] > writes:
            raise Interrupted
        real(self, *args)

    monkeypatch.setattr(OutputFiles, "write", write)


def test_interrupted_job_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = store(tmp_path)
    out = [tmp_path / "out" / f"{i}.safetensors" for i in range(2)]
    monkeypatch.setattr(output_module, "_SECONDS_BETWEEN_SYNCS", 0)
    read: list[int] = []
    real = stream_module.Combination.read_range

    def read_range(self: object, files: object, span: object, n: int, first: int, target: torch.Tensor) -> None:
        read.append(len(target))
        real(self, files, span, n, first, target)

    monkeypatch.setattr(stream_module.Combination, "read_range", read_range)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(Interrupted):
            phema.reconstruct(paths, [0.06, 0.2], out, memory=1, threads=1)
    assert not any(path.exists() for path in out), "no file appears before it is whole"
    read.clear()
    phema.reconstruct(paths, [0.06, 0.2], out, memory=1, threads=1)
    numel = sum(t.numel() for t in load_file(paths[0]).values() if t.is_floating_point())
    assert 0 < sum(read) < numel * len(paths), "what was written is not read again"
    for path, tensors in zip(out, phema.reconstruct(paths, [0.06, 0.2]), strict=True):
        assert all(torch.equal(load_file(path)[name], tensors[name]) for name in tensors)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.safetensors", "1.safetensors"]


def test_job_of_changed_inputs_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, out = store(tmp_path), [tmp_path / "out" / "0.safetensors"]
    monkeypatch.setattr(output_module, "_SECONDS_BETWEEN_SYNCS", 0)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(Interrupted):
            phema.reconstruct(paths, [0.06], out, memory=1, threads=1)
    header = {"nimg": 1024, "sigma_rel": 0.05}
    save_file(some_tensors(7), paths[0], {"edm2": json.dumps(header)})
    phema.reconstruct(paths, [0.06], out)
    (wanted,) = phema.reconstruct(paths, [0.06])
    assert all(torch.equal(load_file(out[0])[name], wanted[name]) for name in wanted)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0.safetensors"], "the old parts are gone"


def test_one_process_at_a_time(tmp_path: Path) -> None:
    work = Reconstruction([open_average(path) for path in store(tmp_path)], [0.06])
    out = [tmp_path / "out.safetensors"]
    metadata = [{"edm2": json.dumps(work.header(work.targets[0]))}]
    with OutputFiles(work.combination, out, metadata), pytest.raises(ValueError, match="another process is writing"):
        OutputFiles(work.combination, out, metadata)


def test_full_disk_is_noticed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output_module.os, "posix_fallocate", full)
    out = tmp_path / "out"
    with pytest.raises(OSError, match=r"cannot write .*out: no room for the 0\.0 GB"):
        phema.reconstruct(store(tmp_path), [0.06], [out / "0.safetensors"])
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(("inputs", "outputs"), [(40, 3), (3, 40)])
def test_memory_is_bounded(tmp_path: Path, inputs: int, outputs: int) -> None:
    """Of torch's tensors, which tracemalloc does not see, the sizes are added up instead."""
    numel, limit = 300_000, 2 << 20
    averages = []
    for i in range(inputs):
        path = tmp_path / f"{i}.safetensors"
        save_average(path, {"w": torch.randn(numel)}, {"nimg": 1024 * (i + 1), "sigma_rel": 0.05})
        averages.append(open_average(path))
    work = Reconstruction(averages, np.linspace(0.06, 0.2, outputs).tolist())
    asked: list[int] = []
    real = torch.empty

    def empty(*size: int, **options: object) -> torch.Tensor:
        made = real(*size, **options)
        asked.append(made.numel() * made.element_size())
        return made

    class Nowhere:
        def write(self, first: int, values: torch.Tensor) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_module.torch, "empty", empty)
        tracemalloc.start()
        stream_module.stream(work.combination, [Nowhere()] * outputs, memory=limit)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert sum(asked) <= limit
    assert peak < 1 << 20


def test_neighbours_are_read_together(tmp_path: Path) -> None:
    average = open_average(store(tmp_path, times=1)[0])
    work = Reconstruction([average], [0.05])
    reads: list[int] = []

    class Files:
        def read_into(self, path: Path, position: int, target: torch.Tensor) -> None:
            reads.append(len(target))

    (span,) = work.combination.spans
    target = torch.empty(span.stop, dtype=torch.float16)
    work.combination.read_range(Files(), span, 0, 0, target)
    assert reads == [span.stop]


def test_eight_more_bits(tmp_path: Path) -> None:
    x = torch.cat([torch.randn(2000), torch.randn(500) * 1e-6, torch.tensor([0.0, -0.0, 65504, -65504, 6e-8, 2.0])])
    coarse, fine = residual(x)
    assert torch.equal(coarse, x.half())
    back = refine(coarse, fine)
    normal = x.abs() > 6.2e-5
    error = ((back - x) / x)[normal]
    assert float(error.square().mean().sqrt()) == pytest.approx(phema.ROUNDING["fp16+8"], rel=0.1)
    assert float((back - x).abs()[~normal].max()) <= 2**-24 / 256
    path = tmp_path / "a.safetensors"
    save_average(path, {"w": x}, {"nimg": 8, "sigma_rel": 0.1}, "fp16+8")
    assert torch.equal(load_file(path)["w"], x.half()), "the file itself is an ordinary one"
    average = open_average(path)
    assert average.storage == "fp16+8"
    (result,) = Reconstruction([average], [0.1]).in_memory(dtype=torch.float32)
    assert torch.equal(result["w"], back)
    residual_path(path).unlink()
    assert open_average(path).storage == "fp16"


def test_rest_of_another_file_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        save_average(tmp_path / f"{name}.safetensors", {"w": torch.randn(9)}, {"nimg": 8, "sigma_rel": 0.1}, "fp16+8")
    residual_path(tmp_path / "b.safetensors").replace(residual_path(tmp_path / "a.safetensors"))
    with pytest.raises(ValueError, match=r"a\.residual does not belong to a\.safetensors"):
        open_average(tmp_path / "a.safetensors")
    save_average(tmp_path / "a.safetensors", {"w": torch.randn(9)}, {"nimg": 8, "sigma_rel": 0.1}, "fp32")
    assert not residual_path(tmp_path / "a.safetensors").exists()
    assert open_average(tmp_path / "a.safetensors").storage == "fp32"


def _shrink(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _forget_header(path: Path) -> None:
    save_file(load_file(path), path)


def _reshape(path: Path) -> None:
    save_file({**load_file(path), "b.bias": torch.zeros(14)}, path, {"edm2": '{"nimg": 1024, "sigma_rel": 0.1}'})


def _widen(path: Path) -> None:
    tensors = {**load_file(path), "b.bias": torch.zeros(13).double()}
    save_file(tensors, path, {"edm2": '{"nimg": 1024, "sigma_rel": 0.1}'})


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (Path.unlink, "no such file"),
        (_shrink, "damaged or not a safetensors file"),
        (_forget_header, "does not tell its time and width"),
        (_reshape, "the tensor b.bias is missing, unknown or of a wrong shape"),
        (_widen, "b.bias must be float16, bfloat16 or float32, got torch.float64"),
    ],
)
def test_bad_files_are_named_and_nothing_is_written(tmp_path: Path, harm: Callable[[Path], None], words: str) -> None:
    paths = store(tmp_path, times=2)
    harm(paths[1])
    with pytest.raises(ValueError, match=words) as error:
        phema.reconstruct(paths, [0.06], [tmp_path / "out" / "0.safetensors"])
    assert paths[1].name in str(error.value)
    assert not (tmp_path / "out").exists()


def test_file_that_shrinks_meanwhile_is_an_error(tmp_path: Path) -> None:
    paths = store(tmp_path)
    work = Reconstruction([open_average(path) for path in paths], [0.06])
    with open(paths[3], "r+b") as file:
        file.truncate(400)
    with pytest.raises(ValueError, match="is damaged: it ends before byte"):
        work.to_files([tmp_path / "out" / "0.safetensors"])
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_arguments(tmp_path: Path) -> None:
    averages = [open_average(path) for path in store(tmp_path)]
    with pytest.raises(ValueError, match="targets must not be empty"):
        Reconstruction(averages, [])
    with pytest.raises(ValueError, match="no stored average after time 0"):
        Reconstruction(averages, [Target(0.1, 5)])
    with pytest.raises(ValueError, match=r"no parameter is named like 'c\.\*'"):
        Reconstruction(averages, [0.1], {"c.*": 0.2})
    with pytest.raises(ValueError, match="expected 1 output paths, got 2"):
        Reconstruction(averages, [0.1]).to_files(["a", "b"])
    with pytest.raises(ValueError, match="dtype must be float16 or float32"):
        Reconstruction(averages, [0.1]).to_files(["a"], dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="storage must be one of fp16, fp16\\+8, fp32, got 'int4'"):
        save_average(tmp_path / "x", {}, {"nimg": 1, "sigma_rel": 0.1}, "int4")
    with pytest.raises(ValueError, match="the header must tell nimg and sigma_rel"):
        save_average(tmp_path / "x", {}, {"nimg": 1})


def test_compiled_names_are_plain_names(tmp_path: Path) -> None:
    header = {"sigma_rel": 0.05}
    plain, compiled = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"net.w": torch.ones(3)}, plain, {"edm2": json.dumps({**header, "nimg": 1024})})
    save_file({"net._orig_mod.w": torch.ones(3)}, compiled, {"edm2": json.dumps({**header, "nimg": 2048})})
    (result,) = phema.reconstruct([plain, compiled], [0.06])
    assert result["net.w"].tolist() == [1, 1, 1]
    save_file({"net._orig_mod.w": torch.ones(3), "net.w": torch.ones(3)}, compiled, {"edm2": "{}"})
    with pytest.raises(ValueError, match="under the names of a plain and a compiled module"):
        open_average(compiled, nimg=1, sigma_rel=0.1)


def test_layout_is_that_of_safetensors(tmp_path: Path) -> None:
    (path, *_) = store(tmp_path)
    metadata, tensors = read_layout(path)
    assert json.loads(metadata["edm2"])["nimg"] == 1024
    assert isinstance(tensors["a.weight"], StoredTensor)
    content = path.read_bytes()
    for name, value in load_file(path).items():
        stored = tensors[name]
        assert content[stored.start : stored.end] == value.numpy().tobytes()


def test_averages_of_a_run(tmp_path: Path) -> None:
    """Names and buffers of a module, from `PowerEMA.save` to a state dict that the module loads."""
    run = train(tmp_path, times=8, steps_between=2, also=(0.07,), storage="fp16")
    (result,) = phema.reconstruct(run.files, [0.07])
    run.ema.net.load_state_dict(result)
    torch.testing.assert_close(flat(result), run.directly(0.07), rtol=1e-2, atol=2e-3)
    assert isinstance(open_average(run.files[0]), StoredAverage)
