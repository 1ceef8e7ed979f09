"""ext4: files copied to a file system are whole after a reconnect, and the file system is clean"""

from harness import files

NQN = "nqn.2026-11.io.ringstone:ext4"


def test(t):
    t.target.start()
    t.target.subsystem(NQN)
    t.volume(NQN, 256)
    t.connect(NQN)
    files.fill(t, t.namespace(NQN), timeout_s=240)
    t.disconnect(NQN)
    t.eventually("! ls -d /sys/class/nvme/nvme*")

    t.connect(NQN)
    files.check(t, t.namespace(NQN), timeout_s=120)
    t.check_never_reconnected()
