//! Properties, events, keep alive, aborts, errors; Connect.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bdev::core::Geometry;
use proptest::prelude::*;
use reactor::{Buffers, ReactorId};
use zerocopy::FromBytes;

use super::fixture::*;
use super::*;
use crate::spec::opcode::admin;

const NS_CHANGED: u32 = 0x0004_0002;
const ANA_CHANGED: u32 = 0x000c_0302;
const DISCOVERY_CHANGED: u32 = 0x0070_f002;
const NS_ATTRIBUTE: u32 = 1 << 8;
const ANA_CHANGE: u32 = 1 << 11;
const DISCOVERY_CHANGE: u32 = 1 << 31;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn bigger(ns: &mut NamespaceView) {
    ns.geometry.num_blocks += 8;
}

// ---- properties ---------------------------------------------------------------------------------------------------

#[test]
fn capabilities() {
    let mut bench = Bench::disabled(subsystem(), 0);
    let cap = bench.property(0, 8).unwrap();
    assert_eq!(cap & 0xffff, 127, "MQES is 0's-based");
    assert_eq!(cap >> 16 & 1, 1, "CQR");
    assert_eq!(cap >> 24 & 0xff, 20, "TO");
    assert_eq!(cap >> 37 & 0xff, 0x41, "CSS: NVM, and CNS 1Ch");
    assert_eq!(cap >> 48 & 0xff, 0, "MPSMIN, MPSMAX: 4 KiB");
    assert_eq!(cap >> 59 & 3, 1, "CRMS: ready with media");
    assert_eq!(bench.property(8, 4), Ok(0x0002_0100));
    assert_eq!(bench.property(0x68, 4), Ok(20), "CRTO");
    assert_eq!(bench.property(0x20, 4), Ok(0), "NSSR reads as 0");
}

#[test]
fn properties_have_their_size_and_most_are_read_only() {
    let mut bench = Bench::disabled(subsystem(), 0);
    for (offset, size) in [(0, 4), (8, 8), (0x14, 8), (0x1c, 8), (0x30, 4), (0x1000, 8)] {
        assert_eq!(bench.property(offset, size), Err(Status::INVALID_FIELD.dnr()), "{offset:#x}");
    }
    for (offset, size_bytes) in [(0x00, 8), (0x08, 4), (0x1c, 4), (0x20, 4), (0x64, 4), (0x30, 4), (0x14, 8)] {
        let property = Property::from_offset(offset);
        let set = FabricsCommand::PropertySet { property, offset, size_bytes, value: CC_ENABLED };
        let outcome = bench.controller.fabrics(&set, bench.now);
        assert_eq!(outcome.result, Err(Status::INVALID_FIELD.dnr()), "{offset:#x}");
    }
    assert!(!bench.controller.is_enabled());
}

#[test]
fn a_controller_is_enabled_and_disabled() {
    let mut bench = Bench::disabled(subsystem(), 0);
    assert_eq!((bench.csts(), bench.controller.is_enabled()), (0, false));
    bench.enable();
    assert_eq!((bench.csts(), bench.controller.is_enabled()), (1, true));
    assert!(bench.controller.shared().ready.load(Ordering::Relaxed));
    assert_eq!(bench.property(0x14, 4), Ok(CC_ENABLED));
    // An I/O queue must go before RDY does.
    bench.controller.shared().io_queues().insert(1, ReactorId(0));
    assert_eq!(bench.set_cc(CC_ENABLED - 1), Ok(Effect::Disabled));
    assert_eq!((bench.csts(), bench.controller.is_enabled()), (1, false));
    assert!(!bench.controller.shared().ready.load(Ordering::Relaxed));
    assert_eq!(bench.set_cc(CC_ENABLED), Err(Status::COMMAND_SEQUENCE_ERROR.dnr()), "not before RDY is 0");
    bench.controller.shared().io_queues().clear();
    bench.controller.queues_deleted(bench.now);
    assert_eq!(bench.csts(), 0);
    bench.enable();
    assert!(bench.controller.is_enabled());
}

#[test]
fn without_io_queues_a_controller_is_disabled_at_once() {
    let mut bench = Bench::io(subsystem());
    assert_eq!(bench.set_cc(0), Ok(Effect::Disabled));
    assert_eq!(bench.csts(), 0);
    bench.controller.queues_deleted(bench.now);
    assert_eq!(bench.csts(), 0);
}

#[test]
fn a_shutdown_completes_when_the_queues_are_gone() {
    for shn in [1, 2] {
        let mut bench = Bench::io(subsystem());
        bench.controller.shared().io_queues().insert(1, ReactorId(0));
        assert_eq!(bench.set_cc(CC_ENABLED | shn << 14), Ok(Effect::ShutDown));
        assert_eq!(bench.csts(), 1 | 1 << 2);
        assert!(!bench.controller.is_enabled());
        bench.controller.shared().io_queues().clear();
        bench.controller.queues_deleted(bench.now);
        assert_eq!(bench.csts(), 1 | 2 << 2);
        // The reset that must follow a shutdown clears it.
        assert_eq!(bench.set_cc(0), Ok(Effect::Disabled));
        assert_eq!(bench.csts(), 0);
        bench.enable();
        assert_eq!(bench.csts(), 1);
    }
}

