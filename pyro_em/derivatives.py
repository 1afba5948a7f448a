"""Vector-Jacobian products: c ↦ Jᵀc, and by applying it twice Jacobian-vector products.

`torch.autograd.grad(outputs, inputs, grad_outputs)` is the same, but imports torch's symbolic shapes, and sympy with
them, at its first call: a third of a second of a first fit. An inner product with the cotangents needs none of it,
where they are leaves. Others may be functions of the inputs, through which the inner product would be differentiated.

Not handled: outputs that are not differentiable (the caller knows which are).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pulled_back(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], *, graph: bool = False
) -> tuple[Tensor | None, ...]:
    """Jᵀc for every input, None for those that no output depends on. The graph of the outputs is kept.

    :param cotangents: of the shapes of the outputs.
    :param graph: the result is differentiable in the inputs and in the cotangents.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> pulled_back([x**2], [x], [torch.tensor([1.0, 10.0])])
    (tensor([ 2., 40.]),)
    """
    if any(c.grad_fn is not None for c in cotangents):  # which may depend on the inputs: not to be differentiated here
        return torch.autograd.grad(
            outputs, inputs, cotangents, retain_graph=True, create_graph=graph, allow_unused=True
        )
    with torch.enable_grad():
        parts = [(o * c).sum() for o, c in zip(outputs, cotangents, strict=True)]
        total = sum(parts[1:], parts[0])
    return torch.autograd.grad(total, inputs, retain_graph=True, create_graph=graph, allow_unused=True)
