"""A checkpoint -> a Hugging Face folder in FP8 or NVFP4, by NVIDIA's ModelOpt, for vLLM,
TensorRT-LLM and SGLang.

    megatron-tst quantize ck hf_fp8 --recipe fp8 --data-path corpus/text --tokenizer tokenizer.json

Calibrates on the start of an indexed dataset (`megatron-tst corpus` makes one) and measures the
perplexity on its end, before and after. CHECKPOINT is the folder that --save named (then its latest
iteration), or one iter_... in it. The device holds the whole model. Needs pip install
'megatron-tst[modelopt]'. TARGET is whole or absent, also after a kill.
"""

from __future__ import annotations

import contextlib
import math
import sys

from megatron_tst.cli.export_hf import add_export, given
from megatron_tst.cli.screen import Parser, answer, call, progress_bar


def parser(prog: str) -> Parser:
    """The flags of this verb; `prog` is the command as it was called."""
    it = Parser(prog, __doc__)
    add_export(it)
    it.add_argument("--recipe", required=True, metavar="fp8|nvfp4", help="nvfp4 needs a GPU")
    it.add_argument(
        "--data-path", required=True, metavar="PREFIX", help="indexed dataset, PREFIX.bin and .idx"
    )
    it.add_argument(
        "--samples",
        type=int,
        default=512,
        help="to calibrate on, and as many to measure perplexity on; default: 512",
    )
    it.add_argument(
        "--sequence-length", type=int, help="tokens of a sample; default: the run's --seq-length"
    )
    it.add_argument("--device", help="cpu, cuda, cuda:1; default: the GPU where there is one")
    return it


def main(argv: list[str] | None = None, prog: str = "megatron-tst quantize") -> int:
    """Run the verb. -> exit code"""
    return call(parser(prog), _run, argv)


def _run(options):
    from megatron_tst.checkpoint.format import Checkpoint
    from megatron_tst.export.quantize import quantize

    source = Checkpoint(options.checkpoint)
    # ModelOpt and transformers print on stdout
    with contextlib.redirect_stdout(sys.stderr), progress_bar("samples", unit="") as progress:
        folder, before, after = quantize(
            source,
            options.target,
            recipe=options.recipe,
            data=options.data_path,
            samples=options.samples,
            sequence_length=options.sequence_length,
            device=options.device,
            progress=progress,
            **given(options),
        )
    perplexity = {"before": before, "after": after}
    rows = [
        f"perplexity {when:6s} {value:.4f} ({math.log(value):.5f} nats)"
        for when, value in perplexity.items()
    ]
    about = {"written": str(folder), "from": str(source.path), "recipe": options.recipe}
    text = "\n".join([*rows, f"{folder}: written from {source.path}"])
    answer(options.json, about | {"perplexity": perplexity}, text)
    return 0
