//! Typed commands: each submission queue entry is parsed once, here.
//!
//! What is wrong by itself (a reserved value, a fused bit where none may be) is
//! answered with a status here. What depends on the controller's state (does
//! the namespace exist, is the range inside it) is the target's to check.
//! All counts are counts: the 0's-based fields of the wire end in this file.

use super::fabrics::Property;
use super::opcode::{FABRICS, admin, fabrics, io};
use super::sqe::{Fuse, Sqe};
use super::status::Status;
use zerocopy::FromZeros;

type Result<T> = std::result::Result<T, Status>;

const INVALID_FIELD: Status = Status::INVALID_FIELD.dnr();

/// Matches no namespace in particular (Base 3.2.1).
pub const NSID_ALL: u32 = 0xffff_ffff;

/// An admin command that a fabrics controller can execute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdminCommand {
    /// Get Log Page.
    GetLogPage(GetLogPage),
    /// Identify.
    Identify(Identify),
    /// Abort.
    Abort(Abort),
    /// Set Features.
    SetFeatures(SetFeatures),
    /// Get Features.
    GetFeatures(GetFeatures),
    /// Asynchronous Event Request.
    AsyncEventRequest,
    /// Keep Alive.
    KeepAlive,
}

/// Get Log Page: Base 5.1.12.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GetLogPage {
    /// Log page identifier.
    pub lid: u8,
    /// Log specific parameter (7 bits).
    pub lsp: u8,
    /// Retain asynchronous event.
    pub rae: bool,
    /// Log specific identifier.
    pub lsi: u16,
    /// Bytes wanted: a multiple of 4, at most 2^34.
    pub len_bytes: u64,
    /// Where to start.
    pub offset: LogOffset,
    /// Command set identifier.
    pub csi: u8,
    /// UUID index.
    pub uuid_index: u8,
    /// Namespace identifier.
    pub nsid: u32,
}

/// Start of the wanted part of a log page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogOffset {
    /// Bytes, a multiple of 4.
    Bytes(u64),
    /// Index into the log's list of structures.
    Index(u64),
}

/// Identify: Base 5.1.13.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identify {
    /// Which data structure.
    pub cns: u8,
    /// Controller identifier.
    pub cntid: u16,
    /// CNS specific identifier.
    pub cnssi: u16,
    /// Command set identifier.
    pub csi: u8,
    /// UUID index.
    pub uuid_index: u8,
    /// Namespace identifier.
    pub nsid: u32,
}

/// Abort: Base 5.1.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abort {
    /// Queue that the command went to.
    pub sqid: u16,
    /// The command.
    pub cid: u16,
}

/// Set Features: Base 5.1.25.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetFeatures {
    /// Feature identifier.
    pub fid: u8,
    /// Keep the value over resets and power cycles.
    pub save: bool,
    /// Namespace identifier.
    pub nsid: u32,
    /// Feature specific; see [`super::feature`].
    pub cdw11: u32,
    /// Feature specific.
    pub cdw12: u32,
    /// Feature specific.
    pub cdw13: u32,
    /// UUID index.
    pub uuid_index: u8,
    /// Feature specific.
    pub cdw15: u32,
}

/// Get Features: Base 5.1.11.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GetFeatures {
    /// Feature identifier.
    pub fid: u8,
    /// Which of its values.
    pub select: Select,
    /// Namespace identifier.
    pub nsid: u32,
    /// Feature specific.
    pub cdw11: u32,
    /// UUID index.
    pub uuid_index: u8,
}

/// Which value of a feature Get Features returns (SEL).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Select {
    /// 000b
    Current,
    /// 001b
    Default,
    /// 010b
    Saved,
    /// 011b: what can be done with the feature, see [`super::feature::Capabilities`].
    SupportedCapabilities,
}

