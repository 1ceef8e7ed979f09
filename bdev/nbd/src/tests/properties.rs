//! Any bytes, cut anywhere.

use bdev::core::IoStatus;
use proptest::prelude::*;

use super::{Bench, SIZE, context_data, facts, go_data, opt, pattern, request, write};
use crate::connection::WINDOW_BYTES;
use crate::wire::{CHUNK_MAGIC, OPTION_REPLY_MAGIC, Reader, SIMPLE_REPLY_MAGIC, command, option};

/// A client's bytes, and how much data the reads among them ask for, by cookie.
#[derive(Clone, Debug)]
struct Session {
    bytes: Vec<u8>,
    reads: Vec<u32>,
}

/// The replies in a stream. Requests are answered in any order, so they are sorted.
fn replies(session: &Session, bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut rest = &bytes[18..];
    let mut out = vec![bytes[..18].to_vec()];
    while !rest.is_empty() {
        let mut reader = Reader(rest);
        match reader.u32().unwrap() {
            CHUNK_MAGIC => {
                reader.take(12).unwrap();
                reader.string().unwrap();
            }
            SIMPLE_REPLY_MAGIC => {
                let (error, cookie) = (reader.u32().unwrap(), reader.u64().unwrap());
                let data = if error == 0 { session.reads[cookie as usize] } else { 0 };
                reader.take(data as usize).unwrap();
            }
            magic => {
                assert_eq!(magic, (OPTION_REPLY_MAGIC >> 32) as u32);
                reader.take(12).unwrap();
                reader.string().unwrap();
            }
        }
        let len = rest.len() - reader.0.len();
        out.push(rest[..len].to_vec());
        rest = reader.0;
    }
    out.sort();
    out
}

/// Feeds a session cut at `cuts`; the replies, and whether it ended with a fault.
fn play(session: &Session, cuts: &[usize], memory: usize) -> (Vec<Vec<u8>>, bool) {
    let (out, fault) = run(&session.bytes, cuts, memory);
    (replies(session, &out), fault)
}

/// Feeds `bytes` cut at `cuts`; the output, and whether it ended with a fault.
fn run(bytes: &[u8], cuts: &[usize], memory: usize) -> (Vec<u8>, bool) {
    let mut bench = Bench::new(facts());
    bench.memory = memory;
    let mut out = bench.output();
    let mut cuts = cuts.iter().copied().cycle();
    let mut at = 0;
    // A read that waits for memory has taken its bytes already.
    while at < bytes.len() || bench.connection.wants_memory().is_some() {
        let piece = (at + cuts.next().unwrap_or(bytes.len()).max(1)).min(bytes.len());
        let fed = bench.feed(&bytes[at..piece]);
        while !bench.held.is_empty() {
            bench.finish(0, IoStatus::Success);
        }
        let sent = bench.output();
        assert!(bench.lent <= WINDOW_BYTES.max(1 << 20));
        let Ok(taken) = fed else {
            out.extend(sent);
            return (out, true);
        };
        at += taken;
        // Nothing taken, nothing sent, nothing waited for: it is over.
        if taken == 0 && sent.is_empty() && bench.connection.wants_memory().is_none() {
            break;
        }
        out.extend(sent);
    }
    (out, false)
}

fn option_bytes() -> impl Strategy<Value = Vec<u8>> {
    let name = prop_oneof![Just(""), Just("vol"), Just("other")];
    let query = prop_oneof![Just("base:"), Just("base:allocation"), Just("x")];
    prop_oneof![
        Just(opt(option::LIST, &[])),
        Just(opt(option::STRUCTURED_REPLY, &[])),
        // Not EXPORT_NAME and ABORT: one has no reply of the usual form, the other ends it all.
        (3u32..14, prop::collection::vec(any::<u8>(), 0..40)).prop_map(|(n, data)| opt(n, &data)),
        (name.clone(), prop::collection::vec(0u16..5, 0..5))
            .prop_map(|(n, infos)| opt(option::INFO, &go_data(n, &infos))),
        (name, prop::collection::vec(query, 0..3), 9u32..11)
            .prop_map(|(n, queries, which)| opt(which, &context_data(n, &queries))),
    ]
}

/// Command, flags, block, blocks, and whether the offset is odd.
fn requests() -> impl Strategy<Value = Vec<(u16, u16, u64, u32, bool)>> {
    let command = (0u16..9).prop_map(|command| if command == command::DISC { command::WRITE } else { command });
    let flags = prop_oneof![4 => Just(0), 2 => 0u16..2, 1 => 0u16..32];
    let one = (command, flags, 0u64..SIZE / 512 + 4, 0u32..700, 0u8..20);
    let one = one.prop_map(|(command, flags, lba, blocks, odd)| (command, flags, lba, blocks, odd == 0));
    prop::collection::vec(one, 0..12)
}

fn session() -> impl Strategy<Value = Session> {
    let options = prop::collection::vec(option_bytes(), 0..6);
    (any::<bool>(), options, requests(), prop::collection::vec(any::<u8>(), 0..30)).prop_map(
        |(structured, options, requests, noise)| {
            let mut bytes = 3u32.to_be_bytes().to_vec();
            if structured {
                bytes.extend(opt(option::STRUCTURED_REPLY, &[]));
            }
            bytes.extend(options.concat());
            bytes.extend(opt(option::GO, &go_data("", &[3])));
            let mut reads = Vec::new();
            for (cookie, &(command, flags, lba, blocks, odd)) in (0..).zip(&requests) {
                let (offset, length) = (lba * 512 + u64::from(odd), blocks * 512);
                reads.push(if command == command::READ { length } else { 0 });
                bytes.extend(match command {
                    command::WRITE => write(flags, cookie, offset, &pattern(cookie as u8, length as usize)),
                    _ => request(command, flags, cookie, offset, length),
                });
            }
            bytes.extend(noise);
            Session { bytes, reads }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn cuts_change_nothing(session in session(), cuts in prop::collection::vec(1usize..70_000, 1..8)) {
        prop_assert!(play(&session, &[usize::MAX / 2], usize::MAX) == play(&session, &cuts, usize::MAX));
    }

    #[test]
    fn single_bytes_change_nothing(mut session in session()) {
        session.bytes.truncate(3000);
        prop_assert!(play(&session, &[usize::MAX / 2], usize::MAX) == play(&session, &[1], usize::MAX));
    }

    #[test]
    fn scarce_memory_changes_nothing(session in session(), cuts in prop::collection::vec(1usize..70_000, 1..4)) {
        prop_assert!(play(&session, &[usize::MAX / 2], usize::MAX) == play(&session, &cuts, 700 * 512));
    }

    #[test]
    fn noise_does_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..400), flags in any::<bool>(), cut in 1usize..50) {
        let bytes = if flags { [&3u32.to_be_bytes()[..], b"IHAVEOPT", &bytes].concat() } else { bytes };
        run(&bytes, &[cut], 100_000);
    }
}
