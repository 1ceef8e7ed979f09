//! The command line's arguments as parameters of a method.
//!
//! Either one JSON object, or words of the form `key=value`. Dots lead into
//! nested objects: `listen_address.traddr=127.0.0.1`. What a value is read as
//! is up to the method's declaration: `size=4096` is a number where a number
//! is wanted and text where text is wanted. Arrays are JSON, or words with
//! commas between them; objects are JSON.

use std::fmt;

use schema::{Kind, MethodSpec, Param, nearest};
use serde_json::{Map, Number, Value};

use crate::json;

/// Keys in one dotted path.
const MAX_PATH: usize = 16;

/// What is wrong with an argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArgError(String);

impl fmt::Display for ArgError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ArgError {}

fn wrong<T>(text: String) -> Result<T, ArgError> {
    Err(ArgError(text))
}

/// Parameters for a method from the words behind its name; `Value::Null` for
/// none.
///
/// Without a declaration, as for a method that only the server knows, values
/// are JSON where they parse as such and text otherwise. Bounds are left to
/// the server, which checks them all.
pub fn parse(spec: Option<&MethodSpec>, words: &[String]) -> Result<Value, ArgError> {
    match words {
        [] => return Ok(Value::Null),
        [word] if word.trim_start().starts_with(['{', '[']) => {
            return match json::parse(word) {
                Ok(value @ Value::Object(_)) => Ok(value),
                Ok(_) => wrong("parameters must be a JSON object, not an array".to_owned()),
                Err(error) => wrong(format!("this is not JSON: {error}: {word}")),
            };
        }
        _ => {}
    }
    let mut params = Map::new();
    for word in words {
        let Some((key, text)) = word.split_once('=') else {
            return wrong(match spec.and_then(|spec| meant(spec.params, word)) {
                Some(name) => format!("write {name}=VALUE instead of {word:?}"),
                None => format!("{word:?} is not of the form key=value"),
            });
        };
        let path: Vec<&str> = key.split('.').collect();
        if path.len() > MAX_PATH {
            return wrong(format!("{word:?}: more than {MAX_PATH} keys deep"));
        }
        let value = match spec {
            Some(spec) => read(&find(spec, &path)?.kind, key, text)?,
            None => json::parse(text).unwrap_or_else(|_| Value::from(text)),
        };
        insert(&mut params, &path, key, value)?;
    }
    Ok(Value::Object(params))
}

fn meant(params: &[Param], word: &str) -> Option<&'static str> {
    nearest(word, params.iter().map(|param| param.name))
}

fn find(spec: &MethodSpec, path: &[&str]) -> Result<&'static Param, ArgError> {
    let mut params = spec.params;
    let mut found: Option<&Param> = None;
    for (depth, key) in path.iter().enumerate() {
        let within = path[..depth].join(".");
        let Some(param) = params.iter().find(|param| param.name == *key) else {
            let what = match within.as_str() {
                "" => format!("{} has no parameter {key}", spec.name),
                within => format!("{within} of {} has no key {key}", spec.name),
            };
            return wrong(match meant(params, key) {
                Some(name) => format!("{what}; did you mean {name}?"),
                None if params.is_empty() => format!("{what}; it has none"),
                None => {
                    let names: Vec<_> = params.iter().map(|param| param.name).collect();
                    format!("{what}; known are {}", names.join(", "))
                }
            });
        };
        params = match param.kind {
            Kind::Object(params) => params,
            _ => &[],
        };
        found = Some(param);
    }
    found.map_or_else(|| wrong("an empty key".to_owned()), Ok)
}

fn read(kind: &Kind, key: &str, text: &str) -> Result<Value, ArgError> {
    let mistyped = || wrong(format!("{key}={text}: {kind} is wanted"));
    match kind {
        Kind::Bool => match text {
            "true" | "on" | "yes" | "1" => Ok(Value::Bool(true)),
            "false" | "off" | "no" | "0" => Ok(Value::Bool(false)),
            _ => mistyped(),
        },
        Kind::F64 => match text.parse().ok().and_then(Number::from_f64) {
            Some(number) => Ok(Value::Number(number)),
            None => mistyped(),
        },
        kind if kind.integer_range().is_some() => match integer(text) {
            Some(number) => Ok(Value::Number(number)),
            None => mistyped(),
        },
        Kind::Array(_) if text.starts_with('[') => structured(kind, key, text),
        Kind::Array(item) => {
            let words = text.split(',').filter(|word| !word.is_empty());
            words.map(|word| read(item, key, word)).collect()
        }
        Kind::Set(_) if text.starts_with('[') => structured(kind, key, text),
        Kind::Object(_) => structured(kind, key, text),
        Kind::Any => Ok(json::parse(text).unwrap_or_else(|_| Value::from(text))),
        _ => Ok(Value::from(text)),
    }
}

fn structured(kind: &Kind, key: &str, text: &str) -> Result<Value, ArgError> {
    match json::parse(text) {
        Ok(value) if value.is_object() == matches!(kind, Kind::Object(_)) => Ok(value),
        Ok(_) => wrong(format!("{key}={text}: {kind} is wanted")),
        Err(error) => wrong(format!("{key}={text}: {kind} is wanted, as JSON: {error}")),
    }
}

/// A decimal or 0x number.
fn integer(text: &str) -> Option<Number> {
    let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let number = match digits {
        Some(digits) if !digits.starts_with('+') => i128::from(u64::from_str_radix(digits, 16).ok()?),
        Some(_) => return None,
        None => text.parse().ok()?,
    };
    Number::from_i128(number)
}

