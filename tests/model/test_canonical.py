"""Logits that are log w of a simplex or logit p, factors of a covariance S: closed forms of w, p and S serve them."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from pyro_em.families import SOFTMAX
from pyro_em.model.canonical import rows_taken

X = torch.tensor([-2.1, -1.9, -2.4, 0.9, 1.2, 1.4, 0.3, -0.8], dtype=torch.float64)
Y = torch.stack([X, X.flip(0) + 0.3 * X, X.roll(3)], -1)


def _t(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def hidden(y: Tensor, by_log: bool) -> None:
    """Pyro's own HMM takes logits alone; row 0 of A cannot reach state 2."""
    w = pyro.param("w", _t([0.2, 0.3, 0.5]), constraint=constraints.simplex)
    A = pyro.param("A", _t([[0.6, 0.4, 0.0], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]]), constraint=constraints.simplex)
    loc = pyro.param("loc", _t([-1.0, 0.0, 1.0]))
    if by_log:
        pyro.sample("y", dist.DiscreteHMM(w.log(), A.log(), dist.Normal(loc, 1.0)), obs=y)
        return
    z: Any = pyro.sample("z", dist.Categorical(w))
    for t in pyro_em.markov(len(y)):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])


def mixture(x: Tensor, by_log: bool) -> None:
    w = pyro.param("w", _t([[0.3, 0.7], [0.6, 0.4]]), constraint=constraints.simplex)
    p = pyro.param("p", _t([0.2, 0.8]), constraint=constraints.unit_interval)
    with pyro.plate("data", len(x)):
        group = (x > 1).long()
        z = pyro.sample("z", dist.Categorical(logits=w.log()[group]) if by_log else dist.Categorical(w[group]))
        made = dist.Bernoulli(logits=(p / (1 - p)).log()[z]) if by_log else dist.Bernoulli(p[z])
        pyro.sample("x", made, obs=(x > 0).double())


def vectors(y: Tensor, by_log: bool) -> None:
    w = pyro.param("w", _t([0.4, 0.6]), constraint=constraints.simplex)
    loc = pyro.param("loc", _t([[-1.0, 0, 0], [1, 0, 1]]))
    S = pyro.param("S", torch.stack([_t([[2.0, 0.5, 0], [0.5, 1, 0.2], [0, 0.2, 1.5]])] * 2).clone(),
                   constraint=constraints.positive_definite)  # fmt: skip
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        shape = {"scale_tril": torch.linalg.cholesky(S)[z]} if by_log else {"covariance_matrix": S[z]}
        pyro.sample("y", dist.MultivariateNormal(loc[z], **shape), obs=y)


MODELS: dict[str, tuple[Any, Tensor]] = {
    "hidden": (hidden, X),
    "mixture": (mixture, X),
    "vectors": (vectors, Y.repeat(3, 1)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_updates_are_those_of_the_model_that_takes_the_parameters_themselves(name: str) -> None:
    model, data = MODELS[name]
    data = data + 0.1 * torch.arange(data.numel()).reshape(data.shape).double().sin()
    options: dict[str, Any] = {"max_iter": 5, "tol": 0}
    own, plain = (pyro_em.fit(model, data, by_log, **options) for by_log in (True, False))
    assert all(own.plan.route(n) == "closed" for n in own.params)
    for n, value in plain.params.items():
        assert torch.allclose(own.params[n], value, rtol=1e-10, atol=1e-12)
    assert own.history["log_likelihood"] == pytest.approx(plain.history["log_likelihood"], rel=1e-12)
    assert own.history["score"] == pytest.approx(plain.history["score"], rel=1e-8)
    if name == "hidden":
        assert float(own.params["A"][0, 2]) == 0.0


def test_what_is_no_row_of_the_parameter_is_not_taken_for_one() -> None:
    w = _t([[0.5, 0.5], [0.25, 0.75]]), _t([[0.125, 0.875], [0.625, 0.375]])
    first, second = w
    half = tuple((0.5 * x.log()) for x in w)  # a power of the row
    moved = first.log(), second.flip(0).log()  # another row at the second point
    assert rows_taken(SOFTMAX, 1, half, w) is None
    assert rows_taken(SOFTMAX, 1, moved, w) is None
    assert rows_taken(SOFTMAX, 1, (first.log(), first.log()), w) is None  # nothing of it moves
    assert rows_taken(SOFTMAX, 1, tuple(x[:, :1].log() for x in w), w) is None
    fixed = tuple(torch.stack([x[1].log(), _t([0.0, 1.0])]) for x in w)
    taken = rows_taken(SOFTMAX, 1, fixed, w)
    assert taken is not None and taken.tolist() == [[2, 3], [-1, -1]]
