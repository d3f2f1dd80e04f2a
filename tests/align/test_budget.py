"""How many units stay apart under a budget: against every choice there is, closed forms and an SLSQP of our own."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from partial_networks import two
from scipy.optimize import minimize
from torch import Tensor

from merganser.align.budget import choose, concave, step_of
from merganser.align.cost import Quadratic, flops, parameters, quadratic
from merganser.align.layers import Layer, layers_of
from merganser.errors import ParameterError
from merganser.symmetry.spec import Group, Part, Spec

#: Rows, columns, places of a kernel, places of the output.
Term = tuple[Part, Part, int, int]


def network(sizes: Mapping[str, int], terms: Sequence[Term]) -> tuple[Spec, list[Layer]]:
    """Layers without bias that make units of groups from units of groups."""
    axes: dict[str, tuple[Part, ...]] = {f"{i}.weight": (r, c) for i, (r, c, _, _) in enumerate(terms)}
    roles = dict.fromkeys(axes, ("producer", "consumer"))
    layers = [Layer(n.removesuffix(".weight"), "conv2d", n, *term) for n, term in zip(axes, terms, strict=True)]
    return Spec({g: Group(n) for g, n in sizes.items()}, axes, roles, {}), layers


def chain(rng: np.random.Generator) -> tuple[dict[str, int], list[Term]]:
    """Two to four groups of up to five units, one after the other, the third of which reads the first too."""
    sizes = {f"g{i}": int(n) for i, n in enumerate(rng.integers(1, 6, size=rng.integers(2, 5)))}
    parts: list[Part] = [int(rng.integers(1, 6)), *sizes, int(rng.integers(1, 6))]
    terms = [(r, c, 1, int(rng.integers(1, 20))) for c, r in itertools.pairwise(parts)]
    return sizes, [*terms, ("g2", "g0", 1, int(rng.integers(1, 20)))] if len(sizes) > 2 else terms


def worst_first(sizes: Mapping[str, int], rng: np.random.Generator) -> dict[str, Tensor]:
    """Gains of some groups' pairs that fall, of another size in each group."""
    return {g: torch.from_numpy(-np.sort(-rng.exponential(size=n)) * rng.random() / n) for g, n in sizes.items()}


def gained(values: Mapping[str, Tensor], apart: Mapping[str, int]) -> float:
    return sum(float(values[g][:n].sum()) for g, n in apart.items())


