"""The grouped engine (e_step/grouped.py) equals the reference: evidence, statistics, updates; and when it is chosen.

Statistics are compared as the gradient of every parameter's Q at random points: for an exponential family
that determines the moments, whatever centre they were taken about.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints, transform_to

import pyro_em
from pyro_em.e_step.auto import choose_engine
from pyro_em.e_step.base import Expectation, NotCompiled
from pyro_em.e_step.grouped import Grouped, compile_grouped
from pyro_em.e_step.interpreted import Interpreted
from pyro_em.e_step.predicted import Predicted
from pyro_em.errors import NonFiniteError
from pyro_em.m_step.auto import MStep
from pyro_em.m_step.separate import Separate
from pyro_em.problem import Problem, bind
from tests.graphs import random_graph
from tests.problems import PROBLEMS

simplex, positive = constraints.simplex, constraints.positive


def _uniform(*shape: int) -> Tensor:
    return torch.full(shape, 1.0 / shape[-1])


def _rows(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.2
    return table / table.sum(-1, keepdim=True)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _digits(*shape: int, below: int, seed: int = 0) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def hmm(y: Tensor, K: int = 3) -> None:
    """One sequence (T, D) without any plate."""
    pi = pyro.param("pi", _uniform(K), constraint=simplex)
    A = pyro.param("A", _uniform(K, K), constraint=simplex)
    mu = pyro.param("mu", torch.zeros(K, y.shape[-1]))
    L = pyro.param("L", torch.eye(y.shape[-1]).repeat(K, 1, 1), constraint=constraints.lower_cholesky)
    z = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
        pyro.sample(f"y_{t}", dist.MultivariateNormal(mu[z], scale_tril=L[z]), obs=y[t])


def poisson_hmm(y: Tensor, exposure: Tensor, K: int = 2) -> None:
    """Rates scaled by an exposure that changes with time."""
    pi = pyro.param("pi", _uniform(K), constraint=simplex)
    A = pyro.param("A", _uniform(K, K), constraint=simplex)
    rate = pyro.param("rate", 1.0 + torch.arange(K), constraint=positive)
    z = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
        pyro.sample(f"y_{t}", dist.Poisson(exposure[t] * rate[z]), obs=y[t])


def changing(words: Tensor, K: int = 2, V: int = 3) -> None:
    """Sequences (N, T); every step has a transition table of its own."""
    N, T = words.shape
    pi = pyro.param("pi", _uniform(K), constraint=simplex)
    A = pyro.param("A", _uniform(T - 1, K, K), constraint=simplex)
    B = pyro.param("B", _uniform(K, V), constraint=simplex)
    z = None
    with pyro.plate("sequences", N):
        for t in pyro.markov(range(T)):
            z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[t - 1][z]))
            pyro.sample(f"x_{t}", dist.Categorical(B[z]), obs=words[:, t])


def autoregressive(y: Tensor, K: int = 2) -> None:
    """The data of a step depend on two neighbouring states."""
    pi = pyro.param("pi", _uniform(K), constraint=simplex)
    A = pyro.param("A", _uniform(K, K), constraint=simplex)
    mu = pyro.param("mu", torch.zeros(K, K))
    with pyro.plate("sequences", len(y)):
        z = pyro.sample("z_0", dist.Categorical(pi))
        for t in pyro.markov(range(1, y.shape[1])):
            before, z = z, pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"y_{t}", dist.Normal(Vindex(mu)[before, z], 1.0), obs=y[:, t])


def tones(on: Tensor, K: int = 2) -> None:
    """Sequences (N, T, M) of M binary tones, in a plate inside of the sequences."""
    N, T, M = on.shape
    pi = pyro.param("pi", _uniform(K), constraint=simplex)
    A = pyro.param("A", _uniform(K, K), constraint=simplex)
    p = pyro.param("p", torch.full((K, M), 0.5), constraint=constraints.unit_interval)
    tone = pyro.plate("tones", M, dim=-1)
    z = None
    with pyro.plate("sequences", N, dim=-2):
        for t in pyro.markov(range(T)):
            z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
            with tone as m:
                pyro.sample(f"x_{t}", dist.Bernoulli(Vindex(p)[z, m]), obs=on[:, t])


def one_by_one(y: Tensor, K: int = 2) -> None:
    """Sequences in a Python loop: every one is a component of its own."""
    pi = pyro.param("pi", _uniform(K), constraint=simplex)
    A = pyro.param("A", _uniform(K, K), constraint=simplex)
    mu = pyro.param("mu", torch.zeros(K))
    for i in range(len(y)):
        z = None
        for t in pyro.markov(range(y.shape[1] - i % 2)):
            z = pyro.sample(f"z_{i}_{t}", dist.Categorical(pi if z is None else A[z]))
            pyro.sample(f"y_{i}_{t}", dist.Normal(mu[z], 1.0), obs=y[i, t])


def ragged(y: Tensor, lengths: Tensor, K: int = 2) -> None:
    pi = pyro.param("pi", _uniform(K), constraint=simplex)
    A = pyro.param("A", _uniform(K, K), constraint=simplex)
    mu = pyro.param("mu", torch.zeros(K))
    z = None
    with pyro.plate("sequences", len(y)):
        for t in pyro.markov(range(y.shape[1])):
            with pyro.poutine.mask(mask=t < lengths):  # type: ignore[call-overload]
                z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
                pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[:, t])


def factorial(y: Tensor) -> None:
    """Two chains that share the data: no chain, so the general path."""
    A = pyro.param("A", _uniform(2, 2), constraint=simplex)
    B = pyro.param("B", _uniform(2, 2), constraint=simplex)
    mu = pyro.param("mu", torch.zeros(2, 2))
    a = b = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        a = pyro.sample(f"a_{t}", dist.Categorical(A[a]))
        b = pyro.sample(f"b_{t}", dist.Categorical(B[b]))
        pyro.sample(f"y_{t}", dist.Normal(Vindex(mu)[a, b], 1.0), obs=y[t])


def scaled(y: Tensor) -> None:
    """Scaled, with a hidden family whose factor cannot move, and data that no latent reaches."""
    A = pyro.param("A", _uniform(2, 2), constraint=simplex)
    mu = pyro.param("mu", torch.zeros(2))
    level = pyro.param("level", torch.zeros(()))
    z = torch.tensor(0)
    with pyro.poutine.scale(scale=2.5):
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[t])
            pyro.sample(f"s_{t}", dist.VonMises(z * 1.0, 1.0), obs=y[t].remainder(3.0))
            pyro.sample(f"c_{t}", dist.Normal(level, 1.0), obs=y[t])


LEFT_RIGHT = torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.7, 0.3], [0.0, 0.0, 1.0]], dtype=torch.float64)
_start3 = {
    "pi": _rows(3),
    "A": _rows(3, 3),
    "mu": _normal(3, 2),
    "L": torch.eye(2, dtype=torch.float64).repeat(3, 1, 1),
}
_start2 = {"pi": _rows(2), "A": _rows(2, 2, seed=1)}
_series = _normal(6, 7, seed=2)
_lengths = torch.tensor([7, 1, 4, 0, 6, 7])
_means = {"mu": torch.tensor([-0.5, 1.0], dtype=torch.float64)}

CASES: dict[str, tuple[Any, tuple[Any, ...], dict[str, Tensor], dict[str, Tensor] | None]] = {
    "hmm": (hmm, (_normal(40, 2),), _start3, None),
    "two steps": (
        poisson_hmm,
        (torch.tensor([2.0, 6.0]), torch.ones(2)),
        {**_start2, "rate": torch.tensor([2.0, 5.0], dtype=torch.float64)},
        None,
    ),
    "left-right": (
        hmm,
        (_normal(30, 2) + 3.0 * (torch.arange(30) // 10 - 1.0).unsqueeze(-1),),
        {
            **_start3,
            "A": LEFT_RIGHT,
            "pi": torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64),
            "mu": torch.tensor([[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]], dtype=torch.float64),
        },
        None,
    ),
    "poisson": (
        poisson_hmm,
        (_digits(50, below=9).double(), 0.5 + _rows(50) * 50),
        {**_start2, "rate": torch.tensor([2.0, 5.0], dtype=torch.float64)},
        None,
    ),
    "changing": (
        changing,
        (_digits(5, 6, below=3),),
        {"pi": _rows(2), "A": _rows(5, 2, 2), "B": _rows(2, 3, seed=3)},
        None,
    ),
    "autoregressive": (autoregressive, (_series,), {**_start2, "mu": _normal(2, 2, seed=5)}, None),
    "tones": (
        tones,
        (_digits(4, 5, 3, below=2).double(),),
        {**_start2, "p": 0.2 + 0.6 * _rows(2, 3)},
        {"sequences": torch.tensor([1.0, 0.0, 2.5, 1.0])},
    ),
    "one by one": (one_by_one, (_series,), {**_start2, **_means}, None),
    "ragged": (
        ragged,
        (torch.where(torch.arange(7) < _lengths[:, None], _series, torch.nan), _lengths),
        {**_start2, **_means},
        {"sequences": torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5, 3.0])},
    ),
    "factorial": (factorial, (_normal(6),), {"A": _rows(2, 2), "B": _rows(2, 2, seed=1), "mu": _normal(2, 2)}, None),
    "scaled": (
        scaled,
        (_normal(9),),
        {"A": _rows(2, 2), **_means, "level": torch.tensor(0.3, dtype=torch.float64)},
        None,
    ),
}


def _same(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11, msg=lambda m: f"{what}: {m}")


def _gradients(problem: Problem, m_step: MStep, params: Mapping[str, Tensor], step: Expectation) -> dict[str, Tensor]:
    """∂Q/∂θ of every parameter at random points, the arguments of the others held at `params`."""
    found = {}
    for unit in m_step.units:
        if not isinstance(unit, Separate):
            continue  # blocks of locations have no kernel of their own; their updates are compared
        (name,) = unit.names
        theta = params[name].double()
        combined = unit.combined(theta, step.sufficient)
        inside = transform_to(problem.parameters[name].constraint)
        for i in range(3):
            u = 0.5 * _normal(*inside.inverse_shape(theta.shape), seed=i)
            found[f"{name} {i}"] = combined.gradient(inside(u))
    return found


def _agree(problem: Problem, start: Mapping[str, Tensor], updates: int = 3) -> Grouped:
    """The engine and the reference from the same start; fails where they differ."""
    grouped, reference = compile_grouped(problem), Interpreted(problem)
    ours, theirs = MStep(problem, "auto", "em"), MStep(problem, "auto", "em")
    params = {name: value.clone() for name, value in start.items()}
    for _ in range(updates):
        found, expected = grouped.e_step(params), reference.e_step(params)
        assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-12, abs=1e-12)
        assert found.log_prior == pytest.approx(expected.log_prior, rel=1e-12, abs=1e-12)
        assert found.magnitude == pytest.approx(expected.magnitude, rel=1e-12, abs=1e-12)
        for (name, a), b in zip(
            _gradients(problem, ours, params, found).items(),
            _gradients(problem, theirs, params, expected).values(),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11 * (1 + float(b.abs().max())), msg=name)
        ours_next, _ = ours.update(params, found)
        params, _ = theirs.update(params, expected)
        for name, value in params.items():
            _same(ours_next[name], value, name)
    return grouped


@pytest.mark.parametrize("name", CASES)
def test_chains(name: str) -> None:
    model, args, start, weights = CASES[name]
    grouped = _agree(bind(model, args, {}, with_prior=False, weights=weights), start)
    assert "0 of" in grouped.reason if name == "factorial" else "0 of" not in grouped.reason


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_problems(problem: Any) -> None:
    """Mixtures, latent classes, Dawid-Skene, blood groups, priors: whatever has closed forms."""
    weights = None if problem.weights is None else {problem.plate: problem.weights}
    bound = bind(problem.model, problem.args, {}, with_prior=problem.priors, weights=weights)
    m_step = MStep(bound, "auto", "em")
    if bound.graph.loops:
        return  # tests/test_scanned.py
    if problem.name == "censored_mixture":
        with pytest.raises(NotCompiled, match="constants of a shape of their own"):  # one limit per row
            compile_grouped(bound)
    elif m_step.separate:
        _agree(bound, problem.start())
    else:
        assert isinstance(choose_engine(bound, m_step), Interpreted | Predicted)


@pytest.mark.parametrize("seed", range(60))
def test_graphs(seed: int) -> None:
    """Random graphs: plates, nested plates, tied tables, structural zeros."""
    graph = random_graph(seed)
    torch.manual_seed(seed)
    _agree(bind(graph.model, (graph.simulate(),), {}, with_prior=False), graph.tables)


def test_a_chain_does_not_run_the_model_again() -> None:
    calls = []

    def counted(y: Tensor) -> None:
        calls.append(1)
        hmm(y)

    y = _normal(30, 2)
    problem = bind(counted, (y,), {}, with_prior=False)
    m_step = MStep(problem, "auto", "em")
    engine = choose_engine(problem, m_step)
    assert engine.name == "grouped"
    assert engine.reason == "60 sites evaluated as 3, 1 of 1 components smoothed as chains"
    calls.clear()
    params: Any = _start3
    for _ in range(5):
        params, _ = m_step.update(params, engine.e_step(params))
    assert not calls


@pytest.mark.filterwarnings("ignore::pyro_em.EMWarning")  # one sequence leaves no doubt about its first state
def test_fit_is_the_same_by_either_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    model, args, start, _ = CASES["hmm"]
    found = pyro_em.fit(model, *args, init=start, max_iter=25, tol=0)
    monkeypatch.setattr("pyro_em.e_step.auto.COMPILERS", ())
    expected = pyro_em.fit(model, *args, init=start, max_iter=25, tol=0)
    assert found.history["objective"] == pytest.approx(expected.history["objective"], rel=1e-12)
    assert found.history["score"] == pytest.approx(expected.history["score"], rel=1e-7)
    for name, value in expected.params.items():
        torch.testing.assert_close(found.params[name], value, rtol=1e-9, atol=1e-9)


def test_what_does_not_move_may_be_opaque() -> None:
    """A frozen parameter behind a softmax: the model is run again when its value is another."""

    def model(y: Tensor) -> None:
        rows = torch.softmax(pyro.param("logits", torch.zeros(2, 2)), -1)
        mu = pyro.param("mu", torch.zeros(2))
        z = torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(rows[z]))
            pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[t])

    problem = bind(model, (_normal(12),), {}, with_prior=False)
    m_step = MStep(problem, {"logits": "fixed"}, "em")
    engine = choose_engine(problem, m_step)
    assert isinstance(engine, Grouped)
    for seed in range(2):
        params = {"logits": _normal(2, 2, seed=seed), "mu": _normal(2, seed=7)}
        expected = Interpreted(problem).e_step(params)
        assert engine.e_step(params).log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-12)


def test_what_it_cannot_run_is_left_to_the_reference() -> None:
    """A moving parameter behind a softmax has no closed form."""

    def model(y: Tensor) -> None:
        rows = torch.softmax(pyro.param("logits", torch.zeros(2, 2)), -1)
        z = torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(rows[z]))
            pyro.sample(f"y_{t}", dist.Normal(z * 1.0, 1.0), obs=y[t])

    problem = bind(model, (_normal(5),), {}, with_prior=False)
    engine = choose_engine(problem, MStep(problem, "auto", "em"))
    assert isinstance(engine, Interpreted)
    assert "'logits' has no closed form on sufficient statistics" in engine.reason


def test_impossible_data_are_named_as_by_the_reference() -> None:
    model, args, _, _ = CASES["changing"]
    problem = bind(model, args, {}, with_prior=False)
    params = {"pi": _rows(2), "A": _rows(5, 2, 2), "B": torch.tensor([[1.0, 0, 0], [0, 1, 0]])}
    with pytest.raises(NonFiniteError) as found:
        compile_grouped(problem).e_step(params)
    with pytest.raises(NonFiniteError) as expected:
        Interpreted(problem).e_step(params)
    assert str(found.value) == str(expected.value)
