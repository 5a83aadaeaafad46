"""A network that one file holds, beside the parts of a model: read, checked and built."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from flux.errors import FluxError
from flux.weights import shapes, tensors, values

Tensors = dict[str, mx.array]


def load(
    kind: str,
    file: Path,
    config: Mapping[str, Any],
    to_ours: Callable[[Tensors], Tensors],
    network: Callable[..., nn.Module],
    dtype: mx.Dtype,
) -> nn.Module:
    """The network of a file, its weights in dtype, lazily. kind: as `shapes.params` takes it.

    to_ours: from the file's tensors to the network's names and axes; names that are not known stay. network:
    from the shape to the network. FluxError naming every tensor that is at fault.
    """
    found = tensors.load([file])
    header = tensors.read_header(file).tensors
    values.check(file, header, found.keys() & header.keys())
    try:
        weights = to_ours(found)
        built = network(shapes.params(kind, weights, config))
    except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:
        raise FluxError(f"{file}: no network fits its tensors and its config: {error}") from None
    tensors.check(str(file), weights, dict(tree_flatten(built.parameters())))
    built.load_weights([(name, w.astype(dtype)) for name, w in weights.items()])
    built.eval()
    return built
