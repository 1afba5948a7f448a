"""Published fits of models with continuous latents: factor analysis, mixed models, scale mixtures, overdispersion."""

from __future__ import annotations

import csv
import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from models import eight_schools, factor_analysis, linear_mixed, overdispersed, student_t
from tests.published import CASES, Found, fit, read
from tests.zoo_conjugate import negative_binomial, student

FAST: dict[str, Any] = {"restarts": 1, "init": None, "accelerate": "squarem"}


def _groups(name: str, response: str, *columns: str) -> tuple[Tensor, list[Tensor], list[dict[str, str]]]:
    with open(CASES / "data" / f"{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    codes = []
    for column in columns:
        names = sorted({row[column] for row in rows})
        codes.append(torch.tensor([names.index(row[column]) for row in rows]))
    return torch.tensor([float(row[response]) for row in rows]), codes, rows


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


def _slopes(x: Tensor, group: Tensor, y: Tensor) -> Any:
    return fit(linear_mixed.slopes, x, group, y, **FAST)


def _components(result: Any) -> Tensor:
    D = result.params["D"]
    return torch.stack([D[0, 0], D[1, 1], D[0, 1], result.params["within"] ** 2])


def lmm_sleepstudy() -> Found:
    y, (subject,), rows = _groups("sleepstudy", "Reaction", "Subject")
    days = torch.tensor([float(row["Days"]) for row in rows])
    result = _slopes(days, subject, y)
    apart, intercepts = (fit(_effects, days, subject, y, how, **FAST) for how in ("apart", "intercepts"))
    reml = fit(_effects, days, subject, y, "restricted", roles={"beta": "latent"}, **FAST)
    return {
        "loglik ML": result.log_likelihood,
        "beta": result.params["beta"],
        "SE beta": result.standard_errors()["beta"],
        "var intercept, var slope, cov, resid var": _components(result),
        "loglik uncorrelated (Days||Subject)": apart.log_likelihood,
        "loglik random intercept only": intercepts.log_likelihood,
        "REML loglik": reml.log_likelihood,
    }


def _effects(x: Tensor, group: Tensor, y: Tensor, how: str) -> None:
    """Uncorrelated effects, intercepts alone, or any effects with coefficients under a flat prior (Harville's REML)."""
    design = torch.stack([torch.ones_like(x), x], -1)
    size = 1 if how == "intercepts" else 2
    within = pyro.param("within", torch.tensor(25.0), constraint=constraints.positive)
    if how == "restricted":
        D = pyro.param("D", torch.diag(torch.tensor([600.0, 30.0])), constraint=constraints.positive_definite)
        beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (2,)))
    else:
        beta = pyro.param("beta", torch.linalg.lstsq(design, y).solution)
        D = torch.diag(pyro.param("variance", torch.tensor([600.0, 30.0])[:size], constraint=constraints.positive))
    with pyro.plate("subjects", int(group.max()) + 1):
        b = pyro.sample("b", dist.MultivariateNormal(torch.zeros(size), D))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal((design * beta).sum(-1) + (design[:, :size] * b[group]).sum(-1), within), obs=y)


def _two_lines(x: Tensor, treated: Tensor, group: Tensor, y: Tensor) -> None:
    """A line for each of two kinds of subjects, whose effects have one covariance."""
    design = torch.stack([torch.ones_like(x), x, treated, treated * x], -1)
    beta = pyro.param("beta", torch.linalg.lstsq(design, y).solution)
    D = pyro.param("D", torch.diag(torch.tensor([100.0, 0.3])), constraint=constraints.positive_definite)
    within = pyro.param("within", torch.tensor(6.0), constraint=constraints.positive)
    with pyro.plate("subjects", int(group.max()) + 1):
        b = pyro.sample("b", dist.MultivariateNormal(torch.zeros(2), D))
    with pyro.plate("rows", len(y)):
        own = b[group]
        pyro.sample("y", dist.Normal(design @ beta + own[..., 0] + own[..., 1] * x, within), obs=y)


def lmm_rats30() -> Found:
    weight, (subject,), rows = _groups("rats60", "Weight", "Subject")
    age, treated = (torch.tensor([float(row[c]) for row in rows]) for c in ("Age", "Group"))
    first = treated == 0
    _, own = subject[first].unique(return_inverse=True)
    result = _slopes(age[first], own, weight[first])
    return {
        "loglik ML": result.log_likelihood,
        "beta": result.params["beta"],
        "var int, var slope, cov, resid": _components(result),
        "both groups loglik": fit(_two_lines, age, treated, subject, weight, **FAST).log_likelihood,
    }


def lmm_dyestuff() -> Found:
    y, (batch,), _ = _groups("dyestuff", "Yield", "Batch")
    result = fit(linear_mixed.model, batch, y, **FAST)
    return {
        "loglik ML": result.log_likelihood,
        "mu, SE": torch.stack([result.params["mean"], result.standard_errors()["mean"]]),
        "var batch, var resid": torch.stack([result.params["between"], result.params["within"]]) ** 2,
    }


def lmm_penicillin() -> Found:
    y, (plate, sample), _ = _groups("penicillin", "diameter", "plate", "sample")
    result = fit(linear_mixed.crossed, plate, sample, y, **FAST)
    v = result.params
    return {
        "loglik ML": result.log_likelihood,
        "var plate, sample, resid": torch.stack([v["first"], v["second"], v["within"]]) ** 2,
        "mu, SE": torch.stack([v["mean"], result.standard_errors()["mean"]]),
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
