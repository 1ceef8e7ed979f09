//! I/O commands of a host: what is asked, and what the answers must be.

use std::collections::BTreeSet;
use std::rc::Rc;

use bdev::conformance::Rng;
use nvmf::spec::opcode::{admin, io};
use nvmf::spec::{Sqe, Status};
use nvmf::tcp::wire_client;
use reactor::Instant;
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

use super::{Command, Host, Io, Kind, Namespaces};
use crate::model::{self, Model};

const FUA: u32 = 1 << 30;
/// Data that fits the capsules of an I/O queue.
const IN_CAPSULE_BYTES: usize = 8192;

impl Host {
    fn tolerates(&self, status: Status, command: &Command) -> bool {
        let shared = self.shared.borrow();
        let allowed = shared.allowed;
        status.is_success()
            || shared.fleeting.contains(&command.nsid)
            || command.aborted && status.same_code(Status::ABORT_REQUESTED)
            || allowed.media && status.sct() == 2
            || allowed.full && (status.sct() == 2 || status.same_code(Status::CAPACITY_EXCEEDED))
    }

    pub(super) fn io_done(&mut self, command: Command, status: Status) {
        let different = command.kind == Kind::Io(Io::Compare) && status.same_code(Status::COMPARE_FAILURE);
        assert!(
            different || self.tolerates(status, &command),
            "host {}: {:?} of {} blocks at {} of namespace {}: {status:?}",
            self.config.number,
            command.kind,
            command.blocks,
            command.lba,
            command.nsid
        );
        let mut shared = self.shared.borrow_mut();
        shared.succeeded += u64::from(status.is_success());
        if !status.is_success() && !different {
            return lose(&mut shared, &command);
        }
        assert!(different || command.data.len() == command.expects, "host {}: data is missing", self.config.number);
        let Some(model) = shared.models.get_mut(&command.nsid) else { return };
        let Command { lba, blocks, durable, .. } = command;
        let result = match (&command.kind, command.read, command.write) {
            (Kind::Io(Io::Read), Some(read), _) => model.was_read(read, lba, &command.data),
            (Kind::Io(Io::Compare), Some(read), _) if different => model.was_different(read, lba, &command.payload),
            (Kind::Io(Io::Compare), Some(read), _) => model.was_equal(read, lba, &command.payload),
            (Kind::Io(Io::Flush), ..) => {
                model.flushed(command.flush);
                Ok(())
            }
            (_, _, Some(write)) => {
                model.wrote(write, lba, blocks, durable);
                Ok(())
            }
            _ => Ok(()),
        };
        if let Err(why) = result {
            panic!(
                "host {}: {:?} of {blocks} blocks at {lba} of {}: {why}",
                self.config.number, command.kind, command.nsid
            );
        }
    }

    pub(super) fn fused_done(&mut self, (compare, first): (Command, Status), (write, second): (Command, Status)) {
        let number = self.config.number;
        let different = first.same_code(Status::COMPARE_FAILURE);
        let failed = second.same_code(Status::ABORTED_FAILED_FUSED);
        let undone = first.same_code(Status::ABORTED_FAILED_FUSED) && !second.is_success();
        assert!(
            different || undone || self.tolerates(first, &compare),
            "host {number}: fused compare: {first:?}, {second:?}"
        );
        assert!(
            failed && !first.is_success() || self.tolerates(second, &write),
            "host {number}: fused write: {first:?}, {second:?}"
        );
        assert!(first.is_success() || !second.is_success(), "host {number}: fused: {first:?}, {second:?}");
        let mut shared = self.shared.borrow_mut();
        let Some(model) = shared.models.get_mut(&write.nsid) else { return };
        let (Some(read), Some(token)) = (compare.read, write.write) else { return };
        let result = if first.is_success() && second.is_success() {
            model.replaced(read, token, write.lba, &compare.payload, write.stamp, write.durable)
        } else if different {
            model.refused(token, write.lba, write.blocks);
            model.was_different(read, compare.lba, &compare.payload)
        } else {
            model.read_lost(read);
            model.lost(token, write.lba, write.blocks);
            Ok(())
        };
        if let Err(why) = result {
            panic!("host {number}: fused compare and write at {}: {why}", write.lba);
        }
    }