impl AdminCommand {
    /// Parses a command from the admin queue that is not a Fabrics command.
    ///
    /// # Errors
    /// Invalid Command Opcode for what no fabrics controller of this kind
    /// serves (queue creation among them, Base 3.1.3), Invalid Field in Command.
    pub fn parse(sqe: &Sqe) -> Result<Self> {
        let nsid = sqe.nsid.get();
        let cdw10 = sqe.cdw10.get();
        let command = match sqe.opcode {
            admin::GET_LOG_PAGE => AdminCommand::GetLogPage(get_log_page(sqe)?),
            admin::IDENTIFY => AdminCommand::Identify(Identify {
                cns: cdw10 as u8,
                cntid: (cdw10 >> 16) as u16,
                cnssi: sqe.cdw11.get() as u16,
                csi: (sqe.cdw11.get() >> 24) as u8,
                uuid_index: uuid_index(sqe),
                nsid,
            }),
            admin::ABORT => AdminCommand::Abort(Abort { sqid: cdw10 as u16, cid: (cdw10 >> 16) as u16 }),
            admin::SET_FEATURES => AdminCommand::SetFeatures(SetFeatures {
                fid: cdw10 as u8,
                save: cdw10 >> 31 != 0,
                nsid,
                cdw11: sqe.cdw11.get(),
                cdw12: sqe.cdw12.get(),
                cdw13: sqe.cdw13.get(),
                uuid_index: uuid_index(sqe),
                cdw15: sqe.cdw15.get(),
            }),
            admin::GET_FEATURES => AdminCommand::GetFeatures(GetFeatures {
                fid: cdw10 as u8,
                select: match (cdw10 >> 8) & 7 {
                    0 => Select::Current,
                    1 => Select::Default,
                    2 => Select::Saved,
                    3 => Select::SupportedCapabilities,
                    _ => return Err(INVALID_FIELD),
                },
                nsid,
                cdw11: sqe.cdw11.get(),
                uuid_index: uuid_index(sqe),
            }),
            admin::ASYNC_EVENT_REQUEST => AdminCommand::AsyncEventRequest,
            admin::KEEP_ALIVE => AdminCommand::KeepAlive,
            _ => return Err(Status::INVALID_OPCODE.dnr()),
        };
        // Fused operations exist for I/O commands only (Base 3.4.2), and what
        // concerns no namespace has a cleared NSID (Base 4.1.1).
        let no_namespace =
            matches!(command, AdminCommand::Abort(_) | AdminCommand::AsyncEventRequest | AdminCommand::KeepAlive);
        if sqe.fuse() != Fuse::None || (no_namespace && nsid != 0) {
            return Err(INVALID_FIELD);
        }
        Ok(command)
    }
}

fn uuid_index(sqe: &Sqe) -> u8 {
    sqe.cdw14.get() as u8 & 0x7f
}

fn get_log_page(sqe: &Sqe) -> Result<GetLogPage> {
    let (cdw10, cdw11) = (sqe.cdw10.get(), sqe.cdw11.get());
    let numd = u64::from(cdw10 >> 16) | u64::from(cdw11 & 0xffff) << 16;
    let offset = u64::from(sqe.cdw12.get()) | u64::from(sqe.cdw13.get()) << 32;
    let by_index = sqe.cdw14.get() & 1 << 23 != 0;
    if !by_index && offset % 4 != 0 {
        return Err(INVALID_FIELD);
    }
    Ok(GetLogPage {
        lid: cdw10 as u8,
        lsp: (cdw10 >> 8) as u8 & 0x7f,
        rae: cdw10 & 1 << 15 != 0,
        lsi: (cdw11 >> 16) as u16,
        len_bytes: (numd + 1) * 4,
        offset: if by_index { LogOffset::Index(offset) } else { LogOffset::Bytes(offset) },
        csi: (sqe.cdw14.get() >> 24) as u8,
        uuid_index: uuid_index(sqe),
        nsid: sqe.nsid.get(),
    })
}

/// A Fabrics command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FabricsCommand {
    /// Connect.
    Connect(Connect),
    /// Property Get.
    PropertyGet {
        /// Which property; `None` if the offset names none.
        property: Option<Property>,
        /// Offset (OFST).
        offset: u32,
        /// Bytes asked for: 4 or 8.
        size_bytes: u8,
    },
    /// Property Set.
    PropertySet {
        /// Which property; `None` if the offset names none.
        property: Option<Property>,
        /// Offset (OFST).
        offset: u32,
        /// Bytes written: 4 or 8.
        size_bytes: u8,
        /// The value, cut to the size.
        value: u64,
    },
    /// Authentication Send.
    AuthenticationSend(Authentication),
    /// Authentication Receive.
    AuthenticationReceive(Authentication),
    /// Disconnect: deletes the I/O queue that it comes on.
    Disconnect,
}

