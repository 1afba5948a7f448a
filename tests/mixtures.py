"""Random mixtures as Pyro programs: the input of the law that every M-step is the argmax of Q (G6).

A `Mixture` draws, from a seed, a latent class z in a plate of rows and one to three sites that depend on it. Arguments
are put together from what a modeller writes: entries by class or by group, common and class-wise slopes, offsets,
structural zeros, exposures, cumulative sums, multiples, links. Parameters may be tied (one in several sites, or twice
in one), have a prior (conjugate or not, with a parameter of its own), or be told to stay. Rows may have weights, sites
may be masked. Data are drawn from the model at other parameters than the start.

Letters: N rows, K classes, P covariates, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from torch import Tensor
from torch.nn.functional import softplus

from tests.mixture_parts import CONSTRAINTS, TRIALS, Argument, G, N, P, Parameter, Prior, Site, Values, moved


@dataclass
class Mixture:
    """One model, its `words` for the messages of a test."""

    rng: np.random.Generator
    K: int
    words: list[str] = field(default_factory=list)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    fixed: set[str] = field(default_factory=set)
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        self.X = self._tensor(self.rng.normal(size=(N, P)))
        self.exposure = self._tensor(self.rng.uniform(0.5, 2.0, N))
        self.group = torch.as_tensor(self.rng.integers(0, G, N))

    @property
    def with_prior(self) -> bool:
        return any(p.prior is not None for p in self.parameters.values())

    @property
    def start(self) -> Values:
        return {name: p.value.clone() for name, p in self.parameters.items()}

    def model(self, data: Values) -> None:
        values: Values = {}
        for name, own in self.parameters.items():
            values[name] = (
                pyro.param(name, own.value.clone(), constraint=CONSTRAINTS[own.kind])
                if own.prior is None
                else pyro.sample(name, own.prior(values))
            )
        with pyro.plate("rows", N):
            z = pyro.sample("z", self.gate(values))
            for site in self.sites:
                with poutine.mask(mask=True if site.mask is None else site.mask):
                    pyro.sample(site.name, site.distribution(values, z), obs=data.get(site.name))

    def simulate(self, seed: int) -> Values:
        """Data of all sites, at parameters that are not the start."""
        with torch.random.fork_rng(), pyro.get_param_store().scope():
            torch.manual_seed(seed)
            other = {n: moved(p) for n, p in self.parameters.items()}
            nodes = poutine.trace(poutine.condition(self.model, other)).get_trace({}).nodes
        return {site.name: nodes[site.name]["value"].detach() for site in self.sites}

    gate: Callable[[Values], Any] = field(init=False)

    def informed(self) -> Tensor:
        """Rows (N,) of which some site, not masked, has another density in one class than in another."""
        z, values, found = torch.arange(self.K).unsqueeze(-1), self.start, torch.zeros(N, dtype=torch.bool)
        for site in self.sites:
            own = site.distribution(values, z)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                density = own.log_prob(own.sample()[:1]).expand(self.K, N)
            found |= (density != density[:1]).any(0) & (True if site.mask is None else site.mask)
        return found

    def _tensor(self, x: Any) -> Tensor:
        return torch.as_tensor(np.asarray(x, dtype=float))

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def one_of(self, *options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def parameter(self, kind: str, *shape: int, smooth: bool = False) -> str:
        """A new parameter, or one of this kind and shape that another argument has too; `smooth`: without a kink."""
        same = [n for n, p in self.parameters.items() if p.kind == kind and tuple(p.value.shape) == shape]
        same = [n for n in same if self.parameters[n].kink is None or not smooth]
        if same and self.chance(0.3):
            self.words.append("tie")
            return str(self.one_of(*same))
        name = f"{kind}{len(self.parameters)}"
        self.parameters[name] = Parameter(kind, self._start(kind, shape), self._prior(kind, shape, smooth))
        if self.chance(0.08):
            self.fixed.add(name)
        return name

    def _start(self, kind: str, shape: tuple[int, ...]) -> Tensor:
        size = (shape[0], shape[-1], shape[-1]) if kind == "covariance" and len(shape) == 3 else shape
        u = self._tensor(self.rng.normal(size=size))
        if kind == "real":
            return 0.5 * u
        if kind == "positive":
            return (0.4 * u).exp() + 0.3
        if kind == "unit":
            return torch.sigmoid(u)
        if kind == "simplex":
            return torch.softmax(0.5 * u, -1)
        return torch.eye(shape[-1]) + 0.1 * u @ u.mT

    def _prior(self, kind: str, shape: tuple[int, ...], smooth: bool) -> Prior | None:
        if kind == "covariance" or not self.chance(0.35):
            return None
        dims, one = len(shape), torch.ones(shape)
        if kind == "simplex":
            self.words.append("Dirichlet")
            return lambda v: dist.Dirichlet(2 * one).to_event(dims - 1)
        hyper = ""
        if kind == "positive" and shape and self.chance(0.4):
            hyper = f"hyper{len(self.parameters)}"
            self.parameters[hyper] = Parameter("positive", torch.tensor(1.2), lambda v: dist.LogNormal(0.0, 0.5))
        vectors: list[Prior] = []
        if kind == "real" and shape and shape[-1] > 1:
            S = torch.eye(shape[-1]) + 0.3
            vectors = [lambda v: dist.MultivariateNormal(torch.zeros(shape), S).to_event(dims - 1)]
        options: dict[str, list[Prior]] = {
            "real": [
                *([] if smooth else [lambda v: dist.Laplace(0.1 * one, 0.1).to_event(dims)]),
                lambda v: dist.Normal(0.1 * one, 1.5).to_event(dims),
                lambda v: dist.Normal(0 * one, 0.8).to_event(dims),
                lambda v: dist.StudentT(6.0, 0 * one, 2.0).to_event(dims),
                *vectors,
            ],
            "positive": [
                lambda v: dist.Gamma(2.5 * one, 1.5).to_event(dims),
                lambda v: dist.InverseGamma(2.5 * one, 1.5).to_event(dims),
                lambda v: dist.LogNormal(0.1 * one, 0.7).to_event(dims),
                lambda v: dist.HalfCauchy(2 * one).to_event(dims),
                lambda v: dist.Exponential(0.5 * one).to_event(dims),
            ],
            "unit": [lambda v: dist.Beta(2 * one, 3.0).to_event(dims)],
        }
        if hyper:
            self.words.append("hyperparameter")
            return lambda v: dist.Gamma(2.5 * one, v[hyper]).to_event(dims)
        return self.one_of(*options[kind])

    # Arguments -------------------------------------------------------------------------------------------------------

    def location(self) -> Argument:
        """Affine in the parameters, now and then with a unit of a network."""
        kinds = ["level", "common", "slopes", "class slopes", "groups", "cumsum", "offset", "one slope", "contrast"]
        chosen = self.rng.permutation(kinds)[: int(self.rng.integers(1, 4))].tolist()
        if self.chance(0.04):
            chosen.append("hidden unit")
        if chosen == ["offset"]:
            chosen.append("level")
        self.words += chosen
        parts = [self._piece(kind) for kind in chosen]
        return lambda v, z: sum((part(v, z) for part in parts), torch.zeros(()))

    def _piece(self, kind: str) -> Argument:
        X, K = self.X, self.K
        if kind == "offset":
            return lambda v, z: 0.5 * self.X[:, 0] ** 2
        if kind == "level":
            level, factor = self.parameter("real", K), self.one_of(1.0, 1.0, -2.0)
            return lambda v, z: factor * v[level][z]
        if kind == "common":
            common = self.parameter("real")
            return lambda v, z: v[common]
        if kind == "slopes":
            slopes = self.parameter("real", P)
            return lambda v, z: X @ v[slopes]
        if kind == "class slopes":
            slopes = self.parameter("real", K, P)
            return lambda v, z: (X * v[slopes][z]).sum(-1)
        if kind == "groups":
            effects = self.parameter("real", G - 1)
            return lambda v, z: torch.cat([torch.zeros(1), v[effects]])[self.group]
        if kind == "cumsum":
            steps = self.parameter("real", K)
            return lambda v, z: v[steps].cumsum(0)[z]
        if kind == "hidden unit":
            unit = self.parameter("real", P, smooth=True)
            return lambda v, z: torch.tanh(X @ v[unit] + 0.3)
        if kind == "one slope":
            slope = self.parameter("real", K)
            return lambda v, z: v[slope][z] * X[:, 1]
        sign = torch.linspace(-1.0, 1.0, K)
        contrast = self.parameter("real")
        return lambda v, z: sign[z] * v[contrast]

    def positive(self, rate: bool = False) -> Argument:
        """A scale, rate or size; behind a link, by class, common, a multiple or a root."""
        kind = self.one_of("class", "class", "common", "exposure", "root", "exp", "exp", "softplus")
        if kind == "root" and rate:
            kind = "exp"
        self.words.append(kind)
        if kind in ("exp", "softplus"):
            eta, link = self.location(), torch.exp if kind == "exp" else softplus
            return lambda v, z: link(eta(v, z))
        name = self.parameter("positive", *(() if kind == "common" else (self.K,)))
        if kind == "common":
            return lambda v, z: v[name]
        if kind == "exposure":
            return lambda v, z: self.exposure * v[name][z]
        if kind == "root":
            return lambda v, z: v[name][z].sqrt()
        return lambda v, z: v[name][z]

    def trials(self) -> tuple[str, Argument]:
        """An argument `probs` or `logits` of Bernoulli trials."""
        kind = self.one_of("probs", "common probs", "logits", "sigmoid")
        self.words.append(kind)
        if kind in ("logits", "sigmoid"):
            eta = self.location()
            return ("logits", eta) if kind == "logits" else ("probs", lambda v, z: torch.sigmoid(eta(v, z)))
        name = self.parameter("unit", *(() if kind == "common probs" else (self.K,)))
        return "probs", lambda v, z: v[name] if kind == "common probs" else v[name][z]

    def distribution(self) -> Callable[[Values, Tensor], Any]:
        kind = self.one_of(
            "normal", "normal", "lognormal", "poisson", "poisson", "bernoulli", "binomial", "geometric", "gamma",
            "exponential", "negative binomial", "categorical", "mvn", "beta",
        )  # fmt: skip
        self.words.append(kind.upper())
        full = torch.zeros(N)
        if kind in ("normal", "lognormal"):
            loc, scale = self.location(), self.positive()
            make = dist.Normal if kind == "normal" else dist.LogNormal
            return lambda v, z: make(loc(v, z) + full, scale(v, z))
        if kind in ("poisson", "exponential"):
            rate, own = self.positive(rate=True), dist.Poisson if kind == "poisson" else dist.Exponential
            return lambda v, z: own(rate(v, z) + full)
        if kind == "gamma":
            shape, rate = self.positive(), self.positive(rate=True)
            return lambda v, z: dist.Gamma(shape(v, z) + full, rate(v, z))
        if kind == "beta":
            a, b = self.positive(), self.positive()
            return lambda v, z: dist.Beta(a(v, z) + full, b(v, z))
        if kind == "categorical":
            if self.chance(0.5):
                table = self.parameter("simplex", self.K, 3)
                return lambda v, z: dist.Categorical(v[table][z].expand(*z.shape[:-1], N, 3))
            first, second = self.location(), self.location()

            def logits(v: Values, z: Tensor) -> Tensor:
                columns = torch.broadcast_tensors(full, first(v, z), second(v, z))
                return torch.stack(columns, -1)

            return lambda v, z: dist.Categorical(logits=logits(v, z))
        if kind == "mvn":
            first, second = self.location(), self.location()
            S = self.parameter("covariance", *((2, 2) if self.chance(0.5) else (self.K, 2, 2)))
            shared = self.parameters[S].value.dim() == 2

            def loc(v: Values, z: Tensor) -> Tensor:
                return torch.stack(torch.broadcast_tensors(first(v, z) + full, second(v, z)), -1)

            return lambda v, z: dist.MultivariateNormal(loc(v, z), v[S] if shared else v[S][z])
        argument, own = self.trials()
        if kind == "bernoulli":
            return lambda v, z: dist.Bernoulli(**{argument: own(v, z) + full})
        if kind == "binomial":
            return lambda v, z: dist.Binomial(TRIALS, **{argument: own(v, z) + full})
        if kind == "geometric":
            return lambda v, z: dist.Geometric(**{argument: own(v, z) + full})
        size = self.positive()
        return lambda v, z: dist.NegativeBinomial(size(v, z) + full, **{argument: own(v, z)})
