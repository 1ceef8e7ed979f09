"""the initiator over soft-RoCE: identify, discover and a verified load against the kernel's own NVMe/RDMA target"""

import json

from harness.targets import FIRST_VOLUME_MIB, FIRST_VOLUME_NQN, Nvmet

TARGETS = ("ringstone",)
ADDRESS = "10.0.2.15"
PORT = 4430
RINGSTONE = "/opt/ringstone"
REMOTE = f"--trtype rdma --traddr {ADDRESS} --trsvcid {PORT}"
TIMEOUT_S = 400


def tool(t, name, options=""):
    return json.loads(t.sh(f"{RINGSTONE} {name} {REMOTE} --json {options}", TIMEOUT_S))


def load(t, options):
    """A load; what is written is read back and compared."""
    report = tool(t, "perf", f"--subnqn {FIRST_VOLUME_NQN} --io-timeout 200 --size {16 << 20} {options}")
    t.equal(report["errors"], 0, f"errors of {options}")
    if "--verify" in options:
        t.equal((report["verify"]["mismatches"], report["verify"]["complete"]), (0, True), f"verify of {options}")
        t.check(report["verify"]["checked_blocks"] > 0, f"nothing was checked: {report}")
    return report


def test(t):
    t.guest.install(t.target.binary, RINGSTONE)
    t.sh("no_soft_roce")
    # What is missing is named before anything is tried.
    t.refused(f"{RINGSTONE} identify {REMOTE} --subnqn {FIRST_VOLUME_NQN}", "rdma link add rxe0 type rxe", TIMEOUT_S)
    t.refused(f"{RINGSTONE} identify {REMOTE} --hdr-digest --subnqn {FIRST_VOLUME_NQN}", "no digests", TIMEOUT_S)
    t.sh("soft_roce")
    # Nobody listens.
    t.refused(f"{RINGSTONE} identify {REMOTE} --subnqn {FIRST_VOLUME_NQN}", "refused", TIMEOUT_S)

    kernel = Nvmet(t.guest, listen="0.0.0.0")
    kernel.start(first_volume=True)
    try:
        t.sh(f"""
            modprobe nvmet-rdma
            cd /sys/kernel/config/nvmet
            mkdir ports/9
            echo rdma >ports/9/addr_trtype
            echo ipv4 >ports/9/addr_adrfam
            echo {ADDRESS} >ports/9/addr_traddr
            echo {PORT} >ports/9/addr_trsvcid
            ln -s "$PWD/subsystems/{FIRST_VOLUME_NQN}" ports/9/subsystems/
        """)
        check(t)
    finally:
        t.sh(f"cd /sys/kernel/config/nvmet && rm -f ports/9/subsystems/* && rmdir ports/9")
        problem = kernel.finish()
    t.check(problem is None, problem)


def check(t):
    found = tool(t, "identify", f"--subnqn {FIRST_VOLUME_NQN}")
    t.equal(found["controller"]["subnqn"], FIRST_VOLUME_NQN, "the controller's subsystem")
    sizes = [(ns["nsid"], ns["nsze"] * ns["block_size"]) for ns in found["namespaces"]]
    t.equal(sizes, [(1, FIRST_VOLUME_MIB << 20)], "the namespaces")

    # Data in capsules and by key, several queues, payloads of several buffers.
    for options in (
        "--rw randrw --count 300 --verify --qd 8",
        "--rw randrw --count 300 --verify --qd 16 --queues 3 --bs 16384",
        "--rw randrw --count 100 --verify --qd 8 --bs 131072",
        "--rw write --count 16 --verify --qd 2 --bs 1048576",
        "--rw randread --count 200 --qd 1",
    ):
        print(options, load(t, options).get("iops"))

    records = tool(t, "discover")["services"][0]["records"]
    t.check(FIRST_VOLUME_NQN in [record["subnqn"] for record in records], f"the discovery log: {records}")
    text = t.refused(f"{RINGSTONE} identify {REMOTE} --subnqn nqn.2026-11.io.ringstone:missing", "Connect", TIMEOUT_S)

    # A target that goes away under load is told of, and soon enough for a load to end.
    job = t.guest.start(f"{RINGSTONE} perf {REMOTE} --subnqn {FIRST_VOLUME_NQN} --rw randrw --qd 8 --time 300 2>&1")
    t.sh("usleep 3000000; rm /sys/kernel/config/nvmet/ports/9/subsystems/*")
    ended = job.wait(TIMEOUT_S, check=False)
    t.equal(ended.status, 1, f"a load whose target has gone: {ended}")
    t.check("ontroller" in ended.out or "queue pair" in ended.out, f"it says what happened: {ended}")
