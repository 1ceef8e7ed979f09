//! `bdev_nvme_attach_controller`, `bdev_nvme_detach_controller`.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use nvmf::host::ReconnectPolicy;
use schema::{Kind, Method, Param, Params, RpcError};
use serde_json::{Value, json};

use super::{MULTIPATH_OPTS, NAME, not_served, policy};
use crate::path::{Address, Site, TransportKind};
use crate::system::{Attach, InitiatorSystem, Multipath};

/// Bytes of an NQN at most.
pub(super) const NQN_MAX_BYTES: i128 = 223;
/// The port of NVMe over Fabrics, where none was given.
const NVME_PORT: u16 = 4420;
/// Bdevs of a controller where no number is given.
const DEFAULT_MAX_BDEVS: u32 = 128;

pub(super) const TRTYPE: &str =
    "Transport, in any case: TCP; RDMA, which needs a device and its libraries (docs/rdma.md)";
pub(super) const TRADDR: &str = "IP address of the target, in numbers";
pub(super) const ADRFAM: &str = "Address family, IPv4 or IPv6; default: the address's";
const TRSVCID: &str = "Port, as text; default 4420";

pub(super) const ATTACH: Method<InitiatorSystem> = Method::new(
    "bdev_nvme_attach_controller",
    "Connect to an NVMe-oF subsystem and make its namespaces bdevs, or add a path to a controller.",
    |s, p| Box::pin(attach(s, p)),
)
.params(&[
    Param::required("name", Kind::Str, "Name of the controller; its bdevs are called NAMEn1, NAMEn2, ...").at_least(1),
    Param::required("trtype", Kind::Str, TRTYPE),
    Param::required("traddr", Kind::Str, TRADDR),
    Param::optional("adrfam", Kind::Str, ADRFAM),
    Param::optional("trsvcid", Kind::Str, TRSVCID),
    Param::optional("priority", Kind::Str, "Priority of the sockets; only 0 is served"),
    Param::optional("subnqn", Kind::Str, "NQN of the subsystem; needed").at_least(1).at_most(NQN_MAX_BYTES),
    Param::optional("hostnqn", Kind::Str, "NQN of this host; when left out, one drawn at each start")
        .at_least(1)
        .at_most(NQN_MAX_BYTES),
    Param::optional("hostaddr", Kind::Str, "Address to connect from; not served: the system chooses it"),
    Param::optional("hostsvcid", Kind::Str, "Port to connect from; not served: the system chooses it"),
    Param::optional("prchk_reftag", Kind::Bool, "Check reference tags; not served: blocks have no metadata"),
    Param::optional("prchk_guard", Kind::Bool, "Check guards; not served: blocks have no metadata"),
    Param::optional("hdgst", Kind::Bool, "Digests of PDU headers, over TCP; default: false"),
    Param::optional("ddgst", Kind::Bool, "Digests of data, over TCP; default: false"),
    Param::optional("fabrics_connect_timeout_us", Kind::U64, "Time for each step of connecting, in microseconds")
        .at_most(3_600_000_000),
    Param::optional(
        "multipath",
        Kind::Enum(&["failover", "multipath", "disable"]),
        "What this is if NAME is attached already: failover: another port, used when the one in use fails; multipath, the \
         default: another path, used as the policy says; disable: refused",
    ),
    Param::optional("num_io_queues", Kind::U32, "I/O queues at most; each reactor has one, and fewer than reactors are refused"),
    Param::optional(
        "ctrlr_loss_timeout_sec",
        Kind::I32,
        "Seconds of attempts to have a lost controller back; -1 for ever, 0: one attempt; then its bdevs go",
    )
    .at_least(-1),
    Param::optional("reconnect_delay_sec", Kind::U32, "Seconds between these attempts"),
    Param::optional(
        "fast_io_fail_timeout_sec",
        Kind::U32,
        "Seconds after which I/O fails instead of waiting for a lost controller; 0: it waits as long as there are attempts",
    ),
    Param::optional("psk", Kind::Str, "Name of a TLS key; not served"),
    Param::optional("max_bdevs", Kind::U32, "The most bdevs of the controller; default 128").at_least(1).at_most(8192),
    Param::optional("dhchap_key", Kind::Str, "Name of a DH-HMAC-CHAP key; not served"),
    Param::optional("dhchap_ctrlr_key", Kind::Str, "Name of a DH-HMAC-CHAP key of the controller; not served"),
    Param::optional("allow_unrecognized_csi", Kind::Bool, "Attach namespaces of unknown command sets; not served"),
    Param::optional("multipath_opts", Kind::Object(MULTIPATH_OPTS), "How the paths of the first attachment's bdevs are used"),
    Param::optional("disable_sq_flow_control", Kind::Bool, "Accepted: I/O queues always go without").deprecated(),
])
.mutates()
.refuses_with(super::REFUSAL)
.result("array of names of the bdevs on this path");

