use super::*;

fn sqe(opcode: u8, cdws: [u32; 6]) -> Sqe {
    let mut sqe = Sqe::new_zeroed();
    sqe.opcode = opcode;
    sqe.flags = 1 << 6;
    for (field, value) in
        [&mut sqe.cdw10, &mut sqe.cdw11, &mut sqe.cdw12, &mut sqe.cdw13, &mut sqe.cdw14, &mut sqe.cdw15]
            .into_iter()
            .zip(cdws)
    {
        field.set(value);
    }
    sqe
}

#[test]
fn read_and_write() {
    let mut cmd =
        sqe(io::WRITE, [0x5566_7788, 0x11, 0xffff | 1 << 30 | 5 << 20 | 0x9 << 26, 0x1234_0007, 0xaabb, 0x0002_0001]);
    let range = BlockRange {
        slba: 0x11_5566_7788,
        blocks: 65536,
        fua: true,
        limited_retry: false,
        prinfo: 9,
        dtype: 5,
        dspec: 0x1234,
        dsm: 7,
        reference_tag: 0xaabb,
        app_tag: 1,
        app_mask: 2,
    };
    assert_eq!(IoCommand::parse(&cmd), Ok(IoCommand::Write { range, fused: false }));
    assert_eq!(range.len_bytes(512), 65536 * 512);
    cmd.flags |= 2;
    assert_eq!(IoCommand::parse(&cmd), Ok(IoCommand::Write { range, fused: true }));
    cmd.opcode = io::READ;
    assert_eq!(IoCommand::parse(&cmd), Err(INVALID_FIELD));
    cmd.opcode = io::COMPARE;
    assert_eq!(IoCommand::parse(&cmd), Err(INVALID_FIELD));
    cmd.flags ^= 3;
    assert_eq!(IoCommand::parse(&cmd), Ok(IoCommand::Compare { range, fused: true }));
}

#[test]
fn ranges_do_not_overflow() {
    let IoCommand::Read(range) = IoCommand::parse(&sqe(io::READ, [u32::MAX, u32::MAX, 0, 0, 0, 0])).unwrap() else {
        panic!()
    };
    assert_eq!(range.end(), None);
    assert!(!range.is_within(u64::MAX));
    let range = BlockRange { slba: 8, ..range };
    assert!(range.is_within(9) && !range.is_within(8));
}

#[test]
fn counts_are_counts() {
    assert_eq!(
        IoCommand::parse(&sqe(io::DATASET_MANAGEMENT, [0xff, 4, 0, 0, 0, 0])),
        Ok(IoCommand::DatasetManagement(DatasetManagement {
            ranges: 256,
            integral_read: false,
            integral_write: false,
            deallocate: true,
        }))
    );
    let Ok(AdminCommand::GetLogPage(log)) =
        AdminCommand::parse(&sqe(admin::GET_LOG_PAGE, [0xffff_8000 | 0x0170, 0x0007_ffff, 8, 1, 3 << 24 | 2, 0]))
    else {
        panic!()
    };
    assert_eq!(log.len_bytes, 1 << 34);
    assert_eq!((log.lid, log.lsp, log.rae, log.lsi), (0x70, 1, true, 7));
    assert_eq!(log.offset, LogOffset::Bytes(1 << 32 | 8));
    assert_eq!((log.csi, log.uuid_index), (3, 2));
    assert_eq!(
        IoCommand::parse(&sqe(io::RESERVATION_REPORT, [u32::MAX, 1, 0, 0, 0, 0])),
        Ok(IoCommand::ReservationReport { len_bytes: 1 << 34, extended: true })
    );
    let Ok(IoCommand::Copy(copy)) = IoCommand::parse(&sqe(io::COPY, [9, 0, 0x2103, 0, 0, 0])) else { panic!() };
    assert_eq!((copy.sdlba, copy.ranges, copy.format, copy.prinfo_read), (9, 4, 1, 2));
}

#[test]
fn log_offsets() {
    let log = |cdw12, cdw14| AdminCommand::parse(&sqe(admin::GET_LOG_PAGE, [0, 0, cdw12, 0, cdw14, 0]));
    assert_eq!(log(2, 0), Err(INVALID_FIELD));
    let Ok(AdminCommand::GetLogPage(by_index)) = log(3, 1 << 23) else { panic!() };
    assert_eq!(by_index.offset, LogOffset::Index(3));
}

#[test]
fn admin_commands() {
    assert_eq!(
        AdminCommand::parse(&sqe(admin::IDENTIFY, [0x0005_0006, 0x0200_0003, 0, 0, 0x84, 0])),
        Ok(AdminCommand::Identify(Identify { cns: 6, cntid: 5, cnssi: 3, csi: 2, uuid_index: 4, nsid: 0 }))
    );
    assert_eq!(
        AdminCommand::parse(&sqe(admin::ABORT, [0x0005_0001, 0, 0, 0, 0, 0])),
        Ok(AdminCommand::Abort(Abort { sqid: 1, cid: 5 }))
    );
    let get = |cdw10| AdminCommand::parse(&sqe(admin::GET_FEATURES, [cdw10, 1, 0, 0, 0, 0]));
    assert_eq!(
        get(0x30f),
        Ok(AdminCommand::GetFeatures(GetFeatures {
            fid: 0xf,
            select: Select::SupportedCapabilities,
            nsid: 0,
            cdw11: 1,
            uuid_index: 0,
        }))
    );
    assert_eq!(get(0x400), Err(INVALID_FIELD));
    let Ok(AdminCommand::SetFeatures(set)) =
        AdminCommand::parse(&sqe(admin::SET_FEATURES, [0x8000_000f, 11, 12, 13, 14, 15]))
    else {
        panic!()
    };
    assert_eq!((set.fid, set.save, set.cdw11, set.cdw13, set.cdw15), (0xf, true, 11, 13, 15));
    for opcode in [admin::CREATE_IO_SQ, admin::DELETE_IO_CQ, admin::FORMAT_NVM, 0xc0] {
        assert_eq!(AdminCommand::parse(&sqe(opcode, [0; 6])), Err(Status::INVALID_OPCODE.dnr()));
    }
}

