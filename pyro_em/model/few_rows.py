"""A model on a few of its rows: what it is made of is seen there, at a cost that does not grow with the data.

The arguments of the model are cut along the dim that is as long as its largest plate, and the model is run on them.
That rows are treated alike is an assumption; whoever uses what such a run says compares it with a run on all rows
(bind_rows.py, certify.py). A model that holds its data in another way (a closure) fails here or gives other sites, and
is then looked at whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_em.model.capture import Capture
from pyro_em.model.trace import Run, SiteRecord

MANY = 2**14  # rows of a plate above which a model is looked at on few of them
FEW = 509  # prime: hardly the size of anything else


@dataclass(frozen=True)
class Rows:
    """A plate, its size, and the rows of it that are looked at, (n,)."""

    plate: str
    size: int
    index: Tensor

    def cut(self, x: Any) -> Any:
        """Of an argument of the model: tensors as long as the plate in one dim, within lists, tuples and dicts.

        :raises ValueError: if two dims of a tensor are as long as the plate.
        """
        if isinstance(x, Tensor):
            dims = [i for i, size in enumerate(x.shape) if size == self.size]
            if len(dims) > 1:
                raise ValueError("which dim is the plate's cannot be told")
            return x.index_select(dims[0], self.index.to(x.device)) if dims else x
        if type(x) in (list, tuple):
            return type(x)([self.cut(y) for y in x])
        return {key: self.cut(y) for key, y in x.items()} if type(x) is dict else x

    def cuts(self, x: Any) -> bool:
        """Whether `cut` changes anything."""
        if isinstance(x, Tensor):
            return self.size in x.shape
        own = x.values() if type(x) is dict else x if type(x) in (list, tuple) else ()
        return any(self.cuts(y) for y in own)

    def dim(self, site: SiteRecord, argument: str, value: Tensor) -> int | None:
        """The plate's dim in an argument, None if it has none."""
        plate = next((p for p in site.plates if p.name == self.plate), None)
        if plate is None or site.family is None:
            return None
        position = value.dim() - site.family.arguments[argument] - site.element_dims + plate.dim
        return position if position >= 0 else None


def few_rows(seen: Capture) -> Rows | None:
    """Rows to look at, if the model has a large plate; spread over it, so that sorted data do not mislead."""
    sizes = {p.name: p.size for site in seen.sites.values() for p in site.plates}
    plate = max(sizes, key=sizes.__getitem__, default=None)
    if plate is None or sizes[plate] <= MANY or seen.loops:
        return None
    others = [size for name, size in sizes.items() if name != plate]
    if sizes[plate] in others or FEW in others:
        return None
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(sizes[plate], (FEW,), generator=generator, device="cpu").sort().values
    return Rows(plate, sizes[plate], index)


def leading_rows(name: str, size: int, count: int) -> Rows:
    """The first rows of a plate."""
    return Rows(name, size, torch.arange(count))


def alike(few: Run, whole: Run, rows: Rows) -> bool:
    """Whether two runs have the same sites, with arguments of the same shapes but for the number of rows."""
    if few.sites.keys() != whole.sites.keys():
        return False
    for name, site in whole.sites.items():
        own = few.sites[name]
        sizes = [len(rows.index) if p.name == rows.plate else p.size for p in site.plates]
        if type(own.family) is not type(site.family) or own.symbols != site.symbols:
            return False
        if [p.size for p in own.plates] != sizes or (own.arguments or {}).keys() != (site.arguments or {}).keys():
            return False
        for argument, value in (site.arguments or {}).items():
            shape, dim = list(value.shape), rows.dim(site, argument, value)
            if dim is not None and shape[dim] == rows.size:
                shape[dim] = len(rows.index)
            if list((own.arguments or {})[argument].shape) != shape:
                return False
    return True
