"""What a tokenizer's file says, checked before a text is read with it.

An id beyond the rows of a network's embedding reads memory beyond the table; `size` of the
tokenizers says how many rows they need.
"""

from collections.abc import Mapping
from typing import Any

from flux import jsonfiles
from flux.errors import FluxError
from flux.jsonfiles import shown

MAX_ID = 2**24  # the largest vocabularies have 260,000 pieces


def ids(value: Any, what: str) -> dict[str, int]:
    """A vocabulary, piece -> id. FluxError, naming what it is, for other things than ids from 0."""
    if not isinstance(value, dict) or not value:
        raise FluxError(f"{what} should be an object of pieces and their ids, not {shown(value)}")
    for piece, number in value.items():
        if type(number) is not int or not 0 <= number <= MAX_ID:
            raise FluxError(
                f"{what}: the id of {shown(piece)} is {shown(number)}; it should be a number from 0"
            )
    return value


def merges(value: Any, what: str) -> list[str]:
    """Merges as "left right"; a file has them so, or as lists of the two."""
    pairs = [pair if isinstance(pair, str) else _pair(pair, what) for pair in _list(value, what)]
    if wrong := [shown(pair) for pair in pairs if pair.count(" ") != 1]:
        raise FluxError(f"{what}: {wrong[0]} should be two pieces with a space between them")
    return pairs


def _pair(pair: Any, what: str) -> str:
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(piece, str) for piece in pair):
        raise FluxError(f"{what}: {shown(pair)} should be two pieces")
    return " ".join(pair)


def added(tokenizer: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
    """The tokens that a tokenizer.json adds to its model's, each with `content` and `id`."""
    tokens = _list(tokenizer.get("added_tokens", []), f"{what}: added_tokens")
    for token in tokens:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not token["content"]:
            raise FluxError(f"{what}: the added token {shown(token)} should have content and id")
        ids({token["content"]: token.get("id")}, what)
    return tokens


def model(tokenizer: Mapping[str, Any], kind: str, what: str) -> Mapping[str, Any]:
    """The model of a tokenizer.json; FluxError where it is of another kind than "BPE" or "Unigram"."""
    found = tokenizer.get("model")
    if isinstance(found, dict) and found.get("type") == kind:
        return found
    found_kind = found.get("type") if isinstance(found, dict) else found
    raise FluxError(f"{what}; its model is {shown(found_kind)}, expected {kind}")


def pieces(value: Any, what: str) -> list[tuple[str, float]]:
    """A Unigram model's pieces with their log probabilities, in the order of their ids."""
    out = []
    for piece in _list(value, what):
        if not isinstance(piece, list) or len(piece) != 2 or not isinstance(piece[0], str):
            raise FluxError(f"{what}: {shown(piece)} should be a piece and its score")
        out.append((piece[0], jsonfiles.number(piece[1], f"{what}: the score of {shown(piece[0])}")))
    if not out:
        raise FluxError(f"{what} holds no pieces")
    return out


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise FluxError(f"{what} should be a list, not {shown(value)}")
    return value
