//! Errors as callers see them.
//!
//! On the wire an error is
//! `{"code", "message", "data": {"method", "field", "value", "reason", "fix"}}`.
//! The message says all that `data` says, in one line that starts with the
//! standard text of the code, as scripts expect:
//!
//! ```text
//! File exists: bdev_malloc_create: name "Malloc0": a bdev of that name exists; choose another name
//! ```

use std::fmt;
use std::io;

use serde_json::{Value, json};

/// Codes that are not negative errno numbers.
pub mod code {
    /// The bytes are no JSON.
    pub const PARSE_ERROR: i32 = -32700;
    /// The JSON is no request.
    pub const INVALID_REQUEST: i32 = -32600;
    /// No method of that name.
    pub const METHOD_NOT_FOUND: i32 = -32601;
    /// The parameters are not what the method takes.
    pub const INVALID_PARAMS: i32 = -32602;
    /// The server failed.
    pub const INTERNAL_ERROR: i32 = -32603;
    /// The method exists but not in the server's present state.
    pub const INVALID_STATE: i32 = -1;
}

/// Values are shown in messages no longer than this, in characters.
const SHOWN_CHARS: usize = 120;

/// Values travel in `data` no larger than this, in bytes of JSON.
const CARRIED_BYTES: usize = 4096;

/// An errno number; its negative is the error code on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

macro_rules! errnos {
    ($($name:ident = $number:literal, $text:literal;)*) => {
        impl Errno {
            $(#[doc = $text] pub const $name: Errno = Errno($number);)*

            /// The text that strerror(3) gives for it.
            pub fn text(self) -> &'static str {
                match self.0 {
                    $($number => $text,)*
                    _ => "Unknown error",
                }
            }
        }
    };
}

errnos! {
    PERM = 1, "Operation not permitted";
    NOENT = 2, "No such file or directory";
    INTR = 4, "Interrupted system call";
    IO = 5, "Input/output error";
    NXIO = 6, "No such device or address";
    BADF = 9, "Bad file descriptor";
    AGAIN = 11, "Resource temporarily unavailable";
    NOMEM = 12, "Cannot allocate memory";
    ACCES = 13, "Permission denied";
    BUSY = 16, "Device or resource busy";
    EXIST = 17, "File exists";
    NODEV = 19, "No such device";
    NOTDIR = 20, "Not a directory";
    ISDIR = 21, "Is a directory";
    INVAL = 22, "Invalid argument";
    NFILE = 23, "Too many open files in system";
    MFILE = 24, "Too many open files";
    TXTBSY = 26, "Text file busy";
    FBIG = 27, "File too large";
    NOSPC = 28, "No space left on device";
    ROFS = 30, "Read-only file system";
    PIPE = 32, "Broken pipe";
    RANGE = 34, "Numerical result out of range";
    NAMETOOLONG = 36, "File name too long";
    NOSYS = 38, "Function not implemented";
    NOTEMPTY = 39, "Directory not empty";
    LOOP = 40, "Too many levels of symbolic links";
    NODATA = 61, "No data available";
    OVERFLOW = 75, "Value too large for defined data type";
    ILSEQ = 84, "Invalid or incomplete multibyte or wide character";
    OPNOTSUPP = 95, "Operation not supported";
    AFNOSUPPORT = 97, "Address family not supported by protocol";
    ADDRINUSE = 98, "Address already in use";
    ADDRNOTAVAIL = 99, "Cannot assign requested address";
    CONNRESET = 104, "Connection reset by peer";
    NOBUFS = 105, "No buffer space available";
    TIMEDOUT = 110, "Connection timed out";
    CONNREFUSED = 111, "Connection refused";
    ALREADY = 114, "Operation already in progress";
    INPROGRESS = 115, "Operation now in progress";
    DQUOT = 122, "Disk quota exceeded";
    CANCELED = 125, "Operation canceled";
}

