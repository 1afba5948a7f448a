"""`ExactELBO`: a `pyro.infer.ELBO` whose q is the exact posterior of the discrete latents.

Its loss is -log p(x|θ), so that `SVI(model, guide, optim, ExactELBO())` is gradient ascent on the marginal
likelihood itself. Sites of the guide (a Delta, or any reparametrised distribution over continuous sites)
enter as in `Trace_ELBO`: log p(x, c) - log q(c) at the guide's draw, the discrete latents summed out.

Differences from `TraceEnum_ELBO`: latents need not be marked for enumeration, and the gradient is right
where Pyro's own log-einsum clamps it (normalised products below eps).
"""

from __future__ import annotations

from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor

from pyro_em.device import on_device
from pyro_em.errors import Refusal
from pyro_em.evidence.discrete import contract, weighted_sum
from pyro_em.model.capture import capture
from pyro_em.model.density import packed_log_density
from pyro_em.model.graph import build_graph
from pyro_em.model.indexed import Indexed, run_enumerated
from pyro_em.model.recognise import second_point
from pyro_em.model.row_maps import Maps, bind_indexed
from pyro_em.types import Model, Params


class ExactELBO(ELBO):
    """ELBO with the exact posterior over discrete latents.

    :param num_particles: draws of the guide to average over (1 suffices for Delta guides).
    :param max_plate_nesting: as in Pyro; found from the model if not given.

    Example, with the model of `fit`, whose only latent is discrete and needs no guide::

        >>> from pyro.infer import SVI
        >>> def guide(x):
        ...     pass
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=pyro_em.ExactELBO())
        >>> losses = [svi.step(x) for _ in range(20)]
        >>> losses[0] > losses[-1]
        True
    """

    _plain: ClassVar[WeakKeyDictionary[Any, bool]] = WeakKeyDictionary()

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("ExactELBO runs the model itself.")

    def differentiable_loss(self, model: Model, guide: Model, *args: Any, **kwargs: Any) -> Tensor:
        """-ELBO, differentiable in everything the model and guide read from the param store."""
        if self.max_plate_nesting == float("inf"):
            self._guess_max_plate_nesting(model, guide, args, kwargs)
        total = torch.zeros((), dtype=torch.float64)
        with on_device(args, kwargs):
            for _ in range(self.num_particles):
                total = total + self._particle(model, guide, args, kwargs) / self.num_particles
        return -total

    def _particle(self, model: Model, guide: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        guide_trace: Any = poutine.trace(guide).get_trace(*args, **kwargs)
        drawn = {
            name: site["value"]
            for name, site in guide_trace.nodes.items()
            if site["type"] == "sample" and not site["is_observed"]
        }
        indexed, maps = self._indexed(model, args, kwargs, drawn)
        depth = int(self.max_plate_nesting) + (0 if indexed is None else len(indexed.latents))
        with pyro.validation_enabled(False):
            # Subsample indices of the guide are replayed too, so that both see the same minibatch.
            run = run_enumerated(indexed, model, args, kwargs, drawn, max_plate_nesting=depth, live=True)
        for name, site in run.sites.items():
            if not (site.observed or site.enumerated or name in drawn):
                raise Refusal(
                    name,
                    "it is neither observed, nor discrete and enumerable, nor in the guide.",
                    "add it to the guide (AutoDelta, AutoNormal).",
                )
        factors = {name: packed_log_density(site) for name, site in run.sites.items()}
        graph = build_graph(run, factors, frozenset(), {}, maps=maps)
        total = torch.zeros((), dtype=torch.float64)
        for component in graph.components:
            total = total + weighted_sum(contract(graph, component, factors), component.weight)
        for name in graph.constants:
            total = total + weighted_sum(factors[name], graph.factors[name].weight)
        guide_trace.compute_log_prob()
        for name in drawn.keys() & run.sites.keys():
            total = total - guide_trace.nodes[name]["log_prob_sum"]
        return total

    def _indexed(
        self, model: Model, args: tuple[Any, ...], kwargs: dict[str, Any], drawn: Params
    ) -> tuple[Indexed | None, Maps]:
        """Latents that are read by an index from outside of their plates; a model that has none is looked at once."""
        if self._plain.get(model) is True:
            return None, {}
        seen = capture(model, args, kwargs)
        generator = torch.Generator().manual_seed(0)
        params = {name: second_point(record, generator) for name, record in seen.parameters.items()}
        own = [name for name in seen.sites if name not in drawn]
        _, indexed, maps = bind_indexed(seen, own, (), (model, args, kwargs, {**params, **drawn}))
        self._plain[model] = indexed is None
        return indexed, maps

    def loss(self, model: Model, guide: Model, *args: Any, **kwargs: Any) -> float:
        """-ELBO as a number; builds no graph."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Model, guide: Model, *args: Any, **kwargs: Any) -> float:
        """-ELBO as a number; its gradients are added to those of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())
