"""The command line of scripts/bench."""

import argparse
import json
import os
import sys
from pathlib import Path

from . import plot, report
from .cases import FAMILIES, TITLES
from .measure import Bench, BenchError

ROOT = Path(__file__).resolve().parents[3]


def arguments():
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description="Runs the standing benchmarks and prints their tables. Runs of all cases are "
        "interleaved, so that what disturbs the machine for a while disturbs all of them alike.")
    parser.add_argument("family", nargs="*", help=f"families to run, of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each case (default 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds of each run (default 1)")
    parser.add_argument("--quick", action="store_true", help="a few cases of each family")
    parser.add_argument("--target-core", type=int, default=0, help="core of the target (default 0)")
    parser.add_argument("--load-core", type=int, default=1, help="core of the load (default 1)")
    parser.add_argument("--disk", metavar="FOLDER", help="where the file on disk is made (default: the temporary folder)")
    parser.add_argument("--binary", default=str(ROOT / "target/release/ringstone"), help="the ringstone to measure")
    parser.add_argument("--ceiling", default=str(ROOT / "target/release/ceiling"), help="the loop that it is compared with")
    parser.add_argument("--json", metavar="FILE", default=str(ROOT / "target/bench.json"),
                        help="where all numbers go (default target/bench.json)")
    parser.add_argument("--docs", action="store_true", help="write the tables and plots into docs/benchmarks, too")
    options = parser.parse_args()
    for family in options.family:
        if family not in FAMILIES:
            parser.error(f"there is no family {family}; there are {', '.join(FAMILIES)}")
    if options.runs < 1 or options.seconds <= 0:
        parser.error("--runs and --seconds are more than 0")
    allowed = os.sched_getaffinity(0)
    if not {options.target_core, options.load_core} <= allowed:
        parser.error(f"--target-core and --load-core are of the cores that may be used: {sorted(allowed)}")
    if options.target_core == options.load_core:
        parser.error("--target-core and --load-core differ: on one core each would measure the other")
    return options


def main():
    options = arguments()
    cases = [case for name in options.family or FAMILIES for case in FAMILIES[name](options.quick)]
    runs, failed = {case.key: [] for case in cases}, {}
    about = report.machine(options)
    bench = Bench(options)
    try:
        for turn in range(options.runs):
            for i, case in enumerate(cases):
                if sys.stderr.isatty():
                    print(f"\rrun {turn + 1} of {options.runs}, case {i + 1} of {len(cases)} ", end="", file=sys.stderr)
                if case.key in failed:
                    continue
                try:
                    runs[case.key].append(bench.measure(case))
                except BenchError as error:
                    failed[case.key] = str(error)
                    print(f"\n{case.key}: {error}", file=sys.stderr)
    finally:
        bench.close()
    if sys.stderr.isatty():
        print(file=sys.stderr)
    found = [report.summary(case, runs[case.key]) for case in cases if runs[case.key] and case.key not in failed]
    Path(options.json).parent.mkdir(parents=True, exist_ok=True)
    Path(options.json).write_text(json.dumps({"machine": about, "cases": found, "failed": failed}, indent=1) + "\n")
    sections, draws = [report.sentence(about)], plot.available()
    folder = ROOT / "docs/benchmarks" if options.docs else Path(options.json).parent
    folder.mkdir(parents=True, exist_ok=True)
    for family in dict.fromkeys(case.family for case in cases):
        mine = [f for f in found if f["family"] == family]
        if not mine:
            continue
        text = f"## {TITLES[family]}\n\n{report.table(mine)}"
        if draws:
            plot.draw(TITLES[family], mine, folder / f"{family}.svg")
            text += f"\n\n![{TITLES[family]}]({family}.svg)"
        sections.append(text)
    page = "# Benchmarks\n\nWritten by `scripts/bench --docs`; docs/performance.md says how to read it.\n\n" + "\n\n".join(sections)
    if options.docs:
        (folder / "README.md").write_text(page + "\n")
    print("\n\n".join(sections))
    if not draws:
        print("\nNo plots: python3-matplotlib is not installed.", file=sys.stderr)
    print(f"\nAll numbers: {options.json}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
