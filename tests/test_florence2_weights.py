"""Florence-2's checkpoints: names, shapes, both schemes, PyTorch's files, and what is said of faulty ones."""

import json
import pickle
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from flux.errors import FluxError
from flux.models.florence2 import Florence2, Florence2Params, GenerationParams, LanguageParams, VisionParams
from flux.weights import florence2, tensors, torchfile

REFERENCE = Path(__file__).parent / "reference/florence2-base.transformers.json"
TINY = Florence2Params(
    VisionParams(
        depths=(1, 1, 2, 1),
        embed_dim=(8, 8, 16, 16),
        num_heads=(2, 2, 4, 4),
        num_groups=(2, 2, 4, 4),
        window_size=3,
    ),
    LanguageParams(
        vocab_size=50,
        d_model=24,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=3,
        encoder_ffn_dim=32,
        decoder_ffn_dim=40,
        max_position_embeddings=30,
    ),
    max_position_embeddings=7,
    max_temporal_embeddings=3,
)
# The same shape as config.json tells it: transformers' form, and that of Microsoft's code.
TEXT_CONFIG = {name: getattr(TINY.language, name) for name in TINY.language.__dataclass_fields__}
VISION_CONFIG = {
    "depths": [1, 1, 2, 1],
    "num_heads": [2, 2, 4, 4],
    "num_groups": [2, 2, 4, 4],
    "window_size": 3,
}
TRANSFORMERS_CONFIG = {
    "text_config": TEXT_CONFIG,
    "vision_config": VISION_CONFIG
    | {"embed_dim": [8, 8, 16, 16], "max_position_embeddings": 7, "max_temporal_embeddings": 3},
}
MICROSOFT_CONFIG = {
    "text_config": TEXT_CONFIG,
    "vision_config": VISION_CONFIG
    | {
        "dim_embed": [8, 8, 16, 16],
        "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": 7},
        "visual_temporal_embedding": {"type": "COSINE", "max_temporal_embeddings": 3},
        "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
    },
}


def random_weights() -> dict[str, mx.array]:
    mx.random.seed(0)
    shapes = {name: tensor.shape for name, tensor in tree_flatten(Florence2(TINY).parameters())}
    return {name: mx.random.normal(shape) for name, shape in shapes.items()}


def microsoft_names(ours: dict[str, mx.array]) -> dict[str, mx.array]:
    """As Microsoft's files have them: names, layout, the embedding's copies, a bias that is unused."""
    rows = tuple((new, old) for old, new in florence2.ORIGINAL)
    theirs = {}
    for name, tensor in ours.items():
        theirs[florence2.rename(name, rows)] = tensor.transpose(0, 3, 1, 2) if tensor.ndim == 4 else tensor
    theirs["image_projection"] = theirs["image_projection"].T
    for copy in ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"):
        theirs[f"language_model.{copy}.weight"] = ours[florence2.EMBEDDING]
    theirs["language_model.final_logits_bias"] = mx.zeros((1, 50))
    return theirs


def write(folder: Path, weights: dict[str, mx.array], config: dict) -> Path:
    tensors.save(folder / "model.safetensors", {name: mx.contiguous(w) for name, w in weights.items()})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_loads(folder: Path, expected: dict[str, mx.array]) -> None:
    found = dict(tree_flatten(florence2.load(folder, mx.float32).parameters()))
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[name], expected[name]) for name in expected)


def test_names_and_shapes_of_the_reference():
    """The file is of the shape that an empty config.json means to transformers. Lazy: takes no memory."""
    reference = json.loads(REFERENCE.read_text())
    ours = dict(tree_flatten(Florence2(florence2.params({})).parameters()))
    theirs = florence2.to_transformers(ours)
    copies = set(reference) - set(theirs)
    assert copies == {f"model.{name}" for name in florence2.COPIES[:2]} | {"lm_head.weight"}
    assert {name: list(tensor.shape) for name, tensor in theirs.items()} == {
        name: shape for name, shape in reference.items() if name not in copies
    }


def test_sizes_of_base_and_large():
    """0.23 and 0.77 billion parameters, say their pages on the Hub."""
    large = Florence2Params(
        VisionParams(embed_dim=(256, 512, 1024, 2048), num_heads=(8, 16, 32, 64), num_groups=(8, 16, 32, 64)),
        replace(florence2.LANGUAGE_DEFAULTS, vocab_size=51289),
    )
    for params, billions in ((Florence2Params(), 0.23), (large, 0.77)):
        count = sum(tensor.size for _, tensor in tree_flatten(Florence2(params).parameters()))
        assert round(count / 1e9, 2) == billions


@pytest.mark.parametrize("config", [TRANSFORMERS_CONFIG, MICROSOFT_CONFIG], ids=["transformers", "microsoft"])
def test_shape_from_config(config):
    assert florence2.params(config) == TINY


@pytest.mark.parametrize("scheme", ["transformers", "microsoft"])
def test_both_schemes(tmp_path, scheme):
    ours = random_weights()
    to_theirs = florence2.to_transformers if scheme == "transformers" else microsoft_names
    config = TRANSFORMERS_CONFIG if scheme == "transformers" else MICROSOFT_CONFIG
    theirs = to_theirs(ours)
    assert_loads(write(tmp_path, theirs, config), ours)
    once = florence2.to_ours(theirs)
    assert once.keys() == ours.keys()


