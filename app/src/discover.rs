//! `ringstone discover`: what a discovery service knows, and those that it refers to.

use std::process::ExitCode;
use std::sync::mpsc;

use nvmf::host::Watching;
use nvmf::host::discovery::{Crawl, Service, Visit, address_on};
use nvmf::spec::fabrics::DISCOVERY_NQN;
use nvmf::spec::log::{DiscoveryEntry, adrfam, eflags, subtype, trtype};
use nvmf::spec::shown_text;
use reactor::park::Ready;
use reactor::reactor::PollPolicy;
use reactor::{Context, Instant, Poller, PollerId, Progress};
use serde_json::{Value, json};

use crate::remote::{self, Remote};
use crate::say::say;

/// Options of `ringstone discover`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    remote: Remote,
    /// NQN of the discovery subsystem.
    #[arg(long, value_parser = remote::parse_nqn, default_value = DISCOVERY_NQN)]
    subnqn: String,
    /// Show referrals and do not follow them.
    #[arg(long)]
    no_referrals: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

struct Found {
    visits: Vec<Visit>,
    skipped: Vec<(DiscoveryEntry, &'static str)>,
}

struct CrawlPoller {
    id: PollerId,
    crawl: Crawl,
    out: Option<mpsc::Sender<Found>>,
    now: Instant,
}

impl Poller for CrawlPoller {
    fn poll(&mut self, cx: &mut Context) -> Progress {
        self.now = cx.now();
        let mut busy = self.crawl.poll(self.now, &mut Watching { cx, poller: self.id });
        if self.crawl.is_done()
            && let Some(out) = self.out.take()
        {
            busy = true;
            let found = Found { visits: self.crawl.visits().to_vec(), skipped: self.crawl.skipped().to_vec() };
            // Whoever waited for it may be gone.
            let _ = out.send(found);
        }
        Progress::from_busy(busy)
    }

    fn ready(&mut self, _key: u64, ready: Ready) {
        self.crawl.ready(ready);
    }

    fn deadline(&self) -> Option<Instant> {
        self.crawl.deadline(self.now)
    }

