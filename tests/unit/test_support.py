"""The tests' own support: what it promises the other tests."""

import re
import subprocess
import sys
import tomllib

import pytest
from support import processes
from support.paths import ROOT, environment

# it waits: for an instant after exec the kernel shows no environment of a new process
LEAVES_ONE = """
import subprocess, time
def test_leaves_a_process():
    subprocess.Popen(["sleep", "{seconds}"], start_new_session=True)
    time.sleep(0.3)
"""


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["", "xdist"])
@pytest.mark.parametrize("seconds, code", [(300, 1), (0, 0)])
def test_a_process_that_outlives_the_session_fails_it(tmp_path, seconds, code, workers):
    (tmp_path / "test_tiny.py").write_text(LEAVES_ONE.format(seconds=seconds))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    command += ["-p", "support.processes", "--rootdir", tmp_path, tmp_path, *workers]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(**{processes.PATIENCE: "1"})
    )
    assert done.returncode == code and "1 passed" in done.stdout, done.stdout
    assert done.stdout.count("sleep 300") == code, done.stdout


MUTATION = ROOT / "tests/mutation"
ROOMS = ("ops", "data", "checks", "checkpoint", "planning")


def test_every_module_has_tests_that_mutants_of_it_are_shown_to():
    table = tomllib.loads((MUTATION / "modules.toml").read_text())
    files = [path for room in ROOMS for path in (ROOT / "megatron_tst" / room).glob("[!_]*.py")]
    assert set(table) == {"schedule", *(f"{path.parent.name}.{path.stem}" for path in files)}
    for row in table.values():
        assert all((ROOT / test).is_file() for test in [*row["tests"], *row.get("and_then", [])])


def test_faults_written_by_hand_fit_the_code():
    """What they replace is there once, and so are the tests that are to see them."""
    for name, bug in tomllib.loads((MUTATION / "bugs.toml").read_text()).items():
        assert (ROOT / bug["file"]).read_text().count(bug["was"]) == 1, name
        for test in bug["tests"]:
            file, _, function = test.partition("::")
            assert f"def {function}" in (ROOT / file).read_text(), name


def test_mutants_that_change_nothing_fit_the_code():
    """Each is named once, and the line that it changes is there. cosmic-ray is not asked."""
    text = re.sub(r"^#.*\n", "", (MUTATION / "equivalent.txt").read_text(), flags=re.M)
    entries = [entry.split("\n") for entry in re.split(r"\n\s*\n", text.strip())]
    assert len({tuple(entry[:3]) for entry in entries}) == len(entries)
    for head, was, becomes, *why in entries:
        module = ROOT / "megatron_tst" / f"{head.split()[0].replace('.', '/')}.py"
        lines = " ".join(line.strip() for line in module.read_text().split("\n"))
        assert was.startswith("- ") and was[2:].strip() in lines, (head, was)
        assert becomes.startswith("+ ") and "".join(why).strip(), head
