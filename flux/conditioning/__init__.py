"""What the transformer is told besides the noise: texts and pictures."""

from flux.conditioning.texts import TextConditioning, encode_texts, warn_if_cut

__all__ = ["TextConditioning", "encode_texts", "warn_if_cut"]
