"""What a test is given: the guest, the target, and the verbs of an NVMe/TCP host."""

import json
import re
import shlex
import uuid


class TestFailure(Exception):
    """Something is not as the test demands."""


class Host:
    """An identity that connects: NQN and host identifier."""

    def __init__(self, number):
        self.id = str(uuid.UUID(int=(0x4 << 76) | (0x8 << 60) | number))
        self.nqn = f"nqn.2014-08.org.nvmexpress:uuid:{self.id}"

    def options(self):
        return ["--hostnqn", self.nqn, "--hostid", self.id]


class Load:
    """fio writing and verifying over and over in the guest until told to stop."""

    def __init__(self, context, script, stop):
        self.context, self.stop_file = context, stop
        self.job = context.guest.start(script)

    def passes(self):
        return int(self.context.sh(f"cat {self.stop_file}.passes 2>/dev/null || echo 0"))

    def await_passes(self, count, timeout_s=240):
        """Waits until `count` more passes are complete than now."""
        aim = self.passes() + count
        self.context.eventually(f"[ $(cat {self.stop_file}.passes 2>/dev/null || echo 0) -ge {aim} ]"
                                f" || [ ! -e /run/job/{self.job.number}.pid ]", timeout_s)
        if self.job.ended:
            self.job.wait()  # raises what it failed with
            raise TestFailure("the load ended early without an error")

    def finish(self, timeout_s=240):
        """Ends after the pass under way, all of which must have been right."""
        self.context.sh(f"touch {self.stop_file}")
        passes = int(self.job.wait(timeout_s).out)
        self.context.check(passes > 0, "the load did not complete a single pass")


class Context:
    """Passed to each test as `t`."""

    def __init__(self, guest, target, console_start):
        self.guest, self.target = guest, target
        self.console_start = console_start
        self.hosts = [Host(number) for number in range(1, 5)]
        self.loads = 0
        self.sh, self.eventually = guest.sh, guest.eventually

    # Demands

    def check(self, condition, otherwise):
        if not condition:
            raise TestFailure(otherwise)

    def equal(self, found, expected, what):
        if found != expected:
            raise TestFailure(f"{what}: found {found!r}, expected {expected!r}")

    def refused(self, script, words="", timeout_s=120):
        """A script that must fail, saying something that matches `words`; what it said."""
        result = self.guest.run(script, timeout_s, check=False)
        said = result.out + result.err
        self.check(result.status != 0, f"this succeeded and should not:\n{script}\n{said}")
        self.check(re.search(words, said), f"failed without saying {words!r}: {said.strip()}\n{script}")
        return said

    def kernel_log(self):
        """What the guest's console showed since this test began."""
        return self.guest.console()[self.console_start:]

    def check_never_reconnected(self):
        trouble = re.findall(r"nvme nvme\d+: .*(?:reconnect|error recovery|timeout|keep-alive).*", self.kernel_log())
        self.check(not trouble, f"the host had to recover: {trouble}")

    # The host

    def where(self):
        """Options naming the target's address."""
        return f"--transport tcp --traddr {self.target.address} --trsvcid {self.target.port}"

    def nvme(self, command, timeout_s=120):
        """Runs nvme-cli; its JSON output."""
        return json.loads(self.sh(f"nvme {command} --output-format=json", timeout_s))

    def discover(self, host=None, options=""):
        """The records of the discovery log page by subsystem NQN, and its generation counter."""
        host = host or self.hosts[0]
        log = self.nvme(f"discover {self.where()} {shlex.join(host.options())} {options}")
        return {record["subnqn"]: record for record in log["records"]}, log["genctr"]

    def connect_command(self, nqn, options="", host=None):
        host = host or self.hosts[0]
        return f"nvme connect {self.where()} --nqn {nqn} {shlex.join(host.options())} {options}"

    def connect(self, nqn, options="", host=None):
        """Connects; the controller's name such as "nvme0"."""
        host = host or self.hosts[0]
        self.sh(self.connect_command(nqn, options, host), timeout_s=120)
        return self.sh(f"controller {nqn} {host.nqn}")

    def connect_as(self, host, nqn, options=""):
        """Connects through the kernel's own interface; the controller's name.

        For a second host identity: nvme-cli looks at the address and the subsystem alone and says "already connected".
        `options` are the kernel's, such as "nr_io_queues=2,hdr_digest".
        """
        words = [f"transport=tcp,traddr={self.target.address},trsvcid={self.target.port}", f"nqn={nqn}",
                 f"hostnqn={host.nqn}", f"hostid={host.id}", *([options] if options else [])]
        self.sh(f"echo {shlex.quote(','.join(words))} > /dev/nvme-fabrics", timeout_s=120)
        return self.sh(f"controller {nqn} {host.nqn}")

    def disconnect(self, nqn):
        self.sh(f"nvme disconnect --nqn {nqn}")

    def namespace(self, nqn, nsid=1, timeout_s=120):
        """The block device of a namespace, waited for."""
        self.eventually(f"namespace {nqn} {nsid}", timeout_s)
        return self.sh(f"namespace {nqn} {nsid}")

    def await_size(self, device, mib, timeout_s=120):
        """Waits until the kernel knows the device by this size."""
        self.eventually(f"[ $(sectors {device}) = {mib * 2048} ] || {{ sectors {device}; false; }}", timeout_s)

    def volume(self, nqn, mib, nsid=1, name=None, **options):
        """Makes a volume and its namespace; the volume's name."""
        name = name or f"volume-{nsid}"
        self.target.volume(name, mib, **options)
        self.target.add_namespace(nqn, name, nsid)
        return name

    # I/O

    def fio_command(self, device, size_mib, rw="randrw", offset_mib=0, **options):
        """A fio command line: asynchronous direct I/O, each block verified by crc32c after the writing."""
        chosen = {"bs": "4k", "iodepth": 16, "ioengine": "libaio", "direct": 1, "allow_file_create": 0, "verify": "crc32c", "verify_fatal": 1,
                  "verify_dump": 0, "randseed": 20261121, **options}
        words = ["fio", f"--name={rw}", f"--filename={device}", f"--rw={rw}", f"--size={size_mib}m",
                 f"--offset={offset_mib}m"]
        words += [f"--{key}" if value is True else f"--{key}={value}" for key, value in chosen.items()]
        return shlex.join(words)

    def fio(self, device, size_mib, timeout_s=300, **options):
        """Runs fio to its end; every block it wrote was read back right."""
        return self.sh(self.fio_command(device, size_mib, **options), timeout_s)

    def load(self, device, size_mib=4, **options):
        """Starts a Load on part of a device."""
        self.loads += 1
        stop = f"/run/load{self.loads}"
        command = self.fio_command(device, size_mib, **options)
        return Load(self, f"rm -f {stop} {stop}.passes; until_stopped {stop} {command}", stop)
