"""A checkpoint -> a checkpoint of Megatron-Bridge (NeMo), optimizer state included.

    megatron-tst export-nemo ck nemo --tokenizer tokenizer.json

CHECKPOINT is the folder that --save named (then its latest iteration), or one iter_... in it, of
any parallel layout. Needs no GPU and no Transformer Engine; with a tokenizer.json, pip install
'megatron-tst[hf]'. TARGET is whole or absent, also after a kill.
"""

from __future__ import annotations

from pathlib import Path

from megatron_tst.cli.export_hf import add_export, given
from megatron_tst.cli.screen import Parser, answer, call, progress_bar


def parser(prog: str) -> Parser:
    """The flags of this verb; `prog` is the command as it was called."""
    it = Parser(prog, __doc__)
    add_export(it)
    it.add_argument(
        "--hf-config",
        type=Path,
        metavar="FOLDER",
        help="with the config.json of the model that was trained, of any architecture that the "
        "installed Megatron-Bridge has; default: a Llama, Qwen3 or Qwen3-MoE, by the arguments",
    )
    it.add_argument(
        "--layer-spec",
        metavar="local|transformer_engine",
        help="of the Bridge run that is to load it; default: this run's own",
    )
    it.add_argument("--drop-optimizer", action="store_true", help="weights alone")
    return it


def main(argv: list[str] | None = None, prog: str = "megatron-tst export-nemo") -> int:
    """Run the verb. -> exit code"""
    return call(parser(prog), _run, argv)


def _run(options):
    from megatron_tst.checkpoint.format import Checkpoint
    from megatron_tst.export import nemo

    source = Checkpoint(options.checkpoint)
    with progress_bar("writing") as progress:
        folder = nemo.export(
            source,
            options.target,
            hf_config=options.hf_config,
            layer_spec=options.layer_spec,
            drop_optimizer=options.drop_optimizer,
            progress=progress,
            **given(options),
        )
    load = f"AutoBridge.from_hf_config(AutoConfig.from_pretrained('{folder}/hf'))"
    about = {"written": str(folder), "from": str(source.path), "to_hugging_face": load}
    text = f"{folder}: written from {source.path}. To Hugging Face by Bridge: {load}"
    answer(options.json, about, text)
    return 0
