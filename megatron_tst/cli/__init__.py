"""megatron-tst: one verb a module, which reads flags, calls the package and prints.

    megatron-tst VERB ...          the same as python -m megatron_tst VERB ...
    megatron-tst VERB --help       what it does, with an example that runs

Exit codes, of every verb: 0 done, and the answer is yes; 1 done, and the answer is no (`verify`:
they differ; `doctor`: training would fail); 2 refused, with one line on stderr that says what was
expected, what was got and what to do. A verb that is interrupted or killed leaves nothing half
written. With --json stdout is one JSON object and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
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
    if argv[:1] == ["--version"]:
        from megatron_tst import __version__

        print(f"megatron-tst {__version__}")
        return 0
    return dispatch("megatron-tst", {verb: verb for verb in VERBS}, argv)


def dispatch(prog: str, verbs: Mapping[str, str], argv: list[str] | None = None) -> int:
    """Run the verb that the first argument names. -> its exit code

    Args:
        prog: the command as it was called.
        verbs: first argument -> verb. A file of the checkout that is a door to some of the verbs
            may have names of its own for them.
        argv: None: the command line's.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_help(prog, verbs))
        return 0 if argv else 2
    name, *rest = argv
    if name not in verbs:
        print(
            f"{prog}: error: expected a verb, one of {', '.join(verbs)}, got {name!r}. "
            f"`{prog} --help` says what each is for.",
            file=sys.stderr,
        )
        return 2
    module = import_module(f"megatron_tst.cli.{verbs[name].replace('-', '_')}")
    return module.main(rest, f"{prog} {name}")


def _help(prog, verbs):
    rows = [f"  {name:13}{VERBS[verb]}" for name, verb in verbs.items()]
    head = f"usage: {prog} VERB ...\n\nToken-Superposition Training for Megatron-Core.\n"
    tail = f"\n`{prog} VERB --help` has an example that runs."
    codes = "Exit codes: 0 done (yes), 1 done (no: verify, doctor), 2 refused, in one line."
    return "\n".join([head, *rows, tail, codes])
