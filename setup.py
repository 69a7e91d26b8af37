"""Builds the compiled library, a3fta_kernels/_C.abi3.so; the only file that knows compilers.

One shared library on PyTorch's stable ABI holds the CPU kernels, compiled once per instruction
set and chosen when it loads, and the CUDA kernels where nvcc is found. Without a C++ compiler the
package installs without the library: the reference and Triton backends remain. A compiler that
fails stops the installation.

Options, environment variables read while building:

    CXX               the C++ compiler (default: c++, g++ or clang++)
    A3FTA_NATIVE=0    install without the compiled library
    A3FTA_CUDA=0      build without CUDA kernels; 1: fail where nvcc is missing (default: if found)
    A3FTA_CUDA_ARCHS  GPU architectures, e.g. "90" or "80+PTX 120", or "all" of CUDA_ARCHS (default:
                      those of the GPUs here, for no others; all where there is none)
    MAX_JOBS          how many compilers run at once (default: the number of processors)

Objects are kept in build/native and rebuilt when a source, a header, or the command changes.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
OBJECTS = ROOT / "build" / "native"

# +PTX: newer chips compile it when the library loads
CUDA_ARCHS = "80+PTX 86 89 90a 100a 120"
# the oldest torch the library runs on: 2.10
TORCH_TARGET = "0x020a000000000000"

CXX_FLAGS = [
    "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-ffp-contract=fast",
    "-fno-math-errno", "-fno-trapping-math",
]  # fmt: skip
_AVX512 = "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
# the names are those of the tables in csrc/cpu/runtime.cpp
X86_SETS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma",
    "avx512": _AVX512,
    "avx512_bf16": f"{_AVX512} -mavx512bf16",
}


def compiler() -> list[str] | None:
    """The command of the C++ compiler, or None where there is none."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else None


def wanted() -> bool:
    if os.environ.get("A3FTA_NATIVE") == "0":
        say("A3FTA_NATIVE=0: no compiled library; the reference and Triton backends remain")
        return False
    if compiler() is None:
        say("no C++ compiler found: no compiled library; the reference and Triton backends remain")
        return False
    return True


def say(message: str) -> None:
    print(f"a3fta_kernels: {message}", file=sys.stderr, flush=True)


