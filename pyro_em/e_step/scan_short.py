"""One E-step of short chains in few calls: as long as nothing is looked up.

    b = exp(W Φ - max),   α, β by band solves (evidence/banded.py),   Σ_t u_t α_{t-1} (b_t ∘ β_t)ᵀ ∘ A,   Σ_t w γ_t Φ_tᵀ

Of a chain of 200 steps the arithmetic takes ten microseconds, and every call one: NumPy throughout, over arrays that
are kept. It is one operation of torch, so that a recording (tape/) holds the whole E-step. What this does not do
scan_program.py does in general.

Shapes: K states, T steps, C chains, F features; data in the order of chains, then steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from pyro_em.e_step.base import IMPOSSIBLE
from pyro_em.evidence.banded import LOG_2, Banded
from pyro_em.tape.calls import Call, written_by

_LIBRARY = torch.library.Library("pyro_em", "FRAGMENT")
_ALIVE: WeakValueDictionary[int, Short] = WeakValueDictionary()  # operations take numbers, no objects
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Weights:
    """w of whole chains, and of each kind of counts: of first states, and u of transitions. None is 1 everywhere."""

    chains: Tensor | None = None  # (C,)
    first: tuple[Tensor | None, ...] = (None,)  # (C,) each
    pairs: tuple[Tensor | None, ...] = (None,)  # (T, C) each, of the transition that leaves a step


class Short:
    """Φ (F, T·C), in the order of steps, then chains, with its arrays; `base` (C,) are sums of log base measures."""

    def __init__(self, banded: Banded, phi: Tensor, base: Tensor, states: int, weights: Weights) -> None:
        T, C = banded.blocks.steps, banded.blocks.chains
        self.banded, self.base, self.sizes = banded, base.numpy(), (states, T, C)
        self.number = next(_NUMBERS)
        _ALIVE[self.number] = self
        self.phi = np.ascontiguousarray(phi.numpy().reshape(-1, T, C).transpose(0, 2, 1).reshape(-1, C * T))
        self._density, self._scale = np.empty((states, C * T)), np.empty(C * T)
        self._likelihood = self._density.reshape(states, C, T)
        self._states, self._left = banded.states.reshape(-1, states), banded.left.reshape(-1, states)
        self._right = banded.right.reshape(states, -1).T
        self._chains = None if weights.chains is None else weights.chains.double().numpy()
        self._first = [None if w is None else w.double().numpy() for w in weights.first]
        self._pairs = [None if w is None else w.double().mT.contiguous().reshape(-1, 1).numpy() for w in weights.pairs]
        self._weighted = np.empty((C * T, states))

    def smooth(
        self, initial: Tensor, table: Tensor, w: Tensor, differences: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """(Σ ll, Σ |ll|), expected first states (kinds, K) and transitions (kinds, K, K), sums of features (K, F); None
        if the messages leave the range of floats or some row is impossible.

        :param differences: log-densities (K, T·C) of what W leaves out, in the order of steps, then chains.
        """
        if differences is not None:
            K, T, C = self.sizes
            differences = differences.reshape(K, T, C).transpose(1, 2).reshape(K, -1)
        found = torch.ops.pyro_em.short_chains(self.number, initial, table, w, differences)
        evidence, first, pairs, totals, held = found
        return (evidence, first, pairs, totals.mT) if bool(held) else None

    def outputs(self) -> list[Tensor]:
        """Memory for what `into` writes."""
        K, _, _ = self.sizes
        shapes = [(2,), (len(self._first), K), (len(self._pairs), K, K), (len(self.phi), K)]  # by what is read together
        return [*(torch.empty(shape, dtype=torch.float64) for shape in shapes), torch.empty((), dtype=torch.bool)]

    def into(
        self,
        outputs: Sequence[np.ndarray],
        initial: np.ndarray,
        A: np.ndarray,
        w: np.ndarray,
        differences: np.ndarray | None,
    ) -> None:
        """`smooth` from and to arrays, the last of which says whether the others hold."""
        evidence, first, pairs, totals, held = outputs
        _, T, C = self.sizes
        density, scale = self._density, self._scale
        held[...] = False
        np.dot(w, self.phi, out=density)
        if differences is not None:
            np.add(density, differences, out=density)
        np.maximum.reduce(density, 0, out=scale)
        np.subtract(density, scale, out=density)
        np.exp(density, out=density)
        scales = np.add.reduce(scale.reshape(C, T), 1)
        banded = self.banded
        total = banded.messages(initial, A, self._likelihood) if min(scales.tolist()) > 0.1 * IMPOSSIBLE else None
        if total is None:
            return
        self._read(total, scales, evidence)
        for weight, out in zip(self._pairs, pairs, strict=True):
            left = self._left if weight is None else np.multiply(self._left, weight, out=self._weighted)
            np.dot(left.T, self._right, out=out)
        pairs *= A
        for weight, out in zip(self._first, first, strict=True):
            own = banded.states[:, 0]
            np.add.reduce(own, 0, out=out) if weight is None else np.dot(weight, own, out=out)
        if self._chains is not None:
            banded.states *= self._chains[:, None, None]
        np.dot(self.phi, self._states, out=totals)
        held[...] = True

    def _read(self, total: np.ndarray, scales: np.ndarray, evidence: np.ndarray) -> None:
        """Σ w ll and Σ |w ll|; of one chain without a call of NumPy."""
        banded, (_, T, C) = self.banded, self.sizes
        if C == 1 and self._chains is None:
            mantissa, exponent = math.frexp(total[0])
            log_scale = math.log(mantissa) + (exponent + banded.shift) * LOG_2
            banded.set_rate(log_scale / T)
            evidence[0] = own = log_scale + float(scales[0]) + float(self.base[0])
            evidence[1] = abs(own)
            return
        mantissas, exponents = np.frexp(total)
        log_scales = np.log(mantissas) + (exponents + banded.shift) * LOG_2
        banded.set_rate(float(log_scales.mean()) / T)
        log_scales += scales + self.base
        if self._chains is not None:
            log_scales *= self._chains
        evidence[0] = log_scales.sum()
        evidence[1] = np.absolute(log_scales).sum()


def _short_chains(
    number: int, initial: Tensor, table: Tensor, w: Tensor, differences: Tensor | None
) -> tuple[Tensor, ...]:
    own = _ALIVE[number]
    outputs = own.outputs()
    extra = None if differences is None else differences.numpy()
    own.into([x.numpy() for x in outputs], initial.numpy(), table.numpy(), w.numpy(), extra)
    return tuple(outputs)


_RESULTS = ", ".join(["Tensor"] * 5)
_ARGUMENTS = "int number, Tensor initial, Tensor table, Tensor w, Tensor? differences"
_LIBRARY.define(f"short_chains({_ARGUMENTS}) -> ({_RESULTS})")
_LIBRARY.impl("short_chains", _short_chains, "CPU")


@written_by(torch.ops.pyro_em.short_chains.default)
def _replayed(arguments: Sequence[Any], outputs: Sequence[np.ndarray]) -> Call:
    number, *arrays = arguments
    return partial(_ALIVE[number].into, outputs, *arrays)
