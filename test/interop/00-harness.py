"""the harness itself: status, output, deadlines, concurrency, and that wrong data is noticed"""

from harness.machine import GuestError

TARGETS = ("nvmet",)
NQN = "nqn.2026-11.io.ringstone:harness"


def raises(run):
    try:
        run()
    except GuestError as error:
        return str(error)
    return None


def test(t):
    result = t.guest.run("echo out; echo err >&2; exit 7", check=False)
    t.equal((result.status, result.out, result.err), (7, "out\n", "err\n"), "status and outputs of a script")
    t.check(raises(lambda: t.sh("exit 3")), "a failing script was not reported")
    t.check("still running" in raises(lambda: t.sh("sleep 1000", timeout_s=1)), "a deadline was not kept")
    t.check("did not come true" in raises(lambda: t.eventually("false", timeout_s=1)), "false came true")
    large = t.sh("seq 1 100000")
    t.equal(large.splitlines()[-1], "100000", "the end of a large output")

    # A job that waits for a later one shows that they run at the same time.
    first = t.guest.start("until [ -e /tmp/second ]; do usleep 10000; done; echo first")
    second = t.guest.start("touch /tmp/second; echo second")
    t.equal((first.wait().out, second.wait().out), ("first\n", "second\n"), "concurrent scripts")

    # Damage behind the target's back must be found by the same checks that the tests rely on.
    t.target.start()
    t.target.subsystem(NQN)
    t.volume(NQN, 64, name="damaged")
    t.connect(NQN)
    device = t.namespace(NQN)
    t.fio(device, 4, rw="randwrite")
    t.sh("dd if=/dev/urandom of=/srv/damaged bs=4096 seek=200 count=1 conv=notrunc 2>/dev/null")
    said = t.refused(t.fio_command(device, 4, rw="randread"), "verify|crc32c")
    t.check("offset 819200" in said, f"fio did not name the damaged block: {said}")
    load = t.load(device)
    load.await_passes(1)
    load.finish()
