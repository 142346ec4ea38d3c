"""Components of a pipeline (a denoiser, text encoders) in the base of one LoRA file."""

from __future__ import annotations

from collections.abc import Collection

from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError

# What pipelines of diffusers call the model that removes noise.
DENOISERS = ("unet", "transformer", "prior")
# In a single file of a whole pipeline, as the authors of Stable Diffusion and ComfyUI write it.
_DENOISER = "model.diffusion_model."
_TEXT = {
    "text_encoder": (
        "cond_stage_model.transformer.", "conditioner.embedders.0.transformer.", "cond_stage_model.model.",
        "text_encoders.clip_l.transformer.",
    ),
    "text_encoder_2": ("conditioner.embedders.1.model.", "text_encoders.clip_g.transformer."),
    "text_encoder_3": ("text_encoders.t5xxl.transformer.",),
}  # fmt: skip
# What LoRA files call text encoders, by diffusers' name.
_WORDS = {
    "lora_te": "text_encoder", "lora_te1": "text_encoder", "clip_l": "text_encoder", "lora_prior_te": "text_encoder",
    "lora_te2": "text_encoder_2", "clip_g": "text_encoder_2", "lora_te3": "text_encoder_3", "t5": "text_encoder_3",
    "t5xxl": "text_encoder_3",
}  # fmt: skip
# What they call whatever model is denoised by.
_ANY_DENOISER = (
    "", "lora_unet", "oft_unet", "lora_transformer", "lora_prior_unet", "lora_prior", "lycoris", "diffusion_model",
    "model.diffusion_model", "base_model.model",
)  # fmt: skip


_PARTS = (_DENOISER, *(prefix for prefixes in _TEXT.values() for prefix in prefixes))


def part_of(name: str) -> str:
    """What the name of a tensor starts with that says which part of a pipeline it is of: ``"unet/"``, ``"model.diffusion_model."``."""
    component, slash, _ = name.rpartition("/")
    return component + slash or next((prefix for prefix in _PARTS if name.startswith(prefix)), "")


def component_of(prefix: str, prefixes: Collection[str], base: Checkpoint, where: object) -> str:
    """Diffusers' name of the component that a prefix of keys stands for; "" for the only model of a base without components.

    Args:
        prefix: as in a parsed key.
        prefixes: of all keys of the file.
        base: the base.
        where: the file, for messages.

    Raises:
        SourceError: a prefix that stands for the denoiser, of which the base has two or none.
    """
    models = base.components
    if prefix in _ANY_DENOISER:
        return _denoiser(base, where)
    word = prefix.removeprefix("text_encoders.").removesuffix(".transformer")
    found = _WORDS.get(word, prefix)
    # FLUX's T5 is the third text encoder for kohya and ComfyUI, and the second in diffusers' pipeline.
    if found == "text_encoder_3" and word in _WORDS and models and found not in models:
        seconds = {name for name, text in _WORDS.items() if text == "text_encoder_2"}
        return found if any(seconds & {*other.split(".")} for other in prefixes) else "text_encoder_2"
    return found


def _denoiser(base: Checkpoint, where: object) -> str:
    models = base.components
    if not models:
        return ""
    if "transformer" in models and "transformer_2" in models:
        raise SourceError(
            f"{where}: the base has two denoisers, transformer and transformer_2, and the file does not say which it "
            "adapts: give the folder of one of them as the base"
        )
    for name in DENOISERS:
        if name in models:
            return name
    raise SourceError(f"{where}: adapts the denoiser, and the base has neither {' nor '.join(DENOISERS)}, but {', '.join(models)}")  # fmt: skip


def component_names(base: Checkpoint, component: str, where: object, *, alone: bool) -> tuple[str, list[str]]:
    """The prefix of a component's tensors in ``base`` (``"unet/"`` in a pipeline), and their names without it.

    A checkpoint of one model has no components: it is taken for ``component`` if the LoRA adapts no other (``alone``).

    Raises:
        SourceError: the base has no such component.
    """
    if base.components:
        if component not in base.components:
            raise SourceError(
                f"{where}: adapts the component {component!r}, the base has {', '.join(base.components)}"
            )
        prefixes: tuple[str, ...] = (f"{component}/",)
    elif any(name.startswith(_DENOISER) for name in base):
        prefixes = (_DENOISER,) if component in ("", *DENOISERS) else _TEXT.get(component, ())
    elif alone:
        return "", list(base)
    else:
        raise SourceError(
            f"{where}: adapts {component or 'the denoiser'!r} and other components: the base must be the whole pipeline (a "
            "folder with model_index.json), not one model of it"
        )
    for prefix in prefixes:
        if names := [name.removeprefix(prefix) for name in base if name.startswith(prefix)]:
            return prefix, names
    raise SourceError(f"{where}: adapts {component!r}, which {base.path} lacks or holds under unknown names")
