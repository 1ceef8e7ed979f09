"""Child processes that cannot outlive the harness, and the error every part of it raises."""

import ctypes
import os
import re
import signal
import socket
import subprocess
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1


class HarnessError(Exception):
    """The harness itself cannot go on: a missing package, a guest that does not boot. Not a failing test."""


def spawn(command, log):
    """Starts a child whose output goes to the open file `log`.

    The kernel kills it when the harness ends in whatever way. It has its own process group, so that Ctrl-C reaches
    the harness alone, which then takes its children down in order.
    """
    parent = os.getpid()

    def in_child():
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # the harness ended between fork and prctl

    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                            preexec_fn=in_child, start_new_session=True)


def stop(child):
    """Kills a child that may have ended already and reaps it."""
    if child is not None and child.poll() is None:
        child.kill()
    if child is not None:
        child.wait()

def free_port():
    """A TCP port nobody listens on now. Kept below the ephemeral range so that no client's connection takes it."""
    first, last = map(int, re.findall(r"\d+", Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()))
    start = os.getpid() % 4096
    for step in range(8192):
        port = 20000 + (start + step * 7) % 8192
        if first <= port <= last:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise HarnessError("no free TCP port between 20000 and 28191")