class Cuda:
    """The CUDA toolkit that nvcc belongs to."""

    def __init__(self, nvcc: str) -> None:
        self.nvcc = nvcc
        # nvcc on the PATH may be a wrapper, so its place says nothing
        dry = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull],
            capture_output=True, text=True,
        )  # fmt: skip
        top = re.search(r"TOP=(\S+)", dry.stderr + dry.stdout)
        if top is None:
            raise RuntimeError(f"{nvcc} --dryrun does not name its toolkit:\n{dry.stderr}")
        self.home = Path(top[1]).resolve()
        target = self.home / "targets" / f"{platform.machine()}-linux"
        if not target.is_dir() and platform.machine() == "aarch64":
            target = self.home / "targets" / "sbsa-linux"
        base = target if target.is_dir() else self.home
        self.include = base / "include"
        self.libraries = base / ("lib" if base is target else "lib64")

    def gencode(self) -> list[str]:
        """-gencode options; architectures that this nvcc does not know are left out, by name."""
        listing = subprocess.run(
            [self.nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True
        ).stdout
        known = set(re.findall(r"sm_(\d+)", listing))
        asked = os.environ.get("A3FTA_CUDA_ARCHS")
        here = [] if asked else archs_here()
        if here and known.issuperset(here):
            names = here
        elif not asked or asked == "all":
            names, asked = CUDA_ARCHS.split(), None
        else:
            names = re.split(r"[\s,;]+", asked.strip())
        flags = []
        for name in names:
            match = re.fullmatch(r"(\d+)([a-z]?)(\+PTX)?", name)
            if match is None:
                raise RuntimeError(f"A3FTA_CUDA_ARCHS: expected names like 90a or 80+PTX: {name}")
            number, suffix, ptx = match.groups()
            if number not in known:
                if asked:
                    raise RuntimeError(f"A3FTA_CUDA_ARCHS: {self.nvcc} does not know sm_{number}")
                say(f"{self.nvcc} does not know sm_{number}: left out")
                continue
            # these chips have instructions that only their own code may use; PTX is for others
            arch = f"{number}a" if number in ("90", "100") else number + suffix
            flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
            if ptx:
                ptx_arch = number + suffix
                flags += ["-gencode", f"arch=compute_{ptx_arch},code=compute_{ptx_arch}"]
            if arch == "90a":
                flags.append("-DA3FTA_SM90A")
        return flags


def archs_here() -> list[str]:
    """Those of this machine's GPUs that the kernels run on."""
    import torch

    try:
        count = torch.cuda.device_count() if torch.version.cuda else 0
        found = {torch.cuda.get_device_capability(i) for i in range(count)}
    except RuntimeError as error:  # a GPU that may not be used now
        say(f"GPUs of this machine: {error}")
        return []
    return [f"{major}{minor}" for major, minor in sorted(found) if major >= 8]


def find_cuda() -> Cuda | None:
    option = os.environ.get("A3FTA_CUDA", "auto")
    if option not in ("auto", "0", "1"):
        raise RuntimeError(f"A3FTA_CUDA: expected 0 or 1, got {option!r}")
    if option == "0":
        return None
    nvcc = shutil.which("nvcc")
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if nvcc is None and os.environ.get(variable):
            nvcc = shutil.which(str(Path(os.environ[variable]) / "bin" / "nvcc"))
    if nvcc is None:
        if option == "1":
            raise RuntimeError("A3FTA_CUDA=1, but nvcc is neither on the PATH nor in CUDA_HOME")
        say("nvcc not found: CPU kernels only")
        return None
    return Cuda(nvcc)


class BuildLibrary(build_ext):
    """Compiles csrc/ and links one library; setuptools only says where it goes."""

    def build_extension(self, ext: Extension) -> None:
        try:
            from torch.utils import cpp_extension
        except ImportError as error:
            raise RuntimeError(
                "torch is not installed where the library is built: install torch and run "
                "pip install --no-build-isolation, or set A3FTA_NATIVE=0 to go without"
            ) from error
        cuda = find_cuda()
        kernels = sorted(CSRC.glob("cuda/*.cu")) if cuda else []
        cxx = compiler()
        assert cxx is not None

        flags = [*cxx, *CXX_FLAGS, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
        # torch's headers are not ours to warn about
        for path in cpp_extension.include_paths():
            flags += ["-isystem", path]
        # kernels.cpp is compiled once per instruction set
        apart = ("kernels.cpp", "runtime.cpp")
        registrations = sorted(s for s in CSRC.glob("cpu/*.cpp") if s.name not in apart)
        sets = self.instruction_sets(cxx)
        if "avx2" in sets:
            flags.append("-DA3FTA_X86")
        if "avx512_bf16" in sets:
            flags.append("-DA3FTA_AVX512_BF16")
        jobs = [(source, f"{source.stem}_cpu", flags) for source in registrations]
        jobs.append((CSRC / "cpu" / "runtime.cpp", "runtime_cpu", flags))
        source = CSRC / "cpu" / "kernels.cpp"
        for name, options in sets.items():
            command = [*cxx, *CXX_FLAGS, *options.split(), f"-DA3FTA_ISA={name}"]
            jobs.append((source, f"kernels_{name}", command))
        if kernels and cuda is not None:
            flags = [*flags, "-DA3FTA_WITH_CUDA", "-isystem", str(cuda.include)]
            jobs += [(s, f"{s.stem}_cuda", flags) for s in sorted(CSRC.glob("cuda/*.cpp"))]
            command = [
                cuda.nvcc, "-std=c++17", "-O3", "--expt-relaxed-constexpr",
                "-Xcompiler", "-fPIC,-fvisibility=hidden", *cuda.gencode(),
            ]  # fmt: skip
            # the slow ones first
            jobs = [(k, f"{k.stem}_cu", command) for k in kernels] + jobs

        jobs.append((CSRC / "ops.cpp", "ops", flags))
        OBJECTS.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = list(pool.map(lambda job: compile_one(*job), jobs))

        link = [*cxx, "-shared", *map(str, objects)]
        for path in cpp_extension.library_paths():
            link += [f"-L{path}"]
        # libtorch brings in libtorch_cuda where torch has it: keep it though nothing here names it
        link += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-Wl,--as-needed"]
        if kernels and cuda is not None:
            link += [f"-L{cuda.libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(target.name + ".new")
        execute([*link, "-o", str(fresh)], "linking")
        # in one step: a process may have the old library loaded
        os.replace(fresh, target)
        say(f"built {target.name} for {', '.join(sets)}" + (" and CUDA" if kernels else ""))

    def instruction_sets(self, cxx: list[str]) -> dict[str, str]:
        """The builds of the CPU kernels: those that the compiler can make for this machine."""
        if platform.machine() not in ("x86_64", "AMD64"):
            return {"baseline": ""}
        probe = subprocess.run(
            [*cxx, "-mavx512bf16", "-x", "c++", "-fsyntax-only", os.devnull], capture_output=True
        )
        if probe.returncode == 0:
            return X86_SETS
        say("the compiler does not know AVX512_BF16: bfloat16 will be multiplied in float32")
        return {k: v for k, v in X86_SETS.items() if k != "avx512_bf16"}

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(self.get_ext_fullname(ext.name))
            target = ROOT / self.get_ext_filename(self.get_ext_fullname(ext.name))
            fresh = target.with_name(target.name + ".new")
            shutil.copyfile(built, fresh)
            os.replace(fresh, target)


def compile_one(source: Path, name: str, command: list[str]) -> Path:
    """Compiles `source` to build/native/`name`.o, unless that is up to date."""
    target = OBJECTS / f"{name}.o"
    depends, stamp = target.with_suffix(".d"), target.with_suffix(".command")
    command = [*command, "-MD", "-MF", str(depends), "-c", str(source), "-o", str(target)]
    digest = hashlib.sha256("\0".join(command).encode()).hexdigest()
    if target.exists() and depends.exists() and stamp.exists() and stamp.read_text() == digest:
        listed = depends.read_text().replace("\\\n", " ").partition(":")[2].split()
        paths = [Path(p) for p in listed]
        built = target.stat().st_mtime
        if all(p.exists() and p.stat().st_mtime <= built for p in paths):
            return target
    stamp.unlink(missing_ok=True)
    execute(command, str(source.relative_to(ROOT)))
    stamp.write_text(digest)
    return target


def execute(command: list[str], what: str) -> None:
    say(what)
    done = subprocess.run(command, capture_output=True, text=True)
    output = (done.stdout + done.stderr).strip()
    if done.returncode != 0:
        raise RuntimeError(f"{what} failed: {shlex.join(command)}\n{output}")
    if output:
        print(output, file=sys.stderr, flush=True)


setup(
    ext_modules=[
        Extension(
            "a3fta_kernels._C",
            sources=[str(p.relative_to(ROOT)) for p in sorted(CSRC.glob("*/*.cpp"))],
            py_limited_api=True,
        )
    ]
    if wanted()
    else [],
    cmdclass={"build_ext": BuildLibrary},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
