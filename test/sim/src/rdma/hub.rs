//! The queue pairs of one owner on one device.

use super::*;

pub(super) struct SimHub {
    pub(super) sim: Arc<Sim>,
    pub(super) id: u64,
    pub(super) limits: Limits,
    pub(super) info: DeviceInfo,
    /// What is exposed, as peers are told.
    pub(super) lists: BTreeMap<usize, Vec<Remote>>,
}

impl HubState {
    fn check_known(&self, buffer: &mut Buffer) {
        let address = buffer.as_mut_ptr() as usize;
        let known = self.pools.iter().any(|(region, _)| buffer.in_region(region)) || self.messages.contains(&address);
        assert!(known, "memory was posted that is not registered");
    }
}

impl SimHub {
    /// The device learns of what was posted.
    fn ring(&self, all: bool) {
        let mut state = self.sim.lock();
        let state = &mut *state;
        state.rdma.ring(self.id, all, &mut state.rng, &mut state.agenda);
    }

    fn qp(&self, state: &State, endpoint: EndpointId) -> u64 {
        state.rdma.hubs[&self.id].endpoints[endpoint.0].expect("the endpoint was detached")
    }

    /// What the owner is told of the end of work.
    fn done(&self, state: &mut State, qp: u64, work: Work) -> Done {
        let shared = state.rdma.hubs[&self.id].config.shared_receives > 0;
        match work {
            Work::Received { buffer, bytes, invalidated, status } => {
                let hub = state.rdma.hubs.get_mut(&self.id).expect("it is held");
                if shared {
                    hub.shared_out -= 1;
                } else if let Some(at) = state.rdma.qps.get_mut(&qp) {
                    at.receives_out -= 1;
                }
                let endpoint = state.rdma.qps.get(&qp).map(|at| at.endpoint);
                Done::Received { endpoint, buffer, bytes, invalidated, status }
            }
            Work::Posted { post, status } => {
                let at = state.rdma.qps.get_mut(&qp).expect("chains end with their queue pair");
                at.requests_out -= post.requests();
                at.reads_out -= reads(&post);
                let head = post.message.map(|message| message.head);
                Done::Posted { endpoint: at.endpoint, user: post.user, data: post.data, head, status }
            }
        }
    }
}

impl Hub for SimHub {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn device(&self) -> &DeviceInfo {
        &self.info
    }

    fn is_on(&self, link: &dyn Link) -> bool {
        link.device() == self.info
    }

    fn register(&mut self, pool: &BufferPool, remote: bool) -> io::Result<()> {
        self.sim.lock().rdma.hubs.get_mut(&self.id).expect("it is held").pools.push((pool.region(), remote));
        Ok(())
    }

    fn messages(&mut self, count: usize, bytes: usize) -> io::Result<Vec<Buffer>> {
        let mut made: Vec<Buffer> = (0..count).map(|_| Buffer::heap(bytes)).collect();
        let mut state = self.sim.lock();
        let hub = state.rdma.hubs.get_mut(&self.id).expect("it is held");
        hub.messages.extend(made.iter_mut().map(|buffer| buffer.as_mut_ptr() as usize));
        Ok(made)
    }

    fn attach(&mut self, link: Box<dyn Link>, depths: QueueDepths) -> io::Result<EndpointId> {
        let link: Box<dyn Any> = link;
        let mut link = link.downcast::<SimLink>().expect("a link of the same fabric");
        let mut state = self.sim.lock();
        let rdma = &mut state.rdma;
        let hub = rdma.hubs.get_mut(&self.id).expect("it is held");
        let refused = if hub.device == MACHINE && rdma.lost { Some(gone()) } else { None };
        let too_deep = depths.send > self.limits.qp_wr || depths.send_pieces > self.limits.sge;
        if let Some(error) = refused.or_else(|| too_deep.then(|| io::ErrorKind::OutOfMemory.into())) {
            drop(state);
            return Err(error);
        }
        let free = hub.endpoints.iter().position(Option::is_none);
        let endpoint = EndpointId(free.unwrap_or(hub.endpoints.len()));
        if free.is_none() {
            hub.endpoints.push(None);
        }
        hub.endpoints[endpoint.0] = Some(link.qp);
        let at = rdma.qps.get_mut(&link.qp).expect("it is held");
        at.hub = Some(self.id);
        at.endpoint = endpoint;
        at.depths = depths;
        link.qp = 0;
        drop(state);
        Ok(endpoint)
    }

