"""What a request can be refused for: a status and one sentence."""

from typing import Any

from flux.errors import FluxError


class Problem(FluxError):
    """A refusal with its HTTP status; a plain FluxError is answered with 422."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


def bad(sentence: str) -> Problem:
    """400: the request itself is not one that can be answered."""
    return Problem(400, sentence)


def absent(sentence: str) -> Problem:
    """404: what is asked for is not there."""
    return Problem(404, sentence)


def conflict(sentence: str) -> Problem:
    """409: it does not go with what there is already."""
    return Problem(409, sentence)


def too_large(sentence: str) -> Problem:
    """413: it is larger than the server takes."""
    return Problem(413, sentence)


def wrong(sentence: str) -> Problem:
    """422: a value is not what it should be."""
    return Problem(422, sentence)


def too_many(sentence: str) -> Problem:
    """429: the server has enough to do."""
    return Problem(429, sentence)


def sentence_of(errors: list[Any]) -> str:
    """What is wrong with a request, in one line."""
    lines = []
    for each in errors[:5]:
        where = ".".join(str(part) for part in each["loc"] if part not in ("body", "query", "path"))
        lines.append(f"{where}: {each['msg']}" if where else each["msg"])
    text = "; ".join(lines) + ("; and more" if len(errors) > 5 else "")
    return text.encode("ascii", "backslashreplace").decode()[:1000]
