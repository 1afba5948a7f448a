"""The table of problems with Gaussian latents: each a small model, its data, and a start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests import zoo_latent as z
from tests.problem import Fitted


def _t(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=float))


@dataclass(frozen=True)
class LatentProblem(Fitted):
    attained: bool = True  # the log-evidence has its maximum at variances above 0


def _build() -> list[LatentProblem]:
    rng = np.random.default_rng(0)
    x4 = _t(rng.normal(size=(14, 2)) @ rng.normal(size=(2, 4)) + rng.normal(size=4) + 0.5 * rng.normal(size=(14, 4)))
    W = _t(rng.normal(size=(4, 2)))
    known = torch.as_tensor(rng.random(14) < 0.7)
    subject = torch.as_tensor(np.sort(rng.integers(0, 5, 23)))
    days = _t(rng.integers(0, 6, 23))
    effects = rng.normal(size=(5, 2))
    y = _t(2.0 + effects[subject, 0] + (0.5 + effects[subject, 1]) * days.numpy() + 0.6 * rng.normal(size=23))
    wide = _t(1.0 + 1.5 * rng.normal(size=6) + 0.7 * rng.normal(size=(3, 6)))
    row, column = torch.as_tensor(rng.integers(0, 6, 30)), torch.as_tensor(rng.integers(0, 4, 30))
    cells = _t(1.0 + rng.normal(size=6)[row] + 0.8 * rng.normal(size=4)[column] + 0.5 * rng.normal(size=30))
    of_class, school = torch.as_tensor(np.arange(26) % 7), torch.as_tensor([0, 0, 1, 1, 1, 2, 2])
    pupils = _t(rng.normal(size=(1, 1, 3)) + 0.6 * rng.normal(size=(1, 2, 3)) + 0.4 * rng.normal(size=(4, 2, 3)) + 1.0)
    schools, sigma = _t([28, 8, -3, 7, -1, 1, 18, 12]), _t([15, 10, 16, 11, 9, 11, 10, 18])
    pairs = _t(rng.normal(size=(9, 2)) + 0.4)
    home, away = torch.as_tensor([0, 1, 2, 3, 0, 2, 1, 3]), torch.as_tensor([1, 2, 3, 0, 2, 1, 3, 1])
    margin = _t(rng.normal(size=8) * 2 + 0.5)
    few = _t(np.concatenate([rng.normal(size=(3, 3)) - 2, rng.normal(size=(3, 3)) + 2]))
    groups = _t(np.concatenate([rng.normal(size=(3, 3)) * 0.4 - 1, rng.normal(size=(3, 3)) * 1.5 + 2], 1))
    age, dose = _t(rng.normal(size=14)), _t(rng.integers(0, 3, 23))
    treatment = torch.as_tensor(rng.integers(0, 3, 23))
    both = _t(effects[subject, :1] + 0.4 * rng.normal(size=(23, 2)) + np.arange(3)[treatment, None])
    times = _t(np.exp(effects[subject, 0] + 0.5 * rng.normal(size=23)))
    half, one = _t([0.5, 0.5]), _t(1.0)
    fa = {"W": W, "b": _t([0.1, 0, 0, 0]), "sd": _t([1.0, 0.8, 1.2, 0.9])}
    school_start = {"mu": _t(3.0), "tau2": _t(30.0)}
    P = LatentProblem
    return [
        P("factor_analysis", z.factor_analysis, (x4,), fa),
        P("factor_analysis_weighted", z.factor_analysis, (x4,), fa,
          options={"weights": {"rows": _t([2, 1, 0, 1, 3, 1, 1, 1, 0.5, 1, 1, 2, 1, 1])}}),
        P("ppca", z.ppca, (x4,), {"W": W[:, :1], "b": _t([0.1, 0, 0, 0]), "sd": one}),
        P("factor_with_covariate", z.factor_with_covariate, (x4, age),
          {"w": W[:, 0], "b": _t(rng.normal(size=(2, 4)) * 0.3), "noise": 0.3 + torch.eye(4).double()}),
        P("repeated_vectors", z.repeated_vectors, (subject, treatment, dose, both, times),
          {"effect": _t([0.2, 0.1, 0.3]), "slope": _t(0.1), "shift": _t(0.2), "tau": _t([0.8, 0.5]),
           "sd": _t([1.0, 0.7]), "other": _t(0.9)}),
        P("masked_factor", z.masked_factor, (x4, known), {"w": _t([1, 0.5, -0.5, 0.2]), "sd": _t([1, 1, 2, 1])},
          attained=False),
        P("random_slopes", z.random_slopes, (days, subject, y),
          {"beta": _t([1.0, 0.3]), "D": _t([[1.0, 0.2], [0.2, 0.8]]), "s2": _t(0.5)}),
        P("random_intercepts", z.random_intercepts, (wide,), {"mu": _t(0.2), "tau": _t(0.9), "sd": one}),
        P("crossed", z.crossed, (row, column, cells), {"mu": _t(0.5), "sa": _t(0.8), "sc": _t(1.1), "sd": _t(0.7)}),
        P("nested", z.nested, (pupils,),
          {"mu": _t(0.5), "school_sd": one, "class_sd": _t(0.7), "sd": _t(0.6)}),
        P("subjects_and_items", z.subjects_and_items, (cells.flip(0), row, column, torch.arange(30) % 3, cells),
          {"beta": _t([0.3, 0.1]), "loading": _t(0.4), "item_sd": _t(0.8),
           "site_sd": _t(0.5), "sd": _t(0.7)}, attained=False),
        P("pupils_in_classes", z.pupils_in_classes, (school, _t([3, 4, 2, 5, 3, 4, 6]), of_class, cells[:26]),
          {"mu": _t(0.5), "slope": _t(0.1), "school_sd": one, "class_sd": _t(0.7), "sd": _t(0.6)}, attained=False),
        P("eight_schools", z.eight_schools, (schools, sigma), school_start, attained=False),
        P("eight_schools_event", z.eight_schools_event, (schools, sigma), school_start, attained=False),
        P("common_shock", z.common_shock, (pairs,), {"tau": _t(0.8), "sd": _t(0.9)}),
        P("path_model", z.path_model, (pairs,), {"slope": _t(0.4), "sd": _t(0.9)}, attained=False),
        P("two_sets", z.two_sets, (pairs[:, 0], wide[0]), {"mu": _t(0.2), "tau": one}),
        P("matches", z.matches, (home, away, margin), {"tau": _t(0.8), "sd": _t(1.1), "advantage": _t(0.1)}),
        P("mixture_of_factors", z.mixture_of_factors, (few,),
          {"w": half, "W": _t([[1, 0.5, 0.2], [0.3, -0.5, 1]]), "b": _t([[-1.0] * 3, [1.5] * 3]),
           "sd": _t([1, 0.8, 1])}, attained=False),
        P("mixture_of_groups", z.mixture_of_groups, (groups,),
          {"w": half, "mu": _t([-1, 1]), "tau": _t([0.5, 1.0]), "sd": _t([0.6, 1.2])}, attained=False),
        P("latent_first", z.latent_first, (pairs[:6, 0] * 3,), {"w": half, "mu": _t([-1, 2]), "tau": _t(0.7)}),
        P("schools_with_priors", z.schools_with_priors, (schools, sigma), {"mu": _t(3.0), "tau": _t(5.0)}, "map-em"),
    ]  # fmt: skip


LATENT_PROBLEMS = _build()
BY_NAME = {problem.name: problem for problem in LATENT_PROBLEMS}
