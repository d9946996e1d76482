"""A process that imports torch and Megatron once and then forks: one JSON job a line on stdin, one
JSON answer a line on stdout.

A job: {"nproc": 2, "ranks": [first, number], "master": HOST, "port": 1234, "log": PATH, "env":
{...}, "seconds": 300, "after": TEXT} and one of
    "script": [PATH, ARGS...]   run as __main__, as torchrun would
    "module": [NAME, ARGS...]   python -m NAME ARGS
    "call":   [MODULE, FUNCTION, ARGS...]    called in each rank with a gloo process group
The answer: {"codes": [exit code of each rank here]}. Ranks that outlive a failed one by 5 s, or the
job's seconds, are killed (-9); with "after", the seconds count from when the log shows that text.
Each rank leads a process group of its own. What is left of that when the rank has ended is killed:
a rank ends by os._exit, which leaves the daemons of multiprocessing alive (asynchronous saves).

A process that has touched CUDA cannot be forked, so on a GPU each rank is a fresh process:
python -m support.fork_server JOB RANK.
"""

import importlib
import json
import os
import runpy
import signal
import sys
import time
import traceback

from support.processes import die_with_parent


def serve() -> None:
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prepare()
    for line in sys.stdin:
        answers.write(json.dumps({"codes": run(json.loads(line))}) + "\n")
        answers.flush()


def prepare() -> None:
    from megatron_tst import compat, cpu

    cpu.enable_if_asked()
    compat.hide_broken_transformer_engine()
    if not cpu.asked_for():
        return
    # what a run would import, apart from the script itself
    import megatron.core.models.gpt
    import megatron.core.models.hybrid.hybrid_model
    import megatron.training.training  # noqa: F401

    import megatron_tst.training  # noqa: F401


def run(job: dict) -> list[int]:
    alive, codes = {}, {}
    first, number = job["ranks"]
    for rank in range(first, first + number):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            die_with_parent()
            if os.environ.get("MEGATRON_TST_CPU") != "1":
                module = [sys.executable, "-P", "-m", "support.fork_server"]
                os.execv(sys.executable, [*module, json.dumps(job), str(rank)])
            child(job, rank)
        alive[pid] = rank
    awaited = job.get("after")
    deadline = time.time() + (300 if awaited else job["seconds"])
    while alive:
        if (
            awaited
            and os.path.exists(job["log"])
            and awaited in open(job["log"], errors="replace").read()
        ):
            awaited, deadline = None, time.time() + job["seconds"]
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            codes[alive.pop(pid)] = code
            end_group(pid)
            if code:
                deadline = min(deadline, time.time() + 5)
        elif time.time() > deadline:
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        else:
            time.sleep(0.02)
    return [codes[rank] for rank in range(first, first + number)]


def end_group(leader: int) -> None:
    """Kill what is left of the process group of a rank that has ended."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        pass  # nothing is left


def child(job: dict, rank: int) -> None:
    code = 1
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(
            job["env"],
            RANK=str(rank),
            LOCAL_RANK=str(local_rank(rank - job["ranks"][0])),
            WORLD_SIZE=str(job["nproc"]),
            MASTER_ADDR=job["master"],
            MASTER_PORT=str(job["port"]),
        )
        code = start(job, rank) or 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def local_rank(place: int) -> int:
    """Several ranks share a GPU where there are more of them (over gloo: NCCL refuses)."""
    import torch

    return (
        place
        if os.environ.get("MEGATRON_TST_CPU") == "1"
        else place % max(1, torch.cuda.device_count())
    )


def start(job: dict, rank: int) -> None:
    if "call" in job:
        import torch

        torch.distributed.init_process_group("gloo", rank=rank, world_size=job["nproc"])
        module, function, *arguments = job["call"]
        getattr(importlib.import_module(module), function)(*arguments)
        torch.distributed.barrier()
        return
    if "module" in job:
        sys.argv = job["module"]
        runpy.run_module(job["module"][0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = job["script"]
        runpy.run_path(job["script"][0], run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        prepare()
        child(json.loads(sys.argv[1]), int(sys.argv[2]))
    serve()
