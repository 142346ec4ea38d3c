"""What a file is that is no LoRA which can be converted, told from its keys: its name, and why it is refused."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from shira_format.checkpoints import Checkpoint
from shira_format.checkpoints.pickles import PickleError
from shira_format.checkpoints.quantised import any_quantised
from shira_format.checkpoints.torch_file import TorchFile
from shira_format.errors import FormatError, SourceError
from shira_format.lora.files import PICKLES, SAFETENSORS, open_tensors
from shira_format.lora.groups import Group
from shira_format.lora.keys import DOWN
from shira_format.lora.peft.tuners import REFUSED
from shira_format.storage.paths import open_storage

_NEEDS_CONFIG = "PEFT's adapter_config.json, which has its options, is missing: put it beside the file"
_NETWORK = "a network of its own that acts beside the model, and no change of the base's weights"
_TOKENS = "vectors of new tokens, which change no weight of the base"


class Kind(NamedTuple):
    """One kind of file.

    Attributes:
        name: what it is.
        why: why it is no LoRA that can be converted, or the way out.
        any_key: found in one of its keys.
        all_keys: matches each of its keys, if that is what tells it.
    """

    name: str
    why: str
    any_key: re.Pattern[str]
    all_keys: re.Pattern[str] = re.compile(".*", re.DOTALL)


def _kind(name: str, why: str, any_key: str, all_keys: str = ".*") -> Kind:
    return Kind(name, why, re.compile(any_key), re.compile(all_keys, re.DOTALL))


# The first that fits; those that have keys of others in them come first.
KINDS = (
    # stability-ComfyUI-nodes (control_lora_create.py) marks its files with an empty tensor.
    _kind("a Control-LoRA", "it makes a ControlNet of the base, which acts beside it", r"\Alora_controlnet\Z"),
    _kind("a ControlNet-LLLite", _NETWORK, r"\Alllite_(?:unet|dit)_"),
    # Of the authors, of diffusers, and of FLUX.
    _kind(
        "a ControlNet", _NETWORK,
        r"\A(?:control_model\.|(?:module\.)?(?:input_hint_block|zero_convs|controlnet_(?:cond_embedding|down_blocks|mid_block|blocks|"
        r"single_blocks|x_embedder|mode_embedder))\.)|\A(?:pos_embed_input|controlnet_.*)\.\w+\Z",
    ),
    # tencent-ailab/IP-Adapter, its file for faces (which has a LoRA within), and XLabs-AI/x-flux.
    _kind(
        "an IP-Adapter", "its layers read an image, and are added to the base's",
        r"(?:\A|\.)ip_adapter[._]|\Aip_adapter\Z|\Aimage_proj\.|\bto_[kv]_ip\.|\Aip_adapter_proj_model\.",
    ),
    _kind("a T2I-Adapter", _NETWORK, r"\A(?:adapter\.)?body\.\d+\.(?:in_conv|resnets)\."),
    _kind("a PhotoMaker", "its encoder of faces reads an image; convert the LoRA within it alone", r"\Aid_encoder\."),
    # black-forest-labs' LoRAs that make FLUX.1 Canny or Depth of FLUX.1 dev.
    _kind(
        "a control LoRA of FLUX's authors",
        "its img_in reads an image beside the latents and has more columns than the base's, which an adapter cannot change; load "
        "and fuse it with diffusers, save the pipeline, and convert that (full_to_shira --exact)",
        r"\Aimg_in\.lora_[AB]\.", r"[^.]+(?:\.[^.]+)*\.(?:lora_[AB]\.(?:weight|bias)|scale)",
    ),
    # AUTOMATIC1111 (.pt), safetensors of Stable Diffusion, those of SDXL, SD 3 and FLUX, diffusers (learned_embeds), OneTrainer.
    _kind(
        "a textual-inversion embedding", _TOKENS, "",
        r"emb_params|(?:clip_[lgh]|t5(?:xxl)?|llama|gemma)(?:_out)?|<[^<>]+>|text_encoders?_[01]|string_to_(?:param|token).*",
    ),
    _kind("a hypernetwork", _NETWORK, r"\A\d+\.[01]\.linear\.", r"\d+\.[01]\.linear\.\d+\.(?:weight|bias)"),
    # tune_mode prompt, prefix or p of PEFT: saved prompts and the networks that make them.
    _kind(
        "a tuned prompt of PEFT", "vectors before the input, which change no weight of the base",
        r"\Aprompt_embeddings\Z|(?:\A|\.)prompt_encoder\.|(?:\A|\.)adaption_prompt|adaption_gate\Z|(?:\A|\.)cartridge_",
    ),
    _kind("a state of an optimizer", "it holds moments, and no weights", r"(?:\A|\.)(?:exp_avg(?:_sq)?|momentum_buffer)\Z"),
    _kind(
        "a LoRA packed by Nunchaku for 4-bit kernels", "rows and columns of its factors are permuted; take the LoRA that it was made from",
        r"\.(?:lora_(?:down|up)|proj_(?:down|up))\Z",
    ),
    _kind("SHiRA of PEFT", "it is converted by peft_to_shira", r"\.(?:shira|supertuning)_(?:weight|indices|values)\Z"),
)  # fmt: skip

# Methods of PEFT by the first word of their parts (``prefix`` in peft/tuners/*/model.py): name and peft_type.
_METHODS = {
    "lora_E": ("AdaLoRA", "ADALORA"), "lora_ranknum": ("AdaLoRA", "ADALORA"),
    "vera_lambda_": ("VeRA", "VERA"), "pvera_lambda_": ("PVeRA", "PVERA"), "vblora_": ("VB-LoRA", "VBLORA"),
    "randlora_": ("RandLoRA", "RANDLORA"), "fourierft_": ("FourierFT", "FOURIERFT"), "waveft_": ("WaveFT", "WAVEFT"),
    "c3a_": ("C3A", "C3A"), "bone_": ("Bone", "BONE"), "miss_": ("MiSS", "MISS"), "hra_": ("HRA", "HRA"), "hira_": ("HiRA", "HIRA"),
    "road_": ("RoAd", "ROAD"), "delora_": ("DeLoRA", "DELORA"), "gralora_": ("GraLoRA", "GRALORA"), "unilora_": ("UniLoRA", "UNILORA"),
    "psoft_": ("PSOFT", "PSOFT"), "peanut_": ("PEANuT", "PEANUT"), "lily_": ("Lily", "LILY"), "deft_": ("DEFT", "DEFT"),
    "beft_": ("BEFT", "BEFT"), "adamss_": ("AdaMSS", "ADAMSS"), "tinylora_": ("TinyLoRA", "TINYLORA"), "osf_": ("OSF", "OSF"),
    "frod_": ("FRoD", "FROD"), "shadow_": ("Shadow", "SHADOW"), "poly_": ("Poly", "POLY"), "ln_tuning_": ("LN tuning", "LN_TUNING"),
    "glora_": ("GLoRA", "GLORA"),
}  # fmt: skip
_METHOD = re.compile(rf"\.(?P<word>{'|'.join(sorted(_METHODS, key=len, reverse=True))})\w*(?=\.|\Z)")
_PEFT = re.compile(
    r"\.lora_(?:embedding_)?[AB](?:\.(?:weight|bias))?\Z|\Abase_model\.model\..+\.(?:hada|lokr)_\w+\Z"
)
# A word of an adapter's part anywhere in a key.
_OF_ADAPTER = re.compile(r"(?:\A|[._])(?:lora|hada|lokr|b?oft|ia3|dora|locon|loha)(?:[._]|\Z)|_lora\w?(?:\.|\Z)|\.(?:diff|diff_b|alpha|[wb]_norm)\Z")  # fmt: skip
# Layers that read a picture's latents.
_INPUTS = re.compile(r"(?:.*[._])?(?:img_in|x_embedder|conv_in|patch_embedding|patchify_proj|pos_embed[._]proj|input_blocks[._]0[._]0)(?:[._]proj)?")  # fmt: skip


def kind_of(keys: Collection[str]) -> str | None:
    """What a file with these keys is, and why it is not converted; None if it may be a LoRA."""
    for kind in KINDS:
        if any(kind.any_key.search(key) for key in keys) and all(kind.all_keys.fullmatch(key) for key in keys):
            return f"{kind.name}: {kind.why}"
    if found := next(filter(None, map(_METHOD.search, keys)), None):
        name, peft_type = _METHODS[found["word"]]
        return f"an adapter of {name}: {REFUSED.get(peft_type, _NEEDS_CONFIG)}"
    return None


# What a pickle of nested dicts has at the top, and the kind that it is.
_NESTED = {
    "string_to_param": "a textual-inversion embedding", "param_groups": "a state of an optimizer", "ip_adapter": "an IP-Adapter",
    "id_encoder": "a PhotoMaker",
}  # fmt: skip


def _kind_of_pickle(path: Path) -> str | None:
    """What a file of ``torch.save`` is, told from its outermost keys, which are not those of tensors."""
    try:
        root = TorchFile(open_storage(path)).root
    except (PickleError, OSError):  # reported when it is opened for its tensors
        return None
    if type(root) is not dict:
        return None
    words = [_NESTED.get(key) for key in root if type(key) is str]
    # AUTOMATIC1111's: two networks by the width of the layer that they act on.
    if any(type(key) is int and type(value) in (tuple, list) for key, value in root.items()):
        words.append("a hypernetwork")
    found = next(filter(None, words), None)
    return next((f"{kind.name}: {kind.why}" for kind in KINDS if kind.name == found), None)


def why_unknown(path: Path) -> str | None:
    """Why no dialect reads the file at ``path``; None if nothing tells.

    Raises:
        SourceError: the file, which has the ending of one with tensors, cannot be opened as such, or its keys contradict each
            other.
        FormatError: it is a damaged safetensors file.
    """
    if path.suffix in (".npz", ".npy"):
        return "a NumPy archive; save its arrays by their names as safetensors (mlx.core.save_safetensors for adapters.npz of mlx-lm)"
    if path.is_dir():
        return _why_folder(path)
    if path.suffix not in (SAFETENSORS, *PICKLES):
        return f"the file does not end in {SAFETENSORS}, {', '.join(PICKLES)} or .gguf"
    if path.suffix in PICKLES and (found := _kind_of_pickle(path)) is not None:
        return found
    return why_keys(open_tensors(path))


def _why_folder(path: Path) -> str | None:
    files = sorted(file for file in path.iterdir() if file.is_file() and file.suffix in (SAFETENSORS, *PICKLES))
    if not files:
        return f"the folder has no file that ends in {SAFETENSORS} or {', '.join(PICKLES)}"
    for file in files:
        try:
            why = why_keys(open_tensors(file))
        except (SourceError, FormatError):
            continue
        if why is not None:
            return f"{file.name}: {why}"
    return None


def why_keys(tensors: Checkpoint) -> str | None:
    """Why a file with these tensors is of no dialect; None if nothing tells."""
    if not tensors:
        return "it holds no tensors"
    if found := kind_of(tensors):
        return found
    if quantised := any_quantised(tensors):
        return f"{quantised}; a LoRA has no such weights"
    if any(map(_PEFT.search, tensors)):
        return "its keys are PEFT's, and adapter_config.json, which has rank and alpha, is missing: put it beside the file"
    if not any(map(_OF_ADAPTER.search, tensors)) and any(key.endswith(".weight") for key in tensors):
        return "whole weights of a model, such as a full checkpoint, which full_to_shira converts"
    return None


def unmatched(key: str, tensors: Checkpoint) -> str:
    """Why a key of a LoRA file has no place in the grammar, for messages."""
    if key.startswith("bundle_emb."):
        return "the LoRA is bundled with an embedding of new tokens, which is no change of the base's weights"
    if found := kind_of([key]):
        return f"it is of {found}"
    if quantised := any_quantised(tensors):
        return f"{quantised}; a LoRA has no such weights"
    return "it ends in no known part of a LoRA"


def check_input(group: Group, module: str, shape: tuple[int, ...]) -> None:
    """Refuse a LoRA of a layer of the input that reads more channels than the base's.

    Args:
        group: the parts of the module's LoRA.
        module: its name, for messages.
        shape: of the base's weight.

    Raises:
        SourceError: it is such a LoRA.
    """
    down = group.parts.get(DOWN)
    if down is not None and down.ndim > 1 < len(shape) and down.shape[1] > shape[1] and _INPUTS.fullmatch(module):
        raise SourceError(
            f"{group.path}: {group.keys[DOWN]!r} has shape {list(down.shape)}, and the base's weight {list(shape)}: a control LoRA, "
            "whose first layer reads an image beside the latents; an adapter cannot change a weight's shape: load and fuse it with "
            "diffusers, save the pipeline, and convert that (full_to_shira --exact)"
        )
