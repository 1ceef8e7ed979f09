//! The numbers of real reactors, through the methods that tell them.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::{Shelf, block_on};
use reactor::platform::OsPlatform;
use reactor::reactor::{PollPolicy, ReactorConfig, ReactorThreads};
use reactor::{Context, Platform, Poller, Progress, ReactorId, Schedule};
use ringstone_rpc::reactors::Reactors;
use ringstone_rpc::runtime::IoChannelSnapshot;
use serde_json::{Value, json};

struct Counting(Arc<AtomicU64>);

impl Poller for Counting {
    fn poll(&mut self, _: &mut Context) -> Progress {
        self.0.fetch_add(1, Ordering::SeqCst);
        Progress::from_busy(true)
    }
}

#[test]
fn reactors_tell_what_they_did() {
    let runs = Arc::new(AtomicU64::new(0));
    let platform: Arc<dyn Platform> = Arc::new(OsPlatform::default());
    let policy = PollPolicy::default();
    let configs = [0, 1].map(|id| ReactorConfig { id: ReactorId(id), core: None, policy });
    let counter = Arc::clone(&runs);
    let threads = ReactorThreads::start(&platform, &configs, move |cx| {
        cx.add_poller("count", Schedule::Active, Box::new(Counting(Arc::clone(&counter))));
        cx.add_poller("rarely", Schedule::Every(Duration::from_secs(3600)), Box::new(Counting(Arc::default())));
        Ok(())
    })
    .unwrap();
    let channels = |cx: &mut Context| vec![IoChannelSnapshot { name: format!("dev{}", cx.id().0), references: 2 }];
    let source = Reactors::new(threads.handles().to_vec(), policy, Arc::new(channels));
    let table = Shelf::new().builder().runtime(Arc::new(source)).build().unwrap();
    let get = |method: &str| block_on(table.call(method, Value::Null)).unwrap();
    get("framework_start_init");

    let reactors = get("framework_get_reactors");
    assert_eq!(reactors["tick_rate"], 1_000_000_000);
    assert_eq!(reactors["pid"], std::process::id());
    assert_eq!(reactors["reactors"][1]["lcore"], 1);
    assert_eq!(reactors["reactors"][1]["lw_threads"][0]["name"], "reactor_1");
    let tid = |at: usize| reactors["reactors"][at]["tid"].as_u64().unwrap();
    assert!(tid(0) != tid(1) && tid(0) > 0);

    // The counters reach us within a bounded number of steps.
    let pollers = loop {
        let pollers = get("thread_get_pollers");
        let first = &pollers["threads"][0];
        if first["active_pollers"].as_array().unwrap().iter().any(|poller| poller["busy_count"] != 0) {
            break pollers;
        }
    };
    let first = &pollers["threads"][0];
    let count = first["active_pollers"].as_array().unwrap().iter().find(|poller| poller["name"] == "count").unwrap();
    let busy = count["busy_count"].as_u64().unwrap();
    assert!(busy <= runs.load(Ordering::SeqCst));
    assert_eq!(count["run_count"].as_u64(), Some(busy), "it is always busy");
    let timed = first["timed_pollers"].as_array().unwrap();
    let rarely = timed.iter().find(|poller| poller["name"] == "rarely").unwrap();
    assert_eq!(rarely["period_ticks"], 3_600_000_000_000u64);

    let stats = get("thread_get_stats");
    assert!(stats["threads"][0]["busy"].as_u64().unwrap() > 0);
    assert_eq!(stats["threads"][0]["id"], 1);
    assert_eq!(stats["threads"][1]["id"], 2);
    let channels = get("thread_get_io_channels");
    assert_eq!(channels["threads"][1], json!({"name": "reactor_1", "io_channels": [{"name": "dev1", "ref": 2}]}));

    threads.stop().unwrap();
    let error = block_on(table.call("thread_get_stats", Value::Null)).unwrap_err();
    assert_eq!(error.code(), -32603);
    assert!(error.message().contains("the reactor has stopped"));
}
