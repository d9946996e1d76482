"""Draw the experiments' CSV: each question's arms with error bars, and their differences from the
first arm at the same seed.

    python examples/experiments/plot.py experiments_out/results.csv --question equal_flops --output
    equal_flops.png
    python examples/experiments/plot.py experiments_out/results.csv --question equal_data --against
    flops --output equal_data.svg

Left: final next-token validation loss, a dot a seed; right: arm minus reference, paired by seed.
The bar is the standard error of the mean over the seeds; one seed has none. --against raw_tokens,
flops or iterations: loss against that in place of the left panel, and how many times more of it the
reference's arms of other lengths need to each arm's loss. The figures are printed too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from questions import ConfigError, load, refuse
from results import Table

from megatron_tst.planning.curves import reached, spread
from megatron_tst.planning.plots import save

AGAINST = ("iterations", "raw_tokens", "flops")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path)
    parser.add_argument("--question", required=True, help="the config file's name without .toml")
    parser.add_argument(
        "--iterations", type=int, help="of an arm of length 1; default: the most that the CSV has"
    )
    parser.add_argument(
        "--reference", help="an arm; default: the first of the question's config, or of the CSV"
    )
    parser.add_argument("--against", choices=AGAINST)
    parser.add_argument(
        "--output", type=Path, default=Path("experiment.png"), help="ends in .png or .svg"
    )
    options = parser.parse_args(argv)
    try:
        rows = select(Table(options.csv).rows(), options)
        arms = in_order(options.question, dict.fromkeys(row["arm"] for row in rows))
        reference = options.reference or arms[0]
        if reference not in arms:
            refuse(
                "--reference",
                f"one of {', '.join(arms)}",
                reference,
                "Name an arm of the question.",
            )
        losses = {
            arm: {row["seed"]: float(row["validation_loss"]) for row in rows if row["arm"] == arm}
            for arm in arms
        }
        for line in summary(losses, reference):
            print(line)
        if options.against:
            for line in equal_loss(rows, reference, options.against):
                print(line)
        draw(rows, losses, reference, options)
    except ConfigError as error:
        print(f"plot: error: {error}", file=sys.stderr)
        return 2
    print(options.output)
    return 0


def select(rows: list[dict], options) -> list[dict]:
    """The question's rows of one base length."""
    rows = [row for row in rows if row["question"] == options.question]
    if not rows:
        refuse(
            options.csv,
            f"rows of question {options.question!r}",
            "none",
            "Run it first, or name another one.",
        )
    base = options.iterations or max(int(row["base_iterations"]) for row in rows)
    rows = [row for row in rows if int(row["base_iterations"]) == base]
    if not rows:
        refuse("--iterations", "a length that the CSV has", base, "Leave it out for the longest.")
    if options.output.suffix not in (".png", ".svg"):
        refuse("--output", "a name that ends in .png or .svg", options.output, "Rename it.")
    return rows


def in_order(question: str, arms) -> list[str]:
    """The arms as the question's config has them (rows come in the order in which runs ended), then
    those that it has not.
    """
    config = Path(__file__).with_name(f"{question}.toml")
    first = [arm.name for arm in load(config).arms] if config.exists() else []
    return sorted(arms, key=lambda arm: first.index(arm) if arm in first else len(first))


def differences(losses: dict[str, dict[str, float]], reference: str) -> dict[str, list[float]]:
    """Arm -> its loss minus the reference's, for each seed that both have."""
    base = losses[reference]
    return {
        arm: [found[seed] - base[seed] for seed in sorted(found) if seed in base]
        for arm, found in losses.items()
        if arm != reference
    }


def summary(losses: dict[str, dict[str, float]], reference: str) -> list[str]:
    """A line an arm: mean loss with its standard error, and the paired difference from the
    reference.
    """
    lines, paired = [], differences(losses, reference)
    for arm, found in losses.items():
        line = f"{arm:28} {_said(list(found.values()))}"
        if paired.get(arm):
            line += f" | minus {reference}: {_said(paired[arm], sign='+')}"
        lines.append(line)
    return lines


