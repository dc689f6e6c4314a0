"""The conversion command: what it writes, what it leaves alone, its errors; pickles in generate and reconstruct."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import official_files as files
import pytest
import safetensors
import torch
from click.testing import CliRunner, Result
from official_files import small_net, write

from python_train import checkpoint, generate, reconstruct
from python_train.convert import Facts, convert, main
from python_train.network import Precond

NAME = "edm2-tiny-0000065-0.135"
STATE = "training-state-0000065.pt"


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def net() -> Precond:
    torch.manual_seed(0)
    return small_net(channels=4)


@pytest.fixture
def pkl(net: Precond, tmp_path: Path) -> Path:
    return write(tmp_path / f"{NAME}.pkl", files.snapshot(net))


def test_a_snapshot(net: Precond, pkl: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "xs.safetensors"
    result = run(pkl, target)
    assert result.exit_code == 0, result.output
    assert f"1 networks written to {target}, 0 were there already" in result.output
    assert "licence of the weights: CC BY-NC-SA 4.0" in result.output
    again, header = checkpoint.load_snapshot(target)
    for name, value in again.state_dict().items():
        assert torch.equal(value, net.state_dict()[name].half().float()), name
    assert again.config == net.config
    assert (header["nimg"], header["sigma_rel"], header["ema_kind"]) == (65536, 0.135, "phema")
    assert header["license"] == "CC BY-NC-SA 4.0"
    assert header["encoder"]["kind"] == "latent"
    assert os.listdir(target.parent) == ["xs.safetensors"]


def test_it_is_the_snapshot_that_training_would_write(net: Precond, pkl: Path, tmp_path: Path) -> None:
    converted, header = tmp_path / "a.safetensors", checkpoint.read_header(pkl)
    convert(pkl, converted)
    facts = {key: header[key] for key in checkpoint.HEADER_KEYS if key not in ("format_version", "config")}
    extra = {key: header[key] for key in ("license", "source")}
    checkpoint.save_snapshot(tmp_path / "b.safetensors", net, **facts, extra=extra)
    a, b = (safetensors.safe_open(tmp_path / name, "pt") for name in ("a.safetensors", "b.safetensors"))
    assert a.metadata() == b.metadata()
    assert sorted(a.keys()) == sorted(b.keys())
    assert all(torch.equal(a.get_tensor(name), b.get_tensor(name)) for name in a.keys())  # noqa: SIM118
    assert {a.get_tensor(name).dtype for name in a.keys()} == {torch.float16}  # noqa: SIM118


def test_a_folder_is_continued(net: Precond, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    content = files.snapshot(net)
    names = [f"edm2-tiny-{kimg:07d}-{std:.3f}" for kimg in (65, 131) for std in (0.05, 0.1)]
    for name in names:
        write(raw / f"{name}.pkl", content)
    write(raw / "edm2-tiny-0000196-0.050.pkl", content[:-100])
    write(raw / "notes.pkl", b"")
    result = run(raw, out)
    assert result.exit_code == 1
    assert "4 networks written" in result.output
    assert "1 files were not converted:" in result.output
    assert "edm2-tiny-0000196-0.050.pkl is refused: it ends early" in result.output
    assert sorted(path.stem for path in out.iterdir()) == names, "a half-written or unasked file"

    first, second = out / f"{names[0]}.safetensors", out / f"{names[1]}.safetensors"
    before = first.stat().st_mtime_ns
    second.unlink()
    (raw / "edm2-tiny-0000196-0.050.pkl").unlink()
    result = run(raw, out)
    assert result.exit_code == 0, result.output
    assert "1 networks written" in result.output
    assert "3 were there already" in result.output
    assert first.stat().st_mtime_ns == before
    run(raw, out, "--overwrite")
    assert first.stat().st_mtime_ns > before


def test_what_is_ours_already_is_said_to_be(net: Precond, pkl: Path, tmp_path: Path) -> None:
    ours, official = tmp_path / "ours.safetensors", tmp_path / "official.pt"
    assert run(pkl, ours).exit_code == 0
    assert run(ours, official, "--to", "official").exit_code == 0
    result = run(ours, tmp_path / "again.safetensors")
    assert result.exit_code == 1
    assert "is a snapshot of this program already; --to official converts it" in result.output
    for arguments, words in (
        ((pkl, official), "results are .safetensors files; name one, or a folder"),
        ((ours, tmp_path / "x.safetensors", "--to", "official"), "name it such as ours.pt"),
        ((ours, tmp_path, "--to", "official"), "name it such as ours.pt"),
        ((tmp_path, tmp_path / "x.pt", "--to", "official"), "is a folder: --to official converts one snapshot"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1
        assert words in result.output
    assert sorted(os.listdir(tmp_path)) == sorted([pkl.name, ours.name, official.name])


def test_there_and_back(net: Precond, pkl: Path, tmp_path: Path) -> None:
    """Of the file that --to official writes, the same snapshot is made again, and of that the same file."""
    own = tmp_path / "own.safetensors"
    dataset = {"name": "mine", "num_images": 7, "class_names": ["a", "b", "c"]}
    encoder = {"kind": "standardized", "mean": [0.5] * 4, "std": [0.25] * 4}
    extra = {"shape": "window", "sigma_rel_of": {"unet.enc.*": 0.1}}
    checkpoint.save_snapshot(
        own, net, nimg=65_000, sigma_rel=0.07, ema_kind="phema", dataset=dataset, encoder=encoder, extra=extra
    )
    convert(pkl, tmp_path / "published.safetensors")
    for name, license_text in (("own", None), ("published", "CC BY-NC-SA 4.0")):
        first, there, back = (tmp_path / f"{name}{end}" for end in (".safetensors", ".pt", "-back.safetensors"))
        assert run(first, there, "--to", "official").exit_code == 0
        result = run(there, back)
        assert result.exit_code == 0, result.output
        assert ("licence of the weights" in result.output) == (license_text is not None), "no licence is made up"
        before, after = checkpoint.read_header(first), checkpoint.read_header(back)
        assert {**before, "source": after["source"]} == after
        assert after.get("license") == license_text
        tensors = checkpoint.read_tensors(back)
        assert all(torch.equal(tensors[key], value) for key, value in checkpoint.read_tensors(first).items())
        again = tmp_path / f"{name}-again.pt"
        assert run(back, again, "--to", "official").exit_code == 0
        a, b = (torch.load(path, weights_only=True) for path in (there, again))
        assert all(torch.equal(value, b["net"][key]) for key, value in a.pop("net").items())
        del b["net"]
        assert a == b


def test_nothing_of_the_users_is_overwritten(net: Precond, pkl: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.safetensors"
    for content, words in ((b"precious", "damaged or something else"), (None, "not made from this file")):
        if content is None:
            convert(write(tmp_path / "edm2-other-0000065-0.135.pkl", files.snapshot(net)), target, overwrite=True)
        else:
            target.write_bytes(content)
        before = target.read_bytes()
        result = run(pkl, target)
        assert result.exit_code == 1
        assert words in result.output
        assert target.read_bytes() == before
    assert run(pkl, target, "--overwrite").exit_code == 0
    assert checkpoint.read_header(target)["source"]["file"] == pkl.name


def test_training_states(tmp_path: Path) -> None:
    nets = {std: small_net(model_channels=64, channels_per_head=64, channel_mult=[1]) for std in (0.05, 0.1)}
    state = write(tmp_path / STATE, files.training_state(nets))
    assert run(state, tmp_path / "out").exit_code == 0
    names = ["network-snapshot-0000065-0.050.safetensors", "network-snapshot-0000065-0.100.safetensors"]
    assert sorted(os.listdir(tmp_path / "out")) == names
    for (std, net), name in zip(nets.items(), names, strict=True):
        again, header = checkpoint.load_snapshot(tmp_path / "out" / name)
        assert (header["sigma_rel"], header["ema_kind"]) == (std, "power")
        assert all(
            torch.equal(value, net.state_dict()[key].half().float()) for key, value in again.state_dict().items()
        )
    (tmp_path / "out" / names[1]).unlink()
    assert "1 networks written" in (again := run(state, tmp_path / "out").output)
    assert "1 were there already" in again
    assert "2 were there already" in run(state, tmp_path / "out").output
    one = tmp_path / "one.safetensors"
    result = run(state, one)
    assert result.exit_code == 1
    assert "holds averages of the widths 0.05, 0.1: choose one by --sigma-rel" in result.output
    assert run(state, one, "--sigma-rel", 0.1).exit_code == 0
    assert checkpoint.read_header(one)["sigma_rel"] == 0.1
    result = run(state, one, "--sigma-rel", 0.2)
    assert result.exit_code == 1
    assert "has no average of width 0.2; it has 0.05, 0.1" in result.output


def test_what_a_file_does_not_tell(net: Precond, tmp_path: Path) -> None:
    pkl = write(tmp_path / "model.pkl", files.snapshot(net))
    target = tmp_path / "x.safetensors"
    result = run(pkl, target)
    assert result.exit_code == 1
    assert "add --kimg and --sigma-rel" in result.output
    own = ["--kimg", 65, "--sigma-rel", 0.05, "--kind", "power", "--license", "my own weights"]
    result = run(pkl, target, *own)
    assert result.exit_code == 0
    assert "licence of the weights: my own weights" in result.output
    header = checkpoint.read_header(target)
    assert [header[key] for key in ("nimg", "sigma_rel", "ema_kind", "license")] == [
        65536,
        0.05,
        "power",
        "my own weights",
    ]
    state = write(tmp_path / STATE, files.training_state(small_net(model_channels=64, channels_per_head=64)))
    assert "add --sigma-rel" in run(state, tmp_path / "traditional").output
    assert run(state, tmp_path / "traditional", "--sigma-rel", 0.034).exit_code == 0
    assert os.listdir(tmp_path / "traditional") == ["network-snapshot-0000065-0.034.safetensors"]


def test_and_back(net: Precond, pkl: Path, tmp_path: Path) -> None:
    """The file is plain values, in the names and the order that the reference's network has."""
    ours, back = tmp_path / "ours.safetensors", tmp_path / "new" / "back.pt"
    convert(pkl, ours)
    assert run(ours, back, "--to", "official").exit_code == 0
    data = torch.load(back, weights_only=True)
    assert list(data["net"]) == list(net.state_dict())
    again = Precond(**data["init_kwargs"])
    again.load_state_dict(data["net"])
    assert all(torch.equal(value, data["net"][key]) for key, value in again.half().state_dict().items())
    assert all(torch.equal(value.half(), data["net"][key]) for key, value in net.state_dict().items())
    assert data["state"] == {"cur_nimg": 65536, "total_elapsed_time": 0.0}
    assert data["license"] == "CC BY-NC-SA 4.0"
    assert b"class " not in back.read_bytes(), "source code"
    result = run(ours, back, "--to", "official")
    assert result.exit_code == 1
    assert "exists already; use --overwrite" in result.output


