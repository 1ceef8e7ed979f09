//! What two ends of a channel say to each other: a machine without I/O and without a clock.
//!
//! ```text
//! hello, 20 bytes, first from both sides:
//!    0  8  "RINGCHAN"
//!    8  2  oldest version spoken       all numbers little-endian
//!   10  2  newest version spoken
//!   12  4  silence after which the sender takes its peer for dead, in milliseconds
//!   16  4  zero
//! frame, after that:
//!    0  3  bytes of payload that follow
//!    3  1  0 data, 1 alive, 2 end (nothing more will be sent)
//! ```
//!
//! The newest version that both speak is used; where there is none, both ends see that in the other's hello.
//!
//! ```text
//!  Greeting --(hello, a common version)--> Open --(end frame)--> Ended      of the receiving direction
//! ```
//!
//! Keep-alives: a side that has sent nothing for a quarter of the silence that its peer allows sends an alive frame. A side
//! that has received nothing for as long as it allows takes the peer for dead; but only time counts in which it tried to
//! receive, so that bytes which it leaves unread itself (its owner is slow) never count against the peer.

use std::fmt;
use std::time::Duration;

use reactor::Instant;

/// Bytes of a hello.
pub const HELLO_BYTES: usize = 20;
/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 4;
/// Payload of one frame, at most; more than that is refused.
pub const MAX_FRAME_BYTES: usize = 256 * 1024;
/// The oldest version spoken.
pub const OLDEST_VERSION: u16 = 1;
/// The newest version spoken.
pub const NEWEST_VERSION: u16 = 1;
/// Silence that a side may ask to be broken, at least.
const MIN_SILENCE: Duration = Duration::from_millis(20);
/// ... and at most.
const MAX_SILENCE: Duration = Duration::from_secs(3600);

const MAGIC: &[u8; 8] = b"RINGCHAN";
const DATA: u8 = 0;
const ALIVE: u8 = 1;
const END: u8 = 2;

/// What a channel is set up with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionConfig {
    /// Versions spoken, oldest and newest.
    pub versions: (u16, u16),
    /// Silence after which the peer is dead.
    pub silence: Duration,
    /// Time for the connection and the peer's hello.
    pub handshake: Duration,
}

impl Default for SessionConfig {
    /// Death is noticed within a second.
    fn default() -> Self {
        SessionConfig {
            versions: (OLDEST_VERSION, NEWEST_VERSION),
            silence: Duration::from_millis(900),
            handshake: Duration::from_secs(5),
        }
    }
}

/// Why a channel is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// What connected is not the other end of a channel.
    NotAChannel,
    /// No version is spoken by both.
    Version {
        /// Ours, oldest and newest.
        ours: (u16, u16),
        /// The peer's.
        theirs: (u16, u16),
    },
    /// The peer broke the protocol.
    Protocol(&'static str),
    /// The peer did not connect, or did not say hello.
    NoHello(Duration),
    /// The peer is silent.
    Silent(Duration),
    /// The connection ended before the peer said that it would.
    Vanished,
    /// The connection failed.
    Io(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::NotAChannel => f.write_str("what answers is not a Ringstone channel"),
            Fault::Version { ours, theirs } => write!(
                f,
                "the peer speaks versions {} to {} of the channel protocol, this side {} to {}: update the older one",
                theirs.0, theirs.1, ours.0, ours.1
            ),
            Fault::Protocol(what) => write!(f, "the peer broke the channel protocol: {what}"),
            Fault::NoHello(time) => write!(f, "the peer was not there within {} ms", time.as_millis()),
            Fault::Silent(time) => write!(f, "the peer has been silent for {} ms", time.as_millis()),
            Fault::Vanished => f.write_str("the connection ended in the middle"),
            Fault::Io(error) => f.write_str(error),
        }
    }
}

impl std::error::Error for Fault {}

/// What the front of the input is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parsed {
    /// Bytes that the machine has taken.
    pub skip: usize,
    /// Bytes of payload right behind them, as far as they are there.
    pub data: usize,
}

