"""Gradients averaged over the processes that mlx.launch starts."""

from collections.abc import Callable
from itertools import accumulate

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map


def average_gradients(group: mx.distributed.Group) -> Callable[[dict], dict]:
    """Mean of the gradients of all processes, in one message: many small ones would cost latency."""

    def average(gradients: dict) -> dict:
        flat = [array for _, array in tree_flatten(gradients)]
        message = mx.concatenate([array.reshape(-1) for array in flat]) / group.size()
        message = mx.distributed.all_sum(message, group=group)
        ends = list(accumulate(array.size for array in flat))
        parts = iter(mx.split(message, ends[:-1]))
        return tree_map(lambda array: next(parts).reshape(array.shape).astype(array.dtype), gradients)

    return average
