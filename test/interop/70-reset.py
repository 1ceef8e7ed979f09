"""controller reset and rescan under load: no I/O is lost or fails"""

NQN = "nqn.2026-11.io.ringstone:reset"


def test(t):
    t.target.start()
    t.target.subsystem(NQN)
    t.volume(NQN, 64)
    name = t.connect(NQN, "--reconnect-delay=1")
    load = t.load(t.namespace(NQN))
    load.await_passes(1)
    for _ in range(4):
        t.sh(f"nvme reset /dev/{name}")
        t.eventually(f"grep -q live /sys/class/nvme/{name}/state")
        t.sh(f"nvme ns-rescan /dev/{name}")
        load.await_passes(1)
    load.finish()
    if t.target.controllers(NQN) is not None:
        t.equal(len(t.target.controllers(NQN)), 1, "controllers the target still holds after four resets")
