//! Completion status: Base 4.2.3.
//!
//! ```text
//!  14   13   12 11   10  8   7    0
//! +-----+---+------+-------+-------+
//! | DNR | M | CRD  |  SCT  |  SC   |
//! +-----+---+------+-------+-------+
//! ```
//!
//! The phase tag that shares the 16 bits with it in a completion queue entry is
//! not part of [`Status`]; message-based transports keep it at zero.

use std::fmt;

/// A 15-bit completion status.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Status(u16);

/// Status Code Type: Base 4.2.3.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StatusCodeType {
    /// 0h: applies to any command.
    Generic,
    /// 1h: meaning depends on the command.
    CommandSpecific,
    /// 2h: media and data integrity.
    Media,
    /// 3h: the path to the namespace, not the namespace.
    Path,
    /// 7h: vendor specific.
    Vendor,
    /// 4h to 6h.
    Reserved(u8),
}

const DNR: u16 = 1 << 14;
const MORE: u16 = 1 << 13;
const CRD_SHIFT: u32 = 11;

impl Status {
    /// From a status code type (0 to 7) and a status code.
    pub const fn new(sct: u8, sc: u8) -> Self {
        Self(((sct as u16 & 7) << 8) | sc as u16)
    }

    /// From the 16-bit field of a completion queue entry; the phase tag is dropped.
    pub const fn from_field(field: u16) -> Self {
        Self(field >> 1)
    }

    /// The 16-bit field of a completion queue entry with a phase tag of zero.
    pub const fn to_field(self) -> u16 {
        self.0 << 1
    }

    /// Status Code Type, raw.
    pub const fn sct(self) -> u8 {
        (self.0 >> 8) as u8 & 7
    }

    /// Status Code.
    pub const fn sc(self) -> u8 {
        self.0 as u8
    }

    /// Status Code Type.
    pub const fn code_type(self) -> StatusCodeType {
        match self.sct() {
            0 => StatusCodeType::Generic,
            1 => StatusCodeType::CommandSpecific,
            2 => StatusCodeType::Media,
            3 => StatusCodeType::Path,
            7 => StatusCodeType::Vendor,
            n => StatusCodeType::Reserved(n),
        }
    }

    /// True for Successful Completion, whatever the other bits say.
    pub const fn is_success(self) -> bool {
        self.sct() == 0 && self.sc() == 0
    }

    /// The same status with Do Not Retry set.
    #[must_use]
    pub const fn dnr(self) -> Self {
        Self(self.0 | DNR)
    }

    /// The same status with Do Not Retry cleared.
    #[must_use]
    pub const fn retryable(self) -> Self {
        Self(self.0 & !DNR)
    }

    /// Do Not Retry.
    pub const fn is_dnr(self) -> bool {
        self.0 & DNR != 0
    }

    /// The same status with More set: the Error Information log has an entry for it.
    #[must_use]
    pub const fn more(self) -> Self {
        Self(self.0 | MORE)
    }

    /// More.
    pub const fn is_more(self) -> bool {
        self.0 & MORE != 0
    }

    /// The same status with Command Retry Delay `crd` (0: none, 1 to 3: CRDT1 to CRDT3).
    #[must_use]
    pub const fn with_crd(self, crd: u8) -> Self {
        Self(self.0 & !(3 << CRD_SHIFT) | ((crd as u16 & 3) << CRD_SHIFT))
    }

    /// Command Retry Delay.
    pub const fn crd(self) -> u8 {
        (self.0 >> CRD_SHIFT) as u8 & 3
    }

    /// True if type and code are those of `other`; DNR, M and CRD do not matter.
    pub const fn same_code(self, other: Status) -> bool {
        self.0 & 0x7ff == other.0 & 0x7ff
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:x}h/{:02x}h", self.name(), self.sct(), self.sc())?;
        if self.is_dnr() {
            f.write_str(", DNR")?;
        }
        if self.crd() != 0 {
            write!(f, ", CRD {}", self.crd())?;
        }
        f.write_str(")")
    }
}

