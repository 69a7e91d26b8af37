"""The Triton kernels, compiled for chips that are not here: they fit, and tensor cores work."""

from __future__ import annotations

import ast
import functools
import json
import re
from dataclasses import replace

import pytest

triton = pytest.importorskip("triton")

from triton.runtime.jit import JITFunction  # noqa: E402

from a3fta_kernels import triton_support  # noqa: E402
from a3fta_kernels.backends import triton_interpreted  # noqa: E402
from a3fta_kernels.ops.activations import ACTIVATIONS  # noqa: E402

if triton_interpreted():
    pytest.skip("under TRITON_INTERPRET kernels are not compiled", allow_module_level=True)

from benchmarks import aot  # noqa: E402

KERNELS = {
    name: (module, value)
    for module in aot.modules()
    for name, value in vars(module).items()
    if isinstance(value, JITFunction) and value.__module__ == module.__name__
}
ENTRIES = [entry for module in aot.modules() for entry in getattr(module, "AOT_KERNELS", ())]
DEFAULTS = list(aot.builds(defaults_only=True))
# descriptors are for newer chips alone
ON_ONE_CHIP = [b for b in DEFAULTS if b.capability == (89 if 89 in b.entry.targets else 90)]
BY_DESCRIPTORS = [b for b in DEFAULTS if b.entry.by_descriptors]
PARKED = 16  # bytes of a thread's stack


