"""The house as CONTRIBUTING.md draws it: import arrows, one op one name, no orphans."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

import pytest

import a3fta_kernels
from benchmarks.workloads import BENCHES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "a3fta_kernels"

# bottom first; a module imports from the layers below its own, and never beside itself
LAYERS = [
    ["checks"],
    ["backends"],
    ["triton_support"],
    ["ops.activations", "ops.rule", "ops.*.layout", "ops.*.limits", "ops.*.attention"],
    [
        "ops.validate",
        "ops.skinny_triton",
        "ops.norm_triton",
        "ops.sum_triton",
        "ops.*.up",
        "ops.*.tiles_triton",
    ],
    ["ops.norm"],
    ["ops.*_triton"],
    ["ops.*.reference", "ops.*.triton", "ops.*.native", "ops.*.choice"],
    ["ops.*.contract"],
    ["ops.*.api"],
    ["ops.*"],
    ["ops"],
    ["adapters.config", "adapters.timestep", "adapters.reruns"],
    ["adapters.bottleneck"],
    ["adapters.*"],
    ["adapters"],
    ["bank", "captured", "forwards", "stack", "whereabouts"],
    ["placements"],
    ["projection"],
    ["conversion"],
    ["tree"],
    ["attention_weights"],
    ["merging", "per_sample", "report", "switch", "timesteps"],
    ["processors.clock", "processors.engines", "processors.qkv"],
    ["processors.family"],
    ["processors.flux", "processors.unet"],
    ["processors.*"],
    ["processors"],
    ["attention"],
    ["planning"],
    ["inject"],
    ["adapter_file"],
    ["hub", "peft_file"],
    ["fingerprint"],
    ["peft.config", "peft.layer"],
    ["peft.model"],
    ["peft"],
    ["export", "storage"],
    ["memory.account", "memory.fakes", "memory.operators", "memory.packed", "memory.places"],
    ["memory.saved", "memory.models", "memory.methods"],
    ["memory.peak"],
    ["lean.swapping", "lean.forgetful"],
    ["lean.rebuild", "lean.compiled", "lean.feed_forward", "lean.report"],
    ["lean.modulated", "lean.aside", "lean.silu_gate"],
    ["lean.*"],
    ["lean.rules"],
    ["lean.budget"],
    ["lean"],
    ["memory.levels"],
    ["memory.plan"],
    ["memory"],
    ["train.errors", "train.listener"],
    ["train.batches", "train.noise", "train.records", "train.settings"],
    ["train.images", "train.sources", "train.buckets", "train.cache", "train.split"],
    ["train.photos", "train.checkpoints", "train.optimizers", "train.packing", "train.run_files"],
    ["train.families.family"],
    ["train.families.latents", "train.families.unconditional"],
    ["train.families.*"],
    ["train.families"],
    ["train.closeness", "train.encoding", "train.monitor"],
    ["train.verdict"],
    ["train.drawing", "train.figures", "train.trainer"],
    ["train.card", "train.report"],
    ["train.dataset", "train.loop"],
    ["train.closing"],
    ["train.recipe", "train.sampling"],
    ["train"],
    ["study.methods", "study.glyphs", "study.bases", "study.features", "study.metrics"],
    ["study.statistics", "study.table"],
    ["study.views"],
    ["study.hypotheses"],
    ["study.plan", "study.subject"],
    ["study.pairs", "study.pretrained", "study.training"],
    ["study.figures", "study.notes", "study.ranking"],
    ["study.report", "study.run"],
    ["study.work"],
    ["study.conduct"],
    ["study"],
    ["cli", "cli.*"],
    [""],
    ["__main__"],
]

# importer, imported, why
EXCEPTIONS = [
    ("ops.adapter_linear.*", "ops.adapter.*", "adapter_linear is adapter, then the projection"),
    (
        "ops.cross_attention_adapter.*",
        "ops.adapter_linear*",
        "it is attention, then adapter_linear; where its kernels cannot run, literally",
    ),
    ("ops.*.contract", "ops.quantize*", "what an op keeps for its backward may be held in 8 bits"),
    ("ops.norm", "ops.quantize*", "the same, for the two normalisations together"),
    ("adapters.config", "adapters", "the table of designs, read when a config is checked"),
    ("lean*", "memory", "the ledger's files are in that package, below lean"),
    ("cli*", "cli.*", "the command line is one unit"),
    ("cli*", "", "the command line is a user of the public names"),
]

# op: its modules beside those that every op has
BESIDE = {
    "adapter_linear": ["choice", "fused_triton", "up", "up_triton"],
    "cross_attention_adapter": ["attention", "backward_triton", "limits", "tiles_triton"],
    "quantize": ["layout"],
}
# ops without kernels in the compiled library: `native` computes them of other ops
COMPOSED = {"cross_attention_adapter"}
# ops that are a rule around PyTorch's own operator on every device
LIBRARY = {"frozen_conv"}
# op: its schemas in csrc/ops.cpp, where they are not <op>_forward and <op>_backward
SCHEMAS = {
    "adapter_bank": ("adapter_bank_forward(",),
    "quantize": ("quantize(", "dequantize("),
}

# a third-party package may be imported in these modules alone
HOMES = {
    "triton": ["*triton", "triton_support"],
    "diffusers": ["processors*", "inject", "lean*", "memory.models", "train*", "study*", "cli*"],
    "peft": ["memory.methods", "peft*", "study.methods", "cli*"],
    "xformers": ["backends", "processors*"],
    "flash_attn_interface": ["backends", "processors*"],
    "safetensors": ["adapter_file", "peft_file", "train*", "study*", "cli*"],
    "rich": ["cli*"],
    "matplotlib": ["train*", "study*", "cli*"],
    "sklearn": ["study.pairs", "cli*"],
    "scipy": ["study.figures", "study.statistics"],
    "numpy": ["train*", "study*", "cli*"],
    "PIL": ["train*", "study*", "cli.sample"],
    "datasets": ["train.sources"],
    "transformers": ["train*"],
    "huggingface_hub": ["hub", "train*"],
    "yaml": ["train*"],
    "accelerate": ["train.recipe", "train.sampling", "train.closing"],
    "bitsandbytes": ["train.packing"],
    "torch": ["*"],
}


def module_name(path: Path) -> str:
    """`ops.adapter.api` for a3fta_kernels/ops/adapter/api.py, "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
