"""Published cases of data seen only in part: censored and truncated responses."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.distributions import Censored, Truncated
from tests.classics import positive, unit
from tests.published import Found, fit, read


def _regression(design: Tensor, y: Tensor, lower: Any, upper: Any) -> None:
    coefficients = pyro.param("coefficients", torch.zeros(design.shape[-1]))
    scale = pyro.param("scale", y.std(), constraint=positive)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", Censored(dist.Normal(design @ coefficients, scale), lower, upper), obs=y)


def cens_motorettes() -> Found:
    temperature, time, failed = read("motors", "temp", "time", "cens").unbind(-1)
    y, inverse = time.log10(), 1000 / (temperature + 273.2)
    design = torch.stack([torch.ones_like(y), inverse], -1)
    limits = (-math.inf, torch.where(failed == 1, math.inf, y))
    result = fit(_regression, design, y, *limits, restarts=1, init="model", tol=1e-9)
    errors = result.standard_errors()
    return {
        "b0,b1,sigma": torch.cat([result.params["coefficients"], result.params["scale"].reshape(1)]),
        "loglik": result.log_likelihood,
        "SE": torch.cat([errors["coefficients"], errors["scale"].reshape(1)]),
    }


def cens_tobin() -> Found:
    table = read("tobin", "durable", "age", "quant")
    y, design = table[:, 0], torch.cat([torch.ones(len(table), 1), table[:, 1:]], -1)
    result = fit(_regression, design, y, 0.0, math.inf, restarts=1, init="model", tol=1e-9)
    return {
        "coef": result.params["coefficients"],
        "scale": result.params["scale"],
        "loglik": result.log_likelihood,
        "SE": result.standard_errors()["coefficients"],
    }


def _households(cases: Tensor) -> None:
    rate = pyro.param("rate", torch.tensor(1.0), constraint=positive)
    with pyro.plate("households", len(cases)):
        pyro.sample("cases", Truncated(dist.Poisson(rate), lower=1), obs=cases)


def _inflated(cases: Tensor) -> None:
    inflation = pyro.param("inflation", torch.tensor(0.5), constraint=unit)
    rate = pyro.param("rate", torch.tensor(1.0), constraint=positive)
    with pyro.plate("households", len(cases)):
        zero = pyro.sample("zero", dist.Bernoulli(inflation)).long()
        pyro.sample("cases", dist.Poisson(torch.stack([rate, torch.zeros(())])[zero]), obs=cases)


def trunc_cholera() -> Found:
    cases, houses = read("mckendrick_cholera", "cases_in_house", "houses").unbind(-1)
    some = cases > 0
    result = fit(_households, cases[some], weights={"households": houses[some]}, restarts=1, init="model", tol=1e-12)
    assert result.num_iterations <= 45  # the textbook EM takes 37 from rate 1 to 1e-10
    rate = float(result.params["rate"])
    total = float(houses[some].sum()) / (1 - math.exp(-rate))
    both = fit(_inflated, cases, weights={"households": houses}, restarts=1, init="model", tol=1e-10)
    return {
        "lambda": rate,
        "expected susceptible zero households": total * math.exp(-rate),
        "N": total,
        "truncated loglik": result.log_likelihood,
        "ZIP on all 223: pi, lambda, loglik": [
            *(float(both.params[n]) for n in ("inflation", "rate")),
            both.log_likelihood,
        ],
    }
