"""Compiles the Triton kernels where no GPU is, and keeps a table of what they take of a chip.

    python -m benchmarks.aot [--jobs N]

builds every configuration the launchers may choose, for every dtype, rank block and target, and
writes benchmarks/results/aot_triton.json: registers a thread, bytes of stack (spilled registers)
and bytes of shared memory. The table is keyed by a hash of each kernel's source; a test holds it
to the sources. Nothing here is a timing.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import itertools
import json
import pkgutil
import re
import subprocess
import tempfile
import tokenize
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import a3fta_kernels
from a3fta_kernels.triton_support import TARGETS, AotKernel, Config

TABLE = Path(__file__).with_name("results") / "aot_triton.json"
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)")


class Build(NamedTuple):
    """One kernel to compile; `module` and `index` find it again in another process."""

    module: str
    index: int
    variant: str
    dtype: str
    capability: int
    config: Config

    @property
    def entry(self) -> AotKernel:
        return importlib.import_module(self.module).AOT_KERNELS[self.index]

    @property
    def name(self) -> str:
        return self.entry.launcher.kernel.__name__

    def __str__(self) -> str:
        return f"{self.variant}, {self.dtype}, sm_{self.capability}, {self.config}"


class Resources(NamedTuple):
    """What one build takes: a thread's registers and stack, a block's shared memory, in bytes."""

    registers: int
    stack: int
    shared: int
    tensor_cores: str  # the instruction, or ""


def modules() -> list[ModuleType]:
    """Every module of the package that holds Triton kernels."""
    found = pkgutil.walk_packages(a3fta_kernels.__path__, "a3fta_kernels.")
    return [importlib.import_module(m.name) for m in found if m.name.endswith("triton")]


def builds(defaults_only: bool = False) -> Iterator[Build]:
    """All builds, or each kernel's default: bf16, rank 64, first variant, first configuration."""
    for module in modules():
        for index, entry in enumerate(getattr(module, "AOT_KERNELS", ())):
            dtypes = ("bf16",) if defaults_only else entry.dtypes
            ranks = (64,) if defaults_only else entry.ranks
            variants = list(entry.variants)[: 1 if defaults_only else None]
            options = itertools.product(TARGETS, variants, dtypes, ranks)
            for capability, variant, dtype, rank in options:
                launcher = entry.launcher_of(variant)
                choices = launcher.configs(DTYPES[dtype], rank, capability)
                for choice in choices[: 1 if defaults_only else None]:
                    yield Build(module.__name__, index, variant, dtype, capability, choice)


def compile_build(
    build: Build, aligned: bool = True, fixed_sizes: dict[str, int] | None = None
) -> Resources:
    """`aligned`: pointers and sizes are multiples of 16, as in real layers. `fixed_sizes`:
    integers that Triton makes constants, as it does with every 1."""
    entry = build.entry
    kernel = entry.launcher.kernel
    constants = (fixed_sizes or {}) | entry.variants[build.variant] | build.config.meta
    signature, fixed, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            fixed[(i,)] = constants.pop(name)
            continue
        pointer = name.endswith("_ptr")
        signature[name] = f"*{entry.pointers.get(name, build.dtype)}" if pointer else "i32"
        if aligned and not parameter.do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    if constants:
        raise ValueError(f"{build.name}: no parameters named {', '.join(constants)}")
    built = triton.compile(
        ASTSource(kernel, signature, fixed, attributes),
        target=GPUTarget("cuda", build.capability, 32),
        options=build.config.options,
    )
    used = _TENSOR_CORE.search(built.asm["ptx"])
    registers, stack = _usage(built.asm["cubin"])
    return Resources(registers, stack, built.metadata.shared, used[1] if used else "")


def _usage(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def source_hash(kernel: JITFunction) -> str:
    """Of the code of a kernel and of all it calls; comments and line breaks do not count."""
    seen: dict[str, Any] = {}

    def visit(function: JITFunction) -> None:
        # tokens, not a syntax tree: its dump differs between versions of Python
        tokens = [
            (t.type, t.string)
            for t in tokenize.generate_tokens(io.StringIO(function.src).readline)
            if t.type not in (tokenize.COMMENT, tokenize.NL)
        ]
        seen[function.__name__] = [text for _, text in tokens]
        for kind, text in tokens:
            value = function.fn.__globals__.get(text) if kind == tokenize.NAME else None
            if isinstance(value, JITFunction) and text not in seen:
                visit(value)
            elif isinstance(value, triton.language.constexpr):
                seen[text] = repr(value.value)

    visit(kernel)
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    jobs = parser.parse_args().jobs
    everything = list(dict.fromkeys(builds()))
    kernels: dict[str, Any] = {}
    with ProcessPoolExecutor(jobs) as pool:
        results = pool.map(compile_build, everything, chunksize=4)
        for i, (build, found) in enumerate(zip(everything, results, strict=True), 1):
            kernel = build.entry.launcher.kernel
            row = kernels.setdefault(build.name, {"source": source_hash(kernel), "builds": {}})
            row["builds"][str(build)] = found
            print(f"{i}/{len(everything)}  {build.name}: {build}: {found}", flush=True)
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(render({"triton": triton.__version__, "kernels": kernels}))


def render(table: dict[str, Any]) -> str:
    """JSON with one build a line."""
    text = json.dumps(table, indent=1)
    return (
        re.sub(r"\[\s+(.*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text, flags=re.S) + "\n"
    )


if __name__ == "__main__":
    main()
