"""What the parts of a fine-tuning hand each other."""

from dataclasses import dataclass

from mlx.optimizers import Optimizer

from flux.adapters import Adapters
from flux.data.batches import Plan
from flux.training.finetune.features import Features
from flux.training.finetune.length import Length
from flux.training.finetune.model import Base, Network
from flux.training.finetune.previews import Pictures
from flux.training.flow_matching import FlowLoss
from flux.training.trainer import Trainer


@dataclass(frozen=True)
class Prepared:
    """The model's files and the data set, read and checked; nothing is encoded or trained yet.

    digest: tells the data set from others. The pipeline in `base` is loaded lazily.
    """

    base: Base
    plan: Plan
    digest: str
    length: Length
    optimizer: Optimizer


@dataclass(frozen=True)
class Encoded:
    """What the encoders made of the data set and of the progress prompts; they have left memory."""

    features: Features
    pictures: Pictures


@dataclass(frozen=True)
class Built:
    """The network with the adapter in it, and the trainer that moves it, at the state to go on from."""

    network: Network
    adapters: dict[str, Adapters]  # by part, "flux" and maybe "clip"
    loss: FlowLoss
    trainer: Trainer
