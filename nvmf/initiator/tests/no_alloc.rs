//! No memory is taken for an I/O on a remote bdev once it runs, whatever the operation: neither by the bdev, nor by the
//! initiator, nor by the target that answers it on the same thread, nor by the reactors below. The clock is virtual and moves a
//! microsecond a step, so that nothing that comes by time, as keep-alives do, comes meanwhile.

mod common;

use std::sync::Arc;

use bdev::conformance::WorldConfig;
use bdev::core::{BdevEvent, Completion, IoRequest, Op};
use bdev::modules::malloc::{self, MallocOptions};
use common::{NQN, Pair, attach};
use nvmf::target::model::NewNamespace;

#[global_allocator]
static ALLOCATOR: allocations::Counting = allocations::Counting;

const BLOCK: usize = 4096;
const DEPTH: u64 = 32;

#[test]
fn io_allocates_nothing_in_the_steady_state() {
    let mut pair = Pair::new(WorldConfig::default());
    let socket = {
        let mut target = pair.target.borrow_mut();
        let (bdevs, nvmf) = (Arc::clone(&target.bdevs), Arc::clone(&target.nvmf));
        target.world.block_on(async move {
            malloc::create(&bdevs, "base", None, MallocOptions::new(BLOCK as u32, 4096)).await.expect("a bdev");
            nvmf.add_namespace(NQN, NewNamespace::default(), "base").await.expect("a namespace");
        });
        target.listen()
    };
    let initiator = Arc::clone(&pair.initiator);
    let names = pair.host.block_on(async move { initiator.attach(attach("N", socket)).await }).expect("attached");
    let nothing = Arc::new(|_: BdevEvent| {});
    let descriptor = pair.host.system().open(&names[0], true, "a test", nothing).expect("it is there");
    let runtime = pair.host.runtime(0);
    let (client, channel) = {
        let mut runtime = runtime.borrow_mut();
        (runtime.add_client(), runtime.get_channel(descriptor.bdev()).expect("a channel"))
    };
    let mut done: Vec<Completion> = Vec::with_capacity(2 * DEPTH as usize);
    let mut round = |blocks: u64, op: Op| {
        let before = allocations::count();
        for user in 0..DEPTH {
            let mut runtime = runtime.borrow_mut();
            let bufs = runtime.pool().alloc(op.payload_bytes(blocks, BLOCK as u32) as usize).expect("there is memory");
            runtime.submit(channel, client, IoRequest { op, lba: user * blocks, blocks, bufs, user });
        }
        let mut left = DEPTH;
        while left > 0 {
            pair.host.step();
            runtime.borrow_mut().take_completions(client, &mut done);
            for completion in done.drain(..) {
                assert!(completion.status().is_success());
                left -= 1;
                runtime.borrow_mut().recycle(completion);
            }
        }
        allocations::count() - before
    };
    let mut noise: Vec<(Op, u64, u64)> = Vec::new();
    for turn in 0..30 {
        for blocks in [1, 4] {
            // Those with lists of ranges need memory for them, too. Compare-and-write is left out: the target's device has
            // none, and locks across its reactors take memory.
            for op in [
                Op::Read,
                Op::Write { fua: false },
                Op::WriteZeroes { fua: false, may_unmap: false },
                Op::Unmap,
                Op::Copy { source_lba: 2048 },
            ] {
                let allocations = round(blocks, op);
                // Queues grow to their working size in the first rounds.
                if turn >= 10 {
                    noise.extend((allocations > 0).then_some((op, blocks, allocations)));
                }
            }
        }
    }
    assert!(noise.is_empty(), "rounds of {DEPTH} that took memory: operation, blocks, how often: {noise:?}");
    let mut runtime = runtime.borrow_mut();
    runtime.put_channel(channel);
    runtime.remove_client(client);
}
