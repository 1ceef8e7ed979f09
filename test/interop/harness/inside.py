"""Ringstone inside the guest, for what the guest cannot reach from outside: RDMA over a software device."""

import json
import re
import shlex

PROGRAM = "/opt/ringstone"
PORT = 4420
ADDRESS = "10.0.2.15"


class Inside:
    """A `ringstone serve` in the guest. Its volumes are memory, or files on a ram disk. Several have names."""

    def __init__(self, t, name="inside", cores="0,1"):
        self.t, self.job, self.starts, self.cores = t, None, 0, cores
        self.state = f"/run/{name}"
        self.socket = f"{self.state}/rpc.sock"
        t.guest.install(t.target.binary, PROGRAM)
        t.sh(f"rm -rf {self.state}; mkdir -p {self.state}")

    def start(self, options="--empty"):
        """Starts it; with `options` empty again from its saved state."""
        self.starts += 1
        log = self.log_path = f"{self.state}/log.{self.starts}"
        self.job = self.t.guest.start(f"echo $$ >{self.state}/pid; exec {PROGRAM} serve --state-dir {self.state}/state "
                                      f"--rpc-socket {self.socket} --cores {self.cores} {options} >{log} 2>&1")
        self.t.eventually(f"{PROGRAM} rpc --socket {self.socket} spdk_get_version >/dev/null 2>&1 || "
                          f"{{ cat {log}; false; }}", 240)

    def command(self, method, **params):
        return f"{PROGRAM} rpc --socket {self.socket} {method} {shlex.quote(json.dumps(params))}"

    def rpc(self, method, **params):
        out = self.t.sh(self.command(method, **params), 240)
        return json.loads(out) if out.strip() else None

    def start_rdma(self, **options):
        """Starts it with a device and the transport, ready for subsystems."""
        self.t.sh("soft_roce && modprobe nvme-rdma")
        self.start()
        self.rpc("nvmf_create_transport", trtype="RDMA", **options)

    def malloc(self, nqn, nsid, mib, name=None):
        """A namespace in memory."""
        name = name or f"memory-{nsid}"
        self.rpc("bdev_malloc_create", name=name, num_blocks=mib * 2048, block_size=512)
        self.add_namespace(nqn, nsid, name)

    def file(self, nqn, nsid, mib):
        """A namespace that survives the process: a file on a ram disk. Its name."""
        name = f"file-{nsid}"
        self.t.sh(f"ram_disk && rm -f /srv/{name} && truncate -s {mib}M /srv/{name}")
        self.rpc("bdev_uring_create", name=name, filename=f"/srv/{name}", block_size=512)
        self.add_namespace(nqn, nsid, name)
        return name

    def resize_file(self, name, mib):
        self.t.sh(f"truncate -s {mib}M /srv/{name}")
        self.rpc("bdev_uring_rescan", name=name)

    def add_namespace(self, nqn, nsid, name):
        self.rpc("nvmf_subsystem_add_ns", nqn=nqn, namespace={"bdev_name": name, "nsid": nsid})

    def remove_namespace(self, nqn, nsid):
        self.rpc("nvmf_subsystem_remove_ns", nqn=nqn, nsid=nsid)

    def connect(self, nqn, options="--nr-io-queues 2"):
        """The kernel's host connects over RDMA; the controller's name such as "nvme0"."""
        host = self.t.hosts[0]
        self.t.sh(f"nvme connect --transport rdma --traddr {ADDRESS} --trsvcid {PORT} --nqn {nqn} --hostnqn {host.nqn} "
                  f"--hostid {host.id} {options}", 240)
        return self.t.sh(f"controller {nqn} {host.nqn}")

    def await_no_controllers(self, nqn):
        self.t.eventually(f"{self.command('nvmf_subsystem_get_controllers', nqn=nqn)} | grep -q '^\\[\\]'", 240)

    def process(self):
        """What the process holds: descriptors, threads, resident KiB."""
        status = self.t.sh(f"cat /proc/$(cat {self.state}/pid)/status")
        number = lambda name: int(re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)[1])
        descriptors = int(self.t.sh(f"ls /proc/$(cat {self.state}/pid)/fd | wc -l"))
        return {"descriptors": descriptors, "threads": number("Threads"), "resident_kib": number("VmRSS")}

    def listener(self, nqn, port=PORT, trtype="RDMA"):
        self.rpc("nvmf_subsystem_add_listener", nqn=nqn, listen_address={
            "trtype": trtype, "adrfam": "IPv4", "traddr": ADDRESS, "trsvcid": str(port)})

    def subsystem(self, nqn, port=PORT):
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
        return self.t.sh(f"cat {self.state}/log.*")

    def kill(self):
        self.t.sh(f"kill -9 $(cat {self.state}/pid)")
        self.job.wait(check=False)

    def stop(self):
        """Ends it as a user does, which must succeed."""
        self.t.sh(f"kill $(cat {self.state}/pid)")
        result = self.job.wait(120, check=False)
        log = self.log()
        self.t.check(result.status == 0, f"the target in the guest ended with status {result.status}:\n{log[-3000:]}")
        self.t.check("panicked at" not in log, f"a thread of the target in the guest panicked:\n{log[-3000:]}")
