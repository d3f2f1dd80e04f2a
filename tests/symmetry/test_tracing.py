"""Tracing: the network is as it was, and what one run cannot tell is fixed and reported."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from architectures import ARCHITECTURES
from stress_networks import Network, linear, weight
from stress_networks_more import STRESS as STRESS_MORE
from tiny import Built, sequences, tiny, vectors
from torch import Tensor, nn
from torch.nn import functional

from merganser.errors import DtypeError, ParameterError
from merganser.symmetry import Spec, Symmetries, symmetries
from merganser.symmetry.record import record_run


def network(formula: Callable[..., Tensor], inputs: Callable[[], Tensor] = vectors, **parts) -> Built:
    own = {"up": linear(12, 24), "down": linear(24, 11), **parts}
    return tiny(lambda: Network(formula, **own), inputs)()


def groups(it: Symmetries) -> dict[str, int]:
    return {name: group.size for name, group in it.spec.groups.items()}


# the network is as it was


class Several(nn.Module):
    """Parts in several modes, statistics, and torch's own attention."""

    def __init__(self, fails_in: torch.dtype | None = None) -> None:
        super().__init__()
        self.fails_in = fails_in
        self.up, self.norm, self.drop = nn.Linear(12, 24), nn.BatchNorm1d(24), nn.Dropout(0.5)
        self.layer, self.down = nn.TransformerEncoderLayer(24, 4, 32, batch_first=True), nn.Linear(24, 11)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.norm(self.up(x)))
        if x.dtype == self.fails_in:
            raise RuntimeError("on purpose")
        return self.down(self.layer(y[None])[0])


def everything(it: nn.Module) -> list[object]:
    """What a run could change, of the network and of torch."""
    tensors = {**dict(it.named_parameters()), **dict(it.named_buffers())}
    return [
        {name: (module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in
         it.named_modules()},
        {name: (id(x), x.dtype, x.requires_grad, x.grad, x.tolist()) for name, x in tensors.items()},
        torch.get_rng_state().tolist(),
        torch.get_default_dtype(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.mkldnn.enabled,
        torch.is_grad_enabled(),
    ]  # fmt: skip


@pytest.mark.parametrize("fails_in", [None, torch.float32, torch.float64])
def test_the_network_and_torch_are_as_they_were(fails_in: torch.dtype | None) -> None:
    """Also where the network fails while it is traced, in float32, or while it is checked, in float64."""
    torch.manual_seed(0)
    it, x = Several(fails_in).train(), vectors()
    it.norm.eval()
    it.layer.linear1.eval()
    before = everything(it)
    if fails_in is None:
        assert symmetries(it, (x,)).unsound == ()
    else:
        with pytest.raises(RuntimeError, match="on purpose"):
            symmetries(it, (x,))
    assert everything(it) == before


def test_a_switched_off_fast_path_stays_off() -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        symmetries(Several(), (vectors(),))
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_another_default_dtype_is_kept() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        symmetries(Several().float(), (torch.randn(5, 12, dtype=torch.float32),))
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


def test_inputs_are_as_they_were() -> None:
    x = vectors()
    before = x.clone()
    it, _, _ = network(lambda it, x: it.down(torch.relu(it.up(x))))
    symmetries(it, (x,))
    assert x.dtype == torch.float32
    assert torch.equal(x, before)


# without weights


@pytest.mark.parametrize("name", ["resnext", "vit-fused", "cait", "moe-stacked", "tied-autoencoder", "lstm"])
def test_a_network_without_memory_has_the_same_symmetries(name: str) -> None:
    it, args, kwargs = ARCHITECTURES[name]()
    real = symmetries(it, args, kwargs, check=False)
    empty = copy.deepcopy(it).to("meta")
    found = symmetries(empty, tuple(x.to("meta") for x in args), kwargs, check=False)
    assert found.spec.to_json() == real.spec.to_json()
    assert not found.checked


# what one run cannot tell


def test_parameters_that_no_operation_read_are_fixed_and_reported() -> None:
    it = symmetries(*network(lambda it, x: it.down(torch.relu(it.up(x))), inner=linear(24, 24)))
    assert it.unused == ("inner.weight", "inner.bias")
    reasons = [it.spec.pinned[place] for place in ("inner.weight[0]", "inner.weight[1]", "inner.bias[0]")]
    assert all(why.startswith("never used in the run") for why in reasons)
    assert groups(it) == {"up": 24}
    assert it.spec.axes["inner.weight"] == (24, 24)


def test_a_branch_by_numbers_that_may_use_what_this_run_did_not_fixes_everything() -> None:
    it = symmetries(*STRESS_MORE["a_layer_that_a_branch_may_use"]())
    assert groups(it) == {}
    assert it.unused == ("inner.weight", "inner.bias")
    why = "_local_scalar_dense in the network may take a branch that uses inner.weight, which this run did not"
    assert it.spec.pinned["up.weight[0]"].startswith(why)


def test_a_branch_by_numbers_with_everything_used_fixes_nothing() -> None:
    def formula(it: Network, x: Tensor) -> Tensor:
        h = torch.relu(it.up(x))
        return it.down(h) * (2 if bool(h.sum() > 1e9) else 1)

    assert groups(symmetries(*network(formula))) == {"up": 24}


@pytest.mark.filterwarnings("ignore")  # of scripting being old
def test_a_script_is_refused() -> None:
    script = torch.jit.script(nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 11)))
    with pytest.raises(ParameterError, match="TorchScript, which hides its operations\nhint: give the Python network"):
        symmetries(nn.Sequential(script), (vectors(),))


