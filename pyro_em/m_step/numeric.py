"""Numeric M-steps: climb Q(θ) in free coordinates, never below where it started.

Small blocks: damped Newton with the exact Hessian (quadratic convergence makes the argmax exact to
rounding). Large blocks: `torch.optim.LBFGS` with strong Wolfe line search. A gradient M-step (`gem`, or
`m_step="gradient"`) is one short L-BFGS run, or the user's own optimiser, kept only if Q rose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.charts import Chart, chart
from pyro_em.errors import NonFiniteError
from pyro_em.m_step.kinks import Kinks, kink_of, kinked
from pyro_em.model.trace import Run
from pyro_em.problem import Problem
from pyro_em.statistics import Posteriors
from pyro_em.types import Params

NEWTON_LIMIT = 120  # free coordinates; the Hessian costs one backward pass each


Objective = Callable[[Params], tuple[Tensor, Run]]


@dataclass
class Block:
    """The parameters to be moved, their charts, and an objective as a function of their free coordinates.

    `objective` maps parameters to its value, differentiable, and to the run of the model behind it.
    """

    problem: Problem
    params: Params
    objective: Objective
    names: tuple[str, ...]

    @classmethod
    def of_q(cls, problem: Problem, params: Params, weights: Posteriors, names: tuple[str, ...]) -> Block:
        """The block of Q(θ) = E_q[log p(x,z|θ)] for given posterior weights."""
        return cls(problem, params, lambda values: problem.expected_log_joint(values, weights), names)

    def with_objective(self, objective: Objective) -> Block:
        """The same parameters in the same coordinates, with another objective."""
        other = copy(self)
        other.objective = objective
        return other

    def __post_init__(self) -> None:
        records = self.problem.parameters
        self.charts: dict[str, Chart] = {n: chart(records[n].constraint, self.params[n].double()) for n in self.names}
        self.sizes = [self.charts[n].size for n in self.names]

    def kinks(self, u: Tensor) -> Kinks | None:
        """Of Laplace priors, over `u`; |x| has the derivative 0 at its kink for torch."""
        counted = {n: self.problem.uses[n] for n in self.names if self.problem.with_prior}
        bent = kinked(counted, {site.name: site for site in self.problem.sites})
        if not bent:
            return None
        with torch.no_grad():
            _, run = self.objective(self.values(u))
        return Kinks.of([(self.charts[n].size, kink_of(run.sites[n]) if n in bent else None) for n in self.names])

    def free(self) -> Tensor:
        parts = [self.charts[n].to_free(self.params[n].double()) for n in self.names]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def values(self, u: Tensor) -> Params:
        """All parameters, those of the block at free coordinates `u`, differentiable in `u`."""
        moved = dict(self.params)
        for name, part in zip(self.names, torch.split(u, self.sizes), strict=True):
            moved[name] = self.charts[name].from_free(part).to(self.params[name].dtype)
        return moved

    def q(self, u: Tensor) -> float:
        with torch.no_grad():
            value, _ = self.objective(self.values(u))
        return float(value.detach())

    def gradient(self, u: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Q, its gradient in the free coordinates, and the leaves that the gradient was taken for.

        Parameters of torch modules are their own leaves (and their own free coordinates).
        """
        u = u.detach().requires_grad_(True)
        values = self.values(u)
        q, run = self.objective(values)
        modules = [n for n in self.names if self.problem.parameters[n].kind == "module" and n in run.leaves]
        leaves = [u, *(run.leaves[n] for n in modules)]
        if not q.requires_grad:
            return q, torch.zeros_like(u), leaves
        found = torch.autograd.grad(q, leaves, create_graph=create_graph, allow_unused=True)
        total = found[0] if found[0] is not None else torch.zeros_like(u)
        if modules:
            parts = list(torch.split(total, self.sizes))
            for name, own in zip(modules, found[1:], strict=True):
                if own is not None:
                    parts[self.names.index(name)] = own.reshape(-1).double()
            total = torch.cat(parts)
        return q, total, leaves

    def slope(self) -> Tensor:
        """The gradient where the block stands.

        :raises NonFiniteError: if it has a NaN: maxima pass over it, and a score of 0 is convergence.
        """
        u = self.free()
        _, gradient, _ = self.gradient(u)
        kinks = self.kinks(u)
        gradient = gradient if kinks is None else kinks.nearest(u, gradient)
        for name, part in zip(self.names, torch.split(gradient, self.sizes), strict=True):
            if bool(part.isnan().any()):
                raise no_derivative(name)
        return gradient

    def hessian(self, u: Tensor) -> tuple[float, Tensor, Tensor]:
        q, gradient, leaves = self.gradient(u, create_graph=True)
        rows = []
        for i in range(gradient.numel()):
            if not gradient.requires_grad:
                rows.append(torch.zeros_like(gradient))
                continue
            found = torch.autograd.grad(gradient[i], leaves, retain_graph=True, allow_unused=True)
            row = found[0] if found[0] is not None else torch.zeros_like(leaves[0])
            parts = list(torch.split(row, self.sizes))
            modules = [n for n in self.names if self.problem.parameters[n].kind == "module"]
            for name, own in zip(modules, found[1:], strict=False):
                if own is not None:
                    parts[self.names.index(name)] = own.reshape(-1).double()
            rows.append(torch.cat(parts))
        return float(q.detach()), gradient.detach(), torch.stack(rows)


def no_derivative(name: str) -> NonFiniteError:
    """The error for a parameter in which the log-density has no derivative."""
    return NonFiniteError(
        name,
        f"Parameter '{name}': the derivative of the log-density in it is NaN, though the log-density is finite. Some "
        "operation of the model has no derivative at these values (a power or root of 0, inf - inf in a branch of "
        "torch.where): change the start, or replace the argument before the operation.",
    )


