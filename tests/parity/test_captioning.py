"""The captioner's tokenizer and tasks against transformers': the same ids, prompts and answers."""

import json
import random
import unicodedata

import pytest

from flux.captioning.tasks import TASKS, Task, region
from flux.captioning.tokenizer import FLORENCE_TOKENS, BartTokenizer
from tests import florence2_reference as reference

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
# Every third letter of all scripts; without those that the two libraries' editions of Unicode may not share.
LETTERS = [chr(code) for code in range(0, 0x20000, 3) if unicodedata.category(chr(code)) not in ("Cs", "Cn")]
ASKED = [task for name, task in TASKS.items() if name != "prompt"]


def random_text(source: random.Random) -> str:
    """Words, any script, odd spaces, and tokens that are written out, some of them almost."""
    odd = [" ", "  ", "\t", "\n", "'s", "'LL", "'ll", "\u00a0", "\u3000", "\x1c", "\x85"]
    tokens = [*FLORENCE_TOKENS, "<s>", "</s>", "<mask>", " <mask>", "\n <pad> ", "<loc_5", "<loc_1000>"]
    parts = []
    for _ in range(source.randint(0, 30)):
        text, start = source.choice(reference.TEXTS), source.randint(0, 60)
        parts += [
            source.choice(
                [text[start : start + 9], source.choice(LETTERS), source.choice(odd), source.choice(tokens)]
            ),
            str(source.randint(0, 99999)) * (source.random() < 0.2),
        ]
    return "".join(parts)


@pytest.mark.parametrize("letters", [256, 200])  # BART's vocabulary need not have all bytes
def test_token_ids_and_texts(letters, tmp_path):
    theirs = reference.tokenizer(letters)
    theirs.save_pretrained(tmp_path)
    ours = BartTokenizer.from_folder(tmp_path)
    source = random.Random(letters)
    for _ in range(300):
        text = random_text(source)
        assert ours.encode(text) == theirs(text)["input_ids"], repr(text)
        ids = [source.randrange(len(theirs)) for _ in range(source.randint(0, 20))]
        assert ours.decode(ids) == theirs.decode(ids), ids


def test_batches_are_padded(tmp_path):
    theirs = reference.tokenizer()
    theirs.save_pretrained(tmp_path)
    tokens, mask = BartTokenizer.from_folder(tmp_path)(reference.TEXTS)
    expected = theirs(reference.TEXTS, padding=True)
    assert tokens.tolist() == expected["input_ids"]
    assert mask.tolist() == [[bool(seen) for seen in row] for row in expected["attention_mask"]]


def test_microsofts_tokenizer_gets_the_tokens_for_places(tmp_path):
    """Its files are BART's; the code beside them adds Florence-2's tokens when it runs."""
    theirs = reference.tokenizer()
    theirs.save_pretrained(tmp_path / "whole")
    file = json.loads((tmp_path / "whole/tokenizer.json").read_text())
    file["added_tokens"] = [
        token for token in file["added_tokens"] if token["content"] not in FLORENCE_TOKENS
    ]
    file["added_tokens"].pop()  # the reference's own token for a picture
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    ours = BartTokenizer.from_folder(tmp_path)

    text = "Locate <loc_0><loc_999><and>cats<poly><loc_52>"
    assert ours.encode(text) == theirs(text)["input_ids"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(file["model"]["vocab"]))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in file["model"]["merges"])]
    (tmp_path / "merges.txt").write_text("\n".join(lines))
    assert BartTokenizer.from_folder(tmp_path).encode(text) == ours.encode(text)


@pytest.fixture(scope="module")
def processor():
    return reference.processor(reference.tokenizer())


@pytest.mark.parametrize("task", ASKED, ids=lambda task: task.token)
def test_prompts(processor, task: Task):
    text = " a <loc_3> dog " if "{}" in task.prompt else ""
    assert [task.ask(text)] == processor._construct_prompts(task.token + text)


def random_answer(source: random.Random) -> str:
    """Labels and places in more and less order than the network would write them."""
    words = [
        "cat",
        " a dog ",
        "café",
        "it",
        "a group",
        "the\nend",
        " \n x",
        "über alles 猫",
        "the image",
        "a\t x",
    ]
    marks = ["<sep>", "<poly>", "</poly>", "<and>", "<pad>", "</s>", "<od>"]
    parts = ["</s><s>"]
    for _ in range(source.randint(0, 8)):
        places = "".join(f"<loc_{source.randint(0, 999)}>" for _ in range(source.randint(1, 13)))
        parts.append(source.choice([source.choice(words), source.choice(marks), places, places]))
    return "".join(parts) + "</s>" * source.randint(0, 1)


@pytest.mark.parametrize("task", ASKED, ids=lambda task: task.token)
def test_answers(processor, task: Task):
    source = random.Random(0)
    for _ in range(500):
        text, size = random_answer(source), (source.randint(1, 4000), source.randint(1, 4000))
        expected = processor.post_process_generation(text=text, task=task.token, image_size=size)[task.token]
        assert task.answer(text, size) == expected, (text, size)


def test_regions(processor):
    source = random.Random(0)
    for _ in range(500):
        size = (source.randint(1, 4000), source.randint(1, 4000))
        box = [source.uniform(-5, 4100) for _ in range(4)]
        places = processor.post_processor.quantize(torch.tensor([box]), size)[0].tolist()
        assert region(box, size) == "".join(f"<loc_{place}>" for place in places)
