"""A file system with files in it, and whether they are whole."""


def fill(t, device, timeout_s):
    """Makes ext4 on a device, and copies the guest's programs and modules there; their sums stay in the guest."""
    t.sh(f"""
        set -e
        mkfs.ext4 -q {device}
        mount -t ext4 {device} /mnt
        cp -r /bin /lib/modules /mnt/
        cd /mnt
        find . -type f -print0 | sort -z | xargs -0 sha256sum > /tmp/sums
        for round in 1 2 3; do cp -r modules modules.$round; sync; rm -r modules.$round; done
        cd /
        umount /mnt""", timeout_s=timeout_s)
    files = int(t.sh("wc -l < /tmp/sums"))
    t.check(files > 30, f"only {files} files were copied")


def check(t, device, timeout_s):
    """The file system is clean, and the files are those that were copied. It stays mounted."""
    t.sh(f"e2fsck -fn {device}", timeout_s=timeout_s)
    t.sh(f"mount -t ext4 -o ro {device} /mnt")
    # Both the copies against their sums and the sums against the originals.
    t.sh("cd /mnt && sha256sum -c /tmp/sums >/tmp/checked 2>&1 || { grep -v ': OK' /tmp/checked; false; }", timeout_s=timeout_s)
    t.sh("cmp /mnt/bin/fio /bin/fio")
