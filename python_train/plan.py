"""What a run will take: arithmetic, memory traffic, memory, time and disk, predicted without a GPU for a dry run.

One round of a training step runs on meta tensors, which counts its arithmetic, its traffic and the memory it needs at
its peak. Times are predictions: products at 70 % of the GPU's peak and all other traffic at 90 % of its bandwidth,
which single kernels were seen to reach on an H200 (700 of 989 TFLOP/s, 4.3 of 4.8 TB/s), one after the other, and no
waiting in between.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

import edm2ext
from edm2ext.ops import conv_choice
from edm2ext.phema.stored import BYTES
from edm2ext.traffic import Counter, CudaLayouts, PeakMemory, counting
from python_train import UserError
from python_train.config import PRESETS, TrainOptions, make_options
from python_train.network import Precond
from python_train.trainer import COMPUTE_DTYPES, Trainer
from python_train.world import World

PEAK_SHARE, BANDWIDTH_SHARE = 0.7, 0.9
FREE_MEMORY = 0.92  # of the GPU's, left by its driver, the allocator's gaps and the workspaces of libraries
# Images at a time with which a step's memory peaks where the backward pass begins: activations, few gradients.
MANY = 256


# What the presets' names say they are for: resolution, channels and label_dim (spec 1.1, 1.2). A dry run without --data
# counts on it.
NOMINAL_DATA = {"img512": (64, 4, 1000), "img64": (64, 3, 1000)}


@dataclass(frozen=True)
class GPU:
    """A GPU's data sheet: memory in GiB, dense TFLOP/s with 16-bit inputs and in fp32, memory bandwidth in TB/s."""

    name: str
    memory: float
    tflops_16: float
    tflops_32: float
    bandwidth: float

    def tflops(self, precision: str) -> float:
        return self.tflops_32 if precision == "fp32" else self.tflops_16


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("A100-40GB", 40, 312, 19.5, 1.555),
        GPU("A100-80GB", 80, 312, 19.5, 2.039),
        GPU("H100", 80, 989, 66.9, 3.35),
        GPU("H200", 141, 989, 66.9, 4.8),
        GPU("L40S", 48, 362, 91.6, 0.864),
        GPU("RTX-3090", 24, 71, 35.6, 0.936),
        GPU("RTX-4090", 24, 165, 82.6, 1.008),
    )
}


