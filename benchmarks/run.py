"""The op benchmarks in one command: `python benchmarks/run.py [--quick] [--device cpu|cuda]`.

Runs the pytest-benchmark files, writes results/<device>.json (environment, ceilings, one row per
bench, workload, dtype, direction and variant) and prints a table; --quick writes
results/<device>-quick.json. Rows of the file that were not measured again stay, if they are of the
same device, and say of which commit they are. Rows of a run that was killed lie in
results/<device>.rows: the next run takes them over, or `--collect` alone. Exit status is not zero
when a variant was wrong or did not run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import measure  # noqa: E402
from benchmarks.workloads import BENCHES  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few workloads, few rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--only", choices=BENCHES, help="this bench alone")
    parser.add_argument("--rank", type=int, help="workloads of this rank alone")
    parser.add_argument("--without", default="", help="a pattern of variants to leave out")
    parser.add_argument("--collect", action="store_true", help="only take over a killed run's rows")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no group after this")
    parser.add_argument("--threads", type=int, help="of the CPU (default: PyTorch's)")
    parser.add_argument("--commit", default="", help="named in the results where git is not there")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks: --device cuda, but no GPU is usable here", file=sys.stderr)
        return 2

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    about = measure.environment(device) | {"quick": arguments.quick}
    about |= {"commit": arguments.commit} if arguments.commit else {}
    if about["load"] > 0.5 and device.type == "cpu":
        print(f"benchmarks: other work runs here (load {about['load']}): expect noise, run again")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{measure.file_stem(device)}{'-quick' * arguments.quick}.json"
    if collect(path) is not None:
        print(f"{path.name}: took over the rows of a run that did not end")
    if arguments.collect:
        return 0
    rows = path.with_suffix(".rows").resolve()
    rows.write_text(json.dumps({"environment": about}) + "\n")
    status = run_pytest(arguments, device, rows)
    found = collect(path)
    if found is None:
        print("benchmarks: nothing was measured", file=sys.stderr)
        return status or 1
    print_table(found)
    print(f"\nwritten: {path}")
    return status


def run_pytest(arguments: argparse.Namespace, device: torch.device, rows: Path) -> int:
    only = (arguments.only,) if arguments.only else BENCHES
    command = [
        sys.executable, "-m", "pytest", "-q", "--no-header", "-o", "addopts=", "-rs",
        "-p", "no:cacheprovider", "--tb=short", "--benchmark-columns=median,iqr,rounds",
        f"--bench-device={device.type}", f"--bench-rows={rows}",
        f"--bench-minutes={arguments.minutes}", f"--bench-without={arguments.without}",
        *([f"--bench-rank={arguments.rank}"] if arguments.rank else []),
        *(["--bench-quick"] * arguments.quick), f"--bench-threads={torch.get_num_threads()}",
        *(f"benchmarks/bench_{op}.py" for op in only),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def collect(path: Path) -> dict[str, Any] | None:
    """Moves the rows of a run from its file into the results; None where there are none."""
    rows = path.with_suffix(".rows")
    if not rows.exists():
        return None
    # the last line of a run that was killed may be cut
    head, *lines = [line for line in rows.read_text().splitlines() if line.endswith("}")]
    found = None
    if lines:
        parts = [json.loads(line) for line in lines]
        found = {
            **json.loads(head),
            "ceilings": parts[0]["ceilings"],
            "rows": ratios([part["row"] for part in parts]),
        }
        write(path, merged(path, found))
    rows.unlink()
    return found


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds, per row, how many times faster than eager it is, and floor / time."""
    eager = {_key(r): r["q50_us"] for r in rows if r["variant"] == "eager"}
    for row in rows:
        row["x_eager"] = eager[_key(row)] / row["q50_us"] if _key(row) in eager else None
        if "floor_us" in row:
            row["of_floor"] = row["floor_us"] / row["q50_us"]
    return rows


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[k] for k in ("op", "workload", "dtype", "direction"))


def merged(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Rows of the same device that were not measured now stay, each with its commit; of another
    commit whole groups, since what is compared is of one loop."""
    commit = found["environment"]["commit"]
    for row in found["rows"]:
        row["commit"] = commit
    if not path.exists():
        return found
    before = json.loads(path.read_text())
    same = ("device", "torch", "triton", "quick")
    if any(before["environment"].get(k) != found["environment"].get(k) for k in same):
        print(f"{path.name} is of another device, torch or Triton: its rows are dropped")
        return found
    measured = {_key(row) for row in found["rows"]}
    old = [{"commit": before["environment"]["commit"], **row} for row in before["rows"]]
    old = [row for row in old if row["commit"] == commit or _key(row) not in measured]
    # dictionaries keep the first place of a key, and the last value
    rows = {(*_key(r), r["variant"]): r for r in (*old, *found["rows"])}
    return found | {"rows": sorted(rows.values(), key=lambda r: BENCHES.index(r["op"]))}


def write(path: Path, found: dict[str, Any]) -> None:
    def short(x: Any) -> Any:
        if isinstance(x, float):
            return float(f"{x:.4g}")
        if isinstance(x, dict):
            return {k: short(v) for k, v in x.items()}
        return x

    head = {k: short(v) for k, v in found.items() if k != "rows"}
    lines = ",\n".join(f"    {json.dumps(short(row))}" for row in found["rows"])
    text = json.dumps(head, indent=2).removesuffix("\n}") + f',\n  "rows": [\n{lines}\n  ]\n}}\n'
    partial = path.with_suffix(".part")
    partial.write_text(text)
    partial.replace(path)


def print_table(found: dict[str, Any]) -> None:
    about = found["environment"]
    print(f"\n{about['device']}, torch {about['torch']}, commit {about['commit']}")
    print(", ".join(f"{k} {v:.3g}" for k, v in found["ceilings"].items()))
    group = None
    for row in found["rows"]:
        if _key(row) != group:
            group = _key(row)
            print(f"\n{row['op']} {row['workload']} {row['dtype']} {row['direction']}")
        notes = [f"{row['x_eager']:.2f}x eager"] if row["x_eager"] else []
        if "of_floor" in row:
            notes.append(f"{row['of_floor']:.0%} of the floor {row['floor_us']:.0f} us")
        notes += [f"{v} {k}" for k, v in row.get("counts", {}).items()]
        if "host_us" in row:
            notes.append(f"{row['host_us']:.0f} us with launches")
            notes.append(f"CPU {row['enqueue_us']:.0f} us")
        if "saved_bytes" in row:
            notes.append(f"saves {row['saved_bytes'] / 2**20:.1f} MiB")
        if row["peak_bytes"] is not None:
            notes.append(f"peak {row['peak_bytes'] / 2**20:.1f} MiB")
        print(
            f"  {row['variant']:16s} {row['q50_us']:10.1f} us [{row['q20_us']:.1f}, "
            f"{row['q80_us']:.1f}]  {', '.join(notes)}"
        )


if __name__ == "__main__":
    sys.exit(main())
