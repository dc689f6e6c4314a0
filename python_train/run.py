"""Command line of the training program: ``python -m python_train.run``."""

from __future__ import annotations

from python_train.signals import EXIT_STOPPED, end_at_once

if __name__ == "__main__":
    end_at_once()  # also while the imports below take their seconds

import dataclasses
import errno
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import click
import torch

import edm2ext
from edm2ext.phema import STORAGES, parse_sigma_rel_list
from python_train import UserError, checkpoint, config, data, loop, plan
from python_train.config import FORCE_NORMALIZE, PARALLEL, PRECISIONS, PRESETS, TrainOptions
from python_train.stop import Stopped
from python_train.trainer import fastest_precision
from python_train.world import World, open_world

AUTO = "auto"
_DEMO_MAY_GIVE = {"outdir", "device"}


class _ImageCount(click.ParamType):
    name = "IMAGES"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return _converted(self, config.parse_nimg, value, param, ctx)


class _Integers(click.ParamType):
    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        return value if isinstance(value, tuple) else _converted(self, config.parse_ints, value, param, ctx)


class _LossScaling(click.ParamType):
    name = "FACTOR|dynamic"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        return value if value == "dynamic" else click.FLOAT.convert(value, param, ctx)


class _Widths(click.ParamType):
    name = "WIDTH,WIDTH,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        return value if isinstance(value, tuple) else tuple(_converted(self, parse_sigma_rel_list, value, param, ctx))


class _GPUs(click.ParamType):
    """So many GPUs of a kind, (count, GPU); the count is None where it is not given."""

    name = "[Nx]GPU"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int | None, plan.GPU]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(?:([1-9]\d{0,5})x)?(.+)", value)
        if match is None or match[2] not in plan.GPUS:
            self.fail(f"expected one of {', '.join(plan.GPUS)}, or several such as 8xH100, got {value!r}", param, ctx)
        return int(match[1]) if match[1] else None, plan.GPUS[match[2]]


def _converted(kind: click.ParamType, parse: Any, value: Any, param: Any, ctx: Any) -> Any:
    try:
        return parse(value)
    except ValueError as error:
        kind.fail(str(error), param, ctx)


_EPILOG = """\b
Examples:
  python -m python_train.run                                    the demo on embedded digits
  python -m python_train.run --data photos.zip --preset img64-s --outdir runs/photos
  python -m python_train.run --data icons/ --uncond --channels 64 --channel-mult 1,2,2 \\
      --batch 64 --duration 2Mi --snapshot 64Ki --checkpoint 256Ki --status 8Ki --rampup 100000
  torchrun --standalone --nproc_per_node=8 -m python_train.run --preset img512-xs --data latents.zip

IMAGES are integers, optionally with Ki, Mi or Gi (1024, 1024^2, 1024^3). Running a command again continues its
run from the latest training state, with the same numbers as if it had not stopped. What may be changed freely then
is the duration, the slice, the intervals, what is kept and shown, and how it is computed (--device, --workers,
--cache, --parallel, --recompute, --cuda-graph). Anything else is refused with the differences listed, unless
--override. That takes another --batch-gpu or number of processes as well: the mathematics is the same, the random
numbers are not, so the run will not be bit for bit what it would have been.
SIGTERM, SIGINT and SIGUSR1 end a run after its present step: the training state is saved, the exit code is 75. A
second one ends it at once, and so does one before training begins; the code is 75 too. It is 1 after an error,
also of the data: what was done up to there is saved.
"""


@click.command(epilog=_EPILOG, context_settings={"max_content_width": 120, "show_default": False})
@click.option("--outdir", type=click.Path(path_type=Path), help="Run directory. [default: runs/<preset or data name>]")
@click.option("--data", help="Folder or ZIP of images of one size, or of .npy arrays; classes from dataset.json or "
              "from the top-level folders. 'digits' is embedded. [default: digits]")  # fmt: skip
@click.option("--xflip", is_flag=True, help="Train with every image's mirror image too.")
@click.option("--cache", type=click.FloatRange(min=0), default=data.IN_MEMORY_BYTES / 2**30, help="Keep the data in "
              "memory if they take at most so many GiB. [1]")  # fmt: skip
@click.option("--workers", type=click.IntRange(min=0), default=2, help="Processes that read ahead, for each process of "
              "the run, where the data are not in memory. [2]")  # fmt: skip
@click.option("--preset", help=f"Start from these settings: {', '.join(PRESETS)}. [default: digits for the digits, "
              "else the general-purpose settings shown in brackets]")  # fmt: skip
