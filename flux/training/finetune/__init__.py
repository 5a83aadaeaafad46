"""Fine-tuning by LoRA and QLoRA: what dreambooth.py runs."""

from flux.training.callbacks import Stop, Stopped
from flux.training.finetune.options import Options
from flux.training.finetune.run import Result, finetune
from flux.training.finetune.start import Start, begin, resume

__all__ = ["Options", "Result", "Start", "Stop", "Stopped", "begin", "finetune", "resume"]
