"""Where the time of one command goes, stage by stage: `scripts/bench stages`.

Two tools look at the same load. perf samples the target's CPU time, in the kernel too: a sample in the kernel belongs to the
system call that it is under. callgrind counts every instruction of the target in user space; the same commands make the same
count on any machine, however busy. What either finds at an address is given to the innermost function of the project that is inlined
there, by the line information of the binary, and functions belong to stages by their files and names.
"""

import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

from .process import PATIENCE_S, BenchError, cpu_seconds, run_json
from .targets import Target

# Commands that callgrind counts: so many that connecting is nothing beside them.
COUNTED = 40_000
FREQUENCY_HZ = 4999
VALGRIND_PATIENCE_S = 240

RECEIVE, SEND, WAIT, KERNEL = "receive system call", "send system call", "waiting for readiness", "other kernel"
PARSE, TO_IO, LAYER, DEVICE = "parse", "command to operation", "bdev layer", "device"
DONE, ENCODE, OUT, MEMORY, LOOP = "completion", "encode", "gather and account output", "payload memory (drawing, copying)", "reactor loop"
COPY, REST = "C library (copying)", "rest"
ORDER = [RECEIVE, PARSE, TO_IO, LAYER, DEVICE, DONE, ENCODE, OUT, SEND, MEMORY, LOOP, COPY, WAIT, KERNEL, REST]

# Stage, file, function (any, if left out); the first that fits counts.
RULES = [(stage, re.compile(file), re.compile(function)) for stage, file, function in [
    (ENCODE, r"tcp/connection\.rs", r"^(complete|push_\w+|terminate\w*)$"),
    (OUT, r"tcp/connection\.rs", r"^(poll_output|sent|wants_output|pending_output_bytes)$"),
    (ENCODE, r"tcp/output\.rs", r"^(push|push_data|room|reserve)$"),
    (OUT, r"tcp/output\.rs", r""),
    (ENCODE, r"tcp/slots\.rs", r"^release$"),
    (OUT, r"tcp/transport\.rs", r"^(send_once|flush|has_output)$"),
    (ENCODE, r"tcp/transport\.rs", r"^complete$"),
    (PARSE, r"nvmf/src/tcp/", r""),
    (ENCODE, r"spec/(cqe|status)\.rs", r""),
    (PARSE, r"nvmf/src/spec/", r""),
    (DONE, r"poll_group/commands\.rs", r"^(completed|complete|note_error|unmark|is_media_error)$"),
    (DONE, r"target/io\.rs", r"^status_of$"),
    (TO_IO, r"poll_group/commands\.rs|target/io\.rs", r""),
    (OUT, r"target/poll_group\.rs", r"^(flush_all|want_flush|add_tally)$"),
    (DONE, r"target/poll_group\.rs", r"^complete_all$"),
    (LOOP, r"target/poll_group\.rs", r""),
    (TO_IO, r"nvmf/src/target/", r""),
    (LAYER, r"bdev/src/core/", r""),
    (DEVICE, r"bdev/src/modules/", r""),
    (MEMORY, r"reactor/src/buffer\.rs", r""),
    (LOOP, r"reactor/src/|bdev/nbd/src/|nvmf/initiator/src/", r""),
]]

# In the kernel: the first of the call chain that fits. What is on the way into a call or out of it is known by who made it.
CALLS = [(stage, re.compile(symbol)) for stage, symbol in [
    (RECEIVE, r"(sys|do|vfs)_(recvmsg|recvfrom|readv|read)$|OsStream as .*>::recv$"),
    (SEND, r"(sys|do|vfs)_(sendmsg|sendto|writev|write)$|OsStream as .*>::send$"),
    (WAIT, r"sys_epoll_(wait|pwait|pwait2)$|sys_ppoll$|EpollParker as .*>::wait$"),
]]

LOADS = [("null", "randread"), ("null", "randwrite"), ("malloc", "randread"), ("malloc", "randwrite")]

TOOLS = {
    "perf": "the columns of time are missing (package linux-perf)",
    "valgrind": "the column of instructions is missing (package valgrind)",
}


def stage_of(chain):
    """The stage of an address by what is inlined there, innermost first: pairs of function and file."""
    for function, file in chain:
        # Of a path, the last word; without the hash behind it.
        words = [word for word in re.findall(r"\w+", re.sub(r"<[^<>]*>|\{[^{}]*\}", "", function)) if not re.fullmatch(r"h[0-9a-f]{16}", word)]
        for stage, path, name in RULES:
            if path.search(file) and name.search(words[-1] if words else ""):
                return stage
    return REST


def parse_symbols(text):
    """What addr2line says with -a -f -i: chains by address."""
    chains, at, lines = {}, None, text.splitlines()
    i = 0
    while i < len(lines):
        if lines[i].startswith("0x"):
            at = int(lines[i], 16)
            chains[at] = []
            i += 1
        else:
            chains[at].append((lines[i], lines[i + 1].rsplit(":", 1)[0]))
            i += 2
    return chains


