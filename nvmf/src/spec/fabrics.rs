//! Fabrics commands and controller properties: Base 6, 3.1.4.
//!
//! A Fabrics command is a submission queue entry with opcode 7Fh whose NSID
//! field holds FCTYPE in its low byte; [`super::command::FabricsCommand`] is its
//! parsed form. This file has the data structures and the property registers.

use super::nul_text;
use super::status::Status;
use zerocopy::FromBytes;
use zerocopy::little_endian::U16;

/// Bytes of [`ConnectData`].
pub const CONNECT_DATA_BYTES: u32 = 1024;
/// CNTLID of a Connect that asks for any controller of a dynamic controller model.
pub const CNTLID_DYNAMIC: u16 = 0xffff;
/// CNTLID of a Connect that asks for any static controller.
pub const CNTLID_STATIC: u16 = 0xfffe;
/// Highest controller identifier that may be handed out (Base 3.1.1).
pub const CNTLID_MAX: u16 = 0xffef;
/// Longest NQN in bytes, its terminating zero not counted (Base 4.7).
pub const NQN_MAX_BYTES: usize = 223;
/// The well known discovery service NQN (Base 4.7).
pub const DISCOVERY_NQN: &str = "nqn.2014-08.org.nvmexpress.discovery";
/// Entries of an admin queue that Connect may ask for at least (Base 3.3.3.1).
pub const MIN_ADMIN_QUEUE_ENTRIES: u32 = 32;

wire! {
    /// Connect command data: Base 6.3.
    pub struct ConnectData: 1024 {
        /// 0: host identifier.
        pub hostid: [u8; 16],
        /// 16: controller wanted, or one of [`CNTLID_DYNAMIC`], [`CNTLID_STATIC`].
        pub cntlid: U16,
        reserved18: [u8; 238],
        /// 256: NQN of the subsystem, ended by a zero.
        pub subnqn: [u8; 256],
        /// 512: NQN of the host, ended by a zero.
        pub hostnqn: [u8; 256],
        reserved768: [u8; 256],
    }
}

impl ConnectData {
    /// Offset of HOSTID, for [`InvalidParameter`].
    pub const OFFSET_HOSTID: u16 = 0;
    /// Offset of CNTLID, for [`InvalidParameter`].
    pub const OFFSET_CNTLID: u16 = 16;
    /// Offset of SUBNQN, for [`InvalidParameter`].
    pub const OFFSET_SUBNQN: u16 = 256;
    /// Offset of HOSTNQN, for [`InvalidParameter`].
    pub const OFFSET_HOSTNQN: u16 = 512;

    /// From the transferred bytes.
    ///
    /// # Errors
    /// Data SGL Length Invalid if there are fewer than 1024.
    pub fn parse(bytes: &[u8]) -> Result<Self, Status> {
        Self::read_from_prefix(bytes).map(|(data, _)| data).map_err(|_| Status::DATA_SGL_LENGTH_INVALID.dnr())
    }

    /// The subsystem NQN, if it is UTF-8, not empty, not too long and ended by a zero.
    pub fn subnqn(&self) -> Option<&str> {
        nqn(&self.subnqn)
    }

    /// The host NQN, if it is UTF-8, not empty, not too long and ended by a zero.
    pub fn hostnqn(&self) -> Option<&str> {
        nqn(&self.hostnqn)
    }
}

fn nqn(field: &[u8; 256]) -> Option<&str> {
    nul_text(field).filter(|nqn| !nqn.is_empty() && nqn.len() <= NQN_MAX_BYTES)
}

/// Where a Connect went wrong: dword 0 of its completion with Connect Invalid
/// Parameters (Base 6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidParameter {
    /// Byte offset of the parameter.
    pub offset: u16,
    /// True if the offset counts from the start of the data, not of the command.
    pub in_data: bool,
}

impl InvalidParameter {
    /// QID in the command.
    pub const QID: Self = Self::command(42);
    /// SQSIZE in the command.
    pub const SQSIZE: Self = Self::command(44);
    /// KATO in the command.
    pub const KATO: Self = Self::command(48);
    /// CNTLID in the data.
    pub const CNTLID: Self = Self::data(ConnectData::OFFSET_CNTLID);
    /// HOSTID in the data.
    pub const HOSTID: Self = Self::data(ConnectData::OFFSET_HOSTID);
    /// SUBNQN in the data.
    pub const SUBNQN: Self = Self::data(ConnectData::OFFSET_SUBNQN);
    /// HOSTNQN in the data.
    pub const HOSTNQN: Self = Self::data(ConnectData::OFFSET_HOSTNQN);

