"""ComfyUI's workflows become options; what would make another picture stops them by its name."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from flux.errors import FluxError
from flux.workflows import comfyui
from flux.workflows import options as comfyui_options
from flux.workflows.options import to_options

from . import comfyui_workflows as workflows


def read(tmp_path, data) -> comfyui.Workflow:
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return comfyui.read(path)


FORMATS = pytest.mark.parametrize("form", [workflows.api, workflows.editor], ids=["api", "editor"])


@FORMATS
def test_the_base_workflow(tmp_path, form):
    found = read(tmp_path, form(workflows.base(size=1024, steps=20, seed=2**64 - 1)))
    assert found == comfyui.Workflow(
        files={
            "transformer": ("flux1-dev.safetensors", "transformer"),
            "clip": ("clip_l.safetensors", "encoder"),
            "t5": ("t5xxl_fp16.safetensors", "encoder"),
            "ae": ("ae.safetensors", "ae"),
        },
        prompt=workflows.PROMPT,
        guidance=2.5,
        steps=20,
        shift=pytest.approx(1.15),
        seed=2**64 - 1,
        image_size=(1024, 1024),
    )


@FORMATS
def test_the_finetuned_workflow(tmp_path, form):
    found = read(tmp_path, form(workflows.finetuned(strength=0.8)))
    assert found.adapters == [("flux_dreambooth.safetensors", 0.8)]
    assert found.shift == pytest.approx(0.5 + (16 - 256) * 0.65 / 3840)
    assert found.files["t5"] == ("t5xxl_fp16.safetensors", "encoder")
    assert found.notes == (
        ["not used, as the picture does not need them: Note"] if form is workflows.editor else []
    )


@FORMATS
def test_ksampler_with_two_texts(tmp_path, form):
    found = read(tmp_path, form(workflows.ksampler(scheduler="normal")))
    assert (found.prompt, found.clip_prompt) == (workflows.PROMPT, "an apple")
    assert (found.guidance, found.cfg_scale, found.negative_prompt) == (4.0, 1.0, None)
    assert (found.steps, found.schedule, found.shift, found.seed) == (20, "normal", None, 5)
    assert found.notes == []  # the negative text has no effect at cfg 1


def with_negative(cfg=2.0):
    nodes = workflows.ksampler(cfg=cfg)
    nodes["41"] = ("CLIPTextEncode", {"clip": ("11", 0), "text": workflows.PROMPT})
    nodes["42"] = ("CLIPTextEncode", {"clip": ("11", 0), "text": "blurry"})
    return nodes


@FORMATS
def test_true_guidance(tmp_path, form):
    found = read(tmp_path, form(with_negative()))
    assert (found.cfg_scale, found.negative_prompt, found.guidance) == (2.0, "blurry", 3.5)
    assert read(tmp_path, form(with_negative(cfg=1.0))).negative_prompt is None


def test_a_negative_text_with_another_guidance_is_refused(tmp_path):
    nodes = with_negative()
    nodes["43"] = ("FluxGuidance", {"conditioning": ("42", 0), "guidance": 1.0})
    nodes["31"][1]["negative"] = ("43", 0)
    with pytest.raises(FluxError, match=r"KSampler \(node 31\).*another guidance"):
        read(tmp_path, workflows.api(nodes))


@FORMATS
def test_all_in_one_checkpoint(tmp_path, form):
    nodes = workflows.base()
    for key in ("10", "11"):
        del nodes[key]
    nodes["12"] = ("CheckpointLoaderSimple", {"ckpt_name": "FLUX\\flux1-dev-fp8.safetensors"})
    nodes["6"][1]["clip"], nodes["8"][1]["vae"] = ("12", 1), ("12", 2)
    files = read(tmp_path, form(nodes)).files
    assert files == dict.fromkeys(
        ("transformer", "clip", "t5", "ae"), ("FLUX\\flux1-dev-fp8.safetensors", "checkpoint")
    )


def test_primitives_reroutes_and_bypassed_nodes(tmp_path):
    """What the editor resolves before it runs anything."""
    nodes = workflows.finetuned()
    nodes["60"] = ("PrimitiveNode", {"value": 128, "control": "fixed"})
    nodes["61"] = ("PrimitiveInt", {"value": 96, "control": "fixed"})
    nodes["27"][1].update(width=("60", 0), height=("61", 0))
    nodes["62"] = ("Reroute", {"": ("12", 0)})
    nodes["63"] = ("Reroute", {"": ("62", 0)})
    nodes["38"][1]["model"] = ("63", 0)
    found = read(tmp_path, workflows.editor(nodes))
    assert found.image_size == (96, 128)
    assert found.adapters == [("flux_dreambooth.safetensors", 0.8)]
    found = read(tmp_path, workflows.editor(nodes, {"38": 4, "30": 4}))
    assert found.adapters == []
    assert found.shift is None
    assert found.files["transformer"][0] == "flux1-dev.safetensors"


def test_a_primitive_in_the_api_format(tmp_path):
    nodes = workflows.base()
    nodes["61"] = ("PrimitiveInt", {"value": 96})
    nodes["27"][1]["height"] = ("61", 0)
    assert read(tmp_path, workflows.api(nodes)).image_size == (96, 64)


def test_subgraphs(tmp_path):
    found = read(tmp_path, workflows.in_subgraph(workflows.finetuned(), "a green pear"))
    assert found.prompt == "a green pear"
    assert found.adapters == [("flux_dreambooth.safetensors", 0.8)]


def test_loras_in_a_row(tmp_path):
    nodes = workflows.finetuned(lora="first.safetensors", strength=1.0)
    nodes["70"] = (
        "LoraLoaderModelOnly",
        {"model": ("38", 0), "lora_name": "second.safetensors", "strength_model": -0.5},
    )
    nodes["71"] = (
        "LoraLoaderModelOnly",
        {"model": ("70", 0), "lora_name": "off.safetensors", "strength_model": 0},
    )
    nodes["30"][1]["model"] = ("71", 0)
    found = read(tmp_path, workflows.editor(nodes))
    assert found.adapters == [("first.safetensors", 1.0), ("second.safetensors", -0.5)]
    assert any("LoraLoaderModelOnly (node 70) leaves the text encoders alone" in note for note in found.notes)


def test_power_lora_loader(tmp_path):
    data = workflows.api(workflows.finetuned())
    data["38"] = {
        "class_type": "Power Lora Loader (rgthree)",
        "inputs": {
            "PowerLoraLoaderHeaderWidget": {"type": "PowerLoraLoaderHeaderWidget"},
            "lora_1": {"on": True, "lora": "a.safetensors", "strength": 0.7},
            "lora_2": {"on": False, "lora": "b.safetensors", "strength": 1},
            "model": ["12", 0],
            "clip": ["11", 0],
        },
    }
    assert read(tmp_path, data).adapters == [("a.safetensors", 0.7)]
    data["38"]["inputs"]["lora_1"]["strengthTwo"] = 0.2
    with pytest.raises(
        FluxError, match=r"Power Lora Loader \(rgthree\) \(node 38\): the strengths .* differ in a"
    ):
        read(tmp_path, data)


def test_power_lora_loader_in_the_editor(tmp_path):
    """Its list stands among the values by position."""
    data = workflows.editor(workflows.finetuned())
    node = next(node for node in data["nodes"] if node["id"] == 38)
    node["type"] = "Power Lora Loader (rgthree)"
    entries = [
        {"on": on, "lora": f"{on}.safetensors", "strength": 0.7, "strengthTwo": None} for on in (True, False)
    ]
    node["widgets_values"] = [{}, {"type": "PowerLoraLoaderHeaderWidget"}, *entries, {}, ""]
    assert read(tmp_path, data).adapters == [("True.safetensors", 0.7)]


def test_strengths_that_differ_are_refused(tmp_path):
    nodes = workflows.finetuned()
    nodes["38"][1]["strength_clip"] = 0.5
    with pytest.raises(
        FluxError, match=r"LoraLoader \(node 38\): strength_clip 0.5 is not strength_model 0.8"
    ):
        read(tmp_path, workflows.api(nodes))


def test_nodes_off_the_way_do_not_matter(tmp_path):
    nodes = workflows.base()
    nodes["80"] = ("ImageScale", {"image": ("8", 0), "width": 1, "height": 1})
    nodes["81"] = ("PreviewImage", {"images": ("80", 0)})
    found = read(tmp_path, workflows.editor(nodes))
    assert found.notes == ["not used, as the picture does not need them: ImageScale, PreviewImage"]


@FORMATS
def test_unknown_nodes_on_the_way_are_all_named(tmp_path, form):
    nodes = workflows.base()
    nodes["80"] = ("ImageScale", {"image": ("8", 0), "width": 1, "height": 1})
    nodes["9"][1]["images"] = ("80", 0)
    with pytest.raises(FluxError, match=r"workflow\.json: .*does not know: ImageScale \(node 80\)"):
        read(tmp_path, form(nodes))
    nodes = workflows.ksampler(cfg=2.0)  # the negative one counts then
    nodes["27"] = ("ImageScale", {"image": ("8", 0)})
    with pytest.raises(FluxError, match=r"ConditioningZeroOut \(node 42\), ImageScale \(node 27\)"):
        read(tmp_path, form(nodes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("16", "sampler_name", "dpmpp_2m"), r"KSamplerSelect \(node 16\): the sampler dpmpp_2m"),
        (("17", "scheduler", "ddim_uniform"), r"node 17\): the scheduler ddim_uniform is not here; simple"),
        (("17", "denoise", 0.5), r"denoise 0.5 begins with a picture"),
        (("17", "steps", "many"), r"steps should be a whole number, not 'many'"),
        (("17", "steps", True), r"steps should be a whole number, not True"),
        (("11", "type", "sd3"), r"DualCLIPLoader \(node 11\) is for sd3, not flux"),
        (("11", "clip_name1", "clip_g.safetensors"), r"one of clip_g.safetensors and clip_l.safetensors"),
        (("13", "noise", 5), r"SamplerCustomAdvanced \(node 13\) has no noise"),
        (("6", "text", ("99", 0)), r"CLIPTextEncode \(node 6\) takes text from a missing node"),
        (("30", "model", ("30", 0)), r"circle"),
    ],
)
def test_what_is_refused(tmp_path, change, message):
    nodes = workflows.base()
    node, name, value = change
    nodes[node][1][name] = value
    with pytest.raises(FluxError, match=message):
        read(tmp_path, workflows.api(nodes))


def test_muted_nodes(tmp_path):
    with pytest.raises(FluxError, match=r"FluxGuidance \(node 26\) is muted, but BasicGuider"):
        read(tmp_path, workflows.editor(workflows.base(), {"26": 2}))
    with pytest.raises(FluxError, match="no node saves a picture"):
        read(tmp_path, workflows.editor(workflows.base(), {"9": 2}))


def test_several_pictures(tmp_path):
    nodes = workflows.base()
    nodes["88"] = ("VAEDecode", {"samples": ("13", 0), "vae": ("10", 0)})
    nodes["89"] = ("SaveImage", {"images": ("88", 0)})
    with pytest.raises(FluxError, match=r"several pictures \(SaveImage \(node 9\), SaveImage \(node 89\)\)"):
        read(tmp_path, workflows.editor(nodes))
    assert read(tmp_path, workflows.editor(nodes, {"89": 2})).seed == 7


@pytest.mark.parametrize(
    ("text", "expected", "noted"),
    [
        ("a (red:1.2) apple", "a (red:1.2) apple", True),
        (r"an apple \(red\)", "an apple (red)", False),
        ("embedding:nice apple", "embedding:nice apple", True),
        ("plain", "plain", False),
    ],
)
def test_weights_in_a_prompt_are_told(tmp_path, text, expected, noted):
    nodes = workflows.base()
    nodes["6"][1]["text"] = text
    found = read(tmp_path, workflows.api(nodes))
    assert found.prompt == expected
    assert bool(found.notes) is noted


def test_a_batch_and_reduced_weights_are_told(tmp_path):
    nodes = workflows.base()
    nodes["27"][1]["batch_size"], nodes["12"][1]["weight_dtype"] = 3, "fp8_e4m3fn"
    found = read(tmp_path, workflows.editor(nodes))
    assert found.n_images == 3
    assert len(found.notes) == 2


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_a_picture_that_carries_a_workflow(tmp_path, name):
    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    texts = {
        "prompt": workflows.api(workflows.base(seed=1)),
        "workflow": workflows.editor(workflows.base(seed=2)),
    }
    if name == "a.png":
        chunks = PngImagePlugin.PngInfo()
        for key, value in texts.items():
            chunks.add_text(key, json.dumps(value))
        picture.save(tmp_path / name, pnginfo=chunks)
    else:
        exif = Image.Exif()
        exif[0x0110], exif[0x010F] = (f"{key}:{json.dumps(value)}" for key, value in texts.items())
        picture.save(tmp_path / name, exif=exif)
    assert comfyui.read(tmp_path / name).seed == 1  # what ran, not what the editor showed
    picture.save(tmp_path / "bare.png")
    with pytest.raises(FluxError, match=r"bare\.png: the picture holds no ComfyUI workflow"):
        comfyui.read(tmp_path / "bare.png")


def test_what_ran_is_passed_over_where_it_is_no_json(tmp_path):
    """Some nodes write NaN into it."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("prompt", json.dumps(workflows.api(workflows.base(seed=1)) | {"x": math.nan}))
    chunks.add_text("workflow", json.dumps(workflows.editor(workflows.base(seed=2))))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png", pnginfo=chunks)
    assert comfyui.read(tmp_path / "a.png").seed == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        "not json",
        '{"nodes": [{}]}',
        '{"nodes": [{"id": 1, "type": "Reroute", "inputs": 5}]}',
        '{"nodes": [], "links": [[1]]}',
        '{"nodes": [], "links": [[1, 2, [], 4, 5, "X"]]}',
        '{"nodes": [], "definitions": {"subgraphs": [5]}}',
        '{"1": {"class_type": "SaveImage", "inputs": []}}',
        '{"1": {"class_type": ["SaveImage"], "inputs": {}}}',
        '{"1": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}}}',
        '{"nodes": [{"id": 1, "type": "x"}], "definitions": {"subgraphs": [{"id": "x", "nodes": '
        '[{"id": 1, "type": "x"}]}]}}',
    ],
)
def test_files_that_hold_no_workflow(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(FluxError, match=r"^[^\n]*a\.json: [^\n]+$"):
        comfyui.read(tmp_path / "a.json")


def test_a_long_row_of_nodes(tmp_path):
    nodes = workflows.base()
    for i in range(5000):
        source = ("12", 0) if i == 0 else (str(1000 + i - 1), 0)
        nodes[str(1000 + i)] = ("ModelSamplingFlux", {"model": source, "max_shift": 1, "base_shift": 1})
    nodes["30"][1]["model"] = ("5999", 0)
    with pytest.raises(FluxError, match="too many in a row"):
        read(tmp_path, workflows.api(nodes))


def test_files_are_found_in_comfyuis_folders(tmp_path):
    models = tmp_path / "ComfyUI" / "models"
    for name in (
        "unet/FLUX/a.safetensors",
        "clip/t5.safetensors",
        "loras/b.safetensors",
        "loras/sub/c.safetensors",
    ):
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        (models / name).touch()
    for folder in (models, models.parent):
        assert (
            comfyui.locate("FLUX\\a.safetensors", "transformer", folder) == models / "unet/FLUX/a.safetensors"
        )
        assert comfyui.locate("t5.safetensors", "encoder", folder) == models / "clip/t5.safetensors"
        assert comfyui.locate("c.safetensors", "adapter", folder) == models / "loras/sub/c.safetensors"
    assert comfyui.locate("vae.safetensors", "ae", models) is None
    (models / "loras/b").mkdir()
    (models / "loras/b/c.safetensors").touch()
    assert comfyui.locate("c.safetensors", "adapter", models) is None  # there are two


def test_all_missing_files_are_named_at_once(tmp_path):
    workflow = comfyui.Workflow(
        files={"transformer": ("a.gguf", "transformer"), "clip": ("b.sft", "encoder")},
        adapters=[("c.safetensors", 1.0)],
    )
    message = (
        r"not below .*: a\.gguf \(in diffusion_models/ or unet/; or --transformer FILE\), b\.sft .*c\.saf"
    )
    with pytest.raises(FluxError, match=message):
        to_options(workflow, str(tmp_path))
    with pytest.raises(FluxError, match=r"not below \.: c\.safetensors"):
        to_options(workflow, "dev")
    assert to_options(workflow, "dev", ["adapter"])["model"] == "dev"


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "C:\\x.safetensors", "a/../../x"])
def test_names_that_lead_out_of_the_folder(tmp_path, name):
    with pytest.raises(FluxError, match="not a file below"):
        comfyui.locate(name, "adapter", tmp_path)


