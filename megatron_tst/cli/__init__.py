"""megatron-tst: one verb a module, which reads flags, calls the package and prints.

    megatron-tst VERB ...          the same as python -m megatron_tst VERB ...
    megatron-tst VERB --help       what it does, with an example that runs

Exit codes, of every verb: 0 done, and the answer is yes; 1 done, and the answer is no (`verify`:
they differ; `doctor`: training would fail); 2 refused, with one line on stderr that says what was
expected, what was got and what to do. A verb that is interrupted or killed leaves nothing half
written.
"""

from __future__ import annotations

import sys
from importlib import import_module

VERBS = {  # verb: what it is for, a line of `megatron-tst --help`; its module has the same name
    "demo": "train a small GPT with and without TST, on CPU or one GPU, and draw both",
    "corpus": "text files -> a tokenizer and Megatron's indexed dataset",
    "plan": "a run before it starts: text, cost, memory, layout, the paper's figures",
    "doctor": "what is installed, what TST will use, what to do about each fault",
    "launch": "run an unmodified Megatron-LM script with TST",
    "inspect": "what is in a checkpoint: phase, samples, raw tokens, tensors",
    "boundary": "a TST checkpoint -> one that stock Megatron continues",
    "verify": "whether two checkpoints hold the same weights and optimizer state",
    "export-hf": "a checkpoint -> a Hugging Face folder",
    "export-nemo": "a checkpoint -> a checkpoint of Megatron-Bridge (NeMo)",
    "import-hf": "a Hugging Face folder -> a checkpoint to pre-train further",
    "quantize": "a checkpoint -> a Hugging Face folder in FP8 or NVFP4",
    "plot": "draw the losses of runs, and say how much sooner one reaches another's loss",
}


def main(argv: list[str] | None = None) -> int:
    """Run a verb. -> its exit code"""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else 2
    verb, *rest = argv
    if verb == "--version":
        from megatron_tst import __version__

        print(f"megatron-tst {__version__}")
        return 0
    if verb not in VERBS:
        known = ", ".join(VERBS)
        print(
            f"megatron-tst: error: expected a verb, one of {known}, got {verb!r}. "
            "`megatron-tst --help` says what each is for.",
            file=sys.stderr,
        )
        return 2
    return import_module(f"megatron_tst.cli.{verb.replace('-', '_')}").main(rest)


def _help() -> str:
    rows = [f"  {verb:13}{text}" for verb, text in VERBS.items()]
    head = "usage: megatron-tst VERB ...\n\nToken-Superposition Training for Megatron-Core.\n"
    tail = "\n`megatron-tst VERB --help` has an example that runs."
    codes = "Exit codes: 0 done (yes), 1 done (no: verify, doctor), 2 refused, in one line."
    return "\n".join([head, *rows, tail, codes])
