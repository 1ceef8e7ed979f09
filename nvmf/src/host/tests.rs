//! Controllers, queues and walks against a target of answers.

mod fake;

use super::discovery::{Crawl, MAX_SERVICES, Service};
use super::inventory::MAX_NAMESPACES;
use super::*;
use crate::spec::fabrics::DISCOVERY_NQN;
use crate::spec::feature::AsyncEvent;
use crate::spec::log::{AnaState, subtype};
use crate::spec::opcode::admin;
use fake::{Fake, Rng, entry};
use reactor::{Buffers, Instant};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

const MS: u64 = 1_000_000;

fn options() -> Options {
    Options {
        subnqn: "nqn.2026-11.io.example:s".into(),
        hostnqn: "nqn.2026-11.io.example:h".into(),
        io_queues: 3,
        kato_ms: 1000,
        reconnect: ReconnectPolicy::from_seconds(60, 2, 4).expect("a policy"),
        ..Options::default()
    }
}

struct World {
    fake: Fake,
    controller: Controller,
    now: Instant,
}

impl World {
    fn new(fake: Fake, options: Options) -> World {
        let now = Instant(MS);
        World { controller: Controller::new(Arc::new(fake.clone()), options, 0, now), fake, now }
    }

    fn live() -> World {
        let mut world = World::new(Fake::new(), options());
        world.run();
        assert_eq!(world.controller.state(), State::Live, "{:?}", world.controller.error());
        world
    }

    /// Polls until nothing happens at this instant.
    fn run(&mut self) {
        for _ in 0..10_000 {
            if !self.controller.poll(self.now, &mut Polled) {
                return;
            }
        }
        panic!("it never comes to rest: {:?}", self.controller);
    }

    /// Lets time pass, from deadline to deadline.
    fn pass(&mut self, duration: Duration) {
        let until = self.now + duration;
        loop {
            self.run();
            match self.controller.deadline(self.now).filter(|at| *at <= until) {
                // A deadline in the past has been looked at.
                Some(at) => self.now = Instant(at.0.max(self.now.0 + 1)),
                None => break,
            }
        }
        self.now = until;
        self.run();
    }
}

#[test]
fn a_controller_comes_up_and_knows_its_namespaces() {
    let mut world = World::live();
    let controller = &mut world.controller;
    let namespaces = controller.inventory().namespaces();
    let sizes: Vec<_> = namespaces.values().map(|ns| (ns.nsid, ns.blocks, ns.identity.uuid)).collect();
    assert_eq!(sizes, [(1, 1000, Some([1; 16])), (7, 50, Some([7; 16]))]);
    assert_eq!(controller.inventory().ana_state(&namespaces[&1]), AnaState::Optimized);
    assert_eq!(controller.inventory().ana_state(&namespaces[&7]), AnaState::Inaccessible);
    assert_eq!((controller.io_queues(), controller.max_io_bytes(), controller.epoch()), (3, Some(8192), 1));
    let params = controller.queue_params(3).expect("it was granted");
    assert_eq!((params.cntlid, params.slots, params.in_capsule_bytes), (5, 127, 4096));
    assert!(controller.queue_params(4).is_none() && controller.queue_params(0).is_none());
    assert!(controller.inventory_mut().take_changes().namespaces);
    assert_eq!(shown(controller), "FAKE");
    controller.shut_down();
    world.run();
    assert_eq!(world.controller.state(), State::Down);
    assert!(world.fake.brain().shut_down && world.controller.error().is_none());
}

fn shown(controller: &Controller) -> String {
    crate::spec::shown_text(&controller.identity().expect("it is live").sn)
}

#[test]
fn long_lists_are_walked_and_ended() {
    let fake = Fake::new();
    fake.brain().namespaces = (1..=2500).map(|nsid| (nsid * 3, (u64::from(nsid), [1; 16], 1))).collect();
    let mut world = World::new(fake, options());
    world.run();
    assert_eq!(world.controller.inventory().namespaces().len(), 2500);
    let fake = Fake::new();
    fake.brain().namespaces = (1..=MAX_NAMESPACES as u32 + 1).map(|nsid| (nsid, (1, [1; 16], 1))).collect();
    let mut world = World::new(fake, options());
    world.run();
    assert_eq!((world.controller.state(), world.controller.inventory().namespaces().len()), (State::Down, 0));
}

