//! Identify, Get Log Page, Get and Set Features. Fields are looked at where the specification has them in the bytes, not
//! through the structures that put them there.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bdev::core::Geometry;
use reactor::ReactorId;

use crate::spec::Status;
use crate::spec::opcode::admin;
use crate::target::controller::fixture::*;
use crate::target::view::{AnaState, SubsystemView};

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn u128_at(bytes: &[u8], at: usize) -> u128 {
    u128::from_le_bytes(bytes[at..at + 16].try_into().unwrap())
}

fn with_ana() -> SubsystemView {
    SubsystemView { ana_reporting: true, ..subsystem() }
}

fn with_geometry(geometry: Geometry) -> Bench {
    let mut subsystem = subsystem();
    subsystem.namespaces.insert(1, Arc::new(namespace(1, geometry)));
    Bench::io(subsystem)
}

// ---- Identify -----------------------------------------------------------------------------------------------------

#[test]
fn controller() {
    let mut bench = Bench::io(subsystem());
    let id = bench.identify(1, 0).ok();
    assert_eq!(id.len(), 4096);
    assert_eq!(&id[4..24], b"SN42                ");
    assert_eq!(&id[24..32], b"A model ");
    assert!(id[64..72].starts_with(env!("CARGO_PKG_VERSION").as_bytes()));
    assert_eq!(id[76], 0b11, "CMIC: several ports and controllers, no ANA");
    assert_eq!(id[77], 5, "MDTS: 128 KiB");
    assert_eq!(u16_at(&id, 78), 0x1234, "CNTLID");
    assert_eq!(u32_at(&id, 80), 0x0002_0100, "VER");
    assert_eq!(u32_at(&id, 92), 1 << 8, "OAES: namespace attributes");
    assert_eq!(u32_at(&id, 96), 1 << 0 | 1 << 6, "CTRATT: 128-bit host identifier, traffic based keep alive");
    assert_eq!(id[111], 1, "CNTRLTYPE: I/O");
    assert_eq!((u16_at(&id, 128), u16_at(&id, 130), u16_at(&id, 132)), (1, 2, 3), "CRDT");
    assert_eq!(u16_at(&id, 256), 0, "OACS");
    assert_eq!((id[258], id[259]), (3, 3), "ACL, AERL");
    assert_eq!(id[260], 0b11, "FRMW: slot 1, read only");
    assert_eq!(id[261], 1 << 1 | 1 << 2 | 1 << 5, "LPA");
    assert_eq!(id[262], 127, "ELPE");
    assert_eq!(u16_at(&id, 320), 10, "KAS");
    assert!(id[342..352].iter().all(|byte| *byte == 0), "no ANA");
    assert_eq!((id[512], id[513]), (0x66, 0x44), "SQES, CQES");
    assert_eq!(u16_at(&id, 514), 128, "MAXCMD");
    assert_eq!(u32_at(&id, 516), 32, "NN");
    assert_eq!(u16_at(&id, 520), 1 << 0 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 8, "ONCS");
    assert_eq!(u16_at(&id, 522), 1, "FUSES");
    assert_eq!(id[525], 0b101, "VWC: present, no broadcast flush");
    assert_eq!((u16_at(&id, 526), u16_at(&id, 528), u16_at(&id, 532)), (0, 0, 0), "AWUN, AWUPF, ACWU: a block");
    assert_eq!(u16_at(&id, 534), 1, "CDFS");
    assert_eq!(u32_at(&id, 536), 1 | 1 << 18 | 1 << 20 | 1 << 21, "SGLS");
    assert_eq!(u32_at(&id, 540), 32, "MNAN");
    assert_eq!(&id[768..768 + NQN.len()], NQN.as_bytes());
    assert!(id[768 + NQN.len()..1024].iter().all(|byte| *byte == 0));
    assert_eq!(u32_at(&id, 1792), (64 + 8192) / 16, "IOCCSZ");
    assert_eq!(u32_at(&id, 1796), 1, "IORCSZ");
    assert_eq!((u16_at(&id, 1800), id[1802], id[1803], u16_at(&id, 1804)), (0, 0, 1, 0), "ICDOFF, FCATT, MSDBD, OFCS");
}

