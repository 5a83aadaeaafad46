"""What Florence-2 can be asked, and what its answers mean, as in the reference's processor.

A task is asked with a fixed sentence. Its answer is text, or labels with places: numbers 0..999, which say
how far across or down the picture.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flux.errors import FluxError

Answer = str | dict[str, list]
Size = tuple[int, int]  # width, height in pixels

PLACES = 1000  # how many numbers a side of the picture is divided into
_LOC = r"<loc_(\d+)>"
_LABELLED_BOXES = re.compile(r"[^<]+(?:<loc_\d+>){4,}")
_BOXES = re.compile(r"(?:<loc_\d+>){4,}")
_BOX = re.compile(_LOC * 4)
_QUAD = re.compile(r"(.+?)" + _LOC * 8)
_OUTLINE = r"(?:<loc_\d+>|<sep>|<poly>|</poly>){4,}"
_LABELLED_POLYGONS = re.compile(r"[^<]+" + _OUTLINE)
_POLYGONS = re.compile(_OUTLINE)
_POLYGON = re.compile(r"((?:<loc_\d+>)+)(?:<sep>|$)")
_LABEL = re.compile(r"\s*(.*?)(?=<loc_|<poly>)")  # the dot stops at a line's end: such labels do not count

# Words that point at nothing: a phrase that is one of these gets no box.
NO_PHRASES = frozenset(
    (
        *("I", "a", "all", "an", "another", "any", "anybody", "anyone", "anything", "each", "everybody"),
        *("everyone", "everything", "few", "he", "her", "hers", "herself", "him", "himself", "his", "image"),
        *("images", "it", "its", "itself", "lots", "many", "me", "mine", "myself", "nobody", "none", "one"),
        *("oneself", "our", "ours", "ourselves", "several", "she", "some", "somebody", "someone"),
        *("something", "that", "the", "their", "theirs", "them", "themselves", "these", "they", "this"),
        *("those", "us", "we", "what", "which", "who", "whom", "whose", "you", "your", "yours", "yourself"),
        *("yourselves", "a group", "a set", "each other", "one another", "other objects", "the image"),
    )
)


def pixels(places: Sequence[int], size: Size) -> list[int]:
    """Places x, y, x, y, ... -> pixels: the places' middles, in float32 and cut, as the reference does."""
    steps = np.array([size[0] / PLACES, size[1] / PLACES], np.float32)
    points = (np.array(places, np.float32).reshape(-1, 2) + np.float32(0.5)) * steps
    return points.astype(int).flatten().tolist()


def region(box: Sequence[float], size: Size) -> str:
    """A box (left, top, right, bottom) in pixels -> the tokens that tasks about a region are asked with."""
    steps = np.array([size[0] / PLACES, size[1] / PLACES], np.float32)
    places = np.floor(np.array(box, np.float32).reshape(-1, 2) / steps).clip(0, PLACES - 1)
    return "".join(f"<loc_{int(place)}>" for place in places.flatten())


def text_answer(text: str, size: Size) -> str:
    """The text, without start and end token."""
    return text.replace("<s>", "").replace("</s>", "").strip()


def box_answer(text: str, size: Size) -> dict[str, list]:
    """Labels with 4 places each, or with several times 4.

    -> {"bboxes": [[left, top, right, bottom], ...], "labels": [...]}
    """
    return _boxes(_LABELLED_BOXES, text, size)


def bare_box_answer(text: str, size: Size) -> dict[str, list]:
    """Boxes without labels: the same form, every label ""."""
    return _boxes(_BOXES, text, size)


def phrase_answer(text: str, size: Size) -> dict[str, list]:
    """Boxes of the phrases of a caption, without those that name no thing."""
    return _boxes(_LABELLED_BOXES, text, size, NO_PHRASES)


def quad_answer(text: str, size: Size) -> dict[str, list]:
    """Texts with 8 places each -> {"quad_boxes": [[x, y, x, y, x, y, x, y], ...], "labels": [...]}."""
    found = _QUAD.findall(_without_frame(text))
    return {
        "quad_boxes": [pixels([int(place) for place in places], size) for _, *places in found],
        "labels": [label.strip() for label, *_ in found],
    }


def polygon_answer(text: str, size: Size) -> dict[str, list]:
    """Outlines without labels -> {"polygons": [[[x, y, x, y, ...], ...], ...], "labels": ["", ...]}."""
    return _polygons(_POLYGONS, text, size)


