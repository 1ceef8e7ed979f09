//! Vocabulary of the control plane: methods, parameters, errors.
//!
//! Whoever owns a thing declares the methods that manage it: bdev modules
//! theirs, the NVMe target its own. The words for doing so live here, below
//! all of them, so that the server, the command line's help, its argument
//! parser and the reference page are all read from one declaration.
//!
//! ```
//! use std::sync::Arc;
//! use ringstone_schema::{Errno, Kind, Method, Param, Params, RpcError};
//! use serde_json::{Value, json};
//!
//! struct Shelf;
//!
//! const METHODS: &[Method<Shelf>] = &[
//!     Method::new("shelf_put", "Put a box on the shelf.", |shelf, params| {
//!         Box::pin(put(shelf, params))
//!     })
//!     .params(&[
//!         Param::required("name", Kind::Str, "Name of the box"),
//!         Param::optional("weight", Kind::U32, "Weight in grams").at_least(1),
//!     ])
//!     .mutates()
//!     .result("the name of the box"),
//! ];
//!
//! async fn put(_shelf: Arc<Shelf>, params: Params) -> Result<Value, RpcError> {
//!     let name = params.str("name")?;
//!     if name == "Box0" {
//!         return Err(RpcError::errno(Errno::EXIST, "a box of that name is there already")
//!             .field("name")
//!             .value(name)
//!             .fix("choose another name"));
//!     }
//!     Ok(json!(name))
//! }
//! # assert_eq!(METHODS[0].spec.name, "shelf_put");
//! ```
//!
//! A handler sees only parameters that passed [`validate`]: an object, no
//! unknown key, every required key there, every value of the declared kind and
//! within its bounds.

#![forbid(unsafe_code)]

mod config;
mod error;
mod method;
mod nearest;
mod param;
mod params;
pub mod spdk;
mod validate;

pub use config::{ConfigEntry, ConfigSource};
pub use error::{Errno, RpcError, code};
pub use method::{Handler, Method, MethodSpec, States};
pub use nearest::nearest;
pub use param::{Kind, Param};
pub use params::Params;
pub use validate::validate;
