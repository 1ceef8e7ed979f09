//! Neither file engine allocates once it is running: a counting allocator watches thousands of operations.

use std::alloc::{GlobalAlloc, Layout, System};
use std::any::Any;
use std::sync::atomic::{AtomicUsize, Ordering};

use ringstone_reactor::file::os::OsFiles;
use ringstone_reactor::file::{
    EngineChoice, FileDone, FileEngine, FileOp, FileRequest, FileSlot, Files, OpenOptions, Payload, os_engine,
};
use ringstone_reactor::park::{EpollParker, Parker, Ready};
use ringstone_reactor::{BufferPool, Buffers};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are the ones that are asked for.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Memory(Buffers);

impl Payload for Memory {
    fn buffers(&mut self) -> &mut Buffers {
        &mut self.0
    }
    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}

const DEPTH: usize = 64;

/// Keeps `DEPTH` operations under way until `count` have ended; their payloads go round.
fn run(
    engine: &mut dyn FileEngine,
    slot: FileSlot,
    parker: &mut EpollParker,
    idle: &mut Vec<Box<dyn Payload>>,
    done: &mut Vec<FileDone>,
    ready: &mut Vec<Ready>,
    count: usize,
) {
    let (mut begun, mut ended) = (0, 0);
    while ended < count {
        while begun < count
            && let Some(payload) = idle.pop()
        {
            let op = match begun % 16 {
                0 => FileOp::WriteZeroes { len: 4096, may_unmap: true },
                1 => FileOp::Sync,
                n if n % 2 == 0 => FileOp::Read,
                _ => FileOp::Write { durable: false },
            };
            engine.submit(FileRequest { slot, op, offset: (begun % 128) as u64 * 32_768, payload, token: 0 });
            begun += 1;
        }
        engine.flush();
        if engine.reap(done) == 0 {
            ready.clear();
            parker.wait(None, ready).unwrap();
        }
        for end in done.drain(..) {
            assert_eq!(end.result, Ok(()));
            idle.push(end.payload);
            ended += 1;
        }
    }
}

#[test]
fn a_running_engine_allocates_nothing() {
    let name = format!("ringstone-steady-{}", std::process::id());
    let path = std::env::temp_dir().join(name);
    OsFiles.create(&path, 8 << 20).unwrap();
    for choice in [EngineChoice::Threads, EngineChoice::Auto] {
        let mut pool = BufferPool::new(Default::default()).unwrap();
        let mut parker = EpollParker::new().unwrap();
        let mut engine = os_engine(choice, pool.region(), &mut parker).unwrap();
        let slot = engine.attach(OsFiles.open(&path, OpenOptions::default()).unwrap()).unwrap();
        // One in four is scattered over several segments.
        let sizes = [4096, 16_384, 200_000, 4096];
        let mut idle: Vec<Box<dyn Payload>> = Vec::with_capacity(DEPTH);
        for i in 0..DEPTH {
            idle.push(Box::new(Memory(pool.alloc(sizes[i % 4]).unwrap())));
        }
        let mut done = Vec::with_capacity(DEPTH);
        let mut ready = Vec::with_capacity(128);
        // Lists grow to their working size in the first rounds, wherever the work happens to land; then they stay.
        let allocated = (0..8).map(|_| {
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            run(&mut *engine, slot, &mut parker, &mut idle, &mut done, &mut ready, 2000);
            ALLOCATIONS.load(Ordering::Relaxed) - before
        });
        let allocated: Vec<_> = allocated.collect();
        assert!(allocated[1..].contains(&0), "{}: allocations a round: {allocated:?}", engine.mode());
        engine.detach(slot);
    }
    std::fs::remove_file(&path).unwrap();
}