#[test]
fn changes_of_namespaces_arrive_and_only_they_are_asked_for() {
    let mut world = World::live();
    world.controller.inventory_mut().take_changes();
    let identified = world.fake.brain().count(admin::IDENTIFY);
    {
        let mut brain = world.fake.brain();
        brain.namespaces.remove(&7);
        brain.namespaces.insert(9, (5, [9; 16], 1));
        brain.changed = vec![7, 9];
        brain.raise(AsyncEvent::NAMESPACE_CHANGED);
    }
    world.run();
    let inventory = world.controller.inventory_mut();
    assert_eq!(inventory.namespaces().keys().copied().collect::<Vec<_>>(), [1, 9]);
    assert!(inventory.take_changes().namespaces);
    // The list, the namespace, its descriptors.
    assert_eq!(world.fake.brain().count(admin::IDENTIFY) - identified, 3);
    // The same again, and a size: events go on.
    for blocks in [2000, 3000, 4000] {
        {
            let mut brain = world.fake.brain();
            brain.namespaces.insert(1, (blocks, [1; 16], 1));
            brain.changed = vec![1];
            brain.raise(AsyncEvent::NAMESPACE_CHANGED);
        }
        world.run();
        assert_eq!(world.controller.inventory().namespaces()[&1].blocks, blocks);
    }
    {
        let mut brain = world.fake.brain();
        brain.namespaces.insert(1, (1, [1; 16], 1));
        brain.namespaces.insert(9, (1, [9; 16], 1));
        // More than the list can say.
        brain.changed = vec![u32::MAX];
        brain.raise(AsyncEvent::NAMESPACE_CHANGED);
    }
    world.run();
    assert!(world.controller.inventory().namespaces().values().all(|ns| ns.blocks == 1));
}

#[test]
fn access_states_follow_their_log() {
    let mut world = World::live();
    world.controller.inventory_mut().take_changes();
    for (state, want) in [(2, AnaState::NonOptimized), (15, AnaState::Change), (1, AnaState::Optimized)] {
        {
            let mut brain = world.fake.brain();
            brain.ana.insert(2, state);
            brain.generation += 1;
            brain.raise(AsyncEvent::ANA_CHANGED);
        }
        world.run();
        let inventory = world.controller.inventory_mut();
        assert_eq!(inventory.ana_groups()[&2], want);
        assert!(inventory.take_changes().ana);
    }
}

#[test]
fn a_target_that_hangs_is_noticed_and_one_that_dies_comes_back() {
    let mut world = World::live();
    world.pass(Duration::from_secs(30));
    assert!(world.controller.is_live() && world.fake.brain().count(admin::KEEP_ALIVE) >= 50);
    world.fake.brain().hangs = true;
    world.pass(Duration::from_secs(2));
    assert!(!world.controller.is_live(), "{:?}", world.controller);
    assert_eq!(world.controller.error(), Some(&Error::Timeout { what: "Keep Alive" }));
    assert!(!world.controller.fails_io(world.now));
    world.pass(Duration::from_secs(4));
    assert!(world.controller.fails_io(world.now), "fast_io_fail_timeout has passed");
    {
        let mut brain = world.fake.brain();
        brain.hangs = false;
        brain.namespaces.insert(7, (50, [8; 16], 2));
    }
    world.controller.inventory_mut().take_changes();
    world.pass(Duration::from_secs(10));
    assert_eq!((world.controller.state(), world.controller.epoch()), (State::Live, 2));
    assert!(!world.controller.fails_io(world.now));
    // It is another namespace under the same number.
    assert!(world.controller.inventory_mut().take_changes().namespaces);
    assert_eq!(world.controller.inventory().namespaces()[&7].identity.uuid, Some([8; 16]));
    // Refused for ever: ctrlr_loss_timeout ends it.
    world.fake.brain().dead = true;
    world.pass(Duration::from_secs(59));
    assert!(matches!(world.controller.state(), State::Waiting(_)));
    world.pass(Duration::from_secs(2));
    assert_eq!(world.controller.state(), State::Down);
    let tried = world.fake.brain().connections;
    assert!((28..=34).contains(&tried), "{tried} connections");
    world.fake.brain().dead = false;
    world.pass(Duration::from_secs(100));
    assert_eq!((world.controller.state(), world.fake.brain().connections), (State::Down, tried));
}

