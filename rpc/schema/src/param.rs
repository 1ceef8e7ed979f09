//! A parameter as its owner declares it.

use std::fmt;

/// What a value must be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// `true` or `false`.
    Bool,
    /// 0 to 255.
    U8,
    /// 0 to 65535.
    U16,
    /// 0 to 4294967295.
    U32,
    /// 0 to 18446744073709551615.
    U64,
    /// Signed 32-bit number.
    I32,
    /// Signed 64-bit number.
    I64,
    /// Any finite number.
    F64,
    /// Text.
    Str,
    /// Text in the form 8-4-4-4-12 hexadecimal digits.
    Uuid,
    /// Text of exactly this many bytes, two hexadecimal digits each.
    Hex(usize),
    /// One of these words.
    Enum(&'static [&'static str]),
    /// Any of these words, as an array or as text with commas between them;
    /// the handler always sees an array.
    Set(&'static [&'static str]),
    /// An object with these keys and no others.
    Object(&'static [Param]),
    /// An array of such values.
    Array(&'static Kind),
    /// Whatever JSON it is; the handler looks into it.
    Any,
}

impl Kind {
    /// Smallest and largest value that the kind itself allows; `None` where
    /// the kind is not an integer.
    pub const fn integer_range(self) -> Option<(i128, i128)> {
        match self {
            Kind::U8 => Some((0, u8::MAX as i128)),
            Kind::U16 => Some((0, u16::MAX as i128)),
            Kind::U32 => Some((0, u32::MAX as i128)),
            Kind::U64 => Some((0, u64::MAX as i128)),
            Kind::I32 => Some((i32::MIN as i128, i32::MAX as i128)),
            Kind::I64 => Some((i64::MIN as i128, i64::MAX as i128)),
            _ => None,
        }
    }
}

/// The kind in words, for help and error texts: "a 32-bit unsigned number".
impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Bool => f.write_str("true or false"),
            Kind::U8 => f.write_str("an 8-bit unsigned number"),
            Kind::U16 => f.write_str("a 16-bit unsigned number"),
            Kind::U32 => f.write_str("a 32-bit unsigned number"),
            Kind::U64 => f.write_str("a 64-bit unsigned number"),
            Kind::I32 => f.write_str("a 32-bit signed number"),
            Kind::I64 => f.write_str("a 64-bit signed number"),
            Kind::F64 => f.write_str("a number"),
            Kind::Str => f.write_str("a string"),
            Kind::Uuid => f.write_str("a UUID string"),
            Kind::Hex(bytes) => write!(f, "a string of {} hexadecimal digits", bytes * 2),
            Kind::Enum(words) => write!(f, "one of {}", words.join(", ")),
            Kind::Set(words) => write!(f, "any of {}", words.join(", ")),
            Kind::Object(_) => f.write_str("an object"),
            Kind::Array(item) => write!(f, "an array, each item {item}"),
            Kind::Any => f.write_str("any JSON"),
        }
    }
}

/// One parameter of a method, or one key of a nested object.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Param {
    /// Key on the wire.
    pub name: &'static str,
    /// What its value must be.
    pub kind: Kind,
    /// Whether it must be given.
    pub required: bool,
    /// A short phrase for help; says the unit and the default.
    pub help: &'static str,
    /// Smallest value of a number, bytes of a string, items of an array.
    pub min: Option<i128>,
    /// Largest value of a number, bytes of a string, items of an array.
    pub max: Option<i128>,
    /// Still accepted, for scripts that know it, but without effect.
    pub deprecated: bool,
}

impl Param {
    /// A parameter that must be given.
    pub const fn required(name: &'static str, kind: Kind, help: &'static str) -> Self {
        Self { name, kind, required: true, help, min: None, max: None, deprecated: false }
    }

    /// A parameter that may be left out.
    pub const fn optional(name: &'static str, kind: Kind, help: &'static str) -> Self {
        let mut param = Self::required(name, kind, help);
        param.required = false;
        param
    }

    /// Refuses smaller numbers, shorter strings, shorter arrays.
    pub const fn at_least(mut self, min: i128) -> Self {
        self.min = Some(min);
        self
    }

    /// Refuses larger numbers, longer strings, longer arrays.
    pub const fn at_most(mut self, max: i128) -> Self {
        self.max = Some(max);
        self
    }

    /// Accepted, but without effect.
    pub const fn deprecated(mut self) -> Self {
        self.deprecated = true;
        self
    }
}
