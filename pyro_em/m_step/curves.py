"""Q as a function of one linear predictor η, cell by cell: value, slope Q'(η) and curvature −Q''(η).

    kernel                        link                     value                       curvature
    A log t − B₊ t^q − B₋ t^−q    t = exp η                A η − B₊ e^qη − B₋ e^−qη    q² (B₊ e^qη + B₋ e^−qη)
    A log p + B log(1 − p)        p = 1/(1 + e^−η)         A log p + B log(1 − p)      (A + B) p (1 − p)
    Σ_k A_k log p_k               p = softmax η            Σ_k A_k log p_k             (Σ A) (diag p − p pᵀ)
    h·(μ−o) − ½ Λ (μ−o)²          μ = η                    itself                      Λ

Poisson, Exponential, Gamma rates and Normal scales behind exp, trials behind a logit, categories behind a softmax: all
concave, so that Newton's method with backtracking finds the argmax. Any other pair of kernel and link is
differentiated automatically. Kernels are the compressed data (kernels/): sums over everything that does not tell
the cells of the argument apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.families.base import IDENTITY, LOGIT, NORMALISED, SOFTMAX, Link
from pyro_em.kernels import BetaKernel, Kernel, PowerKernel, QuadraticKernel, SimplexKernel
from pyro_em.shapes import broadcast_shapes
from pyro_em.vector_design import Curvature, SoftmaxCurvature

Derivatives = tuple[Tensor, Curvature]


@dataclass(frozen=True, eq=False)
class Curve:
    """`value` (cells) and `derivatives` (slope, curvature) as functions of η.

    Slope and curvature are over the cells; of a vector η they are (cells, D) and (cells, D, D), of a softmax by parts.
    """

    value: Callable[[Tensor], Tensor]
    derivatives: Callable[[Tensor], Derivatives]


def curve_of(kernel: Kernel, link: str, canonical: Link, forward: Callable[[Tensor], Tensor]) -> Curve:
    """The curve of a kernel behind a link.

    :param link: name of the predictor's link (model/links.py), "" for any other function.
    :param canonical: the coordinate of the argument in which the kernel lives.
    :param forward: argument as a function of η.
    """
    if isinstance(kernel, PowerKernel) and link == "exp":
        return _exponential(kernel)
    if isinstance(kernel, BetaKernel) and (link, canonical) in (("identity", LOGIT), ("sigmoid", IDENTITY)):
        return _logistic(kernel)
    if isinstance(kernel, SimplexKernel) and (link, canonical) in (("identity", SOFTMAX), ("softmax", NORMALISED)):
        return _categorical(kernel)
    if isinstance(kernel, QuadraticKernel) and link == "identity":
        return _quadratic(kernel)
    return _automatic(lambda eta: kernel.value(canonical.to_canonical(forward(eta))))


def _quadratic(kernel: QuadraticKernel) -> Curve:
    own = (kernel.precision.shape[-1],) if kernel.vector else ()

    def derivatives(eta: Tensor) -> Derivatives:
        cells = broadcast_shapes(eta.shape, kernel.linear.shape)
        return kernel.gradient(eta).expand(cells), kernel.precision.expand(*cells, *own)

    return Curve(kernel.value, derivatives)


def _exponential(kernel: PowerKernel) -> Curve:
    a, up, down, q = kernel.log_coefficient, kernel.rising, kernel.falling, kernel.exponent
    flat = not bool(down.any())
    last: list[tuple[Tensor, Tensor, Tensor | None]] = []  # value and derivatives are asked for at the same η

    def powers(eta: Tensor) -> tuple[Tensor, Tensor | None]:
        if not last or last[0][0] is not eta:
            size = torch.exp(eta if q == 1 else q * eta)
            last[:] = [(eta, up * size, None if flat else down / size)]
        return last[0][1:]

    def value(eta: Tensor) -> Tensor:
        rises, falls = powers(eta)
        found = (a * eta).sub_(rises)
        return found if falls is None else found.sub_(falls)

    def derivatives(eta: Tensor) -> Derivatives:
        rises, falls = powers(eta)
        if falls is None:
            return (a - rises, rises) if q == 1 else (a - q * rises, q * q * rises)
        return a - q * (rises - falls), q * q * (rises + falls)

    return Curve(value, derivatives)


def _logistic(kernel: BetaKernel) -> Curve:
    a, b = kernel.successes, kernel.failures
    both = a + b

    # Few temporaries: of a table over nodes and rows, making room for each takes longer than what is done with it.
    def value(eta: Tensor) -> Tensor:
        small = eta.abs().neg_().exp_().log1p_()  # log p = min(η, 0) - small, log(1 - p) = -max(η, 0) - small
        found = torch.addcmul(both * small, b, eta.clamp(min=0))
        return torch.addcmul(found, a, eta.clamp(max=0), value=-1).neg_()

    def derivatives(eta: Tensor) -> Derivatives:
        p, rest = torch.sigmoid(eta), eta.neg().sigmoid_()
        slope = torch.addcmul(a * rest, b, p, value=-1)
        return slope, both * rest.mul_(p)

    return Curve(value, derivatives)


def _categorical(kernel: SimplexKernel) -> Curve:
    last: list[tuple[Tensor, Tensor, Tensor]] = []  # value and derivatives are asked for at the same η

    def first(x: Tensor, rank: int) -> Tensor:
        """Categories first: torch is slow over a last dim of few entries."""
        return x.reshape((1,) * (rank - x.dim()) + tuple(x.shape)).movedim(-1, 0).contiguous()

    known = {kernel.counts.dim(): first(kernel.counts, 0)}

    def counts(eta: Tensor) -> Tensor:
        rank = max(kernel.counts.dim(), eta.dim())
        if rank not in known:
            known[rank] = first(kernel.counts, rank)
        return known[rank]

    def softmaxed(eta: Tensor) -> tuple[Tensor, Tensor]:
        """log p and p."""
        if not last or last[0][0] is not eta:
            log_p = first(eta, kernel.counts.dim()).log_softmax(0)
            last[:] = [(eta, log_p, log_p.exp())]
        return last[0][1:]

    def value(eta: Tensor) -> Tensor:
        return (counts(eta) * softmaxed(eta)[0]).sum(0)

    def derivatives(eta: Tensor) -> Derivatives:
        p, own = softmaxed(eta)[1], counts(eta)
        total = own.sum(0)
        expected, root = total * p, total.sqrt() * p
        return (own - expected).movedim(0, -1), SoftmaxCurvature(expected.movedim(0, -1), root.movedim(0, -1))

    return Curve(value, derivatives)


def _automatic(function: Callable[[Tensor], Tensor]) -> Curve:
    """Elementwise: the derivative of a sum over cells is that of every cell."""

    def derivatives(eta: Tensor) -> Derivatives:
        # One η for several cells of the kernel: each has a slope of its own, which the design adds up.
        eta = eta.expand(broadcast_shapes(eta.shape, function(eta).shape))
        slope, curvature = cellwise_derivatives(lambda etas: function(etas[0]), [eta])
        return slope[0], curvature[0][0]

    return Curve(function, derivatives)


def cellwise_derivatives(
    function: Callable[[list[Tensor]], Tensor], etas: list[Tensor]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Slopes and curvatures (minus second derivatives) of a function that acts on every cell by itself."""
    leaves = [eta.detach().clone().requires_grad_(True) for eta in etas]
    with torch.enable_grad():
        total = function(leaves).sum()
        slopes = torch.autograd.grad(total, leaves, create_graph=True)
        rows = []
        for slope in slopes:
            found = (
                torch.autograd.grad(slope.sum(), leaves, retain_graph=True, allow_unused=True)
                if slope.requires_grad
                else [None] * len(leaves)
            )
            rows.append([torch.zeros_like(e) if f is None else -f for e, f in zip(leaves, found, strict=True)])
    return [slope.detach() for slope in slopes], rows


def rowwise_derivatives(function: Callable[[Tensor], Tensor], eta: Tensor) -> Derivatives:
    """Slope (cells, D) and curvature (cells, D, D) of a function that acts on the vector of every cell by itself."""
    leaf = eta.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(function(leaf).sum(), leaf, create_graph=True)
        rows = [torch.autograd.grad(slope[..., d].sum(), leaf, retain_graph=True)[0] for d in range(leaf.shape[-1])]
    return slope.detach(), -torch.stack(rows, -2)
