"""Nothing is lost: kills, damaged files and data, full and read-only disks, other processes, clocks and versions."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from runs import TINY, check_listed_files, children, command, environment, final_files, fork, run, same, start

from edm2ext.phema import STORAGES
from edm2ext.phema.stored import residual_path
from python_train import UserError, checkpoint, data, loop
from python_train.config import TrainOptions
from python_train.loop import build_network
from python_train.reconstruct.snapshots import find_snapshots, open_snapshots
from python_train.rng import epoch_order
from python_train.run_dir import RunDir
from python_train.signals import SIGNALS
from python_train.snapshot_storage import save_tracked, tracked
from python_train.stop import Stopped
from python_train.trainer import Trainer

OLD_RUN = Path(__file__).parents[1] / "golden" / "run_format_1"
SHORT = dataclasses.replace(TINY, duration=2048)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the uninterrupted run leaves behind."""
    torch.set_num_threads(1)
    outdir = tmp_path_factory.mktemp("whole") / "run"
    run(SHORT, outdir)
    return final_files(outdir)


def at_step(monkeypatch: pytest.MonkeyPatch, nimg: int, act: Callable[[], None]) -> None:
    """Do something just before the training step of image ``nimg``."""
    step = Trainer.step

    def acting(self: Trainer, batches: Iterator) -> None:
        if self.nimg == nimg:
            act()
        step(self, batches)

    monkeypatch.setattr(Trainer, "step", acting)