#[test]
fn what_cannot_be_configured_is_a_fatal_status() {
    for bad in [
        CC_ENABLED & !0x000f_0000,   // IOSQES 0
        CC_ENABLED & !0x00f0_0000,   // IOCQES 0
        CC_ENABLED | 1 << 7,         // 8 KiB pages
        CC_ENABLED | 1 << 11,        // weighted round robin
        CC_ENABLED & !0x70 | 7 << 4, // admin command set only
        CC_ENABLED & !0x70 | 1 << 4, // reserved command set
        CC_ENABLED | 1 << 24,        // ready without media
    ] {
        let mut bench = Bench::disabled(subsystem(), 0);
        assert_eq!(bench.set_cc(bad), Ok(Effect::None), "{bad:#x}");
        assert_eq!(bench.csts(), 2, "CFS, not RDY");
        assert_eq!(bench.identify(1, 0).failure(), Status::COMMAND_SEQUENCE_ERROR.dnr());
        assert_eq!(bench.set_cc(0), Ok(Effect::Disabled));
        assert_eq!(bench.csts(), 0);
        bench.enable();
    }
    let mut bench = Bench::disabled(subsystem(), 0);
    assert_eq!(bench.set_cc(CC_ENABLED & !0x70), Ok(Effect::Enabled), "the NVM command set alone");
}

#[test]
fn other_fields_of_an_enabled_controller_do_not_change() {
    let mut bench = Bench::io(subsystem());
    assert_eq!(bench.set_cc(CC_ENABLED | 5 << 7), Ok(Effect::None));
    assert_eq!(bench.property(0x14, 4), Ok(CC_ENABLED));
    assert!(bench.controller.is_enabled());
}

#[test]
fn other_fabrics_commands_on_a_connected_admin_queue() {
    let mut bench = Bench::io(subsystem());
    let disconnect = bench.controller.fabrics(&FabricsCommand::Disconnect, bench.now);
    assert_eq!(disconnect.cqe(9).status(), Status::INVALID_QUEUE_TYPE.dnr());
    let again = FabricsCommand::Connect(crate::spec::command::Connect {
        qid: 0,
        queue_entries: 32,
        priority: 0,
        disable_sq_flow_control: false,
        individual_queue_deletion: false,
        kato_ms: 0,
    });
    assert_eq!(bench.controller.fabrics(&again, bench.now).result, Err(Status::COMMAND_SEQUENCE_ERROR.dnr()));
}

// ---- commands in general ------------------------------------------------------------------------------------------

#[test]
fn nothing_is_executed_before_the_controller_is_enabled() {
    let mut bench = Bench::disabled(subsystem(), 0);
    for opcode in [admin::IDENTIFY, admin::GET_LOG_PAGE, admin::KEEP_ALIVE, admin::ASYNC_EVENT_REQUEST, 0xc0] {
        let answer = bench.admin(sqe(opcode, 0, [1, 0, 0, 0, 0, 0]), 4096);
        assert_eq!(answer.failure(), Status::COMMAND_SEQUENCE_ERROR.dnr());
    }
}

#[test]
fn commands_that_there_are_none_of() {
    let mut bench = Bench::io(subsystem());
    for opcode in [admin::CREATE_IO_SQ, admin::FORMAT_NVM, admin::NAMESPACE_MANAGEMENT, admin::SECURITY_SEND, 0xc0] {
        assert_eq!(bench.admin(sqe(opcode, 0, [0; 6]), 0).failure(), Status::INVALID_OPCODE.dnr());
    }
    let mut fused = sqe(admin::IDENTIFY, 0, [1, 0, 0, 0, 0, 0]);
    fused.flags |= 1;
    assert_eq!(bench.admin(fused, 4096).failure(), Status::INVALID_FIELD.dnr());
    assert_eq!(bench.admin(sqe(admin::KEEP_ALIVE, 1, [0; 6]), 0).failure(), Status::INVALID_FIELD.dnr());
}

#[test]
fn errors_are_logged_latest_first() {
    let mut bench = Bench::io(subsystem());
    bench.controller.record_error(ErrorRecord {
        sqid: 2,
        cid: 0x0b0a,
        status: Status::UNRECOVERED_READ_ERROR,
        opcode: 2,
        nsid: 3,
        lba: 0x0102_0304_0506,
        pel: ErrorRecord::NO_LOCATION,
    });
    assert_eq!(bench.identify(0x7f, 0).failure(), Status::INVALID_FIELD.dnr());
    let log = bench.log(1, 128 * 64);
    assert_eq!(log[0..8], 2u64.to_le_bytes(), "error count");
    assert_eq!(log[8..10], [0, 0], "admin queue");
    assert_eq!(log[12..14], Status::INVALID_FIELD.dnr().to_field().to_le_bytes());
    assert_eq!(log[14..16], [40, 0], "CNS");
    assert_eq!(log[31], admin::IDENTIFY);
    let older = &log[64..128];
    assert_eq!(older[0..8], 1u64.to_le_bytes());
    assert_eq!(older[8..16], [2, 0, 0x0a, 0x0b, 0x02, 0x05, 0xff, 0xff]);
    assert_eq!(older[16..24], 0x0102_0304_0506u64.to_le_bytes());
    assert_eq!(older[24..28], [3, 0, 0, 0]);
    assert_eq!((older[29], older[31], older[63]), (3, 2, 1), "TCP, Read, LPVER");
    assert!(log[128..].iter().all(|byte| *byte == 0));
    // In two parts it is the same.
    let mut parts = bench.log_at(1, true, 0, 64).ok();
    parts.extend(bench.log_at(1, true, 64, 64).ok());
    assert_eq!(parts, log[..128]);
}

