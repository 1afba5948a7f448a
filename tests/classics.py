"""Textbook latent-discrete models as ordinary Pyro, used by the published cases; nothing here knows pyro_em.

Every parameter is a `pyro.param` (or, for the MAP versions, a `pyro.sample` in a components plate), every
latent a plain discrete `pyro.sample`. Rows carry counts through the caller's `weights`, not in the model.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints

simplex, positive, unit = constraints.simplex, constraints.positive, constraints.unit_interval


def uniform(*shape: int) -> Tensor:
    return torch.full(shape, 1.0 / shape[-1])


def linkage(cells: Tensor) -> None:
    """Rao's linkage data: five latent cells of which the first and the last look alike."""
    p = pyro.param("p", torch.tensor(0.4), constraint=unit)
    half, quarter = torch.tensor(0.5), torch.tensor(0.25)
    probs = torch.stack([half, quarter * (1 - p), quarter * (1 - p), quarter * p, quarter * p])
    looks_like = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0], [1.0, 0, 0, 0]])
    with pyro.plate("cells", len(cells)):
        z = pyro.sample("z", dist.Categorical(probs))
        pyro.sample("cell", dist.Categorical(looks_like[z]), obs=cells)


def blood_group(phenotypes: Tensor) -> None:
    """ABO: two alleles (A, B, O) from one table of frequencies make the phenotype (A, B, AB, O)."""
    freq = pyro.param("freq", uniform(3), constraint=simplex)
    a, b, ab, o = torch.eye(4)
    phenotype = torch.stack([torch.stack([a, ab, a]), torch.stack([ab, b, b]), torch.stack([a, b, o])])
    with pyro.plate("people", len(phenotypes)):
        mother = pyro.sample("mother", dist.Categorical(freq))
        father = pyro.sample("father", dist.Categorical(freq))
        pyro.sample("phenotype", dist.Categorical(phenotype[mother, father]), obs=phenotypes)


def coins(heads: Tensor, tosses: int = 10) -> None:
    p = pyro.param("p", torch.tensor([0.4, 0.7]), constraint=unit)
    with pyro.plate("sets", len(heads)):
        z = pyro.sample("z", dist.Categorical(uniform(2)))
        pyro.sample("heads", dist.Binomial(tosses, p[z]), obs=heads)


def coins_map(heads: Tensor, tosses: int = 10) -> None:
    with pyro.plate("coins", 2):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("sets", len(heads)):
        z = pyro.sample("z", dist.Categorical(uniform(2)))
        pyro.sample("heads", dist.Binomial(tosses, p[z]), obs=heads)


def poisson_mixture(counts: Tensor, K: int = 2) -> None:
    pi = pyro.param("pi", uniform(K), constraint=simplex)
    rate = pyro.param("lam", 1.0 + torch.arange(K), constraint=positive)
    with pyro.plate("days", len(counts)):
        z = pyro.sample("z", dist.Categorical(pi))
        pyro.sample("count", dist.Poisson(rate[z]), obs=counts)


def poisson_hmm(counts: Tensor, K: int = 2) -> None:
    pi = pyro.param("pi", uniform(K), constraint=simplex)
    A = pyro.param("A", (uniform(K, K) + torch.eye(K)) / 2, constraint=simplex)
    rate = pyro.param("lam", 1.0 + torch.arange(K), constraint=positive)
    z = None
    for t in pyro.markov(range(len(counts))):
        z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
        pyro.sample(f"count_{t}", dist.Poisson(rate[z]), obs=counts[t])


def normal_hmm(y: Tensor, breaks: tuple[int, ...] = (0,), K: int = 2) -> None:
    """Gaussian HMM of one series, restarted from the initial distribution at every index in `breaks`."""
    pi = pyro.param("pi", uniform(K), constraint=simplex)
    A = pyro.param("A", uniform(K, K), constraint=simplex)
    mu = pyro.param("mu", torch.arange(K) * 1.0)
    sd = pyro.param("sd", torch.ones(K), constraint=positive)
    z = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None or t in breaks else A[z]))
        pyro.sample(f"y_{t}", dist.Normal(mu[z], sd[z]), obs=y[t])


