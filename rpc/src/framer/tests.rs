use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::Value;

use super::*;

const LIMIT: usize = 4096;

/// All values and the error, if any, for a stream that comes in these pieces.
fn frame<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<String>, Option<FrameError>) {
    let mut framer = Framer::new(LIMIT);
    let mut values = Vec::new();
    for piece in pieces {
        framer.push(piece);
        while let Some(result) = framer.next() {
            match result {
                Ok(value) => values.push(value),
                Err(error) => {
                    assert!(framer.next().is_none());
                    framer.push(b"{}");
                    assert!(framer.next().is_none(), "broken stays broken");
                    return (values, Some(error));
                }
            }
        }
    }
    let end = framer.end().err();
    (values, end)
}

fn whole(stream: &[u8]) -> (Vec<String>, Option<FrameError>) {
    frame([stream])
}

fn bytewise(stream: &[u8]) -> (Vec<String>, Option<FrameError>) {
    frame(stream.chunks(1))
}

#[test]
fn values_of_every_shape() {
    let stream = r#"
        {} [] {"a":1}{"b":[true,false,null,-0,0.5,-12e+3,1E9,"\u00e9\"\\"]}
        [[],{},{"":{"x":[]}}]	[1 , 2] {"é" : "}]" }
    "#;
    let wanted = [
        "{}",
        "[]",
        r#"{"a":1}"#,
        r#"{"b":[true,false,null,-0,0.5,-12e+3,1E9,"\u00e9\"\\"]}"#,
        r#"[[],{},{"":{"x":[]}}]"#,
        "[1 , 2]",
        r#"{"é" : "}]" }"#,
    ];
    for (values, error) in [whole(stream.as_bytes()), bytewise(stream.as_bytes())] {
        assert_eq!(values, wanted);
        assert_eq!(error, None);
    }
}

#[test]
fn wrong_bytes_are_told_at_once() {
    for (stream, at) in [
        ("x", 0),
        ("1", 0),
        ("\"text\"", 0),
        ("null", 0),
        ("}", 0),
        ("{} ,", 3),
        ("{]", 1),
        ("[}", 1),
        ("{a", 1),
        ("{\"a\"}", 4),
        ("{\"a\":}", 5),
        ("{\"a\":1,}", 7),
        ("[1,]", 3),
        ("[,", 1),
        ("[1 2", 3),
        ("[01", 2),
        ("[-a", 2),
        ("[1.]", 3),
        ("[1e]", 3),
        ("[1e+]", 4),
        ("[.5", 1),
        ("[+5", 1),
        ("[trux", 4),
        ("[nul]", 4),
        ("[NaN", 1),
        ("[\"\n", 2),
        ("[\"\\x", 3),
        ("[\"\\u00g", 6),
        ("[1]]", 3),
        ("{\"a\":[1}", 7),
        ("[{\"a\":1]", 7),
        ("\u{feff}{}", 0),
        ("//", 0),
    ] {
        for (_, error) in [whole(stream.as_bytes()), bytewise(stream.as_bytes())] {
            match error {
                Some(FrameError::Unexpected { at: told, .. }) => assert_eq!(told, at, "{stream}"),
                other => panic!("{stream}: {other:?}"),
            }
        }
    }
}

#[test]
fn the_position_counts_the_whole_stream() {
    let mut framer = Framer::new(LIMIT);
    framer.push(b"{} {} ");
    while framer.next().is_some() {}
    framer.push(b" x");
    let error = framer.next().unwrap().unwrap_err();
    assert_eq!(error.to_string(), "byte 7 of the stream is 'x' where a request, { or [, must follow");
}

#[test]
fn size_is_bounded() {
    let mut fits = vec![b' '; 3 * LIMIT];
    fits.extend_from_slice(b"[\"");
    fits.resize(3 * LIMIT + LIMIT - 2, b'x');
    fits.extend_from_slice(b"\"]");
    let (values, error) = whole(&fits);
    assert_eq!((values[0].len(), error), (LIMIT, None));

    let mut large = vec![b'['; 1];
    large.extend(std::iter::repeat_n(b' ', 2 * LIMIT));
    assert_eq!(whole(&large).1, Some(FrameError::TooLarge(LIMIT)));
    assert_eq!(bytewise(&large).1, Some(FrameError::TooLarge(LIMIT)));
}

