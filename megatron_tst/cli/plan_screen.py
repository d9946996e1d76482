"""What `megatron-tst plan` prints."""

from __future__ import annotations

import shlex
import textwrap

from rich.console import Console
from rich.table import Table

from megatron_tst.sizes import sizes

WIDTH = 118


def tokens(count: float) -> str:
    """1.99T, 105B, 3.07K"""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= 0.9995 * size:
            return (
                f"{count / size:.3g}{unit}"
                if count < 999.5 * size
                else f"{count / size:,.0f}{unit}"
            )
    return f"{count:.3g}"


def show(plan: dict) -> None:
    """Print a plan, or the faults of a run that is impossible (planning/plan.py, examine)."""
    if "faults" in plan:
        _print(_checks(plan["checks"]))
        _lines(
            f"{len(plan['faults'])} fault{'s' * (len(plan['faults']) > 1)}: the run is impossible",
            plan["faults"],
        )
        _not_used(plan)
        return
    run, model = plan["run"], plan["model"]
    print(
        f"{model['preset'] or 'model'}: {tokens(model['parameters'])} parameters{_active(model)}, "
        f"{run['gpus']} x {run['gpu']}, {run['steps']:,} steps of "
        f"{tokens(run['positions_a_step'])} positions"
    )
    _parts(model)
    _print(_phases(plan))
    rows = Table.grid(padding=(0, 2))
    rows.add_column(min_width=12)
    for part in (_text, _cost, _equal_loss, _memory, _loader, _paper):
        rows.add_row(*part(plan))
    rows.add_row("layout", f"all of {len(plan['checks'])} rules hold (--json lists them)")
    _print(rows)
    _lines("What speaks against it", plan["against"])
    _lines("Warnings at start-up", plan["warnings"])
    _lines("Of config.json", plan["notes"])
    _not_used(plan)
    if "sweep" in plan:
        print()
        _print(_sweep(plan))
    print(
        "\nFlags to paste (beside yours: data, tokenizer, saving"
        + ("" if model["preset"] else ", norms and biases, optimizer, precision")
        + ")"
    )
    print(_flags(plan["flags"]))


def _active(model) -> str:
    """Of a dense model nothing: a token is multiplied with all but a table."""
    idle = model["parameters"] - model["embedding"] - model["active_parameters"]
    return f", {tokens(model['active_parameters'])} active" if idle else ""


def _parts(model):
    """How makers count differs: with or without the tables, and mostly without multi-token
    prediction.
    """
    active, said = model["active_parameters"], []
    if _active(model) and model["embedding"]:
        said.append(
            f"active with the input embedding {tokens(active + model['embedding'])}, without the "
            f"output layer too {tokens(active - model['output'])}"
        )
    if model["mtp_parameters"]:
        said.append(
            f"multi-token prediction {tokens(model['mtp_parameters'])} more, "
            f"{tokens(model['mtp_active'])} active"
        )
    print(f"  {'; '.join(said)}\n" if said else "")


