"""Contracts of the private Pyro names in model/compat.py: a new Pyro release that breaks one fails here, by name."""

from __future__ import annotations

import inspect
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.nn import PyroModule
from torch import Tensor

from pyro_em.model import compat


def chain(y: Tensor) -> None:
    """Two plates, a subsampled one among them, and a chain of two enumerated steps."""
    with pyro.plate("outer", 4, subsample_size=3, dim=-2), pyro.plate("inner", 2, dim=-1):
        z = torch.tensor(0)
        for t in pyro.markov(range(2)):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([[0.2, 0.8], [0.6, 0.4]])[z]))
            pyro.sample(f"y_{t}", dist.Normal(z.double(), 1.0), obs=y)


@pytest.fixture
def trace() -> Any:
    model = config_enumerate(chain, default="parallel")
    return compat.prune_and_symbolize(poutine.trace(compat.enumeration(2)(model)).get_trace(torch.zeros(3, 2)))


def test_every_function_has_a_contract_here() -> None:
    here = inspect.getsource(inspect.getmodule(test_every_function_has_a_contract_here))  # type: ignore[arg-type]
    for name, function in vars(compat).items():
        if inspect.isfunction(function) and function.__module__ == compat.__name__ and not name.startswith("_"):
            assert f"compat.{name}(" in here, f"compat.{name} has no contract test"


@pytest.mark.parametrize(
    "wrap", [lambda d: d, lambda d: d.expand([4, 3]), lambda d: d.to_event(1), lambda d: d.mask(True)]
)
def test_raw_arguments_are_those_that_the_user_wrote(wrap: Any) -> None:
    """Categorical would normalise them; plates, events and masks wrap the distribution."""
    weights = torch.tensor([2.0, 6.0]).expand(3, 2)
    with compat.recording_arguments():
        made = wrap(dist.Categorical(weights))
    raw = compat.raw_arguments(made)
    assert raw is not None
    assert raw.keys() == {"probs"}
    assert raw["probs"] is weights
    assert isinstance(compat.base_distribution(made), dist.Categorical)


def test_arguments_by_position_and_name_and_none_left_out() -> None:
    loc, tril = torch.zeros(2), torch.eye(2)
    with compat.recording_arguments():
        normal = dist.Normal(0.5, scale=2.0)
        joint = dist.MultivariateNormal(loc, scale_tril=tril, validate_args=False)
    assert compat.raw_arguments(normal) == {"loc": 0.5, "scale": 2.0}
    raw = compat.raw_arguments(joint)
    assert raw is not None
    assert raw.keys() == {"loc", "scale_tril"}
    assert raw["scale_tril"] is tril


def test_recording_ends_with_its_context() -> None:
    from pyro.distributions.distribution import COERCIONS

    before = list(COERCIONS)
    with pytest.raises(RuntimeError), compat.recording_arguments():
        assert len(COERCIONS) == len(before) + 1
        raise RuntimeError
    assert before == COERCIONS
    assert not hasattr(dist.Normal(0.0, 1.0), compat._RAW)


@pytest.mark.parametrize(
    ("made", "names"),
    [
        (dist.Normal(0.0, 1.0).expand([2]).to_event(1), {"loc", "scale"}),
        (dist.InverseGamma(torch.tensor(2.0), torch.tensor(3.0)), {"concentration", "rate"}),
        (dist.MultivariateNormal(torch.zeros(2), precision_matrix=torch.eye(2)), {"loc", "precision_matrix"}),
        (dist.Categorical(logits=torch.zeros(3)), {"logits"}),
        (dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), 1.0)), None),
    ],
)
def test_arguments_of_a_distribution_that_was_made_before(made: Any, names: set[str] | None) -> None:
    raw = compat.raw_arguments(made)
    if names is None:
        assert raw is None
        return
    assert raw is not None and raw.keys() == names
    again = type(compat.base_distribution(made))(**raw)
    value = again.sample()
    assert torch.equal(again.log_prob(value), compat.base_distribution(made).log_prob(value))


def test_recorded_distributions_behave_as_ever() -> None:
    with compat.recording_arguments():
        made = dist.Gamma(torch.tensor(2.0), torch.tensor(3.0)).expand([4]).to_event(1)
    plain = dist.Gamma(torch.tensor(2.0), torch.tensor(3.0)).expand([4]).to_event(1)
    value = torch.rand(5, 4)
    assert made.batch_shape == plain.batch_shape
    assert made.event_shape == plain.event_shape
    assert torch.equal(made.log_prob(value), plain.log_prob(value))


