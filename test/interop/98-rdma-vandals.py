"""hosts over RDMA that lie, break rules and vanish are refused or thrown out as they have to be, and nothing of them stays"""

import re

from harness.context import TestFailure
from harness.inside import ADDRESS, Inside
from harness.vandals import VANDAL, install

TARGETS = ("ringstone",)
NQN = "nqn.2026-11.io.ringstone:rdma"
WHERE = f"--transport rdma --traddr {ADDRESS} --trsvcid 4420"


def vandalize(t, seed):
    """Does every deed, one after another; fails and shows them when the target takes one in another way than it has to."""
    t.sh(f"{VANDAL} {ADDRESS}:4420 {NQN} --seed {seed} 2>&1", 1800)


def held(t, inside):
    """What is held: objects of the device by kind, and descriptors of the target."""
    shown = t.sh("rdma resource show rxe0")
    counts = {kind: int(count) for kind, count in re.findall(r"\b(qp|cm_id|cq|pd|srq|ctx) (\d+)", shown)}
    return {**counts, "descriptors": inside.process()["descriptors"]}


def regions(t):
    return int(re.search(r"\bmr (\d+)", t.sh("rdma resource show rxe0"))[1])


def queues(inside):
    """Admin and I/O queues that the target has."""
    groups = inside.rpc("nvmf_get_stats")["poll_groups"]
    return tuple(sum(group[f"current_{kind}_qpairs"] for group in groups) for kind in ("admin", "io"))


def awaited(t, what, look, wanted):
    """Waits until looking finds what is wanted."""
    last = None
    for _ in range(240):
        last = look()
        if last == wanted:
            return
        t.sh("usleep 500000")
    raise TestFailure(f"{what}: {last} instead of {wanted}")


def test(t):
    install(t)
    inside = Inside(t)
    t.sh("soft_roce && modprobe nvme-rdma")
    inside.start()
    # A shared receive queue that leaves little of a completion queue: a queue of 4000 entries is too long for it.
    inside.rpc("nvmf_create_transport", trtype="RDMA", max_queue_depth=4096, max_srq_depth=31500)
    inside.rpc("bdev_malloc_create", name="disk", num_blocks=32 * 2048, block_size=512)
    inside.subsystem(NQN)
    inside.rpc("nvmf_subsystem_add_ns", nqn=NQN, namespace={"bdev_name": "disk", "nsid": 1})
    vandalize(t, 1)

    # Beside an honest host, who must not notice.
    host = t.hosts[0]
    t.sh(f"nvme connect {WHERE} --nqn {NQN} --hostnqn {host.nqn} --hostid {host.id} --nr-io-queues 2", 240)
    load = t.load(t.namespace(NQN), 4, bs="16k")
    load.await_passes(1, 600)
    vandalize(t, 2)
    awaited(t, "queues beside the honest ones", lambda: queues(inside), (1, 2))
    before, regions_before = held(t, inside), regions(t)
    vandalize(t, 3)
    awaited(t, "what the target holds", lambda: held(t, inside), before)
    t.equal(queues(inside), (1, 2), "admin and I/O queues")
    # Messages stay with a reactor for the next queue pair, so more of them at once than before are two more regions. One for each
    # vandal would be more than this.
    grown = regions(t) - regions_before
    t.check(grown <= 8, f"{grown} regions of memory were left behind")
    load.await_passes(1, 600)
    load.finish(900)
    t.check_never_reconnected()

    counted = inside.device()
    for name in ("pending_rdma_read", "pending_rdma_write", "pending_rdma_send"):
        t.equal(counted[name], 0, f"{name} of a device at rest")
    t.check(counted["send_doorbell_updates"] <= counted["total_send_wrs"], f"more doorbells than work: {counted}")
    t.sh(f"nvme disconnect --nqn {NQN}", 240)
    # And the next one is served.
    t.sh(f"nvme connect {WHERE} --nqn {NQN} --hostnqn {host.nqn} --hostid {host.id} --nr-io-queues 1", 240)
    t.fio(t.namespace(NQN), 4, bs="64k", timeout_s=600)
    t.sh(f"nvme disconnect --nqn {NQN}", 240)
    inside.stop()