#[test]
fn depth_is_bounded() {
    let depth = MAX_DEPTH as usize;
    let nested = |n: usize| "[".repeat(n) + &"]".repeat(n);
    assert_eq!(whole(nested(depth).as_bytes()).1, None);
    assert_eq!(whole(nested(depth + 1).as_bytes()).1, Some(FrameError::TooDeep));
    let (values, error) = whole(nested(depth).repeat(2).as_bytes());
    assert_eq!((values.len(), error), (2, None));
    assert!(serde_json::from_str::<Value>(&values[0]).is_ok());
}

#[test]
fn text_must_be_utf8() {
    assert_eq!(whole(b"[\"\xff\"]").1, Some(FrameError::NotUtf8));
    assert_eq!(whole(b"[\"\xc3\xa9\"]").1, None);
}

#[test]
fn the_end_may_come_between_values_only() {
    assert_eq!(whole(b"{} \n").1, None);
    assert_eq!(whole(b"{} {").1, Some(FrameError::Truncated));
    let mut framer = Framer::new(LIMIT);
    assert!(framer.is_between_values());
    framer.push(b"{");
    assert!(!framer.is_between_values());
    assert!(framer.next().is_none());
    framer.push(b"}");
    assert!(framer.next().is_some());
    assert!(framer.is_between_values());
}

fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i32>().prop_map(|quarters| Value::from(f64::from(quarters) / 4.0)),
        ".*".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            vec((".*", inner), 0..4).prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

fn request() -> impl Strategy<Value = Value> {
    prop_oneof![
        vec(json(), 0..4).prop_map(Value::from),
        vec((".*", json()), 0..4).prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
    ]
}

proptest! {
    /// However values are written and cut, they come out as they went in.
    #[test]
    fn cuts_do_not_matter(
        values in vec((request(), any::<bool>(), "[ \t\r\n]{0,3}"), 0..5),
        cuts in vec(1usize..50, 0..40),
    ) {
        let mut stream = String::new();
        for (value, pretty, space) in &values {
            match pretty {
                true => stream += &serde_json::to_string_pretty(value).unwrap(),
                false => stream += &value.to_string(),
            }
            stream += space;
        }
        let mut framer = Framer::new(1 << 20);
        let mut rest = stream.as_bytes();
        let mut out = Vec::new();
        for cut in cuts.into_iter().chain([usize::MAX]) {
            let (piece, next) = rest.split_at(cut.min(rest.len()));
            rest = next;
            framer.push(piece);
            while let Some(text) = framer.next() {
                out.push(serde_json::from_str::<Value>(&text.unwrap()).unwrap());
            }
        }
        prop_assert_eq!(framer.end(), Ok(()));
        prop_assert_eq!(out, values.into_iter().map(|(value, ..)| value).collect::<Vec<_>>());
    }

    /// The framer and serde_json agree on what an array or object is.
    #[test]
    fn agrees_with_serde_json(bytes in r#"[\[{][\[\]{}:,0-9eE.+\-"\\ntrufalsbx \t\n]{0,24}"#) {
        let (values, error) = whole(bytes.as_bytes());
        let parsed = serde_json::from_str::<Value>(&bytes);
        let framed = error.is_none() && values.len() == 1;
        match &parsed {
            Ok(_) => prop_assert!(framed, "{:?}", error),
            // Grammar alone does not know that a number is out of range or
            // that a surrogate stands alone.
            Err(parse) if framed => {
                let text = parse.to_string();
                prop_assert!(
                    text.contains("out of range") || text.contains("surrogate")
                        || text.contains("hex escape"),
                    "{}", text
                );
            }
            Err(_) => {}
        }
    }

    /// Bytes of any kind: no panic, and the cuts do not matter either.
    #[test]
    fn any_bytes(bytes in vec(prop_oneof![any::<u8>(), Just(b'{'), Just(b'"'), Just(b'[')], 0..200)) {
        prop_assert_eq!(whole(&bytes), bytewise(&bytes));
    }
}
