//! Compares declarations and results with what SPDK has, for tests.
//!
//! The data are not part of the project. Where a folder `shared/data` with
//! them lies beside it, tests read it from there; elsewhere they say that they
//! were skipped.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use crate::{Kind, MethodSpec, Param};

/// SPDK's methods, and replies of a running SPDK.
#[derive(Debug)]
pub struct Reference {
    schema: Value,
    samples: Vec<Value>,
}

/// A call that was made to SPDK, and what it answered.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// The method.
    pub method: &'a str,
    /// Its parameters; null for none.
    pub params: &'a Value,
    /// The result, or the error's code.
    pub outcome: Result<&'a Value, i64>,
}

impl Reference {
    /// Looks for the data beside the folder or any that it lies in. Give
    /// `env!("CARGO_MANIFEST_DIR")`. Says on standard error if there are none.
    pub fn beside(folder: &str) -> Option<Reference> {
        let data = Path::new(folder)
            .ancestors()
            .map(|folder| folder.join("shared/data"))
            .find(|data| data.join("spdk-rpc-methods.json").is_file());
        let Some(data) = data else {
            eprintln!("SKIPPED: no shared/data with SPDK's methods beside the project");
            return None;
        };
        let read = |name: &str| -> Value {
            let text = fs::read_to_string(data.join(name)).expect("the data can be read");
            serde_json::from_str(&text).expect("the data are JSON")
        };
        let Value::Array(samples) = read("spdk-rpc-samples.json") else {
            panic!("the samples are an array");
        };
        Some(Reference { schema: read("spdk-rpc-methods.json"), samples })
    }

    /// Everything in which a declaration differs from SPDK's: names, types,
    /// words, what is required. `None` if SPDK has no such method.
    pub fn parameter_differences(&self, spec: &MethodSpec) -> Option<Vec<String>> {
        let theirs = self.schema["methods"].get(spec.name)?.as_array()?;
        let mut out = Vec::new();
        self.compare_params(spec.params, theirs, spec.name, &mut out);
        Some(out)
    }

    /// All calls that were made.
    pub fn samples(&self) -> impl Iterator<Item = Sample<'_>> {
        self.samples.iter().map(|sample| Sample {
            method: sample["request"]["method"].as_str().unwrap_or_default(),
            params: &sample["request"]["params"],
            outcome: match sample["response"].get("result") {
                Some(result) => Ok(result),
                None => Err(sample["response"]["error"]["code"].as_i64().unwrap_or(0)),
            },
        })
    }

    /// Keys and types in which a result differs from all that SPDK answered
    /// to this method: those always there and missing here, those never there
    /// and given here, those of another type. `None` if there is no sample.
    pub fn result_differences(&self, method: &str, ours: &Value) -> Option<Vec<String>> {
        let theirs: Vec<_> =
            self.samples().filter(|sample| sample.method == method).filter_map(|sample| sample.outcome.ok()).collect();
        if theirs.is_empty() {
            return None;
        }
        let mut out = Vec::new();
        compare_shapes(&theirs, ours, method, &mut out);
        Some(out)
    }

    fn compare_params(&self, ours: &[Param], theirs: &[Value], path: &str, out: &mut Vec<String>) {
        for param in theirs {
            let name = param["name"].as_str().unwrap_or_default();
            if !ours.iter().any(|our| our.name == name) {
                out.push(format!("{path}.{name}: missing"));
            }
        }
        for our in ours {
            let path = format!("{path}.{}", our.name);
            let Some(their) = theirs.iter().find(|param| param["name"] == our.name) else {
                out.push(format!("{path}: SPDK has no such parameter"));
                continue;
            };
            if our.required != (their["required"] == true) {
                out.push(format!("{path}: required here: {}", our.required));
            }
            self.compare_kinds(&our.kind, their, &path, out);
        }
    }

    fn compare_kinds(&self, ours: &Kind, their: &Value, path: &str, out: &mut Vec<String>) {
        let class = their["class"].as_str().unwrap_or_default();
        let kind = their["type"].as_str().unwrap_or_default();
        let same = match (ours, kind) {
            (Kind::Bool, "boolean")
            | (Kind::U8, "uint8")
            | (Kind::U16, "uint16")
            | (Kind::U32, "uint32")
            | (Kind::U64, "uint64")
            | (Kind::I32, "int32")
            | (Kind::I64, "int64")
            | (Kind::Str | Kind::Hex(_), "string")
            | (Kind::Uuid, "uuid") => true,
            (Kind::Enum(words), "enum") => same_words(words, &self.schema["enums"][class]),
            (Kind::Set(words), "bitmask") => {
                let class = self.schema["bitmasks"][class]["enum"].as_str();
                same_words(words, &self.schema["enums"][class.unwrap_or_default()])
            }
            (Kind::Object(params), "object") => {
                let fields = self.schema["objects"][class]["fields"].as_array();
                self.compare_params(params, fields.map_or(&[], Vec::as_slice), path, out);
                true
            }
            (Kind::Array(item), "array") => {
                let array = &self.schema["arrays"][class];
                let item_of = |key: &str| array[key].clone();
                let mut their = Map::new();
                their.insert("type".to_owned(), item_of("item_type"));
                their.insert("class".to_owned(), item_of("item_class"));
                self.compare_kinds(item, &Value::Object(their), &format!("{path}[]"), out);
                true
            }
            _ => false,
        };
        if !same {
            out.push(format!("{path}: {ours} here, {kind} {class} there"));
        }
    }
}

