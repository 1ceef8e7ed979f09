"""host allow-list: who is not on it cannot connect and does not see the subsystem"""

NQN = "nqn.2026-11.io.ringstone:private"


def test(t):
    friend, stranger = t.hosts[:2]
    t.target.start()
    t.target.subsystem(NQN, any_host=False)
    t.volume(NQN, 32)
    t.target.allow(NQN, friend.nqn)
    t.check(NQN in t.discover(host=friend)[0], "an allowed host does not see the subsystem")
    t.check(NQN not in t.discover(host=stranger)[0], "a host that is not allowed sees the subsystem")
    t.refused(t.connect_command(NQN, host=stranger))
    t.check(f"is not allowed, hostnqn: {stranger.nqn}" in t.kernel_log(),
            "the kernel does not give the allow-list as the reason of the refusal")
    t.connect(NQN, host=friend)
    t.fio(t.namespace(NQN), 4)
    t.disconnect(NQN)

    t.target.allow(NQN, stranger.nqn)
    t.connect(NQN, host=stranger)
    t.fio(t.namespace(NQN), 4)
    t.disconnect(NQN)

    t.target.disallow(NQN, friend.nqn)
    t.refused(t.connect_command(NQN, host=friend))
    t.connect(NQN, host=stranger)
    t.fio(t.namespace(NQN), 4)
    t.check_never_reconnected()
