//! Compares what a caller sent with what the method declares.
//!
//! Strict, because a mistyped key that is silently ignored costs its writer a
//! day; helpful, because the refusal names the key, the value and what would
//! have been right.

use serde_json::{Map, Number, Value};

use crate::error::clipped;
use crate::{Kind, MethodSpec, Param, Params, RpcError, nearest};

/// Whole numbers beyond this cannot be told apart when written as 1e17.
const LARGEST_EXACT_FLOAT: f64 = 9_007_199_254_740_992.0;

/// Checks the parameters of a call and brings them into the form that handlers
/// see: an object; integers written as `4096.0` or `4e3` as integers; sets as
/// arrays.
///
/// `params` is what the request had under that key; absent, null and `{}` mean
/// the same.
pub fn validate(spec: &MethodSpec, params: Option<Value>) -> Result<Params, RpcError> {
    let mut values = match params {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(values)) => values,
        Some(other) => {
            let error = RpcError::invalid_params(format!(
                "params must be an object with named values, not {}",
                type_name(&other)
            ))
            .value(other)
            .fix(match spec.params.first() {
                Some(param) => format!("write {{\"{}\": ...}}", param.name),
                None => "leave params out: the method takes none".to_owned(),
            });
            return Err(error.with_code(spec.refusal_code).in_method(spec.name));
        }
    };
    object(spec.params, &mut values, "").map_err(|error| error.with_code(spec.refusal_code).in_method(spec.name))?;
    Ok(Params::new(spec, values))
}

fn object(params: &[Param], values: &mut Map<String, Value>, path: &str) -> Result<(), RpcError> {
    for (key, value) in values.iter_mut() {
        let field = join(path, key);
        let Some(param) = params.iter().find(|param| param.name == key) else {
            return Err(unknown(params, key, value, field));
        };
        check(&param.kind, (param.min, param.max), value, &field)?;
    }
    for param in params.iter().filter(|param| param.required) {
        if !values.contains_key(param.name) {
            return Err(RpcError::invalid_params("required but not given")
                .field(join(path, param.name))
                .fix(format!("add it: {} ({})", param.kind, param.help)));
        }
    }
    Ok(())
}

fn unknown(params: &[Param], key: &str, value: &Value, field: String) -> RpcError {
    let names = || params.iter().map(|param| param.name);
    let fix = match nearest(key, names()) {
        Some(name) => format!("did you mean {name}?"),
        None if params.is_empty() => "leave it out: nothing is taken here".to_owned(),
        None => format!("known are {}", names().collect::<Vec<_>>().join(", ")),
    };
    RpcError::invalid_params("no such parameter").field(clipped(&field, 120)).value(value.clone()).fix(fix)
}

type Bounds = (Option<i128>, Option<i128>);

fn check(kind: &Kind, bounds: Bounds, value: &mut Value, field: &str) -> Result<(), RpcError> {
    match kind {
        Kind::Any => Ok(()),
        Kind::Bool if value.is_boolean() => Ok(()),
        Kind::U8 | Kind::U16 | Kind::U32 | Kind::U64 | Kind::I32 | Kind::I64 => integer(kind, bounds, value, field),
        Kind::F64 if value.is_number() => Ok(()),
        Kind::Object(params) => match value {
            Value::Object(values) => object(params, values, field),
            _ => Err(mistyped(kind, value, field)),
        },
        Kind::Array(item) => match value {
            Value::Array(items) => {
                sized(items.len(), "items", bounds, field)?;
                for (at, value) in items.iter_mut().enumerate() {
                    check(item, (None, None), value, &format!("{field}[{at}]"))?;
                }
                Ok(())
            }
            _ => Err(mistyped(kind, value, field)),
        },
        Kind::Set(words) => set(kind, words, value, field),
        Kind::Str | Kind::Uuid | Kind::Hex(_) | Kind::Enum(_) => match value.as_str() {
            Some(text) => string(kind, bounds, text, field),
            None => Err(mistyped(kind, value, field)),
        },
        Kind::Bool | Kind::F64 => Err(mistyped(kind, value, field)),
    }
}

