"""Observed sites whose distribution hides latents: these become sites of their own.

`DiscreteHMM`: its hidden states become latents of a loop over time (timeline.py),

    s ~ Categorical(initial),  z_0 ~ Categorical(transition[s]),  z_t ~ Categorical(transition[z_{t-1}]),
    x_t ~ observation[z_t]

The initial distribution comes before the first transition, as Pyro has it. The site `x` is unfolded into x_start,
x_state_t and x_t while the model is looked at; the states are the sequence `x_state` of the posterior. Everywhere
else the distribution stays what it is. Transitions and observation distributions may vary with time.

`MixtureSameFamily` and `ZeroInflatedPoisson`: the component that a row comes from, and whether its zero could be
nothing else, become the latents `x_component` and `x_zero` of the site x,

    x_component ~ mixture_distribution,  x ~ component_distribution[x_component]
    x_zero ~ Bernoulli(gate),            x ~ Poisson(0 if x_zero else rate)

`LowRankMultivariateNormal`: factor analysis with the factors integrated, which are the latent `x_factor`,

    x_factor ~ N(0, I),  x ~ N(loc + W x_factor, diagonal)

so that the M-step is closed, and the density that of residuals, exact for any small diagonal (torch's own subtracts two
quadratic forms that are alike then). In a loop over time the factors would be a set of latents at every step: there the
site keeps its density.

Beside a latent that quadrature integrates, of which every element is read by several rows, a row's component would be a
latent inside of the integral. There the site stays whole (whole.py), and its density sums over the components.

Not unfolded: distributions inside whose arguments are not seen (mixtures of mixtures, flows), and those in a wrapper
(`.to_event`, `.mask`); the site then keeps its own density, and its parameters have a numeric M-step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_em.distributions import IncompleteLowRankNormal
from pyro_em.errors import InputError
from pyro_em.families import family_of
from pyro_em.model import compat
from pyro_em.model.equivalents import plain_form
from pyro_em.model.timeline import is_active, markov, open_loop

WHOLE = "_pyro_em_whole"  # in `infer` of a site that is not to be unfolded


class Unfold(Messenger):
    """Replace observed sites of these distributions; must be the innermost handler of a run."""

    def _pyro_sample(self, msg: Any) -> None:
        in_loop = open_loop() is not None or compat.markov_depth(msg) is not None
        observed = msg["is_observed"] or bool(msg["infer"].get("was_observed"))  # data that are drawn anew
        msg["fn"] = plain_form(msg["fn"], observed, in_loop)
        kind = type(msg["fn"])
        unfold = UNFOLDED.get(kind) if msg["is_observed"] and WHOLE not in msg["infer"] else None
        if kind in OUTSIDE_OF_LOOPS and in_loop:
            return
        raw = None if unfold is None else compat.raw_arguments(msg["fn"])
        if unfold is None or raw is None:
            return
        remember = compat.forgotten_in_markov(msg["name"])
        # What was missing of the site (missing.py, further in) is missing of the sites that take its place.
        with contextlib.nullcontext() if msg["mask"] is None else poutine.mask(mask=msg["mask"]):
            unfolded = unfold(msg["name"], raw, msg["value"])
        if unfolded:
            msg["done"] = msg["stop"] = True  # handlers further out see the new sites instead
        else:
            remember()


@dataclass(frozen=True)
class _Inner:
    """A distribution that is an argument: its arguments, and how many dims of each belong to the event.

    `elements` are the dims that its `.to_event` declares.
    """

    kind: Any
    arguments: dict[str, Any]
    elements: int
    trailing: dict[str, int]

    def at(self, arguments: dict[str, Any]) -> Any:
        """The distribution with other arguments."""
        made = self.kind(**arguments)
        return made.to_event(self.elements) if self.elements else made


def _inner(fn: Any) -> _Inner | None:
    base, own = compat.base_distribution(fn), compat.raw_arguments(fn)
    family = family_of(type(base)) if own is not None else None
    wrapped = {type(fn), type(base)} <= {type(base), dist.Independent}
    if own is None or family is None or not wrapped:
        return None
    elements = fn.event_dim - base.event_dim
    trailing = {k: elements + family.arguments[k] for k in own if k in family.arguments}
    return _Inner(type(base), own, elements, trailing)


def _mixture(name: str, raw: compat.RawArguments, value: Tensor) -> bool:
    weights, inner = _inner(raw["mixture_distribution"]), _inner(raw["component_distribution"])
    if weights is None or inner is None or weights.kind is not dist.Categorical:
        return False
    component = pyro.sample(f"{name}_component", weights.at(weights.arguments))
    arguments = {
        k: _of_state(v, component, inner.trailing[k]) if k in inner.trailing else v for k, v in inner.arguments.items()
    }
    pyro.sample(name, inner.at(arguments), obs=value)
    return True


def _zero_inflated(name: str, raw: compat.RawArguments, value: Tensor) -> bool:
    gate = {"probs" if k == "gate" else "logits": v for k, v in raw.items() if k in ("gate", "gate_logits")}
    zero = pyro.sample(f"{name}_zero", dist.Bernoulli(**gate))
    pyro.sample(name, dist.Poisson(torch.where(zero == 1, 0.0, raw["rate"])), obs=value)
    return True


def _low_rank(name: str, raw: compat.RawArguments, value: Tensor) -> bool:
    loading, variance = raw["cov_factor"], raw["cov_diag"]
    rank = dist.Normal(loading.new_zeros(loading.shape[-1]), 1.0).to_event(1)
    as_latent: Any = {"em": "latent"}
    factor = pyro.sample(f"{name}_factor", rank, infer=as_latent)
    loc = raw["loc"] + (loading @ factor.unsqueeze(-1)).squeeze(-1)
    pyro.sample(name, dist.Normal(loc, variance.sqrt()).to_event(1), obs=value)
    return True


def _hidden_markov(name: str, raw: compat.RawArguments, value: Tensor) -> bool:
    inner = _inner(raw["observation_dist"]) if is_active() else None
    if inner is None:
        return False
    trailing = inner.trailing
    event = raw["observation_dist"].event_dim
    lead = value.dim() - 1 - event
    steps = value.movedim(lead, 0)
    transition, state = raw["transition_logits"], None
    if not len(steps):
        raise InputError(f"Site '{name}': a sequence of length 0. Give at least one step.")
    for t in markov(len(steps)):
        if state is None:
            state = pyro.sample(f"{name}_start", dist.Categorical(logits=raw["initial_logits"]))
        table = _at(transition, t, 2, lead)
        state = pyro.sample(f"{name}_state_{t}", dist.Categorical(logits=Vindex(table)[..., state, :]))
        arguments = {
            k: _of_state(_at(v, t, trailing[k] + 1, lead), state, trailing[k]) if k in trailing else v
            for k, v in inner.arguments.items()
        }
        pyro.sample(f"{name}_{t}", inner.at(arguments), obs=steps[t])
    return True


def _at(x: Any, t: Any, right: int, lead: int) -> Any:
    """`x` at step t: time is the dim left of the last `right` ones, if it is there, and left of it are plates."""
    if not isinstance(x, Tensor) or x.dim() <= right:
        return x
    axis = x.dim() - 1 - right
    if x.shape[axis] == 1:
        return x.squeeze(axis)
    x = x.movedim(axis, 0)
    return x.reshape(len(x), *(1,) * (lead - axis), *x.shape[1:])[t]


def _of_state(x: Any, state: Tensor, trailing: int) -> Any:
    """The entries of `x` for a state: states are the dim left of the last `trailing` ones, if it is there."""
    if not isinstance(x, Tensor) or x.dim() <= trailing or x.shape[x.dim() - 1 - trailing] == 1:
        return x
    return Vindex(x)[(..., state, *(slice(None),) * trailing)]


UNFOLDED: dict[Any, Callable[[str, compat.RawArguments, Tensor], bool]] = {
    dist.DiscreteHMM: _hidden_markov,
    dist.LowRankMultivariateNormal: _low_rank,
    IncompleteLowRankNormal: _low_rank,
    dist.MixtureSameFamily: _mixture,
    dist.ZeroInflatedPoisson: _zero_inflated,
}
OUTSIDE_OF_LOOPS = frozenset(
    {dist.LowRankMultivariateNormal, IncompleteLowRankNormal}
)  # those whose latents are continuous
