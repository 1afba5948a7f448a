"""Published fits of linear mixed models, and of the effects in them: means and variances as lme4 prints them.

lme4's conditional modes and variances of effects are those given the estimates; those of a fit by REML are here the
posterior at its variances, with the coefficients by generalised least squares.
"""

from __future__ import annotations

import csv
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from models import linear_mixed
from tests.published import CASES, FAST, Found, fit


def _groups(name: str, response: str, *columns: str) -> tuple[Tensor, list[Tensor], list[dict[str, str]]]:
    with open(CASES / "data" / f"{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    codes = []
    for column in columns:
        names = sorted({row[column] for row in rows})
        codes.append(torch.tensor([names.index(row[column]) for row in rows]))
    return torch.tensor([float(row[response]) for row in rows]), codes, rows


def _given(model: Any, *args: Any, **variances: Tensor) -> Any:
    """The fit of everything else at some variances: coefficients by generalised least squares, effects given these."""
    return fit(model, *args, **FAST | {"init": variances, "m_step": dict.fromkeys(variances, "fixed")})


def _restricted(first: Tensor, second: Tensor, y: Tensor) -> None:
    """`linear_mixed.crossed` with its mean under a flat prior, by which the likelihood is the restricted one."""
    mean = pyro.sample("mean", dist.ImproperUniform(constraints.real, (), ()))
    names = ("first", "second", "within")
    scales = [pyro.param(n, y.std() / 2, constraint=constraints.positive) for n in names]
    with pyro.plate("first_groups", int(first.max()) + 1):
        a = pyro.sample("a", dist.Normal(torch.zeros(()), scales[0]))
    with pyro.plate("second_groups", int(second.max()) + 1):
        c = pyro.sample("c", dist.Normal(torch.zeros(()), scales[1]))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean + a[first] + c[second], scales[2]), obs=y)


def _by_reml(first: Tensor, second: Tensor, y: Tensor) -> tuple[Any, Any]:
    """The restricted fit, and the fit of `linear_mixed.crossed` given its variances."""
    reml = fit(_restricted, first, second, y, roles={"mean": "latent"}, **FAST)
    return reml, _given(linear_mixed.crossed, first, second, y, **reml.params)


def _scales(result: Any) -> Tensor:
    return torch.stack([result.params[n] for n in ("first", "second", "within")])


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
    given = _given(linear_mixed.slopes, days, subject, y, **reml.params).posterior()
    blocks = result.posterior().marginal("b").covariance_matrix
    sd = blocks.diagonal(dim1=-2, dim2=-1).sqrt()
    return {
        "loglik ML": result.log_likelihood,
        "beta": result.params["beta"],
        "SE beta": result.standard_errors()["beta"],
        "var intercept, var slope, cov, resid var": _components(result),
        "loglik uncorrelated (Days||Subject)": apart.log_likelihood,
        "loglik random intercept only": intercepts.log_likelihood,
        "REML loglik": reml.log_likelihood,
        "conditional modes ML": result.posterior().mean("b"),
        "conditional variance ML, S308": blocks[0],
        "conditional sd ML, correlation": torch.cat([sd[0], (blocks[0, 0, 1] / sd[0].prod()).reshape(1)]),
        "REML var intercept, var slope, cov, resid var": _components(reml),
        "REML conditional modes, 308 309 310": given.mean("b")[:3],
        "REML conditional variance, 308": given.marginal("b").covariance_matrix[0],
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
        "conditional modes ML": result.posterior().mean("b"),
        "conditional variance ML": result.posterior().variance("b")[0],
    }


def lmm_penicillin() -> Found:
    y, (plate, sample), _ = _groups("penicillin", "diameter", "plate", "sample")
    result = fit(linear_mixed.crossed, plate, sample, y, **FAST)
    posterior, (reml, given) = result.posterior(), _by_reml(plate, sample, y)
    return {
        "loglik ML": result.log_likelihood,
        "var plate, sample, resid": _scales(result) ** 2,
        "mu, SE": torch.stack([result.params["mean"], result.standard_errors()["mean"]]),
        "conditional variance ML, plate a and sample F": torch.stack(
            [posterior.variance("a")[0], posterior.variance("c")[5]]
        ),
        "conditional mode ML, sample F": posterior.mean("c")[5],
        "REML loglik": reml.log_likelihood,
        "REML var plate, sample, resid": _scales(reml) ** 2,
        "REML conditional modes, samples": given.posterior().mean("c"),
        "REML conditional variance, plate and sample": torch.stack(
            [given.posterior().variance(site)[0] for site in ("a", "c")]
        ),
    }


def lmm_pastes() -> Found:
    """Casks within batches: as levels of a hierarchy, and as effects beside each other, which are the same model."""
    outer, inner, y = linear_mixed.load_pastes()
    result = fit(linear_mixed.nested, outer, inner, y, **FAST)
    beside = fit(linear_mixed.crossed, outer[inner], inner, y, **FAST)
    v, errors, posterior = result.params, result.standard_errors(), result.posterior()
    reml, given = _by_reml(outer[inner], inner, y)
    return {
        "loglik ML": torch.tensor([result.log_likelihood, beside.log_likelihood]),
        "mu, SE": torch.stack([v["mean"], errors["mean"]]),
        "sd cask, batch, resid": torch.stack([v["inner"], v["outer"], v["within"]]),
        "conditional variance ML, cask a of A and batch J": torch.stack(
            [beside.posterior().variance("c")[0], posterior.variance("a")[9]]
        ),
        "conditional modes ML, batches": posterior.mean("a") - v["mean"],
        "REML loglik": reml.log_likelihood,
        "REML var cask, batch, resid": (_scales(reml) ** 2)[[1, 0, 2]],
        "REML conditional variance, cask and batch": torch.stack(
            [given.posterior().variance(site)[0] for site in ("c", "a")]
        ),
    }


def lmm_politeness() -> Found:
    """Scenarios with a slope of their own, crossed with subjects."""
    result = fit(linear_mixed.crossed_slopes, *linear_mixed.load_politeness(), **FAST)
    v, posterior = result.params, result.posterior()
    return {
        "loglik ML": result.log_likelihood,
        "beta": v["beta"],
        "SE beta": result.standard_errors()["beta"],
        "var intercept, var slope, cov, var subject, resid": torch.cat(
            [_components(result)[:3], torch.stack([v["between"], v["within"]]) ** 2]
        ),
        "conditional modes ML, subjects": posterior.mean("c"),
        "conditional modes ML, scenarios": posterior.mean("b"),
        "conditional variance ML, scenario 1": posterior.marginal("b").covariance_matrix[0],
        "conditional variance ML, subjects": posterior.variance("c"),
    }


def lmm_baayen() -> Found:
    """Three subjects and three items: intercepts and slopes have correlation -1, which updates approach slowly."""
    y, (subject, item), rows = _groups("baayen2008", "rt", "subject", "item")
    short = torch.tensor([float(row["soa"] == "short") for row in rows])
    options = FAST | {"accelerate": "anderson", "max_iter": 200}
    result = fit(linear_mixed.crossed_slopes, short, subject, item, y, **options)
    D, v = result.params["D"], result.params
    return {
        "loglik ML": result.log_likelihood,
        "beta": v["beta"],
        "var subject, var slope, var item, resid": torch.stack([D[0, 0], D[1, 1], v["between"] ** 2, v["within"] ** 2]),
        "correlation": D[0, 1] / (D[0, 0] * D[1, 1]).sqrt(),
    }
