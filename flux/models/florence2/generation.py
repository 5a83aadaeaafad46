"""Beam search for Florence-2's answers, with the results of transformers' `generate`.

The network gives each row's best continuations; choosing among them is a matter of a few numbers a picture,
and is done in plain Python. Greedy search is beam search with one beam.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from flux.errors import FluxError
from flux.models.florence2.model import Florence2


@dataclass(frozen=True)
class GenerationParams:
    """How answers are searched; the defaults are those of Florence-2's checkpoints.

    max_new_tokens: an answer's length at most, its start and end tokens included.
    no_repeat_ngram_size: no run of so many tokens comes twice in an answer; 0 allows it.
    length_penalty: an answer's score is its log probability / length ** length_penalty: more than 0 favours
    long ones.
    early_stopping: a picture is done with num_beams finished answers. Otherwise only when its best open
    beam, were it to end now, would score no more than any of them.
    forced_bos_token_id, forced_eos_token_id: the first token, and the last one of an answer cut for its
    length.
    """

    num_beams: int = 3
    max_new_tokens: int = 1024
    no_repeat_ngram_size: int = 3
    length_penalty: float = 1.0
    early_stopping: bool = True
    decoder_start_token_id: int = 2
    eos_token_id: int = 2
    forced_bos_token_id: int | None = 0
    forced_eos_token_id: int | None = 2

    def __post_init__(self):
        if self.num_beams < 1:
            raise FluxError(f"{self.num_beams} beams; at least 1 is needed")
        if self.max_new_tokens < 2:
            raise FluxError(f"answers of {self.max_new_tokens} tokens; the start and end tokens alone are 2")

    @property
    def prefix(self) -> list[int]:
        """What every answer starts with: the decoder's start token, and a forced one."""
        forced = [] if self.forced_bos_token_id is None else [self.forced_bos_token_id]
        return [self.decoder_start_token_id, *forced]


@dataclass(frozen=True)
class Beam:
    """An answer or its beginning: its log probability, and its tokens from the decoder's start token on."""

    score: float
    tokens: list[int]


class Search:
    """The search for one picture's answer.

    open: the beams that go on, best first; none where the search is over. finished: the answers that ended,
    best first, num_beams at most, their scores divided for their length.
    """

    def __init__(self, params: GenerationParams):
        self.params = params
        self.open = [Beam(0.0, params.prefix)]
        self.finished: list[Beam] = []

    def advance(self, continuations: list[list[tuple[float, int]]]) -> list[int]:
        """Takes every open beam's best continuations, (log probability, token) each.

        Gives the open beams' origins: beam i now goes on from what was beam origins[i].
        """
        count = self.params.num_beams
        grown = [
            (Beam(beam.score + log_prob, [*beam.tokens, token]), origin)
            for origin, beam in enumerate(self.open)
            for log_prob, token in continuations[origin]
        ]
        grown.sort(key=lambda pair: -pair[0].score)
        # Twice as many as there are beams: were the best to end here, all of them, as many would be left to
        # go on.
        grown = grown[: 2 * count]
        self._finish([beam for beam, _ in grown[:count] if self._ends(beam)])
        going_on = [(beam, origin) for beam, origin in grown if not self._ends(beam)][:count]
        if going_on and self._is_over(going_on[0][0]):
            going_on = []
        self.open = [beam for beam, _ in going_on]
        return [origin for _, origin in going_on]

    def answer(self) -> list[int]:
        """The tokens of the best finished answer, without the decoder's start token."""
        return self.finished[0].tokens[1:]

    def _ends(self, beam: Beam) -> bool:
        return beam.tokens[-1] == self.params.eos_token_id or len(beam.tokens) > self.params.max_new_tokens

    def _finish(self, ended: list[Beam]) -> None:
        self.finished += [Beam(self._score(beam), beam.tokens) for beam in ended]
        self.finished.sort(key=lambda beam: -beam.score)
        del self.finished[self.params.num_beams :]

    def _is_over(self, best: Beam) -> bool:
        """Whether no open beam, `best` being the best of them, can change what is finished."""
        if len(self.finished) < self.params.num_beams:
            return False
        # Greedy search takes what it finds: there is no second beam to wait for.
        if self.params.early_stopping or self.params.num_beams == 1:
            return True
        return self._score(best) <= self.finished[-1].score

    def _score(self, beam: Beam) -> float:
        return beam.score / (len(beam.tokens) - 1) ** self.params.length_penalty


def generate(
    model: Florence2,
    pixels: mx.array,
    tokens: mx.array,
    prompt_mask: mx.array | None = None,
    params: GenerationParams | None = None,
) -> list[list[int]]:
    """Answers to prompts about pictures: the tokens of each, from its start token to its end token.

    pixels (B, H, W, 3), tokens (B, L), prompt_mask (B, L) as in `Florence2.encode`. Pictures whose search is
    over leave the batch.
    """
    params = params or GenerationParams()
    language = model.language_model
    cache = language.cache(*model.encode(pixels, tokens, prompt_mask))
    searches = [Search(params) for _ in range(pixels.shape[0])]
    going_on = searches
    while going_on:
        rows = [beam.tokens for search in going_on for beam in search.open]
        step = mx.array([row[cache.length :] for row in rows])  # the whole prefix, then a token at a time
        logits = language.logits(language.decode(step, cache)[:, -1])
        continuations = best_continuations(logits, rows, params)
        origins: list[int] = []
        start = 0
        for search in going_on:
            end = start + len(search.open)
            origins += [start + origin for origin in search.advance(continuations[start:end])]
            start = end
        cache.select(origins, [i for i, search in enumerate(going_on) if search.open])
        going_on = [search for search in going_on if search.open]
    return [search.answer() for search in searches]


def best_continuations(
    logits: mx.array, rows: list[list[int]], params: GenerationParams
) -> list[list[tuple[float, int]]]:
    """Each row's best next tokens as (log probability, token), best first: two for every beam.

    logits (R, vocabulary); rows: the tokens so far, of equal length.
    """
    if len(rows[0]) == params.max_new_tokens and params.forced_eos_token_id is not None:
        return [[(0.0, params.forced_eos_token_id)] for _ in rows]
    logits = logits.astype(mx.float32)
    log_probs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    banned = [
        (row, token) for row, seen in enumerate(rows) for token in repeats(seen, params.no_repeat_ngram_size)
    ]
    if banned:
        at_rows, at_tokens = mx.array(banned).T
        log_probs[at_rows, at_tokens] = -mx.inf
    count = min(2 * params.num_beams, logits.shape[-1])
    tokens = mx.argpartition(-log_probs, kth=count - 1, axis=-1)[:, :count]
    values = mx.take_along_axis(log_probs, tokens, axis=-1)
    found: Any = (values.tolist(), tokens.tolist())  # MLX types a list's items as anything
    return [sorted(zip(*row, strict=True), reverse=True) for row in zip(*found, strict=True)]


def repeats(tokens: list[int], size: int) -> list[int]:
    """The tokens that would complete a run of `size` tokens that these already hold."""
    if size == 0:
        return []
    ending = tokens[len(tokens) - size + 1 :]
    starts = range(len(tokens) - size + 1)
    return [tokens[start + size - 1] for start in starts if tokens[start : start + size - 1] == ending]
