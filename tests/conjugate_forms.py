"""Closed forms of conjugate_graphs.py: evidence by logarithms of Γ, moments of the posterior.

A row adds (Δ, log h) to the natural parameters (a, b) or α of its element's prior, with normaliser B:

    log Z = log B(posterior) − log B(prior) + Σ log h

In class c with the class's prior; over classes log Σ_c w_c Z_c, and posterior moments are those of the mixture.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from tests.conjugate_graphs import ConjugateGraph, Site

Increment = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # of y, number, mu: Δa, Δb, log h


def _choose(n: Tensor, y: Tensor) -> Tensor:
    return torch.lgamma(n + 1) - torch.lgamma(y + 1) - torch.lgamma(n - y + 1)


def _gamma(y: Tensor, s: Tensor, mu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return s, y, (s - 1) * y.log() - torch.lgamma(s)


def _square(y: Tensor, s: Tensor, mu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return 0 * y + 0.5, (y - mu) ** 2 / 2, 0 * y - 0.5 * math.log(2 * math.pi)


INCREMENTS: dict[str, Increment] = {
    "poisson": lambda y, s, mu: (y, s, y * s.log() - torch.lgamma(y + 1)),
    "exponential": lambda y, s, mu: (0 * y + 1, y, 0 * y),
    "gamma": _gamma,
    "precision": _square,
    "inverse_gamma": lambda y, s, mu: (s, 1 / y, -(s + 1) * y.log() - torch.lgamma(s)),
    "variance": _square,
    "mean": lambda y, s, mu: (0 * y + 1, y, 0 * y),
    "scale": _gamma,
    "laplace": lambda y, s, mu: (0 * y + 1, y.abs(), 0 * y - math.log(2)),
    "bernoulli": lambda y, s, mu: (y, 1 - y, 0 * y),
    "binomial": lambda y, s, mu: (y, s - y, _choose(s, y)),
    "geometric": lambda y, s, mu: (0 * y + 1, y, 0 * y),
    "failure": lambda y, s, mu: (1 - y, y, 0 * y),
    "negative_binomial": lambda y, s, mu: (y, s, _choose(y + s - 1, y)),
}


def closed_form(graph: ConjugateGraph, params: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """log p(x) of every element (E,), and mean and variance of its latent, (E,) or (E, K)."""
    prior = params["alpha"] if graph.kind == "Dirichlet" else torch.stack([params["a"], params["b"]], -1)
    prior = prior.reshape(-1, prior.shape[-1])  # (C, 2) or (C, K)
    added, base = torch.zeros(graph.elements, prior.shape[-1]), torch.zeros(graph.elements)
    for site in graph.sites:
        delta, log_h = _of_rows(graph, site, params, prior.shape[-1])
        added, base = added.index_add(0, graph.index(site), delta), base.index_add(0, graph.index(site), log_h)
    posterior = prior + added.unsqueeze(1)  # (E, C, ...)
    log_z = _log_normaliser(graph.kind, posterior) - _log_normaliser(graph.kind, prior)
    log_z = log_z + base.unsqueeze(-1) + (params["w"].log() if graph.classes else 0.0)
    share = log_z.softmax(-1).unsqueeze(-1)  # (E, C, 1)
    mean, square = _moments(graph.kind, posterior)
    mean, square = (share * mean).sum(1), (share * square).sum(1)
    variance = square - mean**2
    return log_z.logsumexp(-1), *(x if graph.kind == "Dirichlet" else x.squeeze(-1) for x in (mean, variance))


def _of_rows(graph: ConjugateGraph, site: Site, params: dict[str, Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Δ (rows, 2) or (rows, K), and log h (rows,)."""
    if graph.kind == "Dirichlet":
        counts = one_hot(site.data.long(), size).double() if site.family == "categorical" else site.data
        counts = counts.reshape(-1, size)
        return counts, torch.lgamma(counts.sum(-1) + 1) - torch.lgamma(counts + 1).sum(-1)
    number = site.number.expand(site.data.shape).reshape(-1)
    a, b, log_h = INCREMENTS[site.family](site.data.reshape(-1), number, params.get("mu", torch.zeros(())))
    return torch.stack(torch.broadcast_tensors(a, b), -1), log_h


def _log_normaliser(kind: str, natural: Tensor) -> Tensor:
    if kind in ("Beta", "Dirichlet"):
        return torch.lgamma(natural).sum(-1) - torch.lgamma(natural.sum(-1))
    a, b = natural.unbind(-1)
    return torch.lgamma(a) - a * b.log()


def _moments(kind: str, natural: Tensor) -> tuple[Tensor, Tensor]:
    """E z and E z² of every entry, (E, C, 1) or (E, C, K)."""
    if kind == "Dirichlet":
        total = natural.sum(-1, keepdim=True)
        return natural / total, natural * (natural + 1) / (total * (total + 1))
    a, b = natural.unsqueeze(-1).unbind(-2)
    if kind == "Gamma":
        return a / b, a * (a + 1) / b**2
    if kind == "Beta":
        return a / (a + b), a * (a + 1) / ((a + b) * (a + b + 1))
    return b / (a - 1), torch.where(a > 2, b**2 / ((a - 1) * (a - 2)), torch.inf)
