"""missing="nan": exact against per-row normals, naive EM in NumPy, hand-written masks, and numeric derivatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from pyro_em.distributions import IncompleteNormal, InverseWishart, patterns
from pyro_em.errors import Refusal, UnidentifiedParameter
from tests import zoo_missing as zoo
from tests.missing_data import NAN, START, Array, mixed, row_density, rows


def _naive(x: Array, w: Array, mu: Array, S: Array, tied: bool, steps: int) -> tuple[float, Array, Array, Array]:
    """EM row by row and component by component; rows without data are left out of the complete data."""
    x = x[~np.isnan(x).all(1)]
    K, D = mu.shape
    for _ in range(steps):
        log_joint = np.array([[np.log(w[k]) + row_density(row, mu[k], S[k]) for k in range(K)] for row in x])
        r = np.exp(log_joint - np.logaddexp.reduce(log_joint, 1)[:, None])
        first, second = np.zeros((K, D)), np.zeros((K, D, D))
        for n, row in enumerate(x):
            o, m = ~np.isnan(row), np.isnan(row)
            for k in range(K):
                gain = S[k][np.ix_(m, o)] @ np.linalg.inv(S[k][np.ix_(o, o)])
                full = row.copy()
                full[m] = mu[k][m] + gain @ (row[o] - mu[k][o])
                C = np.zeros((D, D))
                C[np.ix_(m, m)] = S[k][np.ix_(m, m)] - gain @ S[k][np.ix_(o, m)]
                first[k] += r[n, k] * full
                second[k] += r[n, k] * (np.outer(full, full) + C)
        count = r.sum(0)
        w, mu = count / count.sum(), first / count[:, None]
        scatter = second - count[:, None, None] * mu[:, :, None] * mu[:, None, :]
        S = np.repeat(scatter.sum(0, keepdims=True) / count.sum(), K, 0) if tied else scatter / count[:, None, None]
    log_joint = np.array([[np.log(w[k]) + row_density(row, mu[k], S[k]) for k in range(K)] for row in x])
    return float(np.logaddexp.reduce(log_joint, 1).sum()), w, mu, S


def _given(S: Tensor, given: str) -> Tensor:
    if given == "scale_tril":
        return torch.linalg.cholesky(S)
    return torch.linalg.inv(S) if given == "precision_matrix" else S


def _covariance(value: Tensor, given: str) -> Tensor:
    if given == "scale_tril":
        return value @ value.mT
    return torch.linalg.inv(value) if given == "precision_matrix" else value


@pytest.mark.parametrize("given", ["covariance_matrix", "scale_tril", "precision_matrix"])
@pytest.mark.parametrize("tied", [False, True])
def test_iterates_of_a_mixture_equal_naive_em(given: str, tied: bool) -> None:
    x, S = rows(), START["S"]
    init = {**START, "S": _given(S, given) if tied else _given(S, given).repeat(2, 1, 1)}
    result = pyro_em.fit(zoo.mixture, x, init=init, missing="nan", max_iter=3, tol=0, K=2, given=given, tied=tied)
    start = (START["w"].numpy(), START["mu"].numpy(), S.repeat(2, 1, 1).numpy())
    log_likelihood, w, mu, spread = _naive(x.numpy(), *start, tied, 3)
    assert result.log_likelihood == pytest.approx(log_likelihood, rel=1e-12)
    assert all(c.route == "closed" for c in result.plan.m_step)
    found = _covariance(result.params["S"], given)
    torch.testing.assert_close(result.params["w"], torch.tensor(w), atol=1e-11, rtol=0)
    torch.testing.assert_close(result.params["mu"], torch.tensor(mu), atol=1e-10, rtol=0)
    torch.testing.assert_close(found.expand(2, 3, 3), torch.tensor(spread), atol=1e-10, rtol=0)


def _marginal(x: Tensor, mu: Tensor, S: Tensor) -> Tensor:
    """Σ log p(x_o), differentiable, one row at a time."""
    total = torch.zeros(())
    for row, m, c in zip(x, mu.expand_as(x), S.expand(len(x), *S.shape[-2:]), strict=True):
        o = ~row.isnan()
        if bool(o.any()):
            total = total + torch.distributions.MultivariateNormal(m[o], c[o][:, o]).log_prob(row[o])
    return total


def _largest_gradient(objective: Any, values: dict[str, Tensor]) -> float:
    leaves = {n: v.detach().clone().requires_grad_() for n, v in values.items()}
    return max(float(g.abs().max()) for g in torch.autograd.grad(objective(leaves), list(leaves.values())))


def test_limit_of_one_normal_is_stationary_and_its_errors_are_the_curvature() -> None:
    x = rows(60)
    result = pyro_em.fit(zoo.normal, x, missing="nan", tol=1e-10, max_iter=5000)
    assert result.converged
    assert result.log_likelihood == pytest.approx(
        float(_marginal(x, result.params["mu"], result.params["S"])), rel=1e-12
    )

    def objective(v: dict[str, Tensor]) -> Tensor:
        return _marginal(x, v["mu"], (v["S"] + v["S"].mT) / 2)

    assert _largest_gradient(objective, result.params) < 1e-6

    lower = torch.tril_indices(3, 3)
    packed = torch.cat([result.params["mu"], result.params["S"][lower[0], lower[1]]])

    def unpacked(u: Tensor) -> Tensor:
        S = torch.zeros(3, 3).index_put((lower[0], lower[1]), u[3:])
        return _marginal(x, u[:3], S + S.tril(-1).mT)

    errors = torch.linalg.inv(-torch.autograd.functional.hessian(unpacked, packed)).diagonal().sqrt()
    found = result.standard_errors()
    torch.testing.assert_close(found["mu"], errors[:3], rtol=1e-5, atol=0)
    torch.testing.assert_close(found["S"][lower[0], lower[1]], errors[3:], rtol=1e-5, atol=0)


def test_opaque_covariance_and_locations_that_vary_by_row() -> None:
    x = rows(30)
    result = pyro_em.fit(zoo.exchangeable, x, missing="nan", tol=1e-9)
    assert result.converged

    def exchangeable(v: dict[str, Tensor]) -> Tensor:
        correlation = v["rho"] + (1 - v["rho"]) * torch.eye(3)
        return _marginal(x, v["mu"], v["sd"] * v["sd"].unsqueeze(-1) * correlation)

    assert _largest_gradient(exchangeable, result.params) < 1e-5

    c = torch.stack([torch.ones(30), torch.linspace(-1, 1, 30)], -1)
    result = pyro_em.fit(zoo.regression, x, c, missing="nan", tol=1e-9)
    assert result.converged
    gradient = _largest_gradient(lambda v: _marginal(x, c @ v["beta"], (v["S"] + v["S"].mT) / 2), result.params)
    assert gradient < 1e-5


def test_priors_and_a_diagonal_covariance() -> None:
    """A diagonal covariance makes the cells independent: the same model as univariate cells with a mask."""
    x = rows(30)
    vector = pyro_em.fit(zoo.conjugate, x, algorithm="map-em", missing="nan", tol=1e-11, max_iter=5000)
    cells = pyro_em.fit(zoo.diagonal, x, algorithm="map-em", missing="nan", tol=1e-11, max_iter=5000)
    assert vector.converged and cells.converged
    assert vector.log_posterior == pytest.approx(cells.log_posterior, rel=1e-11)
    for name, value in cells.params.items():
        torch.testing.assert_close(vector.params[name], value, atol=1e-6, rtol=0)


def test_inverse_wishart_prior() -> None:
    x = rows(25)

    def model(x: Tensor) -> None:
        S = pyro.sample("S", InverseWishart(6.0, torch.eye(3)))
        mu = pyro.param("mu", torch.zeros(3))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.MultivariateNormal(mu, covariance_matrix=S), obs=x)

    result = pyro_em.fit(model, x, algorithm="map-em", missing="nan", tol=1e-10, max_iter=5000)
    assert result.converged
    assert [row.route for row in result.plan.m_step] == ["closed", "closed"]

    def objective(v: dict[str, Tensor]) -> Tensor:
        S = (v["S"] + v["S"].mT) / 2
        return _marginal(x, v["mu"], S) + InverseWishart(6.0, torch.eye(3)).log_prob(S)

    assert _largest_gradient(objective, result.params) < 1e-6


def test_univariate_cells_equal_masks_written_by_hand() -> None:
    data = mixed()
    keep = tuple(~table.isnan() for table in data)
    filled = [table.nan_to_num(1.0) for table in data]
    found = pyro_em.fit(zoo.classes, *data, missing="nan", max_iter=30, tol=0)
    by_hand = pyro_em.fit(zoo.classes, *filled, keep=keep, max_iter=30, tol=0)
    assert found.log_likelihood == pytest.approx(by_hand.log_likelihood, rel=1e-13)
    for name, value in by_hand.params.items():
        torch.testing.assert_close(found.params[name], value, atol=1e-12, rtol=1e-12)


def test_svi_sees_the_same_likelihood() -> None:
    data = mixed()
    result = pyro_em.fit(zoo.classes, *data, missing="nan", algorithm="svi", max_iter=2, seed=0)
    assert result.elbo == pytest.approx(result.log_likelihood, rel=1e-10)
    x = rows(20)
    vector = pyro_em.fit(zoo.normal, x, missing="nan", algorithm="svi", max_iter=2, seed=0)
    expected = float(_marginal(x, vector.params["mu"], vector.params["S"]))
    assert vector.elbo == pytest.approx(expected, rel=1e-10)


def test_full_data_are_untouched_and_rows_without_data_count_nothing() -> None:
    x = rows(30)
    full = x.nan_to_num(0.3)
    init = {**START, "S": START["S"].repeat(2, 1, 1)}
    options: dict[str, Any] = {"init": init, "max_iter": 4, "tol": 0}
    plain, announced = (pyro_em.fit(zoo.mixture, full, missing=m, **options) for m in (None, "nan"))
    assert plain.log_likelihood == announced.log_likelihood
    assert all(torch.equal(plain.params[n], announced.params[n]) for n in plain.params)

    empty = x.isnan().all(-1)
    assert bool(empty.any())
    with_rows, without = (pyro_em.fit(zoo.mixture, d, missing="nan", **options) for d in (x, x[~empty]))
    assert with_rows.log_likelihood == pytest.approx(without.log_likelihood, rel=1e-13)
    for name, value in without.params.items():
        torch.testing.assert_close(with_rows.params[name], value, atol=1e-12, rtol=1e-12)
    pointwise = with_rows.log_prob()
    assert bool((pointwise[empty] == 0).all())
    assert float(pointwise.sum()) == pytest.approx(with_rows.log_likelihood, rel=1e-12)


def test_row_order_and_units() -> None:
    x = rows(30)
    options: dict[str, Any] = {"missing": "nan", "max_iter": 5, "tol": 0}
    first = pyro_em.fit(zoo.normal, x, init={"mu": torch.zeros(3), "S": torch.eye(3)}, **options)
    turned = pyro_em.fit(zoo.normal, x.flip(0), init={"mu": torch.zeros(3), "S": torch.eye(3)}, **options)
    assert turned.log_likelihood == pytest.approx(first.log_likelihood, rel=1e-12)
    a, b = 1e3, 1e6
    moved = pyro_em.fit(zoo.normal, a * x + b, init={"mu": torch.full((3,), b), "S": a * a * torch.eye(3)}, **options)
    cells = float((~x.isnan()).sum())
    assert moved.log_likelihood == pytest.approx(first.log_likelihood - cells * np.log(a), rel=1e-9)
    torch.testing.assert_close((moved.params["mu"] - b) / a, first.params["mu"], atol=1e-8, rtol=0)


@pytest.mark.parametrize("shared", [0, 10**9], ids=["a loop over patterns", "a table for every row"])
def test_density_of_batches(shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any batch dims of value and arguments, against one normal per row."""
    monkeypatch.setattr(patterns, "SHARED", shared)
    rng = np.random.default_rng(5)
    x = torch.tensor(rng.normal(size=(4, 1, 6, 2)))
    x[torch.tensor(rng.random((4, 1, 6, 2)) < 0.4)] = NAN
    root = torch.tensor(rng.normal(size=(3, 1, 2, 2)))
    covariances = [root @ root.mT + torch.eye(2), (root @ root.mT)[0, 0] + torch.eye(2)]
    covariances.append(covariances[1] * torch.linspace(1, 2, 6).reshape(6, 1, 1))  # of its own in every row
    for S in covariances:
        loc = torch.tensor(rng.normal(size=(3, 1, 2)))
        found = IncompleteNormal(loc, covariance_matrix=S).log_prob(x)
        full = torch.broadcast_shapes(x.shape[:-1], loc.shape[:-1], S.shape[:-2])
        rows = zip(
            x.expand(*full, 2).reshape(-1, 2),
            loc.expand(*full, 2).reshape(-1, 2),
            S.expand(*full, 2, 2).reshape(-1, 2, 2),
            strict=True,
        )
        expected = [row_density(r.numpy(), m.numpy(), c.numpy()) for r, m, c in rows]
        torch.testing.assert_close(found, torch.tensor(expected).reshape(full), atol=1e-12, rtol=1e-12)