def maximise(block: Block, *, tolerance: float, max_iter: int = 100) -> Params:
    """Parameters with the block at the argmax of Q (all others held), within `tolerance` on max|∂Q/∂u|."""
    u = block.free()
    if u.numel() == 0:
        return dict(block.params)
    if u.numel() <= NEWTON_LIMIT:
        u = newton(block, u, tolerance=tolerance, max_iter=max_iter)
    else:
        u = lbfgs(block, u, tolerance=tolerance, max_iter=max_iter)
    return detached(block, u)


def ascend(block: Block, *, num_steps: int) -> Params:
    """A gradient M-step: a few L-BFGS iterations on Q, which never end lower than they began."""
    u = block.free()
    if u.numel() == 0:
        return dict(block.params)
    return detached(block, lbfgs(block, u, tolerance=0.0, max_iter=num_steps))


def ascend_with(
    block: Block, optimiser: Callable[[Sequence[Tensor]], torch.optim.Optimizer], *, num_steps: int = 1
) -> Params:
    """A gradient M-step by the user's own torch optimiser, halved back until Q does not fall."""
    start = block.free()
    u = start.clone().requires_grad_(True)
    optimizer = optimiser([u])
    for _ in range(num_steps):
        _, gradient, _ = block.gradient(u)
        u.grad = -gradient
        optimizer.step()
    return detached(block, back_tracked(block, start, u.detach() - start))


def detached(block: Block, u: Tensor) -> Params:
    """All parameters, those of the block at free coordinates `u`."""
    return {name: value.detach().clone() for name, value in block.values(u.detach()).items()}


def back_tracked(block: Block, start: Tensor, step: Tensor, slope: float = 0.0, halvings: int = 40) -> Tensor:
    """The longest of step, step/2, step/4, ... that does not lower Q (Armijo if a slope is given); `start` if none."""
    before = block.q(start)
    length = 1.0
    for _ in range(halvings):
        u = start + length * step
        value = block.q(u)
        if value >= before + 1e-4 * length * slope:
            return u
        length /= 2
    return start


def newton(block: Block, u: Tensor, *, tolerance: float, max_iter: int) -> Tensor:
    """Newton's method on -Q; a Hessian that is not negative definite is shifted by its eigenvalues.

    Where Q is nearly flat such a step is far too long: the next ones begin at twice the length that was halved to.
    """
    reach = math.inf
    for _ in range(max_iter):
        _, gradient, hessian = block.hessian(u)
        kinks = block.kinks(u)
        size = _size(kinks, u, gradient)
        if not bool(gradient.isfinite().all()) or size <= tolerance:
            return u
        hessian = (hessian + hessian.mT) / 2
        if not bool(hessian.isfinite().all()):  # far out: the gradient alone says where to go
            hessian = torch.diag(-gradient.abs().amax().clamp(min=1.0).expand(len(u)))
        values, vectors = torch.linalg.eigh(-hessian)
        values = values.abs().clamp(min=max(float(values.abs().max()) * 1e-12, 1e-300))
        step = vectors @ ((vectors.mT @ gradient) / values)
        target, gain = u + step, gradient @ step
        if kinks is not None:
            target, gain = kinks.target(u, gradient, vectors @ (values.unsqueeze(-1) * vectors.mT))
        longest = float((target - u).abs().max())
        if longest > reach:
            target, gain = u + reach / longest * (target - u), reach / longest * gain
        moved = back_tracked(block, u, target - u, slope=float(gain))
        length = float((moved - u).abs().max())
        reach = max(reach, 4 * length) if length >= 0.9 * min(longest, reach) else 2 * length
        if torch.equal(moved, u):
            # Q is flat to rounding here: keep a full step if it lowers the gradient without lowering Q.
            _, after, _ = block.gradient(target)
            if _size(kinks, target, after) < size and _level(block, u, target):
                u = target
                continue
            return u
        u = target if torch.equal(moved, u + (target - u)) else moved  # a kink is met exactly
    return u


def _size(kinks: Kinks | None, u: Tensor, gradient: Tensor) -> float:
    return float((gradient if kinks is None else kinks.nearest(u, gradient)).abs().max())


def _level(block: Block, u: Tensor, v: Tensor) -> bool:
    before, after = block.q(u), block.q(v)
    return after >= before - 16 * torch.finfo(torch.float64).eps * abs(before)


def lbfgs(block: Block, u: Tensor, *, tolerance: float, max_iter: int) -> Tensor:
    """L-BFGS with strong Wolfe line search on -Q / max(1, |Q|)."""
    start = u.detach()
    before = block.q(start)
    scale = max(1.0, abs(before))
    leaf = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [leaf],
        max_iter=max_iter,
        max_eval=25 * max_iter,  # the default, 1.25 a step, would cut the line searches short
        history_size=20,
        tolerance_grad=tolerance / scale,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        q, gradient, _ = block.gradient(leaf)
        leaf.grad = -gradient / scale
        if bool(q.isfinite()) and bool(gradient.isfinite().all()):
            return -float(q.detach()) / scale
        leaf.grad = torch.zeros_like(leaf)  # outside of a space: no line search can go on from NaN, so it is told
        return 1.0 - before / scale  # that Q is lower there than at the start, and comes back

    optimizer.step(closure)
    end = leaf.detach()
    if bool(end.isfinite().all()) and block.q(end) >= before:
        return end
    return back_tracked(block, start, torch.nan_to_num(end - start))