class Turned(nn.Module):
    """Units are multiplied by complex numbers, which are trained or not."""

    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 11)
        phase = torch.polar(torch.ones(24), torch.rand(24, generator=torch.Generator().manual_seed(0)))
        if trained:
            self.phase = nn.Parameter(phase)
        else:
            self.register_buffer("phase", phase, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down((self.up(x) * self.phase).abs())


def test_complex_parameters_are_refused_by_name_and_complex_constants_are_not() -> None:
    with pytest.raises(DtypeError, match=r"phase is complex.*\nhint: hold real and imaginary parts in one real tensor"):
        symmetries(Turned(trained=True), (vectors(),))
    found = symmetries(Turned(trained=False), (vectors(),))
    assert found.unsound == ()
    assert groups(found) == {}, "a constant that is not the same for every unit fixes them"


def test_an_operation_without_a_rule_fixes_what_it_met_and_nothing_else() -> None:
    def formula(it: Network, x: Tensor) -> Tensor:
        return it.down(torch.relu(it.inner(torch.special.bessel_j0(it.up(x)))))

    it = symmetries(*network(formula, inner=linear(24, 20), down=linear(20, 11)))
    assert it.unknown == ("special_bessel_j0",)
    assert groups(it) == {"inner": 20}
    assert it.spec.pinned["up.weight[0]"].startswith("special_bessel_j0 has no rule in the network")
    assert it.unsound == ()


def test_an_operation_without_a_rule_over_fixed_things_is_no_news() -> None:
    it = symmetries(*network(lambda it, x: it.down(torch.relu(it.up(torch.special.bessel_j0(x))))))
    assert (it.unknown, groups(it)) == ((), {"up": 24})


class Scaled(nn.Module):
    """Units times a buffer."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.up, self.middle, self.down = nn.Linear(12, 24), nn.Linear(24, 20), nn.Linear(20, 11)
        self.register_buffer("frequencies", torch.rand(24), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.middle(self.up(x) * self.frequencies)))


def test_a_buffer_of_the_state_moves_with_its_units() -> None:
    it = symmetries(Scaled(persistent=True), (vectors(),))
    assert groups(it) == {"up": 24, "middle": 20}
    assert it.spec.axes["frequencies"] == ("up",)


def test_a_buffer_that_is_made_anew_fixes_its_units() -> None:
    """Whoever loads the weights has the frequencies in their old order."""
    it = symmetries(Scaled(persistent=False), (vectors(),))
    assert groups(it) == {"middle": 20}
    assert "frequencies" not in it.spec.axes


def test_frequencies_of_rotations_are_no_part_of_a_spec() -> None:
    it, args, kwargs = ARCHITECTURES["llama-3"]()
    assert any(name.endswith("inv_freq") for name, _ in it.named_buffers())
    spec = symmetries(it, args, kwargs, check=False).spec
    assert [name for name in spec.axes if "inv_freq" in name] == []


def rows(spec: Spec, name: str) -> object:
    return spec.axes[name][0]


def test_rows_that_a_slice_left_out_stay() -> None:
    """A longer text, or a wider setting, would use them."""

    def formula(it: Network, x: Tensor) -> Tensor:
        h = functional.linear(x, it.wide[:20]) + it.places[: x.shape[1], :20]
        return functional.linear(torch.relu(h), it.last[:, :20])

    it = symmetries(
        *network(formula, sequences, up=lambda: None, down=lambda: None, wide=weight(24, 12), places=weight(9, 24),
                 last=weight(11, 24))
    )  # fmt: skip
    assert groups(it) == {"wide": 20}
    assert it.spec.axes == {
        "wide": ({"sum": ["wide", 4]}, 12),
        "places": (9, {"sum": ["wide", 4]}),
        "last": (11, {"sum": ["wide", 4]}),
    }
    assert it.unsound == ()


# tied


def test_parameters_under_two_names_move_together_and_are_said_to_be_tied() -> None:
    """Of a layer that is used twice, under two names, the inputs and the outputs are one group."""

    def formula(it: Network, x: Tensor) -> Tensor:
        return it.down(torch.relu(it.two(torch.relu(it.one(torch.relu(it.up(x)))))))

    it, args, kwargs = network(formula, one=linear(24, 24), two=linear(24, 24))
    it.two.weight = it.one.weight
    found = symmetries(it, args, kwargs)
    assert found.spec.tied == {"two.weight": "one.weight"}
    assert groups(found) == {"up": 24}
    assert found.spec.axes["two.weight"] == found.spec.axes["one.weight"] == ("up", "up")
    assert found.unsound == ()


def test_parameters_that_share_their_memory_are_tied() -> None:
    def formula(it: Network, x: Tensor) -> Tensor:
        return it.down(torch.relu(it.up(x)) + torch.relu(it.other(x)))

    it, args, kwargs = network(formula, other=linear(12, 24))
    it.other.weight = nn.Parameter(it.up.weight.detach())
    assert it.other.weight is not it.up.weight
    assert symmetries(it, args, kwargs).spec.tied == {"other.weight": "up.weight"}


def test_a_tied_parameter_counts_once() -> None:
    """12 x 24 shared between an encoder and, turned, a decoder; 24 + 12 shifts, of which the last 12 stay."""

    def formula(it: Network, x: Tensor) -> Tensor:
        return torch.relu(functional.linear(x, it.one, it.shift)) @ it.two + it.last

    it, args, kwargs = network(
        formula, up=lambda: None, down=lambda: None, one=weight(24, 12), shift=weight(24), last=weight(12)
    )
    it.two = it.one
    assert symmetries(it, args, kwargs).coverage == (24 * 12 + 24) / (24 * 12 + 24 + 12)


# what must stay


def test_by_default_all_that_a_network_gives_stays() -> None:
    def formula(it: Network, x: Tensor) -> dict[str, object]:
        h = torch.relu(it.up(x))
        return {"logits": it.down(h), "states": [h], "count": 3}

    built = network(formula)
    assert groups(symmetries(*built)) == {}
    assert groups(symmetries(*built, output=lambda result: result["logits"])) == {"up": 24}


def test_named_inputs_in_nested_containers_are_inputs() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 11)

        def forward(self, *, given: dict[str, list[Tensor]]) -> Tensor:
            return self.down(torch.relu(self.up(given["x"][0])) + given["x"][1])

    it, inputs = Nested(), {"x": [vectors(), torch.randn(24)]}
    found = symmetries(it, kwargs={"given": inputs})
    assert groups(found) == {}  # what is added to the units comes from outside
    assert found.spec.pinned["up.weight[0]"].endswith("with the input of the network")


def test_a_record_says_in_which_module_an_operation_ran() -> None:
    record = record_run(*network(lambda it, x: it.down(torch.relu(it.up(x)))))
    assert [(call.op, call.place) for call in record.calls if call.op in ("addmm", "relu")] == [
        ("addmm", "up"),
        ("relu", "the network"),
        ("addmm", "down"),
    ]
