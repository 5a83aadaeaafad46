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
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from flux.errors import FluxError
from flux.training.ema import EMA

Metrics = dict[str, mx.array]
Loss = Callable[[nn.Module, Any, mx.array], tuple[mx.array, Metrics]]  # (model, batch, key) -> loss, metrics
Batches = Callable[[int], Any]  # step -> a tree of arrays
Callback = Callable[["Trainer", Metrics], None]  # after each step; `trainer.step` is the number of steps done


class Trainer:
    """Takes steps, and saves and loads everything that moves: parameters, optimizer, average, step.

    A step is an update of the parameters, by the mean gradient of `accumulate` batches. Parameters that the
    model has frozen stay as they are.
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
        accumulate: int = 1,
        clip_norm: float | None = None,
        compiled: bool = True,
        save_frozen: bool = True,
    ):
        """average: combines the gradients of several processes, once a step; each of them is given its own
        batches and the same parameters.
        accumulate: batches a step; `batches` counts batches, from 0.
        clip_norm: the gradients' norm is at most this; the metrics then have it as `norm`, as it was.
        compiled: on a CPU, `mx.compile` calls a C++ compiler, seconds for every kernel of a new shape.
        save_frozen: False leaves frozen parameters out of the saved state; `load` then needs them in place.
        """
        self.model = model
        self.optimizer = optimizer
        self.ema = ema
        self.step = 0
        self._loss = loss
        self._batches = batches
        self._seed = seed
        self._average = average
        self._accumulate = accumulate
        self._clip_norm = clip_norm
        self._compiled = compiled
        self._save_frozen = save_frozen
        self._step: Callable | None = None  # (batches, after_batch) -> metrics
        self._sum: dict[str, Any] = {}  # "gradients": of the step's batches so far
        optimizer.init(model.trainable_parameters())

    def run(
        self,
        steps: int,
        callbacks: tuple[Callback, ...] = (),
        between_batches: Callable[[], None] = lambda: None,
    ) -> None:
        """Goes on until `steps` steps have been taken in all, those before a resume included.

        A metric is the mean over the step's batches. `between_batches`, called between two batches of a step,
        may raise to end the run: the parameters are then those of the last whole step, and `save` may follow.
        """
        self._step = self._step or (self._whole_step() if self._accumulate == 1 else self._summed_step())
        while self.step < steps:
            metrics = self._step(between_batches)
            self.step += 1
            for callback in callbacks:
                callback(self, metrics)

    def _batch(self, number: int) -> tuple[Any, mx.array]:
        return self._batches(number), mx.random.key((self._seed << 32) + number)  # words: seed and number

    def _whole_step(self) -> Callable[[Callable], Metrics]:
        """A step of one batch: forward, backward and update are one function."""
        state = self._state()
        value_and_grad = nn.value_and_grad(self.model, self._loss)

        def step(batch: Any, key: mx.array) -> Metrics:
            (loss, metrics), gradients = value_and_grad(self.model, batch, key)
            return {"loss": loss, **metrics, **self._update(gradients)}

        function = self._compile(step, state, state)

        def take(_: Callable) -> Metrics:
            metrics = function(*self._batch(self.step))
            mx.eval(metrics, self._state())
            return metrics

        return take

    def _summed_step(self) -> Callable[[Callable], Metrics]:
        """A step of several batches: one function adds up their gradients, one makes the update."""
        state = self._state()
        value_and_grad = nn.value_and_grad(self.model, self._loss)

        def add(batch: Any, key: mx.array) -> Metrics:
            (loss, metrics), gradients = value_and_grad(self.model, batch, key)
            self._sum["gradients"] = tree_map(mx.add, self._sum["gradients"], gradients)
            return {"loss": loss, **metrics}

        def update() -> Metrics:
            return self._update(tree_map(lambda g: g / self._accumulate, self._sum["gradients"]))

        self._clear_sum()
        add = self._compile(add, [self.model.state, self._sum], [self._sum])
        update = self._compile(update, [*state, self._sum], state)

        def take(between_batches: Callable) -> Metrics:
            self._clear_sum()
            parts = []
            for i in range(self._accumulate):
                if i:
                    between_batches()
                parts.append(add(*self._batch(self.step * self._accumulate + i)))
                mx.eval(parts, self._sum)
            metrics = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]} | update()
            mx.eval(metrics, self._state())
            return metrics

        return take

    def _clear_sum(self) -> None:
        self._sum["gradients"] = tree_map(mx.zeros_like, self.model.trainable_parameters())

    def _update(self, gradients: dict) -> Metrics:
        metrics = {}
        if self._average is not None:
            gradients = self._average(gradients)
        if self._clip_norm is not None:
            gradients, metrics["norm"] = optim.clip_grad_norm(gradients, self._clip_norm)
        self.optimizer.update(self.model, gradients)
        if self.ema is not None:
            self.ema.update(self.model)
        return metrics

    def _compile(self, function: Callable, inputs: list, outputs: list) -> Callable:
        return mx.compile(function, inputs=inputs, outputs=outputs) if self._compiled else function

    def _state(self) -> list:
        return [self.model.state, self.optimizer.state, self.ema.state if self.ema else {}]

    def _trees(self) -> dict[str, Any]:
        """What is saved."""
        model = self.model.parameters() if self._save_frozen else self.model.trainable_parameters()
        trees = {"model": model, "optimizer": self.optimizer.state}
        return trees | ({"ema": self.ema.state} if self.ema is not None else {})

    def save(self, path: Path) -> None:
        """One safetensors file, complete or not there at all: a kill while writing leaves the file before."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial.safetensors")
        metadata = {"step": json.dumps(self.step)}
        mx.save_safetensors(str(partial), dict(tree_flatten(self._trees())), metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Goes on from a file of `save`. The networks and optimizers must be those that it was saved from."""
        arrays, metadata = mx.load(str(path), return_metadata=True)
        expected = {name: array.shape for name, array in tree_flatten(self._trees())}
        found = {name: array.shape for name, array in arrays.items()}
        wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        if wrong:
            raise FluxError(f"{path} is no state of this training run; other or no shape: {', '.join(wrong)}")
        # Not from the names alone: the optimizer wants the empty places of frozen layers, too.
        self._put(tree_map_with_path(lambda name, _: arrays[name], self._trees()))
        self.step = json.loads(metadata["step"])

    def replace(self, function: Callable[[mx.array], mx.array]) -> None:
        """Puts what the function makes of it in the place of every array that `save` would write."""
        trees = tree_map(function, self._trees())
        mx.eval(trees)
        self._put(trees)

    def _put(self, trees: dict[str, Any]) -> None:
        self.model.update(trees["model"])
        self.optimizer.state = trees["optimizer"]
        if self.ema is not None:
            self.ema.state = trees["ema"]
        self._step = None  # it has captured the old state
