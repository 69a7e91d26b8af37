"""The CUDA kernels as machine code: no spills, shared memory in bounds, tensor cores at work.

Looks into the built library where it is newer than its sources; otherwise compiles.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("sources")
ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
LIBRARY = ROOT / "a3fta_kernels" / "_C.abi3.so"
ARCHS = ("sm_80", "sm_90a")
# bytes per block on sm_86, sm_89 and sm_120
SHARED_LIMIT = 99 * 1024
# how many instances each kernel has
KERNELS = {
    "adapter_kernel": 6,
    "adapter_rows_kernel": 6,
    "bank_kernel": 3,
    "bank_rows_kernel": 6,
    "adapter_cluster_kernel": 6,
    "cluster_forward_kernel": 6,
    "product_kernel": 6,
    "adapter_linear_kernel": 3,
    "hopper_kernel": 34,
    "row_product_kernel": 3,
    "sample_sums_kernel": 3,
    "reduce_kernel": 1,
    "geglu_kernel": 12,
    "layer_norm_kernel": 12,
    "norm_group_kernel": 12,
    "norm_last_kernel": 24,
    "norm_merge_kernel": 6,
    "norm_run_kernel": 24,
    "quantize_kernel": 3,
    "dequantize_kernel": 3,
}
MATRIX_KERNELS = (
    "adapter_kernel", "adapter_rows_kernel", "adapter_cluster_kernel", "cluster_forward_kernel",
    "bank_kernel", "bank_rows_kernel", "product_kernel", "adapter_linear_kernel",
    "row_product_kernel",
)  # fmt: skip
# the kernels that read and write each element once: how they must do it
STREAMING = (
    "adapter_rows_kernel", "bank_rows_kernel", "adapter_cluster_kernel", "cluster_forward_kernel",
)  # fmt: skip
STREAMED = ("LDGSTS.E.BYPASS.128", "LDSM.16.M88.4", "STG.E.128")
# the kernels without products, and the vectors they read and write where addresses allow it: of 16
# bytes, codes of eight
ELEMENTWISE = {
    "geglu_kernel": (r"\bLDG\.E\S*\.128", r"\bSTG\.E\S*\.128"),
    "quantize_kernel": (r"\bLDG\.E\S*\.128", r"\bSTG\.E\S*\.64"),
    "dequantize_kernel": (r"\bLDG\.E\S*\.64", r"\bSTG\.E\S*\.128"),
}
# the kernels for clusters, empty where the chip has none; what they send does not wait, and no
# fence of the whole device stands in their loop
CLUSTERED = ("adapter_cluster_kernel", "cluster_forward_kernel")
NORMS = ("layer_norm_kernel", "norm_group_kernel", "norm_last_kernel", "norm_run_kernel")
# the most that leave room for the blocks a kernel is planned for: two of 256 threads; four
REGISTERS = {
    "adapter_rows_kernel": 128,
    "bank_rows_kernel": 128,
    **dict.fromkeys(ELEMENTWISE, 64),
    **dict.fromkeys(NORMS, 64),
    "norm_last_kernel": 96,
}


@dataclass(frozen=True)
class Kernel:
    arch: str
    name: str  # mangled
    usage: dict[str, int]

    @property
    def short(self) -> str:
        return next(
            k for k in sorted(KERNELS, key=len, reverse=True) if f"{len(k)}{k}" in self.name
        )

    @property
    def half(self) -> bool:
        return "__half" in self.name or "__nv_bfloat16" in self.name


def toolkit() -> tuple[str, str]:
    """nvcc and a cuobjdump; skips where one is missing."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc not found: the CUDA sources cannot be compiled here")
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull],
        capture_output=True, text=True,
    )  # fmt: skip
    top = re.search(r"TOP=(\S+)", dry.stderr + dry.stdout)
    places = [shutil.which("cuobjdump")]
    if top is not None:
        places.append(shutil.which(str(Path(top[1]) / "bin" / "cuobjdump")))
    try:
        import triton

        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        places.append(shutil.which(str(bundled)))
    except ImportError:
        pass
    cuobjdump = next(filter(None, places), None)
    if cuobjdump is None:
        pytest.skip("cuobjdump not found, neither in the CUDA toolkit nor in Triton")
    return nvcc, cuobjdump


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def library_is_fresh(cuobjdump: str) -> bool:
    newest = max(p.stat().st_mtime for p in (ROOT / "csrc").rglob("*.*") if p.is_file())
    if not LIBRARY.exists() or LIBRARY.stat().st_mtime < newest:
        return False
    listing = subprocess.run(
        [cuobjdump, "--list-elf", str(LIBRARY)], capture_output=True, text=True
    ).stdout
    return all(f".{arch}." in listing for arch in ARCHS)