@click.option("--cond/--uncond", default=None, help="Train with class labels, or ignore them. [default: --cond]")
@click.option("--duration", type=_ImageCount(), help="Train until the network has seen this many images. [8Gi]")
@click.option("--slice", type=_ImageCount(), help="Stop this process after at most so many images, at a checkpoint; "
              "the same command continues.")  # fmt: skip
@click.option("--batch", type=int, help="Images of one optimizer step, over all processes. [2048]")
@click.option("--batch-gpu", type=int, help="Images at a time on one process; the rest is accumulated. [all at once]")
@click.option("--lr", type=float, help="Reference learning rate alpha_ref. [0.01]")
@click.option("--decay", type=float, help="Decay the learning rate after t_ref batches; 0 = never. [70000]")
@click.option("--rampup", type=_ImageCount(), help="Raise the learning rate from 0 over so many images. [10000000]")
@click.option("--channels", "model_channels", type=int, help="Channels of the first level. [192]")
@click.option("--channel-mult", type=_Integers(), help="Channels of each level, in units of --channels. [1,2,3,4]")
@click.option("--blocks", "num_blocks", type=int, help="Blocks of each level. [3]")
@click.option("--attn", "attn_resolutions", type=_Integers(), help="Resolutions with self-attention. [16,8]")
@click.option("--dropout", type=float, help="Dropout probability. [0]")
@click.option("--P-mean", "P_mean", type=float, help="Mean of the training noise's log-normal distribution. [-0.4]")
@click.option("--P-std", "P_std", type=float, help="Standard deviation of the same. [1.0]")
@click.option("--precision", type=click.Choice((*PRECISIONS, AUTO)), help="Arithmetic of the network's main path; "
              "fp16 means fp32 on a CPU; auto: fp16 on a GPU, bf16 on a CPU that multiplies it, else fp32. "
              "[fp16]")  # fmt: skip
@click.option("--loss-scaling", type=_LossScaling(), help="Factor on the loss that keeps small gradients from "
              "vanishing in fp16, or (below 1) large ones from overflowing, and is divided out again; dynamic: begins "
              "at 1, is halved when any overflows and doubled after 2,000 steps without. [1]")  # fmt: skip
@click.option("--force-normalize", type=click.Choice(FORCE_NORMALIZE), help="Force weights to unit magnitude "
              "before every forward pass, as published, or within the optimizer's step. [forward]")  # fmt: skip
@click.option("--parallel", type=click.Choice(PARALLEL), help="Between processes: every one holds the whole network, "
              "or (fsdp) a share of its weights, gradients, moments and averages. [ddp]")  # fmt: skip
@click.option("--recompute", is_flag=True, default=None, help="Keep only the inputs of the network's blocks for the "
              "backward pass, which computes the rest again: less memory, more time, the same numbers.")  # fmt: skip
@click.option("--cuda-graph", is_flag=True, default=None, help="Replay the step from a CUDA graph; fsdp runs "
              "eagerly.")  # fmt: skip
@click.option("--init-from", help="Start a new run from the weights of this snapshot, of this program or a published "
              "one (.pkl). What does not fit is listed and refused.")  # fmt: skip
@click.option("--reinit", is_flag=True, default=None, help="With --init-from: layers that do not fit start anew.")
@click.option("--seed", type=int, help="Seed of everything random. [0]")
@click.option("--status", type=_ImageCount(), help="Interval of status lines and statistics; 0 = off. [128Ki]")
@click.option("--snapshot", type=_ImageCount(), help="Interval of network snapshots; 0 = off. [8Mi]")
@click.option("--snapshot-storage", type=click.Choice(STORAGES), help="Of snapshots: fp16; or, for EMA lengths below "
              "0.03 without rounding noise, fp16 with eight more bits in a file beside, or fp32. [fp16]")  # fmt: skip
@click.option("--sigma-rels", type=_Widths(), help="EMA lengths to track and store; python -m python_train.reconstruct "
              "plan helps to choose. [0.05,0.1]")  # fmt: skip
@click.option("--checkpoint", type=_ImageCount(), help="Interval of training states; 0 = off. [128Mi]")
@click.option("--keep", type=click.IntRange(min=0), help="Keep so many training states, the last ones; 0 = all. [3]")
@click.option("--keep-every", type=_ImageCount(), help="Keep the training states at multiples of this too. [off]")
@click.option("--sample", type=_ImageCount(), help="Interval of sample grids, one for each EMA length, the same seeds "
              "every time; 0 = off. [off]")  # fmt: skip
@click.option("--metric-images", type=click.IntRange(min=0), help="With --sample: compare so many images with the data "
              "(FD and KID of EfficientNet-Lite0's features). [0]")  # fmt: skip
