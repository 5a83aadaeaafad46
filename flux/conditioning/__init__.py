"""What the transformer is told besides the noise: texts, pictures and a loss."""

from flux.conditioning.controlnets import ControlInput, ControlNets
from flux.conditioning.edit import Edit
from flux.conditioning.encoded import PictureConditioning
from flux.conditioning.guides import Guide
from flux.conditioning.pictures import Picture
from flux.conditioning.texts import TextConditioning, encode_texts, warn_if_cut

__all__ = [
    "ControlInput",
    "ControlNets",
    "Edit",
    "Guide",
    "Picture",
    "PictureConditioning",
    "TextConditioning",
    "encode_texts",
    "warn_if_cut",
]
