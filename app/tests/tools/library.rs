//! The host library over real sockets: the commands and events that the tools do not use.

use std::sync::Arc;
use std::time::Duration;

use nvmf::host::{Completion, Connector, Controller, IoQueue, Options, Polled, ReconnectPolicy, State, commands};
use nvmf::spec::Status;
use nvmf::spec::log::AnaState;
use nvmf::tcp::host_transport::TcpConnector;
use reactor::net::OsNetwork;
use reactor::time::OsClock;
use reactor::{Buffers, Clock};
use serde_json::json;

use crate::common::{address, free_port, wait_for};
use crate::stage::{DISCOVERY, NQN, Stage};

struct Client {
    clock: OsClock,
    controller: Controller,
}

impl Client {
    fn connect(port: u16, options: Options) -> Client {
        let connector: Arc<dyn Connector> = Arc::new(TcpConnector {
            network: Arc::new(OsNetwork),
            address: ([127, 0, 0, 1], port).into(),
            header_digest: true,
            data_digest: true,
        });
        let clock = OsClock::default();
        let options = Options { hostnqn: "nqn.2026-11.io.example:library".into(), hostid: [9; 16], ..options };
        let controller = Controller::new(connector, options, 0, clock.now());
        let mut client = Client { clock, controller };
        client.until("the controller is live", |controller| controller.is_live());
        client
    }

    #[track_caller]
    fn until(&mut self, what: &str, mut is: impl FnMut(&mut Controller) -> bool) {
        wait_for(what, || {
            self.controller.poll(self.clock.now(), &mut Polled);
            is(&mut self.controller).then_some(())
        });
    }

    #[track_caller]
    fn queue(&mut self) -> Queue<'_> {
        let params = self.controller.queue_params(1).expect("it is live");
        let mut queue = IoQueue::connect(params, 1, self.clock.now()).expect("a socket");
        let mut done = Vec::new();
        wait_for("the queue is live", || {
            queue.poll(self.clock.now(), &mut Polled, &mut done).expect("it connects");
            queue.is_live().then_some(())
        });
        Queue { clock: &self.clock, queue, done }
    }
}

struct Queue<'a> {
    clock: &'a OsClock,
    queue: IoQueue,
    done: Vec<Completion>,
}

impl Queue<'_> {
    /// Submits, and waits for so many completions, by their numbers.
    #[track_caller]
    fn does(&mut self, count: usize, submit: impl FnOnce(&mut IoQueue, reactor::Instant)) -> Vec<(Status, Vec<u8>)> {
        submit(&mut self.queue, self.clock.now());
        wait_for("completions", || {
            self.queue.send().expect("the queue lives");
            self.queue.poll(self.clock.now(), &mut Polled, &mut self.done).expect("the queue lives");
            (self.done.len() >= count).then_some(())
        });
        self.done.sort_by_key(|done| done.user);
        assert_eq!(self.done.len(), count);
        self.done.drain(..).map(|done| (done.cqe.status(), done.data.to_vec())).collect()
    }

    #[track_caller]
    fn read(&mut self, slba: u64, blocks: u32) -> Vec<u8> {
        let bytes = blocks as usize * 512;
        let mut done = self.does(1, |queue, now| queue.read(1, 1, slba, blocks, Buffers::heap(bytes), now));
        let (status, data) = done.remove(0);
        assert_eq!(status, Status::SUCCESS);
        data
    }
}

fn bytes(value: u8, blocks: usize) -> Buffers {
    Buffers::from(&vec![value; blocks * 512][..])
}

