//! Features and asynchronous events: Base 5.1.25.1, 5.1.2.

use zerocopy::little_endian::{U16, U32};

/// Feature identifiers: Base 5.1.25.
pub mod fid {
    /// Arbitration.
    pub const ARBITRATION: u8 = 0x01;
    /// Power Management.
    pub const POWER_MANAGEMENT: u8 = 0x02;
    /// Temperature Threshold.
    pub const TEMPERATURE_THRESHOLD: u8 = 0x04;
    /// Error Recovery.
    pub const ERROR_RECOVERY: u8 = 0x05;
    /// Volatile Write Cache.
    pub const VOLATILE_WRITE_CACHE: u8 = 0x06;
    /// Number of Queues.
    pub const NUMBER_OF_QUEUES: u8 = 0x07;
    /// Interrupt Coalescing.
    pub const INTERRUPT_COALESCING: u8 = 0x08;
    /// Interrupt Vector Configuration.
    pub const INTERRUPT_VECTOR: u8 = 0x09;
    /// Write Atomicity Normal.
    pub const WRITE_ATOMICITY: u8 = 0x0a;
    /// Asynchronous Event Configuration.
    pub const ASYNC_EVENT_CONFIG: u8 = 0x0b;
    /// Timestamp.
    pub const TIMESTAMP: u8 = 0x0e;
    /// Keep Alive Timer.
    pub const KEEP_ALIVE_TIMER: u8 = 0x0f;
    /// Host Behavior Support.
    pub const HOST_BEHAVIOR: u8 = 0x16;
    /// I/O Command Set Profile.
    pub const IO_COMMAND_SET_PROFILE: u8 = 0x19;
    /// Host Identifier.
    pub const HOST_IDENTIFIER: u8 = 0x81;
    /// Reservation Notification Mask.
    pub const RESERVATION_MASK: u8 = 0x82;
    /// Reservation Persistence.
    pub const RESERVATION_PERSISTENCE: u8 = 0x83;
    /// Namespace Write Protection Config.
    pub const WRITE_PROTECTION: u8 = 0x84;
}

bits! {
    /// Dword 0 of Get Features for the supported capabilities (SEL 011b): Base 5.1.11.
    Capabilities: u32 {
        /// Can be saved.
        saveable / with_saveable: 0..=0,
        /// Has a value for each namespace.
        ns_specific / with_ns_specific: 1..=1,
        /// Can be changed.
        changeable / with_changeable: 2..=2,
    }
}

bits! {
    /// Arbitration (01h).
    Arbitration: u32 {
        /// Arbitration burst, a power of two; 7 is no limit.
        ab / with_ab: 0..=2,
        /// Low priority weight, 0's-based.
        lpw / with_lpw: 8..=15,
        /// Medium priority weight, 0's-based.
        mpw / with_mpw: 16..=23,
        /// High priority weight, 0's-based.
        hpw / with_hpw: 24..=31,
    }
}

bits! {
    /// Power Management (02h).
    PowerManagement: u32 {
        /// Power state.
        ps / with_ps: 0..=4,
        /// Workload hint.
        wh / with_wh: 5..=7,
    }
}

bits! {
    /// Temperature Threshold (04h).
    TemperatureThreshold: u32 {
        /// Threshold, kelvin.
        tmpth / with_tmpth: 0..=15,
        /// Sensor: 0 composite, 1 to 8, 15 all.
        tmpsel / with_tmpsel: 16..=19,
        /// 0 over, 1 under.
        thsel / with_thsel: 20..=21,
    }
}

bits! {
    /// Error Recovery (05h).
    ErrorRecovery: u32 {
        /// Time limited error recovery, in 100 ms.
        tler / with_tler: 0..=15,
        /// Errors for deallocated blocks.
        dulbe / with_dulbe: 16..=16,
    }
}

bits! {
    /// Volatile Write Cache (06h).
    VolatileWriteCache: u32 {
        /// Enabled.
        wce / with_wce: 0..=0,
    }
}

bits! {
    /// Write Atomicity Normal (0Ah).
    WriteAtomicity: u32 {
        /// Disable normal.
        dn / with_dn: 0..=0,
    }
}

/// Number of Queues (07h) as counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NumberOfQueues {
    /// I/O submission queues, at least 1.
    pub submission: u32,
    /// I/O completion queues, at least 1.
    pub completion: u32,
}

impl NumberOfQueues {
    /// From dword 11 of Set Features; `None` for FFFFh, which is invalid.
    pub fn from_cdw11(cdw11: u32) -> Option<Self> {
        let (sq, cq) = (cdw11 & 0xffff, cdw11 >> 16);
        (sq != 0xffff && cq != 0xffff).then_some(Self { submission: sq + 1, completion: cq + 1 })
    }

    /// Dword 0 of the completion. Both counts must be 1 to 65536.
    pub fn dw0(self) -> u32 {
        let wire = |count: u32| {
            assert!((1..=65536).contains(&count), "{count} queues");
            count - 1
        };
        wire(self.submission) | wire(self.completion) << 16
    }
}

bits! {
    /// Asynchronous Event Configuration (0Bh), and OAES of Identify Controller: Base 5.1.25.
    AsyncEventConfig: u32 {
        /// SMART critical warnings, as in the log.
        smart / with_smart: 0..=7,
        /// Attached namespace attribute notices.
        ns_attribute / with_ns_attribute: 8..=8,
        /// Firmware activation notices.
        firmware_activation / with_firmware_activation: 9..=9,
        /// Telemetry log notices.
        telemetry / with_telemetry: 10..=10,
        /// ANA change notices.
        ana_change / with_ana_change: 11..=11,
        /// Discovery log page change notices.
        discovery_change / with_discovery_change: 31..=31,
    }
}

