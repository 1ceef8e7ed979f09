"""What the load is put on over NVMe/TCP: a Ringstone, and other targets beside it."""

import json
import os
import shlex
import signal
import socket
import subprocess
import time
from pathlib import Path

from .process import PATIENCE_S, BenchError, pin, run_json

START_TIMEOUT_S = 30
MALLOC_BYTES = 512 << 20
NULL_BYTES = 100 << 30


def end(child):
    """Ends a child process and all that it has started, which is of its own session."""
    for word, patience_s in ((signal.SIGCONT, 0), (signal.SIGTERM, 10), (signal.SIGKILL, PATIENCE_S)):
        try:
            os.killpg(child.pid, word)
        except ProcessLookupError:
            pass  # all of it has ended
        try:
            child.wait(patience_s)
        except subprocess.TimeoutExpired:
            pass


class Served:
    """Something that serves the benchmarks' two subsystems at an address: a null device and one in memory."""

    name = ""
    host = "127.0.0.1"
    port = None
    # The process, where it is known.
    pid = None

    def __init__(self, binary, load_core):
        self.binary, self.load_core, self.is_filled = binary, load_core, False

    @staticmethod
    def nqn(bdev):
        return f"nqn.2026-11.io.ringstone:bench-{bdev}"

    def address(self, bdev):
        """Options of the tools that reach it."""
        return ["--traddr", self.host, "--trsvcid", str(self.port), "--subnqn", self.nqn(bdev)]

    def fill(self):
        """Writes all of the memory once: what was never written is not there, and costs nothing to read and much to write."""
        if not self.is_filled:
            command = [self.binary, "perf", *self.address("malloc"), "--rw", "read", "--fill", "--bs", "128k", "--count", "1",
                       "--core", str(self.load_core), "--json"]
            run_json(command, PATIENCE_S)
            self.is_filled = True

    def busy(self):
        """Ticks that it found work in, and those that it did not; `None` where it cannot tell."""
        return None

    def resume(self):
        """It is measured next."""

    def pause(self):
        """Others are measured next, on the same core."""

    def close(self):
        """Ends what was started."""


