"""Which route integrates a set of continuous latents out: a visible ordered tuple, the first that can.

A route may decline a kind of latent (`NotMine`) or refuse a structure (`Refusal`, naming site, reason and
remedy). A set that no route takes is refused with the reason of the route whose kind of latent it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.distributions import biject_to, constraints

from pyro_em.errors import InputError, NonFiniteError, Refusal
from pyro_em.evidence.conjugate import recognise_conjugate
from pyro_em.evidence.elimination import Candidate, NotMine, Route, Values
from pyro_em.evidence.gaussian import GaussianRoute
from pyro_em.evidence.gaussian_recognition import recognise_gaussian
from pyro_em.evidence.quadrature_recognition import recognise_quadrature
from pyro_em.evidence.rule import Quadrature
from pyro_em.model.compat import base_distribution
from pyro_em.model.data import plain_support

ROUTES: tuple[Callable[[Candidate], Route], ...] = (recognise_gaussian, recognise_conjugate)


def check_rules(names: tuple[str, ...], rules: Mapping[str, Quadrature]) -> None:
    """Raise `InputError` for a rule of something that is no continuous latent."""
    for name, rule in rules.items():
        if name not in names and rule.adaptive:
            known = ", ".join(repr(n) for n in names) or "none"
            raise InputError(f"e_step: the model has no continuous latent '{name}'. Its continuous latents: {known}.")


def check_support(name: str, fn: Any) -> None:
    """Refuse a latent without entries, or whose support torch has no coordinates of (mixtures inside of one, say)."""
    if 0 in fn.event_shape:  # a plain tuple where the user gave one
        raise Refusal(
            name,
            f"a latent of shape {tuple(fn.event_shape)} has no entries, so that there is nothing to integrate.",
            "leave it out of a model of 0 factors.",
        )
    try:
        biject_to(fn.support)
    except NotImplementedError:
        kind = type(base_distribution(fn)).__name__
        raise Refusal(
            name,
            f"a latent {kind} is in no family that is integrated exactly, and its support has no coordinates.",
            "write what hides inside of it as sites of their own (of a mixture: the component as a Categorical that "
            f"chooses the latent's arguments), or make it a point estimate by roles={{'{name}': 'parameter'}}.",
        ) from None


def choose_route(candidate: Candidate, rules: Mapping[str, Quadrature]) -> Route:
    """The first route that takes the set, or quadrature where the user asks for it.

    :raises Refusal: if none does.
    """
    if rules.keys() & set(candidate.latents.names):
        return recognise_quadrature(candidate, rules)
    reasons = []
    for recognise in ROUTES:
        try:
            return recognise(candidate)
        except NotMine as error:
            reasons.append(str(error))
    name, *others = candidate.latents.names
    family = _family(candidate, name)
    real = {n: plain_support(candidate.first.sites[n].fn) is constraints.real for n in (name, *others)}
    other = next((n for n in others if real[n] != real[name]), None)
    told = f"of a kind that no exact route integrates: {'; '.join(reasons)}"
    if other is not None:
        told = (
            f"that meets '{other}' ({_family(candidate, other)}) in one density, and no exact route integrates latents "
            "of different kinds together"
        )
    raise Refusal(
        name,
        f"a continuous latent ({family}) {told}.",
        f'use algorithm=\'svi\' with a guide for it; roles={{"{name}": "parameter"}} makes it a point estimate.',
    )


def first_atoms(route: Route, candidate: Candidate) -> Values:
    """Atoms of the set at the start; at the second parameters, if the caller may have to replace the start."""
    if isinstance(route, GaussianRoute):
        return route.at_start
    try:
        return route.eliminate(candidate.run_at[0]).atoms.values
    except NonFiniteError:
        return route.eliminate(candidate.run_at[1]).atoms.values


def _family(candidate: Candidate, name: str) -> str:
    return type(base_distribution(candidate.first.sites[name].fn)).__name__
