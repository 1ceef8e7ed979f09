//! Moving to a new view, and draining what is gone.

use std::sync::Arc;

use bdev::core::IoRuntime;
use reactor::Context;
use reactor::reactor::Reply;

use super::{LocalNamespace, PollGroup, Role};
use crate::target::shared::ControllerShared;
use crate::target::view::{ListenAddress, SubsystemView, TargetView};

/// A change that was asked for and waits until nothing of the old view is in use.
pub(super) struct Applying {
    /// Namespaces that drain, by key and incarnation.
    namespaces: Vec<(usize, u64)>,
    /// Queue pairs that close, by key and generation.
    qpairs: Vec<(usize, u32)>,
    reply: Option<Reply<()>>,
}

impl PollGroup {
    /// Moves to `view`; `reply` is answered when nothing of the old one is in use any more on this reactor.
    pub(super) fn apply(&mut self, cx: &mut Context, view: Arc<TargetView>, reply: Reply<()>) {
        if view.generation <= self.view.generation && self.view.generation > 0 {
            // An older view overtaken by a newer one: what it asked for has been done.
            return reply.send(());
        }
        self.view = view;
        let runtime = std::rc::Rc::clone(&self.runtime);
        let retired = self.update_subsystems(&mut runtime.borrow_mut());
        self.end_refused();
        let view = Arc::clone(&self.view);
        let admins: Vec<usize> = self.admin_queues().collect();
        for index in admins {
            if let Role::Admin(admin) = &mut self.qpairs[index].role {
                admin.controller.target_changed(Arc::clone(&view));
            }
            self.send_events(index);
        }
        let qpairs = self.ended.iter().map(|&(index, _)| (index, self.qpairs[index].generation)).collect();
        let namespaces = retired;
        self.applying.push(Applying { namespaces, qpairs, reply: Some(reply) });
        self.close_ended(cx);
        self.finish_applying();
        self.admit_waiting(cx);
    }

    /// Brings the namespaces of the subsystems in use here up to the view. Returns those that it takes away, by key and
    /// incarnation.
    fn update_subsystems(&mut self, runtime: &mut IoRuntime) -> Vec<(usize, u64)> {
        let mut retired = Vec::new();
        let view = Arc::clone(&self.view);
        let keys: Vec<usize> = self.subsystems.iter().map(|(key, _)| key).collect();
        for key in keys {
            let local = &mut self.subsystems[key];
            let current = view.subsystems.get(&local.nqn).filter(|new| new.incarnation == local.incarnation);
            local.gone = current.is_none();
            if local.gone {
                self.subsystem_by_nqn.retain(|_, known| *known != key);
            }
            if let Some(new) = current {
                local.ana_reporting = new.ana_reporting;
            }
            for slot in 0..self.subsystems[key].table.len() {
                let Some(namespace) = self.subsystems[key].table[slot] else { continue };
                let new = current.and_then(|new| new.namespaces.get(&(slot as u32 + 1)));
                match new.filter(|new| new.incarnation == self.namespaces[namespace].view.incarnation) {
                    Some(new) => self.namespaces[namespace].view = Arc::clone(new),
                    None => {
                        self.subsystems[key].table[slot] = None;
                        retired.push((namespace, self.namespaces[namespace].view.incarnation));
                        self.retire_namespace(runtime, namespace);
                    }
                }
            }
            if let Some(new) = current {
                self.add_namespaces(key, new);
            }
        }
        retired
    }

    /// Enters the namespaces of `view` that the subsystem does not have here yet. Channels open with their first command.
    pub(super) fn add_namespaces(&mut self, key: usize, view: &Arc<SubsystemView>) {
        for (&nsid, namespace) in &view.namespaces {
            let table = &mut self.subsystems[key].table;
            let slot = nsid as usize - 1;
            if table.len() <= slot {
                table.resize(slot + 1, None);
            }
            if table[slot].is_none() {
                let local = LocalNamespace { view: Arc::clone(namespace), channel: None, outstanding: 0, gone: false };
                table[slot] = Some(self.namespaces.insert(local));
            }
        }
    }

    /// A namespace is out of the table: its channel goes back when the last operation has come back.
    pub(super) fn retire_namespace(&mut self, runtime: &mut IoRuntime, key: usize) {
        let namespace = &mut self.namespaces[key];
        namespace.gone = true;
        if namespace.outstanding == 0 {
            self.forget_namespace(runtime, key);
        }
    }

    pub(super) fn forget_namespace(&mut self, runtime: &mut IoRuntime, key: usize) {
        let namespace = self.namespaces.remove(key);
        if let Some(channel) = namespace.channel {
            runtime.put_channel(channel);
        }
    }

    /// Ends the queue pairs that the view no longer allows, and gives the others their listeners in it.
    fn end_refused(&mut self) {
        for (index, qp) in &mut self.qpairs {
            if let Role::Io(io) = &qp.role {
                let subsystem = self.view.subsystems.get(&io.shared.subnqn);
                qp.entrance = subsystem.and_then(|view| view.listener(&qp.listener)).cloned();
            }
            if qp.closed {
                continue;
            }
            let shared = match &qp.role {
                Role::New => continue,
                Role::Admin(admin) => &admin.shared,
                Role::Io(io) => &io.shared,
            };
            if let Some(why) = refused_by(&self.view, shared, &qp.listener) {
                self.ended.push((index, why.into()));
            }
        }
    }

    /// Answers the changes of which nothing old is left.
    pub(super) fn finish_applying(&mut self) {
        if self.applying.is_empty() {
            return;
        }
        let (namespaces, qpairs) = (&self.namespaces, &self.qpairs);
        for change in &mut self.applying {
            change.namespaces.retain(|&(key, incarnation)| {
                namespaces.get(key).is_some_and(|ns| ns.gone && ns.view.incarnation == incarnation)
            });
            change
                .qpairs
                .retain(|&(index, generation)| qpairs.get(index).is_some_and(|qp| qp.generation == generation));
            if change.namespaces.is_empty()
                && change.qpairs.is_empty()
                && let Some(reply) = change.reply.take()
            {
                reply.send(());
            }
        }
        self.applying.retain(|change| change.reply.is_some());
    }
}

/// Why a view no longer allows the queues of a controller that came in at `listener`, if it does not.
pub(super) fn refused_by(
    view: &TargetView,
    shared: &ControllerShared,
    listener: &ListenAddress,
) -> Option<&'static str> {
    if shared.incarnation == 0 {
        // Discovery is open to all, on every listener.
        return None;
    }
    let subsystem = view.subsystems.get(&shared.subnqn);
    match subsystem.filter(|view| view.incarnation == shared.incarnation) {
        None => Some("the subsystem was deleted"),
        Some(view) if !view.allows(&shared.hostnqn) => Some("the host is no longer allowed"),
        Some(view) if view.listener(listener).is_none() => Some("the listener was removed from the subsystem"),
        Some(_) => None,
    }
}
