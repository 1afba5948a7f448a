"""SVI from one start: steps, history, the ELBO at the end, and what is put back.

A run has a param store of its own. Torch modules learn in place whatever the store, so their parameters are
put back at its end; `publish` writes the run that is kept. The choice of guide and loss is made in guides.py.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import PyroLRScheduler, PyroOptim
from torch import Tensor, nn
from torch.distributions import transform_to
from torch.distributions.constraints import Constraint

from pyro_em.errors import InputError, NonFiniteError
from pyro_em.guides import Split
from pyro_em.loop import Callback, History, Step
from pyro_em.model.trace import LOCK
from pyro_em.stop import Outcome
from pyro_em.store import interior, isolated_rng
from pyro_em.types import Params

LEARNING_RATE = 0.01
FINAL_DRAWS = 100  # evaluations of the ELBO that the reported one averages, unless it has no noise


@dataclass(frozen=True)
class Run:
    """One start, finished: `leaves` are its store's own tensors, `values` copies of their final data."""

    leaves: dict[str, Tensor]
    constraints: dict[str, Constraint]
    values: dict[str, Tensor]
    params: Params
    objective: float
    log_prior: float
    history: History
    num_iterations: int
    outcome: Outcome


@dataclass
class Ascent:
    """SVI from one start, in a param store of its own."""

    split: Split
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    start: Params
    optim: PyroOptim
    num_particles: int

    def run(self, max_iter: int, callbacks: tuple[Callback, ...], tick: tuple[Callback, ...]) -> Run:
        began, history, outcome, done = time.perf_counter(), History(), Outcome.steps_done, 0
        store = pyro.get_param_store()
        with store.scope(), poutine.block(), pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Encountered NaN")  # raised below, with the step
            self.model, self.guide = self.split.make(self.start)
            svi = SVI(self.model, self.guide, self.optim, self.split.loss(self.num_particles))
            svi.evaluate_loss(*self.args, **self.kwargs)  # registers every parameter
            kept = self._begin()
            try:
                for done in range(1, max_iter + 1):
                    objective = self._finite(-svi.step(*self.args, **self.kwargs), f"at step {done}")
                    if isinstance(self.optim, PyroLRScheduler):
                        self.optim.step()
                    _record(history, objective, began)
                    params = self._current() if callbacks else {}
                    step = Step(done, params, objective, math.nan, math.nan)
                    if any([callback(step) for callback in (*tick, *callbacks)]):  # noqa: C419  (call them all)
                        outcome = Outcome.interrupted
                        break
                objective, log_prior = self._evaluate(svi, done)
                _record(history, objective, began)
                history.log_prior[-1] = log_prior
                state = store.get_state()
                leaves = dict(state["params"])
                values = {name: leaf.detach().clone() for name, leaf in leaves.items()}
                params = self._current()
            finally:
                for parameter, data in kept.items():
                    parameter.data.copy_(data)
        constraints = state["constraints"]
        return Run(leaves, constraints, values, params, objective, log_prior, history, done, outcome)

    def _begin(self) -> dict[nn.Parameter, Tensor]:
        """Put the starting values into the store; return what the modules' own parameters held."""
        store = pyro.get_param_store()
        state = store.get_state()
        kept: dict[nn.Parameter, Tensor] = {}
        for name, leaf in state["params"].items():
            if isinstance(leaf, nn.Parameter):
                kept[leaf] = leaf.detach().clone()
            else:
                # Pyro stores an unconstrained initial value as the user's own tensor; do not train on that.
                leaf = state["params"][name] = leaf.detach().clone().requires_grad_(True)
            if name in self.start:
                constraint = state["constraints"][name]
                leaf.data.copy_(transform_to(constraint).inv(interior(constraint, self.start[name])))
        store.set_state(state)
        return kept

    def _evaluate(self, svi: SVI, step: int) -> tuple[float, float]:
        """The ELBO to be reported, with log p(θ̂), and log p(θ̂) alone."""
        draws = [self._draw(svi) for _ in range(2)]
        if draws[0] == draws[1]:
            draws = draws[:1]
        else:
            draws += [self._draw(svi) for _ in range(FINAL_DRAWS - 2)]
        objective, log_prior = np.mean(draws, axis=0).tolist()
        return self._finite(objective, f"after step {step}"), log_prior

    def _draw(self, svi: SVI) -> tuple[float, float]:
        objective = -svi.evaluate_loss(*self.args, **self.kwargs)
        if not self.split.points:
            return objective, 0.0
        with torch.no_grad():
            guide = poutine.trace(self.guide).get_trace(*self.args, **self.kwargs)
            replayed = poutine.replay(self.split.model, trace=guide)
            trace = poutine.trace(replayed).get_trace(*self.args, **self.kwargs)
            trace.compute_log_prob(site_filter=lambda name, site: name in self.split.points)
        return objective, sum(float(trace.nodes[name]["log_prob_sum"]) for name in self.split.points)

    def _current(self) -> Params:
        """Constrained values: of the model in program order, then of the guide."""
        store = pyro.get_param_store()
        with torch.no_grad(), isolated_rng(0):  # to look must not change what is drawn next
            trace = poutine.trace(self.guide).get_trace(*self.args, **self.kwargs)
            values: dict[str, Any] = {n: store[n] for n in self.split.capture.parameters if n in store}
            values |= {name: trace.nodes[name]["value"] for name in self.split.points}
            values |= {n: store[n] for n in store if n not in values and not self.split.is_alias(n)}
        return {name: value.detach().clone() for name, value in values.items()}

    def _finite(self, objective: float, when: str) -> float:
        if math.isfinite(objective):
            return objective
        names = [name for name, value in pyro.get_param_store().items() if not bool(value.isfinite().all())]
        which = f"Not finite by now: {', '.join(map(repr, names))}. " if names else ""
        raise NonFiniteError(
            names[0] if names else "",
            f"The ELBO is {objective} {when} of SVI. {which}Lower the learning rate (optim=), start nearer "
            "to the data (init=), or check that the guide's draws stay where the model has density.",
        )


