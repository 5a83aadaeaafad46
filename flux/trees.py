"""The arrays of a nested structure with their names, as the type checker understands them."""

from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten


def named_arrays(tree: Any) -> list[tuple[str, mx.array]]:
    """(name, array) of every array in dicts and lists, names joined by dots."""
    return cast(list[tuple[str, mx.array]], tree_flatten(tree))
