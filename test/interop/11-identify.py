"""identify and logs: id-ctrl, id-ns, list, list-ns, smart-log, error-log and the others nvme-cli reads"""

NQN = "nqn.2026-11.io.ringstone:identify"
MIB = 64


def controller_fields(t, name):
    identity = t.nvme(f"id-ctrl /dev/{name}")
    t.equal(identity["subnqn"], NQN, "subnqn")
    t.check(identity["ver"] >= 0x10300, f"version {identity['ver']:#x}")
    t.check(identity["cntlid"] > 0, "cntlid is 0")
    t.check(identity["nn"] >= 2, f"nn {identity['nn']}")
    t.check(identity["sqes"] == 0x66 and identity["cqes"] == 0x44, f"sqes {identity['sqes']:#x} cqes {identity['cqes']:#x}")
    t.check(identity["kas"] > 0, "keep-alive granularity is 0")
    t.check(identity["oncs"] & 0x0c == 0x0c, f"oncs {identity['oncs']:#x} lacks dataset management or write zeroes")
    t.check(identity["oaes"] & 0x100, f"oaes {identity['oaes']:#x} lacks the namespace attribute notice")
    t.check(identity["ioccsz"] >= 4 and identity["iorcsz"] == 1, f"ioccsz {identity['ioccsz']} iorcsz {identity['iorcsz']}")
    if t.target.name == "ringstone":
        t.equal(identity["sn"].strip(), "GUEST0001", "serial number")
        t.check(identity["vwc"] & 1, "a file without synchronous writes has a volatile write cache")
    return identity


def namespaces(t, name, device, highest):
    size = int(t.sh(f"blockdev --getsz {device}")) * 512
    block = int(t.sh(f"blockdev --getss {device}"))
    identity = t.nvme(f"id-ns {device}")
    t.equal(size, MIB << 20, "size of the block device")
    t.equal(identity["nsze"] * block, size, "nsze")
    t.check(identity["nuse"] <= identity["ncap"] <= identity["nsze"], f"nuse, ncap, nsze: {identity}")
    formats = identity["lbafs"]
    t.equal(1 << formats[identity["flbas"] & 15]["ds"], block, "block size of the format in use")
    t.equal(t.nvme(f"id-ns /dev/{name} --namespace-id=3")["nsze"], 0, "nsze of an inactive namespace")
    if t.target.name == "ringstone":  # the kernel's target answers zeros here too
        t.refused(f"nvme id-ns /dev/{name} --namespace-id={highest + 1}", "INVALID_NS|Invalid Namespace")
    listed = sorted(entry["nsid"] for entry in t.nvme(f"list-ns /dev/{name}")["nsid_list"])
    t.equal(listed, [1, 7], "list-ns")
    described = t.sh(f"nvme ns-descs {device}")
    t.check("uuid" in described or "nguid" in described, f"no UUID or NGUID among the descriptors: {described}")
    return block


def logs(t, name, device, block):
    before = t.nvme(f"smart-log /dev/{name}")
    t.equal(before["critical_warning"], 0, "critical warning")
    t.fio(device, 2)
    after = t.nvme(f"smart-log /dev/{name}")
    if t.target.name == "ringstone":
        for counter in ("host_read_commands", "host_write_commands"):
            t.check(int(after[counter]) > int(before[counter]), f"{counter} stayed at {before[counter]}")
    end = (MIB << 20) // block
    t.refused(f"nvme read {device} --start-block={end} --block-count=0 --data-size={block} --data=/dev/null",
              "LBA_RANGE|LBA Out of Range|Capacity Exceeded")
    errors = t.nvme(f"error-log /dev/{name}")["errors"]
    t.check(any(entry["error_count"] > 0 and entry["nsid"] == 1 for entry in errors),
            f"the read past the end is not in the error log: {errors[:2]}")
    for log in ("fw-log", "effects-log", "changed-ns-list-log"):
        t.sh(f"nvme {log} /dev/{name}")
    features = t.sh(f"nvme get-feature /dev/{name} --feature-id=7")
    t.check("0x07" in features or "Number of Queues" in features, f"number of queues: {features}")


def test(t):
    t.target.start()
    t.target.subsystem(NQN)
    t.volume(NQN, MIB, nsid=1)
    t.volume(NQN, 16, nsid=7)
    name = t.connect(NQN)
    device = t.namespace(NQN, 1)
    t.namespace(NQN, 7)
    highest = controller_fields(t, name)["nn"]
    block = namespaces(t, name, device, highest)
    logs(t, name, device, block)
    listed = t.nvme("list")["Devices"]
    t.check(any(entry["DevicePath"] == device for entry in listed), f"nvme list: {listed}")
    t.check(NQN in t.sh("nvme list-subsys"), "nvme list-subsys does not show the subsystem")
    if t.target.controllers(NQN) is not None:
        t.equal([host for host, _ in t.target.controllers(NQN)], [t.hosts[0].nqn], "controllers the target reports")
    t.check_never_reconnected()
    t.disconnect(NQN)
    t.eventually("! ls -d /sys/class/nvme/nvme*")