#[test]
fn the_error_log_keeps_the_latest() {
    let mut bench = Bench::io(subsystem());
    for _ in 0..ERROR_LOG_ENTRIES + 5 {
        bench.identify(0x7f, 0);
    }
    let log = bench.log(1, 128 * 64);
    let counts: Vec<u64> = log.chunks(64).map(|entry| u64::from_le_bytes(entry[..8].try_into().unwrap())).collect();
    assert_eq!(counts, (6..=133).rev().collect::<Vec<u64>>());
}

#[test]
fn aborts() {
    let mut bench = Bench::io(subsystem());
    let abort = |sqid: u32, cid: u32| sqe(admin::ABORT, 0, [sqid | cid << 16, 0, 0, 0, 0, 0]);
    assert!(bench.request_event(7, 100));
    assert_eq!(bench.admin(abort(0, 99), 0).value(), 1, "nothing with this cid");
    assert_eq!(bench.admin(abort(0, 100), 0).value(), 0);
    let (slot, cqe) = bench.controller.pop_event().unwrap();
    assert_eq!((slot, cqe.cid.get(), cqe.status()), (7, 100, Status::ABORT_REQUESTED));
    assert_eq!(bench.admin(abort(0, 100), 0).value(), 1, "only once");
    // On an I/O queue somebody else has to look; four at once.
    for cid in 1..=4 {
        let mut command = abort(3, 200);
        command.cid.set(cid);
        let admin = bench.submit(0, command, &mut Buffers::new());
        assert_eq!(admin, Admin::Abort { cid_of_abort: cid, sqid: 3, cid: 200 });
    }
    assert_eq!(bench.admin(abort(3, 200), 0).failure(), Status::ABORT_LIMIT_EXCEEDED);
    assert_eq!(bench.controller.abort_done(4, true).dw0.get(), 0);
    let not_found = bench.controller.abort_done(3, false);
    assert_eq!((not_found.cid.get(), not_found.dw0.get()), (3, 1));
    assert!(matches!(bench.submit(0, abort(3, 200), &mut Buffers::new()), Admin::Abort { .. }));
}

// ---- events -------------------------------------------------------------------------------------------------------

#[test]
fn four_event_requests_are_kept() {
    let mut bench = Bench::io(subsystem());
    for n in 0..4 {
        assert!(bench.request_event(n, 100 + n));
    }
    assert!(!bench.request_event(4, 104));
    assert_eq!(bench.controller.abort_parked(102), Some(2));
    assert_eq!(bench.controller.abort_parked(102), None);
    assert!(bench.request_event(4, 104));
    assert_eq!(bench.controller.parked_slots(), [(0, 100), (1, 101), (3, 103), (4, 104)]);
    assert!(bench.controller.parked_slots().is_empty());
    assert_eq!(bench.event(), None);
}

