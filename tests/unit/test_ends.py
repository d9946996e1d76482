"""How a verb ends, whatever happens: one line, an exit code, nothing on the screen that is not for
the user.
"""

import os
import signal
import subprocess
import sys

import pytest

from megatron_tst import cli
from megatron_tst.cli import screen
from megatron_tst.errors import PatchError, TSTError


def parser():
    return screen.Parser("megatron-tst verb", "What it does.")


def ends(capfd, run, argv=()):
    """(exit code, stderr) of a verb that calls `run`."""
    code = screen.call(parser(), run, list(argv))
    said = capfd.readouterr()
    assert said.out == ""
    return code, said.err


def raising(error):
    def run(options):
        raise error

    return run


@pytest.mark.parametrize(
    "error, code, said",
    [
        (TSTError("a: expected b, got c.\nDo d."), 2, "a: expected b, got c. Do d."),
        (PatchError("a seam is missing"), 2, "a seam is missing"),
        (FileNotFoundError(2, "No such file or directory", "x/y"), 2, "x/y: expected that it can"),
        (PermissionError(13, "Permission denied", b"x"), 2, "that you may read and write."),
        (OSError(28, "No space left on device", "x"), 2, "Make room, or choose another disk."),
        (OSError(18, "Invalid cross-device link", "x", None, "y"), 2, "x -> y: expected that"),
        (OSError("cannot mmap an empty file"), 2, "got cannot mmap an empty file."),
        (ModuleNotFoundError("No module named 'x'", name="x"), 2, "x: expected a package that"),
        (ImportError("libx.so: no such file"), 2, "got libx.so: no such file."),
        (MemoryError(), 2, "memory: expected enough, got none left."),
        (KeyboardInterrupt(), 130, "interrupted. Nothing was left half written."),
        (screen.Signal(signal.SIGTERM), 143, "ended by SIGTERM. Nothing was left half written."),
        (KeyError("vocab"), 2, "got KeyError: 'vocab'."),
        (RecursionError("too deep"), 2, "got RecursionError: too deep."),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "UnicodeDecodeErro"),
    ],
)
def test_whatever_is_raised_is_one_line(error, code, said, capfd):
    got, err = ends(capfd, raising(error))
    assert (got, err.count("\n")) == (code, 1), err
    assert err.startswith("megatron-tst verb: error: ") and said in err


def test_a_traceback_only_with_debug(capfd):
    code, err = ends(capfd, raising(KeyError("vocab")), ["--debug"])
    assert code == 2 and err.startswith("Traceback") and err.splitlines()[-1].startswith("megatron")
    code, err = ends(capfd, raising(TSTError("a: expected b, got c.")), ["--debug"])
    assert code == 2 and err.count("\n") == 1  # foreseen: the line says all


def test_the_answer_is_the_exit_code_and_help_is_none_of_our_errors(capfd):
    assert ends(capfd, lambda options: 1) == (1, "")
    with pytest.raises(SystemExit) as end:
        screen.call(parser(), lambda options: 1, ["--help"])
    assert end.value.code == 0
    assert "--debug" not in capfd.readouterr().out


@pytest.mark.parametrize("number", screen.SIGNALS)
def test_a_signal_runs_what_cleans_up_and_handlers_are_put_back(number, capfd):
    before, cleaned = signal.signal(number, signal.SIG_DFL), []  # ignored under nohup

    def run(options):
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        except Exception:
            raise AssertionError("a signal is no ordinary exception") from None
        finally:
            cleaned.append(True)

    try:
        code, err = ends(capfd, run)
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert cleaned and code == 128 + number and number.name in err


def test_a_signal_that_is_ignored_stays_ignored(capfd):
    """nohup megatron-tst ... &"""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert ends(capfd, lambda options: os.kill(os.getpid(), signal.SIGHUP) or 0) == (0, "")
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def run_it(body, **how):
    """A process whose verb does `body`, with its Popen arguments."""
    code = f"""
import os, signal, sys, time
from megatron_tst.cli import screen
def run(options):
    {body}
sys.exit(screen.call(screen.Parser("megatron-tst verb", ""), run, []))
"""
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
    return subprocess.Popen([sys.executable, "-c", code], text=True, **how)


@pytest.mark.parametrize("answer", [0, 1])
@pytest.mark.parametrize("lines", [1, 20000])
def test_a_closed_pipe_does_not_change_the_answer_to_yes(answer, lines):
    """`verify a b | head -1` under pipefail."""
    reader, writer = os.pipe()
    body = f"screen.answer(False, {{}}, 'line\\n' * {lines}); return {answer}"
    process = run_it(body, stdout=writer)
    os.close(writer)
    os.close(reader)
    _, err = process.communicate(timeout=60)
    assert err == "" and process.returncode == answer


@pytest.mark.parametrize("lines", [1, 20000])
def test_a_full_disk_on_stdout_is_one_line(lines):
    with open("/dev/full", "w") as full:
        process = run_it(f"[print(i) for i in range({lines})]; return 0", stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.count("\n") == 1, err
    assert "No space left on device" in err and "Make room" in err


def test_streams_that_the_caller_closed():
    def close():
        os.close(1)
        os.close(2)

    process = run_it("print(1); raise OSError('x')", stdout=None, stderr=None, preexec_fn=close)
    assert process.wait(timeout=60) == 2


@pytest.mark.parametrize("number, code", [(signal.SIGINT, -2), (signal.SIGTERM, -15)])
def test_the_command_dies_of_the_signal(number, code, tmp_path):
    """So that a shell's loop ends with it. The verb waits for a reader of a FIFO."""
    program = """
import sys
from megatron_tst.cli import inspect, main, screen
def run(options):
    print("started", flush=True)
    import time
    time.sleep(60)
inspect._run = run
sys.argv = ["megatron-tst", "inspect", "x"]
sys.exit(main())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a job in the background, or of nohup, is born with it ignored
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "started\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.count("\n") == 1 and err.startswith("megatron-tst inspect: error: ")


def test_a_script_that_is_launched_keeps_its_own_errors(tmp_path):
    """Its exceptions, its exit codes and its signals are the script's, not the verb's."""
    script = tmp_path / "script.py"
    script.write_text(
        "import signal, sys\n"
        "assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL\n"
        "sys.exit(7) if sys.argv[1:] == ['--debug'] else 1 / 0\n"
    )
    for arguments, code in ((["--debug"], 7), ([], 1)):
        done = subprocess.run(
            [sys.executable, "-m", "megatron_tst", "launch", script, *arguments],
            capture_output=True,
            text=True,
            env=dict(os.environ, MEGATRON_TST_CPU="1"),
        )
        assert done.returncode == code, done.stderr
        assert ("ZeroDivisionError" in done.stderr) == (code == 1)


def test_a_module_that_cannot_be_imported_is_one_line(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "megatron_tst.cli.plan", None)
    assert cli.main(["plan"]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "megatron_tst.cli.plan: expected a package" in err
