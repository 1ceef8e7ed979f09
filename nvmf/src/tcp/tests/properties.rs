//! Random mixes of commands, random splits of the stream, random shortage of memory: every command gets its one right
//! answer.

use super::*;
use crate::spec::opcode::io;
use crate::tcp::wire_client::{command, read, write, write_in_capsule};
use proptest::prelude::*;
use std::collections::HashMap;

/// What a host does with one command.
#[derive(Clone, Debug)]
enum Job {
    Flush,
    Read { len: u32, status_ok: bool },
    WriteInCapsule { len: u32, spoil_digest: bool },
    Write { len: u32, piece: u32 },
    TooLong,
}

fn job() -> impl Strategy<Value = Job> {
    prop_oneof![
        Just(Job::Flush),
        (1u32..20_000, any::<bool>()).prop_map(|(len, status_ok)| Job::Read { len, status_ok }),
        (1u32..8192, prop::bool::weighted(0.2))
            .prop_map(|(len, spoil_digest)| Job::WriteInCapsule { len, spoil_digest }),
        (1u32..20_000, 1u32..9000).prop_map(|(len, piece)| Job::Write { len, piece }),
        Just(Job::TooLong),
    ]
}

#[derive(Clone, Debug)]
struct Setup {
    header_digest: bool,
    data_digest: bool,
    cpda: u8,
    hpda: u8,
    flow_control: bool,
    jobs: Vec<Job>,
    /// How the stream is cut, and other choices, over and over.
    cuts: Vec<u16>,
}

fn setup() -> impl Strategy<Value = Setup> {
    (
        any::<(bool, bool, bool)>(),
        (0u8..32, 0u8..32),
        prop::collection::vec(job(), 1..40),
        prop::collection::vec(1u16..3000, 1..20),
    )
        .prop_map(|((header_digest, data_digest, flow_control), (cpda, hpda), jobs, cuts)| Setup {
            header_digest,
            data_digest,
            cpda,
            hpda,
            flow_control,
            jobs,
            cuts,
        })
}

const DEPTH: u16 = 8;

/// A host and a target that run a setup to its end.
struct Run {
    link: Link,
    jobs: Vec<Job>,
    cuts: std::iter::Cycle<std::vec::IntoIter<u16>>,
    /// Bytes of the host that the target has not consumed.
    stream: Vec<u8>,
    next: usize,
    round: usize,
    outstanding: u16,
    /// What came back: by CID, the data and the status.
    reads: HashMap<u16, Vec<u8>>,
    done: HashMap<u16, Status>,
    executing: Vec<(u16, Cqe, Option<Buffers>, usize)>,
}

impl Run {
    fn new(setup: Setup) -> Self {
        let config = Config {
            slots: DEPTH,
            cpda: setup.cpda,
            maxh2cdata: 8192,
            max_io_bytes: 32768,
            r2t_window_bytes: 30_000,
            ..Config::default()
        };
        let mut link = Link::with(config, setup.header_digest, setup.data_digest, setup.hpda);
        link.conn.set_queue(u32::from(DEPTH), setup.flow_control, true);
        Self {
            link,
            jobs: setup.jobs,
            cuts: setup.cuts.into_iter().cycle(),
            stream: Vec::new(),
            next: 0,
            round: 0,
            outstanding: 0,
            reads: HashMap::new(),
            done: HashMap::new(),
            executing: Vec::new(),
        }
    }

    fn cut(&mut self) -> usize {
        usize::from(self.cuts.next().unwrap())
    }

    fn payload(cid: u16, len: u32) -> Vec<u8> {
        pattern(len as usize, cid as u8)
    }

    fn submit(&mut self) {
        while self.outstanding < DEPTH && self.next < self.jobs.len() {
            let cid = self.next as u16;
            let host = &self.link.host;
            let capsule = match self.jobs[self.next] {
                Job::Flush => host.capsule(&command(io::FLUSH, cid, 1), &[]),
                Job::Read { len, .. } => host.capsule(&read(cid, 1, 0, 1, len), &[]),
                Job::Write { len, .. } => host.capsule(&write(cid, 1, 0, 1, len), &[]),
                Job::TooLong => host.capsule(&write(cid, 1, 0, 1, 32769), &[]),
                Job::WriteInCapsule { len, spoil_digest } => {
                    let sqe = write_in_capsule(cid, 1, 0, 1, len);
                    let mut capsule = host.capsule(&sqe, &Self::payload(cid, len));
                    if spoil_digest && host.out.data_digest {
                        *capsule.last_mut().unwrap() ^= 1;
                    }
                    capsule
                }
            };
            self.stream.extend(capsule);
            self.next += 1;
            self.outstanding += 1;
        }
    }

