"""Designs of vector arguments: the three products, by the matrix itself and by pieces, against loops over entries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_em import design, vector_design
from pyro_em.design import Design
from pyro_em.model.predictor import Term, at_entry
from pyro_em.softmax import MANY, log_softmax
from pyro_em.vector_design import SoftmaxCurvature, VectorDesign

D, K, N = 3, 2, 7
CELLS = torch.Size((K, 1, N))


def _terms() -> list[Term]:
    """Logits a[z, d] + b[z, d] x + c[d] u_d: the reference entry has no parameter, u differs by entry."""
    generator = torch.Generator().manual_seed(0)
    x, u = torch.randn(1, 1, N, 1, generator=generator), torch.randn(1, 1, N, D, generator=generator)
    index = torch.arange(K * D).reshape(K, 1, 1, D)
    index = torch.where(torch.arange(D) == 0, -1, index)
    return [
        Term("a", index, torch.ones(())),
        Term("b", index, x),
        Term("c", torch.arange(D), u),
    ]


STARTS, SIZE = {"a": 0, "b": K * D, "c": 2 * K * D}, 2 * K * D + D


@pytest.fixture(params=["matrix", "pieces", "chunks"])
def own(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> VectorDesign:
    if request.param != "matrix":
        monkeypatch.setattr(design, "DENSE", 0)
    if request.param == "chunks":
        monkeypatch.setattr(vector_design, "CHUNK", 40)
    return VectorDesign(_terms(), STARTS, SIZE, D, CELLS)


def _matrices() -> Tensor:
    """A_d over all cells, (D, cells, P)."""
    return torch.stack([Design([at_entry(t, d) for t in _terms()], STARTS, SIZE, CELLS).matrix() for d in range(D)])


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_predict_and_pull(own: VectorDesign) -> None:
    A, theta = _matrices(), _random(SIZE)
    expected = (A @ theta).reshape(D, *CELLS).movedim(0, -1)
    torch.testing.assert_close(own.predict(theta).expand(*CELLS, D), expected, rtol=0, atol=1e-13)
    for shape in ((*CELLS, D), (K, 1, 1, D), (N, D), (4, 1, 1, 1, N, D)):
        v = _random(*shape)
        wide = v.expand(*shape[: max(0, len(shape) - 4)], *CELLS, D).reshape(-1, *CELLS, D).sum(0)
        expected = torch.einsum("dcp,cd->p", A, wide.reshape(-1, D))
        torch.testing.assert_close(own.pull(v), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [CELLS, (K, 1, 1), (1, 1, N), (1,)])
def test_gram_matrices(own: VectorDesign, shape: tuple[int, ...]) -> None:
    A, W = _matrices(), _random(*shape, D, D)
    W = W + W.mT
    wide = W.expand(*CELLS, D, D).reshape(-1, D, D)
    expected = torch.einsum("dcp,cde,ecq->pq", A, wide, A)
    torch.testing.assert_close(own.gram_matrix(W), expected, rtol=0, atol=1e-11)
    p, total = _random(*shape, D).softmax(-1), _random(*shape, 1).abs()
    softmax = SoftmaxCurvature(total * p, total.sqrt() * p)
    wide = total.unsqueeze(-1) * (torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2))
    expected = torch.einsum("dcp,cde,ecq->pq", A, wide.expand(*CELLS, D, D).reshape(-1, D, D), A)
    torch.testing.assert_close(own.gram_matrix(softmax), expected, rtol=0, atol=1e-11)


def test_softmax_over_few_entries() -> None:
    """A table that is taken along its first dim has the values and the gradient of torch's own."""
    x = 30 * _random(5, MANY // 10, 3)
    for table in (x, x.movedim(1, 0), x[..., :2]):
        one, other = table.clone().requires_grad_(), table.clone().requires_grad_()
        torch.testing.assert_close(log_softmax(one), other.log_softmax(-1), rtol=1e-14, atol=1e-13)
        slopes = [
            torch.autograd.grad(f(t).sin().sum(), t)[0]
            for f, t in ((log_softmax, one), (lambda t: t.log_softmax(-1), other))
        ]
        torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-12)