def every_choice(
    sizes: Mapping[str, int], terms: Sequence[Term], values: Mapping[str, Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """Cost, by the authors' formula of a layer, and gain of every choice there is."""
    choices = np.array(list(itertools.product(*(range(n + 1) for n in sizes.values()))))
    where = {g: i for i, g in enumerate(sizes)}
    cost = np.zeros(len(choices))
    for rows, columns, taps, places in terms:
        (d_o, r_o), (d_i, r_i) = (
            (part, 0.0) if isinstance(part, int) else (sizes[part], choices[:, where[part]] / sizes[part])
            for part in (rows, columns)
        )
        cost += 2 * taps * places * d_o * d_i * (1 + r_o + r_i - r_o * r_i)
    sums = [np.concatenate([[0.0], values[g].cumsum(0).numpy()]) for g in sizes]
    return cost, sum(s[choices[:, i]] for i, s in enumerate(sums))


def test_the_best_of_every_choice_is_found_nearly_always() -> None:
    rng, shares = np.random.default_rng(0), []
    for _ in range(30):
        sizes, terms = chain(rng)
        spec, layers = network(sizes, terms)
        values = worst_first(sizes, rng)
        costs, gains = every_choice(sizes, terms, values)
        poly = quadratic(layers, spec, list(sizes))
        for budget in (1.05, 1.2, 1.5, 1.8):
            best = gains[costs <= budget * poly.original * (1 + 1e-12)].max()
            apart = choose(spec, list(sizes), values, poly, budget)
            assert flops(layers, spec, apart) <= budget * poly.original
            assert gained(values, apart) <= best * (1 + 1e-12)
            shares.append(gained(values, apart) / best if best else 1.0)
    assert np.mean(np.array(shares) > 1 - 1e-9) >= 0.98
    assert np.mean(shares) >= 0.998


@given(st.integers(0, 10_000), st.floats(1, 2), st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_no_choice_is_above_the_budget(seed: int, budget: float, multiple: int) -> None:
    rng = np.random.default_rng(seed)
    sizes, terms = chain(rng)
    spec, layers = network(sizes, terms)
    values = {g: torch.from_numpy(rng.normal(size=n)) for g, n in sizes.items()}
    for measure, count in (("flops", flops), ("parameters", parameters)):
        for dense in (False, True):
            poly = quadratic(layers, spec, list(sizes), measure, dense=dense)
            apart = choose(spec, list(sizes), values, poly, budget, multiple=multiple)
            assert count(layers, spec, apart, dense=dense) <= budget * count(layers, spec, {})
            assert all(n % multiple == 0 or n == sizes[g] for g, n in apart.items())


@cache
def resnet50() -> tuple[dict[str, int], list[Term]]:
    """Groups of units and layers of the real one, for a picture of 224 x 224: 37 groups."""
    sizes, terms, stream, side = {"stem": 64}, [("stem", 3, 49, 112**2)], "stem", 56
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        out = f"stream{stage}"
        sizes[out] = 4 * width
        for block in range(blocks):
            first, second, before = f"{stage}.{block}.1", f"{stage}.{block}.2", side
            sizes |= {first: width, second: width}
            side = side // 2 if stage and not block else side
            terms += [(first, stream, 1, before**2), (second, first, 9, side**2), (out, second, 1, side**2)]
            terms += [] if block else [(out, stream, 1, side**2)]
            stream = out
    return sizes, [*terms, (1000, stream, 1, 1)]


def test_a_resnet_50_has_the_size_that_is_known() -> None:
    sizes, terms = resnet50()
    spec, layers = network(sizes, terms)
    assert len(sizes) == 37
    assert parameters(layers, spec, {}) == 25_557_032 - 1000 - 2 * 26_560  # without its biases and BatchNorm's
    assert round(flops(layers, spec, {}) / 2e9, 2) == 4.09


def relaxation(
    sizes: Mapping[str, int], terms: Sequence[Term], weights: np.ndarray, budget: float, starts: int
) -> float:
    """The best of some runs of SLSQP of the authors' problem: sum of weight times share, under a bilinear cost."""
    where = {g: i for i, g in enumerate(sizes)}
    n = len(sizes)
    ends = np.array([[where.get(part, n) for part in term[:2]] for term in terms])  # the last is what is not split
    whole = np.array([c * k * (sizes.get(r, r) if isinstance(r, str) else r) for r, _, c, k in terms], dtype=float)
    whole *= np.array([sizes[c] if isinstance(c, str) else c for _, c, _, _ in terms])
    whole /= whole.sum()

    def room(share: np.ndarray) -> float:
        r_o, r_i = np.append(share, 0.0)[ends].T
        return budget - float(whole @ (1 + r_o + r_i - r_o * r_i))

    def slope(share: np.ndarray) -> np.ndarray:
        r_o, r_i = np.append(share, 0.0)[ends].T
        down = np.zeros(n + 1)
        np.add.at(down, ends[:, 0], whole * (1 - r_i))
        np.add.at(down, ends[:, 1], whole * (1 - r_o))
        return -down[:-1]

    rng, best = np.random.default_rng(1), 0.0
    for start in (*rng.random((starts, n)), np.full(n, budget - 1)):
        done = minimize(
            lambda share: -weights @ share,
            start,
            jac=lambda share: -weights,
            method="SLSQP",
            bounds=[(0, 1)] * n,
            constraints=[{"type": "ineq", "fun": room, "jac": slope}],
            options={"maxiter": 200},
        )
        if room(done.x) >= -1e-6:
            best = max(best, float(weights @ done.x))
    return best


@pytest.mark.parametrize("budget", [1.2, 1.55, 1.8])
def test_a_resnet_50_keeps_as_much_as_a_relaxation_with_many_starts(budget: float) -> None:
    sizes, terms = resnet50()
    spec, layers = network(sizes, terms)
    poly = quadratic(layers, spec, list(sizes))
    for seed in range(2):
        weights = np.random.default_rng(seed).random(len(sizes))
        values = {
            g: torch.full((d,), w / d, dtype=torch.float64) for (g, d), w in zip(sizes.items(), weights, strict=True)
        }
        apart = choose(spec, list(sizes), values, poly, budget)
        bound = relaxation(sizes, terms, weights, budget, starts=6)
        assert gained(values, apart) >= 0.995 * bound
        assert flops(layers, spec, apart) <= budget * flops(layers, spec, {})
        assert flops(layers, spec, apart) >= 0.999 * budget * flops(layers, spec, {})


def test_a_larger_budget_gains_no_less_in_a_resnet_50() -> None:
    sizes, terms = resnet50()
    spec, layers = network(sizes, terms)
    values = worst_first(sizes, np.random.default_rng(3))
    poly = quadratic(layers, spec, list(sizes))
    gains = [
        gained(values, choose(spec, list(sizes), values, poly, budget, multiple=32))
        for budget in (1, 1.05, 1.1, 1.2, 1.35, 1.55, 1.8, 1.95, 2)
    ]
    assert gains == sorted(gains)
    assert gains[0] == 0


def alone(sizes: Mapping[str, int]) -> tuple[Spec, list[Layer], Quadratic]:
    """Groups that never meet, and units of one cost in all."""
    spec, layers = network(sizes, [(g, 7, 1, 3) for g in sizes])
    return spec, layers, quadratic(layers, spec, list(sizes))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 1000), st.data())
@settings(max_examples=25, deadline=None)
def test_units_of_one_cost_that_never_meet_are_taken_by_their_gain(
    widths: list[int], seed: int, data: st.DataObject
) -> None:
    sizes = {f"g{i}": n for i, n in enumerate(widths)}
    spec, _, poly = alone(sizes)
    values = worst_first(sizes, np.random.default_rng(seed))
    total = sum(widths)
    few, many = sorted(data.draw(st.tuples(st.integers(0, total), st.integers(0, total))))
    chosen = [choose(spec, list(sizes), values, poly, 1 + k / total) for k in (few, many)]
    best = torch.cat(list(values.values())).sort(descending=True).values
    for k, apart in zip((few, many), chosen, strict=True):
        assert sum(apart.values()) == k
        assert gained(values, apart) == pytest.approx(float(best[:k].sum()))
    assert all(chosen[0][g] <= chosen[1][g] for g in sizes)  # the larger budget keeps what the smaller kept


@pytest.mark.parametrize("name", ["mlp", "resnet", "dense", "depthwise", "small-vit"])
@pytest.mark.parametrize("measure", ["flops", "parameters"])
def test_one_keeps_nothing_apart_and_two_everything(name: str, measure: str) -> None:
    pair = two(name)
    groups = [g for g in pair.outer() if name != "small-vit" or "embed" not in g]
    sizes = {g: pair.spec.groups[g].size for g in groups}
    layers = layers_of(pair.network, pair.spec, pair.args, pair.kwargs, taps=pair.found.taps)
    poly = quadratic(layers, pair.spec, groups, measure)
    values = worst_first(sizes, np.random.default_rng(0))
    assert choose(pair.spec, groups, values, poly, 1.0) == dict.fromkeys(groups, 0)
    assert choose(pair.spec, groups, values, poly, 2.0) == sizes


def test_a_network_that_is_built_densely_stays_below_two_with_less_apart() -> None:
    pair = two("resnet")
    sizes = {g: pair.spec.groups[g].size for g in pair.outer()}
    layers = layers_of(pair.network, pair.spec, pair.args, pair.kwargs)
    poly = quadratic(layers, pair.spec, list(sizes), dense=True)
    apart = choose(pair.spec, list(sizes), worst_first(sizes, np.random.default_rng(0)), poly, 2.0)
    assert 1.9 * poly.original < flops(layers, pair.spec, apart, dense=True) <= 2 * poly.original
    assert 0 < sum(apart.values()) < sum(sizes.values())


def test_pairs_without_gain_are_merged() -> None:
    sizes = {"a": 3, "b": 3}
    spec, _, poly = alone(sizes)
    values = {"a": torch.tensor([1.0, -1.0, 0.0]), "b": torch.zeros(3)}
    assert choose(spec, ["a", "b"], values, poly, 1.9) == {"a": 1, "b": 0}


def test_heads_are_steps_of_all_their_channels() -> None:
    pair = two("small-vit")
    (heads,) = [g for g in pair.outer() if "blocks.0" in g and pair.spec.groups[g].size == 3]
    hidden = next(g for g in pair.outer() if "blocks.0.up" in g)
    assert [step_of(pair.spec, heads, multiple) for multiple in (1, 4, 8, 6)] == [1, 1, 2, 3]  # of four channels each
    assert [step_of(pair.spec, hidden, multiple) for multiple in (1, 4, 8)] == [1, 4, 8]
    assert step_of(pair.spec, hidden, 4096) == pair.spec.groups[hidden].size


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_concave_gains_are_the_isotonic_ones(gains: list[float]) -> None:
    n = len(gains)
    expected = [
        min(max(sum(gains[a:b]) / (b - a) for b in range(i + 1, n + 1)) for a in range(i + 1)) for i in range(n)
    ]  # the min-max formula of a fit that falls
    assert np.allclose(concave(np.array(gains)), expected, rtol=1e-9, atol=1e-12)


def test_both_networks_heads_must_be_within_the_budget() -> None:
    sizes = {"a": 3}
    spec, layers = network(sizes, [("a", 4, 1, 1), (6, "a", 1, 1)])
    poly = quadratic(layers, spec, ["a"], heads={"1": (6, 6)})
    values = {"a": torch.ones(3)}
    with pytest.raises(ParameterError, match=r"with nothing apart the network costs 1\.6000 of one"):
        choose(spec, ["a"], values, poly, 1.5)
    assert choose(spec, ["a"], values, poly, 1.6) == {"a": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0.9}, r"budget is 0\.9"),
        ({"budget": 2.1}, r"budget is 2\.1"),
        ({"budget": float("nan")}, "budget is nan"),
        ({"multiple": 0}, "multiple is 0"),
        ({"groups": ["b", "a"]}, "of other groups"),
        ({"values": {"a": torch.ones(3)}}, "no gains of b"),
        ({"values": {"a": torch.ones(3), "b": torch.ones(2)}}, r"gains of b are \(2,\); it has 3 units"),
        ({"values": {"a": torch.ones(3), "b": torch.full((3,), torch.nan)}}, "a gain of b is not finite"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    spec, _, poly = alone({"a": 3, "b": 3})
    values = {"a": torch.ones(3), "b": torch.ones(3)}
    usual = {"spec": spec, "groups": ["a", "b"], "values": values, "cost": poly, "budget": 1.5}
    with pytest.raises(ParameterError, match=message):
        choose(**{**usual, **change})
