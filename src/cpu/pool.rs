//! Private threads: never rayon's global pool, never before the first large step, rebuilt after a fork.
//!
//! [`Threads::spread`] is how a step uses them. The calling thread works, too, and never waits for one that has not
//! begun: sleeping threads take tens of microseconds to wake, as long as a step of some 100,000 elements takes.
//!
//! ```text
//! cut the tasks into one stretch for each thread
//! open a gate, call the others
//! work: one's own stretch from its start on, then what is left of the others'
//! close the gate: who comes later goes home, who is inside finishes its task
//! ```

use std::any::Any;
use std::cell::Cell;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::isa::StandardFloats;

/// A pool and the process it belongs to. Dropping a pool that a fork copied would wait for threads that
/// do not exist in the child, so pools are never dropped.
#[derive(Debug, Clone)]
struct Owned {
    process: u32,
    pool: ManuallyDrop<Arc<ThreadPool>>,
}

impl Owned {
    /// Whether it is one of this process with so many threads.
    fn has(&self, count: usize) -> bool {
        self.process == std::process::id() && self.pool.current_num_threads() == count
    }
}

/// All pools of the process, one per thread count, shared between optimizers.
static POOLS: Mutex<Vec<Owned>> = Mutex::new(Vec::new());

fn build(count: usize) -> Option<Owned> {
    let threads = ThreadPoolBuilder::new().num_threads(count).thread_name(|i| format!("roptim-{i}"));
    // A thread begins with the arithmetic of the one that made it.
    let pool = threads.start_handler(|_| StandardFloats::keep()).build().ok()?;
    Some(Owned { process: std::process::id(), pool: ManuallyDrop::new(Arc::new(pool)) })
}

fn shared(count: usize) -> Option<Owned> {
    // A fork can copy the lock while another thread holds it: then this process makes a pool of its own.
    let Ok(mut pools) = POOLS.try_lock() else { return build(count) };
    if let Some(found) = pools.iter().find(|p| p.has(count)) {
        return Some(found.clone());
    }
    let made = build(count)?;
    pools.push(made.clone());
    Some(made)
}

/// The pool of so many threads that is kept, brought up to date.
fn kept(kept: &mut Option<Owned>, count: usize) -> Option<&ThreadPool> {
    if kept.as_ref().is_none_or(|pool| !pool.has(count)) {
        *kept = shared(count);
    }
    kept.as_ref().map(|owned| &**owned.pool)
}

thread_local! {
    static LIMIT: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// Bounds the number of threads of whatever the calling thread asks for from now on; returns the bound before.
pub fn limit(threads: usize) -> usize {
    LIMIT.replace(threads.max(1))
}

/// The number of threads of an optimizer, and its pools once there are some.
#[derive(Debug)]
pub struct Threads {
    count: usize,
    /// As many threads as the count.
    whole: Option<Owned>,
    /// One less: the calling thread works, too.
    others: Option<Owned>,
    /// Reused from call to call.
    stretches: Vec<Stretch>,
    /// The last call's, for the next one unless somebody is late for it.
    gate: Arc<Gate>,
}

impl Threads {
    /// `count` threads, or by default what `ROPTIM_NUM_THREADS` says, or as many as the process may use
    /// (its affinity and its quota).
    pub fn new(count: Option<usize>) -> Self {
        let from_environment = || std::env::var("ROPTIM_NUM_THREADS").ok()?.trim().parse().ok().filter(|&n| n > 0);
        let available = || std::thread::available_parallelism().map_or(1, usize::from);
        let count = count.or_else(from_environment).unwrap_or_else(available).max(1);
        Self { count, whole: None, others: None, stretches: Vec::new(), gate: Arc::default() }
    }

    /// How many, within what [`limit`] says for the calling thread.
    pub fn count(&self) -> usize {
        self.count.min(LIMIT.get())
    }

    /// The pool, if the work is large and more than one thread is asked for. Where the system refuses
    /// threads, the step runs on the calling thread.
    pub fn pool(&mut self, large: bool) -> Option<&ThreadPool> {
        let count = self.count();
        if !large || count == 1 { None } else { kept(&mut self.whole, count) }
    }

    /// Calls `f(0), …, f(tasks − 1)`, each once, on the calling thread and on others. The calling thread begins with the
    /// same tasks at every call, and with two threads so does the other, so that what a small step works on stays in
    /// the cache of one core.
    ///
    /// Panics if one of the calls does, after all that were begun have ended.
    pub fn spread(&mut self, tasks: usize, f: impl Fn(usize) + Sync) {
        let count = self.count();
        let others = count.min(tasks).saturating_sub(1);
        let pool = if others > 0 { kept(&mut self.others, count - 1) } else { None };
        let Some(pool) = pool else { return (0..tasks).for_each(f) };
        self.stretches.clear();
        self.stretches
            .extend((0..=others).map(|k| Stretch::new(k * tasks / (others + 1), (k + 1) * tasks / (others + 1))));
        let call = Call { f: &f, stretches: &self.stretches, arrived: AtomicUsize::new(1) };
        let lent = Lent((&raw const call).cast());
        // Who is late for a call before must find the gate closed that it was called to.
        match Arc::get_mut(&mut self.gate) {
            Some(gate) => *gate = Gate::default(),
            None => self.gate = Arc::default(),
        }
        let gate = &self.gate;
        let closing = Closing(gate);
        for _ in 0..others {
            let gate = Arc::clone(gate);
            pool.spawn(move || {
                gate.pass(|| {
                    // SAFETY: the gate lets nobody in once it is closed. `closing` closes it before `call` goes, on a
                    // panic as well, and waits for who is inside: `call` is there.
                    let call = unsafe { &*lent.address() };
                    call.work(call.arrived.fetch_add(1, Ordering::Relaxed));
                });
            });
        }
        call.work(0);
        drop(closing);
        let panicked = gate.panicked.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(payload) = panicked {
            resume_unwind(payload);
        }
    }
}

/// Neighbouring tasks that one thread begins with, alone in its cache line.
#[derive(Debug)]
#[repr(align(64))]
struct Stretch {
    next: AtomicUsize,
    end: usize,
}

impl Stretch {
    fn new(start: usize, end: usize) -> Self {
        Self { next: AtomicUsize::new(start), end }
    }
}

/// What the threads of one call share.
struct Call<'a> {
    f: &'a (dyn Fn(usize) + Sync),
    stretches: &'a [Stretch],
    arrived: AtomicUsize,
}