#[test]
fn a_resize_is_told_once_until_the_log_is_read() {
    let mut bench = Bench::io(subsystem());
    bench.set_feature(0x0b, NS_ATTRIBUTE).ok();
    assert!(bench.request_event(1, 11) && bench.request_event(2, 12));
    bench.change_namespace(3, bigger);
    assert_eq!(bench.event(), Some((1, 11, NS_CHANGED)));
    bench.change_namespace(1, bigger);
    assert_eq!(bench.event(), None, "masked");
    // With RAE the log stays, and the mask too.
    let list = bench.log_at(4, true, 0, 4096).ok();
    assert_eq!(list[..12], [1, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
    bench.change_namespace(1, bigger);
    assert_eq!(bench.event(), None);
    assert_eq!(bench.log(4, 4096)[..12], list[..12]);
    assert_eq!(bench.log(4, 4096)[..4], [0; 4], "read and cleared");
    bench.change_namespace(1, bigger);
    assert_eq!(bench.event(), Some((2, 12, NS_CHANGED)));
    assert_eq!(bench.log(4, 4096)[..8], [1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn an_event_waits_for_a_request() {
    let mut bench = Bench::io(subsystem());
    bench.set_feature(0x0b, NS_ATTRIBUTE).ok();
    bench.change_namespace(1, bigger);
    bench.change_namespace(3, bigger);
    assert_eq!(bench.event(), None);
    assert!(bench.request_event(5, 50));
    assert_eq!(bench.event(), Some((5, 50, NS_CHANGED)));
    assert!(bench.request_event(6, 51));
    assert_eq!(bench.event(), None, "one for both");
    // What was read before it was told is not told.
    bench.log(4, 4096);
    assert_eq!(bench.controller.parked_slots().len(), 1);
    bench.change_namespace(1, bigger);
    bench.log(4, 4096);
    assert!(bench.request_event(6, 52));
    assert_eq!(bench.event(), None);
}

#[test]
fn nobody_is_told_who_does_not_want_to_be() {
    let mut bench = Bench::io(subsystem());
    assert!(bench.request_event(1, 11));
    bench.change_namespace(1, bigger);
    assert_eq!(bench.event(), None, "off by default");
    bench.set_feature(0x0b, NS_ATTRIBUTE).ok();
    bench.change_subsystem(|_| {});
    assert_eq!(bench.event(), None, "nothing changed");
    bench.controller.parked_slots();
    bench.change_namespace(1, bigger);
    bench.set_feature(0x0b, 0).ok();
    assert!(bench.request_event(1, 12));
    assert_eq!(bench.event(), None, "switched off before it was told");
}

#[test]
fn namespaces_come_go_and_change() {
    let mut bench = Bench::io(subsystem());
    bench.set_feature(0x0b, NS_ATTRIBUTE).ok();
    let mut slot = 0;
    let mut told = |bench: &mut Bench, nsid: u32, what: &str| {
        slot += 1;
        assert!(bench.request_event(slot, slot));
        assert_eq!(bench.event(), Some((slot, slot, NS_CHANGED)), "{what}");
        let list = bench.log(4, 4096);
        assert_eq!(list[..8], u64::from(nsid).to_le_bytes(), "{what}");
    };
    bench.change_subsystem(|subsystem| {
        subsystem.namespaces.insert(2, Arc::new(namespace(2, Geometry::new(512, 8))));
    });
    told(&mut bench, 2, "added");
    bench.change_subsystem(|subsystem| {
        subsystem.namespaces.remove(&1);
    });
    told(&mut bench, 1, "removed");
    bench.change_namespace(3, |ns| ns.incarnation += 1);
    told(&mut bench, 3, "removed and added");
    bench.change_namespace(3, |ns| ns.geometry.read_only = true);
    told(&mut bench, 3, "read only");
    bench.change_namespace(3, |ns| ns.nguid = Some([1; 16]));
    told(&mut bench, 3, "another NGUID");
    assert_eq!(bench.identify(2, 0).ok()[..12], [2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_changed_list_that_overflows_says_so() {
    let mut many = subsystem();
    many.max_namespaces = 2000;
    let mut bench = Bench::io(many);
    bench.set_feature(0x0b, NS_ATTRIBUTE).ok();
    let one = namespace(1, Geometry::new(512, 8));
    let add = |subsystem: &mut SubsystemView, nsids: std::ops::RangeInclusive<u32>| {
        for nsid in nsids {
            subsystem.namespaces.insert(nsid, Arc::new(NamespaceView { nsid, ..one.clone() }));
        }
    };
    bench.change_subsystem(|subsystem| add(subsystem, 10..=1033));
    let list = bench.log_at(4, true, 0, 4096).ok();
    assert_eq!((&list[..4], &list[4092..]), (&10u32.to_le_bytes()[..], &1033u32.to_le_bytes()[..]));
    bench.change_subsystem(|subsystem| add(subsystem, 1034..=1034));
    let list = bench.log(4, 4096);
    assert_eq!(list[..8], [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
    assert_eq!(bench.log(4, 4096)[..4], [0; 4]);
}

#[test]
fn access_changes_are_told_apart_from_namespace_changes() {
    let mut subsystem = subsystem();
    subsystem.ana_reporting = true;
    let mut bench = Bench::io(subsystem);
    bench.set_feature(0x0b, NS_ATTRIBUTE | ANA_CHANGE).ok();
    assert!(bench.request_event(1, 11) && bench.request_event(2, 12));
    let set_state = |bench: &mut Bench, group, state| {
        bench.change_subsystem(|subsystem| {
            Arc::make_mut(&mut subsystem.listeners[0]).ana_states.insert(group, state);
        });
    };
    set_state(&mut bench, 9, AnaState::Inaccessible);
    assert_eq!(bench.event(), None, "a group without namespaces");
    set_state(&mut bench, 1, AnaState::NonOptimized);
    assert_eq!(bench.event(), Some((1, 11, ANA_CHANGED)));
    assert_eq!(bench.log(4, 4096)[..4], [0; 4], "no attribute changed");
    let log = bench.log(0x0c, 16 + 32 + 8);
    assert_eq!(log[..10], [2, 0, 0, 0, 0, 0, 0, 0, 1, 0], "second state of the log, one group");
    assert_eq!((log[16], log[20], log[24], log[32]), (1, 2, 2, 2), "group 1, two namespaces, changed, non-optimized");
    // A namespace that moves to another group.
    bench.change_namespace(3, |ns| ns.anagrpid = 9);
    assert_eq!(bench.event(), Some((2, 12, ANA_CHANGED)));
    // A namespace that comes is not a change of access.
    bench.log(0x0c, 16);
    assert!(bench.request_event(3, 13) && bench.request_event(4, 14));
    bench.change_subsystem(|subsystem| {
        subsystem.namespaces.insert(2, Arc::new(namespace(2, Geometry::new(512, 8))));
    });
    assert_eq!(bench.event(), Some((3, 13, NS_CHANGED)));
    assert_eq!(bench.event(), None);
}

#[test]
fn error_events_need_no_asking_and_media_errors_do() {
    let mut bench = Bench::io(subsystem());
    let record =
        |status| ErrorRecord { sqid: 1, cid: 1, status, opcode: 1, nsid: 1, lba: 0, pel: ErrorRecord::NO_LOCATION };
    assert!(bench.request_event(1, 11) && bench.request_event(2, 12) && bench.request_event(3, 13));
    bench.controller.record_error(record(Status::LBA_OUT_OF_RANGE.dnr()));
    bench.controller.record_error(record(Status::WRITE_FAULT));
    assert_eq!(bench.event(), None);
    bench.controller.record_error(record(Status::INTERNAL_ERROR));
    bench.controller.record_error(record(Status::INTERNAL_ERROR));
    assert_eq!(bench.event(), Some((1, 11, 0x0001_0400)), "error, transient internal error, log 01h");
    assert_eq!(bench.event(), None);
    bench.log(1, 64);
    bench.controller.record_error(record(Status::INTERNAL_ERROR));
    assert_eq!(bench.event(), Some((2, 12, 0x0001_0400)));
    bench.set_feature(0x0b, 1 << 2).ok();
    bench.controller.record_error(record(Status::WRITE_FAULT));
    assert_eq!(bench.event(), Some((3, 13, 0x0002_0001)), "SMART, reliability, log 02h");
}

#[test]
fn errors_of_io_queues_are_told_when_the_timer_is_looked_at() {
    let mut bench = Bench::io(subsystem());
    assert!(bench.request_event(1, 11));
    let shared = Arc::clone(bench.controller.shared());
    let record = ErrorRecord {
        sqid: 4,
        cid: 9,
        status: Status::INTERNAL_ERROR,
        opcode: 1,
        nsid: 1,
        lba: 7,
        pel: ErrorRecord::NO_LOCATION,
    };
    std::thread::spawn(move || shared.record_error(record)).join().unwrap();
    assert_eq!(bench.event(), None);
    assert!(bench.controller.check_keep_alive(bench.now));
    assert_eq!(bench.event(), Some((1, 11, 0x0001_0400)));
    assert_eq!(bench.log(1, 64)[8..12], [4, 0, 9, 0]);
}

#[test]
fn a_reset_ends_requests_and_forgets_what_was_wanted() {
    let mut bench = Bench::io(subsystem());
    bench.set_feature(0x0b, NS_ATTRIBUTE).ok();
    bench.set_feature(0x07, 0x0003_0003).ok();
    assert!(bench.request_event(1, 11) && bench.request_event(2, 12));
    bench.change_namespace(1, bigger);
    assert_eq!(bench.event(), Some((1, 11, NS_CHANGED)));
    assert_eq!(bench.set_cc(0), Ok(Effect::Disabled));
    let (slot, cqe) = bench.controller.pop_event().unwrap();
    assert_eq!((slot, cqe.cid.get(), cqe.status()), (2, 12, Status::ABORTED_SQ_DELETION));
    assert_eq!(bench.controller.pop_event(), None);
    bench.change_namespace(1, bigger);
    bench.enable();
    assert_eq!(bench.get_feature(0x0b, 0).value(), 0);
    assert_eq!(bench.get_feature(0x07, 0).value(), 0x007e_007e);
    assert_eq!(bench.log(4, 4096)[..4], [0; 4]);
    bench.set_feature(0x0b, NS_ATTRIBUTE).ok();
    assert!(bench.request_event(1, 13));
    assert_eq!(bench.event(), None);
    bench.change_namespace(1, bigger);
    assert_eq!(bench.event(), Some((1, 13, NS_CHANGED)), "the mask is gone too");
}

#[test]
fn a_subsystem_that_is_deleted_or_made_anew_is_gone() {
    let mut bench = Bench::io(subsystem());
    bench.change(|target| target.subsystems.clear());
    assert!(bench.controller.subsystem().is_none());
    assert_eq!(bench.identify(1, 0).failure(), Status::INTERNAL_PATH_ERROR);
    let mut bench = Bench::io(subsystem());
    bench.change_subsystem(|subsystem| subsystem.incarnation += 1);
    assert!(bench.controller.subsystem().is_none());
    bench.change_subsystem(|subsystem| subsystem.incarnation -= 1);
    assert!(bench.controller.subsystem().is_some());
}

#[test]
fn discovery_changes_are_told_to_whom_they_concern() {
    let mut bench = Bench::discovery(target(vec![subsystem()]), 10_000);
    bench.set_feature(0x0b, DISCOVERY_CHANGE).ok();
    assert!(bench.request_event(1, 11) && bench.request_event(2, 12));
    bench.change(|target| {
        let mut private = subsystem();
        private.nqn = "nqn.2026-11.io.ringstone:private".into();
        private.allow_any_host = false;
        target.subsystems.insert(private.nqn.clone(), Arc::new(private));
        target.discovery_generation += 1;
    });
    assert_eq!(bench.event(), None, "this host cannot see it");
    bench.change_namespace(1, bigger);
    assert_eq!(bench.event(), None, "no log shows that");
    bench.change(|target| {
        let private = target.subsystems.get_mut("nqn.2026-11.io.ringstone:private").unwrap();
        Arc::make_mut(private).hosts.push(HOST.into());
        target.discovery_generation += 1;
    });
    assert_eq!(bench.event(), Some((1, 11, DISCOVERY_CHANGED)));
    bench.change_subsystem(|subsystem| subsystem.listeners.clear());
    assert_eq!(bench.event(), None, "masked");
    bench.log_at(0x70, true, 0, 1024).ok();
    bench.change_subsystem(|subsystem| subsystem.listeners.push(listener(tcp([127, 0, 0, 1], 4421), 6)));
    assert_eq!(bench.event(), None, "RAE");
    bench.log(0x70, 1024);
    bench.change_subsystem(|subsystem| subsystem.listeners.clear());
    assert_eq!(bench.event(), Some((2, 12, DISCOVERY_CHANGED)));
}

// ---- keep alive ---------------------------------------------------------------------------------------------------

#[test]
fn an_idle_host_is_noticed() {
    let mut bench = Bench::disabled(subsystem(), 5000);
    bench.enable();
    let deadline = bench.now + ms(5000);
    assert_eq!(bench.controller.keep_alive_deadline(), Some(deadline));
    bench.pass(ms(4999));
    assert!(bench.controller.check_keep_alive(bench.now));
    bench.pass(ms(1));
    assert!(!bench.controller.check_keep_alive(bench.now));
    assert_eq!(bench.csts() & 2, 2, "CFS");
    assert!(!bench.controller.shared().ready.load(Ordering::Relaxed));
}

#[test]
fn a_keep_alive_restarts_the_timer() {
    let mut bench = Bench::disabled(subsystem(), 5000);
    bench.enable();
    bench.pass(ms(4000));
    assert_eq!(bench.admin(sqe(admin::KEEP_ALIVE, 0, [0; 6]), 0).value(), 0);
    assert_eq!(bench.controller.keep_alive_deadline(), Some(bench.now + ms(5000)));
}

#[test]
fn traffic_of_any_queue_keeps_the_association() {
    let mut bench = Bench::disabled(subsystem(), 1000);
    bench.enable();
    for _ in 0..3 {
        // An I/O queue's, on another reactor.
        bench.controller.shared().traffic.store(true, Ordering::Relaxed);
        bench.pass(ms(1000));
        assert!(bench.controller.check_keep_alive(bench.now));
        assert_eq!(bench.controller.keep_alive_deadline(), Some(bench.now + ms(1000)));
        bench.identify(1, 0).ok();
        bench.pass(ms(1000));
        assert!(bench.controller.check_keep_alive(bench.now));
    }
    bench.pass(ms(1000));
    assert!(!bench.controller.check_keep_alive(bench.now), "each counts once");
}

#[test]
fn timeouts_are_rounded_up_and_can_be_changed() {
    let mut bench = Bench::disabled(subsystem(), 1);
    bench.enable();
    assert_eq!(bench.get_feature(0x0f, 0).value(), 1000);
    for (wanted, granted) in [(1001, 2000), (30_000, 30_000), (u32::MAX, u32::MAX), (0, 0)] {
        bench.set_feature(0x0f, wanted).ok();
        assert_eq!(bench.get_feature(0x0f, 0).value(), granted);
    }
    assert_eq!(bench.get_feature(0x0f, 1).value(), 1000, "the default is Connect's");
    assert_eq!(bench.controller.keep_alive_deadline(), None);
    bench.pass(Duration::from_secs(1_000_000));
    assert!(bench.controller.check_keep_alive(bench.now));
    bench.set_feature(0x0f, 7000).ok();
    assert_eq!(bench.controller.keep_alive_deadline(), Some(bench.now + ms(7000)));
}

#[test]
fn who_never_enables_the_controller_does_not_keep_it() {
    let mut bench = Bench::disabled(subsystem(), 0);
    let deadline = bench.now + ASSOCIATION_TIMEOUT;
    assert_eq!(bench.controller.keep_alive_deadline(), Some(deadline));
    bench.pass(ASSOCIATION_TIMEOUT);
    bench.csts();
    assert!(!bench.controller.check_keep_alive(bench.now));
    let mut bench = Bench::io(subsystem());
    assert_eq!(bench.controller.keep_alive_deadline(), None);
    bench.set_cc(0).unwrap();
    assert_eq!(bench.controller.keep_alive_deadline(), Some(bench.now + ASSOCIATION_TIMEOUT));
    bench.enable();
    assert_eq!(bench.controller.keep_alive_deadline(), None);
}

#[test]
fn nothing_prolongs_an_association_after_a_shutdown() {
    let mut bench = Bench::disabled(subsystem(), 5000);
    bench.enable();
    assert_eq!(bench.set_cc(CC_ENABLED | 1 << 14), Ok(Effect::ShutDown));
    let deadline = Some(bench.now + ASSOCIATION_TIMEOUT);
    bench.pass(ms(1000));
    assert_eq!(bench.admin(sqe(admin::KEEP_ALIVE, 0, [0; 6]), 0).value(), 0);
    bench.set_feature(0x0f, 60_000).ok();
    assert_eq!(bench.controller.keep_alive_deadline(), deadline);
    bench.pass(ASSOCIATION_TIMEOUT);
    assert!(!bench.controller.check_keep_alive(bench.now));
}

#[test]
fn a_discovery_controller_without_timeout_waits_two_minutes() {
    let mut bench = Bench::discovery(target(vec![subsystem()]), 0);
    bench.pass(DISCOVERY_ACTIVITY_TIMEOUT - ms(1));
    bench.log(0x70, 1024);
    bench.pass(ms(1));
    assert!(bench.controller.check_keep_alive(bench.now));
    bench.pass(DISCOVERY_ACTIVITY_TIMEOUT);
    assert!(!bench.controller.check_keep_alive(bench.now));
}

// ---- whatever a host sends ----------------------------------------------------------------------------------------

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_command_with_any_data_gets_an_answer(
        bytes in prop::array::uniform32(any::<u8>()),
        opcode in prop_oneof![
            Just(2u8), Just(6u8), Just(8u8), Just(9u8), Just(10u8), Just(12u8), Just(24u8), any::<u8>()
        ],
        id in any::<u8>(),
        plain in any::<bool>(),
        len in prop_oneof![Just(0usize), Just(512), Just(4096), 0usize..9000],
        discovery in any::<bool>(),
    ) {
        prop_assume!(opcode != FABRICS);
        let mut raw = [0; 64];
        raw[..32].copy_from_slice(&bytes);
        raw[32..].copy_from_slice(&bytes);
        let mut command = Sqe::read_from_bytes(&raw).unwrap();
        command.opcode = opcode;
        if plain {
            // Near enough to a right command to get past the first checks.
            command.flags = 0x40;
            command.nsid.set(command.nsid.get() & 1);
            command.cdw10.set(u32::from(id) & 0x9f | 0x00ff_0000);
            command.cdw11.set(command.cdw11.get() & 0x0001_0000);
            command.cdw12.set(command.cdw12.get() & 0x1ffc);
            command.cdw13.set(0);
            command.cdw14.set(0);
        }
        let mut bench = if discovery {
            Bench::discovery(target(vec![subsystem()]), 0)
        } else {
            let mut subsystem = subsystem();
            subsystem.ana_reporting = true;
            Bench::io(subsystem)
        };
        let mut data = Buffers::heap(len);
        let admin = bench.submit(3, command, &mut data);
        prop_assert!(data.len() <= len);
        if let Admin::Complete { cqe, send } = admin {
            prop_assert!(cqe.status().is_success() || !send);
        }
    }
}

mod connect {
    //! Connect checks.

    use zerocopy::FromZeros;

    use super::*;
    use crate::spec::command::Connect;
    use crate::spec::fabrics::{ConnectData, InvalidParameter};
    use crate::target::connect::{ConnectError, Target, check_admin, check_io, join};
    use crate::target::shared::ControllerTable;
    use crate::target::view::DISCOVERY_NQN;

    fn command(qid: u16, queue_entries: u32) -> Connect {
        Connect {
            qid,
            queue_entries,
            priority: 0,
            disable_sq_flow_control: false,
            individual_queue_deletion: false,
            kato_ms: 0,
        }
    }

    fn data(subnqn: &str, hostnqn: &str, cntlid: u16) -> ConnectData {
        let mut data = ConnectData::new_zeroed();
        data.hostid = HOSTID;
        data.cntlid.set(cntlid);
        data.subnqn[..subnqn.len()].copy_from_slice(subnqn.as_bytes());
        data.hostnqn[..hostnqn.len()].copy_from_slice(hostnqn.as_bytes());
        data
    }

    fn here() -> ListenAddress {
        tcp([127, 0, 0, 1], 4420)
    }

    fn invalid(error: ConnectError) -> InvalidParameter {
        assert_eq!(error.status, Status::CONNECT_INVALID_PARAMETERS.dnr());
        let parameter = error.parameter.unwrap();
        assert_eq!(error.cqe(5).dw0.get(), parameter.dw0());
        parameter
    }

    #[test]
    fn admin_queues() {
        let view = target(vec![subsystem()]);
        let ok = check_admin(&view, &command(0, 32), &data(NQN, HOST, 0xffff), &here()).unwrap();
        assert!(matches!(ok, Target::Subsystem(subsystem) if subsystem.nqn == NQN));
        let ok = check_admin(&view, &command(0, 128), &data(DISCOVERY_NQN, HOST, 0xffff), &here()).unwrap();
        assert!(matches!(ok, Target::Discovery));
        let refused =
            |command: Connect, data: ConnectData| invalid(check_admin(&view, &command, &data, &here()).unwrap_err());
        assert_eq!(refused(command(0, 32), data("nqn.none", HOST, 0xffff)), InvalidParameter::SUBNQN);
        assert_eq!(refused(command(0, 32), data("", HOST, 0xffff)), InvalidParameter::SUBNQN);
        assert_eq!(refused(command(0, 32), data(NQN, "", 0xffff)), InvalidParameter::HOSTNQN);
        assert_eq!(refused(command(0, 32), data(NQN, HOST, 0xfffe)), InvalidParameter::CNTLID);
        assert_eq!(refused(command(0, 32), data(NQN, HOST, 1)), InvalidParameter::CNTLID);
        assert_eq!(refused(command(0, 1), data(NQN, HOST, 0xffff)), InvalidParameter::SQSIZE);
        assert_eq!(refused(command(0, 129), data(NQN, HOST, 0xffff)), InvalidParameter::SQSIZE);
        let elsewhere = tcp([127, 0, 0, 1], 4421);
        let error = check_admin(&view, &command(0, 32), &data(NQN, HOST, 0xffff), &elsewhere).unwrap_err();
        assert_eq!(invalid(error), InvalidParameter::SUBNQN);
    }

    #[test]
    fn hosts_must_be_allowed() {
        let mut subsystem = subsystem();
        subsystem.allow_any_host = false;
        let refused = |subsystem: &SubsystemView| {
            check_admin(&target(vec![subsystem.clone()]), &command(0, 32), &data(NQN, HOST, 0xffff), &here())
        };
        let error = refused(&subsystem).unwrap_err();
        assert_eq!((error.status, error.cqe(1).dw0.get()), (Status::CONNECT_INVALID_HOST.dnr(), 0));
        subsystem.hosts.push(HOST.into());
        assert!(refused(&subsystem).is_ok());
    }

    fn table(view: &TargetView) -> (ControllerTable, Arc<ControllerShared>) {
        let table = ControllerTable::default();
        let incarnation = view.subsystems[NQN].incarnation;
        let build = |cntlid| ControllerShared { cntlid, ..shared(NQN, incarnation) };
        let shared = table.add(NQN, 1, 10, build).unwrap();
        shared.ready.store(true, Ordering::Relaxed);
        (table, shared)
    }

    #[test]
    fn io_queues() {
        let view = target(vec![subsystem()]);
        let (table, shared) = table(&view);
        shared.max_io_queues.store(4, Ordering::Relaxed);
        let check = |command: Connect, data: ConnectData| check_io(&view, &table, &command, &data, &here());
        let refused = |command, data| invalid(check(command, data).unwrap_err());
        assert!(Arc::ptr_eq(&check(command(4, 128), data(NQN, HOST, 1)).unwrap(), &shared));
        assert_eq!(refused(command(5, 128), data(NQN, HOST, 1)), InvalidParameter::QID);
        assert_eq!(refused(command(1, 129), data(NQN, HOST, 1)), InvalidParameter::SQSIZE);
        assert_eq!(refused(command(1, 128), data(NQN, HOST, 2)), InvalidParameter::CNTLID);
        assert_eq!(refused(command(1, 128), data(NQN, HOST, 0xffff)), InvalidParameter::CNTLID);
        assert_eq!(refused(command(1, 128), data(NQN, "nqn.other", 1)), InvalidParameter::HOSTNQN);
        assert_eq!(refused(command(1, 128), data(DISCOVERY_NQN, HOST, 1)), InvalidParameter::QID);
        let mut other_host = data(NQN, HOST, 1);
        other_host.hostid = [8; 16];
        assert_eq!(refused(command(1, 128), other_host), InvalidParameter::HOSTID);
        shared.ready.store(false, Ordering::Relaxed);
        assert_eq!(refused(command(1, 128), data(NQN, HOST, 1)), InvalidParameter::QID);
        shared.ready.store(true, Ordering::Relaxed);
        shared.kill(Instant(0));
        assert_eq!(refused(command(1, 128), data(NQN, HOST, 1)), InvalidParameter::CNTLID);
    }

    #[test]
    fn a_controller_of_a_deleted_subsystem_is_not_joined() {
        let mut view = target(vec![subsystem()]);
        let (table, _shared) = table(&view);
        Arc::make_mut(view.subsystems.get_mut(NQN).unwrap()).incarnation += 1;
        let error = check_io(&view, &table, &command(1, 128), &data(NQN, HOST, 1), &here()).unwrap_err();
        assert_eq!(invalid(error), InvalidParameter::CNTLID);
    }

    #[test]
    fn a_queue_joins_once() {
        let view = target(vec![subsystem()]);
        let (_, shared) = table(&view);
        join(&shared, 1, ReactorId(1)).unwrap();
        assert_eq!(shared.io_queues().get(&1), Some(&ReactorId(1)));
        let error = join(&shared, 1, ReactorId(0)).unwrap_err();
        assert_eq!((error.status, error.parameter), (Status::COMMAND_SEQUENCE_ERROR.dnr(), None));
        shared.ready.store(false, Ordering::Relaxed);
        assert_eq!(invalid(join(&shared, 2, ReactorId(0)).unwrap_err()), InvalidParameter::QID);
        assert_eq!(shared.io_queues().len(), 1);
    }
}
