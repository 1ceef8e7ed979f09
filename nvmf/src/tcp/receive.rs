//! The receiving half of the machine: headers, in-capsule data, H2CData.

use super::codec::{Fatal, Layout};
use super::connection::{ADMIN_IN_CAPSULE_BYTES, Alloc, Connection, Fault, Need, Negotiated, Phase};
use super::digest::crc32c;
use super::slots::{Plan, SlotState};
use crate::spec::opcode::{self, Direction};
use crate::spec::pdu::{
    COMMON_HEADER_BYTES, CapsuleCmd, CommonHeader, DIGEST_BYTES, DataPdu, Fes, IcReq, MAX_PDA, PduType, TermReq, dgst,
    flags,
};
use crate::spec::sqe::{Fuse, Sgl};
use crate::spec::{Sqe, Status};
use reactor::buffer::Buffers;
use zerocopy::FromBytes;

/// Longest data of half a fused operation that gets memory of its own: the largest block.
const MAX_FUSED_BYTES: u32 = 64 * 1024;

/// What the next byte of the stream belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rx {
    /// A header.
    Header,
    /// In-capsule data for which there is no memory yet.
    Stalled,
    /// Padding or data.
    Data,
    /// A data digest.
    Digest,
    /// Nobody.
    Dead,
}

/// The data of the PDU that is being read: bytes that are left, in the order of the stream.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Incoming {
    slot: u16,
    digest: bool,
    /// Padding.
    pad: u32,
    /// Data in front of what the command wants.
    skip: u32,
    /// Data that the command wants, to be put at `offset` of its buffers.
    take: u32,
    offset: u32,
    /// Data behind it.
    rest: u32,
}

impl Connection {
    /// Consumes bytes of the stream; returns how many. It stops before the end of `bytes` only to wait for memory
    /// ([`stalled`](Self::stalled)) or for output to leave; offer the rest again then.
    ///
    /// # Errors
    /// A fault ends the connection; nothing is consumed any more. For [`Fault::Protocol`] a C2HTermReq is queued.
    ///
    /// # Panics
    /// If `alloc` returns memory of another length than it was asked for.
    pub fn handle_input(&mut self, bytes: &[u8], alloc: &mut Alloc<'_>) -> Result<usize, Fault> {
        let mut at = 0;
        loop {
            let rest = &bytes[at..];
            let used = match self.rx {
                Rx::Header => self.rx_header(rest, alloc)?,
                Rx::Data => self.rx_data(rest),
                Rx::Digest => self.rx_digest(rest),
                Rx::Stalled => {
                    if self.begin_capsule_data(alloc) {
                        continue;
                    }
                    0
                }
                Rx::Dead => return Ok(bytes.len()),
            };
            if used == 0 {
                return Ok(at);
            }
            at += used;
        }
    }

    /// Tries again to get memory for what waits, in order. Call it when memory may have come back, or when host data
    /// has arrived while [`stalled`](Self::stalled).
    pub fn retry_alloc(&mut self, alloc: &mut Alloc<'_>) {
        while let Some(index) = self.waiting.front().copied() {
            if !self.give_memory(index, alloc) {
                break;
            }
            self.waiting.pop_front();
        }
        if self.rx == Rx::Stalled {
            self.begin_capsule_data(alloc);
        }
    }

    /// If the next bytes of the stream are data, the memory that they belong in: receive straight into it, and say
    /// how much came with [`read_done`](Self::read_done). What follows belongs to [`handle_input`](Self::handle_input).
    #[inline]
    pub fn read_target(&mut self) -> Option<&mut [u8]> {
        let Incoming { slot, pad, skip, take, offset, .. } = self.incoming;
        if self.rx != Rx::Data || pad > 0 || skip > 0 || take == 0 {
            return None;
        }
        let target = self.slots[slot].data.slice_at_mut(offset as usize);
        let len = target.len().min(take as usize);
        Some(&mut target[..len])
    }

    /// The first `len` bytes of the [`read_target`](Self::read_target) have been filled from the stream.
    ///
    /// # Panics
    /// If that is more than the target has.
    pub fn read_done(&mut self, len: usize) {
        if len == 0 {
            return;
        }
        let incoming = self.incoming;
        let target = self.slots[incoming.slot].data.slice_at(incoming.offset as usize);
        let open = self.rx == Rx::Data && incoming.pad == 0 && incoming.skip == 0;
        assert!(open && len <= target.len().min(incoming.take as usize), "more read than asked for");
        if incoming.digest {
            self.crc.update(&target[..len]);
        }
        self.incoming.offset += len as u32;
        self.incoming.take -= len as u32;
        self.finish_data();
    }

