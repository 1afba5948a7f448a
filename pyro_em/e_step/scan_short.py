"""One E-step of short chains in few calls: as long as nothing is masked, weighted or looked up.

    b = exp(W Φ - max),   α, β by band solves (evidence/banded.py),   Σ_t α_{t-1} (b_t ∘ β_t)ᵀ ∘ A,   Σ_t γ_t Φ_tᵀ

Of a chain of 200 steps the arithmetic takes ten microseconds, and every call one or two: NumPy throughout, over
arrays that are kept. What this does not do scan_program.py does in general.

Shapes: K states, T steps, C chains, F features; rows t·C + c.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyro_em.e_step.program import IMPOSSIBLE
from pyro_em.evidence.banded import Banded


class Short:
    """Φ (F, T·C) with its arrays; `base` (C,) are sums of log base measures."""

    def __init__(self, banded: Banded, phi: Tensor, base: Tensor, states: int) -> None:
        T, C = banded.blocks.steps, banded.blocks.chains
        self.banded, self.base, self.sizes = banded, base.numpy(), (states, T, C)
        self.phi = phi.numpy()
        self._by_chain = np.ascontiguousarray(self.phi.reshape(-1, T, C).transpose(2, 1, 0).reshape(T * C, -1))
        self._density, self._scale = np.empty((states, T * C)), np.empty(T * C)

    def smooth(self, initial: Tensor, table: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """(Σ ll, Σ |ll|), expected first states (1, K) and transitions (1, K, K), sums of features (K, F); None if the
        messages leave the range of floats or some row is impossible."""
        K, T, C = self.sizes
        density, scale, A = self._density, self._scale, table.numpy()
        np.dot(w.numpy(), self.phi, out=density)
        np.maximum.reduce(density, 0, out=scale)
        np.subtract(density, scale, out=density)
        np.exp(density, out=density)
        scales = np.add.reduce(scale.reshape(T, C), 0)
        if not scales.min() > 0.1 * IMPOSSIBLE:
            return None
        found = self.banded.messages(initial.numpy(), A, density.reshape(K, T, C))
        if found is None:
            return None
        log_scale, states, left, right = found
        log_scale += scales
        log_scale += self.base
        rows = states.reshape(-1, K).T
        evidence = np.array([np.add.reduce(log_scale), np.add.reduce(np.absolute(log_scale))])
        pairs = np.dot(left.reshape(-1, K).T, right.reshape(-1, K))
        pairs *= A
        first = np.add.reduce(states[:, 0], 0)
        sums = (evidence, first[None], pairs[None], np.dot(rows, self._by_chain))
        return tuple(torch.from_numpy(x) for x in sums)  # type: ignore[return-value]
