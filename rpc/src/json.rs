//! JSON as the control plane reads it: like serde_json, except that a key
//! given twice in one object is an error, not a silent loss of the first.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Number, Value};

/// Parses one JSON value.
pub(crate) fn parse(text: &str) -> Result<Value, serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value = Strict.deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(value)
}

struct Strict;

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("number out of range"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        while let Some(item) = items.next_element_seed(Strict)? {
            array.push(item);
        }
        Ok(Value::Array(array))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if object.contains_key(&key) {
                return Err(de::Error::custom(format!("key {key:?} is given twice")));
            }
            let value = entries.next_value_seed(Strict)?;
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

/// The keys of an object, in order, with their values as text.
pub(crate) struct Pairs<'a>(pub Vec<(Cow<'a, str>, &'a RawValue)>);

/// More keys than any request has; the rest would only cost memory.
const MAX_PAIRS: usize = 16;

impl<'de: 'a, 'a> Deserialize<'de> for Pairs<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PairsVisitor;

        impl<'de> Visitor<'de> for PairsVisitor {
            type Value = Pairs<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Pairs<'de>, A::Error> {
                let mut pairs = Vec::new();
                while let Some((key, value)) = entries.next_entry::<Cow<'de, str>, &RawValue>()? {
                    if pairs.len() == MAX_PAIRS {
                        return Err(de::Error::custom("too many keys"));
                    }
                    if pairs.iter().any(|(other, _)| *other == key) {
                        return Err(de::Error::custom(format!("key {key:?} is given twice")));
                    }
                    pairs.push((key, value));
                }
                Ok(Pairs(pairs))
            }
        }

        deserializer.deserialize_map(PairsVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_serde_json_reads() {
        let text = r#"{"a":[1,-2,0.5,1e3,"x\n",true,null,{}],"b":{"a":18446744073709551615}}"#;
        assert_eq!(parse(text).unwrap(), serde_json::from_str::<Value>(text).unwrap());
    }

    #[test]
    fn refuses_keys_given_twice() {
        let error = parse(r#"{"a":{"b":1,"\u0062":2}}"#).unwrap_err();
        assert!(error.to_string().contains("key \"b\" is given twice"), "{error}");
        assert!(serde_json::from_str::<Pairs>(r#"{"a":1,"a":1}"#).is_err());
    }

    #[test]
    fn refuses_what_is_no_json() {
        for text in ["", "{} {}", "[1e999]", "[\"\\ud800\"]", "nul"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn pairs_keep_the_text() {
        let pairs = serde_json::from_str::<Pairs>(r#"{"id": 1.50, "p\u0061rams":{ "x":1}}"#);
        let pairs = pairs.unwrap().0;
        assert_eq!((&*pairs[0].0, pairs[0].1.get()), ("id", "1.50"));
        assert_eq!((&*pairs[1].0, pairs[1].1.get()), ("params", "{ \"x\":1}"));
        let many: String = (0..100).map(|n| format!("\"{n}\":1,")).collect();
        assert!(serde_json::from_str::<Pairs>(&format!("{{{many}\"x\":1}}")).is_err());
    }
}
