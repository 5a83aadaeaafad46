"""Adapters made by PEFT and diffusers read here, and ours read by diffusers: same dW, same answer."""

from copy import deepcopy
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from safetensors.torch import save_file  # noqa: E402

from flux.adapters import Adapter, Adapters, Delta, LowRank, load, new_adapter, save, targets  # noqa: E402
from flux.models.clip import CLIPTextModel, CLIPTextParams  # noqa: E402
from flux.models.transformer import Flux, FluxParams  # noqa: E402
from flux.weights import keymaps, prefixes  # noqa: E402

TOLERANCE = 5e-5  # relative error of one call in float32, from numerics.md
HIDDEN, HEADS = 64, 2
SIZES = {"depth": 2, "depth_single_blocks": 2, "axes_dim": (4, 12, 16)}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
MLP = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"]
REST = ["norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out"]
EMBEDDERS = ["x_embedder", "context_embedder", "linear_1", "linear_2"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def randomize(module: "torch.nn.Module", seed: int, only: str = "") -> None:
    """Random values in every parameter whose name has `only` in it; norms' weights about one."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if only in name:
            scale = 0.2 if p.ndim == 1 else p.shape[-1] ** -0.5
            with torch.no_grad():
                value = torch.randn(p.shape, generator=generator) * scale
                p.copy_(value + (p.ndim == 1 and "bias" not in name and not only))


def reference_model() -> "diffusers.FluxTransformer2DModel":
    return deepcopy(_reference_model())


@cache
def _reference_model() -> "diffusers.FluxTransformer2DModel":
    model = diffusers.FluxTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=SIZES["depth"],
        num_single_layers=SIZES["depth_single_blocks"],
        attention_head_dim=HIDDEN // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=48,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=SIZES["axes_dim"],
    )
    randomize(model, 0)
    return model.eval()


def ours_of(reference: "torch.nn.Module") -> Flux:
    model = Flux(
        FluxParams(
            in_channels=16,
            out_channels=16,
            vec_in_dim=32,
            context_in_dim=48,
            hidden_size=HIDDEN,
            num_heads=HEADS,
            **SIZES,
        )
    )
    tensors = {name: mx.array(p.detach().numpy()) for name, p in reference.state_dict().items()}
    model.load_weights(list(keymaps.from_diffusers(keymaps.TRANSFORMER, tensors).items()))
    return model


def inputs(channels: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    img_ids = np.array([[0, y, x] for y in range(2) for x in range(3)], dtype=np.float32)
    return {
        "img": rng.standard_normal((1, 6, channels), dtype=np.float32),
        "img_ids": img_ids,
        "txt": rng.standard_normal((1, 5, 48), dtype=np.float32),
        "txt_ids": np.zeros((5, 3), dtype=np.float32),
        "timesteps": np.array([0.7], dtype=np.float32),
        "y": rng.standard_normal((1, 32), dtype=np.float32),
        "guidance": np.array([3.5], dtype=np.float32),
    }


def answer_of_reference(model: "torch.nn.Module", channels: int = 16) -> np.ndarray:
    with torch.no_grad():
        return run_reference(model, {k: torch.from_numpy(v) for k, v in inputs(channels).items()}).numpy()


def run_reference(model: "torch.nn.Module", given: "dict[str, torch.Tensor]") -> "torch.Tensor":
    return model(
        hidden_states=given["img"],
        encoder_hidden_states=given["txt"],
        pooled_projections=given["y"],
        timestep=given["timesteps"],
        img_ids=given["img_ids"],
        txt_ids=given["txt_ids"],
        guidance=given["guidance"],
    ).sample


def answer_of_ours(model: Flux, channels: int = 16) -> np.ndarray:
    return np.array(run_ours(model, {name: mx.array(value) for name, value in inputs(channels).items()}))


def run_ours(model: Flux, given: dict[str, mx.array]) -> mx.array:
    return model(**given | {name: given[name][None] for name in ("img_ids", "txt_ids")})


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def with_lora(reference: "torch.nn.Module", **options) -> "torch.nn.Module":
    options = {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, **options}
    reference.add_adapter(peft.LoraConfig(init_lora_weights=False, **options))
    randomize(reference, 2, only="lora_")
    return reference


def peft_deltas(reference: "torch.nn.Module") -> dict[str, np.ndarray]:
    """What PEFT itself adds to each weight, under diffusers' names."""
    kinds = (peft.tuners.lora.Linear, peft.tuners.lokr.Linear)
    layers = {n: m for n, m in reference.named_modules() if isinstance(m, kinds)}
    return {name: layer.get_delta_weight("default").detach().numpy() for name, layer in layers.items()}


def check_deltas(adapter: Adapter, expected: dict[str, np.ndarray]) -> None:
    """Every dW of the adapter (our names, fused) equals PEFT's (diffusers' names, split)."""
    seen = set()
    for module, delta in adapter.modules.items():
        row, names = keymaps.find_theirs(keymaps.TRANSFORMER, module)
        dense = np.array(delta.change.dense())
        dense = np.concatenate(np.split(dense, 2)[::-1]) if row.swapped else dense
        for i, name in enumerate(names):
            end = None if i == len(names) - 1 else HIDDEN * (i + 1)
            own = dense[HIDDEN * i : end]
            assert relative_error(own, expected[name]) <= 1e-6 if name in expected else not own.any(), name
            seen.add(name)
    assert seen >= expected.keys()


def save_by_diffusers(reference: "torch.nn.Module", folder: Path, metadata: bool) -> Path:
    layers = peft.get_peft_model_state_dict(reference)
    extra = {}
    if metadata:
        config = reference.peft_config["default"].to_dict()
        extra["transformer_lora_adapter_metadata"] = {k: v for k, v in config.items() if k != "task_type"}
    diffusers.FluxPipeline.save_lora_weights(folder, transformer_lora_layers=layers, **extra)
    return folder / "pytorch_lora_weights.safetensors"


CASES = {
    "attention": {},
    "all layers": {"target_modules": [*ATTENTION, *MLP, *REST, *EMBEDDERS]},
    "ranks and alphas": {
        "target_modules": [*ATTENTION, *MLP],
        "rank_pattern": {"to_k": 2, "transformer_blocks.1.attn.to_v": 3},
        "alpha_pattern": {"to_q": 1, "^transformer_blocks.1.attn.to_v": 5, "proj_mlp": 7},
    },
    "some parts": {"target_modules": ["to_q", "to_v", "add_k_proj", "proj_mlp"]},
    "rslora": {"use_rslora": True},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_diffusers_file_with_metadata(options: dict, tmp_path: Path):
    reference = with_lora(reference_model(), **options)
    ours = ours_of(reference_model())
    adapter = load(save_by_diffusers(reference, tmp_path, metadata=True), strict=True)
    check_deltas(adapter, peft_deltas(reference))
    assert Adapters(ours).add(adapter) == {}
    expected = answer_of_reference(reference)
    assert relative_error(answer_of_ours(ours), expected) <= TOLERANCE
    assert relative_error(base_answer(), expected) > 1e-2


def test_without_metadata_alpha_is_the_rank(tmp_path: Path):
    reference = with_lora(reference_model(), lora_alpha=4)
    path = save_by_diffusers(reference, tmp_path, metadata=False)
    check_deltas(load(path, strict=True), peft_deltas(reference))


def test_dora(tmp_path: Path):
    reference = with_lora(reference_model(), use_dora=True, target_modules=[*ATTENTION, *MLP])
    randomize_magnitudes(reference)
    ours = ours_of(reference_model())
    adapters = Adapters(ours)
    adapters.add(load(save_by_diffusers(reference, tmp_path, metadata=True), strict=True))
    for strength in (0.5, -0.3, 1.0):
        reference.set_adapters("default", strength)
        adapters.set_strength("adapter 1", strength)
        expected = answer_of_reference(reference)
        assert relative_error(answer_of_ours(ours), expected) <= TOLERANCE, strength
    assert adapters.fuse() == []
    assert relative_error(answer_of_ours(ours), expected) <= TOLERANCE


def randomize_magnitudes(reference: "torch.nn.Module") -> None:
    for name, p in reference.named_parameters():
        if "magnitude" in name:
            with torch.no_grad():
                p.copy_(1 + 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))


def test_folder_of_peft(tmp_path: Path):
    """PEFT writes alpha into a file of its own beside the weights."""
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=ATTENTION, init_lora_weights=False)
    wrapped = peft.get_peft_model(reference_model(), config)
    wrapped.save_pretrained(tmp_path)
    check_deltas(load(tmp_path, strict=True), peft_deltas(wrapped.base_model.model))


