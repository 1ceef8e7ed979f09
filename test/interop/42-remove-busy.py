"""removing a busy namespace: its I/O ends with errors, nothing hangs, the neighbour does not notice"""

NQN = "nqn.2026-11.io.ringstone:busy"


def test(t):
    t.target.start()
    t.target.subsystem(NQN)
    t.volume(NQN, 64, nsid=1)
    t.volume(NQN, 64, nsid=2)
    t.connect(NQN)
    neighbour = t.load(t.namespace(NQN, 1))
    for _ in range(2):
        busy = t.load(t.namespace(NQN, 2), iodepth=64)
        busy.await_passes(1)
        neighbour.await_passes(1)
        t.target.remove_namespace(NQN, 2)
        ended = busy.job.wait(timeout_s=120, check=False)
        t.check(ended.status != 0, "fio went on although its namespace was removed")
        t.eventually(f"! namespace {NQN} 2")
        neighbour.await_passes(1)
        t.target.add_namespace(NQN, "volume-2", 2)
        t.fio(t.namespace(NQN, 2), 4)
    neighbour.finish()
    t.check_never_reconnected()
