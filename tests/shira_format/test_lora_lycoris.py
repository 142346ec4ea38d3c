"""LyCORIS' algorithms, against LyCORIS itself: its forward pass, and its merge where that agrees with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from lycoris import LycorisNetwork, create_lycoris
from lycoris.modules.base import LycorisBaseModule
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from lycoris.utils import convert_diffusers_name_to_compvis
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModelWithProjection

from shira_format.checkpoints import open_checkpoint
from shira_format.convert import lora_to_shira
from shira_format.errors import SourceError
from shira_format.format import load
from shira_format.live import apply
from shira_format.lora import DIALECTS, open_lora
from shira_format.names.modules import flat
from tests.diffusion import layers, open_clip_state, pipeline, save, saved_weights, text_config


class Zoo(nn.Module):
    """A layer of each kind that LyCORIS adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype = torch.float64
        self.wide = nn.Linear(24, 40)
        self.square = nn.Linear(40, 40, bias=False)
        self.one = nn.Linear(12, 1)
        self.conv = nn.Conv2d(8, 12, 3, padding=1)
        self.conv_square = nn.Conv2d(12, 12, (1, 3), stride=2)
        self.pointwise = nn.Conv2d(12, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.line = nn.Conv1d(6, 10, 5)
        self.cube = nn.Conv3d(4, 6, 2)
        self.layer_norm = nn.LayerNorm(24)
        self.group_norm = nn.GroupNorm(2, 8)

    def forward(self) -> list[torch.Tensor]:
        """Each layer's output for a fixed input, in turn."""
        torch.manual_seed(77)

        def x(*shape: int) -> torch.Tensor:
            return torch.randn(2, *shape, dtype=torch.float64).to(self.dtype)

        return [
            self.wide(x(24)), self.square(x(40)), self.one(x(12)), self.conv(x(8, 5, 5)), self.conv_square(x(12, 5, 5)),
            self.pointwise(x(12, 5, 5)), self.grouped(x(8, 5, 5)), self.line(x(6, 9)), self.cube(x(4, 3, 3, 3)),
            self.layer_norm(x(24)), self.group_norm(x(8, 5, 5)),
        ]  # fmt: skip


def zoo(dtype: torch.dtype = torch.float64) -> Zoo:
    torch.manual_seed(3)
    model = Zoo().to(dtype)
    model.dtype = dtype
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # norms are not all ones
    return model


@pytest.fixture(autouse=True)
def _preset() -> Iterator[None]:
    """``create_lycoris`` changes its class."""
    before = {key: value for key, value in vars(LycorisNetwork).items() if key.isupper()}
    yield
    for key, value in before.items():
        setattr(LycorisNetwork, key, value)


def network(model: nn.Module, **options: Any) -> LycorisNetwork:
    """LyCORIS around ``model``, at work in it, with noise on all that it trains; alpha is not the rank."""
    settings = {
        "linear_dim": 3,
        "linear_alpha": 1.25,
        "conv_dim": 2,
        "conv_alpha": 5.0,
        "preset": "full",
        **options,
    }
    made = create_lycoris(model, 1.0, **settings)
    return at_work(made, model)


def at_work(made: LycorisNetwork, model: nn.Module) -> LycorisNetwork:
    dtype = next(model.parameters()).dtype
    made.apply_to()
    made.to(dtype)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made.eval()


def save_base(model: nn.Module, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors"
    )
    return folder


def save_lora(made: LycorisNetwork, folder: Path) -> Path:
    path = folder / "lora" / "lora.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in made.state_dict().items()}, path)
    return path


def converted(lora: Path, base: Path, dialect: str = "lycoris") -> dict[str, torch.Tensor]:
    """All weights of the base after the whole conversion, everything kept."""
    out = lora.with_name("adapter.st")
    lora_to_shira(lora, base, out, density=1.0)
    adapter = load(out)
    assert adapter.manifest["source"]["dialect"] == dialect
    assert [name for name, dialect in DIALECTS.items() if dialect.recognises(lora)] == [dialect]
    weights = (
        saved_weights(base) if (base / "model_index.json").exists() else load_file(base / "model.safetensors")
    )
    apply(adapter, weights)
    return weights


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, error


# By name: options, and parts that the file must have, or must not have.
ALGORITHMS: dict[str, tuple[dict[str, Any], str, str]] = {
    "locon": ({"algo": "lora"}, "lora_up.weight lora_down.weight", "lora_mid.weight"),
    "locon tucker": ({"algo": "lora", "use_tucker": True}, "lora_mid.weight", ""),
    "locon scalar": ({"algo": "lora", "use_scalar": True}, "lora_up.weight", "scalar"),
    "loha": ({"algo": "loha"}, "hada_w1_a hada_w1_b hada_w2_a hada_w2_b", "hada_t1"),
    "loha tucker": ({"algo": "loha", "use_tucker": True}, "hada_t1 hada_t2", ""),
    "loha scalar": ({"algo": "loha", "use_scalar": True}, "hada_w1_a", "scalar"),
    "lokr": ({"algo": "lokr", "factor": 2}, "lokr_w1 lokr_w2_a lokr_w2_b", "lokr_w1_a"),
    "lokr whole": ({"algo": "lokr", "factor": 4, "full_matrix": True}, "lokr_w1 lokr_w2", "lokr_w2_a"),
    "lokr large rank": ({"algo": "lokr", "linear_dim": 100, "conv_dim": 100}, "lokr_w1 lokr_w2", "lokr_w2_a"),
    "lokr factor 1": ({"algo": "lokr", "factor": 1}, "lokr_w1 lokr_w2_a", ""),
    "lokr both": (
        {"algo": "lokr", "linear_dim": 1, "conv_dim": 1, "decompose_both": True, "factor": 6},
        "lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b", "",
    ),
    "lokr left": (
        {"algo": "lokr", "linear_dim": 2, "decompose_both": True, "unbalanced_factorization": True, "factor": 2},
        "lokr_w1_a lokr_w2", "",
    ),
    "lokr tucker": ({"algo": "lokr", "factor": 2, "conv_dim": 1, "use_tucker": True}, "lokr_t2", ""),
    "lokr unbalanced": ({"algo": "lokr", "factor": 3, "unbalanced_factorization": True}, "lokr_w1", ""),
    "lokr scalar": ({"algo": "lokr", "factor": 2, "use_scalar": True}, "lokr_w1", "scalar"),
    "full": ({"algo": "full"}, "diff diff_b", "alpha"),
}  # fmt: skip
DORA = [name for name in ALGORITHMS if name != "full"]
CASES: list[tuple[str, dict[str, Any], str]] = [
    *((name, {}, "") for name in ALGORITHMS),
    *((name, {"dora_wd": True, "wd_on_output": True}, "dora_scale") for name in DORA),
    *((name, {"dora_wd": True, "wd_on_output": False}, "dora_scale") for name in DORA),
    *((name, {"train_norm": True}, "w_norm b_norm") for name in ("locon", "full")),
]


def parts_of(path: Path) -> set[str]:
    return {name.partition(".")[2] for name in load_file(path)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("name", "more", "added"), CASES)
def test_forward(name: str, more: dict[str, Any], added: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """What LyCORIS computes as it trains."""
    options, needed, absent = ALGORITHMS[name]
    model, ours = zoo(dtype), zoo(dtype)
    base = save_base(model, tmp_path)
    plain = [output.detach().clone() for output in model()]
    lora = save_lora(network(model, **options, **more), tmp_path)
    parts = parts_of(lora)
    assert parts >= {*needed.split(), *added.split()}
    assert not parts & set(absent.split())
    ours.load_state_dict(converted(lora, base))
    changed = 0
    for before, expected, found in zip(plain, model(), ours(), strict=True):
        close(found, expected, 1e-12 if dtype == torch.float64 else 5e-6)
        changed += not torch.equal(before, expected)
    assert changed == (11 if "w_norm" in added else 9)


@pytest.mark.parametrize("algorithm", ["locon", "loha", "lokr"])
def test_rs_lora_is_in_the_alpha(algorithm: str, tmp_path: Path) -> None:
    model, ours = zoo(), zoo()
    base = save_base(model, tmp_path)
    made = LycorisNetwork(
        model, lora_dim=2, conv_lora_dim=2, alpha=1.5, conv_alpha=2.5, network_module=algorithm, rs_lora=True, factor=1
    )  # fmt: skip
    assert made.loras[0].scale == 1.5 / 2**0.5
    # Where both factors are whole, the file has no trace of it, and LyCORIS reads it as we do.
    whole = {lora.lora_name for lora in made.loras if isinstance(lora, LokrModule) and lora.use_w1 and lora.use_w2}
    assert len(whole) < 3
    lora = save_lora(at_work(made, model), tmp_path)
    ours.load_state_dict(converted(lora, base))
    names = [f"lycoris_{name}" for name, _ in model.named_children()]
    for name, expected, found in zip(names, model(), ours(), strict=True):
        if name not in whole:
            close(found, expected, 1e-7)  # the alpha is saved as it was made, in float32


MERGED = {
    # Where alpha is the rank, or has no say, LyCORIS' own merge is what it trains.
    "locon": {"algo": "lora", "linear_alpha": 0.5},
    "locon tucker": {"algo": "lora", "use_tucker": True, "linear_alpha": 0.5},
    "loha": {"algo": "loha", "linear_alpha": 3, "conv_alpha": 2},
    "loha tucker": {"algo": "loha", "linear_alpha": 3, "conv_alpha": 2, "use_tucker": True},
    "lokr": {"algo": "lokr", "linear_alpha": 3, "conv_alpha": 2, "factor": 2},
    "lokr whole": {"algo": "lokr", "linear_alpha": 7, "full_matrix": True, "factor": 4},
    "full": {"algo": "full", "train_norm": True},
}


@pytest.mark.parametrize("more", [{}, {"dora_wd": True}, {"dora_wd": True, "wd_on_output": False}], ids=str)
@pytest.mark.parametrize("name", MERGED)
def test_merge(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    """The weights that LyCORIS merges, one by one."""
    if more and name == "full":
        more = {}
    model = zoo()
    base = save_base(model, tmp_path)
    settings = {"linear_dim": 3, "conv_dim": 2, "conv_alpha": 5.0, "preset": "full", **MERGED[name], **more}
    made = create_lycoris(model, 1.0, **settings)
    generator = torch.Generator().manual_seed(8)
    state = {}
    for lora in made.loras:
        lora.double().eval()
        with torch.no_grad():
            for parameter in lora.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        if name == "full" and hasattr(lora, "weight"):
            state |= {f"{lora.lora_name}.diff": lora.weight.detach().clone()}
            state |= {} if lora.bias is None else {f"{lora.lora_name}.diff_b": lora.bias.detach().clone()}
        else:
            state |= {
                f"{lora.lora_name}.{key}": value.detach().clone() for key, value in lora.state_dict().items()
            }
    path = tmp_path / "lora" / "lora.safetensors"
    path.parent.mkdir()
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made.merge_to(1.0)
    found = converted(path, base)
    expected = model.state_dict()
    assert sum(not torch.equal(before[key], expected[key]) for key in expected) >= 9
    for key, value in expected.items():
        close(found[key], value, 1e-12)


# Alpha is the rank, so that LyCORIS' merge is what it trains.
KINDS: list[tuple[type[LycorisBaseModule], dict[str, Any]]] = [
    (LoConModule, {"alpha": 0.5}),
    (LohaModule, {"alpha": 2}),
    (LokrModule, {"alpha": 2, "factor": 2}),
    (FullModule, {}),
    (LoConModule, {"alpha": 1, "use_tucker": True, "weight_decompose": True}),
    (LohaModule, {"alpha": 2, "use_tucker": True, "weight_decompose": True, "wd_on_out": False}),
    (LokrModule, {"alpha": 2, "factor": 4, "full_matrix": True}),
]


@pytest.mark.parametrize("xl", [False, True], ids=["sd15", "sdxl"])
def test_pipelines(xl: bool, tmp_path: Path) -> None:
    """Every layer of three models in turn under another algorithm, and the norms; SDXL by the names that kohya gives it."""
    pipe = pipeline(xl=xl)
    base = save(pipe, tmp_path / "base")
    modules: dict[str, nn.Module] = layers(pipe, "", te="lora_te1" if xl else "lora_te")
    modules |= {
        f"lora_unet_{flat(name)}": module
        for name, module in pipe.unet.named_modules()
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm))
    }
    state = {}
    generator = torch.Generator().manual_seed(9)
    for number, (name, module) in enumerate(modules.items()):
        kind, options = KINDS[number % len(KINDS)]
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            kind, options = NormModule, {}
        lora = kind(name, module, 1.0, **({} if kind is NormModule else {"lora_dim": 2}), **options)
        with torch.no_grad():
            for parameter in lora.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        parts = lora.state_dict()
        if kind is FullModule:
            parts = {"diff": lora.weight.detach().clone()}
            parts |= {} if lora.bias is None else {"diff_b": lora.bias.detach().clone()}
        state |= {f"{name}.{part}": tensor.detach().clone().contiguous() for part, tensor in parts.items()}
        lora.merge_to(1.0)
    expected = saved_weights(save(pipe, tmp_path / "merged"))
    before = saved_weights(base)
    changed = {name for name in before if not torch.equal(before[name], expected[name])}
    assert len(changed) > len(modules)
    assert any("norm" in name for name in changed)
    if xl:
        state = {
            f"{convert_diffusers_name_to_compvis(key.partition('.')[0])}.{key.partition('.')[2]}": tensor
            for key, tensor in state.items()
        }
        assert any("output_blocks" in key for key in state)
    (tmp_path / "lora").mkdir()
    save_file(state, tmp_path / "lora" / "lora.safetensors")
    found = converted(tmp_path / "lora" / "lora.safetensors", base)
    assert found.keys() == expected.keys()
    for name in changed:
        close(found[name], expected[name], 1e-6)
    assert all(torch.equal(found[name], before[name]) for name in before.keys() - changed)


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "full"])
def test_single_files_of_open_clip(algorithm: str, tmp_path: Path) -> None:
    """Rows of a fused weight, its bias, and what they may not be: queries alone, by any algorithm but DoRA."""
    text = CLIPTextModelWithProjection(text_config()).double()
    with torch.no_grad():
        for parameter in text.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    base = {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in open_clip_state(text).items()}
    base["model.diffusion_model.out.2.weight"] = torch.zeros(2, 2)
    save_file({name: tensor.detach().contiguous() for name, tensor in base.items()}, tmp_path / "base.safetensors")
    kinds = {"lora": LoConModule, "loha": LohaModule, "lokr": LokrModule, "full": FullModule}
    state = {}
    generator = torch.Generator().manual_seed(10)
    for name, module in text.named_modules():
        if not name.endswith(
            ("layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj", "layers.1.self_attn.k_proj", "fc1")
        ):
            continue
        lora = kinds[algorithm](name, module, 1.0, lora_dim=2, alpha=2, factor=2).double()
        with torch.no_grad():
            for parameter in lora.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        parts = lora.state_dict()
        if algorithm == "full":
            parts = {"diff": lora.weight.detach().clone(), "diff_b": lora.bias.detach().clone()}
        state |= {f"lora_te2_{flat(name)}.{part}": tensor.detach().clone() for part, tensor in parts.items()}
        lora.merge_to(1.0)
    path = save_state(state, tmp_path)
    out = path.with_name("adapter.st")
    lora_to_shira(path, tmp_path / "base.safetensors", out, density=1.0, dialect="lycoris")
    weights = load_file(tmp_path / "base.safetensors")
    apply(load(out), weights)
    expected = open_clip_state(text)
    for name, tensor in expected.items():
        close(weights[f"conditioner.embedders.1.model.{name}"], tensor.detach(), 1e-12)
    assert not torch.equal(expected["transformer.resblocks.0.attn.in_proj_weight"], base["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"])  # fmt: skip


