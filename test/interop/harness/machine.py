"""The guest machine: QEMU by software emulation, and scripts run in it with status, output and a deadline.

Hardware virtualisation is never used: the guest must behave the same on every machine, and nested virtualisation
is seen to hang. Scripts travel over a virtio serial port (see test/interop/guest/agent), so that they work whatever
the network does; any number can run at once. Whatever a script waits for has a deadline, after which it is killed.
"""

import base64
import functools
import http.server
import os
import re
import select
import shlex
import shutil
import socket
import subprocess
import tempfile
import textwrap
import threading
import time
from pathlib import Path

from .image import which
from .process import HarnessError, free_port, spawn, stop

BOOT_TIMEOUT_S = 300
# Without no_timer_check, a kernel that is emulated on a busy machine may see too few ticks of its timer at the start, and panic.
# tsc=reliable: it is emulated from one clock for all processors. Compared with another clock on a busy machine it looks unstable, the kernel
# then changes code that other processors run, and where that is emulated they die of it.
BOOT_OPTIONS = "console=ttyS0 quiet panic=1 oops=panic nowatchdog no_timer_check tsc=reliable"
# The guest reaches the loopback interface of the host at this address.
HOST_ADDRESS = "10.0.2.2"
# What the kernel prints when it has found itself broken; a test during which it does has failed.
KERNEL_TROUBLE = re.compile(r"(BUG: .*|Oops: .*|WARNING: CPU: .*|general protection fault.*|Kernel panic.*|"
                            r"INFO: task .* blocked for more than.*|refcount_t: .*)")


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a word."""

    def log_message(self, *_):
        pass


class GuestError(Exception):
    """A script in the guest failed, ran out of time, or the guest is gone."""


class Result:
    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out, err

    def __str__(self):
        text = "\n".join(part.strip()[-3000:] for part in (self.out, self.err) if part.strip())
        return f"status {self.status}\n{text}" if text else f"status {self.status}, no output"


class Job:
    """A script running in the guest."""

    def __init__(self, guest, number, script):
        self.guest, self.number, self.script = guest, number, script
        self.result = None
        self.started = time.monotonic()

    @property
    def ended(self):
        with self.guest.changed:
            return self.result is not None

    def wait(self, timeout_s=120, check=True):
        """Its Result. Past the deadline the script is killed and GuestError raised; so it is for a status other
        than 0, unless `check` is off."""
        deadline = time.monotonic() + timeout_s
        with self.guest.changed:
            while self.result is None and self.guest.alive:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self.guest.changed.wait(left)
            result, alive = self.result, self.guest.alive
        if result is None:
            if alive:
                self.kill()
                raise GuestError(f"still running after {timeout_s} s:\n{self.script}")
            raise GuestError(f"the guest ended during:\n{self.script}")
        if check and result.status != 0:
            raise GuestError(f"{result}\nfrom:\n{textwrap.dedent(self.script)}")
        return result

    def kill(self):
        """Kills the script and all it started; a process stuck in the kernel stays."""
        self.guest.start(f"kill -9 -$(cat /run/job/{self.number}.pid)")


class Guest:
    """A booted guest. Use as a context manager: leaving it ends QEMU."""

    def __init__(self, image, folder, processors, memory_mib):
        """Boots; console.log, qemu.log and scripts.log are written to `folder`."""
        self.booted = time.monotonic()
        self.scripts_path = Path(folder) / "scripts.log"
        self.image = image
        self.console_path = Path(folder) / "console.log"
        self.qemu_log_path = Path(folder) / "qemu.log"
        self.changed = threading.Condition()
        self.alive = True
        self.jobs = {}
        self.numbers = 0
        self.qemu = None
        self.port = None
        # What listens on port 4420 of the guest is reached here from this machine, and from nowhere else.
        self.target_port = free_port()
        self.reader = None
        try:
            self._boot(processors, memory_mib)
        except BaseException:
            self.close()
            raise

    def _boot(self, processors, memory_mib):
        with tempfile.TemporaryDirectory(prefix="ringstone-guest-") as scratch:
            path = os.path.join(scratch, "agent")
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path)
            listener.listen(1)
            command = [
                which("qemu-system-x86_64"), "-accel", "tcg,thread=multi", "-cpu", "max",
                "-smp", str(processors), "-m", str(memory_mib), "-nodefaults", "-display", "none", "-no-reboot",
                "-kernel", str(self.image.kernel), "-initrd", str(self.image.initrd),
                "-append", BOOT_OPTIONS,
                "-chardev", f"file,id=console,path={self.console_path}", "-serial", "chardev:console",
                "-device", "virtio-serial-pci",
                "-chardev", f"socket,id=agent,path={path},server=off", "-device", "virtserialport,chardev=agent,name=agent",
                "-nic", f"user,model=virtio-net-pci,hostfwd=tcp:127.0.0.1:{self.target_port}-10.0.2.15:4420",
            ]
            self.console_path.touch()
            with open(self.qemu_log_path, "wb") as log:
                self.qemu = spawn(command, log)
            deadline = time.monotonic() + BOOT_TIMEOUT_S
            while self.port is None:
                if select.select([listener], [], [], 0.1)[0]:
                    self.port = listener.accept()[0]
                self._still_booting(deadline)
            listener.close()
        self._await_ready(deadline)
        self.reader = threading.Thread(target=self._read_replies, daemon=True)
        self.reader.start()

    def _still_booting(self, deadline):
        if self.qemu.poll() is not None:
            raise HarnessError(f"QEMU ended with status {self.qemu.returncode} while the guest booted:\n"
                               f"{self.qemu_log_path.read_text(errors='replace')[-2000:]}\n{self.console()[-2000:]}")
        if time.monotonic() > deadline:
            raise HarnessError(f"the guest did not boot within {BOOT_TIMEOUT_S} s:\n{self.console()[-2000:]}")

    def _await_ready(self, deadline):
        self.port.settimeout(0.2)
        greeting = b""
        while not greeting.endswith(b"\n"):
            self._still_booting(deadline)
            try:
                greeting += self.port.recv(1)
            except TimeoutError:
                continue
        if greeting != b"ready\n":
            raise HarnessError(f"the agent in the guest greeted with {greeting!r}")
        self.port.settimeout(None)

    def _read_replies(self):
        pending = b""
        while True:
            try:
                data = self.port.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                break
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                number, status, out, err = line.split()
                text = [base64.b64decode(field[2:]).decode(errors="replace") for field in (out, err)]
                self._ended(int(number), Result(int(status), *text))
        with self.changed:
            self.alive = False
            self.changed.notify_all()

    def _ended(self, number, result):
        """Files the result of a script and tells who waits for it."""
        with self.changed:
            job = self.jobs.pop(number)
            job.result = result
            self.changed.notify_all()
        with open(self.scripts_path, "a", encoding="utf-8") as log:
            log.write(f"--- began {job.started - self.booted:.1f} s after power-on, took "
                      f"{time.monotonic() - job.started:.1f} s, {result}\n{textwrap.dedent(job.script).strip()}\n")

    def start(self, script):
        """Starts a shell script in the guest; a Job."""
        with self.changed:
            if not self.alive:
                raise GuestError("the guest is not running")
            self.numbers += 1
            job = self.jobs[self.numbers] = Job(self, self.numbers, script)
            try:
                self.port.sendall(b"%d %s\n" % (job.number, base64.b64encode(script.encode())))
            except OSError as error:
                self.alive = False
                raise GuestError(f"the guest is not running: {error}") from error
        return job

    def run(self, script, timeout_s=120, check=True):
        """Runs a shell script to its end; its Result."""
        return self.start(script).wait(timeout_s, check)

    def sh(self, script, timeout_s=120):
        """Runs a shell script that must succeed; its standard output without the final newline."""
        return self.run(script, timeout_s).out.rstrip("\n")

    def eventually(self, condition, timeout_s=120):
        """Waits until a shell condition holds; GuestError with `condition`'s last output when it does not in time."""
        script = f"until {{ {condition}\n}} >/tmp/eventually.$$ 2>&1; do usleep 100000; done; rm /tmp/eventually.$$"
        job = self.start(script)
        try:
            job.wait(timeout_s)
        except GuestError as error:
            if self.alive and job.result is None:
                last = self.run(condition, check=False)
                raise GuestError(f"did not come true within {timeout_s} s: {condition}\nlast seen: {last}") from error
            raise

    def write_file(self, path, text):
        self.sh(f"printf %s {shlex.quote(text)} > {shlex.quote(path)}")

    def install(self, program, path):
        """Copies a program of this machine into the guest, without what is only there for debugging."""
        with tempfile.TemporaryDirectory(prefix="ringstone-guest-") as folder:
            shutil.copy(program, os.path.join(folder, "program"))
            if shutil.which("strip"):
                subprocess.run(["strip", os.path.join(folder, "program")], check=True)
            handler = functools.partial(Quiet, directory=folder)
            with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
                threading.Thread(target=server.serve_forever, daemon=True).start()
                try:
                    # Over the loopback interface of this machine, as everything between the two.
                    url = f"http://{HOST_ADDRESS}:{server.server_address[1]}/program"
                    # Renamed, as one that runs cannot be written to.
                    self.sh(f"mkdir -p $(dirname {path}); wget -q -O {path}.new {url} && chmod +x {path}.new && "
                            f"mv -f {path}.new {path}", 600)
                finally:
                    server.shutdown()

    def mark(self, text):
        """Writes a line to the kernel's log, and with it to the console's."""
        self.sh(f"echo {shlex.quote('harness: ' + text)} > /dev/kmsg")

    def console(self):
        """All the guest's console has shown."""
        return self.console_path.read_text(errors="replace").replace("\r\n", "\n")

    def trouble(self, since=0):
        """What the kernel complained of on the console after the first `since` characters."""
        return KERNEL_TROUBLE.findall(self.console()[since:])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        with self.changed:
            self.alive = False
            self.changed.notify_all()
        stop(self.qemu)
        if self.port is not None:
            self.port.close()
        if self.reader is not None:
            self.reader.join()
