"""A real training run on the GPU beside the same run on the CPU: loss curves, and samples of what the GPU's learned.

python -m benchmarks.gpu_training digits|emoji FOLDER [--data FILE] [--minutes 3] [--dry-run]

Both runs start at once with the same seed, in FOLDER/<name>-cuda and FOLDER/<name>-cpu; they are stopped when the time
is up, and the curves are compared as far as both go. emoji needs --data: what `python -m
python_train.data recipe emoji64 FILE --resolution 32` makes. Writes FOLDER/<name>-loss.png, <name>-samples.png and
<name>.json. --dry-run trains for moments, on the CPU alone.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import torch
from matplotlib.figure import Figure

from python_train.pictures import read_stats, save_figure

RUNS = {
    "digits": ["--preset=digits", "--data=digits"],
    "emoji": [
        *("--channels=64", "--channel-mult=1,2,2", "--blocks=2", "--attn=8", "--batch=256", "--duration=1Mi"),
        *("--lr=0.01", "--decay=2000", "--rampup=50000", "--status=8Ki", "--snapshot=64Ki", "--checkpoint=0"),
    ],
}
BRIEFLY = ["--duration=2Ki", "--status=1Ki", "--snapshot=1Ki", "--checkpoint=0"]
LABELS = {"cuda": "GPU", "cpu": "CPU"}


def start(name: str, folder: Path, device: str, more: list[str]) -> subprocess.Popen[bytes]:
    """Training in a process of its own; the same command continues a run that was stopped."""
    outdir = folder / f"{name}-{device}"
    command = [sys.executable, "-P", "-m", "python_train.run", f"--outdir={outdir}", f"--device={device}", *more]
    print("$ " + " ".join(command), flush=True)
    log = (folder / f"{name}-{device}.txt").open("wb")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def train(name: str, folder: Path, devices: list[str], more: list[str], seconds: float) -> None:
    """Runs until all have ended, the time is up, or the first device's run fails: then RuntimeError."""
    running = {device: start(name, folder, device, more) for device in devices}
    first = running[devices[0]]
    end = time.monotonic() + seconds
    try:
        while any(process.poll() is None for process in running.values()) and time.monotonic() < end:
            if first.poll():
                break
            time.sleep(0.5)
    finally:
        for process in running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)  # ends after the present step
    for process in running.values():
        _end(process)
    if first.returncode not in (0, 75):  # 75: asked to stop
        log = (folder / f"{name}-{devices[0]}.txt").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"training on {devices[0]} ended with status {first.returncode}: {log[-2000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def losses(run: Path) -> dict[float, float]:
    """{thousands of images: mean loss since the entry before}, a run's finite ones."""
    file = run / "stats.jsonl"
    entries = read_stats(file) if file.exists() else []
    return {e["Progress/kimg"]: e["Loss/loss"] for e in entries if abs(e.get("Loss/loss", float("nan"))) < float("inf")}


def plot(curves: dict[str, dict[float, float]], path: Path, title: str) -> None:
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    for device, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), ".-", label=LABELS[device])
    axes.set(title=title, xlabel="images seen (thousands)", ylabel="loss (mean per pixel)")
    axes.grid(True, color="#e2e8f0")
    axes.legend()
    save_figure(path, figure)


def draw(name: str, folder: Path, device: str) -> Path | None:
    """A grid of samples from the run's last snapshot, if there is one."""
    run = folder / f"{name}-{device}"
    snapshots = sorted(run.glob("network-snapshot-*-0.100.safetensors"))
    if not snapshots:
        return None
    grid = folder / f"{name}-samples.png"
    command = [sys.executable, "-P", "-m", "python_train.generate", "--overwrite", f"--net={snapshots[-1]}"]
    command += [f"--outdir={folder / f'{name}-images'}", "--seeds=0-63", f"--grid={grid}", f"--device={device}"]
    subprocess.run(command, check=True, env={**os.environ, "TQDM_DISABLE": "1"})
    return grid


def compare(curves: dict[str, dict[float, float]]) -> dict[str, object]:
    """Points at which both runs reported, and the largest relative difference of their losses there."""
    first, *others = curves.values()
    common = [kimg for kimg in first if others and all(kimg in other for other in others)]
    differences = [abs(other[kimg] / first[kimg] - 1) for other in others for kimg in common]
    return {"common_points": len(common), "largest_difference": max(differences, default=None)}


@click.command(help=__doc__)
@click.argument("name", type=click.Choice(list(RUNS)))
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--data", "file", type=click.Path(exists=True, path_type=Path), help="The emoji, 32 x 32.")
@click.option("--minutes", default=3.0, show_default=True, help="For both runs.")
@click.option("--dry-run", is_flag=True, help="A moment's training, on the CPU alone.")
def main(name: str, folder: Path, file: Path | None, minutes: float, dry_run: bool) -> None:
    if name == "emoji" and file is None:
        sys.exit("benchmarks.gpu_training: emoji needs --data FILE (python -m python_train.data recipe emoji64)")
    if not dry_run and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu_training needs a GPU; --dry-run does without one")
    folder.mkdir(parents=True, exist_ok=True)
    more = [*RUNS[name], *([f"--data={file}"] if file else []), *(BRIEFLY if dry_run else [])]
    devices = ["cpu"] if dry_run else ["cuda", "cpu"]
    train(name, folder, devices, more, 60 * minutes)
    curves = {device: losses(folder / f"{name}-{device}") for device in devices}
    plot(curves, folder / f"{name}-loss.png", f"{name}: training loss")
    grid = draw(name, folder, devices[0])
    last = list(curves[devices[0]].items())[-1:]
    found = {"name": name, **compare(curves), "last": last, "samples": grid and grid.name, "curves": curves}
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    kimg, loss = last[0] if last else (0.0, float("nan"))
    print(f"{name}: loss {loss:.4f} after {kimg:.0f} thousand images; {compare(curves)}")


if __name__ == "__main__":
    main()
