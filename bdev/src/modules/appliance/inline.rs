//! Handlers that run on the reactors themselves.
//!
//! A request is done within [`Port::send`], and comes home through the ring like any other, so that the channel needs no
//! second way. A panic costs the request in hand and the handler's object on this reactor, which is made again at most
//! once a second; meanwhile requests wait for their deadlines. A handler that hangs here hangs the reactor: only
//! handlers that never block belong here.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use appliance::request::{Body, lend_home, take_home};
use appliance::{Capabilities, Handler, Inline, Request, RequestId};
use futures_util::future::BoxFuture;
use reactor::{Instant, ReactorId};
use serde_json::{Value, json};

use super::port::{Backend, Port, PortCx};
use super::settings::Settings;
use super::workers::message;
use crate::core::BdevError;

/// The least time between two makings of a handler's object.
const RESTART_AFTER: Duration = Duration::from_secs(1);

/// A handler on the reactors themselves.
pub struct OnReactors {
    bdev: Arc<str>,
    name: Arc<str>,
    capabilities: Capabilities,
    /// Taken when the device is gone.
    handler: Mutex<Option<Arc<dyn Handler>>>,
    panics: Arc<AtomicU64>,
}

impl OnReactors {
    /// A backend that calls `handler` inline.
    ///
    /// # Errors
    /// [`BdevError::Invalid`] when it has no such form.
    pub fn new(bdev: &str, handler: Arc<dyn Handler>, settings: &Settings) -> Result<Arc<OnReactors>, BdevError> {
        if handler.inline(ReactorId(0)).is_none() {
            let reason = format!("'{}' does not run inline; give it a worker", handler.name());
            return Err(BdevError::invalid("workers", 0, reason));
        }
        Ok(Arc::new(OnReactors {
            bdev: bdev.into(),
            name: handler.name().into(),
            capabilities: handler.capabilities(&settings.geometry),
            handler: Mutex::new(Some(handler)),
            panics: Arc::default(),
        }))
    }

    fn handler(&self) -> io::Result<Arc<dyn Handler>> {
        let handler = self.handler.lock().unwrap_or_else(PoisonError::into_inner).clone();
        handler.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the handler was stopped"))
    }
}

impl Backend for OnReactors {
    fn handler_name(&self) -> Arc<str> {
        Arc::clone(&self.name)
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn open_port(&self, cx: &PortCx) -> io::Result<Box<dyn Port>> {
        let handler = self.handler()?;
        let inline = make(&*handler, cx.reactor)?;
        Ok(Box::new(InlinePort {
            bdev: Arc::clone(&self.bdev),
            name: Arc::clone(&self.name),
            handler,
            inline: Some(inline),
            lane: lend_home(&cx.home),
            restart_at: Instant(0),
            reactor: cx.reactor,
            panics: Arc::clone(&self.panics),
        }))
    }

    fn resize(&self, num_blocks: u64) -> BoxFuture<'static, Result<(), BdevError>> {
        let resized = self.handler().and_then(|handler| {
            catch_unwind(AssertUnwindSafe(|| handler.resize(num_blocks)))
                .unwrap_or_else(|panic| Err(io::Error::other(format!("it panicked: {}", message(&*panic)))))
        });
        let result = resized.map_err(|error| match error.kind() {
            io::ErrorKind::InvalidInput => BdevError::invalid("num_blocks", num_blocks, error.to_string()),
            _ => BdevError::host(format!("telling the handler '{}' of '{}' of its size", self.name, self.bdev), error),
        });
        Box::pin(std::future::ready(result))
    }

    fn stats(&self) -> Value {
        let own = self.handler().ok().and_then(|handler| catch_unwind(AssertUnwindSafe(|| handler.stats())).ok());
        json!({ "panics": self.panics.load(Ordering::Relaxed), "handler": own })
    }

    fn stop(&self) {
        let handler = self.handler.lock().unwrap_or_else(PoisonError::into_inner).take();
        let end = move || {
            if let Some(handler) = handler {
                handler.stop();
            }
        };
        if catch_unwind(AssertUnwindSafe(end)).is_err() {
            tracing::error!(bdev = &*self.bdev, handler = &*self.name, "a handler panicked when stopped");
        }
    }

    fn stopped(&self) -> BoxFuture<'static, ()> {
        // It was stopped within `stop`.
        Box::pin(std::future::ready(()))
    }
}

fn make(handler: &dyn Handler, reactor: ReactorId) -> io::Result<Box<dyn Inline>> {
    match catch_unwind(AssertUnwindSafe(|| handler.inline(reactor))) {
        Ok(Some(made)) => made,
        Ok(None) => Err(io::Error::other("the handler does not run inline")),
        Err(panic) => Err(io::Error::other(format!("the handler panicked: {}", message(&*panic)))),
    }
}

struct InlinePort {
    bdev: Arc<str>,
    name: Arc<str>,
    handler: Arc<dyn Handler>,
    inline: Option<Box<dyn Inline>>,
    /// Of the channel's home on this thread's list, so that completions there need not count references.
    lane: u32,
    restart_at: Instant,
    reactor: ReactorId,
    panics: Arc<AtomicU64>,
}

impl InlinePort {
    fn panicked(&mut self, panic: &(dyn std::any::Any + Send), now: Instant) {
        self.panics.fetch_add(1, Ordering::Relaxed);
        self.restart_at = now + RESTART_AFTER;
        tracing::error!(
            bdev = &*self.bdev,
            handler = &*self.name,
            reactor = self.reactor.0,
            panic = message(panic),
            "a handler panicked: the request in its hands fails, and it is made again within a second"
        );
        let inline = self.inline.take();
        if catch_unwind(AssertUnwindSafe(|| drop(inline))).is_err() {
            tracing::error!(bdev = &*self.bdev, handler = &*self.name, "a handler panicked at its end");
        }
    }
}

impl Port for InlinePort {
    #[inline]
    fn send(&mut self, mut body: Box<Body>, now: Instant) -> Result<(), Box<Body>> {
        if self.inline.is_none() && now >= self.restart_at {
            self.restart_at = now + RESTART_AFTER;
            match make(&*self.handler, self.reactor) {
                Ok(inline) => self.inline = Some(inline),
                Err(error) => {
                    let (bdev, handler) = (&*self.bdev, &*self.name);
                    tracing::error!(bdev, handler, %error, "a handler cannot be made again; I/O waits another second");
                }
            }
        }
        let Some(inline) = &mut self.inline else { return Err(body) };
        body.lane = self.lane;
        if body.sampled {
            body.fixed.picked = now;
        }
        let request = Request::from_body(body);
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| inline.handle(request))) {
            self.panicked(&*panic, now);
        }
        Ok(())
    }

    fn flush(&mut self) {}

    fn deadline(&self) -> Option<Instant> {
        self.inline.is_none().then_some(self.restart_at)
    }

    fn abort(&mut self, _: RequestId) {}

    fn reset(&mut self, _: RequestId) {}

    fn close(self: Box<Self>) {
        take_home(self.lane);
    }
}