    fn connect(&mut self, endpoint: EndpointId, params: ConnectParams, private_data: &[u8]) -> io::Result<()> {
        assert!(private_data.len() <= reactor::rdma::CONNECT_PRIVATE_BYTES);
        self.ring(true);
        let mut state = self.sim.lock();
        let qp = self.qp(&state, endpoint);
        let state = &mut *state;
        let to = state.rdma.qps[&qp].remote;
        let delay = State::skewed(&mut state.rng, state.rdma.rules.delay_ns);
        let private_data = PrivateData::from_slice(private_data);
        state.agenda.after(delay, Event::Rdma(RdmaEvent::Asked { qp, to, params, private_data }));
        Ok(())
    }

    fn accept(&mut self, endpoint: EndpointId, params: ConnectParams, private_data: &[u8]) -> io::Result<()> {
        self.ring(true);
        let mut state = self.sim.lock();
        let qp = self.qp(&state, endpoint);
        let state = &mut *state;
        let at = state.rdma.qps.get_mut(&qp).expect("it is attached");
        if at.life == Life::Failed {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        at.life = Life::Connected;
        at.initiator_depth = params.initiator_depth.into();
        let peer = at.peer;
        let mut data = PrivateData::from_slice(private_data);
        data.resize(data.len().max(196), 0);
        let there = ConnectParams {
            responder_resources: params.initiator_depth,
            initiator_depth: params.responder_resources,
            rnr_retry_count: params.rnr_retry_count,
        };
        let delay = State::skewed(&mut state.rng, state.rdma.rules.delay_ns);
        let event = LinkEvent::Established { params: there, private_data: data };
        state.agenda.after(delay, Event::Rdma(RdmaEvent::Told { qp: peer, event }));
        let event = LinkEvent::Established { params, private_data: PrivateData::new() };
        state.agenda.after(2 * delay, Event::Rdma(RdmaEvent::Told { qp, event }));
        Ok(())
    }

    fn disconnect(&mut self, endpoint: EndpointId) {
        self.ring(true);
        let mut state = self.sim.lock();
        let qp = self.qp(&state, endpoint);
        let state = &mut *state;
        state.rdma.part(qp, &mut state.rng, &mut state.agenda);
        state.rdma.fail(qp, &mut state.rng, &mut state.agenda);
    }

    fn detach(&mut self, endpoint: EndpointId, back: &mut dyn FnMut(Done)) {
        self.ring(true);
        let mut returned = Vec::new();
        {
            let mut state = self.sim.lock();
            let qp = self.qp(&state, endpoint);
            let state = &mut *state;
            let hub = state.rdma.hubs.get_mut(&self.id).expect("it is held");
            let shared = hub.config.shared_receives > 0;
            let (mine, others): (VecDeque<_>, VecDeque<_>) = std::mem::take(&mut hub.cq)
                .into_iter()
                .partition(|(of, work)| *of == qp && (!shared || matches!(work, Work::Posted { .. })));
            hub.cq = others;
            hub.endpoints[endpoint.0] = None;
            hub.events.retain(|event| !matches!(event, HubEvent::Link(at, _) if *at == endpoint));
            returned.extend(mine.into_iter().map(|(_, work)| work));
            let pending = state.agenda.take_rdma_work(qp, shared);
            returned.extend(pending);
            let at = state.rdma.forget_qp(qp, &mut state.rng, &mut state.agenda).expect("it is attached");
            let status = WorkStatus::Flushed;
            returned.extend(at.chains.into_iter().map(|post| Work::Posted { post, status }));
            let received = |buffer| Work::Received { buffer, bytes: 0, invalidated: None, status };
            returned.extend(at.own_receives.into_iter().map(received));
        }
        for work in returned {
            back(match work {
                Work::Received { buffer, bytes, invalidated, status } => {
                    Done::Received { endpoint: Some(endpoint), buffer, bytes, invalidated, status }
                }
                Work::Posted { post, status } => {
                    let head = post.message.map(|message| message.head);
                    Done::Posted { endpoint, user: post.user, data: post.data, head, status }
                }
            });
        }
    }

    fn local_addr(&self, endpoint: EndpointId) -> SocketAddr {
        let state = self.sim.lock();
        state.rdma.qps[&self.qp(&state, endpoint)].local
    }

    fn peer_addr(&self, endpoint: EndpointId) -> SocketAddr {
        let state = self.sim.lock();
        state.rdma.qps[&self.qp(&state, endpoint)].remote
    }

    fn has_shared_receives(&self) -> bool {
        self.sim.lock().rdma.hubs[&self.id].config.shared_receives > 0
    }

    fn post_receive(&mut self, endpoint: Option<EndpointId>, mut buffer: Buffer) -> Result<(), (Buffer, io::Error)> {
        let mut state = self.sim.lock();
        let qp = endpoint.map(|endpoint| self.qp(&state, endpoint));
        let state = &mut *state;
        let hub = state.rdma.hubs.get_mut(&self.id).expect("it is held");
        hub.check_known(&mut buffer);
        let shared = hub.config.shared_receives;
        let Some(qp) = qp else {
            assert!(shared > 0, "there is no shared queue");
            if hub.shared_out == shared {
                return Err((buffer, io::ErrorKind::OutOfMemory.into()));
            }
            hub.shared_out += 1;
            hub.staged.push_back(buffer);
            return Ok(());
        };
        assert_eq!(shared, 0, "receives are posted to the shared queue");
        let at = state.rdma.qps.get_mut(&qp).expect("it is attached");
        if at.receives_out == at.depths.receive {
            return Err((buffer, io::ErrorKind::OutOfMemory.into()));
        }
        at.receives_out += 1;
        at.staged_receives.push_back(buffer);
        Ok(())
    }

    fn room(&self, endpoint: EndpointId) -> u32 {
        let state = self.sim.lock();
        let at = &state.rdma.qps[&self.qp(&state, endpoint)];
        at.depths.send - at.requests_out
    }

    fn post(&mut self, endpoint: EndpointId, mut post: Post) -> Result<(), Box<Refused>> {
        let mut state = self.sim.lock();
        let qp = self.qp(&state, endpoint);
        let state = &mut *state;
        let hub = &state.rdma.hubs[&self.id];
        assert!(post.requests() > 0, "a post does something");
        post.data.buffers_mut().iter_mut().for_each(|buffer| hub.check_known(buffer));
        if let Some(message) = &mut post.message {
            assert!(!message.head.is_empty(), "a message has a head");
            hub.check_known(&mut message.head);
        }
        let at = state.rdma.qps.get_mut(&qp).expect("it is attached");
        check_pieces(&post, at.depths.send_pieces);
        if at.requests_out + post.requests() > at.depths.send {
            return Err(Box::new(Refused { post, error: None }));
        }
        at.requests_out += post.requests();
        at.reads_out += reads(&post);
        assert!(at.reads_out <= at.initiator_depth || at.life == Life::Failed, "more READs than were agreed");
        at.staged.push_back(post);
        Ok(())
    }

    fn flush(&mut self) {
        self.ring(true);
    }

    fn doorbells(&self) -> Doorbells {
        self.sim.lock().rdma.hubs[&self.id].doorbells
    }

    fn poll(&mut self, out: &mut Vec<Done>) -> io::Result<usize> {
        self.ring(false);
        let mut state = self.sim.lock();
        let state = &mut *state;
        let most = 1 + state.rng.below(32) as usize;
        let mut count = 0;
        while count < most
            && let Some((qp, work)) = state.rdma.hubs.get_mut(&self.id).and_then(|hub| hub.cq.pop_front())
        {
            out.push(self.done(state, qp, work));
            count += 1;
        }
        Ok(count)
    }

    fn events(&mut self, out: &mut Vec<HubEvent>) -> io::Result<()> {
        let mut state = self.sim.lock();
        out.extend(state.rdma.hubs.get_mut(&self.id).expect("it is held").events.drain(..));
        Ok(())
    }

    fn arm(&mut self) -> io::Result<()> {
        let mut state = self.sim.lock();
        let hub = state.rdma.hubs.get_mut(&self.id).expect("it is held");
        assert!(hub.config.announce, "a hub that does not announce");
        hub.signalled = false;
        hub.armed = true;
        Ok(())
    }

    fn source(&self) -> Source {
        Source::Virtual(self.id)
    }

    fn expose(&mut self, data: Buffers) -> Result<ExposedId, (Buffers, io::Error)> {
        let mut state = self.sim.lock();
        let rdma = &mut state.rdma;
        let id = rdma.exposed.last_key_value().map_or(0, |(id, _)| id + 1);
        let (mut offset, mut remotes) = (0, Vec::new());
        for segment in data.segments().filter(|segment| !segment.is_empty()) {
            rdma.next_key += 1;
            let (key, bytes) = (rdma.next_key, segment.len() as u32);
            rdma.keys.insert(key, (id, offset, bytes));
            remotes.push(Remote { address: base_of(key), bytes, key });
            offset += bytes;
        }
        let keys = remotes.iter().map(|remote| remote.key).collect();
        rdma.exposed.insert(id, Exposed { hub: self.id, data, keys });
        self.lists.insert(id, remotes);
        Ok(ExposedId(id))
    }

    fn exposed(&self, id: ExposedId) -> &[Remote] {
        &self.lists[&id.0]
    }

    fn reclaim(&mut self, id: ExposedId) -> Buffers {
        self.lists.remove(&id.0);
        let mut state = self.sim.lock();
        let exposed = state.rdma.exposed.remove(&id.0).expect("it was reclaimed");
        for key in exposed.keys {
            state.rdma.keys.remove(&key);
        }
        exposed.data
    }
}

/// No request of the chain has more pieces than a request may have.
fn check_pieces(post: &Post, most: u32) {
    let mut at = post.start as usize;
    for transfer in &post.transfers {
        assert!(transfer.bytes > 0, "a transfer moves something");
        let (end, mut pieces) = (at + transfer.bytes as usize, 0);
        assert!(end <= post.data.len(), "transfers are longer than the data");
        while at < end {
            at += post.data.slice_at(at).len().min(end - at);
            pieces += 1;
        }
        assert!(pieces <= most, "{pieces} pieces in one request");
    }
}

impl Drop for SimHub {
    fn drop(&mut self) {
        let endpoints: Vec<usize> = {
            let state = self.sim.lock();
            let of = &state.rdma.hubs[&self.id].endpoints;
            of.iter().enumerate().filter_map(|(n, qp)| qp.map(|_| n)).collect()
        };
        for endpoint in endpoints {
            self.detach(EndpointId(endpoint), &mut drop);
        }
        let mut state = self.sim.lock();
        state.parks.forget(self.id);
        let hub = state.rdma.hubs.remove(&self.id);
        let (mine, others): (BTreeMap<_, _>, BTreeMap<_, _>) =
            std::mem::take(&mut state.rdma.exposed).into_iter().partition(|(_, exposed)| exposed.hub == self.id);
        state.rdma.exposed = others;
        for key in mine.values().flat_map(|exposed| &exposed.keys) {
            state.rdma.keys.remove(key);
        }
        drop(state);
        drop((hub, mine));
    }
}
