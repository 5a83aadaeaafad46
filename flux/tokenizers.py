"""Text to token ids: CLIP's byte-level BPE and T5's SentencePiece, with the ids of transformers' tokenizers.

Both fill a fixed length: a longer text is cut, its end token kept, and `truncated` tells what was lost. A
special token that is written out in a text ("<|endoftext|>", "</s>") becomes that token, as in transformers.
"""

import base64
import gzip
import math
import unicodedata
import zlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import regex
import sentencepiece

from flux import jsonfiles, vocabularies
from flux.errors import FluxError


def well_formed(text: str) -> str:
    """Text that UTF-8 can hold: halves of surrogate pairs, as in JSON, are joined or become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def byte_letters() -> list[str]:
    """The letter that stands for each of the 256 bytes in a byte-level vocabulary.

    Latin-1's printable characters stand for themselves; the 68 other bytes get the letters from U+0100
    on, in order (Radford et al. 2019, GPT-2).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(substitutes)) for byte in range(256)]


class CLIPTokenizer:
    """CLIP's byte-level BPE: words in lower case, contractions, digits and runs of signs, merged from bytes.

    `vocab` is piece -> id, where "</w>" ends a word's last piece. `merges` are "left right", the first to be
    applied first. `max_length` counts the start token and at least one end token.
    Raises FluxError for a vocabulary without these two.

    The ids are those of transformers' CLIPTokenizer, whose tables of characters are older: they differ where
    an accent newer than Unicode 9 stands among other accents, and at letters newer than Unicode 15.
    """

    BOS, EOS, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"
    SPECIAL = r"<\|startoftext\|>|<\|endoftext\|>"
    WORD = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

    def __init__(self, vocab: dict[str, int], merges: list[str], max_length: int = 77):
        missing = [token for token in (self.BOS, self.EOS) if token not in vocab]
        if missing:
            raise FluxError(f"CLIP's vocabulary of {len(vocab)} pieces lacks {', '.join(missing)}")
        self.max_length = max_length
        self.bos_token_id = vocab[self.BOS]
        self.eos_token_id = vocab[self.EOS]
        self.size = 1 + max(vocab.values())  # so many rows a text encoder's embedding must have
        self._vocab = vocab
        self._ranks = {merge: rank for rank, merge in enumerate(merges)}
        self._letters = byte_letters()

    @classmethod
    def from_folder(cls, path: str | Path) -> "CLIPTokenizer":
        """Reads a checkpoint's `tokenizer/`: vocab.json and merges.txt, else tokenizer.json.

        Also merges.txt.gz alone, as this package has them: the vocabulary follows from them.
        """
        folder = Path(path)
        if (folder / "merges.txt.gz").is_file():
            merges = read_merges(read_gzip(folder / "merges.txt.gz"))
            return cls(clip_vocabulary(merges), merges)
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocab = vocabularies.ids(jsonfiles.read(folder / "vocab.json"), str(folder / "vocab.json"))
            return cls(vocab, read_merges(jsonfiles.read_text(folder / "merges.txt")))
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise FluxError(f"{folder}: no CLIP tokenizer; expected vocab.json, merges.txt or tokenizer.json")
        tokenizer = jsonfiles.read(file)
        model = vocabularies.model(tokenizer, "BPE", f"{file}: not a CLIP tokenizer")
        added = {token["content"]: token["id"] for token in vocabularies.added(tokenizer, str(file))}
        vocab = vocabularies.ids(model.get("vocab"), f"{file}: vocab")
        return cls({**vocab, **added}, vocabularies.merges(model.get("merges"), f"{file}: merges"))

    def encode(self, text: str) -> list[int]:
        """max_length ids: the start token, the text, the end token, and more end tokens as padding."""
        pieces = self._pieces(text)[: self.max_length - 2]
        ids = [self._vocab.get(piece, self.eos_token_id) for piece in pieces]  # CLIP's "unknown" is EOS
        return [self.bos_token_id, *ids] + [self.eos_token_id] * (self.max_length - 1 - len(ids))

    def __call__(self, texts: list[str]) -> mx.array:
        """B texts -> (B, max_length), int32."""
        return mx.array([self.encode(text) for text in texts], dtype=mx.int32)

    def truncated(self, text: str) -> str:
        """The end of the text that `encode` cuts off, in lower case as CLIP reads it; "" if all fits."""
        cut = "".join(self._pieces(text)[self.max_length - 2 :]).replace(self.END_OF_WORD, " ")
        bytes_of = {letter: byte for byte, letter in enumerate(self._letters)} | {" ": ord(" ")}
        return bytes(bytes_of[letter] for letter in cut).decode("utf-8", "replace").strip()

    def _pieces(self, text: str) -> list[str]:
        pieces = []
        for part in regex.split(f"({self.SPECIAL})", well_formed(text)):
            if part in (self.BOS, self.EOS):
                pieces.append(part)
            else:
                pieces += [piece for word in self._words(part) for piece in self._merge(word)]
        return pieces

    def _words(self, text: str) -> list[str]:
        # A letter at a time: str.lower() of a whole word would give its last sigma another form.
        lower = "".join(letter.lower() for letter in unicodedata.normalize("NFC", text))
        # Twice, as transformers does, because the lower case of "<|EndOfText|>" is one chunk, yet no token.
        chunks = regex.findall(f"{self.SPECIAL}|{self.WORD}", lower)
        return [word for chunk in chunks for word in regex.findall(self.WORD, chunk)]

    def _merge(self, word: str) -> list[str]:
        pieces = [self._letters[byte] for byte in word.encode("utf-8")]
        pieces[-1] += self.END_OF_WORD
        return merge(pieces, self._ranks)


