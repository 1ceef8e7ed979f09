//! From the text of a request to the text of its reply.
//!
//! jsonrpsee runs single requests that are whole and well-formed. Around it
//! this does what SPDK's clients need beyond that: batches, notifications,
//! requests without the "jsonrpc" key, ids of any number, and errors that say
//! what is wrong with a request.
//!
//! Source: JSON-RPC 2.0 specification, sections 4 to 6.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use jsonrpsee::types::{Id, Params};
use jsonrpsee::{ConnectionId, Extensions, MethodCallback};
use schema::{RpcError, code, nearest};
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::json::{self, Pairs};
use crate::table::Table;

/// Requests in one batch.
pub const MAX_BATCH: usize = 16 * 1024;

/// Bytes of one reply; that to a batch counts as one.
pub const MAX_REPLY_BYTES: usize = 64 << 20;

/// A request, taken apart.
struct Envelope<'a> {
    /// As it was written; `None` in a notification.
    id: Option<&'a RawValue>,
    method: String,
    params: Option<&'a RawValue>,
}

impl Table {
    /// Answers one JSON text: a request or a batch. `None` when it holds only
    /// notifications, which have no reply.
    pub async fn answer(&self, text: &str) -> Option<String> {
        self.answer_watched(text, &AtomicBool::new(false)).await
    }

    /// As [`answer`](Table::answer). While `waits` is true this only waits,
    /// and may be dropped without harm.
    pub(crate) async fn answer_watched(&self, text: &str, waits: &AtomicBool) -> Option<String> {
        let text = text.trim_start();
        if !text.starts_with('[') {
            return match serde_json::from_str::<&RawValue>(text) {
                Ok(request) => self.answer_one(request, MAX_REPLY_BYTES, waits).await,
                Err(error) => Some(parse_error(&error.to_string())),
            };
        }
        let requests = match serde_json::from_str::<Vec<&RawValue>>(text) {
            Ok(requests) => requests,
            Err(error) => return Some(parse_error(&error.to_string())),
        };
        if requests.is_empty() || requests.len() > MAX_BATCH {
            let error = RpcError::new(code::INVALID_REQUEST, format!("a batch of {} requests", requests.len()));
            return Some(reply("null", &error.fix(format!("send 1 to {MAX_BATCH} in one batch"))));
        }
        self.answer_batch(&requests, waits).await
    }

    async fn answer_batch(&self, requests: &[&RawValue], waits: &AtomicBool) -> Option<String> {
        let mut out = String::from("[");
        for request in requests {
            let left = MAX_REPLY_BYTES.saturating_sub(out.len());
            let reply = match left {
                0 => refuse_unanswerable(request),
                left => self.answer_one(request, left, waits).await,
            };
            if let Some(reply) = reply {
                if out.len() > 1 {
                    out.push(',');
                }
                out.push_str(&reply);
            }
        }
        if out.len() == 1 {
            return None;
        }
        out.push(']');
        Some(out)
    }

    async fn answer_one(&self, request: &RawValue, max_bytes: usize, waits: &AtomicBool) -> Option<String> {
        let envelope = match open(request) {
            Ok(envelope) => envelope,
            Err((id, error)) => return Some(reply(id.map_or("null", RawValue::get), &error)),
        };
        let Some(MethodCallback::Async(callback)) = self.module.method(&envelope.method) else {
            let error = self.unknown(&envelope.method);
            return envelope.id.map(|id| reply(id.get(), &error));
        };
        let id_text = envelope.id.map_or("null", RawValue::get);
        let id = serde_json::from_str::<Id>(id_text).ok();
        waits.store(self.spec(&envelope.method).is_some_and(|spec| spec.waits), Ordering::Relaxed);
        let response = callback(
            id.clone().unwrap_or(Id::Null).into_owned(),
            Params::new(envelope.params.map(RawValue::get)).into_owned(),
            ConnectionId(0),
            max_bytes,
            Extensions::new(),
        )
        .await;
        waits.store(false, Ordering::Relaxed);
        tracing::debug!(method = envelope.method, error = response.as_error_code(), "called");
        envelope.id?;
        match id {
            Some(_) => Some(response.as_ref().to_owned()),
            None => Some(with_id(response.as_ref(), id_text)),
        }
    }
}

