"""The command line of scripts/bench."""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from . import plot, report, stages
from .cases import CEILING, FAMILIES, LOCAL, TITLES
from .measure import Bench
from .process import BenchError

ROOT = Path(__file__).resolve().parents[3]
STAGES = "stages"


def named(text):
    """NAME=SOMETHING as a pair."""
    name, equals, value = text.partition("=")
    if not equals or not value or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=..., as in spdk=127.0.0.1:4420")
    return name, value


def named_address(text):
    name, value = named(text)
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"'{value}' is not ADDRESS:PORT, as in 127.0.0.1:4420")
    return name, (host.strip("[]"), int(port))


def named_pid(text):
    name, value = named(text)
    if not value.isdecimal() or not Path(f"/proc/{value}").exists():
        raise argparse.ArgumentTypeError(f"'{value}' is not the number of a process that runs")
    return name, int(value)


def arguments(words=None):
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description="Runs the standing benchmarks and prints their tables. Runs of all cases are "
        "interleaved, so that what disturbs the machine for a while disturbs all of them alike. What is interrupted, or "
        "fails, keeps what was measured before.",
        epilog="A peer is another target to measure in the same runs. It serves, for any host, a null device of 100 GiB as "
        "namespace 1 of nqn.2026-11.io.ringstone:bench-null, and 512 MiB of memory as that of "
        "nqn.2026-11.io.ringstone:bench-malloc, both with blocks of 4096 bytes. Its process is stopped (SIGSTOP) while "
        "others are measured, if it is known: --peer-command starts it, or --peer-pid names it.")
    parser.add_argument("family", nargs="*", help=f"families to run, of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT",
                        help="run a family, or the cases whose family, row or column contain a text; may be repeated")
    parser.add_argument("--list", action="store_true", help="name the cases, and run none")
    parser.add_argument("--runs", type=int, default=5, help="runs of each case (default 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds of each run (default 1)")
    parser.add_argument("--quick", action="store_true", help="a few cases of each family")
    parser.add_argument("--target-core", type=int, default=0, help="core of the target (default 0)")
    parser.add_argument("--load-core", type=int, default=1, help="core of the load (default 1)")
    parser.add_argument("--near", type=int, metavar="NS",
                        help="measure again, a few times, what was measured while the two cores were farther apart than so many "
                        "nanoseconds (a cache line's way there and back): for virtual machines whose cores are moved about")
    parser.add_argument("--disk", metavar="FOLDER", help="where the file on disk is made (default: the temporary folder)")
    parser.add_argument("--binary", default=str(ROOT / "target/release/ringstone"), help="the ringstone to measure")
    parser.add_argument("--ceiling", default=str(ROOT / "target/release/ceiling"), help="the loop that it is compared with")
    parser.add_argument("--peer", type=named_address, action="append", default=[], metavar="NAME=ADDRESS:PORT",
                        help="another target to measure beside it")
    parser.add_argument("--peer-command", type=named, action="append", default=[], metavar="NAME=COMMAND",
                        help="how a peer is started, on the target's core; it is ended when all is done")
    parser.add_argument("--peer-local", type=named, action="append", default=[], metavar="NAME=COMMAND",
                        help="a program to measure beside the families layer and files: how it loads one device on one core for so long. "
                             "{config} is a file of SPDK's format with the device {bdev}; {rw}, {bs}, {qd}, {seconds}, {core} and its "
                             "{mask} stand for themselves. It says what it did as JSON with iops, or in a line Total: IOPS")
    parser.add_argument("--peer-pid", type=named_pid, action="append", default=[], metavar="NAME=PID",
                        help="the process of a peer that runs already, for its CPU time and memory")
    parser.add_argument("--json", metavar="FILE", default=str(ROOT / "target/bench.json"),
                        help="where all numbers go (default target/bench.json)")
    parser.add_argument("--docs", action="store_true", help="write the tables and plots into docs/benchmarks, too")
    options = parser.parse_args(words)
    for family in options.family:
        if family not in FAMILIES and family != STAGES:
            parser.error(f"there is no family {family}; there are {', '.join(FAMILIES)}, and {STAGES}")
    options.stages = STAGES in options.family
    if options.stages and len(options.family) > 1:
        parser.error(f"{STAGES} is measured alone: it has tables of another kind")
    if options.runs < 1 or options.seconds <= 0:
        parser.error("--runs and --seconds are more than 0")
    for option in ("peer", "peer_command", "peer_pid", "peer_local"):
        setattr(options, option, dict(getattr(options, option)))
    for name in [*options.peer_command, *options.peer_pid]:
        if name not in options.peer:
            parser.error(f"the peer {name} has no address: give it with --peer {name}=ADDRESS:PORT")
    if both := set(options.peer_command) & set(options.peer_pid):
        parser.error(f"the peer {min(both)} is started, or runs already: give --peer-command or --peer-pid")
    for name, template in options.peer_local.items():
        try:
            template.format(config="", bdev="", rw="", bs=1, qd=1, seconds=1, core=0, mask="")
        except (LookupError, ValueError) as error:
            parser.error(f"--peer-local {name}: {error} is nothing that stands for something; --help names what does")
    if "ringstone" in [*options.peer, *options.peer_local]:
        parser.error("a peer has a name of its own, which is not ringstone")
    allowed = os.sched_getaffinity(0)
    if not {options.target_core, options.load_core} <= allowed:
        parser.error(f"--target-core and --load-core are of the cores that may be used: {sorted(allowed)}")
    if options.target_core == options.load_core:
        parser.error("--target-core and --load-core differ: on one core each would measure the other")
    return options, parser