    /// Submits one I/O command, or two that are fused; whether there was room.
    pub(super) fn submit_one(&mut self, now: Instant) -> bool {
        let with_room: Vec<usize> = (1..self.queues.len()).filter(|&n| self.queues[n].room() >= 2).collect();
        if with_room.is_empty() {
            return false;
        }
        let index = with_room[self.rng.below(with_room.len() as u64) as usize];
        let shared = Rc::clone(&self.shared);
        let mut shared = shared.borrow_mut();
        let nsids: Vec<u32> = shared.models.keys().chain(&shared.fleeting).copied().collect();
        let nsid = nsids[self.rng.below(nsids.len() as u64) as usize];
        let Some(model) = shared.models.get_mut(&nsid) else {
            self.submit_fleeting(index, nsid, now);
            return true;
        };
        let size = model.block_size();
        let most = (self.config.max_bytes / size as u64).clamp(1, model.len());
        let top = if self.rng.one_in(6) { most } else { most.min(8) };
        let kind = self.rng.below(20);
        // A fused operation is atomic, and that is promised for one block.
        let blocks = if kind >= 18 { 1 } else { 1 + self.rng.below(top) };
        let span = if self.rng.one_in(2) { model.len().min(blocks + 6) } else { model.len() };
        let lba = self.rng.below(span - blocks + 1);
        let bytes = blocks as usize * size;
        let durable = self.rng.one_in(4);
        let io = match kind {
            0..6 => Io::Read,
            6..13 | 17.. => Io::Write,
            13 => Io::Flush,
            14 => Io::WriteZeroes,
            15 => Io::Deallocate,
            _ => Io::Compare,
        };
        let mut command = Command::new(Kind::Io(io.clone()), now);
        (command.nsid, command.lba, command.blocks, command.durable) = (nsid, lba, blocks, durable);
        if kind >= 18 {
            let expected = guess(model, &mut self.rng, lba, blocks);
            let stamp = model.stamp();
            let payload = model::payload(stamp, lba, blocks, size);
            let (read, write) = (Some(model.read()), Some(model.write(stamp, lba, blocks)));
            let mut sqe = wire_client::write(0, nsid, lba, blocks as u32, bytes as u32);
            (sqe.opcode, sqe.flags) = (io::COMPARE, sqe.flags | 1);
            let compare = Command { read, payload: expected, ..command };
            let first = self.send_write(index, sqe, Command { kind: Kind::FusedCompare { other: 0 }, ..compare });
            let mut sqe = wire_client::write(0, nsid, lba, blocks as u32, bytes as u32);
            sqe.flags |= 2;
            if durable {
                sqe.cdw12 |= U32::new(FUA);
            }
            let command = Command {
                kind: Kind::FusedWrite { other: first },
                write,
                stamp,
                payload,
                nsid,
                lba,
                blocks,
                durable,
                ..Command::new(Kind::Enable, now)
            };
            let second = self.send_write(index, sqe, command);
            let half = self.queues[index].commands.get_mut(&first).expect("it was just submitted");
            half.kind = Kind::FusedCompare { other: second };
            return true;
        }
        match io {
            Io::Read => {
                command.read = Some(model.read());
                command.expects = bytes;
                let sqe = wire_client::read(0, nsid, lba, blocks as u32, bytes as u32);
                self.queues[index].submit(sqe, &[], command);
            }
            Io::Write => {
                command.stamp = model.stamp();
                command.write = Some(model.write(command.stamp, lba, blocks));
                command.payload = model::payload(command.stamp, lba, blocks, size);
                let mut sqe = wire_client::write(0, nsid, lba, blocks as u32, bytes as u32);
                if durable {
                    sqe.cdw12 |= U32::new(FUA);
                }
                self.send_write(index, sqe, command);
            }
            Io::Flush => {
                command.flush = model.flush();
                self.queues[index].submit(wire_client::command(io::FLUSH, 0, nsid), &[], command);
            }
            Io::WriteZeroes => {
                command.write = Some(model.write(0, lba, blocks));
                let mut sqe = wire_client::write(0, nsid, lba, blocks as u32, 0);
                sqe.opcode = io::WRITE_ZEROES;
                if durable {
                    sqe.cdw12 |= U32::new(FUA);
                }
                self.queues[index].submit(sqe, &[], command);
            }
            Io::Deallocate => {
                command.durable = false;
                command.write = Some(model.write(0, lba, blocks));
                let range = nvmf::spec::command::DsmRange {
                    attributes: U32::new(0),
                    blocks: U32::new(blocks as u32),
                    slba: U64::new(lba),
                };
                let mut sqe = wire_client::command(io::DATASET_MANAGEMENT, 0, nsid);
                sqe.cdw11 = U32::new(4);
                command.payload = range.as_bytes().to_vec();
                self.send_write(index, wire_client::with_transfer(sqe, 16), command);
            }
            Io::Compare => {
                command.read = Some(model.read());
                command.payload = guess(model, &mut self.rng, lba, blocks);
                let mut sqe = wire_client::write(0, nsid, lba, blocks as u32, bytes as u32);
                sqe.opcode = io::COMPARE;
                self.send_write(index, sqe, command);
            }
        }
        true
    }

