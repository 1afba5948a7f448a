"""Saved results: everything comes back, bit for bit; every damaged or hostile file is refused, unexecuted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_em
from models import gmm, hmm
from pyro_em.checkpoint import HEADER_AT, MAGIC
from pyro_em.files import replacing


@pytest.fixture(scope="module")
def result() -> pyro_em.FitResult:
    return pyro_em.fit(gmm.bayesian, gmm.load(), algorithm="map-em", restarts=2, seed=3)


@pytest.fixture
def path(result: pyro_em.FitResult, tmp_path: Path) -> Path:
    result.save(tmp_path / "fit.em")
    return tmp_path / "fit.em"


def forged(header: dict[str, Any] | bytes, payload: bytes = b"") -> bytes:
    """A file with a right checksum and whatever else."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + payload
    return MAGIC + hashlib.sha256(content).digest() + content


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = struct.unpack("<Q", content[HEADER_AT - 8 : HEADER_AT])[0]
    return json.loads(content[HEADER_AT : HEADER_AT + length]), content[HEADER_AT + length :]


def test_everything_comes_back(result: pyro_em.FitResult, path: Path) -> None:
    again = pyro_em.load(path)
    for field in dataclasses.fields(result):
        if field.name in ("params", "problem"):
            continue
        assert str(getattr(again, field.name)) == str(getattr(result, field.name)), field.name
    assert again.history == result.history and again.plan == result.plan
    assert list(again.params) == list(result.params)
    for name, value in result.params.items():
        assert again.params[name].dtype == value.dtype and torch.equal(again.params[name], value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_raw_bits_of_any_dtype_and_shape(result: pyro_em.FitResult, tmp_path: Path, dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    params = {
        "scalar": torch.tensor(-0.0, dtype=dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
        "odd": torch.tensor([[torch.inf, tiny, tiny / 4], [1 / 3, torch.nan, -torch.inf]], dtype=dtype).T,
    }
    dataclasses.replace(result, params=params, constraints={}).save(tmp_path / "fit.em")
    again = pyro_em.load(tmp_path / "fit.em").params
    for name, value in params.items():
        assert again[name].shape == value.shape and again[name].dtype == dtype
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (again[name], value)]
        assert torch.equal(*bits)


def test_file_saved_again_is_the_same_file(path: Path, tmp_path: Path) -> None:
    pyro_em.load(path).save(tmp_path / "again.em")
    assert (tmp_path / "again.em").read_bytes() == path.read_bytes()


def test_loaded_result_needs_its_model_for_posteriors(path: Path) -> None:
    again = pyro_em.load(path)
    assert again.converged and "loc[0,0]" in str(again)
    with pytest.raises(pyro_em.InputError, match="Give it one"):
        again.posterior()


def test_with_its_model_a_loaded_result_does_what_the_fitted_one_did(result: pyro_em.FitResult, path: Path) -> None:
    again = pyro_em.load(path, model=gmm.bayesian, args=(gmm.load(),))
    assert torch.equal(again.posterior().marginal("z").probs, result.posterior().marginal("z").probs)
    assert torch.equal(again.log_prob(), result.log_prob())
    for name, error in result.standard_errors().items():
        assert torch.equal(again.standard_errors()[name], error)
    assert again.icl == result.icl and str(again) == str(result)


def test_overridden_roles_and_weights_are_bound_again(tmp_path: Path) -> None:
    def model(counts: torch.Tensor) -> None:
        weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
        rate = pyro.sample("rate", dist.Gamma(torch.tensor([2.0, 2.0]), weight).to_event(1))
        with pyro.plate("days", len(counts)):
            z = pyro.sample("z", dist.Bernoulli(weight))
            pyro.sample("count", dist.Poisson(rate[z.long()]), obs=counts)

    counts = torch.tensor([0.0, 1.0, 2.0, 7.0, 8.0])
    weights = {"days": torch.tensor([3.0, 2.0, 1.0, 2.0, 4.0])}
    options = {"roles": {"weight": "parameter", "rate": "parameter"}, "weights": weights}
    init = {"weight": torch.tensor(0.5), "rate": torch.tensor([1.0, 6.0])}
    result = pyro_em.fit(model, counts, algorithm="map-em", init=init, **options)
    result.save(tmp_path / "fit.em")
    again = pyro_em.load(tmp_path / "fit.em", model=model, args=(counts,), weights=weights)
    assert again.posterior().log_evidence == result.log_likelihood
    with pytest.warns(pyro_em.EMWarning, match="the saved one is"):
        pyro_em.load(tmp_path / "fit.em", model=model, args=(counts,))


def test_other_data_warn(path: Path) -> None:
    with pytest.warns(pyro_em.EMWarning, match="the saved one is"):
        pyro_em.load(path, model=gmm.bayesian, args=(gmm.load() + 1.0,))


def test_loading_leaves_random_state_and_param_store_alone(path: Path) -> None:
    before = torch.random.get_rng_state()
    pyro_em.load(path, model=gmm.bayesian, args=(gmm.load(),))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (gmm.model, gmm.load(), "another model"),
        (gmm.bayesian, gmm.load()[:, :1], "shape"),
        (hmm.poisson, hmm.load()[:5], "another model"),
    ],
)
def test_another_model_is_refused(path: Path, model: Any, data: torch.Tensor, message: str) -> None:
    with pytest.raises(pyro_em.CheckpointError, match=message):
        pyro_em.load(path, model=model, args=(data,))


def test_other_number_of_components_is_refused(path: Path) -> None:
    with pytest.raises(pyro_em.CheckpointError, match=r"'weights' has shape \(2,\), the model's \(3,\)"):
        pyro_em.load(path, model=gmm.bayesian, args=(gmm.load(),), kwargs={"num_components": 3})


