"""What every rank runs, in one start: split networks beside whole ones, faults, and txt2image.py.

Arguments: a folder that has a folder for each rank to work in, and txt2image.py's arguments, a JSON list of
lists. Leaves a report0.json, report1.json, ... there, with how the scripts ended among the rest.
"""

import io
import json
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest import mock

import flux  # (before mlx.core: it puts OpenBLAS into the process)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

import txt2image
from flux import adapters, sampler
from flux.adapters import Adapter, Adapters, Delta, Dense, Kronecker, LowRank
from flux.adapters.beside import linear_shape
from flux.adapters.changes import GLoRA, Hadamard, Rotation, Scaling
from flux.adapters.lora import linears
from flux.distributed import ranks as processes
from flux.distributed.fsdp import fully_shard
from flux.distributed.gradients import average_gradients
from flux.distributed.ranks import Ranks
from flux.distributed.sharding import shard
from flux.errors import FluxError
from flux.models.nag import Nag, NagAttention, join_vectors
from flux.models.t5 import T5Encoder
from flux.models.transformer import Flux
from flux.step_cache import StepCache
from flux.weights import tensors
from flux.weights.quantize import quantize
from tests import tiny

# Five heads and an MLP of 640 = 5 * 128: no number of ranks divides them.
FLUX = replace(tiny.FLUX, hidden_size=160, num_heads=5)
T5 = replace(tiny.T5, d_model=64, num_heads=5, d_ff=160)
NAMES = (
    *("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_attn.proj", "double_blocks.1.img_mlp.0"),
    *("double_blocks.1.img_mlp.2", "double_blocks.1.txt_mlp.2", "single_blocks.0.linear1"),
    *("single_blocks.1.linear2", "single_blocks.2.modulation.lin", "img_in"),
)
ODD = {"guidance_embed": False, "qkv_bias": False, "mlp_ratio": 3.7}
T5_NAMES = [
    *(f"encoder.block.1.layer.0.SelfAttention.{name}" for name in "qkvo"),
    *(f"encoder.block.1.layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
]


def make_flux(**changes) -> Flux:
    return tiny.randomize(Flux(replace(FLUX, **changes)), 0)


def make_t5() -> T5Encoder:
    return tiny.randomize(T5Encoder(T5), 1)


def run_flux(network: Flux) -> mx.array:
    """The velocity of a batch of two, in one call."""
    rng = np.random.default_rng(5)
    img, txt, y = (mx.array(rng.standard_normal(s, np.float32)) for s in ((2, 24, 16), (2, 7, 48), (2, 32)))
    ids, txt_ids = sampler.image_positions((8, 12)), sampler.text_positions(7)
    return network(img, ids, txt, txt_ids, mx.array([0.9, 0.3]), y, mx.array([3.5, 1.0]))


def run_nag(network: Flux) -> mx.array:
    """The velocity with two prompts of different lengths."""
    rng = np.random.default_rng(5)
    shapes = ((1, 24, 16), (1, 9, 48), (2, 1, 32))
    img, txt, y = (mx.array(rng.standard_normal(shape, np.float32)) for shape in shapes)
    both = [network.modulation(mx.array([0.9]), pooled, mx.array([3.5]))[0] for pooled in y]
    pe = network.positions(sampler.text_positions(9), sampler.image_positions((8, 12)))
    attend = NagAttention(Nag(5, tau=1.2), (4, 5), network.over_heads)
    vectors = join_vectors(*both, (4, 5), 24)
    return network.denoise(img, network.embed_text(txt), pe, vectors, attend=attend)


def run_t5(network: T5Encoder) -> mx.array:
    return network(mx.array(np.random.default_rng(6).integers(0, T5.vocab_size, (2, 9))))


def random_adapter(network: nn.Module, names: tuple[str, ...] | list[str], kind: str) -> Adapter:
    """A change of each of the layers, with a bias where the layer has one."""
    rng = np.random.default_rng(7)

    def normal(*shape: int) -> mx.array:
        return 0.1 * mx.array(rng.standard_normal(shape, np.float32))

    modules = {}
    for name in names:
        layer = linears(network)[name]
        rows, columns = linear_shape(layer)
        if kind == "lokr":
            change = Kronecker(normal(4, 2), normal(rows // 4, columns // 2), 0.7)
        elif kind == "dense":
            change = Dense(normal(rows, columns))
        elif kind == "loha":
            change = Hadamard(normal(rows, 3), normal(3, columns), normal(rows, 3), normal(3, columns), 9.0)
        elif kind == "glora":
            change = GLoRA(normal(columns, 3), normal(3, columns), normal(rows, 3), normal(3, columns), 9.0)
        elif kind == "ia3":
            change = Scaling(normal(1, columns))
        elif kind == "oft":
            change = Rotation(mx.eye(2) + normal(1, rows // 2, 2, 2))
        else:
            change = LowRank(normal(4, columns), normal(rows, 4), 2.0)
        magnitude = mx.abs(normal(rows)) + 0.5 if kind == "dora" else None
        if kind == "dora of columns":
            magnitude = mx.abs(normal(1, columns)) + 0.5
        modules[name] = Delta(change, normal(rows) if "bias" in layer else None, magnitude)
    return Adapter(modules)


def adapted(network: nn.Module, *kinds: str, fuse: bool = False) -> nn.Module:
    own = Adapters(network)
    names = NAMES if isinstance(network, Flux) else T5_NAMES
    for kind in kinds:
        own.add(random_adapter(network, names, kind), 0.8, kind, strict=True)
    if fuse:
        own.fuse()
    return network


def from_file(network: Flux, ranks: Ranks, folder: Path) -> Flux:
    """The network with lazy weights, as a checkpoint's."""
    path = folder.parent / f"flux.{ranks.rank}.safetensors"
    tensors.save(path, dict(tree_flatten(network.parameters())))
    network.load_weights(list(tensors.load([path]).items()))
    return network


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], mx.array]]] = {
    "transformer": (make_flux, run_flux),
    "no guidance, no qkv bias, an odd mlp": (lambda: make_flux(**ODD), run_flux),
    "transformer of 4 bits": (lambda: quantize(make_flux(), 4, 32), run_flux),
    "transformer of mxfp4": (lambda: quantize(make_flux(), 4, 32, "mxfp4"), run_flux),
    "lora": (lambda: adapted(make_flux(), "lora"), run_flux),
    "lora on 4 bits": (lambda: adapted(quantize(make_flux(), 4, 32), "lora"), run_flux),
    "lora in the weights": (lambda: adapted(make_flux(), "lora", fuse=True), run_flux),
    "then 8 bits": (lambda: quantize(adapted(make_flux(), "lora", fuse=True), 8, 32), run_flux),
    "dora, lokr and dense": (lambda: adapted(make_flux(), "dora", "lokr", "dense"), run_flux),
    "other kinds on 8 bits": (
        lambda: adapted(quantize(make_flux(), 8, 32), "loha", "glora", "ia3", "oft", "dora of columns"),
        run_flux,
    ),
    "nag": (make_flux, run_nag),
    "t5": (make_t5, run_t5),
    "t5 of 4 bits with lora": (lambda: adapted(quantize(make_t5(), 4, 32), "lora"), run_t5),
}


def error(a: mx.array, b: mx.array) -> float:
    return (mx.linalg.norm((a - b).flatten()) / mx.linalg.norm(b.flatten())).item()


# What is run where the ranks are two or four; three, which divide nothing here, run all.
FEW = ("transformer", "transformer of 4 bits", "lora", "lora in the weights", "t5")


def compare(ranks: Ranks) -> dict[str, float]:
    """The relative error of each case's split network."""
    errors = {}
    for name in CASES if ranks.size == 3 else FEW:
        make, run = CASES[name]
        whole = run(make())
        network = make()
        shard(network, ranks)
        errors[name] = error(run(network), whole)
    return errors


WIDE = replace(FLUX, hidden_size=192, num_heads=12, axes_dim=(4, 6, 6), depth=4, depth_single_blocks=12)


def cached(ranks: Ranks) -> list:
    """A split network's steps by a cache, beside a whole's: blocks saved of each, and the relative error.

    And how many are saved where the first rank would compute all steps, and the others none.
    """
    networks = [make_flux(), make_flux()]
    shard(networks[1], ranks)
    results = []
    for network in networks:
        cache = StepCache(HIGHEST)
        results.append((run_cached(network, cache), cache.count.saved))
    unlike = StepCache(HIGHEST if ranks.rank else 0)
    mx.eval(run_cached(networks[1], unlike))
    (whole, saved), (split, saved_split) = results
    return [saved, saved_split, error(split, whole), unlike.count.saved]


HIGHEST = 1e9  # a threshold that no step reaches


def run_cached(network: Flux, cache: StepCache) -> mx.array:
    """The velocity in the last of five steps, of which a cache with that threshold computes the first two."""
    rng = np.random.default_rng(5)
    img, txt, y = (mx.array(rng.standard_normal(s, np.float32)) for s in ((1, 24, 16), (1, 7, 48), (1, 32)))
    times = [1.0, 0.8, 0.6, 0.5, 0.4]
    pe = network.positions(sampler.text_positions(7), sampler.image_positions((8, 12)))
    for t, vectors in zip(times, network.modulation(mx.array(times), y, mx.array([3.5])), strict=True):
        v = cache.denoise(network, "", t, 24, False, img, network.embed_text(txt), pe, vectors)
    return v


def memory(ranks: Ranks, folder: Path, divide: Callable[[Flux, Ranks], None]) -> dict[str, float]:
    """Bytes of a network of 50 MB: whole, what every rank has of it, and this rank's peak while it reads."""
    network = from_file(tiny.randomize(Flux(WIDE), 0), ranks, folder)
    total = size_of(network)
    embedders = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in")
    last = network.final_layer.linear if divide is shard else network.final_layer
    replicated = sum(size_of(network[name]) for name in embedders) + size_of(last)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    divide(network, ranks)
    adapters.evaluate(network)
    mx.eval(network.parameters())
    return {"total": total, "replicated": replicated, "peak": mx.get_peak_memory() - before}


def size_of(network: nn.Module) -> int:
    return sum(array.nbytes for _, array in tree_flatten(network.parameters()))


def fully_sharded(ranks: Ranks) -> list[bool]:
    """Whether networks whose weights are gathered layer by layer give what whole ones do, to the bit."""
    same = []
    for name in ("transformer", "transformer of mxfp4", "lora on 4 bits"):
        make, run = CASES[name]
        network = make()
        whole = run(network)
        mx.eval(whole)
        fully_shard(network, ranks)
        same.append(mx.array_equal(run(network), whole).item())
    return same


def messages(ranks: Ranks) -> dict[str, int]:
    """How many sums one call of the transformer takes, and how many gathers its modulation."""
    network = make_flux()
    shard(network, ranks)
    counts = {}
    for name in ("all_sum", "all_gather"):
        with mock.patch.object(mx.distributed, name, wraps=getattr(mx.distributed, name)) as function:
            mx.eval(run_flux(network))
        counts[name] = function.call_count
    return counts


def faults(ranks: Ranks) -> dict[str, str]:
    """What is said to every rank of what goes wrong on one or on all."""
    said = {}

    def note(name: str, call: Callable[[], object]) -> None:
        try:
            call()
            said[name] = ""
        except FluxError as error:
            said[name] = str(error)

    def work() -> None:
        if ranks.rank == ranks.size - 1:
            raise FluxError("no such file")

    note("on all ranks", lambda: ranks.on_all_ranks(work))
    note("map", lambda: list(ranks.map(lambda _: work() or mx.zeros((1,)), range(5))))
    note("agree", lambda: ranks.agree({"weights": "ab", "size": str(ranks.rank)}))
    note("agree on all", lambda: ranks.agree({"weights": "ab"}))
    cut = quantize(Flux(replace(FLUX, hidden_size=320, num_heads=10)), 4, 64)  # heads of 32
    note("group", lambda: ranks.on_all_ranks(lambda: shard(cut, ranks)))
    other = "0.0" if ranks.rank == 1 else flux.__version__
    with mock.patch.object(processes, "__version__", other):
        note("version", Ranks)
    note("heads", lambda: shard(make_flux(hidden_size=32, num_heads=1), ranks))
    return said


def dealt(ranks: Ranks) -> list:
    """Five items of different lengths: 10 times the item, and who worked on it."""
    items = ranks.map(lambda i: mx.full((i, 2), 10 * i + ranks.rank, mx.uint8), range(1, 6))
    return [item.tolist() for item in items]


def scripts(ranks: Ranks, folder: Path, commands: list[list[str]]) -> list[tuple[int, str, str]]:
    """Status, output and errors of txt2image.py with each of the arguments, run in the rank's folder."""
    os.chdir(folder)
    ended = []
    for arguments in commands:
        out, err = io.StringIO(), io.StringIO()
        argv = mock.patch.object(sys, "argv", ["txt2image.py", *arguments])
        with argv, warnings.catch_warnings(), redirect_stdout(out), redirect_stderr(err):
            status = txt2image.main()
        ended.append((status, out.getvalue(), err.getvalue()))
    return ended


def main() -> None:
    ranks = Ranks()
    folder = Path(sys.argv[1]) / f"rank{ranks.rank}"
    gradients = {"a": mx.full((2, 3), ranks.rank, mx.float32), "b": [mx.full((4,), 1, mx.bfloat16)]}
    mean = average_gradients(ranks.group)(gradients)
    report = {
        "errors": compare(ranks),
        "cached": cached(ranks),
        "memory": [memory(ranks, folder, divide) for divide in (shard, fully_shard)],
        "fully_sharded": fully_sharded(ranks),
        "faults": faults(ranks),
        "dealt": dealt(ranks),
        "mean": [mean["a"].tolist(), mean["b"][0].tolist(), str(mean["b"][0].dtype)],
        "messages": messages(ranks),
        "scripts": scripts(ranks, folder, json.loads(sys.argv[2])),
    }
    (folder.parent / f"report{ranks.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