fn integer(kind: &Kind, bounds: Bounds, value: &mut Value, field: &str) -> Result<(), RpcError> {
    let Value::Number(given) = &*value else {
        return Err(mistyped(kind, value, field));
    };
    let Some(number) = whole(given) else {
        return Err(mistyped(kind, value, field));
    };
    let (low, high) = kind.integer_range().expect("only called for integers");
    let low = bounds.0.map_or(low, |min| min.max(low));
    let high = bounds.1.map_or(high, |max| max.min(high));
    if number < low || number > high {
        return Err(RpcError::invalid_params(format!("out of range for {kind}"))
            .field(field)
            .value(value.clone())
            .fix(format!("give {low} to {high}")));
    }
    // In range of a kind of at most 64 bits, so one of the two holds it.
    if let Some(number) = Number::from_i128(number) {
        *value = Value::Number(number);
    }
    Ok(())
}

fn whole(number: &Number) -> Option<i128> {
    number.as_i128().or_else(|| {
        let float = number.as_f64()?;
        (float.fract() == 0.0 && float.abs() <= LARGEST_EXACT_FLOAT).then_some(float as i128)
    })
}

fn string(kind: &Kind, bounds: Bounds, text: &str, field: &str) -> Result<(), RpcError> {
    let wrong = |reason: String, fix: String| Err(RpcError::invalid_params(reason).field(field).value(text).fix(fix));
    match kind {
        Kind::Enum(words) if !words.contains(&text) => wrong(
            "none of the known words".to_owned(),
            match nearest(text, words.iter().copied()) {
                Some(word) => format!("did you mean {word}? known are {}", words.join(", ")),
                None => format!("known are {}", words.join(", ")),
            },
        ),
        Kind::Uuid if !is_uuid(text) => {
            wrong("not a UUID".to_owned(), "write 8-4-4-4-12 hexadecimal digits".to_owned())
        }
        Kind::Hex(bytes) if text.len() != bytes * 2 || !text.bytes().all(|b| b.is_ascii_hexdigit()) => {
            wrong(format!("not {kind}"), format!("write exactly {} digits 0-9, a-f", bytes * 2))
        }
        _ => sized(text.len(), "bytes", bounds, field).map_err(|error| error.value(text)),
    }
}

fn sized(len: usize, unit: &str, (min, max): Bounds, field: &str) -> Result<(), RpcError> {
    let given = len as i128;
    if min.is_none_or(|min| given >= min) && max.is_none_or(|max| given <= max) {
        return Ok(());
    }
    let fix = match (min, max) {
        (Some(min), Some(max)) => format!("give {min} to {max} {unit}"),
        (Some(min), None) => format!("give at least {min} {unit}"),
        (_, max) => format!("give at most {} {unit}", max.unwrap_or_default()),
    };
    Err(RpcError::invalid_params(format!("{len} {unit} long")).field(field).fix(fix))
}

fn set(kind: &Kind, words: &[&str], value: &mut Value, field: &str) -> Result<(), RpcError> {
    if let Value::String(text) = &*value {
        *value = text.split(',').map(str::trim).filter(|word| !word.is_empty()).map(Value::from).collect();
    }
    let Value::Array(items) = value else {
        return Err(mistyped(kind, value, field));
    };
    for (at, item) in items.iter().enumerate() {
        let fix = match item.as_str() {
            Some(word) if words.contains(&word) => continue,
            Some(word) => nearest(word, words.iter().copied()),
            None => None,
        };
        let fix = match fix {
            Some(word) => format!("did you mean {word}? known are {}", words.join(", ")),
            None => format!("known are {}", words.join(", ")),
        };
        return Err(RpcError::invalid_params("none of the known words")
            .field(format!("{field}[{at}]"))
            .value(item.clone())
            .fix(fix));
    }
    Ok(())
}

