# %% [markdown]
"""
# Your own model

Nobody can write rules for every model. This tutorial fits two that have none: a mixture of a distribution that we
write ourselves, and a mixture of experts, in which a small network decides. Then it uses them: standard errors,
predictions for new data, and a file to keep.
"""

# %%
import math
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions.utils import broadcast_all

import pyro_em

torch.set_default_dtype(torch.float64)
pyro.clear_param_store()

DATA = Path(pyro_em.__file__).parents[1] / "models" / "data"  # in a checkout of the repository
duration, wait = torch.from_numpy(np.loadtxt(DATA / "faithful.csv", delimiter=",", skiprows=1)).T.contiguous()

# %% [markdown]
# ## A distribution of your own
#
# The waits for Old Faithful are a mixture of two humps, and the humps may lean. A skew normal can:
#
# $$\log p(x) = \log 2 - \log s + \log \varphi(u) + \log \Phi(a u), \qquad u = (x - m) / s,$$
#
# with location $m$, scale $s$ and slant $a$; at $a = 0$ it is a normal. Pyro has no such distribution. What a fit needs
# is what Pyro needs: shapes, constraints, and a `log_prob` that torch can differentiate.


# %%
class SkewNormal(TorchDistribution):
    """Azzalini's skew normal; all arguments broadcast to the batch shape."""

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive, "slant": constraints.real}  # noqa: RUF012
    support = constraints.real

    def __init__(self, loc, scale, slant, validate_args=None):
        self.loc, self.scale, self.slant = broadcast_all(loc, scale, slant)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        return SkewNormal(*(p.expand(batch_shape) for p in (self.loc, self.scale, self.slant)), validate_args=False)

    def log_prob(self, value):
        u = (value - self.loc) / self.scale
        return math.log(2) - self.scale.log() - (u**2 + math.log(2 * math.pi)) / 2 + torch.special.log_ndtr(self.slant * u)

    def sample(self, sample_shape=torch.Size()):
        shape = self._extended_shape(sample_shape)
        delta = self.slant / (1 + self.slant**2).sqrt()
        half, other = torch.randn(2, *shape).unbind()
        return self.loc + self.scale * (delta * half.abs() + (1 - delta**2).sqrt() * other)


def mixture(x, skew):
    weights = pyro.param("weights", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
    loc = pyro.param("loc", torch.tensor([55.0, 80.0]))
    scale = pyro.param("scale", torch.tensor([6.0, 6.0]), constraint=constraints.positive)
    slant = pyro.param("slant", torch.zeros(2)) if skew else None
    with pyro.plate("eruptions", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        hump = SkewNormal(loc[z], scale[z], slant[z]) if skew else dist.Normal(loc[z], scale[z])
        pyro.sample("x", hump, obs=x)


for row in pyro_em.plan(mixture, wait, skew=True).m_step:
    print(f"{row.name:8} {row.route:8} {row.reason}")

# %% [markdown]
# The E-step is exact as ever: enumeration asks for densities, not for names. `weights` keeps its formula, since it
# belongs to a Categorical. The other three have none and are `numeric`: each M-step maximises the expected complete-data
# log-likelihood over them, and never lowers it. That is still EM; it is only dearer.

# %%
normal = pyro_em.fit(mixture, wait, skew=False, tol=1e-7)
skewed = pyro_em.fit(mixture, wait, skew=True, init=normal.params, accelerate="squarem")
for name, fit in (("normal", normal), ("skew", skewed)):
    print(f"{name:7} log-likelihood {fit.log_likelihood:.4f}, {fit.num_parameters} parameters, BIC {fit.bic:.2f}")
print()
print(skewed)

# %% [markdown]
# The start is the normal fit, a special case of the new model, so the log-likelihood could only rise. Whether it rose
# *enough* is another question, and BIC answers it: the smaller one is preferred. The intervals of the slants say how
# much these waits know about them.
#
# ## A model that learns: a mixture of experts
#
# Next, the wait is to be predicted from the duration before it. Two experts each draw a line; a gate, which sees the
# duration, says which expert to trust. The gate's softmax has no formula. As a `PyroModule`:


# %%
class Experts(PyroModule):
    """wait | z = k ~ Normal(intercept_k + slope_k · duration, scale_k),  z ~ Categorical(softmax(gate(duration)))."""

    def __init__(self):
        super().__init__()
        self.gate = PyroModule[nn.Linear](1, 2)
        self.gate.weight = nn.Parameter(torch.tensor([[-1.0], [1.0]]))
        self.gate.bias = nn.Parameter(torch.zeros(2))
        self.intercept = PyroParam(torch.tensor([55.0, 80.0]))
        self.slope = PyroParam(torch.zeros(2))
        self.scale = PyroParam(torch.tensor([6.0, 6.0]), constraints.positive)

    def forward(self, duration, wait):
        from_mean = duration - 3.5
        with pyro.plate("eruptions", len(duration)):
            z = pyro.sample("z", dist.Categorical(logits=self.gate(from_mean[:, None])))
            line = self.intercept[z] + self.slope[z] * from_mean
            pyro.sample("wait", dist.Normal(line, self.scale[z]), obs=wait)


experts = Experts()
for row in pyro_em.plan(experts, duration, wait).m_step:
    print(f"{row.name:12} {row.role:8} {row.route:8} {row.reason}")
