//! The threads of the CPU backend: parallel loops with about a microsecond of overhead.
//!
//! A step has some seventy parallel regions of 10 µs to 1 ms each, so workers spin for a while after each before they
//! sleep. A region ends when its tasks are done and the workers *inside it* have left: a worker that the system has
//! descheduled delays nobody.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an idle worker spins before it sleeps.
const SPIN: Duration = Duration::from_micros(100);

type Job = dyn Fn(usize, usize) + Sync;

/// `threads - 1` workers and the calling thread.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    /// Bit 0: the region is open to workers; bits 1..16: workers inside; the rest: the region's number.
    state: AtomicU64,
    /// The open region's work; written only while no region is open and no worker inside.
    region: UnsafeCell<Region>,
    next_task: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
}

#[derive(Clone, Copy)]
struct Region {
    job: Option<*const Job>,
    tasks: usize,
}

// SAFETY: `region` is read only between a successful join (Acquire of the store that opened the region) and the leave,
// and written only when the state says that nobody is inside.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

const OPEN: u64 = 1;
const WORKER: u64 = 2;
const WORKERS_MASK: u64 = 0xfffe;
const EPOCH_SHIFT: u32 = 16;

impl Pool {
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            region: UnsafeCell::new(Region { job: None, tasks: 0 }),
            next_task: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
        });
        let workers = (1..threads.clamp(1, 1024))
            .map_while(|index| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("cpu-{index}"))
                    .spawn(move || shared.work(index))
                    .ok()
            })
            .collect();
        Self { shared, workers }
    }

    /// Threads that run a region, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `job(task, thread)` for every task in `0..tasks`, in any order, on all threads; returns when all are done.
    /// `thread` is below [`threads`](Pool::threads) and held by one call at a time.
    pub fn run(&mut self, tasks: usize, job: impl Fn(usize, usize) + Sync) {
        if tasks <= 1 || self.workers.is_empty() {
            (0..tasks).for_each(|task| job(task, 0));
            return;
        }
        let shared = &*self.shared;
        let job: &(dyn Fn(usize, usize) + Sync) = &job;
        // SAFETY: lengthens the lifetime only; the pointer is dropped below, before `job` goes.
        let job: *const Job = unsafe { std::mem::transmute::<&(dyn Fn(usize, usize) + Sync), *const Job>(job) };
        // SAFETY: no region is open and nobody is inside (the previous `run` waited for that).
        unsafe { *shared.region.get() = Region { job: Some(job), tasks } };
        shared.next_task.store(0, Ordering::Relaxed);
        let epoch = (shared.state.load(Ordering::Relaxed) >> EPOCH_SHIFT) + 1;
        shared.state.store(epoch << EPOCH_SHIFT | OPEN, Ordering::Release);
        fence(Ordering::SeqCst);
        if shared.sleepers.load(Ordering::Relaxed) > 0 {
            let _guard = shared.sleep.lock().unwrap_or_else(PoisonError::into_inner);
            shared.wake.notify_all();
        }

        shared.drain(0);
        let mut state = shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0u32;
        while state & WORKERS_MASK != 0 {
            spins += 1;
            // A worker that lost its core mid-task needs ours to get on.
            if spins.is_multiple_of(4096) {
                std::thread::yield_now()
            } else {
                std::hint::spin_loop()
            }
            state = shared.state.load(Ordering::Acquire);
        }
        // SAFETY: closed and empty.
        unsafe { (*shared.region.get()).job = None };
        assert!(
            !shared.panicked.swap(false, Ordering::Relaxed),
            "a task of a parallel region panicked"
        );
    }
}

impl Shared {
    fn drain(&self, thread: usize) {
        // SAFETY: called inside a region only.
        let Region { job: Some(job), tasks } = (unsafe { *self.region.get() }) else {
            return;
        };
        // SAFETY: `run` keeps the job alive until everyone has left.
        let job = unsafe { &*job };
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let task = self.next_task.fetch_add(1, Ordering::Relaxed);
                if task >= tasks {
                    break;
                }
                job(task, thread);
            }
        }));
        if result.is_err() {
            self.panicked.store(true, Ordering::Relaxed);
        }
    }

    fn work(&self, thread: usize) {
        let mut last_epoch = 0;
        let mut idle_since: Option<Instant> = None;
        let mut spins = 0u32;
        while !self.stop.load(Ordering::Relaxed) {
            let state = self.state.load(Ordering::Acquire);
            let epoch = state >> EPOCH_SHIFT;
            if state & OPEN != 0 && epoch != last_epoch {
                if self
                    .state
                    .compare_exchange_weak(state, state + WORKER, Ordering::AcqRel, Ordering::Relaxed)
                    .is_ok()
                {
                    self.drain(thread);
                    self.state.fetch_sub(WORKER, Ordering::Release);
                    last_epoch = epoch;
                    idle_since = None;
                    spins = 0;
                }
                continue;
            }
            std::hint::spin_loop();
            spins += 1;
            if !spins.is_multiple_of(128) {
                continue;
            }
            if idle_since.get_or_insert_with(Instant::now).elapsed() > SPIN {
                self.park(last_epoch);
                idle_since = None;
            }
        }
    }

    fn park(&self, last_epoch: u64) {
        let guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let idle = |_: &mut ()| {
            let state = self.state.load(Ordering::Acquire);
            !(self.stop.load(Ordering::Relaxed) || state & OPEN != 0 && state >> EPOCH_SHIFT != last_epoch)
        };
        drop(
            self.wake
                .wait_while(guard, idle)
                .unwrap_or_else(PoisonError::into_inner),
        );
        self.sleepers.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        drop(self.shared.sleep.lock().unwrap_or_else(PoisonError::into_inner));
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker's panic was already reported by `run`.
            let _ = worker.join();
        }
    }
}

/// A pointer that tasks of one region share, each writing its own part.
pub struct Shards<T>(*mut T, usize);

// SAFETY: tasks write disjoint parts (the contract of `slice`), and `T` may move between threads.
unsafe impl<T: Send> Send for Shards<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shards<T> {}

impl<T> Shards<T> {
    pub fn new(of: &mut [T]) -> Self {
        Self(of.as_mut_ptr(), of.len())
    }

    /// # Safety
    /// No two live slices overlap, and none outlives the borrow that made `self`.
    #[expect(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(
            start <= self.1 && len <= self.1 - start,
            "part of a region out of bounds"
        );
        // SAFETY: in bounds; disjoint by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }

    pub fn as_ptr(&self) -> *mut T {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_exactly_once() {
        let mut pool = Pool::new(4);
        for tasks in [0, 1, 2, 3, 100, 1000] {
            for _ in 0..50 {
                let mut hits = vec![0u8; tasks];
                let shards = Shards::new(&mut hits);
                // SAFETY: one element per task.
                pool.run(tasks, |task, _| unsafe { shards.slice(task, 1)[0] += 1 });
                assert!(hits.iter().all(|&n| n == 1), "{tasks} tasks: {hits:?}");
            }
        }
    }

    #[test]
    fn workers_wake_after_sleeping() {
        let mut pool = Pool::new(3);
        for _ in 0..5 {
            let sum = AtomicUsize::new(0);
            pool.run(64, |task, _| {
                sum.fetch_add(task, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 2016);
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn a_panicking_task_reaches_the_caller_and_the_pool_survives() {
        let mut pool = Pool::new(2);
        let result = catch_unwind(AssertUnwindSafe(|| pool.run(8, |task, _| assert!(task != 5))));
        assert!(result.is_err());
        let count = AtomicUsize::new(0);
        pool.run(8, |_, _| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 8);
    }
}
