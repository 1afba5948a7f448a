"""One E-step of short chains in few calls: as long as nothing is looked up.

    b = exp(W Φ),   α, β by band solves (evidence/banded.py),   Σ_t u_t α_{t-1} (b_t ∘ β_t)ᵀ ∘ A,   Σ_t w γ_t Φ_tᵀ

Where the messages would leave the range of floats, b is divided by its largest entry at every step.

Of a chain of 200 steps the arithmetic takes ten microseconds, and every call one: NumPy throughout, over arrays that
are kept. It is one operation of torch, so that a recording (tape/) holds the whole E-step. What this does not do
scan_program.py does in general.

Shapes: K states, T steps, C chains, F features; data in blocks (L, M) as in blocked.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from pyro_em.e_step.base import IMPOSSIBLE
from pyro_em.evidence.banded import LOG_2, Banded, Rate
from pyro_em.evidence.blocked import Scratch, smooth_blocked
from pyro_em.tape.calls import Call, written_by

_LIBRARY = torch.library.Library("pyro_em", "FRAGMENT")
_ALIVE: WeakValueDictionary[int, ChainSums] = WeakValueDictionary()  # operations take numbers, no objects
_NUMBERS = itertools.count()
BARE, SCALED = 0, 1  # b as it is, and divided by the largest of every step
STRIKES = 3  # failures of bare b, after which it is not tried again


@dataclass(frozen=True)
class Weights:
    """w of whole chains, and of each kind of counts: of first states, and u of transitions. None is 1 everywhere."""

    chains: Tensor | None = None  # (C,)
    first: tuple[Tensor | None, ...] = (None,)  # (C,) each
    pairs: tuple[Tensor | None, ...] = (None,)  # (L, M) each, of the transition that leaves a step


class Given(NamedTuple):
    """What an E-step is asked for: initial distributions (K, C or 1), A, W, log-densities (K, places) besides W Φ."""

    initial: np.ndarray
    table: np.ndarray
    w: np.ndarray
    differences: np.ndarray | None


class ChainSums:
    """An E-step of chains as one operation. Φ (F, places), zero where there is padding; `base` (C,) are sums of log
    base measures. `into` is what a subclass adds."""

    def __init__(self, phi: Tensor, base: Tensor, states: int, weights: Weights, padding: Tensor | None) -> None:
        self.base, self.states = base.numpy(), states
        self.number = next(_NUMBERS)
        _ALIVE[self.number] = self
        self.phi, self.padding = phi.numpy(), padding
        self.chain_weights = None if weights.chains is None else weights.chains.double().numpy()
        self.first_weights = [None if w is None else w.double().numpy() for w in weights.first]
        self.pair_weights = [None if w is None else w.double().reshape(-1).numpy() for w in weights.pairs]

    def smooth(
        self, initial: Tensor, table: Tensor, w: Tensor, differences: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """(Σ ll, Σ |ll|), expected first states (kinds, K) and transitions (kinds, K, K), sums of features (K, F); None
        if the messages leave the range of floats or some row is impossible.

        :param differences: log-densities (K, places) of what W leaves out.
        """
        if differences is not None and self.padding is not None:
            differences = differences.masked_fill(self.padding, 0.0)
        found = torch.ops.pyro_em.short_chains(self.number, initial, table, w, differences)
        evidence, first, pairs, totals, held = found
        return (evidence, first, pairs, totals.mT) if bool(held) else None

    def outputs(self) -> list[Tensor]:
        """Memory for what `into` writes."""
        K = self.states
        shapes = [(2,), (len(self.first_weights), K), (len(self.pair_weights), K, K), (len(self.phi), K)]
        return [*(torch.empty(shape, dtype=torch.float64) for shape in shapes), torch.empty((), dtype=torch.bool)]

    def into(self, outputs: Sequence[np.ndarray], given: Given) -> None:
        """`smooth` from and to arrays (what is read together side by side), the last of which says whether the others
        hold."""
        raise NotImplementedError


class Short(ChainSums):
    """Of chains that are short, all at once; Φ (F, L·M)."""

    def __init__(
        self, banded: Banded, phi: Tensor, base: Tensor, states: int, weights: Weights, padding: Tensor | None
    ) -> None:
        super().__init__(phi, base, states, weights, padding)
        blocks = banded.blocks
        self.banded = banded
        shape = blocks.length, blocks.columns
        self._phi, self._scale = self.phi.reshape(-1, *shape).transpose(1, 0, 2), np.empty(shape)
        scales = self._scale.reshape(blocks.length, blocks.chains, blocks.per_chain)
        one = blocks.chains == 1  # one dim takes less time
        self._scales: np.ndarray = self._scale.reshape(-1, 1) if one else scales
        self._axes: int | tuple[int, int] = 0 if one else (0, 2)
        self._at_first = banded.states[0, :, :: blocks.per_chain]
        self._columns = None if self.chain_weights is None else np.repeat(self.chain_weights, blocks.per_chain)
        self._rates: list[Rate | None] = [None, banded.rate]
        self._strikes, self._nothing, self._once = 0, np.zeros(blocks.chains), np.ones(blocks.chains)

    def into(self, outputs: Sequence[np.ndarray], given: Given) -> None:
        evidence, first, pairs, totals, held = outputs
        held[...] = False
        if not self._smoothed(given, evidence):
            return
        for weight, out in zip(self.pair_weights, pairs, strict=True):
            own = self.banded.pairs(None if weight is None else weight.reshape(self._scale.shape))
            np.multiply(own, given.table, out)
        for weight, out in zip(self.first_weights, first, strict=True):
            np.dot(self._at_first, self._once if weight is None else weight, out)
        if self._columns is not None:
            self.banded.states *= self._columns
        np.copyto(totals, self.banded.moments(self._phi))
        held[...] = True

    def _smoothed(self, given: Given, evidence: np.ndarray) -> bool:
        """Posteriors by bare b if that holds, which one call does not find out for the next."""
        if self._rates[BARE] is not None:
            if self._run(BARE, given, evidence):
                return True
            self._rates[BARE], self._strikes = None, self._strikes + 1
        held = self._run(SCALED, given, evidence) or (self._measured(given) and self._run(SCALED, given, evidence))
        if not held:
            return False
        if self._strikes < STRIKES:
            self.banded.set_rate(self._level)
            self._rates[BARE] = self.banded.rate
            if not self._run(BARE, given, evidence):
                self._rates[BARE], self._strikes = None, STRIKES
                return self._run(SCALED, given, evidence)
        return True

    def _measured(self, given: Given) -> bool:
        """Find the rate at which scaled b may hold, if there is another one than that known."""
        banded, before = self.banded, self._rates[SCALED]
        if self._likelihood(SCALED, given) is None:
            return False
        arrays = (given.initial, given.table, banded.likelihood)
        start, table, b = (torch.from_numpy(np.ascontiguousarray(x)) for x in arrays)
        found = smooth_blocked(start, table, b, banded.blocks, Scratch())
        if found is None:
            return False
        banded.set_rate(float(found.log_scale.mean()) / banded.blocks.steps)
        self._rates[SCALED] = banded.rate
        return before is None or banded.rate.units != before.units

    def _run(self, kind: int, given: Given, evidence: np.ndarray) -> bool:
        scales, banded = self._likelihood(kind, given), self.banded
        banded.rate = self._rates[kind]  # type: ignore[assignment]
        total = None if scales is None else banded.messages(given.initial, given.table)
        if total is None or scales is None:
            return False
        self._read(total, scales, evidence)
        self._rates[kind] = banded.rate
        return True

    def _likelihood(self, kind: int, given: Given) -> np.ndarray | None:
        """b, and sums of the logs of its scales by chain; None if no state of some row is possible."""
        density, scales = self.banded.given, self._nothing
        np.matmul(given.w, self._phi, density)  # results by position, as names cost time
        if given.differences is not None:
            likelihood = self.banded.likelihood
            np.add(likelihood, given.differences.reshape(likelihood.shape), likelihood)
        if kind == SCALED:
            np.maximum.reduce(density, 1, out=self._scale)
            np.subtract(density, self._scale[:, None], density)
            scales = np.add.reduce(self._scales, self._axes)
            if not min(scales.tolist()) > 0.1 * IMPOSSIBLE:
                return None
        np.exp(density, density)
        return scales

    def _read(self, total: np.ndarray, scales: np.ndarray, evidence: np.ndarray) -> None:
        """Σ w ll and Σ |w ll|, and the level of a step; of one chain without a call of NumPy."""
        banded = self.banded
        C, T = banded.blocks.chains, banded.blocks.steps
        if C == 1 and self.chain_weights is None:
            mantissa, exponent = math.frexp(total[0])
            log_scale = math.log(mantissa) + (exponent + banded.rate.shift) * LOG_2
            banded.set_rate(log_scale / T)
            own = log_scale + float(scales[0])
            self._level = own / T
            evidence[0] = own = own + float(self.base[0])
            evidence[1] = abs(own)
            return
        mantissas, exponents = np.frexp(total)
        log_scales = np.log(mantissas) + (exponents + banded.rate.shift) * LOG_2
        banded.set_rate(float(log_scales.mean()) / T)
        log_scales += scales
        self._level = float(log_scales.mean()) / T
        log_scales += self.base
        if self.chain_weights is not None:
            log_scales *= self.chain_weights
        evidence[0] = log_scales.sum()
        evidence[1] = np.absolute(log_scales).sum()


def _short_chains(
    number: int, initial: Tensor, table: Tensor, w: Tensor, differences: Tensor | None
) -> tuple[Tensor, ...]:
    own = _ALIVE[number]
    outputs = own.outputs()
    extra = None if differences is None else differences.numpy()
    with np.errstate(all="ignore"):  # as replays do; what is not a number does not hold
        own.into([x.numpy() for x in outputs], Given(initial.numpy(), table.numpy(), w.numpy(), extra))
    return tuple(outputs)


_RESULTS = ", ".join(["Tensor"] * 5)
_ARGUMENTS = "int number, Tensor initial, Tensor table, Tensor w, Tensor? differences"
_LIBRARY.define(f"short_chains({_ARGUMENTS}) -> ({_RESULTS})")
_LIBRARY.impl("short_chains", _short_chains, "CPU")


@written_by(torch.ops.pyro_em.short_chains.default)
def _replayed(arguments: Sequence[Any], outputs: Sequence[np.ndarray]) -> Call:
    number, *arrays = arguments
    return partial(_ALIVE[number].into, outputs, Given(*arrays))
