//! Opcodes: Base 5.1, 6, 7; NVM 3.2.
//!
//! Bits 1:0 of an opcode name the direction of its data, which lets the
//! transport place data before anybody has parsed the command. For Fabrics
//! commands bits 1:0 of FCTYPE take that part.

/// Which way a command's data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// 00b: no data.
    None,
    /// 01b: from the host to the controller.
    HostToController,
    /// 10b: from the controller to the host.
    ControllerToHost,
    /// 11b: both ways; no supported transport carries such a command.
    Bidirectional,
}

impl Direction {
    /// From bits 1:0 of an opcode or of FCTYPE.
    pub const fn of(opcode: u8) -> Self {
        match opcode & 3 {
            0 => Direction::None,
            1 => Direction::HostToController,
            2 => Direction::ControllerToHost,
            _ => Direction::Bidirectional,
        }
    }

    /// Of the command in a submission queue entry; looks at FCTYPE for Fabrics commands.
    pub fn of_command(sqe: &super::Sqe) -> Self {
        if sqe.opcode == FABRICS { Self::of(sqe.fctype()) } else { Self::of(sqe.opcode) }
    }
}

/// Fabrics commands, on admin and I/O queues.
pub const FABRICS: u8 = 0x7f;

/// Admin opcodes.
pub mod admin {
    /// Delete I/O Submission Queue (memory-based only).
    pub const DELETE_IO_SQ: u8 = 0x00;
    /// Create I/O Submission Queue (memory-based only).
    pub const CREATE_IO_SQ: u8 = 0x01;
    /// Get Log Page.
    pub const GET_LOG_PAGE: u8 = 0x02;
    /// Delete I/O Completion Queue (memory-based only).
    pub const DELETE_IO_CQ: u8 = 0x04;
    /// Create I/O Completion Queue (memory-based only).
    pub const CREATE_IO_CQ: u8 = 0x05;
    /// Identify.
    pub const IDENTIFY: u8 = 0x06;
    /// Abort.
    pub const ABORT: u8 = 0x08;
    /// Set Features.
    pub const SET_FEATURES: u8 = 0x09;
    /// Get Features.
    pub const GET_FEATURES: u8 = 0x0a;
    /// Asynchronous Event Request.
    pub const ASYNC_EVENT_REQUEST: u8 = 0x0c;
    /// Namespace Management.
    pub const NAMESPACE_MANAGEMENT: u8 = 0x0d;
    /// Firmware Commit.
    pub const FIRMWARE_COMMIT: u8 = 0x10;
    /// Firmware Image Download.
    pub const FIRMWARE_DOWNLOAD: u8 = 0x11;
    /// Device Self-test.
    pub const DEVICE_SELF_TEST: u8 = 0x14;
    /// Namespace Attachment.
    pub const NAMESPACE_ATTACHMENT: u8 = 0x15;
    /// Keep Alive.
    pub const KEEP_ALIVE: u8 = 0x18;
    /// Directive Send.
    pub const DIRECTIVE_SEND: u8 = 0x19;
    /// Directive Receive.
    pub const DIRECTIVE_RECEIVE: u8 = 0x1a;
    /// Virtualization Management.
    pub const VIRTUALIZATION_MANAGEMENT: u8 = 0x1c;
    /// NVMe-MI Send.
    pub const MI_SEND: u8 = 0x1d;
    /// NVMe-MI Receive.
    pub const MI_RECEIVE: u8 = 0x1e;
    /// Discovery Information Management.
    pub const DISCOVERY_INFORMATION_MANAGEMENT: u8 = 0x21;
    /// Lockdown.
    pub const LOCKDOWN: u8 = 0x24;
    /// Format NVM.
    pub const FORMAT_NVM: u8 = 0x80;
    /// Security Send.
    pub const SECURITY_SEND: u8 = 0x81;
    /// Security Receive.
    pub const SECURITY_RECEIVE: u8 = 0x82;
    /// Sanitize.
    pub const SANITIZE: u8 = 0x84;
    /// Get LBA Status.
    pub const GET_LBA_STATUS: u8 = 0x86;
}

/// I/O opcodes of the NVM command set.
pub mod io {
    /// Flush.
    pub const FLUSH: u8 = 0x00;
    /// Write.
    pub const WRITE: u8 = 0x01;
    /// Read.
    pub const READ: u8 = 0x02;
    /// Write Uncorrectable.
    pub const WRITE_UNCORRECTABLE: u8 = 0x04;
    /// Compare.
    pub const COMPARE: u8 = 0x05;
    /// Write Zeroes.
    pub const WRITE_ZEROES: u8 = 0x08;
    /// Dataset Management.
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    /// Verify.
    pub const VERIFY: u8 = 0x0c;
    /// Reservation Register.
    pub const RESERVATION_REGISTER: u8 = 0x0d;
    /// Reservation Report.
    pub const RESERVATION_REPORT: u8 = 0x0e;
    /// Reservation Acquire.
    pub const RESERVATION_ACQUIRE: u8 = 0x11;
    /// I/O Management Receive.
    pub const IO_MANAGEMENT_RECEIVE: u8 = 0x12;
    /// Reservation Release.
    pub const RESERVATION_RELEASE: u8 = 0x15;
    /// Cancel.
    pub const CANCEL: u8 = 0x18;
    /// Copy.
    pub const COPY: u8 = 0x19;
    /// I/O Management Send.
    pub const IO_MANAGEMENT_SEND: u8 = 0x1d;

    /// Whether a command changes what is stored.
    pub const fn writes(opcode: u8) -> bool {
        matches!(opcode, WRITE | WRITE_UNCORRECTABLE | WRITE_ZEROES | DATASET_MANAGEMENT | COPY)
    }
}

/// Fabrics command types (FCTYPE).
pub mod fabrics {
    /// Property Set.
    pub const PROPERTY_SET: u8 = 0x00;
    /// Connect.
    pub const CONNECT: u8 = 0x01;
    /// Property Get.
    pub const PROPERTY_GET: u8 = 0x04;
    /// Authentication Send.
    pub const AUTHENTICATION_SEND: u8 = 0x05;
    /// Authentication Receive.
    pub const AUTHENTICATION_RECEIVE: u8 = 0x06;
    /// Disconnect.
    pub const DISCONNECT: u8 = 0x08;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directions() {
        use Direction::*;
        for (opcode, direction) in [
            (io::READ, ControllerToHost),
            (io::WRITE, HostToController),
            (io::COMPARE, HostToController),
            (io::FLUSH, None),
            (io::WRITE_ZEROES, None),
            (io::DATASET_MANAGEMENT, HostToController),
            (io::COPY, HostToController),
            (io::RESERVATION_REPORT, ControllerToHost),
            (admin::IDENTIFY, ControllerToHost),
            (admin::GET_LOG_PAGE, ControllerToHost),
            (admin::SET_FEATURES, HostToController),
            (admin::GET_FEATURES, ControllerToHost),
            (admin::KEEP_ALIVE, None),
            (fabrics::CONNECT, HostToController),
            (fabrics::PROPERTY_GET, None),
            (fabrics::AUTHENTICATION_SEND, HostToController),
            (fabrics::AUTHENTICATION_RECEIVE, ControllerToHost),
            (0x03, Bidirectional),
        ] {
            assert_eq!(Direction::of(opcode), direction, "{opcode:02x}");
        }
    }
}
