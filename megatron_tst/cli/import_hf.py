"""A Hugging Face folder (Llama, Qwen3, Qwen3-MoE, DeepSeek-V3) -> a checkpoint of weights to
pre-train further.

    megatron-tst import-hf Qwen3-8B ck
    torchrun ... -m megatron_tst.pretrain_gpt ... --load ck --finetune --no-load-optim

FOLDER holds config.json and safetensors. It prints the flags with which Megatron builds and loads
this model. Needs no GPU and no Transformer Engine, but pip install 'megatron-tst[hf]'. TARGET is
whole or absent, also after a kill.
"""

from __future__ import annotations

from pathlib import Path

from megatron_tst.cli.screen import Parser, answer, call, progress_bar


def parser(prog: str) -> Parser:
    """The flags of this verb; `prog` is the command as it was called."""
    it = Parser(prog, __doc__)
    it.add_argument("folder", type=Path, metavar="FOLDER", help="config.json and safetensors")
    it.add_argument("target", type=Path, metavar="TARGET", help="a new folder, for --load")
    it.add_argument(
        "--layer-spec",
        default="transformer_engine",
        metavar="local|transformer_engine",
        help="of the run that is to load it; default: transformer_engine",
    )
    it.add_argument("--force", action="store_true", help="replace an existing TARGET")
    it.add_argument("--json", action="store_true", help="print one JSON object")
    return it


def main(argv: list[str] | None = None, prog: str = "megatron-tst import-hf") -> int:
    """Run the verb. -> exit code"""
    return call(parser(prog), _run, argv)


def _run(options):
    from megatron_tst.export.import_hf import LOAD, import_

    with progress_bar("writing") as progress:
        flags = import_(
            options.folder,
            options.target,
            layer_spec=options.layer_spec,
            force=options.force,
            progress=progress,
        )
    load = ["--load", str(options.target), *LOAD]
    text = f"{options.target}: weights alone. Load them with {' '.join(load)} and\n  "
    about = {"written": str(options.target), "load": load, "flags": " ".join(flags).split()}
    answer(options.json, about, text + " ".join(flags))
    return 0
