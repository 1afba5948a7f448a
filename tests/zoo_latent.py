"""Small models with Gaussian latents, one for each structure that the Gaussian route tells apart."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.ops.indexing import Vindex
from torch import Tensor

positive, positive_definite, simplex = constraints.positive, constraints.positive_definite, constraints.simplex


def factor_analysis(x: Tensor, size: int = 2) -> None:
    loading = pyro.param("W", torch.ones(x.shape[-1], size))
    mean = pyro.param("b", torch.zeros(x.shape[-1]))
    scale = pyro.param("sd", torch.ones(x.shape[-1]), constraint=positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
        pyro.sample("x", dist.Normal(z @ loading.T + mean, scale).to_event(1), obs=x)


def ppca(x: Tensor, size: int = 1) -> None:
    loading = pyro.param("W", torch.ones(x.shape[-1], size))
    mean = pyro.param("b", torch.zeros(x.shape[-1]))
    scale = pyro.param("sd", torch.tensor(1.0), constraint=positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(size), torch.eye(size)))
        location = torch.einsum("...l,dl->...d", z, loading) + mean
        pyro.sample("x", dist.MultivariateNormal(location, scale**2 * torch.eye(x.shape[-1])), obs=x)


def factor_with_covariate(x: Tensor, age: Tensor) -> None:
    """The covariate differs from row to row, but meets no latent."""
    loading = pyro.param("w", torch.ones(x.shape[-1]))
    coefficients = pyro.param("b", torch.zeros(2, x.shape[-1]))
    noise = pyro.param("noise", torch.eye(x.shape[-1]), constraint=positive_definite)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        location = z.unsqueeze(-1) * loading + coefficients[0] + age.unsqueeze(-1) * coefficients[1]
        pyro.sample("x", dist.MultivariateNormal(location, noise), obs=x)


def repeated_vectors(group: Tensor, treatment: Tensor, dose: Tensor, x: Tensor, y: Tensor) -> None:
    """Two outcomes in long format, one of them positive; treatments by an index, and a slope of each group."""
    effect, slope = pyro.param("effect", torch.zeros(3)), pyro.param("slope", torch.tensor(0.0))
    shift = pyro.param("shift", torch.tensor(0.0))
    tau = pyro.param("tau", torch.ones(2), constraint=positive)
    scale = pyro.param("sd", torch.ones(x.shape[-1]), constraint=positive)
    other = pyro.param("other", torch.tensor(1.0), constraint=positive)
    with pyro.plate("groups", int(group.max()) + 1):
        b = pyro.sample("b", dist.Normal(0.0, tau).to_event(1))
    with pyro.plate("rows", len(y)):
        own = b[group]
        first = effect[treatment] + own[..., 0] + (slope + own[..., 1]) * dose
        location = torch.stack([first, first + shift], -1)
        pyro.sample("x", dist.Normal(location, scale).to_event(1), obs=x)
        pyro.sample("y", dist.LogNormal(own[..., 0] - slope, other), obs=y)


def masked_factor(x: Tensor, known: Tensor) -> None:
    """One factor of several indicators; rows that are not known count nothing."""
    loading = pyro.param("w", torch.ones(x.shape[-1]))
    scale = pyro.param("sd", torch.ones(x.shape[-1]), constraint=positive)
    with pyro.plate("rows", len(x)), poutine.mask(mask=known):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1) * loading, scale).to_event(1), obs=x)


def random_slopes(days: Tensor, subject: Tensor, y: Tensor) -> None:
    """Long format: rows read their subject's intercept and slope by an index."""
    beta = pyro.param("beta", torch.zeros(2))
    D = pyro.param("D", torch.eye(2), constraint=positive_definite)
    s2 = pyro.param("s2", torch.tensor(1.0), constraint=positive)
    with pyro.plate("subjects", int(subject.max()) + 1):
        b = pyro.sample("b", dist.MultivariateNormal(torch.zeros(2), D))
    with pyro.plate("rows", len(y)):
        own = b[subject]
        location = beta[0] + own[..., 0] + (beta[1] + own[..., 1]) * days
        pyro.sample("y", dist.Normal(location, s2.sqrt()), obs=y)


