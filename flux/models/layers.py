"""The parts of the Flux transformer, smallest first. Attribute names are those of the BFL checkpoint."""

import math
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import mlx.core as mx
import mlx.nn as nn

NORM_EPS = 1e-6  # of every norm in the transformer; MLX's default is 1e-5
FLOAT16_MAX = 65504.0


def fused(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """A chain of elementwise operations as one kernel on a GPU, where memory traffic is what it costs.

    On a CPU it runs as it is: there `mx.compile` calls a C++ compiler, seconds a function on the first run.
    """
    compiled = mx.compile(function)

    @wraps(function)
    def call(*arrays: mx.array) -> mx.array:
        on_gpu = mx.default_device().type == mx.gpu
        return compiled(*arrays) if on_gpu else function(*arrays)

    return call


# Of exponents: it moves no value by more than 1e-34 |x|, and an infinite exp would make a gradient NaN.
BOUND = 80


@cache
def is_x86() -> bool:
    """Whether the CPU, which must be the default device, is one of Intel's or AMD's."""
    return mx.device_info(mx.default_device()).get("architecture") in ("x86_64", "AMD64")


def _exp(x: mx.array) -> mx.array:
    """e^x, of x up to BOUND, float32.

    On an x86 CPU MLX's exp takes 12 ns a number, as it calls libm's fma for each multiplication, its power 4;
    power is also the more exact one: within 4e-7 of e^x, as a share, for |x| < 10 (exp: 5e-7).
    """
    x = mx.minimum(x, BOUND)
    return mx.power(math.e, x) if mx.default_device().type == mx.cpu and is_x86() else mx.exp(x)


def silu(x: mx.array) -> mx.array:
    """x sigmoid(x), computed in float32; returns x's type."""
    out: Any = _silu_with_gradient(x)  # MLX types a custom function as object
    return out


@mx.custom_function  # its gradient is written out below, for the time that it takes on a CPU
def _silu_with_gradient(x: mx.array) -> mx.array:
    return _silu(x)


@fused
def _silu(x: mx.array) -> mx.array:
    h = x.astype(mx.float32)
    return (h / (1 + _exp(-h))).astype(x.dtype)


@_silu_with_gradient.vjp
def _silu_vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    return _silu_gradient(*mx.depends([x], [cotangent]), cotangent)


@fused
def _silu_gradient(x: mx.array, cotangent: mx.array) -> mx.array:
    """With s = sigmoid(x): s (1 + x (1 - s)) times the cotangent, in x's type."""
    h = x.astype(mx.float32)
    s = 1 / (1 + _exp(-h))
    return (cotangent * (s * (1 + h * (1 - s)))).astype(x.dtype)


# The argument of exp in GELU is x (GELU_1 + GELU_3 x^2).
GELU_1 = -2 * math.sqrt(2 / math.pi)
GELU_3 = 0.044715 * GELU_1


def gelu(x: mx.array) -> mx.array:
    """GELU in its tanh form, 0.5 x (1 + tanh u), u = sqrt(2/pi) (x + 0.044715 x^3) (Hendrycks & Gimpel 2016).

    Written as x / (1 + exp(-2u)), the same function with one exp, cheaper than a tanh on a CPU. Computed in
    float32, as in the reference; returns x's type.
    """
    out: Any = _gelu_with_gradient(x)  # MLX types a custom function as object
    return out


@mx.custom_function  # its gradient is written out below
def _gelu_with_gradient(x: mx.array) -> mx.array:
    return _gelu(x)


@fused
def _gelu(x: mx.array) -> mx.array:
    h = x.astype(mx.float32)
    minus_2u = h * (GELU_1 + GELU_3 * (h * h))
    return (h / (1 + _exp(minus_2u))).astype(x.dtype)


@_gelu_with_gradient.vjp
def _gelu_vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    # `depends`: else a compiled step would keep the float32 steps of the way forward, twice as wide as x.
    return _gelu_gradient(*mx.depends([x], [cotangent]), cotangent)


@fused
def _gelu_gradient(x: mx.array, cotangent: mx.array) -> mx.array:
    """With s = 1 / (1 + exp(-2u)): s (1 - x (1 - s) d(-2u)/dx) times the cotangent, in x's type.

    Written out because it is half of a large step's memory otherwise.
    """
    h = x.astype(mx.float32)
    square = h * h
    s = 1 / (1 + _exp(h * (GELU_1 + GELU_3 * square)))
    slope = s * (1 - h * (1 - s) * (GELU_1 + 3 * GELU_3 * square))
    return (slope * cotangent).astype(x.dtype)


def clip_float16(x: mx.array) -> mx.array:
    """Bounds float16 activations to finite values: an infinity would become NaN in the next norm."""
    return mx.clip(x, -FLOAT16_MAX, FLOAT16_MAX) if x.dtype == mx.float16 else x


# torch's float32 exp (MKL's) is within 0.52 units in the last place: of these 128 values it rounds two, which
# lie at 0.48 units, up. A unit of a frequency is 2e-4 radians at guidance 3.5, and 30 times what all other
# rounding moves the model's output by at guidance 30.
_ROUNDED_UP = {(256, 10000.0): (12, 106)}


def embedding_frequencies(dim: int, max_period: float) -> mx.array:
    """The dim / 2 frequencies exp(-ln(max_period) i / (dim / 2)), float32, the reference's to the bit.

    BFL's and diffusers' code computes the exponents in float32; up to 4e-7 of a frequency hang on that.
    """
    half = dim // 2
    exponents: Any = (mx.arange(half, dtype=mx.float32) * -math.log(max_period) / half).tolist()
    frequencies = [math.exp(exponent) for exponent in exponents]
    for i in _ROUNDED_UP.get((dim, max_period), ()):
        frequencies[i] *= 1 + 2**-24
    return mx.array(frequencies, dtype=mx.float32)


def sinusoidal_embedding(x: mx.array, dim: int = 256, max_period: float = 10000.0) -> mx.array:
    """Cosines and sines of x at dim / 2 frequencies, from 1 down to 1 / max_period: (...) -> (..., dim)."""
    angles = x.astype(mx.float32)[..., None] * embedding_frequencies(dim, max_period)
    return mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)


