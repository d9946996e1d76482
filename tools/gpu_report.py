"""OUT/report.md of tools/gpu_check.sh: what is met and what is not in a paragraph, each figure
against what is wanted, every step, every table.

    python tools/gpu_report.py OUT

Reads the files of all parts that have run, on whatever machine. They lie in OUT, or in
OUT/details.tar, where the newest of a name counts. Written anew after every step, so that it holds
what was known when a machine went away.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PARTS = ("first", "build", "test", "sanitize", "bench", "hints", "fp8", "train", "graphs")
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
ROWS, WHOLE, SHARD = 8192, 151936, 18992  # positions, a vocabulary, an eighth of it
OUT_OF_TIME = 124  # timeout's exit code


def main(folder: str) -> int:
    """Write FOLDER/report.md beside and rename it."""
    results = Results(Path(folder))
    text = "\n\n".join(
        section
        for section in (
            _head(results),
            "## Conclusions\n\n" + conclusions(results),
            _targets(results),
            _steps(results),
            *_tables(results),
        )
        if section
    )
    (results.folder / "report.md.part").write_text(text + "\n")
    (results.folder / "report.md.part").rename(results.folder / "report.md")
    return 0


class Results:
    """The files that the steps have left in a folder, and in its details.tar."""

    def __init__(self, folder: Path):
        self.folder, self.packed = folder, {}
        archive = folder / "details.tar"
        if archive.exists():
            with tarfile.open(archive) as tar:
                for member in tar:
                    if member.isfile() and member.name.endswith((".csv", ".json", ".log")):
                        self.packed[member.name] = tar.extractfile(member).read()

    def text(self, name: str) -> str | None:
        path = self.folder / name
        if path.exists():
            return path.read_text(errors="replace")
        packed = self.packed.get(name)
        return packed.decode(errors="replace") if packed is not None else None

    def csv(self, name: str) -> list[dict]:
        return list(csv.DictReader(io.StringIO(self.text(name) or "")))

    def json(self, name: str) -> dict | None:
        text = self.text(name)
        return json.loads(text) if text else None

    def steps(self) -> list[dict]:
        lines = (self.text("steps.jsonl") or "").splitlines()
        return [json.loads(line) for line in lines]

    def codes(self) -> dict[str, int]:
        """The last exit code of each step, by PART-STEP."""
        return {f"{row['part']}-{row['step']}": row["code"] for row in self.steps()}

    @property
    def rehearsed(self) -> bool:
        return any(row.get("rehearsed") for row in self.steps())


# --- each figure against what is wanted


@dataclass(frozen=True)
class Target:
    """A figure that the project wants.

    Args:
        what: in words.
        wanted: a relation and a number, as ">= 0.85".
        value: what was measured; None: nothing was.
        part: what measures it, for --part.
        look: what to look at first where it is missed.
    """

    what: str
    wanted: str
    value: float | None
    part: str
    look: str

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        relation, number = self.wanted.split()
        holds: dict[str, Callable] = {
            ">=": lambda value, limit: value >= limit,
            "<=": lambda value, limit: value <= limit,
        }
        return holds[relation](self.value, float(number))

    @property
    def limit(self) -> float:
        return float(self.wanted.split()[1])


def ratio(a: float | None, b: float | None) -> float | None:
    return round(a / b, 3) if a and b else None


def targets(results: Results) -> list[Target]:
    """All that the project wants of a GPU, from the files that are there."""
    codes = results.codes()
    share = "share_of_copy"
    place = "ours, in place"
    loss = Losses(results)
    ours = loss.of(place, loss.whole, 16)
    slow_loss = (
        "the kernels' registers and spills below, --part hints for the cache hints, then ncu on "
        "softmax_sums and row_gradients"
    )
    slow_peer = "the share of copy: if that is met, the peer is faster than was thought"
    slow_step = (
        "the loss and the embedding above, whose time is most of what a superposed step has more, "
        "then a profile of both kinds of step"
    )
    cases = results.csv("kernels.csv")
    spills = results.json("resources.json")
    return [
        Target(
            "kernels: cases that differ from the reference",
            "<= 0",
            sum(row["ok"] != "yes" for row in cases) if cases else None,
            "first",
            "the cases in the table below: no other figure counts before they are right",
        ),
        Target(
            "loss: share of copy bandwidth, V = 151936, s = 16",
            ">= 0.85",
            loss.of(place, loss.whole, 16, share),
            "first",
            slow_loss,
        ),
        Target(
            "loss: share of copy bandwidth, V = 18992, s = 16",
            ">= 0.75",
            loss.of(place, loss.shard, 16, share),
            "first",
            f"row_statistics and the prologues, which weigh more in short rows; {slow_loss}",
        ),
        Target(
            "loss: time at s = 16 over s = 1",
            "<= 1.1",
            ratio(ours, loss.of(place, loss.whole, 1)),
            "first",
            "row_statistics, the one kernel whose work grows with s",
        ),
        Target(
            "loss: Transformer Engine's time for one label over ours for 16",
            ">= 1.5",
            ratio(loss.of("te, single", loss.whole, 16), ours),
            "first",
            slow_peer,
        ),
        Target(
            "loss: the paper's loop, compiled, over ours, s = 16",
            ">= 3",
            ratio(loss.of("paper's loop, compiled", loss.whole, 16), ours),
            "first",
            slow_peer,
        ),
        Target(
            "embedding: the torch path's time over ours, into main_grad, s = 16",
            ">= 4",
            embedding_gain(results),
            "first",
            "extra_mb and ms of its rows below: forward and backward apart with ncu",
        ),
        Target(
            "step: superposed over ordinary, 270M, bf16",
            "<= 1.02",
            step_ratio(results, "270m"),
            "first",
            slow_step,
        ),
        Target(
            "step: superposed over ordinary, 1.4B active, bf16",
            "<= 1.02",
            step_ratio(results, "1.4b"),
            "train-1.4b",
            slow_step,
        ),
        Target(
            "kernels that spill registers, or are missing",
            "<= 0",
            len(spills["faults"]) if spills else None,
            "build",
            "__launch_bounds__ of the kernels in the table below",
        ),
        Target(
            "tests on the GPU, exit code",
            "<= 0",
            codes.get("test-gpu"),
            "test",
            "test-gpu.log in details.tar",
        ),
        Target(
            "two tensor-parallel ranks on the GPU, training, exit code",
            "<= 0",
            codes.get("test-ranks"),
            "test",
            "test-ranks.log in details.tar",
        ),
        *(
            Target(
                f"compute-sanitizer, {tool}, exit code",
                "<= 0",
                codes.get(f"sanitize-{tool}"),
                f"sanitize-{tool}",
                f"sanitize-{tool}.log in details.tar, which names the kernel and its line",
            )
            for tool in SANITIZERS
        ),
        Target(
            "FP8: largest distance of a loss from bf16's, either phase",
            "<= 0.01",
            fp8_distance(results),
            "fp8",
            "the recipe's losses below: train in bf16 until they agree",
        ),
        Target(
            "full-iteration CUDA graphs over the boundary, exit code",
            "<= 0",
            codes.get("graphs-full_iteration"),
            "graphs",
            "graphs-full_iteration.log in details.tar",
        ),
    ]


class Losses:
    """Rows of multi_hot_ce.csv at the sizes that count; in a rehearsal at those that are there."""

    def __init__(self, results: Results):
        self.rows = [row for row in results.csv("multi_hot_ce.csv") if row["dtype"] == "bf16"]
        self.whole, self.shard, self.positions = WHOLE, SHARD, ROWS
        if results.rehearsed and self.rows:
            sizes = [int(row["V"]) for row in self.rows]
            self.whole, self.shard = max(sizes), min(sizes)
            self.positions = int(self.rows[0]["N"])

    def of(self, variant: str, v: int, s: int, column: str = "ms") -> float | None:
        """The last measurement's."""
        want = (variant, str(self.positions), str(v), str(s))
        found = (
            float(row[column])
            for row in reversed(self.rows)
            if (row["variant"], row["N"], row["V"], row["s"]) == want
        )
        return next(found, None)