def latent_class(patterns: Tensor, K: int = 2, mask: Tensor | bool = True) -> None:
    """Binary items (N, J), independent given the class."""
    items = patterns.shape[-1]
    w = pyro.param("w", uniform(K), constraint=simplex)
    P = pyro.param("P", torch.full((K, items), 0.5), constraint=unit)
    with pyro.plate("patterns", len(patterns)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("items", dist.Bernoulli(P[z]).mask(mask).to_event(1), obs=patterns)


def latent_class_categories(answers: Tensor, K: int, categories: int) -> None:
    """Items (N, J) with several categories each, coded from 0."""
    items = answers.shape[-1]
    w = pyro.param("w", uniform(K), constraint=simplex)
    P = pyro.param("P", uniform(K, items, categories), constraint=simplex)
    with pyro.plate("people", len(answers)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("answers", dist.Categorical(P[z]).to_event(1), obs=answers)


def confusion_tables(ratings: Tensor, raters: Tensor, K: int) -> None:
    """Dawid and Skene: ratings (N, R) of N patients, column r by `raters[r]`, a confusion table each."""
    patients, columns = ratings.shape
    w = pyro.param("w", uniform(K), constraint=simplex)
    confusion = pyro.param("confusion", uniform(int(raters.max()) + 1, K, K), constraint=simplex)
    with pyro.plate("patients", patients, dim=-2):
        z = pyro.sample("z", dist.Categorical(w))
        with pyro.plate("columns", columns, dim=-1):
            pyro.sample("rating", dist.Categorical(Vindex(confusion)[raters, z]), obs=ratings)


def latent_class_map(patterns: Tensor, K: int = 2) -> None:
    """The same with Dirichlet(2) on the class weights and Beta(2, 2) on every item probability."""
    w = pyro.sample("w", dist.Dirichlet(2.0 * torch.ones(K)))
    with pyro.plate("items_plate", patterns.shape[-1], dim=-1), pyro.plate("classes", K, dim=-2):
        P = pyro.sample("P", dist.Beta(2.0, 2.0))
    with pyro.plate("patterns", len(patterns)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("items", dist.Bernoulli(P[z]).to_event(1), obs=patterns)


def normal_mixture(y: Tensor, K: int = 2, shared: bool = False) -> None:
    pi = pyro.param("pi", uniform(K), constraint=simplex)
    mu = pyro.param("mu", torch.arange(K) * 1.0)
    sd = pyro.param("sd", torch.tensor(1.0) if shared else torch.ones(K), constraint=positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(pi))
        pyro.sample("y", dist.Normal(mu[z], sd if shared else sd[z]), obs=y)


def gaussian_mixture(x: Tensor, K: int = 2) -> None:
    D = x.shape[-1]
    pi = pyro.param("pi", uniform(K), constraint=simplex)
    mu = pyro.param("mu", torch.zeros(K, D))
    S = pyro.param("S", torch.eye(D).expand(K, D, D).clone(), constraint=constraints.positive_definite)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(pi))
        pyro.sample("x", dist.MultivariateNormal(mu[z], covariance_matrix=S[z]), obs=x)


def exponential_mixture(x: Tensor, K: int = 2) -> None:
    pi = pyro.param("pi", uniform(K), constraint=simplex)
    rate = pyro.param("rate", torch.ones(K, x.shape[-1]), constraint=positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(pi))
        pyro.sample("x", dist.Exponential(rate[z]).to_event(1), obs=x)


def stopping_states(previous: Tensor | None, pi: Tensor, T: Tensor) -> dist.Categorical:
    """Next state of a chain with K states and a last one, STOP; T (K, K+1), as nothing leaves STOP."""
    return dist.Categorical(pi if previous is None else T[previous.clamp(max=len(T) - 1)])


def icecream_hmm(cones: Tensor, K: int = 2) -> None:
    """Eisner's ice-cream diary: a categorical HMM that stops after the last day.

    Whether the diary goes on is observed on every day ("alive"), through a 0/1 table of the state.
    """
    pi = pyro.param("pi", uniform(K), constraint=simplex)
    T = pyro.param("T", uniform(K, K + 1), constraint=simplex)
    B = pyro.param("B", uniform(K, 3), constraint=simplex)
    is_alive = torch.tensor([1.0] * K + [0.0])
    z = None
    for t in pyro.markov(range(len(cones) + 1)):
        z = pyro.sample(f"z_{t}", stopping_states(z, pi, T))
        if t > 0:
            going_on = torch.tensor(float(t < len(cones)))
            pyro.sample(f"alive_{t}", dist.Bernoulli(is_alive[z]), obs=going_on)
        if t < len(cones):
            pyro.sample(f"cones_{t}", dist.Categorical(B[z.clamp(max=K - 1)]), obs=cones[t])


def exponential_hmm(x: Tensor, K: int = 2) -> None:
    """Sequences (N, T, D) with products of exponentials as emissions, each stopping after T steps."""
    steps = x.shape[1]
    pi = pyro.param("pi", uniform(K), constraint=simplex)
    T = pyro.param("T", uniform(K, K + 1), constraint=simplex)
    rate = pyro.param("rate", torch.ones(K, x.shape[-1]), constraint=positive)
    is_alive = torch.tensor([1.0] * K + [0.0])
    with pyro.plate("sequences", len(x)):
        z = None
        for t in pyro.markov(range(steps + 1)):
            z = pyro.sample(f"z_{t}", stopping_states(z, pi, T))
            if t > 0:
                going_on = torch.full((len(x),), float(t < steps))
                pyro.sample(f"alive_{t}", dist.Bernoulli(is_alive[z]), obs=going_on)
            if t < steps:
                emission = dist.Exponential(rate[z.clamp(max=K - 1)]).to_event(1)
                pyro.sample(f"x_{t}", emission, obs=x[:, t])
