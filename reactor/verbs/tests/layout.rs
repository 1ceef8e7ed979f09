//! The committed declarations against the system's headers, by the system's C compiler. Skipped with a word where there are
//! no headers (packages libibverbs-dev and librdmacm-dev) or no compiler.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::mem::{offset_of, size_of};
use std::path::Path;
use std::process::Command;

use verbs::raw;

/// Width of a field, from a function that borrows it.
fn width<T, F>(_: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

/// What C is asked, and what Rust believes.
#[derive(Default)]
struct Facts(BTreeMap<String, u64>, String);

impl Facts {
    fn add(&mut self, name: String, c_expression: &str, value: u64) {
        writeln!(self.1, "    printf(\"%s=%llu\\n\", \"{name}\", (unsigned long long)({c_expression}));").unwrap();
        assert!(self.0.insert(name.clone(), value).is_none(), "{name} is there twice");
    }
}

macro_rules! layouts {
    ($facts:ident; $($ty:ident { $($field:ident $(($c:literal))?),* $(,)? })*) => {$(
        let name = stringify!($ty);
        let tag = if name == "ibv_gid" { "union" } else { "struct" };
        $facts.add(format!("sizeof {name}"), &format!("sizeof({tag} {name})"), size_of::<raw::$ty>() as u64);
        $facts.add(format!("alignof {name}"), &format!("_Alignof({tag} {name})"), align_of::<raw::$ty>() as u64);
        $({
            #[allow(unused_mut, unused_assignments)]
            let mut field = stringify!($field);
            $(field = $c;)?
            $facts.add(
                format!("{name}.{field}"),
                &format!("offsetof({tag} {name}, {field})"),
                offset_of!(raw::$ty, $field) as u64,
            );
            $facts.add(
                format!("width {name}.{field}"),
                &format!("sizeof((({tag} {name} *)0)->{field})"),
                width(|value: &raw::$ty| &value.$field) as u64,
            );
        })*
    )*};
}

fn facts() -> Facts {
    let mut facts = Facts::default();
    layouts! { facts;
        ibv_device { node_type, transport_type, name, dev_name, dev_path, ibdev_path }
        ibv_context_ops { alloc_mw, bind_mw, dealloc_mw, poll_cq, req_notify_cq, post_srq_recv, post_send, post_recv,
            _compat_query_device, _compat_query_port, _compat_alloc_pd, _compat_dealloc_pd, _compat_reg_mr,
            _compat_rereg_mr, _compat_dereg_mr, _compat_create_cq, _compat_cq_event, _compat_resize_cq,
            _compat_destroy_cq, _compat_create_srq, _compat_modify_srq, _compat_query_srq, _compat_destroy_srq,
            _compat_create_qp, _compat_query_qp, _compat_modify_qp, _compat_destroy_qp, _compat_create_ah,
            _compat_destroy_ah, _compat_attach_mcast, _compat_detach_mcast, _compat_async_event }
        ibv_context { device, ops, cmd_fd, async_fd, num_comp_vectors, mutex, abi_compat }
        ibv_device_attr { fw_ver, node_guid, sys_image_guid, max_mr_size, page_size_cap, vendor_id, vendor_part_id,
            hw_ver, max_qp, max_qp_wr, device_cap_flags, max_sge, max_sge_rd, max_cq, max_cqe, max_mr, max_pd,
            max_qp_rd_atom, max_ee_rd_atom, max_res_rd_atom, max_qp_init_rd_atom, max_ee_init_rd_atom, atomic_cap,
            max_ee, max_rdd, max_mw, max_raw_ipv6_qp, max_raw_ethy_qp, max_mcast_grp, max_mcast_qp_attach,
            max_total_mcast_qp_attach, max_ah, max_fmr, max_map_per_fmr, max_srq, max_srq_wr, max_srq_sge, max_pkeys,
            local_ca_ack_delay, phys_port_cnt }
        ibv_port_attr { state, max_mtu, active_mtu, gid_tbl_len, port_cap_flags, max_msg_sz, bad_pkey_cntr,
            qkey_viol_cntr, pkey_tbl_len, lid, sm_lid, lmc, max_vl_num, sm_sl, subnet_timeout, init_type_reply,
            active_width, active_speed, phys_state, link_layer, flags, port_cap_flags2 }
        ibv_async_event { element, event_type }
        ibv_wc { wr_id, status, opcode, vendor_err, byte_len, invalidated_rkey, qp_num, src_qp, wc_flags, pkey_index,
            slid, sl, dlid_path_bits }
        ibv_pd { context, handle }
        ibv_mr { context, pd, addr, length, handle, lkey, rkey }
        ibv_srq_attr { max_wr, max_sge, srq_limit }
        ibv_srq_init_attr { srq_context, attr }
        ibv_srq { context, srq_context, pd, handle, mutex, cond, events_completed }
        ibv_qp_cap { max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline_data }
        ibv_qp_init_attr { qp_context, send_cq, recv_cq, srq, cap, qp_type, sq_sig_all }
        ibv_qp { context, qp_context, pd, send_cq, recv_cq, srq, handle, qp_num, state, qp_type, mutex, cond,
            events_completed }
        ibv_gid { raw }
        ibv_global_route { dgid, flow_label, sgid_index, hop_limit, traffic_class }
        ibv_ah_attr { grh, dlid, sl, src_path_bits, static_rate, is_global, port_num }
        ibv_qp_attr { qp_state, cur_qp_state, path_mtu, path_mig_state, qkey, rq_psn, sq_psn, dest_qp_num,
            qp_access_flags, cap, ah_attr, alt_ah_attr, pkey_index, alt_pkey_index, en_sqd_async_notify, sq_draining,
            max_rd_atomic, max_dest_rd_atomic, min_rnr_timer, port_num, timeout, retry_cnt, rnr_retry, alt_port_num,
            alt_timeout, rate_limit }
        ibv_sge { addr, length, lkey }
        ibv_send_wr { wr_id, next, sg_list, num_sge, opcode, send_flags, invalidate_rkey,
            remote_addr("wr.rdma.remote_addr"), rkey("wr.rdma.rkey"), _qp_type("qp_type.xrc.remote_srqn"),
            _rest("bind_mw") }
        ibv_recv_wr { wr_id, next, sg_list, num_sge }
        ibv_comp_channel { context, fd, refcnt }
        ibv_cq { context, channel, cq_context, handle, cqe, mutex, cond, comp_events_completed, async_events_completed }
        rdma_event_channel { fd }
        rdma_ib_addr { sgid, dgid, pkey }
        rdma_addr { src_storage, dst_storage, addr }
        rdma_route { addr, path_rec, num_paths }
        rdma_cm_id { verbs, channel, context, qp, route, ps, port_num, event, send_cq_channel, send_cq, recv_cq_channel,
            recv_cq, srq, pd, qp_type }
        rdma_conn_param { private_data, private_data_len, responder_resources, initiator_depth, flow_control,
            retry_count, rnr_retry_count, srq, qp_num }
        rdma_ud_param { private_data, private_data_len, ah_attr, qp_num, qkey }
        rdma_cm_event { id, listen_id, event, status, param }
    }
    for &(name, value) in raw::CONSTANTS {
        facts.add(name.to_owned(), name, value.into());
    }
    facts
}

/// The C spelling of a Rust type of the signatures.
fn c_type(rust: &str) -> String {
    if let Some(inner) = rust.strip_prefix("*mut ") {
        return format!("{} *", c_type(inner));
    }
    if let Some(inner) = rust.strip_prefix("*const ") {
        return format!("const {} *", c_type(inner));
    }
    match rust {
        "c_int" => "int",
        "c_uint" | "c_enum" => "unsigned int",
        "c_char" => "char",
        "c_void" | "void" => "void",
        "u8" => "uint8_t",
        "u16" => "uint16_t",
        "size_t" | "ssize_t" | "socklen_t" | "nfds_t" | "..." => rust,
        name if name.contains(|c: char| !c.is_ascii_alphanumeric() && c != '_') => panic!("what is {name} in C?"),
        name => return format!("struct {name}"),
    }
    .to_owned()
}

/// Each declared function assigned from the header's, which a compiler refuses when their types differ.
fn signature_checks() -> String {
    let mut text = String::new();
    for &(name, args, ret) in raw::IBVERBS_SIGNATURES.iter().chain(raw::RDMACM_SIGNATURES) {
        let args: Vec<String> = args.iter().map(|arg| c_type(arg)).collect();
        let args = if args.is_empty() { "void".to_owned() } else { args.join(", ") };
        writeln!(text, "{} (*check_{name})({args}) = {name};", c_type(ret)).unwrap();
    }
    // The provider's own functions, which are called through the table of the context.
    text.push_str(
        "void check_ops(struct ibv_context_ops *ops) {\n\
         int (*poll)(struct ibv_cq *, int, struct ibv_wc *) = ops->poll_cq;\n\
         int (*notify)(struct ibv_cq *, int) = ops->req_notify_cq;\n\
         int (*srq)(struct ibv_srq *, struct ibv_recv_wr *, struct ibv_recv_wr **) = ops->post_srq_recv;\n\
         int (*send)(struct ibv_qp *, struct ibv_send_wr *, struct ibv_send_wr **) = ops->post_send;\n\
         int (*recv)(struct ibv_qp *, struct ibv_recv_wr *, struct ibv_recv_wr **) = ops->post_recv;\n\
         (void)poll; (void)notify; (void)srq; (void)send; (void)recv; }\n",
    );
    text
}

#[test]
fn the_declarations_are_those_of_the_system_headers() {
    let headers = ["infiniband/verbs.h", "rdma/rdma_cma.h", "rdma/rsocket.h"];
    if let Some(missing) = headers.iter().find(|header| !Path::new("/usr/include").join(header).exists()) {
        eprintln!("skipped: no {missing} (packages libibverbs-dev and librdmacm-dev)");
        return;
    }
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    if Command::new(&compiler).arg("--version").output().is_err() {
        eprintln!("skipped: no C compiler {compiler:?}");
        return;
    }
    let facts = facts();
    let mut source = String::from("#include <stddef.h>\n#include <stdint.h>\n#include <stdio.h>\n");
    for header in headers {
        writeln!(source, "#include <{header}>").unwrap();
    }
    source.push_str(&signature_checks());
    writeln!(source, "int main(void) {{\n{}    return 0;\n}}", facts.1).unwrap();

    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (file, program) = (folder.join("layout.c"), folder.join("layout"));
    std::fs::write(&file, source).unwrap();
    let compiled = Command::new(&compiler)
        .args([
            "-std=c11",
            "-Wall",
            "-Wno-unused-variable",
            "-Werror=incompatible-pointer-types",
            "-D_GNU_SOURCE",
            "-o",
        ])
        .args([&program, &file])
        // The functions themselves are not linked: only their types are of interest.
        .args(["-Wl,--unresolved-symbols=ignore-all"])
        .output()
        .unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let ran = Command::new(&program).output().unwrap();
    assert!(ran.status.success(), "{ran:?}");
    let said = String::from_utf8(ran.stdout).unwrap();
    let found: BTreeMap<String, u64> = said
        .lines()
        .map(|line| {
            let (name, value) = line.split_once('=').unwrap();
            (name.to_owned(), value.parse().unwrap())
        })
        .collect();
    let wrong: Vec<String> = facts
        .0
        .iter()
        .filter(|(name, value)| found.get(*name) != Some(value))
        .map(|(name, value)| format!("{name}: declared {value}, the headers say {:?}", found.get(name)))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(found.len(), facts.0.len());
    eprintln!("{} sizes, offsets, widths and constants are right", found.len());
}
