"""a thousand connects and disconnects over RDMA leave nothing behind: descriptors, queue pairs, memory, controllers"""

import re

from harness.inside import ADDRESS, PORT, Inside

TARGETS = ("ringstone",)
NQN = "nqn.2026-11.io.ringstone:rdma-leaks"
# Connections by the kernel's host: each time an administrative and two I/O queues. In parts.
TURNS, QUEUES, PARTS = 342, 3, 3
# What a process has touched grows by itself now and then, when more is under way at once than ever before; what leaks grows in
# every part, by more than this for each connection in it.
LEAK_KIB = 1
MOST_KIB = 16384
# Registrations that may come after the first connections: memory for responses is registered for as many queue pairs as there
# have ever been at once, and on a slow machine those of two turns overlap.
MORE_REGISTRATIONS = 6


def held(t, inside):
    """Everything that connections take: in the process, in the kernel for it, and as the target sees it."""
    shown = t.sh("rdma resource show rxe0")
    counts = {kind: int(count) for kind, count in re.findall(r"\b(qp|cm_id|cq|mr|pd|srq|ctx) (\d+)", shown)}
    return {**inside.process(), **counts}


def turns(t, count):
    """The kernel's host connects and disconnects."""
    host = t.hosts[0]
    # Its own interface: nvme-cli takes longer to start than to connect.
    words = f"transport=rdma,traddr={ADDRESS},trsvcid={PORT},nqn={NQN},hostnqn={host.nqn},hostid={host.id},nr_io_queues=2"
    t.sh(f"""
        turn=0
        while [ $turn -lt {count} ]; do
            echo '{words}' >/dev/nvme-fabrics || exit 1
            echo 1 >/sys/class/nvme/$(controller {NQN} {host.nqn})/delete_controller || exit 1
            turn=$((turn + 1))
        done""", 3000)


def test(t):
    inside = Inside(t)
    inside.start_rdma()
    inside.subsystem(NQN)
    inside.malloc(NQN, 1, 16)
    # What the first connections bring for good: pools, threads, an allocator's share.
    turns(t, 20)
    inside.await_no_controllers(NQN)
    before = held(t, inside)

    resident = [before.pop("resident_kib")]
    for _ in range(PARTS):
        turns(t, TURNS // PARTS)
        inside.await_no_controllers(NQN)
        after = held(t, inside)
        resident.append(after.pop("resident_kib"))
    made = TURNS * QUEUES
    t.check(made >= 1000, f"only {made} connections")
    print(f"    {made} connections: before {before}, after {after}, resident {resident} KiB")
    registered = after.pop("mr") - before.pop("mr")
    t.check(registered <= MORE_REGISTRATIONS, f"{made} connections left {registered} registrations behind")
    t.equal(after, before, f"what is held after {made} connections")
    growth = [later - earlier for earlier, later in zip(resident, resident[1:])]
    leaks = min(growth) > LEAK_KIB * made // PARTS or sum(growth) > MOST_KIB
    t.check(not leaks, f"{made} connections left memory behind: {growth} KiB")

    # And the target serves as before.
    inside.connect(NQN)
    t.fio(t.namespace(NQN), 2)
    t.disconnect(NQN)
    inside.await_no_controllers(NQN)
    inside.stop()