def random_intercepts(y: Tensor) -> None:
    """Wide format: y (T, J)."""
    mu, tau = pyro.param("mu", torch.tensor(0.0)), pyro.param("tau", torch.tensor(1.0), constraint=positive)
    scale = pyro.param("sd", torch.tensor(1.0), constraint=positive)
    with pyro.plate("groups", y.shape[1], dim=-1):
        b = pyro.sample("b", dist.Normal(mu, tau))
        with pyro.plate("repeats", y.shape[0], dim=-2):
            pyro.sample("y", dist.Normal(b, scale), obs=y)


def crossed(row: Tensor, column: Tensor, y: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor(0.0))
    scales = [pyro.param(n, torch.tensor(1.0), constraint=positive) for n in ("sa", "sc", "sd")]
    with pyro.plate("rows", int(row.max()) + 1):
        a = pyro.sample("a", dist.Normal(0.0, scales[0]))
    with pyro.plate("columns", int(column.max()) + 1):
        c = pyro.sample("c", dist.Normal(0.0, scales[1]))
    with pyro.plate("cells", len(y)):
        pyro.sample("y", dist.Normal(mu + a[row] + c[column], scales[2]), obs=y)


def subjects_and_items(x: Tensor, subject: Tensor, item: Tensor, site: Tensor, y: Tensor) -> None:
    """Intercepts and slopes of subjects, two latents of items, intercepts of sites: all crossed."""
    beta, loading = pyro.param("beta", torch.zeros(2)), pyro.param("loading", torch.tensor(0.5))
    D = torch.tensor([[1.0, 0.2], [0.2, 0.8]])
    scales = [pyro.param(n, torch.tensor(1.0), constraint=positive) for n in ("item_sd", "site_sd", "sd")]
    with pyro.plate("subjects", int(subject.max()) + 1):
        b = pyro.sample("b", dist.MultivariateNormal(beta, D))
    with pyro.plate("items", int(item.max()) + 1):
        easy = pyro.sample("easy", dist.Normal(0.0, scales[0]))
        quick = pyro.sample("quick", dist.Normal(0.3 * easy, 1.0))
    with pyro.plate("sites", int(site.max()) + 1):
        place = pyro.sample("place", dist.Normal(0.0, scales[1]))
    with pyro.plate("rows", len(y)):
        own, more = b[..., subject, :], easy[..., item] + loading * quick[..., item] * x
        location = own[..., 0] + own[..., 1] * x + more + place[..., site]
        pyro.sample("y", dist.Normal(location, scales[2]), obs=y)


def pupils_in_classes(school: Tensor, size: Tensor, of_class: Tensor, y: Tensor) -> None:
    """Nested by index codes: the school of every class, the class of every pupil; covariates of classes."""
    mu, slope = pyro.param("mu", torch.tensor(0.0)), pyro.param("slope", torch.tensor(0.0))
    scales = [pyro.param(n, torch.tensor(1.0), constraint=positive) for n in ("school_sd", "class_sd", "sd")]
    with pyro.plate("schools", int(school.max()) + 1):
        a = pyro.sample("a", dist.Normal(mu, scales[0]))
    with pyro.plate("classes", len(school)):
        c = pyro.sample("c", dist.Normal(a[..., school] + slope * size, scales[1]))
    with pyro.plate("pupils", len(y)):
        pyro.sample("y", dist.Normal(c[..., of_class], scales[2]), obs=y)


def nested(y: Tensor) -> None:
    """Schools, classes in schools, pupils in classes: y (pupils, classes, schools)."""
    mu = pyro.param("mu", torch.tensor(0.0))
    scales = [pyro.param(n, torch.tensor(1.0), constraint=positive) for n in ("school_sd", "class_sd", "sd")]
    pupils, classes, schools = y.shape
    with pyro.plate("schools", schools, dim=-1):
        school = pyro.sample("school", dist.Normal(mu, scales[0]))
        with pyro.plate("classes", classes, dim=-2):
            own = pyro.sample("own", dist.Normal(school, scales[1]))
            with pyro.plate("pupils", pupils, dim=-3):
                pyro.sample("y", dist.Normal(own, scales[2]), obs=y)


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor(0.0))
    tau2 = pyro.param("tau2", torch.tensor(1.0), constraint=positive)
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau2.sqrt()))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_event(y: Tensor, sigma: Tensor) -> None:
    """The same as one vector, whose elements the plates do not tell apart."""
    mu = pyro.param("mu", torch.tensor(0.0))
    tau2 = pyro.param("tau2", torch.tensor(1.0), constraint=positive)
    theta = pyro.sample("theta", dist.Normal(mu, tau2.sqrt()).expand([len(y)]).to_event(1))
    pyro.sample("y", dist.Normal(theta, sigma).to_event(1), obs=y)


