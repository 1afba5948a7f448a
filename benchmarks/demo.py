"""One data set, three inferences: Old Faithful by em, map-em and svi. This is what `make demo` runs.

Prints the plan, a progress bar and the summary of each, writes a NetCDF file and a picture of each to demo/,
and says where. The three models are one mixture of two Gaussians; under map-em and svi it has priors.
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
from pyro_em.arviz import to_datatree  # noqa: E402
from pyro_em.files import replacing  # noqa: E402

RUNS = (
    ("em", gmm.model, {"restarts": 5}),
    ("map-em", gmm.bayesian, {"restarts": 5}),
    ("svi", gmm.bayesian, {"max_iter": 500, "init": "kmeans++"}),
)


def main() -> None:
    """Fit, print, write."""
    torch.set_default_dtype(torch.float64)
    data = gmm.load()
    folder = ROOT / "demo"
    folder.mkdir(exist_ok=True)
    written = []
    for algorithm, model, options in RUNS:
        print(f"\n=== pyro_em.fit(gmm.{model.__name__}, data, algorithm={algorithm!r}) ===\n")
        print(pyro_em.plan(model, data, algorithm=algorithm), "\n", flush=True)
        began = time.perf_counter()
        result = pyro_em.fit(model, data, algorithm=algorithm, seed=0, progress=True, **options)
        print(result.summary())
        print(f"\n{time.perf_counter() - began:.1f} s")
        with replacing(folder / f"{algorithm}.nc") as path:
            to_datatree(result).to_netcdf(path, engine="h5netcdf")
        with replacing(folder / f"{algorithm}.png") as path:
            result.plot().savefig(path, format="png", dpi=150)
        written += [folder / f"{algorithm}.nc", folder / f"{algorithm}.png"]
    print("\nWritten:", *(f"  {path}" for path in written), sep="\n")
    print(f"\nRead one again with: python -m pyro_em summary {written[0]}")


if __name__ == "__main__":
    main()
