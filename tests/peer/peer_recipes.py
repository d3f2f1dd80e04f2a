"""Recipes that both programs merge, in mergekit's language; `M/` stands for the folder of the family's models."""

from __future__ import annotations

from collections.abc import Mapping

_TWO = "models: [{model: M/a}, {model: M/b}]\n"
_THREE = "models: [{model: M/a}, {model: M/b}, {model: M/c}]\n"
_BASE = "base_model: M/base\n"


def _weighted(*models: str) -> str:
    """A list of models, each with its parameters."""
    parts = [m.partition(" ") for m in models]
    return "models:\n" + "".join(f"- {{model: M/{name}, parameters: {given}}}\n" for name, _, given in parts)


_PAIR = _weighted("a {weight: 0.7}", "b {weight: 0.4}")
_TRIO = _weighted("a {weight: 0.7}", "b {weight: 0.4}", "c {weight: 0.25}")
_NEGATIVE = _weighted("a {weight: 1.0}", "b {weight: -0.3}", "c {weight: 0.5}")
_DENSE = _weighted("a {weight: 0.7, density: 0.5}", "b {weight: 0.4, density: 0.3}", "c {weight: 0.25, density: 0.8}")
_CRUMBS = _weighted("a {weight: 0.7, density: 0.8, gamma: 0.05}", "b {weight: 0.4, density: 0.6, gamma: 0.1}")

#: Method of every kind with every setting that it has, on every family.
METHODS: Mapping[str, str] = {
    "linear": f"merge_method: linear\n{_TRIO}",
    "linear sum": f"merge_method: linear\n{_NEGATIVE}parameters: {{normalize: false}}\n",
    "slerp": f"merge_method: slerp\n{_BASE}models: [{{model: M/base}}, {{model: M/a}}]\nparameters: {{t: 0.3}}\n",
    "nuslerp": f"merge_method: nuslerp\n{_PAIR}",
    "nuslerp of changes": f"merge_method: nuslerp\n{_BASE}{_PAIR}",
    "multislerp": f"merge_method: multislerp\n{_TRIO}",
    "multislerp of changes": f"merge_method: multislerp\n{_BASE}{_TRIO}",
    "karcher": f"merge_method: karcher\n{_THREE}",
    "task_arithmetic": f"merge_method: task_arithmetic\n{_BASE}{_TRIO}parameters: {{lambda: 0.8}}\n",
    "ties": f"merge_method: ties\n{_BASE}{_DENSE}",
    "model_stock": f"merge_method: model_stock\n{_BASE}{_THREE}",
    "passthrough": "merge_method: passthrough\nmodels: [{model: M/a}]\n",
    "breadcrumbs": f"merge_method: breadcrumbs\n{_BASE}{_CRUMBS}",
    "breadcrumbs_ties": f"merge_method: breadcrumbs_ties\n{_BASE}{_CRUMBS}",
    "sce": f"merge_method: sce\n{_BASE}{_THREE}parameters: {{select_topk: 0.5}}\n",
    "nearswap": f"merge_method: nearswap\n{_BASE}{_TWO.replace('M/b', 'M/base')}parameters: {{t: 0.01}}\n",
    "ram": f"merge_method: ram\n{_BASE}{_THREE}",
    "ramplus_tl": f"merge_method: ramplus_tl\n{_BASE}{_THREE}",
}

