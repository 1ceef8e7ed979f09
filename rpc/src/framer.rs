//! Finds the JSON values in a stream of bytes that has no delimiters.
//!
//! Clients write one value after another, with or without white space between,
//! in pieces of any size. The framer follows JSON's grammar (RFC 8259) byte by
//! byte, each byte once, and says where a value ends as soon as its last
//! bracket is there, and that a value cannot become JSON any more as soon as
//! its first wrong byte is there. It performs no I/O.
//!
//! Only objects and arrays count as values here: a request or a reply is
//! nothing else, and numbers have no end of their own.
//!
//! ```text
//!            '{' '['              last bracket
//!  Between ----------> in a value ------------> Between, value handed out
//!     |                    |
//!     | other byte         | byte against the grammar, too large, too deep
//!     v                    v
//!   Broken  <--------------+     nothing more is handed out: in a stream
//!                                without delimiters there is no place to
//!                                start again
//! ```
//!
//! Invariants: the buffer never holds more than the size limit and the last
//! push; what is handed out is UTF-8 and follows the grammar.

use std::fmt;

/// Brackets may be nested this deep.
pub const MAX_DEPTH: u32 = 64;

/// Why the bytes cannot be JSON any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// A byte that the grammar forbids.
    Unexpected {
        /// The byte.
        byte: u8,
        /// Its position in the stream, from 0.
        at: u64,
        /// What would have been right.
        wanted: &'static str,
    },
    /// A value is larger than the limit, in bytes.
    TooLarge(usize),
    /// Brackets are nested deeper than [`MAX_DEPTH`].
    TooDeep,
    /// A value whose text is not UTF-8.
    NotUtf8,
    /// The stream ended inside a value.
    Truncated,
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FrameError::Unexpected { byte, at, wanted } => {
                write!(f, "byte {at} of the stream is '{}' where {wanted} must follow", byte.escape_ascii())
            }
            FrameError::TooLarge(limit) => write!(f, "a value is larger than {limit} bytes"),
            FrameError::TooDeep => write!(f, "brackets are nested deeper than {MAX_DEPTH}"),
            FrameError::NotUtf8 => f.write_str("the text is not UTF-8"),
            FrameError::Truncated => f.write_str("the stream ended inside a value"),
        }
    }
}

impl std::error::Error for FrameError {}

/// What the grammar allows next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Outside of any value.
    Between,
    /// A value must come.
    Value,
    /// A value, or the end of an array that has none.
    FirstItem,
    /// A key, or the end of an object that has none.
    FirstKey,
    /// A key must come.
    Key,
    /// A colon must come.
    Colon,
    /// A comma or a closing bracket.
    AfterValue,
    /// In a string; `key` when it is an object's key.
    String { key: bool },
    /// Behind a backslash.
    Escape { key: bool },
    /// Before this many hexadecimal digits of \uXXXX.
    Unicode { key: bool, left: u8 },
    /// Behind a minus sign.
    Minus,
    /// Behind a leading zero.
    Zero,
    /// In the digits before the point.
    Integer,
    /// Behind the point.
    Point,
    /// In the digits behind the point.
    Fraction,
    /// Behind the letter e.
    Exponent,
    /// Behind the exponent's sign.
    ExponentSign,
    /// In the exponent's digits.
    ExponentDigits,
    /// In true, false or null, before these bytes.
    Literal(&'static [u8]),
}

/// Cuts a stream of bytes into JSON values. See the module's documentation.
#[derive(Debug)]
pub struct Framer {
    buffer: Vec<u8>,
    /// Where the unfinished value, or what follows the last one, starts.
    start: usize,
    /// Up to where the grammar was followed.
    scanned: usize,
    state: State,
    /// Bit i is set if bracket i from outside is an object's.
    objects: u64,
    depth: u32,
    /// Bytes of the stream dropped from the buffer's front.
    dropped: u64,
    max_bytes: usize,
    broken: bool,
}

impl Framer {
    /// A framer that refuses values larger than `max_bytes`.
    pub fn new(max_bytes: usize) -> Self {
        Self {
            buffer: Vec::new(),
            start: 0,
            scanned: 0,
            state: State::Between,
            objects: 0,
            depth: 0,
            dropped: 0,
            max_bytes,
            broken: false,
        }
    }