@click.option("--vae", help="With --sample on latents: the VAE that decodes them, a name or folder for diffusers.")
@click.option("--tensorboard/--no-tensorboard", default=None, help="Statistics and grids for TensorBoard, in the run "
              "directory. [--tensorboard]")  # fmt: skip
@click.option("--wandb", help="Send statistics and grids to this project of Weights & Biases.")
@click.option("--device", help="cpu, cuda or cuda:N. [a GPU if there is one]")
@click.option("--gpu", type=_GPUs(), help="With --dry-run: predict speed and memory for this GPU, or so many, such "
              f"as 8xH100; known are {', '.join(plan.GPUS)}. [those at hand]")  # fmt: skip
@click.option("--override", is_flag=True, help="Continue a run although options have changed.")
@click.option("-n", "--dry-run", is_flag=True, help="Print the plan and stop; writes nothing.")
@click.pass_context
def main(
    ctx: click.Context,
    outdir: Path | None,
    preset: str | None,
    device: str | None,
    gpu: tuple[int | None, plan.GPU] | None,
    override: bool,
    dry_run: bool,
    xflip: bool,
    cache: float,
    workers: int,
    **given: Any,
) -> None:
    """Train an EDM2 diffusion model.

    Without arguments: the demo. A small class-conditional network learns the embedded 8x8 digits in a minute or two
    on a CPU; then sample grids and plots are drawn. Everything goes to one run directory: options.json, log.txt,
    stats.jsonl, network-snapshot-*.safetensors (two averages of the weights each), training-state-*.pt.
    """
    commandline = click.core.ParameterSource.COMMANDLINE
    is_demo = all(ctx.get_parameter_source(name) != commandline for name in ctx.params.keys() - _DEMO_MAY_GIVE)
    try:
        if preset is None and given["data"] in (None, data.DIGITS):
            preset = "digits"
        options = config.make_options(preset, **given)
        if given["data"] is None and preset != "digits" and not dry_run:
            raise UserError(f"preset {preset} needs --data: a folder or ZIP of images (only 'digits' is embedded)")
        if gpu is not None and not dry_run:
            raise UserError("--gpu says what --dry-run shall count on; --device chooses what to train on")
        outdir = outdir or Path("runs") / (preset or Path(options.data).resolve().stem)
        with open_world(device) as world:
            if options.precision == AUTO:
                options = dataclasses.replace(
                    options, precision=fastest_precision(torch.device("cuda") if gpu else world.device)
                )
            planned = dataclasses.replace(world, size=gpu[0]) if gpu and gpu[0] else world
            options.validate(planned.size)
            nominal = plan.NOMINAL_DATA.get((preset or "").partition("-")[0]) if given["data"] is None else None
            dataset = None
            if not nominal:
                dataset = data.open_dataset(options.data, options.cond, xflip, int(cache * 2**30), workers)
            if world.rank == 0:
                facts = _print_settings(options, preset, outdir, planned, dataset or nominal)
                if dry_run:
                    kind = gpu[1] if gpu else plan.gpu_at_hand(world.device)
                    _print_prediction(options, kind, planned.size, *facts)
            if dry_run or dataset is None:
                return
            show_progress = is_demo or sys.stderr.isatty()
            nimg = loop.train(options, dataset, outdir, world, override, show_progress)
            if world.rank > 0:
                return
            if is_demo:
                from python_train import demo

                demo.finish(outdir, device=world.device)
            else:
                _say_what_next(options, outdir, nimg)
    except UserError as error:
        raise click.ClickException(str(error)) from error
    except Stopped as stopped:
        click.echo(f"{stopped}; the same command continues")
        ctx.exit(EXIT_STOPPED)
    except OSError as error:
        hint = " (the disk is full)" if error.errno == errno.ENOSPC else ""
        raise click.ClickException(f"{error}{hint}") from error
    except torch.OutOfMemoryError as error:
        raise click.ClickException(f"not enough GPU memory; try a smaller --batch-gpu ({error})") from error
    except KeyboardInterrupt:
        raise click.ClickException("interrupted; the same command continues from the latest training state") from None