def box_or_polygon_answer(text: str, size: Size) -> dict[str, list]:
    """Labelled outlines where the text has any, else labelled boxes.

    -> {"bboxes": [...], "bboxes_labels": [...], "polygons": [...], "polygons_labels": [...]}
    """
    boxes: dict[str, list] = {"bboxes": [], "labels": []}
    polygons: dict[str, list] = {"polygons": [], "labels": []}
    if "<poly>" in text:
        polygons = _polygons(_LABELLED_POLYGONS, text, size)
    else:
        boxes = box_answer(text, size)
    return {
        "bboxes": boxes["bboxes"],
        "bboxes_labels": boxes["labels"],
        "polygons": polygons["polygons"],
        "polygons_labels": polygons["labels"],
    }


@dataclass(frozen=True)
class Task:
    """One thing to ask. prompt: the sentence; `{}` stands for the caller's text. answer: reads the answer."""

    token: str
    prompt: str
    answer: Callable[[str, Size], Answer] = text_answer

    def ask(self, text: str = "") -> str:
        """The prompt. Raises FluxError where a text is needed and absent, or given and of no use."""
        if "{}" not in self.prompt:
            if text:
                raise FluxError(f"task {self.token} takes no text, but got {text!r}")
            return self.prompt
        if not text.strip():
            raise FluxError(f"task {self.token} needs a text: a phrase, or a region as <loc_...> tokens")
        return self.prompt.replace("{}", text.strip())


TASKS = {
    "caption": Task("<CAPTION>", "What does the image describe?"),
    "detailed": Task("<DETAILED_CAPTION>", "Describe in detail what is shown in the image."),
    "more_detailed": Task("<MORE_DETAILED_CAPTION>", "Describe with a paragraph what is shown in the image."),
    "od": Task("<OD>", "Locate the objects with category name in the image.", box_answer),
    "dense_region_caption": Task(
        "<DENSE_REGION_CAPTION>", "Locate the objects in the image, with their descriptions.", box_answer
    ),
    "region_proposal": Task(
        "<REGION_PROPOSAL>", "Locate the region proposals in the image.", bare_box_answer
    ),
    "ocr": Task("<OCR>", "What is the text in the image?"),
    "ocr_with_region": Task("<OCR_WITH_REGION>", "What is the text in the image, with regions?", quad_answer),
    "phrase_grounding": Task(
        "<CAPTION_TO_PHRASE_GROUNDING>", "Locate the phrases in the caption: {}", phrase_answer
    ),
    "open_vocabulary_detection": Task(
        "<OPEN_VOCABULARY_DETECTION>", "Locate {} in the image.", box_or_polygon_answer
    ),
    "referring_expression_segmentation": Task(
        "<REFERRING_EXPRESSION_SEGMENTATION>", "Locate {} in the image with mask", polygon_answer
    ),
    "region_to_segmentation": Task(
        "<REGION_TO_SEGMENTATION>", "What is the polygon mask of region {}", polygon_answer
    ),
    "region_to_category": Task("<REGION_TO_CATEGORY>", "What is the region {}?"),
    "region_to_description": Task("<REGION_TO_DESCRIPTION>", "What does the region {} describe?"),
    "region_to_ocr": Task("<REGION_TO_OCR>", "What text is in the region {}?"),
    "prompt": Task("a free prompt", "{}"),
}


def find_task(name: str) -> Task:
    """The task of that name. Raises FluxError for an unknown one."""
    if name not in TASKS:
        raise FluxError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]


def _without_frame(text: str) -> str:
    return text.replace("<s>", "").replace("</s>", "").replace("<pad>", "")


def _boxes(
    pattern: re.Pattern, text: str, size: Size, dropped: frozenset[str] = frozenset()
) -> dict[str, list]:
    answer: dict[str, list] = {"bboxes": [], "labels": []}
    for thing in pattern.findall(_without_frame(text)):
        label = _LABEL.match(thing)
        if label is None or label[1].strip() in dropped:
            continue
        for box in _BOX.findall(thing):  # places beyond a multiple of four do not form a box
            answer["bboxes"].append(pixels([int(place) for place in box], size))
            answer["labels"].append(label[1].strip().encode("ascii", "ignore").decode("ascii"))
    return answer


def _polygons(pattern: re.Pattern, text: str, size: Size) -> dict[str, list]:
    """One entry an object: <poly>...</poly>, or all after the label; its outlines are parted by <sep>."""
    answer: dict[str, list] = {"polygons": [], "labels": []}
    for thing in pattern.findall(_without_frame(text)):
        label = _LABEL.match(re.sub(r"^<loc_\d+>", "", thing))
        if label is None:
            continue
        framed = "<poly>" in thing and "</poly>" in thing
        for outlines in re.findall(r"<poly>(.*?)</poly>", thing) if framed else [thing]:
            found = [[int(place) for place in re.findall(_LOC, line)] for line in _POLYGON.findall(outlines)]
            if found:
                # A number too many, at an outline's end, has no partner.
                answer["polygons"].append([pixels(line[: len(line) // 2 * 2], size) for line in found])
                answer["labels"].append(label[1].strip())
    return answer
