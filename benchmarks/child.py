"""One call of one workload in this process: what run.py starts. Not for hand use.

    python -m benchmarks.child '{"workload": ..., "call": ..., "arguments": {...}, "tiny": ..., "threads": ...}' FILE

The thread variables are in the environment already, as libraries read them when they are imported. The answer
goes to FILE as JSON, with the machine, the anchors and the load before and after, as peers print to stdout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.workloads import WORKLOADS


def main(request: str, target: str) -> None:
    """Perform the call and write its answer."""
    asked = json.loads(request)
    workload = WORKLOADS[asked["workload"]]
    if asked["call"] not in workload.calls:
        raise ValueError(f"{asked['call']!r} is no call of workload {workload.name}: {workload.calls}.")
    torch.set_default_dtype(torch.float64)
    machine.set_threads(asked["threads"])
    before = machine.load()
    anchors = machine.anchors() if asked["anchors"] else None
    answer = getattr(workload, asked["call"])(**asked["arguments"], tiny=asked["tiny"])
    answer["machine"] = {**machine.describe(), "anchors": anchors, "load": [before, machine.load()]}
    if answer["machine"]["threads"] != asked["threads"]:
        raise RuntimeError(f"A peer has changed the number of threads to {answer['machine']['threads']}.")
    Path(target).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
