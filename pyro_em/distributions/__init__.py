"""Distributions which Pyro does not have: the inverse Wishart, and responses and vectors seen only in part."""

from pyro_em.distributions.coarse import Censored, Coarse, IntervalCensored, Truncated
from pyro_em.distributions.incomplete import IncompleteNormal
from pyro_em.distributions.inverse_wishart import InverseWishart

__all__ = ["Censored", "Coarse", "IncompleteNormal", "IntervalCensored", "InverseWishart", "Truncated"]