def test_base_distribution_unwraps_everything() -> None:
    inner = dist.Normal(torch.zeros(3), 1.0)
    assert compat.base_distribution(inner) is inner
    assert compat.base_distribution(inner.mask(False).to_event(1)) is inner
    expanded = dist.ExpandedDistribution(dist.Delta(torch.tensor(0.0)), [2])
    assert type(compat.base_distribution(expanded)) is dist.Delta


def test_prune_and_symbolize_name_every_dim(trace: Any) -> None:
    assert not any(name in trace.nodes for name in ("outer", "inner")), "subsample sites are dropped"
    symbols = compat.plate_symbols(trace)
    assert symbols.keys() == {"outer", "inner"}
    assert len(set(symbols.values())) == 2
    node = trace.nodes["y_0"]
    found = compat.dim_symbols(node)
    assert found[-1] == symbols["inner"]
    assert found[-2] == symbols["outer"]
    assert found[-3] == compat.enumeration_symbol(trace.nodes["z_0"])


def test_minibatch() -> None:
    def plates() -> None:
        with pyro.plate("part", 4, subsample_size=3), pyro.plate("all", 2, dim=-2):
            pass

    nodes = poutine.trace(plates).get_trace().nodes
    assert compat.minibatch(nodes["part"]["fn"]) and not compat.minibatch(nodes["all"]["fn"])


def test_enumeration_begins_left_of_the_plates(trace: Any) -> None:
    first, second = trace.nodes["z_0"], trace.nodes["z_1"]
    assert first["value"].shape == (2, 1, 1)
    assert second["value"].shape == (2, 1, 1, 1)
    assert compat.is_enumerated(first)
    assert not compat.is_enumerated(trace.nodes["y_0"])
    assert compat.enumeration_symbol(trace.nodes["y_0"]) is None
    assert compat.enumeration_symbol(first) != compat.enumeration_symbol(second)
    plain = poutine.trace(chain).get_trace(torch.zeros(3, 2))
    assert not compat.is_enumerated(plain.nodes["z_0"])


def test_module_parameters_are_told_from_plain_ones() -> None:
    """A param message's arguments are (name, value): a value that is a torch parameter cannot be replaced."""
    own = torch.nn.Parameter(torch.tensor(1.0))
    module = PyroModule[torch.nn.Linear](1, 1)

    def model() -> None:
        pyro.param("own", own)
        pyro.param("plain", torch.tensor(2.0))
        pyro.param("lazy", lambda: torch.tensor(3.0))
        module(torch.zeros(1, 1))

    nodes = poutine.trace(model).get_trace().nodes
    assert compat.module_parameter(nodes["own"]) is own
    assert compat.module_parameter(nodes["plain"]) is None
    assert compat.module_parameter(nodes["lazy"]) is None
    assert compat.module_parameter(nodes["weight"]) is module.weight


def test_markov_depth_counts_contexts(trace: Any) -> None:
    assert compat.markov_depth(trace.nodes["z_1"]) == 1

    def outside() -> None:
        pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})

    assert compat.markov_depth(poutine.trace(compat.enumeration(0)(outside)).get_trace().nodes["z"]) in (None, 0)
    with poutine.trace() as plain:
        outside()
    assert compat.markov_depth(plain.trace.nodes["z"]) is None


def test_pack_and_unpack_are_inverse() -> None:
    names = {-1: "a", -2: "b", -3: "c"}
    value = torch.randn(2, 1, 3)
    packed = compat.pack(value, names)
    assert compat.dims_of(packed) == "ca"
    assert packed.shape == (2, 3)
    assert torch.equal(compat.unpack(packed, names), value)
    assert not hasattr(value, "_pyro_dims"), "the caller's tensor is not marked"


def test_with_dims_and_detached_keep_the_symbols() -> None:
    value = torch.randn(2, 3, requires_grad=True)
    packed = compat.with_dims(value, "ab")
    assert compat.dims_of(packed) == "ab"
    assert not hasattr(value, "_pyro_dims")
    assert packed.requires_grad
    free = compat.detached(packed)
    assert compat.dims_of(free) == "ab"
    assert not free.requires_grad
    assert torch.equal(free, value)


