"""Megatron's logs, read line by line: as it prints them, through launchers and pipes, of one start
or of several.

Lines: megatron/training/training.py, training_log and evaluate_and_print_results; arguments.py,
_print_args; checkpointing.py, load_checkpoint. Those of TST: loop/report.py.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import math
import re
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from megatron_tst.errors import refuse
from megatron_tst.planning.runs import Run, interpolated

_DAMAGED = EOFError, zlib.error, lzma.LZMAError, OSError  # of an archive
LONGEST = 1 << 20  # characters of a line; a longer one is read in pieces
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\))")
# Where what one rank prints may begin behind what another one has printed on the same line.
_RECORD = re.compile(
    r"(?=\biteration {1,12}\d{1,15}/ {0,12}\d)|(?=\bvalidation(?:-[^|]*)? loss at )|(?=\[tst\] )"
    r"|(?=> number of parameters on \()|(?=successfully loaded checkpoint from )"
    r"|(?=> padded vocab \()"
)
_TRAIN = re.compile(r"iteration +(\d{1,15})/ *(\d{1,15}) \|(.*)")
_FIELD = re.compile(r"([^|]+?): +(\S+) (?=\|)")
_VALID = re.compile(
    r"validation(?:-([^|]*?))? loss at iteration (\d{1,15})( on test set)?[^|]*\| lm loss value: "
    r"(\S+) \|"
)
_PHASE = re.compile(
    r"\[tst\] iteration +(\d{1,15}) \| phase: (\w+) \| bag size: \d+ \| raw tokens: (\d{1,30}) \|"
)
_BOUNDARY = re.compile(r"\[tst\] boundary after iteration (\d{1,15}): .*?\((\d{1,30}) raw tokens\)")
_BLOCK = re.compile(r"\[tst\]   (expert load|router entropy) +(.*)")
_TITLE = re.compile(r"-{10,} arguments -{10,}")
_ARGUMENT = re.compile(r"(?:^|[^.\w]) {2}(\w+) \.{3,}(?: (.*))?$")
_PARAMETERS = re.compile(
    r"> number of parameters on \(.*?\) model parallel rank \((\d[\d, ]*)\): (\d{1,18})(?!\d)"
)
_VOCABULARY = re.compile(r"> padded vocab \(.*?new size: (\d{1,15})\)")
_LOADED = re.compile(r"successfully loaded checkpoint from .* at iteration (\d{1,15})(?!\d)")
_DATE = re.compile(r"\[(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d[.\d]*)\] *$")
_LOOKS = re.compile(
    r"\biteration +\d+/|validation\S* loss at |\b(?:iter|iteration|step)s?\b[ :=#\[]*\d+.*"
    r"\bloss\b\W{0,3}\d",
    re.IGNORECASE,
)
# Arguments that no restart of one run changes, and those that a start from scratch does not either.
_SHAPE = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels"),
    *("num_query_groups", "seq_length", "global_batch_size", "vocab_size", "swiglu"),
    *("num_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_layer_freq"),
    *("mtp_num_layers", "untie_embeddings_and_output_weights"),
)
_RUN = (
    *("lr", "min_lr", "lr_decay_style", "lr_decay_iters", "lr_warmup_iters", "weight_decay"),
    *("adam_beta1", "adam_beta2", "clip_grad", "optimizer", "init_method_std", "seed", "data_path"),
    *("split", "train_iters", "train_samples", "bf16", "fp16", "fp8", "fp4", "tst_bag_size"),
    *("tst_iters", "tst_step_ratio", "tst_superpose", "tst_loss", "tst_target_weighting"),
)


def read_log(*paths: Path) -> Run:
    """Parse a log, whole or still being written; several: a run's parts in order. The last
    evaluation of an iteration counts.

    A log may be of several starts of one run. What came after the checkpoint from which a later
    start went on is left out: those steps were done again.

    Raises:
        TSTError: a file that is no text, or two runs in one.
    """
    reader = _Reader()
    for path in paths:
        reader.read(path)
    return reader.finish()


class _Reader:
    """Reads lines into a run; what it holds beside it is of the start that it is in."""

    def __init__(self):
        self.run, self.path = Run(), Path()
        self.block: dict[str, str] | None = None  # arguments that no training line has followed
        self.ranks: dict[tuple[int, ...], int] = {}
        self.boundaries: dict[int, list[str]] = {}  # iteration -> what is said of experts after it
        self.last, self.last_text, self.date, self.spent = 0, "", "", 0.0
        self.first: tuple[int, str] | None = None  # training line without a checkpoint before it
        self.loaded: int | None = None  # the checkpoint of this start, until its first line
        self.fresh = self.recount = True
        self.batches: set[str] = set()
        self.strange: list[str] = []
        self.notes: list[str] = []

    def read(self, path: Path) -> None:
        self.path, self.fresh, self.recount = path, True, True
        for line in _lines(path, self.notes):
            self._line(line)

    def _line(self, line: str) -> None:
        pieces = _RECORD.split(line)
        known = any([self._record(pieces, i) for i in range(1, len(pieces))])
        if known:
            return
        if match := _ARGUMENT.search(line):
            self._argument(match[1], (match[2] or "").strip())
        elif _TITLE.search(line):
            self._start_of_arguments()
        elif _LOOKS.search(line) and "[tst]" not in line:
            self.strange.append(line)

    def _record(self, pieces: list[str], i: int) -> bool:
        """Whether the piece was understood."""
        piece = pieces[i]
        if match := _TRAIN.match(piece):
            date = _DATE.search(pieces[i - 1])
            return self._train(match, date[1] if date else "")
        if match := _VALID.match(piece):
            self._validation(match)
        elif match := _PHASE.match(piece):
            self.run.raw_tokens[int(match[1])] = int(match[3])
        elif match := _BOUNDARY.match(piece):
            self.boundaries[int(match[1])] = []
            self.run.raw_tokens[int(match[1])] = int(match[2])
        elif match := _BLOCK.match(piece):
            said = self.boundaries[max(self.boundaries)] if self.boundaries else self.run.experts
            said.append(f"{match[1]}: {match[2]}")
        elif match := _PARAMETERS.match(piece):
            if self.recount:
                self.ranks, self.recount = {}, False
            self.ranks[tuple(int(rank) for rank in match[1].split(","))] = int(match[2])
        elif match := _LOADED.match(piece):
            self.loaded, self.fresh = int(match[1]), True
            if self.loaded < self.last:
                self._go_back_to(self.loaded)
        elif match := _VOCABULARY.match(piece):
            self.run.vocabulary = int(match[1])
        else:
            return False
        return True

    def _start_of_arguments(self):
        self.block, self.fresh, self.recount = {}, True, True

    def _argument(self, name, value):
        if self.block is None or self.block.get(name, value) != value:
            self._start_of_arguments()
        self.block[name] = value

    def _train(self, match, date) -> bool:
        iteration, total = int(match[1]), int(match[2])
        fields = {name.strip(): value for name, value in _FIELD.findall(match[3])}
        whole, text = "number of nan iterations" in fields, fields.get("lm loss")
        if not (whole or text):
            return False  # cut off, or of another program
        if match[0] == self.last_text and not self.fresh:
            return True  # the same line twice, as from two ranks' files in one
        if date and date < self.date and not self.fresh and iteration < self.last:
            if total != self.run.total:
                _two(self.path, "iterations in all", self.run.total, total)
            self._note("lines that do not stand in the order of their dates")
            return self._loss(iteration, text, fields, 1)
        self._follow(iteration, total)
        understood = self._loss(iteration, text, fields, iteration - self.last)
        if (elapsed := _number(fields.get("elapsed time per iteration (ms)"))) is not None:
            # a mean over the iterations since the last line
            self.spent += elapsed / 1000 * (iteration - self.last)
            self.run.seconds[iteration] = self.spent
        self.batches.add(fields.get("global batch size", next(iter(self.batches), "")))
        self.last, self.last_text, self.date, self.run.total = iteration, match[0], date, total
        return understood

    def _loss(self, iteration, text, fields, interval) -> bool:
        run = self.run
        run.nan.discard(iteration)
        for losses in (run.train, run.excess, run.skipped):
            losses.pop(iteration, None)
        skipped = int(_number(fields.get("number of skipped iterations")) or 0)
        loss = math.nan if text is None else _number(text)
        if skipped:
            run.skipped[iteration] = skipped
        # Of an interval that is skipped as a whole Megatron prints 0, or nothing at its start.
        if skipped and (loss == 0 or (text is None and skipped >= interval)):
            return True
        if loss is None:
            return False
        if not math.isfinite(loss):
            run.nan.add(iteration)  # Megatron prints no `lm loss` where it is NaN
        else:
            run.train[iteration] = loss
            excess = _number(fields.get("mce minus bag entropy"))
            if excess is not None and math.isfinite(excess):
                run.excess[iteration] = excess
        return True

    def _validation(self, match):
        name, step, on_test, loss = match[1], int(match[2]), match[3], _number(match[4])
        run, loss = self.run, math.nan if loss is None else loss
        if name is not None:
            losses = run.sets.setdefault(name, {})
            if not on_test:  # of several test sets none is the test loss
                losses[step] = loss
            return
        losses, nan = (run.test, set()) if on_test else (run.validation, run.nan_validation)
        losses.pop(step, None)
        nan.discard(step)
        if math.isfinite(loss):
            losses[step] = loss
        else:
            nan.add(step)

    def _follow(self, iteration, total):
        """Before the line of an iteration: whether the run went back, and whether it is one run."""
        back = self.loaded if self.loaded is not None else iteration - 1
        if self.block is not None:
            if self.last:
                one_run(self.path, self.run.arguments, self.block, not back)
                self.run.arguments |= self.block
            else:
                self.run.arguments = self.block
            self.block = None
        if not back and self.last and self.run.total != total:
            _two(self.path, "iterations in all", self.run.total, total)
        if iteration <= self.last:
            self._go_back_to(min(back, iteration - 1))
        if not self.last:
            interval = self.run.arguments.get("log_interval", "")
            self.first = None if self.loaded else (iteration, interval)
        if not self.last and self.loaded:
            self._note(f"it goes on from iteration {self.loaded}: the seconds before are not known")
            self.spent = math.nan
            self.last = back
        self.loaded, self.fresh = None, False

    def _go_back_to(self, step):
        """Leave out what came after: it was done again from a checkpoint."""
        run = self.run
        self._note(done_again(step + 1, self.last))
        if step == 0:
            self.spent = 0.0
        elif run.seconds:
            (self.spent,) = interpolated({0: 0.0, **run.seconds}, [step])
        dated = (run.train, run.excess, run.validation, run.test, run.raw_tokens, run.seconds)
        for losses in (*dated, run.skipped, *run.sets.values(), self.boundaries):
            for later in [at for at in losses if at > step]:
                del losses[later]
        run.nan = {at for at in run.nan if at <= step}
        run.nan_validation = {at for at in run.nan_validation if at <= step}
        self.last = step

    def _note(self, text):
        if text not in self.notes:
            self.notes.append(text)

    def finish(self) -> Run:
        run = self.run
        if self.block and not self.last:
            run.arguments = self.block
        run.varying_batch = len(self.batches) > 1
        run.seconds = {at: spent for at, spent in run.seconds.items() if math.isfinite(spent)}
        if self.first and begins_late(run.seconds, *self.first):
            self._note(f"it begins at iteration {self.first[0]}: the seconds before are not known")
            run.seconds = {}
        run.parameters = run.whole_model(self.ranks)
        run.boundary = max(self.boundaries, default=None)
        run.experts += [said for at in sorted(self.boundaries) for said in self.boundaries[at]]
        run.fill_raw_tokens()
        if self.ranks and run.parameters is None:
            self._note("the number of parameters is not known: not every rank's is there")
        if self.strange:
            self._note(
                f"{len(self.strange)} line{'s' * (len(self.strange) > 1)} not understood, the "
                f"first: {_shown(self.strange[0])}"
            )
        run.notes = self.notes
        return run


def begins_late(seconds: Iterable[int], first: int, interval: str) -> bool:
    """Whether lines before the first one are missing.

    Args:
        seconds: iterations that have a line.
        first: of them.
        interval: iterations between two lines, as an argument says it; "": not known.
    """
    if not interval.isdecimal():
        second = min((step for step in seconds if step > first), default=2 * first)
        interval = str(second - first)
    return first > int(interval)


def one_run(
    path: Path, before: Mapping[str, str], after: Mapping[str, str], from_scratch: bool
) -> None:
    """Refuse two starts that are not of one run, by their arguments.

    Args:
        path: of what holds both.
        before, after: the starts' arguments, as text.
        from_scratch: whether the second loads no checkpoint. One that does may change more.

    Raises:
        TSTError: an argument differs that one run does not change.
    """
    for name in (*_SHAPE, *(_RUN if from_scratch else ())):
        if None not in (a := before.get(name), b := after.get(name)) and a != b:
            _two(path, name, a, b)


def _two(path, what, before, after):
    got, do = f"two: {what} {before}, then {after}", "Give each run a file of its own."
    refuse(path, "the log of one run", got, do)


def done_again(began: int, last: int) -> str:
    """That a later start did the iterations `began` to `last` again."""
    which = f"iterations {began} to {last} were" if last > began else f"iteration {began} was"
    return f"{which} done again from iteration {began - 1}: what came first is left out"


def about_losses(run: Run) -> list[str]:
    """What has to be said of a run's losses: NaN, skipped iterations, a batch that grows."""
    said = []
    if run.nan_from is not None:
        said.append(f"NaN from iteration {run.nan_from} on")
    else:
        if nan := run.nan:
            said.append(f"NaN at {_many(nan, 'iteration')}, the first {min(nan)}")
        if nan := run.nan_validation:
            said.append(f"NaN at {_many(nan, 'evaluation')}, the first {min(nan)}")
    if run.skipped:
        count = sum(run.skipped.values())
        said.append(f"{count} iteration{'s' * (count > 1)} skipped by Megatron (loss scale)")
    if run.varying_batch or run.arguments.get("rampup_batch_size", "None") != "None":
        said.append("the global batch size is not the same at all steps: FLOPs are not known")
    return said


