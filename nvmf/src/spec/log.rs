//! Log pages: Base 5.1.12.1, 5.1.12.3.

use zerocopy::little_endian::{U16, U32, U64, U128};

/// Log page identifiers: Base 5.1.12.1.
pub mod lid {
    /// Supported Log Pages.
    pub const SUPPORTED_LOG_PAGES: u8 = 0x00;
    /// Error Information.
    pub const ERROR_INFORMATION: u8 = 0x01;
    /// SMART / Health Information.
    pub const SMART: u8 = 0x02;
    /// Firmware Slot Information.
    pub const FIRMWARE_SLOT: u8 = 0x03;
    /// Changed Attached Namespace List.
    pub const CHANGED_NAMESPACES: u8 = 0x04;
    /// Commands Supported and Effects.
    pub const COMMAND_EFFECTS: u8 = 0x05;
    /// Device Self-test.
    pub const SELF_TEST: u8 = 0x06;
    /// Endurance Group Information.
    pub const ENDURANCE_GROUP: u8 = 0x09;
    /// Asymmetric Namespace Access.
    pub const ANA: u8 = 0x0c;
    /// Persistent Event Log.
    pub const PERSISTENT_EVENT: u8 = 0x0d;
    /// Feature Identifiers Supported and Effects.
    pub const FEATURE_EFFECTS: u8 = 0x12;
    /// Discovery.
    pub const DISCOVERY: u8 = 0x70;
    /// Reservation Notification.
    pub const RESERVATION: u8 = 0x80;
}

wire! {
    /// One entry of Error Information (01h): Base 5.1.12.1.
    pub struct ErrorEntry: 64 {
        /// 0: running number from 1; 0 marks an unused entry.
        pub error_count: U64,
        /// 8: submission queue; FFFFh if none.
        pub sqid: U16,
        /// 10: command; FFFFh if none.
        pub cid: U16,
        /// 12: status field with the phase tag in bit 0.
        pub status_field: U16,
        /// 14: parameter error location: byte in 7:0, bit in 10:8; FFFFh if none.
        pub pel: U16,
        /// 16: first logical block with the error.
        pub lba: U64,
        /// 24: namespace.
        pub nsid: U32,
        /// 28: log page of vendor specific information; 0 if none.
        pub vsia: u8,
        /// 29: transport; see [`trtype`].
        pub trtype: u8,
        /// 30: command set, valid from LPVER 1.
        pub csi: u8,
        /// 31: opcode, valid from LPVER 1.
        pub opcode: u8,
        /// 32: command specific.
        pub csinfo: U64,
        /// 40: transport type specific.
        pub ttsi: U16,
        reserved42: [u8; 21],
        /// 63: version of the entry.
        pub lpver: u8,
    }
}

wire! {
    /// SMART / Health Information (02h): Base 5.1.12.1.
    pub struct SmartLog: 512 {
        /// 0: critical warnings, a bit each.
        pub critical_warning: u8,
        /// 1: composite temperature, kelvin.
        pub temperature: U16,
        /// 3: available spare, percent.
        pub available_spare: u8,
        /// 4: threshold of the spare, percent.
        pub spare_threshold: u8,
        /// 5: percentage used, up to 255.
        pub percentage_used: u8,
        /// 6: endurance group critical warning summary.
        pub egcws: u8,
        reserved7: [u8; 25],
        /// 32: data read by the host, in 1000 units of 512 bytes, rounded up.
        pub data_units_read: U128,
        /// 48: data written by the host, in 1000 units of 512 bytes, rounded up.
        pub data_units_written: U128,
        /// 64: read commands.
        pub host_reads: U128,
        /// 80: write commands.
        pub host_writes: U128,
        /// 96: time busy with I/O, minutes.
        pub busy_time: U128,
        /// 112: power cycles.
        pub power_cycles: U128,
        /// 128: power on hours.
        pub power_on_hours: U128,
        /// 144: unexpected power losses.
        pub unsafe_shutdowns: U128,
        /// 160: unrecovered data integrity errors.
        pub media_errors: U128,
        /// 176: entries of the error log over the life of the controller.
        pub error_log_entries: U128,
        /// 192: minutes above the warning temperature.
        pub warning_temp_time: U32,
        /// 196: minutes above the critical temperature.
        pub critical_temp_time: U32,
        /// 200: temperature sensors, kelvin.
        pub sensors: [U16; 8],
        /// 216: transitions of thermal management temperature 1 and 2.
        pub thermal_transitions: [U32; 2],
        /// 224: total time of thermal management temperature 1 and 2, seconds.
        pub thermal_time: [U32; 2],
        reserved232: [u8; 280],
    }
}