    /// At a byte of the submission queue entry.
    pub const fn command(offset: u16) -> Self {
        Self { offset, in_data: false }
    }

    /// At a byte of the Connect data.
    pub const fn data(offset: u16) -> Self {
        Self { offset, in_data: true }
    }

    /// IPO in bits 15:0, IATTR in bits 23:16.
    pub const fn dw0(self) -> u32 {
        self.offset as u32 | (self.in_data as u32) << 16
    }

    /// From dword 0 of a completion.
    pub const fn from_dw0(dw0: u32) -> Self {
        Self { offset: dw0 as u16, in_data: dw0 & 1 << 16 != 0 }
    }
}

bits! {
    /// Dword 0 of a successful Connect: Base 6.3.
    ConnectResult: u32 {
        /// Controller identifier.
        cntlid / with_cntlid: 0..=15,
        /// Authentication transaction required.
        atr / with_atr: 16..=16,
        /// Authentication and secure channel required.
        ascr / with_ascr: 17..=17,
    }
}

/// A controller property that message-based controllers have: Base 3.1.4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Property {
    /// 00h, 8 bytes: controller capabilities.
    Cap,
    /// 08h: version.
    Vs,
    /// 14h: controller configuration.
    Cc,
    /// 1Ch: controller status.
    Csts,
    /// 20h: NVM subsystem reset.
    Nssr,
    /// 64h: NVM subsystem shutdown.
    Nssd,
    /// 68h: controller ready timeouts.
    Crto,
}

impl Property {
    /// From an offset (OFST).
    pub const fn from_offset(offset: u32) -> Option<Self> {
        Some(match offset {
            0x00 => Property::Cap,
            0x08 => Property::Vs,
            0x14 => Property::Cc,
            0x1c => Property::Csts,
            0x20 => Property::Nssr,
            0x64 => Property::Nssd,
            0x68 => Property::Crto,
            _ => return None,
        })
    }

    /// The offset (OFST).
    pub const fn offset(self) -> u32 {
        match self {
            Property::Cap => 0x00,
            Property::Vs => 0x08,
            Property::Cc => 0x14,
            Property::Csts => 0x1c,
            Property::Nssr => 0x20,
            Property::Nssd => 0x64,
            Property::Crto => 0x68,
        }
    }

    /// Bytes: 8 for CAP, 4 for all others.
    pub const fn size_bytes(self) -> u8 {
        match self {
            Property::Cap => 8,
            _ => 4,
        }
    }
}

bits! {
    /// Controller Capabilities: Base 3.1.4.1.
    Cap: u64 {
        /// Maximum queue entries supported, 0's-based.
        mqes / with_mqes: 0..=15,
        /// Contiguous queues required; 1 on message-based transports.
        cqr / with_cqr: 16..=16,
        /// Arbitration mechanisms supported beside round robin.
        ams / with_ams: 17..=18,
        /// Worst case time to become ready or not ready, in 500 ms.
        to / with_to: 24..=31,
        /// Doorbell stride.
        dstrd / with_dstrd: 32..=35,
        /// NVM subsystem reset supported.
        nssrs / with_nssrs: 36..=36,
        /// Command sets supported: bit 0 NVM, bit 6 several with CNS 1Ch, bit 7 none.
        css / with_css: 37..=44,
        /// Boot partition support.
        bps / with_bps: 45..=45,
        /// Controller power scope.
        cps / with_cps: 46..=47,
        /// Smallest memory page, 2^(12 + n) bytes.
        mpsmin / with_mpsmin: 48..=51,
        /// Largest memory page, 2^(12 + n) bytes.
        mpsmax / with_mpsmax: 52..=55,
        /// Persistent memory region supported.
        pmrs / with_pmrs: 56..=56,
        /// Controller memory buffer supported.
        cmbs / with_cmbs: 57..=57,
        /// NVM subsystem shutdown supported.
        nsss / with_nsss: 58..=58,
        /// Ready modes: bit 0 with media, bit 1 independent of media.
        crms / with_crms: 59..=60,
    }
}

bits! {
    /// Version: Base 3.1.4.2.
    Vs: u32 {
        /// Tertiary version.
        ter / with_ter: 0..=7,
        /// Minor version.
        mnr / with_mnr: 8..=15,
        /// Major version.
        mjr / with_mjr: 16..=31,
    }
}

impl Vs {
    /// 2.1.0
    pub const V2_1: Vs = Vs(0x0002_0100);
}

