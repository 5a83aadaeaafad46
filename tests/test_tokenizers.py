"""Lengths, padding, what was cut, files: the tokenizers without a reference, on vocabularies made here."""

import json

import mlx.core as mx
import pytest
import sentencepiece

from flux import tokenizers
from flux.errors import FluxError
from flux.tokenizers import CLIPTokenizer, T5Tokenizer, byte_letters, read_gzip, read_merges
from flux.weights.layouts import SHIPPED_TOKENIZERS
from tests.prompts import ALPHABETS, prompts, random_texts

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MERGES = ["c a", "ca t</w>", "d o", "do g</w>", "Ã ©</w>"]


def clip_vocabulary() -> dict[str, int]:
    letters = byte_letters()
    pieces = [*letters, *(letter + "</w>" for letter in letters)]
    pieces += [merge.replace(" ", "") for merge in MERGES]
    return {piece: i for i, piece in enumerate([*pieces, BOS, EOS])}


@pytest.fixture(scope="module")
def clip():
    return CLIPTokenizer(clip_vocabulary(), MERGES, max_length=8)


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prompts()), model_prefix=str(folder / "spiece"), vocab_size=900,
        character_coverage=0.98, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return folder


def test_byte_letters_are_gpt2s():
    letters = byte_letters()
    assert len(set(letters)) == 256
    some = [letters[byte] for byte in (0x00, ord(" "), ord("A"), 0x7F, 0xAD, 0xFF)]
    assert some == ["Ā", "Ġ", "A", "ġ", "Ń", "ÿ"]


def test_clip_merges_and_padding(clip):
    vocab = clip_vocabulary()
    expected = [vocab[piece] for piece in (BOS, "cat</w>", "d", "é".encode().decode("latin-1")[0] + "©</w>")]
    assert clip.encode("  CAT\n dé ") == expected + [vocab[EOS]] * 4
    assert clip.encode("") == [vocab[BOS]] + [vocab[EOS]] * 7


def test_clip_keeps_the_end_token_and_tells_what_was_cut(clip):
    text = "cat dog cat dog cat dog Cats, é"
    ids = clip.encode(text)
    assert len(ids) == 8
    assert ids[-1] == clip.eos_token_id
    assert clip.eos_token_id not in ids[:-1]
    assert clip.truncated(text) == "cats , é"
    assert clip.truncated("cat " * 6) == ""
    assert clip.truncated("cat " * 7) == "cat"
    assert clip.truncated("cat " * 6 + EOS) == EOS


def test_clip_batch(clip):
    tokens = clip(["a cat", "", "dog " * 50])
    assert tokens.shape == (3, 8)
    assert tokens.dtype == mx.int32
    assert tokens.tolist() == [clip.encode(text) for text in ("a cat", "", "dog " * 50)]


def test_t5_lengths(t5_folder):
    t5 = T5Tokenizer.from_folder(t5_folder, 16)
    ids = t5.encode("a red apple", pad=False)
    assert ids[-1] == t5.eos_token_id == 1
    assert t5.encode("a red apple") == ids + [0] * (16 - len(ids))
    assert t5.encode("") == [1] + [0] * 15
    assert t5.encode("", pad=False) == [1]
    assert t5.encode("apple " * 100) == t5.encode("apple " * 100, pad=False)
    assert t5.encode("apple " * 100)[-1] == 1
    assert len(t5.encode("apple " * 100)) == 16


def test_t5_batch_without_padding_is_as_long_as_its_longest(t5_folder):
    t5 = T5Tokenizer.from_folder(t5_folder, 16)
    rows = [t5.encode(text, pad=False) for text in ("a", "a red apple")]
    tokens = t5(["a", "a red apple"], pad=False)
    assert tokens.dtype == mx.int32
    assert tokens.tolist() == [rows[0] + [0] * (len(rows[1]) - len(rows[0])), rows[1]]
    assert t5(["a", "a red apple"]).shape == (2, 16)


