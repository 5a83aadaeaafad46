"""Split over ranks: time, memory and messages of a step at 1, 2 and 4 ranks, and what to expect of machines.

    python -m benchmarks.distributed [--hidden 768] [--tokens 256] [--json FILE]

The ranks share this machine's processor: times say what splitting costs here, not what it saves over several
machines. For these there is a calculation for FLUX.1-dev, from counted operations and bytes, an assumed link
and an assumed speed of a machine.
"""

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import flux  # noqa: F401  (before mlx.core: it puts OpenBLAS into the process)

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from flux import sampler
from flux.adapters import evaluate
from flux.distributed.ranks import Ranks
from flux.distributed.sharding import shard
from flux.models.transformer import Flux, FluxParams
from flux.weights import tensors

SIZES = (1, 2, 4)
DEPTH = (2, 6)  # of the network that is measured: double blocks, single blocks

# The calculation. Bytes a second and seconds of latency of one hop; both are assumptions.
LINKS = {
    "Thunderbolt 4, ring (TCP)": (2.5e9, 300e-6),
    "Thunderbolt 5, ring (TCP)": (5.0e9, 300e-6),
    "Thunderbolt 5, JACCL (RDMA)": (6.5e9, 30e-6),
}
SPEEDS = {"a Mac at 10 TFLOP/s": 10e12, "a Mac at 25 TFLOP/s": 25e12}  # assumptions, too
SIDES = (512, 1024, 2048)
T5_TOKENS = 512
TEXT = 64  # tokens, in what is measured


def network(hidden: int) -> Flux:
    double, single = DEPTH
    return Flux(
        FluxParams(
            hidden_size=hidden,
            num_heads=hidden // 64,
            axes_dim=(8, 28, 28),
            depth=double,
            depth_single_blocks=single,
        )
    )


def measure(hidden: int, tokens: int, file: Path) -> dict[str, float]:
    """On every rank: seconds of the fastest of three steps, peak bytes of reading and of a step, messages."""
    ranks = Ranks()
    flow = network(hidden)
    flow.load_weights(list(tensors.load([file]).items()))
    shard(flow, ranks)
    mx.reset_peak_memory()
    evaluate(flow)
    mx.eval(flow.parameters())
    read = mx.get_peak_memory()
    rng = np.random.default_rng(0)
    img, txt, y = (mx.array(rng.standard_normal(s, np.float32)) for s in ((tokens, 64), (TEXT, 4096), (768,)))
    positions = flow.positions(sampler.text_positions(TEXT), sampler.image_positions((2, 2 * tokens)))
    [modulation] = flow.modulation(mx.array([0.5]), y[None], mx.array([3.5]))
    text = flow.embed_text(txt[None])
    mx.eval(modulation, text, positions)
    flow.drop_modulation()
    mx.clear_cache()
    mx.reset_peak_memory()
    times = []
    with mock.patch.object(mx.distributed, "all_sum", wraps=mx.distributed.all_sum) as message:
        for _ in range(4):
            ranks.barrier()  # begin together
            start = time.perf_counter()
            mx.eval(flow.denoise(img[None], text, positions, modulation))
            times.append(time.perf_counter() - start)
    sent = [call.args[0].nbytes for call in message.call_args_list]
    return {
        "seconds": min(times[1:]),
        "read": read,
        "step": mx.get_peak_memory(),
        "messages": len(sent) // len(times),
        "bytes": sum(sent) // len(times),
    }


def start(size: int, options: list[str]) -> list[dict[str, float]]:
    """What each of so many ranks measures."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(size)]
    hosts = [[f"127.0.0.1:{each.getsockname()[1]}"] for each in sockets]
    for each in sockets:
        each.close()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "hosts.json").write_text(json.dumps(hosts))
        variables = {"MLX_HOSTFILE": str(Path(folder) / "hosts.json")} if size > 1 else {}
        command = [sys.executable, "-m", "benchmarks.distributed", *options]
        ranks = [
            subprocess.Popen(
                command,
                env=os.environ | variables | {"MLX_RANK": str(rank)},
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            for rank in range(size)
        ]
        return [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]


# --- The calculation for FLUX.1-dev ---


def operations(params: FluxParams, tokens: int) -> float:
    """Of a step's blocks: a token passes 12 h^2 weights in each, at 2 operations, and meets all others."""
    h, blocks = params.hidden_size, params.depth + params.depth_single_blocks
    return blocks * (2 * 12 * h * h * tokens + 4 * tokens * tokens * h)


