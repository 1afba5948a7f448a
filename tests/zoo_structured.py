"""More small models for the laws: several latents, nested plates, chains, transforms, modules, priors.

Plain Pyro like `zoo`; nothing here knows pyro_em.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.nn import PyroModule, PyroParam, pyro_method
from pyro.ops.indexing import Vindex
from torch import Tensor

from tests.classics import positive, simplex, uniform, unit


def factorial(y: Tensor) -> None:
    """Two independent latents, one mean for each pair of states."""
    u = pyro.param("u", uniform(2), constraint=simplex)
    v = pyro.param("v", uniform(2), constraint=simplex)
    mu = pyro.param("mu", torch.zeros(2, 2))
    sd = pyro.param("sd", torch.tensor(1.0), constraint=positive)
    with pyro.plate("rows", len(y)):
        a = pyro.sample("a", dist.Categorical(u))
        b = pyro.sample("b", dist.Categorical(v))
        pyro.sample("y", dist.Normal(mu[a, b], sd), obs=y)


def additive(y: Tensor) -> None:
    """Two latents whose effects add: the mean is affine in the parameters, not a gather."""
    u = pyro.param("u", uniform(2), constraint=simplex)
    v = pyro.param("v", uniform(2), constraint=simplex)
    base = pyro.param("base", torch.tensor(0.0))
    effect = pyro.param("effect", torch.ones(2))
    sd = pyro.param("sd", torch.tensor(1.0), constraint=positive)
    with pyro.plate("rows", len(y)):
        a = pyro.sample("a", dist.Categorical(u))
        b = pyro.sample("b", dist.Categorical(v))
        pyro.sample("y", dist.Normal(base + effect[0] * a + effect[1] * b, sd), obs=y)


def global_and_local(y: Tensor) -> None:
    """A regime common to all rows chooses the weights of the components."""
    p = pyro.param("p", torch.tensor(0.5), constraint=unit)
    w = pyro.param("w", uniform(2, 2), constraint=simplex)
    mu = pyro.param("mu", torch.zeros(2))
    regime = pyro.sample("regime", dist.Bernoulli(p))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(w[regime.long()]))
        pyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)


def nested_classes(passed: Tensor) -> None:
    """Schools (N) of a kind, pupils (M) in them of a type that depends on the kind."""
    schools, pupils, items = passed.shape
    kind_prob = pyro.param("kind_prob", uniform(2), constraint=simplex)
    type_prob = pyro.param("type_prob", uniform(2, 2), constraint=simplex)
    pass_prob = pyro.param("pass_prob", torch.full((2, items), 0.5), constraint=unit)
    with pyro.plate("schools", schools, dim=-2):
        kind = pyro.sample("kind", dist.Categorical(kind_prob))
        with pyro.plate("pupils", pupils, dim=-1):
            pupil = pyro.sample("pupil", dist.Categorical(type_prob[kind]))
            pyro.sample("passed", dist.Bernoulli(pass_prob[pupil]).to_event(1), obs=passed)


def dawid_skene(ratings: Tensor, rated: Tensor, K: int = 2) -> None:
    """Ratings (N, R) of N patients by R observers with confusion tables; `rated` masks the missing ones."""
    patients, observers = ratings.shape
    w = pyro.param("w", uniform(K), constraint=simplex)
    confusion = pyro.param("confusion", uniform(observers, K, K), constraint=simplex)
    with pyro.plate("patients", patients, dim=-2):
        z = pyro.sample("z", dist.Categorical(w))
        with pyro.plate("observers", observers, dim=-1) as observer:
            fn = dist.Categorical(Vindex(confusion)[observer, z]).mask(rated)
            pyro.sample("rating", fn, obs=ratings)


def _chain(steps: int, pi: Tensor, A: Tensor, emit: Callable[[int, Tensor], object]) -> None:
    z = None
    for t in pyro.markov(range(steps)):
        z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
        emit(t, z)


def categorical_hmm(words: Tensor, K: int = 2, V: int = 3) -> None:
    """Sequences (N, T) of symbols."""
    pi = pyro.param("pi", uniform(K), constraint=simplex)
    A = pyro.param("A", uniform(K, K), constraint=simplex)
    B = pyro.param("B", uniform(K, V), constraint=simplex)
    with pyro.plate("sequences", len(words)):
        _chain(words.shape[1], pi, A, lambda t, z: pyro.sample(f"x_{t}", dist.Categorical(B[z]), obs=words[:, t]))


def gaussian_hmm(y: Tensor, K: int = 2) -> None:
    """Sequences (N, T) of reals."""
    pi = pyro.param("pi", uniform(K), constraint=simplex)
    A = pyro.param("A", uniform(K, K), constraint=simplex)
    mu = pyro.param("mu", torch.zeros(K))
    sd = pyro.param("sd", torch.ones(K), constraint=positive)
    with pyro.plate("sequences", len(y)):
        _chain(y.shape[1], pi, A, lambda t, z: pyro.sample(f"y_{t}", dist.Normal(mu[z], sd[z]), obs=y[:, t]))


def ragged_hmm(y: Tensor, lengths: Tensor, K: int = 2) -> None:
    """The same for sequences of different lengths: what lies beyond the end is masked."""
    pi = pyro.param("pi", uniform(K), constraint=simplex)
    A = pyro.param("A", uniform(K, K), constraint=simplex)
    mu = pyro.param("mu", torch.zeros(K))
    with pyro.plate("sequences", len(y)):
        z = None
        for t in pyro.markov(range(y.shape[1])):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
                pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[:, t])


def gated_counts(y: Tensor, x: Tensor) -> None:
    """Counts (N, T): a covariate (T,) moves the rates and the probability to stay; Newton's method in both."""
    a, b = pyro.param("a", torch.zeros(2)), pyro.param("b", torch.tensor(0.0))
    stay, slope = pyro.param("stay", torch.zeros(2)), pyro.param("slope", torch.zeros(2))
    with pyro.plate("sequences", len(y)):
        z = torch.tensor(0)
        for t in pyro.markov(range(y.shape[1])):
            high = torch.sigmoid(stay[z] + slope[z] * x[t])
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.stack([1 - high, high], -1)))
            pyro.sample(f"y_{t}", dist.Poisson((a[z] + b * x[t]).exp()), obs=y[:, t])


