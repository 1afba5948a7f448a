"""Predicted covariances of a time-invariant chain, from the first one until they stand still: Riccati's recursion.

    P_{t+1} = Q + A (P_t - P_t Cᵀ S_t⁻¹ C P_t) Aᵀ,      S_t = C P_t Cᵀ + R

The joint covariance of (y_t, x_{t+1}) given the past has this as its Schur complement, so that a step is one Cholesky
factorisation, of which L_xx is a root of P_{t+1}, L_yy that of S_t, and L_xy L_yy⁻¹ the predictor's gain:

    [C; A] P_t [C; A]ᵀ + diag(R, Q) = [L_yy, 0; L_xy, L_xx] [L_yy, 0; L_xy, L_xx]ᵀ

Where an observation leaves a small part of a variance (a wide start), digits cancel in it; these steps, and those whose
joint covariance is singular, are taken in Joseph's form, a sum of squares.

After `BY_ONE` steps they are doubled: with J = Cᵀ R⁻¹ C

    P_{t+1} = Q + A P_t (I + J P_t)⁻¹ Aᵀ

has a k-th iterate of the same form with A_k, J_k, Q_k (Chu, Fan and Lin 2005), so that m covariances give the next m at
once. Not where R is singular: then all steps are taken one by one.

Shapes: D state dims, P cells, T steps.
"""

from __future__ import annotations

import numpy as np
import scipy  # its parts are imported when they are used first
from numpy.typing import NDArray

from pyro_em.state_space.steps import SingularInnovation

Array = NDArray[np.float64]
EPS = float(np.finfo(np.float64).eps)
STEADY = 8 * EPS  # relative distance of a covariance from its limit that is rounding
BY_ONE = 48  # steps taken one by one at the beginning
SHRINKS = 64.0  # from here on the part of a variance that an observation leaves has lost digits


def predicted(
    P: Array, A: Array, Q: Array, C: Array, R: Array, T: int, first_unseen: bool
) -> tuple[Array, Array | None]:
    """P_0, P_1, ... up to where they stand still, at most T of them; and the factors above of every step, if all steps
    (but one that is not observed, whose factor is the unit matrix) were taken by them.

    :raises SingularInnovation: where an observed step has no density given the past.
    """
    regular = not scipy.linalg.lapack.dpotrf(R, lower=1)[1]
    most = min(T, BY_ONE) if regular else T
    found, factors, still = _one_by_one(P, A, Q, C, R, most, first_unseen, 0)
    careful = _careful(found, A, Q)
    if careful:
        found, factors, still = _one_by_one(P, A, Q, C, R, most, first_unseen, careful)
    return (found, factors) if still or len(found) >= T else (_doubled(found, A, Q, C, R, T), None)


def _one_by_one(
    P: Array, A: Array, Q: Array, C: Array, R: Array, most: int, first_unseen: bool, careful: int
) -> tuple[Array, Array | None, bool]:
    """At most `most` covariances, the first `careful` steps in Joseph's form, the factors, and whether the last
    covariance is the limit.
    """
    D, O = len(A), len(C)
    both = np.concatenate([C, A])
    turned = np.ascontiguousarray(both.T)
    noise = np.zeros((O + D, O + D))
    noise[:O, :O], noise[O:, O:] = R, Q
    factorise = scipy.linalg.lapack.dpotrf
    steps, factors, complete, still = [P], list[Array](), True, False
    for t in range(most):
        before, unseen = P, first_unseen and t == 0
        failed = unseen or t < careful
        if not failed:
            joint = both.dot(P).dot(turned)
            joint += noise
            factor, failed = factorise(joint.T, 1, 1)  # lower, zeros above
        if failed:
            P, factor = _unseen(P, A, Q) if unseen else _joseph(P, A, Q, C, R, t), np.eye(O + D)
            complete = complete and unseen
        else:
            root = factor[O:, O:]
            P = root.dot(root.T)
        factors.append(factor)
        near = abs(P.item(0) - before.item(0)) <= STEADY * before.item(0)  # one entry first, which is cheap
        if near and t >= first_unseen and float(abs(P - before).max()) <= STEADY / 2 * float(abs(before).max()):
            still = True
            break
        if t + 1 < most:
            steps.append(P)
    return np.array(steps), np.array(factors) if complete else None, still


def _careful(found: Array, A: Array, Q: Array) -> int:
    """After how many steps no observation takes away more than `SHRINKS` allows of what a state's variance was."""
    reach = (A @ found[:-1] * A).sum(-1) + Q.diagonal()
    lost = (reach > SHRINKS * found[1:].diagonal(axis1=1, axis2=2)).any(1)
    return int(lost.nonzero()[0][-1]) + 1 if lost.any() else 0


def _unseen(P: Array, A: Array, Q: Array) -> Array:
    """One step without data."""
    P = A.dot(P).dot(A.T) + Q
    return (P + P.T) / 2


def _joseph(P: Array, A: Array, Q: Array, C: Array, R: Array, step: int) -> Array:
    """One step as a sum of squares."""
    CP = C.dot(P)
    factor, failed = scipy.linalg.lapack.dpotrf(CP.dot(C.T) + R, lower=1, clean=1)
    if failed:
        raise SingularInnovation(step)
    K = A.dot(scipy.linalg.lapack.dpotrs(factor, CP, lower=1)[0].T)
    closed = A - K.dot(C)
    P = closed.dot(P).dot(closed.T)
    P += K.dot(R).dot(K.T)
    P += Q
    return (P + P.T) / 2


def _doubled(found: Array, A: Array, Q: Array, C: Array, R: Array, T: int) -> Array:
    """The same with those that follow."""
    root = scipy.linalg.solve_triangular(scipy.linalg.cholesky(R, lower=True), C, lower=True)
    J, widest = root.T @ root, abs(found[0]).max()
    known, block = found[:-1], found[-1:]
    eye = np.eye(len(A))
    while len(known) + len(block) < T:
        later = Q + A @ np.linalg.solve(eye + block @ J, block) @ A.T
        block = np.concatenate([block, (later + later.swapaxes(1, 2)) / 2])
        if abs(A).max() ** 2 * widest <= EPS * abs(Q).max():  # all that came last are the limit
            away = np.flatnonzero(abs(block - block[-1]).max((1, 2)) > STEADY * abs(block[-1]).max())
            block = block[: away[-1] + 2] if len(away) else block[:1]
            break
        left = A @ np.linalg.inv(eye + Q @ J)
        A, Q, J = left @ A, Q + left @ Q @ A.T, J + A.T @ J @ np.linalg.solve(eye + Q @ J, A)
    return np.concatenate([known, block])[:T]
