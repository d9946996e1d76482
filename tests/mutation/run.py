"""Mutation testing with cosmic-ray: which faults, put in one at a time, would no test see?

    python tests/mutation/run.py [--packages FOLDER] [--work FOLDER] [MODULE ...]

A MODULE is a name in modules.toml, which says what tests are asked about it, or a room ("ops" is
all of ops.*); none: all. Per mutant a process is forked from one that has imported torch and
Megatron, and runs those tests until the first that fails, in a second or two. What they let pass is
shown to the slower tests of `and_then`, which start processes.

Resumable: FOLDER (build/mutation) has a session of each module, in cosmic-ray's own format, and a
copy of the checkout that the mutants are written into. A module's session starts anew when the
module or its tests have changed.

With --bugs the faults of bugs.toml are put in instead, each with the tests that must see it.

Survivors are held against equivalent.txt, where each mutant that changes nothing stands with its
reason. Exit code 1 if there are others, or if the file names some that are killed or gone.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import difflib
import fcntl
import gc
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
EQUIVALENT = HERE / "equivalent.txt"
# Operators that are left out: of each place enough others stay, two to five
SKIPPED = re.compile(
    r"ReplaceBinaryOperator_(?!(Add_(Sub|Mul)|Sub_(Add|Mul)|Mul_(Add|Div|FloorDiv)"
    r"|Div_(Mul|FloorDiv)|FloorDiv_(Mul|Div|Mod)|Mod_(FloorDiv|Mul)|Pow_Mul|BitOr_BitAnd"
    r"|BitAnd_BitOr|BitXor_BitAnd|RShift_LShift|LShift_RShift)$)"
    r"|ReplaceComparisonOperator_(Eq|NotEq|Lt|LtE|Gt|GtE)_(Is|IsNot|In|NotIn)$"
    r"|ReplaceComparisonOperator_(Eq_(Lt|Gt)|NotEq_(LtE|GtE))$"
    r"|ReplaceComparisonOperator_(Is|IsNot|In|NotIn)_(Lt|LtE|Gt|GtE|Eq|NotEq)$"
    r"|ReplaceUnaryOperator_\w+_(Invert|UAdd)$|VariableReplacer|VariableInserter"
)
# pytest's. The plugins left out walk through all of torch's objects, longer than most tests take
FLAGS = (
    "-x -q --no-header --tb=line -p pytest_timeout -p no:cacheprovider -p no:unraisableexception "
    "-p no:threadexception"
).split()
MEMORY = 8 << 30  # bytes that a mutant may ask for beyond what the parent has


@dataclass
class Module:
    """A line of modules.toml."""

    name: str
    tests: list[str]
    and_then: list[str]

    @property
    def path(self) -> str:
        return f"megatron_tst/{self.name.replace('.', '/')}.py"


def modules(wanted: list[str]) -> list[Module]:
    table = tomllib.loads((HERE / "modules.toml").read_text())
    all_ = [Module(name, row["tests"], row.get("and_then", [])) for name, row in table.items()]
    if not wanted:
        return all_
    found = [m for m in all_ if any(m.name == w or m.name.startswith(w + ".") for w in wanted)]
    if not found:
        sys.exit(f"mutation: expected modules out of {[m.name for m in all_]}, got {wanted}.")
    return found


# ---- the copy of the checkout that mutants are written into


def copy_checkout(work: Path) -> Path:
    """Bring `work`/tree up to date with the checkout; unchanged files keep their age, so that what
    Python has compiled stays good.
    """
    tree = work / "tree"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    names = [n for n in listed if n and (ROOT / n).is_file() and not n.startswith("build/")]
    names += [str(p.relative_to(ROOT)) for p in (ROOT / "megatron_tst").glob("_C*.so")]
    for name in names:
        source, target = ROOT / name, tree / name
        if target.is_file() and target.read_bytes() == source.read_bytes():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        os.utime(target, (1, 1))  # older than any mutant of it
    for path in (tree / "megatron_tst").rglob("*.py"):
        if str(path.relative_to(tree)) not in names:
            path.unlink()
    return tree


# ---- tests in a fork of this process


def prepare(tree: Path) -> None:
    """Import what every test needs, but nothing that is mutated."""
    warnings.simplefilter("ignore")  # of what is not installed, and of forks beside threads
    tqdm.tqdm.monitor_interval = 0  # no thread
    os.chdir(tree)
    os.environ.update(MEGATRON_TST_CPU="1", OMP_NUM_THREADS="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    sys.path[:0] = [str(tree), str(tree / "tests")]
    from support.paths import EVERYTHING, environment

    os.environ.update(environment())
    sys.path[:0] = EVERYTHING
    import torch

    torch.set_num_threads(1)
    from megatron_tst import compat, cpu

    cpu.enable_if_asked()
    compat.hide_broken_transformer_engine()
    import hypothesis
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import megatron.core.models.gpt
    import megatron.core.models.hybrid.hybrid_model
    import megatron.training.training  # noqa: F401
    import torch.utils.tensorboard

    # nobody asks for the smallest example of a mutant
    phases = [p for p in hypothesis.Phase if p.name in ("explicit", "generate")]
    hypothesis.settings.register_profile("mutants", phases=phases, database=None, derandomize=True)
    hypothesis.settings.load_profile("mutants")

    loaded = [n for n in sys.modules if n.startswith("megatron_tst.")]
    unexpected = set(loaded) - {f"megatron_tst.{n}" for n in ("compat", "cpu", "cpu_torch")}
    assert not unexpected, f"mutants of {unexpected} would not be imported"
    gc.freeze()  # else the forks' garbage collectors copy this process, page by page


@dataclass
class Trace:
    """What a test did when no fault was put in."""

    seconds: float  # of the processor
    lines: list[int]  # of the module that it ran


class InOneProcess:
    """Leaves out the tests that start processes of their own. Tests that run the changed lines come
    first, and of these the quick ones. All others follow: a trace is no proof, since a fixture of
    several tests or a cached function runs once.

    Args:
        traces: test -> its trace. A test that takes much longer than that is killed.
        lines: of the module that a mutant changes.
    """

    def __init__(self, traces: dict[str, Trace], lines: set[int]):
        self.traces, self.lines = traces, lines

    def pytest_collection_modifyitems(self, config, items):
        kept = [item for item in items if "fork_server" not in item.fixturenames]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = sorted(kept, key=self._rank)

    def _rank(self, item):
        trace = self.traces.get(item.nodeid, Trace(0, []))
        return not self.lines.intersection(trace.lines), trace.seconds

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        trace = self.traces.get(item.nodeid)
        if trace:
            signal.setitimer(signal.ITIMER_PROF, 5 + 5 * trace.seconds)
        return (yield)


class Tracer:
    """Notes what each test does: pytest's plugin in a fork without a fault.

    Args:
        path: the module.
        file: gets the traces.
    """

    def __init__(self, path: Path, file: Path):
        self.path, self.file, self.traces, self.lines = str(path), file, {}, set()

    def pytest_sessionstart(self):
        events, tool = sys.monitoring, sys.monitoring.PROFILER_ID
        events.use_tool_id(tool, "mutation")
        events.register_callback(tool, events.events.LINE, self._line)
        events.set_events(tool, events.events.LINE)

    def _line(self, code, line):
        if code.co_filename == self.path:
            self.lines.add(line)
        return sys.monitoring.DISABLE

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.lines = set()
        sys.monitoring.restart_events()
        started = time.process_time()
        try:
            return (yield)
        finally:
            seconds = time.process_time() - started
            self.traces[item.nodeid] = Trace(seconds, sorted(self.lines))

    def pytest_sessionfinish(self):
        self.file.write_text(json.dumps({k: vars(v) for k, v in self.traces.items()}))


def run_tests(
    tests: list[str],
    log: Path,
    seconds: float = 900,
    cache: bool = False,
    plugins: tuple[object, ...] = (),
    anew: bool = False,
) -> int:
    """Run tests in a fork until one fails.

    Args:
        tests: pytest's arguments.
        log: gets what pytest prints.
        seconds: after which the fork is killed.
        cache: whether Python may keep what it compiles.
        plugins: pytest's.
        anew: in another Python, since this one has imported the module already; without plugins.

    Returns:
        pytest's exit code: 0 where all passed. -9 where the fork was killed.
    """
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            sys.dont_write_bytecode = not cache
            with open(log, "w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
            arguments = [*FLAGS, "-m", "not slow", *tests]
            if anew:
                os.execv(sys.executable, [sys.executable, "-m", "pytest", *arguments])
            code = int(pytest.main(arguments, plugins=plugins))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + seconds
    ended, status = 0, signal.SIGKILL
    while not ended and time.monotonic() < deadline:
        time.sleep(0.005)
        ended, status = os.waitpid(child, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if not ended:
        os.waitpid(child, 0)
        return -signal.SIGKILL
    return os.waitstatus_to_exitcode(status)


# ---- mutants


def annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the source has annotations, which nobody evaluates."""
    found = []
    for node in ast.walk(ast.parse(source)):
        parts = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            parts.append(node)
        found += [
            ((part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset))
            for part in parts
            if part is not None
        ]
    return found