/// Connect: Base 6.3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connect {
    /// Queue identifier; 0 creates a controller and its admin queue.
    pub qid: u16,
    /// Entries of the submission queue: a count, 1 to 65536 (below 2 is invalid).
    pub queue_entries: u32,
    /// Priority class of the queue (2 bits).
    pub priority: u8,
    /// The host neither keeps nor needs SQHD.
    pub disable_sq_flow_control: bool,
    /// The host will delete single I/O queues with Disconnect.
    pub individual_queue_deletion: bool,
    /// Keep alive timeout in milliseconds; 0 disables it.
    pub kato_ms: u32,
}

/// Authentication Send and Receive: Base 6.1, 6.2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Authentication {
    /// Security protocol; see [`super::fabrics::SECP_NVME`].
    pub secp: u8,
    /// Security protocol specific 0.
    pub spsp0: u8,
    /// Security protocol specific 1.
    pub spsp1: u8,
    /// Transfer length (Send) or allocation length (Receive) in bytes.
    pub len_bytes: u32,
}

impl FabricsCommand {
    /// Parses a command with opcode 7Fh.
    ///
    /// # Errors
    /// Invalid Command Opcode for an unknown FCTYPE, Incompatible Format for a
    /// record format other than 0, Invalid Field in Command.
    pub fn parse(sqe: &Sqe) -> Result<Self> {
        assert_eq!(sqe.opcode, FABRICS, "not a Fabrics command");
        if sqe.fuse() != Fuse::None {
            return Err(INVALID_FIELD);
        }
        let cdw10 = sqe.cdw10.get();
        let cdw11 = sqe.cdw11.get();
        Ok(match sqe.fctype() {
            fabrics::CONNECT => {
                record_format(cdw10)?;
                let cattr = (cdw11 >> 16) as u8;
                FabricsCommand::Connect(Connect {
                    qid: (cdw10 >> 16) as u16,
                    queue_entries: (cdw11 & 0xffff) + 1,
                    priority: cattr & 3,
                    disable_sq_flow_control: cattr & 4 != 0,
                    individual_queue_deletion: cattr & 8 != 0,
                    kato_ms: sqe.cdw12.get(),
                })
            }
            fabrics::PROPERTY_GET => FabricsCommand::PropertyGet {
                property: Property::from_offset(cdw11),
                offset: cdw11,
                size_bytes: property_size(cdw10)?,
            },
            fabrics::PROPERTY_SET => {
                let size_bytes = property_size(cdw10)?;
                let low = u64::from(sqe.cdw12.get());
                FabricsCommand::PropertySet {
                    property: Property::from_offset(cdw11),
                    offset: cdw11,
                    size_bytes,
                    value: if size_bytes == 8 { low | u64::from(sqe.cdw13.get()) << 32 } else { low },
                }
            }
            fabrics::AUTHENTICATION_SEND => FabricsCommand::AuthenticationSend(authentication(cdw10, cdw11)),
            fabrics::AUTHENTICATION_RECEIVE => FabricsCommand::AuthenticationReceive(authentication(cdw10, cdw11)),
            fabrics::DISCONNECT => {
                record_format(cdw10)?;
                FabricsCommand::Disconnect
            }
            _ => return Err(Status::INVALID_OPCODE.dnr()),
        })
    }
}

fn record_format(cdw10: u32) -> Result<()> {
    if cdw10 & 0xffff == 0 { Ok(()) } else { Err(Status::CONNECT_INCOMPATIBLE_FORMAT.dnr()) }
}

fn property_size(cdw10: u32) -> Result<u8> {
    match cdw10 & 7 {
        0 => Ok(4),
        1 => Ok(8),
        _ => Err(INVALID_FIELD),
    }
}

