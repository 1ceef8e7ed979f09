"""Tests of what surrounds the measuring: cases, arguments, sums, and what is kept of a run that ends early."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import types
import unittest
from pathlib import Path
from unittest import mock

from . import __main__ as command
from . import measure, report, stages
from .cases import FAMILIES
from .process import BenchError, cpu_seconds
from .targets import end


def options(*words):
    # On whatever cores there are.
    with mock.patch("os.sched_getaffinity", return_value={0, 1}):
        return command.arguments(words)[0]


def report_of(p99):
    return {"percentiles_us": {"99": p99}, "mean_us": p99 / 2}


class Fake:
    """In place of what measures: tells a number, fails, or is interrupted."""

    def __init__(self, does):
        self.does, self.is_closed, self.far = does, False, 0

    def measure_near(self, case):
        return self.does(case)

    def close(self):
        self.is_closed = True


class Cases(unittest.TestCase):
    def test_every_case_can_be_measured_and_has_a_name_of_its_own(self):
        for quick in (False, True):
            cases = [case for family in FAMILIES.values() for case in family(quick, {"other": None})]
            self.assertEqual(len(cases), len({case.key for case in cases}))
            for case in cases:
                self.assertTrue(hasattr(measure.Bench, f"_{case.kind}"), case.kind)

    def test_a_peer_stands_beside_what_it_is_compared_with(self):
        cases = command.choose(options("--only", "fairness", "--peer", "other=10.0.0.1:4420"))
        for ours, theirs in zip(cases[::2], cases[1::2]):
            self.assertEqual((theirs.beside, theirs.column, theirs.options["peer"]), (ours.key, "other", "other"))

    def test_words_that_make_no_sense_say_what_would(self):
        for words, says in [
            (["--peer", "x"], "as in spdk=127.0.0.1:4420"),
            (["--peer", "x=1"], "is not ADDRESS:PORT"),
            (["--peer-command", "y=true"], "give it with --peer y="),
            (["--peer", "y=a:1", "--peer-command", "y=true", "--peer-pid", f"y={os.getpid()}"], "--peer-command or --peer-pid"),
            (["--peer", "ringstone=a:1"], "a name of its own"),
            (["--peer-local", "other=run {what}"], "'what' is nothing"),
            (["nothing"], "there is no family nothing"),
            (["--target-core", "1"], "differ"),
        ]:
            said = io.StringIO()
            with contextlib.redirect_stderr(said), self.assertRaises(SystemExit):
                options(*words)
            self.assertIn(says, said.getvalue())


class Sums(unittest.TestCase):
    def test_runs_that_were_side_by_side_are_compared(self):
        ours, theirs, _ = command.choose(options("--only", "wake", "--quick", "--peer", "other=a:1"))
        mine = [(10, None, report_of(4.0)), None, (30, "load", report_of(9.0))]
        others = [(5, None, report_of(2.0)), (1, None, report_of(1.0)), (10, None, report_of(9.0))]
        found = report.summary(theirs, others, mine, False)
        self.assertEqual((found["median"], found["ratio"], found["p99_ratio"]), (5, 2.5, 1.5))
        self.assertIn("ringstone 2.50 times that, p99 1.50 times", report.cell(found))
        alone = report.summary(ours, mine, None, True)
        self.assertEqual((alone["runs"], alone["limit"], alone["ratio"]), ([10, 30], "load", None))
        self.assertIn("failed after 2 runs", report.cell(alone))

    def test_a_program_tells_what_it_did(self):
        self.assertEqual(measure.told_iops('{"iops": 12.5}'), 12.5)
        table = " Device : IOPS\n Null0 : 1.00\n ===\n Total                       :   17400000.25   67968.75    0.00\n"
        self.assertEqual(measure.told_iops(table), 17400000.25)
        with self.assertRaises(BenchError):
            measure.told_iops("segmentation fault")

    def test_programs_stand_beside_the_families_in_one_process(self):
        cases = command.choose(options("layer", "nvmf", "--quick", "--peer-local", "other=run {config} {bdev}"))
        beside = [case for case in cases if case.beside]
        self.assertEqual({(case.family, case.column, case.options["peer"]) for case in beside}, {("layer", "other", "other")})

    def test_each_cell_tells_its_share_of_the_bare_sockets(self):
        cases = command.choose(options("nvmf", "--quick", "--only", "null 4K randread depth 128"))
        results = command.Results(cases)
        for case in cases:
            results.runs[case.key] = [(50.0 if case.kind == "ceiling" else 40.0, None, None)]
        self.assertEqual({found["of_ceiling"] for found in results.found()}, {None, 0.8})
        self.assertIn(", 80 %", report.table(results.found()))

    def test_a_row_of_another_family_has_no_share(self):
        cases = command.choose(options("nvmf", "layer", "--only", "null 4K randread depth 128"))
        results = command.Results(cases)
        for case in cases:
            results.runs[case.key] = [(50.0, None, None)]
        self.assertEqual({found["of_ceiling"] for found in results.found() if found["family"] == "layer"}, {None})

    def test_the_limit_is_named(self):
        limits = [measure.limit(*pair) for pair in ((1.0, 1.0), (1.0, 0.1), (0.1, 1.0), (0.1, 0.1), (None, 0.1), (None, 1.0))]
        self.assertEqual(limits, ["both", "target", "load", "latency", None, "load"])


class Distance(unittest.TestCase):
    def bench(self, near, distances):
        bench = object.__new__(measure.Bench)
        bench.options, bench.far, bench.measured = options("--near", "200") if near else options(), 0, 0
        bench._is_near = lambda: next(distances) <= 200

        def count(_):
            bench.measured += 1
            return bench.measured

        bench.measure = count
        return bench

    def test_what_was_measured_between_far_cores_is_measured_again(self):
        case = next(FAMILIES["nvmf"](True, {}))
        with mock.patch("time.sleep"):
            # Far before; moved apart meanwhile; near.
            bench = self.bench(True, iter([400, 100, 400, 100, 100]))
            self.assertEqual((bench.measure_near(case), bench.far), (2, 0))
            # Never near: it is measured all the same, and told.
            bench = self.bench(True, iter(lambda: 400, None))
            self.assertEqual((bench.measure_near(case), bench.far), (1, 1))
            about = {**report.machine(bench.options), "near": {"ns": 200, "far": bench.far, "runs": 3}}
            self.assertIn("within 200 ns of each other in all but 1 of 3 measurements", report.sentence(about))

    def test_nobody_asks_for_it_or_it_makes_no_difference(self):
        nvmf, layer = next(FAMILIES["nvmf"](True, {})), next(FAMILIES["layer"](True, {}))
        self.assertEqual(self.bench(False, iter(())).measure_near(nvmf), 1)
        self.assertEqual(self.bench(True, iter(())).measure_near(layer), 1)


class EarlyEnds(unittest.TestCase):
    def run_with(self, does):
        with tempfile.TemporaryDirectory() as folder:
            chosen = options("--only", "layer", "--quick", "--runs", "3", "--json", f"{folder}/out.json")
            results, bench = command.Results(command.choose(chosen)), Fake(does)
            kept = {word: signal.getsignal(word) for word in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
            try:
                with mock.patch.object(command, "Bench", lambda _: bench), contextlib.redirect_stderr(io.StringIO()):
                    command.measure(chosen, results, {})
            finally:
                for word, handler in kept.items():
                    signal.signal(word, handler)
            results.save(Path(chosen.json), {})
            self.assertTrue(bench.is_closed)
            return json.loads(Path(chosen.json).read_text())

    def test_a_case_that_fails_keeps_its_runs_and_those_of_others(self):
        calls = []

        def does(case):
            calls.append(case.key)
            if "randwrite" in case.key and calls.count(case.key) == 2:
                raise BenchError("it broke")
            return len(calls), None, None

        out = self.run_with(does)
        self.assertEqual([len(case["runs"]) for case in out["cases"]], [3, 1])
        self.assertEqual([case["failed"] for case in out["cases"]], [False, True])
        self.assertEqual(list(out["failed"].values()), ["it broke"])
        self.assertFalse(out["interrupted"])

    def test_an_interrupt_keeps_what_was_measured(self):
        calls = []

        def does(case):
            calls.append(case.key)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return len(calls), None, None

        out = self.run_with(does)
        self.assertEqual([case["runs"] for case in out["cases"]], [[1, 3], [2]])
        self.assertTrue(out["interrupted"])

    def test_what_goes_wrong_in_a_case_is_that_cases_failure(self):
        bench = types.SimpleNamespace(_odd=lambda: json.loads("{"))
        with self.assertRaises(BenchError):
            measure.Bench.measure(bench, types.SimpleNamespace(kind="odd", options={}))


class Stages(unittest.TestCase):
    def test_an_address_belongs_to_the_innermost_function_of_the_project(self):
        std = ("copy_from_slice<u8>", "/rustc/0123/library/core/src/slice/mod.rs")
        for stage, *chain in [
            (stages.ENCODE, std, ("push", "/src/ringstone/nvmf/src/tcp/output.rs")),
            (stages.OUT, std, ("gather", "/src/ringstone/nvmf/src/tcp/output.rs")),
            (stages.PARSE, ("_$LT$x$GT$::rx_header::h0123456789abcdef", "/src/nvmf/src/tcp/receive.rs")),
            (stages.DONE, ("ringstone_nvmf::target::PollGroup::completed::h0123456789abcdef", "nvmf/src/target/poll_group/commands.rs")),
            (stages.TO_IO, ("submit", "nvmf/src/target/poll_group/commands.rs"), ("step", "reactor/src/reactor.rs")),
            (stages.DEVICE, ("poll", "bdev/src/modules/null.rs")),
            (stages.REST, std),
        ]:
            self.assertEqual(stages.stage_of(chain), stage, chain)

    def test_symbolizers_are_read(self):
        text = "0x10\ninner\n/a/b.rs:7\nouter\n/a/c.rs:9 (discriminator 2)\n0x0000000000000020\n??\n??:0\n"
        self.assertEqual(stages.parse_symbols(text), {16: [("inner", "/a/b.rs"), ("outer", "/a/c.rs")], 32: [("??", "??")]})

    def test_callgrind_is_read_without_what_callees_took(self):
        text = "ob=/x/program\nfl=a.rs\nfn=f\n0x10 1 3\ncob=/lib/libc.so.6\ncfn=memcpy\ncalls=2 0x99\n0x11 2 500\n0x11 2 4\n" \
               "ob=/lib/libc.so.6\nfn=memcpy\n0x99 0 500\n"
        inside, outside = stages.parse_callgrind(text, "/x/program")
        self.assertEqual((dict(inside), dict(outside)), ({16: 3, 17: 4}, {"libc.so.6": 500}))

    def test_samples_are_told_apart(self):
        own, kernel = "(/x/program)", "([kernel.kallsyms])"
        text = "\n\n".join([
            f"\t 10 f {own}\n\t 20 main {own}",
            f"\tffffffff81000000 copy {kernel}\n\tffffffff81000010 __x64_sys_sendmsg {kernel}\n\t 20 main {own}",
            f"\tffffffff81000000 do_syscall_64 {kernel}\n\t 30 <a::OsStream as a::Stream>::recv {own}",
            f"\tffffffff81000000 tick {kernel}",
            "\t 7 memcpy (/lib/libc.so.6)",
        ])
        kernel, inside, other = stages.parse_samples(text, "/x/program")
        self.assertEqual(dict(kernel), {stages.SEND: 1, stages.RECEIVE: 1, stages.KERNEL: 1})
        self.assertEqual((dict(inside), other), ({16: 1}, 1))
        self.assertEqual(stages.addresses({16: 1, 99: 2}, [(0, 50, 0), (50, 100, 4096 + 50)]), {16: 1, 4096 + 99: 2})

    def test_a_table_says_what_is_known(self):
        spent, counted = {stages.RECEIVE: 300, stages.PARSE: 100}, {stages.PARSE: 250}
        both = stages.table({"time": spent, "instructions": counted})
        self.assertIn("| parse | 100 | 25 % | 250 |", both)
        self.assertIn("| of it in the kernel | 300 | 75 % |  |", both)
        self.assertIn("| **all** |  |  | 250 |", stages.table({"instructions": counted}))

    def test_this_interpreter_is_an_elf_file_whose_code_is_found(self):
        self.assertTrue(stages.segments(sys.executable))


class Processes(unittest.TestCase):
    def test_a_program_ends_with_all_that_it_started_even_if_it_is_stopped(self):
        child = subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 1000 & echo; wait; wait"], start_new_session=True,
                                 stdout=subprocess.PIPE)
        with child.stdout:
            child.stdout.readline()
            os.killpg(child.pid, signal.SIGSTOP)
            with mock.patch.object(child, "wait", lambda _, wait=child.wait: wait(0.2)):
                end(child)
            # The end of the pipe is the end of the last that has it.
            self.assertEqual(child.stdout.read(), b"")
        self.assertEqual(child.wait(), -signal.SIGKILL)

    def test_cpu_time_grows_with_work(self):
        before = cpu_seconds(os.getpid())
        sum(range(1_000_000))
        self.assertGreater(cpu_seconds(os.getpid()), before)


if __name__ == "__main__":
    ran = unittest.main(exit=False).result
    bad = len(ran.failures) + len(ran.errors)
    # As scripts/test counts.
    print(f"{ran.testsRun - bad} passed, {bad} failed")
    sys.exit(bool(bad))