def test_other_constraint_is_refused(tmp_path: Path) -> None:
    def model(x: torch.Tensor, constraint: Any) -> None:
        p = pyro.param("p", torch.tensor(0.4), constraint=constraint)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Bernoulli(p), obs=x)

    x = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    unit, positive = dist.constraints.unit_interval, dist.constraints.positive
    pyro_em.fit(model, x, unit, init={"p": 0.3}).save(tmp_path / "fit.em")
    with pytest.raises(pyro_em.CheckpointError, match="under the constraint 'unit_interval'"):
        pyro_em.load(tmp_path / "fit.em", model=model, args=(x, positive))


def test_fit_by_svi_comes_back(tmp_path: Path) -> None:
    result = pyro_em.fit(gmm.bayesian, gmm.load(), algorithm="svi", max_iter=3, seed=0)
    result.save(tmp_path / "fit.em")
    again = pyro_em.load(tmp_path / "fit.em", model=gmm.bayesian, args=(gmm.load(),))
    assert again.elbo == result.elbo and not again.exact
    assert torch.equal(again.posterior().marginal("z").probs, result.posterior().marginal("z").probs)


def test_every_truncation_is_found(path: Path) -> None:
    content = path.read_bytes()
    for end in {0, 1, 7, 8, 20, 40, 47, 48, 60, *range(100, len(content), 97), len(content) - 1}:
        path.write_bytes(content[:end])
        with pytest.raises(pyro_em.CheckpointError):
            pyro_em.load(path)


def test_every_flipped_bit_is_found(path: Path) -> None:
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in [0, 8, 40, 48, len(content) - 1, *rng.integers(len(content), size=60).tolist()]:
        changed = bytearray(content)
        changed[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(changed))
        with pytest.raises(pyro_em.CheckpointError):
            pyro_em.load(path)


class _Bomb:
    """Unpickling it makes a file."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return open, (self.target, "w")


def test_foreign_files_are_refused_and_nothing_runs(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    foreign = tmp_path / "foreign"
    bomb = pickle.dumps(_Bomb(str(target)))
    for content in (b"", b"PK\x03\x04", bomb, MAGIC + bomb, forged(bomb), forged({}, bomb), os.urandom(500)):
        foreign.write_bytes(content)
        with pytest.raises(pyro_em.CheckpointError):
            pyro_em.load(foreign)
    torch.save({"a": torch.ones(2)}, foreign)
    with pytest.raises(pyro_em.CheckpointError, match="was not written by pyro_em"):
        pyro_em.load(foreign)
    assert not target.exists()


def test_headers_that_lie_are_refused(path: Path) -> None:
    header, payload = parts(path)
    first = header["tensors"][0]
    lies: list[dict[str, Any] | bytes] = [
        b"[]", b"1", b"nonsense", b"\xff\xfe", b"[" * 100_000,
        {k: v for k, v in header.items() if k != "plan"},
        {**header, "outcome": "__class__"},
        {**header, "outcome": ["converged"]},
        {**header, "exact": 1},
        {**header, "log_likelihood": "0"},
        {**header, "num_iterations": True},
        {**header, "history": {"objective": [None]}},
        {**header, "history": []},
        {**header, "restarts": [["a", 1]]},
        {**header, "restarts": 3},
        {**header, "seed": 1.5},
        {**header, "warnings": "text"},
        {**header, "plan": {**header["plan"], "e_step": [{"name": "z", "evil": "x"}]}},
        {**header, "plan": {**header["plan"], "m_step": ["x"]}},
        {**header, "constraints": {"loc": "os.system"}},
        {**header, "constraints": {"loc": "independent 1 independent 1 real"}},
        {**header, "tensors": []},
        {**header, "tensors": header["tensors"] * 2},
        {**header, "tensors": [{**first, "dtype": "object"}, *header["tensors"][1:]]},
        {**header, "tensors": [{**first, "dtype": "load"}, *header["tensors"][1:]]},
        {**header, "tensors": [{**first, "shape": [-1]}, *header["tensors"][1:]]},
        {**header, "tensors": [{**first, "shape": [10**30]}, *header["tensors"][1:]]},
        {**header, "tensors": [{**first, "shape": [0, 10**30]}, *header["tensors"][1:]]},
        {**header, "tensors": [{**first, "shape": [2.0]}, *header["tensors"][1:]]},
    ]  # fmt: skip
    for lie in lies:
        path.write_bytes(forged(lie, payload))
        with pytest.raises(pyro_em.CheckpointError):
            pyro_em.load(path)
    path.write_bytes(forged(header, payload + b"\0"))
    with pytest.raises(pyro_em.CheckpointError, match="more bytes"):
        pyro_em.load(path)
    path.write_bytes(forged(header, payload))  # the helper itself makes whole files
    assert pyro_em.load(path).converged


def test_length_of_the_header_may_not_exceed_the_file(path: Path) -> None:
    content = struct.pack("<Q", 2**63) + b"{}"
    path.write_bytes(MAGIC + hashlib.sha256(content).digest() + content)
    with pytest.raises(pyro_em.CheckpointError, match="truncated"):
        pyro_em.load(path)


def test_symbolic_links_and_special_files_are_refused(result: pyro_em.FitResult, path: Path, tmp_path: Path) -> None:
    link, pipe = tmp_path / "link.em", tmp_path / "pipe.em"
    link.symlink_to(path)
    os.mkfifo(pipe)
    before = path.read_bytes()
    for special in (link, pipe, tmp_path):
        with pytest.raises(OSError):
            pyro_em.load(special)
        with pytest.raises(OSError):
            result.save(special)
    assert link.is_symlink() and path.read_bytes() == before


def test_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        pyro_em.load(tmp_path / "none.em")


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_new_file_has_the_usual_permissions(path: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