#[test]
fn controller_with_ana() {
    let id = Bench::io(with_ana()).identify(1, 0).ok();
    assert_eq!(id[76], 0b1011, "CMIC");
    assert_eq!(u32_at(&id, 92), 1 << 8 | 1 << 11, "OAES");
    assert_eq!((id[342], id[343]), (10, 0b111), "ANATT, ANACAP");
    assert_eq!((u32_at(&id, 344), u32_at(&id, 348)), (32, 32), "ANAGRPMAX, NANAGRPID");
}

#[test]
fn discovery_controller() {
    let mut bench = Bench::discovery(target(vec![subsystem()]), 0);
    let id = bench.identify(1, 0).ok();
    assert_eq!(u16_at(&id, 78), 0x1234);
    assert_eq!(u32_at(&id, 92), 1 << 31, "OAES: discovery log changes");
    assert_eq!((id[111], id[1806]), (2, 1), "CNTRLTYPE, DCTYPE");
    assert_eq!((u32_at(&id, 516), id[525], u16_at(&id, 520)), (0, 0, 0), "no namespaces");
    assert_eq!(u16_at(&id, 514), 32, "MAXCMD");
    assert!(id[768..].starts_with(b"nqn.2014-08.org.nvmexpress.discovery\0"));
    for cns in [0, 2, 3, 5, 6, 8, 0x1c] {
        assert_eq!(bench.identify(cns, 1).failure(), Status::INVALID_FIELD.dnr());
    }
}

#[test]
fn namespaces() {
    let mut geometry = Geometry::new(512, 0x12_3456);
    geometry.physical_block_size = 4096;
    geometry.optimal_io_boundary = 256;
    geometry.unmap_granularity = 64;
    geometry.unmap_zeroes = true;
    geometry.volatile_cache = true;
    let mut bench = with_geometry(geometry);
    bench.change_namespace(1, |ns| {
        ns.anagrpid = 7;
        ns.nguid = Some([0xa1; 16]);
        ns.eui64 = Some([0xe0; 8]);
    });
    let id = bench.identify(0, 1).ok();
    for at in [0, 8, 16] {
        assert_eq!(u64_at(&id, at), 0x12_3456, "NSZE, NCAP, NUSE");
    }
    assert_eq!(id[24], 1 << 4, "NSFEAT: OPTPERF");
    assert_eq!((id[25], id[26], id[27], id[28], id[29]), (0, 0, 0, 0, 0), "one format without metadata");
    assert_eq!(id[30], 1, "NMIC: shared");
    assert_eq!(id[33], 0b1001, "DLFEAT: zeroes, and by Write Zeroes");
    assert_eq!(u16_at(&id, 46), 256, "NOIOB");
    assert_eq!(u128_at(&id, 48), 0x12_3456 * 512, "NVMCAP");
    assert_eq!((u16_at(&id, 64), u16_at(&id, 66)), (7, 7), "NPWG, NPWA");
    assert_eq!((u16_at(&id, 68), u16_at(&id, 70)), (63, 63), "NPDG, NPDA");
    assert_eq!(u16_at(&id, 72), 255, "NOWS");
    assert_eq!((u16_at(&id, 74), u32_at(&id, 76), id[80]), (32768, 131_072, 15), "MSSRL, MCL, MSRC");
    assert_eq!(u32_at(&id, 92), 7, "ANAGRPID");
    assert_eq!(id[99], 0, "NSATTR");
    assert_eq!((&id[104..120], &id[120..128]), (&[0xa1; 16][..], &[0xe0; 8][..]), "NGUID, EUI64");
    assert_eq!(id[128..132], [0, 0, 9, 0], "LBAF0");
    assert!(id[132..].iter().all(|byte| *byte == 0));
    let id = bench.identify(0, 3).ok();
    assert_eq!((u64_at(&id, 0), id[130]), (1000, 12));
    assert_eq!((u16_at(&id, 64), u16_at(&id, 68), u16_at(&id, 72), u16_at(&id, 46)), (0, 0, 0, 0));
    assert_eq!(id[33], 0, "DLFEAT: not reported");
    assert_eq!(&id[104..120], bench.target.subsystems[NQN].namespaces[&3].uuid.as_bytes(), "the UUID as NGUID");
}