def rotary_tables(ids: mx.array, axes_dim: tuple[int, ...], theta: float) -> mx.array:
    """Rotary position tables (Su et al. 2021), one share of the head's size for each position axis.

    ids (B, L, axes) -> (2, B, 1, L, sum(axes_dim) / 2) in float32: cosines and sines.
    """
    angles = []
    for axis, dim in enumerate(axes_dim):
        frequencies = mx.array([theta ** (-i / dim) for i in range(0, dim, 2)], dtype=mx.float32)
        angles.append(ids[..., axis, None].astype(mx.float32) * frequencies)
    angle = mx.concatenate(angles, axis=-1)[:, None]  # (B, 1, L, D/2): the same for every head
    return mx.stack([mx.cos(angle), mx.sin(angle)])


@fused
def rotate(x: mx.array, pe: mx.array) -> mx.array:
    """Turns each pair (x[2i], x[2i+1]) by its angle, in float32. x (B, H, L, D) keeps its shape and type."""
    cos, sin = pe
    h = x.astype(mx.float32)
    a, b = h[..., 0::2], h[..., 1::2]  # (B, H, L, D/2) each
    turned = mx.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)  # (B, H, L, D/2, 2)
    return turned.flatten(-2).astype(x.dtype)


# What attention is: q, k, v and rotary tables -> (B, L, H*D).
Attend = Callable[[mx.array, mx.array, mx.array, mx.array], mx.array]


def attention(q: mx.array, k: mx.array, v: mx.array, pe: mx.array) -> mx.array:
    """Attention over all tokens with rotary positions. q, k, v (B, H, L, D) -> (B, L, H*D)."""
    out = mx.fast.scaled_dot_product_attention(rotate(q, pe), rotate(k, pe), v, scale=q.shape[-1] ** -0.5)
    return out.swapaxes(1, 2).flatten(2)


