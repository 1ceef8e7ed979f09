//! What hosts see, by the bytes of the log.

use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;

use super::*;
use crate::target::controller::fixture::*;
use crate::target::view::{DiscoveryFilter, Referral, SubsystemView, TransportOptions};

const OTHER_HOST: &str = "nqn.other-host";

fn here() -> ListenAddress {
    tcp([127, 0, 0, 1], 4420)
}

fn local() -> SocketAddr {
    here().socket_addr()
}

/// Subtype, NQN, address and port of each entry.
fn shown(log: &[u8]) -> Vec<(u8, String, String)> {
    let count = u64::from_le_bytes(log[8..16].try_into().unwrap()) as usize;
    assert_eq!(log.len(), 1024 * (count + 1));
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap().trim_end_matches(['\0', ' ']).to_string();
    log[1024..]
        .chunks(1024)
        .map(|entry| (entry[2], text(&entry[256..512]), format!("{} {}", text(&entry[512..768]), text(&entry[32..64]))))
        .collect()
}

fn named(nqn: &str, listeners: Vec<ListenAddress>) -> SubsystemView {
    let listeners = listeners.into_iter().zip(1..).map(|(address, id)| listener(address, id)).collect();
    SubsystemView { nqn: nqn.into(), listeners, ..subsystem() }
}

fn nvm_only(view: &TargetView, came_in: &ListenAddress, local: SocketAddr) -> Vec<String> {
    let log = log(view, HOST, came_in, local);
    shown(&log).into_iter().filter(|entry| entry.0 == 2).map(|entry| entry.2).collect()
}

#[test]
fn the_bytes_of_a_log() {
    let log = log(&target(vec![subsystem()]), HOST, &here(), local());
    assert_eq!(log[..8], 17u64.to_le_bytes(), "GENCTR");
    assert_eq!(log[8..16], 2u64.to_le_bytes(), "NUMREC");
    assert_eq!(log[16..18], [0, 0], "RECFMT");
    let (current, entry) = (&log[1024..2048], &log[2048..]);
    assert_eq!(entry[..4], [3, 1, 2, 0b110], "TCP, IPv4, NVM subsystem, no secure channel and no flow control needed");
    assert_eq!(entry[4..12], [5, 0, 0xff, 0xff, 128, 0, 0, 0], "PORTID, CNTLID, ASQSZ, EFLAGS");
    assert_eq!(&entry[32..64], b"4420                            ");
    assert!(entry[256..].starts_with(NQN.as_bytes()) && entry[256 + NQN.len()] == 0);
    assert!(entry[512..].starts_with(b"127.0.0.1  ") && entry[767] == b' ');
    assert_eq!(entry[768], 0, "SECTYPE");
    assert_eq!((current[2], current[10]), (3, 0b11), "this discovery service, DUPRETINFO and EPCSD");
    assert!(current[256..].starts_with(b"nqn.2014-08.org.nvmexpress.discovery\0"));
    assert!(current[512..].starts_with(b"127.0.0.1 "));
}

#[test]
fn hosts_see_what_they_may_connect_to() {
    let mut private = named("nqn.private", vec![here()]);
    private.allow_any_host = false;
    private.hosts = vec![OTHER_HOST.into()];
    let view = target(vec![subsystem(), private]);
    let nqns =
        |host| -> Vec<String> { shown(&log(&view, host, &here(), local())).into_iter().map(|entry| entry.1).collect() };
    assert_eq!(nqns(HOST), [DISCOVERY_NQN, NQN]);
    assert_eq!(nqns(OTHER_HOST), [DISCOVERY_NQN, NQN, "nqn.private"]);
}

#[test]
fn listeners_pass_the_filter() {
    let there = tcp([10, 0, 0, 1], 4420);
    let other_port = tcp([127, 0, 0, 1], 4421);
    let rdma = ListenAddress { trtype: TransportKind::Rdma, ..here() };
    let mut view = target(vec![named("nqn.a", vec![here(), there, other_port, rdma])]);
    view.transports.insert(TransportKind::Rdma, TransportOptions { max_aq_depth: 64, ..Default::default() });
    let all = ["127.0.0.1 4420", "10.0.0.1 4420", "127.0.0.1 4421", "127.0.0.1 4420"];
    assert_eq!(nvm_only(&view, &here(), local()), all);
    let entries = entries(&view, HOST, &here(), local().ip());
    assert_eq!((entries[4].trtype, entries[4].asqsz.get(), &entries[4].tsas[..4]), (1, 64, &[1, 1, 1, 0][..]));
    let filtered = |transport, address, svcid| {
        let view = TargetView { discovery_filter: DiscoveryFilter { transport, address, svcid }, ..view.clone() };
        nvm_only(&view, &here(), local())
    };
    assert_eq!(filtered(true, false, false), all[..3]);
    assert_eq!(filtered(false, true, false), [all[0], all[2], all[3]]);
    assert_eq!(filtered(false, false, true), [all[0], all[1], all[3]]);
    assert_eq!(filtered(true, true, true), all[..1]);
}