fn insert(params: &mut Map<String, Value>, path: &[&str], key: &str, value: Value) -> Result<(), ArgError> {
    let Some((first, rest)) = path.split_first() else {
        return Ok(());
    };
    if rest.is_empty() {
        return match params.insert((*first).to_owned(), value) {
            None => Ok(()),
            Some(_) => wrong(format!("{key} is given twice")),
        };
    }
    let inner = params.entry(*first).or_insert_with(|| Value::Object(Map::new()));
    match inner {
        Value::Object(inner) => insert(inner, rest, key, value),
        _ => wrong(format!("{key}: {first} is no object")),
    }
}

#[cfg(test)]
mod tests {
    use schema::{Method, Params, RpcError};
    use serde_json::json;

    use super::*;

    const ADDRESS: Kind =
        Kind::Object(&[Param::required("traddr", Kind::Str, "address"), Param::optional("trsvcid", Kind::Str, "port")]);

    const METHOD: Method<()> = Method::new("thing_create", "Create it.", |_, _: Params| {
        Box::pin(async { Err::<Value, _>(RpcError::internal("never called")) })
    })
    .params(&[
        Param::required("name", Kind::Str, "its name"),
        Param::required("size", Kind::U64, "its size"),
        Param::optional("shift", Kind::I32, "its shift"),
        Param::optional("ratio", Kind::F64, "its ratio"),
        Param::optional("readonly", Kind::Bool, "its mode"),
        Param::optional("names", Kind::Array(&Kind::Str), "names"),
        Param::optional("ids", Kind::Array(&Kind::U32), "numbers"),
        Param::optional("filters", Kind::Set(&["a", "b"]), "filters"),
        Param::optional("listen_address", ADDRESS, "where"),
        Param::optional("extra", Kind::Any, "anything"),
    ]);

    fn parse_words(words: &[&str]) -> Result<Value, String> {
        let words: Vec<_> = words.iter().map(|word| (*word).to_owned()).collect();
        parse(Some(&METHOD.spec), &words).map_err(|error| error.to_string())
    }

    #[test]
    fn values_are_read_as_declared() {
        let params = parse_words(&[
            "name=4096",
            "size=0x1000",
            "shift=-1",
            "ratio=0.5",
            "readonly=on",
            "names=a,b",
            "ids=1,2",
            "filters=a,b",
            "listen_address.traddr=127.0.0.1",
            "listen_address.trsvcid=4420",
            "extra={\"x\":1}",
        ]);
        let wanted = json!({
            "name": "4096", "size": 4096, "shift": -1, "ratio": 0.5, "readonly": true,
            "names": ["a", "b"], "ids": [1, 2], "filters": "a,b",
            "listen_address": {"traddr": "127.0.0.1", "trsvcid": "4420"}, "extra": {"x": 1},
        });
        assert_eq!(params, Ok(wanted));
        assert_eq!(parse_words(&["name=a=b"]), Ok(json!({"name": "a=b"})));
        assert_eq!(parse_words(&["names=[\"a,b\"]"]), Ok(json!({"names": ["a,b"]})));
        assert_eq!(
            parse_words(&["listen_address={\"traddr\":\"::1\"}"]),
            Ok(json!({"listen_address": {"traddr": "::1"}}))
        );
    }

    #[test]
    fn one_object_is_taken_as_it_is() {
        assert_eq!(parse_words(&[]), Ok(Value::Null));
        assert_eq!(parse_words(&[" {\"name\": 1}"]), Ok(json!({"name": 1})));
        assert!(parse_words(&["{\"name\": "]).unwrap_err().contains("not JSON"));
        assert!(parse_words(&["[1]"]).unwrap_err().contains("not an array"));
    }

    #[test]
    fn without_a_declaration_json_is_guessed() {
        let words = ["a=1".to_owned(), "b=x".to_owned(), "c.d=true".to_owned()];
        let wanted = json!({"a": 1, "b": "x", "c": {"d": true}});
        assert_eq!(parse(None, &words), Ok(wanted));
    }

    #[test]
    fn mistakes_are_told() {
        for (words, text) in [
            (&["nmae=x"][..], "thing_create has no parameter nmae; did you mean name?"),
            (&["zzz=x"], "known are name, size"),
            (&["name"], "write name=VALUE"),
            (&["zzz"], "\"zzz\" is not of the form key=value"),
            (&["size=big"], "size=big: a 64-bit unsigned number is wanted"),
            (&["size=0x+1"], "is wanted"),
            (&["size="], "is wanted"),
            (&["ratio=NaN"], "a number is wanted"),
            (&["readonly=maybe"], "true or false is wanted"),
            (&["ids=1,x"], "ids=x"),
            (&["listen_address.port=1"], "listen_address of thing_create has no key port"),
            (&["listen_address=x"], "as JSON"),
            (&["listen_address=[]"], "an object is wanted"),
            (&["name.x=1"], "name of thing_create has no key x; it has none"),
            (&["name=a", "name=b"], "name is given twice"),
            (&["=x"], "has no parameter"),
        ] {
            let error = parse_words(words).unwrap_err();
            assert!(error.contains(text), "{words:?}: {error}");
        }
        let words = ["a=1".to_owned(), "a.b=1".to_owned()];
        assert!(parse(None, &words).is_err());
    }
}
