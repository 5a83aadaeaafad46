"""Text to token ids: CLIP's byte-level BPE and T5's SentencePiece, with the ids of transformers' tokenizers.

Both have a network's fixed length: longer texts are cut with the end token kept, and `truncated` shows what
was lost. A special token written out in a text ("<|endoftext|>", "</s>") becomes that token, as in transformers.
"""

import json
import unicodedata
from pathlib import Path

import mlx.core as mx
import regex
import sentencepiece

from flux.errors import FluxError


def byte_letters() -> list[str]:
    """The letter that stands for each of the 256 bytes in a byte-level vocabulary.

    Printable characters of Latin-1 stand for their own code; the 68 other bytes get the letters from U+0100 on,
    in order (Radford et al. 2019, GPT-2).
    """
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


class CLIPTokenizer:
    """CLIP's byte-level BPE: lower-cased words, contractions, digits and runs of signs, each merged from bytes.

    vocab: piece -> id; a piece that ends a word ends in "</w>". merges: "left right" in order of priority.
    """

    BOS, EOS = "<|startoftext|>", "<|endoftext|>"
    WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")

    def __init__(self, vocab: dict[str, int], merges: list[str], max_length: int = 77):
        self.vocab = vocab
        self.max_length = max_length
        self.bos_token_id = vocab[self.BOS]
        self.eos_token_id = vocab[self.EOS]
        self._ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self._letters = byte_letters()
        self._special = regex.compile(f"({regex.escape(self.BOS)}|{regex.escape(self.EOS)})")

    @classmethod
    def from_folder(cls, path: str | Path) -> "CLIPTokenizer":
        """Reads vocab.json and merges.txt, else tokenizer.json, of a `tokenizer/` folder."""
        folder = Path(path)
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            return cls(vocab, [line for line in lines if line and not line.startswith("#version")])
        if (folder / "tokenizer.json").is_file():
            model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
            merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
            return cls(model["vocab"], merges)
        raise FluxError(
            f"{folder}: no CLIP tokenizer here; expected vocab.json and merges.txt, or tokenizer.json"
        )

    def encode(self, text: str) -> list[int]:
        """max_length ids: start token, the text, end token, and end tokens again as padding."""
        ids = self._ids(text)[: self.max_length - 2]
        return [self.bos_token_id, *ids] + [self.eos_token_id] * (self.max_length - 1 - len(ids))

    def __call__(self, texts: list[str]) -> mx.array:
        """B texts -> (B, max_length) int32."""
        return mx.array([self.encode(text) for text in texts], dtype=mx.int32)

    def truncated(self, text: str) -> str:
        """The end of the text that `encode` cuts off, lower-cased as the network would see it; else ""."""
        pieces = [piece for word in self._words(text) for piece in self._merge(word)]
        return self._join(pieces[self.max_length - 2 :])

    def _ids(self, text: str) -> list[int]:
        return [
            self.vocab.get(piece, self.eos_token_id)
            for word in self._words(text)
            for piece in self._merge(word)
        ]

    def _words(self, text: str) -> list[str]:
        words = []
        for part in self._special.split(text):
            if part in (self.BOS, self.EOS):
                words.append(part)
                continue
            part = "".join(map(str.lower, unicodedata.normalize("NFC", part)))
            words += self.WORDS.findall(part)
        return words

    def _merge(self, word: str) -> list[str]:
        """The pieces of one word: its bytes' letters, merged pair by pair, the highest priority first."""
        if word in (self.BOS, self.EOS):
            return [word]
        pieces = [self._letters[byte] for byte in word.encode("utf-8")]
        pieces[-1] += "</w>"
        while len(pieces) > 1:
            pairs = zip(pieces, pieces[1:], strict=False)
            rank, place = min((self._ranks.get(pair, len(self._ranks)), i) for i, pair in enumerate(pairs))
            if rank == len(self._ranks):
                break
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
        return pieces

    def _join(self, pieces: list[str]) -> str:
        codes = {letter: byte for byte, letter in enumerate(self._letters)}
        text = "".join(pieces).replace("</w>", " ").strip()
        return bytes(codes[c] if c != " " else 32 for c in text).decode("utf-8", errors="replace")


class T5Tokenizer:
    """T5's SentencePiece vocabulary; every text ends in the end token (id 1), padding is id 0."""

    def __init__(self, spiece_file: str | Path, max_length: int):
        self.max_length = max_length
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(spiece_file))
        self.eos_token_id = self._model.eos_id()
        self.pad_token_id = self._model.pad_id()

    @classmethod
    def from_folder(cls, path: str | Path, max_length: int) -> "T5Tokenizer":
        """Reads spiece.model of a `tokenizer_2/` folder."""
        file = Path(path) / "spiece.model"
        if not file.is_file():
            raise FluxError(f"{path}: no T5 tokenizer here; expected spiece.model")
        return cls(file, max_length)

    def encode(self, text: str, pad: bool = True) -> list[int]:
        """The text's ids and the end token, cut or (with pad) filled to max_length."""
        ids = [*self._model.encode(text)[: self.max_length - 1], self.eos_token_id]
        return ids + [self.pad_token_id] * (self.max_length - len(ids)) if pad else ids

    def __call__(self, texts: list[str], pad: bool = True) -> mx.array:
        """B texts -> (B, max_length) int32; without pad, (B, length of the longest), shorter ones padded to it."""
        rows = [self.encode(text, pad) for text in texts]
        longest = max(map(len, rows))
        return mx.array([row + [self.pad_token_id] * (longest - len(row)) for row in rows], dtype=mx.int32)

    def truncated(self, text: str) -> str:
        """The end of the text that `encode` cuts off; "" where all of it fits."""
        return self._model.decode(self._model.encode(text)[self.max_length - 1 :])