def embedding_gain(results: Results) -> float | None:
    """The last rows' torch path into main_grad over ours, at the largest bag in bf16."""
    rows = [row for row in results.csv("embedding.csv") if row["dtype"] == "bf16"]
    last = {
        row["variant"]: float(row["ms"])
        for row in rows
        if int(row["s"]) == max(int(row["s"]) for row in rows)
    }
    return ratio(last.get("ours, torch, main_grad"), last.get("ours, main_grad"))


def step_ratio(results: Results, model: str) -> float | None:
    """The last row's; in a rehearsal the demo's stands for it."""
    rows = [row for row in results.csv("step.csv") if row["precision"] == "bfloat16"]
    if results.rehearsed:
        rows = results.csv("step.csv")
    found = [float(row["time_ratio"]) for row in rows if row["model"] == model]
    return found[-1] if found else None


def fp8_distance(results: Results) -> float | None:
    """nan: a recipe failed. None: not all of them have run."""
    found = results.json("fp8.json")
    if not found or set(found["recipes"]) != set(found.get("wanted", found["recipes"])):
        return None
    worst = [
        max(end["distance"] for end in row.values()) if row else math.nan
        for row in found["recipes"].values()
    ]
    return math.nan if any(map(math.isnan, worst)) else round(max(worst), 5)