/// One end's protocol state.
#[derive(Debug)]
pub struct Session {
    config: SessionConfig,
    /// The version in use, once both have said hello.
    version: Option<u16>,
    /// How long the peer bears silence.
    peer_silence: Duration,
    began: Instant,
    heard: Instant,
    said: Instant,
    /// Payload of the present frame that has not been taken.
    in_frame: usize,
    ended: bool,
    finished: bool,
}

impl Session {
    /// An end that begins now. Its [`Session::hello`] goes out first.
    pub fn new(mut config: SessionConfig, now: Instant) -> Session {
        config.silence = config.silence.clamp(MIN_SILENCE, MAX_SILENCE);
        Session {
            config,
            version: None,
            peer_silence: config.silence,
            began: now,
            heard: now,
            said: now,
            in_frame: 0,
            ended: false,
            finished: false,
        }
    }

    /// The first bytes to send.
    pub fn hello(&self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..10].copy_from_slice(&self.config.versions.0.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.config.versions.1.to_le_bytes());
        let silence = u32::try_from(self.config.silence.as_millis()).unwrap_or(u32::MAX);
        bytes[12..16].copy_from_slice(&silence.to_le_bytes());
        bytes
    }

    /// The version that both speak, once that is known.
    pub fn version(&self) -> Option<u16> {
        self.version
    }

    /// The peer will send nothing more.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// This side has said that it will send nothing more.
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    /// Payload of the present frame that has not been taken: the next bytes of the stream are that.
    pub fn expects_data(&self) -> usize {
        self.in_frame
    }

    fn take_hello(&mut self, bytes: &[u8]) -> Result<usize, Fault> {
        let known = bytes.len().min(MAGIC.len());
        if bytes[..known] != MAGIC[..known] {
            return Err(Fault::NotAChannel);
        }
        let Some(hello) = bytes.first_chunk::<HELLO_BYTES>() else { return Ok(0) };
        let number = |at: usize| u16::from_le_bytes([hello[at], hello[at + 1]]);
        let (ours, theirs) = (self.config.versions, (number(8), number(10)));
        let version = ours.1.min(theirs.1);
        if version < ours.0 || version < theirs.0 {
            return Err(Fault::Version { ours, theirs });
        }
        let silence_ms = u32::from_le_bytes([hello[12], hello[13], hello[14], hello[15]]);
        self.peer_silence = Duration::from_millis(silence_ms.into()).clamp(MIN_SILENCE, MAX_SILENCE);
        self.version = Some(version);
        Ok(HELLO_BYTES)
    }

    /// Looks at the input that is there. The caller drops `skip` bytes, keeps the rest, and hands what it takes of the `data`
    /// that follows to its owner, which it tells with [`Session::took`].
    ///
    /// # Errors
    /// The channel is over.
    pub fn parse(&mut self, bytes: &[u8]) -> Result<Parsed, Fault> {
        let mut skip = 0;
        if self.version.is_none() {
            skip = self.take_hello(bytes)?;
            if skip == 0 {
                return Ok(Parsed::default());
            }
        }
        while self.in_frame == 0 {
            let Some(header) = bytes[skip..].first_chunk::<HEADER_BYTES>() else {
                return Ok(Parsed { skip, data: 0 });
            };
            if self.ended {
                return Err(Fault::Protocol("a frame after the end"));
            }
            let len = u32::from_le_bytes([header[0], header[1], header[2], 0]) as usize;
            match (header[3], len) {
                (DATA, 1..=MAX_FRAME_BYTES) => self.in_frame = len,
                (ALIVE, 0) => {}
                (END, 0) => self.ended = true,
                (DATA, _) => return Err(Fault::Protocol("a data frame of no length that is allowed")),
                (ALIVE | END, _) => return Err(Fault::Protocol("a frame with payload that has none")),
                _ => return Err(Fault::Protocol("a frame of no known kind")),
            }
            skip += HEADER_BYTES;
        }
        Ok(Parsed { skip, data: self.in_frame.min(bytes.len() - skip) })
    }

    /// The owner took `n` bytes of payload.
    ///
    /// # Panics
    /// If that is more than the frame has.
    pub fn took(&mut self, n: usize) {
        assert!(n <= self.in_frame, "more payload taken than there is");
        self.in_frame -= n;
    }

    /// Something arrived, or lies here unread.
    pub fn heard(&mut self, now: Instant) {
        self.heard = now;
    }

    /// The header of the next data frame.
    ///
    /// # Panics
    /// If `len` is 0 or above [`MAX_FRAME_BYTES`], or the end was announced.
    pub fn data_header(&mut self, len: usize, now: Instant) -> [u8; HEADER_BYTES] {
        assert!((1..=MAX_FRAME_BYTES).contains(&len) && !self.finished);
        self.said = now;
        let len = (len as u32).to_le_bytes();
        [len[0], len[1], len[2], DATA]
    }

    /// The frame that says that nothing more will be sent; the first time.
    pub fn end_frame(&mut self) -> Option<[u8; HEADER_BYTES]> {
        (!std::mem::replace(&mut self.finished, true)).then_some([0, 0, 0, END])
    }

    /// The frame that says that this side lives, if it is time for one.
    pub fn alive_frame(&mut self, now: Instant) -> Option<[u8; HEADER_BYTES]> {
        (now >= self.next_alive()?).then(|| {
            self.said = now;
            [0, 0, 0, ALIVE]
        })
    }

    /// Frames that were ready could not leave until now; their peer has heard of this side only now.
    pub fn said(&mut self, now: Instant) {
        self.said = now;
    }

    fn next_alive(&self) -> Option<Instant> {
        (self.version.is_some() && !self.finished).then(|| self.said + self.peer_silence / 4)
    }

    /// When the peer is to be taken for dead, if nothing is heard of it.
    fn dead_at(&self) -> Option<Instant> {
        match self.version {
            None => Some(self.began + self.config.handshake),
            Some(_) if self.ended => None,
            Some(_) => Some(self.heard + self.config.silence),
        }
    }

    /// Checks the clock.
    ///
    /// # Errors
    /// The peer is dead.
    pub fn check(&self, now: Instant) -> Result<(), Fault> {
        match self.dead_at() {
            Some(at) if now >= at && self.version.is_none() => Err(Fault::NoHello(self.config.handshake)),
            Some(at) if now >= at => Err(Fault::Silent(now.since(self.heard))),
            _ => Ok(()),
        }
    }

    /// When [`Session::check`] or, if nothing waits to be sent (`idle`), [`Session::alive_frame`] has to be called again at
    /// the latest.
    pub fn deadline(&self, idle: bool) -> Option<Instant> {
        [self.dead_at(), self.next_alive().filter(|_| idle)].into_iter().flatten().min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const T0: Instant = Instant(1_000_000_000);

    fn at(ms: u64) -> Instant {
        T0 + Duration::from_millis(ms)
    }

    fn open() -> Session {
        let mut session = Session::new(SessionConfig::default(), T0);
        let hello = Session::new(SessionConfig::default(), T0).hello();
        assert_eq!(session.parse(&hello), Ok(Parsed { skip: HELLO_BYTES, data: 0 }));
        session
    }

    #[test]
    fn the_hello_is_these_bytes() {
        let hello = Session::new(SessionConfig::default(), T0).hello();
        assert_eq!(&hello, b"RINGCHAN\x01\x00\x01\x00\x84\x03\x00\x00\x00\x00\x00\x00");
    }

    #[test]
    fn the_newest_common_version_is_used() {
        let end = |versions| Session::new(SessionConfig { versions, ..SessionConfig::default() }, T0);
        for (ours, theirs, agreed) in [((1, 3), (2, 5), Some(3)), ((2, 2), (1, 7), Some(2)), ((1, 2), (3, 4), None)] {
            let (mut a, mut b) = (end(ours), end(theirs));
            let (hello_a, hello_b) = (a.hello(), b.hello());
            for (end, hello) in [(&mut a, hello_b), (&mut b, hello_a)] {
                let parsed = end.parse(&hello);
                assert_eq!(parsed.is_ok(), agreed.is_some());
                assert_eq!(end.version(), agreed);
            }
        }
    }

    #[test]
    fn strangers_are_told_apart_by_their_first_byte() {
        let mut session = Session::new(SessionConfig::default(), T0);
        assert_eq!(session.parse(b"RING"), Ok(Parsed::default()));
        assert_eq!(session.parse(b"GET / HTTP/1.1"), Err(Fault::NotAChannel));
    }

    #[test]
    fn frames_that_lie_end_the_channel() {
        for frame in [[0, 0, 0, DATA], [1, 0, 4, DATA], [1, 0, 0, ALIVE], [0, 1, 0, END], [0, 0, 0, 3]] {
            assert!(matches!(open().parse(&frame), Err(Fault::Protocol(_))), "{frame:?}");
        }
        let mut session = open();
        assert_eq!(session.parse(&[0, 0, 0, END, 0, 0, 0, ALIVE]), Err(Fault::Protocol("a frame after the end")));
        assert!(session.has_ended());
    }

    #[test]
    fn a_silent_peer_is_dead_within_a_second_and_a_talking_one_never() {
        let mut session = open();
        session.heard(at(500));
        assert_eq!(session.check(at(1399)), Ok(()));
        assert_eq!(session.check(at(1400)), Err(Fault::Silent(Duration::from_millis(900))));
        for ms in (500..10_000).step_by(800) {
            assert_eq!(session.check(at(ms)), Ok(()));
            session.heard(at(ms));
        }
    }

    #[test]
    fn a_side_that_says_nothing_else_says_that_it_lives() {
        let mut session = open();
        assert_eq!(session.alive_frame(at(224)), None);
        assert_eq!(session.deadline(true), Some(at(225)));
        assert_eq!(session.deadline(false), Some(at(900)));
        assert_eq!(session.alive_frame(at(225)), Some([0, 0, 0, ALIVE]));
        assert_eq!(session.alive_frame(at(226)), None);
        session.data_header(1, at(400));
        assert_eq!(session.alive_frame(at(624)), None);
        assert!(session.end_frame().is_some() && session.end_frame().is_none());
        assert_eq!(session.alive_frame(at(10_000)), None);
    }

    #[test]
    fn a_peer_that_never_says_hello_is_given_up() {
        let session = Session::new(SessionConfig::default(), T0);
        assert_eq!(session.check(at(4999)), Ok(()));
        assert_eq!(session.check(at(5000)), Err(Fault::NoHello(Duration::from_secs(5))));
    }

    proptest! {
        /// However the stream is cut, the same payload comes out, in order, and nothing but payload.
        #[test]
        fn cuts_do_not_matter(
            frames in proptest::collection::vec((0usize..300, any::<u8>()), 1..30),
            cuts in proptest::collection::vec(1usize..97, 1..40),
        ) {
            let mut sender = Session::new(SessionConfig::default(), T0);
            let mut stream = sender.hello().to_vec();
            let mut sent = Vec::new();
            for &(len, byte) in &frames {
                if len == 0 {
                    stream.extend([0, 0, 0, ALIVE]);
                } else {
                    stream.extend(sender.data_header(len, T0));
                    stream.extend(vec![byte; len]);
                    sent.extend(vec![byte; len]);
                }
            }
            stream.extend(sender.end_frame().unwrap());
            let mut receiver = Session::new(SessionConfig::default(), T0);
            let (mut unread, mut got, mut rest) = (Vec::new(), Vec::new(), &stream[..]);
            for &cut in cuts.iter().cycle() {
                let (now, later) = rest.split_at(cut.min(rest.len()));
                rest = later;
                unread.extend_from_slice(now);
                loop {
                    let parsed = receiver.parse(&unread).unwrap();
                    unread.drain(..parsed.skip);
                    // What is taken may be less than what is there.
                    let n = parsed.data.min(61);
                    got.extend(unread.drain(..n));
                    receiver.took(n);
                    if n == 0 {
                        break;
                    }
                }
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(got, sent);
            prop_assert!(receiver.has_ended() && unread.is_empty());
        }

        /// Nothing that a peer says makes it panic, and what it names is bounded.
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut session = open();
            if let Ok(parsed) = session.parse(&bytes) {
                prop_assert!(parsed.skip + parsed.data <= bytes.len());
                prop_assert!(session.expects_data() <= MAX_FRAME_BYTES);
            }
        }
    }
}