#[test]
fn the_first_connection_is_tried_once() {
    let fake = Fake::new();
    fake.brain().dead = true;
    let mut world = World::new(fake, options());
    world.pass(Duration::from_secs(100));
    assert_eq!((world.controller.state(), world.fake.brain().connections), (State::Down, 1));
    let fake = Fake::new();
    fake.brain().hangs = true;
    let mut world = World::new(fake, options());
    world.pass(Duration::from_secs(100));
    assert_eq!(world.controller.state(), State::Down);
    assert_eq!(world.controller.error(), Some(&Error::Timeout { what: "Connect of the admin queue" }));
}

#[test]
fn a_reset_connects_again_and_loses_what_is_outstanding() {
    let mut world = World::live();
    let data = Buffers::heap(4096);
    let sqe = commands::identify(1, 0);
    assert!(world.controller.submit_admin(17, sqe, Payload::ToHost(4096), data, world.now));
    world.controller.reset();
    world.run();
    assert_eq!((world.controller.state(), world.controller.epoch()), (State::Live, 2));
    assert!(matches!(world.controller.take_admin(), Some(AdminDone::Lost(17))));
    assert!(world.controller.submit_admin(17, sqe, Payload::ToHost(4096), Buffers::heap(4096), world.now));
    world.run();
    let Some(AdminDone::Completed(done)) = world.controller.take_admin() else { panic!("no completion") };
    assert!(done.user == 17 && done.cqe.status().is_success());
    // No more than it takes, and none too old.
    world.fake.brain().hangs = true;
    let taken = (0..100)
        .filter(|user| world.controller.submit_admin(*user, sqe, Payload::ToHost(4096), Buffers::heap(4096), world.now))
        .count();
    assert_eq!(taken, 16);
    world.pass(Duration::from_secs(6));
    assert!(!world.controller.is_live());
    let lost = std::iter::from_fn(|| world.controller.take_admin()).count();
    assert_eq!(lost, 16);
}

#[test]
fn commands_of_a_queue_are_too_old_one_by_one() {
    let mut world = World::live();
    let params = world.controller.queue_params(1).expect("it is live");
    let mut queue = IoQueue::connect(params, 1, world.now).unwrap();
    let mut done = Vec::new();
    while !queue.is_live() {
        queue.poll(world.now, &mut Polled, &mut done).unwrap();
    }
    for n in 0..1000 {
        queue.read(n, 1, n, 1, Buffers::heap(512), world.now);
        queue.poll(world.now, &mut Polled, &mut done).unwrap();
        assert_eq!(done.pop().map(|done| (done.user, done.cqe.status().is_success())), Some((n, true)));
        world.now = world.now + Duration::from_secs(1);
    }
    assert_eq!((queue.outstanding(), queue.deadline()), (0, None));
    world.fake.brain().hangs = true;
    queue.read(77, 1, 0, 1, Buffers::heap(512), world.now);
    queue.flush_cache(78, 1, world.now);
    let mut failed = None;
    while failed.is_none() {
        let at = queue.deadline().expect("commands are outstanding");
        assert!(at > world.now);
        world.now = at;
        failed = queue.poll(world.now, &mut Polled, &mut done).err();
    }
    assert_eq!(failed, Some(Error::Timeout { what: "an I/O command" }));
    let mut lost = Vec::new();
    queue.close(&mut Polled, &mut |user, data| lost.push((user, data.len())));
    assert_eq!(lost, [(77, 512), (78, 0)]);
    assert!(!queue.can_submit());
}

