"""A certificate that the steps of a loop that are run together mean what they mean one by one.

The model is also run at a few single steps (timeline.chosen_steps): enough that some step looks back only at
steps which are run together, and the last. At each of these every factor must equal the slice of the one run of
all steps, with "the step before" in the place of the state that the loop carried over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_em.errors import Refusal
from pyro_em.model import compat
from pyro_em.model.chained import ChainedLoop
from pyro_em.model.density import packed_log_density
from pyro_em.model.graph import FactorGraph
from pyro_em.model.packing import align
from pyro_em.model.slicing import rows_of
from pyro_em.model.timeline import chosen_steps
from pyro_em.model.trace import Run, SiteRecord, quiet_store, run_model
from pyro_em.types import Model

REMEDY = (
    "what varies with time must be indexed by the step on its first dim (x[t], with as many more dims as the site has "
    "plates), data of earlier steps too (x[t - 1], not a value carried over from an observed site); states of more "
    "than one step back need history=2 or more; and the body must be the same at all steps after the first. Otherwise "
    "write pyro.markov(range(T)), which runs every step by itself."
)


def certify_loops(
    together: Run,
    graph: FactorGraph,
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    params: Mapping[str, Tensor],
    max_plate_nesting: int,
) -> None:
    """Raise `Refusal` naming the first site of a loop that differs at a single step."""
    if not graph.loops:
        return
    with torch.no_grad(), quiet_store(), pyro.validation_enabled(False):
        alone = run_model(
            model,
            args,
            kwargs,
            params,
            max_plate_nesting=max_plate_nesting,
            loops=together.loops,
            chosen=True,
        )
        for loop in graph.loops:
            _certify(loop, together, alone)


def _certify(loop: ChainedLoop, together: Run, alone: Run) -> None:
    steps, history = chosen_steps(loop.loop), loop.loop.history
    for place, step in enumerate(steps):
        if place < history:
            continue
        symbols = _symbols(loop, together, alone, steps, place)
        for name, template in loop.rest.items():
            own = alone.sites.get(template.name(step, loop.loop))
            if own is None:
                raise Refusal(name, f"the pyro_em.markov loop has no such site at step {step}.", REMEDY)
            found = packed_log_density(own)
            dims = compat.dims_of(found)
            # Plates lie in the same dims, even where their names have the step in them.
            places = together.sites[name].symbols
            symbols.update({own.symbols[p.dim]: places[p.dim] for p in own.plates if p.dim in places})
            strange = [d for d in dims if d not in symbols]
            expected = _slice(together.sites[name], loop, step)
            if not strange:
                found = compat.with_dims(found, "".join(symbols[d] for d in dims))
            if strange or not _equal(found, expected, _rounding(own)):
                raise Refusal(
                    name,
                    f"at step {step} alone its log-density is another than in the run of all steps together.",
                    REMEDY,
                )


def _symbols(loop: ChainedLoop, together: Run, alone: Run, steps: list[int], place: int) -> dict[str, str]:
    """What each symbol of the run at single steps is in the run of all together, seen from one step."""
    found: dict[str, str] = {}
    for name, site in together.sites.items():
        if site.symbol is None:
            continue
        if name not in loop.rest:
            other = alone.sites.get(name)
            if name not in loop.heads and other is not None and other.symbol is not None:
                found[other.symbol] = site.symbol
            continue
        template = loop.rest[name]
        lags = {c.lag: c.previous for c in loop.carried if c.current == site.symbol}
        for lag, symbol in {0: site.symbol, **lags}.items():
            there = alone.sites.get(template.name(steps[place - lag], loop.loop))
            if there is not None and there.symbol is not None:
                found[there.symbol] = symbol
    return found


def _slice(site: SiteRecord, loop: ChainedLoop, step: int) -> Tensor:
    """Packed log-density of one of the steps that were run together."""
    row = step - loop.loop.history
    if site.family is not None and site.arguments is not None:
        return packed_log_density(rows_of(site, loop.loop.plate, row, 1))
    packed = packed_log_density(site)
    dims = compat.dims_of(packed)
    if loop.plate not in dims:
        return packed
    return compat.with_dims(packed.select(dims.index(loop.plate), row), dims.replace(loop.plate, ""))


def _rounding(site: SiteRecord) -> float:
    """That explains a difference; a scalar of float64 beside a vector of float32 is computed with in float32."""
    parts = [x for x in (site.value, *(site.arguments or {}).values()) if x.is_floating_point()]
    return 1e-9 if all(x.dtype == torch.float64 for x in parts) else 1e-4


def _equal(a: Tensor, b: Tensor, tolerance: float) -> bool:
    dims = "".join(dict.fromkeys(compat.dims_of(a) + compat.dims_of(b)))
    a, b = torch.broadcast_tensors(align(a, dims), align(b, dims))
    return bool((torch.isclose(a, b, rtol=tolerance, atol=tolerance) | (a == b)).all())
