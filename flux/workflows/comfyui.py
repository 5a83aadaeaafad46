"""What a ComfyUI workflow makes, as values: followed from the picture that it saves back to the files.

Every node on that way has to be understood, or the picture would be another one: what is not stops the
reading, by its name. Nodes off the way do not matter.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from flux.errors import FluxError
from flux.sampler import COMFYUI_SCHEDULES
from flux.workflows import graph as graphs
from flux.workflows import pictures
from flux.workflows.graph import Graph, Link, Node

T5_LENGTH = 256  # ComfyUI pads a prompt to so many of T5's tokens, and cuts none
GUIDANCE = 3.5  # where no node says another
SAMPLERS = {"euler": "euler", "ddim": "euler", "heun": "heun"}  # ComfyUI's names of our solvers
SAVERS = ("SaveImage", "PreviewImage", "SaveImageWebsocket")  # the best first
# The folders of ComfyUI's models/ in which a kind of file is looked for.
FOLDERS = {
    "transformer": ("diffusion_models", "unet"),
    "checkpoint": ("checkpoints",),
    "encoder": ("text_encoders", "clip"),
    "ae": ("vae",),
    "adapter": ("loras",),
    "picture": ("input", "../input"),  # beside models/
}


@dataclass
class Workflow:
    """A picture's ingredients. Files are names as the workflow has them, with their key in `FOLDERS`.

    clip_prompt: where CLIP reads another text than T5. shift: mu, the logarithm by which times are shifted;
    None for the model's in ComfyUI. image_size: None for the first reference's. references: pictures that
    Kontext is given. notes: what is other than in ComfyUI, or not used.
    """

    files: dict[str, tuple[str, str]] = field(default_factory=dict)  # transformer, clip, t5, ae
    adapters: list[tuple[str, float]] = field(default_factory=list)
    prompt: str = ""
    clip_prompt: str | None = None
    negative_prompt: str | None = None
    guidance: float = GUIDANCE
    cfg_scale: float = 1.0
    steps: int = 20
    solver: str = "euler"
    schedule: str = "simple"
    shift: float | None = None
    seed: int = 0
    image_size: tuple[int, int] | None = (512, 512)
    n_images: int = 1
    references: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read(path: str | Path) -> Workflow:
    """The workflow in a file. FluxError that names each node which this program does not know, or a fault."""
    path = Path(path)
    try:
        return _Reader(graphs.read(path)).read()
    except FluxError as error:
        message = str(error)
        raise FluxError(message if message.startswith(str(path)) else f"{path}: {message}") from None
    except RecursionError:
        raise FluxError(f"{path}: the workflow's nodes are in a circle, or too many in a row") from None


def locate(name: str, kind: str, folder: Path) -> Path | None:
    """A file that a workflow names, in ComfyUI's folder or its models/; None where it is not there.

    FluxError for a name that leads elsewhere.
    """
    relative = Path(*PureWindowsPath(name).parts)  # takes both slashes
    if PureWindowsPath(name).anchor or ".." in relative.parts:
        raise FluxError(f"the workflow names {name!r}, which is not a file below a folder of models")
    roots = [root / sub for root in (folder, folder / "models") for sub in FOLDERS[kind]]
    for root in (*roots, folder):
        if (root / relative).is_file():
            return root / relative
    moved = {path for root in roots if root.is_dir() for path in root.rglob(relative.name)}
    return moved.pop() if len(moved) == 1 else None


class _Reader:
    """Follows a graph from its end; `found` takes what the nodes say."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.found = Workflow()
        self.on_the_way: set[str] = set()
        self.unknown: list[Node] = []
        self.loras: dict[int, dict[str, Node]] = {0: {}, 1: {}}  # those met by way of the model, of CLIP
        self.references: list[str] = []  # of the text that is being read

    def read(self) -> Workflow:
        end = self.end()
        self.picture(end)
        if self.unknown:
            names = ", ".join(dict.fromkeys(map(str, self.unknown)))
            raise FluxError(f"made with nodes that this program does not know: {names}")
        self.check_loras()
        aside = sorted({node.type for node in self.graph.nodes.values() if node.id not in self.on_the_way})
        if aside:
            self.found.notes.append(f"not used, as the picture does not need them: {', '.join(aside)}")
        return self.found

    def end(self) -> Node:
        """The node that saves the picture."""
        for type_ in SAVERS:
            ends = [node for node in self.graph.nodes.values() if node.type == type_ and not node.muted]
            sources = {self.graph.follow(node.inputs.get("images")) for node in ends}
            if len(sources) > 1:
                names = ", ".join(map(str, ends))
                raise FluxError(f"it saves several pictures ({names}); mute all of them but one")
            if ends:
                return ends[0]
        raise FluxError("no node saves a picture (SaveImage or PreviewImage)")

    # --- Values and nodes ---

    def node(self, value: Any, what: str, asker: Node) -> tuple[Node, int]:
        """The node that gives an input, and which of its outputs it is."""
        value = self.graph.follow(value)
        if not isinstance(value, Link) or value.node not in self.graph.nodes:
            raise FluxError(f"{asker} has no {what}")
        node = self.graph.nodes[value.node]
        if node.muted:
            raise FluxError(f"{node} is muted, but {asker} needs its {what}")
        self.on_the_way.add(node.id)
        return node, value.slot

    def value(self, node: Node, name: str, kind: type, default: Any = None) -> Any:
        """A value of a node, of the kind that it must be."""
        value = self.graph.follow(node.inputs.get(name, default))
        if isinstance(value, Link):
            source = self.graph.nodes.get(value.node, Node(value.node, "a missing node", {}))
            raise FluxError(f"{node} takes {name} from {source}, which this program does not know")
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise FluxError(f"{node}: {name} should be {_KINDS[kind]}, not {value!r:.40}")
        return value

    def dispatch(self, table: dict[str, Callable[..., None]], asker: Node, name: str) -> None:
        """Read the node behind an input by the method that the table has for its class."""
        node, slot = self.node(asker.inputs.get(name), name, asker)
        if node.type in table:
            table[node.type](self, node, slot)
        else:
            self.unknown.append(node)

    # --- From the picture to the sampler ---

    def picture(self, end: Node) -> None:
        self.on_the_way.add(end.id)
        self.dispatch({"VAEDecode": _Reader.decode, "VAEDecodeTiled": _Reader.decode}, end, "images")

    def decode(self, node: Node, _: int) -> None:
        self.vae_of(node)
        self.dispatch(_SAMPLING, node, "samples")

    def vae_of(self, node: Node) -> None:
        """The autoencoder of a node that decodes or encodes."""
        self.dispatch({"VAELoader": _Reader.vae, **_CHECKPOINT}, node, "vae")

    def ksampler(self, node: Node, _: int) -> None:
        advanced = node.type == "KSamplerAdvanced"
        if advanced:
            self.whole(node)
        self.seed(node, "noise_seed" if advanced else "seed")
        self.times(node)
        self.sampler(node, 0)
        self.guided(node)
        self.dispatch(_LATENT, node, "latent_image")
        self.shift(node, "model")

    def whole(self, node: Node) -> None:
        """Only all of the steps, from pure noise, make a picture by themselves."""
        noise, leftover = (node.inputs.get(n) for n in ("add_noise", "return_with_leftover_noise"))
        start, stop = self.value(node, "start_at_step", int), self.value(node, "end_at_step", int)
        if (noise, leftover, start) != ("enable", "disable", 0) or stop < self.value(node, "steps", int):
            raise FluxError(f"{node} makes a part of the steps; this program makes all of them")

    def custom(self, node: Node, _: int) -> None:
        """SamplerCustomAdvanced, and SamplerCustom with its guider and noise in itself."""
        if node.type == "SamplerCustom":
            if node.inputs.get("add_noise") is not True:
                raise FluxError(f"{node} adds no noise; this program begins with noise")
            self.seed(node, "noise_seed")
            self.guided(node)
        else:
            self.dispatch({"RandomNoise": _Reader.noise}, node, "noise")
            self.dispatch({"BasicGuider": _Reader.guider, "CFGGuider": _Reader.guider}, node, "guider")
        self.dispatch({"KSamplerSelect": _Reader.sampler}, node, "sampler")
        self.dispatch({"BasicScheduler": _Reader.scheduler}, node, "sigmas")
        self.dispatch(_LATENT, node, "latent_image")

    def noise(self, node: Node, _: int) -> None:
        self.seed(node, "noise_seed")

    def seed(self, node: Node, name: str) -> None:
        self.found.seed = self.value(node, name, int)

    def sampler(self, node: Node, _: int) -> None:
        name = self.value(node, "sampler_name", str)
        if name not in SAMPLERS:
            raise FluxError(f"{node}: the sampler {name} is not here; {', '.join(SAMPLERS)} are")
        self.found.solver = SAMPLERS[name]

    def scheduler(self, node: Node, _: int) -> None:
        self.times(node)
        self.shift(node, "model")

    def times(self, node: Node) -> None:
        name, denoise = self.value(node, "scheduler", str), self.value(node, "denoise", float, 1.0)
        if name not in COMFYUI_SCHEDULES:
            known = ", ".join(COMFYUI_SCHEDULES)
            raise FluxError(f"{node}: the scheduler {name} is not here; {known} are")
        if denoise < 0.9999:
            raise FluxError(f"{node}: denoise {denoise:g} begins with a picture; this program with noise, 1")
        self.found.schedule, self.found.steps = name, self.value(node, "steps", int)

    def latent(self, node: Node, _: int) -> None:
        self.found.image_size = self.value(node, "height", int), self.value(node, "width", int)
        self.found.n_images = self.value(node, "batch_size", int, 1)
        if self.found.n_images > 1:
            self.found.notes.append("ComfyUI makes a batch from one seed, here each picture has another seed")

    def latent_of_picture(self, node: Node, _: int) -> None:
        """From noise alone a latent only says the size: here the first reference's."""
        name = pictures.encoded(self, node)
        if not self.unknown and [name] != self.found.references[:1]:
            raise FluxError(f"{node}: {name} gives the size; here the first reference does")
        self.found.image_size = None

    # --- Guidance and texts ---

    def guider(self, node: Node, _: int) -> None:
        if node.type == "CFGGuider":
            self.guided(node)
        else:
            self.positive(node, "conditioning")

    def guided(self, node: Node) -> None:
        """Positive and, if it has an effect, negative text."""
        self.positive(node, "positive")
        self.found.cfg_scale = self.value(node, "cfg", float)
        if self.found.cfg_scale == 1:
            self.aside(node, "negative")
            return
        self.references = []
        text, guidance, clip_text = self.conditioning(node, "negative")
        if not self.unknown and self.references != self.found.references:
            raise FluxError(f"{node}: the negative text has other references than the prompt")
        if not self.unknown and (guidance != self.found.guidance or clip_text is not None):
            raise FluxError(f"{node}: the negative text has another guidance or another text for CLIP")
        self.found.negative_prompt = text

    def aside(self, node: Node, name: str) -> None:
        """What an input hangs on does not matter, and need not be told."""
        value = self.graph.follow(node.inputs.get(name))
        source = self.graph.nodes.get(value.node) if isinstance(value, Link) else None
        if source and source.id not in self.on_the_way:
            self.on_the_way.add(source.id)
            for other in source.inputs:
                self.aside(source, other)

    def positive(self, node: Node, name: str) -> None:
        self.found.prompt, self.found.guidance, self.found.clip_prompt = self.conditioning(node, name)
        self.found.references = self.references
        self.model(node, 0)

    def conditioning(self, asker: Node, name: str) -> tuple[str, float, str | None]:
        """Text, guidance, and CLIP's text if it is another; the guidance nearest to the sampler counts."""
        node, _ = self.node(asker.inputs.get(name), name, asker)
        if node.type == "FluxGuidance":
            text, _, clip_text = self.conditioning(node, "conditioning")
            return text, self.value(node, "guidance", float), clip_text
        if node.type == "ReferenceLatent":
            found = self.conditioning(node, "conditioning")
            self.references.append(pictures.reference(self, node))
            return found
        if node.type == "FluxKontextMultiReferenceLatentMethod":
            pictures.check_method(self, node)
            return self.conditioning(node, "conditioning")
        if node.type == "CLIPTextEncode":
            self.dispatch(_CLIP, node, "clip")
            return self.text(node, "text"), GUIDANCE, None
        if node.type == "CLIPTextEncodeFlux":
            self.dispatch(_CLIP, node, "clip")
            text, clip_text = self.text(node, "t5xxl"), self.text(node, "clip_l")
            return text, self.value(node, "guidance", float), clip_text if clip_text != text else None
        self.unknown.append(node)
        return "", GUIDANCE, None

    def text(self, node: Node, name: str) -> str:
        """A prompt, literally. ComfyUI weighs what stands in parentheses, and embeds files by their name."""
        text = self.value(node, name, str)
        if re.search(r"(?<!\\)[()]|embedding:", text):
            self.found.notes.append(f"{node}: weights and embeddings in the text are taken as plain text")
        return re.sub(r"\\([()])", r"\1", text)

    # --- Files ---

    def model(self, asker: Node, _: int) -> None:
        self.dispatch(_MODEL, asker, "model")

    def shift(self, asker: Node, name: str) -> None:
        """The shift that the scheduler's model has: that of the node nearest to it."""
        node, _ = self.node(asker.inputs.get(name), name, asker)
        if node.type == "ModelSamplingFlux":
            base, most = self.value(node, "base_shift", float), self.value(node, "max_shift", float)
            tokens = self.value(node, "width", int) * self.value(node, "height", int) / 256
            slope = (most - base) / (4096 - 256)
            self.found.shift = slope * tokens + (base - slope * 256)
        elif "model" in node.inputs:
            self.shift(node, "model")

    def unet(self, node: Node, _: int) -> None:
        self.found.files["transformer"] = self.value(node, "unet_name", str), "transformer"
        kept = node.inputs.get("weight_dtype", "default")
        if kept != "default":
            self.found.notes.append(f"{node}: weights keep their file's precision, not {kept}")

    def lora(self, node: Node, slot: int) -> None:
        """By way of the model it is told; by way of CLIP only that its strength there is the same."""
        strength = self.value(node, "strength_model", float)
        self.loras[slot == 1][node.id] = node
        if slot == 1:
            clip = self.value(node, "strength_clip", float)
            if clip != strength:
                raise FluxError(f"{node}: strength_clip {clip:g} is not strength_model {strength:g}")
            self.dispatch(_CLIP, node, "clip")
        else:
            self.add(self.value(node, "lora_name", str), strength)
            self.model(node, 0)

    def check_loras(self) -> None:
        """Here a file's layers of the text encoders are used with those of the transformer, or not at all."""
        by_model, by_clip = self.loras[0], self.loras[1]
        for name in by_clip.keys() - by_model.keys():
            raise FluxError(f"{by_clip[name]} changes the text encoders alone; this program changes all")
        for name in by_model.keys() - by_clip.keys():
            self.found.notes.append(
                f"{by_model[name]} leaves the text encoders alone; layers that its file has for them are used"
            )

    def power_lora(self, node: Node, slot: int) -> None:
        """rgthree's list of LoRAs: values that hold a file, a strength, and whether it is on."""
        self.loras[slot == 1][node.id] = node
        for entry in [*node.inputs.values(), *node.values]:
            if slot == 0 and isinstance(entry, dict) and entry.get("on") and entry.get("lora"):
                one = Node(node.id, node.type, entry)
                strength = self.value(one, "strength", float)
                if entry.get("strengthTwo") not in (None, strength):  # that of CLIP
                    raise FluxError(f"{node}: the strengths of model and clip differ in {entry['lora']}")
                self.add(self.value(one, "lora", str), strength)
        self.dispatch(_CLIP if slot == 1 else _MODEL, node, "clip" if slot == 1 else "model")

    def add(self, name: str, strength: float) -> None:
        if strength:
            self.found.adapters.insert(0, (name, strength))  # the way leads from the last to the first

    def clips(self, node: Node, _: int) -> None:
        """CLIP and T5, in any order; ComfyUI looks into the files, here the name tells T5."""
        if (kind := node.inputs.get("type", "flux")) != "flux":
            raise FluxError(f"{node} is for {kind}, not flux")
        names = [self.value(node, name, str) for name in ("clip_name1", "clip_name2")]
        t5 = [name for name in names if "t5" in name.lower()]
        if len(t5) != 1:
            raise FluxError(f"{node}: one of {' and '.join(names)} should be T5, with t5 in its name")
        names.remove(t5[0])
        self.found.files |= {"clip": (names[0], "encoder"), "t5": (t5[0], "encoder")}

    def vae(self, node: Node, _: int) -> None:
        self.found.files["ae"] = self.value(node, "vae_name", str), "ae"

    def checkpoint(self, node: Node, slot: int) -> None:
        """All in one file; the output says which part is taken."""
        for part in {0: ("transformer",), 1: ("clip", "t5"), 2: ("ae",)}.get(slot, ()):
            self.found.files[part] = self.value(node, "ckpt_name", str), "checkpoint"


_KINDS = {int: "a whole number", float: "a number", str: "a text"}
_CHECKPOINT = {"CheckpointLoaderSimple": _Reader.checkpoint}
_LATENT = {
    "EmptyLatentImage": _Reader.latent,
    "EmptySD3LatentImage": _Reader.latent,
    "VAEEncode": _Reader.latent_of_picture,
}
_SAMPLING = {
    "KSampler": _Reader.ksampler,
    "KSamplerAdvanced": _Reader.ksampler,
    "SamplerCustom": _Reader.custom,
    "SamplerCustomAdvanced": _Reader.custom,
}
_MODEL = {
    "UNETLoader": _Reader.unet,
    "UnetLoaderGGUF": _Reader.unet,
    "LoraLoader": _Reader.lora,
    "LoraLoaderModelOnly": _Reader.lora,
    "Power Lora Loader (rgthree)": _Reader.power_lora,
    "ModelSamplingFlux": _Reader.model,
    **_CHECKPOINT,
}
_CLIP = {
    "DualCLIPLoader": _Reader.clips,
    "DualCLIPLoaderGGUF": _Reader.clips,
    "LoraLoader": _Reader.lora,
    "Power Lora Loader (rgthree)": _Reader.power_lora,
    **_CHECKPOINT,
}