#[test]
fn inactive_namespaces_are_zero_and_others_invalid() {
    let mut bench = Bench::io(subsystem());
    for cns in [0, 5, 8] {
        assert!(bench.identify(cns, 2).ok().iter().all(|byte| *byte == 0), "{cns}");
        for nsid in [0, 33, 0xffff_fffe, 0xffff_ffff] {
            assert_eq!(bench.identify(cns, nsid).failure(), Status::INVALID_NAMESPACE_OR_FORMAT.dnr());
        }
    }
    assert_eq!(bench.identify(3, 2).failure(), Status::INVALID_NAMESPACE_OR_FORMAT.dnr());
}

#[test]
fn lists_of_namespaces() {
    let mut bench = Bench::io(subsystem());
    for cns in [2, 7] {
        assert_eq!(bench.identify(cns, 0).ok()[..12], [1, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bench.identify(cns, 1).ok()[..8], [3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bench.identify(cns, 3).ok()[..4], [0; 4]);
        assert_eq!(bench.identify(cns, 0xffff_fffd).ok()[..4], [0; 4]);
        for nsid in [0xffff_fffe, 0xffff_ffff] {
            assert_eq!(bench.identify(cns, nsid).failure(), Status::INVALID_NAMESPACE_OR_FORMAT.dnr());
        }
    }
}

#[test]
fn identification_descriptors() {
    let mut bench = Bench::io(subsystem());
    let uuid = *bench.target.subsystems[NQN].namespaces[&1].uuid.as_bytes();
    let page = bench.identify(3, 1).ok();
    assert_eq!(page[..4], [2, 16, 0, 0]);
    assert_eq!(page[4..20], uuid);
    assert_eq!(page[20..24], [3, 16, 0, 0]);
    assert_eq!(page[24..40], uuid);
    assert_eq!(page[40..46], [4, 1, 0, 0, 0, 0]);
    bench.change_namespace(1, |ns| ns.eui64 = Some([9; 8]));
    let page = bench.identify(3, 1).ok();
    assert_eq!(page[..12], [1, 8, 0, 0, 9, 9, 9, 9, 9, 9, 9, 9]);
    assert_eq!(page[12..16], [3, 16, 0, 0], "with an EUI-64 no NGUID is made up");
}

#[test]
fn command_set_structures() {
    let mut subsystem = subsystem();
    subsystem.wzsl = 9;
    subsystem.dmrsl = u64::MAX;
    let mut bench = Bench::io(subsystem);
    let id = bench.identify(6, 0).ok();
    assert_eq!((id[1], id[3], u32_at(&id, 4), u64_at(&id, 8)), (9, 0, u32::MAX, 0), "WZSL, DMRL, DMRSL, DMSL");
    assert_eq!(u32_at(&id, 20), 0x0001_0100, "VER");
    assert!(bench.identify(5, 1).ok().iter().all(|byte| *byte == 0));
    for cns in [5, 6, 7] {
        let zoned = sqe(admin::IDENTIFY, 1, [cns, 2 << 24, 0, 0, 0, 0]);
        assert_eq!(bench.admin(zoned, 4096).failure(), Status::INVALID_FIELD.dnr());
    }
    for (cntid, found) in [(0xffff, true), (0x1234, true), (0x1235, false)] {
        let answer = bench.admin(sqe(admin::IDENTIFY, 0, [0x1c | cntid << 16, 0, 0, 0, 0, 0]), 4096);
        match found {
            true => assert_eq!(answer.ok()[..9], [1, 0, 0, 0, 0, 0, 0, 0, 0]),
            false => assert_eq!(answer.failure(), Status::INVALID_FIELD.dnr()),
        }
    }
    for cns in [4, 0x10, 0x13, 0x17, 0xff] {
        assert_eq!(bench.identify(cns, 1).failure(), Status::INVALID_FIELD.dnr());
    }
}

#[test]
fn the_cache_is_told_of_each_namespace() {
    let mut geometry = Geometry::new(512, 8);
    geometry.volatile_cache = true;
    let mut bench = with_geometry(geometry);
    bench.change_namespace(3, |ns| {
        ns.anagrpid = 4;
        ns.geometry.read_only = true;
    });
    let cached = bench.identify(8, 1).ok();
    assert_eq!((cached[0], cached[1], u32_at(&cached, 4), cached[8], cached[14]), (0, 1, 1, 0, 1));
    let uncached = bench.identify(8, 3).ok();
    assert_eq!((uncached[0], u32_at(&uncached, 4), uncached[8], uncached[14]), (1 << 5, 4, 1, 1));
    assert_eq!(bench.identify(0, 3).ok()[99], 1, "NSATTR: write protected");
}

#[test]
fn memory_may_be_longer_but_not_shorter() {
    let mut bench = Bench::io(subsystem());
    let identify = sqe(admin::IDENTIFY, 0, [1, 0, 0, 0, 0, 0]);
    assert_eq!(bench.admin(identify, 4095).failure(), Status::DATA_SGL_LENGTH_INVALID.dnr());
    assert_eq!(bench.admin(identify, 8192).ok().len(), 4096);
    let log = sqe(admin::GET_LOG_PAGE, 0, [2 | 127 << 16, 0, 0, 0, 0, 0]);
    assert_eq!(bench.admin(log, 511).failure(), Status::DATA_SGL_LENGTH_INVALID.dnr());
    assert_eq!(bench.admin(log, 600).ok().len(), 512);
    let huge = sqe(admin::GET_LOG_PAGE, 0, [2 | 0xffff << 16, 0xffff, 0, 0, 0, 0]);
    assert_eq!(bench.admin(huge, 4096).failure(), Status::DATA_SGL_LENGTH_INVALID.dnr());
}

// ---- Get Log Page -------------------------------------------------------------------------------------------------

fn supported(page: &[u8]) -> Vec<usize> {
    page.chunks(4).enumerate().filter(|(_, entry)| entry[0] & 1 == 1).map(|(id, _)| id).collect()
}

#[test]
fn supported_pages_are_those_that_can_be_read() {
    let mut bench = Bench::io(with_ana());
    let listed = supported(&bench.log(0, 1024));
    assert_eq!(listed, [0, 1, 2, 3, 4, 5, 0x0c, 0x12, 0x13]);
    for lid in 0..=255u8 {
        let answer = bench.log_at(lid, false, 0, 4);
        match listed.contains(&lid.into()) {
            true => assert_eq!(answer.ok().len(), 4),
            false => assert_eq!(answer.failure(), Status::INVALID_LOG_PAGE.dnr()),
        }
    }
    assert!(!supported(&Bench::io(subsystem()).log(0, 1024)).contains(&0x0c), "no ANA, no ANA log");
    let mut bench = Bench::discovery(target(vec![subsystem()]), 0);
    assert_eq!(supported(&bench.log(0, 1024)), [0, 1, 0x70]);
    assert_eq!(bench.log_at(2, false, 0, 512).failure(), Status::INVALID_LOG_PAGE.dnr());
}

#[test]
fn any_part_of_a_page_can_be_read() {
    let mut bench = Bench::io(subsystem());
    let whole = bench.log(5, 4096);
    assert_eq!(bench.log_at(5, false, 1024, 64).ok(), whole[1024..1088]);
    let mut end = whole[4092..].to_vec();
    end.resize(64, 0);
    assert_eq!(bench.log_at(5, false, 4092, 64).ok(), end, "zeroes behind the end");
    assert_eq!(bench.log_at(5, false, 4096, 8).ok(), [0; 8]);
    assert_eq!(bench.log_at(5, false, 4100, 8).failure(), Status::INVALID_FIELD.dnr());
    let past = sqe(admin::GET_LOG_PAGE, 0, [5, 0, 0, 1, 0, 0]);
    assert_eq!(bench.admin(past, 4).failure(), Status::INVALID_FIELD.dnr());
    let by_index = sqe(admin::GET_LOG_PAGE, 0, [5, 0, 0, 0, 1 << 23, 0]);
    assert_eq!(bench.admin(by_index, 4).failure(), Status::INVALID_FIELD.dnr());
    let odd = sqe(admin::GET_LOG_PAGE, 0, [5, 0, 2, 0, 0, 0]);
    assert_eq!(bench.admin(odd, 4).failure(), Status::INVALID_FIELD.dnr());
}

#[test]
fn pages_are_not_of_a_namespace() {
    let mut bench = Bench::io(subsystem());
    for (nsid, ok) in [(0, true), (0xffff_ffff, true), (1, false), (40, false)] {
        let answer = bench.admin(sqe(admin::GET_LOG_PAGE, nsid, [2 | 127 << 16, 0, 0, 0, 0, 0]), 512);
        match ok {
            true => assert_eq!(answer.ok().len(), 512),
            false => assert_eq!(answer.failure(), Status::INVALID_FIELD.dnr()),
        }
    }
}

#[test]
fn smart() {
    let mut bench = Bench::io(subsystem());
    let log = bench.log(2, 512);
    assert_eq!((log[0], u16_at(&log, 1), log[3], log[4], log[5]), (0, 0, 100, 0, 0));
    assert!(log[6..].iter().all(|byte| *byte == 0));
    let counters = &bench.controller.shared().counters;
    counters.bytes_read.store(512_001, Ordering::Relaxed);
    counters.bytes_written.store(1_024_000, Ordering::Relaxed);
    counters.read_commands.store(77, Ordering::Relaxed);
    counters.write_commands.store(78, Ordering::Relaxed);
    counters.media_errors.store(3, Ordering::Relaxed);
    bench.identify(0xff, 0).failure();
    bench.pass(Duration::from_secs(3 * 3600));
    let log = bench.log(2, 512);
    assert_eq!(log[0], 1 << 2, "reliability degraded");
    assert_eq!((u128_at(&log, 32), u128_at(&log, 48)), (2, 2), "data units are rounded up");
    assert_eq!((u128_at(&log, 64), u128_at(&log, 80)), (77, 78));
    assert_eq!(u128_at(&log, 128), 3, "power on hours");
    assert_eq!((u128_at(&log, 160), u128_at(&log, 176)), (3, 1), "media errors, error log entries");
}

#[test]
fn firmware_slots() {
    let mut bench = Bench::io(subsystem());
    let log = bench.log(3, 512);
    assert_eq!(log[0], 1);
    assert_eq!(log[8..16], bench.identify(1, 0).ok()[64..72]);
    assert!(log[16..].iter().all(|byte| *byte == 0));
}

#[test]
fn effects_name_what_is_executed() {
    let mut bench = Bench::io(subsystem());
    let log = bench.log(5, 4096);
    let listed = |part: &[u8]| supported(part);
    assert_eq!(listed(&log[..1024]), [0x02, 0x06, 0x08, 0x09, 0x0a, 0x0c, 0x18, 0x7f]);
    assert_eq!(listed(&log[1024..2048]), [0x00, 0x01, 0x02, 0x05, 0x08, 0x09, 0x19]);
    assert_eq!(u32_at(&log, 1024 + 4), 1 << 20 | 0b11, "Write changes blocks of a namespace");
    assert_eq!(u32_at(&log, 1024 + 8), 1 << 20 | 0b01, "Read does not");
    assert_eq!(u32_at(&log, 6 * 4), 2 << 20 | 1, "Identify is the controller's");
    let zoned = sqe(admin::GET_LOG_PAGE, 0, [5, 0, 0, 0, 2 << 24, 0]);
    assert_eq!(bench.admin(zoned, 4).failure(), Status::INVALID_FIELD.dnr());
    assert!(bench.log(0x13, 4096).iter().all(|byte| *byte == 0));
    // Exactly the admin commands listed are not refused as unknown.
    for opcode in (0..=255u8).filter(|opcode| *opcode != 0x7f && *opcode != admin::ASYNC_EVENT_REQUEST) {
        let answer = bench.admin(sqe(opcode, 0, [0; 6]), 4096);
        let known = !answer.cqe.status().same_code(Status::INVALID_OPCODE);
        assert_eq!(known, listed(&log[..1024]).contains(&opcode.into()), "{opcode:#x}");
    }
}

#[test]
fn ana() {
    let mut subsystem = with_ana();
    for (nsid, group) in [(4, 2), (5, 1)] {
        let mut ns = namespace(nsid, Geometry::new(512, 8));
        ns.anagrpid = group;
        subsystem.namespaces.insert(nsid, Arc::new(ns));
    }
    Arc::make_mut(&mut subsystem.listeners[0]).ana_states.insert(2, AnaState::Inaccessible);
    let mut bench = Bench::io(subsystem);
    let log = bench.log(0x0c, 128);
    assert_eq!((u64_at(&log, 0), u16_at(&log, 8)), (1, 2), "CHGCNT, groups");
    assert_eq!((u32_at(&log, 16), u32_at(&log, 20), u64_at(&log, 24), log[32]), (1, 3, 1, 1));
    assert_eq!((u32_at(&log, 48), u32_at(&log, 52), u32_at(&log, 56)), (1, 3, 5));
    assert_eq!((u32_at(&log, 60), u32_at(&log, 64), log[76], u32_at(&log, 92)), (2, 1, 3, 4));
    assert!(log[96..].iter().all(|byte| *byte == 0));
    let groups_only = sqe(admin::GET_LOG_PAGE, 0, [0x0c | 1 << 8 | 19 << 16, 0, 0, 0, 0, 0]);
    let log = bench.admin(groups_only, 80).ok();
    assert_eq!((u16_at(&log, 8), u32_at(&log, 16), u32_at(&log, 20)), (2, 1, 0));
    assert_eq!((u32_at(&log, 48), u32_at(&log, 52), log[64]), (2, 0, 3));
    bench.change_subsystem(|subsystem| subsystem.listeners.clear());
    assert_eq!(bench.log(0x0c, 128)[32], 3, "no way in: inaccessible");
}

// ---- features -----------------------------------------------------------------------------------------------------

#[test]
fn features_have_values_defaults_and_capabilities() {
    let mut bench = Bench::io(subsystem());
    let listed = supported(&bench.log(0x12, 1024));
    assert_eq!(listed, [1, 2, 4, 5, 6, 7, 8, 9, 0x0a, 0x0b, 0x0f, 0x16, 0x81]);
    for fid in 0..=255u8 {
        let answer = bench.get_feature(fid, 3);
        if !listed.contains(&fid.into()) {
            assert_eq!(answer.failure(), Status::INVALID_FIELD.dnr());
            assert_eq!(bench.set_feature(fid, 0).failure(), Status::INVALID_FIELD.dnr());
            continue;
        }
        let changeable = ![6, 8, 9, 0x81].contains(&fid);
        assert_eq!(answer.value(), u32::from(changeable) << 2, "{fid:#x}");
    }
    for (fid, value, seen) in [
        (0x01, 0x0102_0305, 0x0102_0305),
        (0x02, 0x20, 0x20),
        (0x05, 0x1234, 0x1234),
        (0x0a, 1, 1),
        (0x0b, 0x0000_01ff, 0x0000_01ff),
        (0x0f, 30_000, 30_000),
    ] {
        let default = bench.get_feature(fid, 1).value();
        assert_ne!(default, seen);
        assert_eq!(bench.set_feature(fid, value).value(), 0);
        assert_eq!(bench.get_feature(fid, 0).value(), seen, "{fid:#x}");
        assert_eq!(bench.get_feature(fid, 1).value(), default);
        assert_eq!(bench.get_feature(fid, 2).value(), default, "nothing is saved");
    }
    assert_eq!(bench.get_feature(0x01, 4).failure(), Status::INVALID_FIELD.dnr());
}

#[test]
fn what_features_refuse() {
    let mut bench = Bench::io(subsystem());
    let invalid = Status::INVALID_FIELD.dnr();
    assert_eq!(bench.set_feature(0x02, 1).failure(), invalid, "there is one power state");
    assert_eq!(bench.set_feature(0x05, 1 << 16).failure(), invalid, "DULBE");
    assert_eq!(bench.set_feature(0x0b, 1 << 11).failure(), invalid, "ANA changes without ANA");
    assert_eq!(bench.set_feature(0x0b, 1 << 31).failure(), invalid, "discovery changes");
    for fid in [0x08, 0x09] {
        assert_eq!(bench.set_feature(fid, 0).failure(), Status::FEATURE_NOT_CHANGEABLE.dnr());
    }
    assert_eq!(bench.set_feature(0x81, 1).failure(), Status::COMMAND_SEQUENCE_ERROR.dnr());
    let save = sqe(admin::SET_FEATURES, 0, [0x8000_0001, 0, 0, 0, 0, 0]);
    assert_eq!(bench.admin(save, 0).failure(), Status::FEATURE_NOT_SAVEABLE.dnr());
    let of_namespace = |fid, nsid| sqe(admin::SET_FEATURES, nsid, [fid, 0, 0, 0, 0, 0]);
    assert_eq!(bench.admin(of_namespace(0x0b, 1), 0).failure(), Status::FEATURE_NOT_NS_SPECIFIC.dnr());
    assert_eq!(bench.admin(of_namespace(0x0b, 0xffff_ffff), 0).value(), 0);
    assert_eq!(bench.admin(of_namespace(0x05, 1), 0).value(), 0);
    assert_eq!(bench.admin(of_namespace(0x05, 2), 0).failure(), Status::INVALID_NAMESPACE_OR_FORMAT.dnr());
}

#[test]
fn the_write_cache_is_on() {
    let mut bench = Bench::io(subsystem());
    assert_eq!(bench.get_feature(0x06, 0).value(), 1);
    assert_eq!(bench.set_feature(0x06, 1).value(), 0);
    assert_eq!(bench.set_feature(0x06, 0).failure(), Status::FEATURE_NOT_CHANGEABLE.dnr());
}

#[test]
fn number_of_queues() {
    let mut bench = Bench::io(subsystem());
    assert_eq!(bench.get_feature(0x07, 0).value(), 126 << 16 | 126);
    assert_eq!(bench.set_feature(0x07, 3 << 16 | 3).value(), 3 << 16 | 3);
    assert_eq!(bench.controller.shared().max_io_queues.load(Ordering::Relaxed), 4);
    assert_eq!(bench.get_feature(0x07, 0).value(), 3 << 16 | 3);
    assert_eq!(bench.get_feature(0x07, 1).value(), 126 << 16 | 126);
    assert_eq!(bench.set_feature(0x07, 999 << 16 | 1).value(), 126 << 16 | 126, "no more than there can be");
    for bad in [0xffff, 0xffff_0000] {
        assert_eq!(bench.set_feature(0x07, bad).failure(), Status::INVALID_FIELD.dnr());
    }
    bench.controller.shared().io_queues().insert(1, ReactorId(0));
    assert_eq!(bench.set_feature(0x07, 0).failure(), Status::COMMAND_SEQUENCE_ERROR.dnr());
}

#[test]
fn temperatures() {
    let mut bench = Bench::io(subsystem());
    let get = |bench: &mut Bench, cdw11| bench.admin(sqe(admin::GET_FEATURES, 0, [4, cdw11, 0, 0, 0, 0]), 0);
    assert_eq!(get(&mut bench, 0).value(), 0xffff, "over");
    assert_eq!(get(&mut bench, 1 << 20).value(), 1 << 20, "under");
    bench.set_feature(0x04, 350).ok();
    bench.set_feature(0x04, 1 << 20 | 0xf << 16 | 250).ok();
    assert_eq!(get(&mut bench, 0).value(), 350);
    assert_eq!(get(&mut bench, 1 << 20).value(), 1 << 20 | 250);
    for no_sensor in [1 << 16, 2 << 20] {
        assert_eq!(get(&mut bench, no_sensor).failure(), Status::INVALID_FIELD.dnr());
        assert_eq!(bench.set_feature(0x04, no_sensor).failure(), Status::INVALID_FIELD.dnr());
    }
}

#[test]
fn interrupts_are_shown_as_not_there() {
    let mut bench = Bench::io(subsystem());
    assert_eq!(bench.get_feature(0x08, 0).value(), 0);
    assert_eq!(bench.admin(sqe(admin::GET_FEATURES, 0, [9, 5, 0, 0, 0, 0]), 0).value(), 1 << 16 | 5);
}

#[test]
fn host_behavior() {
    let mut bench = Bench::io(subsystem());
    assert!(!bench.controller.host_obeys_retry_delay());
    let set = sqe(admin::SET_FEATURES, 0, [0x16, 0, 0, 0, 0, 0]);
    let mut data = [0; 512];
    data[0] = 1;
    bench.admin_with(set, &data).ok();
    assert!(bench.controller.host_obeys_retry_delay());
    let get = sqe(admin::GET_FEATURES, 0, [0x16, 0, 0, 0, 0, 0]);
    assert_eq!(bench.admin(get, 512).ok(), data);
    let default = sqe(admin::GET_FEATURES, 0, [0x116, 0, 0, 0, 0, 0]);
    assert_eq!(bench.admin(default, 512).ok(), [0; 512]);
    assert_eq!(bench.admin(get, 511).failure(), Status::DATA_SGL_LENGTH_INVALID.dnr());
    assert_eq!(bench.admin_with(set, &data[..511]).failure(), Status::DATA_SGL_LENGTH_INVALID.dnr());
    for (at, value) in [(0, 2), (2, 1), (4, 4)] {
        let mut bad = [0; 512];
        bad[at] = value;
        assert_eq!(bench.admin_with(set, &bad).failure(), Status::INVALID_FIELD.dnr());
    }
    assert!(bench.controller.host_obeys_retry_delay(), "a refused value changes nothing");
}

#[test]
fn host_identifier() {
    let mut bench = Bench::io(subsystem());
    let get = |exhid| sqe(admin::GET_FEATURES, 0, [0x81, exhid, 0, 0, 0, 0]);
    assert_eq!(bench.admin(get(1), 16).ok(), HOSTID);
    assert_eq!(bench.admin(get(0), 8).failure(), Status::INVALID_FIELD.dnr(), "64 bits are not for fabrics");
}

#[test]
fn discovery_controllers_have_two_features() {
    let mut bench = Bench::discovery(target(vec![subsystem()]), 10_000);
    assert_eq!(bench.get_feature(0x0f, 0).value(), 10_000);
    assert_eq!(bench.set_feature(0x0b, 1 << 31).value(), 0);
    assert_eq!(bench.set_feature(0x0b, 1 << 8).failure(), Status::INVALID_FIELD.dnr());
    for fid in [1, 6, 7, 0x16, 0x81] {
        assert_eq!(bench.get_feature(fid, 0).failure(), Status::INVALID_FIELD.dnr());
    }
    assert_eq!(bench.admin(sqe(admin::ABORT, 0, [0; 6]), 0).failure(), Status::INVALID_OPCODE.dnr());
    assert_eq!(bench.admin(sqe(admin::KEEP_ALIVE, 0, [0; 6]), 0).value(), 0);
}
