"""Small models for the laws, each written as a Pyro user would write it; nothing here knows pyro_em.

One idea a model: a covariance structure, a family, a plate, a chain, a transform, a prior. The textbook ones
with published answers are in `classics`. Shapes: N rows, D dimensions, K components, T steps.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints

from tests.classics import positive, simplex, uniform, unit


def _mixture(n: int, K: int) -> tuple[pyro.plate, Tensor]:
    return pyro.plate("rows", n), pyro.param("w", uniform(K), constraint=simplex)


def gmm_diagonal(x: Tensor, K: int = 2) -> None:
    rows, w = _mixture(len(x), K)
    mu = pyro.param("mu", torch.zeros(K, x.shape[-1]))
    sd = pyro.param("sd", torch.ones(K, x.shape[-1]), constraint=positive)
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], sd[z]).to_event(1), obs=x)


def gmm_spherical(x: Tensor, K: int = 2) -> None:
    rows, w = _mixture(len(x), K)
    mu = pyro.param("mu", torch.zeros(K, x.shape[-1]))
    sd = pyro.param("sd", torch.ones(K), constraint=positive)
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], sd[z].unsqueeze(-1)).to_event(1), obs=x)


def gmm_isotropic(x: Tensor, K: int = 2) -> None:
    """One scale for every component and dimension (k-means' model)."""
    rows, w = _mixture(len(x), K)
    mu = pyro.param("mu", torch.zeros(K, x.shape[-1]))
    sd = pyro.param("sd", torch.tensor(1.0), constraint=positive)
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], sd).to_event(1), obs=x)


def gmm_tied_diagonal(x: Tensor, K: int = 2) -> None:
    rows, w = _mixture(len(x), K)
    mu = pyro.param("mu", torch.zeros(K, x.shape[-1]))
    sd = pyro.param("sd", torch.ones(x.shape[-1]), constraint=positive)
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], sd).to_event(1), obs=x)


def gmm_tied(x: Tensor, K: int = 2) -> None:
    rows, w = _mixture(len(x), K)
    mu = pyro.param("mu", torch.zeros(K, x.shape[-1]))
    S = pyro.param("S", torch.eye(x.shape[-1]), constraint=constraints.positive_definite)
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.MultivariateNormal(mu[z], covariance_matrix=S), obs=x)


def gmm_scale_tril(x: Tensor, K: int = 2) -> None:
    rows, w = _mixture(len(x), K)
    D = x.shape[-1]
    mu = pyro.param("mu", torch.zeros(K, D))
    L = pyro.param("L", torch.eye(D).expand(K, D, D).clone(), constraint=constraints.lower_cholesky)
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.MultivariateNormal(mu[z], scale_tril=L[z]), obs=x)


def gmm_precision(x: Tensor, K: int = 2) -> None:
    rows, w = _mixture(len(x), K)
    D = x.shape[-1]
    mu = pyro.param("mu", torch.zeros(K, D))
    P = pyro.param("P", torch.eye(D).expand(K, D, D).clone(), constraint=constraints.positive_definite)
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.MultivariateNormal(mu[z], precision_matrix=P[z]), obs=x)


def shared_mean(y: Tensor, K: int = 2) -> None:
    """A contaminated normal: one mean, K scales, so that mean and scales are coupled in the M-step."""
    rows, w = _mixture(len(y), K)
    mu = pyro.param("mu", torch.tensor(0.0))
    sd = pyro.param("sd", 1.0 + torch.arange(K), constraint=positive)
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal(mu, sd[z]), obs=y)


def item_plate(answers: Tensor, K: int = 2) -> None:
    """Latent class analysis with people and items as plates."""
    people, items = answers.shape
    w = pyro.param("w", uniform(K), constraint=simplex)
    P = pyro.param("P", torch.full((K, items), 0.5), constraint=unit)
    with pyro.plate("people", people, dim=-2):
        z = pyro.sample("z", dist.Categorical(w))
        with pyro.plate("items", items, dim=-1) as item:
            pyro.sample("answer", dist.Bernoulli(Vindex(P)[z, item]), obs=answers)


def one_hot_mixture(y: Tensor, K: int = 2) -> None:
    rows, w = _mixture(len(y), K)
    mu = pyro.param("mu", torch.zeros(K))
    sd = pyro.param("sd", torch.tensor(1.0), constraint=positive)
    with rows:
        z = pyro.sample("z", dist.OneHotCategorical(w))
        pyro.sample("y", dist.Normal((z * mu).sum(-1), sd), obs=y)


def geometric_mixture(y: Tensor, K: int = 2) -> None:
    rows, w = _mixture(len(y), K)
    p = pyro.param("p", torch.full((K,), 0.5), constraint=unit)
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Geometric(p[z]), obs=y)


def lognormal_mixture(y: Tensor, K: int = 2) -> None:
    rows, w = _mixture(len(y), K)
    mu = pyro.param("mu", torch.zeros(K))
    sd = pyro.param("sd", torch.ones(K), constraint=positive)
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.LogNormal(mu[z], sd[z]), obs=y)


def gamma_mixture(y: Tensor, K: int = 2) -> None:
    """Known shape, free rate."""
    rows, w = _mixture(len(y), K)
    rate = pyro.param("rate", torch.ones(K), constraint=positive)
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Gamma(2.0, rate[z]), obs=y)


def beta_mixture(y: Tensor, K: int = 2) -> None:
    """Both shapes free: no closed form exists."""
    rows, w = _mixture(len(y), K)
    a = pyro.param("a", torch.ones(K), constraint=positive)
    b = pyro.param("b", torch.ones(K), constraint=positive)
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Beta(a[z], b[z]), obs=y)


def multinomial_mixture(counts: Tensor, K: int = 2) -> None:
    rows, w = _mixture(len(counts), K)
    p = pyro.param("p", uniform(K, counts.shape[-1]), constraint=simplex)
    total = int(counts[0].sum())
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("counts", dist.Multinomial(total, p[z]), obs=counts)


def zero_inflated_poisson(counts: Tensor) -> None:
    w = pyro.param("w", torch.tensor(0.5), constraint=unit)
    rate = pyro.param("rate", torch.tensor(1.0), constraint=positive)
    rates = torch.stack([torch.zeros(()), rate])
    with pyro.plate("rows", len(counts)):
        exposed = pyro.sample("exposed", dist.Bernoulli(w))
        pyro.sample("count", dist.Poisson(rates[exposed.long()]), obs=counts)