wire! {
    /// Firmware Slot Information (03h): Base 5.1.12.1.
    pub struct FirmwareSlots: 512 {
        /// 0: active slot in 2:0, slot of the next reset in 6:4.
        pub afi: u8,
        reserved1: [u8; 7],
        /// 8: revisions of slots 1 to 7, ASCII; zeros if none.
        pub frs: [[u8; 8]; 7],
        reserved64: [u8; 448],
    }
}

/// What the Changed Attached Namespace List (04h) starts with when more than
/// 1024 namespaces changed. The log itself is [`super::identify::NamespaceList`].
pub const CHANGED_NAMESPACES_OVERFLOW: u32 = 0xffff_ffff;

wire! {
    /// Commands Supported and Effects (05h): Base 5.1.12.1.
    pub struct CommandEffects: 4096 {
        /// Admin commands by opcode; see [`Effects`].
        pub admin: [U32; 256],
        /// I/O commands by opcode; see [`Effects`].
        pub io: [U32; 256],
        reserved2048: [u8; 2048],
    }
}

bits! {
    /// Effects of one command: Base 5.1.12.1.
    Effects: u32 {
        /// Command supported.
        csupp / with_csupp: 0..=0,
        /// Logical block content may change.
        lbcc / with_lbcc: 1..=1,
        /// Namespace capability may change.
        ncc / with_ncc: 2..=2,
        /// Namespace inventory may change.
        nic / with_nic: 3..=3,
        /// Controller capability may change.
        ccc / with_ccc: 4..=4,
        /// Submission and execution relaxations.
        cser / with_cser: 14..=15,
        /// Submission and execution: 0 no restriction, 1 alone in the namespace, 2 alone.
        cse / with_cse: 16..=18,
        /// UUID selection supported.
        uss / with_uss: 19..=19,
        /// Scope.
        csp / with_csp: 20..=31,
    }
}

wire! {
    /// Supported Log Pages (00h): Base 5.1.12.1. By log identifier; see [`LogSupport`].
    pub struct SupportedLogPages: 1024 {
        /// One dword for each identifier.
        pub lid: [U32; 256],
    }
}

bits! {
    /// One entry of Supported Log Pages: Base 5.1.12.1.
    LogSupport: u32 {
        /// Log page supported.
        lsupp / with_lsupp: 0..=0,
        /// Index offset supported.
        ios / with_ios: 1..=1,
        /// Specific to the log page.
        lidsp / with_lidsp: 16..=31,
    }
}

wire! {
    /// Feature Identifiers Supported and Effects (12h): Base 5.1.12.1. See [`FeatureEffect`].
    pub struct FeatureEffects: 1024 {
        /// One dword for each feature identifier.
        pub fid: [U32; 256],
    }
}

bits! {
    /// One entry of Feature Identifiers Supported and Effects: Base 5.1.12.1.
    FeatureEffect: u32 {
        /// Feature supported.
        fsupp / with_fsupp: 0..=0,
        /// User data content may change.
        udcc / with_udcc: 1..=1,
        /// Namespace capability may change.
        ncc / with_ncc: 2..=2,
        /// Namespace inventory may change.
        nic / with_nic: 3..=3,
        /// Controller capability may change.
        ccc / with_ccc: 4..=4,
        /// UUID selection supported.
        uss / with_uss: 19..=19,
        /// Scope: bit 0 namespace, bit 1 controller.
        fsp / with_fsp: 20..=31,
    }
}

/// State of an ANA group: Base 8.1.1.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum AnaState {
    /// 1h
    Optimized = 0x1,
    /// 2h
    NonOptimized = 0x2,
    /// 3h
    Inaccessible = 0x3,
    /// 4h
    PersistentLoss = 0x4,
    /// Fh: in transition.
    Change = 0xf,
}

