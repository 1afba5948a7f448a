"""Vector-Jacobian products: c ↦ Jᵀc, and by applying it twice Jacobian-vector products.

`torch.autograd.grad(outputs, inputs, grad_outputs)` is the same, but imports torch's symbolic shapes, and sympy with
them, at its first call: a third of a second of a first fit. What it calls at last, torch's engine, needs none of that,
and takes half of the time: a model is bound by a hundred such products. Of a torch that has it under no such name,
an inner product with the cotangents is differentiated instead, where these are leaves (others may be functions of the
inputs, through which it would be differentiated).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

try:
    from torch.autograd.graph import _engine_run_backward
except ImportError:  # it is torch's own
    _engine_run_backward = None  # type: ignore[assignment]
ENGINE: Callable[..., Any] | None = _engine_run_backward


def pulled_back(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], *, graph: bool = False
) -> tuple[Tensor | None, ...]:
    """Jᵀc for every input, None for those that no output depends on. The graph of the outputs is kept.

    :param cotangents: of the shapes and types of the outputs.
    :param graph: the result is differentiable in the inputs and in the cotangents.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> pulled_back([x**2], [x], [torch.tensor([1.0, 10.0])])
    (tensor([ 2., 40.]),)
    """
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not pairs:
        return (None,) * len(inputs)
    roots, own = zip(*pairs, strict=True)
    if ENGINE is not None:
        found: tuple[Tensor | None, ...] = ENGINE(roots, own, True, graph, tuple(inputs), True, accumulate_grad=False)
        return found
    if any(c.grad_fn is not None for c in own):
        return torch.autograd.grad(roots, inputs, own, retain_graph=True, create_graph=graph, allow_unused=True)
    with torch.enable_grad():
        parts = [(o * c).sum() for o, c in pairs]
        total = sum(parts[1:], parts[0])
    return torch.autograd.grad(total, inputs, retain_graph=True, create_graph=graph, allow_unused=True)
