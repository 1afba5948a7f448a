"""A certificate that the enumerated factors mean what the model says.

Pyro enumerates a latent by giving it one value per state along a new dim, unexpanded over plates. A model
that reduces over that dim or over a plate (`z.sum()`), or branches on a value, then silently computes
something else. So the model is also run plainly, with one drawn value per latent, and every site's
log-density must equal the entry of its enumerated factor at those values; and once more with the next state in the
place of every drawn one, so that a branch on a value that happened to be drawn is seen (where that costs little).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_em.errors import InputError, Refusal
from pyro_em.model import compat
from pyro_em.model.capture import Capture
from pyro_em.model.density import log_density, packed_log_density
from pyro_em.model.few_rows import Rows, leading_rows
from pyro_em.model.first import FirstElements
from pyro_em.model.graph import FactorGraph
from pyro_em.model.nests import at_rows
from pyro_em.model.packing import align
from pyro_em.model.repeatable import refuse_changing
from pyro_em.model.slicing import ROWS, first_rows, plate_to_cut
from pyro_em.model.trace import Run, SiteRecord, quiet_store, run_model
from pyro_em.shapes import broadcast_shapes
from pyro_em.types import Model

Values = Mapping[str, Tensor]
FEW = 2**12  # elements of a latent up to which a second run with other states costs next to nothing
RUNS = 8  # that are compared where random numbers of the model itself (a few of dropout) may be why it was refused


def certify_factors(
    capture: Capture,
    enumerated: Run,
    graph: FactorGraph,
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    params: Mapping[str, Tensor],
) -> None:
    """Raise `Refusal` naming the first site whose factor does not match the plain model."""
    if not graph.latents:
        return
    try:
        _against_drawn(capture, enumerated, graph, model, args, kwargs, params)
    except Refusal as refusal:
        with torch.no_grad(), quiet_store(), pyro.validation_enabled(False):
            runs = [
                run_model(model, args, kwargs, params, max_plate_nesting=capture.max_plate_nesting, loops=capture.loops)
                for _ in range(RUNS)
            ]
        refuse_changing(refusal.site, *runs)
        raise


def _against_drawn(
    capture: Capture,
    enumerated: Run,
    graph: FactorGraph,
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    params: Mapping[str, Tensor],
) -> None:
    nested = any(component.nests for component in graph.components)
    plate = None if nested else plate_to_cut(enumerated)

    def drawn(first: FirstElements | None = None, rows: Rows | None = None, values: Values | None = None) -> Run:
        with torch.no_grad(), quiet_store(), pyro.validation_enabled(False):
            return run_model(
                model if values is None else _Given(values)(model),
                args if rows is None else rows.cut(args),
                kwargs if rows is None else rows.cut(kwargs),
                params,
                max_plate_nesting=capture.max_plate_nesting,
                enumerated=False,
                loops=capture.loops,
                first=first,
            )

    cut = first_rows(enumerated, plate)
    factors = {name: compat.detached(packed_log_density(site)) for name, site in cut.sites.items()}

    def agree(run: Callable[..., Run]) -> None:
        plain = run()
        _compare(cut, factors, plain, graph)
        rows = max(plain.sites[name].value.numel() for name in graph.latents)
        if rows <= FEW:  # (in a loop over time one draw serves all steps)
            others = {name: _states(enumerated.sites[name], plain.sites[name], 1)[1] for name in graph.latents}
            _compare(cut, factors, run(values=others), graph)

    if plate is None:
        agree(drawn)
        return
    # Drawn latents give every row arguments of its own: N covariance matrices, if they are not kept from it.
    try:
        agree(partial(drawn, rows=leading_rows(plate, _size(enumerated, plate), ROWS)))
        return
    except (ValueError, RuntimeError, IndexError, InputError, Refusal):
        pass  # data elsewhere, or a model that says something else of its first rows alone
    try:
        agree(partial(drawn, FirstElements(plate, ROWS)))
    except (ValueError, RuntimeError):  # something else has the size of the plate
        _compare(cut, factors, first_rows(drawn(), plate), graph)


class _Given(Messenger):
    """Latents at given values."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]