def test_errors(pkl: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases = [
        ([tmp_path / "missing.pkl", "x"], "does not exist"),
        ([tmp_path / "empty", "x"], "holds no snapshots named like"),
        ([tmp_path, tmp_path / "x.safetensors"], "need a folder too"),
        ([pkl, tmp_path / "x.safetensors", "--sigma-rel", 3], "between 0 and 1"),
        ([pkl, tmp_path / "x.safetensors", "--to", "elsewhere"], "elsewhere"),
        ([pkl, tmp_path / "x.pt", "--to", "official", "--kimg", 3], "leave the other options out"),
        ([write(tmp_path / "x.safetensors", b"no"), tmp_path / "x.pt", "--to", "official"], "damaged"),
        ([write(tmp_path / "y.pkl", b"no"), tmp_path / "z.safetensors"], "y.pkl is refused: byte 0x6e is not"),
    ]
    for args, words in cases:
        result = run(*args)
        assert result.exit_code != 0, args
        assert words in result.output, result.output
        assert "Traceback" not in result.output
    assert not (tmp_path / "x.pt").exists()
    assert not (tmp_path / "z.safetensors").exists()


def test_memory_is_that_of_the_largest_tensor(tmp_path: Path) -> None:
    net = small_net(model_channels=64, num_blocks=3)
    pkl = write(tmp_path / f"{NAME}.pkl", files.snapshot(net))
    largest = max(param.numel() * 2 for param in net.parameters())
    convert(pkl, tmp_path / "warm-up.safetensors")
    tracemalloc.start()
    convert(pkl, tmp_path / "x.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    structure = 2**22  # the objects that the pickle's instructions make, and the network without its numbers
    assert 10 * largest + structure < pkl.stat().st_size, "the bound below would show nothing"
    assert peak < 4 * largest + structure


def test_generate_and_reconstruct_take_pickles(net: Precond, tmp_path: Path) -> None:
    raw, converted = tmp_path / "raw", tmp_path / "converted"
    raw.mkdir()
    for kimg in (65, 131):
        for std in (0.05, 0.1):
            write(raw / f"edm2-tiny-{kimg:07d}-{std:.3f}.pkl", files.snapshot(small_net(channels=4)))
    assert run(raw, converted).exit_code == 0
    for folder in (raw, converted):
        args = ["--indir", folder, "--outdir", folder / "phema", "--outstd", "0.07"]
        result = CliRunner().invoke(reconstruct.main, [str(arg) for arg in args])
        assert result.exit_code == 0, result.output
    a, b = (
        checkpoint.load_snapshot(folder / "phema" / "phema-0000131-0.070.safetensors") for folder in (raw, converted)
    )
    assert a[1] == b[1]
    assert a[1]["license"] == "CC BY-NC-SA 4.0", "the licence stays with what is made of the weights"
    assert all(torch.equal(value, b[0].state_dict()[name]) for name, value in a[0].state_dict().items())

    name = "edm2-tiny-0000131-0.050"
    for suffix, folder in ((".pkl", raw), (".safetensors", converted)):
        args = [
            "--net",
            folder / f"{name}{suffix}",
            "--outdir",
            tmp_path / suffix,
            "--seeds",
            "0-1",
            "--steps",
            2,
            "--device",
            "cpu",
            "--latents",
        ]
        result = CliRunner().invoke(generate.main, [str(arg) for arg in args])
        assert result.exit_code == 0, result.output
    assert (tmp_path / ".pkl" / "000001.npy").read_bytes() == (tmp_path / ".safetensors" / "000001.npy").read_bytes()

    run(raw, raw)
    assert [s.path.suffix for s in reconstruct.find_snapshots(raw)] == [".safetensors"] * 4, "each average once"


def test_library_use(pkl: Path, tmp_path: Path) -> None:
    (path,) = convert(pkl, tmp_path / "folder", Facts(kind="power"))
    assert path == tmp_path / "folder" / f"{NAME}.safetensors"
    assert checkpoint.read_header(path)["ema_kind"] == "power"
    assert convert(pkl, tmp_path / "folder", Facts(kind="power")) == []


def test_help_explains_every_option() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for param in main.params:
        assert param.opts[0] in result.output or param.name.upper() in result.output