@pytest.mark.parametrize("build", DEFAULTS, ids=lambda b: f"{b.name}: {b}")
def test_default_configuration(build):
    found = aot.compile_build(build)
    assert found.stack == 0, f"{found.stack} bytes of registers spilled"
    assert found.shared <= triton_support.shared_limit(build.capability)
    wanted = {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(build.capability, "mma.sync")
    assert found.tensor_cores == (wanted if build.entry.products else "")


@pytest.mark.parametrize("build", ON_ONE_CHIP, ids=lambda b: b.name)
def test_sizes_of_one_compile(build):
    """Triton turns an argument of 1 into a constant, and constants do not have every method."""
    parameters = build.entry.launcher.kernel.params
    ones = {
        p.name: 1
        for p in parameters
        if not (p.is_constexpr or p.do_not_specialize or p.name.endswith(("_ptr", "_desc")))
    }
    assert ones.keys() >= ({"R", "N"} if build.entry.products else set()) and ones
    aot.compile_build(build, fixed_sizes=ones)


@pytest.mark.parametrize("build", ON_ONE_CHIP, ids=lambda b: b.name)
def test_odd_sizes_compile(build):
    """No stride a multiple of 16: slower loads, yet the kernel still fits."""
    found = aot.compile_build(build, aligned=False)
    assert found.shared <= triton_support.shared_limit(build.capability)
    assert bool(found.tensor_cores) == build.entry.products


@pytest.mark.parametrize("build", BY_DESCRIPTORS, ids=lambda b: f"{b.name}: {b}")
def test_descriptors_become_bulk_copies(build):
    """One instruction fetches a tile, another stores it: no fallback to pointers."""
    text = aot.compiled(build).asm["ptx"]
    assert "cp.async.bulk.tensor.2d.shared" in text and "cp.async.bulk.tensor.2d.global" in text


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_what_descriptors_save(direction):
    """Registers on sm_90: fewer for the same tile, though its steps are twice as deep, and room
    for a tile of 128 x 256."""
    table = json.loads(aot.TABLE.read_text())["kernels"]

    def registers(kernel: str, tile: str, warps: int) -> set[int]:
        builds = table[kernel]["builds"].items()
        start, rest = f"{direction}, bf16, sm_90, {tile} ", f" R64 w{warps} "
        return {row[0] for name, row in builds if name.startswith(start) and rest in name}

    for tile in (("M128 N128", 8), ("M64 N64", 4)):
        by_descriptors = registers("concat_gemm_tma_kernel", *tile)
        assert max(by_descriptors) < min(registers("concat_gemm_kernel", *tile))
    assert max(registers("concat_gemm_tma_kernel", "M128 N256", 8)) < 200


_WGMMA = re.compile(r"(#mma\d*) = #ttg.nvidia_mma<\{versionMajor = 3.*?warpsPerCTA = \[(\d+)")
_PRODUCT = re.compile(r"warp_group_dot .*-> tensor<(\d+)x\d+x\w+, (#mma\d*)>")


@pytest.mark.parametrize("name", ["query_grad_kernel", "key_grad_kernel"])
def test_no_product_has_warps_without_rows(name):
    """On sm_90 some code of Triton 3.6 was wrong where warps reach past a product's rows."""
    tall = [
        b for b in aot.builds()
        if b.name == name and b.capability == 90 and b.dtype == "bf16"
        and b.config.meta["BLOCK_M"] == 64
    ]  # fmt: skip
    widest = max(tall, key=lambda b: b.config.num_warps)
    text = aot.compiled(widest).asm["ttgir"]
    warps = {layout: int(count) for layout, count in _WGMMA.findall(text)}
    products = [(int(rows), warps[layout]) for rows, layout in _PRODUCT.findall(text)]
    assert products and all(16 * count <= rows for rows, count in products)


def test_no_kernel_reads_a_global_that_is_nan():
    """Triton compares a kernel's globals at each launch, and NaN never equals itself."""
    for _, kernel in KERNELS.values():
        names = {n.id for n in ast.walk(ast.parse(kernel.src)) if isinstance(n, ast.Name)}
        for name in names & kernel.fn.__globals__.keys():
            value = kernel.fn.__globals__[name]
            value = getattr(value, "value", value)
            assert not isinstance(value, float) or value == value, f"{kernel.__name__}: {name}"


def test_every_kernel_is_registered():
    """A jit function is either in its module's AOT_KERNELS or called by another one."""
    called = {
        node.func.id
        for _, kernel in KERNELS.values()
        for node in ast.walk(ast.parse(kernel.src))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    registered = {entry.launcher.kernel.__name__ for entry in ENTRIES}
    assert KERNELS.keys() - called == registered
    assert not registered & called


def test_registry_names_real_parameters():
    for entry in ENTRIES:
        names = set(entry.launcher.kernel.arg_names)
        assert entry.pointers.keys() <= names
        for variant in entry.variants.values():
            assert variant.keys() <= names


def test_table_is_of_these_sources():
    """`make aot` renews it."""
    table = json.loads(aot.TABLE.read_text())["kernels"]
    now: dict[str, set[str]] = {}
    sources = {}
    for build in aot.builds():
        now.setdefault(build.name, set()).add(str(build))
        sources[build.name] = aot.source_hash(build.entry)
    assert {name: row["source"] for name, row in table.items()} == sources
    assert {name: set(row["builds"]) for name, row in table.items()} == now


def test_no_listed_configuration_spills_or_overflows():
    table = json.loads(aot.TABLE.read_text())["kernels"]
    bad = {}
    for build in aot.builds():
        registers, stack, shared, tensor_cores = table[build.name]["builds"][str(build)]
        limit = triton_support.shared_limit(build.capability)
        # with registers to spare, ptxas parks a value or two so that one more block fits
        spills = stack > (PARKED if registers <= 128 else 0)
        without = build.entry.products and build.dtype != "fp32" and not tensor_cores
        if spills or shared > limit or without:
            bad[f"{build.name}: {build}"] = (stack, shared, tensor_cores)
    assert not bad


def test_every_list_has_a_default():
    """For every dtype, fixed block and chip, those that are not in the table included."""
    for entry in ENTRIES:
        fixed_blocks = (16, 32, 64, 128) if any(entry.fixed_blocks) else (0,)
        for size in {aot.DTYPES[dtype] for dtype in entry.dtypes}:
            for fixed_block in fixed_blocks:
                for capability in (*triton_support.TARGETS, 86, 87, 103, 121):
                    if fixed_block <= max(entry.fixed_blocks) and capability >= min(entry.targets):
                        assert entry.launcher.configs(size, fixed_block, capability)


def test_activation_codes_agree():
    codes = {n: getattr(triton_support, n.upper()).value for n in ACTIVATIONS[:-1]}
    assert codes == {name: i for i, name in enumerate(ACTIVATIONS[:-1])}


def entry_of(kernel: str) -> triton_support.AotKernel:
    return next(e for e in ENTRIES if e.launcher.kernel.__name__ == kernel)


def test_source_hash_sees_callees_and_builds_and_not_comments(monkeypatch):
    entry = entry_of("linear_forward_kernel")
    before = aot.source_hash(entry)
    assert aot.source_hash(replace(entry, variants={"whole": {"ACT": 1}})) != before
    assert aot.source_hash(replace(entry, pointers={})) != before
    helper = triton_support.activate
    monkeypatch.setattr(helper, "_src", helper.src + "\n    # a comment\n")
    assert aot.source_hash(entry) == before
    monkeypatch.setattr(helper, "_src", helper.src.replace("0.5", "0.25"))
    assert aot.source_hash(entry) != before


class InThisProcess:
    """In place of a pool: what a test replaced is replaced there too."""

    def __init__(self, jobs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, function, items, chunksize):
        return map(function, items)


class TestRenewal:
    """`make aot` compiles what the table does not know, with builds and results made up."""

    @pytest.fixture
    def renew(self, monkeypatch, tmp_path):
        compiled = []

        def compile_build(build):
            if build == self.breaks:
                raise KeyboardInterrupt
            compiled.append(build)
            return aot.Resources(len(compiled), 0, 0, "mma.sync")

        self.breaks = None
        self.table = tmp_path / "table.json"
        self.wanted = [b for b in DEFAULTS if b.capability == 80]
        monkeypatch.setattr(aot, "TABLE", self.table)
        monkeypatch.setattr(aot, "builds", lambda: iter(self.wanted))
        monkeypatch.setattr(aot, "compile_build", compile_build)
        monkeypatch.setattr(aot, "ProcessPoolExecutor", InThisProcess)

        def run(*arguments):
            compiled.clear()
            aot.main(list(arguments))
            return list(compiled)

        return run

    def test_known_rows_stay(self, renew):
        assert renew() == self.wanted
        before = self.table.read_text()
        assert renew() == [] and self.table.read_text() == before
        assert renew("--all") == self.wanted

    def test_a_new_build_is_compiled_alone_and_a_gone_one_leaves(self, renew):
        every, self.wanted = self.wanted, self.wanted[1:]
        renew()
        self.wanted = every[:-1]
        assert renew() == every[:1]
        names = {
            name
            for row in json.loads(self.table.read_text())["kernels"].items()
            for name in row[1]["builds"]
        }
        assert names == {str(b) for b in every[:-1]}

    def test_a_changed_source_or_triton_is_compiled_again(self, renew, monkeypatch):
        renew()
        table = json.loads(self.table.read_text())
        table["kernels"][self.wanted[0].name]["source"] = "another"
        self.table.write_text(json.dumps(table))
        assert renew() == [b for b in self.wanted if b.name == self.wanted[0].name]
        monkeypatch.setattr(triton, "__version__", "another")
        assert renew() == self.wanted

    def test_an_interrupted_run_keeps_what_it_has(self, renew):
        self.breaks = self.wanted[2]
        with pytest.raises(KeyboardInterrupt):
            renew()
        self.breaks = None
        assert renew() == self.wanted[2:]


class TestLauncher:
    """The choice among configurations, with times that the test makes up."""

    A, B, C = (triton_support.config(4, s, BLOCK_M=16) for s in (1, 2, 3))

    def choose(self, monkeypatch, times):
        def bench(run, **_):
            run()
            return times[run.args[0]]

        monkeypatch.setattr(triton.testing, "do_bench", bench)
        ran = []

        def prepared(choice):
            return functools.partial(run, choice)

        def run(choice):
            if times[choice] is None:
                raise triton.runtime.errors.OutOfResources(2, 1, "shared memory")
            ran.append(choice)

        return triton_support.fastest(prepared, list(times)), ran

    def test_the_fastest_wins(self, monkeypatch):
        chosen, ran = self.choose(monkeypatch, {self.A: 3.0, self.B: 1.0, self.C: 2.0})
        assert chosen == self.B and ran == [self.A, self.B, self.C]

    def test_one_without_room_is_passed_over(self, monkeypatch):
        chosen, ran = self.choose(monkeypatch, {self.A: None, self.B: 2.0})
        assert chosen == self.B and ran == [self.B]

    def test_a_single_one_is_not_timed(self, monkeypatch):
        chosen, ran = self.choose(monkeypatch, {self.A: 1.0})
        assert chosen == self.A and not ran
