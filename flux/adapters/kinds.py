"""One module's tensors in a file -> what they change: every kind of adapter, told by which tensors there are.

Formulas are those of the programs that write the files: PEFT, LyCORIS (4.1) and sd-scripts.
"""

from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import mlx.core as mx

from flux.adapters import changes, checks
from flux.adapters.names import Target
from flux.adapters.peft_config import Configs
from flux.errors import FluxError

Roles = dict[str, mx.array]  # the tensors of one target, by what names.py calls them
Reader = Callable[[Target, Roles, Configs], changes.Change]


def read_delta(
    target: Target, roles: Roles, configs: Configs, dora_rule: str, gaps: bool = False
) -> changes.Delta:
    """Takes what it understands out of roles; what is left there has no partner.

    dora_rule: how a `dora_scale` is weighed; gaps: it may be NaN, in rows that are not of a DoRA. FluxError
    for tensors that do not fit each other.
    """
    checks.floats({f"{target.theirs} {role}": t for role, t in roles.items() if role not in NUMBERS})
    scales_all = "ia3_l" in roles  # PEFT scales all that comes out of a layer, its bias too
    change = next((read(target, roles, configs) for needs, read in KINDS if needs <= roles.keys()), None)
    if change is not None:
        checks.size([side or 1 for side in change.shape], target.theirs)
    bias, factor = roles.pop("bias", None), None
    if isinstance(change, changes.LowRank) and "up bias" in roles:
        scaled = change.scale * roles.pop("up bias").astype(mx.float32)
        bias = scaled if bias is None else bias + scaled
    if scales_all and isinstance(change, changes.Scaling) and change.factor.shape[1] == 1:
        factor = change.factor[:, 0]
    magnitude, rule = _magnitude(target, roles, change, dora_rule)
    if magnitude is not None:
        _check_magnitude(target, magnitude, gaps)
    new_bias = roles.pop("new bias", None)
    return changes.Delta(change, bias, magnitude, factor, new_bias, rule)


def _magnitude(
    target: Target, roles: Roles, change: changes.Change | None, rule: str
) -> tuple[mx.array | None, str]:
    """A DoRA's magnitude, (out,) or (1, in) by the shape that the file has, and how it is weighed."""
    role = next((role for role in ("magnitude", "dora_scale") if role in roles), "")
    if change is None or not role:
        return None, changes.PEFT
    found = roles.pop(role)
    rows, columns = change.shape
    rule = changes.PEFT if role == "magnitude" else rule
    if role == "dora_scale" and found.ndim > 1 and found.shape[0] == 1 and found.size == columns:
        return found.reshape(1, -1), rule
    if found.size == rows:  # (out, 1) in ComfyUI's files
        return found.reshape(-1), rule
    raise FluxError(
        f"{target.theirs}: a DoRA scale of shape {tuple(found.shape)}; it should have a value for each of "
        f"{rows} rows or {columns} columns"
    )


def _check_magnitude(target: Target, magnitude: mx.array, gaps: bool) -> None:
    sound = mx.isfinite(magnitude) | (mx.isnan(magnitude) if gaps and magnitude.ndim == 1 else False)
    if not mx.all(sound).item():
        raise FluxError(f"{target.theirs}: a DoRA scale that is NaN or infinite")


def _alpha(target: Target, roles: Roles, rank: int, configs: Configs) -> float:
    """Alpha by the header, else by the tensor beside the matrices, else the rank."""
    beside = roles.pop("alpha", None)
    alpha = configs.alpha(target, rank)
    if alpha is not None:
        return alpha
    return float(rank) if beside is None else checks.scalar(beside, f"{target.theirs}: alpha")


def _matrix(target: Target, tensor: mx.array) -> mx.array:
    """A factor of a linear layer: (n, m), or (n, m, 1, 1) where it was written as a convolution."""
    if tensor.ndim != 2 and tensor.shape[2:] != (1, 1):
        raise FluxError(f"{target.theirs}: a tensor of shape {tuple(tensor.shape)} cannot be a matrix")
    return tensor.reshape(tensor.shape[:2])


def _chain(target: Target, *factors: mx.array) -> None:
    """FluxError for factors of a product that do not fit each other, or of an empty or enormous product."""
    for left, right in pairwise(factors):
        if left.shape[1] != right.shape[0]:
            shapes = " and ".join(str(tuple(factor.shape)) for factor in factors)
            raise FluxError(f"{target.theirs}: matrices {shapes} have no rank in common")
    checks.size((factors[0].shape[0], factors[-1].shape[1]), target.theirs)