@dataclass(frozen=True)
class Mutant:
    """A fault that was put in, named by its text, since lines move."""

    module: str
    function: str
    was: str
    is_: str

    @classmethod
    def read(cls, head: str, was: str, is_: str) -> Mutant:
        """From the first three lines of an entry: "module function", "- was", "+ is"."""
        return cls(*head.split(), was[2:].strip(), is_[2:].strip() or "(nothing)")

    def __str__(self) -> str:
        return f"{self.module} {self.function}\n- {self.was}\n+ {self.is_}"


def changed_lines(before: str, after: str) -> tuple[str, str]:
    old, new = [], []
    for line in difflib.ndiff(before.split("\n"), after.split("\n")):
        if line[:2] in ("- ", "+ "):
            (old if line[0] == "-" else new).append(line[2:].strip())
    return " ".join(old), " ".join(new)


def equivalents() -> dict[Mutant, str]:
    """equivalent.txt: mutants -> why each changes nothing."""
    found = {}
    text = EQUIVALENT.read_text() if EQUIVALENT.exists() else ""
    for entry in re.split(r"\n\s*\n", re.sub(r"^#.*\n", "", text, flags=re.M).strip()):
        if not entry:
            continue
        head, was, is_, *why = entry.split("\n")
        assert was.startswith("- ") and is_.startswith("+ ") and why, f"{EQUIVALENT}: {entry}"
        found[Mutant.read(head, was, is_)] = " ".join(line.strip() for line in why)
    return found