    fn submit_fleeting(&mut self, index: usize, nsid: u32, now: Instant) {
        let mut command = Command::new(Kind::Io(Io::Read), now);
        command.nsid = nsid;
        let lba = self.rng.below(64);
        if self.rng.one_in(2) {
            command.expects = 4096;
            self.queues[index].submit(wire_client::read(0, nsid, lba, 1, 4096), &[], command);
        } else {
            command.kind = Kind::Io(Io::Write);
            command.payload = vec![7; 4096];
            self.send_write(index, wire_client::write(0, nsid, lba, 1, 4096), command);
        }
    }

    /// Sends a command with its payload in the capsule, or to be asked for.
    fn send_write(&mut self, index: usize, sqe: Sqe, command: Command) -> u16 {
        let payload = command.payload.clone();
        if payload.len() <= IN_CAPSULE_BYTES && !self.rng.one_in(3) {
            let sqe = wire_client::with_in_capsule(sqe, payload.len() as u32);
            return self.queues[index].submit(sqe, &payload, command);
        }
        self.queues[index].submit(sqe, &[], command)
    }

    pub(super) fn abort_something(&mut self, now: Instant) {
        let outstanding: BTreeSet<(usize, u16)> = (1..self.queues.len())
            .flat_map(|n| self.queues[n].commands.iter().map(move |(cid, command)| (n, *cid, command)))
            .filter(|(_, _, command)| matches!(command.kind, Kind::Io(_)))
            .map(|(n, cid, _)| (n, cid))
            .collect();
        if outstanding.is_empty() || self.queues[0].room() < 4 {
            return;
        }
        let nth = self.rng.below(outstanding.len() as u64) as usize;
        let Some(&(index, cid)) = outstanding.iter().nth(nth) else { return };
        let qid = self.queues[index].qid;
        self.queues[index].commands.get_mut(&cid).expect("it was just seen").aborted = true;
        let mut sqe = wire_client::command(admin::ABORT, 0, 0);
        sqe.cdw10 = U32::new(u32::from(qid) | u32::from(cid) << 16);
        self.queues[0].submit(sqe, &[], Command::new(Kind::Abort, now));
    }
}

fn guess(model: &Model, rng: &mut Rng, lba: u64, blocks: u64) -> Vec<u8> {
    let size = model.block_size();
    let mut expected = vec![0; blocks as usize * size];
    for (n, block) in expected.chunks_mut(size).enumerate() {
        model::fill(model.guess(lba + n as u64), lba + n as u64, block);
    }
    if rng.one_in(8) {
        expected[0] ^= 1;
    }
    expected
}

/// Nobody will tell how a command has ended.
pub(super) fn lose(shared: &mut Namespaces, command: &Command) {
    let Some(model) = shared.models.get_mut(&command.nsid) else { return };
    command.read.into_iter().for_each(|read| model.read_lost(read));
    command.write.into_iter().for_each(|write| model.lost(write, command.lba, command.blocks));
}
