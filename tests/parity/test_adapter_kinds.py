"""Adapters of other algebra than LoRA's: as LyCORIS (where it is installed) and PEFT compute them.

Each layer is changed by the other program's own module with random weights; its file is read here, and the
answers are compared at several strengths: beside the weight, in the weight, and beside a quantized one.
"""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from flux.adapters import Adapter, Adapters, load  # noqa: E402
from flux.adapters.beside import dense_weight  # noqa: E402
from flux.adapters.formats import read  # noqa: E402
from flux.weights.keymaps import TRANSFORMER, find_theirs  # noqa: E402

HIDDEN = 64
TOLERANCE = 1e-5
STRENGTHS = (1.0, 0.5, -0.3, 0.0)
QKV, PROJ, MLP = "double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.proj", "double_blocks.0.img_mlp.0"
SHAPES = {QKV: (3 * HIDDEN, HIDDEN), PROJ: (HIDDEN, HIDDEN), MLP: (4 * HIDDEN, HIDDEN)}


class Block(nn.Module):
    """Some of a transformer's layers, under its names."""

    def __init__(self):
        super().__init__()
        attention, mlp = nn.Module(), [nn.Linear(HIDDEN, 4 * HIDDEN)]
        attention.qkv, attention.proj = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        block = nn.Module()
        block.img_attn, block.img_mlp = attention, mlp
        self.double_blocks = [block]


def layers(model: nn.Module) -> dict[str, nn.Module]:
    block = model.double_blocks[0]
    return {QKV: block.img_attn.qkv, PROJ: block.img_attn.proj, MLP: block.img_mlp[0]}


def make(bits: int | None = None) -> Block:
    mx.random.seed(3)
    model = Block()
    if bits:
        nn.quantize(model, 32, bits)
    return model


def normal(generator: "torch.Generator", *shape: int) -> "torch.Tensor":
    return torch.randn(shape, generator=generator)


def torch_layer(layer: nn.Module, rows: slice = slice(None)) -> "torch.nn.Linear":
    """A Linear, or some rows of it, as torch has it (of a quantized one the weight that it stands for)."""
    weight = np.array(dense_weight(layer))[rows]
    out = torch.nn.Linear(weight.shape[1], weight.shape[0])
    out.weight.data = torch.from_numpy(weight.copy())
    out.bias.data = torch.from_numpy(np.array(layer.bias)[rows].copy())
    return out.requires_grad_(False)


def parts(module: str, split: bool) -> dict[str, slice]:
    """The layers that another program has for one of ours: name -> rows."""
    if not split:
        return {module: slice(None)}
    names = find_theirs(TRANSFORMER, module)[1]
    if len(names) == 1:
        return {names[0]: slice(None)}
    return {name: slice(HIDDEN * i, HIDDEN * (i + 1)) for i, name in enumerate(names)}


def check(adapter: Adapter, references: dict, bits: int | None) -> None:
    """references: (module, strength) -> what the other program's layers make of the same x."""
    assert adapter.unexpected == []
    x = np.random.default_rng(0).standard_normal((2, 5, HIDDEN), dtype=np.float32)
    model = make(bits)
    plain = {name: np.array(layer(mx.array(x))) for name, layer in layers(model).items()}
    adapters = Adapters(model)
    assert adapters.add(adapter, 1.0, "a") == {}
    for strength in STRENGTHS:
        adapters.set_strength("a", strength)
        for name, layer in layers(model).items():
            expected = references[name, strength] if strength else plain[name]
            assert error(np.array(layer(mx.array(x))), expected) <= TOLERANCE, (name, strength)
    adapters.set_strength("a", STRENGTHS[1])
    adapters.fuse()
    for name, layer in layers(model).items():
        assert error(np.array(layer(mx.array(x))), references[name, STRENGTHS[1]]) <= TOLERANCE, name
        assert error(plain[name], references[name, 1.0]) > 1e-2


def error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# --- LyCORIS ---