bits! {
    /// Controller Configuration: Base 3.1.4.5.
    Cc: u32 {
        /// Enable.
        en / with_en: 0..=0,
        /// I/O command set selected: 0 NVM, 6 all supported, 7 admin only.
        css / with_css: 4..=6,
        /// Memory page size, 2^(12 + n) bytes.
        mps / with_mps: 7..=10,
        /// Arbitration mechanism selected.
        ams / with_ams: 11..=13,
        /// Shutdown notification: 0 none, 1 normal, 2 abrupt.
        shn / with_shn: 14..=15,
        /// I/O submission queue entry size, a power of two.
        iosqes / with_iosqes: 16..=19,
        /// I/O completion queue entry size, a power of two.
        iocqes / with_iocqes: 20..=23,
        /// Controller ready independent of media.
        crime / with_crime: 24..=24,
    }
}

bits! {
    /// Controller Status: Base 3.1.4.6.
    Csts: u32 {
        /// Ready.
        rdy / with_rdy: 0..=0,
        /// Controller fatal status.
        cfs / with_cfs: 1..=1,
        /// Shutdown status: 0 normal operation, 1 in progress, 2 complete.
        shst / with_shst: 2..=3,
        /// NVM subsystem reset occurred.
        nssro / with_nssro: 4..=4,
        /// Processing paused.
        pp / with_pp: 5..=5,
        /// Shutdown type: 1 of the NVM subsystem.
        st / with_st: 6..=6,
    }
}

bits! {
    /// Controller Ready Timeouts: Base 3.1.4.21.
    Crto: u32 {
        /// Ready with media timeout, in 500 ms.
        crwmt / with_crwmt: 0..=15,
        /// Ready independent of media timeout, in 500 ms.
        crimt / with_crimt: 16..=31,
    }
}

/// Written to NSSR, this resets the NVM subsystem ("NVMe").
pub const NSSR_MAGIC: u32 = 0x4e56_4d65;

/// SECP of authentication commands: NVMe security protocol (Base 6.2).
pub const SECP_NVME: u8 = 0xe9;

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::{FromZeros, IntoBytes};

    #[test]
    fn connect_data_offsets() {
        let mut data = ConnectData::new_zeroed();
        data.cntlid = U16::new(0xffff);
        data.subnqn[0] = b's';
        data.hostnqn[0] = b'h';
        let bytes = data.as_bytes();
        assert_eq!((bytes[16], bytes[17], bytes[256], bytes[512]), (0xff, 0xff, b's', b'h'));
        let parsed = ConnectData::parse(bytes).unwrap();
        assert_eq!((parsed.subnqn(), parsed.hostnqn()), (Some("s"), Some("h")));
        assert!(ConnectData::parse(&bytes[..1023]).is_err());
    }

    #[test]
    fn nqns_must_be_ended_and_short_enough() {
        let mut data = ConnectData::new_zeroed();
        assert_eq!(data.subnqn(), None);
        data.subnqn = [b'x'; 256];
        assert_eq!(data.subnqn(), None);
        data.subnqn[224] = 0;
        assert_eq!(data.subnqn(), None);
        data.subnqn[223] = 0;
        assert_eq!(data.subnqn().map(str::len), Some(223));
        data.subnqn[0] = 0xff;
        assert_eq!(data.subnqn(), None);
    }

    #[test]
    fn registers() {
        let cap = Cap::default().with_mqes(127).with_cqr(1).with_to(30).with_css(0xc1).with_crms(1);
        assert_eq!(cap.0, 127 | 1 << 16 | 30 << 24 | 0xc1 << 37 | 1 << 59);
        assert_eq!((cap.css(), cap.mqes()), (0xc1, 127));
        let cc = Cc(0x0046_0001);
        assert_eq!((cc.en(), cc.iosqes(), cc.iocqes(), cc.shn()), (1, 6, 4, 0));
        assert_eq!(cc.with_shn(1).0, 0x0046_4001);
        assert_eq!(Csts::default().with_rdy(1).with_shst(2).0, 9);
        assert_eq!((Vs::V2_1.mjr(), Vs::V2_1.mnr(), Vs::V2_1.ter()), (2, 1, 0));
        assert_eq!(Vs::default().with_mjr(u32::MAX).0, 0xffff_0000);
        for offset in 0..=0x100 {
            if let Some(property) = Property::from_offset(offset) {
                assert_eq!(property.offset(), offset);
            }
        }
    }

    #[test]
    fn invalid_parameter_dword() {
        assert_eq!(InvalidParameter::SUBNQN.dw0(), 0x0001_0100);
        assert_eq!(InvalidParameter::SQSIZE.dw0(), 44);
        assert_eq!(InvalidParameter::from_dw0(0x0001_0200), InvalidParameter::HOSTNQN);
    }
}
