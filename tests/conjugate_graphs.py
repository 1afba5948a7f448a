"""Random models with conjugate latents: the input of the law against one-dimensional integrals and closed forms (G5).

A latent of every group (or one for all groups) has one to three observed sites, in the groups' plate, in a plate nested
in it or in long format, of families that are conjugate to it:

    Gamma           Poisson rates with exposures, rates of Exponential, Gamma and InverseGamma, Normal precisions
    InverseGamma    Normal variances, means of Exponential, scales of Gamma and Laplace
    Beta            Bernoulli (of success and of failure), Binomial, Geometric and NegativeBinomial probabilities
    Dirichlet       Categorical, OneHotCategorical and Multinomial probabilities, Multinomial rows of unequal totals

Its hyperparameters are parameters, and so is the mean of normal sites. In some models they are those of one of two
classes, a discrete latent of the group with probabilities of its own.

Letters: E elements of the latent, C classes, K categories.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints

KINDS: dict[str, tuple[str, ...]] = {
    "Gamma": ("poisson", "exponential", "gamma", "precision", "inverse_gamma"),
    "InverseGamma": ("variance", "mean", "scale", "laplace"),
    "Beta": ("bernoulli", "binomial", "geometric", "failure", "negative_binomial"),
    "Dirichlet": ("categorical", "one_hot", "multinomial"),
}
PRIORS: dict[str, Any] = {"Gamma": dist.Gamma, "InverseGamma": dist.InverseGamma, "Beta": dist.Beta}
GROUPS, REPEATS, LONG = 4, 3, 9
MADE: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "poisson": lambda z, mu, number: dist.Poisson(z * number),
    "exponential": lambda z, mu, number: dist.Exponential(z),
    "gamma": lambda z, mu, number: dist.Gamma(number, z),
    "precision": lambda z, mu, number: dist.Normal(mu, z.rsqrt()),
    "inverse_gamma": lambda z, mu, number: dist.InverseGamma(number, z),
    "variance": lambda z, mu, number: dist.Normal(mu, z.sqrt()),
    "mean": lambda z, mu, number: dist.Exponential(1 / z),
    "scale": lambda z, mu, number: dist.Gamma(number, 1 / z),
    "laplace": lambda z, mu, number: dist.Laplace(0.0, z),
    "bernoulli": lambda z, mu, number: dist.Bernoulli(z),
    "binomial": lambda z, mu, number: dist.Binomial(number, z),
    "geometric": lambda z, mu, number: dist.Geometric(z),
    "failure": lambda z, mu, number: dist.Bernoulli(1 - z),
    "negative_binomial": lambda z, mu, number: dist.NegativeBinomial(number, z),
    "categorical": lambda z, mu, number: dist.Categorical(z),
    "one_hot": lambda z, mu, number: dist.OneHotCategorical(z),
    "multinomial": lambda z, mu, number: dist.Multinomial(int(number.max()), z),  # totals may be less
}


def child(family: str, z: Tensor, mu: Tensor, number: Tensor) -> Any:
    """The distribution of a site given its latent; `number` is an exposure, a known shape or a total count."""
    return MADE[family](z, mu, number)


@dataclass(frozen=True)
class Site:
    """`layout` is "groups", "nested" (repeats, groups) or "long"; `group` numbers the group of each long row."""

    name: str
    family: str
    layout: str
    data: Tensor
    number: Tensor
    group: Tensor

    def by_group(self) -> Tensor:
        """The group of every value, flattened."""
        if self.layout == "long":
            return self.group
        event = self.family in ("one_hot", "multinomial")
        return torch.arange(GROUPS).expand(self.data.shape[: -1 if event else None]).reshape(-1)


@dataclass(frozen=True)
class ConjugateGraph:
    seed: int
    kind: str
    common: bool  # one latent for all groups
    classes: bool
    sites: tuple[Site, ...]
    start: dict[str, Tensor]

    @property
    def model(self) -> Callable[[], None]:
        return lambda: _run(self)

    @property
    def elements(self) -> int:
        return 1 if self.common else GROUPS

    def index(self, site: Site) -> Tensor:
        """The element that every value of a site reads, flattened."""
        return torch.zeros_like(site.by_group()) if self.common else site.by_group()

    def log_joint(self, params: dict[str, Tensor], z: Tensor) -> Tensor:
        """log p(z) + log p(data of the element | z) of every latent, (E, points) for z (points,); no Dirichlet."""
        prior = PRIORS[self.kind](params["a"], params["b"]).log_prob(z.unsqueeze(-1))
        own = (prior + params["w"].log()).logsumexp(-1) if self.classes else prior.reshape(z.shape)
        total = own.expand(self.elements, -1).clone()
        for site in self.sites:
            mu = params.get("mu", torch.zeros(()))
            number = site.number.expand(site.data.shape).reshape(-1, 1)
            density = child(site.family, z, mu, number).log_prob(site.data.reshape(-1, 1))
            total = total.index_add(0, self.index(site), density)
        return total


def conjugate_graph(kind: str, seed: int) -> ConjugateGraph:
    """The graph of a seed; data are drawn from the model, so that none is impossible."""
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    torch.manual_seed(seed)
    common, classes = bool(rng.random() < 0.35), bool(rng.random() < 0.4)
    shape = (2,) if classes else ()
    start = {"w": _t([0.4, 0.6])} if classes else {}
    if kind == "Dirichlet":
        start["alpha"] = _t(rng.uniform(0.5, 3.0, (*shape, rng.integers(2, 5))))
    else:
        low = 2.2 if kind == "InverseGamma" else 1.5  # finite variances
        start |= {"a": _t(rng.uniform(low, 4.0, shape)), "b": _t(rng.uniform(0.8, 3.0, shape)), "mu": _t(rng.normal())}
    k = torch.as_tensor(rng.integers(0, 2, GROUPS)) if classes else ...
    z = _prior(kind, start, k).sample(() if classes else (GROUPS,))
    z = z[:1].expand_as(z) if common else z
    sites = []
    for i in range(rng.integers(1, 4)):
        family, layout = str(rng.choice(KINDS[kind])), str(rng.choice(["groups", "nested", "long"]))
        group = torch.as_tensor(rng.integers(0, GROUPS, LONG))
        own = z[group] if layout == "long" else z.expand(REPEATS, *z.shape) if layout == "nested" else z
        number = _t(rng.integers(1, 9, LONG if layout == "long" else GROUPS))
        data = child(family, own, start.get("mu", torch.zeros(())), number).sample()
        if family == "multinomial":  # rows of other totals than the largest
            data = (data - torch.as_tensor(rng.integers(0, 3, data.shape))).clamp(min=0)
        sites.append(Site(f"x{i}", family, layout, data, number, group))
    if not any(site.family in ("precision", "variance") for site in sites):
        start.pop("mu", None)
    return ConjugateGraph(seed, kind, common, classes, tuple(sites), start)


def _t(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=float))


def _prior(kind: str, params: dict[str, Tensor], k: Any) -> Any:
    """The latent's distribution in class k, `...` for the only one."""
    if kind == "Dirichlet":
        alpha = params["alpha"]
        return dist.Dirichlet(alpha if k is ... else Vindex(alpha)[k, :])
    return PRIORS[kind](params["a"][k], params["b"][k])