def choose(options):
    """The cases that were asked for."""
    peers = {name: options.peer_local if name in LOCAL else options.peer for name in FAMILIES}
    cases = [case for name in options.family or FAMILIES for case in FAMILIES[name](options.quick, peers[name])]
    # With a case go the peers' that stand beside it.
    texts = {case: f"{case.key} {case.beside or ''}" for case in cases}
    return [case for case in cases if not options.only or any(text in texts[case] for text in options.only)]


def measure_stages(options, about):
    """Where the time of one command goes; printed, and written into the documentation."""
    found = stages.run(options, lambda text: print(text, file=sys.stderr))
    path = Path(options.json).with_name("bench-stages.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": about, "stages": found}, indent=1) + "\n")
    sections = [report.sentence(about, runs=False), *(f"## {row}\n\n{stages.table(what)}" for row, what in found.items())]
    text = "\n\n".join(sections)
    if options.docs and found:
        page = "# Where the time of one command goes\n\nWritten by `scripts/bench stages --docs`; docs/performance.md says how to read it.\n\n"
        (ROOT / "docs/benchmarks/stages.md").write_text(page + text + "\n")
    print(text)
    print(f"\nAll numbers: {path}", file=sys.stderr)
    return int(not found)


class Results:
    """What was measured so far."""

    def __init__(self, cases):
        self.cases, self.runs, self.failed, self.is_interrupted = cases, {case.key: [] for case in cases}, {}, False

    def found(self):
        found = [report.summary(case, self.runs[case.key], self.runs.get(case.beside), case.key in self.failed)
                 for case in self.cases if any(self.runs[case.key])]
        # Rows of other families may have the same name, and nothing to do with sockets.
        ceilings = {(f["family"], f["row"]): f["median"] for f in found if f["column"] == CEILING}
        for f in found:
            # A share is of what can be moved; times stand beside the bare ones as they are.
            has_share = f["column"] != CEILING and f["unit"] == "IOPS"
            ceiling = ceilings.get((f["family"], f["row"])) if has_share else None
            f["of_ceiling"] = f["median"] / ceiling if ceiling else None
        return found

    def save(self, path, about):
        document = {"machine": about, "interrupted": self.is_interrupted, "cases": self.found(), "failed": self.failed}
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all.
        new = path.with_name(path.name + ".new")
        new.write_text(json.dumps(document, indent=1) + "\n")
        new.replace(path)


def measure(options, results, about):
    """Measures all cases in turn until it is interrupted; every turn is kept when it is over."""
    bench = Bench(options)
    try:
        for turn in range(options.runs):
            for i, case in enumerate(results.cases):
                if sys.stderr.isatty():
                    print(f"\rrun {turn + 1} of {options.runs}, case {i + 1} of {len(results.cases)} ", end="", file=sys.stderr)
                # A turn that failed has its place, so that what ran side by side stays side by side.
                found = None
                if case.key not in results.failed:
                    try:
                        found = bench.measure_near(case)
                    except BenchError as error:
                        results.failed[case.key] = str(error)
                        print(f"\n{case.key}: {error}", file=sys.stderr)
                results.runs[case.key].append(found)
            results.save(Path(options.json), about)
    except KeyboardInterrupt:
        results.is_interrupted = True
        print("\ninterrupted: what was measured so far follows", file=sys.stderr)
    finally:
        # Whoever is impatient twice would leave targets behind.
        for word in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(word, signal.SIG_IGN)
        bench.close()
    if options.near:
        about["near"] = {"ns": options.near, "far": bench.far, "runs": sum(map(len, results.runs.values()))}
    if sys.stderr.isatty():
        print(file=sys.stderr)


def pages(options, results, about):
    """The tables, and the plots into their folder."""
    # What is in the documentation is whole.
    docs = options.docs and not results.is_interrupted
    if options.docs and not docs:
        print("docs/benchmarks stays as it was, since the run was interrupted", file=sys.stderr)
    sections, draws, found = [report.sentence(about)], plot.available(), results.found()
    folder = ROOT / "docs/benchmarks" if docs else Path(options.json).parent
    folder.mkdir(parents=True, exist_ok=True)
    for family in dict.fromkeys(f["family"] for f in found):
        mine = [f for f in found if f["family"] == family]
        text = f"## {TITLES[family]}\n\n{report.table(mine)}"
        if draws:
            plot.draw(TITLES[family], mine, folder / f"{family}.svg")
            text += f"\n\n![{TITLES[family]}]({family}.svg)"
        sections.append(text)
    if docs:
        page = "# Benchmarks\n\nWritten by `scripts/bench --docs`; docs/performance.md says how to read it.\n\n"
        (folder / "README.md").write_text(page + "\n\n".join(sections) + "\n")
    print("\n\n".join(sections))
    if not draws:
        print("\nNo plots: python3-matplotlib is not installed.", file=sys.stderr)


def main():
    options, parser = arguments()

    def stop(*_):
        raise KeyboardInterrupt

    for word in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(word, stop)
    if options.stages:
        try:
            return measure_stages(options, report.machine(options))
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return 130
    cases = choose(options)
    if not cases:
        parser.error(f"no case contains {' or '.join(options.only)}; --list names them")
    if options.list:
        print("\n".join(case.key for case in cases))
        return 0
    about, results = report.machine(options), Results(cases)
    try:
        measure(options, results, about)
    except BenchError as error:
        print(error, file=sys.stderr)
        return 1
    results.save(Path(options.json), about)
    pages(options, results, about)
    print(f"\nAll numbers: {options.json}", file=sys.stderr)
    return 130 if results.is_interrupted else int(bool(results.failed))


if __name__ == "__main__":
    sys.exit(main())
