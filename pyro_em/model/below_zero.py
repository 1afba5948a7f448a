"""Indices below 0 among the data, where they index a parameter or a latent: `b[group]` with a group of -1.

Python counts these from the end. In data, -1 is a code for "no group", whose rows would silently join the last one. A
first look at the model finds such indices (provenance.py); two runs then tell whether they matter, one with them and
one that takes another entry in their place:

    log p(y_n | b[group_n])  is another, for a row n with group_n < 0

Rows that differ are an error; those that are masked, or whose entry the model does not use (`torch.where`, a factor of
0), may have any index.

Not seen: an index of minus the size, which is the first entry; `torch.take`. The other gathers of torch (`gather`,
`index_select`) take none (row_index.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from pyro.ops.provenance import ProvenanceTensor, detach_provenance
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_em.errors import InputError
from pyro_em.model.data import first_bad
from pyro_em.model.density import log_density
from pyro_em.model.provenance import counts_from_end, has_below_zero, traced
from pyro_em.model.trace import Run


class _Elsewhere(TorchFunctionMode):
    """Such indices into a tensor with a gradient, or with provenance, take its first entry instead."""

    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if call is Tensor.__getitem__ and _follows(args[0]) and has_below_zero(args[1]):
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(part.clamp(min=0) if counts_from_end(part) else part for part in parts))
        return call(*args, **(kwargs or {}))


def _follows(x: Tensor) -> bool:
    return isinstance(x, ProvenanceTensor) or x.requires_grad


def check_below_zero(
    indexed: Collection[str],
    run: Callable[[Mapping[str, Tensor]], Run],
    values: Mapping[str, Tensor],
    states: Mapping[str, Tensor] | None = None,
) -> None:
    """Raise `InputError` naming the first row that takes an entry from the end.

    :param indexed: parameters and latents that are indexed so; nothing is done if there are none.
    :param run: the model at values of its parameters and continuous latents.
    :param values: some of which the entries differ.
    :param states: values of discrete latents, where the run is told these too.
    """
    if not indexed:
        return
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    leaves |= {name: traced(value, name) for name, value in (states or {}).items()}
    as_written = run(leaves)
    with _Elsewhere():
        elsewhere = run(leaves)
    for name, site in as_written.sites.items():
        one, two = (detach_provenance(log_density(own)).detach() for own in (site, elsewhere.sites[name]))
        other = (one != two) & ~(one.isnan() & two.isnan())
        while other.dim() > max((-plate.dim for plate in site.plates), default=0):  # dims of enumerated states
            other = other.any(0)
        if bool(other.any()):
            raise InputError(
                f"Site '{name}': row {first_bad(other)} takes its entry of {', '.join(map(repr, sorted(indexed)))} by "
                "an index below 0, which in Python counts from the end: -1 would be the last group. Groups count from "
                "0. Rows without a group belong behind a mask (pyro.poutine.mask(mask=group >= 0)), or have no effect "
                "(torch.where(group >= 0, b[group], 0.)); where counting from the end is meant, write group % size."
            )
