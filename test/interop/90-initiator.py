"""the initiator: identify, discover and a verified load against the kernel's own target"""

import json
import subprocess

from harness.targets import FIRST_VOLUME_MIB, FIRST_VOLUME_NQN, Nvmet

TARGETS = ("ringstone",)
OTHER = "nqn.2026-11.io.ringstone:other"
DISCOVERY_NQN = "nqn.2014-08.org.nvmexpress.discovery"
TIMEOUT_S = 300


def tool(t, name, *options):
    """Runs a tool of ours against the guest: exit status, JSON if it printed some, and what it said."""
    command = [t.target.binary, name, "--traddr", "127.0.0.1", "--trsvcid", str(t.guest.target_port), "--json", *options]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S)
    return done.returncode, json.loads(done.stdout) if done.stdout.strip() else None, done.stderr


def succeeds(t, name, *options):
    status, result, said = tool(t, name, *options)
    t.equal(status, 0, f"{name} {' '.join(options)}: {said}")
    return result


def load(t, *options):
    report = succeeds(t, "perf", "--subnqn", FIRST_VOLUME_NQN, "--io-timeout", "60", *options)
    t.equal(report["errors"], 0, f"errors of {options}")
    if "--verify" in options:
        t.equal((report["verify"]["mismatches"], report["verify"]["complete"]), (0, True), f"verify of {options}")
        t.check(report["verify"]["checked_blocks"] > 0, f"nothing was checked: {report}")
    return report


def test(t):
    kernel = Nvmet(t.guest, listen="0.0.0.0")
    kernel.start(first_volume=True)
    try:
        check(t, kernel)
    finally:
        problem = kernel.finish()
    t.check(problem is None, problem)


def check(t, kernel):
    found = succeeds(t, "identify", "--subnqn", FIRST_VOLUME_NQN)
    t.equal(found["controller"]["subnqn"], FIRST_VOLUME_NQN, "the controller's subsystem")
    t.equal(found["controller"]["mn"], "Linux", "the model")
    sizes = [(ns["nsid"], ns["nsze"] * ns["block_size"]) for ns in found["namespaces"]]
    t.equal(sizes, [(1, FIRST_VOLUME_MIB << 20)], "the namespaces")
    uuid = t.sh(f"cat /sys/kernel/config/nvmet/subsystems/{FIRST_VOLUME_NQN}/namespaces/1/device_uuid").strip()
    t.equal(found["namespaces"][0]["uuid"], uuid, "the namespace's UUID")

    # Single commands and queues, digests, data in capsules and asked for, sizes up to many R2Ts.
    size = ("--size", str(32 << 20))
    load(t, "--rw", "randrw", "--count", "2000", "--verify", *size)
    load(t, "--rw", "randrw", "--count", "2000", "--verify", "--queues", "3", "--qd", "16", "--bs", "16384", *size)
    load(t, "--rw", "write", "--count", "200", "--verify", "--qd", "4", "--bs", "1048576", *size)
    load(t, "--rw", "randrw", "--count", "1000", "--verify", "--hdr-digest", "--data-digest", "--bs", "8192", *size)
    load(t, "--rw", "randread", "--count", "500", "--qd", "1", *size)

    # Several namespaces, one of which came after the first connection; a discovery log that follows.
    kernel.volume("vol1", 64)
    kernel.add_namespace(FIRST_VOLUME_NQN, "vol1", 7)
    report = load(t, "--rw", "randrw", "--count", "1000", "--verify", "--nsid", "1,7", *size)
    t.equal(report["commands"], 1000, "commands on two namespaces")
    before = records(t)
    t.check(FIRST_VOLUME_NQN in before, f"the discovery log: {before}")
    kernel.subsystem(OTHER, any_host=False)
    t.check(OTHER not in records(t), "a subsystem that does not allow this host is in its discovery log")
    status, _, said = tool(t, "identify", "--subnqn", OTHER)
    t.equal(status, 1, "a host that is not allowed")
    t.check("does not allow this host" in said, said)
    status, _, said = tool(t, "identify", "--subnqn", "nqn.2026-11.io.ringstone:missing")
    t.equal(status, 1, "a subsystem that is missing")
    t.check("Connect" in said, said)


def records(t):
    services = succeeds(t, "discover")["services"]
    return [record["subnqn"] for record in services[0]["records"]]
