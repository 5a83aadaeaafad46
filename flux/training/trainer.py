"""The training loop: a model, a loss, batches and an optimizer in; a trained model out.

It knows no network and no task. Everything random comes from (seed, step): a batch is a function of the
step and a loss is handed a key made from it, so a stopped and resumed run is the straight run, to the bit.
"""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map, tree_map_with_path

from flux import jsonfiles, outputs
from flux.errors import FluxError
from flux.training.ema import EMA
from flux.trees import named_arrays

Metrics = dict[str, mx.array]  # scalars that a loss reports
Means = dict[str, float]  # the metrics of a whole step, or of several
Loss = Callable[[Any, Any, mx.array], tuple[mx.array, Metrics]]  # (model, batch, key) -> loss, metrics
Batches = Callable[[int], Any]  # number of the batch, from 0 -> a tree of arrays
MAX_SEED = 2**32 - 1


def sample_key(seed: int, position: int) -> mx.array:
    """The random key (2,), uint32, of a position in a training: the two numbers. FluxError for a bad seed."""
    if not 0 <= seed <= MAX_SEED:
        raise FluxError(f"a training's seed must lie between 0 and {MAX_SEED}, not {seed}")
    return mx.random.key((seed << 32) + position)


class Callback:
    """What happens beside the steps. A subclass overrides what it needs.

    Each method may raise to end the run: the parameters are then those of the last whole step, so that the
    state may still be saved.
    """

    def before_step(self, trainer: "Trainer") -> None:
        """Called before each step; `trainer.step` steps have been taken."""

    def between_batches(self, trainer: "Trainer") -> None:
        """Called between two batches of a step that accumulates several."""

    def after_step(self, trainer: "Trainer", metrics: Means) -> None:
        """Called after each step, which `trainer.step` counts. metrics: its loss and what the loss adds."""