OPS = sorted(path.parent.name for path in PACKAGE.glob("ops/*/api.py"))


def package_of(name: str) -> list[str]:
    parts = name.split(".") if name else []
    return parts if FILES[name].name == "__init__.py" else parts[:-1]


def imports(name: str) -> Iterator[str]:
    """Absolute names of what the module imports, wherever in the file it does so."""
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = package_of(name)
            base = here[: len(here) - node.level + 1] if node.level else []
            prefix = ["a3fta_kernels", *base] if node.level else []
            source = ".".join(prefix + (node.module.split(".") if node.module else []))
            for alias in node.names:
                inner = f"{source}.{alias.name}".removeprefix("a3fta_kernels.")
                is_module = source.startswith("a3fta_kernels") and inner in FILES
                yield f"{source}.{alias.name}" if is_module else source


def own_imports(name: str) -> set[str]:
    found = {x for x in imports(name) if x.split(".")[0] == "a3fta_kernels"}
    return {x.removeprefix("a3fta_kernels").removeprefix(".") for x in found}


def layer(name: str) -> int:
    found = [i for i, patterns in enumerate(LAYERS) if any(fnmatch(name, p) for p in patterns)]
    exact = [i for i, patterns in enumerate(LAYERS) if name in patterns]
    assert found or exact, f"{name} has no place: give it one in LAYERS and in CONTRIBUTING.md"
    return (exact or found)[0]


def is_exception(importer: str, imported: str) -> bool:
    return any(fnmatch(importer, a) and fnmatch(imported, b) for a, b, _ in EXCEPTIONS)


def op_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "ops" and len(parts) > 1 and parts[1] in OPS else None


@pytest.mark.parametrize("name", [name for name in FILES if name])
def test_imports_point_down(name):
    for target in own_imports(name) - {name}:
        if is_exception(name, target):
            continue
        assert layer(target) < layer(name), f"{name} imports {target}, which is not below it"
        if op_of(name) and op_of(target):
            assert op_of(name) == op_of(target), f"{name} imports {target}, of another op"


@pytest.mark.parametrize("name", FILES)
def test_third_party_packages_stay_in_their_homes(name):
    for target in {x.split(".")[0] for x in imports(name)}:
        if target == "a3fta_kernels" or target in sys.stdlib_module_names:
            continue
        assert target in HOMES, f"{name} imports {target}, which no list of dependencies names"
        allowed = HOMES[target]
        assert any(fnmatch(name, p) for p in allowed), f"{target} in {name}, not in {allowed}"


