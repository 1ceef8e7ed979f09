"""The targets a test can run against, behind one interface.

`Ringstone` is a process on this machine, told what to do by JSON-RPC. `Nvmet` is the kernel's own target inside the
guest: a test that fails with both is at fault itself, one that fails with Ringstone alone has found something.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from .machine import HOST_ADDRESS
from .process import free_port, spawn, stop

FIRST_VOLUME_NQN = "nqn.2026-11.io.ringstone:vol0"
FIRST_VOLUME_MIB = 1024
START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 20
RPC_TIMEOUT_S = 60


class TargetError(Exception):
    """The target did not start, ended by itself, or refused an RPC that should succeed."""


class RpcError(TargetError):
    """A JSON-RPC error reply."""

    def __init__(self, method, error):
        super().__init__(f"{method}: {error.get('message')} (code {error.get('code')})")
        self.code = error.get("code")


class Ringstone:
    """A `ringstone serve` process with a state folder, a port and an RPC socket of its own."""

    name = "ringstone"
    address = HOST_ADDRESS
    # The address the target itself listens on and therefore reports in its discovery log.
    own_address = "127.0.0.1"

    def __init__(self, binary, folder):
        self.binary = binary
        self.folder = Path(folder)
        self.state = self.folder / "state"
        self.volumes = self.folder / "volumes"
        self.log_path = self.folder / "target.log"
        self.port = free_port()
        # Not in `folder`: a socket's path may be only 107 bytes long.
        self.scratch = tempfile.mkdtemp(prefix="ringstone-rpc-")
        self.socket = os.path.join(self.scratch, "rpc.sock")
        self.child = None

    def start(self, first_volume=False):
        """Starts serving. `first_volume`: as a new user does, with a volume made on first start; else empty and on
        several cores, of which the default leaves half to others."""
        self.volumes.mkdir(parents=True, exist_ok=True)
        if first_volume:
            self._serve("--listen", f"{self.own_address}:{self.port}")
        else:
            cores = sorted(os.sched_getaffinity(0))[:4]
            self._serve("--empty", "--cores", ",".join(map(str, cores)))
            self.rpc("nvmf_create_transport", trtype="TCP")

    def _serve(self, *options):
        command = [self.binary, "serve", "--state-dir", str(self.state), "--rpc-socket", self.socket, *options]
        with open(self.log_path, "ab") as log:
            log.write(f"--- {shlex.join(command)}\n".encode())
            log.flush()
            self.child = spawn(command, log)
        self._await_rpc()

    def _await_rpc(self):
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            if self.child.poll() is not None:
                raise TargetError(f"the target ended with status {self.child.returncode} at its start:\n{self.tail()}")
            try:
                self.rpc("spdk_get_version")
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise TargetError(f"no answer on the RPC socket within {START_TIMEOUT_S} s: {error}\n"
                                      f"{self.tail()}") from error
                time.sleep(0.02)  # between two tries of a condition that has a deadline

    def rpc(self, method, **params):
        """Calls a JSON-RPC method; its result."""
        request = {"jsonrpc": "2.0", "id": 1, "method": method}
        if params:
            request["params"] = params
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(RPC_TIMEOUT_S)
            connection.connect(self.socket)
            connection.sendall(json.dumps(request).encode())
            received = b""
            while True:
                data = connection.recv(1 << 16)
                if not data:
                    raise TargetError(f"{method}: the RPC connection was closed after {received!r}")
                received += data
                try:
                    reply = json.loads(received)
                    break
                except ValueError:
                    continue  # not all of the reply yet
        if "error" in reply:
            raise RpcError(method, reply["error"])
        return reply["result"]

    def rpc_command(self, *arguments):
        """Runs `ringstone rpc` as a user does: (status, stdout, stderr)."""
        done = subprocess.run([self.binary, "rpc", "--socket", self.socket, *arguments], text=True, timeout=RPC_TIMEOUT_S,
                              stdin=subprocess.DEVNULL, capture_output=True)
        return done.returncode, done.stdout, done.stderr

    def subsystem(self, nqn, any_host=True):
        self.rpc("nvmf_create_subsystem", nqn=nqn, allow_any_host=any_host, serial_number="GUEST0001", max_namespaces=16)
        self.rpc("nvmf_subsystem_add_listener", nqn=nqn, listen_address={
            "trtype": "TCP", "adrfam": "IPv4", "traddr": self.own_address, "trsvcid": str(self.port)})

    def volume_path(self, name):
        return self.volumes / name

    def volume(self, name, mib, kind="file", block_size=512):
        """Makes a block device of `mib` MiB: "file", "malloc" or "null"."""
        blocks = mib * (1 << 20) // block_size
        if kind == "file":
            with open(self.volume_path(name), "xb") as volume:
                volume.truncate(mib << 20)
            self.rpc("bdev_uring_create", name=name, filename=str(self.volume_path(name)), block_size=block_size)
        else:
            self.rpc(f"bdev_{kind}_create", name=name, num_blocks=blocks, block_size=block_size)

    def resize(self, name, mib):
        """Gives a file volume another size."""
        os.truncate(self.volume_path(name), mib << 20)
        self.rpc("bdev_uring_rescan", name=name)

    def allocated_bytes(self, name):
        """How much of a file volume takes up room, or None when that cannot be told."""
        return self.volume_path(name).stat().st_blocks * 512

    def add_namespace(self, nqn, volume, nsid):
        given = self.rpc("nvmf_subsystem_add_ns", nqn=nqn, namespace={"bdev_name": volume, "nsid": nsid})
        if given != nsid:
            raise TargetError(f"nvmf_subsystem_add_ns answered {given!r}, not {nsid}")

    def remove_namespace(self, nqn, nsid):
        self.rpc("nvmf_subsystem_remove_ns", nqn=nqn, nsid=nsid)

    def allow(self, nqn, hostnqn):
        self.rpc("nvmf_subsystem_add_host", nqn=nqn, host=hostnqn)

    def disallow(self, nqn, hostnqn):
        self.rpc("nvmf_subsystem_remove_host", nqn=nqn, host=hostnqn)

    def controllers(self, nqn):
        """(hostnqn, I/O queues) of each connected controller, sorted; None when the target cannot tell."""
        return sorted((found["hostnqn"], found["num_io_qpairs"])
                      for found in self.rpc("nvmf_subsystem_get_controllers", nqn=nqn))

    def crash(self):
        """kill -9."""
        self.child.kill()
        self.child.wait()

    def restart(self):
        """Starts again from the saved state."""
        self._serve()

    def pause(self):
        self.child.send_signal(signal.SIGSTOP)

    def resume(self):
        self.child.send_signal(signal.SIGCONT)

    def stop(self):
        """Stops it as a user does, which must succeed."""
        problem = self.finish()
        if problem:
            raise TargetError(problem)

    def finish(self):
        """Stops it as a user does. A sentence about what is wrong, or None."""
        if self.child is None:
            return None
        if self.child.poll() is not None:
            return f"the target had ended by itself with status {self.child.returncode}"
        self.child.terminate()
        try:
            self.child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"the target did not stop within {STOP_TIMEOUT_S} s of SIGTERM"
        if self.child.returncode != 0:
            return f"the target ended with status {self.child.returncode} after SIGTERM"
        if "panicked at" in self.log():
            return "a thread of the target panicked"
        return None

    def close(self):
        stop(self.child)
        shutil.rmtree(self.scratch, ignore_errors=True)

    def discard_volumes(self):
        """Removes what the test stored; its log stays."""
        shutil.rmtree(self.volumes, ignore_errors=True)
        shutil.rmtree(self.state, ignore_errors=True)

    def log(self):
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def tail(self):
        return "\n".join(self.log().splitlines()[-30:])


class Nvmet:
    """The kernel's target in the guest, on the guest's own loopback interface, set up through configfs.

    Volumes are files of an ext4 file system on a ram disk, which can punch holes and zero ranges.
    """

    name = "nvmet"
    address = own_address = "127.0.0.1"
    port = 4420
    _base = "/sys/kernel/config/nvmet"

    def __init__(self, guest, listen=address):
        """`listen` is where it listens: 0.0.0.0 for hosts outside of the guest, who find it at `guest.target_port` of this
        machine's loopback interface."""
        self.guest = guest
        self.listen = listen
        self.linked = []

    def start(self, first_volume=False):
        self.guest.sh(f"""
            set -e
            modprobe nvmet-tcp
            grep -q ' /sys/kernel/config ' /proc/mounts || mount -t configfs configfs /sys/kernel/config
            ram_disk
            mkdir {self._base}/ports/1
            cd {self._base}/ports/1
            echo tcp > addr_trtype; echo ipv4 > addr_adrfam
            echo {self.listen} > addr_traddr; echo {self.port} > addr_trsvcid""")
        if first_volume:
            self.volume("vol0", FIRST_VOLUME_MIB)
            self.subsystem(FIRST_VOLUME_NQN)
            self.add_namespace(FIRST_VOLUME_NQN, "vol0", 1)

    def subsystem(self, nqn, any_host=True):
        self.guest.sh(f"""
            set -e
            mkdir {self._base}/subsystems/{nqn}
            echo {int(any_host)} > {self._base}/subsystems/{nqn}/attr_allow_any_host""")
        self._link(nqn)
        self.linked.append(nqn)

    def _link(self, nqn):
        self.guest.sh(f"ln -s {self._base}/subsystems/{nqn} {self._base}/ports/1/subsystems/{nqn}")

    def volume(self, name, mib, kind="file", block_size=512):
        self.guest.sh(f"truncate -s {mib}M /srv/{name}")

    def resize(self, name, mib):
        self.guest.sh(f"""
            set -e
            truncate -s {mib}M /srv/{name}
            for namespace in {self._base}/subsystems/*/namespaces/*; do
                [ "$(cat $namespace/device_path)" != /srv/{name} ] || echo 1 > $namespace/revalidate_size
            done""")

    def allocated_bytes(self, name):
        return int(self.guest.sh(f"stat -c %b /srv/{name}")) * 512

    def add_namespace(self, nqn, volume, nsid):
        self.guest.sh(f"""
            set -e
            mkdir {self._base}/subsystems/{nqn}/namespaces/{nsid}
            cd {self._base}/subsystems/{nqn}/namespaces/{nsid}
            echo /srv/{volume} > device_path
            echo 1 > enable""")

    def remove_namespace(self, nqn, nsid):
        self.guest.sh(f"rmdir {self._base}/subsystems/{nqn}/namespaces/{nsid}")

    def allow(self, nqn, hostnqn):
        self.guest.sh(f"mkdir -p {self._base}/hosts/{hostnqn} && "
                      f"ln -s {self._base}/hosts/{hostnqn} {self._base}/subsystems/{nqn}/allowed_hosts/{hostnqn}")

    def disallow(self, nqn, hostnqn):
        self.guest.sh(f"rm {self._base}/subsystems/{nqn}/allowed_hosts/{hostnqn}")

    def controllers(self, nqn):
        return None

    def crash(self):
        """Drops every connection and stops listening, which is as near as a target in the kernel comes."""
        for nqn in self.linked:
            self.guest.sh(f"rm {self._base}/ports/1/subsystems/{nqn}")

    def restart(self):
        for nqn in self.linked:
            self._link(nqn)

    def finish(self):
        if not self.guest.run(f"[ -d {self._base}/ports/1 ]", check=False).status == 0:
            return None
        done = self.guest.run(f"""
            set -e
            cd {self._base}
            for link in ports/1/subsystems/*; do [ ! -L $link ] || rm $link; done
            for link in subsystems/*/allowed_hosts/*; do [ ! -L $link ] || rm $link; done
            for folder in subsystems/*/namespaces/* subsystems/* hosts/* ports/1; do
                [ ! -d $folder ] || rmdir $folder
            done
            for volume in /srv/*; do [ ! -f $volume ] || rm $volume; done""", check=False)
        return None if done.status == 0 else f"nvmet could not be taken down: {done}"

    def close(self):
        pass

    def discard_volumes(self):
        pass

    def log(self):
        return ""
