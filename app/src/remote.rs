//! What the tools that reach a target over NVMe-oF have in common: where it is, who asks, and a reactor to ask from.

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Arc, OnceLock, mpsc};

use nvmf::host::{Connector, Options as HostOptions};
use nvmf::rdma::host_transport::RdmaConnector;
use nvmf::spec::fabrics::NQN_MAX_BYTES;
use nvmf::spec::log::trtype;
use nvmf::tcp::host_transport::TcpConnector;
use reactor::file::EngineChoice;
use reactor::net::Network;
use reactor::platform::OsPlatform;
use reactor::rdma::Fabric;
use reactor::reactor::{PollPolicy, ReactorConfig, ReactorThreads};
use reactor::{Context, Platform, Poller, PollerId, ReactorId, Schedule};

/// Where a target is, and who asks.
#[derive(Clone, Debug, clap::Args)]
pub struct Remote {
    /// Transport.
    #[arg(long, value_enum, ignore_case = true, default_value_t = Trtype::Tcp)]
    trtype: Trtype,
    /// Address of the target.
    #[arg(long)]
    traddr: String,
    /// Port of the target.
    #[arg(long, default_value_t = 4420, value_parser = clap::value_parser!(u16).range(1..))]
    trsvcid: u16,
    /// NQN that this host goes by. The host identifier is the UUID at its end, if it has one.
    #[arg(long, value_parser = parse_nqn, default_value = "nqn.2014-08.org.nvmexpress:uuid:7d5c6f1e-53a0-4d5b-9c3a-0f6f4f1d2b11")]
    hostnqn: String,
    /// Ask for header digests; TCP only.
    #[arg(long)]
    hdr_digest: bool,
    /// Ask for data digests; TCP only.
    #[arg(long)]
    data_digest: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Trtype {
    /// NVMe/TCP.
    Tcp,
    /// NVMe/RDMA: the packages librdmacm1, libibverbs1 and ibverbs-providers, and an RDMA device, are needed.
    Rdma,
}

/// RDMA devices of this machine. They are opened once a process.
fn fabric() -> Arc<dyn Fabric> {
    static FABRIC: OnceLock<Arc<verbs::VerbsFabric>> = OnceLock::new();
    Arc::clone(FABRIC.get_or_init(|| Arc::new(verbs::VerbsFabric::new()))) as _
}

/// A name that fits where NQNs go.
pub fn parse_nqn(text: &str) -> Result<String, String> {
    match text.len() {
        1..=NQN_MAX_BYTES => Ok(text.to_owned()),
        bytes => Err(format!(
            "an NQN has 1 to {NQN_MAX_BYTES} bytes, and this has {bytes}; ringstone discover lists a target's"
        )),
    }
}

/// The words for a namespace that is not there.
pub fn no_namespace<'a>(nsid: u32, there: impl Iterator<Item = &'a u32>) -> String {
    let there: Vec<String> = there.map(u32::to_string).collect();
    match there.len() {
        0 => format!("--nsid {nsid}: the subsystem has no namespace for this host; add one to it"),
        _ => {
            format!("--nsid {nsid}: there is no such namespace for this host; give one of these: {}", there.join(", "))
        }
    }
}

/// The identifier that an NQN with a UUID names.
fn hostid_of(nqn: &str) -> Option<[u8; 16]> {
    let (_, uuid) = nqn.rsplit_once("uuid:")?;
    let digits: Vec<u8> =
        uuid.chars().filter(|c| *c != '-').map(|c| c.to_digit(16).map(|d| d as u8)).collect::<Option<_>>()?;
    let bytes: Vec<u8> = digits.chunks(2).map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit)).collect();
    bytes.try_into().ok()
}

impl Remote {
    /// The target's address.
    ///
    /// # Errors
    /// It has none.
    pub fn address(&self) -> Result<SocketAddr, String> {
        if self.is_rdma() {
            if self.hdr_digest || self.data_digest {
                return Err("--hdr-digest, --data-digest: NVMe/RDMA has no digests; leave them out".into());
            }
            // What is missing is told before anything else is tried.
            fabric().devices().map_err(|error| format!("--trtype rdma: {error}"))?;
        }
        let unknown =
            |why: String| format!("--traddr {}: {why}; give an IP address or a name that has one", self.traddr);
        let mut found = (self.traddr.as_str(), self.trsvcid).to_socket_addrs().map_err(|e| unknown(e.to_string()))?;
        found.next().ok_or_else(|| unknown("no address".into()))
    }

