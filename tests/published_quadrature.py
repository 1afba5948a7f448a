"""Published fits of models whose latents are integrated by quadrature; each returns its case's quantities by name."""

from __future__ import annotations

from typing import Any

import torch

import pyro_em
from models import glmm, irt
from tests.published import Found, read

OPTIONS: dict[str, Any] = {"tol": 1e-7, "accelerate": "squarem"}


def irt_lsat6() -> Found:
    answers = read("lsat6", *(f"Item_{i}" for i in range(1, 6)))
    patterns, counts = torch.unique(answers, dim=0, return_counts=True)
    rule = {"theta": pyro_em.Quadrature(num_nodes=21)}
    two, one, rasch = (
        pyro_em.fit(model, patterns, weights={"people": counts.double()}, e_step=rule, **OPTIONS)
        for model in (irt.model, irt.common_slope, irt.rasch)
    )
    errors = two.standard_errors()
    return {
        "2PL loglik": two.log_likelihood,
        "2PL d": two.params["intercept"],
        "2PL a": two.params["slope"],
        "2PL SE d": errors["intercept"],
        "2PL SE a": errors["slope"],
        "1PL (common a) loglik": one.log_likelihood,
        "1PL a, SE": torch.stack([one.params["slope"], one.standard_errors()["slope"]]),
        "1PL d": one.params["intercept"],
        "Rasch a=1 loglik": rasch.log_likelihood,
    }


def glmm_seeds() -> Found:
    germinated, sown, kind, extract = read("seeds_crowder", "r", "n", "seed_type", "root_extract").unbind(-1)
    x = torch.stack([torch.ones_like(kind), kind, extract, kind * extract], -1)
    rule = {"b": pyro_em.Quadrature(num_nodes=21)}
    result = pyro_em.fit(glmm.model, germinated, sown, x, e_step=rule, **OPTIONS)
    errors = result.standard_errors()
    return {
        "coef": result.params["coef"],
        "SE": errors["coef"],
        "sigma": result.params["scale"],
        "SE sigma": errors["scale"],
        "loglik (with binomial coef)": result.log_likelihood,
    }
