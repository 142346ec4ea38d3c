"""Fits as people call them: ``--fit``, searches and ``refit``, on tiny models, and once on a real one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
)

from shira_cli import convert, inspect
from shira_cli.options import Bytes
from shira_format.format import load
from shira_format.live import Switcher
from tests import models
from tests.shira_cli.test_schemas import check

POSIX = os.name == "posix"
Capture = pytest.CaptureFixture[str]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(30))]
SIZES: dict[str, Any] = {"vocab_size": len(WORDS), "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 16}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT and a tiny Llama with a tokenizer, a LoRA of each, a fine-tune of the BERT, and texts."""
    found = tmp_path_factory.mktemp("fit")
    torch.manual_seed(0)
    bert = BertForSequenceClassification(BertConfig(**SIZES, num_labels=2))
    bert.bert.save_pretrained(found / "bert")
    LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, bos_token_id=2, eos_token_id=3)).save_pretrained(found / "llama")  # fmt: skip
    for name in ("bert", "llama"):
        (found / name / "vocab.txt").write_text("\n".join(WORDS))
        BertTokenizerFast(str(found / name / "vocab.txt"), bos_token="[CLS]").save_pretrained(found / name)
    targets = ["query", "value", "dense"]
    lora = models.random_lora(bert, r=2, scale=0.3, target_modules=targets, modules_to_save=["classifier"], task_type="SEQ_CLS")  # fmt: skip
    models.save_lora(lora, found / "lora")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora.merge_and_unload().bert.save_pretrained(found / "tuned")
        llama = LlamaForCausalLM.from_pretrained(found / "llama")
    models.save_lora(
        models.random_lora(llama, r=2, scale=0.3, target_modules=["q_proj", "down_proj"]), found / "llama-lora"
    )
    draw = np.random.default_rng(0)
    lines = [{"text": " ".join(draw.choice(WORDS[5:], draw.integers(3, 10)))} for _ in range(60)]
    (found / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return found


Run = Callable[..., int]


@pytest.fixture
def lora(folder: Path, tmp_path: Path) -> Run:
    """Fits the LoRA of the BERT with 20 steps, to ``a.st``."""

    def run(*options: object, out: str = "a.st", steps: int | None = 20, texts: bool = True) -> int:
        words = [
            "lora_to_shira",
            folder / "lora",
            "--base",
            folder / "bert",
            "-o",
            tmp_path / out,
            "--fit",
            "distill",
        ]
        words += ["--texts", folder / "texts.jsonl"] if texts else []
        words += ["--steps", steps] if steps else []
        return convert.main([str(word) for word in (*words, *options)])

    return run


def test_a_lora(lora: Run, folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert 0 == lora("--density", "0.05", "--picture", tmp_path / "a.png")
    text, err = capsys.readouterr()
    assert "distillation, 20 steps, on 48 inputs (texts.jsonl)" in text
    assert "on 12 inputs held out; the plain cut keeps" in text
    assert "energy kept" not in text + err
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    found = load(tmp_path / "a.st")
    told = found.manifest["fit"]
    assert ("distill", "fit", 20) == (told["method"], told["kept"], told["options"]["steps"])
    assert told["effect"]["r2"] > told["plain"]["r2"] + 0.2
    assert {"rule": "fit", "scope": "global", "density": 0.05}.items() <= found.manifest["selection"].items()
    # What is told is what the file does to the base, by transformers and PEFT.
    held = texts_held_out(folder, told["inputs"])
    zero, want, here = (outputs(folder, held, kind, tmp_path / "a.st") for kind in ("base", "lora", "file"))
    r2 = 1 - float((here - want).square().sum() / (zero - want).square().sum())
    assert r2 == pytest.approx(told["effect"]["r2"], abs=1e-4)


def texts_held_out(folder: Path, inputs: dict[str, Any]) -> list[str]:
    """The fifth of the texts that the seed draws."""
    from shira_format.convert.fit.data import Split

    lines = [json.loads(line)["text"] for line in (folder / "texts.jsonl").read_text().splitlines()]
    _, held = Split().parts(len(lines), "texts")
    assert inputs["held"] == len(held)
    return [lines[place] for place in held]


def outputs(folder: Path, texts: list[str], kind: str, adapter: Path) -> torch.Tensor:
    """Logits; those of the base have the LoRA's head."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = BertForSequenceClassification.from_pretrained(folder / "bert", num_labels=2)
    if kind == "lora":
        model = models.load_lora(model, folder / "lora")
    elif kind == "file":
        Switcher(model.eval()).load(adapter)
    else:
        dense = load(adapter).dense
        assert {"classifier.weight", "classifier.bias"} == dense.keys()
        state = {name: torch.from_numpy(tensor.values.copy()) for name, tensor in dense.items()}
        model.load_state_dict(state, strict=False)
    tokenizer = BertTokenizerFast.from_pretrained(folder / "bert")
    with torch.no_grad():
        return model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits


def test_moments(lora: Run, tmp_path: Path, capsys: Capture) -> None:
    assert 0 == lora("--fit", "moments", "--density", "0.05", "--json", steps=None)
    found = json.loads(capsys.readouterr().out)
    check("lora_to_shira", found)
    assert "moments" == found["fit"]["method"] == load(tmp_path / "a.st").manifest["fit"]["method"]
    assert 0 == inspect.main([str(tmp_path / "a.st")])
    assert "moments of the layers' inputs" in capsys.readouterr().out
    assert 0 == lora("--fit", "moments", "--max-bytes", "13k", "--quiet", out="b.st", steps=None)
    assert (tmp_path / "b.st").stat().st_size <= 13_000


def test_the_fewest_entries_that_keep_a_share(lora: Run, tmp_path: Path, capsys: Capture) -> None:
    assert 0 == lora("--keep", "0.6", "--json", "--quiet", "--picture", tmp_path / "a.svg")
    out, err = capsys.readouterr()
    assert "" == err
    found = json.loads(out)
    check("lora_to_shira", found)
    fit = found["fit"]
    assert {"keep": 0.6} == fit["goal"] == load(tmp_path / "a.st").manifest["fit"]["goal"]
    # Chosen by some texts, measured on others.
    assert {"fitted": 48, "choosing": 6, "held": 6}.items() <= fit["inputs"].items()
    (written,) = [trial for trial in fit["trials"] if trial["budget"] == fit["budget"]]
    assert written[written["kept"]]["r2"] >= 0.6
    assert written["fit"]["r2"] != fit["fit"]["r2"]
    assert 6 == fit["fit"]["inputs"]
    assert fit["budget"] == min(one["budget"] for one in fit["trials"] if one[one["kept"]]["r2"] >= 0.6)
    assert found["totals"]["file_bytes"] == written["file_bytes"] == (tmp_path / "a.st").stat().st_size
    assert (tmp_path / "a.svg").read_text("utf-8").startswith("<?xml")
    assert {"a.st", "a.svg"} == {path.name for path in tmp_path.iterdir()}


def test_as_many_as_a_file_has_room_for(lora: Run, tmp_path: Path, capsys: Capture) -> None:
    assert 0 == lora("--max-bytes", "14k", "--steps", "6", steps=None)
    assert "written" in capsys.readouterr().out
    size = (tmp_path / "a.st").stat().st_size
    assert 0.98 * 14_000 <= size <= 14_000
    assert 1 == lora("--max-bytes", "2KiB", out="b.st")
    assert "a file with a single entry has" in capsys.readouterr().err
    assert not (tmp_path / "b.st").exists()


def test_a_share_out_of_reach_is_refused(lora: Run, tmp_path: Path, capsys: Capture) -> None:
    assert 1 == lora("--keep", "0.9999", "--steps", "1", steps=None)
    out, err = capsys.readouterr()
    assert "" == out
    assert "shira-convert: error: no density up to 20.00 % keeps 0.9999 of the effect (R²): the best is" in err
    assert [] == list(tmp_path.iterdir())


def test_a_dry_run_fits_and_writes_nothing(lora: Run, tmp_path: Path, capsys: Capture) -> None:
    options = ("--density", "0.02", "--json", "--steps", "4")
    assert 0 == lora(*options, "--dry-run", "--picture", tmp_path / "a.png", steps=None)
    dry = json.loads(capsys.readouterr().out)
    assert [] == list(tmp_path.iterdir())
    check("lora_to_shira", dry)
    assert 0 == lora(*options, steps=None)
    wet = json.loads(capsys.readouterr().out)
    assert (dry["fit"]["fit"], dry["tensors"]) == (wet["fit"]["fit"], wet["tensors"])
    assert 1 == lora(*options, steps=None)
    assert "exists; --force replaces it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--energy", "0.5"), "--energy does not go with --fit: entries are chosen among those of all tensors"),
        (("--scope", "tensor"), "--scope does not go with --fit"),
        (("--min-change", "0.1"), "--min-change does not go with --fit"),
        (("--resume",), "--resume does not go with --fit"),
        (("--dask", "tcp://x:1"), "--dask does not go with --fit"),
        (("--keep", "0.9", "--density", "0.1"), "--density and --keep exclude each other"),
        (("--max-bytes", "1k", "--top-k", "3"), "--top-k and --max-bytes exclude each other"),
        (("--keep", "1"), "--keep 1 is not in (0, 1)"),
        (("--max-bytes", "1 T"), "--max-bytes 1 T is no number of bytes such as 200k, 1.5M or 1MiB"),
        (("--picture", "a.gif"), "--picture a.gif: pictures are written as png and svg"),
        (("--fit", "none", "--seed", "1"), "goes with --fit moments or --fit distill"),
        (("--fit", "moments"), "--steps goes with --fit distill"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(options: tuple[str, ...], reason: str, lora: Run, tmp_path: Path, capsys: Capture) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        sys.exit(lora(*options))
    assert 2 == caught.value.code
    out, err = capsys.readouterr()
    assert ("", 1) == (out, err.count("\n"))
    assert reason in err
    assert [] == list(tmp_path.iterdir())


def test_an_exact_patch_is_not_fitted(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ["full_to_shira", "--base", folder / "bert", "--tuned", folder / "tuned", "-o", tmp_path / "a.st", "--fit", "distill", "--exact"]  # fmt: skip
    with pytest.raises(SystemExit):
        sys.exit(convert.main([str(word) for word in words]))
    assert "--exact keeps every difference as it is" in capsys.readouterr().err


def test_a_classifier_needs_texts(lora: Run, tmp_path: Path, capsys: Capture) -> None:
    assert 1 == lora(texts=False)
    assert "there are no inputs to fit on, and this model cannot write any" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sys.exit(lora("--test", "x.txt", texts=False))
    assert "--test goes with --texts" in capsys.readouterr().err
    assert [] == list(tmp_path.iterdir())


def test_a_language_model_writes_its_own_texts(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ["lora_to_shira", folder / "llama-lora", "--base", folder / "llama", "-o", tmp_path / "a.st", "--fit", "distill"]  # fmt: skip
    options = ("--limit", "24", "--max-length", "8", "--steps", "10", "--top-k", "200", "--json")
    assert 0 == convert.main([str(word) for word in (*words, *options)])
    out, err = capsys.readouterr()
    found = json.loads(out)
    check("lora_to_shira", found)
    assert "note: no texts were given: 24 of 8 tokens were sampled from the source itself" in err
    assert (200, True) == (found["totals"]["nnz"], 0 <= found["fit"]["fit"]["kl"])


def test_a_full_fine_tune_by_its_embeddings(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ["full_to_shira", "--base", folder / "bert", "--tuned", folder / "tuned", "-o", tmp_path / "a.st", "--fit", "distill"]  # fmt: skip
    options = ("--texts", folder / "texts.jsonl", "--test", folder / "texts.jsonl", "--steps", "10", "--density", "0.05")  # fmt: skip
    assert 0 == convert.main([str(word) for word in (*words, *options)])
    out, _ = capsys.readouterr()
    assert "mean cosine to the source's 0." in out
    assert "on 60 inputs held out" in out


def test_refit(lora: Run, folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert 0 == lora("--density", "0.02", "--quiet")
    capsys.readouterr()

    def refit(*options: object) -> int:
        words = ("refit", *options, "--base", folder / "bert", "--texts", folder / "texts.jsonl", "--steps", "20")
        return convert.main([str(word) for word in words])

    first, less, both = (tmp_path / name for name in ("a.st", "less.st", "both.st"))
    assert 0 == refit(first, "--density", "0.01", "-o", less, "--json")
    found = json.loads(capsys.readouterr().out)
    check("refit", found)
    assert found["fit"]["budget"] == found["totals"]["nnz"] < 80
    assert found["fit"]["fit"]["r2"] > found["fit"]["plain"]["r2"] + 0.1
    assert "adapter" == load(less).manifest["source"]["kind"]
    assert 0 == refit(first, less, "--weights", "0.5,0.5", "--top-k", "50", "-o", both, "--quiet")
    assert [first.name, less.name] == [one["name"] for one in load(both).manifest["source"]["files"]]
    assert 50 >= sum(tensor.nnz for tensor in load(both).values())
    with pytest.raises(SystemExit):
        sys.exit(refit(first, less, "--weights", "1", "-o", tmp_path / "c.st"))
    assert "--weights: 1 for 2 adapters" in capsys.readouterr().err


def test_refit_with_texts_of_each(lora: Run, folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert 0 == lora("--density", "0.02", "--quiet")
    adapter, texts = tmp_path / "a.st", folder / "texts.jsonl"
    capsys.readouterr()

    def refit(*options: object) -> int:
        words = ("refit", adapter, adapter, "--base", folder / "bert", "--top-k", "80", *options)
        return convert.main([str(word) for word in (*words, "-o", tmp_path / "both.st", "--force")])

    assert 0 == refit("--texts", texts, "--texts", texts, "--steps", "2")
    where = load(tmp_path / "both.st").manifest["fit"]["inputs"]
    assert [part["name"] for part in where["parts"]] == [texts.name] * 2
    assert where["held"] == 2 * 12
    for options, message in (
        (("--texts", texts, "--texts", texts, "--texts", texts), "--texts: 3 for 2 adapters"),
        (("--texts", texts, "--texts", texts, "--test", texts), "give both once, or both once for each adapter"),
        (("--texts", texts, "--texts", texts, "--fit", "moments"), "moments follow one source"),
    ):
        with pytest.raises(SystemExit):
            sys.exit(refit(*options))
        assert message in capsys.readouterr().err


def test_inspect_tells_what_is_kept(lora: Run, folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert 0 == lora("--density", "0.05", "--quiet")
    capsys.readouterr()
    page = tmp_path / "a.html"
    assert 0 == inspect.main([str(tmp_path / "a.st"), "--html", str(page), "--base", str(folder / "bert")])
    text = capsys.readouterr().out
    assert "selection             fit, density 0.05, over all tensors\n" in text
    for key in ("fit  ", "effect kept  ", "outputs  ", "error by layer  "):
        assert f"\n{key}" in text
    shown = page.read_text("utf-8")
    assert "Effect kept: R² " in shown
    assert "How near each layer is to the source’s" in shown
    assert 0 == inspect.main([str(tmp_path / "a.st"), "--json"])
    info = json.loads(capsys.readouterr().out)
    check("inspect", info)
    assert "distill" == info["fit"]["method"]


_SLOW = """
import sys
from shira_format.convert.fit import run
fast = run.load_base
def loaded(*arguments):
    found = fast(*arguments)
    found.model.register_forward_hook(lambda *_: print("forward", flush=True))
    return found
run.load_base = loaded
from shira_cli.convert import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(not POSIX, reason="signals of POSIX")
def test_an_interrupt_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "tmp").mkdir()
    words = ["lora_to_shira", folder / "lora", "--base", folder / "bert", "-o", tmp_path / "out" / "a.st", "--fit", "distill", "--keep", "0.99"]  # fmt: skip
    words += ["--texts", folder / "texts.jsonl", "--steps", "10000", "--quiet"]
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    with subprocess.Popen([sys.executable, "-c", _SLOW, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:  # fmt: skip
        assert process.stdout is not None
        for _ in range(40):
            assert "forward\n" == process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (130, "shira-convert: error: interrupted; nothing was written\n") == (process.returncode, err)
    assert [] == list((tmp_path / "out").iterdir())
    assert [] == [path for path in (tmp_path / "tmp").iterdir() if path.name.startswith("shira")]


def test_a_real_lora(tmp_path: Path, capsys: Capture) -> None:
    texts = models.LORAS.parent / "text" / "spam-train.jsonl"
    words = ["lora_to_shira", models.LORAS / "spam", "--base", models.minilm(), "-o", tmp_path / "a.st", "--fit", "distill"]  # fmt: skip
    options = (
        "--texts",
        texts,
        "--limit",
        "64",
        "--max-length",
        "24",
        "--steps",
        "8",
        "--density",
        "0.002",
        "--json",
    )
    assert 0 == convert.main([str(word) for word in (*words, *options)])
    out, err = capsys.readouterr()
    found = json.loads(out)
    check("lora_to_shira", found)
    assert found["fit"]["fit"]["r2"] > found["fit"]["plain"]["r2"] + 0.1
    assert 6 == len(found["fit"]["fit"]["layers"])
    assert "energy" not in err


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("200k", 200_000), ("200 kB", 200_000), ("1.5M", 1_500_000), ("2G", 2 * 10**9), ("1MiB", 1 << 20), ("0.5Ki", 512), ("1e3", None), ("-1", None), ("0", None), ("0.1", None), ("", None), ("k", None), ("9" * 5000, None)],
)  # fmt: skip
def test_numbers_of_bytes(text: str, size: int | None) -> None:
    if size is None:
        with pytest.raises(Exception, match="no number of bytes"):
            Bytes().convert(text, None, None)
    else:
        assert size == Bytes().convert(text, None, None)