def verdict(target: Target, rehearsed: bool) -> str:
    if target.met is None:
        return "NOT RUN"
    if rehearsed:
        return "rehearsed"
    return "yes" if target.met else "**no**"


# --- in words


def conclusions(results: Results) -> str:
    """A few sentences: how much is met, by how much what is not, what to look at first."""
    found = targets(results)
    if results.rehearsed:
        ran = sum(target.met is not None for target in found)
        failed = _failed(results)
        steps = f"Steps that failed: {', '.join(failed)}." if failed else "No step failed."
        return (
            f"A rehearsal says whether the check runs, and nothing about a GPU. {ran} of "
            f"{len(found)} figures could be read from what ran here. {steps}"
        )
    met, missed, unknown = (
        [target for target in found if target.met is state] for state in (True, False, None)
    )
    said = [
        f"Of {len(found)} targets {len(met)} are met, {len(missed)} are missed and "
        f"{len(unknown)} were not run."
    ]
    if found[0].met is False:
        said.append("**The kernels are wrong, so no time below counts.**")
    if rate := copy_rate(results):
        said.append(f"A copy of the logits moves {rate:.2f} TB/s here, read and written.")
    paragraphs = [" ".join(said)]
    if met:
        paragraphs.append("Met: " + "; ".join(f"{t.what} ({_number(t)})" for t in met) + ".")
    paragraphs += [
        f"Missed: {t.what} is {_number(t)}{_by_how_much(t)}. Look first at {t.look}."
        for t in missed
    ]
    if hints := without_hints(results):
        paragraphs.append("Without cache hints: " + "; ".join(hints) + ".")
    if failed := _failed(results):
        paragraphs.append("Steps that did not end well: " + ", ".join(failed) + ".")
    if unknown:
        parts = dict.fromkeys(target.part for target in unknown)
        paragraphs.append("Not run: " + ", ".join(f"--part {part}" for part in parts) + ".")
    return "\n\n".join(paragraphs)


def _number(target: Target) -> str:
    return f"{target.value:g}, wanted {target.wanted}"


def _by_how_much(target: Target) -> str:
    if not target.limit or math.isnan(target.value):
        return ""
    return f", {abs(target.value / target.limit - 1):.1%} off"


def _failed(results: Results) -> list[str]:
    return [
        f"{name} ({'out of time' if code == OUT_OF_TIME else f'exit code {code}'})"
        for name, code in results.codes().items()
        if code
    ]


def without_hints(results: Results) -> list[str]:
    """Of each build of --part hints: its time over that of the ordinary one, measured before it."""
    loss, said = Losses(results), []
    for v in (loss.whole, loss.shard):
        plain, found = None, {}
        for row in (row for row in loss.rows if row["V"] == str(v) and row["s"] == "16"):
            if row["variant"] == "ours, in place":
                plain = float(row["ms"])
            elif row["variant"].startswith("ours (") and row["variant"].endswith(", in place"):
                found[row["variant"].split("(")[1].split(")")[0]] = ratio(float(row["ms"]), plain)
        said += [f"{name} takes {times} of the time at V = {v}" for name, times in found.items()]
    return said