class Trainer:
    """Takes steps, and saves and loads everything that moves: parameters, optimizer, average, step.

    A step is an update of the parameters, by the mean gradient of `accumulate` batches. Parameters that the
    model has frozen stay as they are.

    step: the number of steps taken. is_done: whether the run ends after the step at hand.
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
        average_metrics: Callable[[Means], Means] | None = None,
        around_step: Callable[[], AbstractContextManager] = nullcontext,
        accumulate: int = 1,
        clip_norm: float | None = None,
        compiled: bool = True,
        save_frozen: bool = True,
    ):
        """average, average_metrics: combine the gradients and the metrics of several processes, once a step;
        each of them is given other batches and the same parameters.
        around_step: a context for each step with its callbacks, such as a limit on waiting for others.
        accumulate: batches a step; `batches` counts batches, from 0.
        clip_norm: the gradients' norm is at most this; the metrics then have it as `norm`, as it was.
        compiled: on a CPU, `mx.compile` calls a C++ compiler, seconds for every kernel of a new shape.
        save_frozen: False leaves frozen parameters out of the saved state; `load` then keeps the model's.
        """
        self.model = model
        self.optimizer = optimizer
        self.ema = ema
        self.step = 0
        self.is_done = False
        self._loss = loss
        self._batches = batches
        self._seed = seed
        self._average = average
        self._average_metrics = average_metrics or (lambda metrics: metrics)
        self._around_step = around_step
        self._accumulate = accumulate
        self._clip_norm = clip_norm
        self._compiled = compiled
        self._save_frozen = save_frozen
        self._functions: tuple[Callable, Callable] | None = None
        optimizer.init(model.trainable_parameters())

    def run(self, steps: int, callbacks: Sequence[Callback] = ()) -> None:
        """Goes on until `steps` steps have been taken in all, those before a resume included, or `stop`.

        A metric is the mean over the step's batches and over the processes.
        """
        self.is_done = self.step >= steps
        while not self.is_done:
            with self._around_step():
                for callback in callbacks:
                    callback.before_step(self)
                metrics = self._take_step(callbacks)
                self.step += 1
                self.is_done = self.step >= steps
                for callback in callbacks:
                    callback.after_step(self, metrics)

    def stop(self) -> None:
        """Ends `run` after the step at hand: for callbacks."""
        self.is_done = True

    def _take_step(self, callbacks: Sequence[Callback]) -> Means:
        """Adds up the gradients of all batches but the last; the last one's function makes the update."""
        self._functions = self._functions or self._make_functions()
        add, finish = self._functions
        parts, gradients = [], None
        if self._accumulate > 1:
            gradients = tree_map(mx.zeros_like, self.model.trainable_parameters())
        for i in range(self._accumulate - 1):
            metrics, gradients = add(gradients, *self._batch(self.step * self._accumulate + i))
            parts.append(metrics)
            mx.eval(parts, gradients)
            for callback in callbacks:
                callback.between_batches(self)
        last, update = finish(gradients, *self._batch((self.step + 1) * self._accumulate - 1))
        parts.append(last)
        metrics = {name: sum(part[name] for part in parts) / len(parts) for name in last} | update
        mx.eval(metrics, self._state())
        return self._average_metrics({name: value.item() for name, value in metrics.items()})

    def _batch(self, number: int) -> tuple[Any, mx.array]:
        return self._batches(number), sample_key(self._seed, number)

    def _make_functions(self) -> tuple[Callable, Callable]:
        """Of the gradients so far (or None), a batch and its key: one adds, the other makes the update."""
        value_and_grad = nn.value_and_grad(self.model, self._loss)

        def add(so_far: dict | None, batch: Any, key: mx.array) -> tuple[Metrics, dict]:
            (loss, metrics), gradients = value_and_grad(self.model, batch, key)
            if so_far is not None:
                gradients = tree_map(mx.add, so_far, gradients)
            return {"loss": loss, **metrics}, gradients

        def finish(so_far: dict | None, batch: Any, key: mx.array) -> tuple[Metrics, Metrics]:
            metrics, gradients = add(so_far, batch, key)
            if so_far is not None:
                gradients = tree_map(lambda g: g / self._accumulate, gradients)
            return metrics, self._update(gradients)

        if not self._compiled:
            return add, finish
        state, model = self._state(), [self.model.state]
        return (
            # The model is an output although it stays: taking gradients leaves tracers in it.
            mx.compile(add, inputs=model, outputs=model),
            mx.compile(finish, inputs=state, outputs=state),
        )

    def _update(self, gradients: dict) -> Metrics:
        metrics: Metrics = {}
        if self._average is not None:
            gradients = self._average(gradients)
        if self._clip_norm is not None:
            gradients, metrics["norm"] = optim.clip_grad_norm(gradients, self._clip_norm)
        self.optimizer.update(self.model, gradients)
        if self.ema is not None:
            self.ema.update(self.model)
        return metrics

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
        metadata = {"step": json.dumps(self.step)}
        with outputs.replacing(path, ".safetensors") as partial:
            mx.save_safetensors(str(partial), dict(named_arrays(self._trees())), metadata)

    def load(self, path: Path) -> None:
        """Goes on from a file of `save`. The networks and optimizers must be those that it was saved from."""
        try:
            arrays, metadata = cast(tuple[dict, dict], mx.load(str(path), return_metadata=True))
            step = jsonfiles.count(jsonfiles.parse(metadata["step"]), "its step", least=0, most=sys.maxsize)
        except (RuntimeError, KeyError, ValueError) as error:
            raise FluxError(f"{path} is damaged or not a state of a training: {error}") from None
        expected = {name: array.shape for name, array in named_arrays(self._trees())}
        found = {name: array.shape for name, array in arrays.items()}
        wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        if wrong:
            raise FluxError(
                f"{path} is not a state of this training: missing, or of another shape: {', '.join(wrong)}"
            )
        # Not from the names alone: the optimizer wants the empty entries of frozen layers, too.
        self._put(tree_map_with_path(lambda name, _: arrays[name], self._trees()))
        self.step = step

    def replace(self, function: Callable[[mx.array], mx.array]) -> None:
        """Replaces every array that `save` would write by what the function makes of it."""
        trees = tree_map(function, self._trees())
        mx.eval(trees)
        self._put(trees)

    def _put(self, trees: dict[str, Any]) -> None:
        self.model.update(trees["model"])
        self.optimizer.state = trees["optimizer"]
        if self.ema is not None:
            self.ema.state = trees["ema"]
        self._functions = None  # they have captured the old state
