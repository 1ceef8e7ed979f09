//! Why the model refuses an edit.

use std::fmt;

use schema::RpcError;
use serde_json::Value;

/// What kind of mistake it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelErrorKind {
    /// The value makes no sense, or not together with others.
    Invalid,
    /// It is taken.
    Exists,
    /// There is no such thing.
    NotFound,
    /// There are as many as there may be.
    Full,
    /// The field has a meaning, but this target does not serve it.
    Unsupported,
}

/// A refused edit: nothing of it was done.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelError {
    /// What kind of mistake.
    pub kind: ModelErrorKind,
    /// The field to blame, as RPCs name it.
    pub field: &'static str,
    /// Its value.
    pub value: Value,
    /// What is wrong.
    pub reason: String,
    /// What would be right.
    pub fix: String,
}

impl ModelError {
    fn new(
        kind: ModelErrorKind,
        field: &'static str,
        value: impl Into<Value>,
        reason: impl Into<String>,
        fix: impl Into<String>,
    ) -> ModelError {
        ModelError { kind, field, value: value.into(), reason: reason.into(), fix: fix.into() }
    }

    /// A value that makes no sense.
    pub fn invalid(
        field: &'static str,
        value: impl Into<Value>,
        reason: impl Into<String>,
        fix: impl Into<String>,
    ) -> ModelError {
        ModelError::new(ModelErrorKind::Invalid, field, value, reason, fix)
    }

    /// A value that is taken.
    pub fn exists(
        field: &'static str,
        value: impl Into<Value>,
        reason: impl Into<String>,
        fix: impl Into<String>,
    ) -> ModelError {
        ModelError::new(ModelErrorKind::Exists, field, value, reason, fix)
    }

    /// A thing that is not there.
    pub fn not_found(
        field: &'static str,
        value: impl Into<Value>,
        reason: impl Into<String>,
        fix: impl Into<String>,
    ) -> ModelError {
        ModelError::new(ModelErrorKind::NotFound, field, value, reason, fix)
    }

    /// No room for another.
    pub fn full(
        field: &'static str,
        value: impl Into<Value>,
        reason: impl Into<String>,
        fix: impl Into<String>,
    ) -> ModelError {
        ModelError::new(ModelErrorKind::Full, field, value, reason, fix)
    }

    /// A field that this target does not serve.
    pub fn unsupported(
        field: &'static str,
        value: impl Into<Value>,
        reason: impl Into<String>,
        fix: impl Into<String>,
    ) -> ModelError {
        ModelError::new(ModelErrorKind::Unsupported, field, value, reason, fix)
    }
}

impl fmt::Display for ModelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}; {}", self.field, self.value, self.reason, self.fix)
    }
}

impl std::error::Error for ModelError {}

impl From<ModelError> for RpcError {
    /// With -32602, which scripts written for SPDK know for most of them; methods for which they know another say so.
    fn from(error: ModelError) -> RpcError {
        RpcError::invalid_params(error.reason).field(error.field).value(error.value).fix(error.fix)
    }
}
