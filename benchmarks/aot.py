"""Compiles the Triton kernels where no GPU is, and keeps a table of what they take of a chip.

    python -m benchmarks.aot [--jobs N] [--all]

builds every configuration the launchers may choose, for every dtype, fixed block and target, and
writes benchmarks/results/aot_triton.json: registers a thread, bytes of stack (spilled registers)
and bytes of shared memory. Each kernel's rows stand beside a hash of its source and of how it is
built, and a test holds the table to the sources. Rows whose hash, build and Triton version are
those of the table stay as they are; the rest is compiled. Nothing here is a timing.
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
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

import a3fta_kernels
from a3fta_kernels.triton_support import AotKernel, Config

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
    """All builds, or each kernel's default: bf16, a fixed block of 64, the first of the rest."""
    for module in modules():
        for index, entry in enumerate(getattr(module, "AOT_KERNELS", ())):
            dtypes = ("bf16",) if defaults_only else entry.dtypes
            fixed_blocks = (64,) if defaults_only else entry.fixed_blocks
            variants = list(entry.variants)[: 1 if defaults_only else None]
            options = itertools.product(entry.targets, variants, dtypes, fixed_blocks)
            for capability, variant, dtype, fixed_block in options:
                launcher = entry.launcher_of(variant)
                choices = launcher.configs(DTYPES[dtype], fixed_block, capability)
                choices = [choice for choice in choices if entry.suits(variant, choice)]
                for choice in choices[: 1 if defaults_only else None]:
                    yield Build(module.__name__, index, variant, dtype, capability, choice)


def compile_build(
    build: Build, aligned: bool = True, fixed_sizes: dict[str, int] | None = None
) -> Resources:
    """What `compiled` takes of the chip."""
    built = compiled(build, aligned, fixed_sizes)
    used = _TENSOR_CORE.search(built.asm["ptx"])
    registers, stack = _usage(built.asm["cubin"])
    return Resources(registers, stack, built.metadata.shared, used[1] if used else "")


def compiled(
    build: Build, aligned: bool = True, fixed_sizes: dict[str, int] | None = None
) -> CompiledKernel:
    """`aligned`: pointers and sizes are multiples of 16, as in real layers. `fixed_sizes`:
    integers that Triton makes constants, as it does with every 1."""
    entry = build.entry
    kernel = entry.launcher.kernel
    meta = build.config.meta
    constants = (fixed_sizes or {}) | entry.variants[build.variant] | meta
    signature, fixed, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        value = constants.pop(name, ...)
        if isinstance(value, tuple):
            block = ", ".join(str(meta[size]) for size in value)
            signature[name] = f"tensordesc<{build.dtype}[{block}]>"
        elif value is not ...:
            signature[name] = "constexpr"
            fixed[(i,)] = value
        else:
            pointer = name.endswith("_ptr")
            kind = entry.pointers.get(name, build.dtype if pointer else "i32")
            signature[name] = f"*{kind}" if pointer else kind
            if aligned and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    if constants:
        raise ValueError(f"{build.name}: no parameters named {', '.join(constants)}")
    return triton.compile(
        ASTSource(kernel, signature, fixed, attributes),
        target=GPUTarget("cuda", build.capability, 32),
        options=build.config.options,
    )


def _usage(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def source_hash(entry: AotKernel) -> str:
    """Of the code of a kernel and of all it calls, and of what its builds are given.

    Comments and line breaks do not count.
    """
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

    visit(entry.launcher.kernel)
    given = [seen, entry.pointers, entry.variants]
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]


def read_table() -> dict[str, Any]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": "", "kernels": {}}


def known_rows(table: dict[str, Any], wanted: list[Build]) -> dict[Build, Resources]:
    """The rows of `table` that still hold: same Triton, same source, same build."""
    if table["triton"] != triton.__version__:
        return {}
    hashes = {b.name: source_hash(b.entry) for b in wanted}
    found = {}
    for build in wanted:
        kernel = table["kernels"].get(build.name)
        if kernel and kernel["source"] == hashes[build.name] and str(build) in kernel["builds"]:
            found[build] = Resources(*kernel["builds"][str(build)])
    return found


def table_of(rows: dict[Build, Resources], wanted: list[Build]) -> dict[str, Any]:
    """The table with those of the wanted builds that have a row, in their order."""
    kernels: dict[str, Any] = {}
    for build in wanted:
        if build in rows:
            new = {"source": source_hash(build.entry), "builds": {}}
            kernels.setdefault(build.name, new)["builds"][str(build)] = rows[build]
    return {"triton": triton.__version__, "kernels": kernels}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--all", action="store_true", help="compile also what the table knows")
    options = parser.parse_args(arguments)
    wanted = list(dict.fromkeys(builds()))
    rows = {} if options.all else known_rows(read_table(), wanted)
    missing = [build for build in wanted if build not in rows]
    print(f"{len(rows)} builds are known, {len(missing)} to compile", flush=True)
    try:
        with ProcessPoolExecutor(options.jobs) as pool:
            results = pool.map(compile_build, missing, chunksize=4)
            for i, (build, found) in enumerate(zip(missing, results, strict=True), 1):
                rows[build] = found
                print(f"{i}/{len(missing)}  {build.name}: {build}: {found}", flush=True)
    finally:
        # an interrupted run keeps what it has compiled
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(render(table_of(rows, wanted)))


def render(table: dict[str, Any]) -> str:
    """JSON with one build a line."""
    text = json.dumps(table, indent=1)
    return (
        re.sub(r"\[\s+(.*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text, flags=re.S) + "\n"
    )


if __name__ == "__main__":
    main()