def modulate(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
    """LayerNorm without weights, then modulation's scale and shift. x (B, L, C); shift, scale (B, 1, C)."""
    return mx.fast.layer_norm(x, None, None, NORM_EPS) * (1 + scale) + shift


class GELU(nn.Module):
    """`gelu` as a layer. x of any shape."""

    def __call__(self, x: mx.array) -> mx.array:
        return gelu(x)


def mlp(hidden_size: int, mlp_size: int) -> list[nn.Module]:
    """The feed-forward layers as a list, because the checkpoint numbers them: 0 and 2 have weights."""
    return [nn.Linear(hidden_size, mlp_size), GELU(), nn.Linear(mlp_size, hidden_size)]


def hidden_activations(x: mx.array, layers: list[nn.Module], shift: mx.array, scale: mx.array) -> mx.array:
    """What the last layer of an `mlp` is given for x (B, L, C); shift, scale (B, 1, C)."""
    h = modulate(x, shift, scale)
    for layer in layers[:-1]:
        h = layer(h)
    return h


class MLPEmbedder(nn.Module):
    """Brings time, guidance or the pooled text to the hidden size. (..., in_dim) -> (..., hidden_size)."""

    def __init__(self, in_dim: int, hidden_size: int):
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.out_layer(silu(self.in_layer(x)))


class ModulationLayer(nn.Module):
    """`count` vectors (shift, scale, gate, ...) side by side. silu(vec) (..., C) -> (..., 1, count*C).

    Called outside the blocks: the vectors do not depend on the picture, so they are made once for all steps.
    """

    def __init__(self, hidden_size: int, count: int):
        super().__init__()
        self.lin = nn.Linear(hidden_size, count * hidden_size)

    def __call__(self, silu_vec: mx.array) -> mx.array:
        return self.lin(silu_vec)[..., None, :]  # one token wide: it broadcasts over the sequence


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis (Zhang & Sennrich 2019). (..., dim) keeps its shape."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = mx.ones((dim,))

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.scale, NORM_EPS)


