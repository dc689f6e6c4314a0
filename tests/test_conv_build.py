"""The convolution kernels for every architecture, compiled without a GPU: instructions, registers, occupancy."""

import importlib.util
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


def compile_kernels(direction: str, tile: int, cat: str, folder: Path) -> Iterator[Kernel]:
    """Both dtypes for all architectures."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    target = folder / "kernels.o"
    command = [nvcc, "-std=c++20", "-O3", "-lineinfo", "-Xcompiler=-Wall,-Wextra,-Werror", f"-I{ROOT}/csrc/include"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    command += [f"-DEDM2_CONV_DIRECTION={direction}", f"-DEDM2_CONV_TILE={tile}", f"-DEDM2_CONV_CAT={cat}"]
    command += ["-c", "-o", str(target)]
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


def sass(target: Path) -> str:
    tool = cuobjdump()
    environment = {**os.environ, "PATH": f"{Path(tool).parent}:{os.environ['PATH']}"}  # nvdisasm lies beside it
    command = [tool, "--dump-sass", str(target)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def test_the_tiles_were_found():
    assert len(TILES) == 4
    # A block must fit into what sm_86, 89 and 120 grant it.
    assert all(tile.shared <= 99 * 1024 for tile in TILES)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists(), reason="no nvcc")
@pytest.mark.parametrize("direction", [*DIRECTIONS, "kForward of halves", "kBackwardWeight of halves"])
@pytest.mark.parametrize("tile", range(4))
def test_tensor_cores_without_spills(tmp_path: Path, direction: str, tile: int):
    shape = TILES[tile]
    direction, _, halves = direction.partition(" of ")
    kernels = list(compile_kernels(direction, tile, "true" if halves else "false", tmp_path))
    assert sorted(k.arch for k in kernels) == sorted(2 * ARCHITECTURES)
    for kernel in kernels:
        what = f"{direction} {halves}, tile {tile}, sm_{kernel.arch}"
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


# ---- Hopper ----

CUTLASS = importlib.util.find_spec("cutlass_library")
_LAYOUT = r"""
#include <cstdio>
#include "mp_conv2d_wgmma.cuh"

// Counts the sums that a thread does not hold where store_wgmma looks for them.
template <edm2::ConvDirection Direction, int Tile>
int misplaced() {
  using Conv = edm2::cuda::WgmmaConv<Direction, Tile, __half>;
  int wrong = 0;
  for (int thread = 0; thread < 256; ++thread) {
    const auto places = typename Conv::TiledMma{}.get_thread_slice(thread).partition_C(
        cute::make_identity_tensor(cute::Shape<typename Conv::Rows, typename Conv::Columns>{}));
    for (int i = 0; i < Conv::kTile.rows / 128; ++i)
      for (int j = 0; j < Conv::kTile.columns / 8; ++j)
        for (int down = 0; down < 2; ++down)
          for (int across = 0; across < 2; ++across) {
            const auto place = places(cute::make_coord(across, down, j), i, 0);
            wrong += cute::get<0>(place) != i * 128 + thread / 32 * 16 + thread % 32 / 4 + 8 * down ||
                     cute::get<1>(place) != j * 8 + thread % 4 * 2 + across;
          }
  }
  return wrong;
}

int main() {
  std::printf("%d\n", misplaced<edm2::ConvDirection::kForward, 0>() + misplaced<edm2::ConvDirection::kForward, 1>() +
                          misplaced<edm2::ConvDirection::kBackwardInput, 0>() +
                          misplaced<edm2::ConvDirection::kBackwardWeight, 0>() +
                          misplaced<edm2::ConvDirection::kBackwardWeight, 1>());
}
"""


def hopper_command() -> list[str]:
    """nvcc with the flags of CMakeLists.txt."""
    if CUTLASS is None:
        pytest.skip("no headers of CUTLASS (pip install --no-deps nvidia-cutlass)")
    source = Path(CUTLASS.origin).parent / "source"
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    command = [nvcc, "-std=c++20", "-DNDEBUG", "-lineinfo", "--expt-relaxed-constexpr"]
    command += ["-Xcompiler=-Wall,-Wextra,-Werror", f"-I{ROOT}/csrc/include", f"-I{ROOT}/csrc/cuda"]
    command += [flag for folder in ("include", "tools/util/include") for flag in ("-isystem", str(source / folder))]
    return [*command, "-gencode=arch=compute_90a,code=sm_90a"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists(), reason="no nvcc")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_hopper_multiplies_by_wgmma_and_copies_by_tma(tmp_path: Path, direction: str):
    """One of four variants a direction: each takes most of a minute."""
    tile = 1 if direction == "kBackwardInput" else 0
    target = tmp_path / "kernel.o"
    variant = [f"-DEDM2_CONV_DIRECTION={direction}", f"-DEDM2_CONV_TILE={tile}", "-DEDM2_CONV_DTYPE=__half"]
    command = [*hopper_command(), "-O3", *variant, "-c", "-o", str(target), f"{ROOT}/csrc/cuda/mp_conv2d_wgmma.cu"]
    subprocess.run(command, check=True)
    code = sass(target)
    usage = subprocess.run([cuobjdump(), "--dump-resource-usage", str(target)], capture_output=True, check=True)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout.decode()).groups())
    assert stack == 0
    assert registers <= 168
    assert not re.search(r"\b(STL|LDL)\b", code)
    assert ("HGMMA.64x192x16.F32", "HGMMA.64x128x16.F32")[tile] in code
    assert "UTMALDG.4D.IM2COL" in code  # what the taps see
    assert re.search(r"UTMALDG\.\dD\.(IM2COL\.)?MULTICAST", code)  # the other operand, shared by the cluster
    assert "USETMAXREG" in code
    LOG.info("%s, tile %d, sm_90a: %d registers", direction, tile, registers)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists(), reason="no nvcc")
def test_hopper_stores_sums_from_where_wgmma_leaves_them(tmp_path: Path):
    source, program = tmp_path / "layout.cu", tmp_path / "layout"
    source.write_text(_LAYOUT)
    subprocess.run([*hopper_command(), "-O1", "-o", str(program), str(source)], check=True)
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout == "0\n"
