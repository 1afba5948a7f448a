"""Families of linear-Gaussian chains: log-evidence of a batch of them, and weighted moments of their sites.

Of many chains that share all of their arguments one Riccati recursion serves all. The states of a discrete latent may
choose the arguments of a system: with arguments (K, 1) and data (N,) the batch has K·N chains, but K sets of
covariances. A *cell* is one entry of the dims along which some argument differs; where cells are few, each is looked at
by itself and their moments are put together, summed where a site's own arguments do not differ.

Weights that depend on the log-evidence (posterior weights of the discrete latent) come in two stages: `posterior` gives
the evidence, and a function from weights to moments.

Shapes: batch dims B, cells along some of them; S chains of a cell in a row.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from pyro_em.families.base import Arguments
from pyro_em.families.linear_sites import LinearSites
from pyro_em.shapes import broadcast_shapes
from pyro_em.state_space.linear_gaussian import LinearMoments

FEWER = 2  # chains for every cell from which on cells are looked at one by one
Made = Mapping[str, LinearMoments]  # by site of the chain


class Part(Protocol):
    """Some of the chains, S in a row."""

    def evidence(self) -> Tensor:
        """log p(y) of every chain, (S,)."""
        ...

    def moments(self, w: Tensor) -> tuple[Tensor, Made]:
        """The same, and moments weighted by w (S,), summed over chains and steps along which arguments are the same.

        Leading dims: 1 (or the batch, where a site's arguments differ along it), then time.
        """
        ...


@dataclass(frozen=True)
class Cells:
    """The cells of one batch. `dims` (negative) are those along which arguments differ, `sizes` their sizes."""

    batch: torch.Size
    dims: tuple[int, ...]
    sizes: tuple[int, ...]

    @staticmethod
    def of(batch: torch.Size, leads: Sequence[torch.Size]) -> Cells:
        """:param leads: batch dims of every argument, right aligned."""
        dims = tuple(d for d in range(-len(batch), 0) if any(-d <= len(s) and s[d] > 1 for s in leads))
        return Cells(batch, dims, tuple(batch[d] for d in dims))

    def __len__(self) -> int:
        return torch.Size(self.sizes).numel()

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return itertools.product(*(range(size) for size in self.sizes))

    def cut(self, x: Tensor, rest: int, at: Sequence[int]) -> Tensor:
        """One cell of a tensor with `rest` dims behind those of the batch; its dims stay, with size 1."""
        for d, i in zip(self.dims, at, strict=True):
            if x.dim() - rest >= -d and x.shape[d - rest] > 1:
                x = x.narrow(d - rest, i, 1)
        return x

    def put(self, parts: Sequence[Tensor]) -> Tensor:
        """A tensor over the batch from those of its cells in order."""
        shape = [1 if d in self.dims else self.batch[d] for d in range(-len(self.batch), 0)]
        parts = [part.reshape(shape) for part in parts]
        for d, size in reversed(list(zip(self.dims, self.sizes, strict=True))):
            parts = [torch.cat(list(parts[i : i + size]), d) for i in range(0, len(parts), size)]
        return parts[0]

    def joined(self, parts: Sequence[LinearMoments], leads: Sequence[torch.Size]) -> LinearMoments:
        """Moments of a site, summed over the dims along which its own arguments (batch dims `leads`) do not differ.

        `parts` are those of the cells, (1, T') + event each.
        """
        own = Cells.of(self.batch, leads).dims
        gone = [i for i, d in enumerate(self.dims) if d not in own]
        lead = [self.batch[d] if d in own else 1 for d in range(-len(self.batch), 0)]

        def of(cells: Sequence[Tensor]) -> Tensor:
            wide = torch.stack([x[0] for x in cells]).reshape(*self.sizes, *cells[0].shape[1:])
            return (wide.sum(gone) if gone else wide).reshape(*lead, *cells[0].shape[1:])

        return LinearMoments(*(of(own) for own in zip(*(vars(p).values() for p in parts), strict=True)))


class ChainFamily(LinearSites):
    """A family whose sites are linear-Gaussian chains."""

    integrates = True
    steps_before: ClassVar[int] = 0  # states before that of the first observation

    @abstractmethod
    def lead(self, name: str, argument: Tensor) -> torch.Size:
        """Batch dims of an argument."""

    @abstractmethod
    def part(self, args: Arguments, value: Tensor) -> Part:
        """All of a batch."""

    @abstractmethod
    def packed(self, args: Arguments, made: Made) -> tuple[Tensor, ...]:
        """Moments as `kernel` and the others read them."""

    def posterior_moments(self, args: Arguments, value: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        cells, parts = self._parts(args, value)
        found = [part.moments(w) for part, w in zip(parts, _weights(cells, weight, len(parts)), strict=True)]
        made = self._joined(args, cells, [own for _, own in found])
        return cells.put([evidence for evidence, _ in found]), self.packed(args, made)

    def posterior(self, args: Arguments, value: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
        cells, parts = self._parts(args, value)

        def moments(weight: Tensor) -> tuple[Tensor, ...]:
            weights = _weights(cells, weight, len(parts))
            found = [part.moments(w)[1] for part, w in zip(parts, weights, strict=True)]
            return self.packed(args, self._joined(args, cells, found))

        return cells.put([part.evidence() for part in parts]), moments

    def _parts(self, args: Arguments, value: Tensor) -> tuple[Cells, list[Part]]:
        own = {n: x for n, x in args.items() if n in self.arguments and isinstance(x, Tensor)}
        leads = {n: self.lead(n, x) for n, x in own.items()}
        batch = broadcast_shapes(value.shape[:-2], *leads.values())
        cells = Cells.of(batch, list(leads.values()))
        if len(cells) == 1 or FEWER * len(cells) > batch.numel():
            return Cells(batch, (), ()), [self.part(args, value)]
        parts = []
        for at in cells:
            cut = {n: cells.cut(x, x.dim() - len(leads[n]), at) for n, x in own.items()}
            parts.append(self.part({**args, **cut}, cells.cut(value, 2, at)))
        return cells, parts

    def _joined(self, args: Arguments, cells: Cells, made: Sequence[Made]) -> Made:
        if not cells.dims:
            return made[0]
        leads: dict[str, list[torch.Size]] = {site: [] for site in made[0]}
        for name in self.arguments:
            if isinstance(args.get(name), Tensor):
                leads[self.belongs(name)[0]].append(self.lead(name, args[name]))
        return {site: cells.joined([own[site] for own in made], leads[site]) for site in made[0]}


def _weights(cells: Cells, weight: Tensor, parts: int) -> list[Tensor]:
    """Of the chains of every part in a row."""
    w = weight.double().expand(cells.batch)
    return [cells.cut(w, 0, at).reshape(-1) for at in cells] if parts > 1 else [w.reshape(-1)]