fn mistyped(kind: &Kind, value: &Value, field: &str) -> RpcError {
    let fix = match (kind, value) {
        (_, Value::Null) => "leave the key out".to_owned(),
        (kind, Value::String(text)) if kind.integer_range().is_some() => match text.parse::<i128>() {
            Ok(number) => format!("write {number} without quotes"),
            Err(_) => format!("give {kind}"),
        },
        (Kind::Bool, Value::String(text)) if text == "true" || text == "false" => {
            format!("write {text} without quotes")
        }
        (Kind::Str | Kind::Uuid | Kind::Hex(_) | Kind::Enum(_), Value::Number(number)) => {
            format!("write it in quotes: \"{number}\"")
        }
        (Kind::Array(_), value) if !value.is_array() => {
            format!("write [{}]", clipped(&value.to_string(), 120))
        }
        (kind, _) => format!("give {kind}"),
    };
    RpcError::invalid_params(format!("{}, but {kind} is wanted", type_name(value)))
        .field(field)
        .value(value.clone())
        .fix(fix)
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(number) if number.is_f64() => "a number with a fraction",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        })
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::json;

    use super::*;
    use crate::{States, code};

    const SPEC: MethodSpec = MethodSpec {
        name: "thing_create",
        aliases: &[],
        help: "Create a thing.",
        params: &[
            Param::required("name", Kind::Str, "Name").at_least(1).at_most(8),
            Param::required("size", Kind::U32, "Bytes").at_least(512),
            Param::optional("shift", Kind::I32, "Blocks"),
            Param::optional("total", Kind::U64, "Bytes"),
            Param::optional("ratio", Kind::F64, "Ratio"),
            Param::optional("uuid", Kind::Uuid, "UUID"),
            Param::optional("nguid", Kind::Hex(4), "Hex"),
            Param::optional("readonly", Kind::Bool, "Read-only"),
            Param::optional("level", Kind::Enum(&["ERROR", "WARNING"]), "Level"),
            Param::optional("filters", Kind::Set(&["transport", "address"]), "Filters"),
            Param::optional("names", Kind::Array(&Kind::Str), "Names").at_most(2),
            Param::optional(
                "address",
                Kind::Object(&[
                    Param::required("traddr", Kind::Str, "Address"),
                    Param::optional("port", Kind::U16, "Port"),
                ]),
                "Where",
            ),
            Param::optional("extra", Kind::Any, "Anything"),
        ],
        states: States::RUNTIME,
        mutates: false,
        waits: false,
        result: "true",
        refusal_code: code::INVALID_PARAMS,
    };

    fn accept(params: Value) -> Params {
        validate(&SPEC, Some(params)).unwrap()
    }

    fn refuse(params: Value) -> String {
        let error = validate(&SPEC, Some(params)).unwrap_err();
        assert_eq!(error.code(), -32602);
        assert_eq!(error.method(), Some("thing_create"));
        error.message()
    }

    fn with(key: &str, value: Value) -> Value {
        let mut params = json!({"name": "a", "size": 4096});
        params[key] = value;
        params
    }

    #[test]
    fn accepts_what_is_declared() {
        #[derive(Deserialize)]
        struct Thing {
            name: String,
            size: u32,
            shift: Option<i32>,
            filters: Vec<String>,
        }
        let params = accept(json!({
            "name": "a", "size": 4096.0, "shift": -1, "filters": "transport, address",
            "total": u64::MAX, "ratio": 0.5, "uuid": "4dadce4d-faac-4eb4-8ccf-8b8a6dba70bc",
            "nguid": "4DADCE4D", "readonly": true, "level": "ERROR", "names": ["x"],
            "address": {"traddr": "::1", "port": 65535}, "extra": [null],
        }));
        let thing: Thing = params.parse().unwrap();
        assert_eq!((thing.name.as_str(), thing.size), ("a", 4096));
        assert_eq!(thing.shift, Some(-1));
        assert_eq!(thing.filters, ["transport", "address"]);
        assert_eq!(params.opt_u64("total"), Some(u64::MAX));
        assert_eq!(params.bool("readonly"), Ok(true));
        assert_eq!(params.opt::<f64>("ratio").unwrap(), Some(0.5));
        assert_eq!(params.opt_str("nothing"), None);
    }

    #[test]
    fn absent_null_and_empty_are_the_same() {
        let none = MethodSpec { params: &[], ..SPEC };
        for params in [None, Some(Value::Null), Some(json!({}))] {
            assert_eq!(validate(&none, params).unwrap().as_value(), &json!({}));
        }
        let error = validate(&none, Some(json!([]))).unwrap_err();
        assert!(error.message().contains("leave params out"));
    }

    #[test]
    fn positional_values_are_refused() {
        assert_eq!(
            refuse(json!(["a", 4096])),
            "Invalid parameters: thing_create: [\"a\",4096]: params must be an object with named \
             values, not an array; write {\"name\": ...}"
        );
    }

    #[test]
    fn unknown_keys_are_named() {
        assert_eq!(
            refuse(with("sized", json!(1))),
            "Invalid parameters: thing_create: sized 1: no such parameter; did you mean size?"
        );
        assert!(refuse(with("nonsense", json!(1))).contains("known are name, size,"));
        assert!(
            refuse(with("address", json!({"traddr": "x", "prot": 1})))
                .contains("address.prot 1: no such parameter; did you mean port?")
        );
        assert!(refuse(with(&"k".repeat(100_000), json!(1))).len() < 1000);
    }

    #[test]
    fn missing_keys_are_named() {
        assert_eq!(
            refuse(json!({"name": "a"})),
            "Invalid parameters: thing_create: size: required but not given; \
             add it: a 32-bit unsigned number (Bytes)"
        );
        assert!(refuse(with("address", json!({}))).contains("address.traddr: required"));
    }

    #[test]
    fn wrong_types_are_named() {
        for (key, value, text) in [
            ("size", json!("4096"), "write 4096 without quotes"),
            ("size", json!(null), "leave the key out"),
            ("size", json!(4096.5), "a number with a fraction"),
            ("size", json!(511), "give 512 to 4294967295"),
            ("size", json!(4294967296u64), "give 512 to 4294967295"),
            ("size", json!(-1), "out of range"),
            ("size", json!(1e300), "a number with a fraction"),
            ("shift", json!(2147483648u32), "out of range"),
            ("total", json!(-1), "give 0 to 18446744073709551615"),
            ("total", json!(1.8446744073709552e19), "is wanted"),
            ("ratio", json!("1"), "a number is wanted"),
            ("name", json!(7), "write it in quotes: \"7\""),
            ("name", json!(""), "give 1 to 8 bytes"),
            ("name", json!("123456789"), "9 bytes long"),
            ("uuid", json!("4dadce4dfaac4eb48ccf8b8a6dba70bc"), "not a UUID"),
            ("nguid", json!("4DADCE"), "write exactly 8 digits"),
            ("nguid", json!("éééé"), "write exactly 8 digits"),
            ("readonly", json!("true"), "write true without quotes"),
            ("readonly", json!(1), "true or false is wanted"),
            ("level", json!("error"), "did you mean ERROR?"),
            ("level", json!("LOUD"), "known are ERROR, WARNING"),
            ("filters", json!("svcid"), "filters[0] \"svcid\""),
            ("filters", json!(["transport", 3]), "filters[1] 3"),
            ("filters", json!(3), "any of transport, address is wanted"),
            ("names", json!("x"), "write [\"x\"]"),
            ("names", json!(["x", 1]), "names[1] 1"),
            ("names", json!(["x", "y", "z"]), "give at most 2 items"),
            ("address", json!("127.0.0.1"), "an object is wanted"),
            ("address", json!({"traddr": "x", "port": 65536}), "address.port 65536"),
        ] {
            let message = refuse(with(key, value.clone()));
            assert!(message.contains(text), "{key}={value}: {message}");
            assert!(message.contains(key), "{message}");
        }
    }

    #[test]
    fn a_method_may_keep_another_code() {
        let spec = MethodSpec { refusal_code: code::INTERNAL_ERROR, ..SPEC };
        for params in [json!({}), json!([]), json!({"x": 1})] {
            assert_eq!(validate(&spec, Some(params)).unwrap_err().code(), -32603);
        }
        let params = validate(&spec, Some(json!({"name": "a", "size": 512}))).unwrap();
        assert_eq!(params.invalid("name", "odd").code(), -32603);
    }

    #[test]
    fn a_handler_blames_with_the_value() {
        let params = accept(with("address", json!({"traddr": "nowhere"})));
        assert_eq!(
            params.invalid("address.traddr", "not an address").message(),
            "Invalid parameters: thing_create: address.traddr \"nowhere\": not an address"
        );
    }
}
