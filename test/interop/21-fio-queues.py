"""fio on four I/O queues: random reads and writes of many sizes, every block verified"""

NQN = "nqn.2026-11.io.ringstone:queues"
QUEUES = 4


def test(t):
    t.target.start()
    t.target.subsystem(NQN)
    t.volume(NQN, 256)
    name = t.connect(NQN, f"--nr-io-queues={QUEUES}")
    device = t.namespace(NQN)
    t.equal(t.sh(f"cat /sys/class/nvme/{name}/queue_count"), str(QUEUES + 1), "queues with the admin queue")
    if t.target.controllers(NQN) is not None:
        t.equal(t.target.controllers(NQN), [(t.hosts[0].nqn, QUEUES)], "controllers and I/O queues the target reports")
    # One job on each processor, so that each queue carries one.
    spread = {"numjobs": QUEUES, "offset_increment": "48m", "cpus_allowed": f"0-{QUEUES - 1}",
              "cpus_allowed_policy": "split", "group_reporting": True}
    t.fio(device, 16, iodepth=16, **spread)
    t.fio(device, 32, bsrange="4k-256k", iodepth=8, **spread)
    t.fio(device, 32, rw="write", bs="1m", iodepth=4, **spread)  # larger than one command may be
    t.check_never_reconnected()
