"""A ComfyUI workflow as a graph of nodes: from both its file formats, and from pictures that carry one.

The one format (API, a picture's "prompt") is what ran: node -> class and inputs. The other (a picture's
"workflow", what the editor saves) has links apart, values by position, and what the editor resolves before it
runs anything: reroutes, primitives, bypassed nodes, subgraphs.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from flux import images, jsonfiles
from flux.errors import FluxError

MAX_BYTES = 16 * 2**20
MUTED, BYPASSED = 2, 4  # a node's mode
SUBGRAPH_INPUT, SUBGRAPH_OUTPUT = -10, -20  # the ids of a subgraph's ends
PICTURES = (".png", ".webp", ".jpg", ".jpeg")
PRIMITIVES = (
    "PrimitiveInt",
    "PrimitiveFloat",
    "PrimitiveBoolean",
    "PrimitiveString",
    "PrimitiveStringMultiline",
)

_SAMPLER = ("steps", "cfg", "sampler_name", "scheduler")
# The names of the editor's values, in their order. "control" is what becomes of a seed after the picture.
WIDGETS: dict[str, tuple[str, ...]] = {
    "BasicScheduler": ("scheduler", "steps", "denoise"),
    "CFGGuider": ("cfg",),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "CLIPTextEncode": ("text",),
    "CLIPTextEncodeFlux": ("clip_l", "t5xxl", "guidance"),
    "DualCLIPLoader": ("clip_name1", "clip_name2", "type", "device"),
    "DualCLIPLoaderGGUF": ("clip_name1", "clip_name2", "type"),
    "EmptyLatentImage": ("width", "height", "batch_size"),
    "EmptySD3LatentImage": ("width", "height", "batch_size"),
    "FluxGuidance": ("guidance",),
    "FluxKontextMultiReferenceLatentMethod": ("reference_latents_method",),
    "ImageStitch": ("direction", "match_image_size", "spacing_width", "spacing_color"),
    "KSampler": ("seed", "control", *_SAMPLER, "denoise"),
    "KSamplerAdvanced": (
        *("add_noise", "noise_seed", "control", *_SAMPLER),
        *("start_at_step", "end_at_step", "return_with_leftover_noise"),
    ),
    "KSamplerSelect": ("sampler_name",),
    "LoadImage": ("image", "upload"),
    "LoadImageOutput": ("image",),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "LoraLoaderModelOnly": ("lora_name", "strength_model"),
    "ModelSamplingFlux": ("max_shift", "base_shift", "width", "height"),
    "RandomNoise": ("noise_seed", "control"),
    "SamplerCustom": ("add_noise", "noise_seed", "control", "cfg"),
    "UNETLoader": ("unet_name", "weight_dtype"),
    "UnetLoaderGGUF": ("unet_name",),
    "VAELoader": ("vae_name",),
    **dict.fromkeys(PRIMITIVES, ("value",)),
}


class Link(NamedTuple):
    """An output of a node."""

    node: str
    slot: int


@dataclass
class Node:
    """A node; each input is a Link or a value. `values`: the editor's by position, of any class."""

    id: str
    type: str
    inputs: dict[str, Any]
    muted: bool = False
    values: list[Any] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.type} (node {self.id})"


@dataclass
class Graph:
    """`aliases`: outputs that are only another output, or a value, by another name."""

    nodes: dict[str, Node]
    aliases: dict[Link, Any] = field(default_factory=dict)

    def follow(self, value: Any) -> Any:
        """The value, or the Link to the node that makes it. FluxError where the links go in a circle."""
        for _ in range(len(self.aliases) + len(self.nodes) + 1):
            if not isinstance(value, Link):
                return value
            if value in self.aliases:
                value = self.aliases[value]
            elif (node := self.nodes.get(value.node)) and node.type in PRIMITIVES:
                value = node.inputs.get("value")
            else:
                return value
        raise FluxError(f"the workflow's links go in a circle at node {value.node}")


def read(path: Path) -> Graph:
    """The graph in a .json file, or in a picture that ComfyUI wrote. FluxError for what holds none."""
    faults = []
    for text in _texts(path):
        try:
            return _graph(jsonfiles.parse_object(text))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            faults.append(
                f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else str(error)
            )
    raise FluxError(f"{path}: not a ComfyUI workflow: {faults[0]}")


