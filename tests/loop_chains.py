"""Loops over time with Gaussian states for the laws: each a small model, its data, a start.

Their oracle is one dense joint normal (dense.py), found from the log joint of the model in plain Pyro. Data have time
as their first dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor

from pyro_em import markov
from tests.problem import Fitted

positive, definite = constraints.positive, constraints.positive_definite


@dataclass(frozen=True)
class LoopProblem(Fitted):
    closed: bool = True  # every parameter's update has a closed form
    completes: str = ""  # why the complete data of the M-step, and so its Q, are not those of the model as written


def local_level(y: Tensor, loop: Callable[[int], Any] = markov) -> None:
    q, r = (pyro.param(n, torch.tensor(1.0), constraint=positive) for n in ("q", "r"))
    x = None
    for t in loop(len(y)):
        x = pyro.sample(f"x_{t}", dist.Normal(1.0, 2.0) if x is None else dist.Normal(x, q))
        pyro.sample(f"y_{t}", dist.Normal(x, r), obs=y[t])


def step_by_step(y: Tensor) -> None:
    """The same, traced step by step."""
    local_level(y, lambda T: pyro.markov(range(T)))


def trend(y: Tensor) -> None:
    """Level and slope are sites of their own (Harvey 1989, section 2.3)."""
    q, s, r = (pyro.param(n, torch.tensor(1.0), constraint=positive) for n in ("q", "s", "r"))
    for t in markov(len(y)):
        if t == 0:
            level = pyro.sample(f"level_{t}", dist.Normal(0.0, 3.0))
            slope = pyro.sample(f"slope_{t}", dist.Normal(0.0, 1.0))
        else:
            level, slope = (
                pyro.sample(f"level_{t}", dist.Normal(level + slope, q)),
                pyro.sample(f"slope_{t}", dist.Normal(slope, s)),
            )
        pyro.sample(f"y_{t}", dist.Normal(level, r), obs=y[t])


def slope_first(y: Tensor) -> None:
    """The level moves by the slope of its own step: states that read one another within a step."""
    q, s, r = (pyro.param(n, torch.tensor(1.0), constraint=positive) for n in ("q", "s", "r"))
    level, slope = torch.tensor(0.0), torch.tensor(0.0)
    for t in markov(len(y)):
        slope = pyro.sample(f"slope_{t}", dist.Normal(slope, s))
        level = pyro.sample(f"level_{t}", dist.Normal(level + slope, q))
        pyro.sample(f"y_{t}", dist.Normal(level, r), obs=y[t])


def system(y: Tensor) -> None:
    """Every matrix and offset free, for sequences in a plate: y (T, N, P)."""
    A, C = pyro.param("A", torch.eye(2)), pyro.param("C", torch.ones(3, 2))
    b, d, m = pyro.param("b", torch.zeros(2)), pyro.param("d", torch.zeros(3)), pyro.param("m", torch.zeros(2))
    Q, R, S = (pyro.param(n, torch.eye(k), constraint=definite) for n, k in (("Q", 2), ("R", 3), ("S", 2)))
    x = None
    with pyro.plate("sequences", y.shape[1]):
        for t in markov(len(y)):
            fn = dist.MultivariateNormal
            x = pyro.sample(f"x_{t}", fn(m, S) if x is None else fn(x @ A.T + b, Q))
            pyro.sample(f"y_{t}", fn(x @ C.T + d, R), obs=y[t])


def factor(y: Tensor) -> None:
    """One factor with two lags behind several series, which are a plate inside of the loop: y (T, P)."""
    phi = pyro.param("phi", torch.tensor([0.5, 0.1]))
    loadings = pyro.param("loadings", torch.ones(y.shape[1]))
    noise = pyro.param("noise", torch.ones(y.shape[1]), constraint=positive)
    before = f = torch.tensor(0.0)
    for t in markov(len(y), history=2):
        before, f = f, pyro.sample(f"f_{t}", dist.Normal(phi[0] * f + phi[1] * before, 1.0))
        with pyro.plate(f"series_{t}", y.shape[1]):
            pyro.sample(f"y_{t}", dist.Normal(loadings * f, noise), obs=y[t])


def controlled(y: Tensor, u: Tensor) -> None:
    """Controls u (T, 2) in the state equation, covariates in that of the observation, which looks back a step."""
    a, B, c = pyro.param("a", torch.tensor(0.5)), pyro.param("B", torch.zeros(2)), pyro.param("c", torch.zeros(2))
    D = pyro.param("D", torch.zeros(2))
    q, r = (pyro.param(n, torch.tensor(1.0), constraint=positive) for n in ("q", "r"))
    before = x = torch.tensor(0.0)
    for t in markov(len(y)):
        before, x = x, pyro.sample(f"x_{t}", dist.Normal(a * x + u[t] @ B, q))
        pyro.sample(f"y_{t}", dist.Normal(c[0] * x + c[1] * before + u[t] @ D, r), obs=y[t])


def ragged(y: Tensor, seen: Tensor) -> None:
    """Sequences of several lengths: y and `seen` (T, N)."""
    a = pyro.param("a", torch.tensor(0.5))
    q, r = (pyro.param(n, torch.tensor(1.0), constraint=positive) for n in ("q", "r"))
    with pyro.plate("sequences", y.shape[1]):
        x = pyro.sample("x_start", dist.Normal(0.0, 1.0))
        for t in markov(len(y)):
            with poutine.mask(mask=seen[t]):
                x = pyro.sample(f"x_{t}", dist.Normal(a * x, q))
                pyro.sample(f"y_{t}", dist.Normal(x, r), obs=y[t])


def wandering(y: Tensor, v: Tensor) -> None:
    """A regression whose coefficients wander: v (T, 2), with an inverse gamma prior on the variance of the noise."""
    q = pyro.param("q", torch.ones(2), constraint=positive)
    r = pyro.sample("r", dist.InverseGamma(3.0, 2.0))
    x = torch.zeros(2)
    for t in markov(len(y)):
        x = pyro.sample(f"x_{t}", dist.Normal(x, q).to_event(1))
        pyro.sample(f"y_{t}", dist.Normal((v[t] * x).sum(-1), r.sqrt()), obs=y[t])


def autoregression(y: Tensor, seen: Tensor) -> None:
    """An AR(1) seen through noise at some steps only, the mean of the process free."""
    phi, mu = pyro.param("phi", torch.tensor(0.5)), pyro.param("mu", torch.tensor(0.0))
    s = pyro.param("s", torch.tensor(1.0), constraint=positive)
    x = torch.tensor(0.0)
    for t in markov(len(y)):
        x = pyro.sample(f"x_{t}", dist.Normal(phi * x, s))
        with poutine.mask(mask=seen[t]):
            pyro.sample(f"y_{t}", dist.Normal(mu + x, 0.5), obs=y[t])


def intercepts(y: Tensor, loop: Callable[[int], Any] = markov) -> None:
    """Sequences with intercepts of their own, which every step of the loop reads: y (T, N)."""
    a, m = pyro.param("a", torch.tensor(0.5)), pyro.param("m", torch.tensor(0.0))
    q, r, tau = (pyro.param(n, torch.tensor(1.0), constraint=positive) for n in ("q", "r", "tau"))
    with pyro.plate("sequences", y.shape[1]):
        w, x = pyro.sample("w", dist.Normal(m, tau)), torch.tensor(0.0)
        for t in loop(len(y)):
            x = pyro.sample(f"x_{t}", dist.Normal(a * x, q))
            pyro.sample(f"y_{t}", dist.Normal(x + w, r), obs=y[t])


def intercepts_by_step(y: Tensor) -> None:
    """The same, traced step by step."""
    intercepts(y, lambda T: pyro.markov(range(T)))


def pulled(y: Tensor) -> None:
    """States that drift to a level of their own, one of several from before the loop: y (T, N)."""
    a = pyro.param("a", torch.tensor(0.5))
    q, r = (pyro.param(n, torch.tensor(1.0), constraint=positive) for n in ("q", "r"))
    S = pyro.param("S", torch.eye(2), constraint=definite)
    with pyro.plate("sequences", y.shape[1]):
        common = pyro.sample("common", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.MultivariateNormal(common.unsqueeze(-1) * torch.ones(2), S))
        x = pyro.sample("x_start", dist.Normal(w[..., 0], 1.0))
        for t in markov(len(y)):
            x = pyro.sample(f"x_{t}", dist.Normal(a * x + 0.4 * w[..., 0], q))
            pyro.sample(f"y_{t}", dist.Normal(x + w[..., 1], r), obs=y[t])


def growth(y: Tensor) -> None:
    """Intercepts and slopes of sequences, their covariance diagonal at first, beside it the noise q of x_0."""
    a, b = pyro.param("a", torch.tensor(0.5)), pyro.param("b", torch.zeros(2))
    q, r = (pyro.param(n, torch.tensor(1.0), constraint=positive) for n in ("q", "r"))
    S = pyro.param("S", torch.eye(2), constraint=definite)
    times = 0.3 * torch.arange(float(len(y))).unsqueeze(-1)
    with pyro.plate("sequences", y.shape[1]):
        w, x = pyro.sample("w", dist.MultivariateNormal(b, S)), torch.tensor(0.0)
        for t in markov(len(y)):
            x = pyro.sample(f"x_{t}", dist.Normal(a * x, q))
            pyro.sample(f"y_{t}", dist.Normal(x + w[..., 0] + times[t] * w[..., 1], r), obs=y[t])


def coefficients(y: Tensor, u: Tensor) -> None:
    """A regression with random coefficients and autoregressive errors (two lags), some steps not seen: u (T, 2)."""
    phi = pyro.param("phi", torch.tensor([0.5, 0.1]))
    tau = pyro.param("tau", torch.ones(2), constraint=positive)
    q, r = (pyro.param(n, torch.tensor(1.0), constraint=positive) for n in ("q", "r"))
    w = pyro.sample("w", dist.Normal(torch.zeros(2), tau).to_event(1))
    before = x = torch.tensor(0.0)
    for t in markov(len(y), history=2):
        before, x = x, pyro.sample(f"x_{t}", dist.Normal(phi[0] * x + phi[1] * before, q))
        with poutine.mask(mask=~y[t].isnan()):
            pyro.sample(f"y_{t}", dist.Normal(x + (u[t] * w).sum(-1), r), obs=y[t].nan_to_num())


def _t(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=float))


ENDS = "states after the end of their sequence are left out"


def _build() -> list[LoopProblem]:
    rng = np.random.default_rng(0)
    walk = _t(np.cumsum(rng.normal(size=7)) + 0.5 * rng.normal(size=7))
    drift = _t(0.3 * np.arange(6) + rng.normal(size=6))
    three = _t(rng.normal(size=(4, 3, 3)) + np.cumsum(rng.normal(size=(4, 3, 1)), 0))
    u = _t(rng.normal(size=(7, 2)))
    pushed = walk + u @ _t([1.0, -0.5])
    ends = torch.arange(5).unsqueeze(-1) < torch.tensor([5, 3, 1])
    pieces = _t(np.cumsum(rng.normal(size=(5, 3)), 0))
    seen = torch.as_tensor([True, True, False, True, False, False, True])
    one, two = _t(1.0), _t([0.7, 0.7])
    apart = _t(rng.normal(size=(6, 3)) + rng.normal(size=3) * 1.5)
    gappy = pushed.masked_fill(torch.arange(7) == 2, torch.nan)
    spread = {"q": _t(0.8), "r": _t(0.9)}
    P = LoopProblem
    return [
        P("local_level", local_level, (walk,), spread),
        P("step_by_step", step_by_step, (walk,), spread),
        P("trend", trend, (drift,), {**spread, "s": _t(0.3)}),
        P("slope_first", slope_first, (drift,), {**spread, "s": _t(0.3)}),
        P("system", system, (three,),
          {"A": _t([[0.7, 0.1], [-0.2, 0.6]]), "C": _t([[1, 0], [0.5, 1], [0, 0.4]]), "b": _t([0.1, 0]),
           "d": _t([0, 0.2, 0]), "m": _t([0.1, -0.1]), "Q": torch.eye(2), "R": torch.eye(3), "S": torch.eye(2)}),
        P("factor", factor, (three[:, :, 0].repeat(2, 1)[:6],),
          {"phi": _t([0.5, 0.2]), "loadings": _t([1.0, 0.6, -0.3]), "noise": _t([1.0, 0.8, 1.2])}),
        P("controlled", controlled, (pushed, u),
          {**spread, "a": _t(0.6), "B": _t([0.5, 0.0]), "c": _t([1.0, 0.2]), "D": _t([0.0, 0.1])}),
        P("ragged", ragged, (pieces, ends), {**spread, "a": _t(0.8)}, completes=ENDS),
        P("ragged_weighted", ragged, (pieces, ends), {**spread, "a": _t(0.8)},
          options={"weights": {"sequences": _t([2.0, 0.5, 1.0])}}, completes=ENDS),
        P("wandering", wandering, (walk, u), {"q": two, "r": one}, "map-em"),
        P("autoregression", autoregression, (walk, seen), {"phi": _t(0.6), "mu": _t(0.3), "s": one}),
        P("intercepts", intercepts, (apart,), {**spread, "a": _t(0.6), "m": _t(0.2), "tau": _t(1.2)}),
        P("intercepts_by_step", intercepts_by_step, (apart,), {**spread, "a": _t(0.6), "m": _t(0.2), "tau": _t(1.2)}),
        P("intercepts_weighted", intercepts, (apart,), {**spread, "a": _t(0.6), "m": _t(0.2), "tau": _t(1.2)},
          options={"weights": {"sequences": _t([2.0, 0.5, 1.0])}}),
        P("pulled", pulled, (apart,), {**spread, "a": _t(0.6), "S": _t([[1.0, 0.2], [0.2, 0.8]])}),
        P("growth", growth, (apart,), {**spread, "a": _t(0.6), "b": _t([0.1, 0.0]), "S": torch.eye(2)}),
        P("coefficients", coefficients, (gappy, u), {**spread, "phi": _t([0.5, 0.2]), "tau": two}),
    ]  # fmt: skip


default_dtype = torch.get_default_dtype()
torch.set_default_dtype(torch.float64)  # the table is built on import, before any fixture runs
try:
    LOOP_PROBLEMS = _build()
finally:
    torch.set_default_dtype(default_dtype)
BY_NAME = {problem.name: problem for problem in LOOP_PROBLEMS}
