"""Whether gradients tell all that the model's sites have of its parameters.

What an argument is made of is read off gradients (recognise.py). A value that follows a parameter without one, because
the model detaches it (`.detach()`, `.item()`, NumPy, `torch.no_grad()`), would be taken for a constant: the M-step
would leave the parameter where it starts, and call that a maximum. Two runs at different parameters tell: what has no
gradient is the same in both. A parameter without any use is moved alone in a third run, as a value may follow one
parameter with a gradient and another without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pyro_em.derivatives import pulled_back
from pyro_em.errors import Refusal
from pyro_em.model.capture import ParameterRecord
from pyro_em.model.density import log_density
from pyro_em.model.recognise import recognise
from pyro_em.model.trace import Run, SiteRecord
from pyro_em.model.use import Use

REASON = (
    "follows the parameters{names}, but no gradient leads back to them: a parameter is detached on the way (.detach(), "
    ".item(), float(), NumPy, torch.no_grad()), or the model draws random numbers of its own."
)
REMEDY = (
    'compute it by torch operations alone; a parameter that is not to move has m_step={"name": "fixed"}, and random '
    "numbers are sample sites."
)


def certified_uses(
    first: Run,
    run: Callable[[Mapping[str, Tensor]], Run],
    points: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    records: Mapping[str, ParameterRecord],
    priors: frozenset[str],
    second: Run | None = None,
) -> dict[str, tuple[Use, ...]]:
    """The uses of every parameter (recognise.py).

    :param first: the run at the first of the `points`, with gradients, as `run` gives them, and maybe to latents.
    :param second: that at the second of them, if it is known.
    :raises Refusal: naming the site, or the parameter, where gradients do not tell.
    """
    _check_leaves({name: leaf for name, leaf in first.leaves.items() if name in records})
    second = run(points[1]) if second is None else second
    uses = recognise(first, second, records, priors, points)
    told = {(use.site, use.slot) for own in uses.values() for use in own}
    leaves = [leaf for name, leaf in first.leaves.items() if name in records]
    others = any(leaf.requires_grad for name, leaf in first.leaves.items() if name not in records)
    for name, site in first.sites.items():
        for what, slot, value, other in _parts(site, second.sites[name]):
            reached = value.requires_grad and (not others or (name, slot) in told or _reached(value, leaves))
            if not (reached or _same(value, other)):
                raise Refusal(name, f"{what} {REASON.format(names='')}", REMEDY)
    unused = [name for name, own in uses.items() if not own and name in first.leaves]
    if unused:
        third = run({**points[0], **{name: points[1][name] for name in unused}})
        for name, site in first.sites.items():
            for what, _, value, other in _parts(site, third.sites[name]):
                if not _same(value, other):
                    names = " " + ", ".join(f"'{n}'" for n in unused)
                    raise Refusal(name, f"{what} {REASON.format(names=names)}", REMEDY)
    return uses


def _check_leaves(leaves: Mapping[str, Tensor]) -> None:
    for name, leaf in leaves.items():
        if not leaf.requires_grad:
            raise Refusal(
                name,
                "the model switches off the gradient of this parameter (requires_grad_(False)).",
                f'leave it on; a parameter that is not to move has m_step={{"{name}": "fixed"}}.',
            )


def _parts(site: SiteRecord, other: SiteRecord) -> Iterator[tuple[str, str | None, Tensor, Tensor]]:
    """What a site is made of, in words and as an argument, and the same in another run."""
    for argument, value in (site.arguments or {}).items():
        yield f"its argument '{argument}'", argument, value, (other.arguments or {})[argument]
    if site.arguments is None:
        yield "its log-density", None, log_density(site), log_density(other)
    if site.observed:
        yield "its observed value", None, site.value, other.value


def _reached(value: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Whether a gradient leads back to a parameter, not to a latent alone."""
    found = pulled_back([value], leaves, [torch.ones_like(value)]) if leaves else ()
    return any(gradient is not None for gradient in found)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan()) if a.is_floating_point() else a == b).all())
