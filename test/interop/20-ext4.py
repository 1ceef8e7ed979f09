"""ext4: files copied to a file system are whole after a reconnect, and the file system is clean"""

NQN = "nqn.2026-11.io.ringstone:ext4"


def test(t):
    t.target.start()
    t.target.subsystem(NQN)
    t.volume(NQN, 256)
    t.connect(NQN)
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
        umount /mnt""", timeout_s=240)
    files = int(t.sh("wc -l < /tmp/sums"))
    t.check(files > 30, f"only {files} files were copied")
    t.disconnect(NQN)
    t.eventually("! ls -d /sys/class/nvme/nvme*")

    t.connect(NQN)
    device = t.namespace(NQN)
    t.sh(f"e2fsck -fn {device}", timeout_s=120)
    t.sh(f"mount -t ext4 -o ro {device} /mnt")
    # Both the copies against their sums and the sums against the originals.
    t.sh("cd /mnt && sha256sum -c /tmp/sums >/tmp/checked 2>&1 || { grep -v ': OK' /tmp/checked; false; }", timeout_s=120)
    t.sh("cmp /mnt/bin/fio /bin/fio")
    t.check_never_reconnected()