    fn fail(&mut self, fatal: Fatal, header: &[u8]) -> Fault {
        self.terminate_with(fatal.fes, fatal.fei, header);
        Fault::Protocol(fatal)
    }

    /// The type of the PDU whose first byte is given, if it may come now.
    fn expect(&self, first: u8) -> Result<PduType, Fatal> {
        let pdu_type = PduType::from_byte(first)
            .filter(|t| t.is_from_host())
            .ok_or(Fatal::field(CommonHeader::OFFSET_TYPE, "not a PDU type that a host sends"))?;
        match (self.phase, pdu_type) {
            (_, PduType::H2cTermReq) | (Phase::AwaitIcReq, PduType::IcReq) => Ok(pdu_type),
            (Phase::AwaitIcReq, _) => Err(Fatal::sequence("a PDU before ICReq")),
            (_, PduType::IcReq) => Err(Fatal::sequence("a second ICReq")),
            _ => Ok(pdu_type),
        }
    }

    #[inline]
    fn rx_header(&mut self, rest: &[u8], alloc: &mut Alloc<'_>) -> Result<usize, Fault> {
        let Some(&byte) = rest.first() else { return Ok(0) };
        let first = if self.have == 0 { byte } else { self.head[0] };
        let pdu_type = match self.expect(first) {
            Ok(pdu_type) => pdu_type,
            Err(fatal) => return Err(self.fail(fatal, &rest[..rest.len().min(COMMON_HEADER_BYTES)])),
        };
        if self.have == 0 && pdu_type == PduType::CapsuleCmd && !self.has_room_for_command() {
            return Ok(0);
        }
        let need = self.rx_framing.header_bytes(pdu_type);
        if self.have == 0 && rest.len() >= need {
            self.on_header(pdu_type, &rest[..need], alloc)?;
            return Ok(need);
        }
        self.rx_header_piece(pdu_type, need, rest, alloc)
    }

    /// Part of a header: puts it to the parts that came before.
    fn rx_header_piece(
        &mut self,
        pdu_type: PduType,
        need: usize,
        rest: &[u8],
        alloc: &mut Alloc<'_>,
    ) -> Result<usize, Fault> {
        let n = rest.len().min(need - self.have);
        self.head[self.have..self.have + n].copy_from_slice(&rest[..n]);
        self.have += n;
        let head = self.head;
        if let Ok((ch, _)) = CommonHeader::ref_from_prefix(&head[..self.have])
            && pdu_type != PduType::H2cTermReq
            && let Err(fatal) = self.rx_framing.check_early(ch, pdu_type)
        {
            return Err(self.fail(fatal, &head[..self.have]));
        }
        if self.have == need {
            self.have = 0;
            self.on_header(pdu_type, &head[..need], alloc)?;
        }
        Ok(n)
    }

    /// A complete header, with its digest if there is one.
    #[inline]
    fn on_header(&mut self, pdu_type: PduType, header: &[u8], alloc: &mut Alloc<'_>) -> Result<(), Fault> {
        let result = if pdu_type == PduType::H2cTermReq {
            return Err(self.on_term_req(header));
        } else {
            self.dispatch(pdu_type, header, alloc)
        };
        result.map_err(|fatal| self.fail(fatal, &header[..pdu_type.header_bytes()]))
    }

    fn dispatch(&mut self, pdu_type: PduType, header: &[u8], alloc: &mut Alloc<'_>) -> Result<(), Fatal> {
        let (ch, _) = CommonHeader::ref_from_prefix(header).expect("a header has a common header");
        self.rx_framing.check_early(ch, pdu_type)?;
        if self.rx_framing.header_digest && pdu_type.may_have_digest() {
            let (bytes, digest) = header.split_at(pdu_type.header_bytes());
            if crc32c(bytes) != digest {
                let fei = digest.try_into().map_or(0, u32::from_le_bytes);
                return Err(Fatal { fes: Fes::HeaderDigestError, fei, what: "header digest mismatch" });
            }
        }
        let layout = self.rx_framing.check(ch, pdu_type)?;
        match pdu_type {
            PduType::CapsuleCmd => {
                let (capsule, _) = CapsuleCmd::ref_from_prefix(header).expect("a whole header");
                self.on_capsule(&capsule.sqe, layout, alloc)
            }
            PduType::H2cData => {
                let (pdu, _) = DataPdu::ref_from_prefix(header).expect("a whole header");
                self.on_h2c_data(pdu, layout)
            }
            PduType::IcReq => {
                let (req, _) = IcReq::ref_from_prefix(header).expect("a whole header");
                self.on_icreq(req)
            }
            _ => unreachable!("expect() lets only PDUs of the host through"),
        }
    }

