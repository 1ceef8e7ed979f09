"""channels over soft-RoCE: what is missing is named, data is right both ways, the death of either end is noticed"""

import json
import random
import re
import signal
import subprocess
import time

from harness.process import free_port, stop

TARGETS = ("ringstone",)
ADDRESS = "10.0.2.15"
# Channels at once and MiB each way over all of them together. More than three at once need the care that the module on
# rsockets tells of; where it is not taken, one run in two of 16 ends with a segmentation fault.
RUNS = ((1, 64), (16, 64), (2, 4), (4, 4), (8, 4), (16, 4), (16, 4), (16, 4))
BENCH = "/opt/ringstone channel-bench"
# Both ends spin on two emulated processors: silence there means little.
PATIENT = "--silence-ms 60000"
FOREVER = str(1 << 40)
# Within this a peer's death is to be noticed. A machine may be busy just then; not each of so many times.
NOTICED_MS = 1000
TRIES = 20


def bench(t, options, timeout_s=600):
    return json.loads(t.sh(f"{BENCH} --json {options}", timeout_s))


def listen(t, port, transport, options=PATIENT):
    """A serving end in the guest."""
    said = f"/run/listen-{port}"
    job = t.guest.start(f"rm -f {said}; echo $$ >{said}.pid; "
                        f"exec {BENCH} --transport {transport} --listen {ADDRESS}:{port} {options} >{said} 2>{said}.err")
    t.eventually(f"grep -q 'listening on' {said} || {{ cat {said}.err; false; }}", 240)
    return job


def test(t):
    t.guest.install(t.target.binary, "/opt/ringstone")
    t.sh("no_soft_roce")
    # Without a device: named with the way to get one, and TCP works all the same.
    t.refused(f"{BENCH} --transport rsocket --address {ADDRESS}", "rdma link add rxe0 type rxe", 240)
    t.refused(f"{BENCH} --transport verbs --address {ADDRESS}", "rdma link add rxe0 type rxe", 240)
    results = bench(t, "--time 0.2 --sizes 4096")["results"]
    t.equal([("missing" in one) for one in results], [False, True, True], f"without a device: {results}")

    t.sh("soft_roce")
    # All three, in one run; the device is opened, memory registered, a greeting refused with a reason, one accepted.
    results = bench(t, f"--time 0.2 --address {ADDRESS} --sizes 64,65536")["results"]
    t.equal([one["transport"] for one in results], ["tcp"] * 2 + ["rsocket"] * 2 + ["verbs"] * 2, f"compared: {results}")
    t.check(all(one.get("bytes_per_second", 0) > 0 for one in results), f"nothing moved: {results}")
    print(json.dumps(results))

    listen(t, 7001, "rsocket")
    for channels, mib in RUNS:
        done = bench(t, f"--transport rsocket --connect {ADDRESS}:7001 --channels {channels} --bytes {mib << 20} {PATIENT}", 1200)
        t.equal(done["checked_bytes"], mib << 20, f"bytes over {channels} channels")
        print(f"    {mib} MiB each way over {channels} rsocket channels: {done['seconds']:.1f} s")

    for turn in range(2):
        kill_a_side(t, 7100 + turn, random.random())
    # The one that served throughout still does.
    done = bench(t, f"--transport rsocket --connect {ADDRESS}:7001 --channels 2 --bytes {1 << 16} {PATIENT}")
    t.equal(done["checked_bytes"], 1 << 16, "bytes after all that")
    t.sh("kill -9 $(cat /run/listen-7001.pid)")

    silent_over_tcp(t)
    silent_over_rsocket(t)


