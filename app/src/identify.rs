//! `ringstone identify`: what a controller says of itself and of its namespaces.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::mpsc;

use nvmf::host::{Controller, Namespace, State, Watching};
use nvmf::spec::fabrics::{DISCOVERY_NQN, Vs};
use nvmf::spec::feature::AsyncEventConfig;
use nvmf::spec::identify::{IdentifyController, anacap, cmic, cntrltype, nsfeat, oacs, oncs};
use nvmf::spec::log::AnaState;
use nvmf::spec::shown_text;
use reactor::park::Ready;
use reactor::reactor::PollPolicy;
use reactor::{Context, Instant, Poller, PollerId, Progress};
use serde_json::{Value, json};

use crate::remote::{self, Remote};
use crate::say::say;

/// Options of `ringstone identify`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    remote: Remote,
    /// NQN of the subsystem.
    #[arg(long, value_parser = remote::parse_nqn)]
    subnqn: String,
    /// Show this namespace only.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    nsid: Option<u32>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What was found out.
struct Found {
    controller: Box<IdentifyController>,
    namespaces: BTreeMap<u32, (Namespace, AnaState)>,
    io_queues: u16,
}

struct Asker {
    id: PollerId,
    controller: Controller,
    found: Option<Found>,
    out: Option<mpsc::Sender<Result<Found, String>>>,
    now: Instant,
}

impl Poller for Asker {
    fn poll(&mut self, cx: &mut Context) -> Progress {
        self.now = cx.now();
        let busy = self.controller.poll(self.now, &mut Watching { cx, poller: self.id });
        match self.controller.state() {
            State::Live => {
                let (inventory, identity) = (self.controller.inventory(), self.controller.identity());
                let with_state = |(nsid, ns): (&u32, &Namespace)| (*nsid, (ns.clone(), inventory.ana_state(ns)));
                self.found = identity.map(|identity| Found {
                    controller: Box::new(*identity),
                    namespaces: inventory.namespaces().iter().map(with_state).collect(),
                    io_queues: self.controller.io_queues(),
                });
                self.controller.shut_down();
                Progress::Busy
            }
            State::Down => {
                let Some(out) = self.out.take() else { return Progress::Idle };
                let why = || self.controller.error().map_or("the controller is down".into(), ToString::to_string);
                // What was found out stays true if only the farewell failed. Whoever waited may be gone.
                let _ = out.send(self.found.take().ok_or_else(why));
                self.controller.close(&mut Watching { cx, poller: self.id });
                Progress::Busy
            }
            _ => Progress::from_busy(busy),
        }
    }

    fn ready(&mut self, _key: u64, ready: Ready) {
        self.controller.ready(ready);
    }

    fn deadline(&self) -> Option<Instant> {
        self.controller.deadline(self.now)
    }

    fn may_sleep(&mut self, _cx: &mut Context) -> bool {
        !self.controller.has_work()
    }
}