def transformed(y: Tensor) -> None:
    """Parameters behind tanh and softplus: no closed form is to be found."""
    w = pyro.param("w", uniform(2), constraint=simplex)
    a = pyro.param("a", torch.zeros(2))
    b = pyro.param("b", torch.zeros(2))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        loc, scale = 4 * torch.tanh(a), torch.nn.functional.softplus(b)
        pyro.sample("y", dist.Normal(loc[z], scale[z]), obs=y)


class ModuleMixture(PyroModule):
    """A normal mixture as a PyroModule."""

    def __init__(self, K: int = 2) -> None:
        super().__init__()
        self.w = PyroParam(uniform(K), constraint=simplex)
        self.mu = PyroParam(torch.arange(K) * 1.0)
        self.sd = PyroParam(torch.ones(K), constraint=positive)

    @pyro_method
    def forward(self, y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(self.w))
            pyro.sample("y", dist.Normal(self.mu[z], self.sd[z]), obs=y)


def gmm_map(y: Tensor, K: int = 2) -> None:
    w = pyro.sample("w", dist.Dirichlet(2.0 * torch.ones(K)))
    with pyro.plate("components", K):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        var = pyro.sample("var", dist.InverseGamma(2.0, 1.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal(mu[z], var[z].sqrt()), obs=y)


def poisson_map(counts: Tensor, K: int = 2) -> None:
    w = pyro.sample("w", dist.Dirichlet(1.5 * torch.ones(K)))
    with pyro.plate("components", K):
        rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
    with pyro.plate("rows", len(counts)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("count", dist.Poisson(rate[z]), obs=counts)


def hmm_map(words: Tensor, K: int = 2, V: int = 3) -> None:
    pi = pyro.sample("pi", dist.Dirichlet(2.0 * torch.ones(K)))
    with pyro.plate("states", K):
        A = pyro.sample("A", dist.Dirichlet(1.0 + torch.ones(K)))
        B = pyro.sample("B", dist.Dirichlet(1.2 * torch.ones(V)))
    with pyro.plate("sequences", len(words)):
        _chain(words.shape[1], pi, A, lambda t, z: pyro.sample(f"x_{t}", dist.Categorical(B[z]), obs=words[:, t]))


def heavy_prior_map(y: Tensor, K: int = 2) -> None:
    """A prior that is not conjugate (Student t on the means): the root of a cubic."""
    w = pyro.param("w", uniform(K), constraint=simplex)
    with pyro.plate("components", K):
        mu = pyro.sample("mu", dist.StudentT(4.0, 0.0, 2.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)
