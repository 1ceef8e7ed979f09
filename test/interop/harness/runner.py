"""Chooses the tests, gives each a guest and a target, and reports.

One boot serves many tests. After a test has failed the guest is booted anew, so that no test pays for another's mess.
"""

import argparse
import fnmatch
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from . import image as images
from .context import Context, TestFailure
from .machine import Guest, GuestError
from .process import HarnessError
from .targets import Nvmet, Ringstone, TargetError

ROOT = Path(__file__).resolve().parents[3]
TESTS = ROOT / "test" / "interop"
RUNS_KEPT = 8
PROCESSORS = 4
MEMORY_MIB = 2048


class Test:
    """A file NN-name.py with a function `test(t)`; its `TARGETS` names the targets it is for, by default both."""

    def __init__(self, path):
        self.name = path.stem
        spec = importlib.util.spec_from_file_location("interop_" + self.name.replace("-", "_"), path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.run = module.test
        self.summary = (module.__doc__ or "").strip().splitlines()[0]
        self.targets = getattr(module, "TARGETS", ("ringstone", "nvmet"))

    def matches(self, word):
        number, _, rest = self.name.partition("-")
        return word in (number, rest) or fnmatch.fnmatchcase(self.name, word)


def say(text):
    print(text, flush=True)


def arguments():
    parser = argparse.ArgumentParser(prog="scripts/guest", description=(
        "Runs the interoperability tests: a Debian kernel under QEMU connects over NVMe/TCP to a ringstone on this machine."))
    parser.add_argument("tests", nargs="*", metavar="TEST", help="test names, numbers or patterns such as '9*'; all when none is given")
    parser.add_argument("--kernel", default="6.1", help="kernel series of the guest, such as 6.1 or 6.12 (default %(default)s)")
    parser.add_argument("--if-offered", action="store_true",
                        help="where apt offers no kernel of that series, say so and pass")
    parser.add_argument("--binary", help="the ringstone to test (default target/release/ringstone, built when missing)")
    parser.add_argument("--self-test", action="store_true",
                        help="run the tests against the kernel's own target, to tell a bad harness from a bad target")
    parser.add_argument("--list", action="store_true", help="list the tests")
    parser.add_argument("--keep", action="store_true", help="keep the volumes of tests that pass, too")
    return parser.parse_args()


def choose(wanted, target_name):
    tests = [Test(path) for path in sorted(TESTS.glob("[0-9][0-9]-*.py"))]
    for word in wanted:
        if not any(test.matches(word) for test in tests):
            raise HarnessError(f"there is no test {word!r}; --list names them")
    chosen = [test for test in tests if not wanted or any(test.matches(word) for word in wanted)]
    return [test for test in chosen if target_name in test.targets]


def target_folder():
    return Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")


def run_folder():
    """A new folder for the logs of this run; old ones are removed."""
    base = target_folder() / "guest"
    folder = base / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder.mkdir(parents=True)
    for old in sorted(path for path in base.iterdir() if path.is_dir())[:-RUNS_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def binary(chosen):
    """The path of the ringstone to test; the default one is built when it is missing."""
    if chosen:
        path = Path(chosen).resolve()
        if not os.access(path, os.X_OK):
            raise HarnessError(f"--binary {chosen}: not an executable file")
        return str(path)
    path = target_folder() / "release" / "ringstone"
    if not path.exists():
        say("building target/release/ringstone")
        if subprocess.run(["cargo", "build", "--release"], cwd=ROOT).returncode != 0:
            raise HarnessError("cargo build --release failed")
    return str(path)


class Session:
    """The guest shared by the tests, booted when first needed."""

    def __init__(self, image, folder):
        self.image, self.folder = image, folder
        self.guest = None
        self.boots = 0

    def ready(self):
        if self.guest is None:
            self.boots += 1
            folder = self.folder / f"guest-{self.boots}"
            folder.mkdir()
            started = time.monotonic()
            self.guest = Guest(self.image, folder, PROCESSORS, MEMORY_MIB)
            say(f"booted {self.image.about} ({time.monotonic() - started:.1f} s)")
        return self.guest

    def close(self):
        if self.guest is not None:
            self.guest.close()
            self.guest = None


def clean_up(guest):
    """Takes away what a test left in the guest; raises when something cannot be removed."""
    guest.sh("""
        for stop in /run/load*.passes; do touch "${stop%.passes}"; done
        ! grep -q ' /mnt ' /proc/mounts || umount /mnt
        nvme disconnect-all""")
    guest.eventually("! ls -d /sys/class/nvme/nvme* 2>/dev/null && ! ls -d /sys/block/nvme* 2>/dev/null")
    guest.sh("rm -rf /tmp/* /run/load*")


def explain(error):
    """What went wrong, for people: the message alone for an expected kind of failure, else where it came from."""
    if isinstance(error, (TestFailure, GuestError, TargetError)):
        frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent == TESTS]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}: " if frames else ""
        return f"{place}{error}"
    return "".join(traceback.format_exception(error))


def run_one(test, session, make_target, keep):
    """Runs one test; a description of its failure, or None."""
    folder = session.folder / test.name
    folder.mkdir()
    guest = session.ready()
    console_start = len(guest.console())
    guest.mark(f"test {test.name}")
    target = make_target(guest, folder)
    problems = []
    try:
        try:
            test.run(Context(guest, target, console_start))
            clean_up(guest)
            problems.append(target.finish())
        except Exception as error:
            problems.append(explain(error))
        problems += guest.trouble(console_start)
        problems = [problem for problem in problems if problem]
    finally:
        target.close()
        (folder / "console.log").write_text(guest.console()[console_start:])
    if not problems and not keep:
        target.discard_volumes()
    if not problems:
        return None
    (folder / "failure").write_text("\n".join(problems) + "\n")
    session.close()
    return "\n".join(problems)


def run_all(tests, session, make_target, keep):
    passed = failed = 0
    for test in tests:
        started = time.monotonic()
        problem = run_one(test, session, make_target, keep)
        if problem is None:
            passed += 1
            say(f"ok {test.name} ({time.monotonic() - started:.1f} s)")
        else:
            failed += 1
            say(f"FAILED {test.name}")
            say("    " + problem.strip().replace("\n", "\n    "))
            say(f"    logs: {session.folder / test.name}")
    return passed, failed


def main():
    # Also where a script started this in the background and so had it ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    options = arguments()
    session = None
    try:
        if options.list:
            for test in choose([], "nvmet" if options.self_test else "ringstone"):
                say(f"{test.name:24} {test.summary}")
            return 0
        tests = choose(options.tests, "nvmet" if options.self_test else "ringstone")
        if options.self_test:
            make_target = lambda guest, folder: Nvmet(guest)
        else:
            path = binary(options.binary)
            make_target = lambda guest, folder: Ringstone(path, folder)
        image = images.build(options.kernel, TESTS / "guest", say)
        session = Session(image, run_folder())
        passed, failed = run_all(tests, session, make_target, options.keep)
    except images.NoKernel as error:
        print(f"scripts/guest: {'skipped: ' if options.if_offered else ''}{error}", file=sys.stderr, flush=True)
        return 0 if options.if_offered else 2
    except HarnessError as error:
        print(f"scripts/guest: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("scripts/guest: interrupted", file=sys.stderr, flush=True)
        return 130
    finally:
        if session is not None:
            session.close()
    say(f"{passed} passed, {failed} failed")
    return 0 if failed == 0 and passed > 0 else 1