pub(super) const DETACH: Method<InitiatorSystem> = Method::new(
    "bdev_nvme_detach_controller",
    "End a controller, or those of its paths that match: its bdevs go when the last path does.",
    |s, p| Box::pin(detach(s, p)),
)
.params(&[
    NAME,
    Param::optional("trtype", Kind::Str, TRTYPE),
    Param::optional("traddr", Kind::Str, TRADDR),
    Param::optional("adrfam", Kind::Str, "Address family, IPv4 or IPv6"),
    Param::optional("trsvcid", Kind::Str, "Port, as text"),
    Param::optional("subnqn", Kind::Str, "NQN of the subsystem"),
    Param::optional("hostaddr", Kind::Str, "Address connected from; none is ever set"),
    Param::optional("hostsvcid", Kind::Str, "Port connected from; none is ever set"),
])
.mutates()
.refuses_with(super::REFUSAL);

fn transport(params: &Params) -> Result<Option<TransportKind>, RpcError> {
    let Some(text) = params.opt_str("trtype") else { return Ok(None) };
    let kinds = [TransportKind::Tcp, TransportKind::Rdma];
    let found = kinds.into_iter().find(|kind| text.eq_ignore_ascii_case(kind.name()));
    let unknown = || params.invalid("trtype", "a transport that this initiator does not have").fix("give TCP or RDMA");
    found.map(Some).ok_or_else(unknown)
}

pub(super) fn site(params: &Params, default_port: u16) -> Result<Site, RpcError> {
    let trtype = transport(params)?.unwrap_or(TransportKind::Tcp);
    let text = params.str("traddr")?;
    let ip: IpAddr = text.parse().map_err(|_| {
        params
            .invalid("traddr", "not an IP address")
            .fix("write it in numbers: 192.0.2.1, or 2001:db8::1 without brackets")
    })?;
    if let Some(family) = params.opt_str("adrfam") {
        let wanted = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
        if !family.eq_ignore_ascii_case(wanted) {
            return Err(params
                .invalid("adrfam", "traddr is of another family")
                .fix(format!("leave it out, or give {wanted}")));
        }
    }
    let port = match params.opt_str("trsvcid") {
        None => default_port,
        Some(text) => match text.parse::<u16>() {
            Ok(port) if port != 0 && text.bytes().all(|byte| byte.is_ascii_digit()) => port,
            _ => return Err(params.invalid("trsvcid", "not a port").fix("give 1 to 65535 in quotes: \"4420\"")),
        },
    };
    Ok(Site { trtype, socket: SocketAddr::new(ip, port) })
}

/// The three timeouts, where given; those of the options otherwise.
pub(super) fn reconnect(system: &InitiatorSystem, params: &Params) -> Result<ReconnectPolicy, RpcError> {
    let (loss, delay, fail) = system.settings().reconnect;
    let loss = params.get("ctrlr_loss_timeout_sec").and_then(Value::as_i64).unwrap_or(loss);
    let delay = params.opt_u64("reconnect_delay_sec").unwrap_or(delay);
    let fail = params.opt_u64("fast_io_fail_timeout_sec").unwrap_or(fail);
    ReconnectPolicy::from_seconds(loss, delay, fail).map_err(|rule| {
        let field = rule.split(' ').next().unwrap_or("ctrlr_loss_timeout_sec");
        params.invalid(field, rule)
    })
}

