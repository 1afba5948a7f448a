"""Models with low-dimensional latents whose posterior is not Gaussian; nothing here knows pyro_em.

Shapes: N elements, J items, R rows that read an element by its number.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from tests.classics import positive, simplex, unit


def ability(y: Tensor) -> None:
    """Answers (N, J) of N people."""
    N, J = y.shape
    d = pyro.param("d", torch.linspace(-1, 1, J))
    a = pyro.param("a", torch.linspace(0.7, 1.6, J), constraint=positive)
    with pyro.plate("people", N, dim=-2):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("items", J, dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=d + a * theta), obs=y)


def ability_classes(y: Tensor) -> None:
    """Two classes of people, with abilities of their own location."""
    N, J = y.shape
    w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=simplex)
    centre = pyro.param("centre", torch.tensor([-1.0, 1.0]))
    d = pyro.param("d", torch.linspace(-1, 1, J))
    with pyro.plate("people", N, dim=-2):
        z = pyro.sample("z", dist.Categorical(w))
        theta = pyro.sample("theta", dist.Normal(centre[z], 0.7))
        with pyro.plate("items", J, dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=d + theta), obs=y)


def rates(y: Tensor, x: Tensor, g: Tensor, position: bool = False) -> None:
    """Counts (R,) with a random intercept of each group; `position` indexes it in the way of plain tensors."""
    b0, b1 = pyro.param("b0", torch.tensor(0.2)), pyro.param("b1", torch.tensor(0.4))
    s = pyro.param("s", torch.tensor(0.8), constraint=positive)
    with pyro.plate("groups", int(g.max()) + 1):
        u = pyro.sample("u", dist.Normal(0.0, s))
    with pyro.plate("rows", len(y)):
        own = u[g] if position else u[..., g]
        pyro.sample("y", dist.Poisson((b0 + b1 * x + own).exp()), obs=y)


def slopes(y: Tensor, x: Tensor) -> None:
    """A correlated random intercept and slope for each row of answers (N, J), as one vector."""
    L = pyro.param("L", torch.tensor([[0.9, 0.0], [0.3, 0.6]]), constraint=constraints.lower_cholesky)
    d = pyro.param("d", torch.tensor(0.3))
    with pyro.plate("people", len(y)):
        b = pyro.sample("b", dist.MultivariateNormal(torch.zeros(2), scale_tril=L))
        eta = d + b[..., :1] + b[..., 1:] * x
        pyro.sample("y", dist.Bernoulli(logits=eta).to_event(1), obs=y)


def two_sites(y: Tensor, x: Tensor) -> None:
    """Independent intercept and slope, as two sites."""
    s = pyro.param("s", torch.tensor([0.9, 0.6]), constraint=positive)
    d = pyro.param("d", torch.tensor(0.3))
    with pyro.plate("people", len(y)):
        b = pyro.sample("b", dist.Normal(0.0, s[0]))
        c = pyro.sample("c", dist.Normal(0.0, s[1]))
        eta = d + b.unsqueeze(-1) + c.unsqueeze(-1) * x
        pyro.sample("y", dist.Bernoulli(logits=eta).to_event(1), obs=y)


def normal(y: Tensor) -> None:
    """Gaussian all through: the rule is exact with any number of nodes."""
    mu = pyro.param("mu", torch.tensor(0.5))
    s, e = (pyro.param(name, torch.tensor(start), constraint=positive) for name, start in (("s", 0.7), ("e", 1.2)))
    with pyro.plate("groups", len(y), dim=-2):
        b = pyro.sample("b", dist.Normal(mu, s))
        with pyro.plate("repeats", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(b, e), obs=y)


def mixed_items(y: Tensor, K: int = 2) -> None:
    """Classes of people (N, J) to whom the items are of other difficulty: a mixture of item response models."""
    N, J = y.shape
    w = pyro.param("w", torch.full((K,), 1.0 / K), constraint=simplex)
    d = pyro.param("d", torch.linspace(-0.5, 0.5, K).unsqueeze(-1) + torch.linspace(-1, 1, J))
    a = pyro.param("a", torch.linspace(0.7, 1.6, J), constraint=positive)
    with pyro.plate("people", N, dim=-2):
        z = pyro.sample("z", dist.Categorical(w))
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("items", J, dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=d[z, torch.arange(J)] + a * theta), obs=y)


def groups_in_classes(y: Tensor, x: Tensor) -> None:
    """Groups (G, R) in classes with coefficients and a spread of their own; a datum of the group that only the class
    says something of, one that only the latent does, and a second discrete latent."""
    w = pyro.param("w", torch.tensor([0.3, 0.7]), constraint=simplex)
    b = pyro.param("b", torch.tensor([[-0.5, 0.2], [0.8, 0.5]]))
    s = pyro.param("s", torch.tensor([0.4, 0.8]), constraint=positive)
    m, c = pyro.param("m", torch.tensor([-0.5, 0.5])), pyro.param("c", torch.tensor([0.2, 0.4]))
    shift = pyro.param("shift", torch.tensor([0.0, 1.0]))
    with pyro.plate("groups", len(y), dim=-2):
        z = pyro.sample("z", dist.Categorical(w))
        v = pyro.sample("v", dist.Bernoulli(0.4)).long()
        u = pyro.sample("u", dist.Normal(shift[v], s[z]))
        pyro.sample("of_class", dist.Normal(m[z], 1.0), obs=x[:, :1])
        high = (x[:, 1:2] > x[:, 1].median()).double()
        pyro.sample("of_latent", dist.Bernoulli(logits=c[0] + c[1] * u), obs=high)
        with pyro.plate("repeats", y.shape[1], dim=-1):
            pyro.sample("y", dist.Poisson((b[z, 0] + b[z, 1] * x + u).exp()), obs=y)


def mixed_slopes(y: Tensor, x: Tensor) -> None:
    """Correlated intercepts and slopes as one vector, with a covariance and a mean for each class."""
    w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=simplex)
    L = torch.tensor([[[0.9, 0.0], [0.3, 0.6]], [[0.5, 0.0], [-0.2, 0.4]]])
    L = pyro.param("L", L, constraint=constraints.lower_cholesky)
    d = pyro.param("d", torch.tensor([-0.5, 0.5]))
    with pyro.plate("people", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        b = pyro.sample("b", dist.MultivariateNormal(torch.zeros(2), scale_tril=L[z]))
        eta = d[z].unsqueeze(-1) + b[..., :1] + b[..., 1:] * x
        pyro.sample("y", dist.Bernoulli(logits=eta).to_event(1), obs=y)


def drawn_by_ability(y: Tensor) -> None:
    """The class itself depends on the latent."""
    N, J = y.shape
    d, c = pyro.param("d", torch.linspace(-1, 1, J)), pyro.param("c", torch.tensor([0.2, 0.7]))
    e = pyro.param("e", torch.tensor([-0.5, 0.5]))
    with pyro.plate("people", N, dim=-2):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Bernoulli(logits=c[0] + c[1] * theta)).long()
        with pyro.plate("items", J, dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=d + e[z] + theta), obs=y)


def mixed_dispersion(y: Tensor, x: Tensor) -> None:
    """Negative binomial counts (G, R), with a size for each class."""
    w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=simplex)
    b, s = (
        pyro.param("b", torch.tensor([[0.2, 0.4], [-0.3, 0.1]])),
        pyro.param("s", torch.tensor(0.6), constraint=positive),
    )
    size = pyro.param("size", torch.tensor([2.0, 3.0]), constraint=positive)
    with pyro.plate("groups", len(y), dim=-2):
        z = pyro.sample("z", dist.Categorical(w))
        u = pyro.sample("u", dist.Normal(0.0, s))
        with pyro.plate("repeats", y.shape[1], dim=-1):
            eta = b[z, 0] + b[z, 1] * x + u
            pyro.sample("y", dist.NegativeBinomial(size[z], logits=eta - size[z].log()), obs=y)


def classes_of_groups(y: Tensor, x: Tensor, g: Tensor, position: bool = False) -> None:
    """Counts (R,) whose coefficients and spread depend on the class of their group."""
    w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=simplex)
    b = pyro.param("b", torch.tensor([[-0.3, 0.2], [0.7, 0.5]]))
    s = pyro.param("s", torch.tensor([0.5, 0.8]), constraint=positive)
    with pyro.plate("groups", int(g.max()) + 1):
        z = pyro.sample("z", dist.Categorical(w))
        u = pyro.sample("u", dist.Normal(0.0, s[z]))
    with pyro.plate("rows", len(y)):
        class_, own = (z[g], u[g]) if position else (z[..., g], u[..., g])
        pyro.sample("y", dist.Poisson((b[class_, 0] + b[class_, 1] * x + own).exp()), obs=y)


def classes_as_a_table(y: Tensor, x: Tensor, seen: Tensor) -> None:
    """The same as a table (G, W) of groups, with cells that are not `seen`."""
    w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=simplex)
    b = pyro.param("b", torch.tensor([[-0.3, 0.2], [0.7, 0.5]]))
    s = pyro.param("s", torch.tensor([0.5, 0.8]), constraint=positive)
    with pyro.plate("groups", len(y), dim=-2):
        z = pyro.sample("z", dist.Categorical(w))
        u = pyro.sample("u", dist.Normal(0.0, s[z]))
        with pyro.plate("rows", y.shape[1], dim=-1):
            rate = (b[z, 0] + b[z, 1] * x + u).exp()
            pyro.sample("y", dist.Poisson(rate).mask(seen), obs=y)


def classes_of_schools(y: Tensor, g: Tensor, school: Tensor) -> None:
    """Answers (R,) of pupils g, whose ability has the mean of their school's class."""
    w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=simplex)
    m, d = pyro.param("m", torch.tensor([-1.0, 1.0])), pyro.param("d", torch.linspace(-1, 1, 3))
    with pyro.plate("schools", int(school.max()) + 1):
        z = pyro.sample("z", dist.Categorical(w))
    with pyro.plate("pupils", len(school)):
        u = pyro.sample("u", dist.Normal(m[z[..., school]], 0.7))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=d[torch.arange(len(y)) % 3] + u[..., g]), obs=y)