@pytest.mark.parametrize("options", [{"r": 2}, {"r": 2, "decompose_both": True}, {"r": 32}], ids=str)
def test_lokr_of_peft(options: dict, tmp_path: Path):
    config = peft.LoKrConfig(alpha=3, target_modules=[*ATTENTION, *MLP], init_weights=False, **options)
    wrapped = peft.get_peft_model(reference_model(), config)
    randomize(wrapped, 2, only="lokr_")
    wrapped.save_pretrained(tmp_path)
    adapter = load(tmp_path, strict=True)
    check_deltas(adapter, peft_deltas(wrapped.base_model.model))
    assert_same_change(adapter, wrapped.base_model.model)


# --- What we write, read by diffusers ---


def trained(model: Flux, which: str = "all", rank: int = 4, alpha: float = 2.0, **options) -> Adapter:
    """An adapter of this program's own making, with random values in up too."""
    adapter = new_adapter(model, targets(model, which), rank, alpha, mx.random.key(5), **options)
    keys = mx.random.split(mx.random.key(6), len(adapter.modules))
    modules = {}
    for key, (name, delta) in zip(keys, adapter.modules.items(), strict=True):
        up = 0.3 * mx.random.normal(delta.change.up.shape, key=key)
        magnitude = delta.magnitude if delta.magnitude is None else delta.magnitude * 1.1
        modules[name] = Delta(LowRank(delta.change.down, up, delta.change.alpha), magnitude=magnitude)
    return Adapter(modules)