/// Whatever a target says, the controller neither panics nor hangs nor takes memory for it, and once the target is honest
/// again it comes up with what is true.
#[test]
fn lies_cost_the_liar_only() {
    for seed in 0..600 {
        let fake = Fake::new();
        {
            let mut brain = fake.brain();
            brain.rng = Rng(seed);
            brain.lies_one_in = 1 + (seed % 9) as usize;
            if seed % 3 == 0 {
                brain.discovery = Some((0..seed % 40).map(|_| entry(subtype::NVM, "10.0.0.1", "1", "nqn.x")).collect());
            }
        }
        let discovery = seed % 3 == 0;
        let reconnect = ReconnectPolicy { ctrlr_loss_timeout: None, ..options().reconnect };
        let mut world = World::new(fake.clone(), Options { discovery, reconnect, ..options() });
        let mut rng = Rng(!seed);
        for _ in 0..60 {
            {
                let mut brain = fake.brain();
                match rng.below(6) {
                    0 => brain.raise(AsyncEvent::NAMESPACE_CHANGED),
                    1 => brain.raise(AsyncEvent::ANA_CHANGED),
                    2 => brain.raise(AsyncEvent::DISCOVERY_CHANGED),
                    3 => brain.raise(AsyncEvent::from_dw0(rng.next() as u32)),
                    4 => brain.generation += 1,
                    _ => {}
                }
            }
            for _ in 0..400 {
                world.controller.poll(world.now, &mut Polled);
            }
            world.now = world.now + Duration::from_millis(rng.below(3000) as u64);
            assert!(world.controller.inventory().namespaces().len() <= MAX_NAMESPACES);
            if world.controller.state() == State::Down {
                world = World::new(fake.clone(), Options { discovery, reconnect, ..options() });
            }
        }
        fake.brain().lies_one_in = 0;
        world.controller.reset();
        for _ in 0..10 {
            world.pass(Duration::from_secs(10));
            if world.controller.state() == State::Down {
                world = World::new(fake.clone(), Options { discovery, reconnect, ..options() });
            }
        }
        assert!(world.controller.is_live(), "seed {seed}: {:?}", world.controller);
        let inventory = world.controller.inventory();
        if discovery {
            assert_eq!(inventory.discovery().entries.len() as u64, seed % 40);
        } else {
            let sizes: BTreeMap<u32, u64> =
                inventory.namespaces().iter().map(|(nsid, ns)| (*nsid, ns.blocks)).collect();
            assert_eq!(sizes, BTreeMap::from([(1, 1000), (7, 50)]), "seed {seed}");
        }
    }
}

fn service(port: u16) -> Service {
    Service { address: SocketAddr::from(([10, 0, 0, 1], port)), subnqn: DISCOVERY_NQN.into() }
}

fn crawl(services: &[(u16, Fake)], first: u16) -> Crawl {
    let services: BTreeMap<u16, Fake> = services.iter().cloned().collect();
    let connect = Box::new(move |address: SocketAddr| {
        let unknown = || {
            let fake = Fake::new();
            fake.brain().dead = true;
            fake
        };
        Arc::new(services.get(&address.port()).cloned().unwrap_or_else(unknown)) as Arc<dyn Connector>
    });
    let mut crawl = Crawl::new(connect, options(), service(first), true, 0);
    let now = Instant(MS);
    for _ in 0..100_000 {
        crawl.poll(now, &mut Polled);
    }
    assert!(crawl.is_done(), "{crawl:?}");
    crawl
}

fn service_with(entries: Vec<crate::spec::log::DiscoveryEntry>) -> Fake {
    let fake = Fake::new();
    fake.brain().discovery = Some(entries);
    fake
}

#[test]
fn referrals_in_a_circle_end() {
    let referral = |port: &str| entry(subtype::REFERRAL, "10.0.0.1", port, DISCOVERY_NQN);
    let nvm = |nqn: &str| entry(subtype::NVM, "10.0.0.1", "4420", nqn);
    let services = [
        (1, service_with(vec![nvm("nqn.a"), referral("2"), referral("3")])),
        (2, service_with(vec![referral("1"), referral("2"), nvm("nqn.b")])),
        (3, service_with(vec![referral("9"), entry(subtype::REFERRAL, "example.org", "1", "nqn.c"), nvm("nqn.d")])),
    ];
    let crawl = crawl(&services, 1);
    let visits: Vec<_> = crawl.visits().iter().map(|v| (v.service.address.port(), v.depth, v.result.is_ok())).collect();
    assert_eq!(visits, [(1, 0, true), (2, 1, true), (3, 1, true), (9, 2, false)]);
    assert_eq!(crawl.skipped().len(), 1);
    assert_eq!(crawl.skipped()[0].1, "its address is not a numeric one");
    assert!(services.iter().all(|(_, fake)| fake.brain().shut_down), "each is told that the host leaves");
}

#[test]
fn a_world_of_referrals_is_bounded() {
    let endless = |n: u16| {
        (0..200).map(|m| entry(subtype::REFERRAL, "10.0.0.1", &(n * 200 + m + 1).to_string(), DISCOVERY_NQN)).collect()
    };
    let services: Vec<_> = (1..300).map(|n| (n, service_with(endless(n)))).collect();
    let crawl = crawl(&services, 1);
    assert_eq!(crawl.visits().len(), MAX_SERVICES);
    assert!(crawl.skipped().len() <= MAX_SERVICES);
}