/// The address of a call, for threads that may come when it is over.
#[derive(Clone, Copy)]
struct Lent(*const Call<'static>);

// SAFETY: an address; the duty is its user's.
unsafe impl Send for Lent {}

impl Lent {
    /// The whole of it, so that a closure captures what may be sent.
    fn address<'a>(self) -> *const Call<'a> {
        self.0.cast()
    }
}

impl Call<'_> {
    fn work(&self, me: usize) {
        let count = self.stretches.len();
        for Stretch { next, end } in (0..count).map(|k| &self.stretches[(me + k) % count]) {
            loop {
                let task = next.fetch_add(1, Ordering::Relaxed);
                if task >= *end {
                    break;
                }
                (self.f)(task);
            }
        }
    }
}

/// Lets threads into a call until it is closed.
#[derive(Debug, Default)]
struct Gate {
    /// [`CLOSED`] or 0, and [`ONE`] for each thread inside.
    state: AtomicUsize,
    panicked: Mutex<Option<Box<dyn Any + Send>>>,
}

const CLOSED: usize = 1;
const ONE: usize = 2;

impl Gate {
    /// Does the work, unless the gate is closed.
    fn pass(&self, work: impl FnOnce()) {
        if self.state.fetch_add(ONE, Ordering::Acquire) & CLOSED == 0
            && let Err(payload) = catch_unwind(AssertUnwindSafe(work))
        {
            *self.panicked.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
        }
        self.state.fetch_sub(ONE, Ordering::Release);
    }

    /// Lets nobody in any more and waits for who is inside: for one task each, or all that are left after a panic here.
    fn close(&self) {
        const TURNS_BEFORE_YIELDING: usize = 1000;
        self.state.fetch_or(CLOSED, Ordering::Relaxed);
        let mut turns = 0;
        while self.state.load(Ordering::Acquire) != CLOSED {
            turns += 1;
            if turns < TURNS_BEFORE_YIELDING { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }
}

struct Closing<'a>(&'a Gate);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn each_task_is_done_once_before_the_call_ends() {
        for count in [1, 2, 3, 8] {
            let mut threads = Threads::new(Some(count));
            for tasks in [0, 1, 2, 7, 100, 1000] {
                let done: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                threads.spread(tasks, |i| {
                    if i % 97 == 0 {
                        std::thread::sleep(Duration::from_micros(50));
                    }
                    done[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(done.iter().all(|n| n.load(Ordering::Relaxed) == 1), "{count} threads, {tasks} tasks");
            }
        }
    }

    #[test]
    fn a_panic_arrives_after_the_others_have_ended() {
        for culprit in [0, 5, 63] {
            let mut threads = Threads::new(Some(4));
            let (begun, ended) = (AtomicUsize::new(0), AtomicUsize::new(0));
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                threads.spread(64, |i| {
                    begun.fetch_add(1, Ordering::SeqCst);
                    std::thread::sleep(Duration::from_micros(100));
                    if i == culprit {
                        ended.fetch_add(1, Ordering::SeqCst);
                        panic!("task {i}");
                    }
                    ended.fetch_add(1, Ordering::SeqCst);
                });
            }));
            assert!(outcome.is_err());
            assert_eq!(begun.load(Ordering::SeqCst), ended.load(Ordering::SeqCst));
            let fine = AtomicUsize::new(0);
            threads.spread(8, |_| _ = fine.fetch_add(1, Ordering::SeqCst));
            assert_eq!(fine.into_inner(), 8, "the threads work on");
        }
    }

    #[test]
    fn a_limit_holds_for_the_thread_that_set_it() {
        let threads = Threads::new(Some(4));
        let before = limit(2);
        assert_eq!(threads.count(), 2);
        assert_eq!(std::thread::scope(|s| s.spawn(|| threads.count()).join().unwrap()), 4);
        assert_eq!(limit(before), 2);
        assert_eq!(threads.count(), 4);
    }

    #[test]
    fn calls_from_several_threads_at_once() {
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let mut threads = Threads::new(Some(3));
                    for _ in 0..200 {
                        threads.spread(9, |i| _ = total.fetch_add(i, Ordering::Relaxed));
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 200 * 36);
    }
}