def ours_with(adapter: Adapter, strength: float = 1.0) -> np.ndarray:
    ours = ours_of(reference_model())
    Adapters(ours).add(adapter, strength)
    return answer_of_ours(ours)


@pytest.mark.parametrize("options", [{}, {"alpha": 3.0}, {"dora": True}, {"which": "attention"}], ids=str)
def test_diffusers_loads_our_diffusers_file(options: dict, tmp_path: Path, caplog):
    reference = reference_model()
    adapter = trained(ours_of(reference), **options)
    path = tmp_path / "ours.safetensors"
    save(path, adapter, "diffusers")
    reference.load_lora_adapter(str(path), prefix="transformer")
    assert not [r for r in caplog.records if "unexpected" in r.message or "missing" in r.message]
    assert_same_change(adapter, reference)


def pipeline(reference: "torch.nn.Module", clip: "torch.nn.Module | None" = None) -> "diffusers.FluxPipeline":
    none = dict.fromkeys(("scheduler", "vae", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return diffusers.FluxPipeline(transformer=reference, text_encoder=clip, **none)


@pytest.mark.parametrize("format", ["native", "kohya", "diffusers", "ai-toolkit"])
def test_diffusers_pipeline_loads_every_format(format: str, tmp_path: Path):
    """Blocks without `linear1`: diffusers' reader knows that layer at FLUX.1's full width alone."""
    reference = reference_model()
    which = r"double_blocks\..*(attn|mlp).*|single_blocks\..*(linear2|modulation.*)"
    adapter = trained(ours_of(reference), which)
    path = tmp_path / "ours.safetensors"
    save(path, adapter, format)
    pipeline(reference).load_lora_weights(str(path))
    assert_same_change(adapter, reference)


def assert_same_change(adapter: Adapter, reference: "torch.nn.Module") -> None:
    expected = answer_of_reference(reference)
    assert relative_error(ours_with(adapter), expected) <= TOLERANCE
    assert relative_error(base_answer(), expected) > 1e-2


@cache
def base_answer() -> np.ndarray:
    return answer_of_ours(ours_of(reference_model()))


def test_xlabs(tmp_path: Path):
    """diffusers' own reader as the judge of a file made by hand."""
    rng = np.random.default_rng(7)
    tensors = {}
    numbered = ("qkv_lora1", "qkv_lora2", "proj_lora1", "proj_lora2")
    for block, names in (("double", numbered), ("single", ("qkv_lora", "proj_lora"))):
        for name in names:
            stem = f"{block}_blocks.1.processor.{name}"
            columns = HIDDEN * (5 if stem.startswith("single") and name == "proj_lora" else 1)
            rows = HIDDEN * (3 if "qkv" in name else 1)
            tensors[f"{stem}.down.weight"] = rng.standard_normal((4, columns), dtype=np.float32) / 8
            tensors[f"{stem}.up.weight"] = rng.standard_normal((rows, 4), dtype=np.float32) / 2
    path = tmp_path / "xlabs.safetensors"
    save_file({name: torch.from_numpy(value) for name, value in tensors.items()}, path)
    reference = reference_model()
    pipeline(reference).load_lora_weights(str(path))
    adapter = load(path, strict=True)
    assert adapter.format == "XLabs"
    assert_same_change(adapter, reference)


def test_control_adapter(tmp_path: Path):
    """More channels, biases and norms, written for diffusers and loaded there."""
    reference = reference_model()
    adapter = trained(ours_of(reference), "attention")
    rng = np.random.default_rng(8)
    modules = {
        name: Delta(delta.change, mx.array(rng.standard_normal(delta.shape[0], dtype=np.float32) / 3))
        for name, delta in adapter.modules.items()
    }
    down, up = (mx.array(rng.standard_normal(shape, dtype=np.float32)) for shape in ((4, 32), (HIDDEN, 4)))
    modules["img_in"] = Delta(LowRank(down, up, 4.0))
    norms = {
        f"{stem}.norm.{norm}.scale": mx.array(rng.standard_normal(HIDDEN // HEADS, dtype=np.float32))
        for stem in ("double_blocks.0.img_attn", "double_blocks.1.txt_attn", "single_blocks.1")
        for norm in ("query_norm", "key_norm")
    }
    adapter = Adapter(modules, norms)
    save(tmp_path / "control.safetensors", adapter, "diffusers")
    pipeline(reference).load_lora_weights(str(tmp_path / "control.safetensors"))
    ours = ours_of(reference_model())
    Adapters(ours).add(load(tmp_path / "control.safetensors", strict=True), widen=True)
    assert relative_error(answer_of_ours(ours, 32), answer_of_reference(reference, 32)) <= TOLERANCE


# --- Training ---


@pytest.mark.parametrize("dora", [False, True])
def test_gradients(dora: bool, tmp_path: Path):
    """Of the mean squared error, for layers that are one and the same in both programs."""
    single = ["to_out.0", "to_add_out", "ff.net.0.proj", "ff_context.net.2", "proj_out", "norm1.linear"]
    reference = with_lora(reference_model(), target_modules=single, use_dora=dora)
    ours = ours_of(reference_model())
    adapters = Adapters(ours)
    adapters.add(load(save_by_diffusers(reference, tmp_path, metadata=True)), name="new", trainable=True)
    adapters.freeze_all_but("new")
    goal = np.random.default_rng(4).standard_normal((1, 6, 16), dtype=np.float32)

    given = {name: torch.from_numpy(value) for name, value in inputs().items()}
    torch.mean((run_reference(reference, given) - torch.from_numpy(goal)) ** 2).backward()
    arrays = {name: mx.array(value) for name, value in inputs().items()}
    loss = nn.value_and_grad(ours, lambda model: mx.mean((run_ours(model, arrays) - mx.array(goal)) ** 2))
    gradients = dict(tree_flatten(loss(ours)[1]))

    kinds = {"layer.down": "lora_A.default.weight", "layer.up": "lora_B.default.weight"}
    if dora:
        kinds["magnitude"] = "lora_magnitude_vector.default.weight"
    expected = dict(reference.named_parameters())
    assert len(gradients) == len([name for name in expected if "lora" in name])
    for name, gradient in gradients.items():
        module, kind = name.split(".shares.0.")
        _, (theirs,) = keymaps.find_theirs(keymaps.TRANSFORMER, module)
        own = expected[f"{theirs}.{kinds[kind]}"].grad
        assert relative_error(np.array(gradient), own.numpy()) <= 1e-4, name


# --- CLIP ---

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
}
CLIP_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def clip_models() -> tuple["torch.nn.Module", CLIPTextModel]:
    reference = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, eos_token_id=98))
    randomize(reference, 9)
    ours = CLIPTextModel(CLIPTextParams(**TEXT))
    tensors = {name: mx.array(p.detach().numpy()) for name, p in reference.state_dict().items()}
    ours.load_weights([(name, tensors[old]) for old, name in prefixes.bare_names_of("clip", tensors).items()])
    return reference.eval(), ours


def clip_answers(reference: "torch.nn.Module", ours: CLIPTextModel) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.array([[97, 5, 17, 33, 98, 98]])
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens)).last_hidden_state.numpy()
    return np.array(ours(mx.array(tokens), 98).last_hidden_state), expected


def test_clip_both_ways(tmp_path: Path):
    reference, ours = clip_models()
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=CLIP_LAYERS,
        rank_pattern={"layers.1.mlp.fc1": 2},
        init_lora_weights=False,
    )
    reference.add_adapter(config)
    randomize(reference, 2, only="lora_")
    diffusers.FluxPipeline.save_lora_weights(
        tmp_path,
        text_encoder_lora_layers=peft.get_peft_model_state_dict(reference),
        text_encoder_lora_adapter_metadata=reference.peft_config["default"].to_dict(),
    )
    adapter = load(tmp_path, strict=True)
    assert adapter.parts() == ["clip"]
    assert Adapters(ours).add(adapter) == {}
    own, expected = clip_answers(reference, ours)
    assert relative_error(own, expected) <= 1e-5

    for format in ("diffusers", "kohya", "native"):
        path = tmp_path / f"{format}.safetensors"
        save(path, adapter, format)
        fresh, plain = clip_models()
        assert relative_error(clip_answers(fresh, plain)[1], expected) > 1e-2
        pipeline(reference_model(), fresh).load_lora_weights(str(path))
        assert relative_error(clip_answers(fresh, plain)[1], expected) <= 1e-5, format
