use super::*;

fn pool() -> BufferPool {
    BufferPool::new(PoolConfig { small: 4, medium: 2, large: 1 }).unwrap()
}

#[test]
fn payloads_fit_the_smallest_class_and_come_home() {
    let mut pool = pool();
    for len in [1, 4096, 4097, 16384, 16385, 131_072] {
        let list = pool.alloc(len).unwrap();
        assert_eq!((list.len(), list.segment_count()), (len, 1));
        assert_eq!(list.slice_at(0).as_ptr() as usize % ALIGNMENT, 0);
        pool.put(list);
        assert!(pool.is_whole());
    }
}

#[test]
fn zeroes_stay_known_until_somebody_may_write() {
    let mut pool = pool();
    let writers: [fn(&mut Buffers); 6] = [
        |list| list.write_at(100, &[1]),
        |list| list.fill(1),
        |list| list.slice_at_mut(5)[0] = 1,
        |list| list.segments_mut().for_each(|segment| segment[0] = 1),
        // SAFETY: the address is of 4096 bytes that are borrowed exclusively.
        |list| unsafe { list.buffers_mut()[0].as_mut_ptr().write(1) },
        // SAFETY: the list is not touched while the view lives.
        |list| unsafe { list.view(10, 20) }.write_at(3, &[1]),
    ];
    for write in writers {
        let mut list = pool.alloc(4096).unwrap();
        list.zero();
        assert!(list.buffers()[0].zeroes);
        pool.put(list);
        let mut list = pool.alloc(4096).unwrap();
        assert!(list.buffers()[0].zeroes, "it is the buffer that came last");
        write(&mut list);
        assert!(list.to_vec().contains(&1) && !list.buffers()[0].zeroes);
        // A part of it does not make the whole of it known.
        list.truncate(200);
        list.zero();
        assert!(!list.buffers()[0].zeroes);
        list.widen();
        list.zero();
        assert_eq!(list.to_vec(), [0; 4096]);
        pool.put(list);
    }
}

#[test]
fn a_payload_larger_than_any_class_is_scattered() {
    let mut pool = pool();
    let mut list = pool.alloc(131_072 + 16_384 + 100).unwrap();
    assert_eq!(list.len(), 131_072 + 16_384 + 100);
    assert!(list.segment_count() >= 2);
    let bytes: Vec<u8> = (0..list.len()).map(|i| i as u8).collect();
    list.write_at(0, &bytes);
    assert_eq!(list.to_vec(), bytes);
    let mut middle = [0; 300];
    list.read_at(131_000, &mut middle);
    assert_eq!(middle[..], bytes[131_000..131_300]);
}

#[test]
fn exhaustion_is_none_and_keeps_nothing() {
    let mut pool = pool();
    let max = pool.max_payload();
    assert!(pool.alloc(max + 1).is_none());
    assert!(pool.is_whole());
    let all = pool.alloc(max).unwrap();
    assert!(pool.alloc(1).is_none());
    pool.put(all);
    assert_eq!(pool.stats()[0].retries, 1);
    assert_eq!(pool.stats().map(|class| class.handed_out), pool.totals.map(|total| total as u64));
    assert!(pool.alloc(1).is_some());
}

#[test]
fn a_buffer_dropped_on_another_thread_comes_home() {
    let mut pool = pool();
    let lists: Vec<_> = (0..4).map(|_| pool.alloc(4096).unwrap()).collect();
    std::thread::spawn(move || drop(lists)).join().unwrap();
    assert!(pool.is_whole());
}

#[test]
fn what_was_dropped_counts_as_free() {
    let mut pool = BufferPool::new(PoolConfig { small: 2, medium: 0, large: 0 }).unwrap();
    let (kept, dropped) = (pool.alloc(4096).unwrap(), pool.alloc(4096).unwrap());
    drop(dropped);
    assert!(pool.has_free(4096));
    assert!(!pool.has_free(4097));
    pool.put(kept);
    assert!(pool.has_free(8192));
}

#[test]
fn buffers_outlive_their_pool() {
    let mut pool = pool();
    let mut list = pool.alloc(4096).unwrap();
    drop(pool);
    list.fill(7);
    assert!(list.to_vec().iter().all(|&b| b == 7));
}

#[test]
fn truncation_sends_whole_buffers_home() {
    let mut pool = pool();
    let mut list = pool.alloc(131_072 + 4096).unwrap();
    list.truncate(10);
    assert_eq!((list.len(), list.segment_count()), (10, 1));
    list.widen();
    assert_eq!((list.len(), list.slice_at(0).len()), (131_072, 131_072));
    pool.put(list);
    assert!(pool.is_whole());
}

#[test]
fn a_view_reaches_the_parents_bytes() {
    let mut pool = pool();
    let mut list = pool.alloc(131_072 + 4096).unwrap();
    list.fill(0);
    // SAFETY: the parent is not touched until the view is gone.
    let mut view = unsafe { list.view(131_070, 4) };
    assert!(view.has_views());
    view.write_at(0, &[1, 2, 3, 4]);
    drop(view);
    let mut out = [0; 6];
    list.read_at(131_069, &mut out);
    assert_eq!(out, [0, 1, 2, 3, 4, 0]);
    assert!(!list.has_views());
}
