//! Reading a log page that may change meanwhile, in pieces (Base 5.1.12, 5.1.12.3.1).
//!
//! ```text
//!  header (RAE) -> records, piece by piece (RAE) -> header again (no RAE): same generation? -> done
//!       ^                                                       | another
//!       +-------------------------------------------------------+
//! ```
//! The ANA log is short and is read in one piece where it fits, with its header and for good: Linux' target knows no offsets
//! in it. The last read acknowledges the event that told of the change, so one that comes between it and the caller's use of
//! the records is told again. What the header says of the number of records is checked before memory is taken for them.

use super::Error;
use crate::spec::log::{ANA_RETURN_GROUPS_ONLY, AnaGroup, AnaHeader, DiscoveryEntry, DiscoveryHeader, lid};
use zerocopy::FromBytes;

/// Most records of a discovery log that are taken.
pub const MAX_DISCOVERY_RECORDS: u64 = 4096;
/// Times that a log may have changed while it was read.
const MAX_RESTARTS: u32 = 32;

/// Which log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Asymmetric namespace access, the groups without their namespaces.
    Ana,
    /// Discovery.
    Discovery,
}

/// One command to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    /// Log page.
    pub lid: u8,
    /// Log specific parameter.
    pub lsp: u8,
    /// From where, bytes.
    pub offset: u64,
    /// How much, bytes: a multiple of 4.
    pub len: u32,
    /// Keep the event.
    pub retain: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Header,
    Records,
    Confirm,
}

/// A log page that is being read.
#[derive(Debug)]
pub struct LogReader {
    kind: Kind,
    phase: Phase,
    generation: u64,
    wanted: usize,
    records: Vec<u8>,
    piece: usize,
    /// Bytes of the first read: the header, and what is expected behind it.
    first: usize,
    restarts: u32,
}

impl LogReader {
    /// Reads log `kind` in pieces of at most `max_bytes`. `groups` ANA groups are expected.
    pub fn new(kind: Kind, max_bytes: u32, groups: u32) -> LogReader {
        // A piece is at least as long as a header.
        let piece = (max_bytes as usize & !3).max(4096);
        let first = match kind {
            Kind::Ana => (size_of::<AnaHeader>() + (groups as usize).saturating_mul(size_of::<AnaGroup>())).min(piece),
            Kind::Discovery => size_of::<DiscoveryHeader>(),
        };
        let (phase, records) = (Phase::Header, Vec::new());
        LogReader { kind, phase, generation: 0, wanted: 0, records, piece, first, restarts: 0 }
    }

    fn header_bytes(&self) -> usize {
        match self.kind {
            Kind::Ana => size_of::<AnaHeader>(),
            Kind::Discovery => size_of::<DiscoveryHeader>(),
        }
    }

    /// What to read next.
    pub fn next(&self) -> Read {
        let (lid, lsp) = match self.kind {
            Kind::Ana => (lid::ANA, ANA_RETURN_GROUPS_ONLY),
            Kind::Discovery => (lid::DISCOVERY, 0),
        };
        let header = self.header_bytes();
        match self.phase {
            Phase::Header => Read { lid, lsp, offset: 0, len: self.first as u32, retain: self.kind == Kind::Discovery },
            Phase::Confirm => Read { lid, lsp, offset: 0, len: header as u32, retain: false },
            Phase::Records => {
                let len = (self.wanted - self.records.len()).min(self.piece) as u32;
                Read { lid, lsp, offset: (header + self.records.len()) as u64, len, retain: true }
            }
        }
    }

    /// What [`next`](Self::next) asked for has come; whether the log is complete.
    ///
    /// # Errors
    /// The log cannot be what it says, or changes faster than it can be read.
    ///
    /// # Panics
    /// If it is not as long as was asked for.
    pub fn take(&mut self, bytes: &[u8]) -> Result<bool, Error> {
        assert_eq!(bytes.len(), self.next().len as usize, "a read is as long as was asked for");
        if self.phase == Phase::Records {
            self.records.extend_from_slice(bytes);
            if self.records.len() == self.wanted {
                self.phase = Phase::Confirm;
            }
            return Ok(false);
        }
        let (generation, wanted) = self.header(bytes)?;
        if self.phase == Phase::Confirm && (generation, wanted) == (self.generation, self.wanted) {
            return Ok(true);
        }
        if self.phase == Phase::Confirm {
            self.restarts += 1;
            if self.restarts > MAX_RESTARTS {
                return Err(Error::Nonsense("a log page that changes whenever it is read"));
            }
        }
        (self.generation, self.wanted) = (generation, wanted);
        let behind = &bytes[self.header_bytes()..];
        self.records.clear();
        self.records.extend_from_slice(&behind[..behind.len().min(wanted)]);
        let is_whole = self.records.len() == wanted;
        if is_whole && self.kind == Kind::Ana && self.phase == Phase::Header {
            return Ok(true);
        }
        self.phase = if is_whole { Phase::Confirm } else { Phase::Records };
        Ok(false)
    }

