"""Files from strangers, spoilt by a seed: each is a clear line or sound, soon and within 1 GB.

A case that fails says its number; `python -m pytest tests/test_fuzz.py` gives the same again.
"""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from flux import jsonfiles
from flux.adapters import load, mismatches
from flux.adapters import save as save_adapter
from flux.adapters.beside import dense_weight
from flux.adapters.lora import linears
from flux.captioning.captioner import Captioner
from flux.captioning.tokenizer import BartTokenizer
from flux.errors import FluxError
from flux.models.transformer import Flux
from flux.preprocessing import prepare
from flux.tokenizers import CLIPTokenizer, T5Tokenizer, byte_letters
from flux.weights import checkpoints, registry, save, tensors, torchfile
from flux.weights.layouts import FOLDERS, Part
from tests import fuzzing, tiny, torch_files

KINDS = ("transformer", "ae", "clip", "t5")
SINGLE = {"transformer": "flux1-dev.safetensors", "ae": "ae.safetensors"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> save.Model:
    return tiny.model(*tiny.write_tokenizers(tmp_path_factory.mktemp("tokenizers")))


def part_files(folder: Path) -> dict[str, Path]:
    """The file of each part in a folder that this program wrote."""
    out = {}
    for kind in KINDS:
        single = folder / SINGLE.get(kind, "none")
        out[kind] = single if single.is_file() else next((folder / FOLDERS[kind]).glob("*.safetensors"))
    return out


def test_checkpoints(model, tmp_path):
    """1000 files of a network in both layouts."""
    save.save_bfl(tmp_path / "bfl", model, dtype=None)
    save.save_diffusers(tmp_path / "diffusers", model, dtype=mx.bfloat16)
    sources = {}
    for layout in ("bfl", "diffusers"):
        for kind, path in part_files(tmp_path / layout).items():
            config = jsonfiles.read(path.parent / "config.json") if layout == "diffusers" else {}
            part = Part(kind, (path,), config)
            network = checkpoints.load_part(part, mx.float32)
            mx.eval(network.parameters())
            sources[layout, kind] = fuzzing.File.read(path), config, network
    path = tmp_path / "spoilt.safetensors"
    ends: Counter[str] = Counter()
    with fuzzing.bounded_memory():
        for case in range(1000):
            rng = random.Random(case)
            (layout, kind), (file, config, original) = rng.choice(list(sources.items()))
            spoilt = fuzzing.mutate(file, rng)
            spoilt.write(path)

            def load(kind=kind, config=config):
                network = checkpoints.load_part(Part(kind, (path,), config), mx.float32)
                mx.eval(network.parameters())
                return network

            found = fuzzing.outcome(load, f"case {case}, {kind} of {layout}")
            ends["line" if isinstance(found, FluxError) else "sound"] += 1
            if isinstance(found, FluxError):
                assert str(path) in str(found), f"case {case}: no file in: {found}"
            elif spoilt.exact:
                assert tiny.same(found, original), f"case {case}: another {kind} was read"
            else:
                weights = [w for _, w in tree_flatten(found.parameters())]
                assert all(mx.issubdtype(w.dtype, mx.floating) for w in weights), f"case {case}"
    assert min(ends["line"], ends["sound"]) > 20, ends


def odd_view(rng: random.Random) -> bytes:
    """A tensor on a storage of 12 numbers, or somewhat beside it."""
    axes = rng.choice((0, 1, 2, 2, 3))
    shape = tuple(rng.choice((0, 1, 2, 3, 4, 2**40)) if rng.random() < 0.3 else 2 for _ in range(axes))
    strides = tuple(rng.choice((0, 1, 2, 4, -1, 2**70)) if rng.random() < 0.3 else 2 for _ in range(axes))
    return torch_files.tensor(
        "FloatStorage", "s-layers.0.weight", 12, rng.choice((0, 0, 3, 11, 12)), shape, strides
    )


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # of pickletools, about what is in the pickle
def test_pytorch_files(tmp_path):
    """400 files in both formats."""
    rng = np.random.default_rng(0)
    arrays = {
        f"layers.{i}.weight": rng.standard_normal((4, 3)).astype(kind)
        for i, kind in enumerate((np.float32, np.float16, np.float64))
    }
    pickled, data = torch_files.table(torch_files.whole(arrays)), torch_files.arrays_of(arrays)
    sizes = {f"s-{name}": array.size for name, array in arrays.items()}
    path = tmp_path / "spoilt.bin"
    ends: Counter[str] = Counter()
    with fuzzing.bounded_memory():
        for case in range(400):
            rng = random.Random(case)
            kind = case % 4
            spoilt = fuzzing.mutate_bytes(pickled, rng) if kind in (1, 2) else pickled
            if kind == 3:
                spoilt = torch_files.table(torch_files.whole(arrays) | {"other": odd_view(rng)})
            if rng.random() < 0.5:
                torch_files.write_zip(path, spoilt, data)
            else:
                path.write_bytes(
                    torch_files.legacy(spoilt, {key: (sizes[key], content) for key, content in data.items()})
                )
            if spoilt is pickled:
                path.write_bytes(fuzzing.mutate_bytes(path.read_bytes(), rng))
            found = fuzzing.outcome(lambda: torchfile.load([path]), f"case {case}")
            ends["line" if isinstance(found, FluxError) else "sound"] += 1
            if not isinstance(found, FluxError):
                assert sum(array.nbytes for array in found.values()) < 4 * path.stat().st_size
    assert min(ends["line"], ends["sound"]) > 20, ends


def adapter_sources() -> dict[str, tuple[dict[str, np.ndarray], dict[str, str], dict | None]]:
    """Adapters of the tiny model in the formats of the field: tensors, metadata, PEFT's config."""
    size, rng = tiny.FLUX.hidden_size, np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return 0.1 * rng.standard_normal(shape, dtype=np.float32)

    def pair(down: str, up: str, rows: int = size, columns: int = size) -> dict[str, np.ndarray]:
        return {down: normal(4, columns), up: normal(rows, 4)}

    alpha = {"alpha": np.array(2, np.float32)}
    native = pair("{}.lora_A.weight", "{}.lora_B.weight") | {"{}.alpha": alpha["alpha"]}
    kohya = {
        f"lora_unet_{{}}.{key}": value for key, value in pair("lora_down.weight", "lora_up.weight").items()
    }
    lokr = {"lokr_w1": normal(4, 4), "lokr_w2_a": normal(16, 2), "lokr_w2_b": normal(2, 16), **alpha}
    ours = ("double_blocks.0.img_attn.proj", "double_blocks.1.txt_attn.proj")
    theirs = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_add_out")
    norm = {"double_blocks.0.img_attn.norm.query_norm.scale": normal(size // 2)}

    def named(parts: dict[str, np.ndarray], modules: tuple[str, ...]) -> dict[str, np.ndarray]:
        return {key.format(module): value for module in modules for key, value in parts.items()}

    lycoris = tuple("lycoris_" + name.replace(".", "_") for name in (ours[0], *theirs))
    kinds = {
        "LoHa": {
            **{f"{{}}.hada_w{i}_a": normal(size, 4) for i in (1, 2)},
            **{f"{{}}.hada_w{i}_b": normal(4, size) for i in (1, 2)},
        },
        "GLoRA": {
            **{f"{{}}.{x}1.weight": normal(size, 4) for x in "ab"},
            **{f"{{}}.{x}2.weight": normal(4, size) for x in "ab"},
        },
        "(IA)3": {"{}.weight": normal(size), "{}.on_input": np.array(True)},
        "OFT": {"{}.oft_blocks": normal(size // 4, 4, 4), "{}.alpha": np.array(0.01, np.float32)},
        "BOFT": {"{}.oft_blocks": normal(2, size // 4, 4, 4), "{}.rescale": 1 + normal(size, 1)},
        "DoRA of columns": {
            "{}.lora_down.weight": normal(4, size),
            "{}.lora_up.weight": normal(size, 4),
            "{}.dora_scale": normal(1, size),
        },
    }
    config = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn.to_q": 2}, "rank_pattern": {}}
    packed = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    plain = pair("{}.lora_A.weight", "{}.lora_B.weight")
    return {
        "native": ({"diffusion_model." + key: v for key, v in named(native, ours).items()}, {}, None),
        "kohya": (
            named(kohya, tuple(name.replace(".", "_") for name in ours)),
            {"ss_network_dim": "4", "ss_network_alpha": "2"},
            None,
        ),
        "diffusers": (
            {"transformer." + key: value for key, value in named(plain, theirs).items()},
            {"lora_adapter_metadata": packed},
            None,
        ),
        "PEFT": (
            {"base_model.model." + key: value for key, value in named(plain, theirs).items()},
            {},
            config,
        ),
        "LoKr": (
            named({f"lycoris_{{}}.{key}": v for key, v in lokr.items()}, (ours[0].replace(".", "_"),)),
            {},
            None,
        ),
        "DoRA": (
            {
                "diffusion_model." + k: v
                for k, v in named(native | {"{}.dora_scale": normal(size)}, ours).items()
            },
            {},
            None,
        ),
        "full": (
            {
                f"diffusion_model.{ours[0]}.diff": normal(size, size),
                f"diffusion_model.{ours[0]}.diff_b": normal(size),
            },
            {},
            None,
        ),
        "control": (named(plain, ours) | norm, {}, None),
        **{kind: (named(parts, lycoris), {}, None) for kind, parts in kinds.items()},
        "OFT of PEFT": ({f"base_model.model.{theirs[1]}.oft_R.weight": normal(size // 4, 6)}, {}, config),
    }


UNWRITTEN = ("OFT", "BOFT", "OFT of PEFT")  # no format of ours holds them


def test_adapters(tmp_path):
    """800 files of fifteen kinds, of PEFT's config among them."""
    flow = tiny.randomize(Flux(tiny.FLUX), 0)
    sources = {}
    for name, (arrays, metadata, config) in adapter_sources().items():
        path = tmp_path / name / ("adapter_model.safetensors" if config else "adapter.safetensors")
        tensors.save(path, {key: mx.array(value) for key, value in arrays.items()}, metadata)
        assert not mismatches(flow, load(path)), name
        sources[name] = path, fuzzing.File.read(path), config
    ends: Counter[str] = Counter()
    with fuzzing.bounded_memory():
        for case in range(800):
            rng = random.Random(case)
            name, (path, file, config) = rng.choice(list(sources.items()))
            by_config = config and rng.random() < 0.7
            (file if by_config else fuzzing.mutate(file, rng)).write(path)
            if config:
                text = fuzzing.mutate_json(config, rng) if by_config else json.dumps(config).encode()
                path.with_name("adapter_config.json").write_bytes(text)

            def use(path=path, name=name):
                adapter = load(path)
                wrong = mismatches(flow, adapter)
                if name not in UNWRITTEN:
                    save_adapter(tmp_path / "again.safetensors", adapter, "native")
                layers = {module: d for module, d in adapter.modules.items() if module not in wrong}
                return [d.delta(dense_weight(linears(flow)[module])) for module, d in layers.items()]

            found = fuzzing.outcome(use, f"case {case}, {name}")
            ends["line" if isinstance(found, FluxError) else "sound"] += 1
            if not isinstance(found, FluxError):
                assert all(mx.isfinite(change).all().item() for change in found), f"case {case}, {name}"
    assert min(ends["line"], ends["sound"]) > 20, ends


TEXT = "a red äpple ﬁ ½ on </s> a <|endoftext|> 日本 <mask>background"


def tokenizer_json(kind: str, vocab: object, normalizer: dict | None = None) -> dict:
    special = ("<pad>", "</s>", "<unk>") if kind == "Unigram" else ("<s>", "<pad>", "</s>", "<unk>")
    tokens = [{"id": i, "content": token, "lstrip": False} for i, token in enumerate(special)]
    model = {"type": kind, "vocab": vocab, **({"merges": ["a b", ["c", "d</w>"]]} if kind == "BPE" else {})}
    return {"model": model, "added_tokens": tokens, "normalizer": normalizer}


def tokenizer_cases(folder: Path) -> list[tuple[Path, object, Callable]]:
    """A file, what it holds (bytes, or JSON), and what is done with it in its folder."""
    clip, t5 = tiny.write_tokenizers(folder)
    letters = ["<s>", "<pad>", "</s>", "<unk>", *byte_letters(), *(c + "</w>" for c in byte_letters())]
    bpe = {piece: i for i, piece in enumerate([*letters, "ab", "cd</w>", "<|startoftext|>", "<|endoftext|>"])}
    unigram = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["▁a", -1.0], ["▁", -2.0], ["red", -3.5]]
    step = {"type": "Precompiled", "precompiled_charsmap": ""}
    jsons = {
        "clip_json": tokenizer_json("BPE", bpe),
        "t5_json": tokenizer_json("Unigram", unigram, {"type": "Sequence", "normalizers": [step]}),
        "bart_json": tokenizer_json("BPE", bpe),
    }
    for name, content in jsons.items():
        (folder / name).mkdir()
        (folder / name / "tokenizer.json").write_text(json.dumps(content))

    def use_t5(path: Path) -> object:
        return T5Tokenizer.from_folder(path.parent, 30)

    def use_clip(path: Path) -> object:
        return CLIPTokenizer.from_folder(path.parent)

    def use_bart(path: Path) -> object:
        return BartTokenizer.from_folder(path.parent)

    return [
        (clip / "vocab.json", json.loads((clip / "vocab.json").read_text()), use_clip),
        (clip / "merges.txt", b"a b\nc d</w>\nab c\n", use_clip),
        (t5 / "spiece.model", (t5 / "spiece.model").read_bytes(), use_t5),
        (folder / "clip_json" / "tokenizer.json", jsons["clip_json"], use_clip),
        (folder / "t5_json" / "tokenizer.json", jsons["t5_json"], use_t5),
        (folder / "bart_json" / "tokenizer.json", jsons["bart_json"], use_bart),
    ]


def spoil(path: Path, content: object, rng: random.Random) -> None:
    is_bytes = isinstance(content, bytes)
    path.write_bytes(fuzzing.mutate_bytes(content, rng) if is_bytes else fuzzing.mutate_json(content, rng))


def restore(path: Path, content: object) -> None:
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def test_tokenizers(tmp_path):
    """100 of the files that tokenizers are read from."""
    cases = tokenizer_cases(tmp_path)
    ends: Counter[str] = Counter()
    with fuzzing.bounded_memory():
        for case in range(100):
            rng = random.Random(case)
            path, content, read = rng.choice(cases)
            spoil(path, content, rng)

            def use(path=path, read=read):
                tokenizer = read(path)
                ids = tokenizer.encode(TEXT)
                return tokenizer, ids

            found = fuzzing.outcome(use, f"case {case}, {path.parent.name}/{path.name}")
            restore(path, content)
            ends["line" if isinstance(found, FluxError) else "sound"] += 1
            if not isinstance(found, FluxError):
                tokenizer, ids = found
                assert all(0 <= i < tokenizer.size for i in ids), f"case {case}: {path.name}"
    assert min(ends["line"], ends["sound"]) > 20, ends


def config_cases(model: save.Model, folder: Path) -> list[tuple[Path, dict, Callable]]:
    """A config, and a use of what it speaks of."""
    save.save_diffusers(folder / "model", model, dtype=None)
    shutil.copytree(registry.TINY_CAPTIONER_FOLDER, folder / "captioner")

    def use_part(kind: str, path: Path) -> Callable[[Path], mx.array]:
        def use(config: Path) -> mx.array:
            network = checkpoints.load_part(Part(kind, (path,), jsonfiles.read(config)), mx.float32)
            return {
                "transformer": lambda: network.img_in.weight,
                "ae": lambda: network.decode(network.encode(mx.ones((1, 16, 16, 3)))),
                "clip": lambda: network(mx.array([[1, 2, 513]]), 513).pooled_output,
                "t5": lambda: network(mx.array([[1, 2, 3]])),
            }[kind]()

        return use

    def use_captioner(config: Path) -> mx.array:
        captioner = Captioner.from_folder(config.parent, mx.float32)
        picture = prepare([Image.new("RGB", (8, 8))], captioner.pictures)
        return captioner.model.encode(picture, *captioner.tokenizer(["a"]))[0]

    def use_model(_: Path) -> mx.array:
        checkpoint = checkpoints.find(str(folder / "model"))
        checkpoint.load_clip()
        spec = checkpoint.spec
        return mx.array([float(spec.steps), spec.guidance, spec.cfg_scale, *spec.image_size])

    cases = [
        (path.with_name("config.json"), use_part(kind, path))
        for kind, path in part_files(folder / "model").items()
    ]
    names = ("config.json", "generation_config.json", "preprocessor_config.json")
    cases += [(folder / "captioner" / name, use_captioner) for name in names]
    clip = folder / "model" / "text_encoder" / "model.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(fuzzing.File.read(clip).names(), clip.name)}
    clip.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    jsons = ("model_index.json", "defaults.json", "scheduler/scheduler_config.json")
    cases += [(folder / "model" / name, use_model) for name in jsons]
    cases += [(clip.with_name("model.safetensors.index.json"), use_model)]
    return [(path, jsonfiles.read(path), use) for path, use in cases]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of what is passed over
def test_configs(model, tmp_path):
    """100 configs of networks, of whole models and of the captioner."""
    cases = config_cases(model, tmp_path)
    ends: Counter[str] = Counter()
    with fuzzing.bounded_memory():
        for case in range(100):
            rng = random.Random(case)
            path, content, use = rng.choice(cases)
            spoil(path, content, rng)

            def run(path=path, use=use):
                result = use(path)
                mx.eval(result)
                return result

            found = fuzzing.outcome(run, f"case {case}, {path.parent.name}/{path.name}")
            restore(path, content)
            ends["line" if isinstance(found, FluxError) else "sound"] += 1
            if not isinstance(found, FluxError):
                assert mx.isfinite(found).all().item(), f"case {case}: {path}"
    assert min(ends["line"], ends["sound"]) > 20, ends
