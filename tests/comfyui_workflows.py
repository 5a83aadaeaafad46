"""ComfyUI workflows for tests, in both formats: the documented FLUX workflow, also with a LoRA."""

from typing import Any

PROMPT = "a red apple on a blue background"
FILES = {
    "transformer": "flux1-dev.safetensors",
    "clip": "clip_l.safetensors",
    "t5": "t5xxl_fp16.safetensors",
    "ae": "ae.safetensors",
}

# class -> the editor's values, its inputs (name, type), its outputs' types
CLASSES: dict[str, tuple[tuple[str, ...], tuple[tuple[str, str], ...], tuple[str, ...]]] = {
    "UNETLoader": (("unet_name", "weight_dtype"), (), ("MODEL",)),
    "DualCLIPLoader": (("clip_name1", "clip_name2", "type"), (), ("CLIP",)),
    "VAELoader": (("vae_name",), (), ("VAE",)),
    "CheckpointLoaderSimple": (("ckpt_name",), (), ("MODEL", "CLIP", "VAE")),
    "LoraLoader": (
        ("lora_name", "strength_model", "strength_clip"),
        (("model", "MODEL"), ("clip", "CLIP")),
        ("MODEL", "CLIP"),
    ),
    "LoraLoaderModelOnly": (("lora_name", "strength_model"), (("model", "MODEL"),), ("MODEL",)),
    "ModelSamplingFlux": (
        ("max_shift", "base_shift", "width", "height"),
        (("model", "MODEL"), ("width", "INT"), ("height", "INT")),
        ("MODEL",),
    ),
    "CLIPTextEncode": (("text",), (("clip", "CLIP"), ("text", "STRING")), ("CONDITIONING",)),
    "CLIPTextEncodeFlux": (("clip_l", "t5xxl", "guidance"), (("clip", "CLIP"),), ("CONDITIONING",)),
    "ConditioningZeroOut": ((), (("conditioning", "CONDITIONING"),), ("CONDITIONING",)),
    "FluxGuidance": (("guidance",), (("conditioning", "CONDITIONING"),), ("CONDITIONING",)),
    "BasicGuider": ((), (("model", "MODEL"), ("conditioning", "CONDITIONING")), ("GUIDER",)),
    "CFGGuider": (
        ("cfg",),
        (("model", "MODEL"), ("positive", "CONDITIONING"), ("negative", "CONDITIONING")),
        ("GUIDER",),
    ),
    "RandomNoise": (("noise_seed", "control"), (), ("NOISE",)),
    "KSamplerSelect": (("sampler_name",), (), ("SAMPLER",)),
    "BasicScheduler": (("scheduler", "steps", "denoise"), (("model", "MODEL"),), ("SIGMAS",)),
    "EmptySD3LatentImage": (
        ("width", "height", "batch_size"),
        (("width", "INT"), ("height", "INT")),
        ("LATENT",),
    ),
    "SamplerCustomAdvanced": (
        (),
        (
            ("noise", "NOISE"),
            ("guider", "GUIDER"),
            ("sampler", "SAMPLER"),
            ("sigmas", "SIGMAS"),
            ("latent_image", "LATENT"),
        ),
        ("LATENT", "LATENT"),
    ),
    "KSampler": (
        ("seed", "control", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
        (
            ("model", "MODEL"),
            ("positive", "CONDITIONING"),
            ("negative", "CONDITIONING"),
            ("latent_image", "LATENT"),
        ),
        ("LATENT",),
    ),
    "VAEDecode": ((), (("samples", "LATENT"), ("vae", "VAE")), ("IMAGE",)),
    "SaveImage": (("filename_prefix",), (("images", "IMAGE"),), ()),
    "PreviewImage": ((), (("images", "IMAGE"),), ()),
    "ImageScale": (("upscale_method", "width", "height", "crop"), (("image", "IMAGE"),), ("IMAGE",)),
    "LoadImage": (("image", "upload"), (), ("IMAGE", "MASK")),
    "ImageStitch": (
        ("direction", "match_image_size", "spacing_width", "spacing_color"),
        (("image1", "IMAGE"), ("image2", "IMAGE")),
        ("IMAGE",),
    ),
    "FluxKontextImageScale": ((), (("image", "IMAGE"),), ("IMAGE",)),
    "VAEEncode": ((), (("pixels", "IMAGE"), ("vae", "VAE")), ("LATENT",)),
    "ReferenceLatent": ((), (("conditioning", "CONDITIONING"), ("latent", "LATENT")), ("CONDITIONING",)),
    "FluxKontextMultiReferenceLatentMethod": (
        ("reference_latents_method",),
        (("conditioning", "CONDITIONING"),),
        ("CONDITIONING",),
    ),
    "Reroute": ((), (("", "*"),), ("*",)),
    "PrimitiveNode": (("value", "control"), (), ("INT",)),
    "PrimitiveInt": (("value", "control"), (), ("INT",)),
    "Note": (("text",), (), ()),
}

Nodes = dict[str, tuple[str, dict[str, Any]]]  # id -> class and inputs; a tuple (id, slot) is a link


def base(files: dict[str, str] = FILES, size: int = 64, steps: int = 3, seed: int = 7) -> Nodes:
    """FLUX-dev as ComfyUI's examples draw it, with a shift by the picture's size."""
    return {
        "12": ("UNETLoader", {"unet_name": files["transformer"], "weight_dtype": "default"}),
        "11": ("DualCLIPLoader", {"clip_name1": files["t5"], "clip_name2": files["clip"], "type": "flux"}),
        "10": ("VAELoader", {"vae_name": files["ae"]}),
        "6": ("CLIPTextEncode", {"clip": ("11", 0), "text": PROMPT}),
        "26": ("FluxGuidance", {"conditioning": ("6", 0), "guidance": 2.5}),
        "30": (
            "ModelSamplingFlux",
            {"model": ("12", 0), "max_shift": 1.15, "base_shift": 0.5, "width": size, "height": size},
        ),
        "22": ("BasicGuider", {"model": ("30", 0), "conditioning": ("26", 0)}),
        "25": ("RandomNoise", {"noise_seed": seed, "control": "randomize"}),
        "16": ("KSamplerSelect", {"sampler_name": "euler"}),
        "17": ("BasicScheduler", {"model": ("30", 0), "scheduler": "simple", "steps": steps, "denoise": 1.0}),
        "27": ("EmptySD3LatentImage", {"width": size, "height": size, "batch_size": 1}),
        "13": (
            "SamplerCustomAdvanced",
            {
                "noise": ("25", 0),
                "guider": ("22", 0),
                "sampler": ("16", 0),
                "sigmas": ("17", 0),
                "latent_image": ("27", 0),
            },
        ),
        "8": ("VAEDecode", {"samples": ("13", 0), "vae": ("10", 0)}),
        "9": ("SaveImage", {"images": ("8", 0), "filename_prefix": "ComfyUI"}),
    }


def finetuned(lora: str = "flux_dreambooth.safetensors", strength: float = 0.8, **options) -> Nodes:
    """`base` with a LoRA beside model and text encoders, and a note."""
    nodes = base(**options)
    inputs = {"lora_name": lora, "strength_model": strength, "strength_clip": strength}
    nodes["38"] = ("LoraLoader", {"model": ("12", 0), "clip": ("11", 0), **inputs})
    nodes["30"][1]["model"] = ("38", 0)
    nodes["6"][1]["clip"] = ("38", 1)
    nodes["39"] = ("Note", {"text": "trigger: sks"})
    return nodes


def ksampler(**values) -> Nodes:
    """The documented workflow with KSampler and two texts; values go into KSampler."""
    nodes = base()
    for name in ("30", "22", "25", "16", "17", "13", "6", "26"):
        del nodes[name]
    texts = {"clip_l": "an apple", "t5xxl": PROMPT, "guidance": 4.0}
    nodes["41"] = ("CLIPTextEncodeFlux", {"clip": ("11", 0), **texts})
    nodes["42"] = ("ConditioningZeroOut", {"conditioning": ("41", 0)})
    links = {"model": ("12", 0), "positive": ("41", 0), "negative": ("42", 0), "latent_image": ("27", 0)}
    numbers = {"seed": 5, "control": "fixed", "steps": 20, "cfg": 1.0, "denoise": 1.0}
    names = {"sampler_name": "euler", "scheduler": "simple"}
    nodes["31"] = ("KSampler", links | numbers | names | values)
    nodes["8"][1]["samples"] = ("31", 0)
    return nodes


def kontext(*names: str) -> Nodes:
    """Kontext's documented workflow: a picture, or several in a row; the size is the first one's."""
    nodes = ksampler()
    nodes["41"] = ("CLIPTextEncode", {"clip": ("11", 0), "text": PROMPT})
    nodes["43"] = ("FluxGuidance", {"conditioning": ("41", 0), "guidance": 2.5})
    last = ("41", 0)
    for i, name in enumerate(names):
        key = 70 + 10 * i
        nodes[f"{key}"] = ("LoadImage", {"image": name, "upload": "image"})
        nodes[f"{key + 1}"] = ("FluxKontextImageScale", {"image": (f"{key}", 0)})
        nodes[f"{key + 2}"] = ("VAEEncode", {"pixels": (f"{key + 1}", 0), "vae": ("10", 0)})
        nodes[f"{key + 3}"] = ("ReferenceLatent", {"conditioning": last, "latent": (f"{key + 2}", 0)})
        last = (f"{key + 3}", 0)
    nodes["43"][1]["conditioning"] = last
    nodes["31"][1].update(positive=("43", 0), latent_image=("72", 0))
    del nodes["27"]
    return nodes


def api(nodes: Nodes) -> dict[str, Any]:
    """The format in which a workflow runs."""
    return {
        key: {
            "class_type": kind,
            "inputs": {name: list(v) if isinstance(v, tuple) else v for name, v in inputs.items()},
        }
        for key, (kind, inputs) in nodes.items()
        if kind != "Note"
    }


def editor(nodes: Nodes, modes: dict[str, int] | None = None) -> dict[str, Any]:
    """The format that the editor saves; modes: 2 for muted, 4 for bypassed nodes."""
    links: list[list[Any]] = []
    made = [
        {"id": int(key), "type": kind, "mode": (modes or {}).get(key, 0)}
        | _ends(int(key), kind, inputs, links, nodes)
        for key, (kind, inputs) in nodes.items()
    ]
    return {"last_node_id": 99, "nodes": made, "links": links, "groups": [], "version": 0.4}


def _ends(
    key: int, kind: str, inputs: dict[str, Any], links: list[list[Any]], nodes: Nodes
) -> dict[str, Any]:
    widgets, ends, outputs = CLASSES[kind]
    entries = []
    for slot, (name, type_) in enumerate(ends):
        link = None
        if isinstance(inputs.get(name), tuple):
            source, source_slot = inputs[name]
            link = 100 + len(links)
            links.append([link, int(source), source_slot, key, slot, type_])
        elif name in widgets:
            continue  # a value that has not been made an input
        entries.append({"name": name, "type": type_, "link": link})
    values = [None if isinstance(inputs.get(name), tuple) else inputs.get(name) for name in widgets]
    return {
        "inputs": entries,
        "outputs": [{"name": type_, "type": type_} for type_ in outputs],
        "widgets_values": values,
    }


def in_subgraph(nodes: Nodes, text: str) -> dict[str, Any]:
    """The editor's format with everything but the saver in a subgraph, whose text is given from outside."""
    inner = editor({key: node for key, node in nodes.items() if key != "9"})
    by_id = {node["id"]: node for node in inner["nodes"]}
    by_id[6]["inputs"].append({"name": "text", "type": "STRING", "link": 900, "widget": {"name": "text"}})
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    ends = [(900, -10, 0, 6, 1, "STRING"), (901, 8, 0, -20, 0, "IMAGE")]
    subgraph = {
        "id": "a-b-c",
        "name": "Text to picture",
        "inputs": [{"name": "text", "type": "STRING"}],
        "outputs": [{"name": "IMAGE", "type": "IMAGE"}],
        "nodes": inner["nodes"],
        "links": [dict(zip(names, link, strict=True)) for link in [*inner["links"], *ends]],
    }
    outer = editor({"9": ("SaveImage", {"images": ("50", 0), "filename_prefix": "ComfyUI"})})
    instance = {
        "id": 50,
        "type": "a-b-c",
        "mode": 0,
        "inputs": [{"name": "text", "type": "STRING", "widget": {"name": "text"}, "link": None}],
        "outputs": [{"name": "IMAGE", "type": "IMAGE"}],
        "widgets_values": [text],
    }
    return outer | {"nodes": [*outer["nodes"], instance], "definitions": {"subgraphs": [subgraph]}}