class QKNorm(nn.Module):
    """Keeps queries and keys at unit mean square in each head, so that attention scores stay bounded."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)
        self.head_dim = head_dim

    def split_heads(self, qkv: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """(B, L, 3*H*D) -> normalised q, normalised k and v, each (B, H, L, D)."""
        # The number of heads comes from the tensor: a sharded layer has only its share of them.
        heads = qkv.reshape(*qkv.shape[:2], 3, -1, self.head_dim)  # (B, L, 3, H, D)
        q, k, v = heads.transpose(2, 0, 3, 1, 4)  # 3 x (B, H, L, D)
        return self.query_norm(q), self.key_norm(k), v


class SelfAttention(nn.Module):
    """The attention layers of one stream of a double block; the attention itself is joint, in the block."""

    def __init__(self, hidden_size: int, head_dim: int, qkv_bias: bool):
        super().__init__()
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        self.norm = QKNorm(head_dim)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def heads(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """(B, L, C) -> q, k, v, each (B, H, L, D)."""
        return self.norm.split_heads(self.qkv(x))


class DoubleStreamBlock(nn.Module):
    """Text and picture have separate weights and meet in one joint attention, text first."""

    attend = staticmethod(attention)  # training replaces it

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int, qkv_bias: bool):
        super().__init__()
        head_dim = hidden_size // num_heads
        self.img_mod = ModulationLayer(hidden_size, 6)
        self.img_attn = SelfAttention(hidden_size, head_dim, qkv_bias)
        self.img_mlp = mlp(hidden_size, mlp_size)
        self.txt_mod = ModulationLayer(hidden_size, 6)
        self.txt_attn = SelfAttention(hidden_size, head_dim, qkv_bias)
        self.txt_mlp = mlp(hidden_size, mlp_size)

    def __call__(
        self,
        txt: mx.array,
        img: mx.array,
        pe: mx.array,
        txt_mod: mx.array,
        img_mod: mx.array,
        attend: Attend | None = None,
    ) -> tuple[mx.array, mx.array]:
        """txt (B, Lt, C), img (B, Li, C), pe from `rotary_tables`, *_mod (B, 1, 6*C) -> new txt, new img.

        attend: takes the place of attention, if given. Vectors *_mod may be those of each token, (B, L, 6*C).

        The order of the arguments is that of their use: so a checkpointed call adds up gradients in the same
        order as a plain one, and both give the same bits.
        """
        txt_shift, txt_scale, txt_gate, *txt_rest = mx.split(txt_mod, 6, axis=-1)
        img_shift, img_scale, img_gate, *img_rest = mx.split(img_mod, 6, axis=-1)
        txt_qkv = self.txt_attn.heads(modulate(txt, txt_shift, txt_scale))
        img_qkv = self.img_attn.heads(modulate(img, img_shift, img_scale))
        # q, k and v of both: (B, H, Lt+Li, D)
        q, k, v = (mx.concatenate([t, i], axis=2) for t, i in zip(txt_qkv, img_qkv, strict=True))
        txt_out, img_out = mx.split((attend or self.attend)(q, k, v, pe), [txt.shape[1]], axis=1)
        txt_out, img_out = self.last_layers(self.txt_attn.proj, self.img_attn.proj, txt_out, img_out)
        txt, img = txt + txt_gate * txt_out, img + img_gate * img_out
        txt_shift, txt_scale, txt_gate = txt_rest
        img_shift, img_scale, img_gate = img_rest
        txt_hidden = hidden_activations(txt, self.txt_mlp, txt_shift, txt_scale)
        img_hidden = hidden_activations(img, self.img_mlp, img_shift, img_scale)
        txt_out, img_out = self.last_layers(self.txt_mlp[-1], self.img_mlp[-1], txt_hidden, img_hidden)
        return clip_float16(txt + txt_gate * txt_out), clip_float16(img + img_gate * img_out)

    def last_layers(
        self, txt_layer: nn.Module, img_layer: nn.Module, txt: mx.array, img: mx.array
    ) -> tuple[mx.array, mx.array]:
        """The layers that attention and MLP end with. A method, so that what must act on both streams at
        once, such as a sum over machines, can replace it."""
        return txt_layer(txt), img_layer(img)


class SingleStreamBlock(nn.Module):
    """Text and picture as one sequence; attention and feed-forward side by side (Dehghani et al. 2023)."""

    attend = staticmethod(attention)

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int):
        super().__init__()
        self.linear1 = nn.Linear(hidden_size, 3 * hidden_size + mlp_size)  # qkv and the MLP's first layer
        self.linear2 = nn.Linear(hidden_size + mlp_size, hidden_size)  # attention's and the MLP's last layer
        self.norm = QKNorm(hidden_size // num_heads)
        self.modulation = ModulationLayer(hidden_size, 3)
        self.qkv_share = (3 * hidden_size, 3 * hidden_size + mlp_size)

    def __call__(self, x: mx.array, pe: mx.array, mod: mx.array, attend: Attend | None = None) -> mx.array:
        """x (B, Lt+Li, C), pe from `rotary_tables`, mod (B, 1 or Lt+Li, 3*C) -> x's shape.

        attend: as in `DoubleStreamBlock`.
        """
        shift, scale, gate = mx.split(mod, 3, axis=-1)
        h = self.linear1(modulate(x, shift, scale))
        part, whole = self.qkv_share  # a ratio, not a width: a sharded linear1 gives less of both
        qkv, hidden = mx.split(h, [h.shape[-1] * part // whole], axis=-1)
        attended = (attend or self.attend)(*self.norm.split_heads(qkv), pe)
        return clip_float16(x + gate * self.linear2(mx.concatenate([attended, gelu(hidden)], axis=-1)))


class LastLayer(nn.Module):
    """Norm with shift and scale, and projection to the packed latent's channels."""

    def __init__(self, hidden_size: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, out_channels)
        self.adaLN_modulation = [nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size)]

    def shift_and_scale(self, silu_vec: mx.array) -> mx.array:
        """silu(vec) (..., C) -> (..., 1, 2*C). The SiLU in the list only keeps the checkpoint's numbering."""
        return self.adaLN_modulation[1](silu_vec)[..., None, :]

    def __call__(self, x: mx.array, mod: mx.array) -> mx.array:
        """x (B, Li, C), mod (B, 1, 2*C) -> (B, Li, out_channels)."""
        shift, scale = mx.split(mod, 2, axis=-1)
        return self.linear(modulate(x, shift, scale))