def wait_for(condition: Callable[[], object], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# ---------------------------------------------------------------------------------------------------------------- kills


@pytest.mark.slow
@pytest.mark.parametrize("kills", [10, 50])
def test_killed_at_random_moments(tmp_path: Path, kills: int) -> None:
    """`kill -9` at a moment anywhere in a run, and, every other time, while a file is being written. Then every file
    that is listed can be read, and the run that goes on ends with the same bits."""
    options = ("--duration", "8Ki", "--checkpoint", "1Ki", "--snapshot", "1Ki", "--keep-every", "4Ki")
    began = time.monotonic()
    start(tmp_path / "whole", *options).join()
    seconds = time.monotonic() - began
    expected = final_files(tmp_path / "whole")
    moments = random.Random(kills)
    outdir = tmp_path / "run"
    done = found_writing = 0

    def finish() -> None:
        process = start(outdir, *options)
        process.join()
        assert process.exitcode == 0, outdir.with_suffix(".out").read_text()
        assert same(final_files(outdir), expected)
        assert not list(outdir.glob(".*"))
        shutil.rmtree(outdir)

    while done < kills:
        process = start(outdir, *options)
        process.join(timeout=moments.uniform(0, seconds / 4))
        while done % 2 and process.is_alive() and not any(outdir.glob(".*.tmp")):
            pass
        if not process.is_alive():  # it came to its end before its moment
            assert process.exitcode == 0, outdir.with_suffix(".out").read_text()
            finish()
            continue
        process.kill()
        process.join()
        done += 1
        if outdir.exists():
            found_writing += any(outdir.glob(".*.tmp"))
            check_listed_files(outdir)
    assert found_writing >= kills // 10
    finish()


def test_killed_once(whole: dict[str, object], tmp_path: Path) -> None:
    process = start(tmp_path / "run", "--duration", "2Ki")
    wait_for(lambda: list((tmp_path / "run").glob("training-state-*")) or not process.is_alive())
    process.kill()
    process.join()
    assert run(SHORT, tmp_path / "run") == SHORT.duration
    assert same(final_files(tmp_path / "run"), whole)


def test_stopped_between_two_reports(whole: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses before and after go into one mean, as if nothing had been in between."""
    with monkeypatch.context() as patch:
        at_step(patch, 1088, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        with pytest.raises(Stopped, match="1,152 images are done"):
            run(SHORT, tmp_path / "run")
    run(SHORT, tmp_path / "run")
    assert same(final_files(tmp_path / "run"), whole)


# -------------------------------------------------------------------------------------------------------- damaged files


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_any_flipped_bit_of_a_snapshot_is_noticed(whole: dict[str, object], tmp_path: Path) -> None:
    name, content = next(iter(whole["snapshots"].items()))
    path = tmp_path / name
    header = int.from_bytes(content[:8], "little") + 8
    bits = [*range(64), *random.Random(0).sample(range(64, 8 * header), 100)]
    bits += random.Random(1).sample(range(8 * header, 8 * len(content)), 100)
    for bit in bits:
        path.write_bytes(content)
        flip(path, bit)
        with pytest.raises(UserError, match=name):
            checkpoint.load_snapshot(path)
    path.write_bytes(content)
    checkpoint.load_snapshot(path)


@pytest.mark.parametrize("storage", STORAGES)
def test_reconstruction_refuses_a_damaged_snapshot(tmp_path: Path, storage: str) -> None:
    net = build_network(TINY, 8, 1, 10)
    for nimg in (1024, 2048):
        path = tmp_path / checkpoint.snapshot_name(nimg, 0.05)
        header = tracked(net, nimg=nimg, sigma_rel=0.05, updates=1, dataset={}, encoder={})
        save_tracked(path, header, dict(net.named_parameters()), dict(net.named_buffers()), storage)
    assert len(open_snapshots(find_snapshots(tmp_path))) == 2
    files = [path, residual_path(path)] if storage == "fp16+8" else [path]
    for file in files:
        content = file.read_bytes()
        flip(file, 8 * len(content) - 1000)
        with pytest.raises(UserError, match=f"{file} is damaged: its content does not match its checksum"):
            open_snapshots(find_snapshots(tmp_path))
        file.write_bytes(content)


def test_any_flipped_bit_of_a_training_state_is_noticed_or_harmless(tmp_path: Path) -> None:
    path = OLD_RUN / "training-state-0000001.pt"
    content, state = path.read_bytes(), checkpoint.load_state(path)
    noticed = 0
    for bit in random.Random(0).sample(range(8 * len(content)), 60):
        damaged = tmp_path / path.name
        damaged.write_bytes(content)
        flip(damaged, bit)
        try:
            assert same(checkpoint.load_state(damaged), state)
        except UserError as error:
            assert str(damaged) in str(error)  # noqa: PT017
            noticed += 1
    assert noticed > 20  # the rest of the file is padding


def test_damaged_states_fall_back(whole: dict[str, object], tmp_path: Path) -> None:
    outdir = tmp_path / "run"
    run(dataclasses.replace(SHORT, checkpoint=512 * 2, duration=1024), outdir)
    good = checkpoint.list_states(outdir)[0]
    newest, middle = (outdir / checkpoint.state_name(nimg) for nimg in (3072, 2048))
    for copy in (newest, middle):
        shutil.copy(good, copy)
    flip(newest, 8 * newest.read_bytes().index(b"unet") + 4_000_000 % (8 * 50_000))
    middle.write_bytes(middle.read_bytes()[:1000])
    while True:  # into the numbers
        with contextlib.suppress(UserError):
            checkpoint.load_state(newest)
            flip(newest, random.Random(0).randrange(8 * newest.stat().st_size))
            continue
        break
    assert run(SHORT, outdir) == SHORT.duration
    log = (outdir / "log.txt").read_text()
    assert f"WARNING: {newest} is damaged" in log
    assert f"WARNING: {middle} is damaged" in log
    assert f"resuming from {good}" in log
    newest.unlink()
    assert same(final_files(outdir), whole)


def test_a_run_whose_states_are_all_damaged_is_not_begun_anew(tmp_path: Path) -> None:
    outdir = tmp_path / "run"
    run(dataclasses.replace(SHORT, duration=1024), outdir)
    (state,) = checkpoint.list_states(outdir)
    state.write_bytes(state.read_bytes()[:-100])
    before = {path.name: path.read_bytes() for path in outdir.iterdir() if path.name != "log.txt"}
    with pytest.raises(UserError, match=rf"no training state in {outdir} can be read"):
        run(SHORT, outdir)
    assert {path.name: path.read_bytes() for path in outdir.iterdir() if path.name != "log.txt"} == before


# ------------------------------------------------------------------------------------------------------------ the disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory, of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"mounting a tmpfs is not allowed here: {mount.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk(small_disk: Path, whole: dict[str, object], tmp_path: Path) -> None:
    outdir = small_disk / "run"
    filler = small_disk / "something else"
    filler.write_bytes(bytes(2**20 - 300_000))
    out = tmp_path / "out"
    failed = fork(_train, outdir, log=out)
    failed.join()
    assert failed.exitcode == 1
    assert "No space left on device" in out.read_text()
    assert not list(outdir.glob(".*"))
    check_listed_files(outdir)
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    run(SHORT, outdir)
    assert same(final_files(outdir), whole)


def _train(outdir: Path) -> None:
    try:
        run(SHORT, outdir)
    except OSError as error:
        sys.exit(str(error))


def test_no_room_in_the_middle_of_a_run(
    whole: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on file sizes makes real writes of the thread fail, as a full disk does."""
    outdir = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with monkeypatch.context() as patch:
        at_step(patch, 1536, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard)))
        try:
            with pytest.raises(OSError, match=rf"cannot write {outdir}/.*-0000002.*: File too large"):
                run(SHORT, outdir)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
    check_listed_files(outdir)
    assert [path.name for path in checkpoint.list_states(outdir)] == ["training-state-0000001.pt"]
    assert not list(outdir.glob(".*"))
    run(SHORT, outdir)
    assert same(final_files(outdir), whole)


