"""Trains an autoencoder and a flow transformer from nothing, as a config says.

    python -m flux.training.pretrain CONFIG [--validate-pipeline] [--resume]
    mlx.launch -n 2 --backend ring -- python -m flux.training.pretrain CONFIG

A run may be killed at any moment; with --resume it goes on to the result that it would have had.
"""

import argparse
import sys
from pathlib import Path

from flux.distributed.ranks import Ranks
from flux.errors import FluxError
from flux.training.pretrain.config import ConfigError
from flux.training.pretrain.run import Run
from flux.training.pretrain.validate import load


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flux.training.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="a YAML, TOML or JSON file")
    parser.add_argument(
        "--validate-pipeline", action="store_true", help="check the config and name its faults"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint")
    arguments = parser.parse_args()
    try:
        config = load(arguments.config)
        if arguments.validate_pipeline:
            for number, step in enumerate(config.steps, 1):
                print(f"{number}. {step.name}: trains {', '.join(sorted(step.trained))}")
            return 0
        ranks = Ranks()
        with ranks.waiting(None):
            run = Run(config, arguments.resume)
            result = run.execute()
            ranks.barrier()  # until rank 0 has written everything
        if run.first:
            print(result)
    except ConfigError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    except FluxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