    /// Gives the target a piece of the stream, in place where it asks for that.
    fn feed(&mut self) {
        let n = self.cut().min(self.stream.len());
        let mut at = 0;
        if n.is_multiple_of(2)
            && let Some(target) = self.link.conn.read_target()
        {
            at = target.len().min(n);
            target[..at].copy_from_slice(&self.stream[..at]);
            self.link.conn.read_done(at);
        }
        // Memory comes and goes.
        self.round += 1;
        let short = self.cut().is_multiple_of(3) && !self.round.is_multiple_of(7);
        self.link.memory = if short { 0 } else { 60_000 };
        let piece = self.stream[at..n].to_vec();
        let used = self.link.handle(&piece).unwrap();
        self.stream.drain(..at + used);
        self.link.retry();
    }

    fn execute(&mut self) {
        while let Some(event) = self.link.conn.poll_event() {
            match event {
                Event::Rejected { slot, sqe, status, .. } => {
                    let cid = sqe.cid.get();
                    match self.jobs[usize::from(cid)] {
                        Job::TooLong => assert_eq!(status, Status::DATA_SGL_LENGTH_INVALID.dnr()),
                        Job::WriteInCapsule { spoil_digest: true, .. } => {
                            assert_eq!(status, Status::TRANSIENT_TRANSPORT_ERROR);
                        }
                        ref job => panic!("{job:?} was rejected: {status}"),
                    }
                    let delay = self.cut() % 5;
                    self.executing.push((slot, Cqe::new(cid, status), None, delay));
                }
                Event::Command { slot, seq, sqe, mut data } => {
                    let cid = sqe.cid.get();
                    assert_eq!(seq, u32::from(cid));
                    let (status, data) = match self.jobs[usize::from(cid)] {
                        Job::Read { len, status_ok } => {
                            assert_eq!(data.len(), len as usize);
                            data.write_at(0, &Self::payload(cid, len));
                            let status = if status_ok { Status::SUCCESS } else { Status::UNRECOVERED_READ_ERROR };
                            (status, Some(data))
                        }
                        Job::WriteInCapsule { len, .. } | Job::Write { len, .. } => {
                            assert_eq!(data.to_vec(), Self::payload(cid, len));
                            (Status::SUCCESS, None)
                        }
                        Job::Flush => (Status::SUCCESS, None),
                        Job::TooLong => panic!("delivered"),
                    };
                    let delay = self.cut() % 5;
                    self.executing.push((slot, Cqe::new(cid, status), data, delay));
                }
            }
        }
        let mut i = 0;
        while i < self.executing.len() {
            if self.executing[i].3 == 0 {
                let (slot, cqe, data, _) = self.executing.swap_remove(i);
                self.link.conn.complete(slot, cqe, data);
            } else {
                self.executing[i].3 -= 1;
                i += 1;
            }
        }
    }

    /// Sends a piece of the target's output and lets the host answer.
    fn answer(&mut self) {
        let mut iov = [IoSlice::new(&[]); 5];
        let n = self.link.conn.poll_output(&mut iov);
        let mut bytes: Vec<u8> = iov[..n].iter().flat_map(|s| s.to_vec()).collect();
        bytes.truncate(self.cut() * 4);
        self.link.conn.sent(bytes.len(), &mut |_| ());
        for pdu in self.link.host.receive(&bytes).unwrap() {
            match pdu {
                TargetPdu::R2t { cid, ttag, offset, len } => {
                    let Job::Write { len: total, piece } = self.jobs[usize::from(cid)] else { panic!("R2T") };
                    let payload = Self::payload(cid, total);
                    self.stream.extend(self.link.host.answer_r2t(cid, ttag, offset, len, &payload, piece));
                }
                TargetPdu::Data { cid, offset, data, success, .. } => {
                    assert_eq!(offset, 0);
                    assert_eq!(self.reads.insert(cid, data), None);
                    if success {
                        self.finish(cid, Status::SUCCESS);
                    }
                }
                TargetPdu::Response(cqe) => self.finish(cqe.cid.get(), cqe.status()),
                pdu => panic!("{pdu:?}"),
            }
        }
    }

