//! A client that says exactly what it is told to.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nbd::wire::{
    CHUNK_MAGIC, IHAVEOPT, OPTION_REPLY_MAGIC, Request, SIMPLE_REPLY_MAGIC, chunk, command, info, option, reply,
};

/// Why a request was not done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The server said so.
    Refused(u32),
    /// The connection is over.
    Gone,
}

impl From<io::Error> for Failure {
    fn from(_: io::Error) -> Failure {
        Failure::Gone
    }
}

/// What a read brings, by offset.
pub type Pieces = Vec<(u64, Vec<u8>)>;

/// A connection that has chosen its export.
#[derive(Debug)]
pub struct Client {
    pub stream: UnixStream,
    pub size: u64,
    pub flags: u16,
    cookie: u64,
}

impl Client {
    pub fn connect(socket: &Path) -> io::Result<Client> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(crate::common::PATIENCE))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        assert_eq!(greeting, *b"NBDMAGICIHAVEOPT\x00\x03");
        stream.write_all(&3u32.to_be_bytes())?;
        send_option(&mut stream, option::STRUCTURED_REPLY, &[])?;
        assert_eq!(option_reply(&mut stream)?.0, reply::ACK);
        let data = [&0u32.to_be_bytes()[..], &1u16.to_be_bytes(), &info::BLOCK_SIZE.to_be_bytes()].concat();
        send_option(&mut stream, option::GO, &data)?;
        let (mut size, mut flags) = (0, 0);
        loop {
            let (kind, data) = option_reply(&mut stream)?;
            match kind {
                reply::ACK => break,
                reply::INFO if data[..2] == info::EXPORT.to_be_bytes() => {
                    size = u64::from_be_bytes(data[2..10].try_into().unwrap());
                    flags = u16::from_be_bytes(data[10..12].try_into().unwrap());
                }
                reply::INFO => {}
                other => return Err(io::Error::other(format!("{other:#x}: {}", String::from_utf8_lossy(&data)))),
            }
        }
        Ok(Client { stream, size, flags, cookie: 0 })
    }

    /// Sends a request; its cookie.
    pub fn send(&mut self, command: u16, flags: u16, offset: u64, length: u32, data: &[u8]) -> Result<u64, Failure> {
        self.cookie += 1;
        let request = Request { flags, command, cookie: self.cookie, offset, length };
        self.stream.write_all(&[&request.to_bytes()[..], data].concat())?;
        Ok(self.cookie)
    }

    /// The next whole reply: its cookie, and the pieces of a read by offset or the error.
    pub fn reply(&mut self) -> Result<(u64, Result<Pieces, u32>), Failure> {
        let (mut pieces, mut error) = (Vec::new(), None);
        loop {
            let mut magic = [0; 4];
            self.stream.read_exact(&mut magic)?;
            if u32::from_be_bytes(magic) == SIMPLE_REPLY_MAGIC {
                let mut rest = [0; 12];
                self.stream.read_exact(&mut rest)?;
                let code = u32::from_be_bytes(rest[..4].try_into().unwrap());
                let cookie = u64::from_be_bytes(rest[4..].try_into().unwrap());
                return Ok((cookie, if code == 0 { Ok(pieces) } else { Err(code) }));
            }
            assert_eq!(u32::from_be_bytes(magic), CHUNK_MAGIC);
            let mut head = [0; 16];
            self.stream.read_exact(&mut head)?;
            let flags = u16::from_be_bytes(head[..2].try_into().unwrap());
            let kind = u16::from_be_bytes(head[2..4].try_into().unwrap());
            let cookie = u64::from_be_bytes(head[4..12].try_into().unwrap());
            let mut payload = vec![0; u32::from_be_bytes(head[12..].try_into().unwrap()) as usize];
            self.stream.read_exact(&mut payload)?;
            let number = || u64::from_be_bytes(payload[..8].try_into().unwrap());
            match kind {
                chunk::OFFSET_DATA => pieces.push((number(), payload[8..].to_vec())),
                chunk::OFFSET_HOLE => {
                    let length = u32::from_be_bytes(payload[8..12].try_into().unwrap());
                    pieces.push((number(), vec![0; length as usize]));
                }
                chunk::ERROR | chunk::ERROR_OFFSET => {
                    error = Some(u32::from_be_bytes(payload[..4].try_into().unwrap()));
                }
                chunk::NONE => {}
                other => panic!("chunk of type {other}"),
            }
            if flags & chunk::DONE != 0 {
                return Ok((cookie, error.map_or(Ok(pieces), Err)));
            }
        }
    }

    fn ask(&mut self, command: u16, flags: u16, at: u64, len: u32, data: &[u8]) -> Result<Pieces, Failure> {
        let sent = self.send(command, flags, at, len, data)?;
        let (cookie, result) = self.reply()?;
        assert_eq!(cookie, sent);
        result.map_err(Failure::Refused)
    }

    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, Failure> {
        let mut out = vec![0; length as usize];
        let mut seen = 0;
        for (at, data) in self.ask(command::READ, 0, offset, length, &[])? {
            let from = (at - offset) as usize;
            out[from..from + data.len()].copy_from_slice(&data);
            seen += data.len();
        }
        assert_eq!(seen, out.len(), "a read is answered in full");
        Ok(out)
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), Failure> {
        self.ask(command::WRITE, 0, offset, data.len() as u32, data).map(drop)
    }

    pub fn flush(&mut self) -> Result<(), Failure> {
        self.ask(command::FLUSH, 0, 0, 0, &[]).map(drop)
    }

    /// Waits for the end of the stream; whether it is one.
    pub fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).is_ok_and(|_| rest.is_empty())
    }
}

pub fn send_option(stream: &mut UnixStream, option: u32, data: &[u8]) -> io::Result<()> {
    let head = [option, data.len() as u32].map(u32::to_be_bytes).concat();
    stream.write_all(&[&IHAVEOPT.to_be_bytes()[..], &head, data].concat())
}

/// The next reply to an option: its type and data.
pub fn option_reply(stream: &mut UnixStream) -> io::Result<(u32, Vec<u8>)> {
    let mut head = [0; 20];
    stream.read_exact(&mut head)?;
    assert_eq!(head[..8], OPTION_REPLY_MAGIC.to_be_bytes());
    let mut data = vec![0; u32::from_be_bytes(head[16..].try_into().unwrap()) as usize];
    stream.read_exact(&mut data)?;
    Ok((u32::from_be_bytes(head[12..16].try_into().unwrap()), data))
}
