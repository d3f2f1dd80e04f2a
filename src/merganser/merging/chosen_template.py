"""The chat template of the output: the one that a recipe names, or the one that most of its models have."""

from __future__ import annotations

from collections.abc import Mapping

from merganser.errors import ParameterError
from merganser.merging.chat_templates import TEMPLATES
from merganser.merging.recipe import Recipe
from merganser.merging.tokenizer_json import CONFIG_NAME, TEMPLATE_NAMES, bytes_of, object_of, tokenizer_files
from merganser.types import Source


def chat_template_of(recipe: Recipe, sources: Mapping[str, Source]) -> str | None:
    """The template that a recipe asks for.

    Args:
        recipe: whose `chat_template` is "auto" for the most frequent one among its models and their base, where the
            first model's counts if several are as frequent; one that is built in by name; or a template itself.
        sources: the opened source of every model.

    Returns:
        The template; None where the recipe asks for none, or for "auto" and no model has one.

    Raises:
        ParameterError: If it is a single word and none of the built-in ones.
        CheckpointError: If a model's file cannot be read.
    """
    wanted = recipe.chat_template
    if wanted is None or "{{" in wanted or "{%" in wanted:
        return wanted
    if wanted != "auto":
        if wanted not in TEMPLATES:
            raise ParameterError(
                f"chat_template is {wanted!r}, which is no template", f"write one, or auto, {', '.join(TEMPLATES)}"
            )
        return TEMPLATES[wanted]
    found: dict[str, list[str]] = {}  # by all but the space around them, which a file of its own ends on
    for ref in dict.fromkeys((*(model.ref for one in recipe.slices for model in one.inputs), *recipe.refs)):
        if (template := _template(sources[ref])) is not None:
            found.setdefault(template.strip(), []).append(template)
    return max(found.values(), key=len)[0] if found else None


def _template(source: Source) -> str | None:
    """A model's own template: from a file of its own, or from the settings of its tokenizer."""
    files = tokenizer_files(source)
    plain, in_json = TEMPLATE_NAMES
    if plain in files:
        return bytes_of(files, plain).decode("utf-8", "replace")
    for name in (CONFIG_NAME, in_json):
        found = object_of(bytes_of(files, name), f"{name} of {source.ref}").get("chat_template")
        if isinstance(found, list):  # several with names, of which one is the usual one
            named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
            found = named.get("default")
        if isinstance(found, str):
            return found
    return None
