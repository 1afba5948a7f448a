"""A result in one file: tensors as raw bits, everything else as JSON, and a checksum over both.

    magic (8 bytes) | SHA-256 of all that follows (32) | length of the header (8, little endian) |
    header (JSON) | tensors, little endian, one after the other in the order of the header

There is no pickle, no archive and no name that would be imported: reading a file runs nothing and can only
give numbers, words from fixed tables, and text. The model and its data are not in the file; give them to
`load` to have posteriors, standard errors and predictions again. The checksum finds accidents, not forgery.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_em.constraint_names import constraint_from_name, constraint_name
from pyro_em.errors import CheckpointError, EMWarning, InputError
from pyro_em.evidence.rule import Quadrature
from pyro_em.files import read_regular, replacing
from pyro_em.model.capture import capture
from pyro_em.model.missing import complete_cases
from pyro_em.model.plan import Plan, Row
from pyro_em.problem import Problem, bind
from pyro_em.result import FitResult
from pyro_em.stop import Outcome
from pyro_em.store import isolated_rng
from pyro_em.types import Model, Params

MAGIC = b"PYROEM\x01\n"
DIGEST_AT, LENGTH_AT, HEADER_AT = 8, 40, 48
DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


def save(result: FitResult, path: str | Path) -> None:
    """Write a result to `path`, replacing what is there; on any error the old file stays whole.

    Parameters are written bit for bit, with history, plan, outcome, warnings and restarts.

    :raises OSError: if the path cannot be written to, or is a symbolic link.
    """
    header, payload = _header(result), b"".join(_bytes(value) for value in result.params.values())
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + payload
    with replacing(path) as temporary:
        temporary.write_bytes(MAGIC + hashlib.sha256(content).digest() + content)


def load(
    path: str | Path,
    model: Model | None = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> FitResult:
    """Read a result. With the model and the data of the fit it can do all that the fitted one could.

    :param model: the fitted model; called with `args` and `kwargs`, and `weights` as they were given to `fit`.
    :raises CheckpointError: if the file is truncated, altered or foreign, or its parameters have other
        names, shapes or constraints than the model's.
    :raises OSError: if there is no such file, or it is a symbolic link.

    Warns `EMWarning` if the model with these data has another log-likelihood than was saved.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pyro_em.fit(model, x).save(f"{folder}/result.nc")
    ...     loaded = pyro_em.load(f"{folder}/result.nc", model=model, args=(x,))
    >>> loaded.posterior().mode()["z"]
    tensor([0, 0, 0, 1, 1, 1])
    """
    header, payload = _parts(read_regular(path), path)
    try:
        result = _result(header, payload)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{path}: the content is not that of a saved result ({error}).") from None
    if model is not None:
        model = complete_cases(model, result.missing)
        _bind(result, path, model, args, dict(kwargs or {}), weights)
    return result


def _header(result: FitResult) -> dict[str, Any]:
    words = {}
    for name, constraint in result.constraints.items():
        try:
            words[name] = constraint_name(constraint)
        except InputError:  # a constraint of the user's own: it comes back with the model
            continue
    return {
        "tensors": [
            {"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
            for name, value in result.params.items()
        ],
        "algorithm": result.algorithm,
        "log_likelihood": result.log_likelihood,
        "log_posterior": result.log_posterior,
        "elbo": result.elbo,
        "exact": result.exact,
        "outcome": result.outcome.name,
        "num_iterations": result.num_iterations,
        "history": result.history,
        "plan": asdict(result.plan),
        "warnings": result.warnings,
        "restarts": result.restarts,
        "seed": result.seed,
        "missing": result.missing,
        "rules": {name: asdict(rule) for name, rule in result.rules.items()},
        "num_observations": result.num_observations,
        "num_parameters": result.num_parameters,
        "integration_error": result.integration_error,
        "free": result.free,
        "constraints": words,
    }


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _parts(content: bytes, path: str | Path) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a file whose checksum is right."""
    if content[:DIGEST_AT] != MAGIC:
        raise CheckpointError(f"{path} was not written by pyro_em (or not by this version of its format).")
    digest, rest = content[DIGEST_AT:LENGTH_AT], content[LENGTH_AT:]
    if hashlib.sha256(rest).digest() != digest:
        raise CheckpointError(f"{path} is truncated or has been altered: its checksum does not fit its content.")
    length: int = struct.unpack("<Q", rest[:8].ljust(8, b"\xff"))[0]
    if length > len(rest) - 8:
        raise CheckpointError(f"{path} is truncated: its header is longer than the file.")
    try:
        header = json.loads(rest[8 : 8 + length].decode())
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object.")
    return header, rest[8 + length :]


