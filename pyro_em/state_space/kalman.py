"""Log-evidence of any linear-Gaussian chain by a Kalman filter, two-level in time (chunks.py), differentiable, exact.

Where data are far from 0 the chain is filtered as deviations from a path near its states (centred.py): what a chunk
does to an unknown state is a quadratic around 0, whose terms would cancel.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyro_em.state_space.centred import around_a_constant, centred, is_far
from pyro_em.state_space.chunked import states
from pyro_em.state_space.chunks import act, begin, cut
from pyro_em.state_space.head import Head
from pyro_em.state_space.linear_gaussian import Chain
from pyro_em.state_space.start import is_open
from pyro_em.state_space.steps import predict, prepared, update


def log_evidence(chain: Chain) -> Tensor:
    """log p(y) of every sequence, shape (S,); twice differentiable in the chain's arguments.

    :raises SingularInnovation: where an observed step has no density given the past.
    """
    return _log_evidence(near(chain))


def _log_evidence(chain: Chain) -> Tensor:
    if is_open(chain):
        open_steps = Head.of(chain)
        with open_steps.counted():
            return open_steps.log_evidence() + _log_evidence(open_steps.rest())
    S, T, _ = chain.y.shape
    steps = prepared(chain)
    M, L = cut(S, T - 1)
    head = T - M * L
    m, P, total = begin(chain, steps, S)
    for t in range(1, head):
        s = steps.step(t)
        m, P, density, _, _ = update(s, *predict(s, m, P), t)
        total = total + density
    total, m, P = total.squeeze(1), m.squeeze(1), P.squeeze(1)
    if M:
        action = act(steps.cut(head, M, L), S, M, L, m.shape[-1], head)
        for k in range(M):
            _, _, m, P, evidence = action.on(m, P, k)
            total = total + evidence
    return total


def near(chain: Chain) -> Chain:
    """The chain itself, or its deviations from a path near its states if these are far from 0."""
    if not is_far(chain):
        return chain
    closer, path = around_a_constant(chain)
    if is_far(closer) and chain.num_steps > 1:
        given: dict[str, Any] = {n: None if x is None else x.detach() for n, x in vars(closer).items()}
        still = Chain(**given)
        closer = centred(chain, path + states(still).mean)
    return closer