@pytest.fixture(scope="module")
def binaries(tmp_path_factory) -> tuple[str, list[Path]]:
    """cuobjdump, and files that hold the machine code."""
    nvcc, cuobjdump = toolkit()
    if library_is_fresh(cuobjdump):
        return cuobjdump, [LIBRARY]
    folder = tmp_path_factory.mktemp("cubins")
    found = []
    for source in SOURCES:
        for arch in ARCHS:
            target = folder / f"{source.stem}.{arch}.cubin"
            output(
                nvcc, "-std=c++17", "-O3", "-cubin", f"-arch={arch}", str(source), "-o", str(target)
            )
            found.append(target)
    return cuobjdump, found


@pytest.fixture(scope="module")
def kernels(binaries) -> list[Kernel]:
    cuobjdump, files = binaries
    found = []
    for file in files:
        arch = ""
        name = ""
        for line in output(cuobjdump, "--dump-resource-usage", str(file)).splitlines():
            if match := re.search(r"arch = (sm_\w+)", line):
                arch = match[1]
            elif match := re.search(r"Function (\S+):", line):
                name = match[1]
            elif "REG:" in line and "a3fta" in name:
                usage = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
                found.append(Kernel(arch or file.suffixes[0][1:], name, usage))
    return found


@pytest.fixture(scope="module")
def listings(binaries) -> dict[str, list[tuple[Kernel, str]]]:
    """Our kernels with their instructions, by architecture."""
    cuobjdump, files = binaries
    found: dict[str, list[tuple[Kernel, str]]] = {arch: [] for arch in ARCHS}
    for arch in ARCHS:
        for file in files:
            if file != LIBRARY and f".{arch}." not in file.name:
                continue
            listing = output(cuobjdump, "-sass", "-arch", arch, str(file))
            for section in listing.split("Function : ")[1:]:
                kernel = Kernel(arch, section.split(maxsplit=1)[0], {})
                if "a3fta" in kernel.name:
                    found[arch].append((kernel, section))
    return found


@pytest.mark.timeout(600)
def test_every_kernel_is_there(kernels):
    for arch in ARCHS:
        counted = {name: 0 for name in KERNELS}
        for kernel in kernels:
            counted[kernel.short] += kernel.arch == arch
        assert counted == KERNELS, arch


def test_no_spills(kernels, listings):
    assert kernels
    for kernel, section in (x for found in listings.values() for x in found):
        assert not re.search(r"\b(LDL|STL)\b", section), kernel.name
    for kernel in kernels:
        # eight bytes of stack are the frame of a call (a division's slow path)
        assert kernel.usage["STACK"] <= 8 and kernel.usage["LOCAL"] == 0, kernel


def test_shared_memory(kernels):
    """What the compiler reserves and what the launcher may ask for, together."""
    launch = (ROOT / "csrc" / "cuda" / "launch.h").read_text()
    dynamic = int(re.search(r"kSharedLimit = (\d+) \* 1024;", launch)[1]) * 1024
    for kernel in kernels:
        assert kernel.usage["SHARED"] + dynamic <= SHARED_LIMIT, kernel


def test_registers_allow_a_block(kernels):
    for kernel in kernels:
        assert kernel.usage["REG"] <= REGISTERS.get(kernel.short, 255), kernel


