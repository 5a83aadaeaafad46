"""Numbers and patterns of adapter files: what is refused, in which words, and how soon."""

import re
import time

import mlx.core as mx
import numpy as np
import pytest

from flux.adapters import checks
from flux.errors import FluxError

NAMES = [
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.12.ff.net.0.proj",
    "single_transformer_blocks.3.proj_mlp",
    "text_model.encoder.layers.1.mlp.fc1",
    "x_embedder",
]


@pytest.mark.parametrize("value", [16, 0.5, -1, 0, 1e38])
def test_number(value):
    assert checks.number(value, "alpha") == value
    assert checks.scalar(mx.array([value], mx.float32), "alpha") == pytest.approx(value)


@pytest.mark.parametrize(
    "value", ["16", "", None, [], [16], {}, True, float("nan"), float("inf"), 1e39, 10**400], ids=repr
)
def test_no_number(value):
    with pytest.raises(FluxError, match=r"^lora_alpha is .*; it should be a finite number$"):
        checks.number(value, "lora_alpha")


def test_positive():
    assert checks.positive(4, "r") == 4
    for value in (0, -1):
        with pytest.raises(FluxError, match=r"r is .* it should be above 0"):
            checks.positive(value, "r")


def test_scalars():
    assert checks.scalar(mx.array(8), "alpha") == 8  # kohya's alphas are whole where the user's were
    for tensor in (
        mx.zeros(0),
        mx.zeros((2,)),
        mx.array(True),
        mx.array(float("nan")),
        mx.array(float("inf")),
    ):
        with pytest.raises(FluxError, match=r"x\.alpha"):
            checks.scalar(tensor, "x.alpha")


def test_floats():
    checks.floats({"a": mx.zeros(1), "b": mx.zeros((2, 2), mx.bfloat16)})
    for kind in (mx.int8, mx.bool_, mx.int64, mx.uint32):
        with pytest.raises(
            FluxError, match=f"b has the type {str(kind).split('.')[-1]}; it should hold floats"
        ):
            checks.floats({"a": mx.zeros(1), "b": mx.zeros(1, kind)})
    with pytest.raises(FluxError, match=r"a has the shape \(0, 4\): it holds nothing"):
        checks.floats({"a": mx.zeros((0, 4))})


def test_sizes():
    checks.size((21504, 3072), "x")
    for shape in ((2**17 + 1, 1), (2**15, 2**14), (0, 5), (5,), (5, 5, 1)):
        with pytest.raises(FluxError, match="fits no layer"):
            checks.size(shape, "x")


def peft(table: dict, name: str) -> float | None:
    """PEFT's own rule (peft.utils.other.get_pattern_key), in one line."""
    return next((v for key, v in table.items() if re.match(rf"(.*\.)?({key})$", name)), None)


@pytest.mark.parametrize(
    "keys",
    [
        ["to_q", "attn.to_q", "proj"],
        ["x_embedder", "ff.net.0.proj", "q"],
        [r"attn\.to_(q|k|v)", ".*proj.*"],
        [r"^transformer_blocks\.\d+\..*", "to_q"],
        ["to_q", r"transformer_blocks\.[0-9]+\.attn.*"],
        ["to_q|proj_mlp|fc[12]"],
        [".*single.*", r"transformer_blocks.1?2.ff.*", r"layers.\d.mlp.fc1"],
        ["(?:single_)?transformer_blocks.3.proj_mlp", ""],
        ["^x_embedder$", "embedder"],
        [],
    ],
)
def test_patterns_match_as_peft_does(keys):
    table = {key: i + 1 for i, key in enumerate(keys)}
    patterns = checks.Patterns(table, "alpha_pattern")
    assert [patterns.find(name) for name in NAMES] == [peft(table, name) for name in NAMES]
    if len(keys) > 1:
        assert any(patterns.find(name) for name in NAMES)


def test_one_of_several_names():
    patterns = checks.Patterns({"^encoder.layers.1.mlp.fc1": 3}, "rank_pattern")
    assert patterns.find(NAMES[3]) is None
    assert patterns.find(NAMES[3], NAMES[3].removeprefix("text_model.")) == 3


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+", "(.*)*x", "(a|a)*b", "((a{1000}){1000}){1000}", "(?=(a+)+b)", r"(a)\1", "(a|b|ab)*c"),
        *(".*.*.*.*x", "(" * 100, "(a", "[", "a*" + "a" * 600, "(a|a|a|a)?" * 13, r"\p{L}"),
    ],
)
def test_unsafe_patterns(pattern):
    with pytest.raises(
        FluxError, match=r"alpha_pattern: the pattern '.* is not one that is safe to match"
    ) as error:
        checks.Patterns({"to_q": 1, pattern: 2}, "alpha_pattern")
    assert len(str(error.value)) < 160


def test_no_regular_expression():
    with pytest.raises(FluxError, match=r"r: '\[z-a\]' is not a regular expression: bad character range"):
        checks.Patterns({"[z-a]": 1}, "r")


def test_the_slowest_patterns_end():
    """Those that are allowed one at a time, many at once, at names that they try in every way."""
    table = {f".*a.*a.*(b|c|d|e|f)({i}|x)": 1 for i in range(200)}
    start = time.process_time()
    patterns = checks.Patterns(table, "alpha_pattern")
    with pytest.raises(FluxError, match="alpha_pattern takes more than 2 s"):
        [patterns.find("a" * 60 + "b") for _ in range(1000)]
    assert time.process_time() - start < 5


def test_very_many_patterns():
    for table in ({f"a{i}": 1 for i in range(10_001)}, {f"a{i}.*": 1 for i in range(201)}):
        with pytest.raises(FluxError, match="alpha_pattern"):
            checks.Patterns(table, "alpha_pattern")


def test_a_thousand_names_are_fast():
    """As diffusers writes them where ranks differ: a pattern for every layer."""
    table = {f"transformer_blocks.{i}.attn.to_q": i for i in range(2000)}
    start = time.process_time()
    patterns = checks.Patterns(table, "rank_pattern")
    assert [patterns.find(name) for name in table] == list(range(2000))
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "table", [[], "x", 5, {"to_q": "x"}, {"to_q": None}, {"to_q": float("nan")}], ids=repr
)
def test_no_table(table):
    with pytest.raises(FluxError, match="alpha_pattern"):
        checks.Patterns(table, "alpha_pattern")


def test_numpy_scalars():
    assert checks.scalar(mx.array(np.float16(4)), "alpha") == 4
