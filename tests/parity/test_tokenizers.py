"""The tokenizers against transformers' own: the same ids for every text, real vocabularies and small ones."""

import json

import pytest
import sentencepiece

from flux.tokenizers import CLIPTokenizer, T5Tokenizer
from tests.prompts import ALPHABETS, prompts, random_texts

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")


def clip_rows(reference, texts, max_length=77):
    return reference(texts, padding="max_length", max_length=max_length, truncation=True).input_ids


def t5_rows(reference, texts, max_length, pad=True):
    padding = "max_length" if pad else False
    return reference(texts, padding=padding, max_length=max_length, truncation=True).input_ids


def assert_same(texts, ours, reference):
    """Each text's ids alike; the message shows the first texts that differ."""
    different = [text for text, a, b in zip(texts, ours, reference, strict=True) if a != b]
    assert not different, (
        f"{len(different)} of {len(texts)} differ: {[ascii(text) for text in different[:5]]}"
    )


# --- the real vocabularies ---


@pytest.fixture(scope="module")
def real_clip(shared):
    folder = shared / "tokenizers" / "clip"
    return CLIPTokenizer.from_folder(folder), transformers.CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def real_t5(shared):
    folder = shared / "tokenizers" / "t5"
    return T5Tokenizer.from_folder(folder, 512), transformers.T5Tokenizer.from_pretrained(folder)


def test_clip_prompts(real_clip):
    ours, reference = real_clip
    texts = prompts()
    assert len(texts) > 250
    assert_same(texts, ours(texts).tolist(), clip_rows(reference, texts))


@pytest.mark.parametrize("length", [8, 256, 512])
def test_t5_prompts(real_t5, shared, length):
    ours, reference = T5Tokenizer.from_folder(shared / "tokenizers" / "t5", length), real_t5[1]
    texts = prompts()
    assert_same(texts, ours(texts).tolist(), t5_rows(reference, texts, length))
    unpadded = [ours.encode(text, pad=False) for text in texts]
    assert_same(texts, unpadded, t5_rows(reference, texts, length, pad=False))


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_random_texts(real_clip, real_t5, alphabet):
    texts = random_texts(alphabet, 300)
    ours, reference = real_clip
    assert_same(texts, ours(texts).tolist(), clip_rows(reference, texts))
    ours, reference = real_t5
    assert_same(texts, [ours.encode(text, pad=False) for text in texts], reference(texts).input_ids)


def test_t5_json_is_the_same_vocabulary(real_t5, shared):
    from_json = T5Tokenizer(shared / "tokenizers" / "t5" / "tokenizer.json", 64)
    texts = prompts()
    assert_same(texts, from_json(texts).tolist(), t5_rows(real_t5[1], texts, 64))


# --- small vocabularies, trained here ---


def protobuf_fields(message: bytes):
    """(field number, content) of a message's fields that hold bytes; the others are passed over."""

    def varint(at):
        value = shift = 0
        while True:
            value |= (message[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if message[at - 1] < 128:
                return value, at

    at = 0
    while at < len(message):
        key, at = varint(at)
        if key & 7 == 2:
            length, at = varint(at)
            yield key >> 3, message[at : at + length]
            at += length
        else:
            at = varint(at)[1] if key & 7 == 0 else at + (4 if key & 7 == 5 else 8)


@pytest.fixture(scope="module")
def small_t5(tmp_path_factory):
    """A folder with a spiece.model of 900 pieces, and transformers' tokenizer with the same table."""
    folder = tmp_path_factory.mktemp("t5")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prompts()), model_prefix=str(folder / "spiece"), vocab_size=900,
        character_coverage=0.98, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    proto = (folder / "spiece.model").read_bytes()
    normalizer = next(content for number, content in protobuf_fields(proto) if number == 3)
    charsmap = next(content for number, content in protobuf_fields(normalizer) if number == 2)
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.vocab_size())]
    extra = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    reference = transformers.T5Tokenizer(vocab=pieces + extra, _spm_precompiled_charsmap=charsmap)
    return folder, reference


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    """A folder with vocab.json and merges.txt of 700 pieces, and transformers' tokenizer of them.

    Not every byte has a form that ends a word, so that some characters are unknown.
    """
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
    )  # fmt: skip
    trained.train_from_iterator(prompts(), trainer)
    model = json.loads(trained.to_str())["model"]
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder, transformers.CLIPTokenizer.from_pretrained(folder)


def test_small_t5(small_t5):
    folder, reference = small_t5
    ours = T5Tokenizer.from_folder(folder, 40)
    texts = prompts() + [text for alphabet in ALPHABETS for text in random_texts(alphabet, 20)]
    assert_same(texts, ours(texts).tolist(), t5_rows(reference, texts, 40))
    assert ours.encode("ꙮ", pad=False)[-2] == reference.unk_token_id  # some characters are unknown


def test_small_clip(small_clip):
    folder, reference = small_clip
    ours = CLIPTokenizer.from_folder(folder)
    texts = prompts() + [text for alphabet in ALPHABETS for text in random_texts(alphabet, 20)]
    assert_same(texts, ours(texts).tolist(), clip_rows(reference, texts))


def test_folders_that_transformers_saved(small_t5, small_clip, tmp_path):
    """transformers 5 saves nothing but tokenizer.json."""
    texts = prompts()
    small_t5[1].save_pretrained(tmp_path / "tokenizer_2")
    small_clip[1].save_pretrained(tmp_path / "tokenizer")
    assert not [*tmp_path.rglob("spiece.model"), *tmp_path.rglob("merges.txt")]
    t5 = T5Tokenizer.from_folder(tmp_path / "tokenizer_2", 40)
    assert_same(texts, t5(texts).tolist(), t5_rows(small_t5[1], texts, 40))
    clip = CLIPTokenizer.from_folder(tmp_path / "tokenizer")
    assert_same(texts, clip(texts).tolist(), clip_rows(small_clip[1], texts))


def test_t5_of_no_vocabulary(tmp_path):
    """transformers' default T5Tokenizer: a space, the special tokens, no character map."""
    reference = transformers.T5Tokenizer()
    reference.save_pretrained(tmp_path)
    ours = T5Tokenizer.from_folder(tmp_path, 12)
    texts = ["", "a b", "ﬁ <extra_id_3> é", "a▁b"]
    assert_same(texts, ours(texts).tolist(), t5_rows(reference, texts, 12))


def test_t5_unknown_characters_cost(tmp_path):
    """An unknown character costs 10 more than the rarest piece: "abc" is "ab" "c", "defg" has "d" unknown."""
    pieces = {"<pad>": 0, "</s>": 0, "<unk>": 0, "▁": -2, "ab": -10, "c": -10, "bc": -1, "de": -10, "f": -10}
    pieces |= {"g": -10, "efg": -5}
    reference = transformers.T5Tokenizer(vocab=list(pieces.items()))
    reference.save_pretrained(tmp_path)
    ids = T5Tokenizer.from_folder(tmp_path, 8).encode("abc defg", pad=False)
    assert ids == reference("abc defg").input_ids == [3, 4, 5, 3, 2, 10, 1]