fn authentication(cdw10: u32, cdw11: u32) -> Authentication {
    Authentication {
        spsp0: (cdw10 >> 8) as u8,
        spsp1: (cdw10 >> 16) as u8,
        secp: (cdw10 >> 24) as u8,
        len_bytes: cdw11,
    }
}

/// An I/O command of the NVM command set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoCommand {
    /// Flush.
    Flush,
    /// Read.
    Read(BlockRange),
    /// Write; the second half of a Compare and Write if `fused`.
    Write {
        /// Where, and how.
        range: BlockRange,
        /// Second command of a fused operation.
        fused: bool,
    },
    /// Compare; the first half of a Compare and Write if `fused`.
    Compare {
        /// Where, and how.
        range: BlockRange,
        /// First command of a fused operation.
        fused: bool,
    },
    /// Write Zeroes.
    WriteZeroes {
        /// Where, and how.
        range: BlockRange,
        /// Deallocate if the blocks then read as zeroes (DEAC).
        deallocate: bool,
    },
    /// Write Uncorrectable.
    WriteUncorrectable(BlockRange),
    /// Verify.
    Verify(BlockRange),
    /// Dataset Management; its ranges are [`DsmRange`]s in the data.
    DatasetManagement(DatasetManagement),
    /// Copy; its sources are in the data.
    Copy(Copy),
    /// Reservation Register.
    ReservationRegister(ReservationRegister),
    /// Reservation Acquire.
    ReservationAcquire(ReservationAcquire),
    /// Reservation Release.
    ReservationRelease(ReservationRelease),
    /// Reservation Report.
    ReservationReport {
        /// Bytes wanted, a multiple of 4.
        len_bytes: u64,
        /// 128-bit host identifiers are wanted (EDS).
        extended: bool,
    },
}

/// Logical blocks and the ways to treat them: NVM 3.2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRange {
    /// First logical block.
    pub slba: u64,
    /// Number of logical blocks: a count, 1 to 65536.
    pub blocks: u32,
    /// Force unit access.
    pub fua: bool,
    /// Limited retry.
    pub limited_retry: bool,
    /// Protection information action and checks: bit 3 PRACT, bits 2:0 PRCHK.
    pub prinfo: u8,
    /// Directive type.
    pub dtype: u8,
    /// Directive specific.
    pub dspec: u16,
    /// Dataset management hints.
    pub dsm: u8,
    /// Initial or expected reference tag (CDW14).
    pub reference_tag: u32,
    /// Application tag.
    pub app_tag: u16,
    /// Application tag mask.
    pub app_mask: u16,
}

impl BlockRange {
    /// One past the last block, or `None` beyond 2^64.
    pub fn end(&self) -> Option<u64> {
        self.slba.checked_add(u64::from(self.blocks))
    }

    /// True if all blocks lie below `size_blocks`.
    pub fn is_within(&self, size_blocks: u64) -> bool {
        self.end().is_some_and(|end| end <= size_blocks)
    }

    /// Bytes of data with blocks of `block_bytes` and no metadata.
    pub fn len_bytes(&self, block_bytes: u32) -> u64 {
        u64::from(self.blocks) * u64::from(block_bytes)
    }
}

/// Dataset Management: NVM 3.2.3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DatasetManagement {
    /// Number of ranges: a count, 1 to 256.
    pub ranges: u16,
    /// The ranges will be read as one (IDR).
    pub integral_read: bool,
    /// The ranges will be written as one (IDW).
    pub integral_write: bool,
    /// Deallocate them (AD).
    pub deallocate: bool,
}

impl DatasetManagement {
    /// Bytes of the list of ranges.
    pub fn len_bytes(&self) -> u32 {
        u32::from(self.ranges) * size_of::<DsmRange>() as u32
    }
}

wire! {
    /// One range of Dataset Management: NVM 3.2.3.
    pub struct DsmRange: 16 {
        /// Context attributes.
        pub attributes: zerocopy::little_endian::U32,
        /// Number of logical blocks: already a count on the wire.
        pub blocks: zerocopy::little_endian::U32,
        /// First logical block.
        pub slba: zerocopy::little_endian::U64,
    }
}

