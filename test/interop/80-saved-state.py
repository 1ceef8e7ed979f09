"""saved state: what `ringstone rpc` set up is there after a stop and after kill -9, and what it removed stays gone"""

import json

TARGETS = ("ringstone",)
FIRST = "nqn.2026-11.io.ringstone:first"
SECOND = "nqn.2026-11.io.ringstone:second"


def command(t, *arguments):
    """Runs `ringstone rpc` and returns its result."""
    status, out, err = t.target.rpc_command(*arguments)
    t.equal((status, err), (0, ""), f"status and errors of ringstone rpc {' '.join(arguments)}")
    return json.loads(out)


def listen(t, nqn):
    address = {"trtype": "TCP", "adrfam": "IPv4", "traddr": t.target.own_address, "trsvcid": str(t.target.port)}
    command(t, "nvmf_subsystem_add_listener", f"nqn={nqn}", f"listen_address={json.dumps(address)}")


def set_up(t):
    for name in ("one", "two"):
        path = t.target.volume_path(name)
        with open(path, "xb") as volume:
            volume.truncate(64 << 20)
        t.equal(command(t, "bdev_uring_create", f"name={name}", f"filename={path}", "block_size=512"), name, "name of the bdev")
    command(t, "nvmf_create_subsystem", f"nqn={FIRST}", "allow_any_host=true", "serial_number=FIRST")
    command(t, "nvmf_create_subsystem", f"nqn={SECOND}", "allow_any_host=false", "serial_number=SECOND")
    command(t, "nvmf_subsystem_add_host", f"nqn={SECOND}", f"host={t.hosts[0].nqn}")
    added = command(t, "nvmf_subsystem_add_ns", json.dumps({"nqn": FIRST, "namespace": {"bdev_name": "one", "nsid": 3}}))
    t.equal(added, 3, "namespace identifier")
    command(t, "nvmf_subsystem_add_ns", json.dumps({"nqn": SECOND, "namespace": {"bdev_name": "two"}}))
    listen(t, FIRST)
    listen(t, SECOND)
    status, out, err = t.target.rpc_command("nvmf_subsystem_remove_ns", f"nqn={FIRST}", "nsid=9")
    t.equal((status, out), (1, ""), "status and output of an RPC that must fail")
    t.check(err.strip(), "an RPC failed without a word")


def identity(t, nqn, device):
    """What makes a namespace and its controller the same as before to a host."""
    return t.sh(f"nvme ns-descs {device} | tail -n +2\n"
                f"nvme id-ctrl /dev/$(controller {nqn} {t.hosts[0].nqn}) | grep -E '^(sn|mn|nn) '")


def test(t):
    t.target.start()
    set_up(t)
    identities = {}
    for nqn, nsid in ((FIRST, 3), (SECOND, 1)):
        t.connect(nqn)
        device = t.namespace(nqn, nsid)
        t.fio(device, 8, rw="write", bs="64k")
        identities[nqn] = identity(t, nqn, device)
    for end in (t.target.stop, t.target.crash):
        t.sh("nvme disconnect-all")
        end()
        t.target.restart()
        t.refused(t.connect_command(SECOND, host=t.hosts[1]))
        for nqn, nsid in ((FIRST, 3), (SECOND, 1)):
            t.connect(nqn)
            device = t.namespace(nqn, nsid)
            t.fio(device, 8, rw="read", bs="64k")
            found = identity(t, nqn, device)
            t.equal(found, identities[nqn], f"identity of {nqn} after a restart")

    t.sh("nvme disconnect-all")
    command(t, "nvmf_delete_subsystem", f"nqn={FIRST}")
    t.target.crash()
    t.target.restart()
    records, _ = t.discover()
    t.check(SECOND in records and FIRST not in records, f"served after a restart: {list(records)}")
    t.refused(t.connect_command(FIRST))
