"""The command line of a training run, as `megatron-tst plan` takes it: what of it a plan uses.

    torchrun --nproc-per-node 8 pretrain_gpt.py --num-layers 36 --bf16 --lr 1e-3 ...

What stands before the script is the launcher's. It says how many GPUs there are. Of the flags
behind it a plan uses those of its parser. The others are Megatron's, which its own parser knows. It
is imported where there are such flags.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import io
import itertools
import logging
import os
import re
import shlex
import warnings
from dataclasses import dataclass

from megatron_tst import compat
from megatron_tst.errors import TSTError, refuse

_LAUNCHERS = {
    *("torchrun", "srun", "mpirun", "mpiexec", "accelerate", "deepspeed"),
    *("env", "numactl", "nsys", "nohup", "time", "exec"),
}
# Where a command ends: what a shell does with its output, or after it.
_OUTPUT = re.compile(r"(&|&&|\||\|\||;)$|\d*&?>")
# Modules that run another script, which is the word behind them.
_RUNNERS = {"torch.distributed.run", "torch.distributed.launch", "megatron_tst.launch"}
# Megatron's flags that make another model or batch of it than the one that is planned.
CHANGING = {
    *("--mtp-hybrid-override-pattern", "--spec"),
    *("--rampup-batch-size", "--step-batch-size-schedule"),
}


@dataclass(frozen=True)
class Line:
    """A command line.

    Args:
        argv: the flags that a plan uses, with their values.
        not_used: other flags of Megatron's.
        values: of those, by the names of Megatron's arguments.
        gpus: processes that the launcher starts; None where it does not say.
    """

    argv: list[str]
    not_used: list[str]
    values: dict[str, object]
    gpus: int | None


class Flags(argparse.ArgumentParser):
    """A parser whose mistakes are TSTErrors."""

    def error(self, message: str) -> None:
        """What argparse calls for a mistake.

        Raises:
            TSTError: always.
        """
        raise TSTError(f"{message}. Correct it.")


def read(argv: list[str], p: argparse.ArgumentParser) -> Line:
    """Take a command line apart.

    Args:
        argv: a plan's flags, or the line that starts a run, also as a single word in quotes; or
            both, a plan's flags first.
        p: the parser of a plan.

    Raises:
        TSTError: a launcher without a script, a flag that neither parser has, or a value that
            Megatron's parser refuses.
    """
    if len(argv) == 1 and len(argv[0].split()) > 1:
        argv = _words(argv[0])
    for before, word in itertools.pairwise(["", *argv]):
        if word.startswith("$") and not before.startswith("-"):
            _refuse_variable(word)
    launcher, argv = _launcher(argv, p)
    used: list[str] = []
    others: list[list[str]] = []
    current = used
    for word in argv:
        if re.match(r"--?[A-Za-z_]", word):
            if word.partition("=")[0] in p._option_string_actions:
                current = used
            else:
                others.append(current := [])
        current.append(word)
    values = _checked(others, p) if others else {}
    not_used = list(dict.fromkeys(words[0].partition("=")[0] for words in others))
    return Line(used, not_used, values, _processes(launcher))


def _words(text) -> list[str]:
    """The words of a command as a script has it: lines that go on behind a backslash, comments, and
    what a shell does with the output.
    """
    text = re.sub(r"\\[ \t]*\r?\n", " ", text)
    text = re.sub(r"(?m)(^|[ \t])#.*$", "", text)
    try:
        words = shlex.split(text)
    except ValueError as error:
        refuse("the launch line", "words as a shell reads them", error, "Correct it.")
    taken = list(itertools.takewhile(lambda word: not _OUTPUT.match(word), words))
    ends = (i for i, word in enumerate(taken) if word.endswith(";"))
    if (end := next(ends, None)) is not None:
        taken[end:] = [taken[end].rstrip(";")]
    return taken


def _refuse_variable(word):
    do = "Put the line in double quotes, in a shell that has the variable."
    refuse("the launch line", "words without a shell's variables", word, do)


def _launcher(argv, p) -> tuple[list[str], list[str]]:
    """(the words up to the script, all others)"""
    i = 0
    while i < len(argv) and not _launches(argv[i]):
        if not argv[i].startswith("-"):
            if any(_is_script(word) for word in argv[i:]):
                break  # a launcher that is not known, as `uv run torchrun`
            return [], argv
        name, equals, _ = argv[i].partition("=")
        if (action := p._option_string_actions.get(name)) is None or name == "--print":
            return [], argv  # behind a flag of Megatron's no launcher follows
        i += 1
        if action.nargs in ("+", "*"):
            while i < len(argv) and not (argv[i].startswith("--") or _launches(argv[i], bare=True)):
                i += 1
        elif action.nargs != 0 and not equals:
            i += 1
    for j in range(i, len(argv)):
        module = argv[j - 1] in ("-m", "--module") and j > i
        if (module and argv[j] not in _RUNNERS) or _is_script(argv[j]):
            return argv[i : j + 1], argv[:i] + argv[j + 1 :]
    if i < len(argv):
        do = "Give the whole line, or the flags behind the script alone."
        refuse("the launch line", "a script (x.py or -m MODULE)", shlex.join(argv[i:])[:80], do)
    return [], argv


def _launches(word, bare=False) -> bool:
    """Whether a word begins what stands before the script; `bare`: for sure, since a path of a
    dataset may end in such a name.
    """
    name = word if bare else os.path.basename(word)
    assigns = re.match(r"[A-Za-z_]\w*=", word) and not bare
    python = re.fullmatch(r"python[\d.]*", name)
    return bool(assigns or python) or name in _LAUNCHERS or _is_script(word)


def _is_script(word) -> bool:
    return word.endswith(".py") and not word.startswith("-")


def _processes(launcher: list[str]) -> int | None:
    """torchrun's nodes and processes of each, or the tasks or processes of other launchers."""
    words = [part for word in launcher for part in word.split("=", 1)]
    # srun -n32
    words = [
        part for word in words for part in re.sub(r"^(-[nN])(\d+)$", r"\1 \2", word).split(" ")
    ]

    def said(*names):
        pairs = itertools.pairwise(words)
        found = [after for word, after in pairs if word.replace("_", "-") in names]
        if found and found[-1].startswith("$"):
            _refuse_variable(found[-1])
        return int(found[-1]) if found and re.fullmatch(r"[1-9]\d{0,6}", found[-1]) else None

    each, nodes = said("--nproc-per-node"), said("--nnodes", "-N", "--nodes")
    each = each or said("--ntasks-per-node", "--gpus-per-node", "--num-gpus")
    if each:
        return each * (nodes or 1)
    return said("--ntasks", "-n", "-np", "--np", "--num-processes")


