"""Conversions on a real cluster of several worker processes: the bytes of a local run, whatever happens to a worker."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
import torch
from distributed import LocalCluster
from safetensors.torch import load_file, save_file

from shira_format.convert import full_to_shira, lora_to_shira
from shira_format.convert.exact import Exact
from shira_format.errors import SourceError, WorkError
from shira_format.selection import TopK
from tests import models
from tests.rules import arguments

RULES = {
    "exact": Exact(),
    "tensor": TopK(0.02),
    "global": TopK(0.02, scope="global"),
    "energy": TopK(None, energy=0.8),
    "energy of all": TopK(None, energy=0.8, scope="global"),
}
# How long a lost worker is waited for.
QUICK = {"distributed.comm.timeouts.connect": "3s"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with (
        dask.config.set(QUICK),
        LocalCluster(
            n_workers=3, threads_per_worker=1, processes=True, dashboard_address=None, memory_limit=0,
            silence_logs=50,
        ) as made,
    ):  # fmt: skip
        made.wait_for_workers(3)
        yield made


@pytest.fixture(scope="module")
def tune(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Llama, and the same with some entries moved, on storage that all workers reach."""
    folder = tmp_path_factory.mktemp("shared")
    base = models.save_base(models.llama(), folder / "base", torch.bfloat16)
    state = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    tuned = {
        name: torch.where(torch.rand(t.shape, generator=generator) < 0.1, t * 1.125, t)
        for name, t in state.items()
    }
    (folder / "tuned").mkdir()
    save_file(tuned, folder / "tuned" / "model.safetensors")
    return folder / "tuned", base


@pytest.mark.parametrize("rule", RULES)
def test_the_bytes_of_a_local_run(rule: str, cluster: Any, tune: tuple[Path, Path], tmp_path: Path) -> None:
    done: list[int] = []
    here = full_to_shira(*tune, tmp_path / "here.st", **arguments(RULES[rule]), progress=done.append)
    there_done: list[int] = []
    urls = [path.as_uri() for path in tune]
    there = full_to_shira(
        *urls,
        tmp_path / "there.st",
        **arguments(RULES[rule]),
        dask=cluster.scheduler_address,
        progress=there_done.append,
    )
    assert (tmp_path / "here.st").read_bytes() == (tmp_path / "there.st").read_bytes()
    assert here.tensors == there.tensors
    assert here.nnz > 0
    assert sum(done) == sum(there_done)


def test_a_lora_on_a_cluster(cluster: Any, tmp_path: Path) -> None:
    lora, base = models.LORAS / "spam", models.minilm()
    lora_to_shira(lora, base, tmp_path / "here.st")
    lora_to_shira(lora, base, tmp_path / "there.st", dask=cluster.scheduler_address)
    assert (tmp_path / "here.st").read_bytes() == (tmp_path / "there.st").read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
@pytest.mark.parametrize("rule", ["exact", "global"])
def test_a_worker_that_is_killed_on_the_way(rule: str, cluster: Any, tmp_path: Path) -> None:
    """Killed as soon as the first tensor is back, with a hundred to go."""
    base, tuned = models.minilm(), models.sre()
    full_to_shira(tuned, base, tmp_path / "here.st", **arguments(RULES[rule]))
    before = _processes(cluster)
    killed: list[int] = []

    def kill(_: int) -> None:
        if not killed:
            killed.append(before[0])
            os.kill(before[0], signal.SIGKILL)

    full_to_shira(
        tuned, base, tmp_path / "there.st", **arguments(RULES[rule]), dask=cluster.scheduler_address, progress=kill
    )
    assert killed
    assert before[0] not in _processes(cluster)
    assert (tmp_path / "here.st").read_bytes() == (tmp_path / "there.st").read_bytes()


def _processes(cluster: Any) -> list[int]:
    return [worker.process.pid for worker in cluster.workers.values() if worker.process is not None]


def test_an_unusable_tensor_is_named_as_in_a_local_run(
    cluster: Any, tune: tuple[Path, Path], tmp_path: Path
) -> None:
    tuned, base = tune
    state = load_file(tuned / "model.safetensors")
    state["model.norm.weight"][3] = float("nan")
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(SourceError) as here:
        full_to_shira(tmp_path / "bad.safetensors", base, tmp_path / "a.st")
    with pytest.raises(SourceError) as there:
        full_to_shira(tmp_path / "bad.safetensors", base, tmp_path / "a.st", dask=cluster.scheduler_address)
    assert str(here.value) == str(there.value)
    assert "'model.norm.weight' holds NaN or Inf" in str(here.value)
    assert [tmp_path / "bad.safetensors"] == list(tmp_path.iterdir())


def test_a_scheduler_that_does_not_answer(
    tune: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shira_format.convert.cluster.CONNECT_TIMEOUT", 1)
    with pytest.raises(WorkError, match=r"^tcp://127\.0\.0\.1:1: "):
        full_to_shira(*tune, tmp_path / "a.st", dask="tcp://127.0.0.1:1")
    assert [] == list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="replaces files that are open")
def test_inputs_that_are_replaced_between_two_runs(cluster: Any, tmp_path: Path) -> None:
    """Workers keep what they have opened."""
    base, lora = models.save_base(models.net(), tmp_path / "base"), tmp_path / "lora"
    other = models.net()
    for parameter in other.parameters():
        parameter.data.add_(1)
    models.save_base(other, tmp_path / "other")
    for seed, folder in ((0, lora), (1, tmp_path / "more")):
        models.save_lora(
            models.random_lora(models.net(), seed, r=2, target_modules=["wide", "square", "head"]), folder
        )
    made = set()
    for new, file in (
        (None, None),
        (tmp_path / "more" / "adapter_model.safetensors", lora / "adapter_model.safetensors"),
        (tmp_path / "other" / "model.safetensors", base / "model.safetensors"),
    ):
        if new is not None:
            then = file.stat()
            os.utime(new, ns=(then.st_atime_ns, then.st_mtime_ns))  # as if written in the same tick of the clock
            new.replace(file)
        lora_to_shira(lora, base, tmp_path / "here.st", density=0.1)
        lora_to_shira(lora, base, tmp_path / "there.st", density=0.1, dask=cluster.scheduler_address)
        assert (tmp_path / "here.st").read_bytes() == (tmp_path / "there.st").read_bytes()
        made.add((tmp_path / "here.st").read_bytes())
    assert len(made) == 3
