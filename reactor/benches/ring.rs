//! Nanoseconds a message through the completion ring and through other queues, with 1, 2 and 4 producers.
//!
//! `cargo bench -p ringstone-reactor --bench ring [ROUNDS]`. A message is as large as a completion (32 bytes). Each
//! producer holds its share of 1024 slots as credit, which the consumer gives back in batches, as the I/O pool does;
//! every queue pays for that alike. After each push the producer looks whether the consumer sleeps, as it must in real
//! use: that takes a fence of its own unless the push is already a sequentially consistent exchange.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crossbeam_queue::{ArrayQueue, SegQueue};
use crossbeam_utils::CachePadded;
use ringstone_reactor::park::{Unpark, Waker};
use ringstone_reactor::ring::{Consumer, Producer, ring};

const SLOTS: usize = 1024;
const BATCH: usize = 32;
const MESSAGES: usize = 400_000;

type Message = [u64; 4];

struct NeverSleeps;

impl Unpark for NeverSleeps {
    fn unpark(&self) {
        unreachable!("the consumer of the benchmark does not sleep");
    }
}

/// One way from several producers to one consumer.
trait Queue {
    type Sender: Clone + Send + 'static;
    type Receiver;
    fn new() -> (Self::Sender, Self::Receiver);
    fn push(sender: &Self::Sender, message: Message, waker: &Waker);
    fn pop(receiver: &mut Self::Receiver, take: impl FnMut(Message)) -> usize;
}

struct Ring;

impl Queue for Ring {
    type Sender = Producer<Message>;
    type Receiver = Consumer<Message>;
    fn new() -> (Self::Sender, Self::Receiver) {
        ring(SLOTS)
    }
    fn push(sender: &Self::Sender, message: Message, waker: &Waker) {
        sender.push(message);
        waker.wake_after_rmw();
    }
    fn pop(receiver: &mut Self::Receiver, take: impl FnMut(Message)) -> usize {
        receiver.pop_batch(BATCH, take)
    }
}

/// Pops up to a batch with `next`.
fn pop_each(mut next: impl FnMut() -> Option<Message>, mut take: impl FnMut(Message)) -> usize {
    (0..BATCH).map_while(|_| next().map(&mut take)).count()
}

struct Array;

impl Queue for Array {
    type Sender = Arc<ArrayQueue<Message>>;
    type Receiver = Arc<ArrayQueue<Message>>;
    fn new() -> (Self::Sender, Self::Receiver) {
        let queue = Arc::new(ArrayQueue::new(SLOTS));
        (Arc::clone(&queue), queue)
    }
    fn push(sender: &Self::Sender, message: Message, waker: &Waker) {
        sender.push(message).expect("there is credit");
        waker.wake();
    }
    fn pop(receiver: &mut Self::Receiver, take: impl FnMut(Message)) -> usize {
        pop_each(|| receiver.pop(), take)
    }
}

struct Segments;

impl Queue for Segments {
    type Sender = Arc<SegQueue<Message>>;
    type Receiver = Arc<SegQueue<Message>>;
    fn new() -> (Self::Sender, Self::Receiver) {
        let queue = Arc::new(SegQueue::new());
        (Arc::clone(&queue), queue)
    }
    fn push(sender: &Self::Sender, message: Message, waker: &Waker) {
        sender.push(message);
        waker.wake();
    }
    fn pop(receiver: &mut Self::Receiver, take: impl FnMut(Message)) -> usize {
        pop_each(|| receiver.pop(), take)
    }
}

struct Channel;

impl Queue for Channel {
    type Sender = crossbeam_channel::Sender<Message>;
    type Receiver = crossbeam_channel::Receiver<Message>;
    fn new() -> (Self::Sender, Self::Receiver) {
        crossbeam_channel::bounded(SLOTS)
    }
    fn push(sender: &Self::Sender, message: Message, waker: &Waker) {
        sender.try_send(message).expect("there is credit");
        waker.wake();
    }
    fn pop(receiver: &mut Self::Receiver, take: impl FnMut(Message)) -> usize {
        pop_each(|| receiver.try_recv().ok(), take)
    }
}

struct StdChannel;

impl Queue for StdChannel {
    type Sender = std::sync::mpsc::Sender<Message>;
    type Receiver = std::sync::mpsc::Receiver<Message>;
    fn new() -> (Self::Sender, Self::Receiver) {
        std::sync::mpsc::channel()
    }
    fn push(sender: &Self::Sender, message: Message, waker: &Waker) {
        sender.send(message).expect("the receiver is there");
        waker.wake();
    }
    fn pop(receiver: &mut Self::Receiver, take: impl FnMut(Message)) -> usize {
        pop_each(|| receiver.try_recv().ok(), take)
    }
}

