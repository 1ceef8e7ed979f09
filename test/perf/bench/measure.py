"""Runs one case once: a number, which side was at its limit, and what else is known of the run."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from .process import PATIENCE_S, BenchError, cpu_seconds, huge_mib, pin, rss_mib, run_json
from .targets import MALLOC_BYTES, NULL_BYTES, Peer, Target

# A side that found work at this share of its time had none left.
SATURATED = 0.9
WARMUP_S = 0.3
FILE_BYTES = 1 << 30
IDLE_SETTLE_S = 2.0
IDLE_S = 5.0
# A load at a rate that came no nearer to it than this has measured something else.
HELD = 0.97
# How often something is measured again because the cores were far apart, and how long until then.
NEAR_TRIES = 6
NEAR_PAUSE_S = 0.3
# Families that cores far apart do not change.
ANYWHERE = ("layer", "files", "idle")
# Queues of one host in a crowd: what targets usually give.
CROWD_QUEUES = 125


class Bench:
    """Everything the cases need, made once and removed at the end."""

    def __init__(self, options):
        self.options = options
        self.folder = Path(tempfile.mkdtemp(prefix="ringstone-bench-"))
        self.memory = Path(tempfile.mkdtemp(prefix="ringstone-bench-", dir="/dev/shm"))
        # By how their reactors poll, where that is not the default.
        self.targets = {}
        # Measurements that were made with the cores far apart, after all.
        self.far = 0
        self.peers = {name: Peer(options, name, self.folder) for name in options.peer}
        for peer in self.peers.values():
            peer.pause()

    def close(self):
        for served in [*self.targets.values(), *self.peers.values()]:
            served.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.memory, ignore_errors=True)

    def _is_near(self):
        command = [self.options.ceiling, "--distance", "--target-core", str(self.options.target_core), "--load-core",
                   str(self.options.load_core)]
        return run_json(command, 1)["distance_ns"] <= self.options.near

    def measure_near(self, case):
        """Measures a case; again if the cores turn out to have been farther apart than --near, before or afterwards."""
        if not self.options.near or case.family in ANYWHERE:
            return self.measure(case)
        for _ in range(NEAR_TRIES):
            if self._is_near():
                found = self.measure(case)
                if self._is_near():
                    return found
            time.sleep(NEAR_PAUSE_S)
        self.far += 1
        return self.measure(case)

    @contextlib.contextmanager
    def serving(self, peer, bdev=None, poll=None):
        """The target to measure, and nothing else on its core."""
        if peer:
            served = self.peers[peer]
        else:
            if poll in self.targets and not self.targets[poll].is_alive():
                # Its end was the failure of another case.
                self.targets.pop(poll).close()
            if poll not in self.targets:
                folder = tempfile.mkdtemp(dir=self.folder)
                self.targets[poll] = Target(self.options.binary, self.options.target_core, self.options.load_core, folder, poll)
            served = self.targets[poll]
        served.resume()
        try:
            if bdev == "malloc":
                served.fill()
            yield served
        finally:
            served.pause()

    @contextlib.contextmanager
    def serving_anew(self, peer):
        """As `serving`, without what other cases have left in the target's memory; a peer has what it has."""
        if peer:
            with self.serving(peer) as served:
                yield served
            return
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            target = Target(self.options.binary, self.options.target_core, self.options.load_core, folder)
            with contextlib.closing(target):
                yield target

    def measure(self, case):
        """The number, a word for what was at its limit or None, and the load's report or None."""
        try:
            return getattr(self, f"_{case.kind}")(**case.options)
        except (OSError, subprocess.SubprocessError, ValueError, LookupError) as error:
            raise BenchError(f"{type(error).__name__}: {error}") from error

    def _load(self, served, bdev, rw, bs, qd, seconds, queues=1, digests=False, more=(), core=None):
        """A load that is pinned to its core, not yet started."""
        core = self.options.load_core if core is None else core
        command = [self.options.binary, "perf", *served.address(bdev), "--rw", rw, "--bs", str(bs), "--qd", str(qd), "--queues",
                   str(queues), "--time", str(seconds), "--warmup", str(WARMUP_S), "--core", str(core), "--json", *more]
        return command + (["--hdr-digest", "--data-digest"] if digests else [])

    def _run(self, served, command, seconds):
        """Runs a load; its report, and what the target did in its middle: the share of time with work, and CPU seconds a
        second, where they are known."""
        with subprocess.Popen(command, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE) as load:
            try:
                # From the middle of the run: its start and its end are not what is asked about.
                time.sleep(WARMUP_S + 0.2 * seconds)
                before, cpu, start = served.busy(), served.pid and cpu_seconds(served.pid), time.monotonic()
                time.sleep(0.6 * seconds)
                after, took = served.busy(), time.monotonic() - start
                cpu = served.pid and (cpu_seconds(served.pid) - cpu) / took
                out, err = load.communicate(timeout=seconds + PATIENCE_S)
            finally:
                load.kill()
        if load.returncode != 0:
            raise BenchError(f"{' '.join(command)}\nended with status {load.returncode}: {err.strip()}")
        found = json.loads(out)
        if found["errors"]:
            raise BenchError(f"{found['errors']} commands failed: {' '.join(command)}")
        share = None
        if before and after:
            busy, idle = after[0] - before[0], after[1] - before[1]
            share = busy / max(1, busy + idle)
        return found, share, cpu

    def _perf(self, bdev, rw, bs, qd, queues, digests, peer=None):
        with self.serving(peer, bdev) as served:
            command = self._load(served, bdev, rw, bs, max(1, qd // queues), self.options.seconds, queues, digests)
            found, share, _ = self._run(served, command, self.options.seconds)
            return found["iops"], limit(share, found.get("busy")), found

    def _cpu_at_rate(self, rw, rate, what, poll=None, peer=None):
        """CPU time of the target for one command, or the median of what one takes, while commands come at a rate that it can
        hold."""
        with self.serving(peer, poll=poll) as served:
            if what == "cpu" and served.pid is None:
                raise BenchError(f"the process of {served.name} is not known: name it with --peer-pid")
            seconds = self.options.seconds
            command = self._load(served, "null", rw, 4096, 128, seconds, more=["--rate", str(rate)])
            found, share, cpu = self._run(served, command, seconds)
            if found["iops"] < HELD * rate:
                done = f"only {found['iops']:.0f} of {rate} commands a second were done"
                raise BenchError(f"{done}: this machine is too slow or too busy")
            return cpu / found["iops"] * 1e6 if what == "cpu" else found["percentiles_us"]["50"], None, found

    def _wake(self, rate, peer=None):
        """How long a command takes that finds the target asleep."""
        with self.serving(peer) as served:
            # Some hundred of them.
            seconds = max(self.options.seconds, 200 / rate)
            command = self._load(served, "null", "randread", 4096, 1, seconds, more=["--rate", str(rate)])
            found, _, _ = self._run(served, command, seconds)
            return found["percentiles_us"]["50"], None, found

    def _fairness(self, queues, qd, rw, peer=None):
        """How far the connection with the fewest and the one with the most commands are apart, % of their mean."""
        with self.serving(peer) as served:
            seconds = max(self.options.seconds, 1.0)
            command = self._load(served, "null", rw, 4096, qd, seconds, queues)
            found, share, _ = self._run(served, command, seconds)
            each = found["commands_by_queue"]
            if len(each) < queues:
                raise BenchError(f"{served.name} gives {len(each)} queues to a host, and {queues} are asked for")
            return 100 * (max(each) - min(each)) / (sum(each) / len(each)), limit(share, found.get("busy")), found

    def _scaling(self, rw, what):
        """CPU time for one command of targets that two hosts load as much as they can, or how many times what one reactor does two
        would do by that.

        Two reactors and two loads share two cores, so what is done in a second says nothing: a reactor has a core half of the time.
        CPU time does, as far as no target spends any in looking for work: they sleep at once. Two processes of one reactor are
        loaded in the same way and share nothing, so what two reactors of one process need more is what they cost each other."""
        one, other = self.options.target_core, self.options.load_core
        if what == "times":
            # The two one after the other, so that their ratio is of one moment.
            return 2 * self._scaling(rw, "apart")[0] / self._scaling(rw, "two")[0], None, None
        cores = {"one": [str(one)], "apart": [str(one), str(other)], "two": [f"{one},{other}"]}[what]
        with contextlib.ExitStack() as stack:
            targets = []
            for each in cores:
                folder = stack.enter_context(tempfile.TemporaryDirectory(dir=self.folder))
                target = Target(self.options.binary, each, other, folder, "sleep")
                targets.append(stack.enter_context(contextlib.closing(target)))
                target.fill()
            # Whoever is served on one core asks on the other.
            hosts = [(targets[0], other), (targets[-1], one if what != "one" else other)]
            return self._two_hosts(targets, hosts, rw), None, None

    def _two_hosts(self, targets, hosts, rw):
        """CPU seconds of the targets for a command, in microseconds."""
        seconds = max(self.options.seconds, 1.0)
        with contextlib.ExitStack() as stack:
            loads = []
            for target, core in hosts:
                # Until it is stopped, however long all this takes.
                command = self._load(target, "malloc", rw, 4096, 128, seconds + PATIENCE_S, core=core)
                loads.append(subprocess.Popen(command, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                              stderr=subprocess.PIPE))
                stack.callback(_kill, loads[-1])
                # One after the other, so that it is known which host is whose.
                target.spread("malloc", len(loads) if len(targets) == 1 else 1)
            time.sleep(WARMUP_S)
            start, before = time.monotonic(), [self._work(target) for target in targets]
            time.sleep(seconds)
            after, took = [self._work(target) for target in targets], time.monotonic() - start
            for load in loads:
                if load.poll() is not None:
                    raise BenchError(f"a load ended within {took:.1f} s: {load.stderr.read().strip()}")
                load.send_signal(signal.SIGINT)
                out, err = load.communicate(timeout=PATIENCE_S)
                if json.loads(out)["errors"]:
                    raise BenchError(f"commands failed: {err.strip()}")
        commands = sum(now[0] - then[0] for then, now in zip(before, after))
        cpu = sum(now[1] - then[1] for then, now in zip(before, after))
        if commands <= 0:
            raise BenchError("no command was done")
        return cpu / commands * 1e6

    @staticmethod
    def _work(target):
        """Commands that a target has completed, and CPU seconds that it has taken."""
        groups = target.rpc("nvmf_get_stats")["poll_groups"]
        return sum(group["completed_nvme_io"] for group in groups), cpu_seconds(target.pid)

    def _ceiling(self, mode, bs, qd, memory):
        command = [self.options.ceiling, "--mode", mode, "--bs", str(bs), "--qd", str(qd), "--memory", str(memory), "--time",
                   str(self.options.seconds), "--target-core", str(self.options.target_core), "--load-core",
                   str(self.options.load_core)]
        return run_json(command, self.options.seconds)["iops"], None, None

    def _bare_wake(self, rate):
        """How long a request takes over bare sockets that finds the other side asleep."""
        command = [self.options.ceiling, "--rate", str(rate), "--time", str(max(self.options.seconds, 200 / rate)), "--target-core",
                   str(self.options.target_core), "--load-core", str(self.options.load_core)]
        return run_json(command, max(self.options.seconds, 200 / rate))["median_us"], None, None

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
        # A mirror of two that cost nothing, beside one of them.
        twin = ("bdev_null_create", {"name": "twin", "num_blocks": NULL_BYTES // 4096, "block_size": 4096})
        mirror = {"name": "raid1", "raid_level": "raid1", "base_bdevs": ["null", "twin"]}
        calls["raid1"] = calls["null"] + [twin, ("bdev_raid_create", mirror)]
        if bdev in ("disk", "memory"):
            calls[bdev] = [("bdev_uring_create", {"name": bdev, "filename": str(self.file(bdev)), "block_size": 4096})]
        path = self.folder / f"{bdev}.json"
        config = [{"method": method, "params": params} for method, params in calls[bdev]]
        path.write_text(json.dumps({"subsystems": [{"subsystem": "bdev", "config": config}]}))
        return str(path)

    def _bdevperf(self, bdev, rw, bs, qd, where=None, peer=None):
        seconds = self.options.seconds
        if peer:
            core = self.options.target_core
            words = {"config": self._config(bdev), "bdev": bdev, "rw": rw, "bs": bs, "qd": qd, "seconds": max(1, round(seconds)),
                     "core": core, "mask": hex(1 << core)}
            command = shlex.split(self.options.peer_local[peer].format(**words))
            done = subprocess.run(command, text=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=seconds + PATIENCE_S)
            if done.returncode != 0:
                raise BenchError(f"{' '.join(command)}\nended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
            return told_iops(done.stdout + done.stderr), None, None
        command = [self.options.binary, "bdevperf", "--config", self._config(bdev), "--bdev", bdev, "--rw", rw, "--bs", str(bs),
                   "--qd", str(qd), "--time", str(seconds), "--warmup", str(WARMUP_S), "--core",
                   str(self.options.target_core), "--json"]
        if bdev == "malloc":
            command.append("--fill")
        found = run_json(command, seconds)
        if found["errors"]:
            raise BenchError(f"{found['errors']} operations failed: {' '.join(command)}")
        return found["iops"], None, found

    def _fio(self, where, rw, bs, qd):
        if shutil.which("fio") is None:
            raise BenchError("fio is not installed: install the package fio")
        seconds, path = self.options.seconds, self.file(where)
        direct = 0 if where == "memory" else 1
        batch = max(1, qd // 2)
        command = ["fio", "--name=bench", f"--filename={path}", f"--rw={rw}", f"--bs={bs}", f"--iodepth={qd}",
                   f"--iodepth_batch_submit={batch}", "--iodepth_batch_complete_min=1", f"--iodepth_batch_complete_max={qd}",
                   "--ioengine=io_uring", "--registerfiles=1", "--fixedbufs=1", f"--direct={direct}", "--time_based",
                   f"--runtime={round(seconds * 1000)}ms", f"--ramp_time={round(WARMUP_S * 1000)}ms", "--norandommap",
                   "--randrepeat=0", f"--cpus_allowed={self.options.target_core}", "--output-format=json"]
        job = run_json(command, seconds)["jobs"][0]
        side = "read" if "read" in rw else "write"
        return job[side]["iops"], None, None

    def _idle(self, connections, what, peer=None):
        """What a target costs that has so many connections and is asked for nothing."""
        with self.serving_anew(peer) as served, contextlib.ExitStack() as hosts:
            if served.pid is None:
                raise BenchError(f"the process of {served.name} is not known: name it with --peer-pid")
            there = []
            for first in range(0, connections, CROWD_QUEUES if connections > 8 else 1):
                queues = min(connections - first, CROWD_QUEUES) if connections > 8 else 1
                # One command in ten seconds: the hosts are there, with their keep-alives, and ask for next to nothing.
                command = self._load(served, "null", "randread", 4096, 1, IDLE_SETTLE_S + IDLE_S + 60, queues,
                                     more=["--rate", "0.1"])
                host = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                        preexec_fn=pin(self.options.load_core))
                hosts.callback(_kill, host)
                there.append(host)
            self._wait_for_connections(served, there, connections)
            time.sleep(IDLE_SETTLE_S)
            if what == "rss":
                return rss_mib(served.pid) + huge_mib(served.pid), None, None
            before, start = cpu_seconds(served.pid), time.monotonic()
            time.sleep(IDLE_S)
            value = 100 * (cpu_seconds(served.pid) - before) / (time.monotonic() - start)
            for host in there:
                if host.poll() is not None:
                    raise BenchError(f"a host that should stay connected ended: {host.stderr.read().decode().strip()}")
            return value, None, None

    @staticmethod
    def _wait_for_connections(served, hosts, connections):
        deadline = time.monotonic() + PATIENCE_S
        # Each host has its admin queue beside them.
        while connected(served.port) < connections + len(hosts):
            for host in hosts:
                if host.poll() is not None:
                    raise BenchError(f"a host cannot connect: {host.stderr.read().decode().strip()}")
            if time.monotonic() > deadline:
                raise BenchError(f"{connected(served.port)} of {connections + len(hosts)} connections came about")
            time.sleep(0.1)


def told_iops(text):
    """What a program says that it did in a second: as JSON with the key iops, or in the line of a table that begins with Total."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return float(json.loads(text)["iops"])
    found = re.findall(r"^\W*Total\W+([\d.]+)", text, re.MULTILINE)
    if not found:
        raise BenchError(f"nothing there tells a number of operations: {text.strip()[-500:]}")
    return float(found[-1])


def _kill(child):
    child.kill()
    child.communicate()


def connected(port):
    """Connections that are established to a port of this machine."""
    found = 0
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(table).read_text().splitlines()[1:]:
                local, state = line.split()[1], line.split()[3]
                found += state == "01" and int(local.rsplit(":", 1)[1], 16) == port
    return found


def limit(target, load):
    """Which side had no time left; `None` where the target does not tell and the load had some."""
    if target is not None and target >= SATURATED:
        return "both" if load is not None and load >= SATURATED else "target"
    if load is not None and load >= SATURATED:
        return "load"
    return None if target is None else "latency"
