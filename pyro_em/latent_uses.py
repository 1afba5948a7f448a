"""What a parameter does in a model with continuous latents: uses whose form holds for all values of these.

Uses are recognised at one value of the latents (model/recognise.py), where w·z is "z times an entry of w" and
z @ W.T + b an affine predictor. Both forms hold at every value, but their coefficients move: such a use is kept as a
predictor with `moving` terms, which the M-step reads off anew at the atoms of each E-step (m_step/moving.py), so
that loadings are solved for like the slopes of a regression, and slopes of items by Newton's method. Predictors behind
a link, or of other arguments than a location, are recognised at the other values too. Whatever else moves is opaque.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_em.model.affine import Point, find_predictor
from pyro_em.model.atoms import AtomRuns
from pyro_em.model.links import LINKS
from pyro_em.model.predictor import Predictor, Term, linear_part
from pyro_em.model.trace import Run
from pyro_em.model.use import VALUE, Use
from pyro_em.types import Params

Values = dict[str, Tensor]
MULTIPLIES = "it multiplies a continuous latent"


def without_latents(
    uses: Mapping[str, tuple[Use, ...]],
    runs: AtomRuns,
    params: tuple[Params, Params],
    values: Values,
    there: tuple[Run, Run],
) -> dict[str, tuple[Use, ...]]:
    """Uses whose form holds for all values of the latents; a coefficient that moves with them is none.

    (The location w·z is "z times an entry of w" at one z only.) Checked at other values of the latents, for both
    parameters. An affine predictor keeps its terms if they are right there, without the part that moves.

    :param values: of the latents, other than those at which the uses were recognised.
    :param there: runs at these, at both `params`.
    """
    found = {}
    open_ones: dict[int, Predictor] = {}  # one for all parameters of a predictor, as before
    with torch.no_grad():
        for name, own in uses.items():
            found[name] = tuple(_without_latents(use, *there, params, open_ones) for use in own)
    return _with_predictors(uses, found, runs, params, values)


def _without_latents(
    use: Use, first: Run, second: Run, params: tuple[Params, Params], open_ones: dict[int, Predictor]
) -> Use:
    before = (first.sites[use.site].arguments or {}).get(use.slot)
    after = (second.sites[use.site].arguments or {}).get(use.slot)
    if use.slot == VALUE or before is None or after is None:
        return use
    if use.index is not None:
        if _near(use.argument(params[1][use.parameter], after), after):
            return use
        if use.slot == "loc" and use.power == 1 and not use.exponential and use.coefficient is not None:
            term = Term(use.parameter, use.index, use.coefficient.double())
            alone = Predictor(use.site, use.slot, LINKS[0], (term,), None, moving=True)
            return Use(use.parameter, use.site, use.slot, None, predictor=alone)
    elif use.predictor is not None:
        predictor = use.predictor
        here, there = (predictor.coordinates({n: v.detach() for n, v in own.items()}) for own in params)
        step = {n: there[n] - here[n] for n in predictor.parameters}
        change = predictor.inverse(after.double()) - predictor.inverse(before.double())
        expected = linear_part(predictor.terms, step, torch.zeros_like(change))
        outside = predictor.offset is None  # other parameters move the argument too
        if not outside and _near(expected, change):
            moves = not _near(predictor.argument(params[0]), before)
            if not moves:
                return use
            shared = open_ones.setdefault(id(predictor), dataclasses.replace(predictor, offset=None))
            return dataclasses.replace(use, predictor=shared)
        if not outside and predictor.link is LINKS[0] and use.slot == "loc":
            return dataclasses.replace(use, predictor=dataclasses.replace(predictor, offset=None, moving=True))
    else:
        return use
    return Use(use.parameter, use.site, use.slot, None, reason=MULTIPLIES)


def _with_predictors(
    before: Mapping[str, tuple[Use, ...]],
    found: dict[str, tuple[Use, ...]],
    runs: AtomRuns,
    params: tuple[Params, Params],
    values: Values,
) -> dict[str, tuple[Use, ...]]:
    """Arguments that multiply latents and are the same link of something affine in the same parameters there too."""
    slots = {(u.site, u.slot) for own in found.values() for u in own if u.reason == MULTIPLIES}
    if not slots:
        return found
    leaves = tuple({n: v.detach().clone().requires_grad_(True) for n, v in p.items()} for p in params)
    with torch.enable_grad():
        here = [runs.one(own, values) for own in leaves]
    generator = torch.Generator().manual_seed(0)
    for site, slot in slots:
        names = [n for n, own in before.items() if any((u.site, u.slot) == (site, slot) for u in own)]
        known = next((u.predictor for n in names for u in before[n] if (u.site, u.slot) == (site, slot)), None)
        # The leaf of a torch module's parameter is its own, whatever was given for it.
        points = [
            Point((run.sites[site].arguments or {})[slot], run.leaves, p) for run, p in zip(here, params, strict=True)
        ]
        family = here[0].sites[site].family
        assert family is not None
        again = find_predictor(site, slot, family.arguments[slot], points[0], points[1], names, generator)
        if again is None or again.offset is None or (known is not None and known.link is not again.link):
            continue
        moving = dataclasses.replace(again, offset=None, moving=True)
        for name in names:
            found[name] = tuple(
                Use(name, site, slot, None, predictor=moving) if (u.site, u.slot) == (site, slot) else u
                for u in found[name]
            )
    return found


def _near(found: Tensor, truth: Tensor) -> bool:
    return torch.allclose(found.to(truth), truth, rtol=1e-5, atol=1e-6 * (1 + float(truth.abs().max())), equal_nan=True)
