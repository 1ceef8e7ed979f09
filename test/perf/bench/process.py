"""Programs that a case runs, and what the system says of them."""

import json
import os
import subprocess
from pathlib import Path

# A program may take this much longer than it measures.
PATIENCE_S = 60


class BenchError(Exception):
    """A case cannot be measured. Its words are for the user."""


def run_json(command, seconds):
    """Runs a program that prints JSON."""
    done = subprocess.run(command, text=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=seconds + PATIENCE_S)
    if done.returncode != 0:
        raise BenchError(f"{' '.join(map(str, command))}\nended with status {done.returncode}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def cpu_seconds(pid):
    """CPU time of all threads that a process has: the scheduler's count, in nanoseconds."""
    total_ns = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            total_ns += int((task / "schedstat").read_text().split()[0])
        except FileNotFoundError:
            pass  # a thread that ended meanwhile
    return total_ns / 1e9


def rss_mib(pid):
    """Memory that a process has."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise BenchError(f"process {pid} has no VmRSS")


def huge_mib(pid):
    """Hugepages that a process has, which are not in its VmRSS."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("HugetlbPages:"):
            return int(line.split()[1]) / 1024
    return 0.0


def pin(core):
    """What a child process does first to run on one core."""
    return lambda: os.sched_setaffinity(0, {core})
