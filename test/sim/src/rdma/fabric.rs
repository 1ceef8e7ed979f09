//! What listens and connects.

use super::*;

/// The fabric of a simulated machine.
#[derive(Clone, Debug)]
pub struct SimFabric(Arc<Sim>);

impl SimFabric {
    /// The fabric of `sim`.
    pub fn new(sim: &Arc<Sim>) -> SimFabric {
        SimFabric(Arc::clone(sim))
    }
}

impl Fabric for SimFabric {
    fn devices(&self) -> io::Result<Vec<DeviceInfo>> {
        if self.0.lock().rdma.lost { Err(gone()) } else { Ok(vec![device(HOSTS), device(MACHINE)]) }
    }

    fn listen(&self, addr: SocketAddr, backlog: u32) -> io::Result<Box<dyn Listener>> {
        let mut state = self.0.lock();
        let rdma = &mut state.rdma;
        if rdma.lost {
            return Err(gone());
        }
        if rdma.listeners.values().any(|listening| listening.addr == addr && !listening.removed) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        let id = rdma.draw();
        let backlog = backlog.max(1) as usize;
        rdma.listeners.insert(id, Listening { addr, backlog, queue: VecDeque::new(), removed: false });
        Ok(Box::new(SimListener { sim: Arc::clone(&self.0), id, addr }))
    }

    fn connect(&self, addr: SocketAddr, _: u32) -> io::Result<Box<dyn Connecting>> {
        let mut state = self.0.lock();
        let state = &mut *state;
        let id = state.rdma.draw();
        state.net.attempts.push((state.agenda.now, addr.into()));
        state.rdma.resolving.insert(id, Resolving { ready: false });
        let delay = State::skewed(&mut state.rng, state.rdma.rules.delay_ns);
        state.agenda.after(delay, Event::Rdma(RdmaEvent::Resolved { connecting: id }));
        Ok(Box::new(SimConnecting { sim: Arc::clone(&self.0), id, addr }))
    }
}

struct SimListener {
    sim: Arc<Sim>,
    id: u64,
    addr: SocketAddr,
}

impl Listener for SimListener {
    fn next(&mut self) -> io::Result<Option<Request>> {
        let mut state = self.sim.lock();
        let listening = state.rdma.listeners.get_mut(&self.id).expect("it is held");
        if listening.removed {
            return Err(gone());
        }
        let Some((qp, params, private_data)) = listening.queue.pop_front() else { return Ok(None) };
        drop(state);
        let link = SimLink { sim: Arc::clone(&self.sim), qp, undecided: true };
        Ok(Some(Request { link: Box::new(link), params, private_data }))
    }

    fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    fn source(&self) -> Source {
        Source::Virtual(self.id)
    }
}

impl Drop for SimListener {
    fn drop(&mut self) {
        let queue = {
            let mut state = self.sim.lock();
            state.rdma.listeners.remove(&self.id).map(|listening| listening.queue)
        };
        for (qp, ..) in queue.into_iter().flatten() {
            drop(SimLink { sim: Arc::clone(&self.sim), qp, undecided: true });
        }
    }
}

struct SimConnecting {
    sim: Arc<Sim>,
    id: u64,
    addr: SocketAddr,
}

impl Connecting for SimConnecting {
    fn poll(&mut self) -> io::Result<Option<Box<dyn Link>>> {
        let mut state = self.sim.lock();
        let rdma = &mut state.rdma;
        if !rdma.resolving[&self.id].ready {
            return Ok(None);
        }
        let qp = rdma.draw();
        let local = SocketAddr::new(IpAddr::from([10, 0, 0, 1]), 10_000 + (qp % 50_000) as u16);
        rdma.qps.insert(qp, Qp::new(0, HOSTS, local, self.addr));
        drop(state);
        Ok(Some(Box::new(SimLink { sim: Arc::clone(&self.sim), qp, undecided: false })))
    }

    fn source(&self) -> Source {
        Source::Virtual(self.id)
    }
}

impl Drop for SimConnecting {
    fn drop(&mut self) {
        self.sim.lock().rdma.resolving.remove(&self.id);
    }
}

pub(super) struct SimLink {
    pub(super) sim: Arc<Sim>,
    /// 0 once it was attached or refused.
    pub(super) qp: u64,
    pub(super) undecided: bool,
}

impl SimLink {
    fn refuse(&mut self, private_data: &[u8]) {
        let qp = std::mem::take(&mut self.qp);
        let mut state = self.sim.lock();
        let state = &mut *state;
        let Some(mut at) = state.rdma.qps.remove(&qp) else { return };
        at.parted = true;
        if std::mem::take(&mut self.undecided) {
            let delay = State::skewed(&mut state.rng, state.rdma.rules.delay_ns);
            let mut data = PrivateData::from_slice(private_data);
            data.resize(148, 0);
            let event = LinkEvent::Rejected { reason: 28, private_data: data };
            state.agenda.after(delay, Event::Rdma(RdmaEvent::Told { qp: at.peer, event }));
        }
    }
}

impl Link for SimLink {
    fn device(&self) -> DeviceInfo {
        device(self.sim.lock().rdma.qps[&self.qp].device)
    }

    fn limits(&self) -> Limits {
        self.sim.lock().rdma.rules.limits
    }

    fn local_addr(&self) -> SocketAddr {
        self.sim.lock().rdma.qps[&self.qp].local
    }

    fn peer_addr(&self) -> SocketAddr {
        self.sim.lock().rdma.qps[&self.qp].remote
    }

    fn hub(&self, config: HubConfig) -> io::Result<Box<dyn Hub>> {
        let mut state = self.sim.lock();
        let rdma = &mut state.rdma;
        let on = rdma.qps[&self.qp].device;
        let limits = rdma.rules.limits;
        if on == MACHINE && rdma.lost {
            return Err(gone());
        }
        if config.completions > limits.cqe || config.shared_receives > limits.srq_wr {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let id = rdma.draw();
        rdma.hubs.insert(
            id,
            HubState {
                device: on,
                config,
                pools: Vec::new(),
                messages: BTreeSet::new(),
                shared: VecDeque::new(),
                staged: VecDeque::new(),
                shared_out: 0,
                doorbells: Doorbells::default(),
                cq: VecDeque::new(),
                events: VecDeque::new(),
                armed: false,
                signalled: false,
                endpoints: Vec::new(),
            },
        );
        Ok(Box::new(SimHub { sim: Arc::clone(&self.sim), id, limits, info: device(on), lists: BTreeMap::new() }))
    }

    fn reject(mut self: Box<Self>, private_data: &[u8]) -> io::Result<()> {
        assert!(private_data.len() <= 148, "a reject carries at most 148 bytes");
        self.refuse(private_data);
        Ok(())
    }
}

impl Drop for SimLink {
    fn drop(&mut self) {
        if self.qp != 0 {
            self.refuse(&[]);
        }
    }
}
