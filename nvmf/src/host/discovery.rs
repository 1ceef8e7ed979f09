//! A walk over discovery services: the first one, and those that its referrals lead to (Base 5.1.12.3.1).
//!
//! Services are asked one after the other. None is asked twice, and no more than [`MAX_SERVICES`] are; so referrals in a
//! circle end. Only numeric addresses of the transport at hand are followed: a log is no reason to ask a name server.
//! A service that cannot be reached costs its own entries only.

use super::inventory::DiscoveryLog;
use super::transport::{Connector, Watches};
use super::{Controller, Error, Options, State};
use crate::spec::log::{DiscoveryEntry, subtype, trtype};
use crate::spec::{fabrics::NQN_MAX_BYTES, nul_text, shown_text};
use reactor::Instant;
use reactor::park::Ready;
use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// The most services of one walk.
pub const MAX_SERVICES: usize = 64;

/// A discovery service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Service {
    /// Where it is.
    pub address: SocketAddr,
    /// Its NQN: the well-known one, or its own.
    pub subnqn: String,
}

/// A service that was asked.
#[derive(Clone, Debug)]
pub struct Visit {
    /// Which.
    pub service: Service,
    /// Referrals between it and the first.
    pub depth: u32,
    /// What it said.
    pub result: Result<DiscoveryLog, Error>,
}

/// The address that an entry names, if it is a numeric one on TCP.
///
/// # Errors
/// Why there is none.
pub fn tcp_address(entry: &DiscoveryEntry) -> Result<SocketAddr, &'static str> {
    address_on(trtype::TCP, entry)
}

/// The address that an entry names, if it is a numeric one on a transport of IP networks ([`trtype`]).
///
/// # Errors
/// Why there is none.
pub fn address_on(wanted: u8, entry: &DiscoveryEntry) -> Result<SocketAddr, &'static str> {
    if entry.trtype != wanted {
        return Err(match wanted {
            trtype::RDMA => "not over RDMA",
            _ => "not over TCP",
        });
    }
    let ip: IpAddr = shown_text(&entry.traddr).parse().map_err(|_| "its address is not a numeric one")?;
    let port: u16 = shown_text(&entry.trsvcid).parse().map_err(|_| "its service is not a port")?;
    Ok(SocketAddr::new(ip, port))
}

/// Makes connectors to addresses.
pub type Connect = dyn Fn(SocketAddr) -> Arc<dyn Connector>;

/// A walk. Poll it until it [`is_done`](Crawl::is_done).
pub struct Crawl {
    connect: Box<Connect>,
    /// The transport whose referrals are followed.
    trtype: u8,
    options: Options,
    key: u64,
    follow: bool,
    waiting: VecDeque<(Service, u32)>,
    seen: BTreeSet<Service>,
    current: Option<(Service, u32, Controller)>,
    visits: Vec<Visit>,
    skipped: Vec<(DiscoveryEntry, &'static str)>,
}

impl fmt::Debug for Crawl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Crawl(at {:?}, {} waiting, {} done)", self.current, self.waiting.len(), self.visits.len())
    }
}

impl Crawl {
    /// Begins at `first`; `options` are those of all connections but for the subsystem. Referrals are followed if
    /// `follow`.
    pub fn new(connect: Box<Connect>, options: Options, first: Service, follow: bool, key: u64) -> Crawl {
        let seen = BTreeSet::from([first.clone()]);
        let waiting = VecDeque::from([(first, 0)]);
        let (visits, skipped) = (Vec::new(), Vec::new());
        Crawl { connect, trtype: trtype::TCP, options, key, follow, waiting, seen, current: None, visits, skipped }
    }

    /// Follows referrals on another transport than TCP ([`trtype`]).
    pub fn over(mut self, trtype: u8) -> Crawl {
        self.trtype = trtype;
        self
    }

    /// Whether all services were asked.
    pub fn is_done(&self) -> bool {
        self.current.is_none() && self.waiting.is_empty()
    }

    /// The services that were asked so far, in that order.
    pub fn visits(&self) -> &[Visit] {
        &self.visits
    }

    /// Referrals that were not followed, and why.
    pub fn skipped(&self) -> &[(DiscoveryEntry, &'static str)] {
        &self.skipped
    }

    /// Does what there is to do; whether that was anything.
    pub fn poll(&mut self, now: Instant, watches: &mut dyn Watches) -> bool {
        let Some((service, depth, controller)) = &mut self.current else {
            let Some((service, depth)) = self.waiting.pop_front() else { return false };
            let options = Options { subnqn: service.subnqn.clone(), discovery: true, ..self.options.clone() };
            let controller = Controller::new((self.connect)(service.address), options, self.key, now);
            self.current = Some((service, depth, controller));
            return true;
        };
        let busy = controller.poll(now, watches);
        match controller.state() {
            State::Live => {
                let result = Ok(controller.inventory().discovery().clone());
                self.visits.push(Visit { service: service.clone(), depth: *depth, result });
                controller.shut_down();
                let below = *depth + 1;
                self.follow(below);
                true
            }
            State::Down => {
                let (service, depth, mut controller) = self.current.take().expect("it was just looked at");
                controller.close(watches);
                // One that was live has its visit already, however its shutdown went.
                if self.visits.last().is_none_or(|visit| visit.service != service) {
                    let error = controller.error().cloned().unwrap_or(Error::Nonsense("it went away"));
                    self.visits.push(Visit { service, depth, result: Err(error) });
                }
                true
            }
            _ => busy,
        }
    }

    /// Queues the referrals of the last visit.
    fn follow(&mut self, depth: u32) {
        let Some(Visit { result: Ok(log), .. }) = self.visits.last() else { return };
        for entry in log.entries.iter().filter(|entry| entry.subtype == subtype::REFERRAL) {
            let nqn = nul_text(&entry.subnqn).filter(|nqn| !nqn.is_empty() && nqn.len() <= NQN_MAX_BYTES);
            let target = address_on(self.trtype, entry).and_then(|address| match nqn {
                Some(nqn) => Ok(Service { address, subnqn: nqn.to_owned() }),
                None => Err("its NQN is not one"),
            });
            let verdict = match target {
                Err(why) => Err(why),
                Ok(_) if !self.follow => Err("referrals are not followed"),
                Ok(service) if self.seen.contains(&service) => continue,
                Ok(_) if self.seen.len() >= MAX_SERVICES => Err("too many services"),
                Ok(service) => Ok(service),
            };
            match verdict {
                Ok(service) => {
                    self.seen.insert(service.clone());
                    self.waiting.push_back((service, depth));
                }
                Err(why) if self.skipped.len() < MAX_SERVICES => self.skipped.push((*entry, why)),
                Err(_) => {}
            }
        }
    }

    /// Something was announced under the walk's key.
    pub fn ready(&mut self, ready: Ready) {
        if let Some((_, _, controller)) = &mut self.current {
            controller.ready(ready);
        }
    }

    /// As [`Controller::has_work`].
    pub fn has_work(&self) -> bool {
        match &self.current {
            Some((_, _, controller)) => controller.has_work() || controller.state() == State::Down,
            None => !self.waiting.is_empty(),
        }
    }

    /// As [`Controller::deadline`].
    pub fn deadline(&self, now: Instant) -> Option<Instant> {
        self.current.as_ref().and_then(|(_, _, controller)| controller.deadline(now))
    }

    /// Ends it at once.
    pub fn close(&mut self, watches: &mut dyn Watches) {
        if let Some((_, _, mut controller)) = self.current.take() {
            controller.close(watches);
        }
        self.waiting.clear();
    }
}
