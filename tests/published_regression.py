"""Published fits of regression mixtures, zero inflation, and classes with covariates, by the case's names."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import pyro_em
from models import latent_class_regression, negative_binomial, regression_mixture
from models import zip as zero_inflated
from tests.published import Found


def _fit(model: Any, *args: Any, **options: Any) -> Any:
    """From the model's own start, and from responsibilities drawn at random."""
    return pyro_em.fit(model, *args, **({"max_iter": 5000, "tol": 1e-8, "seed": 0} | options))


def _lines(params: dict[str, Tensor], order: Tensor) -> Tensor:
    return torch.cat([params["intercept"][:, None], params["slope"]], -1)[order]


def mixreg_no_equiv() -> Found:
    y, x = regression_mixture.load()
    result = _fit(regression_mixture.linear, y, x, init="random", restarts=3)
    order = result.params["intercept"].argsort()
    reverse = _fit(regression_mixture.linear, x[:, 0], y[:, None], init="random", restarts=4)
    return {
        "loglik": result.log_likelihood,
        "pi": result.params["weights"][order],
        "beta": _lines(result.params, order),
        "sd (MLE)": result.params["scale"][order],
        "loglik_reverse (NO~Equivalence)": reverse.log_likelihood,
    }


def mixreg_patent_pois3() -> Found:
    y, x, c = regression_mixture.load_patents()
    plain = _fit(regression_mixture.poisson, y, x, 3, init="random", restarts=6)
    order = torch.tensor([int((plain.params["intercept"] - v).abs().argmin()) for v in (0.58, -2.33, 1.98)])
    # The groups of the fit without a gate, the second of which spends most on research, start the one with it.
    start = {"intercept": plain.params["intercept"][order], "slope": plain.params["slope"][order]}
    gated = _fit(regression_mixture.concomitant, y, x, c, init=start)
    shown = torch.tensor([int((gated.params["intercept"] - v).abs().argmin()) for v in (1.96, -2.65, 0.51)])
    return {
        "loglik_concomitant": gated.log_likelihood,
        "beta": _lines(gated.params, shown),
        "loglik_no_concomitant": plain.log_likelihood,
        "beta_no_conc": _lines(plain.params, order),
    }


def mixreg_fabricfault() -> Found:
    y, x = regression_mixture.load_fabric()
    result = _fit(regression_mixture.parallel, y, x)
    order = result.params["intercept"].argsort()
    return {
        "loglik": result.log_likelihood,
        "a": result.params["intercept"][order],
        "b": result.params["slope"][0],
        "pi": result.params["weights"][order],
    }


def zip_biochemists() -> Found:
    result = _fit(zero_inflated.regression, *zero_inflated.load_regression())
    errors = result.standard_errors()
    return {
        "loglik": result.log_likelihood,
        "count coef": result.params["count_coef"],
        "count SE": errors["count_coef"],
        "zero coef": result.params["zero_coef"],
        "zero SE": errors["zero_coef"],
    }


def nb_redmites() -> Found:
    mites, leaves = negative_binomial.load()
    result = _fit(negative_binomial.model, mites, weights={"rows": leaves})
    size, odds = result.params["size"], result.params["intercept"].exp()
    # The mean size · odds has the standard error of the delta method, as all functions of the parameters have.
    slope = np.array([float(odds), float(size * odds)])
    variance = slope @ result.covariance().numpy() @ slope
    return {
        "m, k": torch.stack([size * odds, size]),
        "SE m, k": torch.tensor([variance**0.5, float(result.standard_errors()["size"])]),
        "loglik": result.log_likelihood,
    }


def election_by_party() -> float:
    """Three classes, their probabilities by party identification."""
    items, party = latent_class_regression.load()
    return float(_fit(latent_class_regression.model, items, party, 3, tol=1e-7).log_likelihood)


def balance_by_age(items: Tensor, age: Tensor) -> float:
    """Three classes, their probabilities by age; some answers of a class are certain in the limit."""
    return float(_fit(latent_class_regression.model, items, age, 3, tol=1e-7).log_likelihood)


def negative_binomial_counts(values: Tensor, counts: Tensor) -> Found:
    """One negative binomial to counts with frequencies."""
    result = _fit(negative_binomial.model, values, weights={"rows": counts})
    size = result.params["size"]
    return {
        "loglik_NB": result.log_likelihood,
        "NB mean, size": torch.stack([size * result.params["intercept"].exp(), size]),
    }
