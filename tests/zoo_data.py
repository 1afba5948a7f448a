"""Small models whose data are incomplete: labels known for some rows, states excluded, responses seen in part.

Labels: N rows, K = 3 classes of a normal mixture with a common scale; `known` (N,) says which labels are. Responses:
mixtures of two components whose data are censored, known to an interval, or truncated.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_em.distributions import Censored, IntervalCensored, Truncated
from tests.classics import positive, simplex, uniform

CLASSES = 3


def _parameters() -> tuple[Tensor, Tensor, Tensor]:
    w = pyro.param("w", uniform(CLASSES), constraint=simplex)
    mu = pyro.param("mu", torch.tensor([-1.0, 0.5, 2.0]))
    return w, mu, pyro.param("sd", torch.tensor(1.0), constraint=positive)


def label_as_site(y: Tensor, labels: Tensor, known: Tensor) -> None:
    """The label is a noiseless second observation of the class."""
    w, mu, sd = _parameters()
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal(mu[z], sd), obs=y)
        with poutine.mask(mask=known):
            pyro.sample("label", dist.Categorical(logits=torch.eye(CLASSES).log()[z]), obs=labels)


def label_as_mask(y: Tensor, labels: Tensor, known: Tensor) -> None:
    """The class is observed where it is known."""
    w, mu, sd = _parameters()
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(w), obs=labels, obs_mask=known)
        pyro.sample("y", dist.Normal(mu[z], sd), obs=y)


def label_as_plate(y: Tensor, labels: Tensor, known: Tensor) -> None:
    """Labelled and unlabelled rows in plates of their own."""
    w, mu, sd = _parameters()
    with pyro.plate("labelled", int(known.sum())):
        z = pyro.sample("z", dist.Categorical(w), obs=labels[known])
        pyro.sample("y", dist.Normal(mu[z], sd), obs=y[known])
    with pyro.plate("unlabelled", int((~known).sum())):
        z = pyro.sample("hidden_z", dist.Categorical(w))
        pyro.sample("other_y", dist.Normal(mu[z], sd), obs=y[~known])


def allowed_by_factor(y: Tensor, allowed: Tensor) -> None:
    """The class lies in the set `allowed` (N, K) of its row."""
    w, mu, sd = _parameters()
    with pyro.plate("rows", len(y)) as row:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.factor("allowed", allowed.double().log()[row, z])
        pyro.sample("y", dist.Normal(mu[z], sd), obs=y)


def allowed_by_exclusion(y: Tensor, allowed: Tensor) -> None:
    """The same: for every class that is not allowed, "it is not this one" was observed."""
    w, mu, sd = _parameters()
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        is_other = dist.Bernoulli(1 - torch.eye(CLASSES)[z])
        pyro.sample("excluded", is_other.mask(~allowed).to_event(1), obs=torch.ones(allowed.shape))
        pyro.sample("y", dist.Normal(mu[z], sd), obs=y)


def _mixture(rows: int) -> tuple[pyro.plate, Tensor]:
    return pyro.plate("rows", rows), pyro.param("w", uniform(2), constraint=simplex)


def censored_mixture(y: Tensor, lower: float, upper: Tensor) -> None:
    """A normal response clamped to limits, the upper one of each row its own."""
    rows, w = _mixture(len(y))
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    sd = pyro.param("sd", torch.ones(2), constraint=positive)
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", Censored(dist.Normal(mu[z], sd[z]), lower, upper), obs=y)


def interval_mixture(intervals: Tensor) -> None:
    """Exponential durations known to lie in intervals (N, 2)."""
    rows, w = _mixture(len(intervals))
    rate = pyro.param("rate", torch.tensor([0.5, 2.0]), constraint=positive)
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", IntervalCensored(dist.Exponential(rate[z])), obs=intervals)


def zero_truncated_mixture(counts: Tensor) -> None:
    """Poisson counts of which zeros are never seen."""
    rows, w = _mixture(len(counts))
    rate = pyro.param("rate", torch.tensor([1.0, 4.0]), constraint=positive)
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", Truncated(dist.Poisson(rate[z]), lower=1), obs=counts)


def censored_weibull(y: Tensor, upper: Tensor) -> None:
    """No latents and no closed form."""
    scale = pyro.param("scale", torch.tensor(1.0), constraint=positive)
    shape = pyro.param("shape", torch.tensor(1.0), constraint=positive)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", Censored(dist.Weibull(scale, shape), upper=upper), obs=y)


def censored_regressions(X: Tensor, y: Tensor, upper: Tensor) -> None:
    """A mixture of tobit regressions: negative responses are recorded as 0, large ones as limits of their own."""
    rows, w = _mixture(len(y))
    b = pyro.param("b", torch.tensor([[0.0, 0.5], [2.0, -0.5]]))
    sd = pyro.param("sd", torch.ones(2), constraint=positive)
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", Censored(dist.Normal((X * b[z]).sum(-1), sd[z]), 0.0, upper), obs=y)


def weibull_lifetimes(X: Tensor, y: Tensor, upper: Tensor) -> None:
    """Accelerated failure times of two kinds, right-censored; an infinite limit is a failure that was seen."""
    rows, w = _mixture(len(y))
    b = pyro.param("b", torch.zeros(2, X.shape[-1]))
    shape = pyro.param("shape", torch.ones(2), constraint=positive)
    with rows:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", Censored(dist.Weibull((X * b[z]).sum(-1).exp(), shape[z]), upper=upper), obs=y)