def _params(rows: Any, payload: bytes) -> Params:
    params: Params = {}
    start = 0
    for row in _typed(rows, list):
        name, dtype = _typed(row["name"], str), DTYPES[_typed(row["dtype"], str)]
        shape = [_typed(size, int) for size in _typed(row["shape"], list)]
        if any(size < 0 for size in shape) or name in params:
            raise ValueError(f"tensor '{name}' is listed twice, or with the shape {shape}")
        size = math.prod(shape) * dtype.itemsize
        piece = payload[start : start + size]
        if len(piece) != size:
            raise ValueError(f"tensor '{name}' is longer than the file")
        raw = torch.frombuffer(bytearray(piece), dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
        params[name] = raw.view(dtype).reshape(shape)
        start += size
    if start != len(payload):
        raise ValueError("there are more bytes than the tensors have")
    return params


def _result(header: dict[str, Any], payload: bytes) -> FitResult:
    words = _typed(header["constraints"], dict)
    return FitResult(
        params=_params(header["tensors"], payload),
        algorithm=_typed(header["algorithm"], str),
        log_likelihood=_number_or_none(header["log_likelihood"]),
        log_posterior=_number_or_none(header["log_posterior"]),
        elbo=_typed(header["elbo"], float, int),
        exact=_typed(header["exact"], bool),
        outcome=Outcome[_typed(header["outcome"], str)],
        num_iterations=_typed(header["num_iterations"], int),
        history={
            name: [_typed(value, float, int) for value in _typed(values, list)]
            for name, values in _typed(header["history"], dict).items()
        },
        plan=_plan(header["plan"]),
        warnings=_texts(header["warnings"]),
        restarts=tuple((_typed(value, float, int), _typed(end, str)) for value, end in header["restarts"]),
        seed=None if header["seed"] is None else _typed(header["seed"], int),
        missing=None if header["missing"] is None else _typed(header["missing"], str),
        rules={name: Quadrature(**_typed(rule, dict)) for name, rule in _typed(header["rules"], dict).items()},
        num_observations=_typed(header["num_observations"], float, int),
        num_parameters=_typed(header["num_parameters"], int),
        integration_error=_typed(header.get("integration_error", 0.0), float, int),
        free=_texts(header["free"]),
        constraints={name: constraint_from_name(_typed(word, str)) for name, word in words.items()},
    )


def _plan(fields: Any) -> Plan:
    def rows(name: str) -> tuple[Row, ...]:
        return tuple(Row(**{k: _typed(v, str) for k, v in row.items()}) for row in _typed(fields[name], list))

    return Plan(
        algorithm=_typed(fields["algorithm"], str),
        exact=_typed(fields["exact"], bool),
        objective=_typed(fields["objective"], str),
        e_step=rows("e_step"),
        m_step=rows("m_step"),
        predicted_bytes=_typed(fields["predicted_bytes"], int),
        notes=_texts(fields["notes"]),
        engine=_typed(fields["engine"], str),
    )


def _typed(value: Any, *kinds: type) -> Any:
    """The value if it is of one of the kinds; JSON's true is no integer."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(f"{str(value)[:40]!r} stands where {' or '.join(k.__name__ for k in kinds)} should")
    return value


def _number_or_none(value: Any) -> float | None:
    return None if value is None else _typed(value, float, int)


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(_typed(value, str) for value in _typed(values, list))


def _bind(
    result: FitResult,
    path: str | Path,
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    weights: Mapping[str, Tensor] | None,
) -> None:
    """Check the parameters against the model, then bind it at them."""
    with isolated_rng(0):
        seen = capture(model, args, kwargs)
        declared = {n: (record.value, record.constraint) for n, record in seen.parameters.items()}
        declared |= {n: (s.value, s.fn.support) for n, s in seen.sites.items() if not s.observed and n in result.params}
        missing = [name for name in seen.parameters if name not in result.params]
        unknown = [name for name in result.params if name not in declared] if result.exact else []
        if missing or unknown:
            raise CheckpointError(
                f"{path} is of another model: parameters {missing or 'none'} of the model are not in the file, and "
                f"{unknown or 'none'} of the file are not in the model."
            )
        for name, (value, constraint) in declared.items():
            _check(path, name, value, constraint, result)
        if result.log_likelihood is None:
            return  # nothing exact to bind: the latents were in a guide
        latent = [n for n, s in seen.sites.items() if not (s.observed or s.discrete or s.markov or n in result.params)]
        result.problem = _bound(result, model, args, kwargs, weights, latent)
    result.constraints = {n: record.constraint for n, record in result.problem.parameters.items()}
    _compare(result, result.problem, path)


def _check(path: str | Path, name: str, value: Tensor, constraint: Any, result: FitResult) -> None:
    saved = result.params[name]
    if saved.shape != value.shape:
        raise CheckpointError(
            f"{path}: parameter '{name}' has shape {tuple(saved.shape)}, the model's {tuple(value.shape)}."
        )
    try:
        word = constraint_name(constraint)
    except InputError:
        return
    if name in result.constraints and constraint_name(result.constraints[name]) != word:
        raise CheckpointError(
            f"{path}: parameter '{name}' was under the constraint '{constraint_name(result.constraints[name])}', in "
            f"the model it is under '{word}'."
        )


def _bound(
    result: FitResult, model: Model, args: Any, kwargs: Any, weights: Mapping[str, Tensor] | None, latent: list[str]
) -> Problem:
    roles = {row.name: "parameter" for row in result.plan.m_step if row.role == "pyro.sample"}
    roles |= dict.fromkeys(latent, "latent")  # also those that only the caller's roles made latents
    return bind(
        model, args, kwargs, with_prior=result.log_posterior is not None, roles=roles, weights=weights,
        params=result.params, rules=result.rules,
    )  # fmt: skip


def _compare(result: FitResult, problem: Problem, path: str | Path) -> None:
    evidence, _ = problem.evidence({name: result.params[name] for name in problem.parameters})
    now, saved = float(evidence.log_likelihood), result.log_likelihood
    assert saved is not None
    eps = max(torch.finfo(value.dtype).eps for value in result.params.values()) if result.params else 1e-15
    if not abs(now - saved) <= 1e3 * eps * (1 + float(evidence.magnitude)):
        warnings.warn(
            f"{path}: with the model and data given the log-likelihood is {now:.9g}, the saved one is {saved:.9g}. "
            "Posteriors and standard errors will be those of the data given.",
            EMWarning,
            stacklevel=4,
        )
