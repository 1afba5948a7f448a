"""Small models with conjugate latents: rates, precisions, variances and probabilities that rows have of their own."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

positive, simplex = constraints.positive, constraints.simplex


def _hyper(*names: str) -> list[Tensor]:
    return [pyro.param(name, torch.tensor(1.0), constraint=positive) for name in names]


def gamma_poisson(exposure: Tensor, y: Tensor) -> None:
    alpha, beta = _hyper("alpha", "beta")
    with pyro.plate("rows", len(y)):
        rate = pyro.sample("rate", dist.Gamma(alpha, beta))
        pyro.sample("y", dist.Poisson(rate * exposure), obs=y)


def negative_binomial(y: Tensor) -> None:
    """Mean m and shape k."""
    m, k = _hyper("m", "k")
    with pyro.plate("rows", len(y)):
        rate = pyro.sample("rate", dist.Gamma(k, k / m))
        pyro.sample("y", dist.Poisson(rate), obs=y)


def grouped_counts(group: Tensor, y: Tensor) -> None:
    """Long format: rows read their group's rate by an index."""
    alpha, beta = _hyper("alpha", "beta")
    with pyro.plate("groups", int(group.max()) + 1):
        rate = pyro.sample("rate", dist.Gamma(alpha, beta))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Poisson(rate[..., group]), obs=y)


def positional_counts(group: Tensor, y: Tensor) -> None:
    """The same, indexed as one would without a thought of batches."""
    alpha, beta = _hyper("alpha", "beta")
    with pyro.plate("groups", int(group.max()) + 1):
        rate = pyro.sample("rate", dist.Gamma(alpha, beta))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Poisson(rate[group]), obs=y)


def beta_binomial(y: Tensor, total: int = 12) -> None:
    a, b = _hyper("a", "b")
    with pyro.plate("rows", len(y)):
        p = pyro.sample("p", dist.Beta(a, b))
        pyro.sample("y", dist.Binomial(total, p), obs=y)


def student(y: Tensor) -> None:
    """StudentT(nu, mu, sigma) as a scale mixture of normals."""
    mu = pyro.param("mu", torch.tensor(0.0))
    sigma, nu = _hyper("sigma", "nu")
    with pyro.plate("rows", len(y)):
        precision = pyro.sample("precision", dist.Gamma(nu / 2, nu / 2))
        pyro.sample("y", dist.Normal(mu, sigma / precision.sqrt()), obs=y)


def group_variances(y: Tensor) -> None:
    """y (T, J): groups differ in their variance."""
    shape, rate = _hyper("shape", "rate")
    mu = pyro.param("mu", torch.tensor(0.0))
    with pyro.plate("groups", y.shape[1], dim=-1):
        variance = pyro.sample("variance", dist.InverseGamma(shape, rate))
        with pyro.plate("repeats", y.shape[0], dim=-2):
            pyro.sample("y", dist.Normal(mu, variance.sqrt()), obs=y)


def common_rate(y: Tensor) -> None:
    """One rate for all rows, of waiting times with a known shape."""
    (alpha,) = _hyper("alpha")
    rate = pyro.sample("rate", dist.Gamma(alpha, 0.5))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Gamma(2.0, rate), obs=y)


def event_rates(y: Tensor) -> None:
    """Several rates a row, as one event."""
    alpha, beta = _hyper("alpha", "beta")
    with pyro.plate("rows", len(y)):
        rate = pyro.sample("rate", dist.Gamma(alpha, beta).expand([y.shape[-1]]).to_event(1))
        pyro.sample("y", dist.Poisson(rate).to_event(1), obs=y)


def mixed_counts(y: Tensor) -> None:
    """Two kinds of rows, each with its own distribution of rates."""
    w = pyro.param("w", torch.ones(2) / 2, constraint=simplex)
    alpha = pyro.param("alpha", torch.ones(2), constraint=positive)
    beta = pyro.param("beta", torch.ones(2), constraint=positive)
    with pyro.plate("rows", len(y)):
        k = pyro.sample("k", dist.Categorical(w))
        rate = pyro.sample("rate", dist.Gamma(alpha[k], beta[k]))
        pyro.sample("y", dist.Poisson(rate), obs=y)


def categories(y: Tensor, total: int = 12) -> None:
    """Counts of categories of every row, whose probabilities are its own."""
    alpha = pyro.param("alpha", torch.ones(y.shape[-1]), constraint=positive)
    with pyro.plate("rows", len(y)):
        theta = pyro.sample("theta", dist.Dirichlet(alpha))
        pyro.sample("y", dist.Multinomial(total, theta), obs=y)


def words(document: Tensor, word: Tensor, size: int = 4) -> None:
    """Long format: every word is a draw from the probabilities of its document."""
    alpha = pyro.param("alpha", torch.ones(size), constraint=positive)
    with pyro.plate("documents", int(document.max()) + 1):
        theta = pyro.sample("theta", dist.Dirichlet(alpha))
    with pyro.plate("words", len(word)):
        pyro.sample("word", dist.Categorical(theta[..., document, :]), obs=word)


def kinds_of_categories(y: Tensor, label: Tensor, total: int = 12) -> None:
    """Two kinds of rows, each with its own distribution of probabilities, which a label shows a little of too."""
    w = pyro.param("w", torch.ones(2) / 2, constraint=simplex)
    alpha = pyro.param("alpha", torch.ones(2, y.shape[-1]), constraint=positive)
    with pyro.plate("rows", len(y)):
        k = pyro.sample("k", dist.Categorical(w))
        theta = pyro.sample("theta", dist.Dirichlet(alpha[k]))
        pyro.sample("label", dist.Categorical(theta), obs=label)
        pyro.sample("y", dist.Multinomial(total, theta), obs=y)


def one_token(word: Tensor) -> None:
    """A topic of every row, drawn from the row's probabilities: the topic is summed over, the row stays conjugate."""
    alpha = pyro.param("alpha", torch.ones(2), constraint=positive)
    phi = pyro.param("phi", torch.ones(2, 4) / 4, constraint=simplex)
    with pyro.plate("rows", len(word)):
        theta = pyro.sample("theta", dist.Dirichlet(alpha))
        topic = pyro.sample("topic", dist.Categorical(theta))
        pyro.sample("word", dist.Categorical(phi[topic]), obs=word)
