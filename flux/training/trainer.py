"""The training loop: a model, a loss, batches and an optimizer in; a trained model out.

It knows no network and no task. Everything random comes from (seed, step): a batch is a function of the
step and a loss is handed a key made from it, so a stopped and resumed run is the straight run, to the bit.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from flux.errors import FluxError
from flux.training.ema import EMA

Metrics = dict[str, mx.array]
Loss = Callable[[nn.Module, Any, mx.array], tuple[mx.array, Metrics]]  # (model, batch, key) -> loss, metrics
Batches = Callable[[int], Any]  # step -> a tree of arrays
Callback = Callable[["Trainer", Metrics], None]  # after each step; `trainer.step` is the number of steps done


class Trainer:
    """Takes steps, and saves and loads everything that moves: parameters, optimizer, average, step.

    `average` combines the gradients of several processes; each of them is given its own batches and the same
    parameters. Parameters that the model has frozen stay as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batches: Batches,
        optimizer: optim.Optimizer,
        seed: int = 0,
        ema: EMA | None = None,
        average: Callable[[dict], dict] | None = None,
    ):
        self.model = model
        self.optimizer = optimizer
        self.ema = ema
        self.step = 0
        self._loss = loss
        self._batches = batches
        self._seed = seed
        self._average = average
        self._compiled: Callable | None = None
        optimizer.init(model.trainable_parameters())

    def run(self, steps: int, callbacks: tuple[Callback, ...] = ()) -> None:
        """Goes on until `steps` steps have been taken in all, those before a resume included."""
        self._compiled = self._compiled or self._compile()
        while self.step < steps:
            key = mx.random.key((self._seed << 32) + self.step)  # its two words are seed and step
            metrics = self._compiled(self._batches(self.step), key)
            mx.eval(metrics, self._state())
            self.step += 1
            for callback in callbacks:
                callback(self, metrics)

    def _compile(self) -> Callable:
        state = self._state()
        value_and_grad = nn.value_and_grad(self.model, self._loss)

        def step(batch: Any, key: mx.array) -> Metrics:
            (loss, metrics), gradients = value_and_grad(self.model, batch, key)
            if self._average is not None:
                gradients = self._average(gradients)
            self.optimizer.update(self.model, gradients)
            if self.ema is not None:
                self.ema.update(self.model)
            return {"loss": loss, **metrics}

        return mx.compile(step, inputs=state, outputs=state)

    def _state(self) -> list:
        return [self.model.state, self.optimizer.state, self.ema.state if self.ema else {}]

    def save(self, path: Path) -> None:
        """One safetensors file, complete or not there at all: a kill while writing leaves the file before."""
        trees = {"model": self.model.parameters(), "optimizer": self.optimizer.state}
        if self.ema is not None:
            trees["ema"] = self.ema.state
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial.safetensors")
        mx.save_safetensors(str(partial), dict(tree_flatten(trees)), {"step": json.dumps(self.step)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Goes on from a file of `save`. The networks and optimizers must be those that it was saved from."""
        arrays, metadata = mx.load(str(path), return_metadata=True)
        own = {"model": self.model.parameters(), "optimizer": self.optimizer.state}
        if self.ema is not None:
            own["ema"] = self.ema.state
        expected = {name: array.shape for name, array in tree_flatten(own)}
        found = {name: array.shape for name, array in arrays.items()}
        wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        if wrong:
            raise FluxError(f"{path} is no state of this training run; other or no shape: {', '.join(wrong)}")
        trees = tree_unflatten(list(arrays.items()))
        self.model.update(trees["model"])
        self.optimizer.state = trees["optimizer"]
        if self.ema is not None:
            self.ema.state = trees["ema"]
        self.step = json.loads(metadata["step"])
        self._compiled = None  # it has captured the old state
