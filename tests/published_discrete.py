"""Published fits of count mixtures, latent classes, raters, chains and genetics, by the case's names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pyro_em
from tests import classics
from tests.published import CASES, Found, fit, read
from tests.published_regression import balance_by_age, election_by_party, negative_binomial_counts
from tests.published_sequences import stationary_earthquakes

ONE_CLASS: dict[str, Any] = {"init": "model", "restarts": 1}  # nothing to draw: one update is the maximum


def map_lca_alzheimer_g2() -> Found:
    items = ("Hallucination", "Activity", "Aggression", "Agitation", "Diurnal", "Affective")
    result = fit(classics.latent_class_map, read("alzheimer", *items), algorithm="map-em")
    order = result.params["w"].argsort(descending=True)
    P = result.params["P"][order]
    return {
        "logpost (with prior normalising constants)": result.log_posterior,
        "loglik_at_MAP": result.log_likelihood,
        "class probs": result.params["w"][order],
        "item probs class1": P[0],
        "item probs class2": P[1],
    }


def _poisson(values: Tensor, counts: Tensor | None = None, K: int = 2) -> Any:
    weights = {} if counts is None else {"weights": {"days": counts}}
    start = ONE_CLASS if K == 1 else {"restarts": 2}
    return fit(classics.poisson_mixture, values, K, **(weights | start))


def poismix_hasselblad() -> Found:
    k, n = read("hasselblad_deaths", "deaths", "freq").unbind(-1)
    result = _poisson(k, n)
    order = result.params["lam"].argsort()
    error = result.standard_errors()
    return {
        "loglik": result.log_likelihood,
        "pi (small-rate comp)": result.params["pi"][order][0],
        "lambda": result.params["lam"][order],
        "SE pi, lambda_small, lambda_large (obs. info)": torch.cat([error["pi"][order][:1], error["lam"][order]]),
        "1-component loglik": _poisson(k, n, 1).log_likelihood,
    }


def poismix_greenwood_yule() -> Found:
    k, n = read("greenwood_yule_accidents", "accidents", "workers").unbind(-1)
    result = _poisson(k, n)
    order = result.params["lam"].argsort()
    return {
        "loglik_pois": _poisson(k, n, 1).log_likelihood,
        "loglik_K2": result.log_likelihood,
        "K2 pi, lambda": torch.cat([result.params["pi"][order][:1], result.params["lam"][order]]),
        **negative_binomial_counts(k, n),
    }


def poismix_dmft() -> Found:
    result = _poisson(read("flexmix_dmft", "End")[:, 0])
    order = result.params["lam"].argsort(descending=True)
    return {
        "loglik": result.log_likelihood,
        "log lambda": result.params["lam"][order].log(),
        "pi": result.params["pi"][order],
    }


def _carcinoma(K: int, restarts: int) -> tuple[Any, Tensor, Tensor]:
    data = read("carcinoma", *"ABCDEFG") - 1
    result = fit(classics.latent_class, data, K, restarts=restarts)
    return result, data, result.params["w"].argsort()


def lca_carcinoma_2() -> Found:
    result, _, order = _carcinoma(2, 10)
    w, P = result.params["w"][order], result.params["P"]
    low, high = P.mean(-1).argsort()
    with pytest.warns(pyro_em.errors.BoundaryEstimate):
        errors = result.standard_errors()
    return {
        "loglik": result.log_likelihood,
        "class probs (sorted)": w,
        "P(yes) items A-G, low class": P[low],
        "high class": P[high],
        "SE class prob": errors["w"][0],
    }


def lca_carcinoma_3() -> Found:
    result, data, order = _carcinoma(3, 20)
    patterns = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 7)
    observed = (data.unsqueeze(1) == patterns).all(-1).sum(0).double()
    P = result.params["P"]
    items = torch.where(patterns.unsqueeze(1) == 1, P, 1 - P).prod(-1)  # (128, K); many are impossible
    expected = len(data) * (result.params["w"] * items).sum(-1)
    possible = expected > 0  # the fit reaches probabilities of exactly 0
    assert not bool(observed[~possible].any())
    observed, expected = observed[possible], expected[possible]
    with pytest.warns(pyro_em.errors.BoundaryEstimate):
        errors = result.standard_errors()
    middle = result.params["P"].mean(-1).argsort()[1]
    return {
        "loglik": result.log_likelihood,
        "class probs (sorted)": result.params["w"][order],
        "G^2": 2 * torch.special.xlogy(observed, observed / expected).sum(),
        "X^2": ((observed - expected) ** 2 / expected).sum(),
        "BIC": result.bic,
        "SE class probs (sorted as above)": errors["w"][order],
        "middle class P(yes)": result.params["P"][middle],
    }


def lca_carcinoma_4() -> Found:
    return {"loglik": _carcinoma(4, 10)[0].log_likelihood}


def lca_cheating_2() -> Found:
    data = read("cheating", "LIEEXAM", "LIEPAPER", "FRAUD", "COPYEXAM") - 1
    result = fit(classics.latent_class, data)
    cheaters, others = result.params["w"].argsort()
    return {
        "loglik": result.log_likelihood,
        "class probs": result.params["w"].sort().values,
        "P(yes) cheaters": result.params["P"][cheaters],
        "P(yes) non-cheaters": result.params["P"][others],
    }


def lca_election() -> Found:
    """Complete cases only, as published: 1311 of 1785."""
    table = np.genfromtxt(CASES / "data" / "election.csv", delimiter=",", skip_header=1, missing_values="NA")
    answers = torch.as_tensor(table[~np.isnan(table).any(1)]).long() - 1
    assert len(answers) == 1311
    starts = {1: ONE_CLASS, 2: {"restarts": 2}, 3: {"restarts": 3}}
    fits = {K: fit(classics.latent_class_categories, answers, K, 4, **starts[K]) for K in starts}
    return {f"loglik_K{K}": fit.log_likelihood for K, fit in fits.items()} | {
        "class probs K3 (sorted)": fits[3].params["w"].sort().values,
        "loglik_K3_PARTY": election_by_party(),
    }


def lca_balance() -> Found:
    data = read("balance", "d1", "d2", "d3", "d4")
    two, three = (fit(classics.latent_class, data, K, tol=1e-7) for K in (2, 3))
    return {
        "loglik_K2": two.log_likelihood,
        "class probs K2": two.params["w"].sort().values,
        "loglik_K3": three.log_likelihood,
        "loglik_K3_age": balance_by_age(data.long(), read("balance", "age")),
    }


def lca_lsat6_2() -> Found:
    result = fit(classics.latent_class, read("lsat6", *(f"Item_{i}" for i in range(1, 6))), restarts=2, tol=1e-7)
    low, _ = result.params["P"].mean(-1).argsort()
    return {
        "loglik": result.log_likelihood,
        "class probs": result.params["w"].sort().values,
        "P(1) low class": result.params["P"][low],
    }


def ds_anesthesia() -> Found:
    """The published solution comes from the consensus start (vote shares); restarts find a better one."""
    item, rater, rating = (read("anesthesia_long", "item", "rater", "rating").long() - 1).unbind(-1)
    order = np.lexsort((rater, item))
    ratings, raters = rating[order].reshape(45, 7), rater[order].reshape(45, 7)[0]
    votes = torch.nn.functional.one_hot(ratings, 4).double()  # (45, 7, 4)
    shares = votes.mean(1)
    counts = torch.stack([torch.einsum("nj,nrl->jl", shares, votes[:, raters == r]) for r in range(5)])
    consensus = {"w": shares.mean(0), "confusion": counts / counts.sum(-1, keepdim=True)}
    published = fit(classics.confusion_tables, ratings, raters, 4, restarts=1, init=consensus)
    best = fit(classics.confusion_tables, ratings, raters, 4, restarts=60, init="random", tol=1e-7)
    return {
        "class marginals (published solution)": published.params["w"],
        "loglik (published solution)": published.log_likelihood,
        "observer1 confusion": published.params["confusion"][0],
        "global loglik at least": best.log_likelihood,
    }


def hmm_earthquakes() -> Found:
    counts = read("earthquakes", "count")[:, 0]
    two, three = (fit(classics.poisson_hmm, counts, K, restarts=3, tol=1e-6) for K in (2, 3))
    # Four states: from rates at quantiles and states that last, as the book's own start lies near a worse optimum.
    start = {"lam": counts.quantile((torch.arange(4) + 0.5) / 4), "A": 0.5 * torch.eye(4) + 0.125}
    four = pyro_em.fit(classics.poisson_hmm, counts, 4, init=start, tol=1e-6, accelerate="squarem")
    return {
        "free-init loglik K4 at least": four.log_likelihood,
        "free-init loglik K2": two.log_likelihood,
        "free-init K2 lambda": two.params["lam"].sort().values,
        "free-init loglik K3": three.log_likelihood,
        "free-init K3 lambda": three.params["lam"].sort().values,
        **stationary_earthquakes(),
    }


def hmm_speed_rt() -> Found:
    y = read("speed", "rt")
    y = y[:, 0]
    one, three = (fit(classics.normal_hmm, y, breaks, restarts=1, seed=0, tol=1e-7) for breaks in ((0,), (0, 168, 302)))
    order = one.params["mu"].argsort()
    return {
        "loglik_a": one.log_likelihood,
        "mu_a": one.params["mu"][order],
        "sd_a": one.params["sd"][order],
        "A_a (low,high)": one.params["A"][order][:, order],
        "1-state loglik": fit(classics.normal_mixture, y, 1, **ONE_CLASS).log_likelihood,
        "loglik_b": three.log_likelihood,
        "mu_b": three.params["mu"].sort().values,
    }


def linkage_rao() -> Found:
    n = read("linkage_rao", "count")[:, 0]
    cells, options = torch.arange(4), {"weights": {"cells": n}, "init": {"p": torch.tensor(0.5)}}
    walk = [pyro_em.fit(classics.linkage, cells, max_iter=k, tol=0, **options).params["p"] for k in range(1, 9)]
    result = fit(classics.linkage, cells, restarts=1, tol=1e-12, **options)
    p, error = result.params["p"], result.standard_errors()["p"]
    return {
        "theta": p,
        "EM iterates from 0.5": torch.stack(walk),
        "observed information": error**-2,
        "SE": error,
        "EM rate": (walk[5] - p) / (walk[4] - p),
    }


def abo_mclachlan() -> Found:
    o, a, b, ab = read("abo_mclachlan", "count")[:, 0]
    weights = {"people": torch.stack([a, b, ab, o])}
    result = fit(classics.blood_group, torch.arange(4), weights=weights, restarts=2, tol=1e-10, init="random")
    return {
        "p,q,r": result.params["freq"],
        "loglik without coefficient": result.log_likelihood,
        "SE p, q": result.standard_errors()["freq"][:2],
    }
