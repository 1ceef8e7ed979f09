"""ext4 over RDMA: files copied to a file system are whole after a reconnect, and the file system is clean"""

from harness import files
from harness.inside import Inside

TARGETS = ("ringstone",)
NQN = "nqn.2026-11.io.ringstone:rdma-ext4"
DISK_MIB = 256


def test(t):
    inside = Inside(t)
    inside.start_rdma()
    inside.subsystem(NQN)
    inside.malloc(NQN, 1, DISK_MIB)
    inside.connect(NQN)
    files.fill(t, t.namespace(NQN), timeout_s=600)
    t.disconnect(NQN)
    inside.await_no_controllers(NQN)

    inside.connect(NQN)
    files.check(t, t.namespace(NQN), timeout_s=240)
    t.sh("umount /mnt")
    t.check_never_reconnected()
    t.disconnect(NQN)
    inside.await_no_controllers(NQN)
    inside.stop()