def read_gzip(file: Path, most: int = 2**24) -> str:
    """The text of a gzipped file, of `most` bytes at most; FluxError where it is not gzip."""
    try:
        with gzip.open(file) as packed:
            text = packed.read(most).decode("utf-8")
        if not text:
            raise ValueError("it is empty")
        return text
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise FluxError(f"{file}: not a gzipped text ({error})") from None


def read_merges(text: str) -> list[str]:
    """The merges in a merges.txt, in their order: "left right", one a line."""
    return [line for line in text.split("\n") if line and not line.startswith("#version")]


def clip_vocabulary(merges: list[str]) -> dict[str, int]:
    """Piece -> id, as it follows from the merges: bytes, bytes at a word's end, merges, special tokens.

    The bytes that are printable come first (Radford et al. 2021, CLIP's simple_tokenizer).
    """
    letters = sorted(byte_letters(), key=lambda letter: (ord(letter) > 0xFF, ord(letter)))
    ends = [letter + CLIPTokenizer.END_OF_WORD for letter in letters]
    joined = [merge.replace(" ", "") for merge in merges]
    pieces = [*letters, *ends, *joined, CLIPTokenizer.BOS, CLIPTokenizer.EOS]
    return {piece: i for i, piece in enumerate(pieces)}


def merge(pieces: list[str], ranks: dict[str, int]) -> list[str]:
    """The pieces of one word, its letters at first, joined by the earliest merge that fits, repeatedly.

    ranks: "left right" -> the merge's position in their order.
    """

    def rank(pair: tuple[str, str]) -> float:
        return ranks.get(" ".join(pair), math.inf)

    while len(pieces) > 1:
        left, right = min(pairwise(pieces), key=rank)
        if rank((left, right)) == math.inf:
            break
        pieces = join_pair(pieces, left, right)
    return pieces


def join_pair(pieces: list[str], left: str, right: str) -> list[str]:
    """The pieces with every `left` and `right` that stand side by side made one, from the left."""
    joined: list[str] = []
    for piece in pieces:
        # A joined piece is longer than `left`, so that it cannot be taken for one.
        if piece == right and joined and joined[-1] == left:
            joined[-1] += right
        else:
            joined.append(piece)
    return joined


