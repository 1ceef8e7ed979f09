//! A method as its owner declares it.

use std::fmt;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use serde_json::Value;

use crate::{Param, Params, RpcError, code};

/// In which states of the server a method may be called.
///
/// The server starts in STARTUP, in which sizes and pools are set, and goes to
/// RUNTIME with `framework_start_init`; it never goes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct States {
    /// Callable before `framework_start_init`.
    pub startup: bool,
    /// Callable after `framework_start_init`.
    pub runtime: bool,
}

impl States {
    /// Only before `framework_start_init`.
    pub const STARTUP: States = States { startup: true, runtime: false };
    /// Only after `framework_start_init`.
    pub const RUNTIME: States = States { startup: false, runtime: true };
    /// At any time.
    pub const BOTH: States = States { startup: true, runtime: true };
}

/// What runs when a method is called.
///
/// A plain function pointer, so that tables can be constants. The future is
/// `Send` and must not assume a tokio runtime: the simulator polls it too.
pub type Handler<C> = fn(Arc<C>, Params) -> BoxFuture<'static, Result<Value, RpcError>>;

/// Everything about a method except the code: what help, argument parsing,
/// documentation and validation need.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MethodSpec {
    /// Name on the wire.
    pub name: &'static str,
    /// Other names it answers to; listed only with `include_aliases`.
    pub aliases: &'static [&'static str],
    /// One sentence for help and documentation.
    pub help: &'static str,
    /// Accepted parameters; any other key is refused.
    pub params: &'static [Param],
    /// When it may be called.
    pub states: States,
    /// Whether success changes the configuration, which must then be saved
    /// before the reply is sent.
    pub mutates: bool,
    /// Whether it does nothing but wait, perhaps for ever; it is then dropped
    /// when its caller leaves or the server stops.
    pub waits: bool,
    /// What the result is, in words.
    pub result: &'static str,
    /// Error code for parameters that fail validation.
    ///
    /// -32602, except where scripts written for SPDK know another: many of
    /// its bdev methods answer -32603.
    pub refusal_code: i32,
}

/// A method of a context `C`: its declaration and its handler.
pub struct Method<C: 'static> {
    /// The declaration.
    pub spec: MethodSpec,
    /// The code.
    pub handler: Handler<C>,
}

impl<C: 'static> Clone for Method<C> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<C: 'static> Copy for Method<C> {}

impl<C: 'static> fmt::Debug for Method<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.spec.fmt(f)
    }
}

impl<C: 'static> Method<C> {
    /// A method without parameters that runs in RUNTIME, changes nothing and
    /// answers `true`; the other functions say otherwise.
    pub const fn new(name: &'static str, help: &'static str, handler: Handler<C>) -> Self {
        Self {
            spec: MethodSpec {
                name,
                aliases: &[],
                help,
                params: &[],
                states: States::RUNTIME,
                mutates: false,
                waits: false,
                result: "true",
                refusal_code: code::INVALID_PARAMS,
            },
            handler,
        }
    }

    /// Accepts these parameters.
    pub const fn params(mut self, params: &'static [Param]) -> Self {
        self.spec.params = params;
        self
    }

    /// Answers to these names too.
    pub const fn aliases(mut self, aliases: &'static [&'static str]) -> Self {
        self.spec.aliases = aliases;
        self
    }

    /// Callable in these states.
    pub const fn states(mut self, states: States) -> Self {
        self.spec.states = states;
        self
    }

    /// Success changes the configuration: such methods run one at a time, and
    /// the state is saved before the reply is sent.
    pub const fn mutates(mut self) -> Self {
        self.spec.mutates = true;
        self
    }

    /// Does nothing but wait, perhaps for ever. Its future may be dropped at
    /// any point.
    pub const fn waits(mut self) -> Self {
        self.spec.waits = true;
        self
    }

    /// Describes the result.
    pub const fn result(mut self, result: &'static str) -> Self {
        self.spec.result = result;
        self
    }

    /// Answers parameters that fail validation with this code.
    pub const fn refuses_with(mut self, code: i32) -> Self {
        self.spec.refusal_code = code;
        self
    }
}
