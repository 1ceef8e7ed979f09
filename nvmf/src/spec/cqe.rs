//! Completion queue entry: Base 4.2.
//!
//! ```text
//! byte 0        4        8       10      12      14
//! +--------+--------+-------+-------+-------+--------+
//! |  DW0   |  DW1   | SQHD  | SQID  |  CID  | STATUS |
//! +--------+--------+-------+-------+-------+--------+
//! ```

use super::status::Status;
use zerocopy::little_endian::{U16, U32};

wire! {
    /// A 16-byte completion queue entry.
    pub struct Cqe: 16 {
        /// Command specific, low half.
        pub dw0: U32,
        /// Command specific, high half.
        pub dw1: U32,
        /// Submission queue head pointer; the transport fills it in.
        pub sqhd: U16,
        /// Submission queue identifier; reserved (zero) on fabrics.
        pub sqid: U16,
        /// Command identifier of the command that this completes.
        pub cid: U16,
        /// Status field in bits 15:1, phase tag in bit 0 (zero on fabrics).
        pub status_field: U16,
    }
}

impl Cqe {
    /// A completion of `cid` with `status`, everything else zero.
    pub fn new(cid: u16, status: Status) -> Self {
        Self {
            dw0: U32::ZERO,
            dw1: U32::ZERO,
            sqhd: U16::ZERO,
            sqid: U16::ZERO,
            cid: U16::new(cid),
            status_field: U16::new(status.to_field()),
        }
    }

    /// A successful completion of `cid`.
    pub fn success(cid: u16) -> Self {
        Self::new(cid, Status::SUCCESS)
    }

    /// The same completion with a 32-bit result.
    #[must_use]
    pub fn with_dw0(mut self, dw0: u32) -> Self {
        self.dw0 = U32::new(dw0);
        self
    }

    /// The same completion with a 64-bit result (Property Get).
    #[must_use]
    pub fn with_result(mut self, result: u64) -> Self {
        self.dw0 = U32::new(result as u32);
        self.dw1 = U32::new((result >> 32) as u32);
        self
    }

    /// DW0 and DW1 as one number.
    pub fn result(&self) -> u64 {
        u64::from(self.dw0.get()) | u64::from(self.dw1.get()) << 32
    }

    /// The status.
    pub fn status(&self) -> Status {
        Status::from_field(self.status_field.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    #[test]
    fn bytes() {
        let mut cqe = Cqe::new(0x1234, Status::INVALID_FIELD.dnr()).with_result(0x1122_3344_5566_7788);
        cqe.sqhd = U16::new(0x0a0b);
        assert_eq!(
            cqe.as_bytes(),
            [0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0x0b, 0x0a, 0, 0, 0x34, 0x12, 0x04, 0x80]
        );
        assert_eq!(cqe.result(), 0x1122_3344_5566_7788);
        assert_eq!(cqe.status(), Status::INVALID_FIELD.dnr());
    }
}
