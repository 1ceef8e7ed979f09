"""over RDMA, under load: namespaces come, go and grow, controllers are reset, the target is killed, and nothing is lost"""

from harness.inside import Inside

TARGETS = ("ringstone",)
NQN = "nqn.2026-11.io.ringstone:rdma-changes"
OPTIONS = "--nr-io-queues 2 --ctrl-loss-tmo=600 --reconnect-delay=1 --keep-alive-tmo=20"
PASS_S = 400


def test(t):
    inside = Inside(t)
    inside.start_rdma()
    inside.subsystem(NQN)
    volume = inside.file(NQN, 1, 64)
    name = inside.connect(NQN, OPTIONS)
    device = t.namespace(NQN)
    # What it has acknowledged is durable, so that a crash may lose none of it.
    load = t.load(device, size_mib=2, sync="dsync", rw="randwrite")
    load.await_passes(1, PASS_S)

    namespaces(t, inside, load)
    for mib in (128, 96):
        inside.resize_file(volume, mib)
        t.await_size(device, mib)
        t.fio(device, 4, offset_mib=mib - 4, rw="write", bs="64k")
        load.await_passes(1, PASS_S)
    t.check_never_reconnected()

    # By its host: queue pairs are taken down and made again while I/O waits.
    for _ in range(2):
        t.sh(f"nvme reset /dev/{name}", 240)
        t.eventually(f"grep -q live /sys/class/nvme/{name}/state", 240)
        load.await_passes(1, PASS_S)

    # By its target, which is another process afterwards.
    for _ in range(2):
        inside.kill()
        t.eventually(f"grep -q connecting /sys/class/nvme/{name}/state", 240)
        inside.start("")
        t.eventually(f"grep -q live /sys/class/nvme/{name}/state", 240)
        load.await_passes(1, PASS_S)
    load.finish(PASS_S)

    t.disconnect(NQN)
    inside.await_no_controllers(NQN)
    inside.stop()


def namespaces(t, inside, load):
    inside.rpc("bdev_malloc_create", name="second", num_blocks=32 * 2048, block_size=512)
    for nsid in (2, 5):
        inside.add_namespace(NQN, nsid, "second")
        device = t.namespace(NQN, nsid)
        t.await_size(device, 32)
        t.fio(device, 2)
        # Taken away while it is in use: what was under way ends with errors, and its neighbour does not notice.
        busy = t.load(device, iodepth=32)
        busy.await_passes(1, PASS_S)
        inside.remove_namespace(NQN, nsid)
        ended = busy.job.wait(PASS_S, check=False)
        t.check(ended.status != 0, "fio went on although its namespace was removed")
        t.eventually(f"! namespace {NQN} {nsid}")
        load.await_passes(1, PASS_S)
