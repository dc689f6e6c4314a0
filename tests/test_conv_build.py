"""The convolution kernels for every architecture, compiled without a GPU: instructions, registers, occupancy."""

import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from test_cuda_build import cuobjdump

LOG = logging.getLogger(__name__)  # to be seen with --log-cli-level=INFO
ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "86", "89", "90a", "100a", "120a")
DIRECTIONS = ("kForward", "kBackwardInput", "kBackwardWeight")
SHARED_PER_MULTIPROCESSOR = {"80": 164, "86": 100, "89": 100, "90a": 228, "100a": 228, "120a": 100}  # KiB
REGISTERS_PER_MULTIPROCESSOR = 64 * 1024


class Tile(NamedTuple):
    """A line of kConvTiles."""

    rows: int
    columns: int
    warps: int
    stages: int
    blocks: int

    @property
    def shared(self) -> int:
        """Bytes."""
        return self.stages * (self.rows + self.columns) * 32 * 2


def tiles() -> list[Tile]:
    text = (ROOT / "csrc" / "include" / "edm2" / "mp_conv2d_plan.h").read_text()
    lines = re.findall(r"^    \{(\d+), (\d+), (\d+), (\d+), (\d+), (\d+), [\d.]+\},$", text, re.MULTILINE)
    return [Tile(m, n, wm * wn, stages, blocks) for m, n, wm, wn, stages, blocks in (map(int, line) for line in lines)]


TILES = tiles()


class Kernel(NamedTuple):
    """What one variant needs, and its instructions."""

    arch: str
    registers: int
    stack: int
    instructions: str


def compile_kernels(direction: str, tile: int, folder: Path) -> Iterator[Kernel]:
    """Both dtypes for all architectures."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    target = folder / "kernels.o"
    command = [nvcc, "-std=c++20", "-O3", "-lineinfo", "-Xcompiler=-Wall,-Wextra,-Werror", f"-I{ROOT}/csrc/include"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    command += [f"-DEDM2_CONV_DIRECTION={direction}", f"-DEDM2_CONV_TILE={tile}", "-c", "-o", str(target)]
    subprocess.run([*command, f"{ROOT}/csrc/cuda/mp_conv2d_tiles.cu"], check=True)
    tool = cuobjdump()
    environment = {**os.environ, "PATH": f"{Path(tool).parent}:{os.environ['PATH']}"}  # nvdisasm lies beside it
    usage, code = (
        subprocess.run([tool, option, str(target)], capture_output=True, text=True, check=True, env=environment).stdout
        for option in ("--dump-resource-usage", "--dump-sass")
    )
    for part in re.split(r"(?=arch = sm_)", usage)[1:]:
        arch = re.match(r"arch = sm_(\w+)", part)[1]
        assembly = next(text for text in re.split(r"(?=arch = sm_)", code)[1:] if text.startswith(f"arch = sm_{arch}"))
        functions = re.split(r"Function : ", assembly)[1:]
        needs = re.findall(r"REG:(\d+) STACK:(\d+)", part)
        assert len(functions) == len(needs) == 2
        for (registers, stack), text in zip(needs, functions, strict=True):
            yield Kernel(arch, int(registers), int(stack), text)


def test_the_tiles_were_found():
    assert len(TILES) == 4
    # A block must fit into what sm_86, 89 and 120 grant it.
    assert all(tile.shared <= 99 * 1024 for tile in TILES)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists(), reason="no nvcc")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("tile", range(4))
def test_tensor_cores_without_spills(tmp_path: Path, direction: str, tile: int):
    shape = TILES[tile]
    kernels = list(compile_kernels(direction, tile, tmp_path))
    assert sorted(k.arch for k in kernels) == sorted(2 * ARCHITECTURES)
    for kernel in kernels:
        what = f"{direction}, tile {tile}, sm_{kernel.arch}"
        assert kernel.stack == 0, what
        assert not re.search(r"\b(STL|LDL)\b", kernel.instructions), what
        for instruction in ("HMMA.16816.F32", "LDGSTS.E.BYPASS", "LDGDEPBAR", "DEPBAR.LE SB0"):
            assert instruction in kernel.instructions, f"{what}: {instruction}"
        assert ("LDSM.16.M88.4" in kernel.instructions) == (direction != "kBackwardWeight"), what
        assert ("LDSM.16.MT88.4" in kernel.instructions) == (direction != "kForward"), what  # transposed
        granted = -(-kernel.registers // 8) * 8 * 32 * shape.warps  # registers come in eights
        by_registers = REGISTERS_PER_MULTIPROCESSOR // granted
        by_shared = SHARED_PER_MULTIPROCESSOR[kernel.arch] * 1024 // (shape.shared + 1024)
        LOG.info("%s: %d registers, %d blocks a multiprocessor", what, kernel.registers, min(by_registers, by_shared))
        assert by_registers >= shape.blocks, what
        assert by_shared >= min(shape.blocks, 2), what