def test_a_directory_that_becomes_read_only(whole: dict[str, object], tmp_path: Path) -> None:
    outdir = tmp_path / "run"
    failed = fork(_train_until_read_only, outdir, log=tmp_path / "out")
    failed.join()
    outdir.chmod(0o755)
    assert failed.exitcode == 1
    assert (
        f"cannot write {outdir}/network-snapshot-0000002-0.050.safetensors: Permission denied"
        in (tmp_path / "out").read_text()
    )
    assert [path.name for path in checkpoint.list_states(outdir)] == ["training-state-0000001.pt"]
    run(SHORT, outdir)
    assert same(final_files(outdir), whole)


def _train_until_read_only(outdir: Path) -> None:
    if os.geteuid() == 0:  # permissions mean nothing to root: give up that capability, and all others
        version, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None, use_errno=True).capset(version, nothing) == 0
    at_step(pytest.MonkeyPatch(), 1536, lambda: outdir.chmod(0o555))
    _train(outdir)


# ------------------------------------------------------------------------------------------------------------- the data

IMAGES = dataclasses.replace(SHORT, data="images", cond=False, duration=512, snapshot=0, status=0)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of 256 images."""
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, [256, 8, 8], dtype=np.uint8)
    for index, image in enumerate(pixels):
        PIL.Image.fromarray(image).save(folder / f"{index:03d}.png")
    return folder


def train_on(images: Path, outdir: Path, workers: int, options: TrainOptions = IMAGES) -> dict[str, object]:
    dataset = data.open_dataset(images, cond=False, cache_bytes=0, workers=workers)
    loop.train(options, dataset, outdir)
    state = checkpoint.load_state(checkpoint.list_states(outdir)[0])
    return {key: value for key, value in state.items() if key not in ("run", "elapsed")}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_in_the_middle_of_an_epoch(images: Path, tmp_path: Path, workers: int) -> None:
    """It is named, and the steps before it are saved."""
    expected = train_on(images, tmp_path / "whole", 0)
    bad = images / f"{epoch_order(IMAGES.seed, 0, 256)[150]:03d}.png"
    content = bad.read_bytes()
    bad.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=rf"{bad.name} cannot be decoded(.|\n)*The run stops at 128 images"):
        train_on(images, tmp_path / "run", workers)
    (state,) = checkpoint.list_states(tmp_path / "run")
    assert checkpoint.load_state(state)["nimg"] == 128
    bad.write_bytes(content)
    assert same(train_on(images, tmp_path / "run", workers), expected)


def test_a_process_that_reads_data_is_killed(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    expected = train_on(images, tmp_path / "whole", 2)
    assert signal.getsignal(signal.SIGCHLD) == handler

    def kill_readers() -> None:
        for process in multiprocessing.active_children():
            process.kill()

    with monkeypatch.context() as patch:
        at_step(patch, 128, kill_readers)
        with pytest.raises(UserError, match="a process that reads data is gone"):
            train_on(images, tmp_path / "run", 2)
    nimg = checkpoint.load_state(checkpoint.list_states(tmp_path / "run")[0])["nimg"]
    assert 192 <= nimg < 512  # what had been read ahead was still used
    assert same(train_on(images, tmp_path / "run", 2), expected)


# ---------------------------------------------------------------------------------------- other processes, clocks, time


def test_one_process_at_a_time(images: Path, tmp_path: Path) -> None:
    """The second is refused. When the first is killed, its lock is gone at once: those that read for it do not keep
    it."""
    outdir = tmp_path / "run"
    endless = dataclasses.replace(IMAGES, duration=2**30)
    first = fork(train_on, images, outdir, 2, endless, log=tmp_path / "out")
    wait_for(lambda: len(children(first.pid)) >= 2 or not first.is_alive())
    readers = children(first.pid)
    with pytest.raises(UserError, match=f"another process is training in {outdir}"):
        train_on(images, outdir, 0, endless)
    description = json.loads((outdir / "options.json").read_text())
    for reader in readers:
        os.kill(reader, signal.SIGSTOP)  # else they would notice within seconds, and end
    first.kill()
    first.join()
    RunDir(outdir, description).close()
    for reader in readers:
        os.kill(reader, signal.SIGKILL)


def test_clock_jumps(whole: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the time stamps depends on the clock, or on files' times."""
    outdir = tmp_path / "run"
    clock = time.time
    years = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: clock() + years.uniform(-20, 20) * 3.15e7)
    run(dataclasses.replace(SHORT, slice=1024), outdir)
    for path in outdir.iterdir():
        os.utime(path, (years.uniform(0, 4e9), years.uniform(0, 4e9)))
    run(SHORT, outdir)
    assert same(final_files(outdir), whole)