def _print_settings(
    options: TrainOptions,
    preset: str | None,
    outdir: Path,
    world: World,
    dataset: data.Dataset | tuple[int, int, int],
) -> tuple[int, int, int, int, plan.Size]:
    """What is going to happen, in a dozen lines; ``dataset`` may be just (resolution, channels, label_dim). Returns
    these, the number of parameters, and the size of the images."""
    if isinstance(dataset, tuple):
        resolution, channels, label_dim = dataset
        height = width = resolution
        label_dim = label_dim if options.cond else 0
        about = f"none given; assuming {resolution}x{resolution}, channels {channels}, label_dim {label_dim}"
    else:
        channels = loop.network_channels(dataset, dataset.encoder())
        resolution, label_dim = dataset.resolution, dataset.label_dim
        height, width = dataset.shape[1:]
        size = f"{height}x{width}, {dataset.dtype}, channels {dataset.channels}"
        mirrored = ", half of them mirrored" if dataset.xflip else ""
        about = f"{options.data}: {dataset.num_images} images of {size}{mirrored}, label_dim {label_dim}"
    with torch.device("meta"):
        net = loop.build_network(options, resolution, channels, label_dim)
    if isinstance(dataset, data.Dataset):
        dataset.require_divisible(net.unet.stride)
    parameters = sum(param.numel() for param in net.parameters())
    micro, rounds = options.rounds(world.size)
    info = edm2ext.build_info()
    ops = f"native kernels, {info['cpu_isa']}" if info["native"] else f"plain torch ({info['reason']})"
    computed = "fp32" if options.precision == "fp16" and world.device.type != "cuda" else options.precision
    every = ", ".join(
        f"{name} every {config.format_nimg(getattr(options, name))}" if getattr(options, name) else f"{name} off"
        for name in ("status", "snapshot", "checkpoint")
    )
    for name, text in {
        "preset": preset or "none (general-purpose settings)",
        "data": about,
        "network": f"{parameters:,} parameters; channels {options.model_channels} x {list(options.channel_mult)}, "
        f"blocks per level {options.num_blocks}, attention at {list(options.attn_resolutions)}, "
        f"dropout {options.dropout:g}",
        "duration": f"{options.duration:,} images = {options.duration // options.batch:,} steps of {options.batch} "
        f"({world.size} process{'es' * (world.size > 1)} x {rounds} round{'s' * (rounds > 1)} x {micro})",
        "lr": f"{options.lr:g}, decay after {options.decay:g} batches, ramp-up over {options.rampup:,} images",
        "noise": f"P_mean {options.P_mean:g}, P_std {options.P_std:g}",
        "precision": options.precision if computed == options.precision else f"{options.precision} (here: {computed})",
        "seed": str(options.seed),
        "files": f"{outdir}: {every}",
        "disk": plan.describe_disk(options, parameters),
        "device": _device_text(world.device),
        "torch": f"{torch.__version__}; ops: {ops}",
    }.items():
        click.echo(f"{name:<10}{text}")
    if options.snapshot and options.duration % options.snapshot:
        last = options.duration // options.snapshot * options.snapshot
        click.echo(f"WARNING: the last snapshot will be at {last:,} of {options.duration:,} images; --snapshot should "
                   "divide --duration")  # fmt: skip
    return resolution, channels, label_dim, parameters, (height, width)


def _print_prediction(
    options: TrainOptions,
    gpu: plan.GPU | None,
    gpus: int,
    *data_and_network: Any,
) -> None:
    """What `plan.predict` says of a run on so many GPUs, of data and a network as `_print_settings` returns them."""
    if gpu is None:
        click.echo(f"predicted nothing without a GPU that is known; name one: --gpu {'|'.join(plan.GPUS)}")
        return
    facts = (gpu, gpus, *data_and_network)
    try:
        found = plan.predict(options, *facts)
        without = plan.predict(dataclasses.replace(options, recompute=False), *facts) if options.recompute else None
    except RuntimeError as error:
        click.echo(f"predicted nothing: {error}")
        return
    for name, text in plan.describe(found, options, gpus):
        click.echo(f"{name:<10}{text}")
    if without is not None:
        click.echo(f"{'recompute':<10}{plan.describe_recompute(found, without)}")


def _device_text(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    why = "torch sees no GPU" if torch.version.cuda else "this torch has no CUDA"
    return f"{device} ({torch.get_num_threads()} threads; {why})"


def _say_what_next(options: TrainOptions, outdir: Path, nimg: int) -> None:
    if nimg < options.duration:
        click.echo(f"stopped at {nimg:,} of {options.duration:,} images; the same command continues")
        return
    click.echo(f"the run in {outdir} is complete: {nimg:,} images")
    snapshots = sorted(outdir.glob("network-snapshot-*.safetensors"))
    if not snapshots or checkpoint.read_header(snapshots[-1])["nimg"] == 0:
        return
    sample = ["--net", str(snapshots[-1]), "--outdir", f"{outdir}/out", "--seeds", "0-63"]
    sample += ["--vae", options.vae] if options.vae else []
    tune = ["--indir", str(outdir), "--outdir", str(outdir), "--outstd", "0.05,0.10,0.15"]
    click.echo(f"sample:  python -m python_train.generate {shlex.join(sample)}")
    click.echo(f"tune the averaging length:  python -m python_train.reconstruct {shlex.join(tune)}")


if __name__ == "__main__":
    main()
