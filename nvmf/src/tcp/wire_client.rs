//! A host's end of the wire for tests: builds any PDU, well formed or spoiled, and takes the target's stream apart.
//!
//! It does no I/O and trusts nothing: the target's digests, lengths, padding and offsets are checked byte by byte, and
//! what is wrong comes back as text. It is not the initiator of the product.

use super::codec::Framing;
use super::digest::crc32c;
use crate::spec::opcode::{self, fabrics, io};
use crate::spec::pdu::{
    CapsuleCmd, CapsuleResp, CommonHeader, DIGEST_BYTES, DataPdu, IcReq, IcResp, PduType, R2t, TermReq, dgst, flags,
};
use crate::spec::sqe::{Sgl, SglDescriptor};
use crate::spec::{Cqe, Sqe};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// PSDT 01b: an SGL, and metadata in one piece.
const PSDT_SGL: u8 = 1 << 6;

/// A PDU of the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetPdu {
    /// ICResp.
    IcResp(Box<IcResp>),
    /// Response capsule.
    Response(Cqe),
    /// C2HData.
    Data {
        /// CCCID.
        cid: u16,
        /// DATAO.
        offset: u32,
        /// The data.
        data: Vec<u8>,
        /// LAST_PDU.
        last: bool,
        /// SUCCESS.
        success: bool,
    },
    /// R2T.
    R2t {
        /// CCCID.
        cid: u16,
        /// Transfer tag.
        ttag: u16,
        /// R2TO.
        offset: u32,
        /// R2TL.
        len: u32,
    },
    /// C2HTermReq.
    TermReq {
        /// Fatal error status, raw.
        fes: u16,
        /// Fatal error information.
        fei: u32,
        /// The header that was at fault, as far as it came back.
        header: Vec<u8>,
    },
}

/// The host's end of one connection.
#[derive(Clone, Debug, Default)]
pub struct WireClient {
    /// Framing of what the host sends; set by ICResp.
    pub out: Framing,
    /// Framing of what the target sends; set by ICResp and the host's own ICReq.
    pub incoming: Framing,
    /// MAXH2CDATA of ICResp; 0 before.
    pub maxh2cdata: u32,
    hpda: u8,
    pending: Vec<u8>,
}

impl WireClient {
    /// Before ICReq.
    pub fn new() -> Self {
        Self::default()
    }

    /// ICReq. Remembers HPDA for the check of the target's padding.
    pub fn icreq(&mut self, header_digest: bool, data_digest: bool, hpda: u8, maxr2t: u32) -> Vec<u8> {
        self.hpda = hpda;
        let mut req = IcReq::new_zeroed();
        req.ch = CommonHeader::bare(PduType::IcReq);
        req.hpda = hpda;
        req.dgst = if header_digest { dgst::HEADER } else { 0 } | if data_digest { dgst::DATA } else { 0 };
        req.maxr2t = U32::new(maxr2t);
        req.as_bytes().to_vec()
    }

    /// Command capsule, with in-capsule data if `data` is not empty.
    pub fn capsule(&self, sqe: &Sqe, data: &[u8]) -> Vec<u8> {
        let (ch, _) = self.out.header(PduType::CapsuleCmd, 0, data.len() as u32);
        self.pdu(CapsuleCmd { ch, sqe: *sqe }.as_bytes(), data)
    }

    /// One H2CData. `last` is LAST_PDU.
    pub fn h2c_data(&self, cid: u16, ttag: u16, offset: u32, data: &[u8], last: bool) -> Vec<u8> {
        let pdu_flags = if last { flags::LAST_PDU } else { 0 };
        let (ch, _) = self.out.header(PduType::H2cData, pdu_flags, data.len() as u32);
        self.pdu(DataPdu::new(ch, cid, ttag, offset, data.len() as u32).as_bytes(), data)
    }

    /// All H2CData that an R2T asks for, out of the command's `payload`, in pieces of at most `piece` bytes.
    ///
    /// # Panics
    /// If the R2T asks for bytes outside of the payload.
    pub fn answer_r2t(&self, cid: u16, ttag: u16, offset: u32, len: u32, payload: &[u8], piece: u32) -> Vec<u8> {
        let wanted = &payload[offset as usize..][..len as usize];
        let piece = piece.min(self.maxh2cdata).max(1) as usize;
        let mut out = Vec::new();
        let mut at = 0;
        for data in wanted.chunks(piece) {
            let last = at + data.len() == wanted.len();
            out.extend(self.h2c_data(cid, ttag, offset + at as u32, data, last));
            at += data.len();
        }
        out
    }

