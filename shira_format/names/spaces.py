"""The names that one model's tensors have in other programs, and where each of these tensors is in a checkpoint at hand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from shira_format.names.models.aura_flow import aura_flow
from shira_format.names.models.cosmos import cosmos1, cosmos2
from shira_format.names.models.experts import experts
from shira_format.names.models.flux import chroma, flux
from shira_format.names.models.flux2 import flux2
from shira_format.names.models.flux3 import flux3
from shira_format.names.models.hunyuan_video import hunyuan_video
from shira_format.names.models.ideogram import ideogram4
from shira_format.names.models.krea import krea2
from shira_format.names.models.ltx import ltx, ltx2
from shira_format.names.models.mochi import mochi
from shira_format.names.models.open_clip import open_clip, open_clip_inner
from shira_format.names.models.qwen_image import qwen_image_2
from shira_format.names.models.sana import sana
from shira_format.names.models.sd3 import sd3
from shira_format.names.models.tables import known
from shira_format.names.models.unet import unet
from shira_format.names.models.wan import wan, wan_animate2
from shira_format.names.models.z_image import lumina2, z_image
from shira_format.names.row_blocks import Location

# Given the names of a checkpoint's tensors and their shapes: tensors of other name spaces by name.
Table = Callable[[Collection[str], Callable[[str], tuple[int, ...]]], Mapping[str, Location]]

# A known model is one module in :mod:`shira_format.names.models` and one entry here.
TABLES: tuple[Table, ...] = (
    experts,
    flux,
    chroma,
    flux2,
    flux3,
    sd3,
    wan,
    wan_animate2,
    hunyuan_video,
    z_image,
    lumina2,
    qwen_image_2,
    krea2,
    ideogram4,
    ltx,
    ltx2,
    *cosmos1,
    *cosmos2,
    sana,
    aura_flow,
    mochi,
    unet,
    open_clip,
    open_clip_inner,
    experts,
)


def other_names(names: Collection[str], shape: Callable[[str], tuple[int, ...]]) -> dict[str, Location]:
    """The tensors (weights and biases) that other programs have for the model in a checkpoint, by their names there.

    Args:
        names: the checkpoint's tensors, without a component's prefix.
        shape: of one of them.
    """
    names = known(names)
    found: dict[str, Location] = {}
    for table in TABLES:
        for name, location in table(names, shape).items():
            if name not in names:
                found.setdefault(name, location)
    return found