def copy_rate(results: Results) -> float | None:
    """TB/s, bytes read and bytes written together, of the largest logits."""
    loss = Losses(results)
    ms, mb = (loss.of("copy", loss.whole, 16, column) for column in ("ms", "logits_mb"))
    return 2 * mb / ms / 1e3 if ms and mb else None


# --- the rest of the page


def _head(results: Results) -> str:
    loud = ""
    if results.rehearsed:
        loud = (
            "# REHEARSED ON A CPU. NOT A GPU MEASUREMENT.\n\nEvery figure on this page is of small "
            "shapes on a CPU and says only that the check runs. Steps that need CUDA had the "
            "nearest thing of a CPU in their place.\n\n"
        )
    machine = results.text("machine.log")
    return f"{loud}# GPU check" + (f"\n\n```\n{machine.strip()}\n```" if machine else "")


def _targets(results: Results) -> str:
    rows = [
        (
            t.what,
            t.wanted,
            "-" if t.value is None else f"{t.value:g}",
            verdict(t, results.rehearsed),
        )
        for t in targets(results)
    ]
    return "## Targets\n\n" + _markdown(["what", "wanted", "measured", ""], rows)


def _steps(results: Results) -> str:
    last = {(row["part"], row["step"]): row for row in results.steps()}
    rows = [
        (part, step, _ended(row), row["seconds"], row.get("limit", ""))
        for (part, step), row in last.items()
    ]
    ran = {part for part, _ in last}
    rows += [(part, "", "NOT RUN", "", "") for part in PARTS if part not in ran]
    return "## Steps\n\n" + _markdown(["part", "step", "", "seconds", "of at most"], rows)


def _ended(row: dict) -> str:
    if row["code"] == OUT_OF_TIME:
        return "**OUT OF TIME**"
    if row["code"]:
        return f"**FAILED ({row['code']})**"
    return "rehearsed" if row.get("rehearsed") else "ok"


def _tables(results: Results) -> list[str]:
    sections = []
    if rows := results.csv("kernels.csv"):
        wrong = [list(row.values()) for row in rows if row["ok"] != "yes"]
        text = f"{len(rows) - len(wrong)} of {len(rows)} cases are right."
        if wrong:
            text += "\n\n" + _markdown(list(rows[0]), wrong)
        sections.append("## Kernels against the reference\n\n" + text)
    if found := results.json("resources.json"):
        rows = [list(kernel.values()) for kernel in found["kernels"]]
        head = ["kernel", "architecture", "registers", "stack", "spill stores", "spill loads"]
        sections.append("## Registers\n\n" + _markdown(head, rows))
    if found := results.json("fp8.json"):
        rows = [
            (recipe, *[f"{end['loss']:.4f} ({end['distance']:.3%})" for end in row.values()])
            if row
            else (recipe, "FAILED", "FAILED")
            for recipe, row in found["recipes"].items()
        ]
        head = (
            f"Mean loss of the last {found['last']} of {found['iterations']} steps (distance "
            f"from {found['reference']})"
        )
        columns = ["recipe", "superposition", "recovery"]
        sections.append(f"## FP8\n\n{head}\n\n" + _markdown(columns, rows))
    for name in ("multi_hot_ce.csv", "embedding.csv", "step.csv", "linear_loss.csv"):
        if rows := results.csv(name):
            sections.append(f"## {name}\n\n" + _measured(rows))
    return sections


def _measured(rows: list[dict]) -> str:
    """A table, and in a line above it what all of its rows have in common."""
    where = ("threads", "device", "torch", "megatron_core", "commit")
    common = {
        key: value
        for key, value in rows[0].items()
        if len({row[key] for row in rows}) == 1 and (len(rows) > 1 or key in where)
    }
    columns = [key for key in rows[0] if key not in common]
    line = ", ".join(f"{key} {value}" for key, value in common.items() if value != "")
    table = _markdown(columns, [[row[key] for key in columns] for row in rows])
    return f"{line}\n\n{table}"


def _markdown(head: list[str], rows: list) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
