"""The table of families, each once with random arguments, and what a law needs to run over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from scipy.optimize import minimize
from torch import Tensor

from pyro_em.distributions import InverseWishart
from pyro_em.families import FAMILIES, Family

CELLS, ROWS, SIZE = 2, 30, 3

Arguments = dict[str, Tensor]


def positive(*shape: int) -> Tensor:
    return 0.5 + torch.rand(shape) * 2


def spd(*shape: int) -> Tensor:
    root = torch.randn(*shape, SIZE, SIZE + 3)
    return root @ root.mT / SIZE + 0.2 * torch.eye(SIZE)


def probability(*shape: int) -> Tensor:
    return 0.1 + 0.8 * torch.rand(shape)


def row(*shape: int) -> Tensor:
    return torch.distributions.Dirichlet(torch.full((SIZE,), 2.0)).sample(shape)


# Each row: distribution class, random arguments over cells.
CASES: dict[str, tuple[type, Callable[[], Arguments]]] = {
    "Bernoulli(probs)": (dist.Bernoulli, lambda: {"probs": probability(CELLS)}),
    "Bernoulli(logits)": (dist.Bernoulli, lambda: {"logits": torch.randn(CELLS)}),
    "Binomial(probs)": (
        dist.Binomial,
        lambda: {"total_count": torch.tensor(7.0), "probs": probability(CELLS)},
    ),
    "Binomial(logits)": (
        dist.Binomial,
        lambda: {"total_count": torch.tensor(7.0), "logits": torch.randn(CELLS)},
    ),
    "Geometric(probs)": (dist.Geometric, lambda: {"probs": probability(CELLS)}),
    "Geometric(logits)": (dist.Geometric, lambda: {"logits": torch.randn(CELLS)}),
    "NegativeBinomial(probs)": (
        dist.NegativeBinomial,
        lambda: {"total_count": torch.tensor(2.5), "probs": probability(CELLS)},
    ),
    "NegativeBinomial(logits)": (
        dist.NegativeBinomial,
        lambda: {"total_count": torch.tensor(2.5), "logits": torch.randn(CELLS)},
    ),
    "Categorical(probs)": (dist.Categorical, lambda: {"probs": row(CELLS)}),
    "Categorical(logits)": (dist.Categorical, lambda: {"logits": torch.randn(CELLS, SIZE)}),
    "OneHotCategorical(probs)": (dist.OneHotCategorical, lambda: {"probs": row(CELLS)}),
    "OneHotCategorical(logits)": (dist.OneHotCategorical, lambda: {"logits": torch.randn(CELLS, SIZE)}),
    "Multinomial(probs)": (dist.Multinomial, lambda: {"probs": row(CELLS)}),
    "Multinomial(logits)": (dist.Multinomial, lambda: {"logits": torch.randn(CELLS, SIZE)}),
    "OrderedLogistic": (
        dist.OrderedLogistic,
        lambda: {"predictor": torch.randn(CELLS), "cutpoints": positive(CELLS, SIZE).cumsum(-1) - 2},
    ),
    "Poisson": (dist.Poisson, lambda: {"rate": positive(CELLS)}),
    "Exponential": (dist.Exponential, lambda: {"rate": positive(CELLS)}),
    "Gamma": (dist.Gamma, lambda: {"concentration": positive(CELLS) + 1, "rate": positive(CELLS)}),
    "InverseGamma": (
        dist.InverseGamma,
        lambda: {"concentration": positive(CELLS) + 1, "rate": positive(CELLS)},
    ),
    "Normal": (dist.Normal, lambda: {"loc": torch.randn(CELLS), "scale": positive(CELLS)}),
    "LogNormal": (dist.LogNormal, lambda: {"loc": torch.randn(CELLS), "scale": positive(CELLS)}),
    "HalfCauchy": (dist.HalfCauchy, lambda: {"scale": positive(CELLS)}),
    "Laplace": (dist.Laplace, lambda: {"loc": torch.randn(CELLS), "scale": positive(CELLS)}),
    "StudentT": (
        dist.StudentT,
        lambda: {"df": 1 + positive(CELLS), "loc": torch.randn(CELLS), "scale": positive(CELLS)},
    ),
    "MultivariateStudentT": (
        dist.MultivariateStudentT,
        lambda: {
            "df": 1 + positive(CELLS),
            "loc": torch.randn(CELLS, SIZE),
            "scale_tril": torch.linalg.cholesky(spd(CELLS)),
        },
    ),
    "Cauchy": (dist.Cauchy, lambda: {"loc": torch.randn(CELLS), "scale": positive(CELLS)}),
    "HalfNormal": (dist.HalfNormal, lambda: {"scale": positive(CELLS)}),
    "MultivariateNormal(covariance_matrix)": (
        dist.MultivariateNormal,
        lambda: {"loc": torch.randn(CELLS, SIZE), "covariance_matrix": spd(CELLS)},
    ),
    "MultivariateNormal(scale_tril)": (
        dist.MultivariateNormal,
        lambda: {"loc": torch.randn(CELLS, SIZE), "scale_tril": torch.linalg.cholesky(spd(CELLS))},
    ),
    "MultivariateNormal(precision_matrix)": (
        dist.MultivariateNormal,
        lambda: {"loc": torch.randn(CELLS, SIZE), "precision_matrix": spd(CELLS)},
    ),
    "Beta": (
        dist.Beta,
        lambda: {"concentration1": positive(CELLS) + 1, "concentration0": positive(CELLS) + 1},
    ),
    "Dirichlet": (dist.Dirichlet, lambda: {"concentration": positive(CELLS, SIZE) + 1}),
    "GammaPoisson": (dist.GammaPoisson, lambda: {"concentration": positive(CELLS), "rate": positive(CELLS)}),
    "BetaBinomial": (
        dist.BetaBinomial,
        lambda: {
            "concentration1": positive(CELLS),
            "concentration0": positive(CELLS),
            "total_count": torch.tensor(5.0),
        },
    ),
    "ZeroInflatedPoisson(gate)": (
        dist.ZeroInflatedPoisson,
        lambda: {"rate": positive(CELLS), "gate": torch.sigmoid(torch.randn(CELLS))},
    ),
    "ZeroInflatedPoisson(gate_logits)": (
        dist.ZeroInflatedPoisson,
        lambda: {"rate": positive(CELLS), "gate_logits": torch.randn(CELLS)},
    ),
    "DirichletMultinomial": (dist.DirichletMultinomial, lambda: {"concentration": positive(CELLS, SIZE)}),
    "Uniform": (
        dist.Uniform,
        lambda: {"low": -positive(1).expand(CELLS), "high": 2 + positive(1).expand(CELLS)},
    ),
    "Weibull": (dist.Weibull, lambda: {"scale": positive(CELLS), "concentration": 1 + positive(CELLS)}),
    "VonMises": (dist.VonMises, lambda: {"loc": torch.randn(CELLS) / 4, "concentration": positive(CELLS)}),
    "InverseWishart": (InverseWishart, lambda: {"df": 5 + positive(CELLS), "scale_matrix": spd(CELLS)}),
    "Wishart(covariance_matrix)": (
        dist.Wishart,
        lambda: {"df": 5 + positive(CELLS), "covariance_matrix": spd(CELLS)},
    ),
    "Wishart(scale_tril)": (
        dist.Wishart,
        lambda: {"df": 5 + positive(CELLS), "scale_tril": torch.linalg.cholesky(spd(CELLS))},
    ),
    "Wishart(precision_matrix)": (
        dist.Wishart,
        lambda: {"df": 5 + positive(CELLS), "precision_matrix": spd(CELLS)},
    ),
}
CLOSED = [(name, a) for name, (cls, make) in CASES.items() for a in make() if a in FAMILIES[cls].closed]
VALUES = [name for name, (cls, _) in CASES.items() if cls in (
    dist.Exponential, dist.Gamma, dist.InverseGamma, dist.Normal, dist.HalfNormal, dist.MultivariateNormal,
    dist.Beta, dist.Dirichlet, dist.Uniform, InverseWishart, dist.Wishart,
    dist.LogNormal, dist.VonMises, dist.HalfCauchy, dist.Laplace, dist.StudentT, dist.Cauchy,
)]  # fmt: skip


def law(cls: type, args: Arguments) -> Any:
    extra = {"total_count": 4} if cls in (dist.Multinomial, dist.DirichletMultinomial) else {}
    return cls(**args, **extra)


def log_prob(cls: type, args: Arguments, value: Tensor) -> Tensor:
    """The distribution's own, but that torch approximates the Bessel function of a von Mises to seven digits."""
    if cls is dist.VonMises:
        kappa = args["concentration"]
        return kappa * (value - args["loc"]).cos() - (2 * torch.pi * torch.special.i0(kappa)).log()
    known: Tensor = law(cls, args).log_prob(value)
    return known


