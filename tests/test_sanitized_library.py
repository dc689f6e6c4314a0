"""CPU kernels and torch layer under AddressSanitizer and UndefinedBehaviorSanitizer, for every instruction set."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitized"

# Runs pytest on the package copied to argv[1], not on the one that is installed.
RUN = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "edm2ext" not in type(finder).__module__]
sys.path.insert(0, sys.argv[1])
import edm2ext
assert str(edm2ext.build_info()["library"]).startswith(sys.argv[1]), edm2ext.build_info()
assert edm2ext.build_info()["cpu_isa"] == sys.argv[2], edm2ext.build_info()
import pytest
sys.exit(pytest.main(sys.argv[3:]))
"""


def runtimes() -> str:
    """What must be in the process before anything else: AddressSanitizer, and the __cxa_throw that it intercepts."""
    names = []
    for library in ("libasan.so", "libstdc++.so"):
        command = ["g++", f"-print-file-name={library}"]
        names.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    if not all(Path(name).is_absolute() for name in names):
        pytest.skip("g++ has no libasan.so")
    return " ".join(names)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of edm2ext whose library is compiled with sanitizers."""
    pybind11 = importlib.util.find_spec("pybind11")
    assert pybind11 is not None
    assert pybind11.origin is not None
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert cmake is not None
    configure = [cmake, "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    configure += ["-DEDM2EXT_CUDA=OFF", "-DEDM2EXT_SANITIZE=address,undefined", "-DSKBUILD_PROJECT_VERSION=0"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-Dpybind11_DIR={Path(pybind11.origin).parent / 'share' / 'cmake' / 'pybind11'}"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for command in (configure, [cmake, "--build", str(BUILD), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = tmp_path_factory.mktemp("sanitized")
    shutil.copytree(ROOT / "edm2ext", folder / "edm2ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(BUILD / "libedm2_ops.so", folder / "edm2ext")
    shutil.copy(next(BUILD.glob("_C*.so")), folder / "edm2ext")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_cpu_kernels_under_sanitizers(package: Path, isa: str) -> None:
    environment = {
        **os.environ,
        "LD_PRELOAD": runtimes(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps memory until the end
        "EDM2EXT_CPU_ISA": isa,
        "OMP_NUM_THREADS": "2",
    }
    skipped = "not gradcheck and not gradients and not compile and not opcheck"  # mostly torch's own code, for minutes
    tests = [str(path) for path in sorted((ROOT / "tests" / "ops").glob("test_*.py")) if "compile" not in path.name]
    command = [sys.executable, "-c", RUN, str(package), isa, "-q", "-x", "-s", "-p", "no:cacheprovider"]
    command += ["-k", skipped]
    done = subprocess.run([*command, *tests], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
