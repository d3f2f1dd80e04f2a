"""What was measured of the models of a merge, found before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from merganser.continual.roles import Role, is_matrix, matrix_shape
from merganser.errors import MissingTensorError, ParameterError, ShapeError
from merganser.merging.lookup import Rules
from merganser.merging.recipe import Input
from merganser.types import Source

if TYPE_CHECKING:
    from merganser.merging.plan import Piece


def statistics_of(
    rules: Rules, sources: Mapping[str, Source], models: Sequence[Input], pieces: Sequence[Piece], role: Role
) -> tuple[str, ...]:
    """References of the models' statistics, which must hold what the method asks for of a tensor that it merges.

    Raises:
        ParameterError: If a model has none.
        MissingTensorError: If they lack a tensor.
        ShapeError: If one has another shape.
    """
    found = []
    for model, piece in zip(models, pieces, strict=True):
        if model.statistics is None:
            raise ParameterError(
                f"{rules.name} needs statistics of {model.ref}", "merganser measure writes them; statistics: PATH"
            )
        infos = sources[model.statistics].infos
        for kind in rules.measured:
            wanted = is_matrix(role) or (kind == "fisher" and role == "vector")
            name, info = f"{kind}/{piece.name}", sources[piece.ref].infos[piece.name]
            if wanted and name not in infos:
                raise MissingTensorError(f"{name} is not in {model.statistics}", "measure the model again")
            inputs = matrix_shape(role, info.shape)[1] if kind == "gram" and wanted else 0
            shape = (inputs, inputs) if kind == "gram" else info.shape
            if wanted and infos[name].shape != shape:
                raise ShapeError(
                    f"{name} of {model.statistics} is {infos[name].shape}, and {piece.name} takes {shape}",
                    "measure the model again",
                )
        found.append(model.statistics)
    return tuple(found)