def _texts(path: Path) -> list[bytes | str]:
    """What may be the workflow, the best first: of a picture what ran, then what the editor saved."""
    if path.suffix.lower() not in PICTURES:
        try:
            return [jsonfiles.read_bytes(path, MAX_BYTES)]
        except ValueError as error:
            raise FluxError(f"{path}: {error}") from None
    texts = images.read_workflow(path)
    if not texts:
        raise FluxError(f"{path}: the picture holds no ComfyUI workflow")
    return [texts[name] for name in ("prompt", "workflow") if name in texts]


def _graph(data: dict[str, Any]) -> Graph:
    if isinstance(data.get("nodes"), list):
        return _of_editor(data)
    data = data["prompt"] if isinstance(data.get("prompt"), dict) else data  # as it is sent to the server
    nodes = {
        str(key): Node(str(key), str(node["class_type"]), {n: _linked(v) for n, v in node["inputs"].items()})
        for key, node in data.items()
        if isinstance(node, dict) and "class_type" in node
    }
    if not nodes:
        raise ValueError("it has no nodes")
    return Graph(nodes)


def _linked(value: Any) -> Any:
    is_link = isinstance(value, list) and len(value) == 2 and isinstance(value[1], int)
    return Link(str(value[0]), value[1]) if is_link and isinstance(value[0], str | int) else value


# --- The editor's format ---


def _of_editor(data: dict[str, Any]) -> Graph:
    subgraphs = {graph["id"]: graph for graph in (data.get("definitions") or {}).get("subgraphs") or []}
    graph = Graph({})
    _add_level(graph, data, subgraphs, "", [])
    return graph


def _add_level(
    graph: Graph, level: dict[str, Any], subgraphs: dict[str, Any], prefix: str, given: list[Any]
) -> None:
    """Add a level's nodes, under their ids behind the prefix; `given`: what its subgraph's inputs are."""
    if prefix.count(":") > 8:
        raise ValueError("its subgraphs are nested more than 8 deep")
    sources = {}
    for link in level.get("links") or []:
        number, node, slot, *rest = (
            [link[key] for key in ("id", "origin_id", "origin_slot", "target_id", "target_slot")]
            if isinstance(link, dict)
            else link
        )
        source: Any = Link(f"{prefix}{node}", int(slot))
        if node == SUBGRAPH_INPUT:
            source = given[slot] if slot < len(given) else None
        sources[number] = source
        if rest[0] == SUBGRAPH_OUTPUT:
            graph.aliases[Link(prefix[:-1], int(rest[1]))] = source
    for raw in level["nodes"]:
        _add_node(graph, raw, sources, subgraphs, prefix)


def _add_node(
    graph: Graph, raw: dict[str, Any], sources: dict[Any, Any], subgraphs: dict[str, Any], prefix: str
) -> None:
    name = f"{prefix}{raw['id']}"
    inputs = _inputs(raw, sources)
    mode = raw.get("mode", 0)
    if mode == BYPASSED:
        _bypass(graph, raw, name, sources)
    elif raw["type"] == "Reroute":
        graph.aliases[Link(name, 0)] = next(iter(inputs.values()), None)
    elif raw["type"] == "PrimitiveNode":
        graph.aliases[Link(name, 0)] = raw["widgets_values"][0]
    elif raw["type"] in subgraphs and mode != MUTED:
        subgraph = subgraphs[raw["type"]]
        given = [inputs.get(entry["name"]) for entry in subgraph.get("inputs") or []]
        _add_level(graph, subgraph, subgraphs, f"{name}:", given)
    else:
        values = raw.get("widgets_values") or []
        values = values if isinstance(values, list) else []
        graph.nodes[name] = Node(name, str(raw["type"]), inputs, mode == MUTED, values)


def _inputs(raw: dict[str, Any], sources: dict[Any, Any]) -> dict[str, Any]:
    """A node's values by name, and its links, which go before."""
    values = raw.get("widgets_values") or []
    entries = raw.get("inputs") or []
    if isinstance(values, dict):
        inputs = dict(values)
    else:
        shown = [entry["name"] for entry in entries if entry.get("widget")]
        inputs = dict(zip(WIDGETS.get(raw["type"], shown), values, strict=False))
    for entry in entries:
        source = sources.get(entry.get("link"))
        if source is not None:
            inputs[entry["name"]] = source
    return inputs


def _bypass(graph: Graph, raw: dict[str, Any], name: str, sources: dict[Any, Any]) -> None:
    """A bypassed node hands each output the first input of the output's type."""
    for slot, output in enumerate(raw.get("outputs") or []):
        same = [entry for entry in raw.get("inputs") or [] if entry.get("type") == output.get("type")]
        graph.aliases[Link(name, slot)] = sources.get(same[0].get("link")) if same else None