def _record(history: History, objective: float, began: float) -> None:
    history.objective.append(objective)
    for unknown in (history.log_likelihood, history.log_prior, history.score):
        unknown.append(math.nan)
    history.num_e_steps.append(len(history.objective))
    history.seconds.append(time.perf_counter() - began)


def publish(run: Run) -> None:
    """Write a run into the caller's param store and into the modules.

    Entries of the caller are overwritten in place, so that optimisers holding them see it. A module's own
    parameter becomes the entry: `PyroModule` follows the store, and another tensor there would replace it.
    """
    with LOCK:  # while a fit of another thread runs its model, the store is that model's
        store = pyro.get_param_store()
        state = store.get_state()
        for name, leaf in run.leaves.items():
            leaf.data.copy_(run.values[name])
            old = state["params"].get(name)
            alike = old is not None and old.shape == leaf.shape and old.dtype == leaf.dtype
            if old is not None and alike and not isinstance(leaf, nn.Parameter):
                old.data.copy_(leaf.data)
            else:
                state["params"][name] = leaf
            state["constraints"][name] = run.constraints[name]
        store.set_state(state)


def optimiser(optim: Any) -> Callable[[], PyroOptim]:
    """What makes a fresh Pyro optimiser for each start.

    :raises InputError: for anything but None, a Pyro optimiser, a torch optimiser class or a function from
        parameters to a torch optimiser.
    """
    if optim is None:
        optim = torch.optim.Adam
    if isinstance(optim, PyroOptim):
        return lambda: copy.deepcopy(optim)
    if isinstance(optim, type) and issubclass(optim, torch.optim.Optimizer):
        return lambda: PyroOptim(optim, {"lr": LEARNING_RATE})
    if callable(optim) and not isinstance(optim, torch.optim.Optimizer):
        return lambda: PyroOptim(optim, {})
    raise InputError(
        f"optim: {type(optim).__name__} is bound to parameters of its own or is no optimiser. Give a Pyro "
        'one (pyro.optim.Adam({"lr": 0.01})), a torch class (torch.optim.Adam) or a function from parameters.'
    )