#[test]
fn admin_commands_are_never_fused_and_some_have_no_namespace() {
    let mut keep_alive = sqe(admin::KEEP_ALIVE, [0; 6]);
    assert_eq!(AdminCommand::parse(&keep_alive), Ok(AdminCommand::KeepAlive));
    keep_alive.nsid.set(1);
    assert_eq!(AdminCommand::parse(&keep_alive), Err(INVALID_FIELD));
    let mut aer = sqe(admin::ASYNC_EVENT_REQUEST, [0; 6]);
    aer.flags |= 1;
    assert_eq!(AdminCommand::parse(&aer), Err(INVALID_FIELD));
}

fn fabrics(fctype: u8, cdws: [u32; 6]) -> Result<FabricsCommand> {
    let mut cmd = sqe(FABRICS, cdws);
    cmd.nsid.set(u32::from(fctype));
    FabricsCommand::parse(&cmd)
}

#[test]
fn connect() {
    assert_eq!(
        fabrics(fabrics::CONNECT, [3 << 16, 4 << 16 | 127, 120_000, 0, 0, 0]),
        Ok(FabricsCommand::Connect(Connect {
            qid: 3,
            queue_entries: 128,
            priority: 0,
            disable_sq_flow_control: true,
            individual_queue_deletion: false,
            kato_ms: 120_000,
        }))
    );
    assert_eq!(fabrics(fabrics::CONNECT, [1, 0, 0, 0, 0, 0]), Err(Status::CONNECT_INCOMPATIBLE_FORMAT.dnr()));
    assert_eq!(fabrics(fabrics::DISCONNECT, [1, 0, 0, 0, 0, 0]), Err(Status::CONNECT_INCOMPATIBLE_FORMAT.dnr()));
    assert_eq!(fabrics(fabrics::DISCONNECT, [0; 6]), Ok(FabricsCommand::Disconnect));
}

#[test]
fn properties() {
    assert_eq!(
        fabrics(fabrics::PROPERTY_GET, [1, 0, 0, 0, 0, 0]),
        Ok(FabricsCommand::PropertyGet { property: Some(Property::Cap), offset: 0, size_bytes: 8 })
    );
    assert_eq!(
        fabrics(fabrics::PROPERTY_SET, [0, 0x14, 0x46_0001, 7, 0, 0]),
        Ok(FabricsCommand::PropertySet { property: Some(Property::Cc), offset: 0x14, size_bytes: 4, value: 0x46_0001 })
    );
    assert_eq!(
        fabrics(fabrics::PROPERTY_GET, [0, 0x30, 0, 0, 0, 0]),
        Ok(FabricsCommand::PropertyGet { property: None, offset: 0x30, size_bytes: 4 })
    );
    assert_eq!(fabrics(fabrics::PROPERTY_GET, [2, 0, 0, 0, 0, 0]), Err(INVALID_FIELD));
}

#[test]
fn authentication_and_unknown() {
    assert_eq!(
        fabrics(fabrics::AUTHENTICATION_SEND, [0xe901_0100, 64, 0, 0, 0, 0]),
        Ok(FabricsCommand::AuthenticationSend(Authentication { secp: 0xe9, spsp0: 1, spsp1: 1, len_bytes: 64 }))
    );
    assert_eq!(fabrics(0x33, [0; 6]), Err(Status::INVALID_OPCODE.dnr()));
}

#[test]
fn reservations() {
    assert_eq!(
        IoCommand::parse(&sqe(io::RESERVATION_REGISTER, [0xc000_000a, 0, 0, 0, 0, 0])),
        Ok(IoCommand::ReservationRegister(ReservationRegister {
            action: RegisterAction::Replace,
            ignore_existing_key: true,
            change_ptpl: 3,
        }))
    );
    assert_eq!(IoCommand::parse(&sqe(io::RESERVATION_REGISTER, [0x4000_0000, 0, 0, 0, 0, 0])), Err(INVALID_FIELD));
    assert_eq!(
        IoCommand::parse(&sqe(io::RESERVATION_ACQUIRE, [0x0302, 0, 0, 0, 0, 0])),
        Ok(IoCommand::ReservationAcquire(ReservationAcquire {
            action: AcquireAction::PreemptAndAbort,
            ignore_existing_key: false,
            rtype: 3,
        }))
    );
    assert_eq!(IoCommand::parse(&sqe(io::RESERVATION_RELEASE, [2, 0, 0, 0, 0, 0])), Err(INVALID_FIELD));
    assert_eq!(IoCommand::parse(&sqe(0x7a, [0; 6])), Err(Status::INVALID_OPCODE.dnr()));
}
