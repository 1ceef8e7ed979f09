"""Ringstone inside the guest, for what the guest cannot reach from outside: RDMA over a software device."""

import json
import shlex

PROGRAM = "/opt/ringstone"
ADDRESS = "10.0.2.15"
STATE = "/run/inside"
SOCKET = f"{STATE}/rpc.sock"


class Inside:
    """A `ringstone serve` in the guest. Its volumes are memory, or files on a ram disk."""

    def __init__(self, t):
        self.t, self.job, self.starts = t, None, 0
        t.guest.install(t.target.binary, PROGRAM)
        t.sh(f"rm -rf {STATE}; mkdir -p {STATE}")

    def start(self, options="--empty"):
        """Starts it; with `options` empty again from its saved state."""
        self.starts += 1
        log = self.log_path = f"{STATE}/log.{self.starts}"
        self.job = self.t.guest.start(f"echo $$ >{STATE}/pid; exec {PROGRAM} serve --state-dir {STATE}/state "
                                      f"--rpc-socket {SOCKET} --cores 0,1 {options} >{log} 2>&1")
        self.t.eventually(f"{PROGRAM} rpc --socket {SOCKET} spdk_get_version >/dev/null 2>&1 || "
                          f"{{ cat {log}; false; }}", 240)

    def command(self, method, **params):
        return f"{PROGRAM} rpc --socket {SOCKET} {method} {shlex.quote(json.dumps(params))}"

    def rpc(self, method, **params):
        out = self.t.sh(self.command(method, **params), 240)
        return json.loads(out) if out.strip() else None

    def listener(self, nqn, port=4420, trtype="RDMA"):
        self.rpc("nvmf_subsystem_add_listener", nqn=nqn, listen_address={
            "trtype": trtype, "adrfam": "IPv4", "traddr": ADDRESS, "trsvcid": str(port)})

    def subsystem(self, nqn, port=4420):
        self.rpc("nvmf_create_subsystem", nqn=nqn, allow_any_host=True, serial_number="INSIDE01", max_namespaces=16)
        self.listener(nqn, port)

    def device(self):
        """The counters of the RDMA device, of all reactors together."""
        total = {}
        for group in self.rpc("nvmf_get_stats")["poll_groups"]:
            for transport in group["transports"]:
                for device in transport.get("devices", []):
                    for name, value in device.items():
                        total[name] = value if name == "name" else total.get(name, 0) + value
        return total

    def log(self):
        return self.t.sh(f"cat {STATE}/log.*")

    def kill(self):
        self.t.sh(f"kill -9 $(cat {STATE}/pid)")
        self.job.wait(check=False)

    def stop(self):
        """Ends it as a user does, which must succeed."""
        self.t.sh(f"kill $(cat {STATE}/pid)")
        result = self.job.wait(120, check=False)
        log = self.log()
        self.t.check(result.status == 0, f"the target in the guest ended with status {result.status}:\n{log[-3000:]}")
        self.t.check("panicked at" not in log, f"a thread of the target in the guest panicked:\n{log[-3000:]}")