# ------------------------------------------------------------------------------------------------------------- versions


@pytest.fixture
def old_run(tmp_path: Path) -> tuple[Path, TrainOptions]:
    """A run that was begun by the first version of this program, and its options."""
    shutil.copytree(OLD_RUN, tmp_path / "run")
    options = json.loads((OLD_RUN / "options.json").read_text())["options"]
    tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return tmp_path / "run", TrainOptions(**tuples)


def test_a_run_of_the_first_version_continues(old_run: tuple[Path, TrainOptions]) -> None:
    outdir, options = old_run
    assert run(dataclasses.replace(options, duration=2048, keep=1), outdir) == 2048
    states = checkpoint.list_states(outdir)
    assert [checkpoint.load_state(path)["format_version"] for path in states] == [2, 1]
    assert json.loads((outdir / "options.json").read_text())["format_version"] == 2
    _, header = checkpoint.load_snapshot(outdir / "network-snapshot-0000001-0.050.safetensors")
    assert header["format_version"] == 1


def test_files_of_later_versions_are_refused(old_run: tuple[Path, TrainOptions]) -> None:
    outdir, options = old_run
    state = outdir / "training-state-0000001.pt"
    checkpoint.save_state(state, {**checkpoint.load_state(state), "format_version": 3})
    with pytest.raises(UserError, match=f"{state} has format version 3; this program reads 1 to 2"):
        run(options, outdir)
    description = json.loads((outdir / "options.json").read_text())
    (outdir / "options.json").write_text(json.dumps({**description, "format_version": 9}))
    with pytest.raises(UserError, match=r"options\.json has format version 9; this program reads 1 to 2"):
        run(options, outdir)


# ----------------------------------------------------------------------------------------------- signals, several ranks


