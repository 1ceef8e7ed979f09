//! Processes that lie, write garbage, and speak out of turn.

use super::*;

#[test]
fn lies_are_counted_and_change_nothing() {
    let mut world = World::new(OnDisconnect::Fail);
    let mut rogue = Rogue::start(&mut world);
    let id = world.read(5);
    let submission = rogue.take();
    let honest = Rogue::honest(&submission);
    let lies = [
        Completed { id: honest.id + 1, ..honest },
        Completed { id: 0, ..honest },
        Completed { slot: honest.slot + 1, ..honest },
        Completed { slot: DEPTH as u16, ..honest },
        Completed { slot: u16::MAX, id: u64::MAX, status: u16::MAX, bytes: u32::MAX, done_ns: 0 },
    ];
    for lie in lies {
        rogue.answer(lie);
        assert_eq!(world.poll(), 0, "{lie:?}");
    }
    assert_eq!(world.lies(), lies.len() as u64);
    let memory = Arc::clone(&rogue.memory);
    memory.copy_in(0, honest.slot.into(), [&[5u8; BLOCK][..]].into_iter());
    rogue.answer(honest);
    assert_eq!(world.wait(id), (IoStatus::Success, vec![5; BLOCK]));
    // Twice: the second finds nothing, also when the slot has its next request.
    rogue.answer(honest);
    assert_eq!(world.poll(), 0);
    let next = world.read(6);
    rogue.answer(honest);
    assert_eq!(world.poll(), 0);
    // An impossible status or length fails the request; the payload stays as it was.
    let submission = rogue.take();
    rogue.answer(Completed { status: 0x7fff, ..Rogue::honest(&submission) });
    assert_eq!(world.wait(next), (IoStatus::Failed, vec![0xee; BLOCK]));
    for bytes in [0, 1, BLOCK as u32 - 1, BLOCK as u32 + 1, u32::MAX] {
        let id = world.read(7);
        let submission = rogue.take();
        rogue.answer(Completed { bytes, ..Rogue::honest(&submission) });
        assert_eq!(world.wait(id), (IoStatus::Failed, vec![0xee; BLOCK]));
    }
    // A status of NVMe's own is passed on.
    let id = world.read(7);
    let submission = rogue.take();
    rogue.answer(Completed { status: 0x8281, bytes: 0, ..Rogue::honest(&submission) });
    assert_eq!(world.wait(id).0, IoStatus::Nvme { sct: 2, sc: 0x81, dnr: false });
    assert!(world.lane().is_attached());
}

#[test]
fn memory_full_of_garbage_neither_hangs_nor_corrupts() {
    let mut world = World::new(OnDisconnect::Park);
    let rogue = Rogue::start(&mut world);
    let ids: Vec<_> = (0..DEPTH).map(|i| world.write(i.into(), i as u8)).collect();
    let lane = rogue.memory.lane(0);
    let shape = *rogue.memory.shape();
    let last = shape.completions(0) + shape.depth() as usize * 4;
    let mut seed = 1_u64;
    for round in 0..2000 {
        for word in 0..last {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // Small numbers most of the time: they hit sequences and slots.
            let value = if seed >> 62 == 0 { seed } else { (seed >> 40) % (round + 10) };
            // Ids that are outstanding are left out: guessing one is answering it.
            let is_id = word >= shape.completions(0) && (word - shape.completions(0)) % 4 == 1;
            let value = if ids.contains(&value) && is_id { 0 } else { value };
            lane.store(word, value, Ordering::Relaxed);
        }
        world.poll();
        world.lane().may_sleep();
        world.lane().awake();
    }
    assert_eq!(world.lane().len(), DEPTH as usize, "nobody answered anything");
    drop(rogue);
    world.detach();
    let process = Process::start(world.path(), Process::memory());
    for id in ids {
        assert_eq!(world.wait(id).0, IoStatus::Success);
    }
    for i in 0..DEPTH {
        let id = world.read(i.into());
        assert_eq!(world.wait(id).1, vec![i as u8; BLOCK]);
    }
    process.end();
}

#[test]
fn nonsense_on_the_socket_ends_the_connection_and_nothing_else() {
    let mut world = World::new(OnDisconnect::Fail);
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 4000], &Message::Ready.encode(), &Message::Gone.encode()] {
        let socket = Rogue::connect(&world.path());
        rustix::net::send(&socket, bytes, rustix::net::SendFlags::empty()).unwrap();
        assert!(matches!(Rogue::hear(&socket), Some((Message::Refused { why: Refusal::Version, .. }, _))));
        assert!(Rogue::hear(&socket).is_none());
    }
    let socket = Rogue::connect(&world.path());
    wire::send(&socket, &Message::Hello { version: VERSION + 1 }, &[]).unwrap();
    let Some((Message::Refused { text, .. }, _)) = Rogue::hear(&socket) else { panic!("a refusal") };
    assert!(text.contains("same release"), "{text}");
    // In the middle of a session too.
    let rogue = Rogue::start(&mut world);
    let id = world.write(0, 1);
    rustix::net::send(&rogue.socket, b"?", rustix::net::SendFlags::empty()).unwrap();
    assert_eq!(world.wait(id).0, IoStatus::Failed);
    world.detach();
    let process = Process::start(world.path(), Process::memory());
    world.attach();
    process.end();
}

