"""Exact answers found without pyro_em: explicit enumeration in plain Pyro.

For a model p(x, z | theta) with discrete latents z, run the model once for every assignment of z and add up:

    log p(x) = logsumexp_g [ a_g + sum_n w_n logsumexp_l b_(g,l,n) ]

where g runs over the assignments of the latents outside the element plate, l over those of the latents inside it
(given g, the N elements of that plate are independent, so one run serves them all at once), a is the log-density of
the sites outside and b of those inside. Without a plate everything is outside. `rows`: elements of rows in long format.

Densities are exact at structural zeros (torch clamps `probs`); a mask acts on observed sites only, as in Pyro. Not
handled: continuous latents, subsampling, or more assignments than one cares to wait for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

Model = Callable[..., Any]
Params = Mapping[str, Tensor]
Site = dict[str, Any]
Assignment = dict[str, Tensor]


class _Substitute(Messenger):
    """Give `pyro.param` statements the tensors of `params`, bypassing the store and its transforms."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.params = params

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self.params:
            msg["value"] = self.params[msg["name"]]
            msg["done"] = True


def trace(model: Model, args: tuple[Any, ...], params: Params, assignment: Params | None = None) -> dict[str, Site]:
    """Sites of one run at `params` (of `pyro.param` and `pyro.sample` sites alike) and fixed latents."""
    fixed = {**params, **(assignment or {})}
    with pyro.get_param_store().scope(), _Substitute(params):
        nodes = poutine.trace(poutine.condition(model, data=fixed)).get_trace(*args).nodes
    return dict(nodes)


def exact_log_prob(fn: Any, value: Tensor) -> Tensor:
    """`fn.log_prob(value)`, but -inf where torch's clamped probabilities give -36, and Bessel functions to rounding."""
    if isinstance(fn, torch.distributions.Independent):
        inner = exact_log_prob(fn.base_dist, value)
        count = fn.reinterpreted_batch_ndims
        return inner.sum(list(range(-count, 0))) if count else inner
    if isinstance(fn, dist.MaskedDistribution):
        inner = exact_log_prob(fn.base_dist, value)
        return torch.where(torch.as_tensor(fn._mask), inner, inner.new_zeros(()))
    if isinstance(fn, dist.ExpandedDistribution):
        return exact_log_prob(fn.base_dist, value)
    if isinstance(fn, torch.distributions.OneHotCategorical):
        return exact_log_prob(fn._categorical, value.argmax(-1))
    if isinstance(fn, dist.VonMises):
        kappa = fn.concentration
        return kappa * (value - fn.loc).cos() - (2 * torch.pi * torch.special.i0(kappa)).log()
    if "probs" not in fn.__dict__:  # given by logits, which are not clamped
        return torch.as_tensor(fn.log_prob(value))
    if isinstance(fn, torch.distributions.Categorical):
        index = value.long()
        table, index = torch.broadcast_tensors(fn.probs, index.unsqueeze(-1))
        return table.gather(-1, index[..., :1]).squeeze(-1).log()
    if isinstance(fn, torch.distributions.Bernoulli | torch.distributions.Binomial):
        total = torch.as_tensor(fn.total_count if isinstance(fn, torch.distributions.Binomial) else 1.0)
        choose = torch.lgamma(total + 1) - torch.lgamma(value + 1) - torch.lgamma(total - value + 1)
        return choose + torch.special.xlogy(value, fn.probs) + torch.special.xlog1py(total - value, -fn.probs)
    return torch.as_tensor(fn.log_prob(value))


def _site_log_prob(site: Site, latent: bool) -> Tensor:
    log_prob = exact_log_prob(site["fn"], site["value"])
    if site["mask"] is not None and not latent:
        log_prob = torch.where(torch.as_tensor(site["mask"]), log_prob, log_prob.new_zeros(()))
    return log_prob * site["scale"]


def _stochastic(nodes: dict[str, Site]) -> Iterator[tuple[str, Site]]:
    for name, site in nodes.items():
        if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample":
            yield name, site


def _plate_dim(site: Site, plate: str | None) -> int | None:
    for frame in site["cond_indep_stack"]:
        if frame.name == plate:
            return int(frame.dim)
    return None