def save_state(state: Mapping[str, torch.Tensor], folder: Path) -> Path:
    path = folder / "lora" / "lora.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    return path


@pytest.mark.parametrize("on_out", [True, False])
def test_dora_of_modules_in_parts(on_out: bool, tmp_path: Path) -> None:
    """FLUX's fused weights in diffusers' parts: norms are those of the whole module."""
    with torch.no_grad():
        torch.manual_seed(44)
        model = FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4),
        ).double()  # fmt: skip
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(state, tmp_path / "base.safetensors")
        names = [f"transformer_blocks.0.attn.to_{x}.weight" for x in "qkv"]
        fused = nn.Linear(16, 48, bias=False).double()
        fused.weight.copy_(torch.cat([state[name] for name in names]))
        lora = LoConModule("x", fused, 1.0, 2, 2, weight_decompose=True, wd_on_out=on_out).double()
        for parameter in lora.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, dtype=torch.float64))
    path = save_state(
        {f"lora_unet_double_blocks_0_img_attn_qkv.{part}": tensor for part, tensor in lora.state_dict().items()},
        tmp_path,
    )
    lora.merge_to(1.0)
    lora_to_shira(path, tmp_path / "base.safetensors", path.with_name("a.st"), density=1.0)
    weights = load_file(tmp_path / "base.safetensors")
    apply(load(path.with_name("a.st")), weights)
    for name, expected in zip(names, fused.weight.detach().chunk(3), strict=True):
        close(weights[name], expected, 1e-12)


