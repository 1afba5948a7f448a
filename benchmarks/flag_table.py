"""The same mixture by every algorithm: the table in README.md, as Markdown on stdout.

One model text (`gmm.bayesian`, Old Faithful), one start for all. The priors count under map-em and svi, so
objectives compare within {em, gem} and within {map-em, svi}.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `models`, which is never installed

import pyro_em  # noqa: E402
from models import gmm  # noqa: E402

RUNS = (
    ("em", {}),
    ("gem", {}),
    ("map-em", {}),
    ("svi", {"max_iter": 2000}),
)
START = {
    "weights": torch.tensor([0.5, 0.5], dtype=torch.float64),
    "loc": torch.tensor([[2.5, 60.0], [4.0, 75.0]], dtype=torch.float64),
    "variance": torch.tensor([[0.5, 60.0], [0.5, 60.0]], dtype=torch.float64),
}


def main() -> None:
    """Fit with each, print one row for each."""
    torch.set_default_dtype(torch.float64)
    data = gmm.load()
    print("| algorithm | climbs | objective reached | log-likelihood | exact? | iterations | seconds | ended |")
    print("|---|---|---|---|---|---|---|---|")
    pyro_em.fit(gmm.bayesian, data, algorithm="em", init=START, max_iter=1)  # imports and caches are not timed
    for algorithm, options in RUNS:
        began = time.perf_counter()
        result = pyro_em.fit(gmm.bayesian, data, algorithm=algorithm, init=START, seed=0, **options)
        seconds = time.perf_counter() - began
        cells = (
            f"`{algorithm}`",
            result.plan.objective.replace("|", "\\|"),
            f"{result.history['objective'][-1]:.6f}",
            "" if result.log_likelihood is None else f"{result.log_likelihood:.6f}",
            "yes" if result.exact else "no (ELBO)",
            str(result.num_iterations),
            f"{seconds:.2f}",
            result.outcome.name.replace("_", " "),
        )
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
