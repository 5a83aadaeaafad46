"""What a picture is called in one epoch: sd-scripts' rules for prefixes, dropout, wildcards and tags."""

import re

import numpy as np

from flux.data.schema import Subset


def compose(text: str, options: Subset, epoch: int, rng: np.random.Generator) -> str:
    """The caption of a sample whose caption file (or class) says `text`, in the epoch (from 0).

    Prefix and suffix -> dropout -> wildcard -> split, keep, shuffle, drop tags -> join with ", ". All chance
    comes from `rng`. `caption_dropout_every_n_epochs = n` drops the n-th, 2n-th, ... epoch's captions. A text
    that is neither shuffled nor thinned out is left as it was written, with all its paragraphs; wildcards
    draw one of its lines.
    """
    if _dropped(options, epoch, rng):
        return ""
    line = _wild(text, options, rng) if options.enable_wildcard else _framed(text, options)
    kept_apart = options.keep_tokens_separator and options.keep_tokens_separator in line
    if not (options.shuffle_caption or options.caption_tag_dropout_rate or kept_apart):
        return line
    head, middle, tail = _parts(line, options)
    if options.shuffle_caption:
        middle = [middle[i] for i in rng.permutation(len(middle))]
    if options.caption_tag_dropout_rate:
        middle = [tag for tag in middle if rng.random() >= options.caption_tag_dropout_rate]
    return ", ".join([*head, *middle, *tail])


def _wild(text: str, options: Subset, rng: np.random.Generator) -> str:
    """One of the text's lines with its wildcards replaced."""
    lines = [line for line in text.split("\n") if line.strip()] or [""]
    return _expanded(_framed(_pick(lines, rng), options), rng)


def _framed(line: str, options: Subset) -> str:
    """A text with its prefix and suffix."""
    return " ".join(part for part in (options.caption_prefix, line.strip(), options.caption_suffix) if part)


def _dropped(options: Subset, epoch: int, rng: np.random.Generator) -> bool:
    # The draw comes first: an epoch without captions must not shift the draws of the others.
    by_chance = options.caption_dropout_rate > 0 and rng.random() < options.caption_dropout_rate
    every = options.caption_dropout_every_n_epochs
    return by_chance or (every > 0 and (epoch + 1) % every == 0)


def _expanded(line: str, rng: np.random.Generator) -> str:
    """`{a|b}` becomes a or b; `{{` and `}}` stand for braces."""

    def replace(match: re.Match) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        return _pick(match[1].split("|"), rng)

    return re.sub(r"\{\{|\}\}|\{([^{}]+)\}", replace, line)


def _pick(items: list[str], rng: np.random.Generator) -> str:
    return items[int(rng.integers(len(items)))]


def _parts(line: str, options: Subset) -> tuple[list[str], list[str], list[str]]:
    """A caption's tags: those kept at the front, those that may move or fall out, those kept at the end."""
    separator = options.keep_tokens_separator
    if separator and separator in line:
        head, middle, tail = (*line.split(separator, 2), "")[:3]
        return _tags(head, options), _tags(middle, options), _tags(tail, options)
    tags = _tags(line, options)
    return tags[: options.keep_tokens], tags[options.keep_tokens :], []


def _tags(text: str, options: Subset) -> list[str]:
    return [tag.strip() for tag in text.split(options.caption_separator) if tag.strip()]
