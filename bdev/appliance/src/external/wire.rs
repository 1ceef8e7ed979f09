//! What target and process say to each other over the Unix socket.
//!
//! Messages of a `SOCK_SEQPACKET` socket, fixed in length but for a text at their end, native-endian. Every message begins
//! with a kind and the length of the whole message; a message that is not as long as it says ends the connection.
//!
//! ```text
//! process                          target
//! Hello {version}           ->
//!                           <-     Refused {why, text}                                    and the connection ends
//!                           <-     Welcome {version, measures, geometry, needs, workers} + memfd
//!                           <-     Lanes {count} + eventfds                               one for each lane
//!                           <-     Workers {count} + sockets                              one for each worker
//! Ready | Unable {text}     ->                                                            requests flow after Ready
//!                           <-     Resize {ticket, num_blocks}
//! Resized {ticket, text}    ->                                                            no text: done
//!                           <-     Gone                                                   the device was deleted
//! ```
//!
//! The process rings the target through the lane's eventfd: the target watches its edges and never reads it. The target
//! rings a worker of the process through the worker's socket rather than an eventfd: the flag that makes a write non-blocking belongs to
//! the open file, which for an eventfd both sides share; a process could clear it, fill the counter, and so block the
//! target's reactor. The ends of a socket pair are files of their own.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use crate::layout::{MAX_LANES, MAX_WORKERS, Shape};

/// Raised when target and process of different versions would not understand each other.
pub const VERSION: u32 = 2;

const MAGIC: u64 = u64::from_be_bytes(*b"RSAPPLNC");
/// Bytes of a message at most.
const MAX_MESSAGE: usize = 4096;
/// Bytes of a text at most; what is longer is cut.
pub(crate) const MAX_TEXT: usize = 1024;
/// Descriptors that come with a message at most.
const MAX_FDS: usize = 64;
const _: () = assert!(MAX_LANES as usize <= MAX_FDS && MAX_WORKERS as usize <= MAX_FDS);

/// Why a process is turned away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Refusal {
    /// Another process serves the device: try again when it is gone.
    Busy = 1,
    /// It speaks another version, or something else.
    Version = 2,
    /// The target cannot make a session.
    Trouble = 3,
}

/// What the process is told about the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Welcome {
    pub(crate) shape: Shape,
    pub(crate) block_size: u32,
    pub(crate) num_blocks: u64,
    /// Operations that the handler must do by itself, a bit for each [`OpKind`](crate::OpKind).
    pub(crate) ops: u32,
    /// Whether the host was told that unmapped blocks read as zeroes.
    pub(crate) unmap_zeroes: bool,
    /// Whether the host was told that writes may be lost before the next flush.
    pub(crate) volatile_cache: bool,
    /// How long a worker looks for more work before it sleeps.
    pub(crate) spin_ns: u64,
    /// The cores for the workers, in turn; empty: wherever the host runs them.
    pub(crate) cores: Vec<u32>,
    pub(crate) bdev: String,
}

/// A message, either way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    Hello { version: u32 },
    Refused { why: Refusal, text: String },
    Welcome(Welcome),
    Lanes { count: u32 },
    Workers { count: u32 },
    Ready,
    Unable { text: String },
    Resize { ticket: u64, num_blocks: u64 },
    Resized { ticket: u64, text: String },
    Gone,
}

struct Writer(Vec<u8>);

impl Writer {
    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }
    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }
    fn text(mut self, text: &str) -> Self {
        let mut end = text.len().min(MAX_TEXT);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.0.extend(&text.as_bytes()[..end]);
        self
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn u32(&mut self) -> Option<u32> {
        let (value, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_ne_bytes(*value))
    }
    fn u64(&mut self) -> Option<u64> {
        let (value, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_ne_bytes(*value))
    }
    fn text(&mut self) -> String {
        // Of the other side's choosing, and bound for a log: nothing that moves a terminal's cursor.
        let bytes = std::mem::take(&mut self.0);
        let text = String::from_utf8_lossy(&bytes[..bytes.len().min(MAX_TEXT)]);
        text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
    }
}

