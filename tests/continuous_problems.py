"""One table of all models with continuous latents, missing cells or quadrature: what the general laws run over.

Made of the tables by kind (latent_problems.py, conjugate_problems.py) and of those whose options differ here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models import ordinal
from pyro_em import Quadrature
from tests import zoo_missing, zoo_quadrature
from tests.conjugate_problems import CASES
from tests.latent_problems import LATENT_PROBLEMS
from tests.problem import Fitted

NAN = float("nan")


@dataclass(frozen=True)
class ContinuousProblem(Fitted):
    """`rows` gives the arguments with the independent rows in another order, None where there are none.

    `loose` is the error of the log-likelihood that its nodes leave, 0 where it is exact. `completes` says why the Q of
    the M-step is another than that of the latents, `attained` whether the maximum lies inside of the parameter space.
    """

    rows: Callable[[tuple[Any, ...], Tensor], tuple[Any, ...]] | None = None
    num_rows: int = 0
    loose: float = 0.0
    completes: str = ""
    attained: bool = True


def _t(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=float))


def _first(args: tuple[Any, ...], order: Tensor) -> tuple[Any, ...]:
    """The first argument's rows."""
    return (args[0][order], *args[1:])


def _every(args: tuple[Any, ...], order: Tensor) -> tuple[Any, ...]:
    return tuple(a[order] if isinstance(a, Tensor) else a for a in args)


def _columns(args: tuple[Any, ...], order: Tensor) -> tuple[Any, ...]:
    return (args[0][:, order], *args[1:])


LATENT_ROWS = {
    "factor_analysis": _first,
    "ppca": _first,
    "masked_factor": _every,
    "random_slopes": _every,
    "random_intercepts": _columns,
    "crossed": _every,
    "subjects_and_items": _every,
    "eight_schools": _every,
    "common_shock": _first,
    "path_model": _first,
    "matches": _every,
    "mixture_of_factors": _first,
    "mixture_of_groups": _columns,
    "latent_first": _first,
    "schools_with_priors": _every,
}
CONJUGATE_ROWS = dict.fromkeys(CASES, _every) | {"group_variances": _columns}


def _holes(x: Tensor, share: float, seed: int) -> Tensor:
    x = x.clone()
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < share] = NAN
    return x


CELLS = "vectors with missing cells are completed (families/incomplete_normal.py; test_missing.py has these M-steps)"