class T5Tokenizer:
    """T5's SentencePiece vocabulary, a Unigram model; every text ends in "</s>", padding is "<pad>".

    `file` is spiece.model, or tokenizer.json, the only file that transformers 5 saves. `max_length` counts
    the end token. Raises FluxError for a file that is neither, or lacks "<pad>", "</s>" or "<unk>".
    """

    def __init__(self, file: str | Path, max_length: int):
        file = Path(file)
        model = read_unigram_json(file) if file.suffix == ".json" else read_spiece(file)
        self._ids = {piece: i for i, (piece, _) in enumerate(model.pieces)} | model.special
        missing = [token for token in ("<pad>", "</s>", "<unk>") if token not in self._ids]
        if missing:
            raise FluxError(f"{file}: T5's vocabulary of {len(self._ids)} pieces lacks {', '.join(missing)}")
        self.max_length = max_length
        self.padded_length: int | None = None  # to which `pad` fills up, if not to max_length
        self.pad_token_id = self._ids["<pad>"]
        self.eos_token_id = self._ids["</s>"]
        self._unk_token_id = self._ids["<unk>"]
        # So many rows an embedding must have; the extra ids stand in no prompt, and small models lack them.
        self.size = 1 + max(i for piece, i in self._ids.items() if not piece.startswith("<extra_id_"))
        self._scores = dict(model.pieces)
        self._unknown_score = min(self._scores.values()) - 10.0  # SentencePiece's penalty
        self._longest = max(map(len, self._scores))
        self._mapped = lru_cache(maxsize=10_000)(model.normalizer.normalize)
        self._special = model.special
        self._special_pattern = f"({'|'.join(map(regex.escape, model.special)) or '(?!)'})"

    @classmethod
    def from_folder(cls, path: str | Path, max_length: int) -> "T5Tokenizer":
        """Reads a checkpoint's `tokenizer_2/`: spiece.model, else tokenizer.json."""
        for file in (Path(path) / "spiece.model", Path(path) / "tokenizer.json"):
            if file.is_file():
                return cls(file, max_length)
        raise FluxError(f"{path}: no T5 tokenizer; expected spiece.model or tokenizer.json")

    def encode(self, text: str, pad: bool = True) -> list[int]:
        """The text's ids and the end token, cut to max_length; with `pad` filled up to padded_length."""
        pieces = self._pieces(text)[: self.max_length - 1]
        ids = [*(self._ids.get(piece, self._unk_token_id) for piece in pieces), self.eos_token_id]
        length = self.max_length if self.padded_length is None else min(self.padded_length, self.max_length)
        return ids + [self.pad_token_id] * (length - len(ids)) if pad else ids

    def __call__(self, texts: list[str], pad: bool = True) -> mx.array:
        """B texts -> (B, length), int32; the length of the longest, or what `pad` fills them up to."""
        rows = [self.encode(text, pad) for text in texts]
        length = max(map(len, rows))
        return mx.array([row + [self.pad_token_id] * (length - len(row)) for row in rows], dtype=mx.int32)

    def truncated(self, text: str) -> str:
        """The end of the text that `encode` cuts off; "" if all of it fits."""
        return "".join(self._pieces(text)[self.max_length - 1 :]).replace("▁", " ").strip()

    def _pieces(self, text: str) -> list[str]:
        pieces = []
        for part in regex.split(self._special_pattern, well_formed(text)):
            if part in self._special:
                pieces.append(part)
            else:
                words = self._normalize(part).replace("▁", " ").split()
                pieces += [piece for word in words for piece in self._split_word("▁" + word)]
        return pieces

    def _normalize(self, text: str) -> str:
        """Compatibility composition (NFKC) as transformers' tokenizer does it, unlike SentencePiece itself.

        It goes by grapheme. One of less than 6 bytes whose beginning has an entry in the model's table
        becomes that entry, the shortest that fits, and loses what follows: "e", dot below, circumflex becomes
        "ẹ", not "ệ". In longer ones every character is mapped alone.
        """
        return "".join(map(self._normalize_grapheme, regex.findall(r"\X", text)))

    def _normalize_grapheme(self, grapheme: str) -> str:
        mapped = self._mapped
        if len(grapheme.encode("utf-8")) < 6:
            for end in range(1, len(grapheme) + 1):
                beginning = mapped(grapheme[:end])
                if beginning != grapheme[0] + mapped(grapheme[1:end]):  # more than its parts: has an entry
                    return beginning
        return "".join(map(mapped, grapheme))

    def _split_word(self, word: str) -> list[str]:
        """The most probable way to cut a word into pieces (Viterbi; Kudo 2018, arXiv:1804.10959).

        Neighbouring characters that no piece holds are one piece, unknown.
        """
        scores, starts = (
            [0.0] + [-math.inf] * len(word),
            [0] * (len(word) + 1),
        )  # the best path to each
        for start in range(len(word)):
            for end in range(start + 1, min(start + self._longest, len(word)) + 1):
                missing = self._unknown_score if end == start + 1 else -math.inf
                score = scores[start] + self._scores.get(word[start:end], missing)
                if score > scores[end]:
                    scores[end], starts[end] = score, start
        pieces: list[str] = []
        end = len(word)
        while end > 0:
            piece = word[starts[end] : end]
            if pieces and piece not in self._scores and pieces[-1] not in self._scores:
                pieces[-1] = piece + pieces[-1]
            else:
                pieces.append(piece)
            end = starts[end]
        return pieces[::-1]