class Session:
    """The mutants of one module and what became of them: cosmic-ray's database.

    Args:
        tree: the copy that mutants are written into; the checkout where nothing is to be run, and
            then nothing is changed either: another process may be at work.
    """

    def __init__(self, module: Module, work: Path, tree: Path):
        from cosmic_ray.commands.init import init
        from cosmic_ray.work_db import WorkDB

        self.module, self.work, self.path = module, work, tree / module.path
        self.source = self.path.read_text()
        file, digests = work / f"{module.name}.sqlite", work / f"{module.name}.digests"
        tests = [*module.tests, *module.and_then, "tests/mutation/operators.py"]
        files = {part.split("::")[0] for part in tests if (tree / part.split("::")[0]).is_file()}
        now = [digest(self.source), digest("".join((tree / f).read_text() for f in sorted(files)))]
        before = digests.read_text().split() if digests.exists() else []
        if tree == ROOT:
            if before[:1] != now[:1]:
                print(f"{module.name}: the module has changed since; its results are of before")
            self.db = WorkDB(str(file), WorkDB.Mode.open)
            return
        if before[:1] != now[:1]:
            file.unlink(missing_ok=True)
        new = not file.exists()
        self.db = WorkDB(str(file), WorkDB.Mode.create)
        if new:
            init([Path(module.path)], self.db, {})
            self._skip()
        elif before != now:
            self._forget_survivors()
        digests.write_text(" ".join(now))

    def _skip(self):
        from cosmic_ray.work_item import WorkerOutcome, WorkResult

        spans = annotations(self.source)
        for item in self.db.work_items:
            spec = item.mutations[0]
            inside = any(start <= spec.start_pos and spec.end_pos <= end for start, end in spans)
            if inside or SKIPPED.search(spec.operator_name):
                self.db.set_result(item.job_id, WorkResult(WorkerOutcome.SKIPPED))

    def _forget_survivors(self):
        """They are asked again: the tests have changed."""
        from cosmic_ray.work_db import WorkResultStorage

        with self.db._session_maker.begin() as session:
            survived = [job for job, result in self.db.results if not result.is_killed]
            session.query(WorkResultStorage).filter(WorkResultStorage.job_id.in_(survived)).delete()

    def run(self, sample: int | None = None) -> None:
        """Show every mutant that has no result yet to the tests; of a sample: those among the first
        so many of a seeded order.
        """
        from cosmic_ray.mutating import mutate_code
        from cosmic_ray.plugins import get_operator
        from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

        pending = list(self.db.pending_work_items)
        if sample is not None:
            of = {job: result.worker_outcome for job, result in self.db.results}
            order = [i for i in self.db.work_items if of.get(i.job_id) != WorkerOutcome.SKIPPED]
            order.sort(key=lambda i: (i.mutations[0].operator_name, i.mutations[0].occurrence))
            random.Random(0).shuffle(order)
            chosen = {item.job_id for item in order[:sample]}
            pending = [item for item in pending if item.job_id in chosen]
        if not pending:
            return
        log = self.work / f"{self.module.name}.log"
        traces, limits = self._baseline(log)
        started, used = time.monotonic(), processor_seconds()
        for item in tqdm.tqdm(pending, desc=self.module.name, mininterval=30):
            spec = item.mutations[0]
            mutated = mutate_code(self.source, get_operator(spec.operator_name)(), spec.occurrence)
            outcome, said = TestOutcome.SURVIVED, ""
            if mutated is None or same_program(mutated, self.source):
                self.db.set_result(item.job_id, WorkResult(WorkerOutcome.NO_TEST))
                continue
            self.path.write_text(mutated)
            try:
                lines = set(range(spec.start_pos[0], spec.end_pos[0] + 1))
                for tests, seconds, plugins in (
                    (self.module.tests, limits[0], (InOneProcess(traces, lines),)),
                    (self.module.and_then, limits[1], ()),
                ):
                    if tests and outcome == TestOutcome.SURVIVED:
                        code = run_tests(tests, log, seconds, plugins=plugins)
                        outcome = TestOutcome.KILLED if code else outcome
                        said = log.read_text(errors="replace")[-600:]
            finally:
                self.path.write_text(self.source)
                os.utime(self.path, (1, 1))
            mutant = Mutant(
                self.module.name,
                spec.definition_name or "-",
                *changed_lines(self.source, mutated),
            )
            result = WorkResult(WorkerOutcome.NORMAL, said, outcome, str(mutant))
            self.db.set_result(item.job_id, result)
        print(
            f"{self.module.name}: {len(pending)} mutants, a mutant took "
            f"{(processor_seconds() - used) / len(pending):.1f} s of the processor, "
            f"{(time.monotonic() - started) / len(pending):.1f} s in all"
        )

    def _baseline(self, log: Path) -> tuple[dict[str, Trace], list[float]]:
        """-> what each test does, and seconds that a mutant gets from `tests` and from `and_then`:
        enough for tests that all pass on a busy machine.
        """
        file, limits = self.work / f"{self.module.name}.traces", []
        for tests, tracing in ((self.module.tests, True), (self.module.and_then, False)):
            started = time.monotonic()
            plugins = (InOneProcess({}, set()), Tracer(self.path, file)) if tracing else ()
            if tests and run_tests(tests, log, cache=True, plugins=plugins):
                sys.exit(f"mutation: {self.module.name}: the tests fail unchanged, see {log}")
            limits.append(10 + 5 * (time.monotonic() - started))
        traces = json.loads(file.read_text())
        return {test: Trace(**trace) for test, trace in traces.items()}, limits

    def outcomes(self) -> tuple[collections.Counter, dict[Mutant, bool]]:
        """How many were skipped, killed, survived; and whether each mutant was killed. One that is
        made twice under one name counts as killed where both are.
        """
        counts, mutants = collections.Counter(), {}
        for _, result in self.db.results:
            if result.test_outcome is None:
                counts["skipped"] += 1
                continue
            counts["killed" if result.is_killed else "survived"] += 1
            head, was, is_ = result.diff.split("\n")
            mutant = Mutant.read(head, was, is_)
            mutants[mutant] = mutants.get(mutant, True) and result.is_killed
        return counts, mutants


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def same_program(one: str, other: str) -> bool:
    """Whether two sources are one program; a mutant that is none counts as another."""
    try:
        return ast.dump(ast.parse(one)) == ast.dump(ast.parse(other))
    except SyntaxError:
        return False


