"""ext4 over RDMA: files copied to a file system are whole after a reconnect, and the file system is clean"""

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
    device = t.namespace(NQN)
    t.sh(f"""
        set -e
        mkfs.ext4 -q {device}
        mount -t ext4 {device} /mnt
        cp -r /bin /lib/modules /mnt/
        cd /mnt
        find . -type f -print0 | sort -z | xargs -0 sha256sum > /tmp/sums
        for round in 1 2 3; do cp -r modules modules.$round; sync; rm -r modules.$round; done
        cd /
        umount /mnt""", timeout_s=600)
    files = int(t.sh("wc -l < /tmp/sums"))
    t.check(files > 30, f"only {files} files were copied")
    t.disconnect(NQN)
    inside.await_no_controllers(NQN)

    inside.connect(NQN)
    device = t.namespace(NQN)
    t.sh(f"e2fsck -fn {device}", timeout_s=240)
    t.sh(f"mount -t ext4 -o ro {device} /mnt")
    # Both the copies against their sums and the sums against the originals.
    t.sh("cd /mnt && sha256sum -c /tmp/sums >/tmp/checked 2>&1 || { grep -v ': OK' /tmp/checked; false; }", timeout_s=240)
    t.sh("cmp /mnt/bin/fio /bin/fio")
    t.sh("umount /mnt")
    t.check_never_reconnected()
    t.disconnect(NQN)
    inside.await_no_controllers(NQN)
    inside.stop()
