"""Fine-tuning by LoRA and QLoRA: what dreambooth.py runs."""

from flux.training.finetune.options import Options
from flux.training.finetune.run import FineTuning, Stopped

__all__ = ["FineTuning", "Options", "Stopped"]
