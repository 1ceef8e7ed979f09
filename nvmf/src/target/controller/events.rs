//! Asynchronous events: Base 5.1.2.
//!
//! ```text
//!  raise --> [wanted by the host?] --> pending --(a request is parked)--> sent, masked --(log read, RAE=0)--> quiet
//! ```
//! An event that is pending or masked is not raised again: what it is about lies in its log page, which the host reads
//! once it has been told. So there are never more events than kinds of them.

use std::collections::VecDeque;

use crate::spec::feature::AsyncEventConfig;
use crate::spec::{Cqe, Status};

/// Asynchronous Event Requests that may be outstanding at once (AERL, a count).
pub const MAX_EVENT_REQUESTS: usize = 4;

/// What a host can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(in crate::target) enum Event {
    /// Namespaces were added, removed or changed.
    Namespaces,
    /// Asymmetric namespace access changed.
    Ana,
    /// The discovery log changed.
    Discovery,
    /// A command failed for an internal error; the controller goes on.
    TransientError,
    /// Media errors: the subsystem's reliability is degraded.
    Unreliable,
}

impl Event {
    const ALL: [Event; 5] = [Event::Namespaces, Event::Ana, Event::Discovery, Event::TransientError, Event::Unreliable];

    fn bit(self) -> u8 {
        1 << self as u8
    }

    /// Errors cannot be switched off; everything else is off until the host wants it.
    fn wanted(self, config: AsyncEventConfig) -> bool {
        match self {
            Event::Namespaces => config.ns_attribute() == 1,
            Event::Ana => config.ana_change() == 1,
            Event::Discovery => config.discovery_change() == 1,
            Event::TransientError => true,
            // Bit 2 of the critical warnings: reliability degraded.
            Event::Unreliable => config.smart() & 1 << 2 != 0,
        }
    }
}

/// Requests and events of one controller.
#[derive(Debug, Default)]
pub(in crate::target) struct Events {
    /// Slot and cid of each outstanding request, oldest first; at most [`MAX_EVENT_REQUESTS`].
    parked: VecDeque<(u16, u16)>,
    /// Completions of requests; at most as many as there were requests.
    done: VecDeque<(u16, Cqe)>,
    config: AsyncEventConfig,
    pending: u8,
    masked: u8,
}

impl Events {
    /// Keeps a request. `false` if there are too many already.
    pub(super) fn park(&mut self, slot: u16, cid: u16) -> bool {
        if self.parked.len() == MAX_EVENT_REQUESTS {
            return false;
        }
        self.parked.push_back((slot, cid));
        self.send();
        true
    }

    /// The host is to be told, unless it does not want to be or has been and not yet looked.
    pub(super) fn raise(&mut self, event: Event) {
        if event.wanted(self.config) && self.masked & event.bit() == 0 {
            self.pending |= event.bit();
            self.send();
        }
    }

    /// The log page `lid` was read without RAE: what it was about is known, and may be told anew.
    pub(super) fn log_read(&mut self, lid: u8) {
        for event in Event::ALL {
            if event.notice().lid == lid {
                self.pending &= !event.bit();
                self.masked &= !event.bit();
            }
        }
    }

    /// What the host wants to be told (feature 0Bh).
    pub(in crate::target) fn config(&self) -> AsyncEventConfig {
        self.config
    }

    /// Changes what the host wants to be told.
    pub(in crate::target) fn configure(&mut self, config: AsyncEventConfig) {
        self.config = config;
        for event in Event::ALL {
            if !event.wanted(config) {
                self.pending &= !event.bit();
            }
        }
    }

    fn send(&mut self) {
        for event in Event::ALL {
            if self.pending & event.bit() == 0 {
                continue;
            }
            let Some((slot, cid)) = self.parked.pop_front() else { return };
            self.pending &= !event.bit();
            self.masked |= event.bit();
            self.done.push_back((slot, Cqe::success(cid).with_dw0(event.notice().dw0())));
        }
    }

    /// A request to complete.
    pub(super) fn pop(&mut self) -> Option<(u16, Cqe)> {
        self.done.pop_front()
    }

    /// Ends the request `cid` as aborted. `false` if there is none.
    pub(super) fn abort(&mut self, cid: u16) -> bool {
        let slot = self.take(cid);
        self.done.extend(slot.map(|slot| (slot, Cqe::new(cid, Status::ABORT_REQUESTED))));
        slot.is_some()
    }

    /// Takes the request `cid` out: its slot.
    pub(super) fn take(&mut self, cid: u16) -> Option<u16> {
        let at = self.parked.iter().position(|parked| parked.1 == cid)?;
        self.parked.remove(at).map(|parked| parked.0)
    }

    /// Takes all requests out.
    pub(super) fn take_all(&mut self) -> Vec<(u16, u16)> {
        self.parked.drain(..).collect()
    }

    /// The controller is reset: requests end, nothing is wanted, nothing is masked.
    pub(super) fn reset(&mut self) {
        for (slot, cid) in self.parked.drain(..) {
            self.done.push_back((slot, Cqe::new(cid, Status::ABORTED_SQ_DELETION)));
        }
        self.config = AsyncEventConfig::default();
        self.pending = 0;
        self.masked = 0;
    }
}
