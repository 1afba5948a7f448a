"""Uses of parameters that were recognised on few rows, written out for all rows, and certified there.

What an argument is made of (recognise.py, affine.py) is a question about structure, which few rows answer: the link,
which parameters, along which slices. What it is on the other rows is read off: a coefficient or an index that varies
from row to row is, on the few, a column of some covariate, up to a factor; it is the same column on all rows. The
certificate is the one of affine.py: at a second feasible point, on all rows, every argument must be what its uses say,

    argument(θ₂) = link(offset + Σ c·θ₂[i]),        offset = link⁻¹(argument(θ₁)) - Σ c·θ₁[i].

Nothing here is guessed: where a column is not found, or the certificate fails, all rows are looked at as before.

Not handled (all rows are looked at): families that hide their arguments, opaque uses, predictors that meet structural
zeros, observed values that depend on a parameter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_em.errors import InputError
from pyro_em.model.affine import close, compressed
from pyro_em.model.capture import Capture, ParameterRecord
from pyro_em.model.few_rows import Rows, alike, few_rows
from pyro_em.model.predictor import Predictor, linear_part
from pyro_em.model.recognise import recognise, same_link
from pyro_em.model.row_sources import TOLERANCE, Columns, Copies, NotBound, Place, Sources, Varying
from pyro_em.model.trace import Run, SiteRecord
from pyro_em.model.use import VALUE, Use

Uses = dict[str, tuple[Use, ...]]


class Binding:
    """Uses on few rows, and what they need of a run on all rows: the tensors at the places `wanted`."""

    def __init__(self, few: Run, uses: Uses, rows: Rows, sources: Sources) -> None:
        """:raises NotBound: if that is not known."""
        self.few, self.uses, self.rows = few, uses, rows
        self.columns = Columns(sources)
        self._varying: dict[int, Varying] = {}  # by id of a tensor of the uses
        for site in few.sites.values():
            if site.family is None or (site.observed and site.value.requires_grad):
                raise NotBound
        for own in uses.values():
            for use in own:
                self._look(use)

    @property
    def wanted(self) -> Mapping[Place, tuple[Tensor, int]]:
        return self.columns.wanted

    def _look(self, use: Use) -> None:
        if use.slot == VALUE:
            if use.index is None:
                raise NotBound
            return
        dim = self._dim(use)
        if use.predictor is None:
            if use.index is None:
                raise NotBound
            if dim is not None:
                self._note(use.index, dim)
        elif use.predictor.offset is None or use.predictor.fixed is not None:
            raise NotBound
        elif dim is not None:
            for term in use.predictor.terms:
                self._note(term.index, dim)
                self._note(term.coefficient, dim)

    def _dim(self, use: Use) -> int | None:
        site = self.few.sites[use.site]
        return self.rows.dim(site, use.slot, _argument(site, use.slot))

    def _note(self, x: Tensor, dim: int) -> None:
        if id(x) in self._varying or x.shape[dim] == 1:
            return
        if bool((x == x.narrow(dim, 0, 1)).all()):
            return
        columns = self.columns.match(x.movedim(dim, -1).reshape(-1, x.shape[dim]))
        self._varying[id(x)] = Varying(x, dim, columns)

    def whole(self, first: Run, second: Run, values: tuple[Mapping[str, Tensor], ...], copies: Copies) -> Uses:
        """The uses on all rows, given the runs there.

        :param values: of the parameters in the two runs.
        :raises NotBound: if they do not say what the arguments are.
        """
        at, at2 = ({n: v.detach() for n, v in own.items()} for own in values)
        predictors: dict[int, Predictor] = {}
        found: dict[str, list[Use]] = {name: [] for name in self.uses}
        for name, own in self.uses.items():
            for use in own:
                if use.slot == VALUE:
                    found[name].append(use)
                    continue
                pair = tuple(_argument(run.sites[use.site], use.slot).detach() for run in (first, second))
                if use.predictor is None:
                    found[name].append(self._elementwise(use, pair, (at[name], at2[name]), copies))
                    continue
                if id(use.predictor) not in predictors:
                    predictors[id(use.predictor)] = self._predictor(use, pair, (at, at2), copies)
                found[name].append(dataclasses.replace(use, predictor=predictors[id(use.predictor)]))
        self._certify(found, first, second, (at, at2))
        return {name: tuple(own) for name, own in found.items()}

    def _written_out(self, x: Tensor, dim: int | None, copies: Copies, expand: bool = False) -> Tensor:
        if id(x) in self._varying:
            return self._varying[id(x)].whole(copies, self.rows)
        if dim is None or x.shape[dim] == 1:
            return x
        shape = list(x.shape)
        shape[dim] = self.rows.size
        one = x.narrow(dim, 0, 1)
        return one.expand(shape) if expand else one

    def _elementwise(self, use: Use, pair: Sequence[Tensor], thetas: Sequence[Tensor], copies: Copies) -> Use:
        assert use.index is not None
        index = self._written_out(use.index, self._dim(use), copies, expand=True)
        value, value2 = pair
        if index.shape != value.shape:
            raise NotBound
        if use.gather or use.link is not None:
            return dataclasses.replace(use, index=index, plans={})
        moving = index >= 0
        theta, theta2 = (theta.reshape(-1)[index.clamp(min=0)] for theta in thetas)
        coefficient = same_link(value, value2, theta, theta2, moving, use.power, use.exponential, TOLERANCE)
        if coefficient is None:
            raise NotBound
        return dataclasses.replace(use, index=index, coefficient=coefficient, plans={})

    def _predictor(
        self, use: Use, pair: Sequence[Tensor], values: Sequence[Mapping[str, Tensor]], copies: Copies
    ) -> Predictor:
        old, dim = use.predictor, self._dim(use)
        assert old is not None
        terms = tuple(
            dataclasses.replace(
                t,
                index=self._written_out(t.index, dim, copies),
                coefficient=self._written_out(t.coefficient, dim, copies),
            )
            for t in old.terms
        )
        value, value2 = (x.double() for x in pair)
        if not (old.link.reaches(value, self._event_dim(use)) and old.link.reaches(value2, self._event_dim(use))):
            raise NotBound
        eta = old.link.inverse(value)
        rounding = 1e-4 * TOLERANCE * float(eta.abs().max())
        offset = eta - linear_part(terms, old.coordinates(values[0]), torch.zeros_like(eta))
        offset = compressed(torch.where(offset.abs() <= rounding, 0.0, offset), rounding)
        end = linear_part(terms, old.coordinates(values[1]), offset)
        if not close(old.link.inverse(value2), end, TOLERANCE):
            raise NotBound
        return dataclasses.replace(old, terms=terms, offset=offset)

    def _event_dim(self, use: Use) -> int:
        family = self.few.sites[use.site].family
        assert family is not None
        return family.arguments[use.slot]

    @staticmethod
    def _certify(
        found: Mapping[str, Sequence[Use]], first: Run, second: Run, points: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Every argument is what its uses make of it at both points; those without a use are what they were."""
        for name, site in first.sites.items():
            for slot, value in (site.arguments or {}).items():
                uses = {n: u for n, own in found.items() for u in own if (u.site, u.slot) == (name, slot)}
                if any(use.predictor is not None for use in uses.values()):
                    if any(use.predictor is None for use in uses.values()):
                        raise NotBound
                    continue  # see `_predictor`
                plain = all(use.gather for use in uses.values())
                for at, run in zip(points, (first, second), strict=True):
                    expected, other = value.detach(), _argument(run.sites[name], slot).detach()
                    for n, use in uses.items():
                        expected = use.argument(at[n], expected)
                    if not (torch.equal(expected, other) if plain else close(expected, other, TOLERANCE)):
                        raise NotBound


