"""The feature matrix Φ of a component's data: one column per row of data, feature-major, built in chunks.

Row 0 is all ones; then, site by site, the entries of its sufficient statistics at each position (inner
plates and `.to_event` elements). What is stored are the *raw* rows (x itself, one-hot rows); squares and
products are formed chunk by chunk, so that memory is bounded by the chunk. A small Φ is kept whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.device import chunk_scale

KEEP_BYTES = 48 * 2**20  # a Φ no larger than this is built once
CHUNK_BYTES = 4_600_000  # of Φ; the caches that matter hold about this much


@dataclass(frozen=True)
class Part:
    """One sufficient statistic of a site: "raw" rows, or "square" / "outer" products of the part before it.

    `raw` is (positions · width, N) for "raw"; "outer" has x_i x_j for i <= j. Products are None, if they are not sums.
    """

    kind: str
    width: int
    raw: Tensor | None

    @property
    def num_rows(self) -> int:
        return self.width * (self.width + 1) // 2 if self.kind == "outer" else self.width


@dataclass(frozen=True)
class Block:
    """All features of one site. `flags` (positions, N), if given, are 0/1 rows of masked data: every statistic
    was multiplied by them, and they count the data in place of the ones. With `complement` the last entry of a
    position's statistics is left out, as they sum to one (indicators of categories, x and 1 - x of a trial). Where rows
    are groups of data (nested_rows.py) `flags` count these, and `within` is the scatter around the mean of each."""

    positions: int
    parts: tuple[Part, ...]
    flags: Tensor | None
    codes: Tensor | None  # (q, N) integers that determine the column, for discrete data
    complement: bool = False
    within: Tensor | None = None

    @property
    def num_features(self) -> int:
        count = sum(part.num_rows for part in self.parts) + (0 if self.flags is None else 1)
        return self.positions * count

    def fill(self, out: Tensor, begin: int, end: int) -> None:
        """Write the features of rows begin..end into `out` (num_features, end - begin)."""
        row, previous = 0, out
        for part in self.parts:
            own = out[row : row + self.positions * part.num_rows]
            row += len(own)
            if part.raw is not None:
                own.copy_(part.raw[:, begin:end])
                previous = own
            elif part.kind == "square":
                torch.mul(previous, previous, out=own)
            else:
                _outer(previous, own, self.positions, part.width)
        if self.flags is not None:
            out[row:].copy_(self.flags[:, begin:end])

    def value(self, part: int, end: int, event_dim: int, one_hot: bool) -> Tensor:
        """The first rows of (centered) data in the family's own form, (1, positions, end) + event."""
        raw = self.parts[part].raw
        assert raw is not None
        x = raw[:, :end].reshape(self.positions, -1, end).transpose(1, 2).unsqueeze(0)
        if one_hot:
            return torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1).argmax(-1) if self.complement else x.argmax(-1)
        return x.double() if event_dim else x.squeeze(-1).double()

    def take(self, columns: Tensor) -> Block:
        """The block of some columns of the data."""
        parts = tuple(
            Part(p.kind, p.width, None if p.raw is None else p.raw[:, columns].contiguous()) for p in self.parts
        )
        flags = None if self.flags is None else self.flags[:, columns].contiguous()
        return Block(self.positions, parts, flags, None, self.complement)


def _outer(x: Tensor, out: Tensor, positions: int, width: int) -> None:
    row = 0
    for position in range(positions):
        own = x[position * width : (position + 1) * width]
        for i in range(width):
            torch.mul(own[i:], own[i], out=out[row : row + width - i])
            row += width - i


class Features:
    """Φ over all blocks, in chunks of `chunk` rows, `max_chunk` at most. A small Φ is kept, each chunk in one piece of
    memory, as the columns of a wide matrix are not."""

    def __init__(self, blocks: list[Block], num_rows: int, max_chunk: int, dtype: torch.dtype = torch.float64) -> None:
        self.blocks, self.num_rows, self.max_chunk, self.dtype = blocks, num_rows, max_chunk, dtype
        self.num_features = 1 + sum(block.num_features for block in blocks)
        size = dtype.itemsize * self.num_features
        self._buffer = torch.empty(0, dtype=dtype)
        larger = chunk_scale(self._buffer.device)
        # Of 256 rows at least: below that the overhead of a call outweighs the cache.
        self.chunk = min(num_rows, max(256, min(max_chunk, 2 ** int(math.log2(larger * CHUNK_BYTES / size)))))
        self._kept: list[Tensor] = []
        self._buffer.resize_(self.num_features * self.chunk)
        if size * num_rows <= larger * KEEP_BYTES:
            self._kept = [self._filled(begin).clone() for begin in range(0, num_rows, self.chunk)]
            del self._buffer
        _, first = next(self.chunks())
        self.rms = (first * first).mean(1, dtype=torch.float64).sqrt()  # of every feature, from the first chunk

    def _filled(self, begin: int) -> Tensor:
        end = min(begin + self.chunk, self.num_rows)
        out = self._buffer[: self.num_features * (end - begin)].view(self.num_features, end - begin)
        out[0].fill_(1.0)
        row = 1
        for block in self.blocks:
            block.fill(out[row : row + block.num_features], begin, end)
            row += block.num_features
        return out

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """The first row of every chunk, and its Φ (num_features, n), valid until the next one is asked for."""
        for place, begin in enumerate(range(0, self.num_rows, self.chunk)):
            yield begin, self._kept[place] if self._kept else self._filled(begin)
