"""A run's trained model as a folder in diffusers' layout.

python -m flux.recipes.tiny.export --run tiny-run --output flux/assets/tiny
"""

import sys
from dataclasses import replace

from flux import known_words
from flux.arguments import run_program
from flux.distributed.ranks import Ranks
from flux.pipeline import FluxPipeline
from flux.recipes.arguments import export_folders
from flux.weights.save import Model, save_diffusers


def main() -> int:
    """Run the program; its exit status: 0, 2 for bad input, 130 when interrupted."""
    return run_program(run)


def run(ranks: Ranks) -> int:
    """Write the model that the pipeline has left in the run's folder, with the words that it knows."""
    run, output = export_folders(__doc__)
    trained = FluxPipeline(str(run / "model"))
    spec = replace(trained.spec, name="tiny")
    tokenizers = (trained.checkpoint.clip_tokenizer, trained.checkpoint.t5_tokenizer)
    save_diffusers(output, Model(trained.flow, trained.ae, trained.clip, trained.t5, *tokenizers, spec))
    known = known_words.read(run / "model")
    if known is not None:
        known.write(output)
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