def symbols(binary, addresses):
    """Chains by address in a binary."""
    tool = ["llvm-symbolizer", "--output-style=GNU"] if shutil.which("llvm-symbolizer") else ["addr2line"]
    if not shutil.which(tool[0]):
        raise BenchError("neither llvm-symbolizer nor addr2line is installed: install the package binutils")
    done = subprocess.run([*tool, "-a", "-f", "-i", "-C", "-e", binary], input="\n".join(map(hex, addresses)), text=True,
                          capture_output=True, timeout=10 * PATIENCE_S, check=True)
    return parse_symbols(done.stdout)


def by_stage(binary, counts):
    """Counts by address as counts by stage."""
    chains = symbols(binary, sorted(counts))
    found = Counter()
    for address, count in counts.items():
        found[stage_of(chains.get(address, []))] += count
    return found


def parse_callgrind(text, binary):
    """Instructions by address in a binary, and those of other objects by name. `text` has neither names nor positions
    compressed."""
    inside, outside, here, is_call = Counter(), Counter(), "", False
    name = str(Path(binary).resolve())
    for line in text.splitlines():
        if line.startswith("ob="):
            here = line[3:]
        elif line.startswith("calls="):
            # The next line has what the callee took, which is the callee's.
            is_call = True
        elif line.startswith("0x"):
            if is_call:
                is_call = False
                continue
            words = line.split()
            address, cost = int(words[0], 16), int(words[2]) if len(words) > 2 else 0
            if here == name:
                inside[address] += cost
            else:
                outside[Path(here).name] += cost
    return inside, outside


def parse_samples(text, binary):
    """Samples of `perf script -F ip,sym,dso`, one block each, innermost first: counts by kernel stage, by place in a binary's file, and
    of anything else."""
    own = f"({Path(binary).resolve()})"
    kernel, inside, other = Counter(), Counter(), 0
    for block in text.split("\n\n"):
        frames = [line.split(maxsplit=1) for line in block.splitlines() if line.strip()]
        if not frames:
            continue
        address, where = int(frames[0][0], 16), frames[0][-1]
        if address >= 1 << 63:
            names = [re.sub(r" \(.*", "", rest[0]).split("+")[0] if rest else "" for _, *rest in frames]
            stages = [stage for name in names for stage, symbol in CALLS if symbol.search(name)]
            kernel[stages[0] if stages else KERNEL] += 1
        elif where.endswith(own):
            inside[address] += 1
        else:
            other += 1
    return kernel, inside, other


def segments(binary):
    """What an ELF file has loaded: place in the file, bytes, address."""
    with open(binary, "rb") as file:
        head = file.read(64)
        if head[:5] != b"\x7fELF\x02":
            raise BenchError(f"{binary} is not a program of 64 bits")
        start, size, count = struct.unpack_from("<Q", head, 32)[0], *struct.unpack_from("<HH", head, 54)
        file.seek(start)
        headers = [file.read(size) for _ in range(count)]
    loads = [struct.unpack_from("<IIQQQQ", header) for header in headers]
    return [(offset, bytes_, address) for kind, _, offset, address, _, bytes_ in loads if kind == 1]


def addresses(counts, loaded):
    """Counts by place in a file as counts by address."""
    found = Counter()
    for place, count in counts.items():
        for offset, bytes_, address in loaded:
            if offset <= place < offset + bytes_:
                found[place - offset + address] += count
    return found


