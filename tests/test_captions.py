"""Captions: each rule of the schema alone, their order, and their chances."""

from collections import Counter

import numpy as np
import pytest

from flux.data import batches, captions, samples
from flux.data.schema import Subset
from tests.datasets import OPTIONS, write_pictures


def compose(text, epoch=0, seed=0, **options):
    return captions.compose(text, Subset(**options), epoch, np.random.default_rng(seed))


def many(text, count=400, epoch=0, **options):
    """The captions of many draws, with their counts."""
    rng = np.random.default_rng(5)
    return Counter(captions.compose(text, Subset(**options), epoch, rng) for _ in range(count))


@pytest.mark.parametrize("text", ["a dog", "a dog,sitting ,  on grass", "Ein „Hund“, 犬", "{a|b}, {{c}}", ""])
def test_without_options_a_caption_stays_as_it_is(text):
    assert compose(text) == text


def test_all_paragraphs_are_the_caption():
    text = "First paragraph.\n\nSecond, with a \u2028 and a comma."
    assert compose(text) == text
    assert compose(text, caption_prefix="p") == f"p {text}"


def test_prefix_and_suffix():
    assert compose("dog", caption_prefix="sks", caption_suffix="in the rain") == "sks dog in the rain"
    assert compose("one\ntwo", caption_prefix="p", caption_suffix="s") == "p one\ntwo s"
    assert compose("", caption_prefix="p") == "p"


def test_tags_are_shuffled_but_for_the_kept():
    found = many("a,b , c,d", shuffle_caption=True, keep_tokens=1)
    assert set(found) == {f"a, {x}, {y}, {z}" for x, y, z in ("bcd", "bdc", "cbd", "cdb", "dbc", "dcb")}
    assert min(found.values()) > 40


def test_keeping_more_than_there_are():
    assert compose("a,b", shuffle_caption=True, keep_tokens=5) == "a, b"


def test_another_separator():
    found = many("a, b; c", shuffle_caption=True, caption_separator=";")
    assert set(found) == {"a, b, c", "c, a, b"}


def test_kept_tags_by_a_separator():
    options = {"shuffle_caption": True, "keep_tokens_separator": "|||", "keep_tokens": 3}
    assert set(many("a, b ||| c, d ||| e", **options)) == {"a, b, c, d, e", "a, b, d, c, e"}
    assert set(many("a ||| c, d", **options)) == {"a, c, d", "a, d, c"}
    assert set(many("a, b, c, d", **options)) == {"a, b, c, d"}  # none in the text: keep_tokens counts
    assert (
        compose("a ||| c, d", keep_tokens_separator="|||") == "a, c, d"
    )  # it is never a part of the caption


def test_tag_dropout():
    found = many("keep, a, b", caption_tag_dropout_rate=0.25, keep_tokens=1, count=2000)
    shares = {text: n / 2000 for text, n in found.items()}
    assert shares.keys() == {"keep, a, b", "keep, a", "keep, b", "keep"}
    assert shares["keep, a, b"] == pytest.approx(0.5625, abs=0.04)
    assert shares["keep"] == pytest.approx(0.0625, abs=0.02)
    assert compose("a, b", caption_tag_dropout_rate=1.0) == ""


def test_dropout():
    found = many("dog", caption_dropout_rate=0.2, caption_prefix="p", count=2000)
    assert found.keys() == {"p dog", ""}  # the prefix is dropped too
    assert found[""] / 2000 == pytest.approx(0.2, abs=0.03)


def test_dropout_every_n_epochs():
    found = [compose("dog", epoch=epoch, caption_dropout_every_n_epochs=3) for epoch in range(7)]
    assert found == ["dog", "dog", "", "dog", "dog", "", "dog"]


def test_dropped_epochs_do_not_shift_the_draws_of_others():
    options = {"shuffle_caption": True, "caption_dropout_rate": 0.3}
    plain = [compose("a,b,c,d,e", epoch, seed=epoch, **options) for epoch in range(30)]
    options["caption_dropout_every_n_epochs"] = 2
    thinned = [compose("a,b,c,d,e", epoch, seed=epoch, **options) for epoch in range(30)]
    assert thinned[::2] == plain[::2]
    assert set(thinned[1::2]) == {""}


def test_wildcards():
    found = many("a {red|green|blue} {cat} {{x|y}}", enable_wildcard=True)
    assert set(found) == {f"a {colour} cat {{x|y}}" for colour in ("red", "green", "blue")}
    assert min(found.values()) > 90
    lines = many("one\n\n two \n{three|four}", enable_wildcard=True, caption_prefix="p", caption_suffix="s")
    assert set(lines) == {"p one s", "p two s", "p three s", "p four s"}


def test_order_of_the_rules():
    """The prefix is there when tags are split, wildcards when they are shuffled, and dropout empties all."""
    options = {
        "caption_prefix": "p,",
        "caption_suffix": ", s",
        "enable_wildcard": True,
        "shuffle_caption": True,
        "keep_tokens": 1,
        "caption_dropout_rate": 0.3,
    }
    found = many("{a,b|c,d}", **options)
    inner = [
        sorted(text.split(", ")[1:]) for text in found if text and text.startswith("p, ") and text != "p, s"
    ]
    assert {tuple(tags) for tags in inner} == {("a", "b", "s"), ("c", "d", "s")}
    assert "" in found
    assert len(found) == 1 + 2 * 6


# --- In a data set ---


def test_captions_come_from_seed_sample_and_epoch(tmp_path):
    write_pictures(tmp_path, {f"{i}.png": (64, 64) for i in range(6)})
    options = {**OPTIONS, "class_tokens": "a, b, c, d, e, f, g", "shuffle_caption": True, "num_repeats": 2}

    def of(seed, epoch, **more):
        plan = batches.Plan(samples.load(tmp_path, {**options, **more}), seed)
        entries = [entry for batch in plan.epoch(epoch) for entry in batch.entries]
        return Counter((entry.placed.sample.name, entry.caption) for entry in entries)

    assert of(1, 5) == of(1, 5)
    assert of(1, 5) != of(1, 6)
    assert of(1, 5) != of(2, 5)
    assert of(1, 5) == of(1, 5, batch_size=4), "a caption belongs to the sample, not to its place in a batch"
    assert len(of(1, 5)) == 12, "each repeat is shuffled anew"
