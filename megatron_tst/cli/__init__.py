"""megatron-tst: one verb a module, which reads flags, calls the package and prints.

    megatron-tst VERB ...          the same as python -m megatron_tst VERB ...
    megatron-tst VERB --help       what it does, with an example that runs

Exit codes, of every verb: 0 done, and the answer is yes; 1 done, and the answer is no (`verify`:
they differ; `doctor`: training would fail); 2 refused, with one line on stderr that says what was
expected, what was got and what to do. Interrupted or ended by SIGTERM it dies of that signal (130
or 143 in a shell), after one line. Ended in any way, a verb leaves nothing half written. --debug
adds the traceback of what was not foreseen. With --json stdout is one JSON object and nothing else.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from importlib import import_module

from megatron_tst.errors import refuse

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
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["--version"]:
        from megatron_tst import __version__

        print(f"megatron-tst {__version__}")
        return 0
    code = dispatch("megatron-tst", {verb: verb for verb in VERBS}, words)
    if argv is None and code > 128:
        # as a process that did not catch the signal, so that a shell's loop ends with it too
        signal.signal(code - 128, signal.SIG_DFL)
        os.kill(os.getpid(), code - 128)
    return code


def dispatch(prog: str, verbs: Mapping[str, str], argv: list[str] | None = None) -> int:
    """Run the verb that the first argument names. -> its exit code

    Args:
        prog: the command as it was called.
        verbs: first argument -> verb. A file of the checkout that is a door to some of the verbs
            may have names of its own for them.
        argv: None: the command line's.
    """
    from megatron_tst.cli.screen import guarded

    name, *rest = (sys.argv[1:] if argv is None else argv) or [None]
    with guarded(prog) as end:
        if name in (None, "-h", "--help"):
            print(_help(prog, verbs))
            return 2 if name is None else 0
        module = _module_of(prog, verbs, name)
        end.code = 0
    if end.code:
        return end.code
    return module.main(rest, f"{prog} {name}")


def _module_of(prog, verbs, name):
    if name not in verbs:
        do = f"`{prog} --help` says what each is for."
        refuse("the verb", f"one of {', '.join(verbs)}", repr(name), do)
    return import_module(f"megatron_tst.cli.{verbs[name].replace('-', '_')}")


def _help(prog, verbs):
    rows = [f"  {name:13}{VERBS[verb]}" for name, verb in verbs.items()]
    head = f"usage: {prog} VERB ...\n\nToken-Superposition Training for Megatron-Core.\n"
    tail = f"\n`{prog} VERB --help` has an example that runs."
    codes = (
        "Exit codes: 0 done (yes), 1 done (no: verify, doctor), 2 refused, in one line.\n"
        "--debug behind a verb adds the traceback of what was not foreseen."
    )
    return "\n".join([head, *rows, tail, codes])
