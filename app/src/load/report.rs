//! What came of a run: of one member, of all together, and how it is printed.

use std::io::Write;
use std::process::ExitCode;

use serde_json::{Value, json};

use super::LoadOptions;
use super::histogram::Histogram;

/// What is reported, in per cent.
const PERCENTILES: [f64; 8] = [50.0, 90.0, 95.0, 99.0, 99.9, 99.99, 99.999, 100.0];
/// Mismatches that are described.
const MAX_DESCRIBED: usize = 10;
/// Kinds of errors that are told apart.
const MAX_KINDS: usize = 16;

/// What came of a verified run.
#[derive(Clone, Debug, Default)]
pub struct Verified {
    /// Blocks that were read and checked.
    pub checked_blocks: u64,
    /// Blocks that were not what they have to be.
    pub mismatches: u64,
    /// What some of them were.
    pub described: Vec<String>,
    /// Everything that was written was read again at the end.
    pub complete: bool,
}

impl Verified {
    /// A block is not what it has to be.
    pub fn mismatch(&mut self, why: String) {
        self.mismatches += 1;
        if self.described.len() < MAX_DESCRIBED {
            self.described.push(why);
        }
    }
}

/// What came of a run.
#[derive(Debug)]
pub struct Report {
    /// Whose it is: the index of the member.
    pub member: usize,
    /// Latencies of the commands that succeeded, with those that were outstanding when the measuring ended.
    pub histogram: Histogram,
    /// Commands that succeeded while it was measured.
    pub completed: u64,
    /// Those of them that read.
    pub reads: u64,
    /// The same by queue.
    pub by_queue: Vec<u64>,
    /// Commands outstanding at once on each queue.
    pub depth: usize,
    /// Commands that failed, or whose fate is unknown.
    pub errors: u64,
    /// What failed how often.
    pub kinds: Vec<(String, u64)>,
    /// Time measured.
    pub seconds: f64,
    /// CPU time of the process meanwhile.
    pub cpu_s: f64,
    /// Share of that time in which the load's reactors had something to do: near 1, the load itself was at its limit.
    pub busy: f64,
    /// Somebody stopped it.
    pub interrupted: bool,
    /// Commands that were due and never sent, at a rate.
    pub late: u64,
    /// Of a verified run.
    pub verified: Option<Verified>,
    /// Why it ended early.
    pub failure: Option<String>,
}

impl Report {
    /// Of a run that has done nothing yet.
    pub fn empty(member: usize, verify: bool) -> Report {
        Report {
            member,
            histogram: Histogram::new(),
            completed: 0,
            reads: 0,
            by_queue: Vec::new(),
            depth: 0,
            errors: 0,
            kinds: Vec::new(),
            seconds: 0.0,
            cpu_s: 0.0,
            busy: 0.0,
            interrupted: false,
            late: 0,
            verified: verify.then(Verified::default),
            failure: None,
        }
    }

    /// Commands failed, for a reason that has a name.
    pub fn fail(&mut self, kind: &str, count: u64) {
        self.errors += count;
        match self.kinds.iter().position(|(known, _)| known == kind) {
            Some(at) => self.kinds[at].1 += count,
            None if self.kinds.len() < MAX_KINDS => self.kinds.push((kind.to_owned(), count)),
            None => {}
        }
    }

    /// Of all members together; `None` without any.
    pub fn of(mut reports: Vec<Report>) -> Option<Report> {
        reports.sort_by_key(|report| report.member);
        let members = reports.len() as f64;
        let mut all = reports.into_iter();
        let mut sum = all.next()?;
        all.for_each(|report| sum.add(report));
        sum.busy /= members;
        if sum.interrupted && sum.seconds == 0.0 && sum.failure.is_none() {
            sum.failure = Some("interrupted before anything was measured".into());
        }
        Some(sum)
    }