@pytest.mark.parametrize("by_row", [True, False])
def test_dora_of_rows_of_a_fused_weight(by_row: bool, tmp_path: Path) -> None:
    """Norms are those of the module's own rows, not of all."""
    generator = torch.Generator().manual_seed(3)
    fused = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    tensor = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    ends = {"transformer.resblocks.0.ln_1.weight": 2, "token_embedding.weight": 2, "ln_final.weight": 2}
    base = {tensor: fused} | {
        f"conditioner.embedders.1.model.{end}": torch.ones(size, dtype=torch.float64) for end, size in ends.items()
    }
    save_file(base | {"model.diffusion_model.out.2.weight": torch.zeros(2, 2)}, tmp_path / "base.safetensors")
    shapes = ((2, 1), (1, 2), (2, 1) if by_row else (1, 2))
    up, down, norms = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    name = "lora_te2_text_model_encoder_layers_0_self_attn_k_proj"
    parts = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": norms}
    path = save_state({f"{name}.{part}": array for part, array in parts.items()}, tmp_path)
    expected = fused.clone()
    summed = fused[2:4] + up @ down
    expected[2:4] = summed * norms / (summed.norm(dim=int(by_row), keepdim=True) + torch.finfo(torch.float64).eps)
    lora_to_shira(path, tmp_path / "base.safetensors", tmp_path / "a.st", density=1.0)
    weights = load_file(tmp_path / "base.safetensors")
    apply(load(tmp_path / "a.st"), weights)
    close(weights[tensor], expected, 1e-12)