#: Settings and shapes of the language, on one family of four layers.
SETTINGS: Mapping[str, str] = {
    "linear, base listed": f"merge_method: linear\nbase_model: M/a\n{_PAIR}",
    "linear, base added": f"merge_method: linear\n{_BASE}{_TWO}parameters: {{weight: [0.2, 0.9]}}\n",
    "linear, gradients": "merge_method: linear\n"
    + _weighted("a {weight: [0, 1, 0.25]}", "b {weight: [{filter: mlp, value: [1, 0.2]}, {value: 0.6}]}"),
    "linear, four levels": """
        merge_method: linear
        parameters: {weight: 0.1, normalize: false}
        slices:
          - sources:
              - {model: M/a, layer_range: [0, 2], parameters: {weight: [{filter: mlp, value: 0.4}]}}
              - {model: M/b, layer_range: [0, 2]}
            parameters: {weight: 0.3}
          - sources:
              - {model: M/a, layer_range: [2, 4]}
              - {model: M/b, layer_range: [2, 4]}
            parameters: {normalize: true}
        """,
    "slerp by parts": """
        merge_method: slerp
        base_model: M/a
        slices:
          - sources: [{model: M/a, layer_range: [0, 4]}, {model: M/b, layer_range: [0, 4]}]
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - value: 0.5
        """,
    "slerp, base second": """
        merge_method: slerp
        base_model: M/b
        models: [{model: M/a}, {model: M/b}]
        parameters: {t: [0.2, 0.9]}
        """,
    "slerp, layers shifted": """
        merge_method: slerp
        base_model: M/base
        slices:
          - sources: [{model: M/base, layer_range: [0, 3]}, {model: M/a, layer_range: [1, 4]}]
        parameters: {t: 0.4}
        """,
    "nuslerp of lines": f"merge_method: nuslerp\n{_PAIR}parameters: {{nuslerp_flatten: false}}\n",
    "nuslerp of columns": f"merge_method: nuslerp\n{_PAIR}"
    "parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}\n",
    "nuslerp of lines of changes": f"merge_method: nuslerp\n{_BASE}{_PAIR}parameters: {{nuslerp_flatten: false}}\n",
    "nuslerp of columns of changes": f"merge_method: nuslerp\n{_BASE}{_PAIR}"
    "parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}\n",
    "multislerp, not normalised": f"merge_method: multislerp\n{_TRIO}parameters: {{normalize_weights: false}}\n",
    "multislerp of changes, not normalised": f"merge_method: multislerp\n{_BASE}{_TRIO}"
    "parameters: {normalize_weights: false}\n",
    "karcher of two": f"merge_method: karcher\n{_TWO}parameters: {{max_iter: 20, tol: 1.0e-7}}\n",
    "task_arithmetic, normalised": f"merge_method: task_arithmetic\n{_BASE}{_TRIO}parameters: {{normalize: true}}\n",
    "task_arithmetic, negative": f"merge_method: task_arithmetic\n{_BASE}{_NEGATIVE}"
    "parameters: {lambda: [0.5, 1.5]}\n",
    "ties, all kept": f"merge_method: ties\n{_BASE}{_TRIO}",
    "ties, a sum": f"merge_method: ties\n{_BASE}{_DENSE}"
    "parameters: {normalize: false, lambda: 0.7, int8_mask: true}\n",
    "ties, rescaled": f"merge_method: ties\n{_BASE}{_DENSE}parameters: {{rescale: true}}\n",
    "ties, negative sum": f"merge_method: ties\n{_BASE}{_NEGATIVE}parameters: {{density: 0.5, normalize: false}}\n",
    "ties, gradients": f"merge_method: ties\n{_BASE}"
    + _weighted(
        "a {weight: [0.1, 1], density: [1, 0.7, 0.1]}",
        "b {weight: 0.5, density: [{filter: mlp, value: 0.5}, {value: 1}]}",
    ),
    "ties, few kept": f"merge_method: ties\n{_BASE}{_TRIO}parameters: {{density: 0.01}}\n",
    "breadcrumbs, rescaled": f"merge_method: breadcrumbs\n{_BASE}{_CRUMBS}"
    "parameters: {rescale: true, normalize: true}\n",
    "breadcrumbs_ties, normalised": f"merge_method: breadcrumbs_ties\n{_BASE}{_CRUMBS}"
    "parameters: {normalize: true, lambda: 1.3}\n",
    "breadcrumbs, default": f"merge_method: breadcrumbs\n{_BASE}{_TRIO}",
    "breadcrumbs, gamma 0": f"merge_method: breadcrumbs\n{_BASE}{_TRIO}parameters: {{gamma: 0, density: 0.5}}\n",
    "model_stock by rows": f"merge_method: model_stock\n{_BASE}{_THREE}parameters: {{filter_wise: true}}\n",
    "model_stock of two": f"merge_method: model_stock\n{_BASE}{_TWO}",
    "sce, all": f"merge_method: sce\n{_BASE}{_THREE}",
    "ram, epsilon": f"merge_method: ram\n{_BASE}{_THREE}parameters: {{epsilon: 0.005}}\n",
    "ramplus_tl, settings": f"merge_method: ramplus_tl\n{_BASE}{_THREE}parameters: {{r: 0.5, alpha: 2.0}}\n",
    "passthrough, scaled": """
        merge_method: passthrough
        models:
          - model: M/a
            parameters: {scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: [0.5, 2]}, {value: 1.0}]}
        """,
    "stack": """
        merge_method: passthrough
        slices:
          - sources: [{model: M/a, layer_range: [0, 3]}]
          - sources: [{model: M/b, layer_range: [1, 4]}]
        """,
    "stack, head of a slice without layers": """
        merge_method: passthrough
        slices:
          - sources: [{model: M/a, layer_range: [0, 3]}]
          - sources: [{model: M/b, layer_range: [1, 4]}]
          - sources: [{model: M/c, layer_range: [4, 4]}]
        """,
    "stack of merges": """
        merge_method: task_arithmetic
        base_model: M/base
        slices:
          - sources:
              - {model: M/base, layer_range: [0, 2]}
              - {model: M/a, layer_range: [0, 2], parameters: {weight: 0.5}}
              - {model: M/b, layer_range: [1, 3], parameters: {weight: [0.1, 0.9]}}
            parameters: {lambda: 0.5}
          - sources:
              - {model: M/base, layer_range: [3, 4]}
              - {model: M/c, layer_range: [3, 4], parameters: {weight: [0.2, 1]}}
        """,
    "one layer reads the last value": """
        merge_method: linear
        slices:
          - sources:
              - {model: M/a, layer_range: [0, 1], parameters: {weight: [0.1, 0.9]}}
              - {model: M/b, layer_range: [0, 1], parameters: {weight: 0.5}}
        """,
    "documents": """
        name: first
        merge_method: slerp
        base_model: M/base
        models: [{model: M/base}, {model: M/a}]
        parameters: {t: 0.5}
        ---
        name: second
        merge_method: linear
        models: [{model: M/b, parameters: {weight: 1}}, {model: first, parameters: {weight: 2}}]
        ---
        merge_method: task_arithmetic
        base_model: M/base
        models: [{model: second, parameters: {weight: 1}}, {model: M/c, parameters: {weight: 0.5}}]
        """,
    "modules": """
        merge_method: ties
        base_model: M/base
        parameters: {weight: 0.3, density: 0.5}
        modules:
          default:
            parameters: {weight: 0.8}
            slices:
              - sources:
                  - {model: M/base, layer_range: [0, 4]}
                  - {model: M/a, layer_range: [0, 4], parameters: {density: 0.9}}
                  - {model: M/b, layer_range: [0, 4], parameters: {weight: 0.1}}
        """,
    "adapter": "merge_method: linear\n" + _weighted("base+M/adapter {weight: 0.7}", "b {weight: 0.3}"),
}