#[test]
fn one_process_at_a_time() {
    let mut world = World::new(OnDisconnect::Park);
    let rogue = Rogue::start(&mut world);
    let socket = Rogue::connect(&world.path());
    let Some((Message::Refused { why, text }, _)) = Rogue::hear(&socket) else { panic!("a refusal") };
    assert_eq!(why, Refusal::Busy);
    assert!(text.contains("vol"), "{text}");
    // One that is patient gets its turn.
    let process = Process::start(world.path(), Process::memory());
    let id = world.write(3, 3);
    drop(rogue);
    assert_eq!(world.wait(id).0, IoStatus::Success);
    process.end();
}

#[test]
fn a_process_that_clears_flags_and_fills_counters_blocks_nobody() {
    let mut world = World::new(OnDisconnect::Fail);
    let socket = Rogue::connect(&world.path());
    wire::send(&socket, &Message::Hello { version: VERSION }, &[]).unwrap();
    let Some((Message::Welcome(welcome), files)) = Rogue::hear(&socket) else { panic!("a welcome") };
    let Some((Message::Lanes { .. }, bells)) = Rogue::hear(&socket) else { panic!("lanes") };
    let Some((Message::Workers { .. }, ears)) = Rogue::hear(&socket) else { panic!("workers") };
    for bell in bells.iter().chain(&ears) {
        rustix::fs::fcntl_setfl(bell, rustix::fs::OFlags::empty()).unwrap();
    }
    rustix::io::write(&bells[0], &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let memory = Arc::new(SharedMemory::open(&files[0], welcome.shape).unwrap());
    wire::send(&socket, &Message::Ready, &[]).unwrap();
    world.attach();
    // It claims to sleep for ever, so the target rings at each request, and nobody ever takes a ring away.
    let words = memory.lane(0);
    let mut submissions = Consumer::<7>::new(welcome.shape.submissions(0), welcome.shape.depth());
    let mut completions = Producer::<3>::new(welcome.shape.completions(0), welcome.shape.depth());
    for _ in 0..5000 {
        memory.heads().store(welcome.shape.worker_sleeps(0), 1, Ordering::SeqCst);
        let id = world.send(Op::Flush, 0, Vec::new());
        let submission = Submission::decode(submissions.pop(&words).unwrap());
        completions.push(&words, Rogue::honest(&submission).encode());
        assert_eq!(world.wait(id).0, IoStatus::Success);
    }
}

#[test]
fn the_process_says_when_it_had_a_request_and_is_believed_within_reason() {
    let mut world = World::new(OnDisconnect::Fail);
    let mut rogue = Rogue::start(&mut world);
    let origin_ns = world.clock.origin_ns();
    let refused = |world: &World| world.target.inner.counters.stamps_refused.load(Ordering::Relaxed);
    let mut turn = |world: &mut World, stamps: &dyn Fn(u64, u64) -> (u64, u64)| {
        let id = world.read(1);
        let sent = world.sent;
        let submission = rogue.take();
        assert!(submission.measured);
        let (picked_ns, done_ns) = stamps(origin_ns + sent.0, origin_ns + world.clock.now().0);
        rogue.answer_at(&submission, picked_ns, done_ns);
        let mut body = eventually("a request ends", || {
            let (now, mut home) = (world.clock.now(), None);
            world.lane().drain(now, 1, |body| home = Some(body));
            home
        });
        assert_eq!((body.id.0, body.status), (id, IoStatus::Success));
        body.bufs = Buffers::new();
        let times = (body.fixed.sent, body.fixed.picked, body.fixed.done);
        world.free.push(body);
        times
    };
    // Three stages.
    let (sent, picked, done) = turn(&mut world, &|sent_ns, now_ns| (sent_ns, now_ns));
    assert!(sent == picked && picked < done && done <= world.clock.now());
    let (sent, picked, done) = turn(&mut world, &|_, now_ns| (now_ns, now_ns));
    assert!(sent < picked && picked == done);
    assert_eq!(refused(&world), 0);
    // What cannot be: before the submission, after now, backwards, nothing at all.
    let lies: [&dyn Fn(u64, u64) -> (u64, u64); 6] = [
        &|sent_ns, now_ns| (sent_ns - 1, now_ns),
        &|sent_ns, now_ns| (sent_ns, now_ns + 3_600_000_000_000),
        &|sent_ns, now_ns| (now_ns, sent_ns),
        &|_, _| (0, 0),
        &|_, _| (u64::MAX, u64::MAX),
        &|sent_ns, _| (sent_ns, 0),
    ];
    for (n, lie) in lies.into_iter().enumerate() {
        let (sent, picked, done) = turn(&mut world, lie);
        assert!(sent == picked && picked < done && done <= world.clock.now(), "all of it is the handler's: {n}");
        assert_eq!(refused(&world), n as u64 + 1);
    }
    assert_eq!(world.lies(), 0, "the requests themselves were answered well");
}
