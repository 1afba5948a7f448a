"""Small models for the laws, each written as a Pyro user would write it; nothing here knows pyro_em.

One idea a model: a covariance structure, a family, a plate, a chain, a transform, a prior. The textbook ones
with published answers are in `classics`. Shapes: N rows, D dimensions, K components, T steps.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam, pyro_method
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


def _chain(steps: int, pi: Tensor, A: Tensor, emit: object) -> None:
    z = None
    for t in pyro.markov(range(steps)):
        z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
        emit(t, z)  # type: ignore[operator]


def categorical_hmm(words: Tensor, K: int = 2, V: int = 3) -> None:
    """Sequences (N, T) of symbols."""
    pi = pyro.param("pi", uniform(K), constraint=simplex)
    A = pyro.param("A", uniform(K, K), constraint=simplex)
    B = pyro.param("B", uniform(K, V), constraint=simplex)
    with pyro.plate("sequences", len(words)):
        _chain(
            words.shape[1], pi, A, lambda t, z: pyro.sample(f"x_{t}", dist.Categorical(B[z]), obs=words[:, t])
        )


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
            with pyro.poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
                pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[:, t])


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
        _chain(
            words.shape[1], pi, A, lambda t, z: pyro.sample(f"x_{t}", dist.Categorical(B[z]), obs=words[:, t])
        )


def heavy_prior_map(y: Tensor, K: int = 2) -> None:
    """A prior that is not conjugate (Student t on the means): a numeric M-step."""
    w = pyro.param("w", uniform(K), constraint=simplex)
    with pyro.plate("components", K):
        mu = pyro.sample("mu", dist.StudentT(4.0, 0.0, 2.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)
