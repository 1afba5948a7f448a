"""Random models with conjugate latents: the input of the law against one-dimensional integrals (G5).

A latent of every group (or one for all groups) has one to three observed sites, in the groups' plate, in a plate nested
in it or in long format, of families that are conjugate to it:

    Gamma           Poisson rates with exposures, Exponential and Gamma rates, Normal precisions
    InverseGamma    Normal variances
    Beta            Bernoulli, Binomial and Geometric probabilities

Its hyperparameters are parameters, and so is the mean of normal sites.
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
    "Gamma": ("poisson", "exponential", "gamma", "precision"),
    "InverseGamma": ("variance",),
    "Beta": ("bernoulli", "binomial", "geometric"),
}
PRIORS: dict[str, Any] = {"Gamma": dist.Gamma, "InverseGamma": dist.InverseGamma, "Beta": dist.Beta}
GROUPS, REPEATS, LONG = 4, 3, 9


def child(family: str, z: Tensor, mu: Tensor, number: Tensor) -> Any:
    """The distribution of a site given its latent; `number` is an exposure, a known shape or a total count."""
    if family == "poisson":
        return dist.Poisson(z * number)
    if family == "exponential":
        return dist.Exponential(z)
    if family == "gamma":
        return dist.Gamma(number, z)
    if family == "precision":
        return dist.Normal(mu, z.rsqrt())
    if family == "variance":
        return dist.Normal(mu, z.sqrt())
    if family == "bernoulli":
        return dist.Bernoulli(z)
    return dist.Geometric(z) if family == "geometric" else dist.Binomial(number, z)


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
        return torch.arange(GROUPS).expand(self.data.shape).reshape(-1)


@dataclass(frozen=True)
class ConjugateGraph:
    seed: int
    kind: str
    common: bool  # one latent for all groups
    sites: tuple[Site, ...]
    start: dict[str, Tensor]

    def __str__(self) -> str:
        return f"{self.kind}-{self.seed}"

    @property
    def model(self) -> Callable[[], None]:
        return lambda: _run(self)

    def log_joint(self, params: dict[str, Tensor], z: Tensor) -> Tensor:
        """log p(z) + log p(data of the element | z) of every latent, (elements, points) for z (points,)."""
        elements = 1 if self.common else GROUPS
        total = PRIORS[self.kind](params["a"], params["b"]).log_prob(z).expand(elements, -1).clone()
        for site in self.sites:
            mu = params.get("mu", torch.zeros(()))
            number = site.number.expand(site.data.shape).reshape(-1, 1)
            own = child(site.family, z, mu, number).log_prob(site.data.reshape(-1, 1))
            index = torch.zeros_like(site.by_group()) if self.common else site.by_group()
            total = total.index_add(0, index, own)
        return total


def conjugate_graph(kind: str, seed: int) -> ConjugateGraph:
    """The graph of a seed; data are drawn from the model, so that none is impossible."""
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    torch.manual_seed(seed)
    start = {"a": _t(rng.uniform(1.5, 4.0)), "b": _t(rng.uniform(0.8, 3.0)), "mu": _t(rng.normal())}
    common = bool(rng.random() < 0.25)
    z = PRIORS[kind](start["a"], start["b"]).sample((GROUPS,))
    z = z[:1].expand(GROUPS) if common else z
    sites = []
    for i in range(rng.integers(1, 4)):
        family, layout = str(rng.choice(KINDS[kind])), str(rng.choice(["groups", "nested", "long"]))
        group = torch.as_tensor(rng.integers(0, GROUPS, LONG))
        own = z[group] if layout == "long" else z.expand(REPEATS, GROUPS) if layout == "nested" else z
        number = _t(rng.integers(1, 9, own.shape[-1]))
        data = child(family, own, start["mu"], number).sample()
        sites.append(Site(f"x{i}", family, layout, data, number, group))
    if not any(site.family in ("precision", "variance") for site in sites):
        del start["mu"]
    return ConjugateGraph(seed, kind, common, tuple(sites), start)


def _t(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=float))


def _run(graph: ConjugateGraph) -> None:
    positive, real = constraints.positive, constraints.real
    params = {
        name: pyro.param(name, value.clone(), constraint=real if name == "mu" else positive)
        for name, value in graph.start.items()
    }
    mu = params.get("mu", torch.zeros(()))
    prior = PRIORS[graph.kind](params["a"], params["b"])
    groups = pyro.plate("groups", GROUPS, dim=-1)
    if graph.common:
        z = pyro.sample("z", prior)
    else:
        with groups:
            z = pyro.sample("z", prior)
    for site in graph.sites:
        with pyro.plate(f"long_{site.name}", LONG, dim=-1) if site.layout == "long" else groups:
            if site.layout == "long":
                own = z if graph.common else Vindex(z)[..., site.group]
                pyro.sample(site.name, child(site.family, own, mu, site.number), obs=site.data)
            elif site.layout == "nested":
                with pyro.plate(f"repeats_{site.name}", REPEATS, dim=-2):
                    pyro.sample(site.name, child(site.family, z, mu, site.number), obs=site.data)
            else:
                pyro.sample(site.name, child(site.family, z, mu, site.number), obs=site.data)
