//! Hosts that misbehave, over the RDMA devices of this machine.
//!
//! ```text
//! rdma_vandal ADDRESS NQN [--seed N] [--rounds N] [DEED...]     all deeds that RoCE can do, unless some are named
//! ```
//! A deed is named as it is printed. Status 1: the target took one in another way than it has to.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use nvmf::spec::rdma::Reject;
use ringstone_sim::Rng;
use ringstone_sim::rdma_vandal::{Deed, Place, begin};
use verbs::VerbsFabric;

fn main() -> std::process::ExitCode {
    let mut words = std::env::args().skip(1);
    let (Some(addr), Some(subnqn)) = (words.next(), words.next()) else {
        eprintln!("usage: rdma_vandal ADDRESS NQN [--seed N] [--rounds N] [DEED...]");
        return 2.into();
    };
    let (mut seed, mut rounds, mut chosen) = (1, 1, Vec::new());
    while let Some(word) = words.next() {
        let mut number = || words.next().and_then(|word| word.parse().ok()).expect("a number");
        match word.as_str() {
            "--seed" => seed = number(),
            "--rounds" => rounds = number(),
            name => chosen.push(name.to_owned()),
        }
    }
    // The connection manager of RoCE pads private data, and every device that answers no READs is one that does nothing.
    let cannot = [Deed::Refused(Reject::PrivateDataLength), Deed::Refused(Reject::Ord)];
    let wanted = |deed: &Deed| match chosen.is_empty() {
        true => !cannot.contains(deed),
        false => chosen.contains(&format!("{deed:?}")),
    };
    let deeds: Vec<Deed> = Deed::all().into_iter().filter(wanted).collect();
    let start = Instant::now();
    let place = Rc::new(Place {
        fabric: Arc::new(VerbsFabric::new()),
        addr: addr.parse().expect("an address and a port"),
        subnqn,
        now: Box::new(move || reactor::Instant(start.elapsed().as_nanos() as u64)),
        silence: Box::new(|_| false),
        stay_ns: 30_000_000,
        rng: RefCell::new(Rng::new(seed)),
        busy: Cell::new(false),
        deadline: Cell::new(None),
    });
    let mut failed = 0;
    for _ in 0..rounds {
        for deed in &deeds {
            let mut script = begin(&place, *deed);
            let outcome = loop {
                if let Poll::Ready(outcome) = script.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                    break outcome;
                }
                std::thread::sleep(Duration::from_micros(200));
            };
            println!("{deed:?}: {}", outcome.as_ref().map_or_else(String::as_str, |()| "as it has to be"));
            failed += u32::from(outcome.is_err());
        }
    }
    u8::from(failed > 0).into()
}
