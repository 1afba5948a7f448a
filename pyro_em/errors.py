"""What can go wrong, each as a sentence: what, where (site, row, component, iteration), why, what to do.

Errors are typed so that a program can react to them; their text is for the person who reads it.
Warnings share one base, so that `warnings.filterwarnings("error", category=EMWarning)` is enough. A result keeps the
texts of those of its fit in `result.warnings`.

In the examples `model` is the mixture of two normals of `pyro_em.fit`, and `x` its data.
"""

from __future__ import annotations

from typing import Any


class PyroEMError(Exception):
    """Base of every error that this package raises on purpose.

    >>> try:
    ...     pyro_em.fit(model, x, max_iter=-1)
    ... except pyro_em.PyroEMError as error:
    ...     print(error)
    max_iter must be a non-negative integer, not -1.
    """

    def __reduce__(self) -> Any:
        """Made again from text and attributes: an error of a worker process has to reach its caller."""
        return _made_again, (type(self), self.args, self.__dict__)


def _made_again(kind: type[PyroEMError], args: tuple[Any, ...], attributes: dict[str, Any]) -> PyroEMError:
    error = BaseException.__new__(kind, *args)  # a MemoryError's own will not make its children
    error.__dict__.update(attributes)
    return error


class InputError(PyroEMError, ValueError):
    """Data, starting values, weights or options that cannot be used as given.

    >>> pyro_em.fit(model, torch.tensor([0.5, torch.nan]))
    Traceback (most recent call last):
    pyro_em.errors.InputError: Site 'x': the observation in row 1 is NaN or infinite. ...
    """


class Refusal(PyroEMError):
    """A structure which the exact engine will not approximate silently.

    Attributes: `site` (name), `reason` and `remedy` (sentences).

    >>> def counts(y):
    ...     with pyro.plate("data", len(y)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("y", dist.Poisson(z.exp()), obs=y)
    >>> try:
    ...     pyro_em.fit(counts, torch.tensor([1.0, 4.0]))
    ... except pyro_em.Refusal as refusal:
    ...     print(refusal.site, "-", refusal.reason)
    y - its Poisson density is not quadratic in the Gaussian latents 'z' that it reads.
    """

    def __init__(self, site: str, reason: str, remedy: str) -> None:
        self.site, self.reason, self.remedy = site, reason, remedy
        where = f"Site '{site}': {reason}" if site else f"{reason[:1].upper()}{reason[1:]}"
        super().__init__(f"{where} Remedy: {remedy}")


class ResourceError(PyroEMError, MemoryError):
    """A table that would not fit, found before it is allocated: see `pyro_em.settings.max_table_bytes`.

    >>> def many(y):
    ...     total = sum(pyro.sample(f"z_{i}", dist.Bernoulli(0.5)) for i in range(40))
    ...     pyro.sample("y", dist.Normal(total, 1.0), obs=y)
    >>> pyro_em.fit(many, torch.tensor(12.0))
    Traceback (most recent call last):
    pyro_em.errors.ResourceError: Site 'y': enumerating 40 latents ... jointly needs a table of ...
    """


class DegenerateLikelihoodError(PyroEMError):
    """A component has collapsed: its likelihood is unbounded and no maximum exists.

    Attributes: `site`, `component` (index or None), `iteration`, and `result`, the last finite
    `FitResult` (attached by `fit`).

    >>> try:
    ...     pyro_em.fit(model, x, init={"loc": [-2.0, 1.4], "sd": [1.0, 0.01]})
    ... except pyro_em.DegenerateLikelihoodError as error:
    ...     print(error.site, error.component, error.iteration, error.result.params["sd"].isfinite().all())
    x 1 1 tensor(True)
    """

    def __init__(self, site: str, component: int | None, reason: str, remedy: str) -> None:
        self.site, self.component, self.reason, self.remedy = site, component, reason, remedy
        self.iteration: int | None = None
        self.result: Any = None
        super().__init__(reason)

    def __str__(self) -> str:
        where = f"site '{self.site}'" + ("" if self.component is None else f", component {self.component}")
        when = "" if self.iteration is None else f" at iteration {self.iteration}"
        return f"Degenerate likelihood in {where}{when}: {self.reason} Remedy: {self.remedy}"


class MonotonicityError(PyroEMError):
    """The objective fell in an exact step, which the theory excludes.

    >>> print(pyro_em.MonotonicityError(iteration=7, previous=-120.25, current=-120.5))
    The objective fell from -120.25 to -120.5 at iteration 7. ...
    """

    def __init__(self, iteration: int, previous: float, current: float) -> None:
        self.iteration, self.previous, self.current = iteration, previous, current
        super().__init__(
            f"The objective fell from {previous!r} to {current!r} at iteration {iteration}. An exact EM step "
            "never lowers it: the model changed between two calls (does it draw random numbers, or change "
            "its data?), or this is a defect of pyro_em worth a report."
        )


