"""Shapes that broadcast: as torch says, without what torch needs to say it."""

from __future__ import annotations

import pytest
import torch

from pyro_em.shapes import quick_shapes


@pytest.mark.parametrize(
    "shapes", [((2, 1), (3,)), ((), (4, 1, 2), (1, 5, 1)), (3, (2, 1)), ((2,), (3,)), ((2, 3), (2,))]
)
def test_quick_shapes_are_torchs(shapes: tuple[tuple[int, ...], ...]) -> None:
    before = torch.broadcast_shapes

    def outcome() -> object:
        try:
            return torch.broadcast_shapes(*shapes)
        except RuntimeError as error:
            return type(error)

    expected = outcome()
    with quick_shapes():
        assert torch.broadcast_shapes is not before
        assert outcome() == expected
    assert torch.broadcast_shapes is before
