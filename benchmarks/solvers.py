"""How near to the exact solution each solver comes, by evaluations of the network.

    python -m benchmarks.solvers [--model tiny] [--prompts 8] [--schedules model beta karras]

The exact solution stands for what 200 steps of Heun's solver give; printed is the PSNR of the pictures to it,
over all prompts. An evaluation is one pass of the prompt's, with true guidance two.
"""

from dataclasses import replace

import flux  # noqa: F401  (before mlx.core, so that OpenBLAS is there first)

# isort: split
import numpy as np

from flux import generation, solvers
from flux.arguments import described
from flux.encoding import Encoded
from flux.pipeline import FluxPipeline
from flux.requests import Request

PROMPTS = (
    *("a red apple on a blue background", "a dog face on a green background"),
    *("a small rocket on the left of a black background", "a penguin on a red background"),
    *("a banana on a white background", "a small key on the right of an orange background"),
    *("a cat face on a pink background", "a strawberry and a lemon on a black background"),
)
EXACT = 200  # steps
EVALUATIONS = (4, 6, 8, 12, 16, 20, 28)


def main() -> None:
    """Print the tables, one a schedule."""
    parser = described(__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many pictures")
    parser.add_argument("--schedules", nargs="*", default=["model", "beta", "karras"])
    args = parser.parse_args()
    pipeline = FluxPipeline(args.model)
    requests = [Request(prompt, (i,)).resolved(pipeline) for i, prompt in enumerate(PROMPTS[: args.prompts])]
    encoded = generation.encode(pipeline, requests)
    exact = draw(pipeline, requests, encoded, "heun", EXACT, "model")
    for schedule in args.schedules:
        print(f"\n{schedule}: dB to the exact picture, by evaluations")
        print("| solver |" + "".join(f" {n} |" for n in EVALUATIONS))
        print("|---" * (len(EVALUATIONS) + 1) + "|")
        for solver in solvers.SOLVERS:
            row = []
            for evaluations in EVALUATIONS:
                steps = (evaluations + 1) // 2 if solver == "heun" else evaluations
                row.append(psnr(draw(pipeline, requests, encoded, solver, steps, schedule), exact))
            print(f"| {solver} |" + "".join(f" {value:.1f} |" for value in row), flush=True)


def draw(
    pipeline: FluxPipeline,
    requests: list[generation.ResolvedRequest],
    encoded: Encoded,
    solver: str,
    steps: int,
    schedule: str,
) -> np.ndarray:
    """The pictures (N, H, W, 3), uint8."""
    changed = [replace(r, solver=solver, steps=steps, schedule=schedule) for r in requests]
    latents = generation.denoise(pipeline, changed, encoded)
    return np.concatenate(
        [generation.decode(pipeline, r, [x]) for r, x in zip(changed, latents, strict=True)]
    )


def psnr(pictures: np.ndarray, exact: np.ndarray) -> float:
    """In dB, of all pictures together."""
    error = np.mean((pictures.astype(np.float64) - exact) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-10)))


if __name__ == "__main__":
    main()