def gpu_at_hand(device: torch.device) -> GPU | None:
    """The GPU that a device is, if its data sheet is known here."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    name = properties.name.replace(" ", "-")
    fitting = [gpu for gpu in GPUS.values() if gpu.name.split("-")[-1 if "RTX" in gpu.name else 0] in name]
    return min(fitting, key=lambda gpu: abs(gpu.memory - properties.total_memory / 2**30), default=None)


@dataclass(frozen=True)
class Round:
    """One accumulation round of ``images`` images on one GPU, counted on meta tensors."""

    images: int
    flops: int
    launches: int
    bytes: int  # outside of products; weight pass included
    bytes_of_products: int
    peak: int  # memory of activations and gradients; parameters, effective weights, moments and averages not counted
    optimizer_launches: int
    optimizer_bytes: int


Size = tuple[int, int]  # height and width of images, given where they are not squares of the network's resolution


def count_rounds(
    options: TrainOptions,
    resolution: int,
    channels: int,
    label_dim: int,
    sizes: Sequence[int],
    size: Size | None = None,
) -> list[Round]:
    """Count a round of each of so many images, and the optimizer's pass. Raises RuntimeError if the library has no CUDA
    kernels."""
    if not edm2ext.build_info()["cuda_compiled"]:
        raise RuntimeError("the library holds no CUDA kernels, so their traffic cannot be counted")
    rounds = []
    with torch.device("meta"), edm2ext.set_backend("native"):
        net = Precond(**options.network_config(resolution, channels, label_dim))
        encoder = SimpleNamespace(encode=lambda stored: stored)
        options = replace(options, batch=1, batch_gpu=1)
        trainer = Trainer(net, options, encoder, World(device=torch.device("meta")))
        for images in (1, *sizes):  # the first step makes the optimizer's state
            batch = torch.empty(images, channels, *(size or (resolution, resolution))), torch.empty(images, label_dim)
            with counting() as counter, PeakMemory() as peak:
                trainer.step(itertools.repeat(batch))
            rounds.append(_round(images, peak.bytes, counter))
    return rounds[1:]


def convolutions(
    options: TrainOptions, resolution: int, channels: int, label_dim: int, images: int, size: Size | None = None
) -> list[conv_choice.Problem]:
    """The distinct convolutions and gradients of a training step of so many images on one GPU, those that our kernels
    can compute: what `edm2ext.tune` chooses for. Leaves the random numbers of the CPU alone."""
    with torch.random.fork_rng([]), torch.device("meta"), CudaLayouts(), conv_choice.recording() as found:
        net = Precond(**options.network_config(resolution, channels, label_dim))
        encoder = SimpleNamespace(encode=lambda stored: stored)
        options = replace(options, batch=1, batch_gpu=1)
        batch = torch.empty(images, channels, *(size or (resolution, resolution))), torch.empty(images, label_dim)
        Trainer(net, options, encoder, World(device=torch.device("meta"))).step(itertools.repeat(batch))
    return list(found)


def convolutions_of_preset(preset: str, images: int, precision: str) -> list[conv_choice.Problem]:
    """The same for a preset and the data that it was made for. Raises UserError for other presets."""
    nominal = NOMINAL_DATA.get(preset.partition("-")[0])
    if nominal is None or preset not in PRESETS:
        known = ", ".join(name for name in PRESETS if name.partition("-")[0] in NOMINAL_DATA)
        raise UserError(f"preset must be one of {known}, got {preset!r}")
    return convolutions(make_options(preset, precision=precision), *nominal, images)


def _round(images: int, peak: int, counter: Counter) -> Round:
    both = counter.total(phase="forward") + counter.total(phase="backward")
    products = counter.total(phase="forward", kind="product") + counter.total(phase="backward", kind="product")
    update = counter.total(phase="update")
    return Round(
        images=images,
        flops=counter.flops,
        launches=both.launches,
        bytes=both.bytes - products.bytes,
        bytes_of_products=products.bytes,
        peak=peak,
        optimizer_launches=update.launches,
        optimizer_bytes=update.bytes,
    )


@dataclass(frozen=True)
class Plan:
    """The prediction for one GPU of a run; memory and traffic in bytes."""

    gpu: GPU
    flops_per_image: float  # forward and backward, 2 a multiply-add
    bytes_per_image: float  # all, products' included
    launches: int  # of a round
    peak_memory: int
    memory_per_image: float  # of many at a time
    micro_batch: int
    largest_micro_batch: int
    images_per_second: float
    mfu: float


def parameter_bytes(options: TrainOptions, parameters: int, world_size: int) -> int:
    """Memory that every GPU holds for the parameters, without their gradients: fp32 values, two moments, averages; the
    effective weights; and, with several processes, the buckets of the reduction. With FSDP all but the effective
    weights are shared out; these are kept from the forward to the backward pass."""
    effective = parameters * COMPUTE_DTYPES[options.precision].itemsize
    words = 3 + len(options.sigma_rels)
    if options.parallel == "fsdp" and world_size > 1:
        return effective + parameters * 4 * words // world_size
    return effective + parameters * 4 * (words + (world_size > 1))


def predict(
    options: TrainOptions,
    gpu: GPU,
    world_size: int,
    resolution: int,
    channels: int,
    label_dim: int,
    parameters: int,
    size: Size | None = None,
) -> Plan:
    """Memory, speed and MFU on ``world_size`` of these GPUs; MFU counts 2 flops a multiply-add, against the data sheet,
    and not what is recomputed.

    Raises RuntimeError if the library holds no CUDA kernels.
    """
    micro, rounds = options.rounds(world_size)
    facts = (resolution, channels, label_dim)
    one, many, more = count_rounds(options, *facts, (micro, MANY, 2 * MANY), size)
    peak, bandwidth = PEAK_SHARE * 1e12 * gpu.tflops(options.precision), BANDWIDTH_SHARE * 1e12 * gpu.bandwidth
    seconds_of_products = max(one.flops / peak, one.bytes_of_products / bandwidth)
    seconds = rounds * (seconds_of_products + one.bytes / bandwidth) + one.optimizer_bytes / bandwidth
    images_per_second = options.batch / seconds
    useful = one.flops
    if options.recompute:
        (plain,) = count_rounds(replace(options, recompute=False), *facts, (micro,), size)
        useful = plain.flops
    fixed = parameter_bytes(options, parameters, world_size)
    memory_per_image = (more.peak - many.peak) / MANY
    room = FREE_MEMORY * gpu.memory * 2**30 - fixed
    largest = max(0, int((room - many.peak) / memory_per_image) + MANY)
    if largest > 0:  # of few the memory may peak elsewhere, and the parts of split sums are not in proportion
        few, found = count_rounds(options, *facts, (1, largest), size)
        if found.peak > room:
            largest = max(0, int(1 + (room - few.peak) / (found.peak - few.peak) * (largest - 1)))
    return Plan(
        gpu=gpu,
        flops_per_image=one.flops / micro,
        bytes_per_image=(one.bytes + one.bytes_of_products) / micro,
        launches=one.launches,
        peak_memory=fixed + one.peak,
        memory_per_image=memory_per_image,
        micro_batch=micro,
        largest_micro_batch=largest,
        images_per_second=images_per_second,
        mfu=useful / micro * images_per_second / world_size / (1e12 * gpu.tflops(options.precision)),
    )


def describe_recompute(with_it: Plan, without: Plan) -> str:
    """What recomputing activations saves and costs."""
    gib = 2**30
    saved = 1 - with_it.memory_per_image / without.memory_per_image
    return (
        f"{with_it.peak_memory / gib:,.1f} GiB with --recompute, {without.peak_memory / gib:,.1f} without: "
        f"{with_it.memory_per_image / gib:,.3f} instead of {without.memory_per_image / gib:,.3f} GiB an image "
        f"(-{100 * saved:.0f} %); {100 * (without.images_per_second / with_it.images_per_second - 1):.0f} % more time"
    )


def describe(plan: Plan, options: TrainOptions, world_size: int) -> Iterator[tuple[str, str]]:
    """The prediction for ``world_size`` GPUs as (name, text) lines."""
    gib = 2**30
    yield (
        "per image",
        (
            f"{plan.flops_per_image / 1e9:,.1f} GFLOP and {plan.bytes_per_image / 1e9:,.2f} GB moved, forward and "
            f"backward in rounds of {plan.micro_batch}; {plan.launches:,} launches a round"
        ),
    )
    fits = plan.peak_memory <= FREE_MEMORY * plan.gpu.memory * gib
    per_process, largest = options.batch // world_size, plan.largest_micro_batch
    divisors = [n for n in range(1, min(largest, per_process) + 1) if per_process % n == 0]
    yield (
        "memory",
        (
            f"{plan.peak_memory / gib:,.1f} of {plan.gpu.memory:,.0f} GiB on each {plan.gpu.name} (predicted); "
            + (
                f"up to {max(largest, plan.micro_batch)} images at a time fit"
                if fits
                else f"DOES NOT FIT: at most {largest} images at a time do, such as --batch-gpu {divisors[-1]}"
                if divisors
                else "DOES NOT FIT, however few images at a time"
            )
        ),
    )
    days = options.duration / plan.images_per_second / 86400
    yield (
        "speed",
        (
            f"{plan.images_per_second:,.0f} images/s{f' on {world_size} GPUs' * (world_size > 1)}, "
            f"{100 * plan.mfu:.0f} % MFU (predicted, not measured); {days:,.1f} days to the end"
        ),
    )


def states_kept(options: TrainOptions) -> int:
    """How many training states a run leaves behind; its last one is at its end, wherever that is."""
    if not options.checkpoint:
        return 0
    made = -(-options.duration // options.checkpoint)
    last = min(options.keep or made, made)
    oldest = min((made - last + 1) * options.checkpoint, options.duration)
    return last + ((oldest - 1) // options.keep_every if options.keep_every else 0)


def describe_disk(options: TrainOptions, parameters: int) -> str:
    """Disk that the run's snapshots and training states will take."""
    profiles = len(options.sigma_rels)
    snapshots = options.duration // options.snapshot + 1 if options.snapshot else 0
    states = states_kept(options)
    widths = " and ".join(f"{sigma_rel:g}" for sigma_rel in options.sigma_rels)
    return (
        f"{snapshots:,} snapshots of {profiles} averages (sigma_rel {widths}), "
        f"{snapshots * profiles * parameters * BYTES[options.snapshot_storage] / 1e9:,.1f} GB; "
        f"{states} training states, {states * parameters * 4 * (3 + profiles) / 1e9:,.1f} GB"
    )