    /// H2CTermReq.
    pub fn term_req(&self, fes: u16, fei: u32) -> Vec<u8> {
        let mut term = TermReq::new_zeroed();
        term.ch = CommonHeader::bare(PduType::H2cTermReq);
        term.fes = U16::new(fes);
        term.fei = U32::new(fei);
        term.as_bytes().to_vec()
    }

    /// A PDU of a header, whose common header must fit the data, and data: with digests and padding as negotiated.
    pub fn pdu(&self, header: &[u8], data: &[u8]) -> Vec<u8> {
        let mut out = header.to_vec();
        if self.out.header_digest {
            out.extend(crc32c(header));
        }
        if !data.is_empty() {
            out.resize(usize::from(header[3]).max(out.len()), 0);
            out.extend_from_slice(data);
            if self.out.data_digest {
                out.extend(crc32c(data));
            }
        }
        out
    }

    /// Makes the header digest of a PDU right again after a test has changed its header.
    pub fn reseal(&self, pdu: &mut [u8]) {
        if let Some(pdu_type) = pdu.first().and_then(|b| PduType::from_byte(*b))
            && self.out.header_digest
            && pdu_type.may_have_digest()
        {
            let (header, rest) = pdu.split_at_mut(pdu_type.header_bytes());
            rest[..DIGEST_BYTES].copy_from_slice(&crc32c(header));
        }
    }

    /// Takes bytes of the target's stream and returns the PDUs that they complete.
    ///
    /// # Errors
    /// What breaks a rule of the specification or of the negotiation.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<Vec<TargetPdu>, String> {
        self.pending.extend_from_slice(bytes);
        let mut pdus = Vec::new();
        let mut at = 0;
        while let Ok((ch, _)) = CommonHeader::read_from_prefix(&self.pending[at..]) {
            let plen = ch.plen.get() as usize;
            if plen < size_of::<CommonHeader>() {
                return Err(format!("PLEN {plen}"));
            }
            let Some(pdu) = self.pending[at..].get(..plen) else { break };
            let pdu = self.parse(&ch, pdu)?;
            if let TargetPdu::IcResp(resp) = &pdu {
                self.initialized(resp);
            }
            pdus.push(pdu);
            at += plen;
        }
        self.pending.drain(..at);
        Ok(pdus)
    }

    /// Bytes of a PDU that is not complete.
    pub fn pending_bytes(&self) -> usize {
        self.pending.len()
    }

    fn initialized(&mut self, resp: &IcResp) {
        let header_digest = resp.dgst & dgst::HEADER != 0;
        let data_digest = resp.dgst & dgst::DATA != 0;
        self.out = Framing { header_digest, data_digest, pda: resp.cpda };
        self.incoming = Framing { header_digest, data_digest, pda: self.hpda };
        self.maxh2cdata = resp.maxh2cdata.get();
    }

    fn parse(&self, ch: &CommonHeader, pdu: &[u8]) -> Result<TargetPdu, String> {
        let pdu_type = PduType::from_byte(ch.pdu_type)
            .filter(|t| !t.is_from_host())
            .ok_or_else(|| format!("PDU type {:02x}h from the target", ch.pdu_type))?;
        if pdu_type == PduType::C2hTermReq {
            let (term, header) = TermReq::ref_from_prefix(pdu).map_err(|_| "C2HTermReq is too short")?;
            return Ok(TargetPdu::TermReq { fes: term.fes.get(), fei: term.fei.get(), header: header.to_vec() });
        }
        let checked = self.incoming.check_early(ch, pdu_type).and_then(|()| self.incoming.check(ch, pdu_type));
        let layout = checked.map_err(|fatal| fatal.to_string())?;
        let (header, rest) = pdu.split_at(layout.header_bytes);
        let bare = &header[..pdu_type.header_bytes()];
        if header.len() > bare.len() && crc32c(bare) != header[bare.len()..] {
            return Err(format!("header digest of {pdu_type:?}"));
        }
        let whole = "the length was checked";
        Ok(match pdu_type {
            PduType::IcResp => TargetPdu::IcResp(Box::new(IcResp::read_from_bytes(bare).expect(whole))),
            PduType::CapsuleResp => TargetPdu::Response(CapsuleResp::read_from_bytes(bare).expect(whole).cqe),
            PduType::R2t => {
                let r2t = R2t::read_from_bytes(bare).expect(whole);
                TargetPdu::R2t {
                    cid: r2t.cccid.get(),
                    ttag: r2t.ttag.get(),
                    offset: r2t.r2to.get(),
                    len: r2t.r2tl.get(),
                }
            }
            PduType::C2hData => {
                let (pad, rest) = rest.split_at(layout.pad_bytes);
                let (data, digest) = rest.split_at(layout.data_bytes as usize);
                if pad.iter().any(|b| *b != 0) {
                    return Err("padding is not zero".into());
                }
                if layout.data_digest && crc32c(data) != digest {
                    return Err("data digest of C2HData".into());
                }
                let header = DataPdu::read_from_bytes(bare).expect(whole);
                if header.datal.get() != layout.data_bytes || data.is_empty() {
                    return Err(format!("DATAL {} with {} bytes of data", header.datal, data.len()));
                }
                TargetPdu::Data {
                    cid: header.cccid.get(),
                    offset: header.datao.get(),
                    data: data.to_vec(),
                    last: ch.flags & flags::LAST_PDU != 0,
                    success: ch.flags & flags::SUCCESS != 0,
                }
            }
            _ => return Err(format!("{pdu_type:?} from the target")),
        })
    }
}

