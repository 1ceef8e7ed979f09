//! The memory of the NVMe/TCP machine: nothing for an I/O once it runs, whatever the kind of I/O, and never more in all
//! than its configuration says.

use reactor::buffer::{BufferPool, PoolConfig};
use ringstone_nvmf::spec::opcode::io;
use ringstone_nvmf::spec::{Cqe, Sqe};
use ringstone_nvmf::tcp::wire_client::{TargetPdu, WireClient, command, read, write, write_in_capsule};
use ringstone_nvmf::tcp::{Config, Connection, Event, Framing};
use std::io::IoSlice;

#[global_allocator]
static ALLOCATOR: allocations::Counting = allocations::Counting;

struct Target {
    conn: Connection,
    pool: BufferPool,
    /// Everything that was sent, so that the host can look at it afterwards.
    sent: Vec<u8>,
}

impl Target {
    /// One turn: reads all of `stream`, executes what comes, sends all there is. Returns the commands executed.
    fn turn(&mut self, stream: &[u8]) -> usize {
        self.sent.clear();
        let pool = &mut self.pool;
        let used = self.conn.handle_input(stream, &mut |len, _| pool.alloc(len as usize)).unwrap();
        assert_eq!(used, stream.len());
        let mut done = 0;
        while let Some(event) = self.conn.poll_event() {
            let Event::Command { slot, sqe, data, .. } = event else { panic!("{event:?}") };
            let payload = if sqe.opcode == io::READ {
                Some(data)
            } else {
                pool.put(data);
                None
            };
            self.conn.complete(slot, Cqe::success(0), payload);
            done += 1;
        }
        while self.conn.wants_output() {
            let mut iov = [IoSlice::new(&[]); 32];
            let n = self.conn.poll_output(&mut iov);
            let before = self.sent.len();
            for slice in &iov[..n] {
                self.sent.extend_from_slice(slice);
            }
            self.conn.sent(self.sent.len() - before, &mut |data| pool.put(data));
        }
        done
    }
}

fn capsules(host: &WireClient, commands: impl Iterator<Item = (Sqe, Vec<u8>)>) -> Vec<u8> {
    commands.flat_map(|(sqe, data)| host.capsule(&sqe, &data)).collect()
}

fn answer(host: &WireClient, r2ts: &[TargetPdu]) -> Vec<u8> {
    let answers = r2ts.iter().map(|pdu| match *pdu {
        TargetPdu::R2t { cid, ttag, offset, len } => {
            host.answer_r2t(cid, ttag, offset, len, &vec![9; len as usize], 32_768)
        }
        ref other => panic!("{other:?}"),
    });
    answers.flatten().collect()
}

#[test]
fn steady_state_allocates_nothing() {
    for (digests, sq_flow_control) in [(false, true), (false, false), (true, true)] {
        let mut host = WireClient::new();
        let pool = BufferPool::new(PoolConfig { small: 256, medium: 64, large: 64 }).unwrap();
        let mut target = Target { conn: Connection::new(Config::default()), pool, sent: Vec::with_capacity(4 << 20) };
        let icreq = host.icreq(digests, digests, 0, 0);
        target.turn(&icreq);
        host.receive(&target.sent).unwrap();
        target.conn.set_queue(128, sq_flow_control, true);

        let batches = [
            capsules(&host, (0..128).map(|cid| (read(cid, 1, 0, 8, 4096), vec![]))),
            capsules(&host, (0..16).map(|cid| (read(cid, 1, 0, 256, 131_072), vec![]))),
            capsules(&host, (0..128).map(|cid| (write_in_capsule(cid, 1, 0, 8, 4096), vec![7; 4096]))),
            capsules(&host, (0..128).map(|cid| (command(io::FLUSH, cid, 1), vec![]))),
        ];
        let writes = capsules(&host, (0..16).map(|cid| (write(cid, 1, 0, 256, 131_072), vec![])));
        assert_eq!(target.turn(&writes), 0);
        let r2ts = host.receive(&target.sent).unwrap();
        let data = answer(&host, &r2ts);
        assert_eq!(target.turn(&data), 16);
        host.receive(&target.sent).unwrap();

        for round in 0..20 {
            let before = allocations::count();
            target.turn(&writes);
            let asking = allocations::count() - before;
            let r2ts = host.receive(&target.sent).unwrap();
            let data = answer(&host, &r2ts);
            let before = allocations::count();
            let mut done = target.turn(&data);
            for batch in &batches {
                done += target.turn(batch);
            }
            let allocations = allocations::count() - before + asking;
            assert_eq!(done, 16 + 128 + 16 + 128 + 128);
            // The queues may grow to their working size in the first round, never after it.
            assert!(round == 0 || allocations == 0, "{allocations} allocations for {done} commands");
        }
        assert!(target.pool.is_whole());
    }
}

#[test]
fn a_connection_stays_within_its_memory() {
    let config = Config { slots: 128, ..Config::default() };
    let limit = config.memory_bytes() - size_of::<Connection>();
    let mut pool = BufferPool::new(PoolConfig { small: 2000, medium: 1, large: 1 }).unwrap();
    // The lists of payload are the thread's, like the payload itself, and not the connection's.
    let lists: Vec<_> = (0..2000).map(|_| pool.alloc(512).unwrap()).collect();
    lists.into_iter().for_each(|list| pool.put(list));
    let before = allocations::bytes();
    let mut conn = Connection::new(config);
    let held = || (allocations::bytes() - before) as usize;
    let mut host = WireClient::new();
    let icreq = host.icreq(true, true, 31, 0);
    conn.handle_input(&icreq, &mut |_, _| None).unwrap();
    drop(icreq);
    host.out = Framing { header_digest: true, data_digest: true, pda: 0 };
    assert!(held() <= limit, "{} of {limit} bytes", held());
    // A host that sends commands and never reads an answer.
    conn.set_queue(128, false, true);
    let capsule = host.capsule(&read(1, 1, 0, 1, 8), &[]);
    let capsule_bytes = capsule.capacity();
    while conn.wants_input() {
        let used = conn.handle_input(&capsule, &mut |len, _| pool.alloc(len as usize)).unwrap();
        assert!(used == capsule.len() || used == 0);
        while let Some(Event::Command { slot, data, .. }) = conn.poll_event() {
            conn.complete(slot, Cqe::success(0), Some(data));
        }
    }
    assert!(conn.pending_output_bytes() > 128 * 24);
    assert!(held() - capsule_bytes <= limit, "{} of {limit} bytes", held() - capsule_bytes);
    assert!(limit <= 80 * 1024, "{limit} bytes for a queue of 128");
}