def lycoris_kinds() -> dict:
    modules = pytest.importorskip("lycoris.modules")
    return {
        "locon": (modules.locon.LoConModule, {"alpha": 2}),
        "loha": (modules.loha.LohaModule, {"alpha": 3}),
        "lokr": (modules.lokr.LokrModule, {"alpha": 2, "factor": 4}),
        "lokr both": (
            modules.lokr.LokrModule,
            {"alpha": 2, "factor": 16, "decompose_both": True, "lora_dim": 2},
        ),
        "lokr full": (modules.lokr.LokrModule, {"alpha": 2, "factor": 4, "full_matrix": True}),
        "glora": (modules.glora.GLoRAModule, {"alpha": 2}),
        "ia3": (modules.ia3.IA3Module, {}),
        "ia3 on input": (modules.ia3.IA3Module, {"train_on_input": True}),
        "diag-oft": (modules.diag_oft.DiagOFTModule, {}),
        "coft": (modules.diag_oft.DiagOFTModule, {"constraint": 1e-3}),
        "boft": (modules.boft.ButterflyOFTModule, {"lora_dim": 8}),
        **{
            f"{kind} dora {axis}": (
                getattr(getattr(modules, kind), name),
                {**more, "wd_on_out": axis == "rows"},
            )
            for kind, name, more in (
                ("locon", "LoConModule", {"alpha": 2}),
                ("loha", "LohaModule", {"alpha": 2}),
                ("lokr", "LokrModule", {"alpha": 2, "factor": 4}),
            )
            for axis in ("rows", "columns")
        },
    }


KINDS = [
    *("locon", "loha", "lokr", "lokr both", "lokr full", "glora", "ia3", "ia3 on input", "diag-oft", "coft"),
    *("boft", *(f"{kind} dora {axis}" for kind in ("locon", "loha", "lokr") for axis in ("rows", "columns"))),
]


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
@pytest.mark.parametrize("kind", KINDS)
def test_lycoris(kind: str, split: bool, bits: int | None):
    pytest.importorskip("lycoris")
    maker, options = lycoris_kinds()[kind]
    generator = torch.Generator().manual_seed(1)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 5, HIDDEN), dtype=np.float32))
    tensors, references = {}, {}
    for module, layer in layers(make(bits)).items():
        answers = {strength: [] for strength in STRENGTHS}
        for name, rows in parts(module, split).items():
            base = torch_layer(layer, rows)
            stem = "lycoris_" + name.replace(".", "_")
            own = maker(stem, base, **{"lora_dim": 4, "weight_decompose": "dora" in kind, **options})
            with torch.no_grad():
                for key, p in own.named_parameters():
                    p.copy_(
                        p * (1 + 0.2 * normal(generator, *p.shape))
                        if "dora" in key
                        else 0.2 * normal(generator, *p.shape)
                    )
            own.apply_to()
            for strength in STRENGTHS:
                own.multiplier = strength
                with torch.no_grad():
                    answers[strength].append(base(x).numpy())
            state = {
                f"{stem}.{key}": mx.array(t.detach().float().numpy()) for key, t in own.state_dict().items()
            }
            tensors |= state
        references |= {(module, s): np.concatenate(a, axis=-1) for s, a in answers.items()}
    check(read(tensors, {}), references, bits)


# --- PEFT ---


def torch_model(model: Block) -> "torch.nn.Module":
    """The same layers under diffusers' names."""
    root = torch.nn.Module()
    for module, layer in layers(model).items():
        for name, rows in parts(module, True).items():
            *path, last = name.split(".")
            at = root
            for key in path:
                if not hasattr(at, key):
                    at.add_module(key, torch.nn.Module())
                at = getattr(at, key)
            at.add_module(last, torch_layer(layer, rows))
    return root


