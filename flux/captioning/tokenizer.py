"""Text to token ids and back, for the captioner: BART's byte-level BPE, and tokens for positions."""

from collections.abc import Iterable
from pathlib import Path

import mlx.core as mx
import regex

from flux import jsonfiles, vocabularies
from flux.errors import FluxError
from flux.tokenizers import byte_letters, merge, read_merges, well_formed

# What Florence-2 knows beyond BART's 50,265 tokens, in the order of its embedding's rows. Microsoft's
# checkpoints hold BART's tokenizer, and the code beside them adds these; "desciption" is the name that
# was trained.
FLORENCE_TOKENS = (
    *("<od>", "</od>", "<ocr>", "</ocr>"),
    *(f"<loc_{number}>" for number in range(1000)),
    *("<cap>", "</cap>", "<ncap>", "</ncap>", "<dcap>", "</dcap>", "<grounding>", "</grounding>"),
    *("<seg>", "</seg>", "<sep>", "<region_cap>", "</region_cap>"),
    *("<region_to_desciption>", "</region_to_desciption>", "<proposal>", "</proposal>"),
    *("<poly>", "</poly>", "<and>"),
)


class BartTokenizer:
    """GPT-2's byte-level BPE: words with the space before them, each merged from its bytes.

    vocab: piece -> id. merges: "left right" in order of priority. special: tokens that are found in a text
    before anything else -> id; those that `vocab` lacks get the ids after those. swallows_space: the
    special tokens that take the white space to their left with them.
    """

    BOS, PAD, EOS = "<s>", "<pad>", "</s>"
    WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[str],
        special: dict[str, int],
        swallows_space: Iterable[str] = (),
    ):
        self.vocab = vocab
        self.special = special
        self.bos_token_id, self.pad_token_id, self.eos_token_id = (
            special[token] for token in (self.BOS, self.PAD, self.EOS)
        )
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._letters = byte_letters()
        self._bytes = {letter: byte for byte, letter in enumerate(self._letters)}
        self._pieces = {id: piece for piece, id in (vocab | special).items()}
        self.size = 1 + max(self._pieces)  # so many rows an embedding must have
        swallows_space = set(swallows_space)
        tokens = sorted(special, key=len, reverse=True)  # of two that fit, the longer one
        patterns = [r"\s*" * (token in swallows_space) + regex.escape(token) for token in tokens]
        self._split = regex.compile(f"({'|'.join(patterns)})")

    @classmethod
    def from_folder(cls, path: str | Path) -> "BartTokenizer":
        """Reads tokenizer.json, or vocab.json and merges.txt, of a checkpoint's folder.

        Florence-2's tokens are added after BART's where the files lack them. Raises FluxError without
        files.
        """
        folder = Path(path)
        if (folder / "tokenizer.json").is_file():
            what = str(folder / "tokenizer.json")
            file = jsonfiles.read(folder / "tokenizer.json")
            model = vocabularies.model(file, "BPE", f"{what}: not a captioner's tokenizer")
            vocab = vocabularies.ids(model.get("vocab"), f"{what}: vocab")
            merges = vocabularies.merges(model.get("merges"), f"{what}: merges")
            tokens = vocabularies.added(file, what)
            added = {token["content"]: token["id"] for token in tokens}
            swallows_space = [token["content"] for token in tokens if token.get("lstrip")]
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            what = str(folder / "vocab.json")
            vocab = vocabularies.ids(jsonfiles.read(folder / "vocab.json"), what)
            merges = read_merges(jsonfiles.read_text(folder / "merges.txt"))
            names = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
            added = {token: vocab[token] for token in names if token in vocab}
            swallows_space = ["<mask>"]
        else:
            raise FluxError(f"{folder}: no captioner's tokenizer here; expected tokenizer.json")
        if missing := [token for token in (cls.BOS, cls.PAD, cls.EOS) if token not in added]:
            raise FluxError(f"{what}: the vocabulary lacks {', '.join(missing)}")
        return cls(vocab, merges, with_florence_tokens(vocab, added), swallows_space)

    def encode(self, text: str) -> list[int]:
        """The text's ids between the start and the end token."""
        ids = [id for piece in self._split.split(well_formed(text)) for id in self._ids(piece)]
        return [self.bos_token_id, *ids, self.eos_token_id]

    def __call__(self, texts: list[str]) -> tuple[mx.array, mx.array]:
        """B texts -> ids (B, length of the longest) int32, and a mask: False at padding."""
        rows = [self.encode(text) for text in texts]
        longest = max(map(len, rows))
        ids = [row + [self.pad_token_id] * (longest - len(row)) for row in rows]
        mask = [[True] * len(row) + [False] * (longest - len(row)) for row in rows]
        return mx.array(ids, dtype=mx.int32), mx.array(mask)

    def decode(self, ids: Iterable[int]) -> str:
        """The text with special tokens written out; U+FFFD for what is not UTF-8, nothing for unknown ids."""
        letters = "".join(self._pieces.get(id, "") for id in ids)
        return bytes(self._bytes[c] for c in letters if c in self._bytes).decode("utf-8", errors="replace")

    def _ids(self, piece: str) -> list[int]:
        token = self.special.get(piece.lstrip())
        if token is not None:
            return [token]
        words = self.WORDS.findall(piece)
        return [self.vocab[part] for word in words for part in self._merge(word)]

    def _merge(self, word: str) -> list[str]:
        # Bytes that the vocabulary lacks leave nothing, as in the reference: it has no unknown token here.
        letters = [self._letters[byte] for byte in word.encode("utf-8")]
        return merge([letter for letter in letters if letter in self.vocab], self._ranks)


def with_florence_tokens(vocab: dict[str, int], added: dict[str, int]) -> dict[str, int]:
    """The special tokens with Florence-2's, which get the ids after all others where they have none."""
    special = dict(added)
    free = max([*vocab.values(), *added.values()]) + 1
    for token in FLORENCE_TOKENS:
        if token not in special:
            special[token] = free
            free += 1
    return special