impl Message {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let start = |kind: u32| Writer(Vec::with_capacity(64)).u32(kind).u32(0);
        let mut bytes = match self {
            Message::Hello { version } => start(1).u64(MAGIC).u32(*version).u32(0),
            Message::Refused { why, text } => start(2).u32(*why as u32).u32(0).text(text),
            Message::Welcome(w) => {
                let fixed = start(3)
                    .u32(VERSION)
                    .u32(w.shape.lanes())
                    .u32(w.shape.workers())
                    .u32(w.shape.depth())
                    .u32(w.shape.slot_bytes())
                    .u64(w.num_blocks)
                    .u32(w.block_size)
                    .u32(w.ops)
                    .u32(w.unmap_zeroes.into())
                    .u32(w.volatile_cache.into())
                    .u64(w.spin_ns);
                // More than one for each worker would have no effect.
                let cores = &w.cores[..w.cores.len().min(MAX_WORKERS as usize)];
                let fixed = fixed.u32(cores.len() as u32);
                cores.iter().fold(fixed, |bytes, &core| bytes.u32(core)).text(&w.bdev)
            }
            Message::Lanes { count } => start(4).u32(*count).u32(0),
            Message::Workers { count } => start(10).u32(*count).u32(0),
            Message::Ready => start(5),
            Message::Unable { text } => start(6).text(text),
            Message::Resize { ticket, num_blocks } => start(7).u64(*ticket).u64(*num_blocks),
            Message::Resized { ticket, text } => start(8).u64(*ticket).text(text),
            Message::Gone => start(9),
        }
        .0;
        let len = (bytes.len() as u32).to_ne_bytes();
        bytes[4..8].copy_from_slice(&len);
        bytes
    }

    /// The message in `bytes`; `None` for anything else.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Message> {
        let mut r = Reader(bytes);
        let kind = r.u32()?;
        if r.u32()? as usize != bytes.len() {
            return None;
        }
        Some(match kind {
            1 if r.u64()? == MAGIC => Message::Hello { version: r.u32()? },
            2 => {
                let why = match r.u32()? {
                    1 => Refusal::Busy,
                    2 => Refusal::Version,
                    _ => Refusal::Trouble,
                };
                r.u32()?;
                Message::Refused { why, text: r.text() }
            }
            3 => {
                if r.u32()? != VERSION {
                    return None;
                }
                let (lanes, workers, depth, slot_bytes) = (r.u32()?, r.u32()?, r.u32()?, r.u32()?);
                let shape = Shape::new(lanes, workers, depth, slot_bytes).ok()?;
                if (shape.depth(), shape.slot_bytes()) != (depth, slot_bytes) {
                    return None;
                }
                let (num_blocks, block_size, ops) = (r.u64()?, r.u32()?, r.u32()?);
                let (unmap_zeroes, volatile_cache) = (r.u32()? != 0, r.u32()? != 0);
                let (spin_ns, cores) = (r.u64()?, r.u32()?);
                if cores > MAX_WORKERS {
                    return None;
                }
                let cores = (0..cores).map(|_| r.u32()).collect::<Option<_>>()?;
                let bdev = r.text();
                Message::Welcome(Welcome {
                    shape,
                    block_size,
                    num_blocks,
                    ops,
                    unmap_zeroes,
                    volatile_cache,
                    spin_ns,
                    cores,
                    bdev,
                })
            }
            4 => Message::Lanes { count: r.u32()? },
            10 => Message::Workers { count: r.u32()? },
            5 => Message::Ready,
            6 => Message::Unable { text: r.text() },
            7 => Message::Resize { ticket: r.u64()?, num_blocks: r.u64()? },
            8 => Message::Resized { ticket: r.u64()?, text: r.text() },
            9 => Message::Gone,
            _ => return None,
        })
    }
}

/// Sends a message with descriptors. Never waits: a peer that does not read is as good as gone.
///
/// # Errors
/// As the host says; `WouldBlock` when the socket is full.
pub(crate) fn send(socket: impl AsFd, message: &Message, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    assert!(fds.len() <= MAX_FDS);
    let bytes = message.encode();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)), "there is room for {MAX_FDS} descriptors");
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, flags)?;
    Ok(())
}

fn bad(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.to_string())
}

/// What was received.
#[derive(Debug)]
pub(crate) enum Received {
    Message(Message, Vec<OwnedFd>),
    /// The other side is gone.
    End,
    /// Nothing yet.
    Nothing,
}

