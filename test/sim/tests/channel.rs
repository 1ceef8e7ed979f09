//! Channels over a simulated network: whatever it delays and cuts, bytes arrive in order; whoever dies is noticed.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use channel::{Channel, ChannelListener, Fault, Received, SessionConfig, TcpWires};
use reactor::{Clock, Instant, Progress};
use ringstone_sim::net::SimNetwork;
use ringstone_sim::world::WorldView;
use ringstone_sim::{Actor, Rng, Sim, World, WorldConfig, seeds};

/// Seeds of a scenario that once failed, each with what was wrong.
mod regressions {
    pub const CARRY: &[u64] = &[];
    pub const DEATH: &[u64] = &[];
}

/// The longest time that may pass between a peer's death and its being noticed.
const NOTICED_WITHIN: Duration = Duration::from_secs(1);

fn pattern(at: usize) -> u8 {
    (at.wrapping_mul(0x9e37_79b1) >> 13) as u8
}

/// One end: sends its part of the pattern and checks what it gets.
struct End {
    channel: Option<Channel>,
    total: usize,
    sent: usize,
    got: usize,
    ended: bool,
    fault: Option<(Fault, Instant)>,
    /// It does not say that it has sent everything, so that the channel stays up.
    stays: bool,
}

impl End {
    fn new(channel: Channel, total: usize) -> End {
        End { channel: Some(channel), total, sent: 0, got: 0, ended: false, fault: None, stays: false }
    }

    fn act(&mut self, rng: &mut Rng, now: Instant) -> bool {
        let Some(channel) = &mut self.channel else { return false };
        let chunk = 1 + rng.below(30_000) as usize;
        let bytes: Vec<u8> = (self.sent..self.total.min(self.sent + chunk)).map(pattern).collect();
        let taken = channel.send(&bytes, now);
        self.sent += taken;
        if self.sent == self.total && !self.stays {
            channel.finish();
        }
        let polled = channel.poll(now);
        let moved = polled == Ok(true);
        let mut out = vec![0; chunk];
        let received = channel.recv(&mut out, now);
        if let Ok(Received::Bytes(n)) = received {
            for (offset, byte) in out[..n].iter().enumerate() {
                assert_eq!(*byte, pattern(self.got + offset), "byte {}", self.got + offset);
            }
            self.got += n;
            return true;
        }
        let was = std::mem::replace(&mut self.ended, received == Ok(Received::End));
        if !self.is_done()
            && let Err(fault) = polled
        {
            self.fault = Some((fault, now));
            self.channel = None;
            return true;
        }
        was != self.ended || taken > 0 || moved
    }

    fn is_done(&self) -> bool {
        self.ended && self.channel.as_ref().is_some_and(Channel::is_done)
    }
}

/// All ends, and the listener.
struct Ends {
    listener: ChannelListener,
    ends: Vec<End>,
    rng: Rng,
    total: usize,
    stay: bool,
}

impl Actor for Ends {
    fn act(&mut self, world: &WorldView) -> Progress {
        let now = world.sim.now();
        let mut busy = false;
        while let Some(channel) = self.listener.accept(now).expect("a simulated network hands over") {
            let total = self.rng.below(self.total as u64) as usize;
            self.ends.push(End { stays: self.stay, ..End::new(channel, total) });
            busy = true;
        }
        for end in &mut self.ends {
            busy |= end.act(&mut self.rng, now);
        }
        Progress::from_busy(busy)
    }

    fn deadline(&self) -> Option<Instant> {
        self.ends.iter().filter_map(|end| end.channel.as_ref()?.deadline()).min()
    }

    fn describe(&self) -> String {
        self.ends.iter().map(|end| format!("{} sent, {} got, {:?}; ", end.sent, end.got, end.fault)).collect()
    }
}

fn stage(seed: u64, total: usize, stay: bool) -> (World, Rc<RefCell<Ends>>, usize) {
    let mut rng = Rng::new(seed);
    let sim = Sim::new(seed);
    sim.net(|rules| {
        rules.delay_ns = (1_000, 10_000 + rng.below(500_000));
        rules.segment = (1, 100 + rng.below(100_000));
        rules.buffer = (500 + rng.below(5_000), 6_000 + rng.below(400_000));
    });
    let world = World::new(&sim, WorldConfig::default(), rng.next_u64());
    let wires = TcpWires::new(Arc::new(SimNetwork::new(&sim)));
    let at = SocketAddr::from(([10, 0, 0, 1], 7000));
    let config = SessionConfig::default();
    let listener = ChannelListener::listen(&wires, at, 64, config).unwrap();
    let pairs = 1 + rng.below(16) as usize;
    let ends = (0..pairs)
        .map(|_| {
            let channel = Channel::connect(&wires, at, config, sim.now()).unwrap();
            End { stays: stay, ..End::new(channel, rng.below(total as u64) as usize) }
        })
        .collect();
    let ends = Rc::new(RefCell::new(Ends { listener, ends, rng, total, stay }));
    let mut world = world;
    world.add_actor(Rc::clone(&ends) as Rc<RefCell<dyn Actor>>);
    (world, ends, pairs)
}

#[test]
fn channels_carry_every_byte_in_order() {
    seeds::each("channels_carry_every_byte_in_order", 20, regressions::CARRY, |seed| {
        let (mut world, ends, pairs) = stage(seed, 200_000, false);
        world.run_until("all channels to be done", |_| {
            let ends = ends.borrow();
            assert!(ends.ends.iter().all(|end| end.fault.is_none()), "{}", ends.describe());
            ends.ends.len() == 2 * pairs && ends.ends.iter().all(End::is_done)
        });
        let ends = ends.borrow();
        let sum = |of: fn(&End) -> usize| ends.ends.iter().map(of).sum::<usize>();
        assert_eq!(sum(|end| end.got), sum(|end| end.total));
    });
}

#[test]
fn a_dead_peer_is_noticed_within_a_second() {
    let noticed = std::cell::Cell::new(0);
    seeds::each("a_dead_peer_is_noticed_within_a_second", 20, regressions::DEATH, |seed| {
        let (mut world, ends, pairs) = stage(seed, 200_000, true);
        world.run_until("all channels to be open", |_| {
            let ends = ends.borrow();
            let open = |end: &End| end.channel.as_ref().is_some_and(Channel::is_open);
            ends.ends.len() == 2 * pairs && ends.ends.iter().all(open)
        });
        let mut rng = Rng::new(seed ^ 1);
        world.run_for(Duration::from_millis(rng.below(30)));
        let died = world.sim().now();
        let silenced = rng.one_in(2);
        if silenced {
            // The machine is gone: nothing says so.
            world.sim().silence_some();
        } else {
            // The process is: the host ends its connections.
            ends.borrow_mut().ends.truncate(pairs);
        }
        let all = |ends: &Ends| ends.ends.iter().all(|end| end.fault.is_some());
        if silenced {
            world.run_for(NOTICED_WITHIN);
        } else {
            world.run_until("everybody to notice", |_| all(&ends.borrow()));
        }
        for (fault, at) in ends.borrow().ends.iter().filter_map(|end| end.fault.clone()) {
            noticed.set(noticed.get() + 1);
            assert!(at.since(died) <= NOTICED_WITHIN, "{fault} after {:?}", at.since(died));
            assert!(matches!(fault, Fault::Silent(_) | Fault::Vanished | Fault::Io(_)), "{fault}");
        }
    });
    assert!(noticed.get() > 0, "no death was ever noticed");
}
