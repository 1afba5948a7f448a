"""Pyro's `DiscreteHMM` as an observed site: its hidden states become latents of a loop over time (timeline.py).

    s ~ Categorical(initial),  z_0 ~ Categorical(transition[s]),  z_t ~ Categorical(transition[z_{t-1}]),
    x_t ~ observation[z_t]

The initial distribution comes before the first transition, as Pyro has it. The site `x` is unfolded into x_start,
x_state_t and x_t while the model is looked at; the states are the sequence `x_state` of the posterior. Everywhere
else the distribution stays what it is. Transitions and observation distributions may vary with time.

Not unfolded: observation distributions whose arguments are not seen (mixtures, flows); the site then keeps its own
density, and its parameters have a numeric M-step.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
from pyro.ops.indexing import Vindex
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_em.families import family_of
from pyro_em.model import compat
from pyro_em.model.timeline import is_active, markov


class Unfold(Messenger):
    """Replace observed `DiscreteHMM` sites; must be the innermost handler of a run."""

    def _pyro_sample(self, msg: Any) -> None:
        if (
            not is_active()
            or not msg["is_observed"]
            or type(compat.base_distribution(msg["fn"])) is not dist.DiscreteHMM
        ):
            return
        if _unfolded(msg["name"], msg["fn"], msg["value"]):
            msg["done"] = msg["stop"] = True  # handlers further out see the sites of the loop instead


def _unfolded(name: str, fn: Any, value: Tensor) -> bool:
    raw = compat.raw_arguments(fn)
    if raw is None or fn is not compat.base_distribution(fn):
        return False
    emission = raw["observation_dist"]
    base, own = compat.base_distribution(emission), compat.raw_arguments(emission)
    family = family_of(type(base)) if own is not None else None
    wrapped = {type(emission), type(base)} <= {type(base), dist.Independent}
    if own is None or family is None or not wrapped:
        return False
    elements = emission.event_dim - base.event_dim
    trailing = {k: elements + family.arguments[k] for k in own if k in family.arguments}
    event = emission.event_dim
    lead = value.dim() - 1 - event
    steps = value.movedim(lead, 0)
    transition, state = raw["transition_logits"], None
    for t in markov(len(steps)):
        if state is None:
            state = pyro.sample(f"{name}_start", dist.Categorical(logits=raw["initial_logits"]))
        table = _at(transition, t, 2, lead)
        state = pyro.sample(f"{name}_state_{t}", dist.Categorical(logits=Vindex(table)[..., state, :]))
        arguments = {
            k: _of_state(_at(v, t, trailing[k] + 1, lead), state, trailing[k]) if k in trailing else v
            for k, v in own.items()
        }
        now = type(base)(**arguments)
        pyro.sample(f"{name}_{t}", now.to_event(elements) if elements else now, obs=steps[t])
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
