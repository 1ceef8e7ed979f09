//! The parameters of one call, already validated.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{MethodSpec, RpcError};

/// The parameters of one call. A handler only ever sees validated ones.
///
/// `opt_*` give `None` where the key was left out; the others refuse with
/// -32602, which for a parameter declared as required cannot happen. Asking
/// for another type than the declared kind is a bug of the handler, answered
/// the same way.
#[derive(Clone, Debug)]
pub struct Params {
    method: &'static str,
    refusal_code: i32,
    values: Value,
}

impl Params {
    pub(crate) fn new(spec: &MethodSpec, values: Map<String, Value>) -> Self {
        Self { method: spec.name, refusal_code: spec.refusal_code, values: Value::Object(values) }
    }

    /// The method that was called.
    pub fn method(&self) -> &'static str {
        self.method
    }

    /// All of them, as JSON.
    pub fn as_value(&self) -> &Value {
        &self.values
    }

    /// All of them as a structure of the handler's. Keys that were left out
    /// need `Option` or `#[serde(default)]`.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, RpcError> {
        T::deserialize(&self.values)
            .map_err(|error| RpcError::new(self.refusal_code, error.to_string()))
            .map_err(|error| error.in_method(self.method))
    }

    /// A parameter as it came.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.values.get(name)
    }

    /// A parameter as a type of the handler's.
    pub fn opt<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, RpcError> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => match T::deserialize(value) {
                Ok(value) => Ok(Some(value)),
                Err(error) => Err(self.invalid(name, error.to_string())),
            },
        }
    }

    /// A text, if given.
    pub fn opt_str(&self, name: &str) -> Option<&str> {
        self.get(name)?.as_str()
    }

    /// An unsigned number, if given.
    pub fn opt_u64(&self, name: &str) -> Option<u64> {
        self.get(name)?.as_u64()
    }

    /// An unsigned number declared as `U32` or smaller, if given.
    pub fn opt_u32(&self, name: &str) -> Option<u32> {
        self.opt_u64(name)?.try_into().ok()
    }

    /// A truth value, if given.
    pub fn opt_bool(&self, name: &str) -> Option<bool> {
        self.get(name)?.as_bool()
    }

    /// A text.
    pub fn str(&self, name: &str) -> Result<&str, RpcError> {
        self.opt_str(name).ok_or_else(|| self.absent(name))
    }

    /// An unsigned number.
    pub fn u64(&self, name: &str) -> Result<u64, RpcError> {
        self.opt_u64(name).ok_or_else(|| self.absent(name))
    }

    /// An unsigned number declared as `U32` or smaller.
    pub fn u32(&self, name: &str) -> Result<u32, RpcError> {
        self.opt_u32(name).ok_or_else(|| self.absent(name))
    }

    /// A truth value.
    pub fn bool(&self, name: &str) -> Result<bool, RpcError> {
        self.opt_bool(name).ok_or_else(|| self.absent(name))
    }

    /// A refusal that blames one parameter and carries its value; dots lead
    /// into nested objects.
    pub fn invalid(&self, field: &str, reason: impl Into<String>) -> RpcError {
        self.blame(field, RpcError::new(self.refusal_code, reason))
    }

    /// Blames one parameter, with its value, for an error.
    pub fn blame(&self, field: &str, error: RpcError) -> RpcError {
        let mut at = Some(&self.values);
        for key in field.split('.') {
            at = at.and_then(|value| value.get(key));
        }
        let error = error.in_method(self.method).field(field);
        match at {
            Some(value) => error.value(value.clone()),
            None => error,
        }
    }

    fn absent(&self, name: &str) -> RpcError {
        self.invalid(name, "missing, or not of the type that is wanted")
    }
}
