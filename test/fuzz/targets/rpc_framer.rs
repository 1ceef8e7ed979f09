//! The framing of JSON-RPC on any stream: the pieces that it comes in make no difference, and what is handed out is
//! JSON by the judgement of another parser.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde::de::IgnoredAny;

// The file and not the crate, which would bring the whole control plane with it.
#[rustfmt::skip]
#[path = "../../../rpc/src/framer.rs"]
#[allow(dead_code, reason = "the target uses a part of it")]
mod framer;
use framer::{FrameError, Framer};

const MAX_BYTES: usize = 600;

fn run<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<Result<String, FrameError>>, bool) {
    let mut framer = Framer::new(MAX_BYTES);
    let mut out = Vec::new();
    for piece in pieces {
        framer.push(piece);
        while let Some(value) = framer.next() {
            out.push(value);
        }
    }
    let between = framer.is_between_values();
    if let Err(error) = framer.end() {
        assert!(!between);
        out.push(Err(error));
    }
    assert!(framer.next().is_none());
    (out, between)
}

fuzz_target!(|bytes: &[u8]| {
    let Some((step, stream)) = bytes.split_first() else { return };
    let whole = run(std::iter::once(stream));
    let pieces = run(stream.chunks(usize::from(*step).max(1)));
    assert_eq!(whole, pieces);
    for value in whole.0.iter().flatten() {
        assert!(value.len() <= MAX_BYTES);
        if let Err(error) = serde_json::from_str::<IgnoredAny>(value) {
            panic!("{value:?} was handed out: {error}");
        }
    }
    // The other way round: a stream of values that the other parser takes is handed out whole.
    let values: Vec<_> =
        serde_json::Deserializer::from_slice(stream).into_iter::<Box<serde_json::value::RawValue>>().collect();
    let all = values.into_iter().collect::<Result<Vec<_>, _>>();
    if let Ok(values) = all
        && values.iter().all(|v| v.get().starts_with(['{', '[']) && v.get().len() < MAX_BYTES && depth(v.get()) <= 64)
    {
        let got: Vec<_> = whole.0.into_iter().map(|v| v.expect("another parser takes it")).collect();
        assert_eq!(got, values.iter().map(|v| v.get().to_owned()).collect::<Vec<_>>());
    }
});

/// An upper bound of the nesting.
fn depth(value: &str) -> usize {
    value.bytes().filter(|b| matches!(b, b'{' | b'[')).count()
}