def report(session: Session, known: dict[Mutant, str]) -> bool:
    """Print a module's score, the survivors that are not known to change nothing, and entries of
    equivalent.txt that are out of date. -> whether there are none of either.
    """
    counts, mutants = session.outcomes()
    name, rest = session.module.name, len(list(session.db.pending_work_items))
    survivors = {mutant for mutant, killed in mutants.items() if not killed}
    open_ = sorted(survivors - set(known), key=str)
    gone = {m for m in known if m.module == name and (m in mutants or not rest)} - survivors
    stale = sorted(gone, key=str)
    changing = len(mutants) - len(survivors & set(known))
    score = 100 * (changing - len(open_)) / max(1, changing)
    ran = counts["killed"] + counts["survived"]
    sample = f" of {ran + rest}" if rest else ""
    print(
        f"{name}: {ran} mutants{sample}, {counts['killed']} killed, "
        f"{len(survivors) - len(open_)} change nothing, {len(open_)} survive: {score:.1f} %"
    )
    for mutant in open_:
        print(f"\n{mutant}")
    for mutant in stale:
        print(f"\nno survivor, take it out of equivalent.txt:\n{mutant}")
    return not open_ and not stale


# ---- faults written by hand


def bugs(tree: Path, work: Path, wanted: list[str]) -> bool:
    """Put in the faults of bugs.toml one after the other. -> whether a test failed at each."""
    table = tomllib.loads((HERE / "bugs.toml").read_text())
    missed, passed = [], set()
    for name in wanted or table:
        bug, log = table[name], work / f"{name}.log"
        path, start = tree / bug["file"], time.monotonic()
        source = path.read_text()
        if source.count(bug["was"]) != 1:
            sys.exit(f"mutation: {bug['file']}: expected once {bug['was']!r} (bugs.toml, {name}).")
        # those of CUDA kernels compile what they test
        by_tests = all(test.startswith("tests/kernels/") for test in bug["tests"])
        compiled = bug["file"].startswith("csrc/") and not by_tests
        built = {lib: lib.read_bytes() for lib in tree.glob("megatron_tst/_C*.so") if compiled}
        module = bug["file"].removesuffix(".py").replace("/", ".")
        anew = module in sys.modules
        asked = tuple(bug["tests"])
        if asked not in passed and run_tests(asked, log, cache=True, anew=anew):
            sys.exit(f"mutation: {name}: the tests fail without the fault, see {log}")
        passed.add(asked)
        path.write_text(source.replace(bug["was"], bug["is"]))
        try:
            if compiled:
                build(tree)
            code = run_tests(asked, log, anew=anew)
        finally:
            path.write_text(source)
            if not compiled:  # what is compiled must be newer than its object file
                os.utime(path, (1, 1))
            for library, content in built.items():
                library.write_bytes(content)
        # not: no such test, an error of pytest's own, a kernel that does not compile
        red = code == 1 and "DoesNotCompile" not in log.read_text()
        missed += [] if red else [name]
        seen = "seen" if red else f"NOT SEEN (exit code {code})"
        print(f"{name}: {seen}, {time.monotonic() - start:.0f} s", flush=True)
    return not missed


