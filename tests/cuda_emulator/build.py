"""Builds csrc/cuda/ with the host compiler and the stand-in for CUDA."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
HOPPER = CSRC / "cuda" / "hopper_gemm.cu"
COMPILER = shutil.which("g++")


def compile_objects(
    folder: Path, sources: list[Path], flags: list[str], isystem: list[str]
) -> list[str]:
    objects = []
    for source in sources:
        target = folder / f"{source.name}.o"
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        subprocess.run(
            [COMPILER, "-std=c++17", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi", *flags,
             f"-I{HERE / 'include'}", *(f"-isystem{p}" for p in isystem),
             *language, "-c", str(source), "-o", str(target)],
            check=True,
        )  # fmt: skip
        objects.append(str(target))
    return objects


def kernels() -> list[Path]:
    return sorted((CSRC / "cuda").glob("*.cu"))


def emulator() -> list[Path]:
    return [HERE / f"{name}.cpp" for name in ("emulator", "hopper", "traffic")]


def build_library(folder: Path) -> Path:
    """The native library with the CUDA kernels registered for CPU tensors."""
    sources = [
        *kernels(), *emulator(), CSRC / "ops.cpp",
        *sorted((CSRC / "cuda").glob("*.cpp")), HERE / "torch_stubs.cpp", HERE / "plans.cpp",
    ]  # fmt: skip
    flags = ["-O1", "-DA3FTA_CUDA_KEY=CPU", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    objects = compile_objects(folder, sources, flags, include_paths())
    target = folder / "emulated.so"
    libraries = [f"-L{p}" for p in library_paths()]
    subprocess.run(
        [COMPILER, "-shared", "-Wl,-Bsymbolic", *objects, *libraries,
         "-ltorch_cpu", "-ltorch", "-lc10", "-o", str(target)],
        check=True,
    )  # fmt: skip
    return target


def sanitized(sanitizers: str) -> list[str]:
    """Under AddressSanitizer compiling takes longest, under ThreadSanitizer running does."""
    level = "-O1" if sanitizers == "thread" else "-Og"
    return [level, "-g1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]


def build_program(folder: Path, sanitizers: str) -> Path:
    """sanitize.cpp and the kernels under the given sanitizers, as a program of their own."""
    flags = sanitized(sanitizers)
    sources = [k for k in kernels() if k != HOPPER]
    sources += [HERE / "sanitize.cpp", HERE / "planted.cpp"]
    objects = compile_objects(folder, sources, flags, [])
    kind = "THREAD" if sanitizers == "thread" else "ADDRESS"
    define = f"-DEMULATOR_{kind}_SANITIZER"
    objects += compile_objects(folder, emulator(), ["-O1", "-g1", define], [])
    target = folder / "sanitize"
    subprocess.run([COMPILER, *flags, *objects, "-o", str(target)], check=True)
    return target


def build_hopper_program(folder: Path, sanitizers: str) -> Path:
    """The same for sanitize_hopper.cpp."""
    flags = sanitized(sanitizers)
    sources = [HOPPER, CSRC / "cuda" / "chip.cu", HERE / "sanitize_hopper.cpp"]
    objects = compile_objects(folder, sources, flags, [])
    kind = "THREAD" if sanitizers == "thread" else "ADDRESS"
    define = f"-DEMULATOR_{kind}_SANITIZER"
    objects += compile_objects(folder, emulator(), ["-O1", "-g1", define], [])
    target = folder / "sanitize_hopper"
    subprocess.run([COMPILER, *flags, *objects, "-o", str(target)], check=True)
    return target
