"""namespaces come and go under load: seen without a reconnect, used, and the others undisturbed"""

NQN = "nqn.2026-11.io.ringstone:namespaces"


def test(t):
    t.target.start()
    t.target.subsystem(NQN)
    t.volume(NQN, 64)
    t.connect(NQN)
    load = t.load(t.namespace(NQN, 1))
    load.await_passes(1)
    t.target.volume("second", 32)
    for nsid in (2, 5, 2):
        t.target.add_namespace(NQN, "second", nsid)
        device = t.namespace(NQN, nsid)
        t.await_size(device, 32)
        t.fio(device, 4)
        t.target.remove_namespace(NQN, nsid)
        t.eventually(f"! namespace {NQN} {nsid}")
        load.await_passes(1)
    # Several at once.
    for nsid in (3, 4, 6):
        t.volume(NQN, 16, nsid=nsid)
    for nsid in (3, 4, 6):
        t.fio(t.namespace(NQN, nsid), 2)
    load.await_passes(1)
    load.finish()
    t.check_never_reconnected()
