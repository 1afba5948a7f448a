"""Exponential families: exact log densities, sufficient statistics and kernels for the M-step.

`FAMILIES` is the whole table. A distribution outside it is no error: it has no closed form here, and
its parameters are maximised numerically.
"""

from typing import Any

from pyro_em.distributions import Coarse
from pyro_em.distributions.mass import has_exact_mass
from pyro_em.families.base import (
    CHOLESKY,
    IDENTITY,
    LOGIT,
    NORMALISED,
    SOFTMAX,
    Family,
    Link,
    OneHotStatistic,
    Statistic,
)
from pyro_em.families.categorical import CategoricalFamily, MultinomialFamily, OneHotCategoricalFamily
from pyro_em.families.chain import GROUPS, GaussianChainFamily
from pyro_em.families.circular import VonMisesFamily
from pyro_em.families.dirichlet import BetaFamily, DirichletFamily
from pyro_em.families.grid import GridNormalFamily
from pyro_em.families.heavy import (
    CauchyFamily,
    HalfCauchyFamily,
    LaplaceFamily,
    MultivariateStudentTFamily,
    StudentTFamily,
)
from pyro_em.families.incomplete_normal import IncompleteNormalFamily
from pyro_em.families.moments import EXPECTED
from pyro_em.families.multivariate_normal import MultivariateNormalFamily
from pyro_em.families.normal import HalfNormalFamily, LogNormalFamily, NormalFamily
from pyro_em.families.ordinal import OrderedLogisticFamily
from pyro_em.families.overdispersed import BetaBinomialFamily, DirichletMultinomialFamily, GammaPoissonFamily
from pyro_em.families.positive import ExponentialFamily, GammaFamily, InverseGammaFamily, PoissonFamily
from pyro_em.families.response import ObservedFamily, ResponseFamily
from pyro_em.families.state_space import SITES, GaussianHMMFamily, LinearHMMFamily
from pyro_em.families.trials import BernoulliFamily, BinomialFamily, GeometricFamily, NegativeBinomialFamily
from pyro_em.families.uniform import UniformFamily
from pyro_em.families.weibull import WeibullFamily
from pyro_em.families.wishart import InverseWishartFamily, WishartFamily
from pyro_em.families.zero_inflated import ZeroInflatedPoissonFamily

_FAMILIES: tuple[Family, ...] = (
    HalfCauchyFamily(),
    LaplaceFamily(),
    StudentTFamily(),
    MultivariateStudentTFamily(),
    CauchyFamily(),
    BernoulliFamily(),
    BinomialFamily(),
    GeometricFamily(),
    NegativeBinomialFamily(),
    CategoricalFamily(),
    OneHotCategoricalFamily(),
    MultinomialFamily(),
    OrderedLogisticFamily(),
    PoissonFamily(),
    ExponentialFamily(),
    GammaFamily(),
    InverseGammaFamily(),
    NormalFamily(),
    GridNormalFamily(),
    LogNormalFamily(),
    HalfNormalFamily(),
    MultivariateNormalFamily(),
    IncompleteNormalFamily(),
    BetaFamily(),
    DirichletFamily(),
    GammaPoissonFamily(),
    BetaBinomialFamily(),
    ZeroInflatedPoissonFamily(),
    DirichletMultinomialFamily(),
    UniformFamily(),
    WeibullFamily(),
    VonMisesFamily(),
    InverseWishartFamily(),
    WishartFamily(),
    GaussianHMMFamily(),
    LinearHMMFamily(),
    GaussianChainFamily(),
)

FAMILIES: dict[type, Family] = {family.distribution: family for family in _FAMILIES}
"""Every family by its Pyro distribution class."""


LOCATIONS = frozenset(
    {
        "loc",
        *GaussianHMMFamily.by_entries,
        *GaussianChainFamily.by_entries,
        *(f"{site}.loc" for site in (*SITES, *GROUPS)),
    }
)
"""Arguments that say where a value lies: they are updated before the spread around it."""


def family_of(distribution: type) -> Family | None:
    """The family of a Pyro distribution class, or None. Subclasses are not looked up: they may
    differ from their base in any way.

    >>> import pyro.distributions as dist
    >>> sorted(family_of(dist.Normal).closed)
    ['loc', 'scale']
    >>> family_of(dist.Gumbel) is None
    True
    """
    return FAMILIES.get(distribution)


_RESPONSES: dict[tuple[Family, type], ResponseFamily] = {}


def family_for(distribution: Any) -> Family | None:
    """The family of a distribution object: `family_of` its class, or that of a response seen only in part."""
    if not isinstance(distribution, Coarse):
        return family_of(type(distribution))
    complete = family_of(type(distribution.base))
    if complete is None or not (complete.name in EXPECTED or has_exact_mass(complete.distribution)):
        return None
    key = (complete, type(distribution))
    if key not in _RESPONSES:
        make = ResponseFamily if complete.name in EXPECTED else ObservedFamily
        _RESPONSES[key] = make(complete, type(distribution))
    return _RESPONSES[key]


__all__ = [
    "CHOLESKY",
    "FAMILIES",
    "IDENTITY",
    "LOCATIONS",
    "LOGIT",
    "NORMALISED",
    "SOFTMAX",
    "Family",
    "Link",
    "OneHotStatistic",
    "Statistic",
    "family_for",
    "family_of",
]