RunOn = Callable[[tuple[Any, ...], dict[str, Any], int, bool], Run]  # arguments, at which point, with gradients?


def bound_by_rows(
    seen: Capture,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    run: RunOn,
    points: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    records: Mapping[str, ParameterRecord],
    priors: frozenset[str],
) -> tuple[Run, Uses] | None:
    """The run of the model on all rows at the first point, without gradients, and the uses of its parameters.

    None where the rows are few, where no argument varies along them, or where few rows do not tell.
    """
    rows = few_rows(seen)
    if rows is None or any(r.value.dtype != torch.float64 or rows.size in r.value.shape for r in records.values()):
        return None
    sources = Sources(rows)
    try:
        few_args, few_kwargs = rows.cut(args), rows.cut(kwargs)
        with sources:
            few = run(few_args, few_kwargs, 0, True)
        second_few = run(few_args, few_kwargs, 1, True)
    except (ValueError, RuntimeError, IndexError, InputError):  # data elsewhere, or wrong: all rows say what is
        return None
    if not any(_moves_along(site, rows) for site in few.sites.values()):
        return None
    try:
        binding = Binding(few, recognise(few, second_few, records, priors, points), rows, sources)
        copies = Copies(binding.wanted)
        with copies:
            first = run(args, kwargs, 0, False)
        second = run(args, kwargs, 1, False)
        if not (alike(few, first, rows) and alike(second_few, second, rows)):
            return None
        return first, binding.whole(first, second, points, copies)
    except NotBound:
        return None


def _moves_along(site: SiteRecord, rows: Rows) -> bool:
    """Some argument that depends on parameters varies along the rows."""
    for slot, value in (site.arguments or {}).items():
        dim = rows.dim(site, slot, value)
        if value.requires_grad and dim is not None and value.shape[dim] > 1:
            return True
    return False


def _argument(site: SiteRecord, slot: str) -> Tensor:
    return (site.arguments or {})[slot]
