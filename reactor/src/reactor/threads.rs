//! Reactors on threads of their own: a group that knows each other, and single ones beside it.

use std::fmt;
use std::io;
use std::sync::Arc;

use super::{Context, Entered, PollPolicy, Reactor, ReactorConfig, ReactorHandle, ReactorId};
use crate::platform::Platform;

/// What sets a [`LoneReactor`] up.
pub type Begin = Box<dyn FnOnce(io::Result<&mut Context>) + Send>;

/// A reactor beside the group, in a group of its own, to be started by whoever runs threads: a worker with pollers, a
/// mailbox and a sleep, but without the layers that the group's reactors carry.
pub struct LoneReactor {
    /// Name of its thread; at most 15 bytes are seen by the host.
    pub name: String,
    /// The core to pin to; `None` leaves the thread where it is.
    pub core: Option<usize>,
    /// Spinning and sleeping.
    pub policy: PollPolicy,
    /// Called once on its thread: with its context, before its first step, or with the reason why there is none.
    pub begin: Begin,
}

impl LoneReactor {
    /// Builds the reactor on the calling thread. `None`: it could not be, and [`LoneReactor::begin`] was told.
    pub fn build(self, platform: &Arc<dyn Platform>) -> Option<Reactor> {
        let config = ReactorConfig { id: ReactorId(0), core: self.core, policy: self.policy };
        let pinned = self.core.map_or(Ok(()), |core| platform.pin(core));
        match pinned.and_then(|()| Reactor::new(config, Arc::clone(platform))) {
            Ok(mut reactor) => {
                let handle = reactor.handle();
                reactor.join_group(vec![handle]);
                (self.begin)(Ok(reactor.context()));
                Some(reactor)
            }
            Err(error) => {
                (self.begin)(Err(error));
                None
            }
        }
    }

    /// Runs it on a thread of its own until it stops itself.
    ///
    /// # Errors
    /// When the host has no thread for it.
    pub fn spawn(self, platform: &Arc<dyn Platform>) -> io::Result<()> {
        let platform = Arc::clone(platform);
        let thread = std::thread::Builder::new().name(self.name.clone());
        let body = move || {
            // It was pinned when it was built, and nothing else of running it fails.
            if let Some(mut reactor) = self.build(&platform) {
                let _ = reactor.run();
            }
        };
        thread.spawn(body).map(drop)
    }
}

impl fmt::Debug for LoneReactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoneReactor").field("name", &self.name).field("core", &self.core).finish_non_exhaustive()
    }
}

/// Reactors running on threads of their own.
#[derive(Debug)]
pub struct ReactorThreads {
    handles: Vec<ReactorHandle>,
    threads: Vec<std::thread::JoinHandle<io::Result<()>>>,
}

impl ReactorThreads {
    /// Starts one reactor a configuration, each on a thread of its own, and runs `setup` on each before its first step.
    ///
    /// # Errors
    /// The first reactor's failure to be built, set up or pinned, with its index in the message.
    pub fn start(
        platform: &Arc<dyn Platform>,
        configs: &[ReactorConfig],
        setup: impl Fn(&mut Context) -> io::Result<()> + Send + Clone + 'static,
    ) -> io::Result<ReactorThreads> {
        let mut threads = Vec::new();
        let mut handles = Vec::new();
        let mut starts = Vec::new();
        for &config in configs {
            let (built, is_built) = std::sync::mpsc::channel::<io::Result<ReactorHandle>>();
            let (start, may_start) = std::sync::mpsc::channel::<Vec<ReactorHandle>>();
            let (platform, setup) = (Arc::clone(platform), setup.clone());
            let body = move || {
                let prepared = (|| {
                    if let Some(core) = config.core {
                        platform.pin(core)?;
                    }
                    Reactor::new(config, Arc::clone(&platform))
                })();
                let mut reactor = match prepared {
                    Ok(reactor) => {
                        let _ = built.send(Ok(reactor.handle()));
                        reactor
                    }
                    Err(error) => {
                        let _ = built.send(Err(error));
                        return Ok(());
                    }
                };
                // The starter gave up when its end is gone.
                let Ok(group) = may_start.recv() else {
                    return Ok(());
                };
                reactor.join_group(group);
                {
                    let _entered = Entered::new(config.id);
                    setup(reactor.context())?;
                }
                reactor.run()
            };
            threads.push(std::thread::Builder::new().name(format!("reactor_{}", config.id.0)).spawn(body)?);
            let handle =
                is_built.recv().unwrap_or_else(|_| Err(io::Error::other("its thread ended"))).map_err(|e| {
                    io::Error::new(e.kind(), format!("reactor {} on core {:?}: {e}", config.id.0, config.core))
                })?;
            handles.push(handle);
            starts.push(start);
        }
        for start in starts {
            let _ = start.send(handles.clone());
        }
        Ok(ReactorThreads { handles, threads })
    }

    /// The running reactors, by index.
    pub fn handles(&self) -> &[ReactorHandle] {
        &self.handles
    }

    /// Asks all reactors to stop and waits for their threads.
    ///
    /// # Errors
    /// The first error that a reactor ended with.
    pub fn stop(self) -> io::Result<()> {
        self.handles.iter().for_each(ReactorHandle::stop);
        self.threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(result) => result,
            Err(_) => Err(io::Error::other("a reactor's thread panicked; see the log above")),
        })
    }
}