def _build() -> list[ContinuousProblem]:
    P = ContinuousProblem
    found = []
    for p in LATENT_PROBLEMS:
        how = LATENT_ROWS.get(p.name)
        size = 0 if how is None else p.args[0].shape[-1] if how is _columns else len(p.args[0])
        found.append(P(p.name, p.model, p.args, p.init, p.algorithm, p.options, how, size, attained=p.attained))
    for name, case in CASES.items():
        how = CONJUGATE_ROWS[name]
        size = case.args[0].shape[-1] if how is _columns else len(case.args[0])
        found.append(P(name, case.model, case.args, case.init, rows=how, num_rows=size))
    rng = np.random.default_rng(3)
    answers = _t(rng.random((14, 4)) < 1 / (1 + np.exp(-1.2 * rng.normal(size=(14, 1)) - np.linspace(-1, 1, 4))))
    grades = ordinal.simulate(16, 3, 3, seed=1)
    group = torch.as_tensor(np.concatenate([np.arange(5), rng.integers(0, 5, 13)]))
    x = _t(rng.normal(size=18))
    counts = _t(rng.poisson(np.exp(0.2 + 0.4 * x.numpy() + rng.normal(0, 0.8, 5)[group])))
    items = {"d": _t(np.linspace(-1, 1, 4)), "a": _t(np.linspace(0.7, 1.6, 4))}
    wide = _t(rng.normal(size=(7, 3)) + 0.8 * rng.normal(size=(7, 1)))
    q, design = zoo_quadrature, _t(np.linspace(-1.5, 1.5, 4))

    def rule(sites: str, nodes: int = 25, **options: Any) -> dict[str, Any]:
        return {"e_step": dict.fromkeys(sites.split(), Quadrature(nodes, **options))}

    lower = _t([[0.9, 0.0], [0.3, 0.6]])
    kinds = {"w": _t([0.4, 0.6]), "centre": _t([-1.0, 1.0]), "d": _t(np.linspace(-1, 1, 4))}
    normal = {"mu": _t(0.5), "s": _t(0.7), "e": _t(1.2)}
    own = np.random.default_rng(5)
    class_, v, u = (own.random((24, 1)) < 0.5) * 1.0, (own.random((24, 1)) < 0.4) * 1.0, own.normal(size=(24, 1))
    table = own.normal(size=(24, 5)) + np.r_[2.0, np.zeros(4)] * (class_ - 0.5)
    rows_of, covariate = torch.arange(80) % 16, _t(own.normal(size=80))
    of_group = -0.3 + 2.0 * (np.arange(16) % 2) + 0.6 * own.normal(size=16)
    of_rows = _t(own.poisson(np.exp(of_group[rows_of] + 0.4 * covariate.numpy())))
    events = _t(own.poisson(np.exp(1.5 * class_ + 0.4 * table + v + (0.4 + 0.3 * class_) * u)))
    found += [
        P("ability", q.ability, (answers,), items, options=rule("theta"), rows=_first, num_rows=14, loose=1e-6),
        P("ability_grid", q.ability, (answers,), items, options=rule("theta", 81, adaptive=False), rows=_first,
          num_rows=14, loose=1e-8),
        P("ability_holes", q.ability, (_holes(answers, 0.2, 1),), items,
          options={**rule("theta", 61), "missing": "nan"}, rows=_first, num_rows=14, loose=1e-6),
        P("graded", ordinal.graded, (grades, 3),
          {"slope": items["a"][:3], "cut": _t([[-1.0, 0.5], [-0.4, 0.9], [0.1, 1.0]])}, options=rule("theta", 41),
          rows=_first, num_rows=16, loose=1e-6),
        P("ability_classes", q.ability_classes, (answers,), kinds, options=rule("theta"), rows=_first, num_rows=14,
          loose=1e-6),
        P("groups_in_classes", q.groups_in_classes, (events, _t(table)),
          {"w": _t([0.4, 0.6]), "b": _t([[0.2, 0.3], [1.3, 0.4]]), "s": _t([0.4, 0.7]), "m": _t([-0.6, 0.6]),
           "c": _t([0.2, 0.4]), "shift": _t([0.0, 1.0])}, options=rule("u", 41), rows=_every, num_rows=24, loose=1e-6),
        P("classes_of_groups", q.classes_of_groups, (of_rows, covariate, rows_of),
          {"w": _t([0.4, 0.6]), "b": _t([[-0.3, 0.2], [1.4, 0.5]]), "s": _t([0.5, 0.7])}, options=rule("u", 31),
          rows=_every, num_rows=80, loose=1e-6),
        P("inflated", q.inflated, (of_rows * (torch.arange(80) % 5 > 0), covariate, rows_of),
          {"gate": _t(0.3), "b": _t([0.8, 0.4]), "s": _t(0.9)}, options=rule("u", 31), rows=_every, num_rows=80,
          loose=1e-6),
        P("shares", q.shares, (_t((of_rows + 1) / (of_rows.max() + 2)), covariate, rows_of), {"b": _t([-1.5, 0.3]),
          "s": _t(0.9), "phi": _t([8.0, 8.0])}, options=rule("u", 21), rows=_every, num_rows=80, loose=1e-6),
        P("rates", q.rates, (counts, x, group), {"b0": _t(0.2), "b1": _t(0.4), "s": _t(0.8)}, options=rule("u"),
          rows=_every, num_rows=18, loose=1e-6),
        P("slopes", q.slopes, (answers, design), {"L": lower, "d": _t(0.3)}, options=rule("b", 15), rows=_first,
          num_rows=14, loose=1e-4),
        P("two_sites", q.two_sites, (answers, design), {"s": _t([0.9, 0.6]), "d": _t(0.3)}, options=rule("b c", 15),
          rows=_first, num_rows=14, loose=1e-4),
        P("normal_nodes", q.normal, (wide,), normal, options=rule("b", 5), rows=_first, num_rows=7, loose=1e-9),
    ]  # fmt: skip

    m, data = zoo_missing, _t(rng.normal(size=(16, 3)) @ rng.normal(size=(3, 3)) + 1.0)
    holes, missing = _holes(data, 0.25, 2), {"missing": "nan"}
    pair = {"w": _t([0.5, 0.5]), "mu": torch.stack([data[:8].mean(0), data[8:].mean(0)])}
    S = _t(np.cov(data.numpy().T))
    covariates = _t(np.stack([np.ones(16), np.linspace(-1, 1, 16)], -1))
    classes = (_holes(data[:, :2], 0.2, 3), _holes(_t(rng.poisson(2.0, 16)), 0.2, 4), _t(rng.integers(0, 3, 16)))
    spread = {"mu": data.mean(0), "var": S.diagonal().clone()}
    found += [
        P("missing_normal", m.normal, (holes,), {"mu": data.mean(0), "S": S}, options=missing, rows=_first,
          num_rows=16, completes=CELLS),
        P("missing_mixture", m.mixture, (holes,), {**pair, "S": torch.stack([S, 2 * S])}, options=missing,
          rows=_first, num_rows=16, completes=CELLS),
        P("missing_exchangeable", m.exchangeable, (holes,),
          {"mu": data.mean(0), "sd": data.std(0), "rho": _t(0.2)}, options=missing, rows=_first, num_rows=16),
        P("missing_regression", m.regression, (holes, covariates), {"beta": _t(np.zeros((2, 3))), "S": S},
          options=missing, rows=_every, num_rows=16, completes=CELLS),
        P("missing_priors", m.conjugate, (holes,), spread, "map-em", missing, _first, 16, completes=CELLS),
        P("missing_cells", m.diagonal, (holes,), spread, "map-em", missing, _first, 16),
        P("missing_classes", m.classes, classes,
          {"w": _t([0.4, 0.6]), "mu": _t([[-1.0, -1.0], [1.0, 1.0]]), "sd": _t(np.ones((2, 2))), "rate": _t([1.0, 4.0]),
           "shade": _t([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]])}, options=missing, rows=_every, num_rows=16),
    ]  # fmt: skip
    return found


CONTINUOUS = _build()