def inflated(y: Tensor, x: Tensor, g: Tensor) -> None:
    """Counts (R,) with more zeros than they should have, and a random intercept of each group."""
    gate = pyro.param("gate", torch.tensor(0.3), constraint=unit)
    b = pyro.param("b", torch.tensor([0.3, 0.4]))
    s = pyro.param("s", torch.tensor(0.7), constraint=positive)
    with pyro.plate("groups", int(g.max()) + 1):
        u = pyro.sample("u", dist.Normal(0.0, s))
    with pyro.plate("rows", len(y)):
        rate = (b[0] + b[1] * x + u[..., g]).exp()
        pyro.sample("y", dist.ZeroInflatedPoisson(rate, gate=gate), obs=y)


def inflated_by_row(y: Tensor, x: Tensor, g: Tensor) -> None:
    """The same with a share of zeros that depends on the covariate."""
    c, b = pyro.param("c", torch.tensor([-0.8, 0.3])), pyro.param("b", torch.tensor([0.3, 0.4]))
    s = pyro.param("s", torch.tensor(0.7), constraint=positive)
    with pyro.plate("groups", int(g.max()) + 1):
        u = pyro.sample("u", dist.Normal(0.0, s))
    with pyro.plate("rows", len(y)):
        rate = (b[0] + b[1] * x + u[..., g]).exp()
        pyro.sample("y", dist.ZeroInflatedPoisson(rate, gate_logits=c[0] + c[1] * x), obs=y)