    fn on_icreq(&mut self, req: &IcReq) -> Result<(), Fatal> {
        if req.pfv.get() != 0 {
            return Err(Fatal { fes: Fes::UnsupportedParameter, fei: 8, what: "PDU format version is not 0" });
        }
        if req.hpda > MAX_PDA {
            return Err(Fatal::field(10, "HPDA is above 31"));
        }
        self.initialize(Negotiated {
            header_digest: self.config.allow_header_digest && req.dgst & dgst::HEADER != 0,
            data_digest: self.config.allow_data_digest && req.dgst & dgst::DATA != 0,
            hpda: req.hpda,
            maxr2t: u64::from(req.maxr2t.get()) + 1,
        });
        Ok(())
    }

    fn on_term_req(&mut self, header: &[u8]) -> Fault {
        let (fes, fei) = TermReq::ref_from_prefix(header).map_or((0, 0), |(term, _)| (term.fes.get(), term.fei.get()));
        self.phase = Phase::Closed;
        self.stop_receiving();
        Fault::Host { fes, fei }
    }

    #[inline]
    fn on_capsule(&mut self, sqe: &Sqe, layout: Layout, alloc: &mut Alloc<'_>) -> Result<(), Fatal> {
        let in_capsule = layout.data_bytes;
        if in_capsule > self.config.max_io_bytes.max(self.in_capsule_limit(sqe)) {
            let what = "in-capsule data beyond every limit";
            return Err(Fatal { fes: Fes::DataTransferLimitExceeded, fei: 0, what });
        }
        let plan = match self.slots.find(sqe.cid.get()) {
            None => self.plan(sqe, in_capsule),
            Some(_) => Err(Status::CID_CONFLICT.dnr()),
        };
        let seq = self.seq;
        let index =
            self.slots.take(sqe, seq).ok_or(Fatal::sequence("more commands outstanding than the queue has entries"))?;
        self.seq = seq.wrapping_add(1);
        self.join_fused(index, sqe.fuse());
        let slot = &mut self.slots[index];
        slot.plan = plan.unwrap_or(Plan::None);
        slot.verdict = plan.err().unwrap_or(Status::SUCCESS);
        match slot.plan {
            Plan::ToHost { .. } | Plan::FromHost { .. } => {
                slot.state = SlotState::Waiting;
                let in_line = !self.waiting.is_empty() && sqe.fuse() == Fuse::None;
                if in_line || !self.give_memory(index, alloc) {
                    self.waiting.push_back(index);
                }
                return Ok(());
            }
            Plan::None if in_capsule == 0 => {
                self.make_ready(index);
                return Ok(());
            }
            Plan::None | Plan::InCapsule { .. } => {}
        }
        let (skip, take) = match slot.plan {
            Plan::InCapsule { offset, len } => (offset, len),
            _ => (0, 0),
        };
        slot.state = SlotState::Waiting;
        self.incoming = Incoming {
            slot: index,
            digest: layout.data_digest,
            pad: layout.pad_bytes as u32,
            skip,
            take,
            offset: 0,
            rest: in_capsule - skip - take,
        };
        self.begin_capsule_data(alloc);
        Ok(())
    }

    /// In-capsule data that a command may carry.
    fn in_capsule_limit(&self, sqe: &Sqe) -> u32 {
        if self.is_io_queue && sqe.opcode != opcode::FABRICS {
            self.config.in_capsule_bytes
        } else {
            self.config.in_capsule_bytes.max(ADMIN_IN_CAPSULE_BYTES)
        }
    }

