//! The host's machine: its rules, and random orders of everything that can happen to it.

use proptest::prelude::*;
use zerocopy::{FromZeros, IntoBytes};

use super::*;
use crate::spec::Status;

fn ready(slots: u16) -> HostQueue {
    let mut queue = HostQueue::new(slots);
    queue.established(u16::MAX).unwrap();
    queue
}

fn response(cid: u16) -> Vec<u8> {
    Cqe::success(cid).as_bytes().to_vec()
}

fn write(queue: &mut HostQueue, user: u64, len: u32) {
    queue.submit(user, Sqe::new_zeroed(), Payload::ToController(len), Buffers::heap(len as usize));
}

#[test]
fn a_command_completes_when_it_was_sent_and_answered_and_its_memory_is_back() {
    // In every order.
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let mut queue = ready(4);
        write(&mut queue, 7, 100);
        let mut out = queue.next_command().unwrap();
        assert_eq!((out.carry, out.sqe.psdt()), (Carry::Keyed { to_controller: true }, 1));
        for (n, step) in order.into_iter().enumerate() {
            assert!(queue.poll_completion().is_none(), "{order:?} {n}");
            match step {
                0 => queue.sent(out.slot),
                1 => assert_eq!(queue.received(&response(out.sqe.cid.get()), None), Ok(out.slot)),
                _ => queue.data_back(out.slot, std::mem::take(&mut out.data)),
            }
        }
        let done = queue.poll_completion().unwrap();
        assert_eq!((done.user, done.data.len(), done.transferred_bytes), (7, 100, 100));
        assert_eq!(queue.outstanding(), 0);
    }
}

#[test]
fn the_controllers_receives_bound_what_is_outstanding() {
    let mut queue = HostQueue::new(8);
    assert!(!queue.is_ready() && !queue.can_submit());
    queue.established(2).unwrap();
    assert!(queue.can_submit_pair());
    write(&mut queue, 1, 0);
    assert!(queue.can_submit() && !queue.can_submit_pair());
    write(&mut queue, 2, 0);
    assert!(!queue.can_submit());
    let first = queue.next_command().unwrap();
    assert_eq!(first.carry, Carry::Nothing);
    // An answer gives the credit back, also before the send is known to have left.
    queue.received(&response(first.sqe.cid.get()), None).unwrap();
    assert!(queue.can_submit() && queue.poll_completion().is_none());
    assert_eq!(HostQueue::new(8).established(0), Err(HostFault::NoReceives));
}

#[test]
fn data_goes_in_the_capsule_when_it_fits() {
    let mut queue = ready(4);
    queue.set_in_capsule_bytes(4096);
    write(&mut queue, 1, 4096);
    write(&mut queue, 2, 4097);
    queue.submit(3, Sqe::new_zeroed(), Payload::ToHost(512), Buffers::heap(512));
    let carries = [(); 3].map(|()| queue.next_command().unwrap().carry);
    assert_eq!(
        carries,
        [Carry::InCapsule, Carry::Keyed { to_controller: true }, Carry::Keyed { to_controller: false }]
    );
}

#[test]
fn descriptors_are_bounded_by_the_controller_and_by_the_capsule() {
    let mut queue = ready(1);
    let mut blocks = |msdbd, in_capsule| {
        queue.set_descriptors(msdbd);
        queue.set_in_capsule_bytes(in_capsule);
        queue.max_blocks()
    };
    assert_eq!([blocks(16, 0), blocks(0, 8192), blocks(1, 8192), blocks(200, 8192), blocks(16, 95)], [1, 16, 1, 16, 5]);
}

#[test]
fn what_is_no_answer_ends_the_queue_pair() {
    let mut queue = ready(2);
    write(&mut queue, 1, 0);
    let cid = queue.slots.iter().find(|slot| slot.state == State::Queued).unwrap().cid;
    // It was not even sent.
    assert_eq!(queue.received(&response(cid), None), Err(HostFault::UnknownCid(cid)));
    let out = queue.next_command().unwrap();
    for len in [0, 15, 17, 64] {
        assert_eq!(queue.received(&vec![0; len], None), Err(HostFault::NoResponse(len)));
    }
    assert_eq!(queue.received(&response(cid), Some(9)), Err(HostFault::Invalidated(9)));
    for wrong in [cid ^ 1, cid ^ 2, 0xffff] {
        assert_eq!(queue.received(&response(wrong), None), Err(HostFault::UnknownCid(wrong)));
    }
    queue.received(&response(cid), None).unwrap();
    assert_eq!(queue.received(&response(cid), None), Err(HostFault::UnknownCid(cid)));
    queue.sent(out.slot);
    queue.poll_completion().unwrap();
    // The next use of the slot has another identifier.
    write(&mut queue, 2, 0);
    queue.next_command().unwrap();
    assert_eq!(queue.received(&response(cid), None), Err(HostFault::UnknownCid(cid)));
}

