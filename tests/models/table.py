"""The table of all models of the models folder, each with its data."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

FOLDER = Path(__file__).parents[2] / "models"
FILES = sorted(path.stem for path in FOLDER.glob("*.py"))


def module(file: str) -> ModuleType:
    return importlib.import_module(f"models.{file}")


def arguments(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def simulated(file: str, **options: Any) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: arguments(module(file).simulate(**options))


def loaded(file: str, loader: str = "load", **options: Any) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: arguments(getattr(module(file), loader)(**options))


def simulated_covariates(num_steps: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: arguments(module("switching").simulate_covariates(num_steps))


def no_guide(*args: Any) -> None:
    """All latents are enumerated."""


def column(data: Callable[[], tuple[Tensor, ...]], index: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (data()[0][:, index],)


def categories(data: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """Without the counts, which are the weights of a fit and no argument of the model."""
    return lambda: data()[:1]


def complete_rows(data: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """Rows without a missing cell: plain Pyro has no density for the others."""
    return lambda: tuple(table[~table.isnan().any(-1)] for table in data())


def with_factors(data: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """Which of two factors each measurement loads on."""
    return lambda: (data()[0], torch.arange(data()[0].shape[-1]) % 2)


# (file, model function, data): each function on simulated data, and on its real data where it has any.
TABLE: list[tuple[str, str, Callable[[], tuple[Tensor, ...]]]] = [
    *(
        ("gmm", structure, data)
        for structure in (
            "model",
            "scale_tril",
            "tied",
            "diagonal",
            "shared_diagonal",
            "spherical",
            "shared_spherical",
            "bayesian",
        )
        for data in (simulated("gmm"), loaded("gmm"), loaded("gmm", "load_iris"))
    ),
    ("gmm", "univariate", column(simulated("gmm"), 0)),
    ("gmm", "univariate", column(loaded("gmm"), 1)),
    ("poisson_mixture", "model", simulated("poisson_mixture")),
    ("poisson_mixture", "model", loaded("poisson_mixture")),
    ("poisson_mixture", "model", categories(loaded("poisson_mixture", "load_unique"))),
    ("lca", "model", simulated("lca")),
    ("lca", "model", loaded("lca")),
    ("lca", "bayesian", simulated("lca")),
    ("lca", "bayesian", loaded("lca", "load_alzheimer")),
    ("bernoulli_mixture", "model", simulated("bernoulli_mixture")),
    ("bernoulli_mixture", "model", loaded("bernoulli_mixture")),
    ("hmm", "gaussian", simulated("hmm", num_steps=12)),
    ("hmm", "gaussian", simulated("hmm", num_steps=12, num_sequences=3)),
    ("hmm", "categorical", simulated("hmm", num_steps=12, num_sequences=3, emission="categorical")),
    ("hmm", "poisson", simulated("hmm", num_steps=12, emission="poisson")),
    ("hmm", "poisson", loaded("hmm")),
    ("switching", "autoregression", simulated("switching", num_steps=12)),
    ("switching", "covariates", simulated_covariates(12)),
    ("factorial_hmm", "model", simulated("factorial_hmm", num_steps=8)),
    ("factorial_hmm", "model", simulated("factorial_hmm", num_steps=8, num_series=3)),
    ("hsmm", "model", simulated("hsmm", num_steps=10)),
    ("movement", "model", simulated("movement", num_steps=10)),
    ("dawid_skene", "model", simulated("dawid_skene")),
    ("dawid_skene", "model", loaded("dawid_skene")),
    ("dawid_skene", "rows", lambda: arguments(module("dawid_skene").simulate_rows())),
    ("dawid_skene", "rows", loaded("dawid_skene", "load_rows")),
    ("genetics", "abo", categories(simulated("genetics"))),
    ("genetics", "abo", categories(loaded("genetics"))),
    ("genetics", "linkage", categories(simulated("genetics", problem="linkage"))),
    ("genetics", "linkage", categories(loaded("genetics", problem="linkage"))),
    ("zip", "model", simulated("zip")),
    ("zip", "model", loaded("zip")),
    ("zip", "regression", loaded("zip", "load_regression")),
    ("hurdle", "model", simulated("hurdle")),
    ("hurdle", "model", loaded("hurdle")),
    ("regression_mixture", "linear", simulated("regression_mixture")),
    ("regression_mixture", "linear", loaded("regression_mixture")),
    ("regression_mixture", "experts", loaded("regression_mixture")),
    ("regression_mixture", "poisson", simulated("regression_mixture", family="poisson")),
    ("regression_mixture", "parallel", loaded("regression_mixture", "load_fabric")),
    ("regression_mixture", "logistic", simulated("regression_mixture", family="logistic")),
    ("regression_mixture", "concomitant", loaded("regression_mixture", "load_patents")),
    ("latent_class_regression", "model", simulated("latent_class_regression")),
    ("latent_class_regression", "model", loaded("latent_class_regression")),
    ("negative_binomial", "model", categories(loaded("negative_binomial"))),
    ("negative_binomial", "model", categories(simulated("negative_binomial"))),
    ("negative_binomial", "regression", simulated("negative_binomial")),
    ("semi_supervised", "model", simulated("semi_supervised")),
    ("semi_supervised", "model", loaded("semi_supervised")),
    ("semi_supervised", "masked", loaded("semi_supervised")),
    ("semi_supervised", "restricted", loaded("semi_supervised", "load_restricted")),
    ("censored", "regression", simulated("censored")),
    ("censored", "regression", loaded("censored")),
    ("censored", "regression", loaded("censored", "load_tobin")),
    ("censored", "mixture", lambda: arguments(module("censored").simulate_mixture())),
    ("robust_mixture", "model", simulated("robust_mixture")),
    ("mvn_missing", "model", complete_rows(simulated("mvn_missing"))),
    ("mvn_missing", "model", loaded("mvn_missing", "load_complete")),
    ("state_space", "local_level", simulated("state_space")),
    ("state_space", "local_level", loaded("state_space")),
    ("state_space", "structural", simulated("state_space")),
    ("state_space", "dynamic_factor", simulated("state_space", num_observed=3)),
    ("state_space", "lds", simulated("state_space", num_observed=3)),
    ("state_space", "lds", simulated("state_space", num_observed=3, num_series=4, num_steps=20)),
    ("time_loops", "local_level", loaded("time_loops")),
    ("time_loops", "local_level", simulated("time_loops")),
    ("time_loops", "trend_and_seasonal", simulated("time_loops")),
    ("time_loops", "diffuse_trend", simulated("time_loops")),
    ("time_loops", "dynamic_factor", simulated("time_loops", num_observed=3)),
    ("time_loops", "lds", simulated("time_loops", num_observed=3)),
    ("time_loops", "autoregression", lambda: arguments(module("time_loops").simulate_gaps())),
    ("growth_curves", "drifting", simulated("growth_curves")),
    ("growth_curves", "reverting", lambda: arguments(module("growth_curves").simulate_reverting())),
    ("growth_curves", "experts", lambda: arguments(module("growth_curves").simulate_with_covariates())),
    *(("irt", function, simulated("irt")) for function in ("model", "common_slope", "rasch")),
    ("irt", "mixture", lambda: arguments(module("irt").simulate_mixture())),
    *(("irt", function, categories(loaded("irt"))) for function in ("model", "common_slope", "rasch")),
    ("glmm", "model", loaded("glmm")),
    ("glmm", "grouped", simulated("glmm")),
    ("ordinal", "regression", lambda: arguments(module("ordinal").simulate_regression())),
    ("ordinal", "regression", lambda: module("ordinal").load()[:2]),
    ("ordinal", "mixed", loaded("ordinal", "load_wine")),
    ("ordinal", "graded", simulated("ordinal")),
    ("factor_analysis", "model", simulated("factor_analysis")),
    ("factor_analysis", "model", loaded("factor_analysis")),
    ("factor_analysis", "ppca", loaded("factor_analysis")),
    ("factor_analysis", "low_rank", loaded("factor_analysis")),
    ("factor_analysis", "confirmatory", with_factors(simulated("factor_analysis"))),
    ("factor_analysis", "mixture", loaded("factor_analysis")),
    ("linear_mixed", "model", simulated("linear_mixed")),
    ("linear_mixed", "model", loaded("linear_mixed")),
    ("linear_mixed", "slopes", lambda: arguments(module("linear_mixed").simulate_slopes())),
    ("linear_mixed", "slopes", loaded("linear_mixed", "load_sleepstudy")),
    ("linear_mixed", "crossed", lambda: arguments(module("linear_mixed").simulate_crossed())),
    ("linear_mixed", "crossed", loaded("linear_mixed", "load_penicillin")),
    ("linear_mixed", "crossed_slopes", lambda: arguments(module("linear_mixed").simulate_crossed_slopes())),
    ("linear_mixed", "crossed_slopes", loaded("linear_mixed", "load_politeness")),
    ("linear_mixed", "nested", lambda: arguments(module("linear_mixed").simulate_nested())),
    ("linear_mixed", "nested", loaded("linear_mixed", "load_pastes")),
    ("eight_schools", "model", simulated("eight_schools")),
    ("eight_schools", "model", loaded("eight_schools")),
    ("eight_schools", "bayesian", loaded("eight_schools")),
    ("student_t", "model", simulated("student_t")),
    ("student_t", "model", loaded("student_t")),
    ("student_t", "estimated", simulated("student_t")),
    ("overdispersed", "gamma_poisson", simulated("overdispersed")),
    ("overdispersed", "gamma_poisson", loaded("overdispersed")),
    ("overdispersed", "beta_binomial", lambda: arguments(module("overdispersed").simulate_trials())),
    ("overdispersed", "beta_binomial", categories(loaded("overdispersed", "load_families"))),
    ("overdispersed", "categories", lambda: arguments(module("overdispersed").simulate_categories())),
    ("overdispersed", "categories", loaded("overdispersed", "load_satisfaction")),
    ("overdispersed", "dirichlet_multinomial", lambda: arguments(module("overdispersed").simulate_categories())),
    ("vae", "model", simulated("vae")),
    ("vae", "model", loaded("vae")),
]
CONTINUOUS = (  # files whose latents are not all enumerated
    "irt",
    "glmm",
    "ordinal",
    "time_loops",
    "growth_curves",
    "factor_analysis",
    "linear_mixed",
    "eight_schools",
    "student_t",
    "overdispersed",
)
BY_INDEX = {("dawid_skene", "rows")}  # latents that rows read by an index, which Pyro's own enumeration does not allow
each_case = pytest.mark.parametrize(
    ("file", "function", "data"),
    TABLE,
    ids=[f"{i}-{file}-{function}" for i, (file, function, _) in enumerate(TABLE)],
)
each_file = pytest.mark.parametrize("file", FILES)
