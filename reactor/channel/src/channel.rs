//! A channel: a stream, its session, and two bounded buffers.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::SocketAddr;

use reactor::Instant;
use reactor::park::{Ready, Source};

use crate::session::{Fault, HEADER_BYTES, MAX_FRAME_BYTES, Session, SessionConfig};
use crate::wire::{Wire, WireListener, Wires};

/// Bytes that wait to be sent, at most.
pub const OUTBOX_BYTES: usize = 512 * 1024;
/// Bytes that were received and not taken, at most.
pub const INBOX_BYTES: usize = 256 * 1024;
/// Streams that are looked at in one poll, so that one busy channel does not keep a reactor.
const ROUNDS: usize = 4;

/// What [`Channel::recv`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// So many bytes, at least one.
    Bytes(usize),
    /// Nothing now.
    Nothing,
    /// The peer has said that nothing more will come.
    End,
}

/// One end of a channel, on one reactor. Dropping it closes it at once; what was not sent is lost.
pub struct Channel {
    wire: Box<dyn Wire>,
    session: Session,
    outbox: VecDeque<u8>,
    inbox: Box<[u8]>,
    /// The unread part of `inbox`.
    unread: std::ops::Range<usize>,
    /// The stream has ended.
    eof: bool,
    fault: Option<Fault>,
}

impl Channel {
    fn over(wire: Box<dyn Wire>, config: SessionConfig, now: Instant) -> Channel {
        let session = Session::new(config, now);
        let mut outbox = VecDeque::with_capacity(OUTBOX_BYTES);
        outbox.extend(session.hello());
        let inbox = vec![0; INBOX_BYTES].into_boxed_slice();
        Channel { wire, session, outbox, inbox, unread: 0..0, eof: false, fault: None }
    }

    /// Starts to connect to a listener's address.
    ///
    /// # Errors
    /// As [`Wires::connect`].
    pub fn connect(wires: &dyn Wires, addr: SocketAddr, config: SessionConfig, now: Instant) -> io::Result<Channel> {
        Ok(Channel::over(wires.connect(addr)?, config, now))
    }

    /// Whether both sides have said hello. What is sent earlier waits.
    pub fn is_open(&self) -> bool {
        self.session.version().is_some()
    }

    /// The version of the protocol that both speak.
    pub fn version(&self) -> Option<u16> {
        self.session.version()
    }

    /// Bytes that [`Channel::send`] would take now.
    pub fn room(&self) -> usize {
        // One header more than payload may be needed; the end and an alive frame have their place too.
        (OUTBOX_BYTES - self.outbox.len()).saturating_sub(4 * HEADER_BYTES)
    }

    /// Bytes that were taken and have not left.
    pub fn unsent_bytes(&self) -> usize {
        self.outbox.len()
    }

    /// Takes bytes to be sent, as many as there is room for; they leave with [`Channel::poll`].
    pub fn send(&mut self, bytes: &[u8], now: Instant) -> usize {
        let mut taken = 0;
        while taken < bytes.len() && self.fault.is_none() {
            let n = (bytes.len() - taken).min(MAX_FRAME_BYTES).min(self.room());
            if n == 0 {
                break;
            }
            self.outbox.extend(self.session.data_header(n, now));
            self.outbox.extend(&bytes[taken..taken + n]);
            taken += n;
        }
        taken
    }

    /// Says that nothing more will be sent. Nothing may be sent after that.
    pub fn finish(&mut self) {
        if let Some(frame) = self.session.end_frame() {
            self.outbox.extend(frame);
        }
    }

