"""Distributions which Pyro does not have: the inverse Wishart, and responses and vectors seen only in part.

>>> tobit = pyro_em.distributions.Censored(dist.Normal(1.0, 2.0), lower=0.0)
>>> tobit.log_prob(torch.tensor([0.0, 1.0]))  # log Φ(-1/2) where the limit is all that is known
tensor([-1.1759, -1.6121])
"""

from pyro_em.distributions.coarse import Censored, Coarse, IntervalCensored, Truncated
from pyro_em.distributions.incomplete import IncompleteLowRankNormal, IncompleteNormal
from pyro_em.distributions.inverse_wishart import InverseWishart

__all__ = [
    "Censored",
    "Coarse",
    "IncompleteLowRankNormal",
    "IncompleteNormal",
    "IntervalCensored",
    "InverseWishart",
    "Truncated",
]