class Stages:
    """Measures the stages of one load after the other."""

    def __init__(self, options, folder):
        self.options, self.folder = options, folder

    def _target(self, wrapper=(), patience_s=None):
        folder = tempfile.mkdtemp(dir=self.folder)
        return Target(self.options.binary, self.options.target_core, self.options.load_core, folder, wrapper=wrapper,
                      patience_s=patience_s)

    def _load(self, target, bdev, rw, more):
        return [self.options.binary, "perf", *target.address(bdev), "--rw", rw, "--bs", "4096", "--qd", "128", "--core",
                str(self.options.load_core), "--warmup", "0", "--json", *more]

    def time(self, bdev, rw):
        """CPU nanoseconds of a command by stage, sampled."""
        target = self._target()
        try:
            target.fill() if bdev == "malloc" else None
            seconds = 2 * max(self.options.seconds, 1.0)
            data = str(Path(self.folder) / "perf.data")
            with subprocess.Popen(self._load(target, bdev, rw, ["--time", str(seconds + 2)]), stdin=subprocess.DEVNULL,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as load:
                time.sleep(0.7)
                before, cpu = completed(target), cpu_seconds(target.pid)
                record = ["perf", "record", "-q", "-e", "cpu-clock", "-F", str(FREQUENCY_HZ), "-g", "-o", data, "-p", str(target.pid)]
                done = subprocess.run([*record, "--", "sleep", str(seconds)], text=True, capture_output=True, timeout=seconds + PATIENCE_S)
                commands, cpu = completed(target) - before, cpu_seconds(target.pid) - cpu
                load.terminate()
            if done.returncode != 0 or commands <= 0:
                raise BenchError(f"perf cannot sample: {done.stderr.strip()}")
        finally:
            target.close()
        script = subprocess.run(["perf", "script", "-i", data, "-F", "ip,sym,dso"], text=True, capture_output=True,
                                timeout=10 * PATIENCE_S, check=True).stdout
        Path(data).unlink()
        found, inside, other = parse_samples(script, self.options.binary)
        found.update(by_stage(self.options.binary, addresses(inside, segments(self.options.binary))))
        found[COPY] += other
        all_samples = sum(found.values())
        if all_samples == 0:
            raise BenchError("perf found no sample")
        each_ns = cpu / commands * 1e9
        return {stage: each_ns * count / all_samples for stage, count in found.items()}

    def instructions(self, bdev, rw):
        """Instructions of a command in user space by stage, counted."""
        out = Path(self.folder) / "callgrind.out"
        wrapper = [sys.executable, str(Path(__file__).with_name("auxv.py")), "valgrind", "--tool=callgrind", "--instr-atstart=no", "--dump-instr=yes", "--compress-strings=no",
                   "--compress-pos=no", f"--callgrind-out-file={out}"]
        target = self._target(wrapper, VALGRIND_PATIENCE_S)
        try:
            if bdev == "malloc":
                target.fill()
            # Connected once before, so that what is made at first is there.
            command = self._load(target, bdev, rw, ["--count"])
            run_json([*command, "2000"], VALGRIND_PATIENCE_S)
            control(target.pid, "-i", "on")
            run_json([*command, str(COUNTED)], VALGRIND_PATIENCE_S)
            control(target.pid, "-i", "off")
            control(target.pid, "--dump")
        finally:
            target.close()
        inside, outside = Counter(), Counter()
        for path in out.parent.glob("callgrind.out*"):
            there, elsewhere = parse_callgrind(path.read_text(), self.options.binary)
            inside.update(there)
            outside.update(elsewhere)
            path.unlink()
        found = by_stage(self.options.binary, inside)
        found[COPY] += sum(outside.values())
        return {stage: count / COUNTED for stage, count in found.items()}


def completed(target):
    return sum(group["completed_nvme_io"] for group in target.rpc("nvmf_get_stats")["poll_groups"])


def control(pid, *words):
    done = subprocess.run(["callgrind_control", *words, str(pid)], text=True, capture_output=True, timeout=VALGRIND_PATIENCE_S)
    if done.returncode != 0 or "ERROR" in done.stdout:
        raise BenchError(f"callgrind_control: {done.stdout.strip()} {done.stderr.strip()}")


def cell(value):
    return "" if value is None else f"{value:.0f}"


def table(found):
    """One load's stages, as a Markdown table. `found` has time and instructions by stage, or `None` for what is not known."""
    spent, counted = found.get("time"), found.get("instructions")
    lines = ["| stage | CPU time, ns | share | instructions in user space |", "|---|---|---|---|"]
    whole = sum(spent.values()) if spent else 0

    def line(name, ns, instructions):
        share = "" if ns is None else f"{100 * ns / whole:.0f} %"
        return f"| {name} | {cell(ns)} | {share} | {cell(instructions)} |"

    for stage in ORDER:
        ns, instructions = spent and spent.get(stage), counted and counted.get(stage)
        if (ns or 0) >= 0.5 or (instructions or 0) >= 0.5:
            lines.append(line(stage, ns, instructions))
    kernel = sum(spent.get(stage, 0) for stage in (RECEIVE, SEND, WAIT, KERNEL)) if spent else None
    lines.append(line("**all**", whole if spent else None, sum(counted.values()) if counted else None))
    lines.append(line("of it in the kernel", kernel, None))
    return "\n".join(lines)


def run(options, say):
    """Measures all loads; a table of each, by its name. What is missing is said by `say`."""
    tools = {tool for tool in TOOLS if shutil.which(tool)}
    for tool, lacks in TOOLS.items():
        if tool not in tools:
            say(f"{tool} is not installed: {lacks}")
    found = defaultdict(dict)
    with tempfile.TemporaryDirectory(prefix="ringstone-stages-") as folder:
        stages = Stages(options, folder)
        for bdev, rw in LOADS[:1] if options.quick else LOADS:
            row = f"{bdev} 4K {rw}, one queue of depth 128"
            for tool, what, measure in (("perf", "time", stages.time), ("valgrind", "instructions", stages.instructions)):
                if tool not in tools:
                    continue
                try:
                    found[row][what] = measure(bdev, rw)
                except (BenchError, OSError, subprocess.SubprocessError, ValueError, LookupError) as error:
                    say(f"stages of {row} by {tool}: {error}")
    return dict(found)