/// Copy: NVM 3.2.2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copy {
    /// First logical block of the destination.
    pub sdlba: u64,
    /// Number of source ranges: a count, 1 to 256.
    pub ranges: u16,
    /// Format of the source ranges (DESFMT); 0 is [`CopyRange`].
    pub format: u8,
    /// Force unit access.
    pub fua: bool,
    /// Limited retry.
    pub limited_retry: bool,
    /// Protection information of the reads.
    pub prinfo_read: u8,
    /// Protection information of the writes.
    pub prinfo_write: u8,
}

wire! {
    /// One source range of Copy in format 0h: NVM 3.2.2.
    pub struct CopyRange: 32 {
        reserved0: [u8; 8],
        /// 8: first logical block.
        pub slba: zerocopy::little_endian::U64,
        /// 16: number of logical blocks, 0's-based; see [`CopyRange::blocks`].
        nlb: zerocopy::little_endian::U16,
        reserved18: [u8; 6],
        /// 24: expected initial logical block reference tag.
        pub reference_tag: zerocopy::little_endian::U32,
        /// 28: expected application tag.
        pub app_tag: zerocopy::little_endian::U16,
        /// 30: expected application tag mask.
        pub app_mask: zerocopy::little_endian::U16,
    }
}

impl CopyRange {
    /// The range of `blocks` blocks (1 to 65536) from `slba` on, without protection information.
    ///
    /// # Panics
    /// If `blocks` is not 1 to 65536.
    pub fn new(slba: u64, blocks: u32) -> CopyRange {
        assert!((1..=65536).contains(&blocks), "{blocks} blocks in one source range");
        let mut range = CopyRange::new_zeroed();
        range.slba.set(slba);
        range.nlb.set((blocks - 1) as u16);
        range
    }

    /// Number of logical blocks: a count, 1 to 65536.
    pub fn blocks(&self) -> u32 {
        u32::from(self.nlb.get()) + 1
    }
}

/// Reservation Register: Base 7.6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReservationRegister {
    /// What to do.
    pub action: RegisterAction,
    /// Do not check the current key (IEKEY).
    pub ignore_existing_key: bool,
    /// Change of the persist through power loss state (CPTPL): 0 none, 2 clear, 3 set.
    pub change_ptpl: u8,
}

/// RREGA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegisterAction {
    /// 000b
    Register,
    /// 001b
    Unregister,
    /// 010b
    Replace,
}

/// Reservation Acquire: Base 7.5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReservationAcquire {
    /// What to do.
    pub action: AcquireAction,
    /// Set only by mistake: not allowed here, kept for the check.
    pub ignore_existing_key: bool,
    /// Reservation type wanted (RTYPE).
    pub rtype: u8,
}

/// RACQA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AcquireAction {
    /// 000b
    Acquire,
    /// 001b
    Preempt,
    /// 010b
    PreemptAndAbort,
}

/// Reservation Release: Base 7.7.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReservationRelease {
    /// What to do.
    pub action: ReleaseAction,
    /// Set only by mistake: not allowed here, kept for the check.
    pub ignore_existing_key: bool,
    /// Reservation type held (RTYPE).
    pub rtype: u8,
}

/// RRELA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReleaseAction {
    /// 000b
    Release,
    /// 001b
    Clear,
}