#: Where we differ on purpose: folder of the models and recipe.
DIFFERENCES: Mapping[str, tuple[str, str]] = {
    "buffers": ("neox.bf16", f"merge_method: linear\n{_PAIR}dtype: float32\n"),
    "neox as stored": ("neox.published.f32", f"merge_method: linear\n{_PAIR}"),
    "vit as stored": ("vit.published.f32", f"merge_method: linear\n{_PAIR}"),
    "bert without pooler": ("maskedlm.f32", f"merge_method: linear\n{_PAIR}"),
    "ties, lone negative": (
        "llama.f32",
        f"merge_method: ties\n{_BASE}" + _weighted("a {weight: -1.0}") + "parameters: {normalize: true}\n",
    ),
    "small model_stock": ("small.f32", f"merge_method: model_stock\n{_BASE}{_TWO}"),
    "small sce": ("small.f32", f"merge_method: sce\n{_BASE}{_TWO}"),
    "small nearswap": (
        "small.f32",
        f"merge_method: nearswap\n{_BASE}{_TWO.replace('M/b', 'M/base')}parameters: {{t: 1.0e-7}}\n",
    ),
    "one entry, sce": ("bert.f32", f"merge_method: sce\n{_BASE}{_THREE}parameters: {{select_topk: 0.4}}\n"),
    "zero slerp": (
        "odd.f32",
        f"merge_method: slerp\n{_BASE}{_TWO.replace('M/b', 'M/base')}parameters: {{t: 0.3}}\n",
    ),
    "zero nuslerp": ("odd.f32", f"merge_method: nuslerp\n{_BASE}{_PAIR}"),
    "zero multislerp": ("still.f32", f"merge_method: multislerp\n{_BASE}{_TRIO}"),
    "one entry, breadcrumbs": ("odd.f32", f"merge_method: breadcrumbs\n{_BASE}{_PAIR}parameters: {{density: 0.05}}\n"),
    "della of one entry": (
        "vit.f32",
        f"merge_method: della_linear\n{_BASE}{_PAIR}parameters: {{density: 0.5, epsilon: 0.1}}\n",
    ),
    "rows of a convolution": (
        "vit.f32",
        f"merge_method: model_stock\n{_BASE}{_TWO}parameters: {{filter_wise: true}}\n",
    ),
    "arcee_fusion": ("llama.f32", f"merge_method: arcee_fusion\n{_BASE}{_TWO.replace('M/b', 'M/base')}"),
    "lines of a convolution": (
        "vit.f32",
        f"merge_method: della_linear\n{_BASE}{_weighted('a {weight: 1}')}"
        "parameters:\n  {density: [{filter: patch, value: 0.5}, {value: 1}], epsilon: 0.499, rescale: false}\n",
    ),
    "tied and untied": ("tied.f32", f"merge_method: linear\nbase_model: M/a\n{_PAIR}"),
    "short name of a type": ("llama.f32", "merge_method: passthrough\nmodels: [{model: M/a}]\ndtype: bf16\n"),
    "misspelt": (
        "llama.f32",
        f"merge_method: ties\n{_BASE}" + _weighted("a {weight: 1, denisty: 0.1}") + "tokeniser_source: union\n",
    ),
    "a bare last value": (
        "llama.f32",
        "merge_method: linear\n" + _weighted("a {weight: [{filter: mlp, value: 0.1}, 0.5]}", "b {weight: 1}"),
    ),
}

