"""Symmetries of 138 tiny networks: sound by the rules alone, near complete, and those of hand-written specs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import pytest
import torch
from architectures import ARCHITECTURES
from tiny import Built
from torch import Tensor
from wording import sizes, words

from merganser.symmetry import Spec, Symmetries, symmetries
from merganser.symmetry.checking import failing
from merganser.symmetry.record import tensors_of

TOLERANCE = 1e-5  # of float32, relative to the largest output


@cache
def found(name: str) -> tuple[Built, Symmetries]:
    """A network, and what the rules alone say of it."""
    built = ARCHITECTURES[name]()
    return built, symmetries(*built, check=False)


#: Networks that keep what one run made of their weights for the next: the self-check's second run sees the old ones.
KEEPING = ("levit",)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in KEEPING])
def test_the_rules_alone_give_no_unsound_group(name: str, seed: int) -> None:
    built, it = found(name)
    assert failing(*built, it.spec, seed=seed) == []


def outputs(built: Built, orders: Mapping[str, Tensor], spec: Spec) -> list[Tensor]:
    network, args, kwargs = built
    network.load_state_dict({name: spec.apply(orders, name, x) for name, x in network.state_dict().items()})
    torch.manual_seed(0)
    with torch.no_grad():
        return [x for x in tensors_of(network(*args, **kwargs), None) if x.is_floating_point()]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_permuted_state_dict_gives_the_same_outputs(name: str) -> None:
    """In float32, by networks that have not run before: nothing of how the self-check runs them."""
    spec = found(name)[1].spec
    moved = spec.random(torch.Generator().manual_seed(2))
    before, after = (outputs(ARCHITECTURES[name](), orders, spec) for orders in (spec.identity(), moved))
    assert before
    for one, two in zip(before, after, strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=TOLERANCE * float(one.abs().max()))


#: Share of the parameters that move, and why it is not nine tenths.
PARTLY = {
    "fnet": (0.74, "a Fourier transform over units knows their order"),
    "bilinear": (0.0, "nn.Bilinear's operation has no rule"),
    "siglip-vision": (0.74, "its pooling head is not used for these outputs"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nine_tenths_of_the_parameters_move(name: str) -> None:
    least, most = (PARTLY[name][0], 0.9) if name in PARTLY else (0.9, 1.0)
    assert least <= found(name)[1].coverage <= most


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tensor_of_the_state_has_axes_of_its_shape(name: str) -> None:
    (network, _, _), it = found(name)
    assert it.spec.shapes() == {n: tuple(x.shape) for n, x in network.state_dict().items()}


#: Groups by hand: streams of residual networks, then what each of two layers, or each block, has of its own.
LAYERED = {
    # heads, units of queries and keys, units of values, MLP
    1 + 2 * 4: """
        vit vit-fused deit xcit hub-vit hub-deit beit data2vec-vision dinov2 dinov2-swiglu clip-vision clip-text
        siglip-vision torch-encoder torch-encoder-norm-first bert roberta xlm-roberta gpt gpt2 opt gpt-neo gpt-neox
        gpt-j phi
    """,
    # heads of keys, heads of queries for each, units of values, MLP; rotations fix the units of queries and keys
    1 + 2 * (1 + 1 + 1 + 1): """
        llama llama-3 llama-eager mistral qwen2 qwen3 phi3 gemma2 gemma3 olmo2 cohere granite smollm3 mixtral
        qwen3-moe qwen3-moe-grouped qwen3-moe-batched mamba2
    """,
    1 + 2 * 5: "stablelm qwen2-moe",  # units that are not rotated; a shared expert
    1 + 2 * 3: "modernbert gemma mpt bloom mamba",  # no grouped heads; one head of keys; heads that slopes tell apart
    1 + 2 * 6: "cait",  # heads of scores, of weights between two mixings, of values
    1 + 2 * 2: "mlp-mixer rwkv",
    1 + 2 * 1: "resmlp gmlp",
    1 + 2 * 4 + 1: "distilbert bert-classifier electra opt-projected",  # a pooler; embeddings of another width
    2 + 4: "albert",  # embeddings of another width; all layers are one
    1 + 4 + 2 * 7: "bart marian torch-transformer",  # an encoder layer; two of a decoder with cross attention
    2 + 4 + 1 + 2 * 7: "whisper",  # two convolutions before an encoder that has a width of its own
    2 + 3 * 4: "swin hub-swin",
}
#: The same for all others that are small enough to count.
COUNTED = {
    # vectors, signals, sets, graphs
    **dict.fromkeys(("mlp", "mlp-bn", "tied-autoencoder", "siamese", "nerf", "lstm", "gru"), 2),
    **dict.fromkeys(("highway", "elman", "gcn", "film"), 1),
    "two-towers": 3,  # a hidden layer each, and the units of the products between them
    "dlrm": 3,
    "maxout": 2 + 2,  # units, and the three maps of each
    "moe-stacked": 3,  # stream, experts, the units of each
    "moe-listed": 1 + 3,  # experts stand in a fixed order; each has units of its own
    "tcn": 3,
    "wavenet": 5,
    "gated-convolutions": 2,
    "pointnet": 3,
    "gat": 2,  # heads, and their units
    "perceiver": 1 + 1 + 1 + 3 + 4,  # latents, their stream, that of the inputs; two attentions and an MLP
    # convolutions: one a hidden layer
    **dict.fromkeys(("vgg", "vgg-bn"), 5),
    "mobilenet-v1": 4,
    "squeezenet": 1 + 2 * 3,
    "inception": 1 + 2 * 7,
    "unet": 7,
    "dcgan-generator": 2,
    "conv-autoencoder": 5,
    "vq-vae": 3,
    # convolutions: streams, and one or two a block
    "resnet": 2 + 3,
    "wide-resnet": 3 + 3,
    "resnet-option-a": 3 + 3,  # the second stage: padding, the first stage, padding
    "resnet-gn": 2 * (2 + 2),  # groups of channels, and the channels of each
    "resnet-bottleneck": 2 + 2 * 2,
    "hub-resnet": 2 + 3 * 2,
    "se-resnet": 2 + 2 * 3,
    "eca-net": 1 + 2 * 2,  # the stream of the second stage is fixed: its channels know their neighbours
    **dict.fromkeys(("resnext", "regnet"), 2 + 2 * 3),  # groups, units in and out of each
    "sknet": 5,
    "densenet": 1 + 2 * 2 + 1 + 2 * 2,
    "mobilenet-v2": 3 + 3,
    "efficientnet": 3 + 3 * 2,
    **dict.fromkeys(("convnext", "hub-convnext", "convnextv2"), 2 + 3),
    **dict.fromkeys(("poolformer", "hub-poolformer"), 2 + 2),
    "super-resolution": 1 + 2 + 1,
    "style-transfer": 2 + 1 + 1,
    **{name: count for count, names in LAYERED.items() for name in names.split()},
}


@pytest.mark.parametrize("name", COUNTED)
def test_there_are_as_many_groups_as_by_hand(name: str) -> None:
    groups = found(name)[1].spec.groups
    assert sum(not group.fixed for group in groups.values()) == COUNTED[name], dict(groups)


#: Sizes of groups, and of what tensors are made, a letter a group: `a*b` is a product, `a + b` one after the other.
WORDS: dict[str, tuple[str, dict[str, str]]] = {
    "mlp": ("a 32, b 24", {"0.weight": "a | 12", "2.weight": "b | a", "4.weight": "11 | b", "2.bias": "b"}),
    "vit-fused": (
        "a 4, b 8 in a, c 8 in a, d 32",
        {"1.mixer.qkv.weight": "a*b + a*b + a*c | d", "1.mixer.proj.weight": "d | a*c"},
    ),
    "torch-attention": (
        "a 4, b 8 in a, c 8 in a, d 32, e 32",
        {"attention.in_proj_weight": "a*b + a*b + a*c | d", "attention.out_proj.weight": "e | a*c"},
    ),
    "gpt2": (
        "a 32, b 4, c 8 in b, d 8 in b",
        {
            "transformer.h.1.attn.c_attn.weight": "a | b*c + b*c + b*d",
            "transformer.h.1.attn.c_attn.bias": "b*c + b*c + b*d",
            "transformer.h.1.attn.c_proj.weight": "b*d | a",
        },
    ),
    "gpt-neox": (  # a quarter of a head's units is rotated; head by head
        "a 4, b 6 in a, c 8 in a, d 32",
        {
            "gpt_neox.layers.0.attention.query_key_value.weight": "a*(2 + b + 2 + b + c) | d",
            "gpt_neox.layers.0.attention.dense.weight": "d | a*c",
        },
    ),
    "bloom": (  # slopes tell heads apart
        "a 4 fixed, b 8 in a, c 8 in a, d 32",
        {"transformer.h.0.self_attention.query_key_value.weight": "a*(b + b + c) | d"},
    ),
    "llama-3": (  # two heads of keys, two of queries for each, eight units that are rotated
        "a 2, b 2 in a, c 32, d 8 in a, e 48",
        {
            "model.layers.0.self_attn.q_proj.weight": "a*b*8 | c",
            "model.layers.0.self_attn.k_proj.weight": "a*8 | c",
            "model.layers.0.self_attn.v_proj.weight": "a*d | c",
            "model.layers.0.self_attn.o_proj.weight": "c | a*b*d",
            "model.layers.0.mlp.gate_proj.weight": "e | c",
            "model.layers.0.mlp.down_proj.weight": "c | e",
            "model.norm.weight": "c",
            "lm_head.weight": "97 | c",
        },
    ),
    "phi3": (
        "a 2, b 2 in a, c 8 in a, d 32, e 48",
        {
            "model.layers.0.self_attn.qkv_proj.weight": "a*b*8 + a*8 + a*c | d",
            "model.layers.0.mlp.gate_up_proj.weight": "e + e | d",
        },
    ),
    "mamba2": (  # groups of heads; states are one group's
        "a 2, b 3 in a, c 8 in a, d 5 in a, e 24",
        {
            "backbone.layers.0.mixer.in_proj.weight": "a*b*c + a*b*c + a*d + a*d + a*b | e",
            "backbone.layers.0.mixer.out_proj.weight": "e | a*b*c",
            "backbone.layers.0.mixer.A_log": "a*b",
        },
    ),
    "resnet-option-a": (
        "a 8, b 16, c 8, d 32",
        {
            "2.branch.1.0.weight": "a + b + c | d | 3 | 3",
            "2.branch.0.0.weight": "d | b | 3 | 3",
            "4.2.weight": "11 | a + b + c",
        },
    ),
    "resnext": (
        "a 4, b 4 in a, c 24, d 4 in a, e 40",
        {
            "2.branch.0.0.weight": "a*b | c | 1 | 1",
            "2.branch.1.0.weight": "a*d | b | 3 | 3",
            "2.branch.2.0.weight": "e | a*d | 1 | 1",
        },
    ),
    "densenet": (
        "a 6, b 12, c 16, d 6",
        {"2.layers.5.weight": "a | b | 3 | 3", "2.layers.2.weight": "b | c + d | 1 | 1", "2.layers.0.weight": "c + d"},
    ),
    "vgg": ("a 32, b 24", {"12.weight": "a | b*16"}),
    "lstm": (
        "a 20, b 16",
        {"body.weight_ih_l0": "a + a + a + a | b", "body.weight_hh_l0": "a + a + a + a | a"},
    ),
    "moe-stacked": ("a 3, b 32, c 20 in a", {"1.up": "a | b | c", "1.down": "a | c | b", "1.router.weight": "a | b"}),
    "cait": (
        "a 4, b 8 in a, c 32, d 4, e 8 in d, f 4",
        {
            "1.mixer.q.weight": "a*b | c",
            "1.mixer.v.weight": "d*e | c",
            "1.mixer.before.weight": "f | a",
            "1.mixer.after.weight": "d | f",
        },
    ),
}


@pytest.mark.parametrize("name", WORDS)
def test_axes_are_made_of_what_a_person_would_write(name: str) -> None:
    said, tensors = WORDS[name]
    spec = found(name)[1].spec
    assert words(spec, tensors) == tensors
    assert sizes(spec, tensors) == said


def test_a_fused_projection_is_a_sum_of_products_in_the_spec_itself() -> None:
    spec = found("vit-fused")[1].spec
    heads = "1.mixer.qkv"
    scores, values = ({"product": [heads, f"{heads}#{i}"]} for i in (2, 3))
    assert spec.axes["1.mixer.qkv.weight"] == ({"sum": [scores, scores, values]}, "0.project")
    assert spec.axes["1.mixer.proj.weight"] == ("0.project", {"product": [heads, f"{heads}#3"]})
    assert spec.roles["1.mixer.qkv.weight"] == ("producer", "consumer")


def test_tied_embeddings_are_one_tensor() -> None:
    it = found("gpt2")[1]
    assert it.spec.tied == {"lm_head.weight": "transformer.wte.weight"}
    assert it.spec.axes["lm_head.weight"] == it.spec.axes["transformer.wte.weight"] == (97, "transformer.wte")
