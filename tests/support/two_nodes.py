"""Two nodes on one machine: network namespaces joined by a veth pair, each with its own loopback
and address.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys

from support.paths import environment

ADDRESSES = "10.213.77.1", "10.213.77.2"
INTERFACE = "tst0"  # its name inside either namespace


@contextlib.contextmanager
def two_nodes():
    """-> the names of two namespaces, removed at the end. Raises OSError where they cannot be made
    (not root, no `ip`).
    """
    if not shutil.which("ip"):
        raise OSError("there is no `ip` command (iproute2)")
    names = [f"tst-{os.getpid()}-{i}" for i in (0, 1)]
    made = []
    try:
        for name in names:
            _ip("netns", "add", name)
            made.append(name)
            _ip("-n", name, "link", "set", "lo", "up")
        pair = f"link add {INTERFACE} type veth peer name {INTERFACE} netns".split()
        _ip("-n", names[0], *pair, names[1])
        for name, address in zip(names, ADDRESSES):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", INTERFACE, "up")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _ip(*arguments):
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def start(node: int, namespace: str, command: list[str], log, env: dict) -> subprocess.Popen:
    """Run torchrun of one node; node 0 hosts the rendezvous (it cannot tell from an address that no
    host name stands for).
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-id", "tst", "--max-restarts", "3"]
    torchrun += ["--rdzv-endpoint", f"{ADDRESSES[0]}:29500", "--local-addr", ADDRESSES[node]]
    torchrun += ["--rdzv-conf", f"is_host={int(node == 0)}"]
    # Two agents can count their restarts differently, and the store that they share is divided by
    # that count: a worker would find the addresses of dead ones. With a store of its own for every
    # start there is nothing left to find.
    variables = environment(
        GLOO_SOCKET_IFNAME=INTERFACE, OMP_NUM_THREADS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"
    )
    return subprocess.Popen(
        ["ip", "netns", "exec", namespace, *torchrun, *command],
        stdout=log,
        stderr=log,
        env=variables | env,
    )
