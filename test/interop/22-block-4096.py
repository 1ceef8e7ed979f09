"""4096-byte blocks: a memory volume with this block size is formatted, filled and verified"""

NQN = "nqn.2026-11.io.ringstone:block4096"


def test(t):
    t.target.start()
    t.target.subsystem(NQN)
    t.volume(NQN, 64, kind="malloc", block_size=4096)
    t.connect(NQN)
    device = t.namespace(NQN)
    t.equal(t.sh(f"blockdev --getss {device}"), "4096", "logical block size")
    t.await_size(device, 64)
    t.fio(device, 32, bsrange="4k-64k")
    t.sh(f"mkfs.ext4 -q {device} && mount -t ext4 {device} /mnt && cp /bin/busybox /mnt/ && umount /mnt && e2fsck -fn {device}")
    t.check_never_reconnected()