def two_kinds_of_rows(y: Tensor, g: Tensor) -> None:
    """Each row (R,) is of one of two kinds, of other levels; the rows of a group share an intercept."""
    w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=simplex)
    m, s = pyro.param("m", torch.tensor([-1.0, 1.0])), pyro.param("s", torch.tensor(0.7), constraint=positive)
    with pyro.plate("groups", int(g.max()) + 1):
        u = pyro.sample("u", dist.Normal(0.0, s))
    with pyro.plate("rows", len(y)):
        parts = dist.Poisson((m + u[..., g].unsqueeze(-1)).exp())
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(w), parts), obs=y)


def shares(y: Tensor, x: Tensor, g: Tensor) -> None:
    """Shares (R,) by their mean, of which the logit has a random intercept, and a precision for each kind of row."""
    b, s = pyro.param("b", torch.tensor([0.3, 0.4])), pyro.param("s", torch.tensor(0.7), constraint=positive)
    phi = pyro.param("phi", torch.tensor([8.0, 8.0]), constraint=positive)
    with pyro.plate("groups", int(g.max()) + 1):
        u = pyro.sample("u", dist.Normal(0.0, s))
    with pyro.plate("rows", len(y)):
        mean, own = torch.sigmoid(b[0] + b[1] * x + u[..., g]), phi[(x > 0).long()]
        pyro.sample("y", dist.Beta(mean * own, (1 - mean) * own), obs=y)


def overdispersed_trials(y: Tensor, x: Tensor, g: Tensor) -> None:
    """Successes (R,) among 12 by their mean, with a precision that depends on the covariate."""
    b, s = pyro.param("b", torch.tensor([0.3, 0.4])), pyro.param("s", torch.tensor(0.7), constraint=positive)
    c = pyro.param("c", torch.tensor([1.5, 0.0]))
    with pyro.plate("groups", int(g.max()) + 1):
        u = pyro.sample("u", dist.Normal(0.0, s))
    with pyro.plate("rows", len(y)):
        mean, phi = torch.sigmoid(b[0] + b[1] * x + u[..., g]), (c[0] + c[1] * x).exp()
        pyro.sample("y", dist.BetaBinomial(mean * phi, phi - mean * phi, 12), obs=y)