/// Runs the command.
pub fn main(options: &Options) -> ExitCode {
    let shown = run(options).and_then(|found| {
        let namespaces: Vec<_> = match options.nsid {
            None => found.namespaces.values().collect(),
            Some(nsid) => {
                let missing = || remote::no_namespace(nsid, found.namespaces.keys());
                vec![found.namespaces.get(&nsid).ok_or_else(missing)?]
            }
        };
        Ok((controller_fields(&found), namespaces.into_iter().map(namespace_fields).collect::<Vec<_>>()))
    });
    match shown {
        Ok((controller, namespaces)) if options.json => {
            let value = |fields: &Fields| -> Value {
                let field = |(name, value, _): &(&str, Value, String)| ((*name).to_owned(), value.clone());
                fields.iter().map(field).collect()
            };
            let namespaces: Vec<Value> = namespaces.iter().map(|namespace| value(namespace)).collect();
            say!("{}", json!({ "controller": value(&controller), "namespaces": namespaces }));
            ExitCode::SUCCESS
        }
        Ok((controller, namespaces)) => {
            say!("Controller");
            print_fields(&controller);
            for namespace in &namespaces {
                say!("\nNamespace {}", namespace[0].1);
                print_fields(&namespace[1..]);
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
            let connector = options.remote.connector(&cx.platform().network(), address);
            let mut host = options.remote.host_options(cx, &options.subnqn);
            host.discovery = options.subnqn == DISCOVERY_NQN;
            let controller = Controller::new(connector, host, 0, cx.read_clock());
            Ok(Box::new(Asker { id, controller, found: None, out: Some(out), now: cx.now() }) as _)
        }
    };
    let found = remote::run(&[None], PollPolicy::default(), make, |results| results.recv().ok())?;
    found.map_err(|why| options.remote.explain(address, &why))
}

/// Name, value, and the value in words where that says more.
type Fields = [(&'static str, Value, String)];

fn print_fields(fields: &Fields) {
    for (name, value, words) in fields {
        let value = match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        match words.as_str() {
            "" => say!("  {name:<10} {value}"),
            words => say!("  {name:<10} {value:<12} {words}"),
        }
    }
}

/// The names of the bits that are set.
fn bits(value: u64, names: &[(u64, &str)]) -> String {
    let set: Vec<_> = names.iter().filter(|(bit, _)| value & bit != 0).map(|(_, name)| *name).collect();
    if set.is_empty() { "none of note".into() } else { set.join(", ") }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn controller_fields(found: &Found) -> Vec<(&'static str, Value, String)> {
    let id = &found.controller;
    let mut fields = who_it_is(id);
    fields.extend(what_it_does(id));
    fields.extend(how_its_queues_are(id));
    fields.push(("io_queues", json!(found.io_queues), "granted of 1 asked for".into()));
    fields
}

fn who_it_is(id: &IdentifyController) -> Vec<(&'static str, Value, String)> {
    let text = |field: &[u8]| json!(shown_text(field));
    let plain = String::new;
    let version = Vs(id.ver.get());
    let kind = match id.cntrltype {
        cntrltype::IO => "I/O controller",
        cntrltype::DISCOVERY => "discovery controller",
        cntrltype::ADMINISTRATIVE => "administrative controller",
        _ => "not reported",
    };
    vec![
        ("vid", json!(id.vid.get()), format!("{:#06x}", id.vid.get())),
        ("sn", text(&id.sn), plain()),
        ("mn", text(&id.mn), plain()),
        ("fr", text(&id.fr), plain()),
        ("subnqn", text(&id.subnqn), plain()),
        ("cntrltype", json!(id.cntrltype), kind.into()),
        ("cntlid", json!(id.cntlid.get()), format!("{:#06x}", id.cntlid.get())),
        ("ver", json!(id.ver.get()), format!("{}.{}.{}", version.mjr(), version.mnr(), version.ter())),
        (
            "cmic",
            json!(id.cmic),
            bits(
                id.cmic.into(),
                &[
                    (cmic::MULTI_PORT.into(), "several ports"),
                    (cmic::MULTI_CONTROLLER.into(), "several controllers"),
                    (cmic::ANA.into(), "ANA reporting"),
                ],
            ),
        ),
    ]
}

fn what_it_does(id: &IdentifyController) -> Vec<(&'static str, Value, String)> {
    let mdts = match id.mdts {
        0 => "no limit".into(),
        n => format!("2^{n} pages of the smallest size"),
    };
    let events = AsyncEventConfig(id.oaes.get());
    let notices = [
        (events.ns_attribute(), "namespace attributes"),
        (events.ana_change(), "ANA"),
        (events.discovery_change(), "discovery log"),
    ];
    let notices: Vec<_> = notices.into_iter().filter(|(set, _)| *set == 1).map(|(_, name)| name).collect();
    vec![
        ("mdts", json!(id.mdts), mdts),
        ("oaes", json!(id.oaes.get()), notices.join(", ")),
        (
            "oacs",
            json!(id.oacs.get()),
            bits(
                id.oacs.get().into(),
                &[
                    (oacs::SECURITY.into(), "security"),
                    (oacs::FORMAT.into(), "format"),
                    (oacs::FIRMWARE.into(), "firmware"),
                    (oacs::NAMESPACE_MANAGEMENT.into(), "namespace management"),
                    (oacs::GET_LBA_STATUS.into(), "get LBA status"),
                ],
            ),
        ),
        ("acl", json!(id.acl), format!("{} aborts at once", u16::from(id.acl) + 1)),
        ("aerl", json!(id.aerl), format!("{} event requests at once", u16::from(id.aerl) + 1)),
        ("elpe", json!(id.elpe), format!("{} entries in the error log", u16::from(id.elpe) + 1)),
        ("kas", json!(id.kas.get()), format!("keep-alive in steps of {} ms", u32::from(id.kas.get()) * 100)),
        (
            "anacap",
            json!(id.anacap),
            bits(
                id.anacap.into(),
                &[
                    (anacap::OPTIMIZED.into(), "optimized"),
                    (anacap::NON_OPTIMIZED.into(), "non-optimized"),
                    (anacap::INACCESSIBLE.into(), "inaccessible"),
                    (anacap::PERSISTENT_LOSS.into(), "persistent loss"),
                    (anacap::CHANGE.into(), "change"),
                    (anacap::GROUP_IS_FIXED.into(), "groups are fixed"),
                ],
            ),
        ),
        ("nanagrpid", json!(id.nanagrpid.get()), String::new()),
    ]
}

fn how_its_queues_are(id: &IdentifyController) -> Vec<(&'static str, Value, String)> {
    let plain = String::new;
    let flush = match id.vwc >> 1 & 3 {
        2 => "flush of all namespaces not supported",
        3 => "flush of all namespaces supported",
        _ => "flush of all namespaces not reported",
    };
    vec![
        ("sqes", json!(id.sqes), format!("entries of {} bytes", 1u64 << (id.sqes & 0xf))),
        ("cqes", json!(id.cqes), format!("entries of {} bytes", 1u64 << (id.cqes & 0xf))),
        ("maxcmd", json!(id.maxcmd.get()), plain()),
        ("nn", json!(id.nn.get()), "highest namespace identifier".into()),
        (
            "oncs",
            json!(id.oncs.get()),
            bits(
                id.oncs.get().into(),
                &[
                    (oncs::COMPARE.into(), "compare"),
                    (oncs::WRITE_UNCORRECTABLE.into(), "write uncorrectable"),
                    (oncs::DATASET_MANAGEMENT.into(), "dataset management"),
                    (oncs::WRITE_ZEROES.into(), "write zeroes"),
                    (oncs::SAVE_SELECT.into(), "save and select"),
                    (oncs::RESERVATIONS.into(), "reservations"),
                    (oncs::TIMESTAMP.into(), "timestamp"),
                    (oncs::VERIFY.into(), "verify"),
                    (oncs::COPY.into(), "copy"),
                ],
            ),
        ),
        ("fuses", json!(id.fuses.get()), bits(id.fuses.get().into(), &[(1, "compare and write")])),
        (
            "vwc",
            json!(id.vwc),
            format!("write cache {}, {flush}", if id.vwc & 1 != 0 { "present" } else { "not present" }),
        ),
        ("sgls", json!(id.sgls.get()), format!("{:#x}", id.sgls.get())),
        ("ioccsz", json!(id.ioccsz.get()), format!("command capsules of {} bytes", u64::from(id.ioccsz.get()) * 16)),
        ("iorcsz", json!(id.iorcsz.get()), format!("response capsules of {} bytes", u64::from(id.iorcsz.get()) * 16)),
        ("icdoff", json!(id.icdoff.get()), plain()),
        ("msdbd", json!(id.msdbd), plain()),
    ]
}

fn namespace_fields((ns, state): &(Namespace, AnaState)) -> Vec<(&'static str, Value, String)> {
    let raw = &ns.raw;
    let optional = |bytes: Option<String>| bytes.map_or(Value::Null, Value::String);
    let uuid = ns.identity.uuid.map(|uuid| {
        let digits = hex(&uuid);
        [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]].join("-")
    });
    let mib = |bytes: u128| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let blocks = |count: u64| mib(u128::from(count) * u128::from(ns.block_bytes));
    let deallocated = match raw.dlfeat & 7 {
        1 => "deallocated blocks read as zeroes",
        2 => "deallocated blocks read as ones",
        _ => "what deallocated blocks read as is not reported",
    };
    vec![
        ("nsid", json!(ns.nsid), String::new()),
        ("nsze", json!(raw.nsze.get()), blocks(raw.nsze.get())),
        ("ncap", json!(raw.ncap.get()), blocks(raw.ncap.get())),
        ("nuse", json!(raw.nuse.get()), blocks(raw.nuse.get())),
        ("block_size", json!(ns.block_bytes), "bytes".into()),
        ("flbas", json!(raw.flbas), format!("format {} of {}", raw.flbas & 0xf, u16::from(raw.nlbaf) + 1)),
        (
            "nsfeat",
            json!(raw.nsfeat),
            bits(
                raw.nsfeat.into(),
                &[
                    (nsfeat::THIN.into(), "thin"),
                    (nsfeat::ATOMICS.into(), "atomic sizes of its own"),
                    (nsfeat::DEALLOCATED_ERROR.into(), "errors for deallocated blocks"),
                    (nsfeat::UID_REUSE.into(), "names never reused"),
                    (nsfeat::OPTIMAL.into(), "optimal sizes"),
                ],
            ),
        ),
        ("nmic", json!(raw.nmic), if raw.nmic & 1 != 0 { "shared" } else { "private" }.into()),
        ("rescap", json!(raw.rescap), if raw.rescap == 0 { "no reservations" } else { "reservations" }.into()),
        ("dlfeat", json!(raw.dlfeat), deallocated.into()),
        ("nsattr", json!(raw.nsattr), if ns.read_only { "write protected" } else { "writable" }.into()),
        ("nvmcap", json!(raw.nvmcap.get().to_string()), mib(raw.nvmcap.get())),
        ("anagrpid", json!(ns.anagrpid), String::new()),
        ("ana_state", json!(state.name()), String::new()),
        ("npwg", json!(raw.npwg.get()), format!("writes of {} blocks are best", u32::from(raw.npwg.get()) + 1)),
        ("mssrl", json!(raw.mssrl.get()), "blocks of one copied range".into()),
        ("mcl", json!(raw.mcl.get()), "blocks of one copy".into()),
        ("nguid", optional(ns.identity.nguid.map(|nguid| hex(&nguid))), String::new()),
        ("eui64", optional(ns.identity.eui64.map(|eui64| hex(&eui64))), String::new()),
        ("uuid", optional(uuid), String::new()),
    ]
}