    /// Takes received bytes.
    ///
    /// # Errors
    /// The channel is over, and everything that came before that was taken.
    pub fn recv(&mut self, out: &mut [u8], now: Instant) -> Result<Received, Fault> {
        let mut filled = 0;
        while filled < out.len() {
            let parsed = match self.session.parse(&self.inbox[self.unread.clone()]) {
                Ok(parsed) => parsed,
                Err(fault) => {
                    // What came before it is still handed out.
                    let fault = self.fault.insert(fault);
                    return if filled > 0 { Ok(Received::Bytes(filled)) } else { Err(fault.clone()) };
                }
            };
            self.unread.start += parsed.skip;
            let n = parsed.data.min(out.len() - filled);
            if n > 0 {
                out[filled..filled + n].copy_from_slice(&self.inbox[self.unread.start..self.unread.start + n]);
                self.unread.start += n;
                self.session.took(n);
                filled += n;
                continue;
            }
            // Inside a frame, and nothing of it here: the stream may have the rest, which then needs no second copy.
            let direct = self.session.expects_data().min(out.len() - filled);
            match self.receive_into(&mut out[filled..filled + direct], now) {
                0 => break,
                n => {
                    self.session.took(n);
                    filled += n;
                }
            }
        }
        self.judge_end();
        match &self.fault {
            _ if filled > 0 => Ok(Received::Bytes(filled)),
            _ if self.session.has_ended() => Ok(Received::End),
            Some(fault) => Err(fault.clone()),
            None => Ok(Received::Nothing),
        }
    }

    /// Whether something of what was received can be understood or taken. A piece of a header is neither: its rest may never
    /// come.
    fn has_untaken(&self) -> bool {
        self.unread.len() >= HEADER_BYTES || self.session.expects_data().min(self.unread.len()) > 0
    }

    /// The stream has ended and nothing of it is left to understand: the peer should have said so.
    fn judge_end(&mut self) {
        if self.eof && !self.session.has_ended() && !self.has_untaken() {
            self.fault.get_or_insert(Fault::Vanished);
        }
    }

    /// One receive from the stream; 0 when nothing is there, or it is over.
    fn receive_into(&mut self, bytes: &mut [u8], now: Instant) -> usize {
        if bytes.is_empty() || self.eof || self.fault.is_some() {
            return 0;
        }
        match self.wire.recv(bytes) {
            // Whether that is an end or a fault is seen when everything before it was understood.
            Ok(0) => {
                self.eof = true;
                0
            }
            Ok(n) => {
                self.session.heard(now);
                n
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => {
                self.fail(error);
                0
            }
        }
    }

    fn fail(&mut self, error: io::Error) {
        self.eof = true;
        self.fault.get_or_insert_with(|| Fault::Io(error.to_string()));
    }

    /// Makes progress: receives into the inbox, sends from the outbox, keeps alive, looks at the clock. Whether anything moved.
    ///
    /// # Errors
    /// The channel is over. What was received before that can still be taken.
    pub fn poll(&mut self, now: Instant) -> Result<bool, Fault> {
        if !self.eof
            && let Err(error) = self.wire.poll(!self.outbox.is_empty())
        {
            self.fail(error);
        }
        let mut moved = false;
        if self.wire.is_connected() {
            // Where something waits to be sent, that tells the peer as much, and another frame would only lengthen the queue.
            if self.fault.is_none()
                && self.outbox.is_empty()
                && let Some(frame) = self.session.alive_frame(now)
            {
                self.outbox.extend(frame);
            }
            moved |= self.empty_outbox(now);
            moved |= self.fill_inbox(now);
        }
        self.judge_end();
        if self.fault.is_none() {
            if self.has_untaken() {
                // Unread input is the owner's doing, not the peer's silence.
                self.session.heard(now);
            }
            if let Err(fault) = self.session.check(now) {
                self.fault = Some(fault);
            }
        }
        match &self.fault {
            // The peer has to learn of this side's versions too.
            Some(Fault::Version { .. }) if !self.outbox.is_empty() && !self.eof && self.session.check(now).is_ok() => {
                Ok(moved)
            }
            // Both directions are done with: how the stream ends does not matter any more.
            Some(_) if self.is_done() => Ok(moved),
            Some(fault) => Err(fault.clone()),
            None => Ok(moved),
        }
    }

    fn fill_inbox(&mut self, now: Instant) -> bool {
        let mut moved = false;
        if self.fault.is_some() {
            return moved;
        }
        for _ in 0..ROUNDS {
            // The greeting and frames without payload are understood at once, also when nobody takes payload.
            match self.session.parse(&self.inbox[self.unread.clone()]) {
                Ok(parsed) => self.unread.start += parsed.skip,
                Err(fault) => {
                    self.fault.get_or_insert(fault);
                    return moved;
                }
            }
            if self.unread.is_empty() {
                self.unread = 0..0;
            } else if self.unread.start > INBOX_BYTES / 2 {
                self.inbox.copy_within(self.unread.clone(), 0);
                self.unread = 0..self.unread.len();
            }
            let mut inbox = std::mem::take(&mut self.inbox);
            let n = self.receive_into(&mut inbox[self.unread.end..], now);
            self.inbox = inbox;
            self.unread.end += n;
            if n == 0 {
                break;
            }
            moved = true;
        }
        moved
    }

    fn empty_outbox(&mut self, now: Instant) -> bool {
        let mut moved = false;
        if self.eof {
            return moved;
        }
        for _ in 0..ROUNDS {
            let (front, _) = self.outbox.as_slices();
            if front.is_empty() {
                break;
            }
            match self.wire.send(front) {
                Ok(0) => break,
                Ok(n) => {
                    self.outbox.drain(..n);
                    self.session.said(now);
                    moved = true;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    self.fail(error);
                    break;
                }
            }
        }
        moved
    }

    /// Whether both sides have said that they send nothing more, and everything has left.
    pub fn is_done(&self) -> bool {
        self.session.has_ended() && self.session.is_finished() && self.outbox.is_empty()
    }

    /// When [`Channel::poll`] has to be called again at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.session.deadline(self.outbox.is_empty())
    }

