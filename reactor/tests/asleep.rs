//! A reactor that sleeps whenever it can is woken by file completions, with either engine, over and over.

use std::any::Any;
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};

use ringstone_reactor::file::{
    EngineChoice, Errno, FileDone, FileEngine, FileOp, FileRequest, FileSlot, OpenOptions, Payload,
};
use ringstone_reactor::platform::OsPlatform;
use ringstone_reactor::reactor::{PollPolicy, ReactorConfig, ReactorThreads};
use ringstone_reactor::{BufferPool, Buffers, Context, Platform, Poller, Progress, ReactorId, Schedule};

struct Answer {
    memory: Buffers,
    to: Sender<Result<Vec<u8>, Errno>>,
}

impl Payload for Answer {
    fn buffers(&mut self) -> &mut Buffers {
        &mut self.memory
    }
    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}

type Requests = Arc<Mutex<Vec<(FileOp, u64, Answer)>>>;

/// Hands over what was asked for and answers what has ended.
struct Disk {
    engine: Box<dyn FileEngine>,
    slot: FileSlot,
    requests: Requests,
    done: Vec<FileDone>,
    _pool: BufferPool,
}

impl Poller for Disk {
    fn poll(&mut self, _: &mut Context) -> Progress {
        for (op, offset, answer) in self.requests.lock().unwrap().drain(..) {
            self.engine.submit(FileRequest { slot: self.slot, op, offset, payload: Box::new(answer), token: 0 });
        }
        self.engine.flush();
        let n = self.engine.reap(&mut self.done);
        for done in self.done.drain(..) {
            let answer = done.payload.into_any().downcast::<Answer>().unwrap();
            answer.to.send(done.result.map(|()| answer.memory.to_vec())).unwrap();
        }
        Progress::from_busy(n > 0)
    }
}

#[test]
fn file_completions_wake_a_sleeping_reactor() {
    for choice in [EngineChoice::Threads, EngineChoice::Auto] {
        let platform: Arc<dyn Platform> = Arc::new(OsPlatform::new(choice));
        let path: PathBuf = std::env::temp_dir().join(format!("ringstone-asleep-{}", std::process::id()));
        platform.files().create(&path, 1 << 20).unwrap();
        let file = platform.files().open(&path, OpenOptions { read_only: false, direct: true }).unwrap();
        let requests = Requests::default();
        let queue = Arc::clone(&requests);
        let setup = move |cx: &mut Context| -> io::Result<()> {
            let pool = BufferPool::new(Default::default())?;
            let platform = Arc::clone(cx.platform());
            let mut engine = platform.file_engine(pool.region(), cx.parker())?;
            let slot = engine.attach(Arc::clone(&file))?;
            let disk = Disk { engine, slot, requests: Arc::clone(&queue), done: Vec::new(), _pool: pool };
            cx.add_poller("disk", Schedule::Active, Box::new(disk));
            Ok(())
        };
        let config = ReactorConfig { id: ReactorId(0), core: None, policy: PollPolicy::Sleep };
        let reactors = ReactorThreads::start(&platform, &[config], setup).unwrap();
        for i in 0..300u64 {
            let (to, from) = channel();
            let (op, offset) = match i % 3 {
                0 => (FileOp::Write { durable: i % 2 == 0 }, i / 3 * 4096),
                1 => (FileOp::Read, i / 3 * 4096),
                _ => (FileOp::Sync, 0),
            };
            let mut memory = Buffers::heap(if op == FileOp::Sync { 0 } else { 4096 });
            memory.fill(if i % 3 == 0 { (i / 3) as u8 | 1 } else { 0 });
            requests.lock().unwrap().push((op, offset, Answer { memory, to }));
            // The message's only purpose is to wake the reactor.
            reactors.handles()[0].send(Box::new(|_| ())).unwrap();
            let bytes = from.recv().unwrap().unwrap();
            let want = if i % 3 == 2 { Vec::new() } else { vec![(i / 3) as u8 | 1; 4096] };
            assert!(bytes == want, "operation {i}");
        }
        reactors.stop().unwrap();
        std::fs::remove_file(&path).unwrap();
    }
}
