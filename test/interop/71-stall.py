"""a stalled target: the keep-alive runs out, the host reconnects when the target goes on, nothing is lost"""

TARGETS = ("ringstone",)
NQN = "nqn.2026-11.io.ringstone:stall"


def test(t):
    t.target.start()
    t.target.subsystem(NQN)
    t.volume(NQN, 64)
    name = t.connect(NQN, "--keep-alive-tmo=3 --reconnect-delay=1 --ctrl-loss-tmo=600")
    load = t.load(t.namespace(NQN), sync="dsync")
    load.await_passes(1)
    t.target.pause()
    try:
        t.eventually(f"! grep -q live /sys/class/nvme/{name}/state", 120)
    finally:
        t.target.resume()
    t.eventually(f"grep -q live /sys/class/nvme/{name}/state", 120)
    load.await_passes(1)
    load.finish()