def _said(values, sign=""):
    mean, lowest, highest, error = spread(values)
    if error is None:
        return f"{mean:{sign}.4f} (1 seed)"
    return (
        f"{mean:{sign}.4f} standard error {error:.4f} ({lowest:{sign}.4f} to "
        f"{highest:{sign}.4f}, {len(values)} seeds)"
    )


def equal_loss(rows: list[dict], reference: str, axis: str) -> list[str]:
    """For each arm with TST: how many times more of `axis` stock runs need to its loss, between
    their lengths, by seed.
    """
    lines = []
    stock = [row for row in rows if "--tst" not in row["settings"]]
    for arm in dict.fromkeys(row["arm"] for row in rows if "--tst" in row["settings"]):
        factors, beyond = [], 0
        for row in (row for row in rows if row["arm"] == arm):
            points = sorted(
                (float(other[axis]), float(other["validation_loss"]))
                for other in stock
                if other["seed"] == row["seed"]
            )
            loss = float(row["validation_loss"])
            at = reached(*zip(*points), loss) if len(points) > 1 and points[0][1] > loss else None
            beyond += at is None
            factors += [at / float(row[axis])] if at else []
        found = f"{axis} times {_said(factors)}" if factors else "not found"
        outside = f"; {beyond} seeds outside the stock runs' range" if beyond else ""
        lines.append(f"stock runs to the loss of {arm}: {found}{outside}")
    return lines


def draw(rows: list[dict], losses: dict[str, dict[str, float]], reference: str, options) -> None:
    """The figure."""
    from matplotlib.figure import Figure

    arms, paired = list(losses), differences(losses, reference)
    figure = Figure(figsize=(11, 1.6 + 0.45 * max(4, len(arms))), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, arm in enumerate(arms):
        if options.against:
            found = [row for row in rows if row["arm"] == arm]
            where = [float(row[options.against]) for row in found]
            left.plot(
                where,
                [float(row["validation_loss"]) for row in found],
                ".",
                color=f"C{number}",
                alpha=0.5,
            )
            _bar(left, sum(where) / len(where), losses[arm].values(), f"C{number}", label=arm)
        else:
            left.plot(
                losses[arm].values(),
                [number] * len(losses[arm]),
                ".",
                color=f"C{number}",
                alpha=0.5,
            )
            _bar(left, number, losses[arm].values(), f"C{number}", across=True)
        if paired.get(arm):
            right.plot(paired[arm], [number] * len(paired[arm]), ".", color=f"C{number}", alpha=0.5)
            _bar(right, number, paired[arm], f"C{number}", across=True)
    named = (right,) if options.against else (left, right)
    for axis in named:
        axis.set_yticks(range(len(arms)), arms)
        axis.set_ylim(len(arms) - 0.5, -0.5)
    right.axvline(0, color="grey", linewidth=0.8)
    right.set(
        xlabel=f"nats, minus {reference} at the same seed",
        title="paired difference (left of the line: better)",
    )
    if options.against:
        left.set(
            xlabel=options.against.replace("_", " "),
            ylabel="next-token validation loss, nats",
            title="final loss",
        )
        left.legend(fontsize=8)
    else:
        left.set(xlabel="next-token validation loss, nats", title="final loss")
    for axis in (left, right):
        axis.locator_params(axis="x", nbins=6)
        axis.grid(alpha=0.3)
    seeds = len({row["seed"] for row in rows})
    figure.suptitle(
        f"{options.question}: {rows[0]['base_iterations']} iterations, {seeds} "
        f"seed{'s' * (seeds > 1)}; bars: standard error",
        fontsize=10,
    )
    save(figure, options.output)


def _bar(axis, where, values, colour, across=False, **more):
    mean, _, _, error = spread(list(values))
    if across:
        axis.errorbar(mean, where, xerr=error, fmt="o", color=colour, capsize=4, **more)
    else:
        axis.errorbar(where, mean, yerr=error, fmt="o", color=colour, capsize=4, **more)


if __name__ == "__main__":
    sys.exit(main())
