"""an RDMA device that is removed under load and comes back: the target goes on over TCP, and listens again by itself"""

from harness.inside import ADDRESS, Inside
from harness.vandals import VANDAL, install

TARGETS = ("ringstone",)
NQN = "nqn.2026-11.io.ringstone:rdma"
WHERE = f"--transport rdma --traddr {ADDRESS} --trsvcid 4420"
TCP = f"{NQN}:tcp"


def connect(t, where, nqn, queues=1):
    host = t.hosts[0]
    t.sh(f"nvme connect {where} --nqn {nqn} --hostnqn {host.nqn} --hostid {host.id} --nr-io-queues {queues}", 240)
    return t.namespace(nqn)


def logged(t, inside, text, times):
    """Waits until the target has said this so often."""
    t.eventually(f"[ $(grep -c '{text}' {inside.log_path}) -ge {times} ] || {{ tail -20 {inside.log_path}; false; }}", 240)


def test(t):
    install(t)
    inside = Inside(t)
    t.sh("soft_roce && modprobe nvme-rdma && modprobe nvme-tcp")
    inside.start()
    for trtype in ("RDMA", "TCP"):
        inside.rpc("nvmf_create_transport", trtype=trtype)
    for name in ("disk", "other"):
        inside.rpc("bdev_malloc_create", name=name, num_blocks=32 * 2048, block_size=512)
    inside.subsystem(NQN)
    inside.rpc("nvmf_subsystem_add_ns", nqn=NQN, namespace={"bdev_name": "disk", "nsid": 1})
    inside.rpc("nvmf_create_subsystem", nqn=TCP, allow_any_host=True, serial_number="INSIDE02", max_namespaces=16)
    inside.listener(TCP, 4421, "TCP")
    inside.rpc("nvmf_subsystem_add_ns", nqn=TCP, namespace={"bdev_name": "other", "nsid": 1})
    load = t.load(connect(t, f"--transport tcp --traddr {ADDRESS} --trsvcid 4421", TCP), 4)
    load.await_passes(1, 600)

    descriptors = set()
    # Under load of the kernel's host, which ends its controllers with the device; with hosts of userspace, that hold connections
    # until they hear of it; and with nobody, when only the target has it open.
    for times, who in enumerate(("kernel", "userspace", "nobody"), 1):
        device = connect(t, WHERE, NQN)
        ending = []
        if who == "kernel":
            ending.append(t.guest.start(f"{t.fio_command(device, 8, bs='64k', time_based=True, runtime=600)} || true"))
        else:
            t.fio(device, 2, bs="4k", timeout_s=600)
            t.sh(f"nvme disconnect --nqn {NQN}", 240)
        if who == "userspace":
            ending = [t.guest.start(f"{VANDAL} {ADDRESS}:4420 {NQN} --seed {n} Silence") for n in range(3)]
            t.eventually(f"[ $(rdma resource show qp | grep -c 'state RTS.*rdma_vandal') -ge {len(ending)} ]", 60)
        # Waits in the kernel until nobody has the device open any more.
        t.sh("rdma link delete rxe0", 240)
        # A load that still had the disk open would go on with it when it is back, over whatever is checked there.
        for job in ending:
            job.wait(240)
        logged(t, inside, "no connections over RDMA until the device is back", times)
        load.await_passes(1, 600)
        t.sh("soft_roce", 240)
        logged(t, inside, "listening over RDMA again", times)
        t.fio(connect(t, WHERE, NQN, 2), 2, bs="16k", timeout_s=600)
        t.sh(f"nvme disconnect --nqn {NQN}", 240)
        # Nothing of a device that went stays open.
        descriptors.add(inside.process()["descriptors"])
        t.equal(len(descriptors), 1, f"numbers of descriptors after each removal, {descriptors}")
    load.finish(900)
    t.sh(f"nvme disconnect --nqn {TCP}", 240)

    # The network interface goes down and up.
    device = connect(t, WHERE, NQN)
    t.sh("ip link set eth0 down")
    logged(t, inside, "a port of an RDMA device is down", 1)
    t.sh("ip link set eth0 up")
    logged(t, inside, "a port of an RDMA device is up", 1)
    t.fio(device, 2, bs="16k", timeout_s=600)
    t.sh(f"nvme disconnect --nqn {NQN}", 240)
    inside.stop()