def test_more_cells_than_bits() -> None:
    x = rows(6, 70)
    loc, S = torch.zeros(70), torch.eye(70) + 0.2
    expected = [row_density(row, loc.numpy(), S.numpy()) for row in x.numpy()]
    torch.testing.assert_close(IncompleteNormal(loc, S).log_prob(x), torch.tensor(expected), rtol=1e-12, atol=1e-12)


def test_column_never_observed() -> None:
    x = rows(20)
    x[:, 1] = NAN
    start = {"mu": torch.tensor([0.0, 7.0, 0.0]), "S": torch.diag(torch.tensor([1.0, 4.0, 1.0]))}
    with pytest.warns(UnidentifiedParameter, match=r"'x': cells .*1"):
        result = pyro_em.fit(zoo.normal, x, init=start, missing="nan")
    others = pyro_em.fit(zoo.normal, x[:, [0, 2]], missing="nan")
    assert result.log_likelihood == pytest.approx(others.log_likelihood, rel=1e-9)
    assert result.params["mu"][1] == pytest.approx(7.0)
    assert result.params["S"][1].tolist() == pytest.approx([0.0, 4.0, 0.0])

    data = mixed()
    data[0][:, 0] = NAN
    with pytest.warns(UnidentifiedParameter, match="'mu'"):
        result = pyro_em.fit(zoo.classes, *data, missing="nan")
    assert result.params["mu"][:, 0].tolist() == [-1.0, 1.0]


def test_obs_mask_of_a_continuous_site() -> None:
    x = rows(20)[:, 0]
    known = ~x.isnan()

    def model(x: Tensor, known: Tensor, read: bool = False) -> None:
        mu, sd = (
            pyro.param("mu", torch.tensor(0.5)),
            pyro.param("sd", torch.tensor(1.0), constraint=constraints.positive),
        )
        with pyro.plate("rows", len(x)):
            y = pyro.sample("x", dist.Normal(mu, sd), obs=x, obs_mask=known)
            if read:
                pyro.sample("next", dist.Normal(y, 1.0), obs=torch.zeros(len(x)))

    for data in (x, x.nan_to_num(99.0)):
        result = pyro_em.fit(model, data, known)
        assert float(result.params["mu"]) == pytest.approx(float(x[known].mean()))
        assert result.impute()["x"].sd[~known].tolist() == pytest.approx(
            [float(result.params["sd"])] * int((~known).sum())
        )
    with pytest.raises(Refusal, match=r"'next'.*'x'.*missing"):
        pyro_em.fit(model, x, known, read=True)
