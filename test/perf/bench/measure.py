"""Runs one case once: a number, and which side was at its limit."""

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

START_TIMEOUT_S = 30
# A run may take this much longer than it measures.
PATIENCE_S = 60
# A side that found work at this share of its time had none left.
SATURATED = 0.9
WARMUP_S = 0.3
MALLOC_BYTES = 512 << 20
NULL_BYTES = 100 << 30
FILE_BYTES = 1 << 30
IDLE_SETTLE_S = 2.0
IDLE_S = 5.0


class BenchError(Exception):
    """A case cannot be measured. Its words are for the user."""


def run_json(command, seconds):
    done = subprocess.run(command, text=True, capture_output=True, timeout=seconds + PATIENCE_S)
    if done.returncode != 0:
        raise BenchError(f"{' '.join(map(str, command))}\nended with status {done.returncode}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mib(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise BenchError(f"process {pid} has no VmRSS")


class Target:
    """A `ringstone serve` with one subsystem a volume, on one core."""

    def __init__(self, binary, core, folder):
        self.binary, self.folder = binary, Path(folder)
        self.socket = str(self.folder / "rpc.sock")
        self.log = open(self.folder / "target.log", "ab")
        self.child = subprocess.Popen(
            [binary, "serve", "--empty", "--state-dir", str(self.folder / "state"), "--rpc-socket", self.socket, "--cores",
             str(core)], stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        self.port = None
        try:
            self._set_up()
        except BaseException:
            self.close()
            raise

    def _set_up(self):
        deadline = time.monotonic() + START_TIMEOUT_S
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

    @staticmethod
    def nqn(bdev):
        return f"nqn.2026-11.io.ringstone:bench-{bdev}"

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

    def close(self):
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
            try:
                self.child.wait(10)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()
        self.log.close()


class Bench:
    """Everything the cases need, made once and removed at the end."""

    def __init__(self, options):
        self.options = options
        self.folder = Path(tempfile.mkdtemp(prefix="ringstone-bench-"))
        self.memory = Path(tempfile.mkdtemp(prefix="ringstone-bench-", dir="/dev/shm"))
        self.target = None

    def close(self):
        if self.target:
            self.target.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.memory, ignore_errors=True)

    def served(self):
        if self.target is None:
            self.target = Target(self.options.binary, self.options.target_core, self.folder)
        return self.target

    def measure(self, case):
        """The number, and a word for what was at its limit or None."""
        return getattr(self, f"_{case.kind}")(**case.options)

    def _connect_options(self, bdev):
        target = self.served()
        return ["--traddr", "127.0.0.1", "--trsvcid", str(target.port), "--subnqn", target.nqn(bdev)]

    def _perf(self, bdev, rw, bs, qd, queues, digests):
        target, seconds = self.served(), self.options.seconds
        command = [self.options.binary, "perf", *self._connect_options(bdev), "--rw", rw, "--bs", str(bs), "--qd",
                   str(max(1, qd // queues)), "--queues", str(queues), "--time", str(seconds), "--warmup", str(WARMUP_S), "--core",
                   str(self.options.load_core), "--json"]
        if digests:
            command += ["--hdr-digest", "--data-digest"]
        with subprocess.Popen(command, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE) as load:
            # From the middle of the run: its start and its end are not what is asked about.
            time.sleep(WARMUP_S + 0.2 * seconds)
            before = target.busy()
            time.sleep(0.6 * seconds)
            after = target.busy()
            try:
                out, err = load.communicate(timeout=seconds + PATIENCE_S)
            finally:
                load.kill()
        if load.returncode != 0:
            raise BenchError(f"{' '.join(command)}\nended with status {load.returncode}: {err.strip()}")
        found = json.loads(out)
        if found["errors"]:
            raise BenchError(f"{found['errors']} commands failed: {' '.join(command)}")
        busy, idle = after[0] - before[0], after[1] - before[1]
        return found["iops"], limit(busy / max(1, busy + idle), found.get("busy")), found

    def _ceiling(self, mode, bs, qd, memory):
        command = [self.options.ceiling, "--mode", mode, "--bs", str(bs), "--qd", str(qd), "--memory", str(memory), "--time",
                   str(self.options.seconds), "--target-core", str(self.options.target_core), "--load-core",
                   str(self.options.load_core)]
        return run_json(command, self.options.seconds)["iops"], None, None

    def file(self, where):
        path = (self.memory if where == "memory" else Path(self.options.disk or self.folder)) / f"bench-{os.getpid()}.img"
        if not path.exists():
            # Written, so that reads read: a hole costs nothing.
            with open(path, "wb") as image:
                for _ in range(FILE_BYTES >> 20):
                    image.write(os.urandom(1 << 20))
                image.flush()
                os.fsync(image.fileno())
        return path

    def _config(self, bdev):
        calls = {
            "null": [("bdev_null_create", {"name": "null", "num_blocks": NULL_BYTES // 4096, "block_size": 4096})],
            "malloc": [("bdev_malloc_create", {"name": "malloc", "num_blocks": MALLOC_BYTES // 4096, "block_size": 4096})],
        }
        calls["passthru"] = calls["null"] + [("bdev_passthru_create", {"name": "passthru", "base_bdev_name": "null"})]
        if bdev in ("disk", "memory"):
            calls[bdev] = [("bdev_uring_create", {"name": bdev, "filename": str(self.file(bdev)), "block_size": 4096})]
        path = self.folder / f"{bdev}.json"
        config = [{"method": method, "params": params} for method, params in calls[bdev]]
        path.write_text(json.dumps({"subsystems": [{"subsystem": "bdev", "config": config}]}))
        return str(path)

    def _bdevperf(self, bdev, rw, bs, qd, where=None):
        seconds = self.options.seconds
        command = [self.options.binary, "bdevperf", "--config", self._config(bdev), "--bdev", bdev, "--rw", rw, "--bs", str(bs),
                   "--qd", str(qd), "--time", str(seconds), "--warmup", str(WARMUP_S), "--core", str(self.options.target_core), "--json"]
        found = run_json(command, seconds)
        if found["errors"]:
            raise BenchError(f"{found['errors']} operations failed: {' '.join(command)}")
        return found["iops"], None, found

    def _fio(self, where, rw, bs, qd):
        if shutil.which("fio") is None:
            raise BenchError("fio is not installed")
        seconds, path = self.options.seconds, self.file(where)
        direct = 0 if where == "memory" else 1
        batch = max(1, qd // 2)
        command = ["fio", "--name=bench", f"--filename={path}", f"--rw={rw}", f"--bs={bs}", f"--iodepth={qd}",
                   f"--iodepth_batch_submit={batch}", "--iodepth_batch_complete_min=1", f"--iodepth_batch_complete_max={qd}",
                   "--ioengine=io_uring", "--registerfiles=1", "--fixedbufs=1", f"--direct={direct}", "--time_based",
                   f"--runtime={round(seconds * 1000)}ms", f"--ramp_time={round(WARMUP_S * 1000)}ms", "--norandommap", "--randrepeat=0",
                   f"--cpus_allowed={self.options.target_core}", "--output-format=json"]
        job = run_json(command, seconds)["jobs"][0]
        side = "read" if "read" in rw else "write"
        return job[side]["iops"], None, None

    def _idle(self, hosts, what):
        target, hosts_there = self.served(), []
        try:
            for _ in range(hosts):
                # One command a second: the hosts are there, with their keep-alives, and ask for next to nothing.
                command = [self.options.binary, "perf", *self._connect_options("null"), "--rw", "randread", "--qd", "1",
                           "--time", str(IDLE_SETTLE_S + IDLE_S + 30), "--warmup", "0", "--rate", "1"]
                hosts_there.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                                    stderr=self.target.log))
            time.sleep(IDLE_SETTLE_S)
            for host in hosts_there:
                if host.poll() is not None:
                    raise BenchError("a host that should stay connected ended; its words are in the target's log")
            if what == "rss":
                return rss_mib(target.child.pid), None, None
            before, start = cpu_seconds(target.child.pid), time.monotonic()
            time.sleep(IDLE_S)
            return 100 * (cpu_seconds(target.child.pid) - before) / (time.monotonic() - start), None, None
        finally:
            for host in hosts_there:
                host.kill()
                host.wait()


def limit(target, load):
    """Which side had no time left."""
    if target >= SATURATED:
        return "both" if load is not None and load >= SATURATED else "target"
    if load is not None and load >= SATURATED:
        return "load"
    return "latency"
