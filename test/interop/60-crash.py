"""kill -9 under load: the host reconnects by itself and every acknowledged, flushed write is there"""

from harness.targets import FIRST_VOLUME_NQN

EXTRA = "nqn.2026-11.io.ringstone:extra"
BLOCK = 4096
LEDGER_MIB = 512  # where on the volume the ledger's blocks begin; fio's are far below
ROUNDS = 3


def test(t):
    """Two writers go on through three crashes.

    fio writes synchronously, so all it got acknowledged is durable, and verifies each pass. The ledger writes block
    after block, each flushed, never the same twice, and notes in the guest's memory what was acknowledged: a block
    lost in a crash cannot be healed by a later write and is found at the end.
    """
    t.target.start(first_volume=True)
    t.target.subsystem(EXTRA)
    t.volume(EXTRA, 32, name="extra")
    options = "--nr-io-queues=4 --ctrl-loss-tmo=600 --reconnect-delay=1 --keep-alive-tmo=10"
    t.connect(FIRST_VOLUME_NQN, options)
    t.connect(EXTRA, options, host=t.hosts[1])
    device, extra = t.namespace(FIRST_VOLUME_NQN), t.namespace(EXTRA)
    t.fio(extra, 8, rw="write", bs="64k", end_fsync=1)

    load = t.load(device, size_mib=2, sync="dsync", iodepth=8, rw="randwrite")
    ledger = t.guest.start(f"""
        rm -f /run/ledger /run/ledger.stop
        block={LEDGER_MIB << 20 >> 12}
        i=0
        until [ -e /run/ledger.stop ]; do
            printf %0{BLOCK}d $i > /tmp/stamp
            dd if=/tmp/stamp of={device} bs={BLOCK} seek=$((block + i)) oflag=direct conv=notrunc,fsync 2>/tmp/dd ||
                {{ cat /tmp/dd; exit 1; }}
            i=$((i + 1))
            echo $i >/run/ledger.new && mv /run/ledger.new /run/ledger
        done""")
    await_ledger(t, ledger, 20)
    load.await_passes(1)
    for _ in range(ROUNDS):
        t.target.crash()
        t.eventually("grep -q connecting /sys/class/nvme/nvme*/state")
        t.target.restart()
        t.eventually("! grep -qv live /sys/class/nvme/nvme*/state", 120)
        await_ledger(t, ledger, 30)
        load.await_passes(1)
    t.sh("touch /run/ledger.stop")
    ledger.wait()
    load.finish()
    check_ledger(t, device)
    t.fio(extra, 8, rw="read", bs="64k")

    # And with a new connection, after one more crash with nothing under way.
    t.sh("nvme disconnect-all")
    t.target.crash()
    t.target.restart()
    t.connect(FIRST_VOLUME_NQN)
    t.connect(EXTRA)
    check_ledger(t, t.namespace(FIRST_VOLUME_NQN))
    t.fio(t.namespace(EXTRA), 8, rw="read", bs="64k")


def await_ledger(t, ledger, more):
    aim = int(t.sh("cat /run/ledger 2>/dev/null || echo 0")) + more
    t.eventually(f"[ $(cat /run/ledger 2>/dev/null || echo 0) -ge {aim} ] || [ ! -e /run/job/{ledger.number}.pid ]", 120)
    if ledger.ended:
        ledger.wait()
        t.check(False, "the ledger's writer ended early without an error")


def check_ledger(t, device):
    """Reads every acknowledged block directly, past the guest's page cache."""
    count = int(t.sh("cat /run/ledger"))
    result = t.guest.run(f"""
        i=0
        while [ $i -lt {count} ]; do printf %0{BLOCK}d $i; i=$((i + 1)); done > /tmp/expected
        dd if={device} bs={BLOCK} skip={LEDGER_MIB << 20 >> 12} count={count} iflag=direct 2>/dev/null | cmp - /tmp/expected
        """, check=False)
    t.equal(result.status, 0, f"{count} acknowledged and flushed blocks ({(result.out + result.err).strip()})")