def _many(found, what):
    return (
        f"{len(found)} {what} that is left out"
        if len(found) == 1
        else (f"{len(found)} {what}s that are left out")
    )


def _shown(line: str) -> str:
    text = "".join(letter for letter in " ".join(line.split()) if letter.isprintable())
    return repr(text[:100] + ("..." if len(text) > 100 else ""))


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _lines(path: Path, notes: list[str]) -> Iterator[str]:
    """The lines of a text file, packed or not, without colours."""
    mode = path.stat().st_mode
    given = str(path).startswith(("/dev/fd/", "/proc/self/fd/", "/dev/stdin"))  # as <(zcat LOG)
    if not stat.S_ISREG(mode) and not (stat.S_ISFIFO(mode) and given):
        refuse(path, "a log file", "something else", "Give the file that the last rank wrote.")
    with contextlib.ExitStack() as stack:
        stream = _unpacked(stack.enter_context(path.open("rb")), path, stack)
        try:
            encoding = _encoding(stream.peek()[:64])
            text = stack.enter_context(io.TextIOWrapper(stream, encoding, errors="replace"))
            while line := text.readline(LONGEST):
                line = _of_record(line.rstrip("\n"))
                yield _ANSI.sub("", line) if "\x1b" in line else line
        except _DAMAGED as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's, not the archive's
            notes.append(f"{path.name} ends too early: the archive is damaged or being written")


