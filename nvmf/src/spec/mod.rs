//! The wire vocabulary: structures, values and parsed commands.
//!
//! Every structure is little-endian with alignment 1, so any byte slice of the
//! right length can be viewed as one, and its size is asserted when it is
//! declared. Fields keep the names of the specification. Fields that are
//! 0's-based on the wire are turned into counts in [`command`] and nowhere else.
//!
//! Sources, cited by section where obeyed:
//! - NVM Express Base Specification 2.1 ("Base")
//! - NVM Command Set Specification 1.1 ("NVM")
//! - NVMe/TCP Transport Specification 1.1 ("TCP")

/// Declares a wire structure: C layout, alignment 1, with its size asserted.
macro_rules! wire {
    ($(#[$meta:meta])* $vis:vis struct $name:ident: $size:literal {
        $($(#[$fmeta:meta])* $fvis:vis $field:ident: $ty:ty,)*
    }) => {
        $(#[$meta])*
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq,
            zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable,
            zerocopy::KnownLayout, zerocopy::Unaligned,
        )]
        #[repr(C)]
        $vis struct $name { $($(#[$fmeta])* $fvis $field: $ty,)* }
        const _: () = assert!(size_of::<$name>() == $size);
        const _: () = assert!(align_of::<$name>() == 1);
    };
}

/// Declares a register or dword as a newtype with a getter and a `with_` setter
/// for each field, given as lowest and highest bit.
macro_rules! bits {
    ($(#[$meta:meta])* $name:ident: $int:ty {
        $($(#[$fmeta:meta])* $get:ident / $with:ident: $lo:literal..=$hi:literal,)*
    }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub struct $name(pub $int);

        impl $name {
            $(
                $(#[$fmeta])*
                pub const fn $get(self) -> $int {
                    (self.0 >> $lo) & (<$int>::MAX >> (<$int>::BITS - 1 - ($hi - $lo)))
                }

                #[doc = concat!("The same with [`", stringify!($get), "`](Self::", stringify!($get), ") replaced; higher bits of `value` are cut off.")]
                #[must_use]
                pub const fn $with(self, value: $int) -> Self {
                    let mask = <$int>::MAX >> (<$int>::BITS - 1 - ($hi - $lo));
                    Self((self.0 & !(mask << $lo)) | ((value & mask) << $lo))
                }
            )*
        }
    };
}

pub mod command;
pub mod cqe;
pub mod fabrics;
pub mod feature;
pub mod identify;
pub mod log;
pub mod opcode;
pub mod pdu;
pub mod rdma;
pub mod sqe;
pub mod status;

pub use command::{AdminCommand, FabricsCommand, IoCommand};
pub use cqe::Cqe;
pub use sqe::Sqe;
pub use status::Status;

/// Copies `text` into a fixed field, padded with `pad`; what does not fit is cut off.
///
/// ASCII fields of Identify are padded with spaces, NQNs with zeros (Base 1.4.2, 4.7).
pub fn fill_text(field: &mut [u8], text: &str, pad: u8) {
    let n = text.len().min(field.len());
    field[..n].copy_from_slice(&text.as_bytes()[..n]);
    field[n..].fill(pad);
}

/// The text in front of the first zero byte, if it is UTF-8 and the zero is there.
pub fn nul_text(field: &[u8]) -> Option<&str> {
    let end = field.iter().position(|b| *b == 0)?;
    std::str::from_utf8(&field[..end]).ok()
}

/// The text of a fixed field as people are shown it: up to the first zero byte and without padding, and what cannot be
/// printed replaced.
pub fn shown_text(field: &[u8]) -> String {
    let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
    let text = String::from_utf8_lossy(&field[..end]);
    text.trim_end().chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}