/// Receives a message if there is one. Descriptors are only taken when `fds` says so; others are closed by the host.
///
/// # Errors
/// `InvalidData` for what is no message; else as the host says.
pub(crate) fn receive(socket: impl AsFd, fds: bool) -> io::Result<Received> {
    let mut bytes = [0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let room = if fds { &mut space[..] } else { &mut [] };
    let mut control = RecvAncillaryBuffer::new(room);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let got = match recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
        Ok(got) => got,
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(Received::Nothing),
        Err(rustix::io::Errno::CONNRESET | rustix::io::Errno::PIPE) => return Ok(Received::End),
        Err(errno) => return Err(errno.into()),
    };
    let mut taken = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            taken.extend(rights);
        }
    }
    if got.bytes == 0 {
        return Ok(Received::End);
    }
    if got.flags.contains(ReturnFlags::TRUNC) {
        return Err(bad("a message that is too long"));
    }
    match Message::decode(&bytes[..got.bytes]) {
        Some(message) => Ok(Received::Message(message, taken)),
        None => Err(bad("something that is no message of this version")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn messages() -> Vec<Message> {
        vec![
            Message::Hello { version: 7 },
            Message::Refused { why: Refusal::Busy, text: "wait".into() },
            Message::Welcome(Welcome {
                shape: Shape::new(3, 2, 64, 8192).unwrap(),
                block_size: 4096,
                num_blocks: 1 << 40,
                ops: 0x1f,
                unmap_zeroes: true,
                volatile_cache: false,
                spin_ns: 1 << 40,
                cores: vec![7, 0],
                bdev: "vol".into(),
            }),
            Message::Lanes { count: 2 },
            Message::Workers { count: 64 },
            Message::Ready,
            Message::Unable { text: String::new() },
            Message::Resize { ticket: 1, num_blocks: 2 },
            Message::Resized { ticket: 1, text: "no room".into() },
            Message::Gone,
        ]
    }

    #[test]
    fn messages_survive_their_encoding() {
        for message in messages() {
            assert_eq!(Message::decode(&message.encode()), Some(message));
        }
        let long = Message::Unable { text: "é".repeat(MAX_TEXT) };
        let Some(Message::Unable { text }) = Message::decode(&long.encode()) else { panic!("a message") };
        assert_eq!(text, "é".repeat(MAX_TEXT / 2));
    }

    #[test]
    fn whatever_else_comes_is_no_message_and_no_panic() {
        assert_eq!(Message::decode(&[]), None);
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        for message in messages() {
            let whole = message.encode();
            for cut in 0..whole.len() {
                assert_eq!(Message::decode(&whole[..cut]), None);
            }
            for _ in 0..2000 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let mut bent = whole.clone();
                let at = (seed >> 33) as usize % bent.len();
                bent[at] ^= (seed >> 16) as u8 | 1;
                // Any answer will do, as long as there is one, and what is taken for a shape is one.
                if let Some(Message::Welcome(welcome)) = Message::decode(&bent) {
                    assert!(welcome.shape.bytes() > 0);
                }
            }
        }
    }

    #[test]
    fn descriptors_come_along_only_where_they_are_wanted() {
        let pair = || socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let (a, b) = pair();
        let (c, _d) = pair();
        for wanted in [true, false] {
            send(&a, &Message::Lanes { count: 64 }, &[c.as_fd(); MAX_FDS]).unwrap();
            let Received::Message(message, fds) = receive(&b, wanted).unwrap() else { panic!("a message") };
            assert_eq!((message, fds.len()), (Message::Lanes { count: 64 }, if wanted { MAX_FDS } else { 0 }));
        }
        assert!(matches!(receive(&b, true).unwrap(), Received::Nothing));
        rustix::net::send(&a, &[0; MAX_MESSAGE + 1], SendFlags::empty()).unwrap();
        assert!(receive(&b, true).is_err());
        rustix::net::send(&a, b"nonsense", SendFlags::empty()).unwrap();
        assert!(receive(&b, true).is_err());
        drop(a);
        assert!(matches!(receive(&b, true).unwrap(), Received::End));
    }
}