@dataclass(frozen=True)
class UnigramModel:
    """What a T5 tokenizer's file says.

    pieces: each with its log probability, in the order of their ids. special: the ids of the tokens that are
    taken whole where a text has them. normalizer: the table of characters that are replaced.
    """

    pieces: list[tuple[str, float]]
    special: dict[str, int]
    normalizer: sentencepiece.SentencePieceNormalizer


def read_spiece(file: Path) -> UnigramModel:
    """Reads a SentencePiece model. T5 adds <extra_id_99> ... <extra_id_0> to what is in it."""
    try:
        content = jsonfiles.read_bytes(file, jsonfiles.MAX_BYTES)
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
        ids = list(range(model.vocab_size()))
        pieces = list(zip(model.id_to_piece(ids), model.get_score(ids), strict=True))
        normalizer = character_map(content)
    except (OSError, RuntimeError, ValueError) as error:
        raise FluxError(f"{file}: not a SentencePiece model ({error})") from error
    for piece, score in pieces:
        jsonfiles.number(score, f"{file}: the score of {piece!r}")
    extra = [f"<extra_id_{i}>" for i in reversed(range(100))]
    special = {piece: i for i, (piece, _) in enumerate(pieces) if piece in ("<pad>", "</s>", "<unk>")}
    special |= {piece: i for i, piece in enumerate(extra, start=len(pieces))}
    return UnigramModel(pieces + [(piece, 0.0) for piece in extra], special, normalizer)


def read_unigram_json(file: Path) -> UnigramModel:
    """Reads a tokenizer.json that the `tokenizers` library made of a SentencePiece model."""
    tokenizer = jsonfiles.read(file)
    model = vocabularies.model(tokenizer, "Unigram", f"{file}: not a T5 tokenizer")
    special = {token["content"]: token["id"] for token in vocabularies.added(tokenizer, str(file))}
    pieces = vocabularies.pieces(model.get("vocab"), f"{file}: vocab")
    try:
        normalizer = tokenizer.get("normalizer") or {}
        steps = normalizer.get("normalizers", [normalizer])
        table = b"".join(base64.b64decode(step.get("precompiled_charsmap", "")) for step in steps)
        # A SentencePiece model that holds nothing but normalizer_spec (3) with its precompiled_charsmap (2).
        characters = character_map(protobuf_field(3, protobuf_field(2, table)))
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise FluxError(f"{file}: its normalizer makes no sense ({error})") from None
    return UnigramModel(pieces, special, characters)


def character_map(model: bytes) -> sentencepiece.SentencePieceNormalizer:
    """The table of replaced characters in a SentencePiece model, without the treatment of white space."""
    return sentencepiece.SentencePieceNormalizer(
        model_proto=model, add_dummy_prefix=False, escape_whitespaces=False, remove_extra_whitespaces=False
    )


def protobuf_field(number: int, content: bytes) -> bytes:
    """A field in protobuf's wire format: its number and type, the length in groups of 7 bits, the content."""
    length, groups = len(content), []
    while length > 127:
        groups.append(length & 127 | 128)
        length >>= 7
    return bytes([number << 3 | 2, *groups, length]) + content
