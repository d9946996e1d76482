"""TensorBoard's event files of a run, as Megatron and TST write them."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import ModuleType

from megatron_tst.errors import optional, refuse
from megatron_tst.planning.logs import begins_late, done_again, one_run
from megatron_tst.planning.runs import Run

TAG = "lm loss validation"


def read_events(path: Path) -> Run:
    """The scalars and arguments that Megatron and TST write to TensorBoard; times are of the clock,
    evaluation included.

    Each start of a run writes a file of its own. Where a later one begins, what earlier ones have
    from there on is left out.

    Args:
        path: an event file, or the folder of a run's.

    Raises:
        TSTError: no event files, or tensorboard is not installed.
    """
    reader = optional("tensorboard.backend.event_processing.event_accumulator", "tensorboard")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.glob("*tfevents*") if not file.is_dir())
    if not files:
        inside = sorted({str(file.parent) for file in path.glob("*/**/*tfevents*")})
        got = f"none there, but in {', '.join(inside[:3])}" if inside else "none"
        refuse(path, "TensorBoard's event files", got, "Give the folder of one run.")
    run = Run()
    found = [part for file in files if (part := _scalars(reader, file))]
    run.notes += [note for file in files if (note := _unread(file))]
    parts = sorted(found, key=lambda part: part["began"])
    for part in parts:
        _add(run, part, path)
    if not parts:
        refuse(path, "scalars of Megatron", "none", "Give the folder of --tensorboard-dir.")
    if run.train or run.nan:
        run.total = run.last
    if run.seconds:
        first = min(run.seconds)
        if begins_late(run.seconds, first, run.arguments.get("tensorboard_log_interval", "")):
            run.notes.append(f"it begins at iteration {first}: the seconds before are not known")
            run.seconds = {}
        else:
            del run.seconds[first]  # how long it took is not known
    run.fill_raw_tokens()
    return run


def _scalars(reader: ModuleType, file: Path) -> dict | None:
    """{"began": time of the first event, "scalars": {tag: [event]}, "texts": {name: text}}"""
    log = logging.getLogger("tensorboard")
    level = log.level
    log.setLevel(logging.CRITICAL)  # of a file that is cut off it is what came before that counts
    try:
        events = reader.EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        tags = events.Tags()
        scalars = {tag: events.Scalars(tag) for tag in tags["scalars"]}
        texts = {
            tag.removesuffix("/text_summary"): text.decode()
            for tag in tags["tensors"]
            if tag.endswith("/text_summary")
            for event in events.Tensors(tag)
            for text in event.tensor_proto.string_val
        }
    except Exception as error:
        got = f"one that cannot be read ({type(error).__name__})"
        refuse(file, "an event file of TensorBoard", got, "Give a log of the run.")
    finally:
        log.setLevel(level)
    if not scalars:
        return None
    return {
        "began": min(event.wall_time for events in scalars.values() for event in events),
        "scalars": scalars,
        "texts": texts,
    }


def _unread(file: Path) -> str:
    """What TensorBoard's reader passes over in silence: all that follows a record which is damaged
    or cut off. "" where the file is whole.
    """
    loader = optional("tensorboard.backend.event_processing.event_file_loader", "tensorboard")
    around = 16  # bytes of a record beside its content: length, and a checksum of each
    read = sum(len(record) + around for record in loader.RawEventFileLoader(str(file)).Load())
    left = file.stat().st_size - read
    if not left:
        return ""
    return f"{file.name}: a record is damaged or cut off, and {left} bytes from it on are not read"


def _add(run: Run, part: dict, path: Path) -> None:
    """Put what one start has written behind what earlier ones have."""
    scalars = part["scalars"]
    arguments = run.arguments | part["texts"]
    began = min((event.step for event in scalars.get("lm loss", [])), default=None)
    if run.last:
        one_run(path, run.arguments, part["texts"], began == 1)
    if began is not None and began <= run.last:
        last, dated = run.last, (run.train, run.excess, run.validation, run.test, run.raw_tokens)
        for losses in (*dated, *run.sets.values(), run.seconds):
            for later in [step for step in losses if step >= began]:
                del losses[later]
        run.nan = {step for step in run.nan if step < began}
        run.nan_validation = {step for step in run.nan_validation if step < began}
        if run.boundary is not None and run.boundary >= began:
            run.boundary = None
        run.notes.append(done_again(began, last))
    run.arguments = arguments
    _put(run.train, run.nan, {e.step: e.value for e in scalars.get("lm loss", [])})
    _put(run.excess, set(), {e.step: e.value for e in scalars.get("mce minus bag entropy", [])})
    _put_times(run.seconds, {e.step: e.wall_time for e in scalars.get("lm loss", [])})
    run.raw_tokens |= {e.step: int(e.value) for e in scalars.get("tst raw tokens", [])}
    bagged = [e.step for e in scalars.get("tst bag size", []) if e.value > 1]
    run.boundary = max(bagged, default=run.boundary)
    for tag, events in scalars.items():
        if tag == TAG or (tag.startswith(f"{TAG}-") and not tag.endswith((" vs samples", " ppl"))):
            name = tag.removeprefix(TAG).removeprefix("-")
            validation, test = _of_validation(run, events)
            if name:  # of several test sets none is the test loss
                run.sets.setdefault(name, {}).update(validation)
            else:
                _put(run.validation, run.nan_validation, validation)
                _put(run.test, set(), test)
    if len({event.value for event in scalars.get("batch-size", [])}) > 1:
        run.varying_batch = True


def _put_times(seconds: dict[int, float], clock: dict[int, float]) -> None:
    """Put the times of a start behind those of earlier ones, without what lay between the two. How
    long its first step took is not known: the mean of its others is taken.
    """
    if not clock:
        return
    first, offset = min(clock), 0.0
    if seconds:
        before = max(seconds)
        each = _mean_step(clock) or _mean_step(seconds)
        offset = seconds[before] + each * (first - before)
    seconds |= {step: offset + time - clock[first] for step, time in clock.items()}


def _mean_step(clock: dict[int, float]) -> float:
    first, last = min(clock), max(clock)
    return (clock[last] - clock[first]) / max(1, last - first)


def _put(losses, nan, found):
    """Finite losses to `losses`, the steps of others to `nan`."""
    for step, value in found.items():
        losses.pop(step, None)
        nan.discard(step)
        if math.isfinite(value):
            losses[step] = value
        else:
            nan.add(step)


def _of_validation(run: Run, events: list) -> tuple[dict[int, float], dict[int, float]]:
    """(validation, test) losses by step. Megatron gives both the same tag: after training it
    evaluates the validation set once more, then the test set, at the last step.
    """
    by_step: dict[int, list[float]] = {}
    for event in events:
        by_step.setdefault(event.step, []).append(event.value)
    validation = {step: losses[-1] for step, losses in by_step.items()}
    last = max(by_step)
    values, test = by_step[last], {last: validation[last]}
    if _no_validation(run):
        return {}, test
    first_of_two = validation | {last: values[-2:][0]}
    in_training = _in_training(run, last)
    if len(values) + (in_training is False) > 2:
        return first_of_two, test
    # where it is not known, the second of two may be the test set's
    return (first_of_two if in_training is None else validation), {}


def _in_training(run: Run, step: int) -> bool | None:
    """Whether Megatron evaluates at a step while it trains; None: not known."""
    names = ("eval_interval", "start_eval_at_iter")
    interval, start = (run.arguments.get(name, "") for name in names)
    if not (interval.isdecimal() and int(interval)):
        return None
    return not step % int(interval) and not (start.isdecimal() and step < int(start))


def _no_validation(run: Run) -> bool:
    """Whether --split gives the validation set nothing."""
    parts = run.arguments.get("split", "").split(",")
    return len(parts) == 3 and parts[1].strip() in ("0", "0.0")
