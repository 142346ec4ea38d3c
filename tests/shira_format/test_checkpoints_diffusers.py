"""Diffusers pipelines, as diffusers itself saves them."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch
from transformers import CLIPTextConfig, CLIPTextModel

from shira_format._core.arrays import as_array
from shira_format.checkpoints import open_checkpoint
from shira_format.errors import FormatError, SourceError
from shira_format.storage.weight_files import WeightFiles, find_weights, is_index
from shira_format.tensors import same_bits

PARTS = ("text_encoder", "unet", "vae")


def pipeline() -> StableDiffusionPipeline:
    torch.manual_seed(11)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(4, 8),
        norm_num_groups=2, cross_attention_dim=8, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4),
        text_encoder=CLIPTextModel(text),
        unet=unet,
        tokenizer=None,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[StableDiffusionPipeline, Path]:
    """A pipeline, and folders in which it is saved in all the ways."""
    folder = tmp_path_factory.mktemp("pipelines")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = pipeline()
        pipe.save_pretrained(folder / "plain")
        pipe.save_pretrained(folder / "sharded", max_shard_size="10KB")
        pipe.save_pretrained(folder / "variant", variant="fp16")
        pipe.save_pretrained(folder / "sharded-variant", variant="fp16", max_shard_size="10KB")
        pipe.save_pretrained(folder / "bin", safe_serialization=False)
        pipe.save_pretrained(folder / "sharded-bin", safe_serialization=False, max_shard_size="10KB")
    return pipe, folder


@pytest.fixture
def plain(saved: tuple[StableDiffusionPipeline, Path], tmp_path: Path) -> Path:
    """A copy of the plain pipeline, to be spoiled."""
    return Path(shutil.copytree(saved[1] / "plain", tmp_path / "pipeline"))


def edit(folder: Path, **entries: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def refused(path: Path) -> str:
    with pytest.raises(SourceError) as caught:
        open_checkpoint(path)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["plain", "sharded", "variant", "sharded-variant", "bin", "sharded-bin"])
def test_pipelines(kind: str, saved: tuple[StableDiffusionPipeline, Path]) -> None:
    pipe, folder = saved
    checkpoint = open_checkpoint(folder / kind)
    expected = {
        f"{part}/{name}": as_array(tensor)
        for part in PARTS
        for name, tensor in getattr(pipe, part).state_dict().items()
    }
    # transformers leaves buffers out that it computes.
    assert set(checkpoint) <= set(expected)
    assert {name for name in expected if not name.endswith("position_ids")} <= set(checkpoint)
    assert len(list(checkpoint)) == len(checkpoint)
    for name, array in checkpoint.items():
        assert same_bits(expected[name], array)
        assert (array.shape, array.dtype) == (checkpoint.shape(name), checkpoint.dtype(name))
        assert same_bits(array.reshape(-1)[1:3], checkpoint.part(name, 1, 3))
        out = np.zeros(array.size, array.dtype)
        assert same_bits(array.reshape(-1), checkpoint.part(name, 0, array.size, out))
    assert PARTS == checkpoint.components
    assert folder / kind == checkpoint.path == checkpoint.folder
    assert {folder / kind / part for part in PARTS} == {file.parent for file in checkpoint.files}
    assert ("sharded" in kind) == (len(checkpoint.files) > len(PARTS))
    assert ("variant" in kind) == any("the variant fp16 is read" in notice for notice in checkpoint.notices)
    assert checkpoint.notices == open_checkpoint(folder / kind / "model_index.json").notices


@pytest.mark.parametrize("kind", ["plain", "sharded", "variant", "sharded-variant", "bin", "sharded-bin"])
def test_shards_are_those_of_a_copy(kind: str, saved: tuple[StableDiffusionPipeline, Path]) -> None:
    folder = saved[1] / kind
    checkpoint = open_checkpoint(folder)
    shards = checkpoint.shards
    assert shards is not None
    assert list(checkpoint) == [name for names in shards.values() for name in names] or "sharded" in kind
    assert sorted(checkpoint) == sorted(name for names in shards.values() for name in names)
    for shard, names in shards.items():
        assert shard.endswith(".safetensors")
        assert {shard.split("/")[0]} == {name.split("/")[0] for name in names}
        assert "pt" == checkpoint.metadata(shard)["format"]
    if "bin" not in kind:
        assert [file.relative_to(folder).as_posix() for file in checkpoint.files] == list(shards)


def test_weights_of_pytorch_get_the_name_that_a_loader_looks_for(plain: Path) -> None:
    for part, name in {"unet": "diffusion_pytorch_model", "text_encoder": "model"}.items():
        path = plain / part / f"{name}.safetensors"
        tensors = {name: torch.tensor(array) for name, array in open_checkpoint(path).items()}
        path.unlink()
        torch.save(tensors, plain / part / ("pytorch_model.bin" if name == "model" else f"{name}.bin"))
    shards = open_checkpoint(plain).shards
    assert shards is not None
    assert [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ] == list(shards)


@pytest.mark.parametrize("kind", ["plain", "sharded", "variant", "bin"])
def test_the_folder_of_one_component(kind: str, saved: tuple[StableDiffusionPipeline, Path]) -> None:
    pipe, folder = saved
    checkpoint = open_checkpoint(folder / kind / "unet")
    state = pipe.unet.state_dict()
    assert state.keys() == checkpoint.keys()
    assert all(same_bits(as_array(state[name]), array) for name, array in checkpoint.items())
    assert () == checkpoint.components


def test_the_index_of_a_variant_alone(saved: tuple[StableDiffusionPipeline, Path]) -> None:
    pipe, folder = saved
    path = folder / "sharded-variant" / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    assert pipe.unet.state_dict().keys() == open_checkpoint(path).keys()


def test_names_that_are_not_there(plain: Path) -> None:
    checkpoint = open_checkpoint(plain)
    name = "unet/conv_in.weight"
    assert name in checkpoint
    for other in ("conv_in.weight", "vae/conv_in.weight", "scheduler/x", "unet/", "unet", ""):
        assert other not in checkpoint
        for ask in (checkpoint.__getitem__, checkpoint.shape, checkpoint.dtype):
            with pytest.raises(KeyError):
                ask(other)
    assert 3 not in checkpoint


def test_plain_weights_go_before_a_variant(plain: Path) -> None:
    save_torch({"other": torch.zeros(1)}, plain / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    save_torch({"other": torch.zeros(1)}, plain / "vae" / "diffusion_pytorch_model.non_ema.safetensors")
    checkpoint = open_checkpoint(plain)
    assert "vae/other" not in checkpoint
    names = (f"vae/diffusion_pytorch_model.{variant}.safetensors" for variant in ("fp16", "non_ema"))
    assert (f"{plain.name}: not read: {', '.join(names)}",) == checkpoint.notices


def test_plain_weights_of_pytorch_go_before_a_variant_in_safetensors(plain: Path) -> None:
    (plain / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    save_torch({"other": torch.zeros(1)}, plain / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    torch.save({"w": torch.zeros(2)}, plain / "vae" / "diffusion_pytorch_model.bin")
    assert ["vae/w"] == [name for name in open_checkpoint(plain) if name.startswith("vae/")]


def test_several_variants_are_refused(plain: Path) -> None:
    path = plain / "vae" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    shutil.copy(plain / "unet" / path.name, plain / "vae" / "diffusion_pytorch_model.bf16.safetensors")
    assert f"{plain / 'vae'}: several variants (bf16, fp16) and no plain weights; keep one" == refused(plain)


def spoil_folder(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def spoil_weights(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()


def spoil_all(folder: Path) -> None:
    spoil_weights(folder)
    (folder / "vae" / "config.json").unlink()


def spoil_kind(folder: Path) -> None:
    spoil_all(folder)
    (folder / "vae" / "model.onnx").write_bytes(b"x")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_folder, "the folder of a component that model_index.json lists (AutoencoderKL) is missing"),
        (
            spoil_weights,
            "no weights of a supported format, but model_index.json lists the component (AutoencoderKL)",
        ),
        (spoil_all, "no weights of a supported format, but model_index.json lists the component (AutoencoderKL)"),
        (spoil_kind, "no weights of a supported format, but model_index.json lists the component (AutoencoderKL)"),
    ],
)
def test_what_should_have_weights(spoil: Callable[[Path], None], reason: str, plain: Path) -> None:
    spoil(plain)
    assert f"{plain / 'vae'}: {reason}" == refused(plain)


def test_what_has_no_weights(plain: Path) -> None:
    """Tokenizers may have a config.json or be missing; other objects have settings of their own."""
    (plain / "tokenizer").mkdir()
    (plain / "tokenizer" / "config.json").write_text("{}")
    (plain / "guider").mkdir()
    (plain / "guider" / "guider_config.json").write_text("{}")
    shutil.rmtree(plain / "scheduler")
    edit(
        plain,
        tokenizer=["transformers", "CLIPTokenizerFast"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        guider=["diffusers", "ClassifierFreeGuidance"],
        image_encoder=None,
        scales=[0.5, 1.0],
        mean=[1, 2, 3],
        _private=["a", "b"],
    )
    assert PARTS == open_checkpoint(plain).components


def test_code_of_the_pipelines_own(plain: Path) -> None:
    edit(plain, unet=[["my_module"], "MyUNet"], vae=["my_module", "MyScheduler"])  # which has weights all the same
    assert PARTS == open_checkpoint(plain).components


def test_names_keep_the_order_of_the_index(plain: Path) -> None:
    entries = {part: ["diffusers", "Model"] for part in ("vae", "text_encoder", "unet")}
    (plain / "model_index.json").write_text(json.dumps(entries))
    assert ("vae", "text_encoder", "unet") == open_checkpoint(plain).components


@pytest.mark.parametrize("name", ["..", "../vae", "a/b", "a\\b", ".", "", "C:", "/etc", "a\0"])
def test_components_must_be_folders_of_the_pipeline(name: str, plain: Path) -> None:
    edit(plain, **{name: ["diffusers", "AutoencoderKL"]})
    assert f"{plain / 'model_index.json'}: {name!r} is not the name of a component" == refused(plain)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "3", '{"unet": 1, "unet": 2}', "[" * 5000, '{"a": NaN}', "\ufeff{}"]
)
def test_an_index_that_is_none(text: str, plain: Path) -> None:
    (plain / "model_index.json").write_text(text, "utf-8")
    assert refused(plain).startswith(f"{plain / 'model_index.json'}: not the index of a pipeline: ")


def test_an_index_that_is_no_text(plain: Path) -> None:
    (plain / "model_index.json").write_bytes(b'{"\xff": 1}')
    assert refused(plain).startswith(f"{plain / 'model_index.json'}: not the index of a pipeline: ")


def test_a_pipeline_without_weights(plain: Path) -> None:
    (plain / "model_index.json").write_text('{"scheduler": ["diffusers", "DDIMScheduler"]}')
    assert f"{plain}: no component of model_index.json has weights" == refused(plain)


def test_a_pipeline_within_a_pipeline_is_refused(plain: Path) -> None:
    shutil.copytree(plain, plain / "inner")
    edit(plain, inner=["diffusers", "StableDiffusionPipeline"])
    assert f"{plain / 'inner'}: a pipeline within a pipeline" == refused(plain)


def test_damage_is_named(plain: Path) -> None:
    path = plain / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError) as caught:
        open_checkpoint(plain)
    assert path == caught.value.file


def test_remote_pipelines(saved: tuple[StableDiffusionPipeline, Path]) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(saved[1] / "sharded-variant"), "/test-pipelines/model", recursive=True)
    try:
        local = open_checkpoint(saved[1] / "sharded-variant")
        remote = open_checkpoint("memory://test-pipelines/model")
        assert list(local) == list(remote)
        assert all(same_bits(array, remote[name]) for name, array in local.items())
        assert (local.shards, local.components, local.notices) == (
            remote.shards,
            remote.components,
            remote.notices,
        )
    finally:
        memory.rm("/test-pipelines", recursive=True)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], None),
        (["config.json", "x.safetensors", "model.onnx"], None),
        (["model.safetensors", "pytorch_model.bin"], WeightFiles("model.safetensors")),
        (["model.safetensors", "model.safetensors.index.json"], WeightFiles("model.safetensors.index.json")),
        (["model-00001-of-00002.safetensors"], None),
        (["model.fp16-00001-of-00002.safetensors"], None),
        (["model-00001-of-00002.fp16.safetensors"], None),
        (["model.fp16.safetensors", "model.fp16.bin"], WeightFiles("model.fp16.safetensors", "fp16")),
        (["pytorch_model.fp16.bin"], WeightFiles("pytorch_model.fp16.bin", "fp16")),
        (["model.safetensors.index.fp16.json"], WeightFiles("model.safetensors.index.fp16.json", "fp16")),
        (
            ["diffusion_pytorch_model.non-ema.safetensors", "diffusion_pytorch_model.bin"],
            WeightFiles("diffusion_pytorch_model.bin", None, ("non-ema",)),
        ),
        (["other.fp16.safetensors"], None),
    ],
)
def test_usual_names(names: list[str], expected: WeightFiles | None) -> None:
    assert expected == find_weights(names)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.safetensors.index.json", True),
        ("model.safetensors.index.fp16.json", True),
        ("pytorch_model.bin.index.json", False),
        ("model.safetensors", False),
        ("model_index.json", False),
    ],
)
def test_indexes(name: str, expected: bool) -> None:
    assert expected == is_index(name, ".safetensors")


def test_other_folders_are_no_pipelines(tmp_path: Path) -> None:
    save_file({"w": np.zeros(1)}, tmp_path / "model.safetensors")
    assert () == open_checkpoint(tmp_path).components
    assert f"{tmp_path / 'model_index.json'}: no such file or folder" == refused(tmp_path / "model_index.json")