    /// The generation, and the bytes of all records.
    fn header(&self, bytes: &[u8]) -> Result<(u64, usize), Error> {
        const WHOLE: Error = Error::Nonsense("a log page that is shorter than its header");
        match self.kind {
            Kind::Ana => {
                let (header, _) = AnaHeader::ref_from_prefix(bytes).map_err(|_| WHOLE)?;
                Ok((header.chgcnt.get(), usize::from(header.ngrps.get()) * size_of::<AnaGroup>()))
            }
            Kind::Discovery => {
                let (header, _) = DiscoveryHeader::ref_from_prefix(bytes).map_err(|_| WHOLE)?;
                if header.recfmt.get() != 0 {
                    return Err(Error::Nonsense("a discovery log of an unknown format"));
                }
                let records = header.numrec.get();
                if records > MAX_DISCOVERY_RECORDS {
                    return Err(Error::Nonsense("a discovery log of more than 4096 records"));
                }
                Ok((header.genctr.get(), records as usize * size_of::<DiscoveryEntry>()))
            }
        }
    }

    /// The generation, and the records behind each other. Complete only when [`take`](Self::take) has said so.
    pub fn finish(self) -> (u64, Vec<u8>) {
        (self.generation, self.records)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::{FromZeros, IntoBytes};

    fn log(generation: u64, records: u64) -> Vec<u8> {
        let mut header = DiscoveryHeader::new_zeroed();
        header.genctr.set(generation);
        header.numrec.set(records);
        let mut log = header.as_bytes().to_vec();
        for n in 0..records {
            let mut entry = DiscoveryEntry::new_zeroed();
            entry.set_subnqn(&format!("nqn.{generation}.{n}"));
            log.extend_from_slice(entry.as_bytes());
        }
        log
    }

    fn cut(log: &[u8], read: Read) -> Vec<u8> {
        let mut bytes = vec![0; read.len as usize];
        let from = (read.offset as usize).min(log.len());
        let part = &log[from..log.len().min(from + bytes.len())];
        bytes[..part.len()].copy_from_slice(part);
        bytes
    }

    #[test]
    fn a_log_that_changes_is_read_again() {
        for change_at in 0..20 {
            let (mut reader, mut reads) = (LogReader::new(Kind::Discovery, 4096, 0), 0);
            loop {
                let read = reader.next();
                let now = if reads < change_at { log(1, 11) } else { log(2, 3) };
                reads += 1;
                assert!(reads < 60, "it never ends");
                if reader.take(&cut(&now, read)).unwrap() {
                    break;
                }
            }
            let (generation, records) = reader.finish();
            // Header, three pieces, header.
            let seen = if change_at >= 5 { log(1, 11) } else { log(2, 3) };
            assert_eq!((generation, &records[..]), (if change_at >= 5 { 1 } else { 2 }, &seen[1024..]), "{change_at}");
        }
    }

    #[test]
    fn an_ana_log_is_read_at_once_or_in_pieces() {
        for (groups, expected, reads) in [(3u16, 128, 1), (0, 0, 1), (128, 128, 1), (300, 300, 4), (300, 2, 5)] {
            let mut header = AnaHeader::new_zeroed();
            header.chgcnt.set(9);
            header.ngrps.set(groups);
            let mut log = header.as_bytes().to_vec();
            for group in 1..=u32::from(groups) {
                let mut entry = AnaGroup::new_zeroed();
                entry.agid.set(group);
                log.extend_from_slice(entry.as_bytes());
            }
            let (mut reader, mut count) = (LogReader::new(Kind::Ana, 4160, expected), 0);
            loop {
                let read = reader.next();
                assert!(read.len <= 4160 && read.lsp == ANA_RETURN_GROUPS_ONLY);
                count += 1;
                if reader.take(&cut(&log, read)).unwrap() {
                    assert!(!read.retain, "the last read acknowledges");
                    break;
                }
            }
            assert_eq!((count, reader.finish()), (reads, (9, log[16..].to_vec())), "{groups} groups");
        }
    }

    #[test]
    fn lies_are_refused() {
        let mut reader = LogReader::new(Kind::Discovery, 4096, 0);
        assert!(reader.take(&log(1, 0)[..]).is_ok());
        let mut lie = log(1, 0);
        lie[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(LogReader::new(Kind::Discovery, 4096, 0).take(&lie), Err(Error::Nonsense(_))));
        lie = log(1, 0);
        lie[16] = 1;
        assert!(matches!(LogReader::new(Kind::Discovery, 4096, 0).take(&lie), Err(Error::Nonsense(_))));
        let mut reader = LogReader::new(Kind::Discovery, 4096, 0);
        let failed = (0..10_000).any(|n| reader.take(&log(n, 0)[..]).is_err());
        assert!(failed, "a log that changes with every read is given up");
    }
}
