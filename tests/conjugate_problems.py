"""The table of problems with conjugate latents: each a small model, its data, a start, and its closed forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from tests import zoo_conjugate as z

Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """`evidence` is log p(x) per independent element, by a closed form; `posterior` that of the latent `site`."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    init: Params
    evidence: Callable[[Params], Tensor]
    site: str
    posterior: Callable[[Params], Any]


def _t(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=float))


def _cases() -> dict[str, Case]:
    rng = np.random.default_rng(0)
    exposure, y = _t(rng.uniform(0.5, 3, 15)), _t(rng.poisson(rng.gamma(2.0, 1.5, 15)))
    group = torch.as_tensor(np.concatenate([[0, 1, 2, 3], rng.integers(0, 4, 11)]))
    wins = _t(rng.binomial(12, rng.beta(2, 3, 15)))
    tails = _t(1.0 + 2 * rng.standard_t(3, 20))
    spread = _t(rng.normal(size=(4, 6)) * rng.gamma(2, 1, 6) + 0.3)
    waits = _t(rng.gamma(2.0, 0.4, 9))
    table = _t(rng.poisson(rng.gamma(2.0, 1.5, (8, 3))))
    both = _t(np.concatenate([rng.poisson(1.0, 8), rng.poisson(rng.gamma(9.0, 1.0, 8))]))
    sums = _t(np.zeros(4)).index_add(0, group, y)
    counts = _t(np.zeros(4)).index_add(0, group, torch.ones_like(y))
    votes = _t([rng.multinomial(12, rng.dirichlet([2.0, 1.0, 3.0])) for _ in range(14)])
    shown = torch.as_tensor(np.array([rng.choice(3, p=row / 12) for row in votes.numpy()]))
    document = torch.as_tensor(np.concatenate([np.arange(5), rng.integers(0, 5, 30)]))
    tables = rng.dirichlet([1.0, 0.5, 2.0, 1.5], 5)
    word = torch.as_tensor(np.array([rng.choice(4, p=tables[d]) for d in document.numpy()]))
    tally = torch.zeros(5, 4, dtype=torch.float64).index_put((document, word), torch.ones(35).double(), True)
    hyper = {"alpha": _t(1.7), "beta": _t(0.8)}

    def groups(p: Params) -> Tensor:
        a, b = p["alpha"], p["beta"]
        own = torch.lgamma(a + sums) - torch.lgamma(a) + a * b.log() - (a + sums) * (b + counts).log()
        return own - torch.zeros_like(sums).index_add(0, group, torch.lgamma(y + 1))

    def variances(p: Params) -> Tensor:
        a, b, half = p["shape"], p["rate"], 2.0
        ss = ((spread - p["mu"]) ** 2).sum(0) / 2
        own = a * b.log() - torch.lgamma(a) + torch.lgamma(a + half) - (a + half) * (b + ss).log()
        return own - half * np.log(2 * np.pi)

    def common(p: Params) -> Tensor:
        a, b = p["alpha"], _t(0.5)
        own = a * b.log() - torch.lgamma(a) + torch.lgamma(a + 18) - (a + 18) * (b + waits.sum()).log()
        return own + waits.log().sum()  # Gamma(2, r): log y + 2 log r - r y

    def mixed(p: Params) -> Tensor:
        own = dist.GammaPoisson(p["alpha"], p["beta"]).log_prob(both.unsqueeze(-1))
        return (own + p["w"].log()).logsumexp(-1)

    def rows(alpha: Tensor, counts: Tensor) -> Tensor:
        """log of Γ(A)/Γ(A + n) Π Γ(α + x)/Γ(α)."""
        own = torch.lgamma(alpha + counts).sum(-1) - torch.lgamma(alpha).sum(-1)
        return own + torch.lgamma(alpha.sum(-1)) - torch.lgamma(alpha.sum(-1) + counts.sum(-1))

    def kinds(p: Params) -> Tensor:
        counts = votes + torch.nn.functional.one_hot(shown, 3)
        own = rows(p["alpha"], counts.unsqueeze(-2))
        orders = torch.lgamma(_t(13.0)) - torch.lgamma(votes + 1).sum(-1)
        return (own + p["w"].log()).logsumexp(-1) + orders

    def topics(p: Params) -> Tensor:
        return ((p["alpha"] / p["alpha"].sum()) @ p["phi"])[word].log()

    def grouped_posterior(p: Params) -> Any:
        return dist.Gamma(p["alpha"] + sums, p["beta"] + counts)

    return {
        "gamma_poisson": Case(
            z.gamma_poisson, (exposure, y), hyper,
            lambda p: dist.GammaPoisson(p["alpha"], p["beta"] / exposure).log_prob(y),
            "rate", lambda p: dist.Gamma(p["alpha"] + y, p["beta"] + exposure)),
        "negative_binomial": Case(
            z.negative_binomial, (y,), {"m": _t(2.0), "k": _t(1.3)},
            lambda p: dist.GammaPoisson(p["k"], p["k"] / p["m"]).log_prob(y),
            "rate", lambda p: dist.Gamma(p["k"] + y, p["k"] / p["m"] + 1)),
        "grouped_counts": Case(z.grouped_counts, (group, y), hyper, groups, "rate", grouped_posterior),
        "positional_counts": Case(z.positional_counts, (group, y), hyper, groups, "rate", grouped_posterior),
        "beta_binomial": Case(
            z.beta_binomial, (wins,), {"a": _t(1.4), "b": _t(2.5)},
            lambda p: dist.BetaBinomial(p["a"], p["b"], 12).log_prob(wins),
            "p", lambda p: dist.Beta(p["a"] + wins, p["b"] + 12 - wins)),
        "student": Case(
            z.student, (tails,), {"mu": _t(0.5), "sigma": _t(1.5), "nu": _t(4.0)},
            lambda p: dist.StudentT(p["nu"], p["mu"], p["sigma"]).log_prob(tails),
            "precision", lambda p: dist.Gamma(p["nu"] / 2 + 0.5,
                                              p["nu"] / 2 + ((tails - p["mu"]) / p["sigma"]) ** 2 / 2)),
        "group_variances": Case(
            z.group_variances, (spread,), {"shape": _t(2.0), "rate": _t(1.5), "mu": _t(0.1)}, variances,
            "variance", lambda p: dist.InverseGamma(p["shape"] + 2, p["rate"] + ((spread - p["mu"]) ** 2).sum(0) / 2)),
        "common_rate": Case(
            z.common_rate, (waits,), {"alpha": _t(1.2)}, common,
            "rate", lambda p: dist.Gamma(p["alpha"] + 18, 0.5 + waits.sum())),
        "event_rates": Case(
            z.event_rates, (table,), hyper,
            lambda p: dist.GammaPoisson(p["alpha"], p["beta"]).log_prob(table).sum(-1),
            "rate", lambda p: dist.Gamma(p["alpha"] + table, p["beta"] + 1)),
        "mixed_counts": Case(
            z.mixed_counts, (both,), {"w": _t([0.5, 0.5]), "alpha": _t([1.5, 8.0]), "beta": _t([1.0, 0.9])}, mixed,
            "rate", lambda p: None),
        "categories": Case(
            z.categories, (votes,), {"alpha": _t([1.5, 0.8, 2.2])},
            lambda p: dist.DirichletMultinomial(p["alpha"], 12 * torch.ones(14)).log_prob(votes),
            "theta", lambda p: dist.Dirichlet(p["alpha"] + votes)),
        "words": Case(
            z.words, (document, word), {"alpha": _t([1.0, 0.7, 1.8, 0.9])}, lambda p: rows(p["alpha"], tally),
            "theta", lambda p: dist.Dirichlet(p["alpha"] + tally)),
        "kinds_of_categories": Case(
            z.kinds_of_categories, (votes, shown),
            {"w": _t([0.4, 0.6]), "alpha": _t([[1.5, 0.8, 2.2], [0.6, 2.0, 1.1]])}, kinds, "theta", lambda p: None),
        "one_token": Case(
            z.one_token, (word,), {"alpha": _t([1.2, 0.7]), "phi": _t([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])},
            topics, "theta", lambda p: None),
    }  # fmt: skip


CASES = _cases()