def _checked(others: list[list[str]], p: argparse.ArgumentParser) -> dict[str, object]:
    """Refuse what Megatron's parser does not take. -> the values. Without Megatron-LM nothing is
    known of them.
    """
    theirs = _megatrons()
    known = theirs._option_string_actions if theirs else {}
    for words in others:
        name = words[0].partition("=")[0]
        if name in known:
            continue
        names = [flag for flag in (*p._option_string_actions, *known) if flag.startswith("--")]
        meant = f"--{name.lstrip('-').lower().replace('_', '-')}"
        near = difflib.get_close_matches(meant, names, n=1, cutoff=0.7)
        if theirs or near:
            do = f"Did you mean {near[0]}?" if near else f"`{p.prog} --help` says more."
            refuse("the command line", "a flag of plan or of Megatron's", name, do)
    if not theirs:
        return {}
    found, rest = theirs.parse_known_args([word for words in others for word in words])
    if rest:
        do = "Leave them out, or put them in quotes."
        refuse("the command line", "flags and their values", " ".join(rest), do)
    dests = {known[words[0].partition("=")[0]].dest for words in others}
    return {dest: getattr(found, dest) for dest in dests}


@functools.cache
def _megatrons() -> Flags | None:
    """Megatron's parser; None where megatron.training is not installed."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of what is not installed here
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            compat.hide_broken_transformer_engine()
            from megatron.training.arguments import add_megatron_arguments
        except ImportError:
            return None
        finally:
            logging.disable(before)
        return add_megatron_arguments(Flags(allow_abbrev=False, add_help=False))
