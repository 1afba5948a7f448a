"""Numerically exact integration of low-dimensional latents: adaptive Gauss-Hermite quadrature (rule.py).

The log-factors that read element e of the latents add up to f_e(z), for every state c of the discrete latents.
Newton's method finds the mode of each, the rule gives

    log Z[c, e] = log Σ_q exp(f_e(z_q) + v_q) + log|L|,     p_q = exp(f_e(z_q) + v_q + log|L| - log Z[c, e])

and the nodes z_q with weights p_q are the atoms that the M-step sees: Q(θ) is a finite sum, and its gradient at the
parameters of the E-step is that of log Z with the nodes held. Nodes are a function of θ (the search always starts at
zero), moved at each E-step. So one update climbs the rule's log-likelihood with its old nodes, and moving these
changes it by no more than the rule's error, which is what a monotone objective is granted (`Eliminated.error`).

The error is |log Z - log Z with 2n + 1 nodes|, summed over elements. It is taken at the E-steps number 1, 2, 4, 8, ...
and whenever asked. Not handled here: which row reads which element (quadrature_recognition.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_em.errors import NonFiniteError, Refusal
from pyro_em.evidence.elimination import Atoms, Eliminated, LatentSet, RunAt
from pyro_em.evidence.quadrature_layout import Layout
from pyro_em.evidence.quadrature_posterior import QuadraturePosterior
from pyro_em.evidence.rule import Quadrature
from pyro_em.model.compat import pack, with_dims

MAX_ITER = 100
CLOSE = 1e-20  # squared Newton decrement at which a mode is found
# Of Newton's step, in as many updates in a row: where f is smooth, the curvature that cut a step so short is known to
# the next one; towards a kink every step is cut, and shorter than the last one.
SHORT, STUCK = 2.0**-20, 3


@dataclass
class QuadratureRoute:
    """The route of one set, made by `recognise_quadrature`.

    `symbols` names the dims of the layout, `row_symbols` those of the factors that index the latents; `states` are the
    discrete latents that these read.
    """

    latents: LatentSet
    layout: Layout
    rule: Quadrature
    symbols: Mapping[int, str]
    row_symbols: Mapping[str, Mapping[int, str]]
    plates: frozenset[str]
    dtypes: Mapping[str, torch.dtype]
    states: tuple[str, ...] = ()
    name: str = "quadrature"
    error: float = 0.0
    due: bool = field(default=False, repr=False)  # the next E-step estimates the error
    _count: int = field(default=-1, repr=False)  # of E-steps; the first atoms are none

    @property
    def reason(self) -> str:
        k, n = self.layout.num_columns, math.prod(self.layout.sizes)
        each = f"{self.rule.num_nodes} nodes" + (f" in each of {k} dimensions" if k > 1 else "")
        given = f", in each state of {', '.join(map(repr, self.states))}" if self.states else ""
        return f"{each}, centred and scaled at the modes of {n} elements{given}"

    @property
    def cost(self) -> str:
        return f"error of the log-likelihood at the last check {self.error:.1e}"

    def eliminate(self, run_at: RunAt, *, differentiable: bool = False) -> Eliminated:
        """See the module docstring.

        :raises NonFiniteError: if a posterior has no mode.
        :raises Refusal: if it is not smooth there, or the error exceeds the rule's tolerance.
        """
        mode, peak, spread = self._modes(run_at)
        nodes, log_z, log_p = self._integrated(run_at, self.rule, mode, spread, differentiable)
        self._count += 1
        if self.due or (self._count and self._count & (self._count - 1) == 0):
            self.due = False
            self.check(run_at, mode, spread, log_z.detach())
        m, atoms, weights = len(self.layout.sizes), self.layout.values(nodes, self.dtypes), log_p.detach().exp()
        node = {-m: self.latents.symbol}
        by_factor = {
            name: self.at_rows(name, weights) for name in self.layout.rows if self.layout.rows[name] is not None
        }
        full = weights.expand(*weights.shape[:-m], weights.shape[-m], *self.layout.sizes[1:])
        values = {name: value.detach() for name, value in atoms.items()}
        found = Atoms(values, pack(full, {**self.symbols, **node}), by_factor)
        return Eliminated(
            self.packed(log_z),
            QuadraturePosterior(self.layout, nodes, weights, mode, spread, run_at, self.dtypes),
            lambda: found,
            lambda: self.packed(peak - log_z.detach()),
            self.error,
        )

    def at_rows(self, name: str, weights: Tensor) -> Tensor:
        """Weights of the nodes (C..., Q, plates) at the rows of a factor that reads the latents by an index, packed."""
        m, index = len(self.layout.sizes), self.layout.rows[name]
        assert index is not None
        symbols = {d: s for d, s in self.symbols.items() if d < -m} | {
            **self.row_symbols[name],
            -m: self.latents.symbol,
        }
        return pack(self.layout.to_rows(weights, index), symbols)

    def check(self, run_at: RunAt, mode: Tensor, spread: Tensor, log_z: Tensor) -> None:
        """Estimate the error by doubling the nodes."""
        with torch.no_grad():
            _, finer, _ = self._integrated(run_at, self.rule.doubled(), mode, spread, False)
        self.judge(finer, log_z)

    def judge(self, finer: Tensor, log_z: Tensor) -> None:
        """The error of log Z (C..., 1, plates), given it with the nodes doubled.

        :raises Refusal: if it exceeds the rule's tolerance.
        """
        difference = (finer - log_z).abs()
        lead = difference.dim() - len(self.layout.sizes)
        worst = difference.amax(tuple(range(lead))) if lead else difference
        self.error = float(worst.expand(self.layout.sizes).sum())
        allowed = self.rule.tolerance * (1.0 + float(log_z.abs().sum()))
        if not self.error <= allowed:
            raise Refusal(
                self.latents.names[0],
                f"{self.rule.num_nodes} quadrature nodes leave an error of {self.error:.1e} in the log-likelihood "
                f"(found by doubling them), more than the tolerance allows ({allowed:.1e}).",
                f"use Quadrature(num_nodes={2 * self.rule.num_nodes + 1}), or a larger tolerance.",
            )

    def packed(self, per_element: Tensor) -> Tensor:
        """A quantity of every element in the layout, packed (summed if elements are not told apart)."""
        m = len(self.layout.sizes)
        full = per_element.expand(*per_element.shape[: per_element.dim() - m], *self.layout.sizes)
        if not self.plates:
            full = full.sum(tuple(range(-m, 0)), keepdim=True)
        return pack(full, self.symbols) if full.numel() > 1 else with_dims(full.reshape(()), "")

    def _modes(self, run_at: RunAt) -> tuple[Tensor, Tensor, Tensor]:
        """Modes (C..., 1, plates, k), f there, and L (..., k, k)."""
        k = self.layout.num_columns
        z = torch.zeros(*self.layout.sizes, k, dtype=torch.float64)
        f, g, h = self._derivatives(run_at, z)
        if f.dim() + 1 > z.dim():  # states of discrete latents, each with a mode of its own
            z = z.expand(*f.shape[: f.dim() + 1 - z.dim()], *z.shape).contiguous()
            f, g, h = self._derivatives(run_at, z)
        stuck = torch.zeros_like(f)
        for _ in range(MAX_ITER):
            values, vectors = torch.linalg.eigh(-h)
            size = values.abs().clamp(min=1e-10)
            rotated = (vectors.mT @ g.unsqueeze(-1)).squeeze(-1)
            step = (vectors @ (rotated / size).unsqueeze(-1)).squeeze(-1)
            decrement = (rotated * rotated / size).sum(-1)
            if not bool(decrement.isfinite().all()):
                break
            if bool(decrement.max() <= CLOSE):
                if bool((values <= 0).any()):
                    break
                # L Lᵀ = (-H)⁻¹
                spread = vectors * size.rsqrt().unsqueeze(-2)
                return z, f, spread
            z, f, g, h, length = self._climbed(run_at, z, step, f)
            stuck = torch.where(length < SHORT, stuck + 1, 0.0)
            if bool((stuck >= STUCK).any()):
                raise kinked(self.latents.names[0])
        raise no_mode(self.latents.names[0])

    def _climbed(
        self, run_at: RunAt, z: Tensor, step: Tensor, f: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """A Newton step, halved for the elements where f would fall; the share of it that was made comes last."""
        length = torch.ones_like(f)
        least = f - 1e-12 * (1 + f.abs())
        moved = z + step
        found, g, h = self._derivatives(run_at, moved)
        for _ in range(40):
            worse = ~(found >= least)
            if not bool(worse.any()):
                break
            length = torch.where(worse, length / 2, length)
            moved = z + length.unsqueeze(-1) * step
            with torch.no_grad():
                found = self.layout.total(run_at, self.layout.values(moved, self.dtypes))
        if bool((length < 1).any()):
            found, g, h = self._derivatives(run_at, moved)
        return moved, found, g, h, length

    def _derivatives(self, run_at: RunAt, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f (C..., 1, plates), its gradient + (k,) and Hessian + (k, k) in every element's own z."""
        with torch.enable_grad():
            leaf = z.detach().clone().requires_grad_(True)
            f = self.layout.total(run_at, self.layout.values(leaf, self.dtypes))
            (g,) = torch.autograd.grad(f.sum(), leaf, create_graph=True)
            rows = [
                torch.autograd.grad(g[..., d].sum(), leaf, retain_graph=True, allow_unused=True)[0]
                if g.requires_grad
                else None
                for d in range(z.shape[-1])
            ]
        h = torch.stack([torch.zeros_like(z) if row is None else row for row in rows], -2)
        return f.detach().expand(torch.broadcast_shapes(f.shape, z.shape[:-1])), g.detach(), (h + h.mT) / 2

    def _integrated(
        self, run_at: RunAt, rule: Quadrature, mode: Tensor, spread: Tensor, differentiable: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Nodes (C..., Q, plates, k), log Z (C..., 1, plates) and log p (C..., Q, plates)."""
        x, v = rule.product(self.layout.num_columns)
        m = len(self.layout.sizes)
        own = x.reshape(-1, *(1,) * (m - 1), x.shape[-1])
        nodes = mode + (spread @ own.unsqueeze(-1)).squeeze(-1)
        axis = nodes.dim() - 1 - m
        with torch.set_grad_enabled(differentiable):
            log_volume = torch.linalg.slogdet(spread)[1]
            joint = self.layout.at_nodes(run_at, nodes, self.dtypes) + v.reshape(-1, *(1,) * (m - 1)) + log_volume
            log_z = joint.logsumexp(axis, keepdim=True)
            return nodes, log_z, joint - log_z


def kinked(name: str) -> Refusal:
    """What is said where Newton's steps come to nothing."""
    return Refusal(
        name,
        "the posterior of some element is not smooth at its mode: a density that reads the latent has a kink there, as "
        "Laplace's has at its centre, and Gauss-Hermite nodes are for smooth densities.",
        "give it a smooth prior (StudentT has heavy tails too), or use algorithm='svi' with a guide for it; "
        f'roles={{"{name}": "parameter"}} makes it a point estimate.',
    )


def no_mode(name: str) -> NonFiniteError:
    """What is said where the search does not end."""
    return NonFiniteError(
        name,
        f"Site '{name}': the posterior of some element has no mode with finite curvature at these parameters (a "
        "parameter has left its space, or its prior is flat), so that quadrature has no centre.",
    )