    /// What to do about the data of a command with `in_capsule` bytes behind it (TCP 3.3.2.1).
    #[inline]
    fn plan(&self, sqe: &Sqe, in_capsule: u32) -> Result<Plan, Status> {
        const NONE: Result<Plan, Status> = Ok(Plan::None);
        if in_capsule > self.in_capsule_limit(sqe) {
            return Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
        }
        let to_host = match Direction::of_command(sqe) {
            Direction::None | Direction::Bidirectional if in_capsule == 0 => return NONE,
            Direction::None | Direction::Bidirectional => return Err(Status::INVALID_FIELD.dnr()),
            Direction::HostToController => false,
            Direction::ControllerToHost => true,
        };
        let sgl = sqe.dptr.parse()?;
        if sgl.is_empty() && in_capsule == 0 {
            return NONE;
        }
        // PRPs, and metadata SGLs without data SGLs, do not exist on message-based transports (Base 4.3).
        if sqe.opcode != opcode::FABRICS && !matches!(sqe.psdt(), 1 | 2) {
            return Err(Status::INVALID_FIELD.dnr());
        }
        match sgl {
            Sgl::Transport { len } if in_capsule == 0 => {
                if len > self.config.max_io_bytes {
                    return Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
                }
                Ok(if to_host { Plan::ToHost { len } } else { Plan::FromHost { len } })
            }
            Sgl::InCapsule { offset, len } if !to_host => {
                let Some(room) = u64::from(in_capsule).checked_sub(offset) else {
                    return Err(Status::SGL_OFFSET_INVALID.dnr());
                };
                if u64::from(len) > room || len > self.config.max_io_bytes {
                    return Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
                }
                Ok(if len == 0 { Plan::None } else { Plan::InCapsule { offset: offset as u32, len } })
            }
            _ => Err(Status::SGL_TYPE_INVALID.dnr()),
        }
    }

    /// Gets memory for a command that waits for it, and sends it on its way. False if there is none.
    #[inline]
    fn give_memory(&mut self, index: u16, alloc: &mut Alloc<'_>) -> bool {
        let (len, need) = match self.slots[index].plan {
            Plan::ToHost { len } => (len, Need::ToHost),
            Plan::FromHost { len } => (len, Need::HostData),
            plan => unreachable!("{plan:?} does not wait"),
        };
        if need == Need::HostData && self.r2t_bytes > 0 && self.r2t_bytes + len > self.config.r2t_window_bytes {
            return false;
        }
        let Some(data) = alloc(len, need).or_else(|| self.fused_memory(index, len)) else { return false };
        assert_eq!(data.len(), len as usize, "memory of the length asked for");
        let slot = &mut self.slots[index];
        slot.data = data;
        if need == Need::ToHost {
            self.make_ready(index);
        } else {
            slot.state = SlotState::Transfer;
            let cid = slot.cid;
            self.r2t_bytes += len;
            self.push_r2t(index, cid, len);
        }
        true
    }

    /// Memory of its own for half a fused operation that finds none. It holds what it has until the other half has its own,
    /// and all halves together could wait for each other with everything there is. Only one block is fused, and the queue
    /// bounds how many.
    fn fused_memory(&self, index: u16, len: u32) -> Option<Buffers> {
        let fused = self.is_io_queue && self.slots[index].sqe.fuse() != Fuse::None;
        (fused && len <= MAX_FUSED_BYTES).then(|| Buffers::heap(len as usize))
    }

    /// Gets memory for the in-capsule data that comes next. False if there is none.
    fn begin_capsule_data(&mut self, alloc: &mut Alloc<'_>) -> bool {
        let incoming = &mut self.incoming;
        let slot = &mut self.slots[incoming.slot];
        if slot.verdict != Status::SUCCESS {
            incoming.rest += incoming.take;
            incoming.take = 0;
        } else if incoming.take > 0 {
            let (index, take) = (incoming.slot, incoming.take);
            // Half a fused operation holds its data until the other half's has come, like data that was asked for.
            let fused = self.is_io_queue && self.slots[index].sqe.fuse() != Fuse::None;
            let need = if fused { Need::HostData } else { Need::InCapsule };
            let Some(data) = alloc(take, need).or_else(|| self.fused_memory(index, take)) else {
                self.rx = Rx::Stalled;
                return false;
            };
            assert_eq!(data.len(), take as usize, "memory of the length asked for");
            self.slots[index].data = data;
        }
        self.slots[self.incoming.slot].state = SlotState::InCapsule;
        self.rx = Rx::Data;
        true
    }