# --- Sums and products of factors ---


def _low_rank(target: Target, roles: Roles, configs: Configs) -> changes.LowRank:
    down, up = _matrix(target, roles.pop("down")), _matrix(target, roles.pop("up"))
    if "mid" in roles:  # LyCORIS with Tucker's decomposition
        up = up @ _matrix(target, roles.pop("mid"))
    _chain(target, up, down)
    return changes.LowRank(down, up, _alpha(target, roles, down.shape[0], configs))


def _transposed(target: Target, roles: Roles, configs: Configs) -> changes.LowRank:
    """(in, r) and (r, out), or matrices whose names leave that open."""
    sure = "down transposed" in roles
    suffix = " transposed" if sure else " or transposed"
    a, b = _matrix(target, roles.pop("down" + suffix)), _matrix(target, roles.pop("up" + suffix))
    turned = sure or _is_transposed(a, b)
    roles["down"], roles["up"] = (a.T, b.T) if turned else (a, b)
    return _low_rank(target, roles, configs)


def _is_transposed(down: mx.array, up: mx.array) -> bool:
    """Whether matrices whose names leave it open are (in, r) and (r, out). A square layer allows both: then
    the smaller rank is meant.
    """
    as_is, turned = down.shape[0] == up.shape[-1], down.shape[-1] == up.shape[0]
    return turned and (not as_is or down.shape[-1] < down.shape[0])


def _hadamard(target: Target, roles: Roles, configs: Configs) -> changes.Hadamard:
    factors = [_tucker(target, roles, f"hada_w{i}", f"hada_t{i}") for i in (1, 2)]
    (a1, b1), (a2, b2) = factors
    if (a1.shape[0], b1.shape[1]) != (a2.shape[0], b2.shape[1]):
        raise FluxError(f"{target.theirs}: the two products of a LoHa differ in shape")
    rank = b1.shape[0]
    scale = configs.scale(target)
    alpha = _alpha(target, roles, rank, configs)
    return changes.Hadamard(a1, b1, a2, b2, alpha / rank if scale is None else scale)


def _tucker(target: Target, roles: Roles, name: str, core: str) -> tuple[mx.array, mx.array]:
    """The factors (out, r) and (r, in) of a product; with a core (r, r) the first is (r, out) in the file."""
    a, b = (_matrix(target, roles.pop(f"{name}_{x}")) for x in "ab")
    if core in roles:
        middle = _matrix(target, roles.pop(core))
        _chain(target, a.T, middle, b)
        a = a.T.astype(mx.float32) @ middle.astype(mx.float32)
    _chain(target, a, b)
    return a, b


def _kronecker(target: Target, roles: Roles, configs: Configs) -> changes.Kronecker:
    w1, rank1 = _factor(target, roles, "lokr_w1")
    w2, rank2 = _factor(target, roles, "lokr_w2")
    checks.size((w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1]), target.theirs)
    rank = rank2 or rank1
    alpha = _alpha(target, roles, rank or 1, configs)
    scale = configs.scale(target)  # PEFT scales a product and a plain factor alike
    if scale is None:
        scale = alpha / rank if rank else 1.0
    return changes.Kronecker(w1, w2, scale)


def _factor(target: Target, roles: Roles, name: str) -> tuple[mx.array, int | None]:
    """One factor of a LoKr and its rank where it is a product itself."""
    if name in roles:
        return _matrix(target, roles.pop(name)), None
    a, b = _tucker(target, roles, name, name.replace("_w", "_t"))
    return a.astype(mx.float32) @ b.astype(mx.float32), b.shape[0]


def _glora(target: Target, roles: Roles, configs: Configs) -> changes.GLoRA:
    """W a1 a2 + b1 b2; LyCORIS before 2.0 had the factors of each product in the other order.

    A square layer allows both: then the smaller rank is meant.
    """
    a1, a2, b1, b2 = (_matrix(target, roles.pop(f"glora {name}")) for name in ("a1", "a2", "b1", "b2"))
    if "glora bm" in roles:
        b1 = b1 @ _matrix(target, roles.pop("glora bm"))
    new = {a1.shape[1], a2.shape[0], b1.shape[1], b2.shape[0]}
    old = {a1.shape[0], a2.shape[1], b1.shape[0], b2.shape[1]}
    if len(old) == 1 and (len(new) > 1 or max(old) < max(new)):
        a1, a2, b1, b2 = a2, a1, b2, b1
    _chain(target, a1, a2)
    _chain(target, b1, b2)
    if a1.shape[0] != b2.shape[1] or a2.shape[1] != b2.shape[1]:
        raise FluxError(f"{target.theirs}: the two products of a GLoRA do not fit one layer")
    rank = b2.shape[0]
    return changes.GLoRA(a1, a2, b1, b2, _alpha(target, roles, rank, configs) / rank)


