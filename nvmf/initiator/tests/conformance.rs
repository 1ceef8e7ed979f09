//! A remote namespace goes through the conformance suite of bdevs.

mod common;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use bdev::conformance::{Spec, Subject, suite};
use bdev::core::{BdevError, BdevSystem};
use bdev::modules::malloc::{self, MallocOptions};
use common::{Pair, Target, attach, on_target};
use futures_util::future::BoxFuture;
use initiator::InitiatorSystem;
use nvmf::target::model::NewNamespace;

/// The target and the host of a world.
type Sides = (Rc<RefCell<Target>>, Arc<InitiatorSystem>);

thread_local! {
    /// The two sides of the world at hand.
    static TARGET: RefCell<Option<Sides>> = const { RefCell::new(None) };
    static MADE: Cell<u32> = const { Cell::new(0) };
}

const SUBJECT: Subject =
    Subject { label: "nvme", block_sizes: &[512, 4096], forgets: false, make, resize: Some(resize) };

/// The name of the namespace's bdev on the target.
fn base(spec: &Spec) -> String {
    format!("{}-base", spec.name)
}

fn make(_: Arc<BdevSystem>, spec: Spec) -> BoxFuture<'static, Result<Vec<String>, BdevError>> {
    // What is not Send stays here: the tasks are started at once, and only waited for later.
    let (made, initiator, number) = TARGET.with_borrow_mut(|both| {
        let (target, initiator) = both.as_mut().expect("a world");
        let mut target = target.borrow_mut();
        let (bdevs, nvmf, base) = (Arc::clone(&target.bdevs), Arc::clone(&target.nvmf), base(&spec));
        let (block_size, blocks) = (spec.block_size, spec.num_blocks);
        let made = target.world.start(async move {
            if bdevs.get(&base).is_ok() {
                bdevs.remove(&base).await?;
            }
            malloc::create(&bdevs, &base, None, MallocOptions::new(block_size, blocks)).await?;
            nvmf.add_namespace(common::NQN, NewNamespace::default(), &base).await.expect("a namespace");
            Ok::<(), BdevError>(())
        });
        MADE.set(MADE.get() + 1);
        (made, Arc::clone(initiator), MADE.get())
    });
    let socket = TARGET.with_borrow(|both| {
        let (target, _) = both.as_ref().expect("a world");
        let view = target.borrow().nvmf.view();
        view.subsystems[common::NQN].listeners[0].address.socket_addr()
    });
    Box::pin(async move {
        for group in initiator.groups() {
            initiator.detach(&group.name, |_| true).await.expect("it can be detached");
        }
        on_target(made).await?;
        let names = initiator.attach(attach(&format!("Nvme{number}"), socket)).await.expect("it can be attached");
        Ok(names)
    })
}

fn resize(system: Arc<BdevSystem>, spec: Spec, blocks: u64) -> BoxFuture<'static, Result<(), BdevError>> {
    let (resized, name) = TARGET.with_borrow_mut(|both| {
        let (target, initiator) = both.as_mut().expect("a world");
        let mut target = target.borrow_mut();
        let (bdevs, base) = (Arc::clone(&target.bdevs), base(&spec));
        let resized = target.world.start(async move { malloc::resize(&bdevs, &base, blocks).await });
        (resized, initiator.groups()[0].disks()[0].name.clone())
    });
    Box::pin(async move {
        on_target(resized).await?;
        // The event that says so is on its way.
        std::future::poll_fn(|_| match system.get(&name) {
            Ok(info) if info.device().geometry().num_blocks != blocks => std::task::Poll::Pending,
            _ => std::task::Poll::Ready(()),
        })
        .await;
        Ok(())
    })
}

#[test]
fn remote_namespaces_conform() {
    let folder = std::env::temp_dir();
    let keep: RefCell<Vec<Arc<InitiatorSystem>>> = RefCell::default();
    suite(SUBJECT, 0xfeed_beef, &folder, |config| {
        let Pair { host, initiator, target, .. } = Pair::new(config);
        target.borrow_mut().listen();
        keep.borrow_mut().push(Arc::clone(&initiator));
        TARGET.set(Some((target, initiator)));
        host
    });
    TARGET.set(None);
}
