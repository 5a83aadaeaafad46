"""One step of the pipeline: its batches, optimizers and rates, and the trainer that takes its steps."""

import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from flux.distributed.gradients import average_gradients, average_metrics
from flux.distributed.ranks import Ranks
from flux.training.ema import EMA, Trainable
from flux.training.optimizers import AdamW
from flux.training.pretrain.batches import Batches
from flux.training.pretrain.config import Config, Step
from flux.training.pretrain.losses import Objective
from flux.training.pretrain.networks import Networks, group_of
from flux.training.pretrain.state import Progress
from flux.training.schedules import Constant, Cosine, Plateau, ReduceOnPlateau
from flux.training.trainer import Trainer


class Stage:
    """A step of the config, ready to run. Makes the networks train what the step trains, and nothing else."""

    def __init__(
        self,
        config: Config,
        index: int,
        networks: Networks,
        batches: Batches,
        objective: Objective,
        ranks: Ranks,
    ):
        self.step: Step = config.steps[index]
        self.batches = batches
        self.epochs = self.step.epochs
        epochs, updates = self.epochs or 0, self.step.max_steps or 0
        self.total = epochs * batches.epoch_length if epochs else updates
        self.accumulate = self.step.gradient_accumulation_steps
        self.rates: dict[str, float] = {}  # the learning rate of each group, as set last
        networks.train_only(self.step.trained)
        self._optimizers = {name: self._optimizer(name) for name in self.step.groups}
        seed = np.random.SeedSequence((config.training.seed, index, ranks.rank)).generate_state(1)[0]
        self.trainer = Trainer(
            networks,
            objective,
            batches,
            split_by_group(self._optimizers),
            seed=int(seed),
            ema=PartEMA(networks, self.step.ema_decay) if self.step.use_ema else None,
            average=average_gradients(ranks.group) if ranks.size > 1 else None,
            average_metrics=average_metrics(ranks) if ranks.size > 1 else None,
            accumulate=self.accumulate,
            clip_norm=self.step.clip_norm,
            compiled=self.step.compile,
        )

    def _optimizer(self, group: str) -> optim.Optimizer:
        chosen = self.step.optimization.optimizers.get(group, AdamW())
        return chosen.build(self._base_rate(group))

    def _base_rate(self, group: str) -> float:
        return getattr(self.step.optimization.optimizers.get(group), "lr", None) or self.step.lr

    def _unscheduled(self) -> Constant | Cosine:
        return Constant() if self.step.lr_min is None else Cosine(min_factor=self.step.lr_min)

    def set_rates(self, progress: Progress) -> None:
        """Sets the learning rates of the step that comes next."""
        for group, optimizer in self._optimizers.items():
            scheduler = self.step.optimization.schedulers.get(group) or self._unscheduled()
            factor = scheduler.factor(self.trainer.step, self.total)
            factor *= progress.plateaus.get(group, Plateau()).factor
            self.rates[group] = optimizer.learning_rate = factor * self._base_rate(group)

    def position(self) -> dict[str, int]:
        """The epoch and the batch in it, from 1, of the step taken last."""
        epoch, batch = divmod(self.trainer.step - 1, self.batches.epoch_length)
        return {"epoch": epoch + 1, "batch": batch + 1}

    def after_epoch(self, progress: Progress) -> bool:
        """Feeds an epoch's means to the schedulers; whether the step's threshold has been reached."""
        means = progress.epoch.take()
        for group, scheduler in self.step.optimization.schedulers.items():
            if isinstance(scheduler, ReduceOnPlateau):
                before = progress.plateaus.get(group, Plateau())
                progress.plateaus[group] = scheduler.after_epoch(before, means[scheduler.metric])
        transition = self.step.transition_on
        if transition.metric is None or transition.threshold is None:
            return False
        return means[transition.metric] <= transition.threshold


def split_by_group(optimizers: dict[str, optim.Optimizer]) -> optim.MultiOptimizer:
    """One optimizer that gives the parameters of each group to the optimizer of the group."""
    filters = [lambda name, _, group=group: group_of(name) == group for group in optimizers]
    return optim.MultiOptimizer(list(optimizers.values()), filters[:-1])


class PartEMA(EMA):
    """The average of what a step trains, without the discriminator: its past self is no use to anyone."""

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(_View(model), decay)

    def update(self, model: Trainable) -> None:
        super().update(_View(model))


class _View:
    def __init__(self, model: Trainable):
        self._model = model

    def trainable_parameters(self) -> dict:
        found = self._model.trainable_parameters()
        return {name: tree for name, tree in found.items() if name != "discriminator"}
