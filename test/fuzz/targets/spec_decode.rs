//! Every decoder of the wire vocabulary on any bytes: none panics, and what can be encoded again is the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nvmf::spec::command::{CopyRange, DsmRange, IoCommand, LogOffset};
use nvmf::spec::fabrics::{Cap, Cc, ConnectData, ConnectResult, Csts, InvalidParameter, NQN_MAX_BYTES, Property, Vs};
use nvmf::spec::feature::{AsyncEvent, NumberOfQueues};
use nvmf::spec::log::{DiscoveryEntry, ErrorEntry, SmartLog};
use nvmf::spec::opcode::{Direction, FABRICS};
use nvmf::spec::pdu::{CommonHeader, Fes, PduType};
use nvmf::spec::sqe::{Sgl, SglDescriptor};
use nvmf::spec::{AdminCommand, Cqe, FabricsCommand, Sqe, Status, nul_text};
use nvmf::tcp::Framing;
use nvmf::tcp::wire_client::WireClient;
use zerocopy::FromBytes;

fn sqe(bytes: &[u8]) {
    let Ok((sqe, _)) = Sqe::ref_from_prefix(bytes) else { return };
    let _ = (sqe.fuse(), sqe.psdt(), Direction::of_command(sqe), format!("{sqe:?}"));
    if let Ok(AdminCommand::GetLogPage(log)) = AdminCommand::parse(sqe) {
        assert!(log.len_bytes >= 4 && log.len_bytes <= 1 << 34 && log.len_bytes % 4 == 0);
        assert!(matches!(log.offset, LogOffset::Index(_)) || matches!(log.offset, LogOffset::Bytes(n) if n % 4 == 0));
    }
    let mut fabrics = *sqe;
    fabrics.opcode = FABRICS;
    if let Ok(FabricsCommand::Connect(connect)) = FabricsCommand::parse(&fabrics) {
        assert!((1..=65536).contains(&connect.queue_entries));
    }
    match IoCommand::parse(sqe) {
        Ok(IoCommand::Read(range) | IoCommand::Verify(range) | IoCommand::WriteUncorrectable(range)) => {
            assert!((1..=65536).contains(&range.blocks));
            assert_eq!(range.is_within(u64::MAX), range.end().is_some());
            assert!(!range.is_within(0));
            assert!(range.len_bytes(4096) <= 65536 * 4096);
        }
        Ok(IoCommand::DatasetManagement(dsm)) => assert!((16..=4096).contains(&dsm.len_bytes())),
        _ => {}
    }
    sgl(&sqe.dptr);
}

fn sgl(descriptor: &SglDescriptor) {
    if let Ok(sgl) = descriptor.parse() {
        let again = SglDescriptor::from(sgl);
        assert_eq!(again.parse(), Ok(sgl));
        assert!(matches!(sgl, Sgl::Keyed { .. }) || sgl.len() == descriptor.len());
    }
}

fn structures(bytes: &[u8]) {
    if let Ok(data) = ConnectData::parse(bytes) {
        for nqn in [data.subnqn(), data.hostnqn()].into_iter().flatten() {
            assert!(!nqn.is_empty() && nqn.len() <= NQN_MAX_BYTES && !nqn.contains('\0'));
        }
    }
    let _ = nul_text(bytes);
    let _ = DsmRange::ref_from_prefix(bytes).map(|(range, _)| range.slba.get());
    let _ = CopyRange::ref_from_prefix(bytes).map(|(range, _)| assert!((1..=65536).contains(&range.blocks())));
    let _ = ErrorEntry::ref_from_prefix(bytes).map(|(entry, _)| entry.error_count.get());
    let _ = SmartLog::ref_from_prefix(bytes).map(|(log, _)| log.host_reads.get());
    let _ = DiscoveryEntry::ref_from_prefix(bytes).map(|(entry, _)| nul_text(&entry.subnqn).map(str::len));
    let Ok((word, _)) = u64::read_from_prefix(bytes) else { return };
    assert_eq!(Cap(word).with_mqes(Cap(word).mqes()).with_css(Cap(word).css()), Cap(word));
    let dword = word as u32;
    assert_eq!(Cc(dword).with_shn(Cc(dword).shn()), Cc(dword));
    assert_eq!(Csts(dword).with_shst(Csts(dword).shst()), Csts(dword));
    let _ = (Vs(dword).mjr(), ConnectResult(dword).cntlid(), format!("{}", Status::from_field(dword as u16)));
    assert_eq!(Status::from_field(dword as u16).to_field(), dword as u16 & !1);
    assert_eq!(InvalidParameter::from_dw0(dword).dw0(), dword & 0x1_ffff);
    assert_eq!(AsyncEvent::from_dw0(dword).dw0(), dword & 0xff_ff07);
    if let Some(queues) = NumberOfQueues::from_cdw11(dword) {
        assert_eq!(queues.dw0(), dword);
    }
    if let Some(property) = Property::from_offset(dword) {
        assert_eq!(property.offset(), dword);
    }
    let _ = Cqe::ref_from_prefix(bytes).map(|(cqe, _)| (cqe.result(), cqe.status()));
}

fn pdus(choice: u8, bytes: &[u8]) {
    let framing = Framing { header_digest: choice & 1 != 0, data_digest: choice & 2 != 0, pda: choice >> 3 };
    let mut host = WireClient::new();
    (host.out, host.incoming) = (framing, framing);
    let _ = host.receive(bytes);
    let Ok((ch, _)) = CommonHeader::ref_from_prefix(bytes) else { return };
    let Some(pdu_type) = PduType::from_byte(ch.pdu_type) else { return };
    if framing.check_early(ch, pdu_type).is_err() {
        return;
    }
    match framing.check(ch, pdu_type) {
        Ok(layout) => {
            let digest = if layout.data_digest { 4 } else { 0 };
            let whole = layout.header_bytes as u64 + layout.pad_bytes as u64 + u64::from(layout.data_bytes) + digest;
            assert_eq!(whole, u64::from(ch.plen.get()));
            assert!(layout.data_bytes > 0 || (layout.pad_bytes == 0 && !layout.data_digest));
        }
        Err(fatal) => assert!(fatal.fes == Fes::InvalidHeaderField && fatal.fei < 8),
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((choice, bytes)) = bytes.split_first() else { return };
    sqe(bytes);
    structures(bytes);
    pdus(*choice, bytes);
});