# --- Kontext ---


@FORMATS
def test_references(tmp_path, form):
    found = read(tmp_path, form(workflows.kontext("a.png", "b.png [input]")))
    assert (found.references, found.image_size, found.guidance) == (["a.png", "b.png"], None, 2.5)
    assert found.notes == ["ComfyUI cuts a reference to the size of Kontext, here it is scaled as a whole"]


def test_a_reference_with_another_size(tmp_path):
    nodes = workflows.kontext("a.png")
    nodes["27"] = ("EmptySD3LatentImage", {"width": 96, "height": 64, "batch_size": 1})
    nodes["31"][1]["latent_image"] = ("27", 0)
    nodes["44"] = ("FluxKontextMultiReferenceLatentMethod", {"conditioning": ("73", 0)})
    nodes["44"][1]["reference_latents_method"] = "offset"
    nodes["43"][1]["conditioning"] = ("44", 0)
    nodes["75"] = ("ImageStitch", {"image1": ("70", 0), "direction": "right"})  # with nothing beside it
    nodes["71"][1]["image"] = ("75", 0)
    found = read(tmp_path, workflows.editor(nodes))
    assert (found.references, found.image_size) == (["a.png"], (64, 96))
    assert read(tmp_path, workflows.api(nodes)) == found


def changed(change, *names: str) -> workflows.Nodes:
    nodes = workflows.kontext(*names)
    for key, (kind, inputs) in change.items():
        nodes[key] = (kind, nodes.get(key, ("", {}))[1] | inputs)
    return nodes


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"72": ("VAEEncode", {"pixels": ("70", 0)})}, r"VAEEncode \(node 72\): a picture of its own size"),
        ({"71": ("ImageScale", {"width": 64})}, r"does not know: ImageScale \(node 71\)"),
        ({"73": ("ReferenceLatent", {"latent": ("31", 0)})}, r"does not know: KSampler \(node 31\)"),
        (
            {"31": ("KSampler", {"latent_image": ("82", 0)})},
            r"b\.png gives the size; here the first",
        ),
        (
            {"31": ("KSampler", {"cfg": 2.0, "negative": ("41", 0)})},
            "the negative text has other references than the prompt",
        ),
        (
            {
                "44": (
                    "FluxKontextMultiReferenceLatentMethod",
                    {"conditioning": ("73", 0), "reference_latents_method": "index"},
                ),
                "43": ("FluxGuidance", {"conditioning": ("44", 0)}),
            },
            "by the method offset here, not index",
        ),
    ],
)
def test_references_that_make_another_picture(tmp_path, change, line):
    with pytest.raises(FluxError, match=line):
        read(tmp_path, workflows.api(changed(change, "a.png", "b.png")))


def test_files_of_references(tmp_path):
    """In ComfyUI's input/, also where its models/ is named; one that is given goes before."""
    found = read(tmp_path, workflows.api(workflows.kontext("a.png", "b.png")))
    found.files = {}
    for name in ("a.png", "b.png"):
        (tmp_path / "ComfyUI/input").mkdir(parents=True, exist_ok=True)
        (tmp_path / "ComfyUI/input" / name).touch()
    (tmp_path / "ComfyUI/models").mkdir()
    for folder in ("ComfyUI", "ComfyUI/models"):
        options = to_options(found, str(tmp_path / folder))
        paths = str(options["reference"]).split("\n")
        assert [Path(path).resolve().name for path in paths] == ["a.png", "b.png"]
        assert f"--reference={paths[0]} --reference={paths[1]}" in comfyui_options.shown(options, ["x"])
    (tmp_path / "ComfyUI/input/b.png").unlink()
    with pytest.raises(FluxError, match=r"b\.png \(in input/ or \.\./input/; or --reference FILE\)"):
        to_options(found, str(tmp_path / "ComfyUI"))
    assert "reference" not in to_options(found, str(tmp_path / "ComfyUI"), ["reference"])