    /// Takes bytes of the stream. Take out all values before the next push, or
    /// the buffer grows.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.broken {
            return;
        }
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.dropped += self.start as u64;
            self.scanned -= self.start;
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole value, or why there will be none any more; `None` when
    /// more bytes are needed. After an error there is only `None`.
    #[expect(clippy::should_implement_trait, reason = "None is not the end here")]
    pub fn next(&mut self) -> Option<Result<String, FrameError>> {
        if self.broken {
            return None;
        }
        while let Some(&byte) = self.buffer.get(self.scanned) {
            if let Err(error) = self.step(byte) {
                return Some(Err(self.breaks(error)));
            }
            self.scanned += 1;
            if self.state == State::Between {
                // White space before a value is dropped, not counted.
                let value = self.start..self.scanned;
                self.start = self.scanned;
                if is_space(byte) {
                    continue;
                }
                return Some(match str::from_utf8(&self.buffer[value]) {
                    Ok(text) => Ok(text.to_owned()),
                    Err(_) => Err(self.breaks(FrameError::NotUtf8)),
                });
            }
            if self.scanned - self.start >= self.max_bytes {
                return Some(Err(self.breaks(FrameError::TooLarge(self.max_bytes))));
            }
        }
        None
    }

    /// The stream has ended: an error if that was inside of a value.
    pub fn end(&mut self) -> Result<(), FrameError> {
        if self.broken || self.state == State::Between {
            return Ok(());
        }
        Err(self.breaks(FrameError::Truncated))
    }

    /// Whether all bytes so far belong to values that were handed out.
    pub fn is_between_values(&self) -> bool {
        !self.broken && self.state == State::Between && self.start == self.buffer.len()
    }

    fn breaks(&mut self, error: FrameError) -> FrameError {
        self.broken = true;
        self.buffer = Vec::new();
        error
    }

    fn step(&mut self, byte: u8) -> Result<(), FrameError> {
        // Ordered by how often the states occur.
        self.state = match self.state {
            State::String { key } => match byte {
                b'"' if key => State::Colon,
                b'"' => State::AfterValue,
                b'\\' => State::Escape { key },
                0..=0x1f => return self.wants(byte, "an escaped control character"),
                _ => return Ok(()),
            },
            State::AfterValue => return self.after_value(byte),
            State::Value | State::FirstItem | State::FirstKey | State::Key | State::Colon => {
                return self.expected(byte);
            }
            State::Between => match byte {
                byte if is_space(byte) => State::Between,
                b'{' | b'[' => return self.open(byte),
                _ => return self.wants(byte, "a request, { or [,"),
            },
            State::Escape { key } => match byte {
                b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => State::String { key },
                b'u' => State::Unicode { key, left: 4 },
                _ => return self.wants(byte, "one of \"\\/bfnrtu"),
            },
            State::Unicode { key, left } if byte.is_ascii_hexdigit() => match left {
                1 => State::String { key },
                _ => State::Unicode { key, left: left - 1 },
            },
            State::Unicode { .. } => return self.wants(byte, "a hexadecimal digit"),
            State::Literal(rest) => match rest.split_first() {
                Some((wanted, [])) if byte == *wanted => State::AfterValue,
                Some((wanted, rest)) if byte == *wanted => State::Literal(rest),
                _ => return self.wants(byte, "the rest of true, false or null"),
            },
            _ => return self.number(byte),
        };
        Ok(())
    }

    /// States in which white space may come, and then a certain thing.
    fn expected(&mut self, byte: u8) -> Result<(), FrameError> {
        if is_space(byte) {
            return Ok(());
        }
        self.state = match (self.state, byte) {
            (State::Colon, b':') => State::Value,
            (State::Colon, _) => return self.wants(byte, "a colon"),
            (State::FirstKey | State::Key, b'"') => State::String { key: true },
            (State::FirstKey, b'}') | (State::FirstItem, b']') => return self.close(),
            (State::FirstKey | State::Key, _) => return self.wants(byte, "a key in quotes"),
            (_, b'{' | b'[') => return self.open(byte),
            (_, b'"') => State::String { key: false },
            (_, b'-') => State::Minus,
            (_, b'0') => State::Zero,
            (_, b'1'..=b'9') => State::Integer,
            (_, b't') => State::Literal(b"rue"),
            (_, b'f') => State::Literal(b"alse"),
            (_, b'n') => State::Literal(b"ull"),
            _ => return self.wants(byte, "a value"),
        };
        Ok(())
    }

    fn after_value(&mut self, byte: u8) -> Result<(), FrameError> {
        let in_object = self.objects >> (self.depth - 1) & 1 == 1;
        self.state = match byte {
            byte if is_space(byte) => State::AfterValue,
            b',' if in_object => State::Key,
            b',' => State::Value,
            b'}' if in_object => return self.close(),
            b']' if !in_object => return self.close(),
            _ if in_object => return self.wants(byte, ", or }"),
            _ => return self.wants(byte, ", or ]"),
        };
        Ok(())
    }

    fn number(&mut self, byte: u8) -> Result<(), FrameError> {
        self.state = match (self.state, byte) {
            (State::Minus, b'0') => State::Zero,
            (State::Minus, b'1'..=b'9') => State::Integer,
            (State::Integer, b'0'..=b'9') => State::Integer,
            (State::Zero | State::Integer, b'.') => State::Point,
            (State::Point | State::Fraction, b'0'..=b'9') => State::Fraction,
            (State::Zero | State::Integer | State::Fraction, b'e' | b'E') => State::Exponent,
            (State::Exponent, b'+' | b'-') => State::ExponentSign,
            (State::Exponent | State::ExponentSign | State::ExponentDigits, b'0'..=b'9') => State::ExponentDigits,
            (State::Zero | State::Integer | State::Fraction | State::ExponentDigits, _) => {
                self.state = State::AfterValue;
                return self.after_value(byte);
            }
            _ => return self.wants(byte, "a digit"),
        };
        Ok(())
    }

    fn open(&mut self, byte: u8) -> Result<(), FrameError> {
        if self.depth == MAX_DEPTH {
            return Err(FrameError::TooDeep);
        }
        let bit = 1 << self.depth;
        if byte == b'{' {
            self.objects |= bit;
            self.state = State::FirstKey;
        } else {
            self.objects &= !bit;
            self.state = State::FirstItem;
        }
        self.depth += 1;
        Ok(())
    }

    fn close(&mut self) -> Result<(), FrameError> {
        self.depth -= 1;
        self.state = match self.depth {
            0 => State::Between,
            _ => State::AfterValue,
        };
        Ok(())
    }

    fn wants(&self, byte: u8, wanted: &'static str) -> Result<(), FrameError> {
        Err(FrameError::Unexpected { byte, at: self.dropped + self.scanned as u64, wanted })
    }
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r')
}

#[cfg(test)]
mod tests;
