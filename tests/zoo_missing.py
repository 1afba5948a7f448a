"""Models of normal vectors for data with missing cells; nothing here knows pyro_em.

Shapes: N rows, D cells, K classes.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from tests.classics import positive, simplex, uniform, unit

SPREADS: dict[str, Any] = {
    "covariance_matrix": constraints.positive_definite,
    "precision_matrix": constraints.positive_definite,
    "scale_tril": constraints.lower_cholesky,
}


def normal(x: Tensor, given: str = "covariance_matrix") -> None:
    D = x.shape[-1]
    mu = pyro.param("mu", torch.zeros(D))
    S = pyro.param("S", torch.eye(D), constraint=SPREADS[given])
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.MultivariateNormal(mu, **{given: S}), obs=x)


def mixture(x: Tensor, K: int = 2, given: str = "covariance_matrix", tied: bool = False) -> None:
    D = x.shape[-1]
    w = pyro.param("w", uniform(K), constraint=simplex)
    mu = pyro.param("mu", torch.zeros(K, D))
    S = pyro.param("S", torch.eye(D).repeat(*(() if tied else (K,)), 1, 1), constraint=SPREADS[given])
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.MultivariateNormal(mu[z], **{given: S if tied else S[z]}), obs=x)


def exchangeable(x: Tensor) -> None:
    """Equal correlations, a covariance without closed form."""
    D = x.shape[-1]
    mu = pyro.param("mu", torch.zeros(D))
    sd = pyro.param("sd", torch.ones(D), constraint=positive)
    rho = pyro.param("rho", torch.tensor(0.1), constraint=unit)
    correlation = rho + (1 - rho) * torch.eye(D)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.MultivariateNormal(mu, covariance_matrix=sd * sd.unsqueeze(-1) * correlation), obs=x)


def regression(x: Tensor, c: Tensor) -> None:
    """A location of its own in every row."""
    beta = pyro.param("beta", torch.zeros(c.shape[-1], x.shape[-1]))
    S = pyro.param("S", torch.eye(x.shape[-1]), constraint=constraints.positive_definite)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.MultivariateNormal(c @ beta, covariance_matrix=S), obs=x)


def conjugate(x: Tensor) -> None:
    D = x.shape[-1]
    mu = pyro.sample("mu", dist.Normal(torch.zeros(D), 2.0).to_event(1))
    var = pyro.sample("var", dist.InverseGamma(torch.full((D,), 3.0), 2.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.MultivariateNormal(mu, covariance_matrix=torch.diag_embed(var)), obs=x)


def diagonal(x: Tensor) -> None:
    D = x.shape[-1]
    mu = pyro.sample("mu", dist.Normal(torch.zeros(D), 2.0).to_event(1))
    var = pyro.sample("var", dist.InverseGamma(torch.full((D,), 3.0), 2.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mu, var.sqrt()).to_event(1), obs=x)


def classes(x: Tensor, counts: Tensor, colours: Tensor, keep: tuple[Tensor, ...] | None = None) -> None:
    """Normal cells in a row, a count and a category per row, two classes; `keep` masks them by hand."""
    w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=simplex)
    mu = pyro.param("mu", torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    sd = pyro.param("sd", torch.ones(2, 2), constraint=positive)
    rate = pyro.param("rate", torch.tensor([1.0, 4.0]), constraint=positive)
    shade = pyro.param("shade", torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]]), constraint=simplex)
    cells, rows, other = (True, True, True) if keep is None else keep
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], sd[z]).mask(cells).to_event(1), obs=x)
        with pyro.poutine.mask(mask=rows):
            pyro.sample("count", dist.Poisson(rate[z]), obs=counts)
        with pyro.poutine.mask(mask=other):
            pyro.sample("colour", dist.Categorical(shade[z]), obs=colours)
