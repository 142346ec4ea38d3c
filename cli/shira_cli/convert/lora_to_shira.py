"""``shira-convert lora_to_shira``."""

from __future__ import annotations

import argparse
from typing import Any

from shira_cli import console
from shira_cli.convert import common

DESCRIPTION = """\
Turn a LoRA into a sparse adapter: the largest entries of its update, as exact values of the tuned weights.

What kind of LoRA it is, is seen from its files (--dialect says otherwise):
  peft       adapter_config.json with adapter_model.safetensors or .bin: LoRA, DoRA, embeddings, convolutions, experts
  diffusers  pytorch_lora_weights.safetensors, of today and of 2023
  kohya      lora_unet_..., lora_te_...: files of sd-scripts
  lycoris    LoCon, LoHa, LoKr, full differences, with dora_scale or without
  xlabs      FLUX LoRAs of x-flux
  mlx        mlx-lm's adapters.safetensors
  gguf       llama.cpp's adapters
  torchtune  adapter_model.pt

LoRAs of a UNet and its text encoders need the pipeline (the folder with model_index.json) as base. A key that matches
nothing in the base is an error, never left out."""


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = common.add_command(
        commands, "lora_to_shira", help="a LoRA, with its base",
        description=DESCRIPTION,
        example="my-lora/ --base my-model/ -o adapter.st --density 0.02",
    )  # fmt: skip
    parser.add_argument("lora", metavar="LORA", help="a LoRA: a file or folder of any of these dialects, or hf://owner/name")  # fmt: skip
    parser.add_argument("--base", required=True, help="the model that it adapts: a checkpoint of any layout")
    common.add_selection(parser)
    common.add_filters(parser)
    parser.add_argument("--dialect", help="what kind of LoRA it is (default: recognised)")
    common.add_output(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from shira_format.convert import LoraJob
    from shira_format.lora import DIALECTS

    if options.dialect is not None and options.dialect not in DIALECTS:
        console.usage_error(common.PROG, f"--dialect {options.dialect!r} is not one of {', '.join(DIALECTS)}")
    rule = common.selection_rule(options)
    job = LoraJob(options.lora, options.base, options.dialect, tuple(options.include), tuple(options.exclude))
    return common.run_job(options, job, rule)