#[test]
fn all_commands_do_what_they_say() {
    let stage = Stage::start();
    let mut client = Client::connect(stage.port, Options { subnqn: NQN.into(), ..Options::default() });
    let mut queue = client.queue();
    let status = |done: Vec<(Status, Vec<u8>)>| done.iter().map(|(status, _)| status.retryable()).collect::<Vec<_>>();

    assert_eq!(status(queue.does(1, |queue, now| queue.write(1, 1, 10, 16, bytes(7, 16), now))), [Status::SUCCESS]);
    assert_eq!(queue.read(10, 16), vec![7; 16 * 512]);
    assert_eq!(status(queue.does(1, |queue, now| queue.compare(1, 1, 10, 1, bytes(7, 1), now))), [Status::SUCCESS]);
    assert_eq!(
        status(queue.does(1, |queue, now| queue.compare(1, 1, 10, 1, bytes(8, 1), now))),
        [Status::COMPARE_FAILURE]
    );

    // Fused: the second half happens when the first is true.
    let fused = commands::compare_and_write(1, 10, 1);
    let done = queue.does(2, |queue, now| queue.compare_and_write((1, bytes(7, 1)), (2, bytes(9, 1)), fused, now));
    assert_eq!(status(done), [Status::SUCCESS, Status::SUCCESS]);
    let done = queue.does(2, |queue, now| queue.compare_and_write((1, bytes(7, 1)), (2, bytes(5, 1)), fused, now));
    assert_eq!(status(done), [Status::COMPARE_FAILURE, Status::ABORTED_FAILED_FUSED]);
    assert_eq!(queue.read(10, 1), vec![9; 512]);

    let ok = [Status::SUCCESS];
    assert_eq!(status(queue.does(1, |queue, now| queue.copy(1, 1, 100, &[(10, 1), (12, 2)], now))), ok);
    assert_eq!(queue.read(100, 3), [vec![9; 512], vec![7; 1024]].concat());
    assert_eq!(status(queue.does(1, |queue, now| queue.write_zeroes(1, 1, 100, 1, now))), ok);
    assert_eq!(queue.read(100, 2), [vec![0; 512], vec![7; 512]].concat());
    assert_eq!(status(queue.does(1, |queue, now| queue.deallocate(1, 1, &[(101, 1), (12, 1)], now))), ok);
    assert_eq!(status(queue.does(1, |queue, now| queue.flush_cache(1, 1, now))), ok);
    let beyond = queue.does(1, |queue, now| queue.read(1, 1, 4096, 1, Buffers::heap(512), now));
    assert_eq!(status(beyond), [Status::LBA_OUT_OF_RANGE]);

    // As many as fit, long ones among them, whose data is asked for in pieces.
    let mut submitted = 0;
    let done = queue.does(60, |queue, now| {
        while submitted < 60 && queue.can_submit() {
            queue.write(submitted, 1, submitted * 64, 64, bytes(submitted as u8, 64), now);
            submitted += 1;
        }
    });
    assert!(done.iter().all(|(status, _)| status.is_success()));
    for n in 0..60 {
        assert_eq!(queue.read(n * 64, 64), vec![n as u8; 64 * 512]);
    }
    client.controller.shut_down();
    client.until("it has left", |controller| controller.state() == State::Down);
}

#[test]
fn what_changes_at_the_target_is_known_soon() {
    let stage = Stage::start();
    let mut client = Client::connect(stage.port, Options { subnqn: NQN.into(), ..Options::default() });
    assert_eq!(client.controller.inventory().namespaces().len(), 3);
    stage.server.call("nvmf_subsystem_remove_ns", json!({"nqn": NQN, "nsid": 2}));
    client.until("the namespace is gone", |controller| !controller.inventory().namespaces().contains_key(&2));
    stage.server.call("nvmf_subsystem_add_ns", json!({"nqn": NQN, "namespace": {"bdev_name": "M2", "nsid": 5}}));
    client.until("it is back elsewhere", |controller| controller.inventory().namespaces().contains_key(&5));
    stage.server.call("bdev_null_resize", json!({"name": "N", "new_size": 64}));
    client.until("it is larger", |controller| controller.inventory().namespaces()[&3].blocks == 131_072);
    let state = |controller: &Controller| {
        let inventory = controller.inventory();
        inventory.ana_state(&inventory.namespaces()[&1])
    };
    assert_eq!(state(&client.controller), AnaState::Optimized);
    let change = json!({"nqn": NQN, "listen_address": address(stage.port), "ana_state": "inaccessible"});
    stage.server.call("nvmf_subsystem_listener_set_ana_state", change);
    client.until("it is inaccessible", |controller| state(controller) == AnaState::Inaccessible);
}

#[test]
fn a_discovery_log_is_followed() {
    let stage = Stage::start();
    let options = Options { subnqn: DISCOVERY.into(), discovery: true, ..Options::default() };
    let mut client = Client::connect(stage.port, options);
    let before = client.controller.inventory().discovery().clone();
    assert_eq!(before.entries.len(), 2);
    stage.server.call("nvmf_discovery_add_referral", json!({"address": address(free_port())}));
    client.until("the referral is there", |controller| controller.inventory().discovery().entries.len() == 3);
    assert!(client.controller.inventory().discovery().generation > before.generation);
}

#[test]
fn a_target_that_restarts_is_found_again() {
    let stage = Stage::start();
    let reconnect = ReconnectPolicy {
        ctrlr_loss_timeout: None,
        reconnect_delay: Duration::from_millis(50),
        reconnect_delay_max: Duration::from_secs(1),
        fast_io_fail_timeout: None,
        reconnect: true,
    };
    let mut client = Client::connect(stage.port, Options { subnqn: NQN.into(), reconnect, ..Options::default() });
    let listener = json!({"nqn": NQN, "listen_address": address(stage.port)});
    stage.server.call("nvmf_subsystem_remove_listener", listener.clone());
    client.until("it is lost", |controller| matches!(controller.state(), State::Waiting(_)));
    stage.server.call("nvmf_subsystem_add_listener", listener);
    client.until("it is back", |controller| controller.is_live() && controller.epoch() == 2);
    assert_eq!(client.queue().read(0, 1), vec![0; 512]);
}
