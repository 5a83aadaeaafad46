"""Small vocabularies for small models: CLIP's byte-level BPE and T5's SentencePiece, trained on captions."""

import io
import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import regex
import sentencepiece

from flux.tokenizers import CLIPTokenizer, byte_letters


def train_clip(captions: Iterable[str], merges: int) -> tuple[dict[str, int], list[str]]:
    """Merges the most frequent pair of pieces, again and again (Sennrich et al., 2016), up to `merges` times.

    Returns the vocabulary, piece -> id, and the merges in order of priority, as `CLIPTokenizer` takes them.
    All 256 bytes are in the vocabulary, so that any text can be encoded.
    """
    letters = byte_letters()
    counts = Counter(word for text in captions for word in regex.findall(CLIPTokenizer.WORD, text.lower()))
    words = {word: _bytes(word, letters) for word in counts}
    learned: list[tuple[str, str]] = []
    while len(learned) < merges:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in words.items():
            for pair in pairwise(pieces):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))  # ties by name, so that every run agrees
        learned.append(best)
        words = {word: _merge(pieces, best) for word, pieces in words.items()}
    pieces = sorted(letters) + [letter + "</w>" for letter in sorted(letters)] + ["".join(m) for m in learned]
    vocab = {
        piece: i for i, piece in enumerate(dict.fromkeys([*pieces, CLIPTokenizer.BOS, CLIPTokenizer.EOS]))
    }
    return vocab, [" ".join(merge) for merge in learned]


def _bytes(word: str, letters: list[str]) -> list[str]:
    pieces = [letters[byte] for byte in word.encode("utf-8")]
    return [*pieces[:-1], pieces[-1] + "</w>"]


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def save_clip(vocab: dict[str, int], merges: list[str], folder: Path) -> None:
    """vocab.json and merges.txt, as a `tokenizer/` folder has them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def train_t5(captions: Iterable[str], size: int, file: Path) -> None:
    """Writes a unigram model (Kudo, 2018) with T5's special tokens: padding 0, end 1, unknown 2.

    SentencePiece takes as a candidate only what occurs in two different words. Every word is therefore shown
    with an "s" as well, so that whole words can become pieces.
    """
    captions = list(captions)
    plurals = sorted({word + "s" for text in captions for word in text.split()})
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*captions, *plurals]),
        model_writer=model,
        vocab_size=size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(model.getvalue())