    fn may_sleep(&mut self, _cx: &mut Context) -> bool {
        !self.crawl.has_work()
    }
}

/// Runs the command.
pub fn main(options: &Options) -> ExitCode {
    match run(options) {
        Ok(found) => {
            if options.json {
                say!("{}", as_json(&found));
            } else {
                print_text(&found);
            }
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<Found, String> {
    let address = options.remote.address()?;
    let make = {
        let options = options.clone();
        move |cx: &mut Context, id, out| {
            let (remote, network) = (options.remote.clone(), cx.platform().network());
            let host = options.remote.host_options(cx, &options.subnqn);
            let first = Service { address, subnqn: options.subnqn.clone() };
            let trtype = remote.trtype();
            let connect = Box::new(move |address| remote.connector(&network, address));
            let crawl = Crawl::new(connect, host, first, !options.no_referrals, 0).over(trtype);
            Ok(Box::new(CrawlPoller { id, crawl, out: Some(out), now: cx.now() }) as _)
        }
    };
    let found = remote::run(&[None], PollPolicy::default(), make, |results| results.recv().ok())?;
    // What the user asked for has to be there; of what it refers to, what there is.
    match found.visits.first() {
        Some(Visit { result: Err(error), .. }) => Err(options.remote.explain(address, &error.to_string())),
        _ => Ok(found),
    }
}

fn trtype_name(value: u8) -> String {
    match value {
        trtype::RDMA => "rdma".into(),
        trtype::FC => "fc".into(),
        trtype::TCP => "tcp".into(),
        trtype::LOOP => "loop".into(),
        other => format!("unrecognized ({other})"),
    }
}

fn adrfam_name(value: u8) -> String {
    match value {
        adrfam::IPV4 => "ipv4".into(),
        adrfam::IPV6 => "ipv6".into(),
        adrfam::IB => "infiniband".into(),
        adrfam::FC => "fibre-channel".into(),
        other => format!("unrecognized ({other})"),
    }
}

fn subtype_name(value: u8) -> String {
    match value {
        subtype::REFERRAL => "discovery subsystem referral".into(),
        subtype::NVM => "nvme subsystem".into(),
        subtype::CURRENT_DISCOVERY => "current discovery subsystem".into(),
        other => format!("unrecognized ({other})"),
    }
}

fn treq_name(value: u8) -> String {
    let secure = match value & 3 {
        0 => "not specified",
        1 => "required",
        2 => "not required",
        _ => "reserved",
    };
    let flow = if value & 4 != 0 { ", sq flow control disable supported" } else { "" };
    format!("{secure}{flow}")
}

fn eflags_name(value: u16) -> String {
    let names = [
        (eflags::PERSISTENT, "explicit discovery connections"),
        (eflags::DUPLICATE, "duplicate discovery information"),
        (eflags::NO_CDC, "no CDC connectivity"),
    ];
    let set: Vec<_> = names.into_iter().filter(|(bit, _)| value & bit != 0).map(|(_, name)| name).collect();
    if set.is_empty() { "none".into() } else { set.join(", ") }
}

fn sectype_name(value: u8) -> &'static str {
    match value {
        0 => "none",
        1 => "tls",
        2 => "tls13",
        _ => "unrecognized",
    }
}

fn entry_json(entry: &DiscoveryEntry) -> Value {
    let mut value = json!({
        "trtype": trtype_name(entry.trtype),
        "adrfam": adrfam_name(entry.adrfam),
        "subtype": subtype_name(entry.subtype),
        "treq": treq_name(entry.treq),
        "portid": entry.portid.get(),
        "cntlid": entry.cntlid.get(),
        "asqsz": entry.asqsz.get(),
        "trsvcid": shown_text(&entry.trsvcid),
        "subnqn": shown_text(&entry.subnqn),
        "traddr": shown_text(&entry.traddr),
        "eflags": eflags_name(entry.eflags.get()),
    });
    if entry.trtype == trtype::TCP {
        value["sectype"] = json!(sectype_name(entry.tsas[0]));
    }
    value
}

fn as_json(found: &Found) -> Value {
    let visit = |visit: &Visit| {
        let Service { address, subnqn } = &visit.service;
        let mut value = json!({
            "traddr": address.ip().to_string(), "trsvcid": address.port().to_string(), "subnqn": subnqn,
            "referrals_before": visit.depth,
        });
        match &visit.result {
            Ok(log) => {
                value["genctr"] = json!(log.generation);
                value["records"] = log.entries.iter().map(entry_json).collect();
            }
            Err(error) => value["error"] = json!(error.to_string()),
        }
        value
    };
    let skipped = |(entry, why): &(DiscoveryEntry, &'static str)| {
        let mut value = entry_json(entry);
        value["why"] = json!(why);
        value
    };
    json!({
        "services": found.visits.iter().map(visit).collect::<Vec<_>>(),
        "not_followed": found.skipped.iter().map(skipped).collect::<Vec<_>>(),
    })
}

fn print_text(found: &Found) {
    for visit in &found.visits {
        let Service { address, subnqn } = &visit.service;
        match &visit.result {
            Err(error) => say!("Discovery service {address}, {subnqn}: {error}"),
            Ok(log) => {
                let count = log.entries.len();
                say!("Discovery service {address}, {subnqn}: {count} records, generation counter {}", log.generation);
                log.entries.iter().enumerate().for_each(|(n, entry)| print_entry(n, entry));
            }
        }
        say!("");
    }
    for (entry, why) in &found.skipped {
        let at =
            address_on(entry.trtype, entry).map_or_else(|_| shown_text(&entry.traddr), |address| address.to_string());
        say!("not followed: referral to {at}: {why}");
    }
}

fn print_entry(number: usize, entry: &DiscoveryEntry) {
    say!("  entry {number}");
    let fields = entry_json(entry);
    for name in ["trtype", "adrfam", "subtype", "treq", "portid", "trsvcid", "subnqn", "traddr", "eflags", "sectype"] {
        match &fields[name] {
            Value::Null => {}
            Value::String(text) => say!("    {name:<8} {text}"),
            other => say!("    {name:<8} {other}"),
        }
    }
}