bits! {
    /// Keep Alive Timer (0Fh).
    KeepAliveTimer: u32 {
        /// Timeout in milliseconds; 0 disables it.
        kato_ms / with_kato_ms: 0..=31,
    }
}

bits! {
    /// Host Identifier (81h), dword 11.
    HostIdentifier: u32 {
        /// The identifier has 128 bits.
        exhid / with_exhid: 0..=0,
    }
}

bits! {
    /// Reservation Notification Mask (82h): a set bit keeps the notice from the host.
    ReservationMask: u32 {
        /// Registration preempted.
        regpre / with_regpre: 1..=1,
        /// Reservation released.
        resrel / with_resrel: 2..=2,
        /// Reservation preempted.
        respre / with_respre: 3..=3,
    }
}

bits! {
    /// Reservation Persistence (83h).
    ReservationPersistence: u32 {
        /// Persist through power loss.
        ptpl / with_ptpl: 0..=0,
    }
}

bits! {
    /// Namespace Write Protection Config (84h).
    WriteProtection: u32 {
        /// 0 none, 1 write protect, 2 until power cycle, 3 permanent.
        wps / with_wps: 0..=2,
    }
}

wire! {
    /// Timestamp (0Eh): data of Get and Set Features.
    pub struct Timestamp: 8 {
        /// 0: low 32 of 48 bits of milliseconds since 1970.
        pub low: U32,
        /// 4: high 16 bits.
        pub high: U16,
        /// 6: bit 0 the clock stood still at times, bits 3:1 origin (1: Set Features).
        pub attributes: u8,
        reserved7: u8,
    }
}

wire! {
    /// Host Behavior Support (16h): data of Get and Set Features.
    pub struct HostBehavior: 512 {
        /// 0: advanced command retry enable: the host obeys CRD.
        pub acre: u8,
        /// 1: extended telemetry data area 4 supported.
        pub etdas: u8,
        /// 2: LBA format extension enable.
        pub lbafee: u8,
        /// 3: host dispersed namespace support.
        pub hdisns: u8,
        /// 4: copy descriptor formats enable.
        pub cdfe: U16,
        reserved6: [u8; 506],
    }
}

/// An asynchronous event: dword 0 of the completion (Base 5.1.2).
///
/// ```text
///  31     24 23    16 15     8 7   3 2    0
/// +---------+--------+--------+-----+------+
/// |reserved |  LID   |  info  |  -  | type |
/// +---------+--------+--------+-----+------+
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AsyncEvent {
    /// Event type; see the constants.
    pub kind: u8,
    /// Event information.
    pub info: u8,
    /// Log page to read.
    pub lid: u8,
}

impl AsyncEvent {
    /// Type 0h: error.
    pub const TYPE_ERROR: u8 = 0;
    /// Type 1h: SMART and health status.
    pub const TYPE_SMART: u8 = 1;
    /// Type 2h: notice.
    pub const TYPE_NOTICE: u8 = 2;
    /// Type 6h: I/O command specific status.
    pub const TYPE_IO_COMMAND_SET: u8 = 6;

    /// An attached namespace was added, removed, or changed what Identify says of it.
    pub const NAMESPACE_CHANGED: Self = Self::notice(0x00, super::log::lid::CHANGED_NAMESPACES);
    /// Asymmetric namespace access changed.
    pub const ANA_CHANGED: Self = Self::notice(0x03, super::log::lid::ANA);
    /// The discovery log changed.
    pub const DISCOVERY_CHANGED: Self = Self::notice(0xf0, super::log::lid::DISCOVERY);
    /// The reservation log has a page.
    pub const RESERVATION: Self =
        Self { kind: Self::TYPE_IO_COMMAND_SET, info: 0x00, lid: super::log::lid::RESERVATION };

    const fn notice(info: u8, lid: u8) -> Self {
        Self { kind: Self::TYPE_NOTICE, info, lid }
    }

    /// Dword 0 of the completion.
    pub const fn dw0(self) -> u32 {
        self.kind as u32 & 7 | (self.info as u32) << 8 | (self.lid as u32) << 16
    }

    /// From dword 0 of a completion.
    pub const fn from_dw0(dw0: u32) -> Self {
        Self { kind: dw0 as u8 & 7, info: (dw0 >> 8) as u8, lid: (dw0 >> 16) as u8 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_are_counts() {
        let queues = NumberOfQueues::from_cdw11(0x0003_0007).unwrap();
        assert_eq!((queues.submission, queues.completion), (8, 4));
        assert_eq!(queues.dw0(), 0x0003_0007);
        assert_eq!(NumberOfQueues::from_cdw11(0xffff), None);
        assert_eq!(NumberOfQueues::from_cdw11(0xffff_0000), None);
    }

    #[test]
    fn events() {
        assert_eq!(AsyncEvent::NAMESPACE_CHANGED.dw0(), 0x0004_0002);
        assert_eq!(AsyncEvent::ANA_CHANGED.dw0(), 0x000c_0302);
        assert_eq!(AsyncEvent::DISCOVERY_CHANGED.dw0(), 0x0070_f002);
        assert_eq!(AsyncEvent::RESERVATION.dw0(), 0x0080_0006);
        assert_eq!(AsyncEvent::from_dw0(0x0070_f002), AsyncEvent::DISCOVERY_CHANGED);
    }

    #[test]
    fn config_bits() {
        let config = AsyncEventConfig(0x8000_0900);
        assert_eq!((config.ns_attribute(), config.ana_change(), config.discovery_change()), (1, 1, 1));
        assert_eq!(config.smart(), 0);
        assert_eq!(KeepAliveTimer(u32::MAX).with_kato_ms(5).kato_ms(), 5);
    }
}
