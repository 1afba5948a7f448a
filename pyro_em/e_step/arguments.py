"""Raw arguments of all sites as functions of the parameters, by which a compiled engine need not run the model.

    μ[z], σ               entries of a parameter           model/use.py
    logit⁻¹(x·β)          predictors behind links          model/predictor.py
    diag(τ) L             functions of several parameters  model/composed.py, those that the M-step has recorded

Not handled: arguments that move with continuous latents, which the engines of these read off themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from torch import Tensor

from pyro_em.e_step.base import NotCompiled
from pyro_em.model.composed import Composed, Place
from pyro_em.model.trace import Run
from pyro_em.model.use import VALUE, Use
from pyro_em.problem import Problem
from pyro_em.statistics import SiteMoments
from pyro_em.sufficient import Sufficient, raw_arguments
from pyro_em.types import Params

Functions = Mapping[Place, Composed]


def opaque(problem: Problem, located: Collection[str] = ()) -> dict[Place, str]:
    """Arguments that no rule recognises, each with a parameter that enters it.

    :param located: sites whose location the engine reads off itself; their other arguments are entries of parameters.
    """
    found: dict[Place, str] = {}
    for name, uses in problem.uses.items():
        for use in uses:
            known = use.slot == "loc" or use.index is not None if use.site in located else use.known
            if use.slot != VALUE and not known:
                found[use.site, use.slot] = name
    return found


def check_served(places: Mapping[Place, str], functions: Functions) -> None:
    """:raises NotCompiled: if one of these arguments has no function."""
    for (site, slot), parameter in places.items():
        if (site, slot) not in functions:
            raise NotCompiled(f"'{parameter}' enters '{site}.{slot}' in a way that is not recognised")


class ArgumentsAt:
    """Called with parameters; the statistics that it gives have no moments yet."""

    def __init__(
        self, problem: Problem, run: Run, functions: Functions, skips: Callable[[Use], bool] = lambda use: False
    ) -> None:
        """`skips` says which uses the engine reads off itself."""
        self.problem, self.run, self.functions = problem, run, functions
        self.start = raw_arguments(run.sites)
        self._uses = {n: tuple(use for use in uses if not skips(use)) for n, uses in problem.uses.items()}
        own = (use for uses in self._uses.values() for use in uses)
        self._predictors = {(use.site, use.slot): use.predictor for use in own if use.predictor is not None}

    @property
    def predicted(self) -> set[str]:
        """Sites of which an argument is a predictor behind a link."""
        return {site for site, _ in self._predictors}

    def __call__(self, params: Params) -> Sufficient:
        arguments = {site: dict(own) for site, own in self.start.items()}
        sufficient = Sufficient(self.problem, self.run.sites, arguments, never)
        for name, theta in params.items():
            sufficient.put(theta, self._uses[name])
        if self._predictors or self.functions:
            double = {name: theta.detach().double() for name, theta in params.items()}
            for (site, slot), predictor in self._predictors.items():
                arguments[site][slot] = predictor.argument(double)
            for (site, slot), function in self.functions.items():
                arguments[site][slot] = function(double).detach()
        return sufficient


def never(name: str, arguments: dict[str, Tensor]) -> SiteMoments:
    """In place of moments before the E-step."""
    raise AssertionError(f"moments of '{name}' were asked for before the E-step")