/// An error that a method answers with.
///
/// Say the field and the value where one is to blame, the reason always, and
/// the fix wherever there is one. The table adds the method's name.
#[derive(Clone, Debug, PartialEq)]
pub struct RpcError(Box<Inner>);

#[derive(Clone, Debug, PartialEq)]
struct Inner {
    code: i32,
    method: Option<String>,
    field: Option<String>,
    value: Option<Value>,
    reason: String,
    fix: Option<String>,
}

impl RpcError {
    /// An error with any code.
    pub fn new(code: i32, reason: impl Into<String>) -> Self {
        Self(Box::new(Inner { code, method: None, field: None, value: None, reason: reason.into(), fix: None }))
    }

    /// -32602: a parameter is not what the method takes.
    pub fn invalid_params(reason: impl Into<String>) -> Self {
        Self::new(code::INVALID_PARAMS, reason)
    }

    /// -32603: the server failed.
    pub fn internal(reason: impl Into<String>) -> Self {
        Self::new(code::INTERNAL_ERROR, reason)
    }

    /// -1: not in the server's present state.
    pub fn invalid_state(reason: impl Into<String>) -> Self {
        Self::new(code::INVALID_STATE, reason)
    }

    /// A negative errno: `Errno::EXIST` is answered as -17, "File exists".
    pub fn errno(errno: Errno, reason: impl Into<String>) -> Self {
        assert!(errno.0 > 0, "errno numbers are positive");
        Self::new(-errno.0, reason)
    }

    /// The errno of a failed system call, or -5 (input/output error) where it
    /// has none; `doing` says what failed: "opening the file".
    pub fn io(error: &io::Error, doing: impl fmt::Display) -> Self {
        match error.raw_os_error() {
            Some(number) if number > 0 => Self::errno(Errno(number), format!("{doing} failed")),
            _ => Self::errno(Errno::IO, format!("{doing} failed: {error}")),
        }
    }

    /// Names the parameter to blame; nested ones with dots.
    pub fn field(mut self, field: impl Into<String>) -> Self {
        self.0.field = Some(field.into());
        self
    }

    /// The value to blame.
    pub fn value(mut self, value: impl Into<Value>) -> Self {
        let value = value.into();
        let bytes = value.to_string();
        self.0.value =
            Some(if bytes.len() <= CARRIED_BYTES { value } else { Value::String(clipped(&bytes, SHOWN_CHARS)) });
        self
    }

    /// What to do instead: "choose another name".
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.0.fix = Some(fix.into());
        self
    }

    /// Names the method, unless it is named already.
    pub fn in_method(mut self, method: &str) -> Self {
        self.0.method.get_or_insert_with(|| clipped(method, SHOWN_CHARS));
        self
    }

    /// The same error with another code.
    pub fn with_code(mut self, code: i32) -> Self {
        self.0.code = code;
        self
    }

    /// The code on the wire.
    pub fn code(&self) -> i32 {
        self.0.code
    }

    /// The method, once the table named it.
    pub fn method(&self) -> Option<&str> {
        self.0.method.as_deref()
    }

    /// The parameter to blame.
    pub fn blamed_field(&self) -> Option<&str> {
        self.0.field.as_deref()
    }

    /// What was wrong.
    pub fn reason(&self) -> &str {
        &self.0.reason
    }

    /// What to do instead.
    pub fn remedy(&self) -> Option<&str> {
        self.0.fix.as_deref()
    }

    /// The one-line message.
    pub fn message(&self) -> String {
        self.to_string()
    }

    /// The structured part: every key is there, null where there is nothing
    /// to say.
    pub fn data(&self) -> Value {
        json!({
            "method": self.0.method,
            "field": self.0.field,
            "value": self.0.value,
            "reason": self.0.reason,
            "fix": self.0.fix,
        })
    }

    /// The error object of a reply.
    pub fn to_json(&self) -> Value {
        json!({"code": self.0.code, "message": self.message(), "data": self.data()})
    }
}

