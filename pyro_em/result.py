"""What a fit returns.

The log-likelihood belongs to the *returned* parameters, and says whether it is exact; everything that
needs the model again (posteriors, standard errors, predictions) runs it at those parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_em.charts import free_dimension
from pyro_em.constraint_names import constraint_from_name, constraint_name
from pyro_em.device import on_own_device
from pyro_em.errors import InputError
from pyro_em.evidence.rule import Quadrature
from pyro_em.impute import Imputation, impute
from pyro_em.information import Information, observed_information, standard_errors
from pyro_em.model.plan import Plan
from pyro_em.posterior import Posterior
from pyro_em.predict import predictive
from pyro_em.problem import Problem, bind
from pyro_em.rebind import recipe_of
from pyro_em.stop import Outcome
from pyro_em.types import Params

if TYPE_CHECKING:
    from pyro_em.plots import Figure


def _named(constraint: Constraint) -> Constraint | str:
    try:
        return constraint_name(constraint)
    except InputError:
        return constraint


class _Asked:
    """An attribute that may be given as a function, which is called when somebody asks for the value."""

    def __get__(self, instance: Any, owner: Any) -> Any:
        if instance is None:
            return self
        value = instance.__dict__.get("problem")
        if callable(value):
            value = instance.__dict__["problem"] = value()
        return value

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__["problem"] = None if value is self else value


@on_own_device("params")
@dataclass
class FitResult:
    """Parameters, how good they are, how they were found, and what they say about the latents.

    `params` maps site names to constrained values (under "svi" the guide's parameters follow the model's).
    `log_likelihood` is the exact log p(x|params), None where it is not tractable; `elbo` equals it for exact
    algorithms, is log p(x,z|params) at the most probable z under "cem", and the lower bound under "svi": Pyro's
    ELBO less log p(params) of point-estimated sites, averaged over draws of the guide. So
    `gap = log_likelihood - elbo` is KL[q||posterior of the latents] where both are known, whatever the priors.
    `log_posterior` adds log p(params) in constrained space (no Jacobian), None without priors. `history` is a dict of
    equally long lists, one entry per E-step (under "svi" one per step and a last one for the returned parameters,
    under "sem" a last one for the average); its "objective" counts priors where the algorithm does, and is what the
    algorithm climbs. `restarts` lists (objective, outcome) of every start, in order.
    `missing` and `rules` (quadrature, by site) are options of the fit. `integration_error` is the error of the
    log-likelihood that quadrature leaves, by doubling its nodes; 0 where all is integrated exactly.

    Example, with the model of `fit`::

        >>> result = pyro_em.fit(model, x)
        >>> result.converged, result.num_parameters, round(result.bic, 4)
        (True, 5, 15.315)
        >>> result.standard_errors()["loc"]
        tensor([0.1186, 0.1186])
    """

    algorithm: str
    params: Params
    log_likelihood: float | None
    log_posterior: float | None
    elbo: float
    exact: bool
    outcome: Outcome
    num_iterations: int
    history: dict[str, list[float]]
    plan: Plan
    warnings: tuple[str, ...] = ()
    restarts: tuple[tuple[float, str], ...] = ()
    seed: int | None = None
    missing: str | None = None
    rules: dict[str, Quadrature] = field(default_factory=dict)
    num_observations: float = 0
    num_parameters: int = 0
    integration_error: float = 0.0
    problem: Any = field(default=_Asked(), repr=False)  # Problem | None
    free: tuple[str, ...] = field(default=(), repr=False)
    constraints: dict[str, Constraint] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if float(self.num_observations).is_integer():  # always, unless rows have fractional weights
            self.num_observations = int(self.num_observations)
        if not self.constraints and self.problem is not None:
            self.constraints = {name: record.constraint for name, record in self.problem.parameters.items()}

    def __getstate__(self) -> dict[str, Any]:
        """The problem as what it was bound from, constraints (which torch compares by identity) by their names."""
        problem = self.__dict__["problem"]
        named = {name: _named(constraint) for name, constraint in self.constraints.items()}
        return {**self.__dict__, "problem": recipe_of(problem) if isinstance(problem, Problem) else problem,
                "constraints": named}  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        found = {n: constraint_from_name(c) if isinstance(c, str) else c for n, c in state["constraints"].items()}
        self.__dict__.update(state, constraints=found)

    @property
    def converged(self) -> bool:
        """True only if the score fell below `tol`."""
        return self.outcome is Outcome.converged

    @property
    def gap(self) -> float | None:
        """log p(x|params) - ELBO, 0 for exact algorithms."""
        return None if self.log_likelihood is None else self.log_likelihood - self.elbo

    def _bound(self, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Problem:
        if self.problem is None:
            raise InputError(
                "This result was loaded from a file, which holds no model. Give it one: "
                "pyro_em.load(path, model=model, args=(data,))."
            )
        if not args and not kwargs:
            return self.problem
        roles = {n: r.role for n, r in self.problem.roles.items() if r.role != "data"}
        known = set(self.problem.capture.sites)
        return bind(
            self.problem.model,
            args,
            {**self.problem.kwargs, **(kwargs or {})},
            with_prior=self.problem.with_prior,
            roles={n: role for n, role in roles.items() if n in known and n in self.problem.parameters},
            params=self.params,
            rules=self.rules,
        )

    def posterior(self, *args: Any, **kwargs: Any) -> Posterior:
        """Exact posterior of the latents at `params`, for new data or (without arguments) the fitted ones."""
        return Posterior(self._bound(args, kwargs), self.params)

    def log_prob(self, *args: Any, **kwargs: Any) -> Tensor:
        """Pointwise marginal log-likelihood, shape of the data plate: (N,).

        Its sum is `log_likelihood` (without weights). Without arguments: of the fitted data.
        """
        return self.posterior(*args, **kwargs).pointwise()

    def predictive(self, *args: Any, num_samples: int = 100, seed: int | None = 0, **kwargs: Any) -> Params:
        """Draws of every data and latent site from the model at `params`, shape (num_samples,) + site."""
        problem = self._bound(args, kwargs)
        return predictive(problem, self.params, num_samples, seed)

    def impute(self, *args: Any, **kwargs: Any) -> dict[str, Imputation]:
        """Posterior of missing values at `params`, by site: `.mean`, `.variance`, `.sd`, `.sample(num)`.

        Cells count as missing where a site is masked (NaN under missing="nan", `obs_mask`, `poutine.mask`). For
        new data, or (without arguments) the fitted ones; sites without missing cells are left out.

        Example::

            filled = result.impute()["x"]
            filled.mean[filled.missing], filled.sd[filled.missing]
        """
        return impute(self._bound(args, kwargs), self.params)

    def information(self) -> Information:
        """Observed information of the exact log-evidence (of the log posterior under map-em)."""
        if not self.exact:
            raise InputError(
                f"Parameters found by algorithm='{self.algorithm}' are not a maximum of an exact log-likelihood, so "
                "they have no observed information. Refit with 'em' or 'map-em' from these parameters "
                "(init=result.params)."
            )
        return observed_information(self._bound(), self.params, self.free)

    def standard_errors(self) -> Params:
        """Standard errors like `params`, on the constrained scale (delta method)."""
        return standard_errors(self.information(), self.params)

    def covariance(self) -> Tensor:
        """Covariance of all free parameters' entries, flattened in the order of `params` (delta method)."""
        information = self.information()
        jacobian = torch.cat([information.jacobian[n] for n in self.params if n in information.jacobian])
        return jacobian @ information.covariance @ jacobian.mT

    @property
    def aic(self) -> float:
        """-2 log p + 2·num_parameters (smaller is better)."""
        return -2.0 * self._likelihood() + 2.0 * self.num_parameters

    @property
    def bic(self) -> float:
        """-2 log p + num_parameters·log n (smaller is better); n counts every step of a series (model/counting.py)."""
        return -2.0 * self._likelihood() + self.num_parameters * math.log(self.num_observations)

    @property
    def icl(self) -> float:
        """BIC + 2·entropy of the latents' posterior (Biernacki, Celeux, Govaert 2000)."""
        return self.bic + 2.0 * self.posterior().entropy()

    def _likelihood(self) -> float:
        if self.log_likelihood is None:
            raise InputError("The marginal likelihood of this model is not tractable, so it has no AIC or BIC.")
        return self.log_likelihood

    def summary(self) -> str:
        """A table of estimates with standard errors, and the figures of the fit."""
        from pyro_em.summary import summary

        return summary(self)

    def to_inference_data(self, **options: Any) -> Any:
        """The fit for ArviZ: InferenceData on ArviZ 0.x, an xarray DataTree on 1.x. See `pyro_em.arviz`."""
        from pyro_em.arviz import to_inference_data

        return to_inference_data(self, **options)

    def save(self, path: str | Path) -> None:
        """Write parameters, history and plan to one file (no pickle); see `pyro_em.checkpoint`."""
        from pyro_em.checkpoint import save

        save(self, path)

    def plot(self, **options: Any) -> Figure:
        """Objective by iteration and responsibilities, as a matplotlib figure."""
        from pyro_em.plots import plot

        return plot(self, **options)

    def __str__(self) -> str:
        return self.summary()


def count_parameters(problem: Problem, free: Sequence[str], params: Params) -> int:
    """Free parameters: simplex K-1, covariance D(D+1)/2; fixed and unused ones do not count."""
    return sum(free_dimension(problem.parameters[n].constraint, params[n]) for n in free)