impl AnaState {
    /// From bits 3:0 of a descriptor.
    pub const fn from_value(value: u8) -> Option<AnaState> {
        Some(match value {
            0x1 => AnaState::Optimized,
            0x2 => AnaState::NonOptimized,
            0x3 => AnaState::Inaccessible,
            0x4 => AnaState::PersistentLoss,
            0xf => AnaState::Change,
            _ => return None,
        })
    }

    /// The name that SPDK's RPCs and nvme-cli use.
    pub const fn name(self) -> &'static str {
        match self {
            AnaState::Optimized => "optimized",
            AnaState::NonOptimized => "non-optimized",
            AnaState::Inaccessible => "inaccessible",
            AnaState::PersistentLoss => "persistent-loss",
            AnaState::Change => "change",
        }
    }
}

wire! {
    /// Header of Asymmetric Namespace Access (0Ch): Base 5.1.12.1.
    pub struct AnaHeader: 16 {
        /// 0: counts changes of the log; 0 is not reported.
        pub chgcnt: U64,
        /// 8: descriptors that follow.
        pub ngrps: U16,
        reserved10: [u8; 6],
    }
}

wire! {
    /// ANA Group Descriptor, followed by its NSIDs: Base 5.1.12.1.
    pub struct AnaGroup: 32 {
        /// 0: group.
        pub agid: U32,
        /// 4: NSIDs that follow (none if RGO was set).
        pub nnsids: U32,
        /// 8: counts changes of the group; 0 is not reported.
        pub chgcnt: U64,
        /// 16: an [`AnaState`] in bits 3:0.
        pub state: u8,
        reserved17: [u8; 15],
    }
}

/// Bit of LSP that asks the ANA log for groups without their NSIDs.
pub const ANA_RETURN_GROUPS_ONLY: u8 = 1;

wire! {
    /// Header of the Discovery log (70h): Base 5.1.12.1.
    pub struct DiscoveryHeader: 1024 {
        /// 0: generation counter.
        pub genctr: U64,
        /// 8: entries that follow.
        pub numrec: U64,
        /// 16: record format, 0.
        pub recfmt: U16,
        /// 18: features of the log page.
        pub dlpf: u8,
        reserved19: u8,
        /// 20: total length, extended log only.
        pub tdlpl: U32,
        reserved24: [u8; 1000],
    }
}

wire! {
    /// Discovery Log Page Entry: Base 5.1.12.1.
    pub struct DiscoveryEntry: 1024 {
        /// 0: transport; see [`trtype`].
        pub trtype: u8,
        /// 1: address family; see [`adrfam`].
        pub adrfam: u8,
        /// 2: kind of subsystem; see [`subtype`].
        pub subtype: u8,
        /// 3: transport requirements: bits 1:0 secure channel (0 not said, 1 required,
        /// 2 not required), bit 2 SQ flow control can be disabled.
        pub treq: u8,
        /// 4: port.
        pub portid: U16,
        /// 6: FFFFh for a dynamic controller model.
        pub cntlid: U16,
        /// 8: admin queue entries at most, a count of at least 32.
        pub asqsz: U16,
        /// 10: flags; see [`eflags`].
        pub eflags: U16,
        reserved12: [u8; 20],
        /// 32: transport service identifier, ASCII, padded with spaces.
        pub trsvcid: [u8; 32],
        reserved64: [u8; 192],
        /// 256: NQN, ended and padded with zeros.
        pub subnqn: [u8; 256],
        /// 512: transport address, ASCII, padded with spaces.
        pub traddr: [u8; 256],
        /// 768: transport specific; for TCP byte 0 is SECTYPE (0 none, 1 TLS 1.2, 2 TLS 1.3).
        pub tsas: [u8; 256],
    }
}

impl DiscoveryEntry {
    /// Sets TRADDR and TRSVCID, padded with spaces.
    pub fn set_address(&mut self, traddr: &str, trsvcid: &str) {
        super::fill_text(&mut self.traddr, traddr, b' ');
        super::fill_text(&mut self.trsvcid, trsvcid, b' ');
    }

    /// Sets SUBNQN, padded with zeros.
    pub fn set_subnqn(&mut self, nqn: &str) {
        super::fill_text(&mut self.subnqn, nqn, 0);
    }
}