def draw(cls: type, args: Arguments, rows: int = ROWS) -> Tensor:
    """Values (rows,) + event of the first cell's distribution."""
    if cls is dist.Wishart:  # torch's sampler warns of singular draws that are none
        return spd(rows)
    value: Tensor = law(cls, args).sample((rows,))
    return value[:, 0]


PER_CELL = {dist.Laplace}  # its statistic is the distance from the location


def moments(family: Family, weights: Tensor, value: Tensor, args: Arguments, center: Any) -> list[Tensor]:
    """S₀ (CELLS,) and Σ_n w_nc T(x_n), (CELLS,) + event, for weights (rows, CELLS)."""
    if family.distribution in PER_CELL:
        distances = [statistic.dense() for statistic in family.statistics(value[:, None], args, center)]
        return [weights.sum(0), *((weights * t).sum(0) for t in distances)]
    dense = [statistic.dense() for statistic in family.statistics(value, args, center)]
    return [weights.sum(0), *(torch.tensordot(weights, t, dims=([0], [0])) for t in dense)]


def objective(family: Family, weights: Tensor, value: Tensor, args: Arguments) -> Tensor:
    """Σ w log p, shape (CELLS,)."""
    rowwise = value.reshape(value.shape[0], 1, *value.shape[1:])
    return (weights * family.log_prob(args, rowwise)).sum(0)


def constraint_of(cls: type, args: Arguments, argument: str) -> Any:
    return law(cls, args).arg_constraints[argument]


def maximise(function: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """argmax over free coordinates: BFGS, then Newton steps down to rounding error."""

    def negative(u: Any) -> tuple[float, Any]:
        leaf = torch.tensor(u, requires_grad=True)
        value = -function(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.item(), gradient.numpy()

    u = torch.tensor(minimize(negative, start.numpy(), jac=True, method="BFGS").x)
    for _ in range(3):
        gradient = torch.autograd.functional.jacobian(function, u)
        hessian = torch.autograd.functional.hessian(function, u)
        u = u - torch.linalg.pinv(hessian, rtol=1e-10) @ gradient
    return u


def problem(name: str) -> tuple[type, Family, Arguments, Tensor, Tensor, Any]:
    cls, make = CASES[name]
    args = make()
    value, weights = draw(cls, args), torch.rand(ROWS, CELLS)
    family = FAMILIES[cls]
    center = 0.3 + torch.rand(value.shape[1:]) if family.centered else None
    return cls, family, args, value, weights, center