    /// What announces that there is something to do; `None`: it has to be polled all the time.
    pub fn source(&self) -> Option<Source> {
        self.wire.source()
    }

    /// The source is watched from now on: nothing is looked for that was not announced.
    pub fn set_watched(&mut self) {
        self.wire.set_watched();
    }

    /// The source has announced something.
    pub fn ready(&mut self, ready: Ready) {
        self.wire.ready(ready);
    }

    /// Whether polling now may find something.
    pub fn has_work(&self) -> bool {
        self.wire.has_input() || !self.outbox.is_empty() && self.wire.has_room()
    }

    /// The other end.
    pub fn peer_addr(&self) -> SocketAddr {
        self.wire.peer_addr()
    }

    /// This end.
    pub fn local_addr(&self) -> SocketAddr {
        self.wire.local_addr()
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel")
            .field("session", &self.session)
            .field("unsent", &self.outbox.len())
            .field("unread", &self.unread.len())
            .field("fault", &self.fault)
            .finish_non_exhaustive()
    }
}

/// Where channels arrive.
pub struct ChannelListener {
    listener: Box<dyn WireListener>,
    config: SessionConfig,
}

impl ChannelListener {
    /// Listens. Port 0 chooses a free one.
    ///
    /// # Errors
    /// As [`Wires::listen`].
    pub fn listen(wires: &dyn Wires, addr: SocketAddr, backlog: u32, config: SessionConfig) -> io::Result<Self> {
        Ok(ChannelListener { listener: wires.listen(addr, backlog)?, config })
    }

    /// The next channel, whose handshake begins now; `None` when there is none.
    ///
    /// # Errors
    /// When the host cannot hand it over; it may be tried again.
    pub fn accept(&mut self, now: Instant) -> io::Result<Option<Channel>> {
        match self.listener.accept() {
            Ok(wire) => Ok(Some(Channel::over(wire, self.config, now))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The address, with the port that was chosen.
    pub fn local_addr(&self) -> SocketAddr {
        self.listener.local_addr()
    }

    /// What announces channels; `None`: it has to be polled.
    pub fn source(&self) -> Option<Source> {
        self.listener.source()
    }
}

impl fmt::Debug for ChannelListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChannelListener").field("local_addr", &self.local_addr()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
