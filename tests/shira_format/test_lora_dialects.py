"""Real LoRAs of a real model, in every dialect that can hold them: equal files of ours come out."""

from __future__ import annotations

from pathlib import Path

import pytest

from shira_format.adapter import Adapter
from shira_format.checkpoints import open_checkpoint
from shira_format.convert import lora_to_shira
from shira_format.format import load
from shira_format.lora import DIALECTS
from tests.dialects import WRITERS, pairs_of
from tests.models import LORAS, minilm


@pytest.fixture(scope="module", params=["spam", "genre"])
def lora(request: pytest.FixtureRequest) -> Path:
    return LORAS / request.param


@pytest.fixture(scope="module")
def expected(lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """Out of the files that ship, which hold a head beside the updates."""
    path = tmp_path_factory.mktemp("expected") / "adapter.st"
    lora_to_shira(lora, minilm(), path)
    return load(path)


@pytest.mark.parametrize("dialect", WRITERS)
def test_every_dialect_gives_the_same_adapter(lora: Path, expected: Adapter, dialect: str, tmp_path: Path) -> None:
    written = WRITERS[dialect](pairs_of(lora), tmp_path)
    lora_to_shira(written, minilm(), tmp_path / "adapter.st")
    adapter = load(tmp_path / "adapter.st")
    assert adapter.manifest["source"]["dialect"] == dialect.removesuffix("_old")
    assert Adapter({name: expected[name] for name in expected}) == adapter  # the head apart


@pytest.mark.parametrize("dialect", WRITERS)
def test_each_file_belongs_to_one_dialect(lora: Path, dialect: str, tmp_path: Path) -> None:
    written = WRITERS[dialect](pairs_of(lora), tmp_path)
    name = dialect.removesuffix("_old")
    assert [known for known, found in DIALECTS.items() if found.recognises(written)] == [name]
    assert DIALECTS[name].read(written, open_checkpoint(minilm())).updates
