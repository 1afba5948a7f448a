"""missing="nan": what is refused or an error, and the other ways into a fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_em
from pyro_em.errors import InputError, Refusal
from tests import zoo_missing as zoo
from tests.missing_data import NAN, row_density, rows


def _partly(x: Tensor, fn: Any) -> None:
    pyro.param("a", torch.tensor(1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", fn, obs=x)


@pytest.mark.parametrize(
    "fn", [dist.Dirichlet(torch.ones(3)), dist.Multinomial(3, torch.ones(3) / 3), dist.OneHotCategorical(torch.ones(3))]
)
def test_parts_of_other_vectors_are_refused(fn: Any) -> None:
    x = torch.tensor([[0.2, 0.3, 0.5], [NAN, NAN, NAN], [0.5, NAN, 0.5]])
    with pytest.raises(Refusal, match=f"'x'.*row 2.*{type(fn).__name__}"):
        pyro_em.fit(_partly, x, fn, missing="nan")


def test_bad_input() -> None:
    x = rows(10)
    with pytest.raises(InputError, match=r"'x'.*row .*NaN.*missing='nan'"):
        pyro_em.fit(zoo.normal, x)
    with pytest.raises(InputError, match=r"missing='mean'.*'nan'"):
        pyro_em.fit(zoo.normal, x, missing="mean")
    with pytest.raises(InputError, match="missing='mean'"):
        pyro_em.plan(zoo.normal, x, missing="mean")
    x[2, 0] = torch.inf
    with pytest.raises(InputError, match=r"'x'.*row 2"):
        pyro_em.fit(zoo.normal, x, missing="nan")
    with pytest.raises(InputError, match="num"):
        pyro_em.fit(zoo.normal, rows(10), missing="nan", max_iter=1).impute()["x"].sample(0)


def test_the_other_ways_in(tmp_path: Path) -> None:
    """plan, EM, new data, files, predictions."""
    x = rows(20)
    result = pyro_em.fit(zoo.normal, x, missing="nan", max_iter=3, tol=0)
    assert pyro_em.plan(zoo.normal, x, missing="nan").route("S") == "closed"
    pyro.clear_param_store()
    em = pyro_em.EM(zoo.normal, missing="nan")
    losses = em.run(x, num_steps=3)
    assert [-v for v in losses] == pytest.approx(result.history["objective"][:3], rel=1e-13)
    new = rows(7, seed=9)
    expected = [row_density(r, result.params["mu"].numpy(), result.params["S"].numpy()) for r in new.numpy()]
    torch.testing.assert_close(result.log_prob(new), torch.tensor(expected))
    assert bool(result.predictive(num_samples=2)["x"].isfinite().all())
    result.save(tmp_path / "fit.em")
    again = pyro_em.load(tmp_path / "fit.em", model=zoo.normal, args=(x,))
    assert torch.equal(again.impute()["x"].mean, result.impute()["x"].mean)
    tree = result.to_inference_data()
    assert int(np.isnan(tree["observed_data"]["x"].values).sum()) == int(x.isnan().sum())


@pytest.mark.parametrize("missing", [None, "nan"])
def test_data_that_the_model_computes_with(missing: str | None) -> None:
    """A start made from NaN fails before any site sees them: the argument and its row are named, not the algebra."""
    x = torch.eye(5).repeat(3, 1)
    x[7, 2] = torch.nan

    def model(x: Tensor) -> None:
        _, vectors = torch.linalg.eigh(x.T @ x)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc", vectors[0]), 1.0).to_event(1), obs=x)

    with pytest.raises(pyro_em.InputError, match=r"NaN in row 7, .* before a site observes it"):
        pyro_em.fit(model, x, missing=missing)


def test_other_failures_of_a_model_are_its_own() -> None:
    def model(x: Tensor) -> None:
        raise KeyError("covariate")

    with pytest.raises(KeyError, match="covariate"):
        pyro_em.fit(model, torch.zeros(3))
