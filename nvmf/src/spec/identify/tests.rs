use super::*;
use std::mem::offset_of;
use zerocopy::{FromZeros, IntoBytes};

#[test]
fn controller_offsets() {
    type C = IdentifyController;
    for (field, offset) in [
        (offset_of!(C, cntlid), 78),
        (offset_of!(C, oaes), 92),
        (offset_of!(C, ctratt), 96),
        (offset_of!(C, cntrltype), 111),
        (offset_of!(C, crdt1), 128),
        (offset_of!(C, oacs), 256),
        (offset_of!(C, tnvmcap), 280),
        (offset_of!(C, kas), 320),
        (offset_of!(C, sanicap), 328),
        (offset_of!(C, anatt), 342),
        (offset_of!(C, megcap), 368),
        (offset_of!(C, cqt), 386),
        (offset_of!(C, sqes), 512),
        (offset_of!(C, maxcmd), 514),
        (offset_of!(C, nn), 516),
        (offset_of!(C, vwc), 525),
        (offset_of!(C, sgls), 536),
        (offset_of!(C, mnan), 540),
        (offset_of!(C, subnqn), 768),
        (offset_of!(C, ioccsz), 1792),
        (offset_of!(C, msdbd), 1803),
        (offset_of!(C, ofcs), 1804),
        (offset_of!(C, psd), 2048),
        (offset_of!(C, vendor), 3072),
    ] {
        assert_eq!(field, offset);
    }
}

#[test]
fn namespace_offsets() {
    type N = IdentifyNamespace;
    for (field, offset) in [
        (offset_of!(N, nsfeat), 24),
        (offset_of!(N, rescap), 31),
        (offset_of!(N, dlfeat), 33),
        (offset_of!(N, noiob), 46),
        (offset_of!(N, nvmcap), 48),
        (offset_of!(N, npwg), 64),
        (offset_of!(N, mssrl), 74),
        (offset_of!(N, msrc), 80),
        (offset_of!(N, anagrpid), 92),
        (offset_of!(N, nsattr), 99),
        (offset_of!(N, endgid), 102),
        (offset_of!(N, nguid), 104),
        (offset_of!(N, eui64), 120),
        (offset_of!(N, lbaf), 128),
        (offset_of!(IdentifyNamespaceNvm, elbaf), 12),
        (offset_of!(IdentifyNamespaceNvm, npdgl), 268),
        (offset_of!(IdentifyControllerNvm, dmsl), 8),
        (offset_of!(IdentifyNamespaceIndependent, nstat), 14),
    ] {
        assert_eq!(field, offset);
    }
}

#[test]
fn names_are_padded() {
    let mut ctrl = IdentifyController::new_zeroed();
    ctrl.set_names("S1", "a model name that is longer than its forty bytes", "1");
    ctrl.set_subnqn("nqn.x");
    let bytes = ctrl.as_bytes();
    assert_eq!(&bytes[4..24], b"S1                  ");
    assert_eq!(&bytes[24..64], b"a model name that is longer than its for");
    assert_eq!(&bytes[64..72], b"1       ");
    assert_eq!(&bytes[768..774], b"nqn.x\0");
}

#[test]
fn identification_descriptors() {
    let mut page = [0xff; IDENTIFY_BYTES];
    let mut list = NamespaceDescriptors::new(&mut page);
    list.eui64([1; 8]);
    list.uuid([3; 16]);
    list.csi(csi::NVM);
    assert_eq!(&page[..12], [1, 8, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]);
    assert_eq!(&page[12..16], [3, 16, 0, 0]);
    assert_eq!(&page[32..37], [4, 1, 0, 0, 0]);
    assert!(page[37..].iter().all(|b| *b == 0));
    let parsed: Vec<_> = NamespaceDescriptors::parse(&page).map(|(nidt, nid)| (nidt, nid.len())).collect();
    assert_eq!(parsed, [(1, 8), (3, 16), (4, 1)]);
    assert_eq!(NamespaceDescriptors::parse(&[3, 200, 0, 0, 1]).count(), 0);
    assert_eq!(NamespaceDescriptors::parse(&[3, 1]).count(), 0);
}