@dataclass(frozen=True)
class Enumeration:
    """Everything one can ask of the exact posterior of a small discrete model.

    `log_joint` is (G, L, N); `local` and `outer` list the assignments behind l and g (an element of a local
    assignment has size 1 along the element plate). `shapes` holds the batch shape of each latent site.
    """

    model: Model
    args: tuple[Any, ...]
    params: Params
    plate: str | None
    latents: dict[str, Site]
    outer: list[Assignment]
    local: list[Assignment]
    log_outer: Tensor  # (G,)
    log_joint: Tensor  # (G, L, N)
    weights: Tensor  # (N,)
    rows: Mapping[str, Tensor]

    @property
    def log_evidence(self) -> Tensor:
        """log p(x | params), a differentiable scalar."""
        inner = _logsumexp(self.log_joint, 1)
        return _logsumexp(self.log_outer + (inner * self.weights).sum(-1), 0)

    @property
    def pointwise(self) -> Tensor:
        """log p(x_n | params) of each plate element, (N,); only without outer latents."""
        assert len(self.outer) == 1
        return _logsumexp(self.log_joint[0], 0)

    @property
    def responsibilities(self) -> Tensor:
        """Posterior weight of every joint assignment for every element, (G, L, N)."""
        with torch.no_grad():
            inner = _logsumexp(self.log_joint, 1)
            log_outer = self.log_outer + (inner * self.weights).sum(-1)
            outer = (log_outer - _logsumexp(log_outer, 0)).exp()
            local = (self.log_joint - inner.unsqueeze(1)).exp().nan_to_num(0.0)
            return outer[:, None, None] * local

    def marginal(self, name: str) -> Tensor:
        """p(z = k | x) of a latent site, (batch shape..., K), over its enumerated support."""
        site, weights = self.latents[name], self.responsibilities
        event_dim, dim = site["fn"].event_dim, _plate_dim(site, self.plate)
        support = site["fn"].enumerate_support(expand=False)
        states = support.reshape(support.shape[0], -1)
        result = torch.zeros((*site["fn"].batch_shape, len(states)))
        for g, outer in enumerate(self.outer):
            for l, local in enumerate(self.local):
                value = {**outer, **local}[name]
                value = value.reshape((*value.shape[: value.dim() - event_dim], 1, -1))
                here = weights[g, l, :1].reshape(()) if dim is None else weights[g, l].reshape((-1,) + (1,) * -dim)
                result += (value == states).all(-1) * here
        return result

    def mode(self) -> tuple[float, Assignment]:
        """The joint mode: its log p(x, z) and the assignment of every latent site."""
        best, index = self.log_joint.max(1)
        totals = self.log_outer + (best * self.weights).sum(-1)
        g = int(totals.argmax())
        values = dict(self.outer[g])
        for name in self.local[0]:
            dim = _plate_dim(self.latents[name], self.plate)
            assert dim is not None
            axis = dim - self.latents[name]["fn"].event_dim
            picked = [self.local[int(l)][name] for l in index[g]]
            values[name] = torch.cat([v.narrow(axis, n % v.shape[axis], 1) for n, v in enumerate(picked)], axis)
        return float(totals[g]), values

    def log_density(self, assignment: Assignment) -> float:
        """log p(x, z) of one given assignment of every latent; priors of parameters left out."""
        sites = _stochastic(trace(self.model, self.args, self.params, assignment))
        terms = [_site_log_prob(s, n in assignment).sum() for n, s in sites if n not in self.params]
        return float(torch.stack(terms).sum())

    def expected_log_joint(self, params: Params) -> Tensor:
        """Q(params) = E_q[log p(x, z | params)] with q this posterior, priors of parameters left out."""
        log_outer, log_joint = _log_joint(self.model, self.args, params, self.plate, self.outer, self.local, self.rows)
        weights = self.responsibilities
        zero = log_joint.new_zeros(())
        local = torch.where(weights > 0, log_joint, zero) * weights * self.weights
        outer_weights = weights.sum(1)[:, 0]
        return local.sum() + (torch.where(outer_weights > 0, log_outer, zero) * outer_weights).sum()

    def entropy(self) -> float:
        """Entropy of the joint posterior of all latents, weights w_n counting as repeats."""
        weights = self.responsibilities
        outer = weights.sum(1)[:, 0]
        local = weights / outer[:, None, None].clamp_min(1e-300)
        inner = -(torch.special.xlogy(local, local).sum(1) * self.weights).sum(-1)
        return float((outer * inner).sum() - torch.special.xlogy(outer, outer).sum())


def _logsumexp(x: Tensor, dim: int) -> Tensor:
    """logsumexp whose gradient is zero, not NaN, where every term is -inf."""
    peak = x.detach().amax(dim, keepdim=True)
    peak = torch.where(peak.isfinite(), peak, torch.zeros_like(peak))
    total = (x - peak).exp().sum(dim)
    safe = torch.where(total > 0, total, torch.ones_like(total)).log() + peak.squeeze(dim)
    return torch.where(total > 0, safe, torch.full_like(safe, -torch.inf))


