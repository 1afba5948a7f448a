"""Mixtures of mixed models in long format: rows read the class and the random effects of their group by an index.

Oracle: log p(y_g) = log Σ_k w_k N(y_g; X_g m_k, s² I + X_g S_k X_gᵀ) by dense normals, group by group.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from pyro_em import Refusal
from pyro_em.e_step.auto import choose_engine
from pyro_em.e_step.interpreted import Interpreted
from pyro_em.e_step.pooled_groups import PooledGroups
from pyro_em.m_step.auto import MStep
from pyro_em.problem import bind
from tests.classics import positive, simplex
from tests.laws import largest_score, to_constrained, to_free
from tests.oracles import constraints as constraints_of

G = 6
_rng = torch.Generator().manual_seed(5)
GROUP = torch.arange(G).repeat_interleave(torch.tensor([3, 5, 2, 4, 6, 4]))
GROUP = GROUP[torch.randperm(len(GROUP), generator=_rng)]
DAY = torch.randint(0, 4, (len(GROUP),), generator=_rng).double()
SIGN = torch.tensor([1.0, -1, 1, -1, -1, 1], dtype=torch.float64)[:, None]
EFFECT = torch.randn(G, 2, generator=_rng, dtype=torch.float64) * torch.tensor([0.9, 0.5]).double()
EFFECT = EFFECT + SIGN * torch.tensor([-1.5, 0.6]).double()
NOISE = 0.6 * torch.randn(len(GROUP), generator=_rng, dtype=torch.float64)
Y = EFFECT[GROUP, 0] + EFFECT[GROUP, 1] * DAY + NOISE
SCHOOL = torch.tensor([0, 1, 0, 2, 1, 2])


def _classes() -> Tensor:
    return pyro.sample("z", dist.Categorical(pyro.param("w", torch.tensor([0.4, 0.6]), constraint=simplex)))


def shifted(group: Tensor, day: Tensor, y: Tensor) -> None:
    """An intercept by class in the rows, spreads of effects by class."""
    a = pyro.param("a", torch.tensor([-0.5, 0.8]))
    tau = pyro.param("tau", torch.tensor([0.7, 1.2]), constraint=positive)
    s = pyro.param("s", torch.tensor(0.9), constraint=positive)
    with pyro.plate("groups", G):
        z = _classes()
        b = pyro.sample("b", dist.Normal(0.0, tau[z]))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a[z[group]] + b[group], s), obs=y)


def centred(group: Tensor, day: Tensor, y: Tensor) -> None:
    """The mean of the effects depends on the class, which the rows do not read themselves."""
    a = pyro.param("a", torch.tensor([-0.5, 0.8]))
    tau = pyro.param("tau", torch.tensor(0.8), constraint=positive)
    s = pyro.param("s", torch.tensor(0.9), constraint=positive)
    with pyro.plate("groups", G):
        z = _classes()
        b = pyro.sample("b", dist.Normal(a[z], tau))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(b[group], s), obs=y)


def growing(group: Tensor, day: Tensor, y: Tensor) -> None:
    """Lines by class, intercepts by group, with an index that the model applies to what it made of the class."""
    a, c = pyro.param("a", torch.tensor([-0.5, 0.8])), pyro.param("c", torch.tensor([0.1, -0.1]))
    tau = pyro.param("tau", torch.tensor(0.8), constraint=positive)
    s = pyro.param("s", torch.tensor(0.9), constraint=positive)
    with pyro.plate("groups", G):
        z = _classes()
        b = pyro.sample("b", dist.Normal(0.0, tau))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a[z][group] + c[z[group]] * day + b[group], s), obs=y)


def vectors(group: Tensor, day: Tensor, y: Tensor) -> None:
    """Intercepts and slopes by group, normal vectors with means and covariances by class."""
    m = pyro.param("m", torch.tensor([[-0.5, 0.1], [0.8, -0.1]]))
    S = pyro.param("S", torch.stack([torch.eye(2), 0.5 * torch.eye(2)]), constraint=constraints.positive_definite)
    s = pyro.param("s", torch.tensor(0.9), constraint=positive)
    with pyro.plate("groups", G):
        z = _classes()
        b = pyro.sample("b", dist.MultivariateNormal(m[z], covariance_matrix=S[z]))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(b[group, 0] + b[group, 1] * day, s), obs=y)


def schools(group: Tensor, day: Tensor, y: Tensor) -> None:
    """Classes of schools, effects of pupils within them."""
    a = pyro.param("a", torch.tensor([-0.5, 0.8]))
    tau = pyro.param("tau", torch.tensor(0.9), constraint=positive)
    with pyro.plate("schools", 3):
        z = _classes()
    with pyro.plate("groups", G):
        b = pyro.sample("b", dist.Normal(a[z[SCHOOL]], tau))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(b[group] + 0.5 * a[z[SCHOOL[group]]], 1.0), obs=y)


MODELS = (shifted, centred, growing, vectors, schools)


def _table(model: Callable[..., None], p: Mapping[str, Tensor]) -> Tensor:
    """log w_k p(y_g | k), (G, K); of `schools` by school."""
    rows = []
    for g in range(G):
        here = g == GROUP
        y, X = Y[here], torch.stack([torch.ones(int(here.sum())), DAY[here]], 1)
        one, own = X[:, :1], []
        for k in range(2):
            tau = p["tau"].expand(2)[k] if "tau" in p else torch.zeros(())
            mean, spread = p["a"][k] * one[:, 0] if "a" in p else X @ p["m"][k], tau**2 * one @ one.mT
            if model is growing:
                mean = mean + p["c"][k] * X[:, 1]
            elif model is vectors:
                spread = X @ p["S"][k] @ X.mT
            elif model is schools:
                mean = 1.5 * mean
            noise = (p["s"] ** 2 if "s" in p else 1.0) * torch.eye(len(y))
            own.append(dist.MultivariateNormal(mean, spread + noise).log_prob(y))
        rows.append(torch.stack(own))
    table = torch.stack(rows)
    if model is schools:
        table = torch.zeros(3, 2).index_add(0, SCHOOL, table)
    return table + p["w"].log()


@pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_laws(model: Callable[..., None]) -> None:
    """G1 to G4: monotone, no gap, the posterior, and the score of the marginal likelihood."""
    data = GROUP, DAY, Y
    result = pyro_em.fit(model, *data, max_iter=6, tol=0)
    table, posterior = _table(model, result.params), result.posterior(*data)
    terms = table.logsumexp(1)
    assert result.exact and result.log_likelihood == pytest.approx(float(terms.sum()), rel=1e-12)
    assert result.elbo == pytest.approx(result.log_likelihood, rel=1e-11)
    assert (np.diff(result.history["objective"]) > 0).all()
    torch.testing.assert_close(result.log_prob(*data), terms, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(posterior.marginal("z").probs, table.softmax(1), rtol=1e-10, atol=1e-12)

    start = pyro_em.fit(model, *data, max_iter=0)
    support = constraints_of(model, data, start.params)
    free = {n: u.requires_grad_() for n, u in to_free(start.params, support).items()}
    value = _table(model, to_constrained(free, support)).logsumexp(1).sum()
    gradient = dict(zip(free, torch.autograd.grad(value, list(free.values())), strict=True))
    score = largest_score(gradient, start.params, support) / len(terms)
    assert float(start.history["score"][0]) == pytest.approx(score, rel=1e-7)


@pytest.mark.filterwarnings("ignore::pyro_em.BoundaryEstimate")
@pytest.mark.parametrize("model", [centred, growing], ids=lambda m: m.__name__)
def test_the_limit_is_a_maximum(model: Callable[..., None]) -> None:
    """G7: the marginal likelihood has no slope there in any parameter, and curves down."""
    result = pyro_em.fit(model, GROUP, DAY, Y, tol=1e-8, max_iter=3000, accelerate="squarem")
    assert result.converged
    support = constraints_of(model, (GROUP, DAY, Y), result.params)
    free = to_free(result.params, support)
    sizes, shapes = [u.numel() for u in free.values()], [u.shape for u in free.values()]

    def value(u: Tensor) -> Tensor:
        parts = [part.reshape(shape) for part, shape in zip(u.split(sizes), shapes, strict=True)]
        return _table(model, to_constrained(dict(zip(free, parts, strict=True)), support)).logsumexp(1).sum()

    at = torch.cat([u.reshape(-1) for u in free.values()])
    slope = torch.autograd.functional.jacobian(value, at)
    assert float(slope.abs().max()) <= 1e-6 * G
    assert float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(value, at)).max()) <= 1e-6


def two_measures(group: Tensor, day: Tensor, y: Tensor) -> None:
    """Two kinds of rows and a number of the group itself; a group more, which has no rows."""
    a, c = pyro.param("a", torch.tensor([-0.5, 0.8])), pyro.param("c", torch.tensor(0.1))
    tau = pyro.param("tau", torch.tensor([0.7, 1.1]), constraint=positive)
    s = pyro.param("s", torch.tensor([0.9, 0.8]), constraint=positive)
    rate = pyro.param("rate", torch.tensor([2.0, 3.0]), constraint=positive)
    with pyro.plate("groups", G + 1):
        z = _classes()
        b = pyro.sample("b", dist.Normal(0.0, tau[z]))
        pyro.sample("size", dist.Poisson(rate[z]), obs=torch.arange(G + 1) % 4.0)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a[z[group]] + c * day + b[group], s[z[group]]), obs=y)
    with pyro.plate("more", G):
        pyro.sample("x", dist.Normal(2.0 * b[SCHOOL], s[0]), obs=y[:G])


def uneven(group: Tensor, day: Tensor, y: Tensor) -> None:
    """Rows read the class for their noise only."""
    tau = pyro.param("tau", torch.tensor([0.7, 1.1]), constraint=positive)
    s = pyro.param("s", torch.tensor([0.9, 0.6]), constraint=positive)
    with pyro.plate("groups", G):
        z = _classes()
        b = pyro.sample("b", dist.Normal(0.3, tau[z]))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(b[group], s[z[group]]), obs=y)


COUNTS = torch.tensor([2.0, 1, 1, 3, 0, 1])


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        *((model, None) for model in (shifted, centred, growing, vectors, two_measures, uneven)),
        (shifted, {"groups": COUNTS}),
    ],
)
def test_the_compiled_engine_is_the_reference(model: Callable[..., None], weights: dict[str, Tensor] | None) -> None:
    """Evidence, score and updates, to the rounding of sums."""
    bound = bind(model, (GROUP, DAY, Y), {}, with_prior=False, weights=weights)
    m, own = MStep(bound, "auto", "em"), MStep(bound, "auto", "em")
    engine, reference = choose_engine(bound, m), Interpreted(bound)
    assert isinstance(engine, PooledGroups), engine.reason
    params = bound.start
    for _ in range(3):
        found, expected = engine.e_step(params), reference.e_step(params)
        assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-12)
        assert m.score(params, found) == pytest.approx(own.score(params, expected), rel=1e-8)
        (updated, info), (params, other) = m.update(params, found), own.update(params, expected)
        assert info.empty == other.empty
        for name, value in params.items():
            torch.testing.assert_close(updated[name], value, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("model", [shifted, growing], ids=lambda m: m.__name__)
def test_effects_given_the_class(model: Callable[..., None]) -> None:
    """E b = Σ_k q_k E[b | k], with the law of total variance, and draws that agree with both."""
    p = pyro_em.fit(model, GROUP, DAY, Y, max_iter=2, tol=0)
    posterior, q = p.posterior(), _table(model, p.params).softmax(1)
    tau, s = p.params["tau"].expand(2), p.params["s"]
    line = p.params["a"] + (p.params["c"] * DAY[:, None] if model is growing else torch.zeros(len(Y), 2))  # (N, K)
    count = torch.bincount(GROUP).double()[:, None]
    total = torch.zeros(G, 2).index_add(0, GROUP, Y[:, None] - line)
    precision = count / s**2 + 1 / tau**2
    mean = total / s**2 / precision
    expected = (q * mean).sum(1)
    variance = (q * (1 / precision + (mean - expected[:, None]) ** 2)).sum(1)
    torch.testing.assert_close(posterior.mean("b"), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(posterior.variance("b"), variance, rtol=1e-9, atol=1e-10)
    drawn = posterior.sample(4000)
    torch.testing.assert_close(drawn["b"].mean(0), expected, rtol=0, atol=0.08)
    together = (drawn["b"] * drawn["z"]).mean(0)  # of the effect and its class
    torch.testing.assert_close(together, q[:, 1] * mean[:, 1], rtol=0, atol=0.08)
    mode = posterior.mode()
    k = mode["z"]
    torch.testing.assert_close(mode["b"], mean[torch.arange(G), k], rtol=1e-9, atol=1e-10)


def test_counts_with_a_gamma_effect() -> None:
    """Negative binomial mixtures: rates of groups are Gamma by class, and are integrated out."""
    counts = torch.poisson(torch.exp(0.5 * EFFECT[GROUP, 0] + 1.0), generator=torch.Generator().manual_seed(1))

    def model(group: Tensor, y: Tensor) -> None:
        shape = pyro.param("shape", torch.tensor([2.0, 5.0]), constraint=positive)
        rate = pyro.param("rate", torch.tensor([1.0, 1.5]), constraint=positive)
        with pyro.plate("groups", G):
            z = _classes()
            effect = pyro.sample("effect", dist.Gamma(shape[z], rate[z]))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Poisson(effect[group]), obs=y)

    result = pyro_em.fit(model, GROUP, counts, max_iter=3, tol=0)
    table = torch.zeros(G, 2)
    for g, k in itertools.product(range(G), range(2)):
        y, a, b = counts[g == GROUP], result.params["shape"][k], result.params["rate"][k]
        n, total = len(y), y.sum()
        table[g, k] = a * b.log() - torch.lgamma(a) + torch.lgamma(a + total) - (a + total) * (b + n).log()
        table[g, k] += result.params["w"][k].log() - torch.lgamma(y + 1).sum()
    assert result.log_likelihood == pytest.approx(float(table.logsumexp(1).sum()), rel=1e-12)
    torch.testing.assert_close(result.posterior().marginal("z").probs, table.softmax(1), rtol=1e-9, atol=1e-12)


def coupled(group: Tensor, other: Tensor, y: Tensor) -> None:
    a = pyro.param("a", torch.tensor([-0.5, 0.8]))
    tau = pyro.param("tau", torch.tensor(0.9), constraint=positive)
    with pyro.plate("groups", G):
        z = _classes()
    with pyro.plate("others", 3):
        b = pyro.sample("b", dist.Normal(0.0, tau))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(b[other] + a[z[group]], 1.0), obs=y)


@pytest.mark.parametrize("other", [torch.arange(len(Y)) % 3, SCHOOL[GROUP]], ids=["crossing", "within"])
def test_effects_of_other_groups_are_refused(other: Tensor) -> None:
    """Effects of schools beside classes of pupils couple all pupils of a school."""
    with pytest.raises(Refusal, match=r"'b'.*discrete latents in other plates \(read by y\).*exponential.*'svi'"):
        pyro_em.fit(coupled, GROUP, other, Y)