def test_exit_code_of_a_signal(tmp_path: Path) -> None:
    process = start(tmp_path / "run", "--duration", "1Gi")
    wait_for(lambda: list((tmp_path / "run").glob("training-state-*")) or not process.is_alive())
    os.kill(process.pid, signal.SIGUSR1)
    process.join()
    assert process.exitcode == 75
    assert "are done and saved; the same command continues" in (tmp_path / "run.out").read_text()
    check_listed_files(tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_while_the_program_still_starts(tmp_path: Path, number: signal.Signals) -> None:
    """It comes as soon as it is handled, long before torch is imported: nothing is written, 75 says run it again."""
    arguments = command(tmp_path / "run", "--duration", "1Gi")
    process = subprocess.Popen(arguments, env=environment(), stderr=subprocess.PIPE)
    wait_for(lambda: handles(process.pid, SIGNALS[-1]) or process.poll() is not None)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 75, errors
    assert errors.decode() == f"asked to stop ({number.name}), ended at once; the same command continues\n"
    assert not (tmp_path / "run").exists()


def handles(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for the signal."""
    (caught,) = re.findall(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(caught, 16) >> number - 1 & 1)


def test_early_handlers_are_not_those_of_child_processes() -> None:
    code = (  # a signal that comes before Python's work after a fork is done is lost
        "import os, signal, time; from python_train.signals import end_at_once; end_at_once()\n"
        "begun, tell = os.pipe(); pid = os.fork()\n"
        "if pid == 0: os.write(tell, b'.')\n"
        "while pid == 0: time.sleep(0.01)\n"
        "os.read(begun, 1); os.kill(pid, signal.SIGTERM); assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGTERM"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60).stderr == b""


def test_starting_imports_nothing_heavy_before_signals_are_handled() -> None:
    code = "import sys, python_train.signals; assert not {'torch', 'numpy', 'click', 'edm2ext'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def rank_pid(launcher: subprocess.Popen, rank: int) -> int:
    """Of a process that torchrun has started."""
    variable = f"\0RANK={rank}\0".encode()
    (pid,) = (pid for pid in children(launcher.pid) if variable in Path(f"/proc/{pid}/environ").read_bytes())
    return pid


def launch(outdir: Path, *more: str, launcher: tuple[str, ...] = TORCHRUN) -> subprocess.Popen:
    arguments = [*launcher, *command(outdir, *more)[1:]]
    return subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    outdir = tmp_path_factory.mktemp("two") / "run"
    process = launch(outdir, "--duration", "8Ki")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return final_files(outdir)


@pytest.mark.slow
def test_a_killed_rank_restarts_the_job(whole_of_two: dict[str, object], tmp_path: Path) -> None:
    """torchrun ends the other processes and starts all again, which resume."""
    outdir = tmp_path / "run"
    process = launch(outdir, "--duration", "8Ki", launcher=(*TORCHRUN, "--max-restarts=2"))
    for rank, states in ((1, 1), (0, 3)):
        wait_for(lambda states=states: (outdir / f"training-state-{states:07d}.pt").exists() or process.poll())
        os.kill(rank_pid(process, rank), signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert (outdir / "log.txt").read_text().count("resuming from") == 2
    assert same(final_files(outdir), whole_of_two)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_passes_signals_on(whole_of_two: dict[str, object], tmp_path: Path, number: int) -> None:
    """Its own exit code is not that of the processes it started."""
    outdir = tmp_path / "run"
    process = launch(outdir, "--duration", "8Ki")
    wait_for(lambda: list(outdir.glob("training-state-*")) or process.poll())
    process.send_signal(number)
    output, _ = process.communicate()
    assert process.returncode != 0
    assert "are done and saved; the same command continues" in output
    process = launch(outdir, "--duration", "8Ki")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert same(final_files(outdir), whole_of_two)


@pytest.mark.slow
def test_signals_to_processes_that_srun_starts(whole_of_two: dict[str, object], tmp_path: Path) -> None:
    """Without torchrun, as in the README's Slurm job: one process has the signal, all end with code 75."""
    outdir = tmp_path / "run"

    def processes() -> list[subprocess.Popen]:
        port = str(random.SystemRandom().randrange(20000, 60000))
        common = {**environment(), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        arguments = command(outdir, "--duration", "8Ki")
        env = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        return [subprocess.Popen(arguments, env=values, stdout=subprocess.DEVNULL) for values in env]

    ranks = processes()
    wait_for(lambda: list(outdir.glob("training-state-*")) or ranks[0].poll())
    ranks[1].send_signal(signal.SIGUSR1)
    assert [rank.wait() for rank in ranks] == [75, 75]
    assert [rank.wait() for rank in processes()] == [0, 0]
    assert same(final_files(outdir), whole_of_two)


@pytest.mark.slow
def test_another_number_of_processes(tmp_path: Path) -> None:
    """When it is asked for: the mathematics stays, the random numbers change."""
    outdir = tmp_path / "run"
    run(dataclasses.replace(TINY, duration=2048), outdir)
    refused = launch(outdir, "--duration", "4Ki")
    output, _ = refused.communicate()
    assert refused.returncode != 0
    assert "processes: 1 -> 2" in output
    process = launch(outdir, "--duration", "4Ki", "--override")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "options have changed, so the run will not be, bit for bit" in (outdir / "log.txt").read_text()
    run(TINY, tmp_path / "one")
    two, one = final_files(outdir), final_files(tmp_path / "one")
    assert two["state"]["nimg"] == one["state"]["nimg"] == 4096
    assert not same(two["state"], one["state"])
    losses = [{kimg: loss for kimg, loss, _ in files["stats"]}[4.096] for files in (two, one)]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)