class NonFiniteError(PyroEMError):
    """A log-density or parameter became NaN or infinite; `site` names where.

    >>> def poisson(y):
    ...     rate = pyro.param("rate", torch.tensor(1.0), constraint=constraints.positive)
    ...     with pyro.plate("data", len(y)):
    ...         pyro.sample("y", dist.Poisson(rate), obs=y)
    >>> pyro_em.fit(poisson, torch.tensor([0.0, 4.0]), init={"rate": 0.0})
    Traceback (most recent call last):
    pyro_em.errors.NonFiniteError: Site 'y': the data in rows 1 of plate ['data'] have probability zero ...
    """

    def __init__(self, site: str, message: str) -> None:
        self.site = site
        self.result: Any = None
        super().__init__(message)


class CheckpointError(PyroEMError):
    """A saved result that is truncated, altered, foreign or of another model.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     _ = file.write(b"something else")
    ...     file.flush()
    ...     pyro_em.load(file.name)
    Traceback (most recent call last):
    pyro_em.errors.CheckpointError: ...
    """


class EMWarning(UserWarning):
    """Base of every warning of this package.

    >>> import warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", pyro_em.EMWarning)
    ...     pyro_em.fit(model, x, init={"loc": [0.0, 0.0]})
    Traceback (most recent call last):
    pyro_em.errors.SymmetricStart: All states of latent 'z' start with equal parameters. ...
    """


class BoundaryEstimate(EMWarning):
    """A parameter ended on the boundary of its space, where standard errors do not apply.

    >>> pyro_em.fit(model, x, init={"w": [1.0, 0.0]}).warnings[1]
    "Parameters 'w' ended with entries on the boundary of their space ..."
    """


class SymmetricStart(EMWarning):
    """Components start equal; EM keeps them equal for ever.

    >>> pyro_em.fit(model, x, init={"loc": [0.0, 0.0]}).params["loc"]
    tensor([-0.4833, -0.4833])
    """


class UnidentifiedParameter(EMWarning):
    """No data (an empty component, an unvisited state) informs a parameter; it keeps its value.

    >>> result = pyro_em.fit(model, x, init={"w": [1.0, 0.0], "loc": [0.0, 7.0]})
    >>> result.warnings[0]
    "No data inform some entries of 'loc', 'sd' ..."
    >>> result.params["loc"]
    tensor([-0.4833,  7.0000])
    """


class CollinearDesign(EMWarning):
    """Covariates that the data cannot tell apart: their coefficients are not identified.

    >>> def line(v, y):
    ...     slope = pyro.param("slope", torch.zeros(2))
    ...     with pyro.plate("data", len(y)):
    ...         pyro.sample("y", dist.Normal(v @ slope, 1.0), obs=y)
    >>> pyro_em.fit(line, torch.stack([x, 2 * x], -1), x).warnings[0]
    "The design is collinear: the data cannot tell entries of 'slope' apart, ..."
    """


class LostPrecision(EMWarning):
    """The model's own arithmetic in float32 is far from that in float64, at the returned parameters.

    >>> def large(y):
    ...     rate = pyro.param("rate", torch.tensor([0.9999e7, 1.0001e7]), constraint=constraints.positive)
    ...     with pyro.plate("data", len(y)):
    ...         z = pyro.sample("z", dist.Bernoulli(0.4)).long()
    ...         pyro.sample("y", dist.Poisson(rate[z]), obs=y)
    >>> y = (1e7 + 3e3 * torch.randn(60, generator=torch.Generator().manual_seed(0))).round()
    >>> pyro_em.fit(large, y, max_iter=3).warnings[0]
    'At the returned parameters the model, in float32, has log-likelihood ...; in float64 it is ...'
    """


class SeparatedData(EMWarning):
    """A likelihood that rises for ever as coefficients grow: its maximum is at infinity.

    >>> def logistic(v, y):
    ...     slope = pyro.param("slope", torch.tensor(0.0))
    ...     with pyro.plate("data", len(y)):
    ...         pyro.sample("y", dist.Bernoulli(logits=slope * v), obs=y)
    >>> pyro_em.fit(logistic, x, (x > 0).float()).warnings[0]
    "The likelihood has no maximum in 'slope': it rises for ever, by ever less. ..."
    """