def test_the_rules_catch_what_they_forbid(monkeypatch, tmp_path):
    planted = tmp_path / "reference.py"
    planted.write_text(
        "def f():\n    from ..adapter_linear import api\n    import triton.language\n"
    )
    monkeypatch.setitem(FILES, "ops.adapter.reference", planted)
    with pytest.raises(AssertionError, match=r"imports ops\.adapter_linear\.api, which is not"):
        test_imports_point_down("ops.adapter.reference")
    with pytest.raises(AssertionError, match=r"triton in ops\.adapter\.reference"):
        test_third_party_packages_stay_in_their_homes("ops.adapter.reference")


@pytest.mark.parametrize("op", OPS)
def test_one_op_is_one_folder_one_test_one_bench(op):
    expected = ["__init__", "api", "contract", "reference", *BESIDE.get(op, [])]
    files = [f"tests/ops/test_{op}.py"]
    if op not in LIBRARY:
        expected.append("triton")
        files.append(f"benchmarks/bench_{op}.py")
    if op not in COMPOSED | LIBRARY:
        expected.append("native")
        files += [f"csrc/cpu/{op}.cpp", f"csrc/cuda/{op}.cu"]
        schemas = (ROOT / "csrc/ops.cpp").read_text()
        for name in SCHEMAS.get(op, (f"{op}_forward(", f"{op}_backward")):
            assert f'"{name}' in schemas
    found = sorted(path.stem for path in (PACKAGE / "ops" / op).glob("*.py"))
    assert found == sorted(expected)
    for path in files:
        assert (ROOT / path).is_file(), f"{path} is missing"
    assert op in a3fta_kernels.ops.__all__


def test_every_bench_names_an_op():
    benches = {path.stem.removeprefix("bench_") for path in ROOT.glob("benchmarks/bench_*.py")}
    # a block of a model is no op: it shows what the ops gain where they are used; a whole step,
    # the largest batch and a call of an adapted denoiser are no benches of run.py
    benches -= {"step", "largest", "inference"}
    assert benches == {*OPS, "cross_attention_adapter", "block"} - LIBRARY == set(BENCHES)


def test_every_design_is_in_its_table():
    from a3fta_kernels.adapters import DESIGNS

    files = {name for name in FILES if name.startswith("adapters.")} - {
        "adapters.config",
        "adapters.timestep",
        "adapters.reruns",
    }
    homes = {cls.__module__.removeprefix("a3fta_kernels.") for cls in DESIGNS.values()}
    assert homes == files


def test_every_family_is_in_its_table():
    from a3fta_kernels.processors import FAMILIES, Family

    shared = {f"processors.{name}" for name in ("clock", "engines", "family", "qkv")}
    files = {name for name in FILES if name.startswith("processors.")} - shared
    rows: set[str] = set()
    for name in files:
        module = import_module(f"a3fta_kernels.{name}")
        own = [value for value in vars(module).values() if isinstance(value, Family)]
        own += getattr(module, "FAMILIES", ())
        assert own, name
        rows |= {row.name for row in own}
    assert rows == set(FAMILIES)


def test_every_lean_module_is_in_its_table():
    from a3fta_kernels.lean import rules
    from a3fta_kernels.lean.swapping import LeanModule

    def below(cls: type) -> set[type]:
        return {cls}.union(*(below(child) for child in cls.__subclasses__()))

    leaves = {cls for cls in below(LeanModule) if not cls.__subclasses__()}
    assert leaves == {rule.lean for rule in rules.RULES}
    assert len({rule.stock for rule in rules.RULES}) == len(rules.RULES)
    for rule in rules.RULES:
        assert issubclass(rule.lean, rule.stock) and rule.lean.__module__ != rules.__name__


FOLDERS = ("a3fta_kernels", "tests", "benchmarks", "examples", "scripts", "csrc")


def sources() -> list[Path]:
    suffixes = {".py", ".cpp", ".cu", ".h", ".cuh"}
    inside = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    return sorted(path for path in [*inside, *ROOT.glob("*.py")] if path.suffix in suffixes)


def test_no_file_outgrows_a_reader():
    long = {
        str(p.relative_to(ROOT)): n for p in sources() if (n := len(p.open().readlines())) > 450
    }
    assert not long, f"over 450 lines, find a seam: {long}"


def test_the_floor_plan_names_every_file_at_the_top_of_the_package():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    plan = page[page.index("## Floor plan") : page.index("## Import arrows")]
    names = {path.name for path in PACKAGE.glob("*.py") if not path.name.startswith("__")}
    assert {name for name in names if name not in plan} == set()
