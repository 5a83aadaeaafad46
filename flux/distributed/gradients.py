"""Gradients and metrics averaged over the processes that mlx.launch starts."""

from collections.abc import Callable
from itertools import accumulate

import mlx.core as mx
from mlx.utils import tree_map

from flux.distributed.ranks import Ranks
from flux.trees import named_arrays


def average_gradients(group: mx.distributed.Group) -> Callable[[dict], dict]:
    """Mean of the gradients of all processes, in one message: many small ones would cost latency."""

    def average(gradients: dict) -> dict:
        flat = [array for _, array in named_arrays(gradients)]
        message = mx.concatenate([array.reshape(-1) for array in flat]) / group.size()
        message = mx.distributed.all_sum(message, group=group)
        ends = list(accumulate(array.size for array in flat))
        parts = iter(mx.split(message, ends[:-1]))
        return tree_map(lambda array: next(parts).reshape(array.shape).astype(array.dtype), gradients)

    return average


def average_metrics(ranks: Ranks) -> Callable[[dict[str, float]], dict[str, float]]:
    """Mean of each metric over the ranks. Shows a lost rank, too: a sum without it is not an error to MLX."""

    def average(metrics: dict[str, float]) -> dict[str, float]:
        rows = ranks.gather(metrics)
        return {name: sum(row[name] for row in rows) / len(rows) for name in metrics}

    return average
