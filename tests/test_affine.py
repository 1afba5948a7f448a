"""Affine locations: what is recognised as one, that the solve is exact, and what a poor design does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_em
from pyro_em.design import Design
from pyro_em.gram import gram_matrices
from pyro_em.model.predictor import Term
from pyro_em.problem import bind

N, P = 40, 3
RNG = np.random.default_rng(5)
X = torch.tensor(RNG.normal(size=(N, P)))
GROUP = torch.arange(N) % 4
Y = torch.tensor(RNG.normal(size=N))


def _param(name: str, *shape: int) -> Tensor:
    size = int(np.prod(shape))
    return pyro.param(name, (torch.arange(size) * 0.37).sin().reshape(shape))


LOCATIONS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "X @ w": (lambda z: X @ _param("w", P), 3),
    "intercept": (lambda z: _param("a") + X @ _param("w", P), 4),
    "by class": (lambda z: _param("a", 2)[z] + (X * _param("w", 2, P)[z]).sum(-1), 4),
    "einsum": (lambda z: torch.einsum("np,...np->...n", X, _param("w", 2, P)[z]), 3),
    "slope only": (lambda z: _param("a") + X[:, 0] * _param("w", 2)[z], 2),
    "indexed": (lambda z: _param("a", 4)[GROUP] + _param("w", 4)[GROUP] * X[:, 0], 2),
    "latent covariate": (lambda z: _param("a") + _param("w", 2)[0] * z + _param("w", 2)[1] * X[:, 1], 3),
    "cumsum": (lambda z: _param("w", P).cumsum(0)[GROUP.clamp(max=2)] + X[:, 0], 3),
    "offset": (lambda z: 3.0 - 2 * _param("a") + X[:, 1].exp(), 1),
}


def _model(location: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    def model() -> None:
        with pyro.plate("rows", N):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("y", dist.Normal(location(z), 1.3), obs=Y)

    return model


@pytest.mark.parametrize("name", LOCATIONS)
def test_the_design_is_read_off(name: str) -> None:
    """At new parameters the predictor gives the argument that the model gives."""
    location, num_terms = LOCATIONS[name]
    problem = bind(_model(location), (), {}, with_prior=False)
    predictors = {id(p): p for uses in problem.uses.values() for u in uses if (p := u.predictor) is not None}
    (predictor,) = predictors.values()
    assert len(predictor.terms) == num_terms
    assert sum(t.coefficient.numel() for t in predictor.terms) <= num_terms * N, "factored: nothing of size N K"
    params = {n: torch.randn_like(v) for n, v in problem.start.items()}
    expected = problem.run(params).sites["y"].arguments["loc"]  # type: ignore[index]
    torch.testing.assert_close(predictor.argument(params).expand(expected.shape), expected, rtol=1e-13, atol=1e-13)
    assert problem.recognised


@pytest.mark.parametrize(
    "location",
    [
        lambda z: _param("a") * (X @ _param("w", P)),
        lambda z: (X @ _param("w", P)).tanh(),
        lambda z: (X @ _param("w", P)).relu(),
        lambda z: X @ _param("w", P) ** 2,
        lambda z: torch.sort(_param("w", P)).values[z] + X @ _param("w", P),
    ],
    ids=["product", "tanh", "relu", "square", "sort"],
)
def test_what_is_not_affine_is_not_taken_for_it(location: Callable[[Tensor], Tensor]) -> None:
    problem = bind(_model(location), (), {}, with_prior=False)
    assert not problem.recognised
    assert pyro_em.plan(_model(location)).route("w") != "closed"


def _dense(terms: list[Term], starts: dict[str, int], size: int, cells: torch.Size) -> Tensor:
    A = torch.zeros(*cells, size + 1)
    for term in terms:
        index = torch.where(term.index >= 0, term.index + starts[term.parameter], size).expand(cells)
        A.scatter_add_(-1, index.unsqueeze(-1), term.coefficient.expand(cells).unsqueeze(-1))
    return A[..., :size]


@pytest.mark.parametrize("names", [("a",), ("b",), ("a", "b"), ("b", "c"), ("a", "b", "c", "g")], ids="".join)
@pytest.mark.parametrize("shape", [(5, 30), (1, 30), (5, 1)], ids=str)
@pytest.mark.parametrize("formed", [True, False])
def test_designs_are_the_dense_products(
    names: tuple[str, ...], shape: tuple[int, int], formed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Intercepts and slopes by class, common slopes, group effects, against the (K, N, P) table."""
    if not formed:
        monkeypatch.setattr("pyro_em.design.DENSE", 0)
    K, R = 5, 30
    state = torch.arange(K).reshape(K, 1)
    known = {
        "a": ([Term("a", state, torch.ones(1, 1))], K),
        "b": ([Term("b", 2 * state + j, torch.randn(1, R)) for j in range(2)], 2 * K),
        "c": ([Term("c", torch.zeros(1, 1, dtype=torch.long), torch.randn(K, 1))], 1),
        "g": ([Term("g", torch.randint(-1, 4, (1, R)), torch.ones(1, 1))], 4),
    }
    starts, size, terms = {}, 0, []
    for name in names:
        starts[name], size = size, size + known[name][1]
        terms += known[name][0]
    cells = torch.Size((K, R))
    design, A = Design(terms, starts, size, cells), _dense(terms, starts, size, cells)
    theta, weight = torch.randn(size), torch.rand(shape)
    full = weight.expand(cells)
    torch.testing.assert_close(design.predict(theta).expand(cells), A @ theta)
    torch.testing.assert_close(design.pull(weight), torch.einsum("kn,knp->p", full, A))
    squares = full * (A @ theta) ** 2
    for keep in (frozenset[int](), frozenset({0}), frozenset({0, 1})):
        pieces = design.gram(weight, keep)
        torch.testing.assert_close(design.scatter(pieces), torch.einsum("kn,knp,knq->pq", full, A, A))
        gone = [i for i in range(2) if i not in keep]
        expected = squares.sum(gone, keepdim=True) if gone else squares
        torch.testing.assert_close(design.quadratic(pieces, theta, keep).expand(expected.shape), expected)
    assert (design.dense() is not None) == formed
    torch.testing.assert_close(design.gram_matrix(weight), torch.einsum("kn,knp,knq->pq", full, A, A))
    other = design.scatter(design.gram(weight, other=design), symmetric=False)
    torch.testing.assert_close(other, torch.einsum("kn,knp,knq->pq", full, A, A))


@pytest.mark.parametrize("states", [1, 4])
def test_gram_matrices_are_summed_by_chunks(states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_em.gram.CHUNK_BYTES", 1)
    x, w = torch.randn(6, 1000), torch.rand(states, 1000)
    torch.testing.assert_close(gram_matrices(w, x), torch.einsum("sn,an,bn->sab", w, x, x))