macro_rules! statuses {
    ($($sct:literal, $sc:literal, $name:ident, $text:literal;)*) => {
        impl Status {
            $(#[doc = $text] pub const $name: Status = Status::new($sct, $sc);)*

            /// The specification's name. Codes that several command sets share
            /// have the name of the first one in the list.
            pub const fn name(self) -> &'static str {
                $(if self.same_code(Status::$name) { return $text; })*
                "Unknown Status"
            }
        }

        #[cfg(test)]
        const ALL: &[(Status, &str)] = &[$((Status::$name, $text),)*];
    };
}

statuses! {
    // Generic Command Status: Base 4.2.3.1.
    0, 0x00, SUCCESS, "Successful Completion";
    0, 0x01, INVALID_OPCODE, "Invalid Command Opcode";
    0, 0x02, INVALID_FIELD, "Invalid Field in Command";
    0, 0x03, CID_CONFLICT, "Command ID Conflict";
    0, 0x04, DATA_TRANSFER_ERROR, "Data Transfer Error";
    0, 0x05, ABORTED_POWER_LOSS, "Commands Aborted due to Power Loss Notification";
    0, 0x06, INTERNAL_ERROR, "Internal Error";
    0, 0x07, ABORT_REQUESTED, "Command Abort Requested";
    0, 0x08, ABORTED_SQ_DELETION, "Command Aborted due to SQ Deletion";
    0, 0x09, ABORTED_FAILED_FUSED, "Command Aborted due to Failed Fused Command";
    0, 0x0a, ABORTED_MISSING_FUSED, "Command Aborted due to Missing Fused Command";
    0, 0x0b, INVALID_NAMESPACE_OR_FORMAT, "Invalid Namespace or Format";
    0, 0x0c, COMMAND_SEQUENCE_ERROR, "Command Sequence Error";
    0, 0x0d, INVALID_SGL_SEGMENT, "Invalid SGL Segment Descriptor";
    0, 0x0e, INVALID_SGL_COUNT, "Invalid Number of SGL Descriptors";
    0, 0x0f, DATA_SGL_LENGTH_INVALID, "Data SGL Length Invalid";
    0, 0x10, METADATA_SGL_LENGTH_INVALID, "Metadata SGL Length Invalid";
    0, 0x11, SGL_TYPE_INVALID, "SGL Descriptor Type Invalid";
    0, 0x12, INVALID_CMB_USE, "Invalid Use of Controller Memory Buffer";
    0, 0x13, PRP_OFFSET_INVALID, "PRP Offset Invalid";
    0, 0x14, ATOMIC_WRITE_UNIT_EXCEEDED, "Atomic Write Unit Exceeded";
    0, 0x15, OPERATION_DENIED, "Operation Denied";
    0, 0x16, SGL_OFFSET_INVALID, "SGL Offset Invalid";
    0, 0x18, HOSTID_INCONSISTENT_FORMAT, "Host Identifier Inconsistent Format";
    0, 0x19, KEEP_ALIVE_EXPIRED, "Keep Alive Timer Expired";
    0, 0x1a, KEEP_ALIVE_INVALID, "Keep Alive Timeout Invalid";
    0, 0x1b, ABORTED_PREEMPT, "Command Aborted due to Preempt and Abort";
    0, 0x1c, SANITIZE_FAILED, "Sanitize Failed";
    0, 0x1d, SANITIZE_IN_PROGRESS, "Sanitize In Progress";
    0, 0x1e, SGL_GRANULARITY_INVALID, "SGL Data Block Granularity Invalid";
    0, 0x1f, NOT_SUPPORTED_IN_CMB, "Command Not Supported for Queue in CMB";
    0, 0x20, NAMESPACE_WRITE_PROTECTED, "Namespace is Write Protected";
    0, 0x21, COMMAND_INTERRUPTED, "Command Interrupted";
    0, 0x22, TRANSIENT_TRANSPORT_ERROR, "Transient Transport Error";
    0, 0x23, PROHIBITED_BY_LOCKDOWN, "Command Prohibited by Command and Feature Lockdown";
    0, 0x24, ADMIN_MEDIA_NOT_READY, "Admin Command Media Not Ready";
    0, 0x25, INVALID_KEY_TAG, "Invalid Key Tag";
    0, 0x26, HOST_DISPERSED_NS_NOT_ENABLED, "Host Dispersed Namespace Support Not Enabled";
    0, 0x27, HOSTID_NOT_INITIALIZED, "Host Identifier Not Initialized";
    0, 0x28, INCORRECT_KEY, "Incorrect Key";
    0, 0x29, FDP_DISABLED, "FDP Disabled";
    0, 0x2a, INVALID_PLACEMENT_HANDLE_LIST, "Invalid Placement Handle List";
    0, 0x80, LBA_OUT_OF_RANGE, "LBA Out of Range";
    0, 0x81, CAPACITY_EXCEEDED, "Capacity Exceeded";
    0, 0x82, NAMESPACE_NOT_READY, "Namespace Not Ready";
    0, 0x83, RESERVATION_CONFLICT, "Reservation Conflict";
    0, 0x84, FORMAT_IN_PROGRESS, "Format In Progress";

    // Command Specific Status: Base 4.2.3.2.
    1, 0x00, COMPLETION_QUEUE_INVALID, "Completion Queue Invalid";
    1, 0x01, INVALID_QUEUE_IDENTIFIER, "Invalid Queue Identifier";
    1, 0x02, INVALID_QUEUE_SIZE, "Invalid Queue Size";
    1, 0x03, ABORT_LIMIT_EXCEEDED, "Abort Command Limit Exceeded";
    1, 0x05, AER_LIMIT_EXCEEDED, "Asynchronous Event Request Limit Exceeded";
    1, 0x06, INVALID_FIRMWARE_SLOT, "Invalid Firmware Slot";
    1, 0x07, INVALID_FIRMWARE_IMAGE, "Invalid Firmware Image";
    1, 0x08, INVALID_INTERRUPT_VECTOR, "Invalid Interrupt Vector";
    1, 0x09, INVALID_LOG_PAGE, "Invalid Log Page";
    1, 0x0a, INVALID_FORMAT, "Invalid Format";
    1, 0x0c, INVALID_QUEUE_DELETION, "Invalid Queue Deletion";
    1, 0x0d, FEATURE_NOT_SAVEABLE, "Feature Identifier Not Saveable";
    1, 0x0e, FEATURE_NOT_CHANGEABLE, "Feature Not Changeable";
    1, 0x0f, FEATURE_NOT_NS_SPECIFIC, "Feature Not Namespace Specific";
    1, 0x14, OVERLAPPING_RANGE, "Overlapping Range";
    1, 0x15, NS_INSUFFICIENT_CAPACITY, "Namespace Insufficient Capacity";
    1, 0x16, NSID_UNAVAILABLE, "Namespace Identifier Unavailable";
    1, 0x18, NS_ALREADY_ATTACHED, "Namespace Already Attached";
    1, 0x19, NS_PRIVATE, "Namespace Is Private";
    1, 0x1a, NS_NOT_ATTACHED, "Namespace Not Attached";
    1, 0x1b, THIN_PROVISIONING_NOT_SUPPORTED, "Thin Provisioning Not Supported";
    1, 0x1c, CONTROLLER_LIST_INVALID, "Controller List Invalid";
    1, 0x1d, SELF_TEST_IN_PROGRESS, "Device Self-test In Progress";
    1, 0x1f, INVALID_CONTROLLER_IDENTIFIER, "Invalid Controller Identifier";
    1, 0x24, ANA_GROUP_INVALID, "ANA Group Identifier Invalid";
    1, 0x25, ANA_ATTACH_FAILED, "ANA Attach Failed";
    1, 0x26, INSUFFICIENT_CAPACITY, "Insufficient Capacity";
    1, 0x27, NS_ATTACHMENT_LIMIT_EXCEEDED, "Namespace Attachment Limit Exceeded";
    1, 0x29, IO_COMMAND_SET_NOT_SUPPORTED, "I/O Command Set Not Supported";
    1, 0x2a, IO_COMMAND_SET_NOT_ENABLED, "I/O Command Set Not Enabled";
    1, 0x2b, IO_COMMAND_SET_COMBINATION_REJECTED, "I/O Command Set Combination Rejected";
    1, 0x2c, INVALID_IO_COMMAND_SET, "Invalid I/O Command Set";
    1, 0x2d, IDENTIFIER_UNAVAILABLE, "Identifier Unavailable";

    // Fabrics commands: Base 4.2.3.2 (the codes are shared with the NVM command set).
    1, 0x80, CONNECT_INCOMPATIBLE_FORMAT, "Incompatible Format";
    1, 0x81, CONNECT_CONTROLLER_BUSY, "Controller Busy";
    1, 0x82, CONNECT_INVALID_PARAMETERS, "Connect Invalid Parameters";
    1, 0x83, CONNECT_RESTART_DISCOVERY, "Connect Restart Discovery";
    1, 0x84, CONNECT_INVALID_HOST, "Connect Invalid Host";
    1, 0x85, INVALID_QUEUE_TYPE, "Invalid Queue Type";
    1, 0x90, DISCOVER_RESTART, "Discover Restart";
    1, 0x91, AUTHENTICATION_REQUIRED, "Authentication Required";

    // NVM command set: NVM 3.1.1.
    1, 0x80, CONFLICTING_ATTRIBUTES, "Conflicting Attributes";
    1, 0x81, INVALID_PROTECTION_INFO, "Invalid Protection Information";
    1, 0x82, WRITE_TO_READ_ONLY_RANGE, "Attempted Write to Read Only Range";
    1, 0x83, COMMAND_SIZE_LIMIT_EXCEEDED, "Command Size Limit Exceeded";

    // Media and Data Integrity Errors: Base 4.2.3.3.
    2, 0x80, WRITE_FAULT, "Write Fault";
    2, 0x81, UNRECOVERED_READ_ERROR, "Unrecovered Read Error";
    2, 0x82, GUARD_CHECK_ERROR, "End-to-end Guard Check Error";
    2, 0x83, APPLICATION_TAG_CHECK_ERROR, "End-to-end Application Tag Check Error";
    2, 0x84, REFERENCE_TAG_CHECK_ERROR, "End-to-end Reference Tag Check Error";
    2, 0x85, COMPARE_FAILURE, "Compare Failure";
    2, 0x86, ACCESS_DENIED, "Access Denied";
    2, 0x87, DEALLOCATED_BLOCK, "Deallocated or Unwritten Logical Block";
    2, 0x88, STORAGE_TAG_CHECK_ERROR, "End-to-End Storage Tag Check Error";

    // Path Related Status: Base 4.2.3.4.
    3, 0x00, INTERNAL_PATH_ERROR, "Internal Path Error";
    3, 0x01, ANA_PERSISTENT_LOSS, "Asymmetric Access Persistent Loss";
    3, 0x02, ANA_INACCESSIBLE, "Asymmetric Access Inaccessible";
    3, 0x03, ANA_TRANSITION, "Asymmetric Access Transition";
    3, 0x60, CONTROLLER_PATHING_ERROR, "Controller Pathing Error";
    3, 0x70, HOST_PATHING_ERROR, "Host Pathing Error";
    3, 0x71, ABORTED_BY_HOST, "Command Aborted By Host";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_lie_where_the_completion_wants_them() {
        let status = Status::LBA_OUT_OF_RANGE.dnr().with_crd(2).more();
        // DW3 bit 31 DNR, 30 M, 29:28 CRD, 27:25 SCT, 24:17 SC, 16 phase.
        assert_eq!(status.to_field(), 1 << 15 | 1 << 14 | 2 << 12 | 0x80 << 1);
        assert_eq!(Status::from_field(status.to_field() | 1), status);
        assert_eq!((status.sct(), status.sc(), status.crd()), (0, 0x80, 2));
        assert!(status.is_dnr() && status.is_more());
        assert!(!status.retryable().is_dnr());
        assert_eq!(Status::ANA_INACCESSIBLE.code_type(), StatusCodeType::Path);
        assert_eq!(Status::COMPARE_FAILURE.to_field(), 0x285 << 1);
    }

    #[test]
    fn names_are_found_and_success_is_only_zero() {
        for (status, text) in ALL {
            assert_eq!(status.is_success(), *text == "Successful Completion");
            assert!(status.name() == *text || status.sct() == 1);
        }
        assert_eq!(Status::new(7, 1).name(), "Unknown Status");
        assert_eq!(Status::INVALID_FIELD.dnr().to_string(), "Invalid Field in Command (0h/02h, DNR)");
    }
}
