//! What a run did: a hash of all of it, and the last events in words.
//!
//! One trace a thread, because a run is one thread. The hash is how two runs of one seed are compared; the words are
//! printed when a run fails. Log lines of the code under test go in too.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt::{self, Write};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Events that are kept in words.
const KEPT: usize = 400;

struct Trace {
    hash: u64,
    count: u64,
    now_ns: u64,
    lines: VecDeque<Line>,
}

enum Line {
    Event { at: u64, what: &'static str, a: u64, b: u64, c: u64 },
    Text { at: u64, text: String },
}

thread_local! {
    static TRACE: RefCell<Trace> =
        const { RefCell::new(Trace { hash: 0, count: 0, now_ns: 0, lines: VecDeque::new() }) };
}

fn mix(hash: u64, value: u64) -> u64 {
    (hash ^ value).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23)
}

impl Trace {
    fn push(&mut self, line: Line) {
        self.count += 1;
        if self.lines.len() == KEPT {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }
}

/// Forgets everything: a run begins.
pub fn reset() {
    TRACE.with_borrow_mut(|trace| {
        *trace = Trace { hash: 0xcbf2_9ce4_8422_2325, count: 0, now_ns: 0, lines: VecDeque::new() }
    });
}

/// The present instant, for what follows.
pub fn set_now(now_ns: u64) {
    TRACE.with_borrow_mut(|trace| trace.now_ns = now_ns);
}

/// Something happened.
pub fn event(what: &'static str, a: u64, b: u64, c: u64) {
    TRACE.with_borrow_mut(|trace| {
        let mut hash = mix(trace.hash, trace.now_ns);
        for byte in what.bytes() {
            hash = mix(hash, byte.into());
        }
        trace.hash = mix(mix(mix(hash, a), b), c);
        let at = trace.now_ns;
        trace.push(Line::Event { at, what, a, b, c });
    });
}

/// Something happened that takes words.
pub fn text(text: String) {
    TRACE.with_borrow_mut(|trace| {
        trace.hash = text.bytes().fold(trace.hash, |hash, byte| mix(hash, byte.into()));
        let at = trace.now_ns;
        trace.push(Line::Text { at, text });
    });
}

/// The hash of everything since [`reset`], and how many events that were.
pub fn hash() -> (u64, u64) {
    TRACE.with_borrow(|trace| (trace.hash, trace.count))
}

/// The last events, in words.
pub fn last() -> String {
    TRACE.with_borrow(|trace| {
        let mut out = String::new();
        for line in &trace.lines {
            let _ = match line {
                Line::Event { at, what, a, b, c } => {
                    writeln!(out, "  {:>14.3} us  {what} {a} {b} {c}", *at as f64 / 1e3)
                }
                Line::Text { at, text } => writeln!(out, "  {:>14.3} us  {text}", *at as f64 / 1e3),
            };
        }
        out
    })
}

/// Brings log lines of the code under test into the trace.
struct Logs;

struct Fields(String);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?} "),
            name => write!(self.0, "{name}={value:?} "),
        };
    }
}

impl Subscriber for Logs {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::DEBUG
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields(format!("log {} ", event.metadata().level()));
        event.record(&mut fields);
        text(fields.0);
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// Runs `body` with the log lines of this thread going into the trace.
pub fn with_logs<R>(body: impl FnOnce() -> R) -> R {
    tracing::subscriber::with_default(Logs, body)
}
