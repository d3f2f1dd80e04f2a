"""Networks that exist to mislead the rules: sound by the rules alone, and the groups that a person finds."""

from __future__ import annotations

import pytest
import torch
from stress_networks import Network, linear
from stress_networks_more import STRESS
from tiny import tiny, vectors
from torch import Tensor
from wording import sizes, words

from merganser.symmetry import symmetries
from merganser.symmetry.checking import failing


@pytest.mark.parametrize("name", STRESS)
def test_the_rules_alone_are_not_misled(name: str) -> None:
    built = STRESS[name]()
    spec = symmetries(*built, check=False).spec
    assert [failing(*built, spec, seed=seed) for seed in range(3)] == [[], [], []]


#: By hand. Where heads are compared or mixed, unit by unit, their units have one order; else one in each head.
GROUPS = {
    "products_of_heads": "a 4, b 6",
    "products_of_units": "a 4, b 6",
    "attention_among_heads": "a 4, b 6",
    "softmax_over_heads": "a 4, b 6",
    "norm_over_heads": "a 4, b 6",
    "length_over_heads": "a 4, b 6",
    "mixed_heads": "a 4, b 6",
    "mean_over_heads": "a 4, b 6",
    "batched_products_with_an_addend": "a 4, b 6",
    "mean_over_units": "a 4, b 6 in a",
    "norm_of_each_head": "a 4, b 6 in a",
    "scale_of_each_head_by_a_turned_view": "a 4, b 6 in a",
    "softmax_over_heads_that_are_regrouped": "a 2, b 2, c 6",
    "heads_as_tokens": "a 4, b 6, c 8",
    "half_of_the_products_of_heads": "a 6",  # which pair of heads stands where is fixed
    "grouped_queries": "a 2, b 2 in a, c 6 in a, d 6 in a",
    "experts_of_their_own": "a 3, b 8 in a",
    "experts_that_are_compared": "a 3, b 8",
    "ensemble_by_vmap": "a 3 fixed, b 24 in a",  # members are outputs
    "grouped_convolution": "a 4, b 8 in a, c 6 in a",
    "grouped_transposed_convolution": "a 4, b 6 in a, c 8 in a",
    # nothing that a spec can say
    **dict.fromkeys(("running_sums", "turned_round", "looked_up_backwards", "gathered_backwards"), ""),
    **dict.fromkeys(("convolution_over_units", "turned_inside_out", "lower_triangle", "fixed_noise"), ""),
    **dict.fromkeys(("a_branch_by_the_largest_unit", "written_as_a_result_and_flipped"), ""),
    # what sees units, and not their order
    **dict.fromkeys(("times_the_largest_unit", "how_many_are_smaller", "attention_among_units"), "a 24"),
    # halves are held together; copies and paddings are units of whoever takes them in
    **dict.fromkeys(("halves_swapped", "halves_turned_against_each_other", "pairs_taken_apart"), "a 12"),
    "one_half_gates_the_other": "a 12",
    "repeated": "a 24, b 2",
    "each_repeated": "a 24, b 2 in a",
    "padded_with_a_number": "a 24, b 3, c 5",
    "all_to_all_with_ones": "a 24, b 24",
    "every_pair_of_two": "a 24, b 10",
    "every_pair_of_one": "a 24",
    "thirds_shifted_in_time": "a 8, b 8, c 8",
    "shifted_in_time": "a 24",
    # writes in place
    "the_first_three_set_to_zero": "a 3, b 21",
    "halves_written_side_by_side": "a 12, b 12",
    **dict.fromkeys(("added_in_place_to_a_view", "written_as_a_result", "rows_summed_into_others"), "a 24"),
    # weights made of weights
    **dict.fromkeys(("standardised_weights", "weights_made_by_a_network", "spectral_norm"), "a 24"),
    "low_rank_update": "a 4, b 24",
    "product_of_weights": "a 6, b 24",
    "product_of_a_weight_with_itself": "a 6",
    "cosines_with_codes": "a 9, b 24",
    "the_same_layer_three_times": "a 24",
    **dict.fromkeys(("lstm_cell", "lstm_of_packed_sequences"), "a 20"),
    "lstm_of_two_directions": "a 20, b 20, c 20, d 20",
    "lstm_with_projection": "a 20, b 9",
    # ways of running
    **dict.fromkeys(("what_nothing_comes_from", "inference_mode", "autocast", "checkpointed"), "a 24"),
    "a_layer_that_a_branch_may_use": "",
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_groups_are_those_found_by_hand(name: str) -> None:
    spec = symmetries(*STRESS[name](), check=False).spec
    assert sizes(spec, spec.axes) == GROUPS[name]


WORDS = {
    "softmax_over_heads": {"up.weight": "a*b | 12", "up.bias": "a*b", "down.weight": "11 | a*b"},
    "grouped_queries": {"up.weight": "a*b*c | 12", "key.weight": "a*c | 12", "value.weight": "a*d | 12"},
    "grouped_convolution": {"kernel": "a*b | c | 1", "up.weight": "a*c | 12", "down.weight": "11 | a*b"},
    "halves_swapped": {"up.weight": "a + a | 12", "down.weight": "11 | a + a"},
    "pairs_taken_apart": {"up.weight": "a*2 | 12", "down.weight": "11 | 2*a"},
    "repeated": {"down.weight": "11 | a*b", "up.weight": "b | 12"},
    "each_repeated": {"down.weight": "11 | a*b", "up.weight": "a | 12"},
    "padded_with_a_number": {"down.weight": "11 | a + b + c", "up.weight": "b | 12"},
    "every_pair_of_one": {"down.weight": "11 | a*a", "up.weight": "a | 12"},
    "weights_made_by_a_network": {"up.weight": "a*12 | 12", "down.weight": "11 | a"},
    "half_of_the_products_of_heads": {"up.weight": "4*a | 12", "down.weight": "11 | 10"},
    "thirds_shifted_in_time": {"up.weight": "a + b + c | 12", "down.weight": "11 | a + b + c"},
    "product_of_a_weight_with_itself": {"first": "a | 12", "down.weight": "11 | 12"},
}


@pytest.mark.parametrize("name", WORDS)
def test_axes_are_made_of_what_a_person_finds(name: str) -> None:
    spec = symmetries(*STRESS[name](), check=False).spec
    assert words(spec, WORDS[name]) == WORDS[name]


# numbers that reach Python where no operation is seen


def times_a_number_of_a_list(it: Network, x: Tensor) -> Tensor:
    return it.down(it.after(torch.relu(it.up(x)))) * it.up(x)[0].tolist()[3]


def times_a_number_of_an_array(it: Network, x: Tensor) -> Tensor:
    return it.down(it.after(torch.relu(it.up(x)))) * float(it.up(x).numpy()[0, 0])


def chosen_by_a_list(it: Network, x: Tensor) -> Tensor:
    first = it.up(x)[0].tolist()
    return it.down(it.after(torch.relu(it.up(x)))) * (1 + first.index(max(first)))


@pytest.mark.parametrize("formula", [times_a_number_of_a_list, times_a_number_of_an_array, chosen_by_a_list])
def test_what_leaves_unseen_is_caught_by_the_self_check_alone(formula) -> None:
    built = tiny(lambda: Network(formula, up=linear(12, 24), after=linear(24, 10), down=linear(10, 11)), vectors)()
    rules = symmetries(*built, check=False)
    assert sizes(rules.spec, rules.spec.axes) == "a 24, b 10"
    checked = symmetries(*built)
    assert checked.unsound == ("up",)
    assert {name: (group.size, group.within) for name, group in checked.spec.groups.items()} == {"after": (10, None)}
    assert checked.spec.pinned["up.weight[0]"] == checked.spec.pinned["after.weight[1]"] == "refused by the self-check"


def test_a_number_of_a_list_that_no_order_changes_is_no_reason_to_refuse() -> None:
    def formula(it: Network, x: Tensor) -> Tensor:
        return it.down(torch.relu(it.up(x))) * max(it.up(x)[0].tolist())

    built = tiny(lambda: Network(formula, up=linear(12, 24), down=linear(24, 11)), vectors)()
    checked = symmetries(*built)
    assert (sizes(checked.spec, checked.spec.axes), checked.unsound) == ("a 24", ())