    /// TCP 3.3.2.1.3, 3.6.2.7.
    #[inline]
    fn on_h2c_data(&mut self, pdu: &DataPdu, layout: Layout) -> Result<(), Fatal> {
        let ttag = pdu.ttag.get();
        let Some((slot, len)) = self.slots.get(ttag).and_then(|slot| match slot.plan {
            Plan::FromHost { len } if slot.state == SlotState::Transfer => Some((slot, len)),
            _ => None,
        }) else {
            return Err(Fatal::field(DataPdu::OFFSET_TTAG, "TTAG of no outstanding R2T"));
        };
        let (datao, datal) = (pdu.datao.get(), pdu.datal.get());
        if pdu.cccid.get() != slot.cid {
            return Err(Fatal::field(DataPdu::OFFSET_CCCID, "CCCID is not that of the R2T"));
        }
        if datal == 0 || datal != layout.data_bytes {
            return Err(Fatal::field(DataPdu::OFFSET_DATAL, "DATAL is not the length of the data"));
        }
        if datal > self.config.maxh2cdata {
            return Err(Fatal { fes: Fes::DataTransferLimitExceeded, fei: 0, what: "DATAL is above MAXH2CDATA" });
        }
        let end = u64::from(datao) + u64::from(datal);
        if end > u64::from(len) {
            return Err(Fatal { fes: Fes::DataTransferOutOfRange, fei: 0, what: "data beyond what R2T asked for" });
        }
        if datao != slot.received {
            return Err(Fatal::sequence("DATAO does not continue the data"));
        }
        if (end == u64::from(len)) != (pdu.ch.flags & flags::LAST_PDU != 0) {
            return Err(Fatal::field(CommonHeader::OFFSET_FLAGS, "LAST_PDU is not on the last data of the R2T"));
        }
        self.incoming = Incoming {
            slot: ttag,
            digest: layout.data_digest,
            pad: layout.pad_bytes as u32,
            skip: 0,
            take: datal,
            offset: datao,
            rest: 0,
        };
        self.rx = Rx::Data;
        Ok(())
    }

    fn rx_data(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        let mut next = |left: &mut u32| {
            let n = bytes.len().saturating_sub(at).min(*left as usize);
            *left -= n as u32;
            at += n;
            &bytes[at - n..at]
        };
        let incoming = &mut self.incoming;
        next(&mut incoming.pad);
        let skipped = next(&mut incoming.skip);
        let taken = next(&mut incoming.take);
        let rest = next(&mut incoming.rest);
        if !taken.is_empty() {
            self.slots[incoming.slot].data.write_at(incoming.offset as usize, taken);
            incoming.offset += taken.len() as u32;
        }
        if incoming.digest {
            for part in [skipped, taken, rest] {
                self.crc.update(part);
            }
        }
        self.finish_data();
        at
    }

    /// Goes on when the last byte of the data has come.
    #[inline]
    fn finish_data(&mut self) {
        let Incoming { pad, skip, take, rest, digest, .. } = self.incoming;
        if pad | skip | take | rest == 0 {
            if digest {
                self.rx = Rx::Digest;
            } else {
                self.finish_pdu();
            }
        }
    }

    fn rx_digest(&mut self, bytes: &[u8]) -> usize {
        let n = bytes.len().min(DIGEST_BYTES - self.have);
        self.head[self.have..self.have + n].copy_from_slice(&bytes[..n]);
        self.have += n;
        if self.have == DIGEST_BYTES {
            self.have = 0;
            if self.crc.finish() != self.head[..DIGEST_BYTES] {
                // TCP 3.3.1.1: the command fails, the connection goes on.
                self.data_digest_errors += 1;
                self.slots[self.incoming.slot].verdict = Status::TRANSIENT_TRANSPORT_ERROR;
            }
            self.finish_pdu();
        }
        n
    }

    fn finish_pdu(&mut self) {
        self.rx = Rx::Header;
        let Incoming { slot: index, offset, .. } = self.incoming;
        let slot = &mut self.slots[index];
        match (slot.state, slot.plan) {
            (SlotState::Transfer, Plan::FromHost { len }) => {
                slot.received = offset;
                if offset == len {
                    self.r2t_bytes -= len;
                    self.make_ready(index);
                }
            }
            _ => self.make_ready(index),
        }
    }
}