def _print(table: Table) -> None:
    console = Console(width=WIDTH, markup=False, highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(table)
    print(
        "\n".join(line.rstrip() for line in captured.get().splitlines())
    )  # without rich's padding


def _lines(title, sentences):
    if sentences:
        print(f"\n{title}")
    for sentence in sentences:
        print(
            textwrap.fill(
                sentence,
                WIDTH,
                initial_indent="  ",
                subsequent_indent="    ",
                break_on_hyphens=False,
            )
        )


def _not_used(plan):
    if plan["not_used"]:
        print(f"\nNot used by a plan: {' '.join(plan['not_used'])}")


def _phases(plan) -> Table:
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    table.add_column("phase")
    for name in ("bag size", "steps", "raw tokens", "raw tokens a step"):
        table.add_column(name, justify="right")
    for phase in plan["phases"]:
        table.add_row(
            phase["name"],
            str(phase["bag_size"]),
            f"{phase['steps']:,}",
            tokens(phase["raw_tokens"]),
            tokens(phase["raw_tokens_a_step"]),
        )
    table.add_row("in all", "", f"{plan['run']['steps']:,}", tokens(plan["text"]["raw_tokens"]), "")
    return table


def _text(plan):
    text = plan["text"]
    read = [
        f"\n{row['corpus']}: {tokens(row['tokens'])} to train on, read {row['times']:.3g} times"
        for row in text["readings"]
    ]
    label, said = _whether_it_suffices(plan, text)
    return label, said + "".join(read)


def _whether_it_suffices(plan, text):
    needs = (
        f"\n{tokens(text['needed'])} needed, {text['ratio']:.2f} times what "
        f"{plan['run']['steps']:,} plain steps read"
    )
    if text["suffices"] is None:
        return "\ntext", needs + ". Say how much you have: --tokens or --data-path"
    if text["suffices"]:
        return (
            "\ntext",
            f"{needs}. {tokens(text['available'])} available: they SUFFICE without repetition",
        )
    have = (
        f"{needs}. {tokens(text['available'])} available: they do NOT suffice, "
        f"{tokens(text['missing'])} are missing; each token would be read {text['times']:.2f} times"
    )
    have += "" if text["baseline_suffices"] else "\nThey do not suffice for plain training either"
    fits = {
        "bag_size": "--tst-bag-size {}",
        "superposed_steps": "--tst-iters {}",
        "steps": "--train-iters {} at the same r",
    }
    ways = [fits[name].format(value) for name, value in text.get("fits", {}).items() if value]
    ways = ways or ["fewer --train-iters"]
    return (
        "\ntext",
        f"{have}\nWhat fits: {', or '.join(ways)}, the rest as it is; or --tst-superpose output, "
        f"which needs no more text than plain training",
    )


def _cost(plan):
    cost, run = plan["cost"], plan["run"]
    return "cost", (
        f"{cost['flops']:.3g} FLOPs ({cost['flops_of_step']:.3g} a step, in both phases); "
        f"{cost['gpu_hours']:,.0f} GPU-hours, {cost['days']:,.1f} days "
        f"on {run['gpus']} x {run['gpu']}, {cost['step_seconds']:.3g} s a "
        f"step\n{cost['tflops_a_gpu']:,.0f} TFLOP/s a GPU, MFU {cost['mfu']:.1%} ({cost['source']})"
    )


def _equal_loss(plan):
    found = plan["equal_loss"]
    if not found:
        return (
            "equal loss",
            "the paper has no baseline of equal loss for these settings, or near them",
        )
    other = found["paper_run"]
    hours = f"{plan['cost']['gpu_hours']:,.0f} against {found['baseline_gpu_hours']:,.0f} GPU-hours"
    steps = (
        f"{plan['run']['steps']:,} against {found['baseline_steps']:,} plain steps "
        f"({tokens(found['baseline_tokens'])} tokens): {found['speed_up']:.1f}x"
    )
    if found["measured"]:
        return (
            "equal loss",
            f"{steps}, {hours}. Measured by the paper: loss {other['loss']:.3f} against "
            f"{other['baseline_loss']:.3f}",
        )
    return (
        "equal loss",
        f"NOT measured. If the speed-up of the paper's {other['model']} (s = {other['s']}, r = "
        f"{other['r']:.2f}) held here: {steps}, {hours}",
    )


def _memory(plan):
    memory = plan["loss_memory"]
    first, then = memory["superposition"], memory["recovery"]
    # each in a unit of its own: they differ by what s and the vocabulary are
    bags = {name: sizes(size)[0] for name, size in first.items() if size is not None}
    single = {name: sizes(size)[0] for name, size in then.items() if size is not None}
    return "loss memory", (
        f"superposition: {bags['extension']} with the extension, {bags['torch']} torch kernel"
        + (f", {bags['fused']} --tst-fused-linear-loss" if "fused" in bags else "")
        + f" (the paper's loop, eager: {bags['paper_loop']})\n"
        f"recovery: {single['megatron']} Megatron's, "
        f"{single['kernel_in_recovery']} --tst-kernel-in-recovery"
        + (f", {single['fused']} fused. " if "fused" in single else ". ")
        + f"A micro-batch, last stage, logits ({sizes(memory['logits'])[0]}) included where they "
        f"exist; arithmetic"
    )


def _loader(plan):
    loader = plan["loader"]
    needed = (
        f"{tokens(loader['tokens_a_second'])} tokens/s, {loader['mb_a_second']:,.1f} MB/s in "
        f"superposition, {loader['times_baseline']:g} times the baseline's; over "
        f"{loader['readers']} data-parallel readers"
    )
    if not (measured := loader["measured"]):
        return "data loader", needed
    share = loader["tokens_a_second_of_a_reader"] / measured["tokens_a_second"]
    verdict = (
        "one process reads enough for a reader"
        if share <= 1
        else f"a reader needs {share:.1f} processes: raise --num-workers"
    )
    return (
        "data loader",
        f"{needed}\nmeasured here: {tokens(measured['tokens_a_second'])} tokens/s, "
        f"{measured['mb_a_second']:,.1f} MB/s of one process ({measured['seconds']:g} s, page "
        f"cache included): {verdict}",
    )


def _paper(plan):
    cell, run = plan["paper"]["cell"], plan["paper"]["run"]
    said = []
    if run:
        baseline = (
            f", its baseline of equal steps {run['baseline_loss']:.3f}"
            if run["baseline_loss"]
            else ""
        )
        said.append(f"this run (table 1): final loss {run['loss']:.3f}{baseline}")
    if cell:
        between = cell["interpolated_between_r"]
        how = (
            f"INTERPOLATED between r = {between[0]:g} and {between[1]:g}" if between else "measured"
        )
        said.append(
            f"nearest grid (table {cell['table']}: {cell['model']}, {cell['steps']:,} steps, "
            f"{cell['weighting']}): {cell['difference']:+.3f} nats against plain training of "
            f"equal steps, {how}; one run a cell, no error bars"
        )
    return "paper", "\n".join(said) or "no figure for these settings"


def _checks(checks) -> Table:
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    for name in ("", "what", "expected"):
        table.add_column(name)
    for check in checks:
        table.add_row("FAULT" if check["fault"] else "ok", check["what"], check["rule"])
    return table


def _sweep(plan) -> Table:
    sweep, have = plan["sweep"], plan["text"]["available"]
    title = (
        f"text (and nats against plain training of equal steps: paper, table "
        f"{sweep['table']}, {sweep['model']}, {sweep['steps']:,} steps)"
    )
    table = Table(
        box=None,
        padding=(0, 1),
        pad_edge=False,
        title=title + ("; ! more than you have" if have else ""),
        title_justify="left",
        title_style="",
    )
    table.add_column("s")
    ratios = dict.fromkeys(cell["r"] for cell in sweep["cells"])
    for r in ratios:
        table.add_column(f"r = {r}", justify="right", no_wrap=True)
    for s in dict.fromkeys(cell["s"] for cell in sweep["cells"]):
        cells = [cell for cell in sweep["cells"] if cell["s"] == s]
        table.add_row(
            str(s),
            *(
                f"{'' if c['fits'] else '! '}{tokens(c['raw_tokens'])} "
                f"({'-' if c['difference'] is None else format(c['difference'], '+.3f')})"
                for c in cells
            ),
        )
    return table


def _flags(words: list[str]) -> str:
    """Lines that a shell takes as one command."""
    lines, line = [], "   "
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    for group in map(shlex.join, groups):
        if len(line) + len(group) > WIDTH - 3:
            lines.append(line)
            line = "   "
        line += f" {group}"
    return " \\\n".join([*lines, line])