/// Transport types (TRTYPE).
pub mod trtype {
    /// RDMA.
    pub const RDMA: u8 = 1;
    /// Fibre Channel.
    pub const FC: u8 = 2;
    /// TCP.
    pub const TCP: u8 = 3;
    /// Within the host.
    pub const LOOP: u8 = 0xfe;
}

/// Address families (ADRFAM).
pub mod adrfam {
    /// IPv4.
    pub const IPV4: u8 = 1;
    /// IPv6.
    pub const IPV6: u8 = 2;
    /// InfiniBand.
    pub const IB: u8 = 3;
    /// Fibre Channel.
    pub const FC: u8 = 4;
}

/// Kinds of subsystem (SUBTYPE).
pub mod subtype {
    /// A discovery subsystem somewhere else.
    pub const REFERRAL: u8 = 1;
    /// An NVM subsystem.
    pub const NVM: u8 = 2;
    /// The discovery subsystem that answers.
    pub const CURRENT_DISCOVERY: u8 = 3;
}

/// Bits of EFLAGS.
pub mod eflags {
    /// The same information is to be had from other entries of the subsystem (DUPRETINFO).
    pub const DUPLICATE: u16 = 1 << 0;
    /// Explicit persistent connections to the discovery controller (EPCSD).
    pub const PERSISTENT: u16 = 1 << 1;
    /// No connectivity to a CDC (NCC).
    pub const NO_CDC: u16 = 1 << 2;
}

wire! {
    /// Reservation Notification (80h): Base 5.1.12.1.
    pub struct ReservationNotification: 64 {
        /// 0: running number of the log page; 0 if there is none.
        pub log_page_count: U64,
        /// 8: 0 empty, 1 registration preempted, 2 released, 3 preempted.
        pub kind: u8,
        /// 9: further log pages available, up to 255.
        pub available: u8,
        reserved10: [u8; 2],
        /// 12: namespace.
        pub nsid: U32,
        reserved16: [u8; 48],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;
    use zerocopy::{FromZeros, IntoBytes};

    #[test]
    fn offsets() {
        for (field, offset) in [
            (offset_of!(ErrorEntry, status_field), 12),
            (offset_of!(ErrorEntry, lba), 16),
            (offset_of!(ErrorEntry, trtype), 29),
            (offset_of!(ErrorEntry, lpver), 63),
            (offset_of!(SmartLog, data_units_read), 32),
            (offset_of!(SmartLog, error_log_entries), 176),
            (offset_of!(SmartLog, sensors), 200),
            (offset_of!(SmartLog, thermal_time), 224),
            (offset_of!(FirmwareSlots, frs), 8),
            (offset_of!(CommandEffects, io), 1024),
            (offset_of!(AnaGroup, state), 16),
            (offset_of!(DiscoveryHeader, recfmt), 16),
            (offset_of!(DiscoveryEntry, trsvcid), 32),
            (offset_of!(DiscoveryEntry, subnqn), 256),
            (offset_of!(DiscoveryEntry, traddr), 512),
            (offset_of!(DiscoveryEntry, tsas), 768),
            (offset_of!(ReservationNotification, nsid), 12),
        ] {
            assert_eq!(field, offset);
        }
    }

    #[test]
    fn discovery_text() {
        let mut entry = DiscoveryEntry::new_zeroed();
        entry.set_address("127.0.0.1", "4420");
        entry.set_subnqn("nqn.y");
        let bytes = entry.as_bytes();
        assert_eq!(&bytes[32..38], b"4420  ");
        assert_eq!(&bytes[512..523], b"127.0.0.1  ");
        assert_eq!(bytes[767], b' ');
        assert_eq!(&bytes[256..262], b"nqn.y\0");
    }

    #[test]
    fn effect_dwords() {
        assert_eq!(Effects::default().with_csupp(1).with_lbcc(1).with_cse(1).0, 0x0001_0003);
        assert_eq!(LogSupport::default().with_lsupp(1).with_lidsp(2).0, 0x0002_0001);
        assert_eq!(FeatureEffect::default().with_fsupp(1).with_fsp(2).0, 0x0020_0001);
    }
}