    fn finish(&mut self, cid: u16, status: Status) {
        assert_eq!(self.done.insert(cid, status), None);
        self.outstanding -= 1;
    }

    fn run_to_the_end(mut self) {
        while self.done.len() < self.jobs.len() {
            self.submit();
            self.feed();
            self.execute();
            self.answer();
            assert!(self.round < 200_000, "no progress: {:?}", self.link.conn);
        }
        for (cid, job) in self.jobs.iter().enumerate() {
            let cid = cid as u16;
            let status = self.done[&cid];
            let got = self.reads.get(&cid);
            match *job {
                Job::Read { len, status_ok: true } => assert_eq!(got, Some(&Self::payload(cid, len))),
                Job::Read { .. } => assert_eq!((got, status), (None, Status::UNRECOVERED_READ_ERROR)),
                Job::TooLong => assert_eq!(status, Status::DATA_SGL_LENGTH_INVALID.dnr()),
                Job::WriteInCapsule { spoil_digest: true, .. } if self.link.host.out.data_digest => {
                    assert_eq!(status, Status::TRANSIENT_TRANSPORT_ERROR);
                }
                _ => assert!(status.is_success()),
            }
        }
        assert_eq!(self.link.conn.outstanding(), 0);
        assert!(!self.link.conn.stalled() && !self.link.conn.wants_output() && self.stream.is_empty());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn every_command_gets_its_answer(setup in setup()) {
        Run::new(setup).run_to_the_end();
    }

    /// One byte at a time, in pieces, or at once: the machine does the same.
    #[test]
    fn splits_do_not_matter(
        bytes in prop::collection::vec(any::<u8>(), 0..400),
        choices in prop::collection::vec(0u8..6, 0..12),
        cut in 1usize..90,
        digests in any::<(bool, bool)>(),
    ) {
        let mut host = WireClient::new();
        let mut stream = host.icreq(digests.0, digests.1, 0, 0);
        host.out = Framing { header_digest: digests.0, data_digest: digests.1, pda: 0 };
        for (cid, choice) in choices.iter().enumerate() {
            let cid = cid as u16;
            stream.extend(match choice {
                0 => host.capsule(&command(io::FLUSH, cid, 1), &[]),
                1 => host.capsule(&read(cid, 1, 0, 1, 512), &[]),
                2 => host.capsule(&write(cid, 1, 0, 1, 100), &[]),
                3 => host.h2c_data(cid.wrapping_sub(1), 0, 0, &[1; 100], true),
                4 => host.capsule(&write_in_capsule(cid, 1, 0, 1, 300), &[2; 300]),
                _ => host.capsule(&write_in_capsule(cid, 1, 0, 1, 300), &[2; 299]),
            });
        }
        stream.extend(bytes);
        let run = |cut: usize| {
            let mut link = Link::bare(Config { slots: 8, ..Config::default() });
            let mut events = Vec::new();
            let mut fault = None;
            'stream: for mut piece in stream.chunks(cut) {
                while !piece.is_empty() {
                    match link.handle(piece) {
                        Ok(n) => piece = &piece[n..],
                        Err(f) => {
                            fault = Some(f);
                            break 'stream;
                        }
                    }
                    while let Some(event) = link.conn.poll_event() {
                        events.push(match event {
                            Event::Command { slot, seq, sqe, data } => {
                                let data = if sqe.opcode == io::READ { vec![] } else { data.to_vec() };
                                (slot, seq, sqe, data, Status::SUCCESS)
                            }
                            Event::Rejected { slot, seq, sqe, status } => (slot, seq, sqe, vec![], status),
                        });
                    }
                }
            }
            let ending = link.conn.is_ending();
            let out = if ending { vec![] } else { link.output() };
            (events, fault, out, ending)
        };
        // Events that a fatal error behind them in the same piece takes away are the only difference.
        let (events, fault, out, ending) = run(cut);
        let (bytewise, bytewise_fault, bytewise_out, bytewise_ending) = run(1);
        prop_assert_eq!(&bytewise[..events.len()], &events[..]);
        prop_assert!(events.len() == bytewise.len() || ending);
        prop_assert_eq!((fault, out, ending), (bytewise_fault, bytewise_out, bytewise_ending));
    }
}
