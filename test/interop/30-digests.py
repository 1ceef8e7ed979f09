"""digests: header, data and both, under verified random I/O and a file system"""

NQN = "nqn.2026-11.io.ringstone:digests"


def test(t):
    t.target.start()
    t.target.subsystem(NQN)
    t.volume(NQN, 64)
    for options in ("--hdr-digest", "--data-digest", "--hdr-digest --data-digest"):
        t.connect(NQN, options)
        device = t.namespace(NQN)
        t.fio(device, 12, bsrange="512-96k" if t.sh(f"blockdev --getss {device}") == "512" else "4k-96k")
        t.check_never_reconnected()
        t.disconnect(NQN)
        t.eventually("! ls -d /sys/class/nvme/nvme*")
    t.check("digest error" not in t.kernel_log(), "the host complained of a digest")
