"""How long a training is, and what is due when: iterations, updates, epochs."""

from dataclasses import dataclass

from flux.errors import FluxError
from flux.training.finetune.options import MOST_ITERATIONS, Options


@dataclass(frozen=True)
class Length:
    """iterations: batches that each rank takes. accumulate: iterations an update.

    The last update is as large as the others: iterations are rounded up to whole updates.
    """

    iterations: int
    accumulate: int
    batches_per_epoch: int
    ranks: int = 1

    @classmethod
    def of(cls, options: Options, batches_per_epoch: int, ranks: int) -> "Length":
        """The length that the options ask for, on so many ranks. FluxError where it is beyond all bounds."""
        iterations = options.iterations or -(-(options.epochs or 0) * batches_per_epoch // ranks)
        whole = -(-iterations // options.accumulate) * options.accumulate
        if whole > MOST_ITERATIONS:
            raise FluxError(f"the training has {whole} iterations; {MOST_ITERATIONS} are the most")
        return cls(whole, options.accumulate, batches_per_epoch, ranks)

    @property
    def updates(self) -> int:
        """How many updates there are in all."""
        return self.iterations // self.accumulate

    @property
    def epochs(self) -> int:
        """How many epochs are begun."""
        return -(-self.iterations * self.ranks // self.batches_per_epoch)

    def iterations_at(self, update: int) -> int:
        """How many iterations have been made after so many updates."""
        return update * self.accumulate

    def epoch_of(self, update: int) -> int:
        """The epoch, from 1, of the update's last batch."""
        return (self._batches(update) - 1) // self.batches_per_epoch + 1

    def due(self, every: int | None, update: int) -> bool:
        """Whether a multiple of `every` iterations was reached in this update."""
        if every is None:
            return False
        return self.iterations_at(update) // every > self.iterations_at(update - 1) // every

    def epoch_due(self, every: int | None, update: int) -> int:
        """The multiple of `every` epochs that was completed in this update; 0 where there is none."""
        if every is None:
            return 0
        now, before = (self._batches(u) // (every * self.batches_per_epoch) for u in (update, update - 1))
        return now * every if now > before else 0

    def _batches(self, update: int) -> int:
        """Of all ranks, up to this update."""
        return self.iterations_at(update) * self.ranks
