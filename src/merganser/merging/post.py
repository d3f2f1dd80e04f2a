"""What is done to a merged change afterwards, as the recipe's `post` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from inspect import Parameter, signature
from typing import Any

from torch import Tensor

from merganser.continual.roles import Role, is_matrix
from merganser.methods.joint.posts import POSTS, Post


def check_posts(post: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Everything that is wrong with a recipe's post-processors, one line a problem."""
    problems = []
    for name, settings in post:
        if name not in POSTS:
            near = get_close_matches(name, POSTS, n=1)
            problems.append(f"post.{name}: unknown; {f'did you mean {near[0]}?' if near else ', '.join(POSTS)}")
            continue
        known = POSTS[name].settings
        for setting in settings:
            if setting not in known:
                takes = ", ".join(known)
                problems.append(f"post.{name}.{setting}: unknown; {name} takes {takes}")
            elif not isinstance(settings[setting], int | float | None) or isinstance(settings[setting], bool):
                problems.append(f"post.{name}.{setting}: takes one number for all tensors")
        for setting, default in known.items():
            if default is Parameter.empty and setting not in settings:
                problems.append(f"post.{name}.{setting}: missing; it has no default")
    return problems


def finished(
    post: Sequence[tuple[str, Mapping[str, Any]]],
    role: Role,
    depth: float,
    merged: Tensor,
    changes: Sequence[Tensor],
) -> Tensor:
    """The merged change of one tensor after the recipe's post-processors, in their order.

    Args:
        post: names and settings.
        role: of the tensor.
        depth: of its layer, 0 for the first and 1 for the last.
        merged: the merged change, as the tensor is stored.
        changes: what it is a merge of, likewise.

    Raises:
        ParameterError: If a setting is out of range.
    """
    for name, settings in post:
        row = POSTS[name]
        if not row.matrices:
            merged = _called(row, merged, changes, depth, settings)
        elif is_matrix(role):
            turned = role == "transposed"
            seen, *others = [x.flatten(1) for x in (merged, *changes)]
            if turned:
                seen, *others = [x.T.contiguous() for x in (seen, *others)]
            result = _called(row, seen, others, depth, settings)
            merged = (result.T if turned else result).reshape(merged.shape)
    return merged


def _called(row: Post, merged: Tensor, d: Sequence[Tensor], depth: float, settings: Mapping[str, Any]) -> Tensor:
    names = signature(row.function).parameters
    brought = {n: v for n, v in {"merged": merged, "d": d, "depth": depth}.items() if n in names}
    return row.function(**brought, **settings)
