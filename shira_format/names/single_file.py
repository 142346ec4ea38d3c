"""Components in a single file of a whole pipeline, as the authors of Stable Diffusion and ComfyUI write it."""

from __future__ import annotations

from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError

_DENOISER = "model.diffusion_model."
_PREFIXES = {
    "unet": (_DENOISER,),
    "text_encoder": (
        "cond_stage_model.transformer.", "conditioner.embedders.0.transformer.", "cond_stage_model.model.",
        "text_encoders.clip_l.transformer.",
    ),
    "text_encoder_2": ("conditioner.embedders.1.model.", "text_encoders.clip_g.transformer."),
    "text_encoder_3": ("text_encoders.t5xxl.transformer.",),
}  # fmt: skip


def is_single_file(base: Checkpoint) -> bool:
    """Whether ``base`` is such a file."""
    return not base.components and any(name.startswith(_DENOISER) for name in base)


def single_file_names(base: Checkpoint, component: str, where: str) -> tuple[str, list[str]]:
    """The prefix of a component's tensors in ``base``, and their names without it.

    Args:
        base: the single file.
        component: diffusers' name of it; ``unet`` for any denoiser.
        where: the LoRA, for messages.

    Raises:
        SourceError: there is no such component.
    """
    for prefix in _PREFIXES.get(component, ()):
        if names := [name.removeprefix(prefix) for name in base if name.startswith(prefix)]:
            return prefix, names
    raise SourceError(f"{where}: adapts {component!r}, which {base.path} lacks or holds under unknown names")
