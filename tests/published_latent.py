"""Published fits of models with continuous latents: factor analysis, scale mixtures, overdispersion."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models import eight_schools, factor_analysis, overdispersed, student_t
from tests.published import FAST, Found, fit, read
from tests.zoo_conjugate import negative_binomial, student


def _with_covariance(S: Tensor, num_rows: int) -> Tensor:
    """Data of mean 0 whose second moment, divided by N, is exactly S."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, len(S), generator=generator, dtype=torch.float64)
    x = x - x.mean(0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / num_rows), x.T, upper=False).T @ (
        torch.linalg.cholesky(S).T
    )


def fa_ability() -> Found:
    """Only the covariance is published: data with exactly that second moment, on the correlation scale."""
    S = read("ability_cov", "general", "picture", "blocks", "maze", "reading", "vocab")
    sd = S.diagonal().sqrt()
    R, n = S / sd / sd.unsqueeze(-1), 112
    x = _with_covariance(R, n)
    found: Found = {}
    saturated = -n / 2 * (6 * math.log(2 * math.pi) + float(torch.logdet(R)) + 6)
    for k, factor in ((1, n - 1 - (2 * 6 + 5) / 6 - 2 / 3), (2, n - 1 - (2 * 6 + 5) / 6 - 4 / 3)):
        result = fit(factor_analysis.model, x, k, **FAST)
        discrepancy = 2 * (saturated - result.log_likelihood) / n
        found[f"k={k} uniquenesses"] = result.params["scale"] ** 2
        found[f"k={k} chi2 (df {9 if k == 1 else 4})"] = factor * discrepancy
        found[f"k={k} discrepancy F"] = discrepancy
        found[f"k={k} loglik on corr scale, n=112"] = result.log_likelihood
    return found


def cfa_hs1939() -> Found:
    x = read("holzinger1939", *(f"x{i}" for i in range(1, 10)))
    factor = torch.arange(9) // 3
    result = fit(factor_analysis.confirmatory, x, factor, **FAST)
    C = result.params["covariance"]
    sd = C.diagonal().sqrt()
    loading = torch.ones(9).index_put((torch.tensor([1, 2, 4, 5, 7, 8]),), result.params["loading"])
    R = C / sd / sd.unsqueeze(-1)
    return {
        "loglik": result.log_likelihood,
        "loadings (std.lv)": loading * sd[factor],
        "residual var": result.params["scale"] ** 2,
        "factor corr (12,13,23)": torch.stack([R[0, 1], R[0, 2], R[1, 2]]),
        "SE loadings": _expected_errors(loading * sd[factor], R, result.params["scale"] ** 2, factor, len(x)),
    }


def _expected_errors(loading: Tensor, R: Tensor, noise: Tensor, factor: Tensor, n: int) -> Tensor:
    """Of the loadings, from the expected information (lavaan's; `standard_errors` are those of the observed one):
    n/2 tr(Σ⁻¹ ∂Σ Σ⁻¹ ∂Σ)."""
    rows, columns = torch.triu_indices(3, 3, 1)

    def covariance(u: Tensor) -> Tensor:
        upper = torch.zeros(3, 3).to(u).index_put((rows, columns), u[18:])
        weights = torch.zeros(9, 3).to(u).index_put((torch.arange(9), factor), u[:9])
        return weights @ (upper + upper.T + torch.eye(3).to(u)) @ weights.T + u[9:18].diag()

    at = torch.cat([loading, noise, R[rows, columns]])
    slopes = torch.autograd.functional.jacobian(covariance, at).movedim(-1, 0)
    scaled = torch.linalg.solve(covariance(at), slopes)
    information = n / 2 * torch.einsum("iab,jba->ij", scaled, scaled)
    return torch.linalg.inv(information).diagonal().sqrt()[:9]


def ppca_iris() -> Found:
    x = read("iris", "SepalLength", "SepalWidth", "PetalLength", "PetalWidth")
    found: Found = {}
    for q in (1, 2):
        result = fit(factor_analysis.ppca, x, q, **FAST)
        found |= {f"loglik q={q}": result.log_likelihood, f"sigma2 q={q}": result.params["scale"] ** 2}
    return found


def mfa_faithful() -> Found:
    """Two analysers of one factor in the plane, with a common noise: see the case's conventions."""
    x = read("faithful", "eruptions", "waiting")
    result = fit(factor_analysis.mixture, x, 2, 1, **FAST | {"accelerate": "anderson", "tol": 1e-6})
    v = result.params
    order = v["mean"][:, 0].argsort()
    S = (v["loading"] @ v["loading"].mT + (v["scale"] ** 2).diag())[order]
    return {
        "loglik": result.log_likelihood,
        "pi (by eruptions mean)": v["weights"][order],
        "mu": v["mean"][order],
        "var eruptions, both components": S[:, 0, 0],
        "covariance, both components": S[:, 0, 1],
        "var waiting, both components": S[:, 1, 1],
    }


