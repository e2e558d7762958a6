//! Private threads: never rayon's global pool, never before the first large step, rebuilt after a fork.

use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// A pool and the process it belongs to. Dropping a pool that a fork copied would wait for threads that
/// do not exist in the child, so pools are never dropped.
#[derive(Debug, Clone)]
struct Owned {
    process: u32,
    pool: ManuallyDrop<Arc<ThreadPool>>,
}

/// All pools of the process, one per thread count, shared between optimizers.
static POOLS: Mutex<Vec<Owned>> = Mutex::new(Vec::new());

fn build(count: usize) -> Option<Owned> {
    let pool = ThreadPoolBuilder::new().num_threads(count).thread_name(|i| format!("roptim-{i}")).build().ok()?;
    Some(Owned { process: std::process::id(), pool: ManuallyDrop::new(Arc::new(pool)) })
}

fn shared(count: usize) -> Option<Owned> {
    // A fork can copy the lock while another thread holds it: then this process makes a pool of its own.
    let Ok(mut pools) = POOLS.try_lock() else { return build(count) };
    let here = std::process::id();
    if let Some(found) = pools.iter().find(|p| p.process == here && p.pool.current_num_threads() == count) {
        return Some(found.clone());
    }
    let made = build(count)?;
    pools.push(made.clone());
    Some(made)
}

/// The number of threads of an optimizer, and its pool once there is one.
#[derive(Debug)]
pub struct Threads {
    count: usize,
    pool: Option<Owned>,
}

impl Threads {
    /// `count` threads, or by default what `ROPTIM_NUM_THREADS` says, or as many as the process may use
    /// (its affinity and its quota).
    pub fn new(count: Option<usize>) -> Self {
        let from_environment = || std::env::var("ROPTIM_NUM_THREADS").ok()?.trim().parse().ok().filter(|&n| n > 0);
        let available = || std::thread::available_parallelism().map_or(1, usize::from);
        Self { count: count.or_else(from_environment).unwrap_or_else(available).max(1), pool: None }
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The pool, if the work is large and more than one thread is asked for. Where the system refuses
    /// threads, the step runs on the calling thread.
    pub fn pool(&mut self, large: bool) -> Option<&ThreadPool> {
        if !large || self.count == 1 {
            return None;
        }
        if self.pool.as_ref().is_none_or(|p| p.process != std::process::id()) {
            self.pool = shared(self.count);
        }
        self.pool.as_ref().map(|p| &**p.pool)
    }
}
