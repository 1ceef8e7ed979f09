"""an appliance namespace under load: resized, its handler's process killed and restarted, deleted; nothing is lost"""

import json
import os
import subprocess
import time
from pathlib import Path

from harness.process import spawn, stop

TARGETS = ("ringstone",)
NQN = "nqn.2026-11.io.ringstone:appliance"
SOURCES = Path(__file__).resolve().parents[2] / "bdev" / "appliance"
MIB = 1 << 20
BLOCK = 512
ROUNDS = 3


class Handler:
    """`ringstone appliance` with the example in C that keeps its blocks in a file."""

    def __init__(self, t):
        self.t = t
        self.folder = t.target.volumes
        self.socket = os.path.join(t.target.scratch, "appliance.sock")
        self.library = self.folder / "file.so"
        self.child = None
        built = subprocess.run(["cc", "-std=c11", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-I", SOURCES / "include",
                                "-o", self.library, SOURCES / "examples" / "file.c"], capture_output=True, text=True)
        t.equal(built.returncode, 0, f"the compiler's status ({built.stderr})")

    def start(self):
        options = json.dumps({"path": str(self.folder / "data")})
        with open(self.folder.parent / "handler.log", "ab") as log:
            self.child = spawn([self.t.target.binary, "appliance", "--socket", self.socket, "--handler", self.library,
                                "--options", options], log)
        self.await_connected(True)

    def kill(self):
        """kill -9."""
        stop(self.child)
        self.await_connected(False)

    def await_connected(self, connected):
        deadline = time.monotonic() + 60
        while self.stats()["backend"]["connected"] != connected:
            self.t.check(time.monotonic() < deadline, f"the target did not notice its handler: {self.stats()}")
            time.sleep(0.02)  # between two tries of a condition that has a deadline

    def stats(self):
        return self.t.target.rpc("bdev_appliance_get_stats", name="appliance")[0]


def test(t):
    """Two namespaces: fio writes and verifies one on the appliance, and a neighbour that must not notice."""
    t.target.start()
    t.target.subsystem(NQN)
    t.volume(NQN, 32, nsid=1, kind="malloc")
    handler = Handler(t)
    try:
        t.target.rpc("bdev_appliance_create", name="appliance", handler=f"unix:{handler.socket}", on_disconnect="park",
                     num_blocks=64 * MIB // BLOCK, block_size=BLOCK, timeout_ms=120000)
        under_load(t, handler)
    finally:
        stop(handler.child)


def under_load(t, handler):
    handler.start()
    t.target.add_namespace(NQN, "appliance", 2)
    t.connect(NQN, "--keep-alive-tmo=120")
    neighbour = t.load(t.namespace(NQN, 1))
    device = t.namespace(NQN, 2)
    t.fio(device, 8, rw="write", offset_mib=32, bs="64k", end_fsync=1)
    load = t.load(device, size_mib=8, iodepth=32)
    load.await_passes(1)

    # Resized, with the process and without it.
    for number, mib in enumerate((128, 96, 160)):
        if number == 2:
            handler.kill()
        t.target.rpc("bdev_appliance_resize", name="appliance", num_blocks=mib * MIB // BLOCK)
        t.await_size(device, mib)
        if number == 2:
            handler.start()
        t.fio(device, 8, offset_mib=mib - 8, rw="write", bs="64k")
        load.await_passes(1)

    # Killed and restarted: the I/O waits meanwhile, and goes on.
    for _ in range(ROUNDS):
        handler.kill()
        handler.start()
        load.await_passes(1)
    load.finish()
    t.fio(device, 8, rw="read", offset_mib=32, bs="64k")
    t.check_never_reconnected()
    stats = handler.stats()
    t.equal((stats["timed_out"], stats["backend"]["faults"]), (0, 0), f"requests timed out, faults ({stats})")

    # Deleted under load: its I/O ends, and the neighbour does not notice.
    busy = t.load(device, iodepth=32)
    busy.await_passes(1)
    t.target.rpc("bdev_appliance_delete", name="appliance")
    ended = busy.job.wait(timeout_s=120, check=False)
    t.check(ended.status != 0, "fio went on although its bdev was deleted")
    t.eventually(f"! namespace {NQN} 2")
    neighbour.await_passes(1)
    neighbour.finish()
    t.check(not os.path.exists(handler.socket), "the socket is still there")
