//! One discovery controller: a connection that stays, and reads the log again whenever it has changed.
//!
//! ```text
//!  Connecting --log read--> Live --event: the log has changed--> the log is read again
//!      ^  | failed            | lost
//!      |  v                   v
//!      +- a second later -----+
//! ```
//! What was read last counts until something newer is read: that a discovery controller is away says nothing about the
//! subsystems that it listed. Attempts go on for as long as the scout is wanted.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nvmf::host::inventory::DiscoveryLog;
use nvmf::host::{Connector, Controller, Options, ReconnectPolicy, State, Watches};
use reactor::park::Ready;
use reactor::reactor::Reply;
use reactor::{Instant, ReactorId};

use crate::path::{OnNews, Site};

/// Between attempts to connect.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// What is known through a discovery controller.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// How often the log was read.
    pub reads: u64,
    /// How often an attempt to connect has failed, or a connection was lost.
    pub failures: u64,
    /// The log, once it was read.
    pub log: Option<Arc<DiscoveryLog>>,
    /// Why it failed last; `None` while it is connected.
    pub error: Option<String>,
}

/// What the control plane and the scout's reactor share.
pub struct Post {
    /// Names it for as long as the process runs.
    pub id: u64,
    /// Where the controller is.
    pub site: Site,
    /// NQN of the discovery subsystem.
    pub subnqn: String,
    /// The reactor with its queue.
    pub home: ReactorId,
    report: Mutex<Report>,
    on_news: OnNews,
}

impl Post {
    /// A post that nobody has reported from.
    pub fn new(id: u64, site: Site, subnqn: String, home: ReactorId, on_news: OnNews) -> Arc<Post> {
        Arc::new(Post { id, site, subnqn, home, report: Mutex::default(), on_news })
    }

    /// What is known.
    pub fn report(&self) -> Report {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn publish(&self, change: impl FnOnce(&mut Report)) {
        change(&mut self.report.lock().unwrap_or_else(PoisonError::into_inner));
        (self.on_news)();
    }
}

impl fmt::Debug for Post {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Post({}, {})", self.id, self.site)
    }
}

/// A discovery controller, on one reactor.
pub struct Scout {
    post: Arc<Post>,
    connector: Arc<dyn Connector>,
    options: Options,
    key: u64,
    controller: Controller,
    /// The epoch of the controller whose log was published last.
    epoch: u64,
    /// It works, or tries to; otherwise the next attempt is yet to come.
    trying: bool,
    /// When a first connection that failed is tried again.
    retry_at: Option<Instant>,
    ending: Option<Reply<()>>,
    over: bool,
}

impl Scout {
    /// Begins to connect. Its queue is watched under `key`.
    pub fn new(post: Arc<Post>, connector: Arc<dyn Connector>, options: Options, key: u64, now: Instant) -> Scout {
        let reconnect = ReconnectPolicy {
            ctrlr_loss_timeout: None,
            reconnect_delay: RETRY_DELAY,
            reconnect_delay_max: RETRY_DELAY,
            fast_io_fail_timeout: None,
            reconnect: true,
        };
        let options = Options { discovery: true, reconnect, ..options };
        let controller = Controller::new(Arc::clone(&connector), options.clone(), key, now);
        Scout {
            post,
            connector,
            options,
            key,
            controller,
            epoch: 0,
            trying: true,
            retry_at: None,
            ending: None,
            over: false,
        }
    }

    /// The post.
    pub fn post(&self) -> &Arc<Post> {
        &self.post
    }

    /// Whether it has ended.
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// Does what there is to do; whether that was anything.
    pub fn poll(&mut self, now: Instant, watches: &mut dyn Watches) -> bool {
        let busy = self.controller.poll(now, watches);
        match self.controller.state() {
            State::Live => self.poll_live() | busy,
            State::Down if self.ending.is_some() => {
                self.controller.close(watches);
                self.over = true;
                self.ending.take().into_iter().for_each(|reply| reply.send(()));
                true
            }
            State::Down => self.poll_down(now, watches),
            State::Waiting(_) if self.trying && self.epoch > 0 => {
                self.failed();
                true
            }
            State::Connecting if !self.trying => {
                self.trying = true;
                busy
            }
            _ => busy,
        }
    }

    fn poll_live(&mut self) -> bool {
        let epoch = self.controller.epoch();
        let changed = self.controller.inventory_mut().take_changes().discovery;
        if !changed && epoch == self.epoch {
            return false;
        }
        (self.epoch, self.trying) = (epoch, true);
        let log = Arc::new(self.controller.inventory().discovery().clone());
        self.post.publish(|report| {
            report.reads += 1;
            report.log = Some(log);
            report.error = None;
        });
        true
    }

    fn failed(&mut self) {
        self.trying = false;
        let error = self.controller.error().map_or_else(|| "it went away".into(), ToString::to_string);
        if self.post.report().error.as_ref() == Some(&error) {
            return;
        }
        tracing::warn!(at = %self.post.site, error, "a discovery controller cannot be reached; it is tried again");
        self.post.publish(|report| {
            report.failures += 1;
            report.error = Some(error);
        });
    }

    /// It has never worked, so its controller does not try again by itself.
    fn poll_down(&mut self, now: Instant, watches: &mut dyn Watches) -> bool {
        match self.retry_at {
            None => {
                self.failed();
                self.retry_at = Some(now + RETRY_DELAY);
                true
            }
            Some(at) if now >= at => {
                self.retry_at = None;
                self.controller.close(watches);
                self.epoch = 0;
                self.trying = true;
                self.controller = Controller::new(Arc::clone(&self.connector), self.options.clone(), self.key, now);
                true
            }
            Some(_) => false,
        }
    }

    /// Leaves in good order; `reply` is told when that is done.
    pub fn end(&mut self, reply: Reply<()>) {
        self.controller.shut_down();
        self.ending = Some(reply);
    }

    /// Something was announced under its key.
    pub fn ready(&mut self, ready: Ready) {
        self.controller.ready(ready);
    }

    /// Whether polling now can do something.
    pub fn has_work(&self) -> bool {
        let ended = self.ending.is_some() && self.controller.state() == State::Down;
        ended || self.controller.has_work()
    }

    /// When it wants to be polled even if nothing was announced.
    pub fn deadline(&self, now: Instant) -> Option<Instant> {
        self.controller.deadline(now).into_iter().chain(self.retry_at).min()
    }
}