def test_masked_observations_ask_first_and_split_otherwise() -> None:
    def model() -> Tensor:
        known = torch.tensor([True, False])
        return pyro.sample("x", dist.Normal(torch.zeros(2), 1.0), obs=torch.ones(2), obs_mask=known)

    def observe(name: str, fn: Any, obs: Any, obs_mask: Any) -> Any:
        asked.append((name, obs_mask.tolist()))
        return answers.pop()

    asked: list[Any] = []
    answers = [None, torch.zeros(2)]
    for sites in ([], ["x_observed", "x_unobserved", "x"]):
        with compat.masked_observations(observe):
            trace = poutine.trace(model).get_trace()
        assert [n for n, site in trace.nodes.items() if site["type"] == "sample"] == sites
    assert asked == [("x", [True, False])] * 2
    before = pyro.primitives._masked_observe
    with pytest.raises(RuntimeError), compat.masked_observations(observe):
        raise RuntimeError
    assert pyro.primitives._masked_observe is before


def test_what_comes_before_all_handlers() -> None:
    """Before plates, too, which expand a distribution; the model gets what the second function makes of the value."""
    seen: list[Any] = []

    def place(msg: Any) -> Any:
        if msg["name"] != "x":
            return None
        seen.append((compat.plates_around(), msg["fn"].batch_shape, compat.enumerating()))
        msg["fn"] = dist.Normal(torch.zeros(2, 1), 1.0)
        return lambda value: value.sum()

    def model() -> Tensor:
        with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 5, subsample_size=3):
            value: Tensor = pyro.sample("x", dist.Normal(0.0, 1.0))
        return value

    apply = pyro.primitives.apply_stack  # type: ignore[attr-defined]
    with compat.before_handlers(place):
        found = poutine.trace(model).get_trace()
        with compat.enumeration(2):
            poutine.trace(model).get_trace()
    assert pyro.primitives.apply_stack is apply  # type: ignore[attr-defined]
    assert seen == [({-1: 3, -2: 2}, torch.Size(), False), ({-1: 3, -2: 2}, torch.Size(), True)]
    assert found.nodes["x"]["value"].shape == (2, 3)
    assert found.nodes["_RETURN"]["value"].shape == ()


def test_own_arguments_are_those_that_were_recorded() -> None:
    with compat.recording_arguments():
        assert compat.own_arguments(dist.Normal(1.0, 2.0)) == {"loc": 1.0, "scale": 2.0}
    assert compat.own_arguments(dist.Normal(1.0, 2.0)) is None


@pytest.mark.parametrize("undone", [False, True])
def test_a_site_that_a_loop_forgets(undone: bool) -> None:
    """The sites of later steps do not know it, unless that is taken back."""
    scopes = []

    class Note(poutine.messenger.Messenger):  # type: ignore[misc]
        def _pyro_sample(self, msg: Any) -> None:
            scopes.append(set(msg["infer"]["_markov_scope"]))
            if msg["name"] == "x_0":
                remember = compat.forgotten_in_markov("x_0")
                if undone:
                    remember()

    with Note():
        for t in pyro.markov(range(2)):
            pyro.sample(f"x_{t}", dist.Normal(0.0, 1.0))
    assert scopes[1] == ({"x_0"} if undone else set())


def test_arguments_can_be_attached() -> None:
    own = compat.with_arguments(dist.Normal(0.0, 1.0), {"loc": 5.0})
    assert compat.raw_arguments(own.expand([3])) == {"loc": 5.0}


def test_the_step_of_a_markov_loop() -> None:
    assert compat.markov_step() is None
    steps = [compat.markov_step() for _ in pyro.markov(range(3))]
    assert [step[1] for step in steps if step is not None] == [0, 1, 2]
    assert len({step[0] for step in steps if step is not None}) == 1
    for _ in pyro.markov(range(1)):
        for _ in pyro.markov(range(1)):
            with pytest.raises(ValueError, match="nested"):
                compat.markov_step()


def test_whether_a_model_is_running() -> None:
    seen = []
    assert not compat.recorded()
    poutine.trace(lambda: seen.append(compat.recorded())).get_trace()
    with poutine.block():
        seen.append(compat.recorded())
    assert seen == [True, False]
