"""Shapes and small shared types.

Shape letters, used in every docstring of the package:
    N  elements of the data plate        K  states of a discrete latent
    D  dimensions of an event            T  steps of a chain
    S  draws                             P  free (unconstrained) coordinates of all parameters
`Params` maps the site name of every parameter, as the model wrote it, to its constrained value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Params = dict[str, Tensor]
Model = Callable[..., Any]
ParamsLike = Mapping[str, Tensor]