    /// Whether it is reached over RDMA.
    pub fn is_rdma(&self) -> bool {
        self.trtype == Trtype::Rdma
    }

    /// The transport, as discovery logs name it.
    pub fn trtype(&self) -> u8 {
        if self.is_rdma() { trtype::RDMA } else { trtype::TCP }
    }

    /// What connects to `address` as this host wants it.
    pub fn connector(&self, network: &Arc<dyn Network>, address: SocketAddr) -> Arc<dyn Connector> {
        if self.is_rdma() {
            return Arc::new(RdmaConnector { fabric: fabric(), address });
        }
        let (header_digest, data_digest) = (self.hdr_digest, self.data_digest);
        Arc::new(TcpConnector { network: Arc::clone(network), address, header_digest, data_digest })
    }

    /// How to connect to `subnqn`.
    pub fn host_options(&self, cx: &Context, subnqn: &str) -> HostOptions {
        let hostid = hostid_of(&self.hostnqn).unwrap_or_else(|| {
            let mut random = [0; 16];
            cx.platform().random(&mut random);
            random
        });
        HostOptions { subnqn: subnqn.into(), hostnqn: self.hostnqn.clone(), hostid, ..HostOptions::default() }
    }

    /// A failure, with what to do about it.
    pub fn explain(&self, address: SocketAddr, why: &str) -> String {
        let hint = if why.contains("refused") {
            ": nothing listens there; see whether the target runs, and on which port"
        } else if why.contains("does not answer") || why.contains("closed the connection") || why.contains("reset") {
            ": see whether the target still runs, and what its log says"
        } else {
            ""
        };
        format!("{address}: {why}{hint}")
    }
}

/// Runs a poller on a reactor of its own, one on each core (`None`: wherever), until the result is there that `wait` makes
/// of what they send.
///
/// # Errors
/// The host gives no reactor, or `make` fails.
pub fn run<T: Send + 'static, R>(
    cores: &[Option<usize>],
    policy: PollPolicy,
    make: impl Fn(&mut Context, PollerId, mpsc::Sender<T>) -> Result<Box<dyn Poller>, String> + Send + Clone + 'static,
    wait: impl FnOnce(&mpsc::Receiver<T>) -> Option<R>,
) -> Result<R, String> {
    let platform: Arc<dyn Platform> = Arc::new(OsPlatform::new(EngineChoice::Threads));
    let (out, results) = mpsc::channel();
    let config = |(id, core): (usize, &Option<usize>)| ReactorConfig { id: ReactorId(id as u32), core: *core, policy };
    let configs: Vec<_> = cores.iter().enumerate().map(config).collect();
    let setup = move |cx: &mut Context| {
        let id = cx.reserve_poller();
        let poller = make(cx, id, out.clone()).map_err(std::io::Error::other)?;
        cx.add_reserved_poller(id, "tool", Schedule::Active, poller);
        Ok(())
    };
    let reactors = ReactorThreads::start(&platform, &configs, setup).map_err(|e| format!("cannot start: {e}"))?;
    let result = wait(&results);
    let stopped = reactors.stop();
    result.ok_or_else(|| match stopped {
        Err(error) => error.to_string(),
        Ok(()) => "it ended without a result".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_who_its_nqn_says() {
        let id = hostid_of("nqn.2014-08.org.nvmexpress:uuid:7d5c6f1e-53a0-4d5b-9c3a-0f6f4f1d2b11");
        assert_eq!(id.map(|id| (id[0], id[15])), Some((0x7d, 0x11)));
        assert_eq!(hostid_of("nqn.2026-11.io.example:h"), None);
        assert_eq!(hostid_of("uuid:7d5c6f1e"), None);
        assert_eq!(hostid_of("uuid:zz5c6f1e-53a0-4d5b-9c3a-0f6f4f1d2b11"), None);
    }
}
