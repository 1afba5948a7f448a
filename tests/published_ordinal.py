"""Published fits of ordered categories, alone and with latents by quadrature; quantities by the case's names."""

from __future__ import annotations

from typing import Any

import torch

import pyro_em
from models import ordinal
from tests.published import Found, fit, read

OPTIONS: dict[str, Any] = {"restarts": 1, "init": None, "accelerate": "squarem", "tol": 1e-7}


def _regression(result: Any) -> Found:
    errors = result.standard_errors()
    return {
        "loglik": result.log_likelihood,
        "coef": result.params["beta"],
        "thresholds": result.params["cut"],
        "SE coef": errors["beta"],
        "SE thresholds": errors["cut"],
    }


def ordinal_housing() -> Found:
    x, y, tenants = ordinal.load()
    result = fit(ordinal.regression, x, y, **OPTIONS | {"weights": {"rows": tenants}})
    return {**_regression(result), "deviance": -2 * result.log_likelihood}


def ordinal_wine() -> Found:
    x, _, rating = ordinal.load_wine()
    return _regression(fit(ordinal.regression, x, rating, **OPTIONS))


def ordinal_wine_judges() -> Found:
    result = fit(ordinal.mixed, *ordinal.load_wine(), **OPTIONS | {"e_step": {"b": pyro_em.Quadrature(num_nodes=11)}})
    sd = result.params["scale"]
    return {**_regression(result), "sd": sd, "SE log sd": result.standard_errors()["scale"] / sd}


def grm_lsat6() -> Found:
    """Two categories: the two-parameter logistic of `irt_lsat6`, whose intercepts are minus the cut points."""
    answers = read("lsat6", *(f"Item_{i}" for i in range(1, 6))).long()
    patterns, counts = torch.unique(answers, dim=0, return_counts=True)
    options = OPTIONS | {"weights": {"people": counts.double()}, "e_step": {"theta": pyro_em.Quadrature(num_nodes=21)}}
    result = fit(ordinal.graded, patterns, **options)
    errors = result.standard_errors()
    return {
        "2PL loglik": result.log_likelihood,
        "2PL d": -result.params["cut"][:, 0],
        "2PL a": result.params["slope"],
        "2PL SE d": errors["cut"][:, 0],
        "2PL SE a": errors["slope"],
    }
