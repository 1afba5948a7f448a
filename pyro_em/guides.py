"""Which latents a guide holds under "svi", which are summed out, and the guide and loss that follow.

    discrete, enumerable, not in the guide      summed out at each step
    Delta in the guide, or parameter by role    point estimate; its prior counts, as under "map-em"
    all others                                  a distribution q of the guide

Without a guide of the user: AutoDelta over the point estimates, AutoNormal over continuous latents.

The loss is Pyro's `TraceEnum_ELBO` where latents are summed out and `Trace_ELBO` where none are. One
exception: without a guide of the user and without continuous latents it is `ExactELBO`, the same number with
a gradient and structural zeros that are right where Pyro clamps them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal
from pyro.infer.autoguide.initialization import init_to_median, init_to_value

from pyro_em.elbo import ExactELBO
from pyro_em.errors import InputError, Refusal
from pyro_em.model.capture import Capture, ParameterRecord, capture
from pyro_em.model.compat import base_distribution
from pyro_em.model.roles import RoleOf, assign_roles
from pyro_em.model.timeline import Loop
from pyro_em.store import interior
from pyro_em.types import Model, Params


@dataclass(frozen=True)
class GuideSite:
    """A sample site of the user's guide: its family, and whether the guide enumerates it."""

    family: str
    enumerated: bool


@dataclass(frozen=True)
class Split:
    """The sites of a model, divided between guide and enumeration. Made by `split_sites`.

    `records` are the values that `init` may set: parameters of model and guide, and the sites of an
    automatic guide.
    """

    model: Model
    guide: Model | None
    capture: Capture
    roles: dict[str, RoleOf]
    points: tuple[str, ...]
    guided: tuple[str, ...]
    enumerated: tuple[str, ...]
    guide_sites: dict[str, GuideSite]
    records: dict[str, ParameterRecord]

    @property
    def discrete_only(self) -> bool:
        """Every latent is discrete with finitely many states, so log p(x|params) can be had exactly."""
        return all(self.capture.sites[name].enumerable for name in self.guided)

    @property
    def automatic(self) -> str:
        """The guide in words."""
        if self.guide is not None:
            return "the guide given"
        delta = f"AutoDelta over {_quoted(self.points)}" if self.points else ""
        normal = f"AutoNormal over {_quoted(self.guided)}" if self.guided else ""
        return " and ".join(part for part in (delta, normal) if part) or "empty"

    def loss(self, num_particles: int) -> ELBO:
        depth = self.capture.max_plate_nesting
        if self.guide is None and self.enumerated and not self.guided:
            return ExactELBO(num_particles, max_plate_nesting=depth)
        summed = self.enumerated or any(site.enumerated for site in self.guide_sites.values())
        kind = TraceEnum_ELBO if summed else Trace_ELBO
        return kind(num_particles, max_plate_nesting=depth)

    def make(self, start: Params) -> tuple[Model, Model]:
        """Model and guide as `pyro.infer.SVI` takes them; an automatic guide begins at `start`."""
        model = config_enumerate(self.model, default="parallel")
        if self.guide is not None:
            return model, self.guide
        inner = {n: interior(r.constraint, start[n]) for n, r in self.records.items() if n in start}
        init = init_to_value(values=inner, fallback=init_to_median)
        parts = [
            kind(poutine.block(self.model, expose=list(names)), init_loc_fn=init)
            for kind, names in ((AutoDelta, self.points), (AutoNormal, self.guided))
            if names
        ]
        if len(parts) < 2:
            return model, parts[0] if parts else _empty
        both = AutoGuideList(self.model)
        for part in parts:
            both.append(part)
        return model, both

    def is_alias(self, name: str) -> bool:
        """A parameter of the automatic AutoDelta, which is reported under its site's own name."""
        return self.guide is None and name in {
            f"{owner}.{site}" for owner in ("AutoDelta", "AutoGuideList.0") for site in self.points
        }


def _empty(*args: Any, **kwargs: Any) -> None:
    pass


def _quoted(names: tuple[str, ...]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def split_sites(
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    guide: Model | None,
    roles: Mapping[str, str] | None,
) -> Split:
    """Divide the latents of a model.

    :raises InputError: for a guide site that the model does not have.
    :raises Refusal: for a latent that the guide leaves out and that cannot be summed out.
    """
    seen = capture(model, args, kwargs)
    if seen.loops and (guide is not None or any(_drawn(seen, loop) for loop in seen.loops)):
        seen = capture(model, args, kwargs, together=False)  # SVI runs every step by itself
    held, guide_records = ({}, {}) if guide is None else _inspect(guide, args, kwargs)
    unknown = [name for name in held if name not in seen.sites or seen.sites[name].observed]
    if unknown:
        raise InputError(
            f"guide: its site '{unknown[0]}' is no latent of the model, whose unobserved sites are: "
            f"{', '.join(n for n, s in seen.sites.items() if not s.observed) or 'none'}."
        )
    deltas = [name for name, site in held.items() if site.family == "Delta"]
    assigned = assign_roles(seen, roles, deltas)
    points: list[str] = []
    guided: list[str] = []
    enumerated: list[str] = []
    for name, role in assigned.items():
        site = seen.sites[name]
        if role.role == "data":
            continue
        if name in held:
            (points if name in deltas and not site.discrete else guided).append(name)
        elif site.enumerable:
            enumerated.append(name)
        elif site.discrete or guide is not None:
            raise _left_out(name, type(base_distribution(site.fn)).__name__, site.discrete)
        else:
            (points if role.role == "parameter" else guided).append(name)
    records = {**seen.parameters, **{n: r for n, r in guide_records.items() if n not in seen.parameters}}
    for name in points if guide is not None else (*points, *guided):
        site = seen.sites[name]
        records.setdefault(name, ParameterRecord(name, site.value.detach().clone(), site.fn.support, "sample"))
    return Split(model, guide, seen, assigned, tuple(points), tuple(guided), tuple(enumerated), held, records)


def _drawn(seen: Capture, loop: Loop) -> bool:
    """Whether some latents of a loop over time are drawn from a guide, not summed out."""
    own = [site for name, site in seen.sites.items() if name in loop.names]
    return any(not (site.observed or site.enumerable) for site in own)


def _left_out(name: str, family: str, discrete: bool) -> Refusal:
    if discrete:
        reason = f"an unobserved {family} has infinitely many states, so it cannot be summed out."
        return Refusal(name, reason, "give it a q in the guide, or truncate it (a Categorical over 0..M).")
    reason = f"it is a continuous latent ({family}) that the guide leaves out."
    return Refusal(name, reason, "add it to the guide, or leave the guide out for an automatic one.")


def _inspect(
    guide: Model, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, GuideSite], dict[str, ParameterRecord]]:
    """Sample sites and parameters of the user's guide, by one run in an empty store."""
    store = pyro.get_param_store()
    with store.scope(), poutine.block(), torch.no_grad():
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
        constraints = store.get_state()["constraints"]
        records = {n: ParameterRecord(n, store[n].detach().clone(), constraints[n], "param") for n in store}
    sites = {}
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site["is_observed"] or poutine.util.site_is_subsample(site):
            continue
        infer = site["infer"] or {}
        if not infer.get("is_auxiliary"):
            family = type(base_distribution(site["fn"])).__name__
            sites[name] = GuideSite(family, infer.get("enumerate") is not None)
    return sites, records
