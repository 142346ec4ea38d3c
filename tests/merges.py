"""A LoRA that PEFT wrote, against the model that PEFT runs and merges."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from shira_format.checkpoints import open_checkpoint
from shira_format.convert import lora_to_shira
from shira_format.format import load
from shira_format.live import apply
from shira_format.lora import Lora, open_lora
from tests import models
from tests.updates import dense

State = Mapping[str, torch.Tensor]


class Adapted:
    """A model, its base on disk, and a LoRA of it with random values in everything that is trained.

    Attributes:
        make: makes the model, with the same weights every time.
        base: the folder of the base.
        lora: the folder of the LoRA.
    """

    def __init__(
        self, folder: Path, make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32, **options: Any
    ) -> None:
        self.make = lambda: make().to(dtype).float().eval()  # values that the base can hold
        self.base = models.save_base(self.make(), folder / "base", dtype)
        # Embeddings begin with random numbers of size 1, all else with small ones: no update should drown the others.
        peft = models.random_lora(self.make(), seed=5, scale=0.2, **options)
        self.lora = models.save_lora(peft, folder / "lora")
        self.folder = folder

    def peft(self) -> Any:
        """PEFT's model, with the LoRA read from its files."""
        return models.load_lora(self.make(), self.lora)

    def merged(self) -> dict[str, torch.Tensor]:
        """Weights of the model that PEFT merges."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.peft().merge_and_unload().state_dict()  # type: ignore[no-any-return]

    def read(self) -> Lora:
        return open_lora(self.lora, open_checkpoint(self.base))

    def applied(self) -> nn.Module:
        """The model after our conversion of every entry."""
        lora_to_shira(self.lora, self.base, self.folder / "all.st", density=1.0)
        model = self.make()
        apply(load(self.folder / "all.st"), model.state_dict())
        return model


def results(adapted: Adapted) -> dict[str, np.ndarray[Any, Any]]:
    """What the LoRA as we read it makes of each weight that it changes, in float64."""
    base, lora = open_checkpoint(adapted.base), adapted.read()
    found = {update.name: base[update.name].astype(np.float64) + dense(update) for update in lora.updates}
    assert len(found) == len(lora.updates)
    found |= {name: array.astype(np.float64) for name, array in lora.whole.items()}
    return found | {name: base[name].astype(np.float64) + array for name, array in lora.additions.items()}


def check(adapted: Adapted, expected: State, *, changed: int) -> None:
    """That we change ``changed`` tensors, each to what is expected, and leave the rest as it is."""
    before, found = adapted.make().state_dict(), results(adapted)
    assert len(found) == changed
    for name, tensor in expected.items():
        wanted = tensor.double().numpy()
        if name not in found:
            assert torch.equal(tensor, before[name]), name
            continue
        assert wanted.shape == found[name].shape
        change = np.abs(wanted - before[name].double().numpy()).max()
        assert change > 1e-3, name
        scale = float(np.abs(wanted).max())
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=2e-6 * scale, err_msg=name)


def check_merge(adapted: Adapted, *, changed: int) -> None:
    """That our reading and our conversion give what PEFT merges."""
    expected = adapted.merged()
    check(adapted, expected, changed=changed)
    actual = adapted.applied().state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