def test_microsofts_names():
    """The names in their files, from their code; not derived from the table."""
    theirs = microsoft_names(random_weights())
    block = "vision_tower.blocks.2.1."
    for name in (
        "vision_tower.convs.0.proj.weight",
        "vision_tower.convs.3.norm.bias",
        block + "spatial_block.conv1.fn.dw.weight",
        block + "spatial_block.window_attn.norm.weight",
        block + "spatial_block.window_attn.fn.qkv.bias",
        block + "spatial_block.window_attn.fn.proj.weight",
        block + "channel_block.channel_attn.norm.bias",
        block + "channel_block.channel_attn.fn.qkv.weight",
        block + "channel_block.conv2.fn.dw.bias",
        block + "channel_block.ffn.norm.weight",
        block + "channel_block.ffn.fn.net.fc1.weight",
        block + "channel_block.ffn.fn.net.fc2.bias",
        "image_projection",
        "image_proj_norm.weight",
        "image_pos_embed.row_embeddings.weight",
        "image_pos_embed.column_embeddings.weight",
        "visual_temporal_embed.pos_idx_to_embed",
        "language_model.model.shared.weight",
        "language_model.model.encoder.layers.0.self_attn.k_proj.weight",
        "language_model.model.decoder.layers.1.encoder_attn_layer_norm.bias",
    ):
        assert theirs.pop(name) is not None


def test_one_copy_of_the_embedding_is_enough(tmp_path):
    ours = random_weights()
    theirs = florence2.to_transformers(ours)
    theirs["lm_head.weight"] = theirs.pop("model." + florence2.EMBEDDING)
    assert_loads(write(tmp_path, theirs, TRANSFORMERS_CONFIG), ours)


def test_every_fault_in_one_line(tmp_path):
    weights = florence2.to_transformers(random_weights())
    del weights["model.vision_tower.convs.1.conv.bias"]
    weights["model.language_model.surplus"] = mx.zeros(3)
    weights["model.language_model.encoder.layers.0.fc1.bias"] = mx.zeros(5)
    with pytest.raises(FluxError) as caught:
        florence2.load(write(tmp_path, weights, TRANSFORMERS_CONFIG), mx.float32)
    message = str(caught.value)
    assert "\n" not in message
    for words in (
        "model.safetensors",
        "missing: vision_tower.convs.1.conv.bias",
        "unexpected: language_model.surplus",
        "encoder.layers.0.fc1.bias is (5,) and should be (32,)",
    ):
        assert words in message


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("text_config", "scale_embedding", True),
        ("text_config", "activation_function", "relu"),
        ("vision_config", "image_feature_source", ["temporal_avg_pool"]),
    ],
)
def test_what_is_not_known_is_refused(tmp_path, part, key, value):
    config = TRANSFORMERS_CONFIG | {part: TRANSFORMERS_CONFIG[part] | {key: value}}
    write(tmp_path, florence2.to_transformers(random_weights()), config)
    with pytest.raises(FluxError, match=rf"config.json: {part}: {key} is {re.escape(repr(value))}"):
        florence2.load(tmp_path, mx.float32)


def test_folders_without_a_captioner(tmp_path):
    with pytest.raises(FluxError, match="no captioner here"):
        florence2.load(tmp_path, mx.float32)
    tensors.save(tmp_path / "model.safetensors", {"a": mx.zeros(1)})
    with pytest.raises(FluxError, match=r"no config\.json"):
        florence2.load(tmp_path, mx.float32)
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(FluxError, match=r"config\.json: not JSON"):
        florence2.load(tmp_path, mx.float32)


def test_generation_config(tmp_path):
    assert florence2.generation_params(tmp_path) == GenerationParams()
    config = {"num_beams": 5, "length_penalty": 2.0, "forced_bos_token_id": None, "transformers_version": "4"}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    expected = GenerationParams(num_beams=5, length_penalty=2.0, forced_bos_token_id=None)
    assert florence2.generation_params(tmp_path) == expected


def test_pytorch_files(tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    whole = torch.randn(6, 4)
    state = {
        "half": torch.randn(3, 2).half(),
        "bfloat": torch.randn(5).bfloat16(),
        "a row": whole[2],
        "turned": whole.T,
        "number": torch.tensor(7),
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    found = torchfile.load([tmp_path / "pytorch_model.bin"])
    assert found.keys() == state.keys()
    assert (found["half"].dtype, found["bfloat"].dtype) == (mx.float16, mx.bfloat16)
    for name, tensor in state.items():
        assert found[name].shape == tuple(tensor.shape)
        assert found[name].astype(mx.float32).tolist() == tensor.float().tolist()


def test_microsofts_pytorch_file(tmp_path):
    torch = pytest.importorskip("torch")
    ours = {name: tensor.astype(mx.float16) for name, tensor in random_weights().items()}
    state = {name: torch.tensor(tensor.tolist()).half() for name, tensor in microsoft_names(ours).items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(MICROSOFT_CONFIG))
    assert_loads(tmp_path, {name: tensor.astype(mx.float32) for name, tensor in ours.items()})


class Nasty:
    def __reduce__(self):
        return (print, ("a pickle may call anything",))


@pytest.mark.parametrize("content", [{"weight": Nasty()}, {"weight": 3}, [1]])
def test_pickles_run_nothing(tmp_path, content, capsys):
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content))
    with pytest.raises(FluxError, match=r"pytorch_model.bin: not a PyTorch file of weights"):
        torchfile.load([path])
    assert capsys.readouterr().out == ""


def test_no_zip_archive(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"nothing of the kind")
    with pytest.raises(FluxError, match="not a PyTorch file"):
        torchfile.load([tmp_path / "pytorch_model.bin"])