/// Nanoseconds a message in one round.
fn round<Q: Queue>(producers: usize) -> f64 {
    let (sender, mut receiver) = Q::new();
    let waker = Waker::new(Arc::new(NeverSleeps));
    let taken: Arc<Vec<_>> = Arc::new((0..producers).map(|_| CachePadded::new(AtomicUsize::new(0))).collect());
    let barrier = Arc::new(std::sync::Barrier::new(producers + 1));
    let each = MESSAGES / producers;
    let credit = SLOTS / producers;
    let threads: Vec<_> = (0..producers)
        .map(|p| {
            let (sender, waker) = (sender.clone(), waker.clone());
            let (taken, barrier) = (Arc::clone(&taken), Arc::clone(&barrier));
            std::thread::spawn(move || {
                barrier.wait();
                let mut may_send = credit;
                for i in 0..each {
                    while i == may_send {
                        may_send = taken[p].load(Ordering::Acquire) + credit;
                        if i == may_send {
                            std::thread::yield_now();
                        }
                    }
                    Q::push(&sender, [p as u64, i as u64, 0, 0], &waker);
                }
            })
        })
        .collect();
    let mut got = vec![0usize; producers];
    barrier.wait();
    let start = Instant::now();
    let mut total = 0;
    while total < each * producers {
        let n = Q::pop(&mut receiver, |message| {
            let message = black_box(message);
            got[message[0] as usize] += 1;
        });
        if n == 0 {
            std::thread::yield_now();
            continue;
        }
        total += n;
        for (taken, got) in taken.iter().zip(&got) {
            taken.store(*got, Ordering::Release);
        }
    }
    let spent = start.elapsed();
    threads.into_iter().for_each(|thread| thread.join().expect("a producer ends well"));
    spent.as_nanos() as f64 / total as f64
}

/// Nanoseconds a message with nobody else about: a batch pushed, a batch popped, on one thread.
fn alone<Q: Queue>() -> f64 {
    let (sender, mut receiver) = Q::new();
    let waker = Waker::new(Arc::new(NeverSleeps));
    let start = Instant::now();
    for i in 0..MESSAGES / BATCH {
        for j in 0..BATCH {
            Q::push(&sender, [i as u64, j as u64, 0, 0], &waker);
        }
        let n = Q::pop(&mut receiver, |message| {
            black_box(message);
        });
        assert_eq!(n, BATCH);
    }
    start.elapsed().as_nanos() as f64 / MESSAGES as f64
}

fn show(mut samples: Vec<f64>) -> String {
    samples.sort_by(f64::total_cmp);
    let at = |q: usize| samples[(samples.len() - 1) * q / 4];
    format!("{:5.1} [{:.1} {:.1} {:.1}]", at(2), at(0), at(1), at(3))
}

fn main() {
    // cargo bench passes `--bench` along.
    let rounds = std::env::args().skip(1).find_map(|a| a.parse().ok()).unwrap_or(15usize).max(1);
    type Row = (&'static str, fn() -> f64, fn(usize) -> f64);
    let rows: [Row; 5] = [
        ("ringstone ring", alone::<Ring>, round::<Ring>),
        ("crossbeam ArrayQueue", alone::<Array>, round::<Array>),
        ("crossbeam SegQueue", alone::<Segments>, round::<Segments>),
        ("crossbeam channel", alone::<Channel>, round::<Channel>),
        ("std mpsc", alone::<StdChannel>, round::<StdChannel>),
    ];
    println!("ns a message, median [best, quartiles] of {rounds} rounds of {MESSAGES}");
    println!("{:22}{:>24}{:>24}{:>24}{:>24}", "", "one thread", "1 producer", "2 producers", "4 producers");
    // Rounds of all queues alternate, so that what else the machine does falls on all of them.
    let mut samples = vec![vec![Vec::new(); 4]; rows.len()];
    for _ in 0..rounds {
        for ((_, alone, round), samples) in rows.iter().zip(&mut samples) {
            samples[0].push(alone());
            for (i, producers) in [1, 2, 4].into_iter().enumerate() {
                samples[i + 1].push(round(producers));
            }
        }
    }
    for ((name, ..), samples) in rows.iter().zip(samples) {
        let columns: Vec<_> = samples.into_iter().map(|s| format!("{:>24}", show(s))).collect();
        println!("{name:22}{}", columns.concat());
    }
}
