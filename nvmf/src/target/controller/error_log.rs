//! The Error Information log: Base 5.1.12.1.2. The latest errors, the latest first.
//!
//! It is shared by the queues of a controller, on whichever reactors they are; what it is to tell the host of waits in it
//! until the controller comes by.

use std::collections::VecDeque;

use zerocopy::{FromZeros, IntoBytes};

use super::ErrorRecord;
use crate::spec::Status;
use crate::spec::log::ErrorEntry;
use crate::target::view::TransportKind;

/// Errors that are kept (ELPE, a count). Older ones are forgotten.
pub const ERROR_LOG_ENTRIES: usize = 128;
/// Version of the entries: command set and opcode are valid.
const ENTRY_VERSION: u8 = 1;

/// The log of one controller.
#[derive(Debug, Default)]
pub struct ErrorLog {
    /// Latest first.
    entries: VecDeque<ErrorEntry>,
    /// Errors since the controller was made.
    count: u64,
    news: ErrorNews,
}

/// What the host may want to be told of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::target) struct ErrorNews {
    /// A command failed for an internal error.
    pub(in crate::target) internal: bool,
    /// The medium failed.
    pub(in crate::target) medium: bool,
}

impl ErrorLog {
    /// Adds an error.
    pub(in crate::target) fn add(&mut self, record: ErrorRecord, transport: TransportKind) {
        self.count += 1;
        self.news.internal |= record.status.same_code(Status::INTERNAL_ERROR);
        self.news.medium |=
            record.status.same_code(Status::WRITE_FAULT) || record.status.same_code(Status::UNRECOVERED_READ_ERROR);
        let mut entry = ErrorEntry::new_zeroed();
        entry.error_count.set(self.count);
        entry.sqid.set(record.sqid);
        entry.cid.set(record.cid);
        entry.status_field.set(record.status.to_field());
        entry.pel.set(record.pel);
        entry.lba.set(record.lba);
        entry.nsid.set(record.nsid);
        entry.trtype = transport.trtype();
        entry.opcode = record.opcode;
        entry.lpver = ENTRY_VERSION;
        self.entries.truncate(ERROR_LOG_ENTRIES - 1);
        self.entries.push_front(entry);
    }

    /// Errors since the controller was made.
    pub(in crate::target) fn count(&self) -> u64 {
        self.count
    }

    /// What there is to tell since this was last called.
    pub(in crate::target) fn take_news(&mut self) -> ErrorNews {
        std::mem::take(&mut self.news)
    }

    /// The whole log page; unused entries are zero.
    pub(in crate::target) fn page(&self) -> Vec<u8> {
        let mut page = Vec::with_capacity(ERROR_LOG_ENTRIES * size_of::<ErrorEntry>());
        for entry in &self.entries {
            page.extend_from_slice(entry.as_bytes());
        }
        page.resize(ERROR_LOG_ENTRIES * size_of::<ErrorEntry>(), 0);
        page
    }
}
