"""The softmax of compiled E-steps against torch's own, by NumPy and by torch, alone and recorded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_em import softmax as under_test
from pyro_em.e_step.plated import compile_plated
from pyro_em.problem import bind
from pyro_em.softmax import FEW, padded, softmax, softmax_
from pyro_em.tape import Tape

STARTS, STATES, ROWS = 3, 7, 2000


def _table(dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(0)
    table = 30 * torch.randn(STARTS * STATES, ROWS, generator=g, dtype=torch.float64)
    table[0], table[:STATES, 7] = -1e30, -1e30  # an impossible state, and a row that is impossible for the first start
    return table.to(dtype)


def _expected(table: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    by_start = table.double().unflatten(0, (STARTS, STATES))
    r = by_start.softmax(1) * (1.0 if weight is None else weight)
    return r.flatten(0, 1), by_start.logsumexp(1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("by_numpy", [False, True])
def test_softmax_is_that_of_torch(
    by_numpy: bool, dtype: torch.dtype, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_test, "_vectorised", lambda: by_numpy)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    table = _table(dtype)
    assert under_test.by_numpy(table) is by_numpy and table.numel() > FEW
    weight = torch.arange(ROWS, dtype=torch.float64) if weighted else None
    expected, expected_lse = _expected(table, weight)
    r, lse = softmax(table, STARTS, weight)
    eps = torch.finfo(dtype).eps
    assert torch.equal(table, _table(dtype))
    assert len(r) == padded(len(table)) == 24 and not r[len(table) :].any()
    torch.testing.assert_close(r[: len(table)].double(), expected, rtol=40 * eps, atol=torch.finfo(dtype).tiny)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=4 * eps, atol=eps)
    lse_in_place = softmax_(table, STARTS, weight)
    assert torch.equal(table, r[: len(table)]) and torch.equal(lse, lse_in_place)


def test_small_tables_are_torch_operations() -> None:
    table, weight = _table()[:, :20], torch.arange(20, dtype=torch.float64)
    expected, expected_lse = _expected(table, weight)
    r, lse = softmax(table, STARTS, weight)
    torch.testing.assert_close(r, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-14, atol=0)


def test_rows_are_padded_where_the_last_ones_would_be_slow() -> None:
    assert [padded(n) for n in (2, 9, 10, 12, 13, 15, 16, 20, 61, 200)] == [2, 9, 12, 12, 13, 15, 24, 24, 61, 204]


def test_a_large_table_is_recorded() -> None:
    """Bit for bit, at another table too."""
    tape = Tape(lambda table: softmax(2.0 * table, STARTS), [_table()])
    other = _table() + torch.linspace(0, 1, ROWS, dtype=torch.float64)
    for table in (_table(), other):
        assert all(torch.equal(a, b) for a, b in zip(tape([table]), softmax(2.0 * table, STARTS), strict=True))


def test_nan_stays_nan() -> None:
    table = _table()
    table[3, 11] = torch.nan
    assert softmax_(table, STARTS)[0, 11].isnan() and table[:STATES, 11].isnan().all()


@pytest.mark.parametrize("num_components", [2, 10, 20])
def test_sums_in_chunks_and_for_several_starts(num_components: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of rows, the last one shorter, and starts together give the sums of one dense softmax."""
    from models import gmm

    data = gmm.load()[:, :2].repeat(30, 1)[:7001]
    data = data + torch.linspace(0, 1, len(data), dtype=torch.float64).unsqueeze(1)
    bound = bind(gmm.model, (data, num_components), {}, with_prior=False)
    whole = compile_plated(bound)
    monkeypatch.setattr("pyro_em.e_step.product.CHUNK_CELLS", 2**13)
    parts = compile_plated(bound)
    assert whole.compact or num_components > 8
    assert not parts.compact
    params = bound.start
    stages = [whole.before(params, torch.tensor(1e30, dtype=torch.float64)) for _ in range(3)]
    w = stages[0].tensors[0]
    phi = torch.cat([chunk.clone() for _, chunk in parts.programs[0].product.features.chunks()], 1)
    log_joint = w @ phi
    expected = (log_joint.softmax(0) @ phi.mT, log_joint.logsumexp(0).sum())
    for engine in (whole, parts):
        for totals, evidence in engine.core(stages):
            torch.testing.assert_close(totals, expected[0], rtol=1e-12, atol=1e-9)
            torch.testing.assert_close(evidence[0], expected[1], rtol=1e-13, atol=0)