class Target(Served):
    """A `ringstone serve` with one subsystem a volume, on one core."""

    name = "ringstone"

    def __init__(self, binary, core, load_core, folder, poll=None, wrapper=(), patience_s=None):
        # `core` may be a list of them, as --cores takes it; `wrapper` is what runs it.
        super().__init__(binary, load_core)
        self.patience_s = patience_s or START_TIMEOUT_S
        self.folder = Path(folder)
        self.socket = str(self.folder / "rpc.sock")
        self.log = open(self.folder / "target.log", "ab")
        self.child = subprocess.Popen(
            [*wrapper, binary, "serve", "--empty", "--state-dir", str(self.folder / "state"), "--rpc-socket", self.socket, "--cores",
             str(core), *(["--poll", poll] if poll else [])], stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, start_new_session=True)
        self.pid = self.child.pid
        try:
            self._set_up()
        except BaseException:
            self.close()
            raise

    def _set_up(self):
        deadline = time.monotonic() + self.patience_s
        while True:
            try:
                self.rpc("spdk_get_version")
                break
            except BenchError:
                if self.child.poll() is not None or time.monotonic() > deadline:
                    text = (self.folder / "target.log").read_text()
                    raise BenchError(f"the target does not start:\n{text}") from None
                time.sleep(0.02)
        self.rpc("nvmf_create_transport", trtype="TCP")
        self.rpc("bdev_null_create", name="null", num_blocks=NULL_BYTES // 4096, block_size=4096)
        self.rpc("bdev_malloc_create", name="malloc", num_blocks=MALLOC_BYTES // 4096, block_size=4096)
        for bdev in ("null", "malloc"):
            nqn = self.nqn(bdev)
            self.rpc("nvmf_create_subsystem", nqn=nqn, allow_any_host=True)
            self.rpc("nvmf_subsystem_add_ns", nqn=nqn, namespace={"bdev_name": bdev})
            self._listen(nqn)

    def _listen(self, nqn):
        # A port that is free now can be taken a moment later: the target says so, and the next is tried.
        for _ in range(20):
            if self.port is None:
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", 0))
                    port = probe.getsockname()[1]
            else:
                port = self.port
            address = {"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": str(port)}
            try:
                self.rpc("nvmf_subsystem_add_listener", nqn=nqn, listen_address=address)
                self.port = port
                return
            except BenchError:
                if self.port is not None:
                    raise
        raise BenchError("no free port was found for the target")

    def rpc(self, method, **params):
        command = [self.binary, "rpc", "--socket", self.socket, method]
        done = subprocess.run(command + ([json.dumps(params)] if params else []), text=True, capture_output=True,
                              timeout=PATIENCE_S)
        if done.returncode != 0:
            raise BenchError(f"{method}: {done.stderr.strip()}")
        return json.loads(done.stdout)

    def busy(self):
        """Ticks that the reactors found work in, and those that they did not."""
        # Without a process of its own, which would be in the way of what is measured.
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE_S)
            connection.connect(self.socket)
            connection.sendall(b'{"jsonrpc": "2.0", "id": 1, "method": "framework_get_reactors"}')
            received = b""
            while True:
                received += connection.recv(1 << 16)
                try:
                    reactors = json.loads(received)["result"]["reactors"]
                    break
                except ValueError:
                    continue  # not all of the reply yet
        return sum(r["busy"] for r in reactors), sum(r["idle"] for r in reactors)

    def is_alive(self):
        return self.child.poll() is None

    def spread(self, bdev, queues):
        """Waits for so many I/O queues of hosts, and puts the first on the first reactor, the next on the next and so on."""
        self.rpc("framework_set_scheduler", name="static")
        deadline = time.monotonic() + START_TIMEOUT_S
        nqn = self.nqn(bdev)
        while len(found := [q for q in self.rpc("nvmf_subsystem_get_qpairs", nqn=nqn) if q["qid"] > 0]) < queues:
            if time.monotonic() > deadline:
                raise BenchError(f"{len(found)} of {queues} queues came about")
        groups = [group["name"] for group in self.rpc("nvmf_get_stats")["poll_groups"]]
        for number, queue in enumerate(found):
            to = groups[number % len(groups)]
            if queue["thread"] != to:
                self.rpc("nvmf_subsystem_move_qpair", nqn=nqn, cntlid=queue["cntlid"], qid=queue["qid"], thread=to)

    def close(self):
        end(self.child)
        self.log.close()


class Peer(Served):
    """Another target, which serves subsystems of the same names: one that somebody has started, or that this starts.

    It may poll, and so be in the way of what else is measured on its core. So its process, where it is known, is stopped
    while others are measured.
    """

    def __init__(self, options, name, folder):
        super().__init__(options.binary, options.load_core)
        self.name = name
        (self.host, self.port), self.pid = options.peer[name], options.peer_pid.get(name)
        self.command, self.core = options.peer_command.get(name), options.target_core
        self.log_path, self.child = Path(folder) / f"{name}.log", None

    def resume(self):
        if self.command and self.child is None:
            self._start()
        elif self.pid:
            self._signal(signal.SIGCONT)

    def pause(self):
        if self.pid:
            self._signal(signal.SIGSTOP)

    def _signal(self, word):
        try:
            os.killpg(self.pid, word) if self.child else os.kill(self.pid, word)
        except (ProcessLookupError, PermissionError) as error:
            raise BenchError(f"the peer {self.name}, process {self.pid}: {error.strerror}") from None

    def _start(self):
        with open(self.log_path, "ab") as log:
            self.child = subprocess.Popen(shlex.split(self.command), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                          start_new_session=True, preexec_fn=pin(self.core))
        self.pid = self.child.pid
        deadline = time.monotonic() + START_TIMEOUT_S
        look = [self.binary, "identify", *self.address("null")]
        while (done := subprocess.run(look, text=True, capture_output=True, timeout=PATIENCE_S)).returncode != 0:
            if self.child.poll() is not None or time.monotonic() > deadline:
                self.close()
                text = self.log_path.read_text(errors="replace")[-2000:]
                raise BenchError(f"the peer {self.name} does not serve {self.nqn('null')}: {done.stderr.strip()}\n{text}")
            time.sleep(0.1)

    def close(self):
        if self.child:
            end(self.child)
            self.child, self.pid = None, None
        elif self.pid:
            self._signal(signal.SIGCONT)
