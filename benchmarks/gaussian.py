"""Gaussian latents against scikit-learn and statsmodels, whole fits: data, contenders, workloads.

Crossed effects are in statsmodels the variance components of one group of all rows: it forms products with the dense
indicators of all levels at every evaluation, and its time grows with about their cube.

scikit-learn's FactorAnalysis makes one singular value decomposition of the data an iteration, and stops when the
log-likelihood grows by less than 1e-6 (its default, 0.01, ends up to a tenth of a nat short); statsmodels' MixedLM
maximises the profile likelihood by its own optimisers. Letters: rows N, features D, factors L, groups G.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

import pyro_em
from benchmarks.harness import LogLikelihood
from benchmarks.paired import OURS
from benchmarks.whole import Whole, WholeFit
from models import factor_analysis, linear_mixed

LOOK = 2000  # rows that the start is taken from


@dataclass(frozen=True)
class Factors:
    """Rows and the number of factors."""

    data: Tensor
    size: int


@dataclass(frozen=True)
class Groups:
    """y on x with random intercepts and slopes of groups: (N,) each."""

    x: Tensor
    group: Tensor
    y: Tensor


@dataclass(frozen=True)
class Crossed:
    """y with random intercepts of two crossed factors: levels of each (N,), y (N,)."""

    first: Tensor
    second: Tensor
    y: Tensor

    @property
    def levels(self) -> tuple[int, int]:
        return int(self.first.max()) + 1, int(self.second.max()) + 1


def crossed(first: int, second: int, rows: int) -> Crossed:
    """Rows at random pairs of levels, every level at least once."""
    g = torch.Generator().manual_seed(0)
    codes = []
    for size in (first, second):
        code = torch.randint(size, (rows,), generator=g)
        code[torch.randperm(rows, generator=g)[:size]] = torch.arange(size)
        codes.append(code)
    a, c = (torch.randn(size, generator=g, dtype=torch.float64) for size in (first, second))
    noise = torch.randn(rows, generator=g, dtype=torch.float64)
    return Crossed(codes[0], codes[1], 1 + a[codes[0]] + 0.7 * c[codes[1]] + 0.5 * noise)


def factors(rows: int, features: int, size: int) -> Factors:
    """Standard normal factors, random loadings, noise of standard deviation ½."""
    return Factors(factor_analysis.simulate(rows, features, size), size)


def groups(number: int, rows: int) -> Groups:
    """Balanced, but with covariates that differ from group to group: G different designs."""
    g = torch.Generator().manual_seed(0)

    def normal(size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    group, x = torch.arange(number).repeat_interleave(rows), normal(number * rows)
    y = 1 + normal(number)[group] + (0.5 + 0.3 * normal(number))[group] * x + 0.5 * normal(number * rows)
    return Groups(x, group, y)


def analysis(data: Tensor, size: int) -> None:
    """Factor analysis; start: principal components of the first rows."""
    few = data[:LOOK]

    def principal() -> Tensor:
        values, vectors = torch.linalg.eigh(few.T.cov())
        return vectors[:, -size:] * (values[-size:] / 2).sqrt()

    loading = pyro.param("loading", principal)
    mean = pyro.param("mean", lambda: few.mean(0))
    scale = pyro.param("scale", lambda: few.std(0) / 2, constraint=constraints.positive)
    with pyro.plate("rows", len(data)):
        z = pyro.sample("z", dist.Normal(torch.zeros(size).to(data), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ loading.T + mean, scale).to_event(1), obs=data)


def our_factors(problem: Factors) -> WholeFit:
    """`pyro_em.fit`, accelerated, to its default tolerance."""

    def fit() -> LogLikelihood:
        return _found(
            pyro_em.fit(analysis, problem.data, problem.size, accelerate="anderson", max_iter=1000, progress=False)
        )

    return fit


def scikit_learn(problem: Factors) -> WholeFit:
    """The exact decomposition, as both are to reach the same maximum."""
    from sklearn.decomposition import FactorAnalysis

    data = problem.data.numpy()

    def fit() -> LogLikelihood:
        found = FactorAnalysis(problem.size, svd_method="lapack", tol=1e-6).fit(data)
        return lambda: float(found.loglike_[-1])

    return fit


def our_groups(problem: Groups) -> WholeFit:
    """`pyro_em.fit` on `linear_mixed.slopes`, accelerated, to its default tolerance."""

    def fit() -> LogLikelihood:
        return _found(
            pyro_em.fit(linear_mixed.slopes, problem.x, problem.group, problem.y, accelerate="anderson", progress=False)
        )

    return fit


def statsmodels(problem: Groups) -> WholeFit:
    """Maximum likelihood, not its restricted form."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from statsmodels.regression.mixed_linear_model import MixedLM
    y, group = problem.y.numpy(), problem.group.numpy()
    design = np.column_stack([np.ones(len(y)), problem.x.numpy()])

    def fit() -> LogLikelihood:
        with warnings.catch_warnings():  # about its own optimisers
            warnings.simplefilter("ignore")
            found = MixedLM(y, design, group, exog_re=design).fit(reml=False)
        return lambda: float(found.llf)

    return fit


def our_crossed(problem: Crossed) -> WholeFit:
    """`pyro_em.fit` on `linear_mixed.crossed`, accelerated, to its default tolerance."""

    def fit() -> LogLikelihood:
        args = problem.first, problem.second, problem.y
        return _found(pyro_em.fit(linear_mixed.crossed, *args, accelerate="anderson", progress=False))

    return fit


def variance_components(problem: Crossed) -> WholeFit:
    """statsmodels' MixedLM with one group, whose variance components are the two factors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from statsmodels.regression.mixed_linear_model import MixedLM, VCSpec
    y, ones = problem.y.numpy(), np.ones(len(problem.y))
    codes = problem.first.numpy(), problem.second.numpy()
    columns = [[f"{name}{i}" for i in range(size)] for name, size in zip("ac", problem.levels, strict=True)]

    def fit() -> LogLikelihood:
        tables = [np.eye(size)[code] for size, code in zip(problem.levels, codes, strict=True)]
        parts = VCSpec(["a", "c"], [[own] for own in columns], [[own] for own in tables])
        with warnings.catch_warnings():  # about its own optimisers
            warnings.simplefilter("ignore")
            found = MixedLM(y, ones[:, None], groups=ones, exog_vc=parts).fit(reml=False)
        return lambda: float(found.llf)

    return fit


def _found(result: pyro_em.FitResult) -> LogLikelihood:
    assert result.converged
    found = result.log_likelihood
    assert found is not None
    return lambda: found


WORKLOADS = (
    Whole(
        "C1",
        "Factor analysis, N=100,000 D=50 L=5",
        lambda tiny: factors(*((400, 6, 2) if tiny else (100_000, 50, 5))),
        {OURS: our_factors, "scikit-learn": scikit_learn},
        {"scikit-learn": 50.0},
        gap=0.01,
    ),
    Whole(
        "LMM",
        "Random intercepts and slopes, 1,000 groups x 50 rows",
        lambda tiny: groups(*((30, 8) if tiny else (1000, 50))),
        {OURS: our_groups, "statsmodels": statsmodels},
        {"statsmodels": 5.0},
        gap=0.01,
    ),
    Whole(
        "LMM-crossed",
        "Crossed random intercepts, 200 x 20 levels, 4,000 rows",
        lambda tiny: crossed(*((12, 5, 80) if tiny else (200, 20, 4000))),
        {OURS: our_crossed, "statsmodels": variance_components},
        {"statsmodels": 5.0},
        gap=0.01,
    ),
)