#: What mergekit computes and we refuse, and a piece of what we say.
REFUSED: Mapping[str, tuple[str, str]] = {
    "weights that cancel, linear": (
        "merge_method: linear\n" + _weighted("a {weight: 1}", "b {weight: -1}"),
        "add up to 0",
    ),
    "weights that cancel, task_arithmetic": (
        f"merge_method: task_arithmetic\n{_BASE}"
        + _weighted("a {weight: 1}", "b {weight: -1}")
        + "parameters: {normalize: true}\n",
        "add up to 0",
    ),
    "t above 1": (
        f"merge_method: slerp\n{_BASE}{_TWO.replace('M/b', 'M/base')}parameters: {{t: 1.2}}\n",
        "t is 1.2",
    ),
    "negative place": (
        "merge_method: nuslerp\n" + _weighted("a {weight: 1}", "b {weight: -0.2}"),
        "each is a number from 0",
    ),
    "negative share": (
        "merge_method: multislerp\n" + _weighted("a {weight: 1}", "b {weight: -0.2}"),
        "each is a number from 0",
    ),
    "density of 150 %": (
        f"merge_method: ties\n{_BASE}" + _weighted("a {weight: 1, density: 1.5}"),
        "density is 1.5; it is a fraction in (0, 1]",
    ),
    "density 0": (
        f"merge_method: ties\n{_BASE}" + _weighted("a {weight: 1, density: 0}"),
        "density is 0.0; it is a fraction in (0, 1]",
    ),
}

