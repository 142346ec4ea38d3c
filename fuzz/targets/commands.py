"""Commands on files with hostile names, tensors and provenance: no traceback, no control characters, the right exit code, inputs as before."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fuzz import safetensors
from fuzz.mutate import NUMBERS, TEXTS, mutated_bytes, mutated_json, text
from fuzz.oracle import Violation, aside
from shira_cli.main import main as shira
from shira_format.adapter import Adapter
from shira_format.format import save
from shira_format.format.manifest import DIGEST_KEY, METADATA_KEY
from shira_format.storage.safetensors_file import SafetensorsFile
from shira_format.storage.safetensors_header import file_header
from shira_format.tensors import DenseTensor, SparseTensor

_CASE = "case.json"
# A and B are adapters, D is the base; what is written has names beginning with new.
_COMMANDS = [
    "inspect A", "inspect A --verify", "inspect A --verify --base D", "inspect A --sort nnz", "inspect A B --html new.html", "inspect A --html new.html",
    "diff A B", "measure A", "measure A B", "measure A --ranks", "measure A B --base D", "measure A --spectrum --base D", "merge A B -o new.st",
    "merge A B -o new.st --method ties --base D", "merge A B --check", "merge A B --check --report new.html", "merge A B -o new.st --report new.json",
    "merge A -o new.st --weights 0.5", "merge A B -o new.st --include P", "convert shira_to_csr A -o new", "convert shira_to_full A --base D -o new",
    "convert shira_to_peft A --base D -o new", "convert shira_to_lora A --rank 1 --base D -o new", "convert repack A --base D -o new.st --compact",
    "convert repack A --base D -o new.st", "mask --base D --rule wm --density 0.1 --within A -o new.st", "mask --rule union A B -o new.st",
    "mask --combine union A B -o new.st", "inspect D", "convert lora_to_shira A --base D -o new.st", "convert peft_to_shira A --base D -o new.st",
]  # fmt: skip
_NAMES = [
    "a.st",
    "b.st",
    "-x.st",
    "--json.st",
    "a\u202eb.st",
    "c\x1b[2Kd.st",
    "e\nf.st",
    "é 語.st",
    "<b>&.st",
    "a%s{0}.st",
    "$(id).st",
]
_KEYS = [
    "description", "license", "writer", "base_model", "source", "selection", "mask", "id", "revision", "files", "dialect", "kind", "rule", "density",
    "energy", "scope", "alpha", "name", "digest", "mine",
]  # fmt: skip
_WEIGHTS = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight", "w"]


def make(random: Random, folder: Path) -> None:
    """Two adapters, their base, and a command line."""
    weights = random.sample(_WEIGHTS, k=2) + [_tensor_name(random) for _ in range(random.choice([0, 1, 1, 2]))]
    base = {name: safetensors.some(random, 6, 8).astype(np.float32) for name in dict.fromkeys(weights)}
    (folder / "base.safetensors").write_bytes(safetensors.content(base))
    names = random.sample(_NAMES, k=2)
    if os.name == "nt":
        names = ["a.st", "b.st"]
    for name in names:
        _adapter(random, folder / name, base)
    words = random.choice(_COMMANDS).split()
    words += ["--json"] if random.random() < 0.3 and words[0] != "mask" else []
    places = {
        "A": f"./{names[0]}",
        "B": f"./{names[1]}",
        "D": "base.safetensors",
        "P": text(random, ["(", "w", "a{1,99999}"]),
    }
    words = [places.get(word, word) for word in words]
    (folder / _CASE).write_text(json.dumps(words), "utf-8")


def _tensor_name(random: Random) -> str:
    name = text(random, _WEIGHTS).encode("utf-8", "replace").decode()
    return re.sub("[\x00-\x1f\x7f]|^__|#", "?", name)[:300] or "x"


def _adapter(random: Random, path: Path, base: dict[str, Any]) -> None:
    tensors, dense = [], []
    for name, weight in base.items():
        flat = weight.reshape(-1)
        indices = np.array(sorted(random.sample(range(flat.size), k=random.choice([0, 1, 5, 20]))), np.int64)
        kind: Any = random.choice(["target", "target", "delta", "none", "dense", "absent"])
        if kind == "dense":
            dense.append(DenseTensor(name, weight + 1, base=weight))
        elif kind == "none":
            tensors.append(SparseTensor(name, weight.shape, indices, value_kind="none", dtype=weight.dtype))
        elif kind != "absent":
            values = flat[indices] + np.float32(random.choice([1, 0.01, 1e38, np.nan]))
            tensors.append(SparseTensor(name, weight.shape, indices, values, value_kind=kind, base=flat[indices]))
    save(Adapter(tensors, dense=dense), path)
    _rewrite(random, path)


def _rewrite(random: Random, path: Path) -> None:
    """Provenance of the worst kind, with a digest that is right; sometimes a file that is damaged."""
    file = SafetensorsFile(path)
    data, size = path.read_bytes(), sum(stream.nbytes for stream in file.values())
    manifest = json.loads(file.metadata[METADATA_KEY])
    kept = {
        key: manifest[key]
        for key in ("format_version", "features", "digest", "tensors", "whole")
        if key in manifest
    }
    told: Any = {
        "description": text(random), "license": text(random), "writer": text(random), "alpha": random.choice([1, 0.5, 0, -2, 1e30]),
        "base_model": {"id": text(random), "revision": text(random), "files": [{"name": text(random), "digest": text(random)}]},
        "source": {"kind": text(random, ["lora", "full"]), "dialect": text(random, ["peft"]), "files": [{"name": text(random)}], "r": 8},
        "selection": {"rule": text(random, ["top-k"]), "scope": "tensor", "density": 0.1, "include": [text(random)]},
        "mask": {"rule": text(random, ["rand", "wm"]), "seed": random.choice([*NUMBERS, 1])},
    }  # fmt: skip
    told = {key: value for key, value in told.items() if random.random() < 0.7}
    if random.random() < 0.5 and told:
        told = mutated_json(random, told, _KEYS, TEXTS)
    written = json.dumps(kept | {key: value for key, value in told.items() if key not in kept})
    digest = hashlib.sha256(written.encode("utf-8", "surrogatepass")).hexdigest()
    head = file_header(dict(file), {METADATA_KEY: written, DIGEST_KEY: digest})
    path.write_bytes(head + data[len(data) - size :])
    if random.random() < 0.05:
        path.write_bytes(mutated_bytes(random, path.read_bytes()))


def check(folder: Path) -> None:
    """Run the command in the folder."""
    words = json.loads((folder / _CASE).read_text("utf-8"))
    before, here = _contents(folder), Path.cwd()
    raw = io.BytesIO(), io.BytesIO()
    out, err = (io.TextIOWrapper(one, "utf-8", newline="\n", write_through=True) for one in raw)
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = shira(words)
            except SystemExit as end:
                code = int(end.code or 0)
    finally:
        os.chdir(here)
    with aside():
        shown, told = (one.getvalue().decode("utf-8") for one in raw)
        _judge(words, code, shown, told, before, folder)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _judge(words: list[str], code: int, out: str, err: str, before: dict[str, bytes], folder: Path) -> None:
    after = _contents(folder)
    new = {name: data for name, data in after.items() if name not in before}
    for name, data in before.items():
        if after.get(name) != data:
            raise Violation(f"the input {name!r} was changed")
    for where, shown in (("stdout", out), ("stderr", err)):
        _check_characters(where, shown)
    for name, data in new.items():
        if name.endswith((".html", ".json")):
            _check_characters(name, data.decode("utf-8").replace("\u00a0", " "))  # between numbers and units
        if name.endswith(".html") and b"<script>alert" in data:
            raise Violation(f"{name}: a name is markup")
    if "error:" in err and code == 0:
        raise Violation(f"an error, and exit code 0: {err}")
    if code not in (0, 1, 2):
        raise Violation(f"exit code {code}: {err}")
    if code and words[0] != "diff" and new and not words[0:2] == ["inspect", "--verify"]:
        raise Violation(f"exit code {code}, and {sorted(new)} written: {err}")
    if "--json" in words and code == 0:
        json.loads(out, parse_constant=_no_constant)


def _check_characters(where: str, shown: str) -> None:
    for line in shown.split("\n"):
        if not line.isprintable():
            bad = next(char for char in line if not char.isprintable())
            raise Violation(f"{where} has the character U+{ord(bad):04X}: {line[:300]!a}")


def _no_constant(word: str) -> None:
    raise Violation(f"{word} is not JSON")
