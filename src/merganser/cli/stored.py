"""Under which names a checkpoint holds a network's tensors, where a library calls them otherwise in files."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from merganser.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

    from merganser.types import Source


def shown_as(network: nn.Module, source: Source) -> Source:
    """A checkpoint under a network's names, as `stored_names` tells them."""
    from merganser.checkpoints.views import renamed

    known = {held: name for name, held in stored_names(network, source).items()}
    return renamed(source, lambda name: known.get(name, name)) if known else source


def stored_names(network: nn.Module, source: Source) -> dict[str, str]:
    """Names of a network's tensors and what a checkpoint calls them, where it calls them otherwise.

    From version 5 on, transformers renames the tensors of some networks, ViT's among them, as it reads and writes
    them; older files have other names too (`LayerNorm.gamma`). Its own rules are asked.

    Returns:
        The network's name -> the checkpoint's; empty where all are the same.

    Raises:
        CheckpointError: If it holds a tensor of the network in another form than the network does.

    >>> from torch import nn
    >>> stored_names(nn.Linear(2, 2), None)
    {}
    """
    library: Any = sys.modules.get("transformers")  # a network of its own brings it
    if library is None or not isinstance(network, library.PreTrainedModel):
        return {}
    state = network.state_dict()
    others = [name for name in (*source.infos, *source.aliases) if name not in state]
    if not others:
        return {}
    try:
        mapping: Any = importlib.import_module("transformers.conversion_mapping")
        loading: Any = importlib.import_module("transformers.core_model_loading")
    except ImportError:  # before version 5 it had no such rules
        return {}
    rules = mapping.get_model_conversion_mapping(network)
    renaming = [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
    converting = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]
    found: dict[str, str] = {}
    for name in others:
        known, converted = loading.rename_source_key(name, renaming, converting, network.base_model_prefix, state)
        if known not in state or known in source.infos or known in source.aliases:
            continue
        if converted is not None:
            raise CheckpointError(
                f"{source.ref} holds {known} of the network in another form, as {name}",
                "write it as the network has it: network.save_pretrained(FOLDER, save_original_format=False)",
            )
        found[known] = name
    return found
