"""Published fits of normal vectors with missing cells; each function returns its case's quantities by name."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyro_em
from models import mvn_missing
from tests.published import CASES, Found
from tests.zoo_missing import normal


def read(name: str) -> Tensor:
    """All columns of a data file whose empty cells are missing."""
    return torch.tensor(np.genfromtxt(CASES / "data" / f"{name}.csv", delimiter=",", skip_header=1))


def mvn_fitness1() -> Found:
    x = read("fitness1_sas")
    constant = float((~x.isnan()).sum()) * math.log(2 * math.pi)
    result = pyro_em.fit(mvn_missing.model, x, missing="nan", tol=1e-10)
    # The published start, too, is that of the model: means and variances of the available cells.
    history = pyro_em.fit(mvn_missing.model, x, missing="nan", tol=0, max_iter=9).history["log_likelihood"]
    return {
        "mu": result.params["loc"],
        "Sigma": result.params["covariance"],
        "-2loglik without 2 pi": -2 * result.log_likelihood - constant,
        "EM history of -2loglik": [-2 * value - constant for value in history],
        "loglik with constants": result.log_likelihood,
    }


def mvn_murray() -> Found:
    x = read("murray1977")

    def centred(x: Tensor) -> None:
        S = pyro.param("S", torch.tensor([[1.0, 0.3], [0.3, 1.0]]), constraint=constraints.positive_definite)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), covariance_matrix=S), obs=x)

    best = pyro_em.fit(centred, x, missing="nan", tol=1e-10)
    S = best.params["S"]
    assert float(S[1, 1]) == pytest.approx(float(S[0, 0]), abs=1e-7)
    start = {"mu": torch.zeros(2), "S": torch.eye(2)}
    saddle = pyro_em.fit(normal, x, missing="nan", init=start, tol=1e-10)
    assert saddle.converged
    torch.testing.assert_close(saddle.params["S"], 2.5 * torch.eye(2), atol=1e-8, rtol=0)
    return {
        "sigma11=sigma22": S[0, 0],
        "abs(rho)": S[0, 1].abs() / S[0, 0],
        "loglik max": best.log_likelihood,
        "saddle: sigma=2.5, rho=0, loglik": saddle.log_likelihood,
    }