OTHERS: dict[str, tuple[type[LycorisBaseModule], dict[str, Any]]] = {
    "OFT": (DiagOFTModule, {"lora_dim": 4}),
    "OFT, bounded and rescaled": (DiagOFTModule, {"lora_dim": 4, "constraint": 0.01, "rescaled": True}),
    "BOFT": (ButterflyOFTModule, {"lora_dim": 4}),
    "(IA)^3 of outputs": (IA3Module, {"train_on_input": False}),
    "(IA)^3 of inputs": (IA3Module, {"train_on_input": True}),
    "GLoRA": (GLoRAModule, {"lora_dim": 2, "alpha": 1.0}),
}


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("case", OTHERS)
def test_changes_that_depend_on_the_weight(case: str, in_parts: bool, tmp_path: Path) -> None:
    """Also of a module that is rows of a larger weight. LyCORIS computes rotations in float32."""
    kind, options = OTHERS[case]
    torch.manual_seed(45)
    linear = nn.Linear(16, 8, bias=False)
    made = kind("x", linear, 1.0, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        made.apply_to()
        expected = linear(torch.eye(16)).T  # the trained model's own
    name, module, base = "fc.weight", "lycoris_fc", {"fc.weight": linear.weight.detach().clone()}
    if in_parts:
        prefix = "conditioner.embedders.1.model."
        name, module = (
            f"{prefix}transformer.resblocks.0.attn.in_proj_weight",
            "lora_te2_text_model_encoder_layers_0_self_attn_k_proj",
        )
        base = {name: torch.cat([torch.ones(8, 16), base["fc.weight"], torch.ones(8, 16)])} | {
            f"{prefix}{end}": torch.ones(16) for end in ("transformer.resblocks.0.ln_1.weight", "token_embedding.weight", "ln_final.weight")
        } | {"model.diffusion_model.out.2.weight": torch.zeros(2, 2)}  # fmt: skip
        expected = torch.cat([torch.ones(8, 16), expected, torch.ones(8, 16)])
    save_file(base, tmp_path / "base.safetensors")
    path = save_state({f"{module}.{part}": tensor for part, tensor in made.state_dict().items()}, tmp_path)
    lora_to_shira(path, tmp_path / "base.safetensors", tmp_path / "a.st", density=1.0)
    weights = load_file(tmp_path / "base.safetensors")
    apply(load(tmp_path / "a.st"), weights)
    close(weights[name], expected.detach(), 2e-6)
    assert (weights[name] - base[name]).norm() > 0.01 * linear.weight.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_full_differences_are_read_in_parts(dtype: torch.dtype, tmp_path: Path) -> None:
    """A file of them can be as large as the model."""
    generator = torch.Generator().manual_seed(2)
    weight, diff = torch.randn(9, 5, generator=generator), torch.randn(9, 5, generator=generator).to(dtype)
    save_file({"fc.weight": weight}, tmp_path / "base.safetensors")
    lora = open_lora(
        save_state({"lycoris_fc.diff": diff}, tmp_path), open_checkpoint(tmp_path / "base.safetensors")
    )
    (update,) = lora.updates
    assert not any(isinstance(value, np.ndarray) for value in vars(update).values())
    out = np.empty((4, 5), np.float32)
    update.tile(3, 7, out)
    assert np.array_equal(out, diff[3:7].float().numpy())


# What cannot be read.


def lone(tmp_path: Path, parts: Mapping[str, torch.Tensor]) -> str:
    base = {"conv.weight": torch.ones(4, 6, 3, 3), "conv.bias": torch.ones(4), "norm.weight": torch.ones(4)}
    save_file(base, tmp_path / "base.safetensors")
    state = {
        key if "." in key and key.startswith("lycoris") else f"lycoris_conv.{key}": tensor
        for key, tensor in parts.items()
    }
    path = save_state(state, tmp_path)
    assert DIALECTS["lycoris"].recognises(path)
    with pytest.raises(SourceError) as caught:
        open_lora(path, open_checkpoint(tmp_path / "base.safetensors"))
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ").removeprefix("'lycoris_conv': ")


def of(text: str) -> dict[str, torch.Tensor]:
    """Ones of shapes, as in ``"diff 4,6,3,3; alpha"``."""
    found = {}
    for item in text.split("; "):
        name, _, shape = item.partition(" ")
        found[name] = (
            torch.ones(*(int(number) for number in shape.split(",") if number)) if shape else torch.tensor(1.0)
        )
    return found


LOCON = "lora_up.weight 4,2,1,1; lora_down.weight 2,6,3,3"
TUCKER = "lora_up.weight 4,2,1,1; lora_down.weight 2,6,1,1"
LOHA = "hada_w1_a 4,2; hada_w1_b 2,54; hada_w2_a 4,2; hada_w2_b 2,54"
BAD = {
    "alone": (LOCON + "; alpha; lycoris_norm.alpha", "'lycoris_norm.alpha' has no partner: alpha alone change nothing"),
    "mixed": (LOCON + "; diff 4,6,3,3", "unmatched key 'lycoris_conv.diff': LoRA has no such part"),
    "unknown part": (LOCON + "; lora_mad.weight 2", "unmatched key 'lycoris_conv.lora_mad.weight': it ends in no known part of a LoRA"),
    "scalar": (LOCON + "; scalar 1,1,1,2", "'lycoris_conv.scalar' has shape [1, 1, 1, 2], not one number"),
    "full with DoRA": ("diff 4,6,3,3; dora_scale 4,1,1,1", "unmatched key 'lycoris_conv.dora_scale': full has no such part"),
    "full of another shape": ("diff 4,6,1,3", "updates a weight of shape [4, 6, 1, 3], the base's 'conv.weight' has [4, 6, 3, 3]"),
    "bias of another shape": ("diff 4,6,3,3; diff_b 5", "'lycoris_conv.diff_b' has shape [5], the base's 'conv.bias' [4]"),
    "no bias": ("lycoris_norm.w_norm 4; lycoris_norm.b_norm 4", "'lycoris_norm.b_norm': the base has no 'norm.bias'"),
    "norm of another shape": ("lycoris_norm.w_norm 5", "'lycoris_norm.w_norm' has shape [5], the base's 'norm.weight' [4]"),
    "norm for a convolution": ("w_norm 4", "'lycoris_conv.w_norm' has shape [4], the base's 'conv.weight' [4, 6, 3, 3]"),
    "factors for a norm": ("lycoris_norm.hada_w1_a 4,1; lycoris_norm.hada_w1_b 1,1", "'lycoris_norm': LoHa of the base's 'norm.weight', whose shape is [4]"),
    "Tucker with kernels": (LOCON + "; lora_mid.weight 2,2,3,3", "lora_down or lora_up has a kernel beside lora_mid"),
    "Tucker of another rank": (TUCKER + "; lora_mid.weight 2,3,3,3", "a core of shape [2, 3, 3, 3] does not fit factors of shape [2, 6]"),
    "Tucker of another kernel": (TUCKER + "; lora_mid.weight 2,2,1,3", "'lycoris_conv.lora_up.weight': updates a weight of shape [4, 6, 1, 3], the base's 'conv.weight' has [4, 6, 3, 3]"),
    "Tucker that is huge": (
        "lora_up.weight 4,1,1,1; lora_down.weight 1,300000,1,1; lora_mid.weight 1,1,1,300",
        "a product of its factors has 90000000 elements, the weight has 216",
    ),
    "LoHa without a half": ("hada_w1_a 4,2; hada_w1_b 2,54", "it has hada_w1_a, hada_w1_b without hada_w2_a"),
    "LoHa of two ranks": (LOHA.replace("w2_a 4,2", "w2_a 4,3").replace("w2_b 2,", "w2_b 3,"), "its factors have ranks 2 and 3, which must be equal"),
    "LoHa that does not fit": (LOHA.replace("w2_a 4,2", "w2_a 4,3"), "hada_w2_a of shape [4, 3] and hada_w2_b of shape [2, 54] do not fit"),
    "LoHa of another weight": (LOHA.replace("w1_b 2,54", "w1_b 2,6"), "updates a weight of shape [4, 6], the base's 'conv.weight' has [4, 6, 3, 3]"),
    "LoHa with one core": (LOHA + "; hada_t1 2,2,3,3", "it has only one of hada_t1 and hada_t2"),
    "LoHa with cores that do not fit": (LOHA + "; hada_t1 2,2,3,3; hada_t2 2,2,3,3", "hada_w1_a of shape [4, 2] and hada_w1_b of shape [2, 54] do not fit a core"),
    "LoKr without a half": ("lokr_w1 2,2", "it has lokr_w1 without lokr_w2_a"),
    "LoKr twice": ("lokr_w1 2,2; lokr_w1_a 2,1; lokr_w1_b 1,2; lokr_w2 2,3,3,3", "it has lokr_w1 both whole and in factors"),
    "LoKr with a core it does not need": ("lokr_w1 2,2; lokr_w2 2,3,3,3; lokr_t2 1,1,3,3", "it has lokr_t2 beside a whole lokr_w2"),
    "LoKr of two ranks": (
        "lokr_w1_a 2,1; lokr_w1_b 1,2; lokr_w2_a 2,2; lokr_w2_b 2,27", "its factors have ranks 1 and 2, which must be equal"
    ),
    "LoKr of another weight": (
        "lokr_w1 2,2; lokr_w2 2,2,3,3",
        "the Kronecker product of matrices of shapes [2, 2] and [2, 2, 3, 3] does not have the shape of the base's 'conv.weight', [4, 6, 3, 3]",
    ),
    "LoKr that tears a kernel": (
        "lokr_w1 2,27; lokr_w2 2,2",
        "the Kronecker product of matrices of shapes [2, 27] and [2, 2] does not have the shape of the base's 'conv.weight', [4, 6, 3, 3]",
    ),
    "LoKr of another kernel": (
        "lokr_w1 2,2; lokr_w2 2,3,9,1",
        "the Kronecker product of matrices of shapes [2, 2] and [2, 3, 9, 1] does not have the shape of the base's 'conv.weight', [4, 6, 3, 3]",
    ),
    "LoKr of numbers": ("lokr_w1; lokr_w2 4,6,3,3", "a factor has no dimensions"),
    "DoRA of nothing": (LOCON + "; dora_scale 4,6,1,1", "dora_scale has shape [4, 6, 1, 1], neither one number per output nor one per input of a weight of shape [4, 6, 3, 3]"),
    "DoRA of inputs, flat": (LOCON + "; dora_scale 6", "dora_scale has shape [6], neither one number per output nor one per input of a weight of shape [4, 6, 3, 3]"),
    "T-LoRA": ("lambda_layer 1,2; q_layer.weight 2,6; p_layer.weight 4,2", "T-LoRA depends on the sampling step"),
    "t1": ("lokr_w1 2,2; lokr_w2 2,3,3,3; lokr_t1 1,1,3,3", "no version of LyCORIS gives it a meaning"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refusals(case: str, tmp_path: Path) -> None:
    text, reason = BAD[case]
    found = lone(tmp_path, of(text))
    assert found == reason or (found.startswith("unmatched key 'lycoris_conv.") and f"': {reason}" in found)


def test_a_scalar_beside_the_factors(tmp_path: Path) -> None:
    """1 says nothing; anything else may be in the factors already."""
    base = {"conv.weight": torch.ones(4, 6, 3, 3)}
    save_file(base, tmp_path / "base.safetensors")
    state = {f"lycoris_conv.{part}": tensor for part, tensor in of(LOCON + "; scalar").items()}
    assert open_lora(save_state(state, tmp_path), open_checkpoint(tmp_path / "base.safetensors")).updates
    state["lycoris_conv.scalar"] = torch.tensor(0.5)
    assert "the scalar is not 1" in lone(tmp_path, state)


def test_full_differences_of_norms(tmp_path: Path) -> None:
    """Other programs write them like those of layers."""
    save_file({"norm.weight": torch.ones(4), "norm.bias": torch.ones(4)}, tmp_path / "base.safetensors")
    path = save_state({"lora_unet_norm.diff": torch.arange(4.0), "lora_unet_norm.diff_b": torch.ones(4)}, tmp_path)
    lora = open_lora(path, open_checkpoint(tmp_path / "base.safetensors"))
    assert not lora.updates
    assert lora.additions["norm.weight"].tolist() == [0, 1, 2, 3]
    assert lora.additions["norm.bias"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("part", ["diff_b", "b_norm"])
@pytest.mark.parametrize("beside", ["", LOCON + "; alpha", "diff 4,6,3,3"])
def test_biases(part: str, beside: str, tmp_path: Path) -> None:
    """A bias may be trained alone, or beside any change of the weight."""
    if part == "b_norm" and beside:
        return
    save_file({"conv.weight": torch.zeros(4, 6, 3, 3), "conv.bias": torch.ones(4)}, tmp_path / "base.safetensors")
    parts = (of(beside) if beside else {}) | {part: torch.arange(4.0)}
    path = save_state({f"lycoris_conv.{name}": tensor for name, tensor in parts.items()}, tmp_path)
    lora = open_lora(path, open_checkpoint(tmp_path / "base.safetensors"))
    assert {name: found.tolist() for name, found in lora.additions.items()} == {"conv.bias": [0, 1, 2, 3]}
    assert [update.name for update in lora.updates] == (["conv.weight"] if beside else [])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["diff", "diff_b"])
def test_nan(part: str, bad: float, tmp_path: Path) -> None:
    parts = of("diff 4,6,3,3; diff_b 4")
    parts[part].view(-1)[-1] = bad
    assert lone(tmp_path, parts) == f"'lycoris_conv.{part}' holds NaN or Inf"


def test_integers(tmp_path: Path) -> None:
    parts = {"diff": torch.ones(4, 6, 3, 3, dtype=torch.int32)}
    assert lone(tmp_path, parts) == "'lycoris_conv.diff' is of dtype int32, not a float"


def test_files_of_real_trainers_by_shape(tmp_path: Path) -> None:
    """SimpleTuner: LyCORIS around diffusers' transformer, in a pipeline that has other models as well."""
    folder = tmp_path / "base"
    (folder / "transformer").mkdir(parents=True)
    (folder / "vae").mkdir()
    (folder / "model_index.json").write_text(
        '{"transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}'
    )
    weight = torch.zeros(4, 6)
    for part in ("transformer", "vae"):
        save_file({"blocks.0.to_q.weight": weight}, folder / part / "diffusion_pytorch_model.safetensors")
    state = of("lokr_w1 2,2; lokr_w2 2,3; alpha")
    path = save_state({f"lycoris_blocks_0_to_q.{part}": tensor for part, tensor in state.items()}, tmp_path)
    found = converted(path, folder)
    assert torch.equal(found["transformer/blocks.0.to_q.weight"], torch.ones(4, 6))
    assert torch.equal(found["vae/blocks.0.to_q.weight"], weight)
    comfy = save_state(
        {f"diffusion_model.blocks.0.to_q.{part}": tensor for part, tensor in state.items()}, tmp_path
    )
    assert torch.equal(converted(comfy, folder)["transformer/blocks.0.to_q.weight"], torch.ones(4, 6))
