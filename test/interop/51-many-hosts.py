"""several hosts and subsystems at once: two paths to one namespace, and a neighbour subsystem, all under load"""

SHARED = "nqn.2026-11.io.ringstone:shared"
NEIGHBOUR = "nqn.2026-11.io.ringstone:neighbour"


def test(t):
    first, second, third = t.hosts[:3]
    t.target.start()
    t.target.subsystem(SHARED)
    t.volume(SHARED, 64, name="shared")
    t.target.subsystem(NEIGHBOUR)
    t.volume(NEIGHBOUR, 64, name="neighbour")
    t.connect(SHARED, "--nr-io-queues=2", host=first)
    t.connect_as(second, SHARED, "nr_io_queues=2")
    t.connect(NEIGHBOUR, "--nr-io-queues=3", host=third)
    device = t.namespace(SHARED)
    # One subsystem with two controllers is one device with two paths; use both.
    t.eventually("ls -d /sys/class/nvme/nvme*/nvme*c*n1 | wc -l | grep -qx 3")
    t.sh(f"""
        for subsystem in /sys/class/nvme-subsystem/*; do
            [ "$(cat $subsystem/subsysnqn)" != {SHARED} ] || echo round-robin > $subsystem/iopolicy
        done""")
    if t.target.controllers(SHARED) is not None:
        t.equal(t.target.controllers(SHARED), sorted([(first.nqn, 2), (second.nqn, 2)]), "controllers of the shared subsystem")
        t.equal(t.target.controllers(NEIGHBOUR), [(third.nqn, 3)], "controllers of the neighbour subsystem")
    loads = [t.load(device), t.load(device, offset_mib=16), t.load(t.namespace(NEIGHBOUR))]
    for load in loads:
        load.await_passes(2)
    # One host goes; the shared device lives on by the other path.
    t.sh(f"nvme disconnect --device $(controller {SHARED} {first.nqn})")
    for load in loads:
        load.await_passes(1)
        load.finish()
    t.check_never_reconnected()
