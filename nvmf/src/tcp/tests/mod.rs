//! Tests of the machine against [`wire_client`](super::wire_client).

mod commands;
mod errors;
mod properties;
mod vectors;

use super::wire_client::{TargetPdu, WireClient};
use super::*;
use crate::spec::pdu::Fes;
use crate::spec::{Cqe, Sqe, Status};
use reactor::buffer::Buffers;
use std::io::IoSlice;

/// A machine with a host at its other end.
struct Link {
    conn: Connection,
    host: WireClient,
    /// Bytes of memory that may still be handed out.
    memory: usize,
    /// Payloads that came back from the machine after sending.
    freed: usize,
}

impl Link {
    /// Before ICReq.
    fn bare(config: Config) -> Self {
        Self { conn: Connection::new(config), host: WireClient::new(), memory: usize::MAX, freed: 0 }
    }

    /// Initialised.
    fn with(config: Config, header_digest: bool, data_digest: bool, hpda: u8) -> Self {
        let mut link = Self::bare(config);
        let icreq = link.host.icreq(header_digest, data_digest, hpda, 0);
        link.feed(&icreq);
        assert!(matches!(link.output()[..], [TargetPdu::IcResp(_)]));
        link
    }

    fn new() -> Self {
        Self::with(Config::default(), false, false, 0)
    }

    fn handle(&mut self, bytes: &[u8]) -> Result<usize, Fault> {
        let memory = &mut self.memory;
        self.conn.handle_input(bytes, &mut |len, _| take(memory, len))
    }

    fn retry(&mut self) {
        let memory = &mut self.memory;
        self.conn.retry_alloc(&mut |len, _| take(memory, len));
    }

    /// Input that must be consumed whole.
    #[track_caller]
    fn feed(&mut self, bytes: &[u8]) {
        assert_eq!(self.handle(bytes), Ok(bytes.len()));
    }

    /// Input that must end the connection, and what the host sees of it.
    #[track_caller]
    fn refused(&mut self, bytes: &[u8]) -> (Fes, u32) {
        let fault = self.handle(bytes).expect_err("accepted");
        let Fault::Protocol(fatal) = fault else { panic!("{fault}") };
        assert!(self.conn.is_ending() && !self.conn.is_closed());
        let sent = self.output();
        let Some(TargetPdu::TermReq { fes, fei, header }) = sent.last() else { panic!("{sent:?}") };
        assert_eq!((*fes, *fei), (fatal.fes as u16, fatal.fei));
        assert!(!header.is_empty() && (bytes.len() < header.len() || bytes.starts_with(header)), "{header:?}");
        assert!(self.conn.is_closed());
        assert_eq!(self.handle(b"anything"), Ok(8));
        assert!(self.conn.poll_event().is_none());
        (fatal.fes, fatal.fei)
    }

    /// All that the target has to say now.
    #[track_caller]
    fn output(&mut self) -> Vec<TargetPdu> {
        let mut pdus = Vec::new();
        while self.conn.wants_output() {
            let mut iov = [IoSlice::new(&[]); 7];
            let n = self.conn.poll_output(&mut iov);
            let bytes = iov[..n].iter().flat_map(|s| s.to_vec()).collect::<Vec<u8>>();
            let freed = &mut self.freed;
            self.conn.sent(bytes.len(), &mut |_| *freed += 1);
            pdus.extend(self.host.receive(&bytes).unwrap());
        }
        assert_eq!(self.host.pending_bytes(), 0);
        pdus
    }

    #[track_caller]
    fn command(&mut self) -> (u16, u32, Sqe, Buffers) {
        match self.conn.poll_event() {
            Some(Event::Command { slot, seq, sqe, data }) => (slot, seq, sqe, data),
            other => panic!("{other:?}"),
        }
    }

    /// Takes a rejected command, completes it as told, and returns the status.
    #[track_caller]
    fn rejected(&mut self) -> Status {
        match self.conn.poll_event() {
            Some(Event::Rejected { slot, status, .. }) => {
                self.conn.complete(slot, Cqe::new(0, status), None);
                status
            }
            other => panic!("{other:?}"),
        }
    }
}

fn take(memory: &mut usize, len: u32) -> Option<Buffers> {
    *memory = memory.checked_sub(len as usize)?;
    // Two segments, so that every path meets a boundary.
    let first = len as usize / 3;
    let mut data = Buffers::heap(first);
    for buffer in Buffers::heap(len as usize - first).drain() {
        data.push(buffer);
    }
    Some(data)
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}