/// The reply to text that cannot be read at all.
pub(crate) fn parse_error(reason: &str) -> String {
    reply("null", &RpcError::new(code::PARSE_ERROR, reason))
}

/// An error reply to the request of that id, which is JSON.
pub(crate) fn reply(id: &str, error: &RpcError) -> String {
    let error = error.to_json();
    format!("{{\"jsonrpc\":\"2.0\",\"id\":{id},\"error\":{error}}}")
}

fn value(raw: &RawValue) -> Value {
    json::parse(raw.get()).unwrap_or(Value::Null)
}

/// jsonrpsee knows ids that are whole numbers from 0 on, text or null; this
/// puts back one that is another number.
fn with_id(response: &str, id: &str) -> String {
    let (Ok(mut response), Ok(id)) =
        (serde_json::from_str::<BTreeMap<String, &RawValue>>(response), serde_json::from_str::<&RawValue>(id))
    else {
        return response.to_owned();
    };
    response.insert("id".to_owned(), id);
    json!(response).to_string()
}

fn refuse_unanswerable(request: &RawValue) -> Option<String> {
    let error = RpcError::internal("not run: the replies of this batch fill the largest reply");
    let id = match open(request) {
        Ok(envelope) => envelope.id?,
        Err((id, _)) => id.unwrap_or(RawValue::NULL),
    };
    Some(reply(id.get(), &error.fix("send smaller batches")))
}

type Refusal<'a> = (Option<&'a RawValue>, RpcError);

/// Takes a request apart, or says what is wrong with it, and its id if it has
/// a proper one.
fn open(request: &RawValue) -> Result<Envelope<'_>, Refusal<'_>> {
    let invalid = |reason: &str| RpcError::new(code::INVALID_REQUEST, reason);
    if !request.get().starts_with('{') {
        let error = invalid("a request is an object").value(value(request));
        return Err((None, error));
    }
    let pairs = match serde_json::from_str::<Pairs>(request.get()) {
        Ok(Pairs(pairs)) => pairs,
        Err(error) => return Err((None, invalid(&error.to_string()))),
    };
    let get = |key: &str| {
        let pair = pairs.iter().find(|(name, _)| name == key);
        pair.map(|(_, value)| *value)
    };
    let id = get("id");
    if let Some(id) = id
        && !matches!(id.get().as_bytes()[0], b'"' | b'n' | b'-' | b'0'..=b'9')
    {
        let error = invalid("must be a string, a number or null").field("id");
        return Err((None, error.value(value(id))));
    }
    let refuse = |error: RpcError| Err((id, error));
    for (key, raw) in &pairs {
        const KNOWN: [&str; 4] = ["jsonrpc", "method", "params", "id"];
        if !KNOWN.contains(&&**key) {
            let error = invalid("no such key in a request").field(key.clone());
            return refuse(error.value(value(raw)).fix(match nearest(key, KNOWN) {
                Some(name) => format!("did you mean {name}?"),
                None => format!("known are {}", KNOWN.join(", ")),
            }));
        }
    }
    if let Some(version) = get("jsonrpc")
        && version.get() != "\"2.0\""
    {
        let error = invalid("another protocol version").field("jsonrpc");
        return refuse(error.value(value(version)).fix("write \"2.0\""));
    }
    let Some(raw) = get("method") else {
        let error = invalid("required but not given").field("method");
        return refuse(error.fix("name the method to call"));
    };
    let Ok(method) = serde_json::from_str::<String>(raw.get()) else {
        let error = invalid("must be a string").field("method");
        return refuse(error.value(value(raw)));
    };
    let params = get("params");
    if let Some(params) = params
        && !matches!(params.get().as_bytes()[0], b'{' | b'[' | b'n')
    {
        let error = invalid("must be an object").field("params");
        return refuse(error.value(value(params)).in_method(&method));
    }
    Ok(Envelope { id, method, params })
}
