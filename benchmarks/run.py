"""Run workloads, store their records, print the table.

    python -m benchmarks.run                      all
    python -m benchmarks.run A1 small --rounds 7  some
    python -m benchmarks.run --tiny               all, shrunk to a smoke test whose figures mean nothing

Every call of a workload is a process of its own, with the number of threads set before anything is imported.
Records go to benchmarks/results/NAME.json (with --tiny nowhere, unless --out says where).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.harness import Record
from benchmarks.machine import environment
from benchmarks.report import table
from benchmarks.workload import Workload
from benchmarks.workloads import WORKLOADS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def run(workload: Workload, rounds: int, threads: int = 1, tiny: bool = False) -> Record:
    """The record of a workload, with the machine of its first process."""
    machines: list[Record] = []

    def spawn(call: str, **arguments: Any) -> Record:
        request = {
            "workload": workload.name, "call": call, "arguments": arguments, "tiny": tiny, "threads": threads,
            "anchors": not machines,
        }  # fmt: skip
        answer = _child(request, threads)
        machines.append(answer.pop("machine"))
        return answer

    record = workload.collect(spawn, rounds)
    loads = [value for machine in machines for value in machine["load"] if value is not None]
    return {
        "workload": workload.name,
        "title": workload.title,
        "tiny": tiny,
        "rounds": rounds,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        **record,
        "machine": {**machines[0], "load": [min(loads), max(loads)] if loads else None},
    }


def _child(request: Record, threads: int) -> Record:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.child", json.dumps(request), str(target)]
        done = subprocess.run(command, cwd=ROOT, env=environment(threads), capture_output=True, text=True)
        if done.returncode:
            asked = f"{request['workload']}: {request['call']} {request['arguments']}"
            raise RuntimeError(f"{asked} failed:\n{done.stderr[-3000:]}")
        return json.loads(target.read_text())


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; by default that of this process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Time pyro_em against its peers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(WORKLOADS)}; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds (default 5)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a smoke test")
    parser.add_argument("--out", type=Path, help=f"folder for the records (default {RESULTS.relative_to(ROOT)})")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in WORKLOADS]
    if unknown:
        parser.error(f"there is no workload {unknown[0]!r}. Names: {', '.join(WORKLOADS)}.")
    folder = options.out or (None if options.tiny else RESULTS)
    records, failed = [], []
    for name in options.names or WORKLOADS:
        print(f"{name}: {WORKLOADS[name].title} ...", file=sys.stderr, flush=True)
        try:
            record = run(WORKLOADS[name], options.rounds, options.threads, options.tiny)
        except RuntimeError as error:  # the others are still worth having
            print(error, file=sys.stderr)
            failed.append(name)
            continue
        records.append(record)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(table(records))
    if failed:
        sys.exit(f"Failed, and so not in the table: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
