"""An exponential moving average of a model's parameters: smoother than those of the last step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map


class Trainable(Protocol):
    """What is averaged: an nn.Module, or a view of some of its parameters."""

    def trainable_parameters(self) -> Any:
        """A tree of arrays."""


class EMA:
    """Average of the trainable parameters. `state` is a tree of arrays, saved and compiled with the rest.

    The decay of step n is min(decay, (1 + n) / (10 + n)), so that the random start is soon forgotten.
    """

    def __init__(self, model: Trainable, decay: float = 0.9999):
        self.decay = decay
        self.state = {
            "step": mx.array(0.0),
            "average": tree_map(lambda p: mx.array(p), model.trainable_parameters()),
        }

    def update(self, model: Trainable) -> None:
        """Moves towards the model's parameters of now."""
        step = self.state["step"]
        share = 1 - mx.minimum(self.decay, (1 + step) / (10 + step))
        self.state["step"] = step + 1
        self.state["average"] = tree_map(
            lambda average, now: average + share * (now - average),
            self.state["average"],
            model.trainable_parameters(),
        )

    def copy_to(self, model: nn.Module) -> None:
        """Replaces the model's parameters by their average."""
        model.update(self.state["average"])


@contextmanager
def averaged(model: nn.Module, ema: EMA | None) -> Iterator[None]:
    """Within the block the model has the averaged parameters, if there is an average."""
    before = model.trainable_parameters()
    if ema is not None:
        ema.copy_to(model)
    try:
        yield
    finally:
        model.update(before)
