"""Kernels: the few shapes which Q takes as a function of one parameter.

Hold all parameters but one fixed. Then every site of an exponential family contributes to
Q(θ) = E_q[log p(x, z | θ)] a function of that one parameter from a small set, with coefficients
that add up:

    PowerKernel      A log θ − B₊ θ^q − B₋ θ^−q         rates, scales, variances
    BetaKernel       A log p + B log(1 − p)             probabilities
    SimplexKernel    Σ_k A_k log p_k                    rows of probabilities
    QuadraticKernel  h·(μ−o) − ½ (μ−o)ᵀΛ(μ−o)           locations
    DirichletKernel  n (log Γ(Σα) − Σ log Γ(α_k)) + Σ_k L_k α_k      concentrations
    WishartKernel    −A log|Σ| − ½ tr(B Σ⁻¹)            covariances and precisions
    PositiveSum      sums of PowerKernels and others that are concave in log θ: priors that are not conjugate
    LassoKernel      a QuadraticKernel − r |μ − m|; StudentKernel likewise, − c log(1 + (μ − m)²/t)
    DirectionKernel  C cos μ + S sin μ                  directions; ResultantKernel: their concentration
    FlatKernel       0                                  a flat prior

A prior is one more use of the parameter (as the *value* of a site instead of an argument), so plain
maximum likelihood, parameters shared by several sites and conjugate priors are one rule: add the
kernels, take the `argmax`. Kernels know no distribution and no model.
"""

from pyro_em.kernels.base import FlatKernel, IncompatibleKernels, Kernel
from pyro_em.kernels.circular import DirectionKernel, ResultantKernel
from pyro_em.kernels.concentration import DirichletKernel
from pyro_em.kernels.heavy import LassoKernel, StudentKernel
from pyro_em.kernels.positive import HalfCauchyKernel, LogNormalKernel, PositiveSum
from pyro_em.kernels.power import PowerKernel
from pyro_em.kernels.probability import BetaKernel, SimplexKernel
from pyro_em.kernels.quadratic import Mean, QuadraticKernel
from pyro_em.kernels.wishart import WishartKernel

__all__ = [
    "BetaKernel",
    "DirectionKernel",
    "DirichletKernel",
    "FlatKernel",
    "HalfCauchyKernel",
    "IncompatibleKernels",
    "Kernel",
    "LassoKernel",
    "LogNormalKernel",
    "Mean",
    "PositiveSum",
    "PowerKernel",
    "QuadraticKernel",
    "ResultantKernel",
    "SimplexKernel",
    "StudentKernel",
    "WishartKernel",
]