def _of_record(line: str) -> str:
    """What a program printed, of a line that a container's log driver has made a JSON object."""
    if line.startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            for key in ("log", "message", "msg"):
                if isinstance(record.get(key), str):
                    return record[key].rstrip("\n")
    return line


def _unpacked(
    raw: io.BufferedReader, path: Path, stack: contextlib.ExitStack
) -> io.BufferedReader | BinaryIO:
    head = raw.peek()[:8]
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        refuse(path, "text, or text packed by gzip, bzip2 or xz", "a zstd file", "Unpack it.")
    for magic, opener in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ", lzma.open)):
        if head.startswith(magic):
            return io.BufferedReader(stack.enter_context(opener(raw)))
    return raw


def _encoding(head: bytes) -> str:
    """UTF-8, or what a byte order mark says, or UTF-16 without one."""
    for mark, name in (
        (b"\xff\xfe\0\0", "utf-32"),
        (b"\xff\xfe", "utf-16"),
        (b"\xfe\xff", "utf-16"),
    ):
        if head.startswith(mark):
            return name
    if len(head) >= 8 and not any(head[1:8:2]) and all(head[0:8:2]):
        return "utf-16-le"
    if len(head) >= 8 and not any(head[0:8:2]) and all(head[1:8:2]):
        return "utf-16-be"
    return "utf-8-sig"