    fn add(&mut self, other: Report) {
        self.histogram.add_all(&other.histogram);
        self.completed += other.completed;
        self.reads += other.reads;
        self.by_queue.extend(other.by_queue);
        self.depth = self.depth.max(other.depth);
        // Those of no kind are commands that were lost with their device.
        self.errors += other.errors - other.kinds.iter().map(|(_, count)| count).sum::<u64>();
        other.kinds.iter().for_each(|(kind, count)| self.fail(kind, *count));
        // Members measure at the same time, and CPU time is of the process.
        self.seconds = self.seconds.max(other.seconds);
        self.cpu_s = self.cpu_s.max(other.cpu_s);
        self.busy += other.busy;
        self.interrupted |= other.interrupted;
        self.late += other.late;
        if let (Some(mine), Some(others)) = (&mut self.verified, other.verified) {
            mine.checked_blocks += others.checked_blocks;
            mine.mismatches += others.mismatches;
            mine.complete &= others.complete;
            let room = MAX_DESCRIBED.saturating_sub(mine.described.len());
            mine.described.extend(others.described.into_iter().take(room));
        }
        self.failure = self.failure.take().or(other.failure);
    }

    fn iops(&self) -> f64 {
        if self.seconds > 0.0 { self.completed as f64 / self.seconds } else { 0.0 }
    }

    fn mismatches(&self) -> u64 {
        self.verified.as_ref().map_or(0, |verified| verified.mismatches)
    }
}

fn as_json(options: &LoadOptions, report: &Report) -> Value {
    let histogram = &report.histogram;
    let us = |ns: u64| ns as f64 / 1e3;
    let percentiles: serde_json::Map<_, _> =
        PERCENTILES.iter().map(|p| (p.to_string(), json!(us(histogram.percentile_ns(*p))))).collect();
    let iops = report.iops();
    let mut value = json!({
        "iops": iops,
        "bytes_per_s": iops * f64::from(options.bs),
        "mean_us": histogram.mean_ns() / 1e3,
        "percentiles_us": percentiles,
        "latency_from": latency_from(options),
        "cpu_s": report.cpu_s,
        "busy": report.busy,
        "errors": report.errors,
        "seconds": report.seconds,
        "commands": report.completed,
        "reads": report.reads,
        "writes": report.completed - report.reads,
        "commands_by_queue": report.by_queue,
        "depth": report.depth,
        "interrupted": report.interrupted,
    });
    if options.rate.is_some() {
        value["late"] = json!(report.late);
    }
    if !report.kinds.is_empty() {
        value["errors_by_kind"] = report.kinds.iter().map(|(kind, count)| (kind.clone(), json!(count))).collect();
    }
    if let Some(verified) = &report.verified {
        value["verify"] = json!({
            "checked_blocks": verified.checked_blocks,
            "mismatches": verified.mismatches,
            "complete": verified.complete,
        });
    }
    if let Some(failure) = &report.failure {
        value["failure"] = json!(failure);
    }
    value
}

fn latency_from(options: &LoadOptions) -> &'static str {
    if options.rate.is_some() { "schedule" } else { "submission" }
}

