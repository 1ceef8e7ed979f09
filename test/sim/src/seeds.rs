//! Runs a scenario over many seeds, and says how to run a failing one again.
//!
//! | variable | meaning |
//! |---|---|
//! | `SIM_SEED` | run this seed only (decimal, or hexadecimal with `0x`) |
//! | `SIM_SEEDS` | run so many seeds of each scenario instead of its own number |
//! | `SIM_FIRST` | the first of them; 1 when it is not set |
//! | `SIM_KEEP_GOING` | go on after a failure and list all failing seeds |

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::trace;

fn variable(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let value = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    Some(value.unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// The seed of one run of a scenario: scenarios share seeds by number, not by what they draw from them.
fn mixed(name: &str, seed: u64) -> u64 {
    name.bytes().fold(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15), |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Runs `scenario` once with `seed`; the hash of what it did.
pub fn run_once(name: &str, seed: u64, scenario: impl FnOnce(u64)) -> (u64, u64) {
    trace::reset();
    trace::with_logs(|| scenario(mixed(name, seed)));
    trace::hash()
}

/// Runs `scenario`, which is the test `name`, over `count` seeds and over the `regressions`: seeds that once failed.
///
/// # Panics
/// When a run does. Standard error has the seed, the last events and how to run it again.
pub fn each(name: &str, count: u64, regressions: &[u64], scenario: impl Fn(u64)) {
    let first = variable("SIM_FIRST").unwrap_or(1);
    let count = variable("SIM_SEEDS").unwrap_or(count);
    let seeds: Vec<u64> = match variable("SIM_SEED") {
        Some(seed) => vec![seed],
        None => regressions.iter().copied().chain(first..first + count).collect(),
    };
    let keep_going = variable("SIM_KEEP_GOING").is_some_and(|on| on != 0);
    let mut failed = Vec::new();
    for seed in seeds {
        let run = catch_unwind(AssertUnwindSafe(|| run_once(name, seed, &scenario)));
        if run.is_err() {
            let (hash, events) = trace::hash();
            eprintln!("{}", trace::last());
            eprintln!("{name}: seed {seed} failed after {events} events (trace {hash:016x}); run it again with");
            eprintln!("    SIM_SEED={seed} cargo test -p ringstone-sim {name}");
            failed.push(seed);
            if !keep_going {
                break;
            }
        }
    }
    assert!(failed.is_empty(), "{name}: seeds that failed: {failed:?}");
}