# --- Scalings, whole matrices ---


def _ia3(target: Target, roles: Roles, configs: Configs) -> changes.Scaling:
    """LyCORIS: W (1 + weight), along the rows or, where `on_input`, the columns."""
    role = "weight" if "weight" in roles else "whole weight"
    factor, columns = roles.pop(role).reshape(-1), roles.pop("on_input")
    return changes.Scaling(factor[None] if columns.reshape(-1)[0].item() else factor[:, None])


def _ia3_of_peft(target: Target, roles: Roles, configs: Configs) -> changes.Scaling:
    """PEFT: W ia3_l, (out, 1) or (1, in)."""
    factor = roles.pop("ia3_l")
    if factor.ndim != 2 or 1 not in factor.shape:
        raise FluxError(f"{target.theirs}: ia3_l of shape {tuple(factor.shape)}; one axis should be 1")
    return changes.Scaling(factor.astype(mx.float32) - 1)


def _dense(target: Target, roles: Roles, configs: Configs) -> changes.Dense:
    return changes.Dense(_matrix(target, roles.pop("diff")))


def _replacement(target: Target, roles: Roles, configs: Configs) -> changes.Replacement:
    return changes.Replacement(_matrix(target, roles.pop("whole weight")))


# --- Rotations ---


def _skew(target: Target, blocks: mx.array, axes: int) -> mx.array:
    """Q - Q^T in float32; blocks: square matrices, with so many axes in all."""
    if blocks.ndim != axes or blocks.shape[-1] != blocks.shape[-2]:
        raise FluxError(f"{target.theirs}: blocks of shape {tuple(blocks.shape)} cannot form a rotation")
    checks.size((blocks.shape[-3] * blocks.shape[-1], blocks.shape[-1]), target.theirs)
    blocks = blocks.astype(mx.float32)
    return blocks - blocks.swapaxes(-1, -2)


def _cayley(q: mx.array) -> mx.array:
    """(I + Q) (I - Q)^-1 for skew-symmetric Q (..., b, b): a rotation."""
    eye = mx.eye(q.shape[-1])
    return (eye + q) @ mx.linalg.inv(eye - q, stream=mx.cpu)


def _rotation(target: Target, blocks: mx.array, **more: Any) -> changes.Rotation:
    """blocks (m, n, b, b), computed now: they are small, and come of an inverse."""
    if not mx.all(mx.isfinite(blocks)).item():
        raise FluxError(f"{target.theirs}: rotation blocks too large to form a rotation")
    return changes.Rotation(blocks, **more)


def _constrained(q: mx.array, constraint: float) -> mx.array:
    """Q with its norm over all blocks no larger than the constraint, which is none where 0."""
    norm = mx.linalg.norm(q.reshape(-1))
    return q * mx.minimum(1.0, constraint / (norm + 1e-8)) if constraint > 0 else q


def _oft(target: Target, roles: Roles, configs: Configs) -> changes.Rotation:
    """LyCORIS and sd-scripts: (n, b, b), W' = R^T W in each block of rows; BOFT (m, n, b, b), R W of stages.

    Alpha is the constraint of Q's norm for each row.
    """
    blocks, rescale = roles.pop("oft_blocks"), roles.pop("rescale", None)
    butterfly = blocks.ndim == 4
    q = _skew(target, blocks, 4 if butterfly else 3)
    alpha = roles.pop("alpha", None)
    rows = q.shape[-3] * q.shape[-1]
    limit = 0.0 if alpha is None else checks.scalar(alpha, f"{target.theirs}: alpha")
    rotation = _cayley(_constrained(q, limit * rows))
    if butterfly:
        return _rotation(target, rotation, butterfly=True, rescale=_column(rescale))
    return _rotation(target, rotation.swapaxes(-1, -2)[None], rescale=_column(rescale))


def _oft_parts(target: Target, roles: Roles, configs: Configs) -> changes.Stack:
    """sd-scripts: an OFT for each part of a fused layer."""
    alpha, parts, at = roles.pop("alpha", None), [], 0
    for i in range(4):
        if f"oft_blocks.{i}" in roles:
            part = {"oft_blocks": roles.pop(f"oft_blocks.{i}")} | ({} if alpha is None else {"alpha": alpha})
            change = _oft(target, part, configs)
            rows = change.shape[0] or 0
            parts.append((at, at + rows, changes.Delta(change)))
            at += rows
    return changes.Stack(tuple(parts), at)