def expected(params: FluxParams, side: int, size: int, speed: float, link: tuple[float, float]) -> float:
    """Seconds a step. A ring sends 2 (n-1) parts of 1/n of the message, one after the other."""
    tokens = (side // 16) ** 2 + T5_TOKENS
    messages = 2 * params.depth + params.depth_single_blocks
    bandwidth, latency = link
    hops = 2 * (size - 1)
    message = tokens * params.hidden_size * 2  # bfloat16
    return operations(params, tokens) / speed / size + messages * hops * (
        message / size / bandwidth + latency
    )


def show_expected() -> None:
    params = FluxParams()
    print("\nFLUX.1-dev in bfloat16, seconds a step (calculated, nothing of it was run)")
    names = "".join(f"{f'{side}x{side}':>14}{'2':>8}{'4':>8}" for side in SIDES)
    print(f"{'picture, and machines: 1, 2, 4':<52}{names}")
    for machine, speed in SPEEDS.items():
        for name, link in LINKS.items():
            row = ""
            for side in SIDES:
                one, two, four = (expected(params, side, size, speed, link) for size in (1, 2, 4))
                row += f"{one:>14.2f}{two:>8.2f}{four:>8.2f}"
            print(f"{machine + ', ' + name:<52}{row}")
    for side in SIDES:
        tokens = (side // 16) ** 2 + T5_TOKENS
        message = tokens * params.hidden_size * 2
        count = 2 * params.depth + params.depth_single_blocks
        # A split pays as soon as what is sent takes less time than what is saved: (1 - 1/n) of the step.
        needed = count * message / operations(params, tokens) * 2
        print(
            f"{side}x{side}: {operations(params, tokens) / 1e12:.0f} TFLOP and {count} messages of "
            f"{message / 1e6:.1f} MB a step; pays where the link brings more than "
            f"{needed * 1e12 / 1e9:.3f} GB/s for each TFLOP/s of a machine"
        )


COLUMNS = ("ranks", "step", "to 1 rank", "peak, reading", "to weights", "peak, step", "messages", "sent")


def show(rows: dict[int, list[dict[str, float]]], size: int, total: int) -> str:
    """A line of the table: of the slowest and the fullest rank."""
    most = {name: max(row[name] for row in rows[size]) for name in rows[size][0]}
    alone = rows[1][0]["seconds"]
    cells = (
        f"{size}",
        f"{most['seconds']:.2f} s",
        f"{most['seconds'] / alone:.2f} x",
        f"{most['read'] / 1e6:.0f} MB",
        f"{most['read'] / total:.2f}",
        f"{most['step'] / 1e6:.0f} MB",
        f"{most['messages']}",
        f"{most['bytes'] / 1e6:.1f} MB",
    )
    return " ".join(f"{cell:>13}" for cell in cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=768, help="width, a multiple of 256 (default: 768)")
    parser.add_argument("--tokens", type=int, default=256, help="of the picture (default: 256)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.hidden, args.tokens, args.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "flux.safetensors"
        weights = dict(tree_flatten(network(args.hidden).parameters()))
        mx.save_safetensors(str(file), weights)
        total = sum(weight.nbytes for weight in weights.values())
        del weights
        print(
            f"{DEPTH[0]} double and {DEPTH[1]} single blocks of {args.hidden}: {total / 1e6:.0f} MB, float32,"
        )
        print(f"{args.tokens} + {TEXT} tokens, over the ring; {os.cpu_count()} cores, {platform.machine()}")
        print(" ".join(f"{name:>13}" for name in COLUMNS))
        rows = {}
        for size in SIZES:
            options = [f"--hidden={args.hidden}", f"--tokens={args.tokens}", f"--measure={file}"]
            rows[size] = start(size, options)
            print(show(rows, size, total), flush=True)
    show_expected()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
