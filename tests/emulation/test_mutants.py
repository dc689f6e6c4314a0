"""Do the tests notice a wrong kernel? mutate.py, its faults and what the tests make of them."""

import subprocess
import sys

import emulated
import mutate
import pytest
import seeding
from faults import FAULTS

SOURCE = """
template <int N>
__global__ void f(float* x, int64_t count) {  // i < count
  for (int64_t i = threadIdx.x; i < count; i += step) x[i] *= 2;
  if (count > most) count = most;
  __syncthreads();  // before x is read
  const float half = x[0] / 2;
  const Traffic traffic{2 * bytes, bytes};
}
"""


def test_what_is_seeded():
    changes = [(m.operator, m.change(SOURCE).split(" => ")[1]) for m in seeding.mutants("f.cuh", SOURCE)]
    assert changes[0] == ("barrier", "; // before x is read")
    assert {operator for operator, _ in changes[1:]} == {
        *("bound", "arithmetic", "accumulation", "stride", "index", "condition", "constant", "rounding", "dropped")
    }
    assert ("bound", "for (int64_t i = threadIdx.x; i <= count; i += step) x[i] *= 2;") in changes
    assert ("rounding", "const float half = __bfloat162float(__float2bfloat16_rn(x[0] / 2));") in changes
    assert not [change for _, change in changes if "raffic" in change or "i <= count)" in change or ">=" in change]


def run_mutate(*arguments: str) -> str:
    """Runs mutate.py, in a process that has not loaded any kernels; returns what it printed."""
    command = [sys.executable, f"{emulated.HERE}/mutate.py", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=5 * 3600)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-3000:]
    return run.stdout


@pytest.mark.slow
def test_every_barrier():
    """Some test fails without it, or unnoticeable.py says why it is redundant."""
    run_mutate("--operators", "barrier", "--quick")


def test_planted_faults_have_a_place():
    texts = mutate.sources()
    planted = [m for name, text in texts.items() for m in seeding.mutants(name, text) if m.operator == "planted"]
    assert len(planted) == len(FAULTS)


@pytest.mark.slow
def test_faults_of_every_kind_in_every_file():
    """Every planted fault and barrier, and six others in each file. About 40 minutes of one core."""
    run_mutate("--per-file", "6", "--quick")