def _run(graph: ConjugateGraph) -> None:
    spaces = {"mu": constraints.real, "w": constraints.simplex}
    params = {
        name: pyro.param(name, value.clone(), constraint=spaces.get(name, constraints.positive))
        for name, value in graph.start.items()
    }
    mu = params.get("mu", torch.zeros(()))
    groups = pyro.plate("groups", GROUPS, dim=-1)

    def latent() -> Any:
        k: Any = pyro.sample("k", dist.Categorical(params["w"])) if graph.classes else ...
        return pyro.sample("z", _prior(graph.kind, params, k))

    if graph.common:
        z = latent()
    else:
        with groups:
            z = latent()
    event = graph.kind == "Dirichlet"
    for site in graph.sites:
        with pyro.plate(f"long_{site.name}", LONG, dim=-1) if site.layout == "long" else groups:
            if site.layout == "long":
                gathered = (lambda g: Vindex(z)[..., g, :]) if event else (lambda g: Vindex(z)[..., g])
                own = z if graph.common else gathered(site.group)
                pyro.sample(site.name, child(site.family, own, mu, site.number), obs=site.data)
            elif site.layout == "nested":
                with pyro.plate(f"repeats_{site.name}", REPEATS, dim=-2):
                    pyro.sample(site.name, child(site.family, z, mu, site.number), obs=site.data)
            else:
                pyro.sample(site.name, child(site.family, z, mu, site.number), obs=site.data)
