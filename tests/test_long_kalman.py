"""A series of a million steps with Gaussian states: against the textbook's scalar filter, in memory that is O(T)."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import resource, torch, pyro_em
from tests.loop_chains import local_level
torch.set_default_dtype(torch.float64)
generator = torch.Generator().manual_seed(0)
y = 0.3 * torch.randn(10**6, generator=generator).cumsum(0) + torch.randn(10**6, generator=generator)
pyro_em.fit(local_level, y[:100], max_iter=8, tol=0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = pyro_em.fit(local_level, y, init={"q": torch.tensor(0.3), "r": torch.tensor(1.0)}, max_iter=8, tol=0)
bytes_a_step = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / len(y)
m, P, total, q, r = 1.0, 4.0, [], 0.09, 1.0
for t, value in enumerate(y.tolist()):
    if t:
        P += q
    S = P + r
    total.append(-0.5 * (value - m) ** 2 / S - 0.5 * math.log(2 * math.pi * S))
    K = P / S
    m, P = m + K * (value - m), (1 - K) * P
print(result.history["log_likelihood"][0], math.fsum(total), bytes_a_step)
"""


def test_a_million_steps() -> None:
    """Log-likelihood to 1e-11; less than 1.5 kB a step at the peak, the tracing of the model included."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "import math\n" + SCRIPT], capture_output=True, text=True, env=environment, check=True
    )
    found, truth, bytes_a_step = map(float, done.stdout.split())
    assert math.isclose(found, truth, rel_tol=1e-11)
    assert bytes_a_step < 1500