def test_t5_padding_to_another_length(t5_folder):
    """ComfyUI pads to 256 tokens whatever the model's length, and cuts no longer prompt."""
    t5 = T5Tokenizer.from_folder(t5_folder, 32)
    text = t5.encode("a red apple", pad=False)
    t5.padded_length = 16
    assert t5.encode("a red apple") == text + [0] * (16 - len(text))
    assert len(t5.encode("apple " * 100)) == 32
    t5.padded_length = 64
    assert len(t5.encode("a red apple")) == 32


def test_t5_tells_what_was_cut(t5_folder):
    words = "A photo of an astronaut riding a horse on Mars 火星 ꙮ"
    long = T5Tokenizer.from_folder(t5_folder, 512)
    assert long.truncated(words) == ""
    fits = len(long.encode(words, pad=False))
    assert T5Tokenizer.from_folder(t5_folder, fits).truncated(words) == ""
    assert T5Tokenizer.from_folder(t5_folder, fits - 1).truncated(words) != ""
    first = len(long.encode("A photo of an", pad=False))
    assert (
        T5Tokenizer.from_folder(t5_folder, first).truncated(words)
        == "astronaut riding a horse on Mars 火星 ꙮ"
    )


def test_broken_surrogates_are_text_too(clip, t5_folder):
    """What JSON's "\\ud83d" or a shell's stray bytes become in a str: no UTF-8, still a prompt."""
    t5 = T5Tokenizer.from_folder(t5_folder, 32)
    for tokenizer in (clip, t5):
        assert tokenizer.encode("a \ud83d cat") == tokenizer.encode("a \ufffd cat")
        assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("\U0001f600")


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(FluxError, match=r"no CLIP tokenizer; expected vocab\.json"):
        CLIPTokenizer.from_folder(tmp_path)
    with pytest.raises(FluxError, match=r"no T5 tokenizer; expected spiece\.model"):
        T5Tokenizer.from_folder(tmp_path, 8)


def test_files_that_are_something_else(tmp_path, t5_folder):
    file = tmp_path / "tokenizer.json"
    file.write_text("{")
    with pytest.raises(FluxError, match=r"tokenizer\.json: not JSON"):
        CLIPTokenizer.from_folder(tmp_path)
    file.write_text(json.dumps({"model": {"type": "WordPiece"}}))
    with pytest.raises(FluxError, match=r"its model is .WordPiece., expected BPE"):
        CLIPTokenizer.from_folder(tmp_path)
    with pytest.raises(FluxError, match=r"its model is .WordPiece., expected Unigram"):
        T5Tokenizer.from_folder(tmp_path, 8)
    file.write_text(json.dumps({"model": {"type": "Unigram", "vocab": [["▁", -1.0]]}}))
    with pytest.raises(FluxError, match="lacks <pad>, </s>, <unk>"):
        T5Tokenizer.from_folder(tmp_path, 8)
    (tmp_path / "spiece.model").write_bytes((t5_folder / "spiece.model").read_bytes()[:500])
    with pytest.raises(FluxError, match=r"spiece\.model: not a SentencePiece model"):
        T5Tokenizer.from_folder(tmp_path, 8)
    with pytest.raises(FluxError, match=r"lacks <\|endoftext\|>"):
        CLIPTokenizer({BOS: 0}, [])


# --- The vocabularies that ship with the package ---


