"""Sets of Gaussian latents with effects of several plates, all of whose sites stand in common plates.

Pupils of classes of schools, written as nested plates: given the parameters the schools are independent, although a
school's effect couples its classes. The evidence is a sum over them; each of its parts belongs to one: a row, an
element of A, an entry of B (for the determinant, that of a triangular factor, which keeps to the blocks).

Shapes: as in assembly.py, m plate-like dims; shared dims are negative numbers among them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_em.evidence.assembly import Geometry, Reading
from pyro_em.evidence.elimination import Candidate, LatentSet

Sizes = Sequence[int]


def shared_dims(candidate: Candidate, geometry: Geometry, readings: Sequence[Reading]) -> tuple[int, ...]:
    """Dims of plates in which all sites of the set stand, each row reading elements of its own."""
    columns = (*geometry.columns_a, *geometry.offsets_b)
    if any(column.element is not None for column in columns):
        return ()
    common: set[tuple[str, int]] | None = None
    for name in candidate.latents.factors:
        own = {(plate.name, plate.dim) for plate in candidate.first.sites[name].plates if plate.size > 1}
        common = own if common is None else common & own
    dims = sorted(dim for _, dim in common or ())
    return tuple(d for d in dims if all(_reads_its_own(candidate, geometry, reading, d) for reading in readings))


def _reads_its_own(candidate: Candidate, geometry: Geometry, reading: Reading, dim: int) -> bool:
    m = len(geometry.layout)
    found: list[Tensor] = []
    if reading.index is not None:
        found.append(_along(torch.Size(geometry.layout), dim)[reading.index.clamp(min=0)])
    for i, column in enumerate(reading.columns[reading.num_a :]):
        batch = candidate.latents.shapes[column.site][0]
        assert reading.entries is not None
        entries = reading.entries[..., i] - geometry.offsets_b[column]
        found.append(_along(torch.Size((1,) * (m - len(batch)) + tuple(batch)), dim)[entries])
    for number in found:
        if number.dim() < -dim:
            return False
        own = torch.arange(number.shape[dim]).reshape(-1, *(1,) * (-dim - 1))
        if not bool((number == own).all()):
            return False
    return True


def _along(sizes: torch.Size, dim: int) -> Tensor:
    """The place along a dim of every element of a grid, flattened."""
    return torch.arange(sizes[dim]).reshape(-1, *(1,) * (-dim - 1)).expand(sizes).reshape(-1)


def over(x: Tensor, sizes: Sizes, shared: Sizes) -> Tensor:
    """A quantity of the cells of a grid, summed over all dims but the shared ones, which stay: m dims."""
    gone = [d for d in range(-len(sizes), 0) if d not in shared]
    return x.expand(*sizes).sum(gone, keepdim=True)


def entries_over(x: Tensor, latents: LatentSet, geometry: Geometry, shared: Sizes) -> Tensor:
    """The same for a quantity of the entries of B (n_B,)."""
    m = len(geometry.layout)
    total: Tensor | None = None
    for column, offset in geometry.offsets_b.items():
        batch = latents.shapes[column.site][0]
        sizes = (1,) * (m - len(batch)) + tuple(batch)
        own = over(x[offset : offset + batch.numel()].reshape(sizes), sizes, shared)
        total = own if total is None else total + own
    assert total is not None
    return total