ATTENTION, EVERY = ["to_q", "to_k", "to_v", "to_out.0"], ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj"]
PEFT = {
    "lora": (peft.LoraConfig, {"r": 4, "lora_alpha": 6, "init_lora_weights": False}),
    "dora": (peft.LoraConfig, {"r": 4, "lora_alpha": 6, "use_dora": True, "init_lora_weights": False}),
    "lora with biases": (peft.LoraConfig, {"r": 4, "bias": "lora_only", "init_lora_weights": False}),
    "loha": (peft.LoHaConfig, {"r": 4, "alpha": 6, "init_weights": False}),
    "lokr": (peft.LoKrConfig, {"r": 2, "alpha": 6, "decompose_both": True, "init_weights": False}),
    "ia3": (peft.IA3Config, {"feedforward_modules": ["net.0.proj", "to_k"]}),
    "oft": (peft.OFTConfig, {"oft_block_size": 8}),
    "oft by the inverse": (peft.OFTConfig, {"oft_block_size": 8, "use_cayley_neumann": False}),
    "boft": (peft.BOFTConfig, {"boft_block_size": 8}),
}
UNSCALED = ("ia3", "oft", "oft by the inverse", "boft", "lora with biases")  # PEFT knows no strength for them


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("kind", PEFT)
@pytest.mark.filterwarnings("ignore")
def test_peft(kind: str, bits: int | None, tmp_path: Path):
    config, options = PEFT[kind]
    wrapped = peft.get_peft_model(torch_model(make(bits)), config(target_modules=EVERY, **options))
    generator = torch.Generator().manual_seed(1)
    trained = [(name, p) for name, p in wrapped.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for name, p in trained:
            factor = 1 + 0.2 * normal(generator, *p.shape)
            p.copy_(
                p * factor if p.abs().max() > 0 and "lora_" not in name else 0.1 * normal(generator, *p.shape)
            )
            if "magnitude" in name:
                p.copy_(0.6 * factor)
    wrapped.save_pretrained(tmp_path)
    adapter = load(tmp_path, strict=True)
    strengths = (1.0,) if kind in UNSCALED else STRENGTHS[:-1]
    answers = {s: peft_answers(wrapped, s) for s in strengths}
    for strength, references in answers.items():
        check_once(adapter, references, strength, bits)


def peft_answers(wrapped: "torch.nn.Module", strength: float) -> dict[str, np.ndarray]:
    """What each of our layers' parts makes of the same x, one under another."""
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 5, HIDDEN), dtype=np.float32))
    out = {}
    for module in SHAPES:
        own = [wrapped.base_model.model.get_submodule(name) for name in parts(module, True)]
        for layer in own:
            if strength != 1 and hasattr(layer, "set_scale"):
                layer.set_scale("default", strength)
        with torch.no_grad():
            out[module] = np.concatenate([layer(x).numpy() for layer in own], axis=-1)
    return out


def check_once(adapter: Adapter, references: dict, strength: float, bits: int | None) -> None:
    x = mx.array(np.random.default_rng(0).standard_normal((2, 5, HIDDEN), dtype=np.float32))
    model = make(bits)
    plain = {name: np.array(layer(x)) for name, layer in layers(model).items()}
    adapters = Adapters(model)
    assert adapters.add(adapter, strength) == {}
    for _ in range(2):
        for name, layer in layers(model).items():
            assert error(np.array(layer(x)), references[name]) <= TOLERANCE, (name, strength)
            assert error(plain[name], references[name]) > 1e-3
        adapters.fuse()


@pytest.mark.parametrize("bits", [None, 8])
def test_layers_that_peft_trained_whole(bits: int | None, tmp_path: Path):
    config = peft.LoraConfig(
        r=4, target_modules=ATTENTION[:2], modules_to_save=["to_out.0", "net.0.proj"], init_lora_weights=False
    )
    wrapped = peft.get_peft_model(torch_model(make(bits)), config)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "modules_to_save" in name:
                p.add_(0.1 * normal(torch.Generator().manual_seed(2), *p.shape))
    wrapped.save_pretrained(tmp_path)
    adapter = load(tmp_path, strict=True)
    assert adapter.modules.keys() == SHAPES.keys()
    check_once(adapter, peft_answers(wrapped, 1.0), 1.0, bits)


def test_any_name_of_an_adapter():
    """As in a state that was saved without PEFT's help."""
    wrapped = peft.get_peft_model(
        torch_model(make()),
        peft.LoraConfig(r=4, lora_alpha=4, target_modules=EVERY, init_lora_weights=False),
        "style_0",
    )
    state = {
        name: mx.array(t.detach().numpy()) for name, t in wrapped.state_dict().items() if "lora_" in name
    }
    assert all(".style_0." in name for name in state)
    adapter = read(state, {})
    assert adapter.unexpected == []
    wrapped.set_adapter("style_0")
    check_once(adapter, peft_answers(wrapped, 1.0), 1.0, None)