impl IoCommand {
    /// Parses a command from an I/O queue that is not a Fabrics command.
    ///
    /// # Errors
    /// Invalid Command Opcode, Invalid Field in Command; the latter also for a
    /// fused bit on anything but Compare (first) and Write (second).
    pub fn parse(sqe: &Sqe) -> Result<Self> {
        let fused = match (sqe.fuse(), sqe.opcode) {
            (Fuse::None, _) => false,
            (Fuse::First, io::COMPARE) | (Fuse::Second, io::WRITE) => true,
            _ => return Err(INVALID_FIELD),
        };
        let cdw10 = sqe.cdw10.get();
        let cdw11 = sqe.cdw11.get();
        Ok(match sqe.opcode {
            io::READ => IoCommand::Read(block_range(sqe)),
            io::WRITE => IoCommand::Write { range: block_range(sqe), fused },
            io::FLUSH => IoCommand::Flush,
            io::COMPARE => IoCommand::Compare { range: block_range(sqe), fused },
            io::WRITE_ZEROES => {
                IoCommand::WriteZeroes { range: block_range(sqe), deallocate: sqe.cdw12.get() & 1 << 25 != 0 }
            }
            io::WRITE_UNCORRECTABLE => IoCommand::WriteUncorrectable(block_range(sqe)),
            io::VERIFY => IoCommand::Verify(block_range(sqe)),
            io::DATASET_MANAGEMENT => IoCommand::DatasetManagement(DatasetManagement {
                ranges: (cdw10 & 0xff) as u16 + 1,
                integral_read: cdw11 & 1 != 0,
                integral_write: cdw11 & 2 != 0,
                deallocate: cdw11 & 4 != 0,
            }),
            io::COPY => IoCommand::Copy(copy(sqe)),
            io::RESERVATION_REGISTER => IoCommand::ReservationRegister(ReservationRegister {
                action: match cdw10 & 7 {
                    0 => RegisterAction::Register,
                    1 => RegisterAction::Unregister,
                    2 => RegisterAction::Replace,
                    _ => return Err(INVALID_FIELD),
                },
                ignore_existing_key: cdw10 & 8 != 0,
                change_ptpl: match cdw10 >> 30 {
                    1 => return Err(INVALID_FIELD),
                    n => n as u8,
                },
            }),
            io::RESERVATION_ACQUIRE => IoCommand::ReservationAcquire(ReservationAcquire {
                action: match cdw10 & 7 {
                    0 => AcquireAction::Acquire,
                    1 => AcquireAction::Preempt,
                    2 => AcquireAction::PreemptAndAbort,
                    _ => return Err(INVALID_FIELD),
                },
                ignore_existing_key: cdw10 & 8 != 0,
                rtype: (cdw10 >> 8) as u8,
            }),
            io::RESERVATION_RELEASE => IoCommand::ReservationRelease(ReservationRelease {
                action: match cdw10 & 7 {
                    0 => ReleaseAction::Release,
                    1 => ReleaseAction::Clear,
                    _ => return Err(INVALID_FIELD),
                },
                ignore_existing_key: cdw10 & 8 != 0,
                rtype: (cdw10 >> 8) as u8,
            }),
            io::RESERVATION_REPORT => {
                IoCommand::ReservationReport { len_bytes: (u64::from(cdw10) + 1) * 4, extended: cdw11 & 1 != 0 }
            }
            _ => return Err(Status::INVALID_OPCODE.dnr()),
        })
    }
}

fn slba(sqe: &Sqe) -> u64 {
    u64::from(sqe.cdw10.get()) | u64::from(sqe.cdw11.get()) << 32
}

fn block_range(sqe: &Sqe) -> BlockRange {
    let cdw12 = sqe.cdw12.get();
    let cdw13 = sqe.cdw13.get();
    let cdw15 = sqe.cdw15.get();
    BlockRange {
        slba: slba(sqe),
        blocks: (cdw12 & 0xffff) + 1,
        fua: cdw12 & 1 << 30 != 0,
        limited_retry: cdw12 >> 31 != 0,
        prinfo: (cdw12 >> 26) as u8 & 0xf,
        dtype: (cdw12 >> 20) as u8 & 0xf,
        dspec: (cdw13 >> 16) as u16,
        dsm: cdw13 as u8,
        reference_tag: sqe.cdw14.get(),
        app_tag: cdw15 as u16,
        app_mask: (cdw15 >> 16) as u16,
    }
}

fn copy(sqe: &Sqe) -> Copy {
    let cdw12 = sqe.cdw12.get();
    Copy {
        sdlba: slba(sqe),
        ranges: (cdw12 & 0xff) as u16 + 1,
        format: (cdw12 >> 8) as u8 & 0xf,
        fua: cdw12 & 1 << 30 != 0,
        limited_retry: cdw12 >> 31 != 0,
        prinfo_read: (cdw12 >> 12) as u8 & 0xf,
        prinfo_write: (cdw12 >> 26) as u8 & 0xf,
    }
}

#[cfg(test)]
mod tests;
