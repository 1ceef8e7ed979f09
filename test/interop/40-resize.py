"""resize under load: the host sees the new size without a reconnect and can use all of it"""

NQN = "nqn.2026-11.io.ringstone:resize"


def test(t):
    t.target.start()
    t.target.subsystem(NQN)
    volume = t.volume(NQN, 64)
    t.connect(NQN)
    device = t.namespace(NQN)
    t.await_size(device, 64)
    load = t.load(device)
    load.await_passes(1)
    for mib in (128, 192, 96, 256):
        t.target.resize(volume, mib)
        t.await_size(device, mib)
        t.fio(device, 8, offset_mib=mib - 8, rw="write", bs="64k")
        load.await_passes(1)
    load.finish()
    t.equal(t.sh(f"blockdev --getsize64 {device}"), str(256 << 20), "size an application sees")
    if t.target.name == "ringstone":
        # A bdev that is resized by a method of its own.
        t.volume(NQN, 32, nsid=2, name="nothing", kind="null")
        nothing = t.namespace(NQN, 2)
        t.await_size(nothing, 32)
        t.target.rpc("bdev_null_resize", name="nothing", new_size=48)
        t.await_size(nothing, 48)
    t.check_never_reconnected()
