"""The table of test problems: a law is one test over this table.

Data are drawn once from fixed seeds with NumPy, so every session sees the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests import classics, mixed_chains, problems_data, zoo, zoo_circular, zoo_long, zoo_regression, zoo_time
from tests import zoo_structured as s
from tests.problem import Problem
from tests.problems_data import chains, two_groups


def _t(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=float))


ENDS = "latents after the end of their sequence have no data and leave the complete data (model/relevance.py)"
SHORT = "short chains are smoothed by LAPACK's band solver, which only the CPU has"


def _build() -> list[Problem]:
    rng = np.random.default_rng(0)
    plane = two_groups(1, (25, 15), ((-1.5, 0.0), (1.5, 1.0)), (0.8, 1.1))
    three = torch.cat([plane, two_groups(2, (20,), ((0.0, -4.0),), (0.7,))])
    line = two_groups(3, (30, 20), (-1.5, 2.0), (0.7, 1.0))
    counts = _t(np.concatenate([rng.poisson(2.0, 30), rng.poisson(7.0, 20)]))
    w, means = _t([0.4, 0.6]), _t([[-1.0, 0.5], [1.0, 0.0]])
    answers = _t(rng.random((40, 5)) < np.repeat([[0.2] * 5, [0.8] * 5], (22, 18), 0))
    paths = chains(4, 8, 5)
    words = torch.as_tensor((rng.random((8, 5)) < 0.75) * paths + (rng.random((8, 5)) < 0.2))
    series = _t(rng.normal(3.0 * paths, 1.0))
    pi, A, B = _t([0.45, 0.55]), _t([[0.7, 0.3], [0.4, 0.6]]), _t([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]])
    spread = _t([[[1.2, 0.1], [0.1, 0.9]], [[0.8, -0.1], [-0.1, 1.1]]])
    truth = rng.integers(0, 2, 30)
    ratings = torch.as_tensor(np.where(rng.random((30, 4)) < 0.8, truth[:, None], 1 - truth[:, None]))
    rated = torch.as_tensor(rng.random((30, 4)) < 0.85)
    confusion = _t([[0.7, 0.3], [0.25, 0.75]]).repeat(4, 1, 1)
    kinds = np.repeat([0, 1], (5, 4))
    passed = _t(rng.random((9, 3, 4)) < np.where(rng.random((9, 3, 1)) < 0.2 + 0.6 * kinds[:, None, None], 0.85, 0.25))
    pairs = _t(rng.normal(3.0 * rng.integers(0, 2, 40) + 6.5 * rng.integers(0, 2, 40), 0.8))
    zeros = counts * _t(rng.random(50) < 0.6)
    tosses = _t(np.concatenate([rng.binomial(10, 0.3, 15), rng.binomial(10, 0.7, 15)]))
    shares = _t(np.concatenate([rng.multinomial(12, p, 15) for p in ((0.6, 0.3, 0.1), (0.1, 0.4, 0.5))]))
    waits = _t(np.concatenate([rng.exponential((1.0, 3.0), (20, 2)), rng.exponential((4.0, 1.0), (20, 2))]))
    trials = _t(np.concatenate([rng.geometric(0.7, 25), rng.geometric(0.15, 25)]) - 1)
    gammas = _t(np.concatenate([rng.gamma(2.0, 0.4, 25), rng.gamma(2.0, 3.0, 25)]))
    betas = _t(np.concatenate([rng.beta(2.0, 6.0, 25), rng.beta(7.0, 2.0, 25)]))
    noisy = torch.cat([line[:30], 3.0 * line[30:] - 6.0])
    cells, cell_counts = torch.arange(4), _t([125, 18, 20, 34])
    people = _t([186, 38, 13, 284])
    patterns = _t([[i >> 3 & 1, i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(16)])
    pattern_counts = _t([42, 23, 6, 25, 6, 24, 7, 38, 1, 4, 1, 6, 2, 9, 2, 20])
    items = _t([[0.3, 0.25, 0.35, 0.3, 0.2], [0.6, 0.75, 0.7, 0.65, 0.8]])
    means3 = _t([[-1.0, 0.5], [1.0, 0.5], [0.2, -3.0]])
    eye3 = torch.eye(2).repeat(3, 1, 1)
    c, z, time = classics, zoo, zoo_time
    ends = torch.arange(5).unsqueeze(-1) < torch.tensor([5, 4, 5, 1, 2, 5, 3, 5])
    cube = _t([[[0.7, 0.3], [0.4, 0.6]], [[0.5, 0.5], [0.2, 0.8]]])
    return [
        Problem(
            "gmm_full",
            c.gaussian_mixture,
            (three, 3),
            {"pi": _t([0.3, 0.4, 0.3]), "mu": means3, "S": eye3},
            "rows",
        ),
        Problem(
            "gmm_diagonal",
            z.gmm_diagonal,
            (plane,),
            {"w": w, "mu": means, "sd": _t([[1, 0.9], [1.1, 0.8]])},
            "rows",
        ),
        Problem("gmm_spherical", z.gmm_spherical, (plane,), {"w": w, "mu": means, "sd": _t([1.0, 1.3])}, "rows"),
        Problem("gmm_isotropic", z.gmm_isotropic, (plane,), {"w": w, "mu": means, "sd": _t(1.2)}, "rows"),
        Problem("gmm_tied", z.gmm_tied, (plane,), {"w": w, "mu": means, "S": spread[0]}, "rows"),
        Problem(
            "gmm_scale_tril",
            z.gmm_scale_tril,
            (plane,),
            {"w": w, "mu": means, "L": torch.linalg.cholesky(spread)},
            "rows",
        ),
        Problem("gmm_precision", z.gmm_precision, (plane,), {"w": w, "mu": means, "P": spread}, "rows"),
        Problem("shared_mean", z.shared_mean, (noisy,), {"w": w, "mu": _t(-1.0), "sd": _t([0.8, 3.0])}, "rows"),
        Problem("poisson_mixture", c.poisson_mixture, (counts,), {"pi": w, "lam": _t([3.0, 5.0])}, "days"),
        Problem("item_plate", z.item_plate, (answers,), {"w": w, "P": items}, "people"),
        Problem(
            "latent_class_counts",
            c.latent_class,
            (patterns,),
            {"w": w, "P": items[:, :4]},
            "patterns",
            weights=pattern_counts,
        ),
        Problem("blood_group", c.blood_group, (cells,), {"freq": _t([0.3, 0.2, 0.5])}, "people", weights=people),
        Problem("linkage", c.linkage, (cells,), {"p": _t(0.5)}, "cells", closed=False, weights=cell_counts),
        Problem("coins", c.coins, (tosses,), {"p": _t([0.4, 0.55])}, "sets"),
        Problem(
            "exponential_mixture",
            c.exponential_mixture,
            (waits,),
            {"pi": w, "rate": _t([[1.0, 0.5], [0.4, 0.9]])},
            "rows",
        ),
        Problem("geometric_mixture", z.geometric_mixture, (trials,), {"w": w, "p": _t([0.6, 0.3])}, "rows"),
        Problem(
            "lognormal_mixture",
            z.lognormal_mixture,
            (line.exp(),),
            {"w": w, "mu": _t([-1.0, 1.0]), "sd": _t([1.0, 0.8])},
            "rows",
        ),
        Problem("gamma_mixture", z.gamma_mixture, (gammas,), {"w": w, "rate": _t([2.0, 0.6])}, "rows"),
        Problem(
            "beta_mixture",
            z.beta_mixture,
            (betas,),
            {"w": w, "a": _t([2.0, 4.0]), "b": _t([4.0, 2.0])},
            "rows",
            closed=False,
        ),
        Problem("multinomial_mixture", z.multinomial_mixture, (shares,), {"w": w, "p": B}, "rows"),
        Problem(
            "zero_inflated_poisson",
            z.zero_inflated_poisson,
            (zeros,),
            {"w": _t(0.7), "rate": _t(3.0)},
            "rows",
        ),
        Problem(
            "one_hot_mixture",
            z.one_hot_mixture,
            (line,),
            {"w": w, "mu": _t([-1.0, 1.0]), "sd": _t(1.0)},
            "rows",
        ),
        Problem(
            "factorial",
            s.factorial,
            (pairs,),
            {"u": w, "v": _t([0.7, 0.3]), "mu": _t([[0.0, 5.0], [3.0, 10.0]]), "sd": _t(1.2)},
            "rows",
        ),
        Problem(
            "additive",
            s.additive,
            (pairs,),
            {"u": w, "v": _t([0.7, 0.3]), "base": _t(0.2), "effect": _t([2.0, 5.0]), "sd": _t(1.2)},
            "rows",
        ),
        Problem(
            "global_and_local",
            s.global_and_local,
            (line,),
            {"p": _t(0.4), "w": _t([[0.7, 0.3], [0.4, 0.6]]), "mu": _t([-1.0, 1.0])},
            "rows",
            attained=False,  # one draw of the global latent: its probability goes to 0 or 1
        ),
        Problem(
            "nested_classes",
            s.nested_classes,
            (passed,),
            {"kind_prob": w, "type_prob": A, "pass_prob": items[:, :4]},
            "schools",
        ),
        Problem("dawid_skene", s.dawid_skene, (ratings, rated), {"w": w, "confusion": confusion}, "patients"),
        Problem("categorical_hmm", s.categorical_hmm, (words,), {"pi": pi, "A": A, "B": B}, "sequences"),
        Problem(
            "gaussian_hmm",
            s.gaussian_hmm,
            (series,),
            {"pi": pi, "A": A, "mu": _t([0.5, 2.0]), "sd": _t([1.2, 0.9])},
            "sequences",
        ),
        Problem(
            "ragged_hmm",
            s.ragged_hmm,
            (series, torch.tensor([5, 4, 5, 1, 2, 5, 3, 5])),
            {"pi": pi, "A": A, "mu": _t([0.5, 2.0])},
            "sequences",
            completes=ENDS,
        ),
        Problem(
            "timed_ragged",
            time.ragged,
            (series.mT, ends),
            {"pi": pi, "A": A, "mu": _t([0.5, 2.0]), "sd": _t([1.2, 0.9])},
            "sequences",
            completes=ENDS,
            rounds=SHORT,
        ),
        Problem(
            "timed_factorial",
            time.factorial,
            (series[:, :3].mT + _t([[0.0], [6.0], [6.0]]),),
            {"A": A, "B": _t([[0.6, 0.4], [0.2, 0.8]]), "mu": _t([[0.0, 6.0], [3.0, 9.0]])},
            "sequences",
            rounds=SHORT,
        ),
        Problem(
            "timed_mixture",
            time.mixture,
            (series[:, :3].mT,),
            {"A": A, "share": B[:, :2] / B[:, :2].sum(1, keepdim=True), "mu": _t([[-1.0, 1.0], [2.0, 4.0]])},
            "sequences",
            rounds=SHORT,
        ),
        Problem(
            "timed_second_order",
            time.second_order,
            (words[:, :4].mT,),
            {"pi": pi, "A": A, "C": cube, "B": B},
            "sequences",
            rounds=SHORT,
        ),
        Problem(
            "timed_autoregression",
            time.autoregression,
            (series[:, :4].mT,),
            {"A": A, "a": _t([0.5, 2.0]), "phi": _t([0.2, -0.1]), "sd": _t(1.2)},
            "sequences",
            rounds=SHORT,
        ),
        Problem(
            "timed_switching",
            time.switching,
            (series[:, :4].mT, _t([[0.0], [1.0], [-1.0], [0.5]])),
            {"stay": _t([-1.0, 1.0]), "mu": _t([0.5, 2.0])},
            "sequences",
            closed=False,
        ),
        Problem(
            "timed_kinds_map",
            time.kinds_of_chains,
            (series[:, :3].mT,),
            {"w": w, "mu": _t([0.5, 2.0])},
            "sequences",
            priors=True,
            rounds=SHORT,
        ),
        Problem(
            "transformed",
            s.transformed,
            (line,),
            {"w": w, "a": _t([-0.3, 0.3]), "b": _t([0.5, 0.7])},
            "rows",
            closed=False,
        ),
        Problem(
            "module_mixture",
            s.ModuleMixture(),
            (line,),
            {"w": w, "mu": _t([-1.0, 1.0]), "sd": _t([1.0, 1.2])},
            "rows",
        ),
        Problem("coins_map", c.coins_map, (tosses,), {"p": _t([0.4, 0.55])}, "sets", priors=True),
        Problem(
            "gmm_map",
            s.gmm_map,
            (line,),
            {"w": w, "mu": _t([-1.0, 1.0]), "var": _t([1.0, 1.5])},
            "rows",
            priors=True,
        ),
        Problem("poisson_map", s.poisson_map, (counts,), {"w": w, "rate": _t([3.0, 5.0])}, "rows", priors=True),
        Problem("latent_class_map", c.latent_class_map, (answers,), {"w": w, "P": items}, "patterns", priors=True),
        Problem("hmm_map", s.hmm_map, (words,), {"pi": pi, "A": A, "B": B}, "sequences", priors=True),
        Problem(
            "heavy_prior_map",
            s.heavy_prior_map,
            (line,),
            {"w": w, "mu": _t([-1.0, 1.0])},
            "rows",
            priors=True,
        ),
    ]


default_dtype = torch.get_default_dtype()
torch.set_default_dtype(torch.float64)  # the table is built on import, before any fixture runs
try:
    PROBLEMS = [
        *_build(),
        *problems_data.build(Problem),
        *zoo_regression.problems(Problem, _t),
        *zoo_circular.problems(Problem, _t),
        *zoo_long.problems(Problem),
        *mixed_chains.problems(Problem),
    ]
finally:
    torch.set_default_dtype(default_dtype)
BY_NAME = {problem.name: problem for problem in PROBLEMS}