#[test]
fn wildcards_are_shown_as_the_address_that_the_host_came_to() {
    let any4 = tcp([0, 0, 0, 0], 4420);
    let any6 = ListenAddress { traddr: IpAddr::V6(Ipv6Addr::UNSPECIFIED), ..here() };
    let (v4, v6): (SocketAddr, SocketAddr) = ("192.0.2.7:4420".parse().unwrap(), "[2001:db8::7]:4420".parse().unwrap());
    let mapped: SocketAddr = "[::ffff:192.0.2.7]:4420".parse().unwrap();
    let view4 = target(vec![named("nqn.a", vec![any4.clone()])]);
    let view6 = target(vec![named("nqn.a", vec![any6.clone()])]);
    assert_eq!(nvm_only(&view4, &any4, v4), ["192.0.2.7 4420"]);
    assert_eq!(nvm_only(&view6, &any6, v6), ["2001:db8::7 4420"]);
    assert_eq!(nvm_only(&view6, &any6, mapped), ["192.0.2.7 4420"], "IPv4 through a dual-stack socket");
    assert_eq!(entries(&view6, HOST, &any6, v6.ip())[1].adrfam, 2);
    assert_eq!(entries(&view6, HOST, &any6, mapped.ip())[1].adrfam, 1);
    assert!(nvm_only(&view4, &any6, v6).is_empty(), "an IPv4 listener is no IPv6 address");
    // The service itself is where the host found it.
    assert_eq!(shown(&log(&view4, HOST, &any4, v4))[0].2, "192.0.2.7 4420");
}

#[test]
fn addresses_of_the_service_itself() {
    let mut view = target(vec![subsystem()]);
    view.discovery_listeners = vec![here(), tcp([10, 0, 0, 1], 8009), tcp([127, 0, 0, 1], 8009)];
    let current = |view: &TargetView| -> Vec<String> {
        let all = shown(&log(view, HOST, &here(), local()));
        all.into_iter().filter(|entry| entry.0 == 3).map(|entry| entry.2).collect()
    };
    assert_eq!(current(&view), ["127.0.0.1 4420", "10.0.0.1 8009", "127.0.0.1 8009"]);
    view.discovery_filter.address = true;
    assert_eq!(current(&view), ["127.0.0.1 4420", "127.0.0.1 8009"]);
}

#[test]
fn referrals() {
    let mut view = target(vec![]);
    for (secure_channel, port) in [(false, 8009), (true, 8010)] {
        let address = tcp([192, 0, 2, 1], port);
        view.referrals.push(Referral { address, subnqn: DISCOVERY_NQN.into(), secure_channel });
    }
    let bytes = log(&view, HOST, &here(), local());
    let all = shown(&bytes);
    assert_eq!(all[1], (1, DISCOVERY_NQN.into(), "192.0.2.1 8009".into()));
    assert_eq!(all[2].2, "192.0.2.1 8010");
    assert_eq!((bytes[2 * 1024 + 3] & 3, bytes[3 * 1024 + 3] & 3), (2, 1), "secure channel not required, required");
    assert_eq!(bytes[2 * 1024 + 8..2 * 1024 + 10], [32, 0]);
}

#[test]
fn a_log_is_read_in_parts_of_any_size() {
    let mut bench = Bench::discovery(target(vec![subsystem(), named("nqn.b", vec![here()])]), 0);
    let whole = log(&bench.target, HOST, &here(), local());
    assert_eq!(bench.log(0x70, 4096), whole);
    let mut parts = Vec::new();
    for at in (0..4096).step_by(512) {
        parts.extend(bench.log_at(0x70, true, at, 512).ok());
    }
    assert_eq!(parts, whole);
    assert_eq!(bench.log(0x70, 8192)[4096..], [0; 4096]);
    bench.change(|target| {
        target.discovery_generation = 18;
        let subsystem = target.subsystems.get_mut("nqn.b").unwrap();
        Arc::make_mut(subsystem).listeners.clear();
    });
    assert_eq!(bench.log(0x70, 16), [18, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
}