#[test]
fn a_failed_command_has_moved_nothing() {
    let mut queue = ready(1);
    queue.submit(1, Sqe::new_zeroed(), Payload::ToHost(512), Buffers::heap(512));
    let out = queue.next_command().unwrap();
    let cqe = Cqe::new(out.sqe.cid.get(), Status::INVALID_FIELD);
    queue.received(cqe.as_bytes(), None).unwrap();
    queue.sent(out.slot);
    queue.data_back(out.slot, out.data);
    assert_eq!(queue.poll_completion().unwrap().transferred_bytes, 0);
}

#[derive(Debug)]
struct World {
    queue: HostQueue,
    /// Posted: whether it was sent, whether it was answered, its data.
    posted: Vec<(Outgoing, bool, bool, bool)>,
    next_user: u64,
    completed: Vec<u64>,
    credits: usize,
}

impl World {
    fn step(&mut self, choice: u8, pick: usize) {
        let pick = if self.posted.is_empty() { 0 } else { pick % self.posted.len() };
        match choice % 6 {
            0 if self.queue.can_submit() => {
                let len = (pick * 977 % 5000) as u32;
                let payload = if choice > 100 { Payload::ToHost(len) } else { Payload::ToController(len) };
                self.queue.submit(self.next_user, Sqe::new_zeroed(), payload, Buffers::heap(len as usize));
                self.next_user += 1;
            }
            1 => {
                if let Some(out) = self.queue.next_command() {
                    if choice > 200 {
                        self.queue.put_back(out);
                    } else {
                        let home = out.carry == Carry::Nothing;
                        self.posted.push((out, false, false, home));
                    }
                }
            }
            2 if !self.posted.is_empty() && !self.posted[pick].1 => {
                self.posted[pick].1 = true;
                self.queue.sent(self.posted[pick].0.slot);
            }
            3 if !self.posted.is_empty() && !self.posted[pick].2 => {
                self.posted[pick].2 = true;
                let cid = self.posted[pick].0.sqe.cid.get();
                self.queue.received(&response(cid), None).unwrap();
            }
            4 if !self.posted.is_empty() && !self.posted[pick].3 => {
                self.posted[pick].3 = true;
                let data = std::mem::take(&mut self.posted[pick].0.data);
                self.queue.data_back(self.posted[pick].0.slot, data);
            }
            _ => {
                while let Some(done) = self.queue.poll_completion() {
                    self.completed.push(done.user);
                }
            }
        }
        self.posted.retain(|(_, sent, answered, home)| !(*sent && *answered && *home));
    }
}

proptest! {
    /// Every command completes once or is lost once, whatever the order, and credits are kept.
    #[test]
    fn nothing_is_lost_and_nothing_happens_twice(
        steps in proptest::collection::vec((any::<u8>(), any::<usize>()), 1..400),
        slots in 1u16..12,
        credits in 1u16..12,
    ) {
        let mut queue = HostQueue::new(slots);
        queue.established(credits).unwrap();
        queue.set_in_capsule_bytes(1024);
        let credits = usize::from(credits.min(slots));
        let mut world = World { queue, posted: Vec::new(), next_user: 0, completed: Vec::new(), credits };
        for (choice, pick) in steps {
            world.step(choice, pick);
            let unanswered = world.posted.iter().filter(|posted| !posted.2).count();
            prop_assert!(unanswered <= world.credits);
        }
        for (out, _, _, home) in &mut world.posted {
            if !*home {
                world.queue.data_back(out.slot, std::mem::take(&mut out.data));
            }
        }
        let mut all = std::mem::take(&mut world.completed);
        world.queue.drain(&mut |user, _| all.push(user));
        all.sort_unstable();
        prop_assert_eq!(all, (0..world.next_user).collect::<Vec<_>>());
        prop_assert_eq!(world.queue.outstanding(), 0);
    }

    /// No message makes it panic.
    #[test]
    fn any_message_is_survived(message in proptest::collection::vec(any::<u8>(), 0..40), key in proptest::option::of(any::<u32>())) {
        let mut queue = ready(3);
        write(&mut queue, 1, 10);
        queue.next_command().unwrap();
        let _ = queue.received(&message, key);
    }
}
