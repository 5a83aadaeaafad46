"""Pictures in a ComfyUI workflow: those that Kontext is given, followed to their files."""

from typing import TYPE_CHECKING

from flux.errors import FluxError
from flux.workflows.graph import Node

if TYPE_CHECKING:
    from flux.workflows import comfyui

LOADERS = ("LoadImage", "LoadImageOutput")
SCALED = "ComfyUI cuts a reference to the size of Kontext, here it is scaled as a whole"


def reference(reader: "comfyui._Reader", node: Node) -> str:
    """The file of a ReferenceLatent's picture; "" where a node is not known, which the reader then names."""
    latent, _ = reader.node(node.inputs.get("latent"), "latent", node)
    return encoded(reader, latent)


def encoded(reader: "comfyui._Reader", latent: Node) -> str:
    """The file of the picture behind a latent, as `reference`. FluxError for one that keeps its own size."""
    if latent.type != "VAEEncode":
        return _unknown(reader, latent)
    reader.vae_of(latent)
    scaled, _ = reader.node(latent.inputs.get("pixels"), "picture", latent)
    if scaled.type in LOADERS:
        raise FluxError(f"{latent}: a picture of its own size; here a reference has FluxKontextImageScale's")
    if scaled.type != "FluxKontextImageScale":
        return _unknown(reader, scaled)
    if SCALED not in reader.found.notes:
        reader.found.notes.append(SCALED)
    image, _ = reader.node(scaled.inputs.get("image"), "picture", scaled)
    if image.type == "ImageStitch" and reader.graph.follow(image.inputs.get("image2")) is None:
        image, _ = reader.node(image.inputs.get("image1"), "picture", image)
    if image.type not in LOADERS:
        return _unknown(reader, image)
    return reader.value(image, "image", str).removesuffix(" [input]")


def _unknown(reader: "comfyui._Reader", node: Node) -> str:
    reader.unknown.append(node)
    return ""


def check_method(reader: "comfyui._Reader", node: Node) -> None:
    """FluxError where several references are not laid beside one another."""
    method = reader.value(node, "reference_latents_method", str)
    if method != "offset":
        raise FluxError(f"{node}: references are laid by the method offset here, not {method}")