def _assignments(sites: dict[str, Site], plate: str | None, whole: bool = False) -> list[Assignment]:
    """Every joint value of `sites`; along the element plate a value has size 1, or with `whole` is the same."""
    choices = []
    for site in sites.values():
        support = site["fn"].enumerate_support(expand=False)
        states = support.reshape((support.shape[0], *site["fn"].event_shape))
        batch = list(site["fn"].batch_shape)
        dim = _plate_dim(site, plate)
        if dim is not None:
            batch[dim] = 1
        values = itertools.product(range(len(states)), repeat=int(np.prod(batch)))
        event, full = site["fn"].event_shape, site["fn"].batch_shape if whole else batch
        choices.append([states[list(v)].reshape((*batch, *event)).expand((*full, *event)) for v in values])
    return [dict(zip(sites, combination, strict=True)) for combination in itertools.product(*choices)]


def _log_joint(
    model: Model,
    args: tuple[Any, ...],
    params: Params,
    plate: str | None,
    outer: list[Assignment],
    local: list[Assignment],
    elements: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """(G,) log-density of the sites outside the element plate, (G, L, N) of those inside."""
    all_outer, all_joint = [], []
    for g in outer:
        rows, outside = [], torch.zeros(())
        for l in local:
            nodes = trace(model, args, params, {**g, **l})
            inside, outside = torch.zeros(1), torch.zeros(())
            for name, site in _stochastic(nodes):
                if name in params:
                    continue
                log_prob = _site_log_prob(site, latent=name in g or name in l)
                dim = _plate_dim(site, plate)
                nested = next((f for f in site["cond_indep_stack"] if f.name in elements), None)
                if nested is not None:
                    own = log_prob.movedim(nested.dim, -1).reshape(-1, nested.size).sum(0)
                    inside = inside + own.new_zeros(len(inside)).index_add(0, elements[nested.name], own)
                elif dim is None:
                    outside = outside + log_prob.sum()
                else:
                    size = next(f.size for f in site["cond_indep_stack"] if f.name == plate)
                    log_prob = log_prob.expand(torch.broadcast_shapes(log_prob.shape, (size,) + (1,) * (-dim - 1)))
                    inside = inside + log_prob.movedim(dim, -1).reshape(-1, size).sum(0)
            rows.append(inside)
        all_joint.append(torch.stack(torch.broadcast_tensors(*rows)))
        all_outer.append(outside)
    return torch.stack(all_outer), torch.stack(all_joint)


def enumerate_model(
    model: Model,
    args: tuple[Any, ...],
    params: Params,
    plate: str | None = None,
    weights: Tensor | None = None,
    limit: int = 5000,
    rows: Mapping[str, Tensor] | None = None,
) -> Enumeration:
    """Enumerate all latents; the elements of `plate` must be independent given everything outside it."""
    nodes = trace(model, args, params)
    latents = {n: s for n, s in _stochastic(nodes) if not s["is_observed"] and n not in params}
    inside = {n: s for n, s in latents.items() if _plate_dim(s, plate) is not None}
    outside = {n: s for n, s in latents.items() if n not in inside}
    outer, local = _assignments(outside, None), _assignments(inside, plate, whole=rows is not None)
    if len(outer) * len(local) > limit:
        raise ValueError(f"{len(outer)} x {len(local)} assignments are more than {limit}.")
    log_outer, log_joint = _log_joint(model, args, params, plate, outer, local, rows or {})
    size = log_joint.shape[-1]
    return Enumeration(
        model, args, params, plate, latents, outer, local, log_outer, log_joint,
        torch.ones(size) if weights is None else weights, rows or {},
    )  # fmt: skip


def log_prior(model: Model, args: tuple[Any, ...], params: Params) -> Tensor:
    """Sum of the log-densities of parameter-role sample sites, in the constrained space, no Jacobian."""
    nodes = trace(model, args, params)
    priors = [exact_log_prob(s["fn"], s["value"]).sum() for n, s in _stochastic(nodes) if n in params]
    return torch.stack(priors).sum() if priors else torch.zeros(())


def constraints(model: Model, args: tuple[Any, ...], params: Params) -> dict[str, Any]:
    """The constraint of every parameter: of its `pyro.param` statement, or the support of its prior."""
    with pyro.get_param_store().scope():
        nodes = poutine.trace(model).get_trace(*args).nodes
        declared = dict(pyro.get_param_store().get_state()["constraints"])
    return {name: declared[name] if name in declared else nodes[name]["fn"].support for name in params}