@pytest.mark.parametrize("arch", ARCHS)
def test_tensor_cores(arch, listings):
    """16-bit products run on the tensor cores; fp32 ones in full fp32."""
    seen = set()
    for kernel, section in listings[arch]:
        if kernel.short not in MATRIX_KERNELS:
            continue
        seen.add(kernel.name)
        if kernel.short in CLUSTERED:
            assert ("STAS" in section) == (arch != "sm_80"), kernel.name
            if arch == "sm_80":
                continue
            loop = section[section.index("STAS") : section.rindex("STAS")]
            assert "MEMBAR" not in loop, kernel.name
        assert ("HMMA" in section) == kernel.half, kernel.name
        assert ("FFMA" in section) or kernel.half, kernel.name
        assert not re.search(r"\b(LDL|STL)\b", section), kernel.name
        if kernel.short in STREAMING:
            assert all(found in section for found in STREAMED), kernel.name
    assert len(seen) == sum(KERNELS[k] for k in MATRIX_KERNELS)


@pytest.mark.parametrize("arch", ARCHS)
def test_norms(arch, listings):
    """Vectors of 16 bytes where rows are whole; no sum by atomics, whose order is chance."""
    loads, stores = 0, 0
    for kernel, section in listings[arch]:
        if kernel.short not in NORMS:
            continue
        assert not re.search(r"\b(LDL|STL|RED|ATOM|ATOMG)\b", section), kernel.name
        loads += bool(re.search(r"\bLDG\.E\S*\.128", section))
        stores += bool(re.search(r"\bSTG\.E\S*\.128", section))
    # half of each kernel's instances take packs; of those that only sum, none stores elements
    assert (loads, stores) == (6 + 6 + 12 + 12, 6 + 6 + 6 + 6)


@pytest.mark.parametrize("arch", ARCHS)
def test_elementwise(arch, listings):
    """Whole vectors and no local memory; one element at a time only where geglu's rows are odd."""
    vectors = dict.fromkeys(ELEMENTWISE, 0)
    for kernel, section in listings[arch]:
        if kernel.short not in ELEMENTWISE:
            continue
        assert not re.search(r"\b(LDL|STL)\b", section), kernel.name
        wanted = ELEMENTWISE[kernel.short]
        vectors[kernel.short] += all(re.search(pattern, section) for pattern in wanted)
    assert vectors == {"geglu_kernel": 6, "quantize_kernel": 3, "dequantize_kernel": 3}


def test_hopper(listings):
    """wgmma on tiles that the copy engine brings, one after the other; registers as asked for."""
    source = (ROOT / "csrc" / "cuda" / "hopper_gemm.cu").read_text()
    lowered = int(re.search(r"lower_registers<(\d+)>", source)[1])
    raised = int(re.search(r"raise_registers<(\d+)>", source)[1])
    assert 128 * (lowered + 2 * raised) <= 64 * 1024
    seen = 0
    for kernel, section in listings["sm_90a"]:
        name = kernel.name
        if kernel.short != "hopper_kernel":
            continue
        seen += 1
        assert "UTMALDG.2D" in section and "SYNCS.PHASECHK" in section, name
        assert "LDG.E.128" in section and "STG.E.128" in section, name
        assert not re.search(r"\b(LDL|STL|HMMA)\b", section), name
        # ptxas leaves setmaxnreg out where it cannot honour it (its warning C7508)
        assert f"USETMAXREG.DEALLOC.CTAPOOL {lowered:#x}" in section, name
        assert re.search(rf"USETMAXREG.TRY_ALLOC.CTAPOOL .*{raised:#x}", section), name
        # a step is four products of which only the last ends a group: where ptxas cannot
        # follow the sums it waits after each (C7510)
        ends = ["gsb0" in line for line in section.splitlines() if "HGMMA.64x" in line]
        steps = sum(ends[i : i + 4] == [False] * 3 + [True] for i in range(len(ends)))
        assert steps >= 2, name
    assert seen == KERNELS["hopper_kernel"]
