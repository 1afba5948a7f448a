"""Time in its own dim at every site of a loop's body, also beside and between plates that other sites have.

The steps that are run together are a plate left of all others of the loop (timeline.py), at dim -1 - D where plates
inside of it reach to dim -D. What a model indexes by the step has time as its first dim, x[t] of shape (S, rest), and
`rest` has as many dims as the site has plates, which may be fewer than D:

    x[t] (S,)  beside a plate of M     ->  (S, 1)         y[t] (S, M)  in it: as it is

So at a site whose value, arguments or masks have a dim of S elements right of time's, where none of the site's plates
has that size, and none at time's place, that dim is time and is moved there. Each step by itself is certified to say
the same (certify_loops.py), so that a dim of that size which is not time is refused there.

It is done before any plate sees the site, so that a number for each step may stand in a plate, too. Handed back to the
model is what it gave, and of a discrete latent that is drawn (nothing enumerated) one draw for all steps, so that time
has size 1 as in enumerated states, and meets only what it should. Not handled, and refused where it is seen: tensors in
which the model itself has joined time with the dim of a plate; distributions whose arguments are not seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_em.errors import Refusal
from pyro_em.model import compat


@contextlib.contextmanager
def time_in_place(steps: int, dim: int) -> Iterator[None]:
    """Within this context, the body of a loop whose `steps` are run together at `dim`, sites have time there."""

    def place(msg: Any) -> Callable[[Tensor], Tensor] | None:
        fn, value = msg["fn"], msg["value"]
        if poutine.util.site_is_subsample(msg) or not hasattr(fn, "event_dim"):
            return None
        move = _Move(msg["name"], steps, dim)
        msg["fn"] = move.distribution(fn, 0)
        moved = move(value, fn.event_dim) if isinstance(value, Tensor) else value
        if moved is value:
            return None
        msg["value"] = moved
        # Handlers may have changed the value (to NaN where it is missing).
        return lambda after: value if after is moved else move.back(after, value, fn.event_dim)

    with compat.before_handlers(place), _Within(steps, dim):
        yield


class _Within(Messenger):
    """What is known only after the handlers of the body have seen a site: its masks, and that it is to be drawn."""

    def __init__(self, steps: int, dim: int) -> None:
        super().__init__()
        self.steps, self.dim = steps, dim

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if poutine.util.site_is_subsample(msg) or not hasattr(fn, "event_dim"):
            return
        if isinstance(msg["mask"], Tensor):
            msg["mask"] = _Move(msg["name"], self.steps, self.dim)(msg["mask"], 0)
        if msg["value"] is None and fn.has_enumerate_support and not compat.enumerating():
            msg["value"] = self._drawn(fn)

    def _drawn(self, fn: Any) -> Tensor:
        """A draw for every element of the plates, the same at all steps."""
        shape = [1] * (-self.dim - len(fn.batch_shape)) + list(fn.batch_shape)
        for dim, size in compat.plates_around().items():
            if dim != self.dim:
                shape = [1] * (-dim - len(shape)) + shape
                shape[dim] = size
        value: Tensor = fn.expand(torch.Size(shape)).sample()
        return value.narrow(self.dim - fn.event_dim, 0, 1)


class _Move:
    """Moves time to its dim at one site; see the module docstring. `sizes` are those of the open plates by dim."""

    def __init__(self, site: str, steps: int, dim: int) -> None:
        self.site, self.steps, self.dim, self.sizes = site, steps, dim, compat.plates_around()

    def __call__(self, x: Tensor, trailing: int) -> Tensor:
        """`x` with time in its place; `trailing` dims stand right of those of the plates."""
        batch = x.shape[: x.dim() - trailing]
        where = self._misplaced(batch)
        if where is None:
            return x
        x = x.reshape((1,) * (-self.dim - len(batch)) + tuple(x.shape))
        return x.transpose(where - trailing, self.dim - trailing)

    def back(self, x: Tensor, like: Tensor, trailing: int) -> Tensor:
        """The inverse of moving `like`, for another tensor of the shape that came out."""
        where = self._misplaced(like.shape[: like.dim() - trailing])
        return x if where is None else x.transpose(where - trailing, self.dim - trailing).reshape(like.shape)

    def _misplaced(self, batch: torch.Size) -> int | None:
        """The dim that is time, None where time is in its place, or not there.

        :raises Refusal: where it is in several.
        """
        if self.steps == 1:  # is in its place wherever it is
            return None
        placed = len(batch) >= -self.dim and batch[self.dim] != 1
        right = range(max(-len(batch), self.dim + 1), 0)
        found = [d for d in right if batch[d] == self.steps != self.sizes.get(d)]
        if len(found) > 1 - placed:
            if len(found) == 1 and batch[self.dim] != self.steps:
                raise Refusal(
                    self.site,
                    f"its shape {tuple(batch)} has time ({self.steps} steps at once) right of a plate's dim.",
                    "time is the first dim of what the step indexes: y.mT[t] for y[:, t].",
                )
            raise Refusal(
                self.site,
                f"its shape {tuple(batch)} has time ({self.steps} steps at once) in several dims.",
                "give what the step indexes a dim of size 1 for each plate in the loop that its site is not in: x[t] "
                "with x of shape (T, 1).",
            )
        return found[0] if found else None

    def distribution(self, fn: Any, trailing: int) -> Any:
        """The distribution with time in its place in all of its arguments and masks."""
        shape = fn.batch_shape
        if self._misplaced(shape[: len(shape) - trailing]) is None:
            return fn
        if isinstance(fn, dist.Independent):
            dims = fn.reinterpreted_batch_ndims
            return dist.Independent(self.distribution(fn.base_dist, trailing + dims), dims)
        if isinstance(fn, dist.MaskedDistribution):
            mask = fn._mask
            mask = self(mask, trailing) if isinstance(mask, Tensor) else mask
            return dist.MaskedDistribution(self.distribution(fn.base_dist, trailing), mask)
        if isinstance(fn, dist.ExpandedDistribution):
            return dist.ExpandedDistribution(self.distribution(fn.base_dist, trailing), self._shape(shape, trailing))
        raw = compat.own_arguments(fn)
        if raw is None:
            return fn
        moved = {name: self._argument(fn, name, value, trailing) for name, value in raw.items()}
        return type(fn)(**moved, validate_args=False).expand(self._shape(shape, trailing))

    def _argument(self, fn: Any, name: str, value: Any, trailing: int) -> Any:
        if isinstance(value, torch.distributions.Distribution):  # the parts of a mixture have one dim more
            return self.distribution(value, trailing + max(0, len(value.batch_shape) - len(fn.batch_shape)))
        if not isinstance(value, Tensor):
            return value
        constraint = fn.arg_constraints.get(name)
        return self(value, trailing + (0 if constraint is None else constraint.event_dim))

    def _shape(self, shape: torch.Size, trailing: int) -> torch.Size:
        return self(torch.zeros(()).expand(shape), trailing).shape