def common_shock(x: Tensor) -> None:
    """A latent that all rows share, and one of each row."""
    tau = pyro.param("tau", torch.tensor(1.0), constraint=positive)
    scale = pyro.param("sd", torch.tensor(1.0), constraint=positive)
    shock = pyro.sample("shock", dist.Normal(0.0, tau))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.5 * shock, 1.0))
        pyro.sample("x", dist.Normal(torch.stack([z, shock - z], -1), scale).to_event(1), obs=x)


def path_model(x: Tensor) -> None:
    """Latents that depend on latents, in one plate."""
    slope, scale = pyro.param("slope", torch.tensor(0.5)), pyro.param("sd", torch.tensor(1.0), constraint=positive)
    with pyro.plate("rows", len(x)):
        cause = pyro.sample("cause", dist.Normal(0.0, 1.0))
        effect = pyro.sample("effect", dist.Normal(slope * cause, 0.7))
        pyro.sample("x", dist.Normal(cause, scale), obs=x[:, 0])
        pyro.sample("y", dist.Normal(2.0 * effect, scale), obs=x[:, 1])


def two_sets(x: Tensor, y: Tensor) -> None:
    """Two groups of latents that share parameters but no data."""
    mu, tau = pyro.param("mu", torch.tensor(0.3)), pyro.param("tau", torch.tensor(1.0), constraint=positive)
    with pyro.plate("first", len(x)):
        u = pyro.sample("u", dist.Normal(mu, tau))
        pyro.sample("x", dist.Normal(u, 1.0), obs=x)
    with pyro.plate("second", len(y)):
        v = pyro.sample("v", dist.Normal(mu, 2 * tau))
        pyro.sample("y", dist.Normal(v, 0.5), obs=y)


def matches(home: Tensor, away: Tensor, margin: Tensor) -> None:
    """Each row reads two elements of one plate: the system is dense."""
    tau, scale = (pyro.param(n, torch.tensor(1.0), constraint=positive) for n in ("tau", "sd"))
    advantage = pyro.param("advantage", torch.tensor(0.0))
    with pyro.plate("teams", int(home.max()) + 1):
        skill = pyro.sample("skill", dist.Normal(0.0, tau))
    with pyro.plate("games", len(margin)):
        pyro.sample("margin", dist.Normal(advantage + skill[home] - skill[away], scale), obs=margin)


def mixture_of_factors(x: Tensor) -> None:
    w = pyro.param("w", torch.ones(2) / 2, constraint=simplex)
    loading = pyro.param("W", torch.ones(2, x.shape[-1]))
    mean = pyro.param("b", torch.zeros(2, x.shape[-1]))
    scale = pyro.param("sd", torch.ones(x.shape[-1]), constraint=positive)
    with pyro.plate("rows", len(x)):
        k = pyro.sample("k", dist.Categorical(w))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        location = Vindex(loading)[k, :] * z.unsqueeze(-1) + Vindex(mean)[k, :]
        pyro.sample("x", dist.Normal(location, scale).to_event(1), obs=x)


def mixture_of_groups(y: Tensor) -> None:
    """Each group has a kind, which decides the spread of its effect and of its repeats: y (T, J)."""
    w = pyro.param("w", torch.ones(2) / 2, constraint=simplex)
    mu = pyro.param("mu", torch.zeros(2))
    tau, scale = (pyro.param(n, torch.ones(2), constraint=positive) for n in ("tau", "sd"))
    with pyro.plate("groups", y.shape[1], dim=-1):
        k = pyro.sample("k", dist.Categorical(w))
        b = pyro.sample("b", dist.Normal(mu[k], tau[k]))
        with pyro.plate("repeats", y.shape[0], dim=-2):
            pyro.sample("y", dist.Normal(b, scale[k]), obs=y)


def latent_first(y: Tensor) -> None:
    """The discrete latent is drawn after the Gaussian one; location is not centred."""
    w = pyro.param("w", torch.ones(2) / 2, constraint=simplex)
    mu = pyro.param("mu", torch.zeros(2))
    tau = pyro.param("tau", torch.tensor(1.0), constraint=positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Categorical(w))
        pyro.sample("y", dist.Normal(mu[k] + tau * z, 0.5), obs=y)


def schools_with_priors(y: Tensor, sigma: Tensor) -> None:
    """`eight_schools` with priors on its parameters, for map-em."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.Gamma(2.0, 0.1))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)
