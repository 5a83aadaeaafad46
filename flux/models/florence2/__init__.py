"""Florence-2, the captioner's network: a DaViT vision tower and a BART language model."""

from flux.models.florence2.generation import GenerationParams, generate
from flux.models.florence2.language import LanguageParams
from flux.models.florence2.model import Florence2, Florence2Params
from flux.models.florence2.vision import VisionParams

__all__ = ["Florence2", "Florence2Params", "GenerationParams", "LanguageParams", "VisionParams", "generate"]
