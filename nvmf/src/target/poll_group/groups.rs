//! The poll groups of all reactors, as the control plane reaches them.

use std::sync::Arc;

use futures_util::future::{BoxFuture, join_all};
use reactor::{Context, Instant, ReactorHandle, ReactorId};

use super::moving::MoveError;
use super::{PollGroup, Role, listener_key};
use crate::target::system::{PollGroupStats, QpairInfo, QpairState, QueueName, Reactors, Stopping};
use crate::target::transport::Acceptor;
use crate::target::view::{ListenAddress, TargetView};

/// The poll groups of a group of reactors, on each of which [`PollGroup::install`] was called.
#[derive(Clone, Debug)]
pub struct PollGroups {
    reactors: Vec<ReactorHandle>,
}

impl PollGroups {
    /// The poll groups of `reactors`.
    pub fn new(reactors: Vec<ReactorHandle>) -> PollGroups {
        PollGroups { reactors }
    }

    fn on_all<R: Send + 'static>(
        &self,
        work: impl Fn(&mut Context) -> R + Send + Clone + 'static,
    ) -> BoxFuture<'static, Result<Vec<R>, Stopping>> {
        let calls: Vec<_> = self.reactors.iter().map(|reactor| reactor.call(work.clone())).collect();
        Box::pin(async move { Ok(join_all(calls).await.into_iter().collect::<Result<Vec<R>, _>>()?) })
    }
}

impl Reactors for PollGroups {
    fn apply(&self, view: Arc<TargetView>) -> BoxFuture<'static, Result<(), Stopping>> {
        let calls: Vec<_> = self
            .reactors
            .iter()
            .map(|reactor| {
                let view = Arc::clone(&view);
                reactor.call_deferred(move |cx, reply| PollGroup::of(cx).borrow_mut().apply(cx, view, reply))
            })
            .collect();
        Box::pin(async move { Ok(join_all(calls).await.into_iter().collect::<Result<(), _>>()?) })
    }

    fn add_listener(
        &self,
        address: ListenAddress,
        acceptor: Box<dyn Acceptor>,
    ) -> BoxFuture<'static, Result<(), Stopping>> {
        // Connections are spread when they are accepted, so one reactor may accept for all.
        let call = self.reactors[0].call(move |cx| {
            let group = PollGroup::of(cx);
            group.borrow_mut().add_listener(cx, address, acceptor);
        });
        Box::pin(async move { Ok(call.await?) })
    }

    fn remove_listener(&self, address: &ListenAddress) -> BoxFuture<'static, Result<(), Stopping>> {
        let address = address.clone();
        let call = self.reactors[0].call(move |cx| PollGroup::of(cx).borrow_mut().remove_listener(cx, &address));
        Box::pin(async move { Ok(call.await?) })
    }

    fn qpairs(&self) -> BoxFuture<'static, Result<Vec<QpairInfo>, Stopping>> {
        let all = self.on_all(|cx| PollGroup::of(cx).borrow().qpair_infos());
        Box::pin(async move { Ok(all.await?.into_iter().flatten().collect()) })
    }

    fn stats(&self) -> BoxFuture<'static, Result<Vec<PollGroupStats>, Stopping>> {
        self.on_all(|cx| PollGroup::of(cx).borrow().stats())
    }

    fn loads(&self, now: Instant) -> Vec<u32> {
        self.reactors.iter().map(|reactor| reactor.load(now)).collect()
    }

    fn move_qpair(
        &self,
        name: QueueName,
        from: ReactorId,
        to: ReactorId,
    ) -> BoxFuture<'static, Result<Result<(), MoveError>, Stopping>> {
        let known = |id: ReactorId| self.reactors.get(id.0 as usize);
        let (Some(from), Some(_)) = (known(from), known(to)) else {
            return Box::pin(std::future::ready(Ok(Err(MoveError::NoReactor))));
        };
        let moved = from.call_deferred(move |cx, reply| {
            PollGroup::of(cx).borrow_mut().move_qpair(cx, &name, to, reply);
        });
        Box::pin(async move { Ok(moved.await?) })
    }
}

impl PollGroup {
    fn add_listener(&mut self, cx: &mut Context, address: ListenAddress, mut acceptor: Box<dyn Acceptor>) {
        let key = self.listeners.vacant_key();
        if let Err(error) = acceptor.watch(cx, self.poller, listener_key(key)) {
            tracing::error!(address = %address.socket_addr(), %error, "a listener cannot be watched; it accepts nothing");
        }
        self.listeners.insert((address, acceptor));
        self.accepting = true;
    }

    fn remove_listener(&mut self, cx: &mut Context, address: &ListenAddress) {
        let key = self.listeners.iter().find(|(_, (known, _))| known == address).map(|(key, _)| key);
        if let Some(key) = key {
            let (_, mut acceptor) = self.listeners.remove(key);
            acceptor.close(cx);
        }
    }

    fn qpair_infos(&self) -> Vec<QpairInfo> {
        let info = |(_, qp): (usize, &super::Qp)| {
            let (shared, qid, units) = match &qp.role {
                Role::New => return None,
                Role::Admin(admin) => (&admin.shared, 0, 0),
                Role::Io(io) => (&io.shared, io.qid, io.units),
            };
            Some(QpairInfo {
                cntlid: shared.cntlid,
                qid,
                state: if qp.closed { QpairState::Deactivating } else { QpairState::Enabled },
                reactor: self.reactor,
                subnqn: shared.subnqn.clone(),
                hostnqn: shared.hostnqn.clone(),
                hostid: shared.hostid,
                listen: qp.listener.clone(),
                peer: qp.qpair.peer_addr(),
                is_movable: qid > 0 && !qp.closed && qp.qpair.is_movable(),
                units,
            })
        };
        self.qpairs.iter().filter_map(info).collect()
    }
}
