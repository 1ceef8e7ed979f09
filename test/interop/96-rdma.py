"""NVMe/RDMA over soft-RoCE: the kernel's host discovers, connects, and every block it writes is read back right"""

from harness.inside import ADDRESS, Inside

TARGETS = ("ringstone",)
NQN = "nqn.2026-11.io.ringstone:rdma"
WHERE = f"--transport rdma --traddr {ADDRESS} --trsvcid 4420"
DISK_MIB = 64


def test(t):
    inside = Inside(t)
    inside.start()
    t.sh("no_soft_roce")
    # Without a device: named with the way to get one, and TCP works all the same.
    t.refused(inside.command("nvmf_create_transport", trtype="RDMA"), "rdma link add rxe0 type rxe", 240)
    inside.rpc("nvmf_create_transport", trtype="TCP")
    t.sh("soft_roce && modprobe nvme-rdma")
    inside.rpc("nvmf_create_transport", trtype="RDMA", max_io_size=1 << 20)
    shown = inside.rpc("nvmf_get_transports", trtype="RDMA")[0]
    t.equal((shown["in_capsule_data_size"], shown["max_srq_depth"]), (4096, 4096), "the transport's options")

    inside.rpc("bdev_malloc_create", name="disk", num_blocks=DISK_MIB * 2048, block_size=512)
    inside.subsystem(NQN)
    inside.rpc("nvmf_subsystem_add_ns", nqn=NQN, namespace={"bdev_name": "disk", "nsid": 1})
    inside.listener(NQN, 4421, "TCP")

    # A host that says nothing of itself is refused by its own kernel, from 6.12 on.
    host = t.hosts[0]
    identity = f"--hostnqn {host.nqn} --hostid {host.id}"
    records = {(found["trtype"], found["trsvcid"]): found
               for found in t.nvme(f"discover {WHERE} {identity}")["records"] if found["subnqn"] == NQN}
    t.equal(sorted(records), [("rdma", "4420"), ("tcp", "4421")], f"the discovery log: {records}")

    t.sh(f"nvme connect {WHERE} --nqn {NQN} {identity} --nr-io-queues 2", 240)
    device = t.namespace(NQN)
    t.equal(int(t.sh(f"sectors {device}")), DISK_MIB * 2048, "the namespace's size")
    # In capsules, by one READ or WRITE, by many; several queues; more than one transfer's size at once.
    for size, depth, mib in (("512", 8, 1), ("4k", 16, 4), ("16k", 16, 8), ("128k", 8, 16), ("1m", 4, 32)):
        t.fio(device, mib, bs=size, iodepth=depth, timeout_s=600)
    t.fio(device, 8, bs="8k", iodepth=16, numjobs=2, offset_increment="16m", timeout_s=600)
    t.check_never_reconnected()

    counted = inside.device()
    t.equal(counted["name"], "rxe0", "the device")
    for name in ("completions", "requests", "request_latency", "total_send_wrs", "total_recv_wrs"):
        t.check(counted[name] > 0, f"{name} of {counted}")
    for name in ("pending_rdma_read", "pending_rdma_write", "pending_rdma_send"):
        t.equal(counted[name], 0, f"{name} of a device at rest")

    t.sh(f"nvme disconnect --nqn {NQN}")
    t.eventually(f"{inside.command('nvmf_subsystem_get_controllers', nqn=NQN)} | grep -q '^\\[\\]'", 240)
    inside.stop()
