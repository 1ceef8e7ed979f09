//! What a part of the server tells about its configuration.

use serde_json::{Value, json};

/// One call that, made again, brings back a piece of configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct ConfigEntry {
    /// Method to call.
    pub method: &'static str,
    /// Its parameters, an object; null for none.
    pub params: Value,
}

impl ConfigEntry {
    /// A call with parameters, as `json!({...})`; `Value::Null` for none.
    pub fn new(method: &'static str, params: Value) -> Self {
        assert!(params.is_object() || params.is_null(), "parameters are an object or absent");
        Self { method, params }
    }

    /// `{"method", "params"}`, without `params` where there are none.
    pub fn to_json(&self) -> Value {
        match &self.params {
            Value::Null => json!({"method": self.method}),
            params => json!({"method": self.method, "params": params}),
        }
    }
}

/// A part of the server with configuration of its own, listed by
/// `framework_get_subsystems` and saved under its name ("bdev", "nvmf", ...).
pub trait ConfigSource: Send + Sync {
    /// Name in the saved configuration.
    fn name(&self) -> &'static str;

    /// Names of the parts that must be set up before this one.
    fn depends_on(&self) -> &'static [&'static str] {
        &[]
    }

    /// The calls that restore the present configuration, in the order in which
    /// they must be made. The state must be consistent: no half-made thing.
    fn save(&self) -> Vec<ConfigEntry>;
}