#: What neither program merges: folder of the models and recipe.
IMPOSSIBLE: Mapping[str, tuple[str, str]] = {
    "t at a model": (
        "llama.f32",
        f"merge_method: slerp\n{_BASE}" + _weighted("base {t: 0.5}", "a {t: 0.5}"),
    ),
    "layers past the last": (
        "llama.f32",
        "merge_method: passthrough\nslices: [{sources: [{model: M/a, layer_range: [2, 6]}]}]\n",
    ),
    "different numbers of layers": (
        "llama.f32",
        "merge_method: linear\nslices: [{sources: [{model: M/a, layer_range: [0, 2]}, "
        "{model: M/b, layer_range: [0, 3]}]}]\nparameters: {weight: 1}\n",
    ),
    "no weight": ("llama.f32", f"merge_method: ties\n{_BASE}{_TWO}"),
    "no base": ("llama.f32", f"merge_method: ties\n{_PAIR}"),
    "three for slerp": ("llama.f32", f"merge_method: slerp\n{_BASE}{_THREE}parameters: {{t: 0.5}}\n"),
    "two for passthrough": ("llama.f32", f"merge_method: passthrough\n{_TWO}"),
    "different vocabularies": ("words", "merge_method: linear\n" + _weighted("small {weight: 1}", "large {weight: 1}")),
    "epsilon past the density": (
        "llama.f32",
        f"merge_method: della\n{_BASE}{_PAIR}parameters: {{density: 0.2, epsilon: 0.3}}\n",
    ),
}

_P, _Q = "a {weight: 1, density: 0.3}", "b {weight: 0.6, density: 0.7}"
#: What draws noise, on layers that all hold the same change.
CHANCE: Mapping[str, str] = {
    "dare_linear": f"merge_method: dare_linear\n{_BASE}{_weighted(_P)}parameters: {{rescale: false}}\n",
    "dare_linear, rescaled": f"merge_method: dare_linear\n{_BASE}{_weighted(_P)}",
    "dare_ties": f"merge_method: dare_ties\n{_BASE}{_weighted(_P, _Q)}",
    "della_linear": f"merge_method: della_linear\n{_BASE}{_weighted(_P)}parameters: {{rescale: false, epsilon: 0.2}}\n",
    "della": f"merge_method: della\n{_BASE}{_weighted(_P, _Q)}parameters: {{epsilon: 0.2}}\n",
}

_WORDS = "merge_method: linear\n" + _weighted("small {weight: 0.5}", "large {weight: 0.5}")
#: Vocabularies of 64, 66 and 64 + 4 unused rows.
TOKENIZERS: Mapping[str, str] = {
    "union": f"{_WORDS}base_model: M/small\ntokenizer_source: union\n",
    "base": f"{_WORDS}base_model: M/small\ntokenizer_source: base\n",
    "of a model": f"{_WORDS}base_model: M/small\ntokenizer_source: M/large\n",
    "padded": f"{_WORDS}base_model: M/small\ntokenizer: {{source: union, pad_to_multiple_of: 32}}\n",
    "unused rows": "merge_method: linear\n"
    + _weighted("small {weight: 0.5}", "unused {weight: 0.5}")
    + "base_model: M/small\ntokenizer_source: union\n",
    "changes": f"merge_method: task_arithmetic\n{_BASE.replace('M/base', 'M/small')}"
    + _weighted("large {weight: 0.5}", "unused {weight: 0.25}")
    + "tokenizer_source: union\n",
    "tokens": f"""
        {_WORDS.replace(chr(10), chr(10) + " " * 8)}
        base_model: M/small
        tokenizer:
          source: union
          tokens:
            th: {{source: {{kind: zero}}}}
            the: {{source: {{kind: model_token, model: M/small, token: "a"}}}}
            b: {{source: M/large, force: true}}
            c: {{source: {{kind: model_token, model: M/large, token_id: 5}}, force: true}}
        """,
}
