"""A captioner: pictures and a task in, answers out."""

from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
from PIL import Image

from flux.captioning.tasks import Answer, Task
from flux.captioning.tokenizer import BartTokenizer
from flux.errors import FluxError
from flux.models.florence2 import Florence2, GenerationParams, generate
from flux.preprocessing import PictureParams, params_of, prepare
from flux.weights import florence2

MOST_BEAMS = 100


@dataclass
class Captioner:
    """Florence-2 with all that belongs to it. generation: how answers are searched; may be replaced."""

    model: Florence2
    tokenizer: BartTokenizer
    pictures: PictureParams
    generation: GenerationParams

    @classmethod
    def from_folder(cls, folder: str | Path, dtype: mx.Dtype) -> "Captioner":
        """Reads a checkpoint's folder, transformers' or Microsoft's. Raises FluxError for a faulty one."""
        folder = Path(folder)
        model, tokenizer = florence2.load(folder, dtype), BartTokenizer.from_folder(folder)
        generation = florence2.generation_params(folder)
        _check_ids(folder, model, tokenizer, generation)
        return cls(model, tokenizer, picture_params(folder), generation)

    def search(self, beams: int | None = None, max_tokens: int | None = None) -> None:
        """Changes how answers are searched: with so many beams, for so many tokens at most.

        None stands for the checkpoint's, within what the network can write. FluxError beyond that.
        """
        known, limit = self.generation, self.model.language_model.max_tokens
        if max_tokens is not None and max_tokens > limit:
            raise FluxError(f"answers of {max_tokens} tokens; the captioner writes {limit} at most")
        if beams is not None and beams > MOST_BEAMS:
            raise FluxError(f"a search with {beams} beams; {MOST_BEAMS} are the most")
        self.generation = replace(
            known,
            num_beams=known.num_beams if beams is None else beams,
            max_new_tokens=min(known.max_new_tokens, limit) if max_tokens is None else max_tokens,
        )

    def answers(self, images: list[Image.Image], task: Task, texts: list[str] | None = None) -> list[Answer]:
        """What the task finds in each picture. texts: what it needs besides, one a picture.

        Positions in the answers are pixels of the pictures as they were given.
        """
        texts = texts or [""] * len(images)
        tokens, mask = self.tokenizer([task.ask(text) for text in texts])
        written = generate(self.model, prepare(images, self.pictures), tokens, mask, self.generation)
        decoded = [self.tokenizer.decode(answer) for answer in written]
        return [task.answer(text, image.size) for text, image in zip(decoded, images, strict=True)]


def _check_ids(
    folder: Path, model: Florence2, tokenizer: BartTokenizer, generation: GenerationParams
) -> None:
    """FluxError where the tokenizer or the search has a token that the network's embedding has no row for."""
    rows = model.language_model.shared.weight.shape[0]
    if tokenizer.size > rows:
        raise FluxError(f"{folder}: its tokenizer has {tokenizer.size} tokens, the network {rows}")
    for name, token in vars(generation).items():
        if name.endswith("token_id") and token is not None and token >= rows:
            raise FluxError(
                f"{folder / 'generation_config.json'}: {name} is {token}; there are {rows} tokens"
            )


def picture_params(folder: Path) -> PictureParams:
    """What preprocessor_config.json, or the newer processor_config.json, says; else Florence-2's."""
    combined = florence2.read_json(folder, "processor_config.json").get("image_processor", {})
    config = florence2.read_json(folder, "preprocessor_config.json") or combined
    return params_of(config, PictureParams(), str(folder))