/// A command without data.
pub fn command(opcode: u8, cid: u16, nsid: u32) -> Sqe {
    let mut sqe = Sqe::new_zeroed();
    sqe.opcode = opcode;
    sqe.flags = PSDT_SGL;
    sqe.cid = U16::new(cid);
    sqe.nsid = U32::new(nsid);
    sqe.dptr = Sgl::Transport { len: 0 }.into();
    sqe
}

/// The same command with data outside of the capsule, in either direction.
#[must_use]
pub fn with_transfer(mut sqe: Sqe, len: u32) -> Sqe {
    sqe.dptr = Sgl::Transport { len }.into();
    sqe
}

/// The same command with `len` bytes of data in the capsule.
#[must_use]
pub fn with_in_capsule(mut sqe: Sqe, len: u32) -> Sqe {
    sqe.dptr = Sgl::InCapsule { offset: 0, len }.into();
    sqe
}

/// The same command with any descriptor.
#[must_use]
pub fn with_descriptor(mut sqe: Sqe, dptr: SglDescriptor) -> Sqe {
    sqe.dptr = dptr;
    sqe
}

fn block_command(opcode: u8, cid: u16, nsid: u32, slba: u64, blocks: u32) -> Sqe {
    assert!((1..=65536).contains(&blocks), "{blocks} blocks");
    let mut sqe = command(opcode, cid, nsid);
    sqe.cdw10 = U32::new(slba as u32);
    sqe.cdw11 = U32::new((slba >> 32) as u32);
    sqe.cdw12 = U32::new(blocks - 1);
    sqe
}

/// Read of `blocks` blocks, `len` bytes.
pub fn read(cid: u16, nsid: u32, slba: u64, blocks: u32, len: u32) -> Sqe {
    with_transfer(block_command(io::READ, cid, nsid, slba, blocks), len)
}

/// Write of `blocks` blocks, `len` bytes, that come when an R2T asks for them.
pub fn write(cid: u16, nsid: u32, slba: u64, blocks: u32, len: u32) -> Sqe {
    with_transfer(block_command(io::WRITE, cid, nsid, slba, blocks), len)
}

/// Write of `blocks` blocks, `len` bytes, that are in the capsule.
pub fn write_in_capsule(cid: u16, nsid: u32, slba: u64, blocks: u32, len: u32) -> Sqe {
    with_in_capsule(block_command(io::WRITE, cid, nsid, slba, blocks), len)
}

/// Connect, with its 1024 bytes of data in the capsule. `entries` is a count.
pub fn connect(cid: u16, qid: u16, entries: u16, kato_ms: u32, disable_sq_flow_control: bool) -> Sqe {
    let mut sqe = with_in_capsule(command(opcode::FABRICS, cid, u32::from(fabrics::CONNECT)), 1024);
    sqe.cdw10 = U32::new(u32::from(qid) << 16);
    let cattr = if disable_sq_flow_control { 4 << 16 } else { 0 };
    sqe.cdw11 = U32::new(u32::from(entries.wrapping_sub(1)) | cattr);
    sqe.cdw12 = U32::new(kato_ms);
    sqe
}

/// Property Get of 4 or 8 bytes.
pub fn property_get(cid: u16, offset: u32, size_bytes: u8) -> Sqe {
    let mut sqe = command(opcode::FABRICS, cid, u32::from(fabrics::PROPERTY_GET));
    sqe.cdw10 = U32::new(u32::from(size_bytes == 8));
    sqe.cdw11 = U32::new(offset);
    sqe
}

/// Property Set of 4 bytes.
pub fn property_set(cid: u16, offset: u32, value: u32) -> Sqe {
    let mut sqe = command(opcode::FABRICS, cid, u32::from(fabrics::PROPERTY_SET));
    sqe.cdw11 = U32::new(offset);
    sqe.cdw12 = U32::new(value);
    sqe
}