def _oft_of_old_lycoris(target: Target, roles: Roles, configs: Configs) -> changes.Rotation:
    """LyCORIS 2: the rotations R themselves, W' = R^T W."""
    blocks = roles.pop("oft_diag").astype(mx.float32)
    _skew(target, blocks, 3)
    return _rotation(target, blocks.swapaxes(-1, -2)[None], rescale=_column(roles.pop("rescale", None)))


def _oft_of_peft(target: Target, roles: Roles, configs: Configs) -> changes.Rotation:
    """PEFT: (n, b (b - 1) / 2), the upper triangles of Q; W' = W R^T in each block of columns."""
    config, upper = configs.of(target), roles.pop("oft_R").astype(mx.float32)
    size = round((1 + (1 + 8 * upper.shape[-1]) ** 0.5) / 2)
    if upper.ndim != 2 or size * (size - 1) // 2 != upper.shape[1] or config.get("block_share"):
        raise FluxError(f"{target.theirs}: an OFT of PEFT of shape {tuple(upper.shape)} that cannot be read")
    rows, columns = zip(*((i, j) for i in range(size) for j in range(i + 1, size)), strict=True)
    q = mx.zeros((upper.shape[0], size, size))
    q[:, mx.array(rows), mx.array(columns)] = upper
    q = q - q.swapaxes(-1, -2)
    if config.get("use_cayley_neumann", True):
        rotation = _neumann(q, int(checks.positive(config.get("num_cayley_neumann_terms", 5), "terms")))
    else:
        rotation = _cayley(-q)
    return _rotation(target, rotation.swapaxes(-1, -2)[None], inner=True)


def _neumann(q: mx.array, terms: int) -> mx.array:
    """PEFT's I + 2 Q + 2 Q^2 + ... + Q^(terms - 1), in place of Cayley's inverse."""
    out = power = mx.eye(q.shape[-1])
    last = 1 if terms <= 2 else max(3, min(terms - 1, 64))
    for i in range(1, last + 1 if terms > 1 else 1):
        power = power @ q
        out = out + (1 if i == last > 1 else 2) * power
    return out


def _boft_of_peft(target: Target, roles: Roles, configs: Configs) -> changes.Rotation:
    """PEFT without its CUDA extension: (1, n, b, b), W' = boft_s (W R^T) in each block of columns."""
    blocks = roles.pop("boft_R")
    if blocks.ndim != 4 or blocks.shape[0] != 1:
        raise FluxError(
            f"{target.theirs}: a BOFT of PEFT with more than one butterfly factor is not supported"
        )
    rotation = _cayley(-_skew(target, blocks, 4) / 2)
    return _rotation(
        target, rotation.swapaxes(-1, -2), inner=True, rescale=_column(roles.pop("boft_s", None))
    )


def _column(rescale: mx.array | None) -> mx.array | None:
    """(out, 1)"""
    return None if rescale is None else rescale.reshape(-1, 1)


def _lokr_needs() -> list[frozenset[str]]:
    """Each factor of a LoKr is whole or a product."""
    ways = [[(f"lokr_w{i}",), (f"lokr_w{i}_a", f"lokr_w{i}_b")] for i in (1, 2)]
    return [frozenset(first + second) for first, second in product(*ways)]


# Which tensors make which kind of change: the first kind whose tensors are all there.
KINDS: tuple[tuple[frozenset[str], Reader], ...] = (
    (frozenset({"down", "up"}), _low_rank),
    (frozenset({"down transposed", "up transposed"}), _transposed),
    (frozenset({"down or transposed", "up or transposed"}), _transposed),
    (frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}), _hadamard),
    *((needs, _kronecker) for needs in _lokr_needs()),
    (frozenset({"glora a1", "glora a2", "glora b1", "glora b2"}), _glora),
    (frozenset({"weight", "on_input"}), _ia3),
    (frozenset({"whole weight", "on_input"}), _ia3),
    (frozenset({"ia3_l"}), _ia3_of_peft),
    (frozenset({"oft_blocks"}), _oft),
    (frozenset({"oft_blocks.0"}), _oft_parts),
    (frozenset({"oft_diag"}), _oft_of_old_lycoris),
    (frozenset({"oft_R"}), _oft_of_peft),
    (frozenset({"boft_R"}), _boft_of_peft),
    (frozenset({"diff"}), _dense),
    (frozenset({"whole weight"}), _replacement),
)
NUMBERS = ("alpha", "on_input")  # what may be of any type