/// The standard text of a code, with which its messages start.
fn lead(code: i32) -> &'static str {
    match code {
        code::PARSE_ERROR => "Parse error",
        code::INVALID_REQUEST => "Invalid request",
        code::METHOD_NOT_FOUND => "Method not found",
        code::INVALID_PARAMS => "Invalid parameters",
        code::INTERNAL_ERROR => "Internal error",
        code::INVALID_STATE => "Invalid state",
        code if code < 0 => Errno(code.saturating_neg()).text(),
        _ => "Error",
    }
}

impl fmt::Display for RpcError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { code, method, field, value, reason, fix } = &*self.0;
        f.write_str(lead(*code))?;
        if let Some(method) = method {
            write!(f, ": {method}")?;
        }
        match (field, value) {
            (Some(field), Some(value)) => write!(f, ": {field} {}", shown(value))?,
            (Some(field), None) => write!(f, ": {field}")?,
            (None, Some(value)) => write!(f, ": {}", shown(value))?,
            (None, None) => {}
        }
        write!(f, ": {reason}")?;
        match fix {
            Some(fix) => write!(f, "; {fix}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for RpcError {}

fn shown(value: &Value) -> String {
    clipped(&value.to_string(), SHOWN_CHARS)
}

/// At most `chars` characters of `text`, with dots where some were left out.
pub(crate) fn clipped(text: &str, chars: usize) -> String {
    match text.char_indices().nth(chars) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_says_everything() {
        let error = RpcError::errno(Errno::EXIST, "a bdev of that name exists")
            .field("name")
            .value("Malloc0")
            .fix("choose another name")
            .in_method("bdev_malloc_create");
        assert_eq!(
            error.message(),
            "File exists: bdev_malloc_create: name \"Malloc0\": a bdev of that name exists; \
             choose another name"
        );
        assert_eq!(error.code(), -17);
        assert_eq!(
            error.to_json()["data"],
            json!({
                "method": "bdev_malloc_create",
                "field": "name",
                "value": "Malloc0",
                "reason": "a bdev of that name exists",
                "fix": "choose another name",
            })
        );
    }

    #[test]
    fn parts_may_be_missing() {
        let error = RpcError::internal("the reactor is gone");
        assert_eq!(error.message(), "Internal error: the reactor is gone");
        assert_eq!(error.to_json()["data"]["field"], Value::Null);
        assert_eq!(RpcError::new(-4095, "x").message(), "Unknown error: x".to_owned());
        assert_eq!(RpcError::new(i32::MIN, "x").message(), "Unknown error: x".to_owned());
    }

    #[test]
    fn the_first_method_named_stays() {
        let error = RpcError::internal("x").in_method("inner").in_method("outer");
        assert_eq!(error.method(), Some("inner"));
    }

    #[test]
    fn large_values_are_clipped() {
        let error = RpcError::invalid_params("too long").field("name").value("x".repeat(1 << 20));
        assert!(error.message().len() < 300);
        assert!(error.to_json().to_string().len() < 600);
        let error = error.value("é".repeat(200));
        assert!(error.message().chars().count() < 300);
        assert_eq!(error.data()["value"], json!("é".repeat(200)));
    }

    #[test]
    fn io_errors_keep_their_number() {
        let error = RpcError::io(&io::Error::from_raw_os_error(2), "opening the file");
        assert_eq!(error.code(), -2);
        assert_eq!(error.message(), "No such file or directory: opening the file failed");
        let error = RpcError::io(&io::Error::other("no idea"), "opening the file");
        assert_eq!(error.code(), -5);
    }

    /// The texts are what the C library says, so that scripts that compare
    /// them keep working.
    #[test]
    fn texts_are_those_of_strerror() {
        for number in 1..=133 {
            let text = Errno(number).text();
            if text == "Unknown error" {
                continue;
            }
            let std = io::Error::from_raw_os_error(number).to_string();
            assert_eq!(std, format!("{text} (os error {number})"));
        }
    }
}