def build(tree: Path) -> None:
    """Compile the extension in the copy, for the CPU."""
    for library in tree.glob("megatron_tst/_C*.so"):
        library.unlink()  # a new file: this process may have the old one open
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree,
        env=os.environ | {"MEGATRON_TST_SKIP_CUDA": "1"},
        check=True,
        capture_output=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*")
    parser.add_argument("--packages", type=Path, help="the folder that cosmic-ray is installed in")
    parser.add_argument("--work", type=Path, default=ROOT / "build/mutation")
    parser.add_argument("--nice", type=int, default=19)
    parser.add_argument("--bugs", action="store_true", help="the faults of bugs.toml, by name")
    parser.add_argument("--sample", type=int, metavar="N", help="N mutants of each module alone")
    parser.add_argument("--report", action="store_true", help="run nothing, print what is known")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.nice(options.nice)
    if options.bugs:
        tree = copy_checkout(work)
        prepare(tree)
        return 0 if bugs(tree, work, options.modules) else 1
    if options.packages:
        sys.path.append(str(options.packages.resolve()))
    import cosmic_ray.plugins

    sys.path.insert(0, str(HERE))
    import operators

    cosmic_ray.plugins.OPERATOR_PROVIDERS["left-out"] = operators.Provider()
    wanted, known = modules(options.modules), equivalents()
    tree = ROOT
    if not options.report:
        lock = open(work / "lock", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"mutation: expected {work} for itself, got another run in it. Wait for it.")
        tree = copy_checkout(work)
        prepare(tree)
    fine = True
    for module in wanted:
        if options.report and not (work / f"{module.name}.sqlite").exists():
            continue
        session = Session(module, work, tree)
        if not options.report:
            session.run(options.sample)
        fine &= report(session, known)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