def map_eight_schools_gamma2() -> Found:
    y, sigma = read("eight_schools", "y", "sigma").unbind(-1)
    result = fit(eight_schools.bayesian, y, sigma, **FAST | {"algorithm": "map-em"})
    # EM approaches the boundary tau = 0 sublinearly, the mean with it: extrapolation gets there.
    boundary = fit(eight_schools.model, y, sigma, **FAST | {"max_iter": 400})
    return {
        "tau": result.params["tau"],
        "mu": result.params["mu"],
        "MLE tau (no prior)": boundary.params["tau"],
        "MLE mu at tau=0": boundary.params["mu"],
        "SE mu at tau=0": ((1 / (sigma**2 + boundary.params["tau"] ** 2)).sum()) ** -0.5,
        "MLE loglik": boundary.log_likelihood,
    }


def t_stackloss() -> Found:
    table = read("stackloss", "AirFlow", "WaterTemp", "AcidConc", "stackloss")
    x, y = torch.cat([torch.ones_like(table[:, :1]), table[:, :3]], -1), table[:, 3]
    # 10⁴ degrees of freedom stand for infinitely many: the log-likelihood differs by less than 0.001.
    constant = len(y) / 2 * math.log(2 * math.pi)
    fits = {
        nu: fit(student_t.model, x, y, nu, **FAST | {"tol": 1e-6}) for nu in (1e4, 8.0, 4.0, 3.0, 2.0, 1.1, 1.0, 0.5)
    }
    free = fit(student_t.estimated, x, y, **FAST | {"init": fits[1.1].params | {"dof": torch.tensor(1.1)}})
    return {
        "loglik minus constant (nu=inf,8,4,3,2,1.1,1,0.5)": torch.tensor(
            [f.log_likelihood + constant for f in fits.values()]
        ),
        "loglik full constant nu=4": fits[4.0].log_likelihood,
        "beta nu=4": fits[4.0].params["beta"],
        "beta nu=1.1": fits[1.1].params["beta"],
        "nu_hat": free.params["dof"],
        "loglik at nu_hat": free.log_likelihood,
    }


def t_abbey() -> Found:
    y = read("abbey", "x")[:, 0]
    start = {"mu": y.median(), "sigma": torch.tensor(5.0), "nu": torch.tensor(5.0)}
    result = fit(student, y, **FAST | {"init": start, "m_step": {"nu": "fixed"}})
    errors = result.standard_errors()
    return {
        "m, s": torch.stack([result.params["mu"], result.params["sigma"]]),
        "loglik": result.log_likelihood,
        "SE m, s": torch.stack([errors["mu"], errors["sigma"]]),
    }


def nb_redmites() -> Found:
    mites, leaves = read("redmites", "mites", "leaves").unbind(-1)
    start = {"m": torch.tensor(1.0), "k": torch.tensor(1.0)}
    result = fit(negative_binomial, mites, **FAST | {"init": start, "weights": {"rows": leaves}})
    errors = result.standard_errors()
    return {
        "m, k": torch.stack([result.params["m"], result.params["k"]]),
        "SE m, k": torch.stack([errors["m"], errors["k"]]),
        "loglik": result.log_likelihood,
    }


def pumps_gamma_poisson() -> Found:
    failures, time = read("pumps", "failures", "time").unbind(-1)
    result = fit(overdispersed.gamma_poisson, failures, time, **FAST)
    errors = result.standard_errors()
    return {
        "alpha, beta": torch.stack([result.params["alpha"], result.params["beta"]]),
        "loglik": result.log_likelihood,
        "SE": torch.stack([errors["alpha"], errors["beta"]]),
    }


def betabin_saxony() -> Found:
    males, families = read("saxony_families", "males", "families").unbind(-1)
    result = fit(overdispersed.beta_binomial, males, **FAST | {"weights": {"rows": families}, "tol": 1e-9})
    errors = result.standard_errors()
    return {
        "loglik": result.log_likelihood,
        "a, b": torch.stack([result.params["a"], result.params["b"]]),
        "SE": torch.stack([errors["a"], errors["b"]]),
    }


def dirmult_saxony() -> Found:
    """Two categories: the model of `betabin_saxony` with a simplex for a probability."""
    males, families = read("saxony_families", "males", "families").unbind(-1)
    table = torch.stack([males, 12 - males], -1)
    result = fit(overdispersed.categories, table, **FAST | {"weights": {"rows": families}, "tol": 1e-9})
    return {"loglik": result.log_likelihood, "a, b": result.params["concentration"]}


def dirmult_housing() -> Found:
    """With the probabilities of a block of tenants as latents, and integrated by the distribution."""
    table = overdispersed.load_satisfaction()
    latent, marginal = (
        fit(model, table, **FAST | {"tol": 1e-9})
        for model in (overdispersed.categories, overdispersed.dirichlet_multinomial)
    )
    return {
        "loglik (with multinomial coefficients)": torch.tensor([latent.log_likelihood, marginal.log_likelihood]),
        "concentration": torch.stack([r.params["concentration"] for r in (latent, marginal)]),
    }
