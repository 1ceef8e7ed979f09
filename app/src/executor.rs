//! The control plane's tasks on tokio.

use std::time::Duration;

use bdev::core::system::Executor;
use futures_util::future::BoxFuture;
use tokio::runtime::Handle;

/// Runs tasks on the control thread's runtime.
pub struct TokioExecutor(Handle);

impl TokioExecutor {
    /// Over the runtime that this is called in.
    pub fn current() -> TokioExecutor {
        TokioExecutor(Handle::current())
    }
}

impl Executor for TokioExecutor {
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        self.0.spawn(task);
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(duration))
    }
}
