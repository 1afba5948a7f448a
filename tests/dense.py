"""The exact evidence of a linear-Gaussian model, found without pyro_em: one dense joint normal.

For latents z (all continuous sites flattened into one vector) the log joint f(z), run in plain Pyro, is quadratic,
so with gradient g and Hessian H at 0, both by automatic differentiation of the whole model,

    log p(x) = f(0) + ½ gᵀ(-H)⁻¹g - ½ log|-H| + (D/2) log 2π,     z|x ~ N((-H)⁻¹ g, (-H)⁻¹).

Discrete latents are enumerated, every assignment of every element: for a handful of rows only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from tests.oracles import exact_log_prob, trace

Model = Callable[..., Any]
Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Dense:
    """log p(x), and moments of the continuous latents, by site in the site's own shape.

    `joint` is the covariance of all of them, flattened one behind the other.
    """

    log_evidence: Tensor
    mean: dict[str, Tensor]
    variance: dict[str, Tensor]
    joint: Tensor

    @property
    def covariance(self) -> dict[str, Tensor]:
        """That of every element's vector, batch shape + (D, D), for sites with an event of one dim."""
        found, begin = {}, 0
        for site, mean in self.mean.items():
            size = mean.numel()
            own = self.joint[begin : begin + size, begin : begin + size]
            begin += size
            if mean.dim():
                D = mean.shape[-1]
                blocks = own.reshape(-1, D, size // D, D).diagonal(dim1=0, dim2=2).movedim(-1, 0)
                found[site] = blocks.reshape(*mean.shape, D)
        return found


def _log_joint(nodes: dict[str, Any], latent: set[str], parameters: set[str]) -> Tensor:
    total = torch.zeros(())
    for name, site in nodes.items():
        if site["type"] != "sample" or type(site["fn"]).__name__ == "_Subsample" or name in parameters:
            continue
        log_prob = exact_log_prob(site["fn"], site["value"])
        if site["mask"] is not None and name not in latent:
            log_prob = torch.where(torch.as_tensor(site["mask"]), log_prob, 0.0)
        total = total + (log_prob * site["scale"]).sum()
    return total


def _gaussian(f: Callable[[Tensor], Tensor], size: int) -> tuple[Tensor, Tensor, Tensor]:
    zero = torch.zeros(size, requires_grad=True)
    value = f(zero)
    (g,) = torch.autograd.grad(value, zero, create_graph=True)
    H = torch.stack([torch.autograd.grad(g[i], zero, create_graph=True)[0] for i in range(size)])
    precision = -(H + H.T) / 2
    mean = torch.linalg.solve(precision, g)
    log_z = value + 0.5 * g @ mean - 0.5 * torch.logdet(precision) + 0.5 * size * math.log(2 * math.pi)
    return log_z, mean, torch.linalg.inv(precision)


def _latents(nodes: dict[str, Any], params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
    """Discrete and continuous ones."""
    latent = {
        n: s for n, s in nodes.items()
        if s["type"] == "sample" and not s["is_observed"] and n not in params and type(s["fn"]).__name__ != "_Subsample"
    }  # fmt: skip
    discrete = {n: s for n, s in latent.items() if s["fn"].has_enumerate_support}
    return discrete, {n: s for n, s in latent.items() if n not in discrete}


def _assignments(discrete: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Every joint value of the discrete latents."""
    elements = [(n, i) for n, s in discrete.items() for i in range(s["value"].numel())]
    states = [range(len(discrete[n]["fn"].enumerate_support(expand=False))) for n, _ in elements]
    for chosen in itertools.product(*states):
        fixed = {n: torch.zeros_like(s["value"]).reshape(-1) for n, s in discrete.items()}
        for (n, i), state in zip(elements, chosen, strict=True):
            fixed[n][i] = state
        yield {n: v.reshape(discrete[n]["value"].shape) for n, v in fixed.items()}


def dense(model: Model, args: tuple[Any, ...], params: Params) -> Dense:
    """The oracle at `params` (which may require gradients)."""
    with pyro.get_param_store().scope(), torch.no_grad():
        nodes = trace(model, args, params)
    discrete, continuous = _latents(nodes, params)
    latent = {*discrete, *continuous}
    sizes = [s["value"].numel() for s in continuous.values()]

    def unpack(z: Tensor) -> dict[str, Tensor]:
        parts = z.split(sizes)
        return {n: p.reshape(s["value"].shape) for (n, s), p in zip(continuous.items(), parts, strict=True)}

    terms, means, squares = [], [], []
    for fixed in _assignments(discrete):

        def f(z: Tensor, fixed: dict[str, Tensor] = fixed) -> Tensor:
            return _log_joint(trace(model, args, params, {**unpack(z), **fixed}), latent, set(params))

        log_z, mean, covariance = _gaussian(f, sum(sizes))
        terms.append(log_z)
        means.append(mean)
        squares.append(covariance + mean.unsqueeze(-1) * mean)
    log_evidence = torch.stack(terms).logsumexp(0)
    weights = (torch.stack(terms) - log_evidence).exp().unsqueeze(-1)
    mean = (weights * torch.stack(means)).sum(0)
    joint = (weights.unsqueeze(-1) * torch.stack(squares)).sum(0) - mean.unsqueeze(-1) * mean
    return Dense(log_evidence, unpack(mean), unpack(joint.diagonal()), joint)


def expected_log_joint(model: Model, args: tuple[Any, ...], old: Params) -> Callable[[Params], Tensor]:
    """θ -> E[log p(x, z|θ) | x, old]: for every assignment of the discrete latents f(m) + ½ tr(H V), with gradient and
    Hessian in the continuous z at θ, weighted by its posterior probability."""
    with pyro.get_param_store().scope(), torch.no_grad():
        nodes = trace(model, args, old)
    discrete, continuous = _latents(nodes, old)
    latent, sizes = {*discrete, *continuous}, [s["value"].numel() for s in continuous.values()]

    def joint(params: Params, fixed: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        def f(z: Tensor) -> Tensor:
            parts = z.split(sizes)
            values = {n: p.reshape(s["value"].shape) for (n, s), p in zip(continuous.items(), parts, strict=True)}
            return _log_joint(trace(model, args, params, {**values, **fixed}), latent, set(params))

        return f

    each = [(fixed, *_gaussian(joint(old, fixed), sum(sizes))) for fixed in _assignments(discrete)]
    weights = torch.stack([log_z.detach() for _, log_z, _, _ in each]).softmax(0)

    def given(params: Params, fixed: dict[str, Tensor], mean: Tensor, covariance: Tensor) -> Tensor:
        z = mean.detach().clone().requires_grad_()
        with torch.enable_grad():
            value = joint(params, fixed)(z)
            (g,) = torch.autograd.grad(value, z, create_graph=True)
            H = torch.stack([torch.autograd.grad(g[i], z, create_graph=True)[0] for i in range(len(z))])
        return value + 0.5 * (H * covariance.detach()).sum()

    def q(params: Params) -> Tensor:
        terms = [given(params, fixed, mean, covariance) for fixed, _, mean, covariance in each]
        return (weights * torch.stack(terms)).sum()

    return q
