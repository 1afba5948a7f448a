"""`result.impute()`: missing cells given the observed ones, against conditional normals, enumeration and moments."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

import pyro_em
from tests import zoo_missing as zoo
from tests.missing_data import START, Array, mixed, row_density, rows


def _conditional(row: Array, mu: Array, S: Array) -> tuple[Array, Array]:
    o, m = ~np.isnan(row), np.isnan(row)
    gain = S[np.ix_(m, o)] @ np.linalg.pinv(S[np.ix_(o, o)])
    return mu[m] + gain @ (row[o] - mu[o]), S[np.ix_(m, m)] - gain @ S[np.ix_(o, m)]


def test_imputations_of_a_mixture() -> None:
    x = rows(12)
    result = pyro_em.fit(
        zoo.mixture, x, init={**START, "S": START["S"].repeat(2, 1, 1)}, missing="nan", max_iter=2, tol=0
    )
    p = {n: v.numpy() for n, v in result.params.items()}
    filled = result.impute()["x"]
    assert torch.equal(filled.missing, x.isnan())
    assert torch.equal(filled.mean[~x.isnan()], x[~x.isnan()])
    assert bool((filled.sd[~x.isnan()] == 0).all())
    for n, row in enumerate(x.numpy()):
        joint = np.array([np.log(p["w"][k]) + row_density(row, p["mu"][k], p["S"][k]) for k in range(2)])
        r = np.exp(joint - np.logaddexp.reduce(joint))
        parts = [_conditional(row, p["mu"][k], p["S"][k]) for k in range(2)]
        mean = sum(r[k] * parts[k][0] for k in range(2))
        second = sum(r[k] * (np.diag(parts[k][1]) + parts[k][0] ** 2) for k in range(2))
        gone = np.isnan(row)
        np.testing.assert_allclose(filled.mean[n].numpy()[gone], mean, atol=1e-12)
        np.testing.assert_allclose(filled.variance[n].numpy()[gone], second - mean**2, atol=1e-12)
    draws = filled.sample(400, seed=1)
    assert bool((draws[:, ~x.isnan()] == x[~x.isnan()]).all())
    error = (draws.mean(0) - filled.mean)[x.isnan()] / filled.sd[x.isnan()]
    assert float(error.abs().max()) < 4.5 / np.sqrt(400)


def test_draws_are_joint() -> None:
    """Means and covariances of the missing cells of a row, against those of the normal given its other cells."""
    x = rows(12)
    result = pyro_em.fit(zoo.normal, x, missing="nan", max_iter=3, tol=0)
    mu, S = (result.params[n].numpy() for n in ("mu", "S"))
    filled = result.impute()["x"]
    draws = filled.sample(4000, seed=1)
    assert draws.shape == (4000, 12, 3)
    assert torch.equal(draws, filled.sample(4000, seed=1))
    assert not torch.equal(draws, filled.sample(4000, seed=2))
    for n, row in enumerate(x.numpy()):
        gone = np.isnan(row)
        if gone.any():
            mean, covariance = _conditional(row, mu, S)
            own = draws[:, n].numpy()[:, gone]
            scale = np.sqrt(np.diag(covariance))
            assert np.abs((own.mean(0) - mean) / scale).max() < 4.5 / np.sqrt(4000)
            found = np.cov(own.T).reshape(covariance.shape)
            assert np.abs((found - covariance) / np.outer(scale, scale)).max() < 7 / np.sqrt(4000)


def test_imputations_of_counts_and_categories() -> None:
    data = mixed()
    result = pyro_em.fit(zoo.classes, *data, missing="nan", max_iter=5, tol=0)
    found = result.impute()
    assert found.keys() == {"x", "count", "colour"}
    r, p = result.posterior().responsibilities("z"), result.params
    gone = data[1].isnan()
    rate = r @ p["rate"]
    torch.testing.assert_close(found["count"].mean[gone], rate[gone])
    second = r @ (p["rate"] + p["rate"] ** 2)
    torch.testing.assert_close(found["count"].variance[gone], (second - rate**2)[gone])
    gone = data[2].isnan()
    assert found["colour"].probabilities is not None
    torch.testing.assert_close(found["colour"].probabilities[gone], (r @ p["shade"])[gone])
    draws = found["colour"].sample(50)[:, gone]
    assert set(draws.unique().tolist()) <= {0.0, 1.0, 2.0}


def test_imputations_where_labels_say_what_was_seen() -> None:
    """`obs_mask` of sites with finitely many values: under their own names, by Bayes' rule given the other sites."""
    known, x = torch.tensor([True, False, True, False]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    kind = torch.nn.functional.one_hot(torch.tensor([2, 0, 1, 0]), 3).double()
    y = torch.tensor([0.3, 1.5, -0.4, -2.0])

    def model() -> None:
        p = pyro.param("p", torch.tensor(0.4), constraint=constraints.unit_interval)
        w = pyro.param("w", torch.tensor([0.2, 0.3, 0.5]), constraint=constraints.simplex)
        with pyro.plate("rows", 4):
            z = pyro.sample("z", dist.Bernoulli(p), obs=x, obs_mask=known)
            k = pyro.sample("k", dist.OneHotCategorical(w), obs=kind, obs_mask=known)
            pyro.sample("y", dist.Normal(z + k @ torch.tensor([0.0, 1.0, -1.0]), 1.0), obs=y)

    found = pyro_em.fit(model, max_iter=0).impute()
    assert found.keys() == {"z", "k"}
    shift = torch.arange(2.0).unsqueeze(-1) + torch.tensor([0.0, 1.0, -1.0])
    for row in (1, 3):
        joint = torch.tensor([[0.6], [0.4]]) * torch.tensor([0.2, 0.3, 0.5])
        joint = joint * dist.Normal(shift, 1.0).log_prob(y[row]).exp()
        joint = joint / joint.sum()
        one = float(joint[1].sum())
        assert float(found["z"].mean[row]) == pytest.approx(one, rel=1e-12)
        assert float(found["z"].variance[row]) == pytest.approx(one * (1 - one), rel=1e-11)
        torch.testing.assert_close(found["k"].mean[row], joint.sum(0), rtol=1e-12, atol=0)
    assert found["z"].mean[known].tolist() == [1.0, 0.0] and float(found["z"].variance[known].max()) == 0.0
    draws = found["z"].sample(50)
    assert draws.shape == (50, 4) and set(draws[:, [1, 3]].unique().tolist()) == {0.0, 1.0}
    assert found["k"].sample(3).shape == (3, 4, 3)


@pytest.mark.filterwarnings("ignore::pyro_em.UnidentifiedParameter")
def test_single_vectors_outside_of_plates() -> None:
    """A vector of its own has no dim for its row: log p of what is observed, by dense normals."""
    S = torch.tensor([[2.0, 0.5, 0.3], [0.5, 1.0, -0.2], [0.3, -0.2, 1.5]], dtype=torch.float64)
    rows = torch.tensor([[1.0, float("nan"), 0.2], [0.4, -1.0, 2.0]], dtype=torch.float64)

    def model() -> None:
        mu = pyro.param("mu", torch.zeros(3, dtype=torch.float64))
        for i in range(2):
            pyro.sample(f"y_{i}", dist.MultivariateNormal(mu, S), obs=rows[i])

    result = pyro_em.fit(model, missing="nan", max_iter=6, tol=0)
    mu, seen = result.params["mu"], torch.tensor([0, 2])
    part = dist.MultivariateNormal(mu[seen], S[seen][:, seen]).log_prob(rows[0, seen])
    expected = float(part + dist.MultivariateNormal(mu, S).log_prob(rows[1]))
    assert result.log_likelihood == pytest.approx(expected, abs=1e-10)
    mean = mu[1] + S[1, seen] @ torch.linalg.solve(S[seen][:, seen], rows[0, seen] - mu[seen])
    assert float(result.impute()["y_0"].mean[1]) == pytest.approx(float(mean), abs=1e-10)


def test_vectors_missing_as_a_whole_inside_of_an_event() -> None:
    table = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gone = torch.cat([table, torch.full((1, 3), torch.nan, dtype=torch.float64)])

    def model(x: torch.Tensor) -> None:
        mu = pyro.param("mu", torch.zeros(3, dtype=torch.float64))
        rows = dist.MultivariateNormal(mu, torch.eye(3, dtype=torch.float64)).expand([len(x)])
        pyro.sample("y", rows.to_event(1), obs=x)

    one, two = pyro_em.fit(model, table), pyro_em.fit(model, gone, missing="nan")
    assert one.log_likelihood == pytest.approx(two.log_likelihood, abs=1e-11)
    assert torch.allclose(two.params["mu"], table.mean(0), rtol=0, atol=1e-12)
