"""Where results differ from mergekit 0.1.5 whatever the dialect; read by the generated page, held by tests/peer."""

from __future__ import annotations

from collections.abc import Mapping

#: What mergekit does, and what is done here instead.
DIFFERENCES: Mapping[str, str] = {
    "Unknown keys": (
        "mergekit ignores them, so `denisty: 0.2` runs at 1.0; here they are errors that name the nearest, or "
        "warnings with `--lenient`."
    ),
    "Arithmetic in `dtype`": (
        "mergekit casts every input first and computes in bfloat16, up to a fifth of the entries more than "
        "one step off; here it is float32 (float64 where a model is), and only the result is cast."
    ),
    "Config and tokenizer without `base_model`": (
        "mergekit takes them from a model that depends on PYTHONHASHSEED; here they are the first model's."
    ),
    "Tensors that a template forgets": (
        "mergekit drops them without a word (48 of 56 of a ViT as it is stored) or refuses the model; here "
        "every tensor is merged."
    ),
    "`modules`": (
        "mergekit's are those of its template; here a module is the tensors whose names begin with its name, `default` "
        "takes what no other does, and what is in no module is an error."
    ),
    "Tensors that only a later model of a slice has": (
        "mergekit may drop them; here they are an error, as in `models`, and `keep: [patterns]`, a key that mergekit "
        "ignores, leaves them out."
    ),
    "Lists of one entry a layer in the config of slices": (
        "mergekit leaves `layer_types` and its like as the donor has them, and changes their number alone; here "
        "each entry is that of the model that the layer comes from, and a config that lacks it is an error."
    ),
    "Slices of layers of several kinds": (
        "mergekit leaves lists of layers' numbers (`mlp_only_layers`) as they are, and stacks any layer on any; here "
        "such lists get the new numbers, and a layer without tensors that the config asks for in its place, which "
        "would be drawn at random when the model is loaded, is an error."
    ),
    "Tied and untied models together": (
        "mergekit writes a head, and a config that ties it away; here the output is untied and its config says so."
    ),
    "Integers and running statistics": (
        "mergekit's methods treat them as weights, and cast masks to `dtype`; here integers must be equal, "
        "means and variances are averaged."
    ),
    "Noise": (
        "mergekit draws from one global generator; here a model's noise depends on the seed, its reference "
        "and the tensor's name alone."
    ),
    "Equal magnitudes at the edge of a density": (
        "mergekit's sort is not stable; here the first in the tensor are kept."
    ),
    "A density that keeps nothing": ("mergekit's breadcrumbs and sce may keep no entry; here it is at least one."),
    "Election of signs with `normalize`": (
        "mergekit divides by the sum of weights, which gives a lone model of negative weight its sign back "
        "and can be 0; here by the sum of their sizes."
    ),
    "Weights that add up to 0 under `normalize`": ("mergekit's linear gives infinity or NaN; here it is an error."),
    "Weights of 0 throughout": (
        "where no model has a weight for a tensor, methods of changes leave it as the base's, as in mergekit; under "
        "linear and multislerp, where mergekit gives NaN, and nuslerp, where it takes the middle, it is an error."
    ),
    "Small changes": (
        "mergekit clamps at 1e-6 in model_stock (small changes give the base), sce (equal weights) and "
        "nearswap; here nothing is clamped."
    ),
    "Zero tensors in slerp and nuslerp": ("mergekit takes them as orthogonal; here it is the straight line."),
    "multislerp of changes where nobody changed a tensor": (
        "mergekit fails with three or more models; here it is the base."
    ),
    "della": (
        "mergekit cannot rank rows of one entry, and ranks convolutions along axis 1; here along the last "
        "axis, and rows of one entry are kept by their density."
    ),
    "model_stock with `filter_wise` on convolutions": (
        "mergekit takes lines of the last axis; here it is whole filters."
    ),
    "arcee_fusion": (
        "mergekit's quantiles are those of a random sample above a million entries; here they are exact, and "
        "the divergence is float64 without an epsilon."
    ),
    "ramplus_tl": ("mergekit writes float32 tensors from bfloat16 models; here the type is the models'."),
    "Ranges": (
        "t above 1, densities of 0 or 1.5 and negative weights in nuslerp and multislerp are errors here; "
        "mergekit computes something."
    ),
    "Embeddings of different sizes": (
        "mergekit refuses, or cuts with --unsafe-truncate-embeddings; here `vocabulary` or `tokenizer_source` "
        "maps them, and nothing is cut."
    ),
    "Order of a union of vocabularies": (
        "mergekit adds new tokens in the order of a Python set; here by model and id. Rows of padding are the "
        "mean of a model's own rows."
    ),
}