async fn attach(system: Arc<InitiatorSystem>, params: Params) -> Result<Value, RpcError> {
    let site = site(&params, NVME_PORT)?;
    let Some(subnqn) = params.opt_str("subnqn") else {
        return Err(params
            .invalid("subnqn", "missing")
            .fix("give the subsystem's NQN; ringstone discover lists a target's"));
    };
    if subnqn == nvmf::spec::fabrics::DISCOVERY_NQN {
        let error = params.invalid("subnqn", "a discovery service has no namespaces");
        return Err(error.fix("give the NQN of a subsystem that it lists"));
    }
    if params.opt_str("priority").is_some_and(|text| text != "0") {
        return Err(params.invalid("priority", "socket priorities are not served").fix("leave it out, or give 0"));
    }
    for field in ["hostaddr", "hostsvcid"] {
        not_served(&params, field, "the system chooses where a connection comes from")?;
    }
    for field in ["prchk_reftag", "prchk_guard"] {
        not_served(&params, field, "blocks with metadata are not served")?;
    }
    if site.trtype == TransportKind::Rdma {
        for field in ["hdgst", "ddgst"] {
            not_served(&params, field, "NVMe/RDMA has no digests: the network below it has checksums of its own")?;
        }
    }
    for field in ["psk", "dhchap_key", "dhchap_ctrlr_key"] {
        not_served(&params, field, "connections are neither encrypted nor authenticated")?;
    }
    let reactors = system.bdevs().reactors().len();
    if params.opt_u32("num_io_queues").is_some_and(|queues| (queues as usize) < reactors) {
        let error = params.invalid("num_io_queues", format!("each of the {reactors} reactors needs a queue"));
        return Err(error.fix(format!("leave it out, or give at least {reactors}")));
    }
    not_served(&params, "allow_unrecognized_csi", "only namespaces of the NVM command set can be bdevs")?;
    let hostnqn = params.opt_str("hostnqn").unwrap_or(system.hostnqn()).to_string();
    let mode = match params.get("multipath_opts") {
        None => None,
        Some(given) => {
            let text = |key: &str| given.get(key).and_then(Value::as_str);
            let min_io = given.get("min_io").and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok());
            Some(policy(&params, (text("policy"), text("selector"), min_io), "multipath_opts.min_io")?)
        }
    };
    let request = Attach {
        name: params.str("name")?.to_string(),
        address: Address { site, subnqn: subnqn.to_string(), hostnqn },
        digests: (params.opt_bool("hdgst").unwrap_or(false), params.opt_bool("ddgst").unwrap_or(false)),
        multipath: match params.opt_str("multipath") {
            Some("disable") => Multipath::Disable,
            Some("failover") => Multipath::Failover,
            _ => Multipath::Multipath,
        },
        reconnect: reconnect(&system, &params)?,
        step_timeout: params.opt_u64("fabrics_connect_timeout_us").filter(|us| *us > 0).map(Duration::from_micros),
        mode,
        max_bdevs: params.opt_u32("max_bdevs").unwrap_or(DEFAULT_MAX_BDEVS) as usize,
        owner: None,
        params: params.as_value().clone(),
    };
    Ok(json!(system.attach(request).await?))
}

async fn detach(system: Arc<InitiatorSystem>, params: Params) -> Result<Value, RpcError> {
    let trtype = transport(&params)?;
    for field in ["hostaddr", "hostsvcid"] {
        not_served(&params, field, "no path is bound to an address of this host")?;
    }
    let text = |field: &str| params.opt_str(field).map(str::to_string);
    let (traddr, family, port, subnqn) = (text("traddr"), text("adrfam"), text("trsvcid"), text("subnqn"));
    let ip: Option<IpAddr> = match traddr {
        None => None,
        Some(text) => Some(text.parse().map_err(|_| params.invalid("traddr", "not an IP address"))?),
    };
    let which = move |address: &Address| {
        trtype.is_none_or(|trtype| trtype == address.site.trtype)
            && ip.is_none_or(|ip| ip == address.site.socket.ip())
            && family.as_ref().is_none_or(|family| family.eq_ignore_ascii_case(address.family()))
            && port.as_ref().is_none_or(|port| *port == address.site.socket.port().to_string())
            && subnqn.as_ref().is_none_or(|nqn| *nqn == address.subnqn)
    };
    system.detach(params.str("name")?, which).await?;
    Ok(json!(true))
}