/// Prints the report, and what was wrong to standard error; what the process ends with.
pub fn print(options: &LoadOptions, report: &Report) -> ExitCode {
    let text = match options.json {
        true => format!("{}\n", as_json(options, report)),
        false if report.seconds > 0.0 => as_text(options, report),
        false => String::new(),
    };
    // Whoever read it may be gone, as the reader of a pipe is that has seen enough.
    let printed = std::io::stdout().write_all(text.as_bytes()).is_ok();
    let _ = std::io::stderr().write_all(complaints(report).as_bytes());
    let bad = !printed || report.failure.is_some() || report.errors > 0 || report.mismatches() > 0;
    if bad { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// What was wrong, a line each.
fn complaints(report: &Report) -> String {
    let mut said = String::new();
    if let Some(verified) = &report.verified {
        verified.described.iter().for_each(|why| said += &format!("verify: {why}\n"));
        if verified.mismatches > 0 {
            said += &format!("verify: {} blocks are not what was written\n", verified.mismatches);
        } else if !verified.complete && report.seconds > 0.0 {
            said += "verify: what was written was not all read again, as the run ended early\n";
        }
    }
    report.kinds.iter().for_each(|(kind, count)| said += &format!("{count} commands failed: {kind}\n"));
    if let Some(why) = &report.failure {
        said += &format!("{why}\n");
    }
    said
}

fn as_text(options: &LoadOptions, report: &Report) -> String {
    let (histogram, iops) = (&report.histogram, report.iops());
    let mib = iops * f64::from(options.bs) / f64::from(1 << 20);
    let early = if report.interrupted { ", interrupted" } else { "" };
    let mut text = format!("{iops:.0} IOPS, {mib:.1} MiB/s over {:.2} s{early}\n", report.seconds);
    let mean_us = histogram.mean_ns() / 1e3;
    text += &format!("mean {mean_us:.1} us, CPU {:.2} s, errors {}\n", report.cpu_s, report.errors);
    if let Some(rate) = options.rate {
        text += &format!(
            "open loop at {rate} a second: latency counts from when a command was due; {} came too late to be sent\n",
            report.late
        );
    }
    for percent in PERCENTILES {
        text += &format!("  {percent:>7} %  {:>10.1} us\n", histogram.percentile_ns(percent) as f64 / 1e3);
    }
    if let Some(verified) = &report.verified {
        text += &format!("verified {} blocks, {} wrong\n", verified.checked_blocks, verified.mismatches);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(member: usize) -> Report {
        let mut report = Report::empty(member, true);
        report.histogram.add(1000 * (member as u64 + 1));
        (report.completed, report.reads, report.by_queue) = (1, member as u64, vec![member as u64]);
        (report.seconds, report.cpu_s, report.busy, report.depth) = (1.0 + member as f64, 2.0, 0.5, 7);
        report.verified = Some(Verified { complete: true, ..Verified::default() });
        report
    }

    #[test]
    fn the_members_of_a_run_are_one_report() {
        let mut second = member(1);
        second.fail("Odd", 2);
        second.errors += 3;
        second.busy = 1.0;
        second.verified.as_mut().unwrap().complete = false;
        let mut first = member(0);
        first.fail("Odd", 1);
        let sum = Report::of(vec![second, first]).unwrap();
        assert_eq!((sum.completed, sum.reads, &sum.by_queue[..], sum.depth), (2, 1, &[0, 1][..], 7));
        assert_eq!((sum.errors, &sum.kinds[..]), (6, &[("Odd".to_owned(), 3)][..]));
        assert_eq!((sum.seconds, sum.cpu_s, sum.busy), (2.0, 2.0, 0.75));
        assert_eq!(sum.histogram.mean_ns(), 1500.0);
        assert!(!sum.verified.unwrap().complete && sum.failure.is_none());
        assert!(Report::of(Vec::new()).is_none());
    }

    #[test]
    fn what_was_stopped_before_it_measured_says_so() {
        let mut report = Report::empty(0, false);
        report.interrupted = true;
        let report = Report::of(vec![report]).unwrap();
        assert!(complaints(&report).contains("before anything was measured"));
    }

    #[test]
    fn there_is_no_end_of_kinds_and_mismatches() {
        let mut report = member(0);
        for n in 0..100 {
            report.fail(&n.to_string(), 1);
            report.verified.as_mut().unwrap().mismatch(String::new());
        }
        assert_eq!((report.errors, report.kinds.len()), (100, MAX_KINDS));
        let sum = Report::of(vec![report, member(1)]).unwrap();
        let verified = sum.verified.unwrap();
        assert_eq!((sum.errors, verified.mismatches, verified.described.len()), (100, 100, MAX_DESCRIBED));
    }
}
