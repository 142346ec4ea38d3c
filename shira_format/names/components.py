"""Components of a pipeline (UNet, text encoders) as the base of one LoRA file."""

from __future__ import annotations

from shira_format.checkpoints import Checkpoint
from shira_format.errors import SourceError


def component_names(base: Checkpoint, component: str, where: object, *, alone: bool) -> tuple[str, list[str]]:
    """The prefix of a component's tensors in ``base`` (``"unet/"`` in a pipeline), and their names without it.

    A checkpoint of one model has no components: it is taken for ``component`` if the LoRA adapts no other (``alone``).

    Raises:
        SourceError: the base has no such component.
    """
    if base.components:
        prefix = f"{component}/"
        if component not in base.components:
            raise SourceError(
                f"{where}: adapts the component {component!r}, the base has {', '.join(base.components)}"
            )
        return prefix, [name.removeprefix(prefix) for name in base if name.startswith(prefix)]
    if not alone:
        raise SourceError(
            f"{where}: adapts {component!r} and other components: the base must be the whole pipeline (a folder with "
            "model_index.json), not one model of it"
        )
    return "", list(base)
