//! The production target in a world: composed as the appliance composes it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use nvmf::host::Transports as HostTransports;
use nvmf::rdma::host_transport::RdmaHost;
use nvmf::rdma::transport::RdmaTransport;
use nvmf::target::model::{NewListener, NewNamespace, NewSubsystem};
use nvmf::target::poll_group::groups::PollGroups;
use nvmf::target::poll_group::{Loads, PollGroup};
use nvmf::target::shared::ControllerTable;
use nvmf::target::system::NvmfSystem;
use nvmf::target::transport::Transports;
use nvmf::target::view::{ListenAddress, TransportKind, TransportOptions};
use nvmf::tcp::host_transport::TcpHost;
use nvmf::tcp::transport::TcpTransport;

use crate::rdma::SimFabric;
use crate::world::World;

/// The subsystem that scenarios use.
pub const NQN: &str = "nqn.2026-11.io.ringstone:sim";

/// Where the target listens.
pub fn address() -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2)), 4420)
}

/// An address of the machine.
pub fn listen_address(addr: SocketAddr) -> ListenAddress {
    ListenAddress { trtype: TransportKind::Tcp, traddr: addr.ip(), trsvcid: addr.port() }
}

/// A port of a target, on any transport.
pub fn listen_on(trtype: TransportKind, addr: SocketAddr) -> ListenAddress {
    ListenAddress { trtype, ..listen_address(addr) }
}

/// What a host in a world connects with.
pub fn host_transports(world: &World) -> HostTransports {
    let fabric = Arc::new(SimFabric::new(world.sim()));
    vec![Arc::new(TcpHost { network: world.platform().network() }), Arc::new(RdmaHost { fabric })]
}

/// The target of a world.
pub struct Target {
    /// Its control plane.
    pub nvmf: Arc<NvmfSystem>,
    controllers: Arc<ControllerTable>,
    kind: TransportKind,
}

impl Target {
    /// Puts a target on every reactor, without anything in it but the TCP transport.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn install(world: &mut World, options: TransportOptions) -> Target {
        Target::install_over(world, TransportKind::Tcp, options)
    }

    /// The same with another transport.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn install_over(world: &mut World, kind: TransportKind, options: TransportOptions) -> Target {
        let controllers = Arc::new(ControllerTable::default());
        let loads = Arc::new(Loads::new(world.reactor_count()));
        for n in 0..world.reactor_count() {
            PollGroup::install(world.context(n), Arc::clone(&controllers), Arc::clone(&loads));
        }
        let fabric = Arc::new(SimFabric::new(world.sim()));
        let transports: Transports =
            vec![Arc::new(TcpTransport::new(world.platform().network())), Arc::new(RdmaTransport::new(fabric))];
        let groups = Arc::new(PollGroups::new(world.system().reactors().to_vec()));
        let nvmf = NvmfSystem::new(Arc::clone(world.system()), Arc::clone(&controllers), transports, groups);
        let target = Target { nvmf, controllers, kind };
        target.add_transport(world, kind, options);
        target
    }

    /// Has another transport besides.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn add_transport(&self, world: &mut World, kind: TransportKind, options: TransportOptions) {
        let system = Arc::clone(&self.nvmf);
        let made = async move { system.create_transport(kind, options).await };
        world.block_on("the transport", made).expect("it can be had");
    }

    /// Serves the bdevs `names` as namespaces 1 and up of [`NQN`] on [`address`], to any host.
    ///
    /// # Panics
    /// When it cannot be served.
    pub fn serve(&self, world: &mut World, names: &[String]) {
        let (system, names, trtype) = (Arc::clone(&self.nvmf), names.to_vec(), self.kind);
        let made = async move {
            let new =
                NewSubsystem { nqn: NQN.into(), allow_any_host: true, ana_reporting: true, ..NewSubsystem::default() };
            system.create_subsystem(new).await?;
            for name in names {
                system.add_namespace(NQN, NewNamespace::default(), &name).await?;
            }
            let address = listen_on(trtype, address());
            system.add_listener(NQN, NewListener { address, ana_state: None, sock_impl: None }).await
        };
        world.block_on("the subsystem", made).expect("it can be served");
    }

    /// Ends the target and checks that nothing of it is left.
    ///
    /// # Panics
    /// When something is.
    pub fn shut_down(self, world: &mut World) {
        let system = Arc::clone(&self.nvmf);
        world.block_on("the target to shut down", async move { system.shut_down().await });
        // A peer that does not answer is waited for before its connection is gone.
        let patience = world.sim().uptime() + Duration::from_secs(120);
        let groups = Arc::clone(self.nvmf.reactors());
        loop {
            let groups = Arc::clone(&groups);
            let both = world.block_on("the queue pairs", async move { (groups.qpairs().await, groups.stats().await) });
            let (qpairs, stats) = (both.0.expect("the reactors run"), both.1.expect("the reactors run"));
            // Connections that never came as far as Connect are in no list, and time out like the others.
            let unassociated: u64 = stats.iter().map(|group| u64::from(group.current_unassociated_qpairs)).sum();
            if qpairs.is_empty() && unassociated == 0 && self.controllers.is_empty() {
                break;
            }
            assert!(world.sim().uptime() < patience, "queue pairs or controllers are left at the end");
            world.run_for(Duration::from_millis(100));
        }
    }
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Target")
    }
}
