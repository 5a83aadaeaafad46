"""What the server costs: pictures a minute beside the pipeline alone, and /status while a training runs.

    python -m benchmarks.server [--pictures 12] [--statuses 300] [--json FILE]

Both make the same pictures with the built-in model, loaded already, in turn: so that what else the machine
does concerns both alike. The server is a process of its own, asked over HTTP on loopback.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import flux  # noqa: F401  (before mlx.core, so that OpenBLAS is there first)

# isort: split
import httpx
from PIL import Image

from flux.pipeline import FluxPipeline

ROOT = Path(__file__).parents[1]
PROMPT = "a red apple on a blue background"


def start(folder: Path) -> tuple[subprocess.Popen, httpx.Client]:
    """The server in a folder, and a client of it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MOUNT_PATH": str(folder)}
    words = [sys.executable, "-m", "flux.server", "--port", "0", "--model", "tiny"]
    process = subprocess.Popen(words, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    found = next(found for line in process.stderr if (found := re.search(r"http://[\d.]+:\d+", line)))
    return process, httpx.Client(base_url=found[0], timeout=600, trust_env=False)


def pictures(client: httpx.Client, count: int) -> dict[str, float]:
    """Median seconds of a picture, alone and of the server, which take turns."""
    pipeline = FluxPipeline("tiny")
    seconds: dict[str, list[float]] = {"alone": [], "server": []}
    for seed in range(-1, count):
        begin = time.perf_counter()
        pipeline.generate_images(PROMPT, seed=seed + 1)
        middle = time.perf_counter()
        body = {"prompt": PROMPT, "seed": seed + 1}
        client.post("/v1/images/generations", json=body).raise_for_status()
        if seed >= 0:  # the first loads the models
            seconds["alone"].append(middle - begin)
            seconds["server"].append(time.perf_counter() - middle)
    return {name: statistics.median(values) for name, values in seconds.items()}


def statuses(client: httpx.Client, folder: Path, count: int) -> dict[str, float]:
    """Median and 99th percentile of the seconds to /status's first byte, while a training runs."""
    images = folder / "flux_train" / "datasets" / "set"
    images.mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 0, 0)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text("sks thing")
    config = {"output_name": "set", "resolution": 64}
    client.post("/create-dataset-config", json=config).raise_for_status()
    request = {"output_name": "set", "pretrained_model": "tiny", "iterations": 100_000}
    run = client.post("/train", json=request).raise_for_status().json()["run_id"]
    while not client.get(f"/jobs/{run}").json()["iteration"]:
        time.sleep(0.1)
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        with client.stream("GET", f"/status/{run}") as answer:
            next(answer.iter_raw())
        seconds.append(time.perf_counter() - begin)
        time.sleep(0.01)
    client.post(f"/jobs/{run}/cancel").raise_for_status()
    while client.get(f"/jobs/{run}").json()["state"] == "running":
        time.sleep(0.1)
    return {"median": statistics.median(seconds), "p99": statistics.quantiles(seconds, n=100)[98]}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--statuses", type=int, default=300)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        process, client = start(Path(name))
        try:
            made = pictures(client, args.pictures)
            asked = statuses(client, Path(name), args.statuses)
        finally:
            process.terminate()
            process.wait()
    for who, seconds in made.items():
        print(f"pictures, {who:8} {60 / seconds:7.1f} a minute")
    print(f"the server takes {100 * (made['server'] / made['alone'] - 1):+.1f} % of a picture's time")
    print(f"/status while a training runs: {1e3 * asked['median']:.1f} ms, p99 {1e3 * asked['p99']:.1f} ms")
    if args.json:
        args.json.write_text(json.dumps({"picture_seconds": made, "status_seconds": asked}, indent=1))


if __name__ == "__main__":
    main()
