"""Texts for the transformer: what each encoder reads, and what is said of a text that is too long."""

import warnings

import mlx.core as mx
import pytest

from flux.conditioning import encode_texts, warn_if_cut
from flux.models.clip import CLIPTextModel
from flux.models.t5 import T5Encoder
from flux.tokenizers import CLIPTokenizer, T5Tokenizer

from . import tiny


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    clip_folder, t5_folder = tiny.write_tokenizers(tmp_path_factory.mktemp("vocabularies"))
    networks = tiny.randomize(T5Encoder(tiny.T5), 1), tiny.randomize(CLIPTextModel(tiny.CLIP), 2)
    return *networks, T5Tokenizer.from_folder(t5_folder, 24), CLIPTokenizer.from_folder(clip_folder)


def test_clip_can_read_another_text(encoders):
    one, other = (encode_texts([text], *encoders) for text in ("a red apple", "two green birds"))
    mixed = encode_texts(["a red apple"], *encoders, clip_texts=["two green birds"])
    assert mx.array_equal(mixed.t5, one.t5)
    assert mx.array_equal(mixed.clip, other.clip)
    assert not mx.array_equal(one.clip, other.clip)


@pytest.mark.parametrize("which", ["t5", "clip", "clip's own"])
def test_warnings_quote_at_most_80_characters(encoders, which):
    _, _, t5, clip = encoders
    text = "a red apple " * 300
    given = {"t5": (t5, clip), "clip": (None, clip), "clip's own": (None, clip)}[which]
    with pytest.warns(UserWarning, match="left out: 'a? ?") as record:
        warn_if_cut(text, *given)
    (message,) = [str(warning.message) for warning in record]
    assert len(message) <= 80 + len("the prompt is longer than the model's 24 tokens; left out: ")
    assert message.endswith("...")


def test_no_warning_of_what_fits(encoders):
    _, _, t5, clip = encoders
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_cut("a red apple", t5, clip)


def test_each_text_is_measured_by_the_encoder_that_reads_it(encoders):
    long = "a red apple " * 300
    with pytest.warns(UserWarning, match="left out") as record:
        encode_texts(["a red apple"], *encoders, clip_texts=[long])
    assert [str(warning.message)[:36] for warning in record] == ["the prompt is longer than CLIP's 77 t"[:36]]
    with pytest.warns(UserWarning, match="left out") as record:
        encode_texts([long], *encoders, clip_texts=["a red apple"])
    assert [str(warning.message)[:40] for warning in record] == ["the prompt is longer than the model's 24"]
