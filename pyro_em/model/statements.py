"""The sample statements of a chain of Gaussian states in one run, with time, plates and cells in one layout.

A *step* of the chain has latent statements (level, slope, ...) and observed ones. Whatever plates and event dims a
statement has besides the plates that all of them share are cells of one vector, so that every location, noise and
value gets the layout B + (time,) + (cells,): B the shared plates (size 1 where there is none), time 1 unless the
statement stands for many steps at once (timeline.py). Where discrete latents are enumerated, their dims stand left of
all plates: locations and noises keep those that they have, in front of B, which then has a dim for every plate of the
model; values have none.

Handed to the model in the place of a latent is a leaf in that layout; how locations move with the leaves is the
chain (folding.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops.provenance import detach_provenance
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_em.distributions import IncompleteNormal
from pyro_em.model import compat
from pyro_em.model.flat import is_flat
from pyro_em.model.trace import combined_masks

NORMAL, VECTOR = (dist.Normal,), (dist.MultivariateNormal, IncompleteNormal)
OUTSIDE = -1  # step of what is sampled before the loop


class NotFolded(Exception):
    """The statements are no chain of the kind that is folded; the text is the reason."""


@dataclass(frozen=True)
class Layout:
    """Where a statement's dims go: `order` of its dims in plates and its event dims, `sizes` of them in that order.

    `depth` of its dims are of plates, of which the model's may have `nesting`.
    """

    order: tuple[int, ...]
    sizes: tuple[int, ...]
    lead: tuple[int, ...]  # B
    time: int
    depth: int
    nesting: int

    @staticmethod
    def of(batch: torch.Size, event: torch.Size, shared: Mapping[int, int], time: int | None, nesting: int) -> Layout:
        """:param shared: size of every shared plate by its dim; :param time: dim of the plate over steps."""
        r = len(batch)
        front = [d + r for d in sorted(shared)]
        middle = [] if time is None else [time + r]
        rest = [i for i in range(r + len(event)) if i not in front and i not in middle]
        full = (*batch, *event)
        order = (*front, *middle, *rest)
        lead = tuple(shared.get(d, 1) for d in range(min(shared, default=0), 0))
        steps = 1 if time is None else batch[time + r]
        return Layout(order, tuple(full[i] for i in order), lead, steps, r, nesting)

    def lay(self, x: Tensor) -> Tensor:
        """B + (time, cells) of a tensor that broadcasts to batch + event, its dims of enumerated states in front."""
        extra = max(0, x.dim() - len(self.order))
        states = x.shape[: max(0, extra - (self.nesting - self.depth))]
        full = x.reshape([*states, *x.shape[extra:]])
        full = full.expand([*states, *(self.sizes[self.order.index(i)] for i in range(len(self.order)))])
        moved = full.permute([*range(len(states)), *(len(states) + i for i in self.order)])
        between = (1,) * (self.nesting - len(self.lead)) if states else ()
        return moved.reshape(*states, *between, *self.lead, self.time, -1)

    def back(self, x: Tensor) -> Tensor:
        """The inverse of `lay`, for any dims before B."""
        more = x.dim() - len(self.lead) - 2
        inverse = [more + self.order.index(i) for i in range(len(self.order))]
        return x.reshape([*x.shape[:more], *self.sizes]).permute([*range(more), *inverse])

    @property
    def cells(self) -> int:
        """Cells of one step."""
        return torch.Size(self.sizes).numel() // (torch.Size(self.lead).numel() * self.time)


@dataclass(frozen=True)
class Statement:
    """One sample statement. `location` and `value` are laid out, `noise` is the raw argument `kind`, laid out too."""

    name: str
    latent: bool
    step: int
    layout: Layout
    timed: bool
    location: Tensor
    kind: str
    noise: Tensor
    value: Tensor  # of latents the leaf
    scale: Any
    frames: tuple[Any, ...]
    event: torch.Size
    flat: bool = False  # of density 1; location and noise are then 0
    copy_of: str = ""  # a latent from before the loop that it repeats (still.py)


ValueOf = Callable[[str, tuple[int, ...], torch.dtype], Tensor]


class Collect(Messenger):
    """Take the statements `names` out of a run and note what they say; the innermost handler but those of the model.

    :param shared: names of the plates that all statements share.
    :param value_of: the leaf of a latent, by name, shape and dtype.
    :param nesting: dims that plates may have; those left of them are of enumerated states.
    """

    def __init__(self, names: frozenset[str], shared: frozenset[str], value_of: ValueOf, nesting: int) -> None:
        super().__init__()
        self.names, self.shared, self.value_of, self.nesting = names, shared, value_of, nesting
        self.statements: list[Statement] = []
        self._loop: int | None = None

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.names or poutine.util.site_is_subsample(msg):
            return
        self.statements.append(self._statement(msg))
        own = self.statements[-1]
        if own.latent:
            msg["value"] = own.layout.back(own.value)
        compat.forgotten_in_markov(msg["name"])  # or what enumerates the loop's other latents would look for it
        msg["done"] = msg["stop"] = True  # handlers further out see the chain instead

    def _statement(self, msg: Any) -> Statement:
        fn, name = msg["fn"], msg["name"]
        base, raw = compat.base_distribution(fn), compat.raw_arguments(fn)
        flat = not msg["is_observed"] and is_flat(fn)
        if flat:
            base, raw = _flat_normal(name, fn)
        if raw is None or type(base) not in (*NORMAL, *VECTOR) or "loc" not in raw:
            raise NotFolded(f"'{name}' is {type(base).__name__}")
        frames = tuple(f for f in msg["cond_indep_stack"] if f.vectorized)
        shared = {f.dim: f.size for f in frames if f.name in self.shared}
        time = next((f.dim for f in frames if f.name.startswith("markov_") and f.name not in self.shared), None)
        event = torch.Size(fn.event_shape)
        batch = _in_plates(name, torch.Size(fn.batch_shape), self.nesting, frames)
        layout = Layout.of(batch, event, shared, time, self.nesting)
        loc = _tensor(raw["loc"])
        kind, noise = self._noise(name, base, raw, layout, batch, shared, time)
        if msg["is_observed"]:
            value = _in_one_state(name, _with_gaps(msg["value"].double(), fn, msg["mask"]), len(layout.order))
            value = layout.lay(value)
        else:
            value = self.value_of(name, (*layout.lead, layout.time, layout.cells), _dtype(msg, loc))
        return Statement(
            name, not msg["is_observed"], self._step(name), layout, time is not None, layout.lay(loc.double()),
            kind, noise, value, msg["scale"], tuple(f for f in frames if f.name in self.shared),
            event, flat,
        )  # fmt: skip

    def _step(self, name: str) -> int:
        try:
            found = compat.markov_step()
        except ValueError as error:
            raise NotFolded(f"'{name}' lies in loops inside of one another") from error
        if found is None:
            return OUTSIDE
        if self._loop not in (None, found[0]):
            raise NotFolded(f"'{name}' lies in another loop")
        self._loop = found[0]
        return found[1]

    def _noise(
        self, name: str, base: Any, raw: Mapping[str, Any], layout: Layout, batch: torch.Size, shared: Any, time: Any
    ) -> tuple[str, Tensor]:
        if type(base) in NORMAL:
            return "scale", layout.lay(_tensor(raw.get("scale", 1.0)).double())
        kind = next(n for n in ("covariance_matrix", "scale_tril", "precision_matrix") if n in raw)
        size = base.event_shape[-1]
        if layout.cells != size:
            raise NotFolded(f"'{name}' is several normal vectors a step")
        square = Layout.of(batch, torch.Size((size, size)), shared, time, self.nesting)
        return kind, square.lay(_tensor(raw[kind]).double()).unflatten(-1, (size, size))


def _flat_normal(name: str, fn: Any) -> tuple[Any, dict[str, Any]]:
    """A flat density as a normal one of which location and noise are 0: what is not so is said apart."""
    zero = torch.zeros(tuple(fn.batch_shape) + tuple(fn.event_shape))
    if not bool(torch.as_tensor(fn.support.check(zero - 1.5)).all()):
        raise NotFolded(f"'{name}' is bounded")
    return dist.Normal(zero, 1.0), {"loc": zero, "scale": zero}


def _tensor(x: Any) -> Tensor:
    x = detach_provenance(x)
    return x if isinstance(x, Tensor) else torch.as_tensor(x, dtype=torch.get_default_dtype())


def _dtype(msg: Any, loc: Tensor) -> torch.dtype:
    return loc.dtype if loc.is_floating_point() else torch.get_default_dtype()


def _in_plates(name: str, batch: torch.Size, nesting: int, frames: Sequence[Any]) -> torch.Size:
    """Batch dims without those of enumerated states, which lie left of `nesting` dims that plates may have."""
    if len(batch) <= nesting:
        return batch
    depth = max((-frame.dim for frame in frames), default=0)
    if any(size > 1 for size in batch[len(batch) - nesting : len(batch) - depth]):
        raise NotFolded(f"'{name}' has dims that belong to no plate")
    return batch[len(batch) - depth :]


def _in_one_state(name: str, value: Tensor, dims: int) -> Tensor:
    """An observation without dims of enumerated states, which masks of distributions may give it."""
    while value.dim() > dims:
        first = value[:1]
        if not torch.equal(first.nan_to_num(torch.inf).expand_as(value), value.nan_to_num(torch.inf)):
            raise NotFolded(f"what is seen of '{name}' depends on a discrete latent")
        value = first.squeeze(0)
    return value


def _with_gaps(value: Tensor, fn: Any, mask: Any) -> Tensor:
    """The observation with NaN where it is masked."""
    value = detach_provenance(value)
    batch, element = combined_masks(fn, detach_provenance(mask))
    keep = torch.ones((), dtype=torch.bool)
    if batch is not None:
        keep = detach_provenance(batch).reshape(batch.shape + (1,) * fn.event_dim)
    if element is not None:
        base = compat.base_distribution(fn).event_dim
        keep = keep & detach_provenance(element).reshape(element.shape + (1,) * base)
    return torch.where(keep, value, torch.nan)