def silent_over_tcp(t):
    """Processes of this machine, whose clock can be trusted: the end of a channel whose peer dies knows within a second."""
    bench = [t.target.binary, "channel-bench", "--transport", "tcp"]

    def attempt(number):
        where = f"127.0.0.1:{free_port()}"
        server = client = None
        try:
            server = subprocess.Popen([*bench, "--listen", where], stdout=subprocess.PIPE, text=True)
            t.check("listening" in server.stdout.readline(), "the serving end listens")
            client = subprocess.Popen([*bench, "--connect", where, "--channels", "4", "--bytes", FOREVER],
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            t.check("4 channels are open" in client.stdout.readline(), "the channels are open")
            server.send_signal(number)
            since = time.monotonic()
            said = client.communicate(timeout=240)[1]
            t.equal(client.returncode, 1, f"the status of the end that went on: {said}")
            return round(1000 * (time.monotonic() - since)), said
        finally:
            for process in (server, client):
                stop(process)

    # Stopped, its connection stays and nothing comes over it any more; killed, its connection ends.
    for number, words in ((signal.SIGSTOP, "the peer has been silent for"), (signal.SIGKILL, "channel ")):
        told = []
        while not told or told[-1] >= NOTICED_MS and len(told) < TRIES:
            ms, said = attempt(number)
            t.check(words in said, f"it says what happened: {said}")
            told.append(ms)
        print(f"    a peer that got {number.name} was noticed after {told} ms")
        t.check(told[-1] < NOTICED_MS, f"time until a dead peer was noticed, each try: {told} ms")


def silent_over_rsocket(t):
    """The same in the guest, where the queue pair of a stopped process lives on in its kernel; how soon is not asked of it."""
    silence = "--silence-ms 5000"
    server = listen(t, 7200, "rsocket", silence)
    said = "/run/client.said"
    client = t.guest.start(f"exec {BENCH} --transport rsocket --connect {ADDRESS}:7200 --bytes {FOREVER} {silence} >{said} 2>&1")
    t.eventually(f"grep -q 'channels are open' {said} || [ ! -e /run/job/{client.number}.pid ]", 240)
    t.sh("kill -STOP $(cat /run/listen-7200.pid)")
    ended = client.wait(240, check=False)
    t.sh("kill -9 $(cat /run/listen-7200.pid)")
    server.wait(240, check=False)
    told = t.sh(f"cat {said}")
    t.equal(ended.status, 1, f"the end that went on: {told}")
    found = re.search(r"the peer has been silent for (\d+) ms", told)
    t.check(found and int(found[1]) >= 5000, f"it says that its peer is silent: {told}")


def kill_a_side(t, port, moment):
    """kill -9 of the serving end at a random moment of a transfer; then of the other one."""
    silence = "--silence-ms 5000"
    server = listen(t, port, "rsocket", silence)
    connect = f"{BENCH} --transport rsocket --connect {ADDRESS}:{port} --channels 4 --bytes {FOREVER} {silence}"
    client = t.guest.start(f"{connect} 2>&1")
    t.sh(f"usleep {int(moment * 3e6)}; kill -9 $(cat /run/listen-{port}.pid)")
    ended = client.wait(240, check=False)
    t.equal(ended.status, 1, f"the client whose server was killed: {ended}")
    t.check("ringstone: " in ended.out, f"it says what happened: {ended}")
    t.check("not permitted" not in ended.out, f"it says what happened, and not what did not: {ended}")
    server.wait(240, check=False)

    server = listen(t, port + 10, "rsocket", silence)
    connect = connect.replace(f":{port} ", f":{port + 10} ")
    client = t.guest.start(f"echo $$ >/run/client.pid; exec {connect}")
    t.sh(f"usleep {int(moment * 3e6) + 1000000}; kill -9 $(cat /run/client.pid)")
    client.wait(240, check=False)
    # Its channels end, if they had begun, and the server goes on. Where everything is emulated, the greeting may take longer
    # than is allowed for it.
    again = f"{BENCH} --transport rsocket --connect {ADDRESS}:{port + 10} --bytes {1 << 16} {PATIENT}"
    t.eventually(f"{again} 2>&1 | tee /run/again; grep -q '{1 << 16} bytes each way' /run/again", 240)
    t.sh(f"kill -9 $(cat /run/listen-{port + 10}.pid)")
    server.wait(240, check=False)