fn same_words(ours: &[&str], theirs: &Value) -> bool {
    let theirs = theirs.as_array().map_or(&[][..], Vec::as_slice);
    let known = |word: &Value| word.as_str().is_some_and(|word| ours.contains(&word));
    ours.len() == theirs.len() && theirs.iter().all(known)
}

fn compare_shapes(theirs: &[&Value], ours: &Value, path: &str, out: &mut Vec<String>) {
    if !theirs.iter().any(|their| type_of(their) == type_of(ours)) {
        let types: Vec<_> = theirs.iter().map(|their| type_of(their)).collect();
        out.push(format!("{path}: {} here, {} there", type_of(ours), types.join(" or ")));
        return;
    }
    match ours {
        Value::Object(ours) => {
            let theirs: Vec<_> = theirs.iter().filter_map(|their| their.as_object()).collect();
            let first = theirs.iter().flat_map(|their| their.keys());
            for key in first {
                let always = theirs.iter().all(|their| their.contains_key(key));
                let text = format!("{path}.{key}: missing");
                if always && !ours.contains_key(key) && !out.contains(&text) {
                    out.push(text);
                }
            }
            for (key, our) in ours {
                let path = format!("{path}.{key}");
                let theirs: Vec<_> = theirs.iter().filter_map(|their| their.get(key)).collect();
                match theirs.as_slice() {
                    [] => out.push(format!("{path}: SPDK has no such key")),
                    theirs => compare_shapes(theirs, our, &path, out),
                }
            }
        }
        Value::Array(ours) => {
            let theirs: Vec<_> = theirs.iter().filter_map(|their| their.as_array()).flatten().collect();
            if theirs.is_empty() {
                return;
            }
            for our in ours {
                compare_shapes(&theirs, our, &format!("{path}[]"), out);
            }
        }
        _ => {}
    }
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{Method, Params, RpcError};

    fn reference() -> Reference {
        Reference {
            schema: json!({
                "methods": {"thing_create": [
                    {"name": "name", "type": "string", "required": true},
                    {"name": "level", "type": "enum", "class": "level"},
                    {"name": "mask", "type": "bitmask", "class": "mask"},
                    {"name": "at", "type": "object", "class": "address"},
                    {"name": "names", "type": "array", "class": "names"},
                ]},
                "enums": {"level": ["LOW", "HIGH"], "bit": ["a", "b"]},
                "bitmasks": {"mask": {"enum": "bit"}},
                "objects": {"address": {"fields": [{"name": "port", "type": "uint16"}]}},
                "arrays": {"names": {"item_type": "string"}},
            }),
            samples: vec![
                json!({"request": {"method": "thing_get"}, "response": {"result":
                    [{"name": "x", "size": 1}, {"name": "x", "odd": true}]}}),
                json!({"request": {"method": "thing_get"}, "response": {"error": {"code": -19}}}),
            ],
        }
    }

    fn method(params: &'static [Param]) -> MethodSpec {
        let method: Method<()> = Method::new("thing_create", "Create it.", |_, _: Params| {
            Box::pin(async { Err(RpcError::internal("never called")) })
        });
        method.params(params).spec
    }

    #[test]
    fn equal_declarations_have_no_differences() {
        const PARAMS: &[Param] = &[
            Param::required("name", Kind::Str, ""),
            Param::optional("level", Kind::Enum(&["HIGH", "LOW"]), ""),
            Param::optional("mask", Kind::Set(&["a", "b"]), ""),
            Param::optional("at", Kind::Object(&[Param::optional("port", Kind::U16, "")]), ""),
            Param::optional("names", Kind::Array(&Kind::Str), ""),
        ];
        let spec = method(PARAMS);
        assert_eq!(reference().parameter_differences(&spec), Some(vec![]));
        let other = MethodSpec { name: "other", ..spec };
        assert_eq!(reference().parameter_differences(&other), None);
    }

    #[test]
    fn every_difference_is_told() {
        const PARAMS: &[Param] = &[
            Param::optional("name", Kind::U8, ""),
            Param::optional("level", Kind::Enum(&["HIGH"]), ""),
            Param::optional("mask", Kind::Set(&["a", "c"]), ""),
            Param::optional("at", Kind::Object(&[Param::required("port", Kind::U32, "")]), ""),
            Param::optional("more", Kind::Any, ""),
        ];
        let spec = method(PARAMS);
        let differences = reference().parameter_differences(&spec).unwrap();
        let wanted = [
            "thing_create.names: missing",
            "thing_create.name: required here: false",
            "thing_create.name: an 8-bit unsigned number here, string  there",
            "thing_create.level: one of HIGH here, enum level there",
            "thing_create.mask: any of a, c here, bitmask mask there",
            "thing_create.at.port: required here: true",
            "thing_create.at.port: a 32-bit unsigned number here, uint16  there",
            "thing_create.more: SPDK has no such parameter",
        ];
        assert_eq!(differences, wanted);
    }

    #[test]
    fn shapes_are_compared_with_all_samples() {
        let reference = reference();
        let differences = |ours: Value| reference.result_differences("thing_get", &ours).unwrap();
        assert!(differences(json!([{"name": "y", "size": 7}, {"name": "z"}])).is_empty());
        assert_eq!(
            differences(json!([{"size": "7", "new": 1}])),
            [
                "thing_get[].name: missing",
                "thing_get[].new: SPDK has no such key",
                "thing_get[].size: string here, number there",
            ]
        );
        assert_eq!(differences(json!({})), ["thing_get: object here, array there"]);
        assert_eq!(reference.result_differences("none", &Value::Null), None);
        assert_eq!(reference.samples().nth(1).unwrap().outcome, Err(-19));
    }
}
