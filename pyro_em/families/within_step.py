"""States that read one another within a step, x = B x + M s + b + noise with B strictly lower triangular; flat ones.

Solved for x this is x = (I - B)⁻¹ (M s + b + noise), of which a filter is made; the density of x is that of the
residual (|I - B| = 1), so that the M-step is the one of x given its parents (s, x). A state with a flat density in the
place of noise moves x along a column of (I - B)⁻¹.

Shapes: leading dims U, D states, parents s of any number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_em.state_space.linear_gaussian import LinearMoments, outer, symmetric


def solved(args: Mapping[str, Tensor], group: str, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """x = B x + M s + b as x = (I - B)⁻¹ (M s + b): I - B, and the matrix and the offset solved for x."""
    matrix, b = args[f"{group}.matrix"].double(), args[f"{group}.loc"].double()
    left = torch.eye(width, dtype=torch.float64) - matrix[..., -width:]
    M = matrix[..., :-width]
    shape = torch.broadcast_shapes(left.shape[:-2], b.shape[:-1])
    solved = torch.linalg.solve(left, M) if M.shape[-1] else M
    return left, solved, torch.linalg.solve(left.expand(*shape, width, width), b.expand(*shape, width))


def given_own_step(own: LinearMoments, left: Tensor, A: Tensor, b: Tensor, width: int) -> LinearMoments:
    """Moments with x itself among the parents, which are (s, x): residuals are (I - B) times those of x - A s - b."""
    n, s, ss = own.count, own.parents, own.parents_squares
    r, rr, rs = own.residual, own.residual_squares, own.residual_parents
    x = r + (A @ s.unsqueeze(-1)).squeeze(-1) + n.unsqueeze(-1) * b
    xs = rs + A @ ss + outer(b, s)
    rx = rr + rs @ A.mT + outer(r, b)
    xx = symmetric(rx + A @ xs.mT + outer(b, x))
    shape = torch.broadcast_shapes(ss.shape[:-2], xx.shape[:-2])
    top = torch.cat([ss.expand(*shape, *ss.shape[-2:]), xs.mT.expand(*shape, *xs.mT.shape[-2:])], -1)
    bottom = torch.cat([xs.expand(*shape, *xs.shape[-2:]), xx.expand(*shape, *xx.shape[-2:])], -1)
    return LinearMoments(
        n,
        (left @ r.unsqueeze(-1)).squeeze(-1),
        left @ rr @ left.mT,
        left @ torch.cat([rs.expand(*shape, *rs.shape[-2:]), rx.expand(*shape, *rx.shape[-2:])], -1),
        torch.cat([s.expand(*shape, s.shape[-1]), x.expand(*shape, width)], -1),
        torch.cat([top, bottom], -2),
    )


def flat_directions(cells: Sequence[Sequence[bool]], left: Sequence[Tensor | None], size: int) -> Tensor:
    """(S|1, H, `size`, F): where the flat states among those of each of H steps lead.

    :param cells: which states of every step are flat.
    :param left: I - B of every step, (S|1, 1, D, D), or None where B is 0.
    """
    parts, before, F = [], 0, sum(map(sum, cells))
    for own, matrix in zip(cells, left, strict=True):
        at = [c for c, flat in enumerate(own) if flat]
        columns = torch.eye(len(own), dtype=torch.float64)[:, at].expand(1, 1, -1, -1)
        if matrix is not None:
            columns = torch.linalg.inv(matrix) @ columns
        after = F - before - len(at)
        parts.append(torch.nn.functional.pad(columns, (before, after, 0, size - len(own))))
        before += len(at)
    S = max(map(len, parts))
    return torch.cat([x.expand(S, -1, -1, -1) for x in parts], 1)
