"""Where the result differs from mergekit 0.1.5, whatever the dialect; read by the generated page."""

from __future__ import annotations

from collections.abc import Mapping

#: What mergekit does, and what is done here instead.
DIFFERENCES: Mapping[str, str] = {
    "Unknown keys": (
        "mergekit ignores them, so `denisty: 0.2` runs at 1.0; here they are errors that name the nearest, or "
        "warnings with `--lenient`."
    ),
    "Config and tokenizer without `base_model`": (
        "mergekit takes them from a model that depends on PYTHONHASHSEED; here they are the first model's."
    ),
    "Arithmetic": (
        "mergekit casts every input to `dtype` first; here it is float32 (float64 where a model is), and only "
        "the result is cast."
    ),
    "Tied and untied models together": (
        "mergekit writes an `lm_head` that loading ignores, or none; here the output is untied and its config says so."
    ),
    "Noise": (
        "mergekit draws from one global generator; here a model's noise depends on the seed, its reference "
        "and the tensor's name alone."
    ),
    "Election of signs with `normalize`": (
        "mergekit divides by the sum of weights, which gives a lone model of negative weight its sign back "
        "and can be 0; here by the sum of their sizes."
    ),
    "Opposite tensors in slerp and nuslerp": (
        "mergekit gives zeros; in its dialect so do we, in our own the nearer one's direction."
    ),
    "Weights that add up to 0 under `normalize`": ("mergekit gives infinity or NaN; here it is an error."),
    "arcee_fusion": ("mergekit's quantiles are those of a random sample above a million entries; here they are exact."),
    "Running statistics, integers": (
        "mergekit's methods treat them as weights; here means and variances are averaged, and integers must be equal."
    ),
    "Embeddings of different sizes": (
        "mergekit refuses, or cuts with --unsafe-truncate-embeddings; here `vocabulary` or `tokenizer_source` "
        "maps them, and nothing is cut."
    ),
}