def test_shipped_vocabularies_are_the_full_ones(shared):
    """CLIP's follows from its merges; the ids of many texts are those of the published files."""
    published = json.loads((shared / "tokenizers/clip/vocab.json").read_text(encoding="utf-8"))
    merges = read_merges(read_gzip(SHIPPED_TOKENIZERS / "tokenizer/merges.txt.gz"))
    assert tokenizers.clip_vocabulary(merges) == published
    texts = [*prompts(), *(text for name in ALPHABETS for text in random_texts(name, 50, 7))]
    pairs = [
        (
            CLIPTokenizer.from_folder(SHIPPED_TOKENIZERS / "tokenizer"),
            CLIPTokenizer.from_folder(shared / "tokenizers/clip"),
        ),
        (
            T5Tokenizer.from_folder(SHIPPED_TOKENIZERS / "tokenizer_2", 128),
            T5Tokenizer.from_folder(shared / "tokenizers/t5", 128),
        ),
    ]
    for ours, theirs in pairs:
        assert ours.size == theirs.size
        assert [ours.encode(text) for text in texts] == [theirs.encode(text) for text in texts]


def test_shipped_vocabularies_without_the_published_ones():
    clip = CLIPTokenizer.from_folder(SHIPPED_TOKENIZERS / "tokenizer")
    assert clip.size == 49408
    assert clip.encode("A photo of an astronaut!")[:8] == [49406, 320, 1125, 539, 550, 18376, 256, 49407]
    t5 = T5Tokenizer.from_folder(SHIPPED_TOKENIZERS / "tokenizer_2", 512)
    assert t5.size == 32000
    assert t5.encode("A photo of an astronaut!", pad=False) == [71, 1202, 13, 46, 30059, 55, 1]
    licences = [(SHIPPED_TOKENIZERS / name).read_text() for name in ("LICENSE-CLIP", "LICENSE-T5")]
    assert "MIT License" in licences[0]
    assert "Apache License" in licences[1]


def test_a_damaged_gzip_is_one_line(tmp_path):
    for content in (b"", b"no gzip", (SHIPPED_TOKENIZERS / "tokenizer/merges.txt.gz").read_bytes()[:999]):
        (tmp_path / "merges.txt.gz").write_bytes(content)
        with pytest.raises(FluxError, match=r"merges\.txt\.gz"):
            CLIPTokenizer.from_folder(tmp_path)


BYTES = [*byte_letters(), *(letter + "</w>" for letter in byte_letters()), "<|startoftext|>", "<|endoftext|>"]


@pytest.mark.parametrize("number", [-1, 10**9, True, "5", None, 1.0])
def test_ids_that_no_embedding_has(number, tmp_path):
    """+10^6 was a segmentation fault, and a negative one another picture."""
    vocab = {piece: i for i, piece in enumerate(BYTES)}
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    assert CLIPTokenizer.from_folder(tmp_path).size == len(BYTES)
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {"a": number}))
    with pytest.raises(FluxError, match=r"vocab\.json: the id of 'a' is"):
        CLIPTokenizer.from_folder(tmp_path)


def test_sizes_tell_of_the_highest_id(tmp_path):
    """Where it is beyond the embedding, the parts of a model do not fit."""
    vocab = {piece: i for i, piece in enumerate(BYTES)} | {"a": 10**6}
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    assert CLIPTokenizer.from_folder(tmp_path).size == 10**6 + 1
    content = {
        "model": {"type": "Unigram", "vocab": [["<pad>", 0], ["</s>", 0], ["<unk>", 0], ["▁a", -1.5]]},
        "added_tokens": [{"content": "</s>", "id": 5000}, {"content": "<extra_id_0>", "id": 9000}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert T5Tokenizer.from_folder(tmp_path, 8).size == 5001


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab": 5}, "vocab should be a list"),
        ({"vocab": []}, "vocab holds no pieces"),
        ({"vocab": [["a"]]}, "should be a piece and its score"),
        ({"vocab": [["a", "x"]]}, "the score of 'a' is 'x'"),
        ({"vocab": [[5, 1.0]]}, "should be a piece and its score"),
    ],
)
def test_pieces_that_make_no_sense(change, words, tmp_path):
    content = {"model": {"type": "Unigram", "vocab": [["<pad>", 0]], **change}, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(FluxError, match=rf"tokenizer\.json: .*{words}"):
        T5Tokenizer.from_folder(tmp_path, 8)
