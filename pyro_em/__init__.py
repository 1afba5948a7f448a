"""Exact EM, MAP-EM, generalised EM and SVI for Pyro models, swapped by a flag."""

from pyro_em import distributions, settings
from pyro_em.checkpoint import load
from pyro_em.elbo import ExactELBO
from pyro_em.em import EM
from pyro_em.errors import (
    BoundaryEstimate,
    CheckpointError,
    CollinearDesign,
    DegenerateLikelihoodError,
    EMWarning,
    InputError,
    LostPrecision,
    MonotonicityError,
    NonFiniteError,
    PyroEMError,
    Refusal,
    ResourceError,
    SeparatedData,
    SymmetricStart,
    UnidentifiedParameter,
)
from pyro_em.evidence.rule import Quadrature
from pyro_em.fit import fit, plan
from pyro_em.loop import Step
from pyro_em.model.timeline import markov
from pyro_em.posterior import Posterior
from pyro_em.result import FitResult
from pyro_em.stop import Outcome
from pyro_em.version import __version__

__all__ = [
    "EM",
    "BoundaryEstimate",
    "CheckpointError",
    "CollinearDesign",
    "DegenerateLikelihoodError",
    "EMWarning",
    "ExactELBO",
    "FitResult",
    "InputError",
    "LostPrecision",
    "MonotonicityError",
    "NonFiniteError",
    "Outcome",
    "Posterior",
    "PyroEMError",
    "Quadrature",
    "Refusal",
    "ResourceError",
    "SeparatedData",
    "Step",
    "SymmetricStart",
    "UnidentifiedParameter",
    "__version__",
    "distributions",
    "fit",
    "load",
    "markov",
    "plan",
    "settings",
]
