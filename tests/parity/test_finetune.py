"""A step of LoRA training beside diffusers and PEFT: same weights, noise and times, same gradients."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")

from flux import sampler  # noqa: E402
from flux.adapters import Adapter, Adapters, Delta, LowRank, targets  # noqa: E402
from flux.models.transformer import Flux, FluxParams  # noqa: E402
from flux.training import losses, optimizers  # noqa: E402
from flux.training.flow_matching import FlowLoss  # noqa: E402
from flux.training.gradient_checkpointing import checkpoint_blocks  # noqa: E402
from flux.training.trainer import sample_key  # noqa: E402
from flux.weights import keymaps  # noqa: E402

from .test_adapters import HEADS, HIDDEN, SIZES, randomize, relative_error  # noqa: E402

TOLERANCE = 1e-4
RANK, ALPHA, RATE, DECAY = 4, 6, 1e-3, 0.01
LOSS = FlowLoss(shift_factor=0.1, scale_factor=0.4)
LAYERS = (  # every linear layer of the blocks, as diffusers names them
    r"(?:single_)?transformer_blocks\.\d+\.(?:attn\.(?:to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    r"|ff(?:_context)?\.net\.(?:0\.proj|2)|proj_mlp|proj_out|norm\.linear|norm1(?:_context)?\.linear)"
)


class Model(nn.Module):
    def __init__(self, flow: Flux):
        super().__init__()
        self.flow = flow


def reference_model(guidance: bool) -> "diffusers.FluxTransformer2DModel":
    torch.set_num_threads(1)
    model = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=SIZES["depth"],
        num_single_layers=SIZES["depth_single_blocks"],
        attention_head_dim=HIDDEN // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=48,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=SIZES["axes_dim"],
    )
    randomize(model, 0)
    return model


def ours_of(reference: "torch.nn.Module", guidance: bool) -> Flux:
    shape = {"in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 48}
    params = FluxParams(hidden_size=HIDDEN, num_heads=HEADS, guidance_embed=guidance, **shape, **SIZES)
    model = Flux(params)
    tensors = {name: mx.array(p.detach().float().numpy()) for name, p in reference.state_dict().items()}
    model.load_weights(list(keymaps.from_diffusers(keymaps.TRANSFORMER, tensors).items()))
    return model


def parts(names: list[str]) -> dict[str, list[str]]:
    """Our layers and the diffusers layers that each of them is made of."""
    return {name: keymaps.find_theirs(keymaps.TRANSFORMER, name)[1] for name in names}


def add_lora(reference: "torch.nn.Module", layers: dict[str, list[str]]) -> None:
    """Random LoRAs, up included. The parts of what is one layer for us share one down matrix, as ours do."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LAYERS, init_lora_weights=False)
    reference.add_adapter(config)
    randomize(reference, 2, only="lora_")
    for first, *others in layers.values():
        for name in others:
            reference.get_submodule(name).lora_A = reference.get_submodule(first).lora_A


def lora_of(reference: "torch.nn.Module", layers: dict[str, list[str]], value) -> dict[str, np.ndarray]:
    """PEFT's matrices, or what `value` makes of each parameter, under our names."""
    out = {}
    for ours, names in layers.items():
        modules = [reference.get_submodule(name) for name in names]
        out[f"{ours}.down"] = value(modules[0].lora_A["default"].weight)
        out[f"{ours}.up"] = np.concatenate([value(m.lora_B["default"].weight) for m in modules])
    return out


def lora_of_ours(tree: dict) -> dict[str, np.ndarray]:
    names = {path: path.replace("flow.", "", 1).replace(".shares.0.layer", "") for path, _ in tree}
    return {names[path]: np.array(value) for path, value in tree}


def make_batch(size: tuple[int, int]) -> dict[str, mx.array]:
    rng = np.random.default_rng(7)
    normal = lambda *shape: mx.array(rng.standard_normal(shape).astype(np.float32))  # noqa: E731
    return {
        "mean": normal(2, *size, 4),
        "logvar": normal(2, *size, 4),
        "t5": normal(2, 5, 48),
        "clip": normal(2, 32),
        "is_reg": mx.zeros(2),
        "keys": mx.stack([sample_key(3, i) for i in range(2)]),
        "times": mx.array([0.125, 0.75]),  # a thousandfold, they are the same in float32 and in float64
    }


def loss_of_reference(reference, batch: dict[str, mx.array], guidance: bool) -> "torch.Tensor":
    x0, noise, times = LOSS._draw(batch)
    size = x0.shape[1:3]
    tensor = lambda array: torch.from_numpy(np.array(array)).double()  # noqa: E731
    velocity = reference(
        hidden_states=tensor(sampler.pack(losses.noised(x0, noise, times))),
        encoder_hidden_states=tensor(batch["t5"]),
        pooled_projections=tensor(batch["clip"]),
        timestep=tensor(times),
        img_ids=tensor(sampler.image_positions(size)[0]),
        txt_ids=torch.zeros(5, 3).double(),
        guidance=torch.full((2,), LOSS.guidance).double() if guidance else None,
    ).sample
    return ((velocity - tensor(sampler.pack(noise - x0))) ** 2).mean()


@pytest.mark.parametrize(
    ("size", "guidance", "checkpoint"), [((4, 6), True, False), ((6, 2), False, False), ((2, 8), True, True)]
)
def test_gradients_and_one_update(size, guidance, checkpoint):
    reference = reference_model(guidance).double()  # so that what is measured is our rounding, not its own
    flow = ours_of(reference, guidance)
    layers = parts(targets(flow, "blocks"))
    add_lora(reference, layers)
    before = lora_of(reference, layers, lambda p: p.detach().float().numpy())
    changes = {
        name: LowRank(mx.array(before[f"{name}.down"]), mx.array(before[f"{name}.up"]), ALPHA)
        for name in layers
    }
    adapters = Adapters(flow)
    adapters.add(
        Adapter({name: Delta(change) for name, change in changes.items()}), name="new", trainable=True
    )
    adapters.freeze_all_but("new")
    model, batch = Model(flow), make_batch(size)
    if checkpoint:
        checkpoint_blocks(flow)

    (loss, _), gradients = nn.value_and_grad(model, LOSS)(model, batch, mx.random.key(0))
    expected = loss_of_reference(reference, batch, guidance)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours = lora_of_ours(tree_flatten(gradients))
    theirs = slopes = lora_of(reference, layers, lambda p: p.grad.numpy())
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2 * len(layers)
    for name in theirs:
        assert relative_error(ours[name], theirs[name]) <= TOLERANCE, name

    optimizers.make("adamw", lambda step: mx.array(RATE), DECAY).update(model, gradients)
    trained = {p for p in reference.parameters() if p.requires_grad}
    torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY).step()
    ours = lora_of_ours(tree_flatten(model.trainable_parameters()))
    theirs = lora_of(reference, layers, lambda p: p.detach().numpy())
    for name in theirs:
        # Adam's first step goes by the sign alone: where a gradient is only rounding, either is right.
        sure = np.abs(slopes[name]) > 1e-5 * np.abs(slopes[name]).max()
        assert sure.mean() > 0.9
        a, b = ours[name][sure], theirs[name][sure]
        assert relative_error(a, b) <= TOLERANCE, name
        assert relative_error(a - before[name][sure], b - before[name][sure]) <= 1e-3, name
