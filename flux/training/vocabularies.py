"""Small vocabularies for small models, trained on captions: byte-level BPE as CLIP and BART have it, and T5's
SentencePiece.
"""

import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import regex
import sentencepiece

from flux import outputs
from flux.captioning.tokenizer import FLORENCE_TOKENS, BartTokenizer
from flux.tokenizers import CLIPTokenizer, byte_letters

BART_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # the last one after all pieces
IMAGE_TOKEN = "<image>"  # in transformers a picture's features replace it


def train_clip(captions: Iterable[str], merges: int) -> tuple[dict[str, int], list[str]]:
    """Merges the most frequent pair of pieces, again and again (Sennrich et al., 2016), up to `merges` times.

    Returns the vocabulary, piece -> id, and the merges in order of priority, as `CLIPTokenizer` takes them.
    All 256 bytes are in the vocabulary, so that any text can be encoded.
    """
    letters = byte_letters()
    counts = Counter(word for text in captions for word in regex.findall(CLIPTokenizer.WORD, text.lower()))
    learned = _learn({word: _bytes(word, letters) for word in counts}, counts, merges)
    pieces = sorted(letters) + [letter + "</w>" for letter in sorted(letters)] + ["".join(m) for m in learned]
    vocab = {
        piece: i for i, piece in enumerate(dict.fromkeys([*pieces, CLIPTokenizer.BOS, CLIPTokenizer.EOS]))
    }
    return vocab, [" ".join(merge) for merge in learned]


def train_bart(captions: Iterable[str]) -> tuple[dict[str, int], list[str]]:
    """The same for BART, whose words begin with the space before them; every word becomes one piece.

    The vocabulary ends with the tokens of Florence-2 and the one that stands for a picture in transformers.
    """
    letters = byte_letters()
    counts = Counter(word for text in captions for word in BartTokenizer.WORDS.findall(text))
    words = {word: [letters[byte] for byte in word.encode("utf-8")] for word in counts}
    learned = _learn(words, counts)
    pieces = [*BART_TOKENS[:-1], *sorted(letters), *("".join(pair) for pair in learned), BART_TOKENS[-1]]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *FLORENCE_TOKENS, IMAGE_TOKEN]))}
    return vocab, [" ".join(pair) for pair in learned]


def _learn(
    words: dict[str, list[str]], counts: Mapping[str, int], most: int | None = None
) -> list[tuple[str, str]]:
    """The merges, `most` at most; words: word -> its letters, counts: word -> how often it occurs."""
    learned: list[tuple[str, str]] = []
    while most is None or len(learned) < most:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in words.items():
            for pair in pairwise(pieces):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))  # ties by name, so that every run agrees
        learned.append(best)
        words = {word: _merge(pieces, best) for word, pieces in words.items()}
    return learned


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


def save_bart(vocab: dict[str, int], merges: list[str], folder: Path) -> None:
    """tokenizer.json as a Florence-2's folder has it, and the settings that transformers wants beside it."""
    special = {
        token: i for token, i in vocab.items() if token in (*BART_TOKENS, *FLORENCE_TOKENS, IMAGE_TOKEN)
    }
    flags = dict.fromkeys(("single_word", "rstrip", "normalized"), False) | {"special": True}
    added = [{"id": i, "content": t, "lstrip": t == "<mask>", **flags} for t, i in special.items()]
    bytes_of = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    kept = {token: i for token, i in vocab.items() if token not in special or token in BART_TOKENS}
    content = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {**bytes_of, "add_prefix_space": False},
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": ["</s>", vocab["</s>"]],
            "cls": ["<s>", vocab["<s>"]],
            "trim_offsets": True,
            "add_prefix_space": False,
        },
        "decoder": {**bytes_of, "add_prefix_space": True},
        "model": {"type": "BPE", "vocab": kept, "merges": [merge.split(" ") for merge in merges]},
    }
    named = dict(
        zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), BART_TOKENS, strict=True)
    )
    config = {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": False, **named}
    config |= {"cls_token": "<s>", "sep_token": "</s>", "extra_special_tokens": {"image_token": IMAGE_TOKEN}}
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (("tokenizer_config", config), ("tokenizer", content)):
        with outputs.replacing(folder / f"{name}.json") as partial:
            partial.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


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
