"""Linear predictors of isomorphic sites as one: Poisson(exp(a[z] + b[z]·x[t])) at all steps t.

    η = offset + Σ_j c_j·θ[i_j] of each copy    ->    the same with offset, c_j and i_j stacked along the copies

The copies of a group have equally many terms of each parameter; every tensor of a term is laid out and stacked like
the argument itself (groups.py). A copy at which a covariate is 0 has a term less, and is in another group.

Not handled: predictors with an offset that depends on other parameters; their parameters are opaque to the engine.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from pyro_em.model.predictor import Predictor
from pyro_em.model.use import Use

PREDICTED = ("offset", "fixed", "term index", "term coefficient")  # kinds of tensors, whose keys go on with the slot


def predictors_of(uses: Sequence[Use]) -> dict[str, Predictor]:
    """By slot; the uses of all parameters of a predictor share it."""
    return {use.slot: use.predictor for use in uses if use.predictor is not None}


def key_of(uses: Sequence[Use]) -> Hashable:
    """What the predictors of copies must have in common besides the shapes of their tensors."""
    return tuple(
        (slot, own.link.name, tuple((term.parameter, term.logarithmic) for term in own.terms))
        for slot, own in predictors_of(uses).items()
    )


def parts_of(uses: Sequence[Use], arguments: Mapping[str, Tensor]) -> dict[tuple[str, ...], Tensor]:
    """The tensors of all predictors of a site, of the rank of their arguments."""
    found: dict[tuple[str, ...], Tensor] = {}
    for slot, own in predictors_of(uses).items():
        assert own.offset is not None
        found["offset", slot] = own.offset
        if own.fixed is not None:
            found["fixed", slot] = own.fixed
        for i, term in enumerate(own.terms):
            found["term index", slot, str(i)] = term.index
            found["term coefficient", slot, str(i)] = term.coefficient
        rank = arguments[slot].dim()
        for key in [key for key in found if key[1] == slot]:
            x = found[key]
            found[key] = x.reshape((1,) * (rank - x.dim()) + tuple(x.shape))
    return found


def stacked_predictor(own: Predictor, site: str, tensors: Mapping[tuple[str, ...], Tensor]) -> Predictor:
    """The predictor of a group from that of its first copy and the stacked tensors."""
    slot = own.slot
    terms = tuple(
        replace(
            term,
            index=tensors["term index", slot, str(i)],
            coefficient=tensors["term coefficient", slot, str(i)],
        )
        for i, term in enumerate(own.terms)
    )
    return replace(own, site=site, terms=terms, offset=tensors["offset", slot], fixed=tensors.get(("fixed", slot)))