def _size(run: Run, plate: str) -> int:
    return next(p.size for site in run.sites.values() for p in site.plates if p.name == plate)


def _compare(enumerated: Run, factors: Mapping[str, Tensor], plain: Run, graph: FactorGraph) -> None:
    states = {name: _state_index(enumerated, plain, name) for name in graph.latents}
    nests_of = {name: component.nests for component in graph.components for name in component.factors}
    for name, site in enumerated.sites.items():
        if name not in plain.sites:
            raise Refusal(
                name,
                "it exists when the latents are enumerated, but not when they are drawn.",
                "do not branch in Python on a latent value; use indexing or torch.where.",
            )
        own = plain.sites[name]
        expected = compat.pack(log_density(own, masked=not site.latent).detach(), own.symbols)
        latents = [graph.symbol_sites[d] for d in compat.dims_of(factors[name]) if d in graph.symbol_sites]
        nests, plates = nests_of.get(name, {}), site.plate_dims
        here = {n: at_rows(states[n], plates, nests, graph.plate_sizes) for n in latents}
        found = _lookup(factors[name], here, graph)
        dims = "".join(dict.fromkeys(compat.dims_of(expected) + compat.dims_of(found)))
        a, b = align(expected, dims), align(found, dims)
        a, b = torch.broadcast_tensors(a, b)
        close = torch.isclose(a, b, rtol=1e-6, atol=1e-6) | (a == b)
        if not bool(close.all()):
            raise Refusal(
                name,
                "with enumerated latents its log-density differs from the one with drawn latents, so the model "
                "does not act elementwise on the latent: it sums, counts or averages it over a plate or over "
                "its states, or branches on its value.",
                "use the latent only by indexing (loc[z]) or elementwise arithmetic inside of its own plates.",
            )


def refuse_minibatches(capture: Capture) -> None:
    """Raise `Refusal` for a plate that takes other elements in every run."""
    for name in sorted(capture.minibatches):
        raise Refusal(
            name,
            "this plate draws a minibatch (subsample_size): no run of the model has the likelihood of all data.",
            "leave subsample_size out: an E-step takes all rows, in chunks, at a cost that is linear in their number; "
            "or use algorithm='svi'.",
        )


def _state_index(enumerated: Run, plain: Run, name: str) -> Tensor:
    """Packed (over plates) number of the drawn state of each latent element."""
    own = plain.sites[name]
    return compat.pack(_states(enumerated.sites[name], own)[0].expand(own.batch_shape), own.symbols)


def _states(site: SiteRecord, drawn: SiteRecord, shift: int = 0) -> tuple[Tensor, Tensor]:
    """Number of the drawn state of each latent element, and the value `shift` states after it."""
    support = site.fn.enumerate_support(expand=False)
    event_dim = site.fn.event_dim
    states = support.reshape(support.shape[0], *support.shape[support.dim() - event_dim :])
    value = drawn.value
    batch = value.shape[: value.dim() - event_dim]
    same = value.unsqueeze(0) == states.reshape(states.shape[0], *(1,) * len(batch), *states.shape[1:])
    index = same.reshape(states.shape[0], *batch, -1).all(-1).long().argmax(0)
    return index, states[(index + shift) % len(states)]


def _lookup(factor: Tensor, states: Mapping[str, Tensor], graph: FactorGraph) -> Tensor:
    """The factor's entries at the drawn states, packed over plates."""
    for symbol in [d for d in compat.dims_of(factor) if d in graph.symbol_sites]:
        dims = compat.dims_of(factor)
        index = states[graph.symbol_sites[symbol]]
        plates = "".join(dict.fromkeys([d for d in dims if d != symbol] + list(compat.dims_of(index))))
        wide = align(factor, plates + symbol)
        picked = align(index, plates).unsqueeze(-1)
        shape = broadcast_shapes(wide.shape[:-1], picked.shape[:-1])
        taken = wide.expand(*shape, wide.shape[-1]).gather(-1, picked.expand(*shape, 1)).squeeze(-1)
        factor = compat.with_dims(taken, plates)
    return factor
